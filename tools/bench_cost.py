"""How long the cost report of a run with thousands of attempts takes, beside reading every line of its ledger as JSON.

python tools/bench_cost.py [--attempts 10000] [--lines 5]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pixart_ds import files
from pixart_ds.layout import RunLayout
from pixart_ds.ledger.entries import Entry

ROOT = Path(__file__).resolve().parents[1]


def make_run(folder: Path, attempts: int, lines: int) -> RunLayout:
    """A run of one stage, each attempt with so many lines and a column of Slurm's account beside."""
    run = RunLayout(folder / "run")
    stage = run.stage("stage1")
    for number in range(1, attempts + 1):
        attempt = stage.attempt(number)
        attempt.root.mkdir(parents=True)
        began = 1e6 + 4000.0 * number
        entry = Entry.start("stage1", number, 1, "cuda", 64, began, 1000 * number)
        about = {"device_kind": "v100-sxm2", "job": str(number), "user": "ada", "hosts": [f"n{n}" for n in range(8)]}
        written = []
        for line in range(lines):
            until = began + 3600.0 * (line + 1) / lines
            parts = {"startup": 60.0, "productive": until - began - 90, "checkpoint": 20.0}
            ended = {"outcome": "stopped", "cause": "walltime"} if line == lines - 1 else {}
            values = {
                **entry.to_json(),
                **about,
                "until": until,
                "images_to": 1000 * number + 900,
                "parts": parts,
                **ended,
            }
            written.append(json.dumps(values))
        attempt.ledger.write_text("\n".join(written) + "\n")
    files.write_json(run.manifest, {"stages": ["stage1"], "chain": "bench"})
    return run


def seconds(work: Callable[[], object], rounds: int = 5) -> float:
    """The least of some rounds."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def read_all(run: RunLayout) -> None:
    """The peer: every line of every attempt."""
    for attempt in run.stage("stage1").all_attempts():
        for line in attempt.ledger.read_text().splitlines():
            json.loads(line)


def report(run: RunLayout, form: str) -> None:
    """The command that a person types."""
    script = ROOT / "tools" / "cost_report.py"
    command = [sys.executable, str(script), str(run.root), "--no-sacct", "--format", form]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Prints a line for each format, and the ratio to the peer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attempts", type=int, default=10_000)
    parser.add_argument("--lines", type=int, default=5, help="of each attempt's ledger")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), options.attempts, options.lines)
        peer = seconds(lambda: read_all(run))
        print(f"{options.attempts} attempts of {options.lines} lines; every line read as JSON: {peer:.2f} s")
        for form in ("text", "json", "csv", "md", "html"):
            took = seconds(partial(report, run, form), 3)
            print(f"  {form:<5} {took:5.2f} s, process included; ratio to the peer {took / peer:.2f}")


if __name__ == "__main__":
    main()
