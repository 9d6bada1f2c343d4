"""DeepSpeed's JSON: the recipe owns what is trained and fills in "auto"; the file owns how."""

from __future__ import annotations

import copy
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
}
"""Sections and keys that a DeepSpeed file must not have, with the reason."""


def load_deepspeed(name_or_path: str) -> dict[str, Any]:
    """Reads a DeepSpeed file as it is, "auto" included.

    Args:
        name_or_path: `zero2_fp16` (a file of ds_configs/) or a path to a JSON file.

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
            there with the reason, every "auto" that nothing fills.
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
            problems.append(f'{key}: the file says {_json(given)}, but {_json(value)} is due ({origin}); write "auto"')
    forbidden = tuple(_NOT_OURS)
    for key in _autos(merged):
        if not key.startswith(forbidden) and key != "train_batch_size":
            problems.append(f'{key}: nothing in the recipe fills this "auto"; write a value')
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


def _autos(values: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys whose value is still "auto"."""
    if values == "auto":
        yield prefix
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _autos(value, f"{prefix}.{key}" if prefix else key)
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from _autos(value, f"{prefix}.{index}")


def _json(value: Any) -> str:
    return (
        {True: "true", False: "false", None: "null"}.get(value, repr(value))
        if isinstance(value, bool | None)
        else repr(value)
    )
