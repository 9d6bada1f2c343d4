"""Stage-in from a real S3 server: it fills, goes on after a kill, and training then asks the store for no shard."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pixart_ds.data.cache import CacheOptions, shards_here
from pixart_ds.data.shards import PreparedSet
from pixart_ds.layout import RunLayout
from tests.data.test_stage_in import LATENTS, fill
from tests.e2e.test_demo import ROOT, call
from tests.e2e.test_same_run import create, prepare_small
from tests.helpers.s3 import S3Server
from tests.helpers.sets import tiny_set

pytestmark = pytest.mark.store


def shards(s3: S3Server, bucket: str) -> list[str]:
    """The shards that the server has given so far."""
    return [one.path for one in s3.requests("GET", f"/{bucket}/") if one.path.endswith(".mds")]


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small(tmp_path_factory.mktemp("small"))


def test_a_killed_stage_in_goes_on_where_it_was(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    tiny_set(tmp_path / "set", [(number % 3, 2) for number in range(60)])
    s3.put_folder(tmp_path / "set", bucket, "set")
    options = CacheOptions(tmp_path / "cache")
    code = (
        "from pathlib import Path\nfrom pixart_ds.data.cache import CacheOptions\n"
        "from pixart_ds.data.shards import PreparedSet\nfrom tests.data.test_stage_in import fill\n"
        f"fill(PreparedSet.open('s3://{bucket}/set'), CacheOptions(Path({str(options.folder)!r})))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while len(list(options.folder.rglob("*.mds"))) < 20:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    remote = PreparedSet.open(f"s3://{bucket}/set")
    here = sum(int(shards_here(remote.index(name), options).sum()) for name in ("captions", LATENTS))
    assert 0 < here < 120
    time.sleep(2)  # what the server was sending to the dead process
    before = len(shards(s3, bucket))
    assert fill(remote, options).fetched_shards == 120 - here
    assert len(shards(s3, bucket)) - before == 120 - here
    assert fill(remote, options).fetched_shards == 0
    assert len(shards(s3, bucket)) - before == 120 - here


def test_training_reads_no_shard_from_the_store(s3: S3Server, bucket: str, small_set: Path, tmp_path: Path) -> None:
    s3.put_folder(small_set, bucket, "set")
    # the path of the set is the store's; create() writes it into the recipe
    create(tmp_path / "run", Path("unused"), f"*.data.sets=[{{path: s3://{bucket}/set}}]", "stage1.length.steps=8")
    cache = (
        *("--set", "execution.cache.mode=node-persistent"),
        *("--set", f"execution.cache.folder={tmp_path / 'disk'}"),
    )
    dry = call("stage-in", tmp_path / "run", "stage1", *cache, "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    assert not (tmp_path / "disk").exists()
    answer = call("stage-in", tmp_path / "run", "stage1", *cache, "--json")
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout)
    assert (
        told["fetched_shards"] == told["shards"] == json.loads(dry.stdout)["fetched_shards"] == len(shards(s3, bucket))
    )
    assert "are wanted in" in answer.stderr
    again = call("stage-in", tmp_path / "run", "stage1", *cache)
    assert f"fetched 0 of {told['shards']} shards" in again.stdout
    trained = call("train", tmp_path / "run", "stage1", "--device", "cpu", "--processes", "2", *cache)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert RunLayout(tmp_path / "run").stage("stage1").done.exists()
    assert len(shards(s3, bucket)) == told["shards"]


def test_a_copy_on_a_shared_file_system_is_trained_from(
    s3: S3Server, bucket: str, small_set: Path, tmp_path: Path
) -> None:
    s3.put_folder(small_set, bucket, "set")
    create(tmp_path / "run", Path("unused"), f"*.data.sets=[{{path: s3://{bucket}/set}}]", "stage1.length.steps=8")
    shared = ("--set", "execution.cache.mode=shared")
    refused = call("stage-in", tmp_path / "run", "stage1", *shared)
    assert refused.returncode == 2
    assert "no folder is named for the copy that all nodes read" in refused.stderr
    shared = (*shared, "--set", f"execution.cache.folder={tmp_path / 'scratch'}")
    staged = call("stage-in", tmp_path / "run", "stage1", *shared)
    assert staged.returncode == 0, staged.stderr
    before = len(shards(s3, bucket))
    trained = call("train", tmp_path / "run", "stage1", "--device", "cpu", "--processes", "2", *shared)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert len(shards(s3, bucket)) == before > 0
    job = call("stage-in", tmp_path / "run", "stage1", "--set", "execution.cache.mode=node-job")
    assert (job.returncode, "nothing to stage in for stage1" in job.stdout) == (0, True)
