"""DeepSpeed's JSON: the recipe owns what is trained and fills in "auto"; the file owns the loss scale of fp16.

What else DeepSpeed knows has no effect on our engine, or would harm it, and is refused (docs/deepspeed.md).
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pixart_ds import files
from pixart_ds.config.schema import StageConfig
from pixart_ds.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent.parent
FOLDERS = (_PACKAGE.parent / "ds_configs", _PACKAGE / "ds_configs")
"""Beside the package in a checkout, inside it once installed."""

_ABSENT = object()

_IN_BACKWARD = "it has no effect: the engine sums and reduces the gradients itself, not in DeepSpeed's buckets"
_IN_ONE_CALL = "it has no effect: DeepSpeed gathers the weights in one call"
_FP32 = "masters, moments and EMA are fp32: in 16 bit a step or an EMA's share of it rounds to nothing"

_NOT_OURS: dict[str, str] = {
    "optimizer": "AdamW with the EMA is the engine's, its numbers are the recipe's (optimizer.*)",
    "scheduler": "the learning rate follows from the recipe (optimizer.warmup_steps, decay_fraction)",
    "elasticity": "DeepSpeed 0.19 has removed it; a checkpoint resumes at any world as it is",
    "torch_autocast": "in fp16 it clips scaled gradients and never recovers from an overflow; use precision",
    "amp": "DeepSpeed 0.19 has removed it; use precision",
    "activation_checkpointing": "DeepSpeed's breaks on tensors that blocks share; use execution.checkpointed_blocks",
    "checkpoint": "checkpoints are written in our own format, not in DeepSpeed's",
    "data_efficiency": "the order of the data is ours (order.*)",
    "curriculum_learning": "the order of the data is ours (order.*)",
    "communication_data_type": "gradients are summed and reduced in fp32 by the engine",
    "prescale_gradients": "every sample already weighs 1 / global_batch_size",
    "gradient_predivide_factor": "every sample already weighs 1 / global_batch_size",
    "zero_optimization.offload_optimizer": "the flat shards that checkpoints are made of must stay on the device",
    "zero_optimization.offload_param": "it belongs to ZeRO-3",
    "zero_optimization.zenflow": "the flat shards that checkpoints are made of must stay on the device",
    "zero_optimization.elastic_checkpoint": "it is dead in DeepSpeed 0.19; a checkpoint resumes at any world as it is",
    "zero_optimization.parameter_alignment": "checkpoints need the parameters back to back in the flat shards",
    "zero_optimization.reduce_bucket_size": _IN_BACKWARD,
    "zero_optimization.contiguous_gradients": _IN_BACKWARD,
    "zero_optimization.overlap_comm": _IN_BACKWARD,
    "zero_optimization.reduce_scatter": _IN_BACKWARD,
    "zero_optimization.use_multi_rank_bucket_allreduce": _IN_BACKWARD,
    "zero_optimization.ignore_unused_parameters": _IN_BACKWARD,
    "zero_optimization.allgather_bucket_size": _IN_ONE_CALL,
    "zero_optimization.allgather_partitions": _IN_ONE_CALL,
    "zero_optimization.compute_grad_norm": "the norm is what clips a gradient and refuses one that is not finite",
    "bf16.check_grad_overflow": "without the check a NaN would be applied to the weights",
    "bf16.bf16_master_weights_and_grads": _FP32,
    "bf16.bf16_optimizer_states": _FP32,
    "fp16.fp16_master_weights_and_grads": _FP32,
    "fp16.auto_cast": "the nets cast what they are given; sizes and ratios must enter in fp32",
}
"""Sections and keys that a DeepSpeed file must not have, with the reason."""

_SCALE_KEYS: dict[str, tuple[int, int | None]] = {
    "loss_scale": (0, None),
    "initial_scale_power": (0, 32),
    "loss_scale_window": (1, None),
    "hysteresis": (1, None),
    "min_loss_scale": (1, None),
}
"""Whole numbers of the fp16 section, with the least and the most that each may be."""

_OTHER_KEYS = ("train_batch_size", "fp16.consecutive_hysteresis")


def load_deepspeed(name_or_path: str) -> dict[str, Any]:
    """Reads a DeepSpeed file as it is, "auto" included.

    Args:
        name_or_path: `zero2_v100_32gb` (a file of ds_configs/) or a path to a JSON file.

    Raises:
        ConfigError: There is no such file, or it is no JSON object.
    """
    path = _find(name_or_path)
    values = files.read_json(path, error=ConfigError)
    if not isinstance(values, dict):
        raise ConfigError(f"a DeepSpeed file is a JSON object, not a {type(values).__name__}", where=path)
    return values


def _find(name_or_path: str) -> Path:
    given = Path(name_or_path)
    if given.suffix == ".json" or len(given.parts) > 1:
        if given.is_file():
            return given
        raise ConfigError(
            f"there is no DeepSpeed file {given.name}", where=given.absolute(), remedy="mend execution.deepspeed"
        )
    for folder in FOLDERS:
        if (path := folder / f"{name_or_path}.json").is_file():
            return path
    known = sorted({path.stem for folder in FOLDERS for path in folder.glob("*.json")})
    raise ConfigError(
        f"there is no DeepSpeed file called {name_or_path!r}",
        where="execution.deepspeed",
        remedy=f"use one of: {', '.join(known)}; or give a path that ends in .json",
    )


def owned(stage: StageConfig) -> dict[str, tuple[Any, str]]:
    """DeepSpeed keys that are not the file's to choose: dotted key → (value, who says so)."""
    micro = "the engine, which runs micro-batches itself (execution.micro_batch_size)"
    exact = "the engine, whose sums are final and in fp32"
    return {
        "train_micro_batch_size_per_gpu": (1, micro),
        "gradient_accumulation_steps": (1, micro),
        "gradient_clipping": (stage.optimizer.gradient_clipping, "the recipe's optimizer.gradient_clipping"),
        "fp16.enabled": (stage.precision == "fp16", f"the recipe's precision {stage.precision}"),
        "bf16.enabled": (stage.precision == "bf16", f"the recipe's precision {stage.precision}"),
        "zero_optimization.stage": (2, "the engine, which is written for ZeRO-2"),
        "zero_optimization.round_robin_gradients": (False, "the checkpoints, which it would silently corrupt"),
        "gradient_allreduce_op": ("sum", exact),
        "data_types.grad_accum_dtype": ("fp32", exact),
        "zero_allow_untested_optimizer": (True, "the engine, whose optimizer is its own"),
        "steps_per_print": (10**9, "the engine, which reports the steps itself"),
    }


