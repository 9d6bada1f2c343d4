"""`pixart-ds launch` and plain sbatch, on a real Slurm: what is submitted, what is refused, which code runs, what is kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pixart_ds import files
from tests.e2e.test_demo import ROOT, call
from tests.e2e.test_same_run import create
from tests.slurm.cluster import Cluster, Training, site, until

pytestmark = pytest.mark.slurm

STEPS = 20
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-4711",
    "HF_TOKEN": "planted-hf-4711",
    "WANDB_API_KEY": "planted-wandb-4711",
    "MY_PASSWORD": "planted-word-4711",
}


@pytest.fixture
def run(small_set: Path, tmp_path: Path) -> Path:
    create(tmp_path / "run", small_set, f"stage1.length.steps={STEPS}")
    return tmp_path / "run"


def test_slurm_would_take_every_checked_in_file(cluster: Cluster) -> None:
    for path in sorted((ROOT / "slurm").glob("*.sbatch")):
        answer = subprocess.run(["sbatch", "--test-only", str(path)], capture_output=True, text=True, check=False)
        assert answer.returncode == 0, f"{path.name}: {answer.stderr}"
        nodes = re.search(r"--nodes=(\d+)", path.read_text())
        assert nodes
        assert f"using {64 * int(nodes[1])} processors" in answer.stderr


def test_sixty_four_tasks_know_who_they_are_and_where_they_meet(cluster: Cluster) -> None:
    code = (
        "import json, os; from pixart_ds.engine.environment import read_environment as read; given = read(os.environ); "
        "print(json.dumps([given.launcher, given.rank, given.size, given.local_rank, given.local_size, "
        "given.master_addr, given.master_port]))"
    )
    tasks = [
        "srun",
        "--partition=gpu",
        "--nodes=8",
        "--ntasks=64",
        "--ntasks-per-node=8",
        "--gres=gpu:8",
        "--exclusive",
    ]
    answer = subprocess.run(
        [*tasks, sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    told = sorted((json.loads(line) for line in answer.stdout.splitlines()), key=lambda each: int(each[1]))
    assert [each[:5] for each in told] == [["srun", rank, 64, rank % 8, 8] for rank in range(64)]
    ((host, port),) = {tuple(each[5:]) for each in told}
    assert host == "n1"
    assert 20000 <= port < 30000


def test_a_dry_run_prints_what_will_be_submitted_to_the_letter(cluster: Cluster, run: Path, tmp_path: Path) -> None:
    options = ("--profile", "test-cluster", "--nodes", "1-2", "--time", "15", "--set", "execution.micro_batch_size=4")
    dry = call("launch", "stage1", "--run", run, *options, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert not (run / "code").exists()
    assert not cluster.tell("squeue", "-h")
    cluster.fill(8)
    training = Training(cluster, run, *options[2:])
    cluster.tell("scontrol", "write", "batch_script", training.job, tmp_path / "got")
    assert (tmp_path / "got").read_text() == dry.stdout
    about = cluster.about(training.job)
    assert about["JobName"].startswith("pixart-run-stage1-")
    assert about["TimeLimit"] == "00:15:00"
    again = call("launch", "stage1", "--run", run, *options)
    assert again.returncode == 2
    assert f"job {training.job} of this stage is pending already" in again.stderr


def test_editing_the_checkout_changes_no_job_that_waits_and_secrets_stay_out(
    cluster: Cluster, run: Path, tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    for name in ("pixart_ds", "ds_configs", "slurm"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, **SECRETS, "PYTHONPATH": str(checkout)}
    urgent = cluster.fill(8)
    cluster.wait_state(urgent, "RUNNING")
    command = [sys.executable, "-m", "pixart_ds", "launch", "stage1", "--run", str(run), "--profile", "test-cluster"]
    began = time.monotonic()
    answer = subprocess.run(
        [*command, "--json"], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    print(f"launch to submitted: {time.monotonic() - began:.2f} s")
    job = json.loads(answer.stdout)["jobs"][0]
    for path in (checkout / "pixart_ds").rglob("*.py"):
        path.write_text("raise SystemExit('the checkout was edited')\n")
    cluster.tell("scancel", urgent)
    output = run / "stage1" / "submissions" / f"{job}.out"
    cluster.wait_over(job, output)
    env = files.read_json(run / "stage1" / "attempts" / "0001" / "env.json")
    assert env["nodes"]
    assert all(text.startswith("gpu:v100:8") for text in env["gres"].values())
    (history,) = files.read_json_lines(run / "code" / "history.jsonl")
    assert (history["by"], history["hash"]) == ("launch", json.loads(answer.stdout)["code"])
    found = [
        (path, name)
        for path in run.rglob("*")
        for name, secret in SECRETS.items()
        if path.is_file() and secret.encode() in path.read_bytes()
    ]
    assert not found


def test_other_code_is_taken_only_on_record(cluster: Cluster, run: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in ("pixart_ds", "ds_configs", "slurm"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert call("launch", "stage1", "--run", run, "--profile", "test-cluster", "--time", "5").returncode == 0
    cluster.clear()
    (checkout / "pixart_ds" / "new.py").write_text('"""New."""\n')
    command = [sys.executable, "-m", "pixart_ds", "launch", "stage1", "--run", str(run), "--profile", "test-cluster"]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    codes = []
    for more in ([], ["--update-code"]):
        done = subprocess.run(
            [*command, "--json", *more], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        codes.append(json.loads(done.stdout)["code"])
        cluster.clear()
    first, second = files.read_json_lines(run / "code" / "history.jsonl")
    assert (first["hash"], second["hash"], second["replaces"]) == (codes[0], codes[1], codes[0])
    assert codes[0] != codes[1]
    assert (run / "code" / codes[0]).is_dir(), "a job may run it still"


def test_plain_sbatch_freezes_the_code_at_its_first_start_and_says_so(
    cluster: Cluster, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    path = tmp_path / "slurm" / "stage1.sbatch"
    path.write_text(path.read_text().replace("--device cuda", "--device cpu --tasks-per-node 1"))
    environment = {**os.environ, "RUN": str(run), "VENV": sys.prefix}
    answer = subprocess.run(
        ["sbatch", "--parsable", "slurm/stage1.sbatch"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    job = answer.stdout.strip()
    output = tmp_path / f"pixart-stage1-{job}.out"
    cluster.wait_over(job, output)
    assert "the code is frozen into the run" in output.read_text()
    (row,) = files.read_json_lines(run / "code" / "history.jsonl")
    assert row["by"] == f"job {job}"
    assert "attempt 1: job" in output.read_text()


@pytest.mark.parametrize("moment", ["set-up", "start"])
def test_a_warning_that_comes_before_the_supervisor_listens_is_not_lost(
    cluster: Cluster, run: Path, tmp_path: Path, moment: str
) -> None:
    here = tmp_path / "here"
    training = Training(cluster, run, profile=site(tmp_path, f"setup: ['touch {here}; sleep 3']"))
    until(here.exists, 180, training.output)
    if moment == "start":
        until(training.stage.attempt(1).heartbeat.exists, 60, training.output)
    cluster.tell("scancel", "--batch", "--signal=USR1", training.job)
    cluster.wait_restart(training.job, 1)
    training.wait_end()
    assert training.outcomes() == ["stopped", "done"]
    assert files.read_json(training.stage.attempt(1).outcome)["cause"].startswith("SIGUSR1")
    training.audited()


def test_a_job_that_is_stopped_again_and_again_before_it_saves_ends_with_the_reason(
    cluster: Cluster, run: Path, tmp_path: Path
) -> None:
    training = Training(cluster, run, profile=site(tmp_path, "environment: {PIXART_DS_ASKED: SIGUSR1}"))
    for restarts in (1, 2, 3, 4):
        cluster.wait_restart(training.job, restarts)
    output = training.wait_end("FAILED")
    assert "5 attempts in a row have saved nothing new: the job is not requeued; SIGUSR1" in output
    assert training.outcomes() == ["stopped"] * 5


def test_a_node_whose_ranks_fail_before_the_first_step_is_left_out(cluster: Cluster, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('SLURMD_NODENAME') == 'n1' and 'pixart_ds.train.rank' in sys.orig_argv:\n"
        "    print('no GPU is found here', file=sys.stderr, flush=True)\n"
        "    os._exit(3)\n"
    )
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    own = f"environment: {{PYTHONPATH: '{path}', OMP_NUM_THREADS: 1, GLOO_SOCKET_IFNAME: lo}}"
    profile = site(tmp_path, f"{own}\nsbatch: {{exclude: n8}}")
    training = Training(cluster, run, profile=profile)
    cluster.wait_restart(training.job, 1)
    output = training.wait_end()
    assert "node n1 is left out for 24 h: its ranks failed before the first step" in output
    assert cluster.about(training.job)["ExcNodeList"] == "n1,n8", "beside the one that the profile leaves out"
    assert training.outcomes() == ["failed", "done"]
    assert "no GPU is found here" in training.launches(1)[0]["cause"]
    (row,) = files.read_json_lines(run / "bad-nodes.jsonl")
    assert (row["node"], row["attempt"]) == ("n1", 1)
    assert "n1" not in files.read_json(training.stage.attempt(2).env)["nodes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--profile", "v200"], "there is no profile 'v200'"),
        (["--partition", "big"], "there is no partition 'big' here; choose one of: gpu, urgent"),
        (["--nodes", "9"], "nodes 9: partition gpu has 8 such nodes"),
        (["--nodes", "8-4"], "nodes '8-4' is neither a number from 1 on nor a range such as 4-8"),
        (["--constraint", "a100"], "constraint a100: no node of partition gpu has it; they have: v100-32g"),
        (["--time", "8-00:00:00"], "time 8-00:00:00: partition gpu allows 168 h"),
        (["--time", "0:30"], "time 0:30 is not even twice warning_s (20 s)"),
        (["--set", "length.steps=3"], "these keys belong to the run and cannot change between attempts"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_submitted(
    cluster: Cluster, run: Path, options: list[str], message: str
) -> None:
    words = options if "--profile" in options else ["--profile", "test-cluster", *options]
    answer = call("launch", "stage1", "--run", run, *words)
    assert (answer.returncode, message in answer.stderr) == (2, True), answer.stderr
    assert not cluster.tell("squeue", "-h")


def test_what_slurm_itself_refuses_is_told_in_its_words(cluster: Cluster, run: Path, tmp_path: Path) -> None:
    answer = call("launch", "stage1", "--run", run, "--profile", site(tmp_path, "sbatch: {licenses: no-such}"))
    assert answer.returncode == 2
    assert "Slurm would not take the job: " in answer.stderr
    assert "Invalid license specification" in answer.stderr
    assert not cluster.tell("squeue", "-h")


def test_sizes_of_the_site_are_held_against_the_profile(cluster: Cluster, run: Path, tmp_path: Path) -> None:
    answer = call("launch", "stage1", "--run", run, "--profile", site(tmp_path, "gpus_per_node: 16"))
    assert answer.returncode == 2
    assert "gpus_per_node 16: a node of partition gpu has 8" in answer.stderr
    path = {**os.environ, "PATH": os.path.dirname(sys.executable)}
    command = [sys.executable, "-m", "pixart_ds", "launch", "stage1", "--run", str(run), "--profile", "test-cluster"]
    found = subprocess.run(command, env={**path, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert found.returncode == 3
    assert "there is no sinfo on the path" in found.stderr
    assert "load their module" in found.stderr


def test_a_time_limit_shorter_than_a_checkpoint_interval_is_refused(
    cluster: Cluster, small_set: Path, tmp_path: Path
) -> None:
    """At the rate that the run itself has measured."""
    stage = create(tmp_path / "run", small_set, "stage1.length.steps=9000", "stage1.checkpoint.every.steps=9000")
    stage.attempt(1).root.mkdir(parents=True)
    files.append_json_line(stage.attempt(1).metrics, {"images_seen": 32, "images_per_second": 160.0})
    answer = call("launch", "stage1", "--run", tmp_path / "run", "--profile", "test-cluster", "--time", "20")
    assert answer.returncode == 2
    assert "time 20 is shorter than the 0.5 h between two checkpoints (every 9,000 steps)" in answer.stderr
