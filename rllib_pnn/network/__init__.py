"""The progressive network itself: columns, laterals, adapters, the column store. Plain torch, no Ray."""
