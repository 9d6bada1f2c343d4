"""The supervisor with real processes and real signals; only the ranks are fake."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pixart_ds import files
from pixart_ds.cluster import allocation, guardian, node_check
from pixart_ds.cluster.launchers import LocalLauncher
from pixart_ds.cluster.requests import ASKED, Requests
from pixart_ds.cluster.slurm import JobState, Slurm
from pixart_ds.cluster.supervise import Timing, supervise
from pixart_ds.config.schema import DeadlinesConfig
from pixart_ds.errors import ConfigError, MachineError
from pixart_ds.layout import RunLayout, StageLayout
from pixart_ds.ledger.accounting import whole_parts
from pixart_ds.ledger.book import read_book
from pixart_ds.train.attempt import refuse_others

FAKE = (sys.executable, str(Path(__file__).with_name("fake_rank.py")))


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    # whether the machine has an srun or not, there is none for the jobs of `FakeSlurm`
    monkeypatch.setattr(node_check, "examine", lambda nodes, *_: node_check.Found({}, len(nodes)))
    monkeypatch.setattr(guardian.Guardian, "keep", lambda *_: None)


def until(happens: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def a_run(folder: Path) -> StageLayout:
    run = RunLayout(folder / "run")
    run.stage("stage1").root.mkdir(parents=True)
    run.manifest.write_text(json.dumps({"stages": ["stage1"]}))
    return run.stage("stage1")


def go(
    stage: StageLayout,
    script: str,
    *,
    after: float | None = None,
    signals: tuple[int, ...] = (signal.SIGTERM,),
    then: Callable[[], object] | None = None,
    **more: Any,
) -> tuple[int, str]:
    """Exit code and output of an attempt. Once its ranks are up, `then` happens beside it, and `signals` reach the supervisor one
    by one, `after` seconds apart.
    """
    output = io.StringIO()
    processes = len(script.split(","))
    attempt, over = stage.attempt(len(stage.all_attempts()) + 1), threading.Event()

    def beside() -> None:
        give_up = time.monotonic() + 60  # and go on: a supervisor that is never asked would never end
        while not all((attempt.root / f"env-{rank}.json").exists() for rank in range(processes)):
            if over.wait(0.02) or time.monotonic() > give_up:
                break
        if then is not None:
            then()
        for number in signals if after is not None else ():
            if over.wait(after):
                return  # there are no handlers any more
            names = more["requests"].names
            known = len(names)
            os.kill(os.getpid(), number)
            while len(names) == known and not over.wait(0.01):  # two of a kind that are both pending are one
                pass

    thread = threading.Thread(target=beside, daemon=True)
    launcher = LocalLauncher(processes, extra=("--script", script), command=FAKE)
    more.setdefault("timing", Timing(retries=0))
    if after is not None:
        more["requests"] = Requests()
    thread.start()
    try:
        code = supervise(stage.root.parent, "stage1", launcher=launcher, device="cpu", output=output, **more)
    finally:
        over.set()
        thread.join()
    return code, output.getvalue()


def outcome(stage: StageLayout, attempt: int = 1) -> dict[str, Any]:
    return dict(json.loads(stage.attempt(attempt).outcome.read_text()))


def test_done(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    code, text = go(stage, "done,done")
    assert code == 0
    assert outcome(stage) | {"outcome": "done", "exit_code": 0, "world_size": 2, "device": "cpu"} == outcome(stage)
    assert "rank 0 of 2: done" in text
    assert "rank 1" not in text  # only rank 0's lines are shown
    assert stage.attempt(1).rank_log(1, 1).read_text() == "rank 1 of 2: done\n"
    said = [json.loads((stage.attempt(1).root / f"env-{rank}.json").read_text()) for rank in (0, 1)]
    assert [(e["RANK"], e["LOCAL_RANK"], e["WORLD_SIZE"], e["LOCAL_WORLD_SIZE"]) for e in said] == [
        ("0", "0", "2", "2"),
        ("1", "1", "2", "2"),
    ]
    assert said[0]["MASTER_PORT"] == said[1]["MASTER_PORT"]
    environment = json.loads(stage.attempt(1).env.read_text())
    assert environment["host"] == socket.gethostname()
    assert environment["versions"]["deepspeed"]
    code, text = go(stage, "done,done")
    assert (code, len(stage.all_attempts())) == (0, 1)
    assert "is done already" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_stop_signal_is_passed_on_and_ends_with_75(tmp_path: Path, number: signal.Signals) -> None:
    stage = a_run(tmp_path)
    code, text = go(stage, "save-when-asked,save-when-asked", after=0.7, signals=(number,))
    assert code == 75
    assert outcome(stage)["outcome"] == "stopped"
    assert outcome(stage)["cause"] == number.name
    assert f"attempt 1: stopped ({number.name})" in text
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL  # given back


def test_attempts_are_numbered_and_the_ledger_accounts_for_each(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    go(stage, "save-when-asked,save-when-asked", after=0.7)
    go(stage, "done")
    first, second = read_book(stage.root.parent).stages["stage1"]
    assert [(e.attempt, e.outcome, e.device_count) for e in (first, second)] == [(1, "stopped", 2), (2, "done", 1)]
    assert first.until - first.started > 0.5
    assert sum(whole_parts(first).values()) == pytest.approx(first.until - first.started)
    assert (first.images_from, first.images_to, second.images_from) == (0, 640, 640)


def test_asked_to_stop_but_nothing_saved_is_a_failure_that_may_start_again(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    code, _ = go(stage, "leave-when-asked", after=0.7)
    assert code == 75
    assert outcome(stage)["outcome"] == "failed"
    assert "asked to stop (SIGTERM), but the ranks left without a word" in outcome(stage)["cause"]


def test_a_second_signal_hurries_and_then_kills(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    code, _ = go(
        stage,
        "ignore",
        after=0.5,
        signals=(signal.SIGTERM, signal.SIGTERM),
        timing=Timing(hurry_grace_s=0.3, retries=0),
    )
    assert code == 75
    assert "SIGKILL" in outcome(stage)["cause"]


@pytest.mark.parametrize(
    ("script", "code"), [("exit-2", 2), ("exit-4", 4), ("exit-5", 5), ("exit-70", 70), ("exit-1", 70), ("killed", 70)]
)
def test_a_failing_rank_ends_the_attempt_with_its_last_words(tmp_path: Path, script: str, code: int) -> None:
    stage = a_run(tmp_path)
    assert go(stage, f"leave-when-asked,{script}")[0] == code
    said = outcome(stage)
    assert said["outcome"] == "failed"
    assert (
        "rank 1 was killed by SIGKILL" if script == "killed" else f"rank 1 ended with exit code {script[5:]}"
    ) in said["cause"]
    assert script == "killed" or "the set is damaged" in said["cause"]


def test_peers_that_do_not_leave_are_killed(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    assert go(stage, "ignore,exit-4", timing=Timing(peers_s=0.3))[0] == 4


def test_a_crash_is_followed_by_another_launch_in_the_same_attempt(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    code, text = go(stage, "leave-when-asked-once,killed-once", timing=Timing(peers_s=5, backoff_s=0.1))
    assert code == 0
    said = outcome(stage)
    assert [(each["launch"], each["ending"]) for each in said["launches"]] == [(1, "failed"), (2, "done")]
    assert "rank 1 was killed by SIGKILL" in said["launches"][0]["cause"]
    assert (
        f"launch 1 failed: rank 1 was killed by SIGKILL on {socket.gethostname()}; launch 2 goes on after 0 s" in text
    )
    assert text.count("trains again") == 1, "though the launch is over before anybody looked at its ranks"
    first, second = read_book(stage.root.parent).stages["stage1"]
    assert (first.outcome, second.outcome) == ("failed", "done")
    assert first.until == second.started, "no second of the devices is lost between them"


def test_crashes_without_progress_end_the_attempt_with_the_last_cause(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    code, text = go(stage, "leave-when-asked,exit-70", timing=Timing(backoff_s=0.01, retries=2))
    assert code == 70
    assert len(outcome(stage)["launches"]) == 3
    assert "the set is damaged" in outcome(stage)["cause"]
    assert text.count("goes on after") == 2


def test_a_roll_back_is_followed_at_once(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    code, text = go(stage, "roll-back-once")
    assert code == 0
    assert [each["ending"] for each in outcome(stage)["launches"]] == ["rolled back", "done"]
    assert "launch 1 rolled back; launch 2 goes on" in text


def test_a_stop_while_the_next_launch_is_waited_for_ends_the_attempt(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    code, _ = go(stage, "killed", after=1.0, timing=Timing(backoff_s=60))
    assert code == 75
    assert "asked to stop (SIGTERM), but rank 0 was killed by SIGKILL" in outcome(stage)["cause"]


def test_a_rank_that_dies_in_the_save_that_was_asked_for_is_not_started_again(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    code, _ = go(stage, "leave-when-asked,die-when-asked", after=0.7, timing=Timing(peers_s=5))
    assert code == 75
    said = outcome(stage)
    assert said["outcome"] == "failed"
    assert "asked to stop (SIGTERM), but rank 1 was killed by SIGKILL" in said["cause"]
    assert len(said["launches"]) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = a_run(tmp_path)
    stage.attempts.write_text("in the way")
    with pytest.raises(MachineError, match="the run's folder cannot be written") as caught:
        go(stage, "done")
    assert str(stage.root) in str(caught.value)


class FakeSlurm(Slurm):
    """Answers as Slurm does of a job that runs until `end`; the real one is in tests/slurm."""

    def __init__(self, job: str = "4711", end: float | None = None, **more: Any) -> None:
        super().__init__(job, 0)
        known: dict[str, Any] = {"state": "RUNNING", "reason": None, "restarts": 0, "preempted": False}
        known |= {"end": end, "nodes": "n1", "num_nodes": 1, "gres": {}, "batch_host": "n1"}
        self.now = JobState(**{**known, **more})
        self.told: list[str] = []

    def state(self) -> JobState:
        return self.now

    def requeue(self) -> None:
        self.told.append("requeue")

    def exclude(self, nodes: Sequence[str]) -> None:
        self.told.append(f"exclude {','.join(nodes)}")


def test_a_job_that_saves_nothing_new_again_and_again_is_not_requeued(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    for attempt in (1, 2, 3):
        slurm = FakeSlurm()
        code, text = go(stage, "save-when-asked", after=0.7, timing=Timing(fruitless_attempts=3), slurm=slurm)
        assert (code, slurm.told) == ((0, ["requeue"]) if attempt < 3 else (75, []))
    assert "3 attempts in a row have saved nothing new: the job is not requeued" in text


@pytest.mark.parametrize(
    ("script", "cause", "node"),
    [("killed", "the node n2 was lost", "n2"), ("exit-4", "rank 0 ended with exit code 4", None)],
)
def test_a_node_that_slurm_gave_up_since_the_last_look_is_named(
    tmp_path: Path, script: str, cause: str, node: str | None
) -> None:
    """Unless a rank said what is wrong."""
    stage = a_run(tmp_path)

    class LosesANode(FakeSlurm):
        def state(self) -> JobState:
            lost = (stage.attempt(1).root / "env-0.json").exists()
            return replace(self.now, nodes="n1" if lost else "n[1-2]", num_nodes=1 if lost else 2)

    _, text = go(stage, script, slurm=LosesANode())
    (launch,) = outcome(stage)["launches"]
    assert cause in launch["cause"]
    assert launch["node"] == (node or socket.gethostname())
    assert ("the node n2 was lost" in text) == (node is not None)


def test_near_the_end_of_the_walltime_a_stop_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "_PERIOD_S", 0.1)
    stage = a_run(tmp_path)
    slurm = FakeSlurm(end=time.time() + 3600)

    def shorten() -> None:
        slurm.now = replace(slurm.now, end=time.time() + 3)

    code, text = go(stage, "save-when-asked", then=shorten, timing=Timing(walltime_margin_s=2), slurm=slurm)
    assert (code, outcome(stage)["cause"], slurm.told[0]) == (0, "walltime", "requeue")
    assert "job 4711, start 1, on 1 node n1" in text


def test_a_request_that_came_before_the_ranks_starts_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = a_run(tmp_path)
    monkeypatch.setenv(ASKED, "SIGUSR1")
    slurm = FakeSlurm()
    code, _ = go(stage, "done", requests=Requests(), slurm=slurm)
    assert (code, slurm.told[0]) == (0, "requeue")
    assert (outcome(stage)["outcome"], outcome(stage)["cause"]) == ("stopped", "SIGUSR1, before the ranks were started")
    assert ASKED not in os.environ
    code, _ = go(stage, "done", slurm=FakeSlurm(preempted=True))
    assert outcome(stage, 2)["cause"] == "preemption, before the ranks were started"


def test_a_warning_and_the_preemption_that_it_was_for_are_one_request(tmp_path: Path) -> None:
    """The ranks have the whole grace, and not the little that a person's second Ctrl-C leaves."""
    stage = a_run(tmp_path)
    signals = (signal.SIGUSR1, signal.SIGTERM)
    timing = Timing(hurry_grace_s=0.1, retries=0)
    code, _ = go(stage, "save-late", after=0.5, signals=signals, timing=timing)
    assert (code, outcome(stage)["outcome"]) == (75, "stopped")


