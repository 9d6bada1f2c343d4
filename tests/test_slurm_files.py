"""The sbatch files and profiles: one source of truth, and what headers must and must not say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from pixart_ds.cluster.jobs import JobSpec, Place
from pixart_ds.config.load import load_stage
from pixart_ds.config.profile import Profile, known_profiles, load_profile, node_range, seconds_of
from pixart_ds.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[1] / "slurm"
STAGES = ("stage1", "stage2", "stage3_256", "stage3_512", "stage3_1024")


def options_of(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))


def test_there_is_one_for_each_stage() -> None:
    assert {path.stem for path in FOLDER.glob("*.sbatch")} == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_checked_in_is_what_is_rendered(stage: str) -> None:
    text = JobSpec(load_stage(stage), load_profile("generic-v100")).render()
    assert (FOLDER / f"{stage}.sbatch").read_text() == text, "run: python tools/render_sbatch.py"


@pytest.mark.parametrize("stage", STAGES)
def test_header_and_last_line(stage: str) -> None:
    text = (FOLDER / f"{stage}.sbatch").read_text()
    options = options_of(text)
    assert {"requeue", "no-kill", "exclusive"} <= set(options)
    assert (options["open-mode"], options["gres"], options["job-name"]) == ("append", "gpu:8", f"pixart-{stage}")
    assert options["signal"].startswith("B:USR1@")
    assert not {"ntasks", "ntasks-per-node", "gpus", "cpus-per-task"} & set(options)  # they freeze the number of nodes
    assert int(options["nodes"]) * 8 == load_stage(stage).paper_gpus
    assert text.rstrip().splitlines()[-1] == f'exec pixart-ds train "$RUN" {stage} --launcher srun --device cuda'
    subprocess.run(["bash", "-n", str(FOLDER / f"{stage}.sbatch")], check=True)
    subprocess.run(["bash", "-n", str(FOLDER / "setup.sh")], check=True)


def test_the_papers_gpus_by_stage() -> None:
    nodes = [JobSpec(load_stage(stage), load_profile("generic-v100")).nodes for stage in STAGES]
    assert [8 * int(each) for each in nodes] == [8, 64, 64, 64, 32]
    assert JobSpec(load_stage("stage2"), load_profile("jean-zay-like")).nodes == "16", "four GPUs in a node"


@pytest.mark.parametrize("name", known_profiles())
def test_every_profile_renders_a_job(name: str) -> None:
    profile = load_profile(name)
    text = JobSpec(load_stage("stage2"), profile).render()
    options = options_of(text)
    assert options["time"] == profile.time_of("stage2")
    assert (options.get("partition"), options.get("account")) == (profile.partition, profile.account)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_a_job_of_a_run_says_where_everything_is() -> None:
    place = Place(
        Path("/runs/a b"), Path("/runs/a b/code/0123"), Path("/venv"), Path("/runs/a b/stage2/submissions/%j.out")
    )
    profile = load_profile("jean-zay-like").model_copy(update={"requeue": False, "warning_s": 120})
    text = JobSpec(load_stage("stage2"), profile, place, ["execution.micro_batch_size=16"]).render()
    lines = text.splitlines()
    assert "export RUN='/runs/a b'" in lines
    assert "export VENV=/venv" in lines
    assert lines.index("module load cuda/12.6") < lines.index("source '/runs/a b/code/0123/slurm/setup.sh'")
    assert "export NCCL_SOCKET_IFNAME=ib0" in lines
    assert options_of(text)["dependency"] == "singleton"
    assert options_of(text)["hint"] == "nomultithread"
    assert "requeue" not in options_of(text)
    assert lines[-1] == (
        'exec pixart-ds train "$RUN" stage2 --launcher srun --device cuda --warning 120 --successor '
        "--set execution.cache.mode=shared --set execution.micro_batch_size=16"
    )


def test_a_description_and_a_folder_cannot_break_the_header() -> None:
    """sbatch stops reading options at the first line that is no comment."""
    stage = load_stage("stage2").model_copy(update={"description": "two\nlines\n"})
    place = Place(Path("/my runs/a,b"), Path("/c"), Path("/v"), Path("/my runs/%j.out"))
    header = JobSpec(stage, load_profile("a100"), place, exclude=["n1", "n7"]).render().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    options = options_of(header)
    assert (options["output"], options["exclude"]) == ('"/my runs/%j.out"', "n1,n7")
    assert re.fullmatch(r"pixart-a_b-stage2-[0-9a-f]{6}", options["job-name"])


def test_runs_of_the_same_name_have_jobs_of_different_names() -> None:
    names = {
        JobSpec(load_stage("stage2"), load_profile("a100"), Place(Path(run), Path("/c"), Path("/v"), Path("/o"))).name
        for run in ("/one/first", "/two/first")
    }
    assert len(names) == 2


def test_only_names_of_secrets_look_like_secrets(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        "description: a site\ngpus_per_node: 8\nenvironment: {TOKENIZERS_PARALLELISM: 'false', MONKEY: 1}\n"
    )
    assert load_profile(str(path)).environment["MONKEY"] == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sbatch", "{ntasks: 8}", "sbatch.ntasks: it would freeze the number of nodes at the first start"),
        ("sbatch", "{time: 10}", "sbatch.time: time says it"),
        ("sbatch", "{--hint: x}", "sbatch.--hint: write it without dashes"),
        ("time", "20:00:00", r"time: YAML reads a number here \(72000\); put it between quotes"),
        ("time", '"a day"', "time: string should match pattern"),
        ("stages", '{stage2: {nodes: "8-4"}}', "nodes '8-4' is neither a number from 1 on nor a range such as 4-8"),
        ("environment", "{AWS_SECRET_ACCESS_KEY: x}", "looks like a secret, which would stand in the job's script"),
        ("gpus", "8", "gpus: there is no such key .*; did you mean gpu?"),
        ("cost", "{pue: 0.9}", "cost.pue: input should be greater than or equal to 1"),
    ],
)
def test_a_profile_that_is_wrong_says_where(tmp_path: Path, key: str, value: str, message: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(f"description: a site\ngpus_per_node: 8\n{key}: {value}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        load_profile(str(path))
    assert str(path) in str(caught.value)


def test_an_unknown_profile_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="there is no profile 'v200'") as caught:
        load_profile("v200")
    assert all(name in str(caught.value) for name in known_profiles())


def test_times_and_sizes_as_sbatch_reads_them() -> None:
    times = {"10": 600, "1:30": 90, "20:00:00": 72000, "1-12": 129600, "2-0:30": 174600, "7-00:00:00": 604800}
    assert {text: seconds_of(text) for text in times} == times
    assert (node_range("8"), node_range("4-8")) == ((8, 8), (4, 8))
    assert Profile(description="a site", gpus_per_node=4).nodes_of("stage2", 64) == "16"
