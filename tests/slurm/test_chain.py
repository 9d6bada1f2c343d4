"""`pixart-ds chain` and `cancel` on a real Slurm: five stages with a preemption, a failure and its repair."""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from pixart_ds import files
from pixart_ds.cluster.jobs import job_name
from pixart_ds.layout import RunLayout
from tests.e2e.test_demo import call
from tests.e2e.test_same_run import create
from tests.slurm.cluster import Cluster, site, until

pytestmark = pytest.mark.slurm

STAGES = ("stage1", "stage2", "stage3_256", "stage3_512", "stage3_1024")


class Chain:
    """The jobs of a run's stages."""

    def __init__(self, cluster: Cluster, run: Path, profile: object = "test-cluster") -> None:
        self.cluster, self.run, self.profile, self.layout = cluster, run, profile, RunLayout(run)

    def go(self, *options: str, code: int = 0) -> dict[str, dict[str, Any]]:
        """`pixart-ds chain RUN`: what it did, by stage."""
        answer = call("chain", self.run, "--profile", self.profile, *options, "--json")
        assert answer.returncode == code, answer.stdout + answer.stderr
        return {each["stage"]: each for each in json.loads(answer.stdout)["stages"]}

    def wait_images(self, stage: str, images: int, seconds: float = 240) -> None:
        def there() -> bool:
            attempts = self.layout.stage(stage).all_attempts()
            row = files.last_json_line(attempts[-1].metrics) if attempts else None
            return row is not None and row["images_seen"] >= images

        until(there, seconds, lambda: f"{stage} has not come to {images} images\n{self.outputs(stage)}")

    def wait_done(self, stage: str, seconds: float = 450) -> None:
        done = self.layout.stage(stage).done
        until(done.exists, seconds, lambda: f"{stage} is not done\n{self.outputs(stage)}\n{self.queue()}")

    def outputs(self, stage: str) -> str:
        return "\n".join(path.read_text() for path in sorted(self.layout.stage(stage).submissions.glob("*.out")))

    def queue(self) -> str:
        return self.cluster.tell("squeue", "-o", "%i %j %T %r %E")

    def jobs(self, stage: str) -> list[str]:
        return self.cluster.tell("squeue", "-h", f"--name={job_name(self.run, stage)}", "-o", "%i").split()


def test_five_stages_with_a_preemption_a_failure_and_a_repair(
    cluster: Cluster, small_set: Path, tmp_path: Path
) -> None:
    link = tmp_path / "set-of-stage3"
    link.symlink_to(small_set)
    create(
        *(tmp_path / "run", small_set, "stage1.length.steps=160", "stage2.length.steps=20"),
        f"stage3_256.data.sets=[{{path: {link}}}]",
    )
    chain = Chain(cluster, tmp_path / "run")
    assert {(each["do"], *each["jobs"]) for each in chain.go("--dry-run").values()} == {("submit",)}
    assert not chain.queue().splitlines()[1:], "it would only"
    first = chain.go()
    assert [each["do"] for each in first.values()] == ["submit"] * 5
    jobs = {stage: first[stage]["jobs"][0] for stage in STAGES}
    for before, stage in itertools.pairwise(STAGES):
        assert f"afterok:{jobs[before]}" in cluster.about(jobs[stage])["Dependency"]
    assert [each["do"] for each in chain.go().values()] == ["leave"] * 5, "the same command changes nothing"

    chain.wait_images("stage1", 32 * 10)
    urgent = cluster.fill(8)
    until(lambda: cluster.state(jobs["stage1"]) == "PENDING", 120, chain.queue)
    assert [each["do"] for each in chain.go().values()] == ["leave"] * 5, "it has been put back, and is waited for"
    cluster.tell("scancel", urgent)
    cluster.wait_restart(jobs["stage1"], 1)
    chain.wait_images("stage2", 32)
    link.unlink()  # as if somebody tidied up
    chain.wait_done("stage2")
    cluster.wait_state(jobs["stage3_256"], "FAILED")

    failed = chain.go(code=70)
    assert [each["do"] for each in failed.values()] == ["nothing", "nothing", "tell", "wait", "wait"]
    assert f"job {jobs['stage3_256']} ended before an attempt began: pixart-ds train: " in failed["stage3_256"]["why"]
    assert str(link) in chain.outputs("stage3_256")
    text = call("chain", chain.run, "--profile", "test-cluster").stdout
    assert f"when the cause is mended: pixart-ds chain {chain.run} --profile test-cluster --retry" in text
    until(lambda: "DependencyNeverSatisfied" in chain.queue(), 120, chain.queue)

    link.symlink_to(small_set)
    cluster.tell("scancel", jobs["stage3_1024"])  # and somebody has lost patience with this one
    mended = chain.go("--retry")
    assert [each["do"] for each in mended.values()] == ["nothing", "nothing", "submit", "mend", "submit"]
    assert mended["stage3_512"]["jobs"] == [jobs["stage3_512"]], "it keeps its place in the queue"
    chain.wait_done("stage3_1024")
    assert [each["do"] for each in chain.go().values()] == ["nothing"] * 5
    assert len(chain.layout.stage("stage1").all_attempts()) == 2
    answer = call("audit", chain.run, "--json")
    assert answer.returncode == 0, answer.stdout
    lineage = files.read_json(chain.layout.stage("stage3_1024").handover / "lineage.json")
    assert lineage["lineage"]["lineage"]["stage"] == "stage3_512"