def test_a_signal_waits_while_a_process_is_replaced(tmp_path: Path) -> None:
    """Held before exec, it is there for the next process's handlers."""
    code = (
        "import os, signal, sys, time\n"
        "from pixart_ds.cluster.requests import Requests\n"
        "requests = Requests()\n"
        "if len(sys.argv) > 1: print(requests.names); sys.exit()\n"
        "told = requests.hold()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "os.execve(sys.executable, [sys.executable, '-c', open('/proc/self/cmdline').read().split(chr(0))[2], 'again'],"
        " {**os.environ, **told})\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (0, "['SIGUSR1']\n"), answer.stderr


def test_a_rank_that_hangs_is_named_and_all_are_started_again(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    deadlines = DeadlinesConfig(silence=2, step=60, start=60)
    timing = Timing(backoff_s=0.1, stacks_s=2)
    code, text = go(stage, "go-on-once,hang-once", timing=timing, deadlines=deadlines)
    assert code == 0
    assert "launch 1 failed: rank 1 on" in text
    assert "has given no sign of life for" in text
    hang = json.loads(stage.attempt(1).hang(1).read_text())
    assert [each["rank"] for each in hang["culprits"]] == [1]
    assert "go-on-once" in stage.attempt(1).rank_log(1, 0).read_text()
    assert "Current thread" in stage.attempt(1).rank_log(1, 1).read_text(), "its stack"


def test_a_stop_file_from_before_is_refused(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    stage.stop_request.touch()
    with pytest.raises(ConfigError, match="a stop file asks this stage to stop") as caught:
        go(stage, "done")
    assert "remove it to go on" in str(caught.value)
    assert not stage.all_attempts()


def test_a_living_supervisor_is_respected_and_a_dead_one_is_not(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    script = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from pixart_ds.cluster.launchers import LocalLauncher
        from pixart_ds.cluster.supervise import supervise
        launcher = LocalLauncher(1, extra=("--script", "leave-when-asked"), command={FAKE!r})
        supervise(Path({str(stage.root.parent)!r}), "stage1", launcher=launcher, device="cpu")
    """)
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert "rank 0 of 1" in other.stdout.readline()
    until(stage.attempt(1).ledger.exists)  # written after the ranks are started
    with pytest.raises(MachineError, match=f"this stage runs already: pid {other.pid} on {socket.gethostname()}"):
        go(stage, "done")
    ranks = Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()
    other.kill()
    other.wait()
    other.stdout.close()
    for rank in ranks:  # orphaned
        os.kill(int(rank), signal.SIGKILL)
    assert go(stage, "done")[0] == 0
    assert [e.outcome for e in read_book(stage.root.parent).stages["stage1"]] == ["lost", "done"]


def _beat(stage: StageLayout, **more: Any) -> None:
    attempt = stage.attempt(len(stage.all_attempts()) or 1)
    attempt.root.mkdir(parents=True, exist_ok=True)
    said = {"host": "elsewhere", "pid": 7, "time": 0.0, "job": None, **more}
    files.write_json(attempt.heartbeat, said)  # whole at any moment, as the real one


def test_on_another_host_a_heartbeat_must_be_seen_to_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = a_run(tmp_path)
    _beat(stage)
    over = threading.Event()

    def live() -> None:
        while not over.wait(0.2):
            _beat(stage, time=time.time())

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(MachineError, match="this stage runs already: pid 7 on elsewhere, attempt 1"):
            refuse_others(stage, patience_s=30)
    finally:
        over.set()
        thread.join()
    refuse_others(stage, patience_s=1)  # it does not change any more
    os.utime(stage.attempt(1).heartbeat, (1, 1))
    refuse_others(stage, patience_s=3600)  # the file system says that it is old: nothing is waited for
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    _beat(stage, job="4711", restart=0)
    refuse_others(stage, patience_s=3600)  # an earlier start of this job
