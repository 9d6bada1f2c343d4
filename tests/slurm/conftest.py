"""A real Slurm on this machine, for all tests of this folder; and one small prepared set."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_same_run import prepare_small
from tests.slurm.cluster import Cluster, until


def _why_not() -> str | None:
    if os.geteuid() != 0:
        return "the test cluster's daemons, its device files and its packages need root"
    if shutil.which("apt-get") is None and shutil.which("slurmctld") is None:
        return "there is no slurmctld, and no apt-get to install it with"
    return None


def _processes(root: Path) -> list[str]:
    return subprocess.run(["pgrep", "-f", str(root)], capture_output=True, text=True, check=False).stdout.split()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Eight nodes with eight GPUs each, none of them real; gone afterwards, with all its processes."""
    if (reason := _why_not()) is not None:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(
        prefix="sl-", dir="/tmp"
    ) as folder:  # short: the paths of sockets have at most 107 characters
        root, before = Path(folder), dict(os.environ)
        os.environ.update(
            CLUSTER_ROOT=str(root),
            # below those of `make cluster`, of ranks and of outgoing connections
            CLUSTER_PORT=str(10000 + os.getpid() % 60 * 100),
            SLURM_CONF=str(root / "etc" / "slurm.conf"),
        )
        found = Cluster(root)
        try:
            found.script("install")
            found.script("start")
            yield found
        finally:
            found.script("stop")
            os.environ.clear()
            os.environ.update(before)
            until(lambda: not _processes(root), 20, lambda: f"processes of the cluster are left: {_processes(root)}")


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures in 40 buckets, prepared."""
    return prepare_small(tmp_path_factory.mktemp("slurm-data"))


@pytest.fixture(autouse=True)
def _idle(cluster: Cluster) -> Iterator[None]:
    """Each test begins and ends with an idle cluster."""
    yield
    cluster.clear()
