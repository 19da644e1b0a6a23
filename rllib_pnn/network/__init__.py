"""The progressive network itself: columns, laterals, adapters, the column store. Plain torch, no Ray."""

from rllib_pnn.network.column import ColumnOutput
from rllib_pnn.network.progressive import ProgressiveNetwork
from rllib_pnn.network.spec import LSTM, ColumnSpec, Conv, Dense
from rllib_pnn.network.store import ColumnStore, ColumnStoreError

__all__ = [
    "LSTM",
    "ColumnOutput",
    "ColumnSpec",
    "ColumnStore",
    "ColumnStoreError",
    "Conv",
    "Dense",
    "ProgressiveNetwork",
]
