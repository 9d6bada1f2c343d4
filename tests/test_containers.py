"""The recipes of images, as far as they can be checked without docker and apptainer: what they copy is there, versions agree."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "containers" / "Dockerfile").read_text()
RECIPE = (ROOT / "containers" / "pixart.def").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def sections() -> dict[str, str]:
    """The sections of the Apptainer recipe."""
    parts = re.split(r"^%(\w+)$", RECIPE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def copied() -> tuple[set[str], set[str]]:
    """What the Dockerfile and the Apptainer recipe copy from the checkout."""
    docker = {name for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE) for name in line.split()[:-1]}
    return docker, {line.split()[0] for line in sections()["files"].strip().splitlines()}


def test_both_copy_the_same_and_all_of_it_is_there() -> None:
    docker, apptainer = copied()
    assert docker == apptainer
    assert not [name for name in docker if not (ROOT / name).exists()]
    let_in = {
        line[1:]
        for line in (ROOT / "containers" / "Dockerfile.dockerignore").read_text().splitlines()
        if line[:1] == "!"
    }
    assert let_in == docker


def test_what_pyproject_and_the_installer_read_is_copied() -> None:
    docker, _ = copied()
    assert {PROJECT["readme"], *PROJECT["license-files"]} <= docker
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(tool["package-dir"].values()) <= docker
    lists = set(re.findall(r"-r (\S+\.txt)", (ROOT / "tools" / "install.sh").read_text()))
    assert lists
    assert lists <= docker


def test_for_apptainer_each_file_keeps_its_name() -> None:
    for line in sections()["files"].strip().splitlines():
        source, target = line.split()
        assert target == f"/opt/pixart_ds/{source}"


@pytest.mark.parametrize("text", [DOCKERFILE, sections()["arguments"]])
def test_versions_agree_with_the_lists(text: str) -> None:
    (version,) = re.findall(r"^\s*(?:ARG )?TORCH=(\S+)$", text, re.MULTILINE)
    wanted = {Requirement(each).name: Requirement(each).specifier for each in PROJECT["dependencies"]}
    assert version in wanted["torch"]
    makefile = (ROOT / "Makefile").read_text()
    assert f"V100 users: TORCH={version}," in makefile
    pinned = re.findall(r"^torch==(\S+)$", (ROOT / "requirements-cuda.txt").read_text(), re.MULTILINE)
    for recipe in (DOCKERFILE, RECIPE):
        assert re.findall(r"--build-arg TORCH=(\S+)", recipe) == pinned
        (python,) = re.findall(r"python:(\d+\.\d+)-slim-bookworm", recipe)
        assert python in SpecifierSet(PROJECT["requires-python"])


def test_basics_of_a_dockerfile() -> None:
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    words = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert set(words) <= {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}
    assert words[:2] == ["ARG", "FROM"]
    assert words[-1] == "CMD"
    assert "apt-get update" in DOCKERFILE
    assert DOCKERFILE.count("apt-get install -y --no-install-recommends") == DOCKERFILE.count(
        "rm -rf /var/lib/apt/lists/*"
    )
    assert not re.search(r":latest|\bsudo\b|^ADD |^MAINTAINER|\bcurl\b.*\|", DOCKERFILE, re.MULTILINE)
    for command in re.findall(r"^RUN (.+(?:\\\n.+)*)", DOCKERFILE, re.MULTILINE):
        subprocess.run(["bash", "-n"], input=command, text=True, check=True)


def test_basics_of_an_apptainer_recipe() -> None:
    assert RECIPE.split("%", 1)[0].split("\n")[-4:-2] == ["Bootstrap: docker", "From: python:3.11-slim-bookworm"]
    found = sections()
    assert list(found) == ["arguments", "files", "post", "environment", "runscript", "test"]
    assert found["post"].split()[:2] == ["set", "-e"]
    known = set(re.findall(r"^\s+(\w+)=", found["arguments"], re.MULTILINE))
    assert set(re.findall(r"\{\{ (\w+) \}\}", RECIPE)) == known
    for name in ("post", "environment", "runscript", "test"):
        subprocess.run(["sh", "-n"], input=found[name], text=True, check=True)
