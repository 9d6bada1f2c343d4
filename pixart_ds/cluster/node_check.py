"""The doctor's quick half on every node of a job, before its first ranks are started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

_STEP_MINUTES = 2
_TIMEOUT_S = 60.0 * _STEP_MINUTES + 30.0


@dataclass(frozen=True)
class Found:
    """What the nodes said.

    Attributes:
        bad: Nodes with what is wrong with them.
        answered: How many have answered at all.
        said: srun's own words, where too few have.
    """

    bad: dict[str, str]
    answered: int
    said: str = ""


def examine(nodes: Sequence[str], run: Path, stage: str, device: str, srun: str = "srun") -> Found:
    """Runs `pixart-ds doctor --quick` on each of these nodes, one task each; the doctor is a program of its own.

    Args:
        nodes: Of this allocation.
        run, stage, device: What is to be trained on what.
        srun: The program.
    """
    size = len(nodes)
    argv = [
        *(srun, f"--nodes={size}", f"--ntasks={size}", "--ntasks-per-node=1", f"--nodelist={','.join(nodes)}"),
        *("--export=ALL", "--overlap", "--kill-on-bad-exit=0", f"--time={_STEP_MINUTES}"),  # one that hangs ends alone
        *(sys.executable, "-m", "pixart_ds", "doctor", str(run), stage, "--quick", "--device", device, "--json"),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_TIMELIMIT"}
    try:
        answer = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
            start_new_session=True,  # a warning to the job is not to end it
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return Found({}, 0, f"no end within {_TIMEOUT_S:.0f} s")
    except OSError as error:
        return Found({}, 0, str(error))
    return judge(nodes, answer.stdout, answer.stderr)


def judge(nodes: Collection[str], output: str, errors: str) -> Found:
    """The nodes that failed, or that alone did not answer; pure.

    Where none has answered at all, it was not the nodes: nobody is blamed.
    """
    bad: dict[str, str] = {}
    answered: set[str] = set()
    for line in output.splitlines():
        try:
            told = json.loads(line)
        except ValueError:  # a library's own word
            continue
        if not isinstance(told, dict) or told.get("host") not in nodes:
            continue
        host = str(told["host"])
        answered.add(host)
        if told.get("verdict") == "failed":
            failed = [each for each in told.get("checks", ()) if each.get("verdict") == "failed"]
            bad[host] = "; ".join(f"{each['name']}: {each['evidence']}" for each in failed) or "failed"
    if answered:
        bad |= {node: "the doctor gave no answer there" for node in nodes if node not in answered}
    said = errors.strip().splitlines()
    return Found(bad, len(answered), said[-1] if said and len(answered) < len(nodes) else "")
