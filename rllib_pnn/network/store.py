"""Frozen columns on disk: safetensors and a JSON manifest. Plain torch, no Ray, no pickle.

A store is a folder with `manifest.json` and one `column_NNN.safetensors` a column. A column is written once, when
it is frozen: its file first, then the manifest, each moved into place whole, so that a kill at any moment leaves
the store either without the column or with it. Whatever is read is data from a stranger: sizes, names and shapes are
checked against the manifest before anything is allocated, links are refused, and every column's SHA-256 fingerprint
is compared with the one noted at its freezing. One process writes to a store; any number may read it meanwhile.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, Literal, NoReturn

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save

from rllib_pnn.files import RefusedFile, claim, open_regular, write_whole
from rllib_pnn.network.column import Column, ColumnLayout
from rllib_pnn.network.progressive import ProgressiveNetwork
from rllib_pnn.network.spec import ColumnSpec
from rllib_pnn.text import one_line

FORMAT: Final = "rllib_pnn.columns/1"
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 2**20
MAX_COLUMN_BYTES = 4 * 2**30
MAX_COLUMNS = 10_000

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1, le=2**31)]


class ColumnStoreError(ValueError):
    """A store that can't be read or written; one line that names the file and what differs."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class NetworkEntry(_Model):
    """What all columns of a store share."""

    observation_shape: Annotated[tuple[Size, ...], Field(min_length=1, max_length=3)]
    num_outputs: Size
    spec: dict[str, Any]
    lateral: Literal["adapter", "linear", "none"]
    lateral_scale: float
    lateral_heads: bool
    input_scale: float
    seed: int


class ColumnEntry(_Model):
    """One frozen column: what it is, what it learned, how well, and the fingerprint that proves it unchanged.

    `score` is the mean return per episode, unclipped, at freezing (None: not measured); `num_env_steps` were trained.
    """

    file: Annotated[str, Field(pattern=r"^column_[0-9]{3,5}\.safetensors$")]
    fingerprint: Sha256
    spec: dict[str, Any]
    lateral: Literal["adapter", "linear", "none"]
    lateral_heads: bool
    lateral_scale: float
    num_sources: Annotated[int, Field(ge=0, le=MAX_COLUMNS)]
    input_shift: float = 0.0
    task: Annotated[str, Field(max_length=200)]
    env: Annotated[str, Field(max_length=200)] | None = None
    env_config: dict[str, Any] = {}
    score: float | None = None
    num_env_steps: Annotated[int, Field(ge=0)] | None = None
    extra: dict[str, Any] = {}


class Manifest(_Model):
    format: Literal["rllib_pnn.columns/1"]
    network: NetworkEntry
    columns: Annotated[list[ColumnEntry], Field(max_length=MAX_COLUMNS)]


