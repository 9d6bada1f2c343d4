"""The environment that a job unpacks onto its nodes: what is rendered, what unpack.sh does, and what it says when it cannot."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pixart_ds.cluster.jobs import JobSpec, Place
from pixart_ds.cluster.srun import rank_command
from pixart_ds.config.load import load_stage
from pixart_ds.config.profile import load_profile
from pixart_ds.errors import ConfigError, MachineError

UNPACK = Path(__file__).resolve().parents[1] / "slurm" / "unpack.sh"
PLACE = Place(Path("/runs/a"), Path("/runs/a/code/0123"), Path("/venv"), Path("/runs/a/%j.out"))


def profile_of(tmp_path: Path, more: str) -> str:
    path = tmp_path / "site.yaml"
    path.write_text(f"description: a site\ngpus_per_node: 8\n{more}\n")
    return str(path)


def archive_of(folder: Path, python: str = "#!/bin/sh\nexit 0\n", name: str = "env.tar.gz") -> Path:
    """An archive whose bin/python is a script."""
    made = folder / "made"
    (made / "bin").mkdir(parents=True, exist_ok=True)
    (made / "bin" / "python").write_text(python)
    (made / "bin" / "python").chmod(0o755)
    subprocess.run(["tar", "-C", made, "-caf", folder / name, "."], check=True)
    return folder / name


def unpack(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(UNPACK), *map(str, words)], capture_output=True, text=True, check=False)


def test_the_job_unpacks_it_before_the_supervisor_and_starts_its_python(tmp_path: Path) -> None:
    keys = "environment_archive: /project/env.tar.zst\nenvironment_folder: $TMPDIR/env"
    lines = JobSpec(load_stage("stage2"), load_profile(profile_of(tmp_path, keys)), PLACE).render().splitlines()
    (step,) = [number for number, line in enumerate(lines) if line.startswith("srun ")]
    assert lines[step - 1] == 'export VENV="$TMPDIR/env"'
    assert lines[step].endswith('bash /runs/a/code/0123/slurm/unpack.sh /project/env.tar.zst "$VENV" || exit 3')
    assert lines.index("source /runs/a/code/0123/slurm/setup.sh") > step
    assert lines[-1].startswith('exec "$VENV/bin/python" -m pixart_ds train "$RUN" stage2 --launcher srun')
    assert "/venv" not in "\n".join(lines)
    subprocess.run(["bash", "-n"], input="\n".join(lines), text=True, check=True)


def test_without_it_nothing_is_unpacked(tmp_path: Path) -> None:
    text = JobSpec(load_stage("stage2"), load_profile(profile_of(tmp_path, "")), PLACE).render()
    assert "unpack" not in text
    assert "--container" not in text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("environment_archive: /project/env.tar", "go together"),
        ("environment_folder: /scratch/env", "go together"),
        ("environment_archive: env.tar\nenvironment_folder: /scratch/env", "environment_archive: string should match"),
        ("environment_archive: /e.zip\nenvironment_folder: /scratch/env", "environment_archive: string should match"),
        ("environment_archive: /e.tar\nenvironment_folder: '$(rm x)/env'", "environment_folder: string should match"),
        ("container: ''", "container: string should have at least 1 character"),
    ],
)
def test_keys_that_cannot_work_are_refused(tmp_path: Path, keys: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_profile(profile_of(tmp_path, keys))


@pytest.mark.parametrize("name", ["env.tar", "env.tar.gz", "env.tar.zst"])
def test_it_is_unpacked_once_and_anew_when_the_archive_is_another(tmp_path: Path, name: str) -> None:
    archive, folder = archive_of(tmp_path, name=name), tmp_path / "disk" / "env"
    first = unpack(archive, folder)
    assert first.returncode == 0, first.stderr
    assert "is unpacked into" in first.stdout
    (folder / "mine").write_text("a mark")
    assert (unpack(archive, folder).stdout, (folder / "mine").exists()) == ("", True)
    archive_of(tmp_path, "#!/bin/sh\nexit 0 # newer\n", name)
    os.utime(archive, (1, 1))
    assert "is unpacked into" in unpack(archive, folder).stdout
    assert "newer" in (folder / "bin" / "python").read_text()
    assert not (folder / "mine").exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["env", "env.lock"]


def test_one_that_was_killed_on_the_way_is_unpacked_again(tmp_path: Path) -> None:
    archive, folder = archive_of(tmp_path), tmp_path / "env"
    (tmp_path / "env.pixart-new").mkdir()
    (tmp_path / "env.pixart-new" / "half").write_text("")
    folder.mkdir()
    (folder / ".pixart-archive").write_text("")  # renamed, and killed before the stamp
    assert unpack(archive, folder).returncode == 0
    assert (folder / "bin" / "python").exists()
    assert not (tmp_path / "env.pixart-new").exists()


def test_a_conda_environment_is_told_its_new_place(tmp_path: Path) -> None:
    made = tmp_path / "made" / "bin"
    made.mkdir(parents=True)
    (made / "conda-unpack").write_text("")
    (made / "conda-unpack").chmod(0o755)
    folder = tmp_path / "env"
    answer = unpack(archive_of(tmp_path, '#!/bin/sh\necho "$*" >>"$0.calls"\n'), folder)
    assert answer.returncode == 0, answer.stderr
    calls = (folder / "bin" / "python.calls").read_text().splitlines()
    assert calls == [str(folder / "bin" / "conda-unpack"), "-c import sys"], "in its place, and before it is used"


def test_several_at_once_unpack_it_once(tmp_path: Path) -> None:
    archive, folder = archive_of(tmp_path), tmp_path / "env"
    command = ["bash", str(UNPACK), str(archive), str(folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    told = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum(bool(text) for text in told) == 1


def test_what_is_said_when_it_cannot(tmp_path: Path) -> None:
    archive, folder = archive_of(tmp_path), tmp_path / "env"
    cases = {
        "is $TMPDIR set on this cluster?": (archive, "/env"),
        "is not there; all nodes must see it": (tmp_path / "none.tar", folder),
        "was not unpacked by a job": (archive, tmp_path / "made"),
        "could not be unpacked": (UNPACK, folder),
    }
    for words, arguments in cases.items():
        answer = unpack(*arguments)
        assert (answer.returncode, words in answer.stderr) == (3, True), answer.stderr
    assert (tmp_path / "made" / "bin" / "python").exists(), "nobody's folder is removed"
    broken = archive_of(tmp_path, "#!/no/such/interpreter\n")
    answer = unpack(broken, folder)
    assert answer.returncode == 3
    assert "bin/python does not run here" in answer.stderr
    assert "conda-pack" in answer.stderr
    (tmp_path / "empty").mkdir()
    subprocess.run(["tar", "-C", tmp_path / "empty", "-cf", tmp_path / "empty.tar", "."], check=True)
    assert "holds no bin/python at its top" in unpack(tmp_path / "empty.tar", tmp_path / "other").stderr


def test_a_container_stands_before_the_ranks_command(tmp_path: Path) -> None:
    profile = load_profile(profile_of(tmp_path, "container: env X=1 nice"))
    text = JobSpec(load_stage("stage2"), profile, PLACE).render()
    assert text.rstrip().endswith("--device cuda --container 'env X=1 nice'")
    env, *rest = rank_command("env X=1 nice")
    assert Path(env).is_absolute()
    assert rest == ["X=1", "nice", "python", "-m", "pixart_ds.train.rank"]
    assert rank_command(None)[1:] == ("-m", "pixart_ds.train.rank")
    with pytest.raises(MachineError, match="there is no apptainer-of-nobody, which is to start the ranks"):
        rank_command("apptainer-of-nobody exec /x.sif")
