"""The demo's own object store: there while the demo trains, and nothing of it afterwards, however the demo ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pixart_ds.data.shards import PreparedSet
from pixart_ds.demo import store as demo_store
from pixart_ds.demo.store import DemoStore
from pixart_ds.errors import MachineError
from pixart_ds.log import Log
from tests.helpers.s3 import ROOT, gone
from tests.helpers.sets import tiny_set

pytestmark = pytest.mark.store


def children_of(pid: int) -> list[int]:
    """A process's children and theirs."""
    direct = list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return direct + [other for child in direct for other in children_of(child)]


def test_the_set_is_read_from_it_and_the_environment_is_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_set(tmp_path / "set")
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://the.users.own")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    before, others = dict(os.environ), set(children_of(os.getpid()))
    for sent in (True, False):  # the second time it is there already
        with DemoStore(tmp_path / "store", Log("demo", None)) as store:
            pids = [pid for pid in children_of(os.getpid()) if pid not in others]
            assert len(pids) > 4
            assert (store.upload(tmp_path / "set").sent_files > 0) == sent
            assert PreparedSet.open(store.url).fingerprint == made.fingerprint
        assert gone(pids)
        assert dict(os.environ) == before


def fail_inside(root: Path) -> None:
    """Starts a store, writes the ids of its processes to a file, and fails."""
    others = set(children_of(os.getpid()))
    with DemoStore(root, Log("demo", None)):
        (root / "pids").write_text(" ".join(str(pid) for pid in children_of(os.getpid()) if pid not in others))
        raise ZeroDivisionError


def test_it_stops_after_an_error_and_after_a_kill(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_inside(tmp_path / "store")
    pids = list(map(int, (tmp_path / "store" / "pids").read_text().split()))
    assert len(pids) > 4
    assert gone(pids)
    code = f"""
import time
from pathlib import Path
from pixart_ds.demo.store import DemoStore
from pixart_ds.log import Log

with DemoStore(Path({str(tmp_path / "store")!r}), Log("demo", None)):
    print("there", flush=True)
    time.sleep(600)
"""
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    assert starter.stdout.readline() == "there\n"
    pids = children_of(starter.pid)
    assert len(pids) > 4
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    assert gone(pids)


def test_what_keeps_it_from_starting_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        DemoStore(tmp_path / "store", Log("demo", None)),
        pytest.raises(MachineError, match="another server runs on"),
        DemoStore(tmp_path / "store", Log("demo", None)),
    ):
        pass
    monkeypatch.setattr(demo_store, "CHECKOUT", tmp_path)
    with pytest.raises(MachineError, match="not in the installed package"), DemoStore(tmp_path, Log("demo", None)):
        pass
