"""safetensors files written piece by piece, each with a checksum, without a second copy in memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from pixart_ds.engine.storage import Storage, read_into

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
_CHUNK_BYTES = 1 << 22


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


def write_tensors(
    storage: Storage,
    name: str,
    specs: Sequence[TensorSpec],
    tensors: Callable[[], Iterable[torch.Tensor]],
    *,
    new: bool = False,
) -> FileRecord:
    """Writes a durable safetensors file.

    Args:
        storage: Where to.
        name: Of the file.
        specs: What comes, in order.
        tensors: Gives them one at a time, in the same order; on any device. An object store may ask twice.
        new: Take nobody's place.

    Raises:
        ValueError: A tensor is not what its spec says.
        MachineError: The disk or the store refuses.
        FileExistsError: It was to be new, but is there.
    """
    written = FileRecord(name, 0, "")

    def counted() -> Iterator[memoryview]:
        nonlocal written
        digest, count = xxhash.xxh3_128(), 0
        for piece in _pieces(specs, tensors()):
            digest.update(piece)
            count += len(piece)
            yield piece
        written = FileRecord(name, count, digest.hexdigest())

    storage.write(name, counted, new=new)
    return written


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


def read_header(storage: Storage, name: str) -> dict[str, tuple[TensorSpec, int]]:
    """The tensors of a safetensors file: what each is, and where its bytes begin in the file."""
    (length,) = struct.unpack("<Q", b"".join(map(bytes, storage.pieces(name, 0, 8))))
    entries = json.loads(b"".join(map(bytes, storage.pieces(name, 8, length))))
    dtypes = {text: dtype for dtype, text in _NAMES.items()}
    return {
        key: (
            TensorSpec(key, dtypes[entry["dtype"]], tuple(entry["shape"])),
            8 + length + int(entry["data_offsets"][0]),
        )
        for key, entry in entries.items()
        if key != "__metadata__"
    }


def read_elements(storage: Storage, name: str, start: int, out: torch.Tensor) -> None:
    """Fills a contiguous CPU tensor from the bytes of a file that begin at `start`."""
    read_into(storage, name, start, out.reshape(-1).view(torch.uint8).numpy().data)


def record(storage: Storage, name: str) -> FileRecord:
    """What a file looks like now; reads it whole."""
    digest = xxhash.xxh3_128()
    count = 0
    for piece in storage.pieces(name):
        digest.update(piece)
        count += len(piece)
    return FileRecord(name, count, digest.hexdigest())


def problem(storage: Storage, wanted: FileRecord, *, whole: bool) -> str | None:
    """What is wrong with a file, or None; `whole` also reads it for its checksum."""
    size = storage.size(wanted.name)
    if size is None:
        return f"{wanted.name} is missing"
    if size != wanted.num_bytes:
        return f"{wanted.name} has {size} bytes instead of {wanted.num_bytes}"
    if whole and (found := record(storage, wanted.name).checksum) != wanted.checksum:
        return f"{wanted.name} is damaged: its {CHECKSUM} is {found} instead of {wanted.checksum}"
    return None