def merge(stage: StageConfig, raw: Mapping[str, Any], where: object | None = None) -> dict[str, Any]:
    """Fills a DeepSpeed file's "auto" from the recipe. Merging a merged one again changes nothing.

    Args:
        stage: The recipe.
        raw: DeepSpeed's keys.
        where: Where `raw` comes from, for the message; by default the recipe's execution.deepspeed.

    Raises:
        ConfigError: All at once: every disagreement between file and recipe with both sides, every key that must not be
            there with the reason, every key that nothing reads, every "auto" that nothing fills.
    """
    merged: dict[str, Any] = copy.deepcopy(dict(raw))
    problems = [f"{key}: remove it; {reason}" for key, reason in _NOT_OURS.items() if _get(merged, key) is not _ABSENT]
    if _get(merged, "zero_optimization.stage") is _ABSENT:
        problems.append("zero_optimization.stage: it is missing; write 2")
    if "train_batch_size" in merged:
        problems.append("train_batch_size: remove it; it follows from the number of ranks")
    for key, (value, origin) in owned(stage).items():
        given = _get(merged, key)
        if given is _ABSENT or given == "auto":
            clash = _set(merged, key, value)
            if clash is not None:
                problems.append(clash)
        elif given != value or isinstance(given, bool) != isinstance(value, bool):
            problems.append(
                f'{key}: the file says {_json(given)}, but {_json(value)} is due ({origin}); write "auto"'
                " or take another file"
            )
    problems += _unread(merged, {*owned(stage), *_OTHER_KEYS, *(f"fp16.{key}" for key in _SCALE_KEYS)})
    problems += _bad_scale(merged)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(
            f"{count} between the DeepSpeed file and the recipe {stage.name}:\n"
            + "\n".join(f"  - {line}" for line in problems),
            where=where or f"execution.deepspeed: {stage.execution.deepspeed}",
        )
    return merged


def _get(values: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return _ABSENT
        values = values[part]
    return values


def _set(values: dict[str, Any], key: str, value: Any) -> str | None:
    """Sets a dotted key; says what is wrong if a section on the way is none."""
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            return f"{section}: a section is due, the file says {_json(values)}"
    values[last] = value
    return None


def _unread(values: Mapping[str, Any], known: set[str]) -> list[str]:
    """A line for each key that is not known, nor refused for a reason of its own: DeepSpeed would pass over it in silence."""
    lines = []
    for key in _leaves(values):
        if key in known or any(key == refused or key.startswith(f"{refused}.") for refused in _NOT_OURS):
            continue
        if any(name.startswith(f"{key}.") for name in known):
            continue  # no section where one is due: said already
        close = difflib.get_close_matches(key, known, n=1)
        lines.append(f"{key}: nothing reads this key; " + (f"did you mean {close[0]}?" if close else "remove it"))
    return lines


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys that hold no section."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _bad_scale(values: Mapping[str, Any]) -> list[str]:
    """A line for each number of the fp16 section that DeepSpeed would refuse only on the ranks, or not at all."""
    lines = []
    for key, (least, most) in _SCALE_KEYS.items():
        given = _get(values, f"fp16.{key}")
        whole = isinstance(given, int) and not isinstance(given, bool)
        if given is not _ABSENT and not (whole and given >= least and (most is None or given <= most)):
            limits = f"from {least} on" if most is None else f"{least} to {most}"
            lines.append(f"fp16.{key}: a whole number {limits} is due, the file says {_json(given)}")
    refill = _get(values, "fp16.consecutive_hysteresis")
    if refill is not _ABSENT and not isinstance(refill, bool):
        lines.append(f"fp16.consecutive_hysteresis: true or false is due, the file says {_json(refill)}")
    return lines


def _json(value: Any) -> str:
    return (
        {True: "true", False: "false", None: "null"}.get(value, repr(value))
        if isinstance(value, bool | None)
        else repr(value)
    )
