"""Several machines without Slurm, with real sockets and real processes; only the ranks, and sometimes the agents, are fake."""

from __future__ import annotations

import argparse
import io
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pixart_ds import files
from pixart_ds.cli import main
from pixart_ds.cluster import hosts as hosts_module
from pixart_ds.cluster import machines as machines_module
from pixart_ds.cluster import wire as words
from pixart_ds.cluster.hosts import Hosts, is_here, parse_hosts
from pixart_ds.cluster.join import Agent, this_machine
from pixart_ds.cluster.launchers import LaunchRequest, LocalLauncher
from pixart_ds.cluster.machines import MachinesLauncher, MachinesRanks, machines_launcher
from pixart_ds.cluster.requests import Requests
from pixart_ds.cluster.supervise import Timing, supervise
from pixart_ds.cluster.wire import Address, Refused, Wire, ask_to_join
from pixart_ds.engine.environment import free_port
from pixart_ds.errors import ConfigError, MachineError
from pixart_ds.layout import StageLayout
from pixart_ds.log import Log
from tests.cluster.test_supervise import FAKE, a_run, no_slurm, until

__all__ = ["no_slurm"]

LOOPBACK = Address("127.0.0.1", 0)


class Leader:
    """A launcher that listens, and what it says."""

    def __init__(self, stage: StageLayout, script: str = "done", **more: Any) -> None:
        self.stage, self.said = stage, io.StringIO()
        self.wires: list[Wire] = []
        self.started: list[MachinesRanks] = []
        local = LocalLauncher(1, extra=("--script", script), command=FAKE)
        log = Log("stage1", self.said)
        self.launcher = MachinesLauncher(local, stage, "cpu", LOOPBACK, log, **more)

    def opened(self) -> Leader:
        self.launcher.open()
        return self

    def start(self, launch: int = 1) -> MachinesRanks:
        attempt = self.stage.attempt(1)
        attempt.root.mkdir(parents=True, exist_ok=True)
        request = LaunchRequest(self.stage.root.parent, "stage1", attempt, launch, "cpu")
        self.started.append(self.launcher.start(request, io.StringIO()))
        return self.started[-1]

    def connect(self) -> Wire:
        return Wire(socket.create_connection((self.launcher.address.host, self.launcher.address.port)))

    def joined(self, name: str, processes: int = 1) -> Wire:
        """A machine whose agent is the test."""
        wire = self.connect()
        self.wires.append(wire)
        ask_to_join(wire, self.stage.machines_token.read_text(), this_machine(processes, "cpu", name))
        return wire

    def close(self, code: int = 0) -> None:
        """Ends, the machines that are the test first: they do not listen. No rank of this machine is left."""
        for wire in self.wires:
            wire.close()
        self.launcher.close(code)
        for ranks in self.started:
            ranks._local.send(signal.SIGKILL)
        until(lambda: not any(ranks._local.alive() for ranks in self.started))

    def killed(self) -> None:
        """As the kernel closes what a killed leader leaves: its port, and its connections."""
        port = self.launcher._rendezvous
        assert port is not None
        port._closed.set()
        port._thread.join()
        port._server.close()
        for member in self.launcher.members():
            member.lose(OSError("killed"))

    def names(self) -> list[str]:
        return [each.name for each in self.launcher.members()]


@pytest.fixture
def leader(tmp_path: Path) -> Iterator[Leader]:
    found = Leader(a_run(tmp_path)).opened()
    yield found
    found.close(0)


def an_agent(leader: Leader, name: str = "n2", **more: Any) -> tuple[Agent, Callable[[], object]]:
    """An agent in a thread; the function waits for what it returns or raises."""
    asked = SimpleNamespace(names=[])
    agent = Agent(
        *(leader.stage.root.parent, "stage1", leader.launcher.address, this_machine(1, "cpu", name)),
        *(asked, Log("stage1", io.StringIO())),  # type: ignore[arg-type]
        **{"launcher": LocalLauncher(1, command=FAKE), "grace_s": 10.0, "patience_s": 10.0, "once": True} | more,
    )
    found: list[object] = []

    def work() -> None:
        try:
            found.append(agent.work())
        except MachineError as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def result() -> object:
        thread.join(20)
        assert found, "the agent does not end"
        return found[0]

    return agent, result


