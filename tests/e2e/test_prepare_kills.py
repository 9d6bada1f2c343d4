"""Preparing survives being killed at any moment, over and over: the set is the same to the byte."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pixart_ds.demo.pictures import write_pictures
from pixart_ds.prepare.pipeline import prepare
from tests.prepare.test_prepare import ENCODERS, config_of, content, overrides, own_captioners

pytestmark = pytest.mark.e2e

_SERVER = """
import os, random, signal, sys, time
sys.argv = ["pixart-ds"]
from pixart_ds.cli import main
import pixart_ds.prepare.pipeline, torch, diffusers, transformers, pyarrow.parquet
from diffusers import AutoencoderKL
from transformers import AutoTokenizer, T5EncoderModel
command, folder, restarts, longest = eval(sys.stdin.read())
draw = random.Random(7)
killed, finished = 0, 0
while True:
    process = os.fork()
    if process == 0:
        os.setsid()
        sys.stdout = sys.stderr = open(os.path.join(folder, "log.txt"), "a")
        os._exit(main([word.replace("SET", f"set-{finished}") for word in command]))
    if killed < restarts:
        time.sleep(draw.uniform(0, longest))
        done, status = os.waitpid(process, os.WNOHANG)
        if not done:
            os.killpg(process, signal.SIGKILL) if os.getpgid(process) == process else os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            killed += 1
            continue
    else:
        _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    finished += 1
    if killed >= restarts or code:
        print(killed, finished)
        sys.exit(code)
    longest /= 2  # it was faster than thought: once more, with less time for each start
"""


@pytest.mark.parametrize(("captioner", "restarts"), [("own", 50), ("source", 20)])
def test_kills_at_random_moments_change_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, captioner: str, restarts: int
) -> None:
    """While pictures are listed, described and encoded."""
    monkeypatch.syspath_prepend(tmp_path)
    write_pictures(tmp_path / "pictures", 160, seed=3)
    more = ["rows_per_group=2"]
    if captioner == "own":
        more.append(f"{own_captioners(tmp_path)}:Few")
    began = time.monotonic()
    prepare(config_of(tmp_path / "pictures", tmp_path / "whole", *more))
    seconds = time.monotonic() - began
    sets = [word for each in overrides(tmp_path / "pictures", tmp_path / "SET", *more) for word in ("--set", each)]
    command = ["prepare", "smoke/prepare", *sets]
    # every start does some of it, and few do all
    about = (command, str(tmp_path), restarts, max(0.5, seconds / 12))
    answer = subprocess.run(
        [sys.executable, "-c", _SERVER],
        input=repr(about),
        capture_output=True,
        text=True,
        check=False,
        cwd=ENCODERS.parents[2],
        env={**os.environ, "PYTHONPATH": f"{ENCODERS.parents[2]}{os.pathsep}{tmp_path}"},
    )
    log = (tmp_path / "log.txt").read_text()
    assert answer.returncode == 0, f"{answer.stdout}{answer.stderr}\n{log[-3000:]}"
    killed, finished = map(int, answer.stdout.split())
    assert killed == restarts
    for number in range(finished):
        made = tmp_path / f"set-{number}"
        assert content(made) == content(tmp_path / "whole")
        assert not list(made.rglob("*.tmp"))
    assert "Traceback" not in log


def test_a_kill_of_the_command_leaves_no_process_behind(tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 160, seed=3)
    sets = [
        word
        for each in overrides(tmp_path / "pictures", tmp_path / "set", "rows_per_group=2")
        for word in ("--set", each)
    ]
    command = [sys.executable, "-m", "pixart_ds", "prepare", "smoke/prepare", "--processes", "2", *sets]
    process = subprocess.Popen(command, cwd=ENCODERS.parents[2], start_new_session=True)
    while not list((tmp_path / "set/parts").glob("part-*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    seconds = random.uniform(0, 0.2)  # a fast machine makes the rest in more
    print(f"killed {seconds:.3f} s after the first part")
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 20
    while _alive(process.pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _alive(process.pid)
    assert not (tmp_path / "set/manifest.json").exists()
    prepare(config_of(tmp_path / "pictures", tmp_path / "set", "rows_per_group=2"))
    prepare(config_of(tmp_path / "pictures", tmp_path / "whole", "rows_per_group=2"))
    assert content(tmp_path / "set") == content(tmp_path / "whole")


def _alive(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has just ended
            continue
        if int(fields[3]) == session and fields[0] != "Z" and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found
