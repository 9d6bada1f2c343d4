"""The verbs `export` and `import`: weights out of a run into other projects' forms, and back."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from pathlib import Path
from typing import Any

from pixart_ds.config.load import apply_overrides
from pixart_ds.data.shards import first_set
from pixart_ds.engine.foreign import DIT_LICENCE, UNKNOWN_LICENCE, read_foreign
from pixart_ds.engine.handover import save_handover
from pixart_ds.engine.weights import licences_of, open_weights
from pixart_ds.errors import ConfigError
from pixart_ds.layout import RunLayout


def export_weights(options: Namespace) -> dict[str, Any]:
    """Writes weights as a diffusers pipeline or under the official names; returns what was written where."""
    from pixart_ds.export.diffusers import export_pipeline
    from pixart_ds.export.official import write_official

    weights = open_weights(options.source, stage=options.stage, kind=options.weights)
    out = options.out or _default_out(options)
    licences = licences_of(weights.lineage)
    prepared = first_set(weights.stage)
    about = {
        "source": str(weights.where),
        "stage": weights.stage.name if weights.stage else None,
        "weights": weights.kind,
        "model": weights.model.model_dump(mode="json"),
        "clean_captions": prepared.description.clean_captions if prepared else weights.clean_captions,
        "licences": licences,
        "lineage": weights.lineage,
    }
    if options.format == "diffusers":
        vae = weights.encoder("vae", options.vae, prepared.description.vae if prepared else None)
        text_encoder = weights.encoder(
            "text_encoder", options.text_encoder, prepared.description.text_encoder if prepared else None
        )
        if not options.dry_run:
            export_pipeline(out, weights.model, weights.state, vae=vae, text_encoder=text_encoder, about=about)
    elif not options.dry_run:
        write_official(out, weights.model, weights.state, about=about)
    return {key: about[key] for key in ("source", "stage", "weights", "licences")} | {"out": str(out)}


def import_weights(options: Namespace) -> dict[str, Any]:
    """Writes foreign weights as a handover that stages, `sample` and `export` start from; returns what was found."""
    model: dict[str, Any] = apply_overrides({}, options.sets)
    foreign = read_foreign(options.source, image_size=options.image_size, model=model)
    default = DIT_LICENCE if foreign.model.kind == "dit" else UNKNOWN_LICENCE
    inherited = foreign.note.get("licences", []) or licences_of(foreign.note.get("lineage", {}))
    licence = options.licence or "; ".join(inherited) or default
    lineage = {
        "source": "import",
        "path": str(options.source.absolute()),
        "sha256": _sha256(options.source) if options.source.is_file() else None,
        "layout": foreign.layout,
        "licence": licence,
    }
    if foreign.note:
        lineage["from"] = foreign.note.get("lineage")
    if not options.dry_run:
        save_handover(options.out, foreign.states, lineage, foreign.model)
    return {
        "out": str(options.out),
        "weights": list(foreign.states),
        "layout": foreign.layout,
        "licence": licence,
        "model": foreign.model.model_dump(mode="json", exclude_none=True),
    }


def _default_out(options: Namespace) -> Path:
    run = RunLayout(options.source)
    if options.format == "official" or not run.manifest.exists():
        raise ConfigError("nothing says where to write", remedy="add --out: a folder, or for --format official a file")
    return run.export


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
