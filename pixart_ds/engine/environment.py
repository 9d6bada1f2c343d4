"""Who a rank is among how many: what each launcher says in environment variables, in one place and without torch.

Launchers speak torch's language (torchrun, the deepspeed launcher, our supervisor), Slurm's (a task of srun), or none at all.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pixart_ds.errors import MachineError

TORCH_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""torch's variables, and the deepspeed launcher's LOCAL_SIZE, which it sets instead of LOCAL_WORLD_SIZE."""

PARENT_PID = "PIXART_DS_PARENT_PID"
"""Process that the local launcher runs in: a rank that finds itself without it leaves."""

_REMEDY = (
    "start the ranks with `pixart-ds train`, torchrun, deepspeed or srun; "
    "or unset these variables to train in a single process (docs/launching.md)"
)


@dataclass(frozen=True)
class RankEnvironment:
    """What a launcher tells one rank: its place among all, and where all of them meet.

    Attributes:
        launcher: Whose words said it; `torchrun` also stands for the supervisor, which uses the same.
        rank, size: Among all ranks.
        local_rank, local_size: Among those of this machine.
        master_addr, master_port: Where rank 0 listens.
    """

    launcher: Literal["alone", "torchrun", "deepspeed", "srun"]
    rank: int
    size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int

    def variables(self) -> dict[str, str]:
        """The same in torch's words, which DeepSpeed reads as well."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def read_environment(environment: Mapping[str, str]) -> RankEnvironment:
    """This rank's place; torch's words count before Slurm's, so that torchrun and the supervisor work inside an allocation.

    A process that no launcher started is a world of one, at a free port.

    Raises:
        MachineError: All variables that are missing, are no number, or contradict each other.
    """
    said = _Said(environment)
    ranks = [name for name in TORCH_NAMES if not name.startswith("MASTER") and said.has(name)]
    if ranks or (said.has("MASTER_ADDR", "MASTER_PORT") and not said.has("SLURM_STEP_ID")):
        given = _torch(said)
    elif said.has("SLURM_STEP_ID"):
        given = _slurm(said)
    else:
        if said.has("SLURM_PROCID") and (tasks := environment.get("SLURM_NTASKS", "1")) != "1":
            said.problems.append(
                f"SLURM_NTASKS is {tasks}, but SLURM_STEP_ID is not set: this is the job's script, and no task of srun"
            )
        given = RankEnvironment("alone", 0, 1, 0, 1, "127.0.0.1", free_port())
    said.compare(given)
    if said.problems:
        raise MachineError(
            "the environment does not say who this rank is: " + "; ".join(said.problems),
            where="environment variables",
            remedy=_REMEDY,
        )
    return given


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Said:
    """The variables, read one by one; what is wrong with them is collected, and the figure -1 stands for it meanwhile."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.problems: list[str] = []
        self.sources: dict[str, str] = {}
        """Which variable said each of rank, size, local_rank and local_size."""

    def has(self, *names: str) -> bool:
        return any(self.environment.get(name, "").strip() for name in names)

    def first(self, *names: str) -> str | None:
        """The first of `names` that is set; a problem if none is."""
        for name in names:
            if self.has(name):
                return name
        self.problems.append(" or ".join(names) + (" is not set" if len(names) == 1 else ": none is set"))
        return None

    def text(self, *names: str) -> str:
        name = self.first(*names)
        return self.environment[name].strip() if name else ""

    def number(self, *names: str, of: str | None = None) -> int:
        """The number in the first of `names` that is set; `of` is what it says of this rank."""
        if (name := self.first(*names)) is None:
            return -1
        value = self.environment[name].strip()
        if not value.isdecimal():
            self.problems.append(f"{name} is {value!r}, not a number")
            return -1
        if of:
            self.sources[of] = name
        return int(value)

    def compare(self, given: RankEnvironment) -> None:
        """Finds figures that contradict each other."""
        for part, whole in (("rank", "size"), ("local_rank", "local_size"), ("local_size", "size")):
            least = 1 if part == "local_size" else 0
            small, large = getattr(given, part), getattr(given, whole)
            if small >= 0 and large >= 0 and small > large - 1 + least:
                names = self.sources.get(part, part), self.sources.get(whole, whole)
                self.problems.append(f"{names[0]} is {small}, but {names[1]} is {large}")


def _torch(said: _Said) -> RankEnvironment:
    deepspeed = said.has("LOCAL_SIZE") and not said.has("LOCAL_WORLD_SIZE")
    given = RankEnvironment(
        "deepspeed" if deepspeed else "torchrun",
        said.number("RANK", of="rank"),
        said.number("WORLD_SIZE", of="size"),
        said.number("LOCAL_RANK", of="local_rank"),
        said.number("LOCAL_SIZE" if deepspeed else "LOCAL_WORLD_SIZE", of="local_size"),
        said.text("MASTER_ADDR"),
        said.number("MASTER_PORT"),
    )
    if said.has("LOCAL_SIZE") and not deepspeed and said.number("LOCAL_SIZE") not in (-1, given.local_size):
        said.problems.append(
            f"LOCAL_SIZE is {said.text('LOCAL_SIZE')}, but LOCAL_WORLD_SIZE is {said.text('LOCAL_WORLD_SIZE')}"
        )
    return given


def _slurm(said: _Said) -> RankEnvironment:
    """A task of srun. A step may be smaller than its job, so the step's own variables come first; all tasks derive the same meeting
    point, of which Slurm says nothing (SLURM_LAUNCH_NODE_IPADDR is the host of srun, not of task 0).
    """
    return RankEnvironment(
        "srun",
        said.number("SLURM_PROCID", of="rank"),
        said.number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", of="size"),
        said.number("SLURM_LOCALID", of="local_rank"),
        _tasks_here(said),
        said.text("MASTER_ADDR")
        if said.has("MASTER_ADDR")
        else first_host(said.text("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")),
        said.number("MASTER_PORT")
        if said.has("MASTER_PORT")
        else job_port(
            said.number("SLURM_JOB_ID"),
            said.number("SLURM_STEP_ID"),
            said.number("SLURM_RESTART_COUNT") if said.has("SLURM_RESTART_COUNT") else 0,
        ),
    )


def _tasks_here(said: _Said) -> int:
    """Tasks of this step on this node: `8(x2),4` lists them node by node, and SLURM_NODEID says which one this is."""
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    if not said.has(*names) and said.has("SLURM_NTASKS_PER_NODE"):
        return said.number("SLURM_NTASKS_PER_NODE", of="local_size")
    name, node = said.first(*names), said.number("SLURM_NODEID")
    if name is None or node < 0:
        return -1
    text, counts = said.text(name), []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            said.problems.append(f"{name} is {text!r}, not tasks per node as in 8(x2),4")
            return -1
        counts += [int(found[1])] * int(found[2] or 1)
    if node >= len(counts):
        said.problems.append(f"SLURM_NODEID is {node}, but {name} is {text!r}")
        return -1
    said.sources["local_size"] = name
    return counts[node]


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: n1 of `n[1-8,10],m2`; task 0 runs there."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else ""


def job_port(job: int, step: int, restarts: int = 0) -> int:
    """A port that all tasks of a step know; other jobs, steps and starts of the job on the same node have others, mostly."""
    return 20000 + (job + 101 * step + 3001 * restarts) % 10000
