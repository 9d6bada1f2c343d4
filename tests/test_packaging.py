"""The wheel holds what the package reads, and the pinned lists hold what it needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pixart_ds

ROOT = Path(__file__).resolve().parents[1]


def test_wheel_holds_recipes_rates_encoders_deepspeed_files_and_profiles(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pixart_ds", "ds_configs", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"pixart_ds-{pixart_ds.__version__}-")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"pixart_ds/ds_configs/{path.name}" for path in (ROOT / "ds_configs").glob("*.json")}
    wanted |= {f"pixart_ds/{path.relative_to(ROOT)}" for path in (ROOT / "slurm").rglob("*") if path.is_file()}
    for pattern in ("recipes/**/*.yaml", "rates.yaml", "py.typed", "demo/encoders/*/*", "**/*.py"):
        wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "pixart_ds").glob(pattern)}
    assert len(wanted) > 80
    assert wanted <= names, sorted(wanted - names)


def test_version_is_in_the_changelog_or_unreleased() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{pixart_ds.__version__}]" in text or "## [Unreleased]" in text


def pinned(name: str) -> dict[str, list[str]]:
    """The releases that a list pins, by distribution; several where markers choose between them."""
    versions: dict[str, list[str]] = {}
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        (pin,) = requirement.specifier
        assert pin.operator == "==", line
        assert "*" not in pin.version, line
        versions.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    return versions


def test_pinned_lists_hold_everything_in_the_ranges_of_pyproject() -> None:
    everywhere, cuda = pinned("requirements.txt"), pinned("requirements-cuda.txt")
    assert not everywhere.keys() & cuda.keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lifted = {"numpy", "transformers"}  # their upper ends are mosaicml-streaming's wish, which the list does not obey
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        wanted = Requirement(text)
        versions = (everywhere | cuda)[canonicalize_name(wanted.name)]
        for version in versions:
            assert wanted.name in lifted or version in wanted.specifier, f"{text} does not admit the pinned {version}"


def test_only_the_cuda_list_costs_gigabytes() -> None:
    large = re.compile(r"^(torch$|triton|nvidia-(?!ml-py$)|cuda-)")
    assert not [name for name in pinned("requirements.txt") if large.match(name)]
    assert [name for name in pinned("requirements-cuda.txt") if not large.match(name)] == []
    assert len(pinned("requirements-cuda.txt")["torch"]) == 1
