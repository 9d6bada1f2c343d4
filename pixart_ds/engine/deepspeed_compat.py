"""Every work-around for the pinned DeepSpeed; each has a test that fails when a release makes it needless.

The numbers and line references are those of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import datetime
import logging
import os
import warnings
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

ALL_GATHER_WARNING = r"`?torch\.distributed\.all_gather_into_tensor"
"""torch ≥ 2.13 deprecates a function that DeepSpeed calls in every step, on every rank."""


def load() -> ModuleType:
    """The `deepspeed` module; imported here only, after `prepare`, because its import decides about the accelerator."""
    import deepspeed

    return deepspeed


def prepare(device: Literal["cpu", "cuda"]) -> None:
    """Imports DeepSpeed without a word on the terminal, and makes its CPU accelerator fit for tests and the demo."""
    os.environ["DS_ACCELERATOR"] = device  # else it warns that it found no GPU
    warnings.filterwarnings("ignore", message=ALL_GATHER_WARNING, category=FutureWarning)
    load()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device == "cpu":
        from deepspeed.accelerator import set_accelerator

        set_accelerator(cpu_accelerator())


def cpu_accelerator() -> CPU_Accelerator:
    """DeepSpeed's CPU accelerator, allowing fp16 and never compiling anything.

    fp16: DeepSpeed asks whether oneDNN has fp16 kernels (avx512_fp16) and refuses otherwise, although torch computes in
    fp16 on any CPU. Compiling: at every first connection it builds a C++ extension for `inference_all_reduce`, which
    training never uses: 43 s, a compiler needed, and a lock that hangs the next start for ever if the build was killed.
    """
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class PatientCPU(CPU_Accelerator):  # type: ignore[misc]
        def is_fp16_supported(self) -> bool:
            return True

        def create_op_builder(self, op_name: str) -> Any:
            return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)

    return PatientCPU()


def connect(backend: Literal["gloo", "nccl"], timeout: datetime.timedelta) -> None:
    """torch's process group and DeepSpeed's, from the environment; without MPI discovery, which would import mpi4py."""
    load().init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    give_clone_a_timeout(timeout)


def give_clone_a_timeout(timeout: datetime.timedelta) -> None:
    """Makes the group that ZeRO communicates in, with our timeout.

    DeepSpeed clones the world group without passing the timeout on (utils/groups.py, `_clone_world_group`), so a lost
    peer would be noticed after gloo's 30 or NCCL's 10 minutes whatever was asked for.
    """
    from deepspeed.utils import groups

    groups._WORLD_GROUP = dist.new_group(range(dist.get_world_size()), timeout=timeout)


def initialise(
    net: torch.nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], device: torch.device
) -> Any:
    """`deepspeed.initialize` on a device: DeepSpeed takes LOCAL_RANK for the device's number unless it is told."""
    args = SimpleNamespace(device_rank=device.index) if device.type == "cuda" else None
    engine, *_ = load().initialize(args=args, model=net, optimizer=optimizer, config=config)
    return engine


def stop_reducing_in_backward(engine: Any) -> None:
    """DeepSpeed's hooks leave `.grad` alone and reduce nothing: the gradients are summed and reduced by our engine.

    Its own ways need the same number of micro-batches on every rank, or sum in 16 bit.
    """
    engine.optimizer._coalesce_grad_reduction = True
    engine.enable_backward_allreduce = False


def give_gradient(engine: Any, group: int) -> torch.Tensor:
    """The flat fp32 buffer in which DeepSpeed's `step` looks for this rank's part of the gradient; fill it in place."""
    buffer = engine.optimizer._build_compact_grad_partition_buffer(group)
    engine.optimizer.averaged_gradients[group] = buffer
    flat: torch.Tensor = buffer.flat_partition
    return flat


def reduce_scatter(output: torch.Tensor, whole: torch.Tensor, group: Any) -> None:
    """Gives each rank its equal part of the sum over all ranks, under the name that this torch does not warn about."""
    function = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in torch 2.13
    function(output, whole, group=group)


def keep_going_at_minimum_scale(engine: Any) -> None:
    """Lets fp16 skip at the minimum loss scale, as bf16 and fp32 skip.

    DeepSpeed raises a bare Exception there; `StepResult.consecutive_skips` lets the loop end with a reason.
    """
    engine.optimizer.loss_scaler.raise_error_at_min_scale = False
