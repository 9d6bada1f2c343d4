"""The wheel holds what the package reads."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pixart_ds

ROOT = Path(__file__).resolve().parents[1]


def test_wheel_holds_recipes_rates_encoders_and_deepspeed_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pixart_ds", "ds_configs"):
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
    for pattern in ("recipes/**/*.yaml", "rates.yaml", "py.typed", "demo/encoders/*/*", "**/*.py"):
        wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "pixart_ds").glob(pattern)}
    assert len(wanted) > 80
    assert wanted <= names, sorted(wanted - names)


def test_version_is_in_the_changelog_or_unreleased() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{pixart_ds.__version__}]" in text or "## [Unreleased]" in text