def test_a_stage_waits_for_an_array_and_a_held_pair_for_its_stage(
    cluster: Cluster, small_set: Path, tmp_path: Path
) -> None:
    """Where requeueing is forbidden a stage's jobs end well many times: those of the next are released when it is done."""
    data = tmp_path / "set"
    create(tmp_path / "run", data, "stage1.length.steps=12", "stage2.length.steps=6")
    chain = Chain(cluster, tmp_path / "run", site(tmp_path, "requeue: false"))
    refused = call("chain", chain.run, "--profile", chain.profile)
    assert refused.returncode == 4, "its set is not there, and nothing is waited for that makes it"
    script = f"ln -sfn {small_set} {data}; sleep 2"
    array = cluster.sbatch("--array=1-2", "--output=/dev/null", f"--wrap={script}")
    submitted = chain.go("--after", array)
    assert [len(each["jobs"]) for each in submitted.values()] == [2] * 5
    assert [each["do"] for each in chain.go().values()] == ["leave"] * 5
    assert "JobHeldUser" in chain.queue()
    chain.wait_done("stage2")
    output = chain.outputs("stage1") + chain.outputs("stage2")
    assert re.search(r"job \d+ of stage2, which waited for stage1, is released", output)
    assert chain.go()["stage3_512"]["do"] == "leave", "it is held, behind the one before it"
    cancelled = json.loads(call("cancel", chain.run, "--json").stdout)
    assert {each["how"] for each in cancelled} <= {"withdrawn", "asked to save"}
    until(lambda: not cluster.tell("squeue", "-h", "-u", "root"), 180, chain.queue)


def test_cancel_withdraws_what_waits_and_has_the_others_save(cluster: Cluster, small_set: Path, tmp_path: Path) -> None:
    create(tmp_path / "run", small_set, "stage1.length.steps=4000")
    chain = Chain(cluster, tmp_path / "run")
    chain.go()
    chain.wait_images("stage1", 32 * 10)
    one = call("cancel", chain.run, "--stage", "stage3_1024")
    assert re.fullmatch(r"stage3_1024: job \d+ is withdrawn\n", one.stdout)
    told = call("cancel", chain.run)
    assert re.search(r"stage3_512: job \d+ is withdrawn", told.stdout)
    assert re.search(r"stage1: job \d+ is asked to save", told.stdout)
    until(lambda: not chain.jobs("stage1"), 180, chain.queue)
    outcome = files.read_json(chain.layout.stage("stage1").attempt(1).outcome)
    assert (outcome["outcome"], outcome["cause"]) == ("stopped", "the file stop")
    assert outcome["images_committed"] >= 32 * 10
    assert call("cancel", chain.run).stdout == "the run has no jobs in the queue\n"
    chain.go()  # takes the file away
    assert not chain.layout.stage("stage1").stop_request.exists()
    chain.wait_images("stage1", outcome["images_committed"] + 32)
    began = time.monotonic()
    ended = json.loads(call("cancel", chain.run, "--now", "--json").stdout)
    assert [each["how"] for each in ended if each["stage"] == "stage1"] == ["ended"]
    until(lambda: not chain.jobs("stage1"), 180, lambda: f"after {time.monotonic() - began:.0f} s {chain.queue()}")
    assert files.read_json(chain.layout.stage("stage1").attempt(2).outcome)["outcome"] == "stopped"
