"""Files written piece by piece are what the safetensors library reads and writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pixart_ds.engine.storage import FolderStorage
from pixart_ds.engine.tensors import FileRecord, TensorSpec, problem, record, write_tensors
from pixart_ds.errors import MachineError

TENSORS = {
    "weight": torch.arange(15.0).view(3, 5).t(),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.empty(0),
    "scalar": torch.tensor(7),
}
GOLDEN = (427, "e3cf1c2442cc7363eeeea53bb338d8e0")


def _write(path: Path) -> FileRecord:
    specs = [TensorSpec.of(name, tensor) for name, tensor in TENSORS.items()]
    return write_tensors(FolderStorage(path.parent), path.name, specs, lambda: iter(TENSORS.values()))


def test_the_library_reads_what_was_streamed(tmp_path: Path) -> None:
    written = _write(tmp_path / "a.safetensors")
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert written == record(FolderStorage(tmp_path), "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_bytes_do_not_change_between_versions(tmp_path: Path) -> None:
    """Golden: what one version wrote, the next must recognise."""
    written = _write(tmp_path / "a.safetensors")
    assert (written.num_bytes, written.checksum) == GOLDEN


@pytest.mark.parametrize("wrong", [torch.zeros(5, 2), torch.zeros(5, 3, dtype=torch.float64)])
def test_a_tensor_that_is_not_as_announced_leaves_no_file(tmp_path: Path, wrong: torch.Tensor) -> None:
    storage, specs = FolderStorage(tmp_path), [TensorSpec.of("weight", TENSORS["weight"])]
    with pytest.raises(ValueError, match="weight is"):
        write_tensors(storage, "a", specs, lambda: [wrong])
    with pytest.raises(ValueError, match="shorter"):
        write_tensors(storage, "a", specs, list)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="cannot write a.safetensors: No such file or directory"):
        _write(tmp_path / "gone" / "a.safetensors")


def test_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written = _write(path)
    assert problem(FolderStorage(tmp_path), written, whole=True) is None
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert problem(FolderStorage(tmp_path), written, whole=False) is None
    assert "is damaged" in str(problem(FolderStorage(tmp_path), written, whole=True))
    path.write_bytes(data[:-1])
    assert (
        problem(FolderStorage(tmp_path), written, whole=False)
        == f"a.safetensors has {len(data) - 1} bytes instead of {len(data)}"
    )
    path.unlink()
    assert problem(FolderStorage(tmp_path), written, whole=False) == "a.safetensors is missing"
    assert FileRecord.from_json(written.name, written.to_json()) == written
