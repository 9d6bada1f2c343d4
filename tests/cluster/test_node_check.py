"""What the nodes of a job say before its ranks are started."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pixart_ds.cluster.node_check import examine, judge

NODES = ["n1", "n2", "n3"]


def said(host: str, verdict: str = "ok", *failed: str) -> str:
    checks: list[dict[str, Any]] = [{"name": "clock", "verdict": "ok", "evidence": "0.1 s", "remedy": None}]
    checks += [{"name": name, "verdict": "failed", "evidence": "8 GiB", "remedy": "x"} for name in failed]
    return json.dumps({"host": host, "verdict": verdict, "checks": checks, "seconds": 0.4})


def test_nodes_that_fail_and_nodes_that_say_nothing_are_bad() -> None:
    output = "\n".join(
        ["a library's word", said("n1", "warning"), said("n3", "failed", "space", "gpu"), '{"host": "n9"}']
    )
    found = judge(NODES, output, "srun: error: n2: task 1: Killed\n")
    assert found.bad == {"n3": "space: 8 GiB; gpu: 8 GiB", "n2": "the doctor gave no answer there"}
    assert (found.answered, found.said) == (2, "srun: error: n2: task 1: Killed")


def test_where_all_are_well_nothing_is_bad() -> None:
    found = judge(NODES, "\n".join(map(said, NODES)), "a warning")
    assert (found.bad, found.answered, found.said) == ({}, 3, "")


def test_where_none_answers_no_node_is_blamed() -> None:
    found = judge(NODES, "[1]\nnull\n", "srun: error: Unable to create step: Socket timed out")
    assert (found.bad, found.answered) == ({}, 0)
    assert "Socket timed out" in found.said
    assert examine(NODES, Path("run"), "stage1", "cpu", srun="/no/such/srun").answered == 0


def test_the_doctor_is_started_once_on_each_node(tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    srun.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/argv\nprintf "%s\\n" \'{said("n1")}\'\n')
    srun.chmod(0o755)
    found = examine(["n1", "n2"], Path("/runs/first"), "stage2", "cuda", srun=str(srun))
    assert found.bad == {"n2": "the doctor gave no answer there"}
    argv = (tmp_path / "argv").read_text().split("\n")
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n1,n2", "--overlap"} <= set(argv)
    doctor = argv[argv.index(sys.executable) :]
    assert doctor[:-1] == [
        *(sys.executable, "-m", "pixart_ds", "doctor", "/runs/first", "stage2", "--quick", "--device", "cuda", "--json")
    ]