def go(stage: StageLayout, script: str, then: Callable[[], None] | None = None, timing: Timing | None = None) -> int:
    """An attempt of two machines with a rank each; `then` happens beside it, once the ranks run."""
    leader = Leader(stage, script, machines=2, patience_s=10.0)
    ends: list[Callable[[], object]] = []

    def beside() -> None:
        until(lambda: stage.machines_token.exists() and leader.launcher.address.port)
        ends.append(an_agent(leader)[1])
        if then is not None:
            until(lambda: all((stage.attempt(1).root / f"env-{rank}.json").exists() for rank in (0, 1)))
            then()

    def attempt() -> int:
        return supervise(
            *(stage.root.parent, "stage1"),
            **{"launcher": leader.launcher, "device": "cpu", "output": leader.said, "requests": requests},
            timing=timing or Timing(retries=0, backoff_s=0.1),
        )

    thread = threading.Thread(target=beside, daemon=True)
    with Requests() as requests:
        thread.start()
        code = leader.launcher.lead(requests, attempt)
    thread.join()
    print(leader.said.getvalue())
    assert ends[0]() == code, "the agent ends as the leader does"
    assert not stage.machines_token.exists()
    return code


def test_ranks_of_two_machines_are_one_world(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    assert go(stage, "done,done") == 0
    attempt = stage.attempt(1)
    said = [files.read_json(attempt.root / f"env-{rank}.json") for rank in (0, 1)]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    assert [tuple(each[name] for name in names) for each in said] == [
        ("0", "2", "0", "1", "127.0.0.1"),
        ("1", "2", "0", "1", "127.0.0.1"),
    ]
    assert said[0]["MASTER_PORT"] == said[1]["MASTER_PORT"]
    assert attempt.rank_log(1, 1).read_text() == "rank 1 of 2: done\n"
    host = socket.gethostname()
    assert files.read_json(attempt.env)["launcher"] == f"supervisor, 2 machines: {host} (1), n2 (1)"


def test_a_stop_reaches_all_machines(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    assert go(stage, "save-when-asked,save-when-asked", lambda: os.kill(os.getpid(), signal.SIGTERM)) == 75
    assert files.read_json(stage.attempt(1).outcome)["outcome"] == "stopped"


def test_a_rank_that_dies_elsewhere_is_followed_by_another_launch(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    assert go(stage, "go-on-once,killed-once", timing=Timing(retries=1, backoff_s=0.1, peers_s=0.2)) == 0
    told = files.read_json(stage.attempt(1).outcome)["launches"]
    assert [(each["ending"], each["world_size"], each["cause"] and each["cause"].splitlines()[0]) for each in told] == [
        ("failed", 2, "rank 1 was killed by SIGKILL on n2:"),
        ("done", 2, None),
    ]


def test_an_exit_code_that_tells_ends_the_attempt_wherever_it_comes_from(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    assert go(stage, "go-on,exit-4", timing=Timing(retries=3, peers_s=0.2)) == 4
    cause = files.read_json(stage.attempt(1).outcome)["cause"]
    assert cause.startswith("rank 1 ended with exit code 4 on n2")
    assert "the set is damaged" in cause


# ---- joining and leaving ---------------------------------------------------------------------------------------------


def test_only_who_can_read_the_run_may_join(leader: Leader) -> None:
    token = leader.stage.machines_token
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    with pytest.raises(Refused, match="it does not know the secret"):
        ask_to_join(leader.connect(), "another", this_machine(1, "cpu", "n2"))
    leader.joined("n2")
    until(lambda: leader.names() == ["n2"])
    leader.close(0)
    assert not token.exists()


def test_whatever_connects_the_leader_goes_on(leader: Leader) -> None:
    address = leader.launcher.address.host, leader.launcher.address.port
    for sent in (b"GET / HTTP/1.1\r\n\r\n", b"x" * (1 << 18), b'{"kind": "hello"}\n', b"\n", b""):
        with socket.create_connection(address) as stranger, suppress(ConnectionError):
            stranger.sendall(sent)
    until(lambda: leader.said.getvalue().count("has not joined") == 5)
    leader.joined("n2")
    until(lambda: leader.names() == ["n2"])


def test_two_machines_of_one_name_are_told_apart(leader: Leader) -> None:
    first = leader.joined("n2")
    with pytest.raises(Refused, match="another machine called n2 is there; give it another --name") as told:
        leader.joined("n2")
    assert not told.value.final, "the first may be a connection that is broken, which is noticed a little later"
    first.close()
    until(lambda: leader.names() == [])
    leader.joined("n2")


@pytest.mark.parametrize("after", ["joining", "start", "a failure"])
def test_a_machine_that_is_lost_is_named_and_missing_in_the_next_launch(leader: Leader, after: str) -> None:
    wire = leader.joined("n2", processes=3)
    if after == "joining":
        wire.close()
        until(lambda: leader.names() == [])
        ranks = leader.start()
        assert ranks.world_size == 1
        until(lambda: not ranks.alive())
        assert ranks.failed() is None
        return
    leader.launcher.local.extra = ("--script", "leave-when-asked")
    ranks = leader.start()
    told = wire.receive()
    about = {"attempt": 1, "launch": 1, "device": "cpu", "first": 1, "count": 3, "world_size": 4}
    assert (
        told | {"kind": "start", "master_addr": "127.0.0.1", "extra": ["--script", "leave-when-asked"], **about} == told
    )
    if after == "a failure":
        wire.send("failed", launch=1, rank=2, code=70)
        until(ranks.failed)
    wire.close()
    until(lambda: (failed := ranks.failed()) is not None and failed.rank is None)
    assert str(ranks.failed()) == "the node n2 was lost"
    ranks.send(signal.SIGTERM)
    until(lambda: not ranks.alive())
    ranks = leader.start(2)
    assert ranks.world_size == 1
    wire = leader.joined("n2")
    assert ranks.world_size == 1, "it waits for the next launch"
    ranks.send(signal.SIGKILL)
    until(lambda: not ranks.alive())
    assert leader.start(3).world_size == 2
    assert wire.receive()["launch"] == 3


def test_a_machine_that_is_lost_when_its_ranks_have_left_is_no_failure_of_theirs(leader: Leader) -> None:
    wire = leader.joined("n2")
    ranks = leader.start()
    wire.send("left", launch=1)
    wire.close()
    until(lambda: not leader.names() and not ranks.alive())
    assert ranks.failed() is None


def test_what_a_rank_died_of_outweighs_what_its_peers_say(leader: Leader) -> None:
    wire = leader.joined("n2")
    leader.launcher.local.extra = ("--script", "exit-70")
    ranks = leader.start()
    until(ranks.failed)
    assert str(ranks.failed()).startswith("rank 0 ended with exit code 70")
    ranks.send(signal.SIGTERM)
    wire.send("failed", launch=0, rank=5, code=-6)
    wire.send("failed", launch=1, rank=1, code=-signal.SIGTERM)
    wire.send("left", launch=1)
    until(lambda: not ranks.alive())
    assert str(ranks.failed()).startswith("rank 0"), "one of an earlier launch, and one that we ended"
    wire.send("failed", launch=1, rank=1, code=-signal.SIGSEGV)
    until(lambda: str(ranks.failed()).startswith("rank 1 was killed by SIGSEGV on n2"))


@pytest.mark.parametrize("asked", [False, True])
def test_where_a_lost_machine_made_all_save_the_others_go_on(leader: Leader, asked: bool) -> None:
    leader.launcher.local.extra = ("--script", "save-when-asked")
    wire = leader.joined("n2")
    ranks = leader.start()
    until((leader.stage.attempt(1).root / "env-0.json").exists)
    if asked:
        ranks.send(signal.SIGTERM)
    wire.send("leaves", why="SIGTERM")
    until(lambda: leader.names() == [])
    assert ranks.failed() is None, "it may be saving"
    ranks._local.send(signal.SIGTERM)  # as the agreement between ranks does
    wire.send("left", launch=1)
    wire.close()
    until(lambda: not ranks.alive())
    attempt = leader.stage.attempt(1)
    assert str(ranks.failed()) == "the node n2 was lost"
    assert (attempt.stopped.exists(), attempt.saved_for_a_machine(1).exists()) == (asked, not asked)


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = Leader(a_run(tmp_path))
        found.launcher.address = Address("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(MachineError, match="cannot be listened on: Address already in use"):
            found.launcher.open()


def test_machines_that_do_not_come_are_counted(tmp_path: Path) -> None:
    found = Leader(a_run(tmp_path), machines=3, patience_s=0.3).opened()
    found.joined("n2")
    until(found.names)
    with pytest.raises(MachineError, match="2 of 3 machines have joined within 0 s; missing: 1 other machine"):
        found.launcher.gather(lambda: False)
    found.launcher.gather(lambda: True)
    found.close(3)


# ---- the agent -------------------------------------------------------------------------------------------------------


def test_ranks_of_a_leader_that_is_lost_are_asked_to_save_and_killed_after_a_grace(leader: Leader) -> None:
    leader.launcher.local.extra = ("--script", "leave-when-asked,ignore")
    agent, result = an_agent(leader, grace_s=0.2)
    until(leader.names)
    ranks = leader.start()
    log = leader.stage.attempt(1).rank_log(1, 1)
    until(lambda: log.exists() and log.read_text())
    leader.killed()
    assert result() == 75
    ranks.send(signal.SIGTERM)
    until(lambda: not ranks.alive())
    told = agent.log.stream.getvalue()  # type: ignore[union-attr]
    assert "the leader is lost" in told
    assert "all ranks have left" in told


def test_an_agent_of_a_person_joins_the_next_leader(tmp_path: Path) -> None:
    first = Leader(a_run(tmp_path)).opened()
    _, result = an_agent(first, once=False)
    until(first.names)
    first.killed()
    second = Leader(first.stage)
    second.launcher.address = first.launcher.address
    second.opened()
    until(second.names)
    second.close(4)
    assert result() == 4


def test_an_agent_that_is_asked_to_stop_leaves_the_others_training(leader: Leader) -> None:
    leader.launcher.local.extra = ("--script", "leave-when-asked,leave-when-asked")
    agent, result = an_agent(leader)
    until(leader.names)
    ranks = leader.start()
    until((leader.stage.attempt(1).root / "env-1.json").exists)
    agent.requests.names.append("SIGTERM")
    assert result() == 75
    until(ranks.failed)
    assert leader.names() == []
    until(lambda: "n2 has left (SIGTERM)" in leader.said.getvalue())


def test_an_agent_without_a_leader_or_with_another_code_says_so(leader: Leader) -> None:
    agent, result = an_agent(leader)
    until(leader.names)
    leader.close(0)
    assert result() == 0
    agent.patience_s = 0.1
    with pytest.raises(MachineError, match="no leader has let this machine join within 0 s: Connection refused"):
        agent.work()
    files.write_text(leader.stage.done, "{}")
    assert agent.work() == 0


def test_an_agent_with_another_code_gives_up_at_once(leader: Leader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixart_ds.cluster.join.hash_here", lambda: "0123")
    _, result = an_agent(leader)
    assert "the leader refuses this machine: its code is 0123, the leader's " in str(result())
    until(lambda: "has not joined: its code is 0123" in leader.said.getvalue())


def test_a_run_that_is_not_shared_is_found_out(leader: Leader, tmp_path: Path) -> None:
    agent, result = an_agent(leader, folder_s=0.1)
    until(leader.names)
    agent.run = tmp_path / "elsewhere"
    ranks = leader.start()
    assert "the folder of attempt 1 is not seen on this machine" in str(result())
    until(ranks.failed)
    until(lambda: "n2 has left (the folder of attempt 1 is not seen" in leader.said.getvalue())


# ---- ssh -------------------------------------------------------------------------------------------------------------


def a_program(folder: Path, text: str) -> str:
    program = folder / "ssh"
    program.write_text(f"#!/bin/bash\n{text}\n")
    program.chmod(0o755)
    return str(program)


def test_the_command_line_survives_the_hosts_shell(tmp_path: Path) -> None:
    stage = a_run(tmp_path / "with space")
    environment = {"PYTHONPATH": "/a b", "NCCL_DEBUG": "INFO", "AWS_SECRET_ACCESS_KEY": "x", "HOME": "/h"}
    hosts = Hosts(["n2"], stage, "cuda", 8, "ssh -p 2222", environment)
    argv = hosts.argv("n2", Address("n1", 29400))
    assert argv[:5] == ["ssh", "-p", "2222", "-o", "BatchMode=yes"]
    assert argv[-2] == "n2"
    assert f"cd {os.getcwd()} && exec env NCCL_DEBUG=INFO 'PYTHONPATH=/a b' " in argv[-1]
    assert "--rendezvous n1:29400 --device cuda --name n2 --once --patience 60 --processes 8" in argv[-1]
    assert "AWS" not in argv[-1]
    assert f">> '{stage.machine_log('n2')}' 2>&1 < /dev/null" in argv[-1]


def test_this_machine_is_left_out_of_the_list() -> None:
    assert is_here("localhost")
    assert is_here(socket.gethostname())
    assert not is_here("no-such-host.invalid")
    assert parse_hosts("localhost, b.invalid,a.invalid,") == ["b.invalid", "a.invalid"]
    with pytest.raises(ConfigError, match="n2 stands in the list twice"):
        parse_hosts("n2,n2")
    with pytest.raises(ConfigError, match="'-oProxyCommand=x' is no name of a host"):
        parse_hosts("n2,-oProxyCommand=x")


def test_hosts_count_in_the_sequence_of_their_list(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    found = Leader(stage, hosts=Hosts(["n2", "n3"], stage, "cpu", 1, a_program(tmp_path, "exit 255"))).opened()
    for name in ("extra", "n3", "n2"):
        found.joined(name)
    until(lambda: found.names() == ["n2", "n3", "extra"])
    found.launcher.gather(lambda: False)
    found.close(0)


@pytest.mark.parametrize("third", ["exit 255", "exec sleep 100"])
def test_a_host_that_ssh_cannot_reach_is_called_again_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, third: str
) -> None:
    """With what the call before said where the newest one has said nothing yet."""
    monkeypatch.setattr(machines_module, "_AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(hosts_module, "_LEAVE_SECONDS", 0.1)
    stage, calls = a_run(tmp_path), tmp_path / "calls"
    each = f"[ $7 = n3 ] || exit 255; echo called >> {calls}; echo 'no route to host' >&2"
    program = a_program(tmp_path, f"{each}; [ $(wc -l < {calls}) -lt 3 ] || {third}; exit 255")
    found = Leader(stage, hosts=Hosts(["n2", "n3"], stage, "cpu", 1, program), patience_s=60).opened()
    found.joined("n2")
    found.launcher.gather(lambda: calls.exists() and len(calls.read_text().split()) > 2)
    found.launcher.patience_s = 0
    with pytest.raises(MachineError, match="2 of 3 machines .* missing: n3 \\(no route to host\\)"):
        found.launcher.gather(lambda: False)
    found.close(3)


def test_an_agent_that_fails_on_its_host_is_quoted_at_once(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    program = a_program(tmp_path, "echo 'the set is not there' >&2; exit 4")
    found = Leader(stage, hosts=Hosts(["n2"], stage, "cpu", 1, program)).opened()
    with pytest.raises(MachineError, match="the agent on n2 ended with exit code 4:\nthe set is not there"):
        found.launcher.gather(lambda: False)
    found.close(3)


def test_a_missing_ssh_is_named(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    found = Leader(stage, hosts=Hosts(["n2"], stage, "cpu", 1, "/no/ssh"))
    with pytest.raises(MachineError, match="/no/ssh cannot be started: No such file"):
        found.launcher.lead(SimpleNamespace(names=[]), lambda: 0)  # type: ignore[arg-type]
    assert not stage.machines_token.exists()


def test_what_ssh_started_is_ended_with_the_leader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts_module, "_LEAVE_SECONDS", 0.1)
    stage = a_run(tmp_path)
    found = Leader(stage, hosts=Hosts(["n2"], stage, "cpu", 1, a_program(tmp_path, "exec sleep 100"))).opened()
    call = found.launcher.hosts._calls["n2"]  # type: ignore[union-attr]
    found.close(0)
    assert call.poll() == -signal.SIGKILL


def test_a_lost_host_is_called_again_before_the_next_launch(tmp_path: Path) -> None:
    stage = a_run(tmp_path)
    found = Leader(stage, hosts=Hosts(["n2"], stage, "cpu", 1, a_program(tmp_path, f"echo called >> {tmp_path}/calls")))
    found.opened()
    wire = found.joined("n2")
    until(found.names)
    wire.close()
    until(lambda: not found.names())
    until(lambda: found.launcher.hosts.ended("n2") is not None)  # type: ignore[union-attr]
    assert found.start(2).world_size == 1
    assert (tmp_path / "calls").read_text() == "called\ncalled\n"
    found.close(0)


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"rendezvous": "n1:29400"}, "--rendezvous is for several machines"),
        ({"machines": 2}, "--machines needs an address"),
        ({"machines": 2, "rendezvous": "n1:0"}, "port 0 is none that the others could know"),
        ({"hosts": "n2", "rendezvous": "n1"}, "'n1' is no HOST:PORT"),
    ],
)
def test_options_that_do_not_go_together_are_named(tmp_path: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        machines_launcher(LocalLauncher(1), a_run(tmp_path), options(**given))


def test_what_is_wrong_is_said_before_anything_is_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["join", str(tmp_path), "stage1", "--rendezvous", "n1"]) == 2
    assert "pixart-ds join: 'n1' is no HOST:PORT" in capsys.readouterr().err
    assert main(["join", str(tmp_path), "stage1", "--rendezvous", "n1:29400"]) == 2
    assert "manifest.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path), "stage1", "--hosts", "n1", "--machines", "2"])


def options(**given: Any) -> argparse.Namespace:
    plain = {"hosts": None, "machines": None, "rendezvous": None, "ssh": None, "processes": None}
    return argparse.Namespace(**{**plain, "device": "cpu", "patience": 600, **given})


def test_what_would_run_is_said(tmp_path: Path) -> None:
    local, stage = LocalLauncher(8), a_run(tmp_path)
    assert machines_launcher(local, stage, options()) is None
    by_hand = machines_launcher(local, stage, options(machines=3, rendezvous=f"n1:{free_port()}"))
    assert str(by_hand) == "3 machines, 8 local processes on this one"
    by_ssh = machines_launcher(local, stage, options(hosts="localhost,b.invalid,a.invalid"))
    assert str(by_ssh) == "3 machines, 8 local processes on this one"
    assert words.SILENCE_SECONDS > 3 * words.BEAT_SECONDS
