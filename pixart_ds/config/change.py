"""What a run trains may change while it is under way, if a person says so by name: recorded in the run, and in the lineage."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pixart_ds import files
from pixart_ds.config import deepspeed
from pixart_ds.config.freeze import read_stage
from pixart_ds.config.load import apply_overrides, differences, dump_yaml, identity, validate
from pixart_ds.config.schema import StageConfig
from pixart_ds.errors import CheckpointError, ConfigError
from pixart_ds.layout import RunLayout, StageLayout

KINDS = ("recipe", "dataset", "precision")
"""Names by which a change is allowed."""

_DATASET = ("data.", "order.")
_FIXED = ("name", "model.", "init.", "seed", "global_batch_size", "checkpoint.path")


@dataclass(frozen=True)
class Change:
    """One recorded change of a stage.

    Attributes:
        allowed: The kinds that a person has named.
        differences: `key: old → new`; empty where only the content of a set has changed.
        before: The stage as it was, all keys.
        when: ISO time.
    """

    allowed: tuple[str, ...]
    differences: tuple[str, ...]
    before: dict[str, Any]
    when: str

    @property
    def stage_before(self) -> StageConfig:
        return validate(StageConfig, self.before, "changes.jsonl")

    def told(self) -> dict[str, Any]:
        """For the lineage."""
        return {"allowed": list(self.allowed), "differences": list(self.differences), "when": self.when}


def change_stage(
    run: RunLayout, name: str, overrides: Sequence[str], allowed: Sequence[str], *, dry_run: bool = False
) -> list[str]:
    """Changes a stage of a run for all attempts to come.

    Args:
        run: The run; nothing may train the stage meanwhile.
        name: The stage.
        overrides: `key.path=value`. None, with `dataset` allowed, says that a set's own content has changed.
        allowed: Of `KINDS`: which differences are meant.
        dry_run: Only say what would change.

    Returns:
        `key: old → new` for each.

    Raises:
        ConfigError: A difference is of a kind that is not allowed, or can never change within a stage; all at once. Nothing has
            changed then.
    """
    stage, layout = read_stage(run, name), run.stage(name)
    if layout.done.exists():
        raise ConfigError(f"{name} is done; a change would never be trained", where=layout.done)
    changed = validate(
        StageConfig, apply_overrides(stage.model_dump(mode="json", exclude_none=True), overrides), "--set"
    )
    lines = differences(identity(stage), identity(changed))
    if problems := _not_allowed(lines, allowed):
        raise ConfigError(
            f"{len(problems)} of {len(lines)} differences are not allowed:\n" + "\n".join(f"  - {t}" for t in problems),
            where=layout.config,
            remedy="add --allow with the names given, or start a new run",
        )
    if not lines and "dataset" not in allowed:
        raise ConfigError("nothing would change", where=layout.config, remedy="give --set KEY=VALUE")
    merged = _merged(layout, stage, changed)
    if dry_run:
        return lines
    record = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        "allowed": list(allowed),
        "differences": lines,
        "before": stage.model_dump(mode="json"),
    }
    files.append_json_line(layout.changes, record)  # first: a change that is not told of must not be trained
    files.write_json(layout.deepspeed, merged)
    files.write_text(layout.config, dump_yaml(changed))
    return lines


def _merged(layout: StageLayout, stage: StageConfig, changed: StageConfig) -> dict[str, Any]:
    """DeepSpeed's keys of the changed stage: the run's own file, in which a person may have edited what the recipe does not own."""
    if changed.execution.deepspeed != stage.execution.deepspeed:
        return deepspeed.merge(changed, deepspeed.load_deepspeed(changed.execution.deepspeed))
    frozen = files.read_json(layout.deepspeed, error=ConfigError)
    for key, (value, _) in deepspeed.owned(stage).items():
        *sections, last = key.split(".")
        section: Any = frozen
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        # one that was edited otherwise is told of as a clash
        if isinstance(section, dict) and section.get(last) == value:
            section[last] = "auto"
    return deepspeed.merge(changed, frozen, layout.deepspeed)


def _not_allowed(lines: Sequence[str], allowed: Sequence[str]) -> list[str]:
    problems = []
    for line in lines:
        kind = kind_of(line.split(":", 1)[0])
        if kind is None:
            problems.append(f"{line} (never within a stage: a new run can start from this one's weights, init.path)")
        elif kind not in allowed:
            problems.append(f"{line} (--allow {kind})")
    return problems


def kind_of(key: str) -> str | None:
    """By which name a difference in a dotted key is allowed; None for never."""
    if key.startswith(_FIXED):
        return None
    if key == "precision":
        return "precision"
    return "dataset" if key.startswith(_DATASET) else "recipe"


def read_changes(layout: StageLayout) -> list[Change]:
    """The recorded changes of a stage, oldest first."""
    return [
        Change(tuple(row["allowed"]), tuple(row["differences"]), row["before"], row["when"])
        for row in files.read_json_lines(layout.changes)
    ]


def changes_since(
    layout: StageLayout,
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    saved_data: Mapping[str, Any],
    data: Mapping[str, Any],
    where: str,
    lineage: Mapping[str, Any] | None = None,
) -> list[Change]:
    """The recorded changes that lie between a checkpoint and the stage as it is now.

    A change accounts for what was trained otherwise once: a checkpoint whose lineage tells of it is from after it.

    Args:
        layout: The stage.
        saved, now: `identity` of the stage that wrote the checkpoint, and of today's; keys that the first does not have, because an
            older version wrote it, are left out.
        saved_data, data: What the sets were, and are: one JSON value for each path, and `order`.
        where: The checkpoint.
        lineage: The checkpoint's.

    Raises:
        CheckpointError: They differ, and no recorded change accounts for it; every difference is listed.
    """
    lines = _known_differences(saved, now)
    data_lines = differences(saved_data, data) if saved_data.get("order") != data["order"] else []
    if not lines and not data_lines:
        return []
    taken = [_about(told) for told in (lineage or {}).get("changes", [])]
    changes = [change for change in read_changes(layout) if _about(change.told()) not in taken]
    for number, change in enumerate(changes):
        if not _known_differences(saved, identity(change.stage_before)):
            later = changes[number:]
            if data_lines and not any("dataset" in each.allowed for each in later):
                break
            return later
    kinds = sorted(
        {kind_of(line.split(":", 1)[0]) or "never" for line in lines} | ({"dataset"} if data_lines else set())
    )
    raise CheckpointError(
        "the checkpoint was trained otherwise:\n" + "\n".join(f"  - {line}" for line in [*lines, *data_lines]),
        where=where,
        remedy="put recipe and sets back as they were; or say that the change is meant: "
        f"pixart-ds change RUN {layout.root.name} --allow {' --allow '.join(kinds)} [--set KEY=VALUE]",
    )


def _about(told: Mapping[str, Any]) -> list[Any]:
    """What tells a change from others."""
    return [told["when"], told["allowed"], told["differences"]]


def _known_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`differences` in what the saved one knows, at any depth."""
    return differences(saved, _restricted(now, saved))


def _restricted(value: Mapping[str, Any], to: Mapping[str, Any]) -> dict[str, Any]:
    restricted = {}
    for key, known in to.items():
        if key in value:
            inner = value[key]
            both = isinstance(inner, Mapping) and isinstance(known, Mapping)
            restricted[key] = _restricted(inner, known) if both else inner
    return restricted
