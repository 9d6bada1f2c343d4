"""The verb `checkpoint`: which ones a run has, whether their files are whole, and what stands in one."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from pixart_ds import files
from pixart_ds.config.freeze import open_run, read_stage
from pixart_ds.engine import line
from pixart_ds.engine.storage import storage_of
from pixart_ds.errors import CheckpointError, ConfigError
from pixart_ds.layout import CheckpointName, RunLayout
from pixart_ds.log import si


def list_checkpoints(run: RunLayout, stage: str | None = None) -> list[dict[str, Any]]:
    """One row for each committed checkpoint, oldest first: whether it is on the line, a milestone, the one to go on from."""
    stages = [stage] if stage else files.read_json(run.manifest, error=ConfigError)["stages"]
    rows = []
    for name in stages:
        read_stage(run, name)
        layout = run.stage(name)
        on_line, newest = set(line.line(layout)), line.newest(layout)
        for each in line.committed(layout):
            folder = storage_of(layout).sub(str(each))
            rows.append(
                {
                    "stage": name,
                    "checkpoint": str(each),
                    "images_seen": each.images_seen,
                    "milestone": line.is_milestone(layout, each),
                    "on_line": each in on_line,
                    "newest": each == newest,
                    "bytes": sum(folder.sizes().values()),
                    "path": folder.where,
                }
            )
    return rows


def verify_checkpoints(path: Path | str, stage: str | None = None) -> list[dict[str, Any]]:
    """Reads every file of a checkpoint, or of all of a run, and compares its checksum; `problem` is None if all is whole.

    Raises:
        ConfigError: The folder is neither.
    """
    from pixart_ds.engine.checkpoint import Reader

    rows = []
    for location in _locations(path, stage):
        problem = None
        try:
            Reader.at(location).verify()
        except CheckpointError as error:
            problem = str(error)
        rows.append({"path": location, "problem": problem})
    return rows


def _locations(path: Path | str, stage: str | None) -> list[str]:
    """The checkpoint itself, or all of the run's, those that are not committed included."""
    if CheckpointName.parse(str(path).rstrip("/").rsplit("/", 1)[-1]) is not None:
        return [str(path)]
    run = open_run(Path(path))
    stages = [stage] if stage else files.read_json(run.manifest, error=ConfigError)["stages"]
    found = []
    for name in stages:
        read_stage(run, name)
        storage = storage_of(run.stage(name))
        found += [storage.sub(str(each)).where for each in line.present(run.stage(name))]
    return found


def show_checkpoint(path: Path | str) -> dict[str, Any]:
    """What a checkpoint's manifest says, parameters summed up.

    Raises:
        CheckpointError: It is not committed, or its manifest is damaged.
    """
    from pixart_ds.engine.checkpoint import Reader

    reader = Reader.at(path)
    parts: dict[str, int] = defaultdict(int)
    for place in reader.layout.places:
        parts[place.name.split(".")[0]] += place.count
    manifest = {key: value for key, value in reader.manifest.items() if key not in ("parameters", "fixed")}
    return {
        "path": reader.storage.where,
        **manifest,
        "parameters": sum(parts.values()),
        "parameters_by_part": dict(parts),
        "fixed": [entry["name"] for entry in reader.manifest["fixed"]],
        "files": {entry.name: entry.to_json() for entry in reader.files},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The list for people."""
    if not rows:
        return "there is no committed checkpoint"
    lines = [f"{'stage':<14}{'checkpoint':<34}{'images':>9}{'GB':>8}  "]
    for row in rows:
        notes = [text for key, text in (("milestone", "milestone"), ("newest", "to go on from")) if row[key]]
        notes += [] if row["on_line"] else ["off the line: never read"]
        size, images = row["bytes"] / 1e9, si(row["images_seen"])
        lines.append(f"{row['stage']:<14}{row['checkpoint']:<34}{images:>9}{size:>8.3g}  {', '.join(notes)}")
    return "\n".join(line.rstrip() for line in lines)


def page(shown: dict[str, Any]) -> str:
    """One checkpoint for people."""
    by = shown["written_by"]
    lines = [
        f"{shown['path'].rsplit('/', 1)[-1]}: {si(shown['images_seen'])} images{', a milestone' if shown['milestone'] else ''}",
        f"  written     {shown['written_at']} by attempt {by['attempt']}, launch {by['launch']}, on {shown['world_size']} ranks",
        f"  versions    package {by['package']}, torch {by['torch']}",
        f"  net         {shown['model']['kind']}, {shown['parameters']:,} parameters; beside them: {', '.join(shown['fixed'])}",
        f"  clock       {', '.join(f'{key} {value}' for key, value in shown['clock'].items() if not isinstance(value, dict))}",
        f"  order       {shown['state'].get('order')}",
        f"  recipe      {shown['config']['stage']}; DeepSpeed {shown['config']['deepspeed']}",
        f"  files       {len(shown['files'])}, {sum(entry['bytes'] for entry in shown['files'].values()) / 1e9:.3g} GB",
    ]
    return "\n".join(lines)
