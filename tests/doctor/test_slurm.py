"""What is asked of Slurm, of programs that answer as Slurm's do."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pixart_ds import files
from pixart_ds.config.load import load_stage
from pixart_ds.config.profile import load_profile
from pixart_ds.doctor.ask import Answer
from pixart_ds.doctor.probes import slurm
from pixart_ds.layout import RunLayout
from tests.doctor.subjects import gpus, make_run, on_node, subject
from tests.doctor.test_machine import program

JOB = {
    "SLURM_JOB_ID": "71",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURMD_NODENAME": "n1",
    "SLURM_GPUS_ON_NODE": "8",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that are found before all others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    return folder


def scontrol(folder: Path, requeue: int = 1, start: float = 0.0, end: float = 0.0) -> None:
    job = f"JobId=71 JobState=RUNNING Requeue={requeue} StartTime={start:.0f} EndTime={end:.0f}"
    program(folder, "scontrol", f'if [ "$2" = job ]; then echo "{job}"; else printf "n1\\nn2\\n"; fi')


def test_outside_of_a_job_nothing_is_asked() -> None:
    for probe in (slurm.variables, slurm.gpus, slurm.requeue):
        assert probe(subject()).evidence == "this process runs in no job of Slurm"
    assert slurm.time_limit(subject()).evidence == (
        "this process runs in no job of Slurm, and no run and --profile say how long one would be"
    )
    assert slurm.partition(subject()).evidence == "no --profile was given"


def test_inside_a_job(programs: Path) -> None:
    now = time.time()
    scontrol(programs, 1, now - 3600, now + 7200)
    job = subject(device="cuda", environment=JOB)
    assert slurm.variables(job).evidence == "job 71, 2 nodes: n[1-2]"
    assert slurm.gpus(job).evidence == "8 of 8 GPUs in CUDA_VISIBLE_DEVICES"
    assert slurm.requeue(job).evidence == "the job may be requeued"
    check = slurm.time_limit(job)
    assert check.verdict == "ok"
    assert " left of 3 h 00 min, warned 5 min 00 s before the end" in check.evidence
    assert slurm.gpus(subject(environment=JOB)).evidence == "the stage is to run on the CPU"


def test_a_job_that_may_not_be_requeued(programs: Path) -> None:
    scontrol(programs, 0)
    check = slurm.requeue(subject(environment=JOB))
    assert check.verdict == "failed"
    assert check.remedy == (
        "submit it with --requeue; where the site forbids it, say requeue: false in the profile and use `pixart-ds launch`"
    )
    assert slurm.requeue(subject(environment=JOB, profile=load_profile("generic-v100"))).verdict == "failed"


def test_a_slurm_that_does_not_answer(programs: Path) -> None:
    program(programs, "scontrol", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    assert slurm.requeue(subject(environment=JOB)).evidence == (
        "Slurm does not answer: slurm_load_jobs error: Unable to contact"
    )
    assert slurm.variables(subject(environment=JOB)).verdict == "ok"
    program(programs, "sinfo", "echo 'error: Unable to contact' >&2; exit 1")
    check = slurm.partition(subject(profile=load_profile("generic-v100")))
    assert (check.verdict, check.evidence) == ("failed", "sinfo: error: Unable to contact")


def test_where_slurms_programs_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.requeue(subject(environment=JOB)).evidence == "there is no scontrol here"
    assert slurm.time_limit(subject(environment=JOB)).evidence == "there is no scontrol here"
    assert slurm.partition(subject(profile=load_profile("generic-v100"))).evidence == "there is no sinfo here"


def test_on_a_login_node_the_profile_says_partition_and_time(programs: Path, tmp_path: Path) -> None:
    program(programs, "sinfo", "echo 'gpu*|1-00:00:00|64|gpu:v100:8'")
    profile = load_profile("generic-v100")
    login = on_node(
        Answer(error="no driver"),
        gpu_required=False,
        run=RunLayout(tmp_path),
        stage=load_stage("stage2", []),
        profile=profile,
    )
    assert slurm.partition(login).evidence == "partition gpu: 64 nodes with up to 8 GPUs"
    check = slurm.time_limit(login)
    assert check.verdict == "ok"
    assert check.evidence.startswith(
        "20 h 00 min left of 20 h 00 min, warned 5 min 00 s before the end; a checkpoint every "
    )
    short = login.profile.model_copy(update={"time": "00:11:00"}) if login.profile else None
    check = slurm.time_limit(on_node(Answer(gpus()), run=login.run, stage=login.stage, profile=short))
    assert check.verdict == "failed"
    assert check.evidence.endswith("a crash would cost the whole attempt")


def test_the_interval_between_checkpoints_as_the_run_has_measured_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    attempt = run.stage("stage1").attempt(1)
    attempt.root.mkdir(parents=True)
    assert slurm.checkpoint_interval_s(subject(run)) is None  # on a CPU nothing is estimated
    files.append_json_line(attempt.metrics, {"images_per_second": 4.0})
    assert slurm.checkpoint_interval_s(subject(run)) == 6 * 32 / 4.0
    assert slurm.checkpoint_interval_s(subject()) is None


def test_by_dalys_rule(tmp_path: Path) -> None:
    run = make_run(tmp_path, None, "*.checkpoint={mean_time_between_failures_hours: 5.0}")
    assert slurm.checkpoint_interval_s(subject(run)) == pytest.approx((2 * 60 * 5 * 3600) ** 0.5)
