"""The command as a person types it: help, answers for programs, and what it says when the input is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pixart_ds.cli import main

VERBS = (
    "demo",
    "config",
    "estimate",
    "prepare",
    "nouns",
    "verify",
    "upload",
    "stage-in",
    "create",
    "change",
    "budget",
    "train",
    "join",
    "launch",
    "chain",
    "cancel",
    "doctor",
    "status",
    "cost",
    "audit",
    "checkpoint",
    "sample",
    "export",
    "import",
)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pixart_ds", *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_needs_no_heavy_library(verb: str) -> None:
    code = (
        "import sys\nfrom pixart_ds.cli import main\n"
        f"try:\n    main([{verb!r}, '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'diffusers', 'transformers', 'streaming', 'yaml', 'nltk'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert f"pixart-ds {verb}" in answer.stdout


def test_help_lists_all_verbs_and_the_exit_codes() -> None:
    text = run("--help").stdout
    assert all(re.search(rf"^    {verb}\s", text, re.MULTILINE) for verb in VERBS)
    assert "75 stopped on request" in text


def test_config_prints_what_it_reads_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "stage2", "--set", "length.steps=5000"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["length"]["steps"] == 5000
    assert main(["config", "chain", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["stages"]) == 5
    assert main(["config", "demo/prepare", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows_per_group"] == 64


def test_a_typo_in_a_recipe_is_exit_code_2_without_a_traceback(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"base: {Path(__file__).parents[1] / 'pixart_ds/recipes/stage2.yaml'}\nmodel: {{dept: 3}}\n")
    answer = run("config", str(recipe))
    assert answer.returncode == 2
    assert "model.dept: there is no such key (value 3); did you mean depth?" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_create_freezes_a_chain_and_refuses_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "run")
    assert main(["create", folder, "--chain", "demo/chain", "--dry-run"]) == 0
    assert not Path(folder).exists()
    assert main(["create", folder, "--chain", "demo/chain", "--set", "*.seed=7"]) == 0
    assert main(["create", folder, "--chain", "demo/chain", "--set", "*.seed=7"]) == 0  # the same again
    capsys.readouterr()
    assert (
        main(["create", folder, "--chain", "demo/chain", "--set", "*.seed=7", "--set", "stage2.optimizer.eps=1e-8"])
        == 2
    )
    text = capsys.readouterr().err
    assert "stage2.optimizer.eps: 1e-10 → 1e-08" in text
    assert "start a new run" in text
    assert (
        main(
            ["create", folder, "--chain", "demo/chain", "--set", "*.seed=7", "--set", "*.execution.micro_batch_size=3"]
        )
        == 0
    )
    assert main(["status", folder, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out[len(f"run {folder}: ") :].split("\n", 1)[1])
    assert [row["state"] for row in shown["stages"]] == ["not started"] * 5


def test_create_leaves_a_strangers_folder_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    assert main(["create", str(tmp_path), "--chain", "demo/chain"]) == 2
    assert "neither empty nor a run" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_train_says_what_is_missing_before_it_starts_a_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tmp_path / "none"), "stage1"]) == 2
    assert "there is no run in this folder" in capsys.readouterr().err
    folder = str(tmp_path / "run")
    sets = f"*.data.sets=[{{path: {tmp_path / 'nothing-prepared'}}}]"
    assert main(["create", folder, "--chain", "smoke/chain", "--set", sets]) == 0
    assert main(["train", folder, "stage9"]) == 2
    assert "choose one of: stage1, stage2" in capsys.readouterr().err
    assert main(["train", folder, "stage2"]) == 5
    assert "stage2 starts from stage1, which has handed nothing over yet" in capsys.readouterr().err
    assert main(["train", folder, "stage1"]) == 4
    assert "nothing-prepared" in capsys.readouterr().err
    assert main(["train", folder, "stage1", "--set", "optimizer.eps=1e-8"]) == 2
    assert "optimizer.eps: 1e-10 → 1e-08" in capsys.readouterr().err
    assert not list(Path(folder).glob("*/attempts/*"))


def test_an_estimate_reckons_with_a_sites_gpus_and_costs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(
        "description: a site\ngpu: a100-80gb\ngpus_per_node: 4\ncost: {country: FRA, pue: 1.1, price_per_hour: 2.0}\n"
    )
    assert main(["estimate", "stage2", "--nodes", "2", "--profile", str(site), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    options = ["--gpu", "a100-80gb", "--gpus-per-node", "4", "--country", "FRA", "--pue", "1.1", "--price", "2"]
    assert main(["estimate", "stage2", "--nodes", "2", *options, "--json"]) == 0
    assert found == json.loads(capsys.readouterr().out)
    assert main(["estimate", "stage2", "--nodes", "2", "--profile", str(site), "--gpus-per-node", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpus"] == 16, "an option goes before the profile"
    assert main(["estimate", "stage2", "--profile", "test-cluster"]) == 2
    assert "the profile test-cluster names no gpu" in capsys.readouterr().err
