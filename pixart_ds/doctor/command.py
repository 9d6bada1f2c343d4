"""The command line of the doctor."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from pixart_ds import files
from pixart_ds.config.freeze import open_run, read_stage
from pixart_ds.config.profile import load_profile
from pixart_ds.doctor import examine
from pixart_ds.doctor.ask import end_all
from pixart_ds.doctor.check import Check, failed, overall
from pixart_ds.doctor.page import page
from pixart_ds.doctor.subject import Subject
from pixart_ds.errors import EXIT_DONE, EXIT_MACHINE, ConfigError
from pixart_ds.layout import RunLayout


def run(options: argparse.Namespace) -> int:
    """Examines, prints, and returns the exit code.

    Raises:
        ConfigError: There is no such run, stage or profile. With --quick a run that is not there is a failure of the node: the
            others see it.
    """
    began = time.monotonic()
    checks: list[Check] = []
    try:
        subject = _subject(options)
    except ConfigError as error:
        if not options.quick or options.run is None or RunLayout(options.run).manifest.exists():
            raise
        subject = _subject(argparse.Namespace(**{**vars(options), "run": None, "stage": None}))
        checks = [failed("machine.run_folder", f"{error.what} ({error.where})", _IF_NOT_SEEN)]
    probes, limits = (examine.QUICK, examine.QUICK_LIMITS) if options.quick else (examine.full(), examine.FULL_LIMITS)
    there = {check.name for check in checks}
    try:
        checks += [each for each in examine.examine(subject, probes, limits) if each.name not in there]
    finally:
        end_all()
    answer = {
        "host": subject.host,
        "verdict": overall(checks),
        "checks": [check.to_json() for check in checks],
        "seconds": round(time.monotonic() - began, 1),
    }
    if not options.json:
        text = page(_about(subject), checks)
    elif options.quick:
        text = one_line(answer, _STEP_LINE if subject.environment.get("SLURM_STEP_ID") else None)
    else:
        text = json.dumps(answer, indent=2, ensure_ascii=False)
    print(text, flush=True)
    return EXIT_MACHINE if answer["verdict"] == "failed" else EXIT_DONE


_IF_NOT_SEEN = "mount the run's file system on this node, or correct RUN"


def _subject(options: argparse.Namespace) -> Subject:
    profile = None if options.profile is None else load_profile(options.profile)
    run = None if options.run is None else open_run(options.run)
    name = options.stage or (None if run is None else _first_to_do(run))
    return Subject(
        device=options.device or (profile.device if profile else "cuda"),
        gpu_required=options.device == "cuda" or "SLURM_JOB_ID" in os.environ,
        run=run,
        stage=None if run is None or name is None else read_stage(run, name),
        profile=profile,
    )


def _first_to_do(run: RunLayout) -> str:
    """The first stage that is not done; if all are, the last."""
    names: list[str] = files.read_json(run.manifest, error=ConfigError)["stages"]
    return next((name for name in names if not run.stage(name).done.exists()), names[-1])


def _about(subject: Subject) -> str:
    parts = [subject.host, subject.device]
    if subject.run is not None and subject.stage is not None:
        parts.append(f"{subject.stage.name} of {Path(subject.run.root)}")
    if subject.job is not None:
        parts.append(f"job {subject.job}")
    return ", ".join(parts)


_STEP_LINE = 1000
"""Bytes: srun passes a task's output on in pieces of 1,024, and mixes those of longer lines with other tasks'."""
_CUT = 160


def one_line(answer: dict[str, Any], limit: int | None) -> str:
    """The answer as one line, of no more than `limit` bytes: then what is no finding goes first, and `left_out` counts it.

    Args:
        answer: With all checks.
        limit: None: as long as it gets.
    """
    bad = [check for check in answer["checks"] if check["verdict"] in ("failed", "warning")]
    bad.sort(key=lambda check: check["verdict"])  # failures before warnings
    short = [{**check, "evidence": check["evidence"][:_CUT], "remedy": None} for check in bad]
    shorter: list[list[dict[str, Any]]] = [answer["checks"], bad, short]
    shorter += [short[:count] for count in range(len(short) - 1, -1, -1)]
    for checks in shorter:
        left_out = len(answer["checks"]) - len(checks)
        said = {**answer, "checks": checks, **({"left_out": left_out} if left_out else {})}
        text = json.dumps(said, ensure_ascii=False)
        if limit is None or len(text.encode()) <= limit:
            break
    return text