class ColumnStore:
    """A folder of frozen columns.

    Args:
        path: the folder; created by the first `save_column`.

    >>> store = ColumnStore("run/columns")               # doctest: +SKIP
    >>> network = store.load()                            # doctest: +SKIP
    >>> [entry.task for entry in store.entries]           # doctest: +SKIP
    ['pong', 'h_flip']
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"ColumnStore({str(self.path)!r})"

    def exists(self) -> bool:
        """Whether the folder holds a manifest."""
        return os.path.lexists(self.path / MANIFEST)

    @property
    def manifest(self) -> Manifest:
        """The manifest as it is on disk now. Raises `ColumnStoreError`."""
        path = self.path / MANIFEST
        return _parse_manifest(path, _read(path, MAX_MANIFEST_BYTES))

    @property
    def entries(self) -> list[ColumnEntry]:
        """One entry a column, oldest first; [] if nothing was stored yet. Raises `ColumnStoreError`."""
        return self.manifest.columns if self.exists() else []

    def claim(self, timeout_s: float = 60.0) -> None:
        """Keeps other processes from claiming this store until this one ends; waits for one that is just ending.

        Whoever writes to a store over a long time claims it first: a process that was cut off rather than ended (its
        driver killed, its node lost) could otherwise store a column behind the back of the one that took its place.

        Raises:
            ColumnStoreError: another process held it for `timeout_s`.
        """
        try:
            holder = claim(self.path, timeout_s)
        except OSError as error:
            raise ColumnStoreError(f"{error.filename or self.path}: {error.strerror or error}") from error
        if holder is not None:
            raise ColumnStoreError(f"{self.path}: written to by {holder}; stop it first")

    def save_column(
        self,
        network: ProgressiveNetwork,
        index: int,
        *,
        task: str,
        env: str | None = None,
        env_config: dict[str, Any] | None = None,
        score: float | None = None,
        num_env_steps: int | None = None,
        extra: dict[str, Any] | None = None,
    ) -> ColumnEntry:
        """Stores a frozen column; columns go in in order, and one that is in is never written again.

        Storing a column that the store holds already, with the same fingerprint, changes nothing.

        Args:
            network, index: which column.
            task: name of the task that it learned.
            env, env_config: the environment, `env_config` as plain JSON data.
            score: mean return per episode, unclipped; NaN (no episode ended) counts as not measured.
            num_env_steps: how many it was trained on.
            extra: anything else worth keeping, as plain JSON data.

        Raises:
            ColumnStoreError: not frozen, changed since, out of order, not the column that the store holds under this
                index, or the disk refuses. The store is then as it was.
        """
        if not 0 <= index < network.num_columns:
            raise ColumnStoreError(f"{self.path}: no column {index} in a network of {network.num_columns}")
        column = network.columns[index]
        if column.fingerprint is None:
            raise ColumnStoreError(f"{self.path}: column {index} still trains; freeze() it first")
        try:
            column.verify()
        except ValueError as error:
            raise ColumnStoreError(f"{self.path}: column {index}: {error}") from None
        shared = _network_entry(network)
        manifest = self.manifest if self.exists() else Manifest(format=FORMAT, network=shared, columns=[])
        for name in ("observation_shape", "num_outputs", "input_scale"):
            held, given = getattr(manifest.network, name), getattr(shared, name)
            if held != given:
                raise ColumnStoreError(f"{self.path / MANIFEST}: holds columns of {name} {held}, not {given}")
        if column.input_scale != network.input_scale:
            raise ColumnStoreError(
                f"{self.path}: column {index} scales observations by {column.input_scale}, the network by "
                f"{network.input_scale}; a store holds columns of one scale"
            )
        if index < len(manifest.columns):
            entry = manifest.columns[index]
            if entry.fingerprint != column.fingerprint:
                raise ColumnStoreError(
                    f"{self.path / MANIFEST}: column {index} is stored with fingerprint {entry.fingerprint[:12]}, "
                    f"not {column.fingerprint[:12]}; a stored column is never replaced, use another folder"
                )
            return entry
        if index > len(manifest.columns):
            raise ColumnStoreError(
                f"{self.path / MANIFEST}: holds {len(manifest.columns)} columns, column {index} can't be next"
            )
        layout = column.layout
        plain = {"env_config": dict(env_config or {}), "extra": dict(extra or {})}
        try:
            entry = ColumnEntry(
                file=_file_name(index),
                fingerprint=column.fingerprint,
                spec=layout.spec.to_json(),
                lateral=layout.lateral,  # type: ignore[arg-type]
                lateral_heads=layout.lateral_heads,
                lateral_scale=layout.lateral_scale,
                num_sources=column.num_sources,
                input_shift=layout.input_shift,
                task=task,
                env=env,
                score=float(score) if score is not None and math.isfinite(score) else None,
                num_env_steps=None if num_env_steps is None else int(num_env_steps),
                **json.loads(json.dumps(plain, allow_nan=False)),
            )
            columns = [*manifest.columns, entry]
            text = manifest.model_copy(update={"columns": columns}).model_dump_json(indent=2).encode()
        except (ValidationError, TypeError, ValueError, RecursionError) as error:
            reason = _where_and_what(error) if isinstance(error, ValidationError) else _reason(error)
            raise ColumnStoreError(f"{self.path}: column {index} can't be described as JSON: {reason}") from None
        _parse_manifest(self.path / MANIFEST, text)  # what can't be read again is not written
        tensors = {n: p.detach().to("cpu", torch.float32).contiguous() for n, p in column.named_parameters()}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / entry.file, safetensors_save(tensors))
            write_whole(self.path / MANIFEST, text)
        except OSError as error:
            raise ColumnStoreError(f"{error.filename or self.path}: {error.strerror or error}") from error
        return entry

    def load(self, num_columns: int | None = None) -> ProgressiveNetwork:
        """The network with its (first `num_columns`) columns, all frozen and verified.

        Raises:
            ColumnStoreError: naming the file and what differs.
        """
        manifest = self.manifest
        if num_columns is not None and not 0 <= num_columns <= len(manifest.columns):
            raise ColumnStoreError(
                f"{self.path / MANIFEST}: holds {len(manifest.columns)} columns, {num_columns} were asked for"
            )
        shared = manifest.network
        try:
            network = ProgressiveNetwork(
                shared.observation_shape,
                shared.num_outputs,
                shared.spec,
                lateral=shared.lateral,
                lateral_scale=shared.lateral_scale,
                lateral_heads=shared.lateral_heads,
                input_scale=shared.input_scale,
                seed=shared.seed,
            )
        except (ValueError, OverflowError) as error:
            raise ColumnStoreError(f"{self.path / MANIFEST}: network: {_reason(error)}") from None
        for index, entry in enumerate(manifest.columns[:num_columns]):
            network.append_column(self._load_column(network, index, entry))
        return network

    def verify(self) -> None:
        """Raises `ColumnStoreError` unless every column loads and has its fingerprint."""
        self.load()

    def _load_column(self, network: ProgressiveNetwork, index: int, entry: ColumnEntry) -> Column:
        # The name says which column it is, so that no two entries can share a file.
        if entry.file != _file_name(index):
            raise ColumnStoreError(
                f"{self.path / MANIFEST}: columns.{index}.file: expected {_file_name(index)}, got {entry.file}"
            )
        path = self.path / entry.file
        if entry.num_sources > index:
            raise ColumnStoreError(
                f"{self.path / MANIFEST}: columns.{index}.num_sources: "
                f"expected at most {index}, got {entry.num_sources}"
            )
        try:
            layout = ColumnLayout(
                network.observation_shape,
                network.num_outputs,
                ColumnSpec.parse(entry.spec),
                entry.lateral,
                entry.lateral_heads,
                entry.lateral_scale,
                tuple(column.layout.spec for column in network.columns[: entry.num_sources]),
                entry.input_shift,
            )
            with torch.device("meta"):  # shapes without memory
                column = Column(layout, network.input_scale)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise ColumnStoreError(f"{self.path / MANIFEST}: columns.{index}: {_reason(error)}") from None
        expected = {name: tuple(p.shape) for name, p in column.named_parameters()}
        column.load_state_dict(_read_tensors(path, expected), strict=True, assign=True)
        found = column.compute_fingerprint()
        if found != entry.fingerprint:
            raise ColumnStoreError(
                f"{path}: its fingerprint is {found[:12]}, the manifest says {entry.fingerprint[:12]}: "
                "the file was changed or belongs to another store"
            )
        column.freeze()
        return column


def _network_entry(network: ProgressiveNetwork) -> NetworkEntry:
    return NetworkEntry(
        observation_shape=network.given_observation_shape,
        num_outputs=network.num_outputs,
        spec=network.spec.to_json(),
        lateral=network.lateral,  # type: ignore[arg-type]
        lateral_scale=network.lateral_scale,
        lateral_heads=network.lateral_heads,
        input_scale=network.input_scale,
        seed=network.seed,
    )


def _file_name(index: int) -> str:
    return f"column_{index:03d}.safetensors"


def _parse_manifest(path: Path, text: bytes) -> Manifest:
    try:
        # pydantic's own JSON parser would take NaN, and the last of two equal keys.
        data = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
        return Manifest.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise ColumnStoreError(f"{path}: {_where_and_what(error)}") from None
    except RecursionError:
        raise ColumnStoreError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise ColumnStoreError(f"{path}: not a manifest: {_reason(error)}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _where_and_what(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return _reason(f"{where}: {first['msg']}" if where else first["msg"])


def _read_tensors(path: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The float32 tensors of a safetensors file. Nothing is read, let alone made, unless names, shapes and size fit."""
    with _open(path, MAX_COLUMN_BYTES) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            head = file.read(length)
            header = json.loads(head, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
            header.pop("__metadata__", None)
            found = {name: tuple(t["shape"]) for name, t in header.items()}
            types = {t["dtype"] for t in header.values()}
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ColumnStoreError(f"{path}: damaged or not a safetensors file: {_reason(error)}") from None
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                difference = f"expected shape {expected.get(name, 'none')}, got {found.get(name, 'none')}"
                raise ColumnStoreError(f"{path}: {_reason(f'{name}: {difference}')}")
        if types != {"F32"}:
            found_types = _reason(", ".join(sorted(map(str, types))))
            raise ColumnStoreError(f"{path}: expected float32 tensors (F32), got {found_types}")
        expected_size = 8 + length + 4 * sum(math.prod(shape) for shape in expected.values())
        if size != expected_size:
            raise ColumnStoreError(f"{path}: {size} bytes, expected {expected_size}: cut short or damaged")
        data = b"".join((struct.pack("<Q", length), head, file.read(size - 8 - length)))
    try:
        tensors = safetensors_load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ColumnStoreError(f"{path}: damaged: {_reason(error)}") from None
    # Into memory of torch's own: where a matrix starts decides how its product is rounded (promise 1).
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _read(path: Path, limit: int) -> bytes:
    with _open(path, limit) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def _open(path: Path, limit: int) -> BinaryIO:
    try:
        return open_regular(path, limit)
    except FileNotFoundError:
        raise ColumnStoreError(f"{path}: no such file; expected a column store (a run's `columns` folder)") from None
    except RefusedFile as error:
        raise ColumnStoreError(str(error)) from None


def _reason(message: object) -> str:
    return one_line(message, 300)
