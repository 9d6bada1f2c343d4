"""`chain` beside a queue that changes while it looks; the real one is in tests/slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixart_ds.cluster.chain import Wishes, run_chain
from pixart_ds.config.freeze import create_run
from pixart_ds.config.load import load_chain
from pixart_ds.config.profile import load_profile
from pixart_ds.errors import MachineError

_HELD = "PENDING|JobHeldUser||pixart-ds waits for"


@pytest.mark.parametrize("becomes", ["begun", "waiting", "gone"])
def test_a_job_that_begins_before_it_is_mended_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, becomes: str
) -> None:
    """The supervisor of the stage before releases it at the same moment. What Slurm refuses otherwise is told."""
    run = create_run(tmp_path / "run", load_chain("smoke/chain"), "smoke/chain")
    run.stage("stage1").done.parent.mkdir(parents=True, exist_ok=True)
    run.stage("stage1").done.write_text("{}")
    later = {"begun": "echo '7|RUNNING|None||'", "waiting": f"echo '7|{_HELD} stage1'", "gone": "true"}[becomes]
    programs = {
        "squeue": f"""case "$*" in
            *-stage2-*) if [ -e {tmp_path}/asked ]; then {later}; else echo '7|{_HELD} stage1'; fi;;
            *-stage3*) echo '8|{_HELD} stage2';;
        esac""",
        "scontrol": f"touch {tmp_path}/asked; echo 'Job is no longer pending execution' >&2; exit 1",
    }
    for name, does in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def go() -> list[tuple[str, str]]:
        found = run_chain(run, load_profile("test-cluster"), Wishes({}), lambda *_, **__: None)
        return [(done.action.do, done.action.why) for done in found]

    if becomes == "begun":
        assert go()[:2] == [("nothing", "is done"), ("leave", "has begun meanwhile")]
    else:
        with pytest.raises(MachineError, match="JobId=7: Job is no longer pending execution"):
            go()
