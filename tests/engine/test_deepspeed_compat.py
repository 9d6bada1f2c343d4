"""Each work-around for the pinned DeepSpeed is still needed, and works; some need ranks: see test_distributed."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pixart_ds.engine import deepspeed_compat as compat


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> None:
    compat.prepare("cpu")


def test_the_pinned_release() -> None:
    assert version("deepspeed") == "0.19.8", (
        "another release: read deepspeed_compat, then the tests of this file, then pin it"
    )


def test_cpu_fp16_is_still_refused_without_help() -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this CPU has fp16 kernels, so DeepSpeed does not refuse")
    assert not CPU_Accelerator().is_fp16_supported(), "needless: PatientCPU.is_fp16_supported"
    assert torch.float16 not in CPU_Accelerator().supported_dtypes()
    ours = compat.cpu_accelerator()
    assert ours.is_fp16_supported()
    assert torch.float16 in ours.supported_dtypes()


class _Builder:
    """Stands for the builder of the C++ extension."""

    NAME = "deepspeed_shm_comm"

    def __init__(self) -> None:
        self.loaded = False

    def load(self) -> None:
        self.loaded = True

    def absolute_name(self) -> str:
        return self.NAME


def test_connecting_still_compiles_without_help(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    backend = importlib.import_module("deepspeed.comm.torch")
    builder = _Builder()
    monkeypatch.setattr(
        CPU_Accelerator, "create_op_builder", lambda self, name: builder if name == "ShareMemCommBuilder" else None
    )
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {_Builder.NAME: True}, raising=False)
    monkeypatch.setattr(backend, "get_accelerator", CPU_Accelerator)
    backend.build_shm_op()
    assert builder.loaded, "needless: PatientCPU.create_op_builder"
    builder.loaded = False
    monkeypatch.setattr(backend, "get_accelerator", compat.cpu_accelerator)
    assert backend.build_shm_op() is None
    assert not builder.loaded


def test_other_operators_can_still_be_built() -> None:
    assert compat.cpu_accelerator().create_op_builder("CPUAdamBuilder") is not None


def test_the_scaler_still_raises_at_its_minimum() -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    def scaler() -> Any:
        return DynamicLossScaler(1.0, 100, 1.0, 1, False, dtype=torch.float32)

    with pytest.raises(Exception, match="already at minimum"):  # needless otherwise: keep_going_at_minimum_scale
        scaler().update_scale(True)
    ours = scaler()
    compat.keep_going_at_minimum_scale(SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=ours)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepspeed.runtime.fp16.loss_scaler.dist.get_rank", lambda: 1)
        ours.update_scale(True)
    assert ours.cur_scale == 1.0


@pytest.mark.parametrize(("device", "wanted"), [(torch.device("cuda", 0), 0), (torch.device("cpu"), None)])
def test_deepspeed_is_told_the_device(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, wanted: int | None
) -> None:
    """It would take LOCAL_RANK for the number, though with --gpus-per-task=1 each rank sees one GPU, number 0."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    assert "device_rank" in DeepSpeedEngine._set_distributed_vars.__code__.co_names
    told: dict[str, Any] = {}

    class Fake:
        @staticmethod
        def initialize(**given: Any) -> tuple[str, None, None, None]:
            told.update(given)
            return "engine", None, None, None

    monkeypatch.setattr(compat, "load", lambda: Fake)
    assert compat.initialise(torch.nn.Linear(1, 1), None, {}, device) == "engine"  # type: ignore[arg-type]
    assert getattr(told["args"], "device_rank", None) == wanted


def test_importing_deepspeed_still_speaks_without_help() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"} | {
        "CUDA_VISIBLE_DEVICES": ""
    }
    told = subprocess.run(
        [sys.executable, "-c", "import deepspeed"], env=environment, capture_output=True, text=True, check=True
    )
    assert "Setting accelerator to CPU" in told.stdout + told.stderr, "needless: DS_ACCELERATOR in `prepare`"
    code = "from pixart_ds.engine.deepspeed_compat import prepare; prepare('cpu')"
    quiet = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert quiet.stdout + quiet.stderr == ""
