"""The stage's config against the device that it is to run on."""

from __future__ import annotations

from typing import Any

from pixart_ds.doctor.check import Check, failed, ok, skipped, warning
from pixart_ds.doctor.subject import Subject
from pixart_ds.errors import CheckpointError, ConfigError
from pixart_ds.plan.estimate import Machines, estimate_stage
from pixart_ds.rates import rate_table
from pixart_ds.train.preflight import check_origin, preflight

_GIB = 2**30
_NO_STAGE = "no run was given"
_NO_GPU = "no GPU of rates.yaml is here, and no --profile names one"


def judge_precision(precision: str, gpu: str, *, has_bf16: bool) -> Check:
    """Whether the GPU computes in the recipe's precision."""
    if precision == "bf16" and not has_bf16:
        return failed(
            "config.precision", f"precision bf16, and {gpu} has no bf16 units", "start a run with precision fp16"
        )
    if precision == "fp32":
        return warning(
            "config.precision", f"precision fp32 on {gpu}: its tensor cores are not used", "start a run with fp16"
        )
    return ok("config.precision", f"{precision} on {gpu}")


def judge_memory(estimated: dict[str, Any]) -> Check:
    """Whether micro-batch and checkpointed blocks fit, as `pixart-ds estimate` reckons."""
    way, gpu = estimated["options"]["recipe"], estimated["gpu"]
    usable = estimated["usable_bytes"] / _GIB
    if not way["micro_batch_size"]:
        return failed("config.memory", f"nothing fits {gpu}", "choose a GPU with more memory, or more of them")
    needed = way["memory_bytes"]["total"] / _GIB
    seen = (
        f"micro-batches of {way['micro_batch_size']}, {way['checkpointed_blocks']} blocks checkpointed, on {gpu}: "
        f"{needed:.1f} of {usable:.1f} GiB, estimated"
    )
    if not way["fits"]:
        return failed(
            "config.memory",
            seen,
            f"lower execution.micro_batch_size ({way['largest_micro_batch']} fit), or set it and checkpointed_blocks to auto",
        )
    return ok("config.memory", seen)


def precision(subject: Subject) -> Check:
    if subject.stage is None:
        return skipped("config.precision", _NO_STAGE)
    if subject.device == "cpu":
        return ok("config.precision", f"{subject.stage.precision} on the CPU")
    gpu = subject.gpu_name
    if gpu is None:
        return skipped("config.precision", _NO_GPU)
    return judge_precision(subject.stage.precision, gpu, has_bf16=rate_table().estimate.gpus[gpu].bf16)


def memory(subject: Subject) -> Check:
    if subject.stage is None:
        return skipped("config.memory", _NO_STAGE)
    if subject.device == "cpu":
        return skipped("config.memory", "the stage is to run on the CPU")
    estimated = estimate_of(subject)
    return skipped("config.memory", _NO_GPU) if estimated is None else judge_memory(estimated)


def estimate_of(subject: Subject) -> dict[str, Any] | None:
    """The stage's estimate on the GPUs at hand, or those of the profile; None where there are none."""
    if subject.stage is None or subject.device == "cpu" or subject.gpu_name is None:
        return None
    try:
        return estimate_stage(subject.stage, Machines(subject.gpu_name, subject.nodes, subject.gpus_per_node))
    except ConfigError:  # bf16 on a V100: `precision` says it
        return None


def recipe(subject: Subject) -> Check:
    """What an attempt would refuse at its start: numbers left to auto on a CPU, DeepSpeed's file against the recipe."""
    if subject.run is None or subject.stage is None:
        return skipped("config.recipe", _NO_STAGE)
    preflight(subject.run, subject.stage, subject.device, origin=False, data=False)
    return ok("config.recipe", f"{subject.stage.name} and its DeepSpeed file can run on {subject.device}")


def origin(subject: Subject) -> Check:
    """What the stage starts from is there; that of a stage before may still come."""
    name = "config.origin"
    if subject.run is None or subject.stage is None:
        return skipped(name, _NO_STAGE)
    init = subject.stage.init
    if init.source == "scratch":
        return ok(name, f"{subject.stage.name} starts from scratch")
    try:
        check_origin(subject.run, subject.stage)
    except CheckpointError as error:
        if init.path is not None:
            raise
        return warning(name, error.what, error.remedy or "finish it first")
    return ok(name, f"{subject.stage.name} starts from {init.path or init.stage}, which is there")


FULL = (precision, memory, recipe, origin)
