"""safetensors files written piece by piece, each with a checksum, without a second copy in memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from pixart_ds.errors import MachineError
from pixart_ds.files import write_durable

CHECKSUM = "xxh3_128"
"""Several gigabytes a second on one core: a checksum here finds damage, it is no defence against forgery."""

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """safetensors' name of the dtype."""
        return _NAMES[self.dtype]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorSpec:
        return cls(name, tensor.dtype, tuple(tensor.shape))


@dataclass(frozen=True)
class FileRecord:
    """What a file must look like."""

    name: str
    num_bytes: int
    checksum: str

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.num_bytes, CHECKSUM: self.checksum}

    @classmethod
    def from_json(cls, name: str, values: dict[str, Any]) -> FileRecord:
        return cls(name, int(values["bytes"]), str(values[CHECKSUM]))


def write_tensors(path: Path, specs: Sequence[TensorSpec], tensors: Iterable[torch.Tensor]) -> FileRecord:
    """Writes a durable safetensors file.

    Args:
        path: The file; its folder exists.
        specs: What comes, in order.
        tensors: One at a time, in the same order; on any device.

    Raises:
        ValueError: A tensor is not what its spec says.
        MachineError: The disk refuses.
    """
    digest = xxhash.xxh3_128()
    written = 0

    def counted() -> Iterator[memoryview]:
        nonlocal written
        for piece in _pieces(specs, tensors):
            digest.update(piece)
            written += len(piece)
            yield piece

    try:
        write_durable(path, counted())
    except OSError as cause:
        raise MachineError(
            f"cannot write {path.name}: {cause.strerror or cause}",
            where=path,
            remedy="free or enlarge the disk, then start again",
        ) from cause
    return FileRecord(path.name, written, digest.hexdigest())


def _pieces(specs: Sequence[TensorSpec], tensors: Iterable[torch.Tensor]) -> Iterator[memoryview]:
    yield memoryview(header(specs))
    for spec, tensor in zip(specs, tensors, strict=True):
        if TensorSpec.of(spec.name, tensor) != spec:
            raise ValueError(f"{spec.name} is {tensor.dtype} {tuple(tensor.shape)}, not {spec.dtype} {spec.shape}")
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(raw), _CHUNK_BYTES):
            yield raw[start : start + _CHUNK_BYTES]


def header(specs: Sequence[TensorSpec]) -> bytes:
    """The head of a safetensors file: the JSON's length, and the JSON padded to eight bytes."""
    entries: dict[str, Any] = {}
    at = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": spec.dtype_name,
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.num_bytes],
        }
        at += spec.num_bytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def record(path: Path) -> FileRecord:
    """What a file looks like now; reads it whole."""
    digest = xxhash.xxh3_128()
    count = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            count += len(chunk)
    return FileRecord(path.name, count, digest.hexdigest())


def problem(folder: Path, wanted: FileRecord, *, whole: bool) -> str | None:
    """What is wrong with a file, or None; `whole` also reads it for its checksum."""
    path = folder / wanted.name
    if not path.is_file():
        return f"{wanted.name} is missing"
    if (size := path.stat().st_size) != wanted.num_bytes:
        return f"{wanted.name} has {size} bytes instead of {wanted.num_bytes}"
    if whole and (found := record(path).checksum) != wanted.checksum:
        return f"{wanted.name} is damaged: its {CHECKSUM} is {found} instead of {wanted.checksum}"
    return None
