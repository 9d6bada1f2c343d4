"""What the tests ask of their Slurm."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pixart_ds import files
from pixart_ds.layout import RunLayout, StageLayout
from pixart_ds.train.pulse import read_pulses
from tests.e2e.test_demo import ROOT, call

SCRIPT = Path(__file__).with_name("cluster.sh")
PROFILES = ROOT / "slurm" / "profiles"

_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


class Cluster:
    """The cluster below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def script(self, *words: str) -> None:
        """Runs cluster.sh."""
        answer = subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True, check=False, timeout=300)
        assert answer.returncode == 0, f"cluster.sh {' '.join(words)}: {answer.stdout}{answer.stderr}"

    def tell(self, *words: object) -> str:
        """Runs one of Slurm's programs; its output."""
        answer = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, timeout=180)
        assert answer.returncode == 0, f"{words}: {answer.stdout}{answer.stderr}"
        return answer.stdout.strip()

    def sbatch(self, *words: object) -> str:
        return self.tell("sbatch", "--parsable", *words).split(";")[0]

    def state(self, job: str) -> str:
        """As the scheduler sees it; PENDING, RUNNING, COMPLETED, …"""
        return self.tell("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")

    def about(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.tell("scontrol", "show", "job", "-o", job)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def wait_state(self, job: str, *states: str, seconds: float = 180) -> str:
        until(lambda: self.state(job) in states, seconds, lambda: f"job {job} is {self.state(job)}, not {states}")
        return self.state(job)

    def wait_over(self, job: str, output: Path, state: str = "COMPLETED", seconds: float = 360) -> str:
        """Until a job is over, and in this state; what it printed."""

        def said() -> str:
            return f"job {job} is {self.state(job)}\n{output.read_text() if output.exists() else 'and printed nothing'}"

        until(lambda: self.state(job) in _OVER, seconds, said)
        assert self.state(job) == state, said()
        return output.read_text() if output.exists() else ""

    def wait_restart(self, job: str, restarts: int, *, kick: bool = True, seconds: float = 240) -> None:
        """Waits until a job runs for the `restarts`-th time again; it need not wait for its turn."""
        until(lambda: int(self.about(job)["Restarts"]) >= restarts, seconds, lambda: f"{self.about(job)}")
        if kick:
            until(lambda: self.state(job) != "COMPLETING", seconds, lambda: f"{self.about(job)}")
            if self.state(job) == "PENDING":
                self.script("kick", job)

    def configure(self, parameters: str) -> None:
        """Gives slurmctld other parameters; `clear` brings the usual ones back."""
        path = self.root / "etc" / "slurm.conf"
        line = f"SlurmctldParameters={parameters}" if parameters else "#SlurmctldParameters="
        text = re.sub(r"^#?SlurmctldParameters=.*$", line, path.read_text(), flags=re.MULTILINE)
        if text != path.read_text():
            path.write_text(text)
            self.tell("scontrol", "reconfigure")

    def clear(self) -> None:
        """Ends all jobs, brings all nodes back, and the usual parameters."""
        self.configure("preempt_send_user_signal")
        self.tell("scancel", "-Q", "-u", "root")
        until(lambda: not self.tell("squeue", "-h"), 180, lambda: self.tell("squeue"))
        for number in range(1, 9):
            pid = self.root / "run" / f"slurmd.n{number}.pid"
            if not (pid.exists() and _alive(pid.read_text().strip())):
                self.script("revive", f"n{number}")
        self.tell("scontrol", "update", "NodeName=n[1-8]", "State=IDLE") if self._down() else None
        until(lambda: not self._down(), 180, lambda: self.tell("sinfo"))

    def _down(self) -> bool:
        return len(self.tell("sinfo", "-hN", "-p", "gpu", "-t", "idle").splitlines()) < 8

    def fill(self, nodes: int, seconds: float = 300) -> str:
        """A job that takes nodes away, at once or by preemption."""
        return self.sbatch(
            "--partition=urgent", f"--nodes={nodes}", "--exclusive", "--output=/dev/null", f"--wrap=sleep {seconds}"
        )


def _alive(pid: str) -> bool:
    """Where process 1 reaps orphans late, a zombie counts as gone."""
    try:
        return re.search(r"^State:\s+[ZX]", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE) is None
    except OSError:
        return False


def until(holds: Callable[[], bool], seconds: float, told: Callable[[], str]) -> None:
    """Waits for something."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, told()
        time.sleep(0.1)


class Training:
    """A run's first stage as a job."""

    def __init__(self, cluster: Cluster, run: Path, *options: object, profile: object = "test-cluster") -> None:
        self.cluster, self.run = cluster, run
        self.stage: StageLayout = RunLayout(run).stage("stage1")
        answer = call("launch", "stage1", "--run", run, "--profile", profile, *options, "--json")
        assert answer.returncode == 0, answer.stderr
        self.submission: dict[str, Any] = json.loads(answer.stdout)
        self.jobs: list[str] = self.submission["jobs"]
        self.job = self.jobs[0]

    def output(self, job: str | None = None) -> str:
        """What the job's script printed."""
        path = self.stage.submissions / f"{job or self.job}.out"
        return path.read_text() if path.exists() else "nothing"

    def wait_images(self, attempt: int, steps: int, seconds: float = 240) -> None:
        """Until an attempt has made so many steps of the stage."""
        metrics = self.stage.attempt(attempt).metrics

        def there() -> bool:
            row = files.last_json_line(metrics) if metrics.exists() else None
            return row is not None and row["images_seen"] >= 32 * steps

        until(there, seconds, lambda: f"no step {steps} in attempt {attempt}:\n{self.output()}")

    def wait_end(self, state: str = "COMPLETED") -> str:
        """Until the job is over; what it printed."""
        return self.cluster.wait_over(self.job, self.stage.submissions / f"{self.job}.out", state)

    def wait_launch(self, attempt: int, launch: int, seconds: float = 240) -> None:
        """Until both ranks of a launch have ended a step: the attempt's metrics may all be those of the launch before."""

        def there() -> bool:
            pulses = read_pulses(self.stage.attempt(attempt), launch)
            return sum(each["images_seen"] is not None for each in pulses) == 2

        until(there, seconds, lambda: f"no step of launch {launch} in attempt {attempt}:\n{self.output()}")

    def outcomes(self) -> list[str | None]:
        """Of each attempt; None for one that left no word."""
        return [
            files.read_json(each.outcome)["outcome"] if each.outcome.exists() else None
            for each in self.stage.all_attempts()
        ]

    def launches(self, attempt: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = files.read_json(self.stage.attempt(attempt).outcome)["launches"]
        return found

    def ranks(self) -> list[int]:
        """Processes of the ranks that live."""
        pattern = f"pixart_ds.train.rank --run {self.run} "
        found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=False).stdout.split()
        mine: list[int] = []
        for pid in map(int, found):
            with suppress(OSError):  # it has ended meanwhile
                if b"srun" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
                    mine.append(pid)
        return mine

    def audited(self) -> dict[str, Any]:
        """The audit's word on the stage, which must be without a finding."""
        answer = call("audit", self.run, "--stage", "stage1", "--json")
        assert answer.returncode == 0, answer.stdout + answer.stderr
        found: dict[str, Any] = json.loads(answer.stdout)["stages"][0]
        return found


def site(folder: Path, more: str) -> Path:
    """A profile of our own: the test cluster's with other keys in place of its own."""
    keys = {line.split(":")[0] for line in more.splitlines() if not line.startswith((" ", "-"))}
    kept = [
        line for line in (PROFILES / "test-cluster.yaml").read_text().splitlines() if line.split(":")[0] not in keys
    ]
    path = folder / "site.yaml"
    path.write_text("\n".join([*kept, more]) + "\n")
    return path
