"""A run whose budget is used up in the middle of a stage: warned, stopped at a checkpoint, refused, raised, trained to its end."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pixart_ds import files
from pixart_ds.cluster.launchers import LocalLauncher
from pixart_ds.cluster.supervise import Timing, supervise
from pixart_ds.config.budget import change_budget
from pixart_ds.layout import CheckpointName, RunLayout, StageLayout
from pixart_ds.ledger.book import read_book
from tests.e2e.test_demo import call
from tests.e2e.test_same_run import create, prepare_small, start

pytestmark = pytest.mark.e2e

STEPS, ENOUGH, SOON_S = 400, 10, 3.0
"""Steps of the stage, after how many of them so much is taken from its budget that at least 85 % are used, and most seconds that
this leaves: however long the ranks took to start, the stop comes before their last step.
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small(tmp_path_factory.mktemp("data"))


def budget(run: Path, *words: str) -> dict[str, Any]:
    answer = call("budget", run, "--json", *words)
    assert answer.returncode == 0, answer.stderr
    return dict(json.loads(answer.stdout))


def cut(stage: StageLayout, over: threading.Event) -> None:
    """Lowers the budget once the stage has made some steps."""
    while not over.wait(0.05):
        row = files.last_json_line(stage.attempt(1).metrics)
        if row is not None and row["images_seen"] >= 32 * ENOUGH:
            run = RunLayout(stage.root.parent)
            (entry,) = read_book(run.root).stages["stage1"]
            used_s = time.time() - entry.started
            limit_s = min(used_s / 0.85, used_s + SOON_S)
            change_budget(run, [f"gpu_days={entry.device_count * limit_s / 86400:.9f}"])
            return


def test_a_budget_stops_a_run_at_a_checkpoint_and_raising_it_goes_on(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stage = create(run, data, f"stage1.length.steps={STEPS}", "budget.gpu_days=1", "budget.usd=1000")
    over, output = threading.Event(), io.StringIO()
    cutter = threading.Thread(target=cut, args=(stage, over), daemon=True)
    cutter.start()
    timing = Timing(retries=0, budget_s=0.1)
    code = supervise(run, "stage1", launcher=LocalLauncher(2), device="cpu", output=output, timing=timing)
    over.set()
    cutter.join()
    text = output.getvalue()
    print(text)
    assert code == 75
    assert "% used, " in text
    assert "gpu_days; at this pace used up in" in text
    assert text.index("% used, ") < text.index("budget used up: ")
    said = files.read_json(stage.attempt(1).outcome)
    assert (said["outcome"], said["cause"].split(":")[0]) == ("stopped", "budget used up")
    seen = files.read_json(stage.attempt(1).stopped)["images_seen"]
    assert 32 * ENOUGH <= seen < 32 * STEPS
    assert seen == max(filter(None, map(clock_of, stage.checkpoints.iterdir()))), "saved before it left"
    assert call("checkpoint", "verify", run).returncode == 0

    process = start(run, 2)
    words, _ = process.communicate()
    assert process.returncode == 2, words
    assert "the run's budget is used up: " in words
    assert f"pixart-ds budget {run} --set gpu_days=MORE" in words
    assert len(stage.all_attempts()) == 1
    assert "USED UP; no attempt begins before it is raised" in call("budget", run).stdout
    assert "USED UP; no attempt begins before it is raised" in call("cost", run, "--no-sacct").stdout

    raised = budget(run, "--set", "gpu_days=1")
    assert raised["limits"] == {"gpu_days": 1.0, "usd": 1000.0}
    history = files.read_json(run / "budget.json")["history"]
    assert [each["after"]["gpu_days"] == 1.0 for each in history] == [True, False, True]
    process = start(run, 1)
    words, _ = process.communicate()
    assert process.returncode == 0, words
    assert stage.done.exists()
    audited = call("audit", run, "--stage", "stage1")
    assert audited.returncode == 0, audited.stdout
    clocks = [line["images_seen"] for each in stage.all_attempts() for line in files.read_json_lines(each.audit)]
    assert clocks == list(range(32, 32 * STEPS + 1, 32)), "no step is made twice"


def clock_of(path: Path) -> int | None:
    name = CheckpointName.parse(path.name)
    return None if name is None else name.images_seen
