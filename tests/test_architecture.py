"""The floors of the house, and what stays light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_imports_go_down_only() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    answer = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "config.load",
        "config.freeze",
        "report.command",
        "cluster.supervise",
        "cluster.task",
        "engine.environment",
        "train.rank",
        "cluster.status_text",
        "train.preflight",
        "plan.order",
    ],
)
def test_light_modules_load_without_torch(module: str) -> None:
    heavy = "{'torch', 'deepspeed', 'diffusers', 'transformers', 'streaming'} & set(sys.modules)"
    code = f"import sys, pixart_ds.{module}; heavy = {heavy}; assert not heavy, heavy"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


def test_nothing_large_is_in_the_package() -> None:
    encoders = sum(path.stat().st_size for path in (ROOT / "pixart_ds/demo/encoders").rglob("*") if path.is_file())
    assert encoders <= 4 << 20
