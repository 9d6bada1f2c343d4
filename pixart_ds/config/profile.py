"""What is particular to a site: a profile in slurm/profiles/, or a file of the user's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from pixart_ds.config.load import read_layers, validate
from pixart_ds.config.schema import CacheConfig, Name, PositiveFloat, PositiveInt, Section
from pixart_ds.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent.parent
FOLDERS = (_PACKAGE.parent / "slurm", _PACKAGE / "slurm")
"""Of profiles/, setup.sh and the sbatch files: beside the package in a checkout, inside it once installed."""

OWN_OPTIONS = {
    **dict.fromkeys(
        ("ntasks", "ntasks-per-node", "ntasks-per-gpu", "gpus", "gpus-per-task", "cpus-per-task", "n", "c", "G"),
        "it would freeze the number of nodes at the first start; tasks_per_node says how many tasks srun starts",
    ),
    **dict.fromkeys(("nodes", "N"), "stages.STAGE.nodes says how many"),
    **dict.fromkeys(("time", "t"), "time says it"),
    **dict.fromkeys(("signal", "requeue", "no-requeue", "no-kill", "open-mode"), "warning_s and requeue decide it"),
    **dict.fromkeys(("job-name", "J", "output", "o", "error", "e", "dependency", "d"), "the job's own"),
    **dict.fromkeys(("partition", "account", "qos", "constraint", "gres", "exclusive"), "it is a key of its own"),
}
"""Options of sbatch that `sbatch:` must not hold, and why."""


def _quoted(value: object) -> object:
    if isinstance(value, int):  # YAML takes 20:00:00 for a number in base 60
        raise ValueError(f"YAML reads a number here ({value}); put it between quotes")
    return value


TimeLimit = Annotated[
    str, BeforeValidator(_quoted), Field(pattern=r"^(\d+|\d+:\d{2}|\d+:\d{2}:\d{2}|\d+-\d{1,2}(:\d{2}){0,2})$")
]
"""As sbatch reads it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS."""
Nodes = Annotated[str, BeforeValidator(_quoted), Field(pattern=r"^\d+(-\d+)?$")]
"""As sbatch reads it: 8, or 4-8 for what can be had between the two."""
ShellName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class StageJob(Section):
    """A stage's own size and time at a site."""

    nodes: Nodes | None = None
    """4-8: each attempt takes what it gets. By default as many as hold the paper's number of GPUs."""
    time: TimeLimit | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.nodes is not None:
            node_range(self.nodes)
        return self


class CostConfig(Section):
    """What turns the site's device time into money, energy and emissions; by default what the table of rates says."""

    price_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Dollars for a GPU-hour."""
    country: str | None = None
    """Whose electricity: ISO code of three letters, or WORLD."""
    pue: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """Power usage effectiveness of the site."""
    grams_per_kwh: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """CO2e of the site's own electricity, location-based, in place of the country's average."""
    watts: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Of a GPU, where its energy was not measured."""
    host_watts: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Of a GPU's share of the node around it, which nothing measures."""


class Profile(Section):
    """The facts of a site that a job depends on."""

    description: str
    gpu: str | None = None
    """What its nodes have, as `pixart-ds estimate --gpu` names it; null: none that is real."""
    gpus_per_node: PositiveInt
    device: Literal["cpu", "cuda"] = "cuda"
    tasks_per_node: PositiveInt | None = None
    """Ranks on each node; by default one for each GPU."""
    gres: str | None = None
    """By default gpu:GPUS_PER_NODE; sites with several kinds want gpu:v100:8."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclusive: bool = True
    """Whole nodes."""
    time: TimeLimit = "20:00:00"
    """Of one attempt; a job goes on in the next one."""
    sbatch: dict[str, str | int | bool] = Field(default={})
    """Further options of sbatch by their long names, without dashes; true for those without a value."""
    requeue: bool = True
    """Whether a job may go back into the queue. Where sites forbid it, a second job waits behind the one that runs."""
    warning_s: PositiveInt = 300
    """Before the time limit, when all ranks are asked to save; at least twice the longest step and save together."""
    grace_s: PositiveFloat | None = None
    """What preemption leaves between its warning and the end; null: there is none, or nobody knows."""
    setup: tuple[str, ...] = Field(default=(), strict=False)
    """Lines of shell at the start of a job, before the environment is entered: modules."""
    environment: dict[ShellName, str | int] = Field(default={})
    """Variables of the job; no secrets: they would stand in the job's script."""
    environment_archive: Annotated[str, Field(pattern=r"^/.*\.(tar|tar\.gz|tgz|tar\.zst)$")] | None = None
    """An environment with bin/python at its top, that each attempt unpacks onto every node, and enters in place of the one that
    submitted: ranks of many nodes then do not read Python's files from one file system."""
    environment_folder: Annotated[str, Field(pattern=r"^[/$][\w/.${}:-]*$")] | None = None
    """Where to, on the node's own disk, such as $TMPDIR/env; the node that runs the script expands it for all."""
    container: Annotated[str, Field(min_length=1)] | None = None
    """What starts a rank inside a container: apptainer exec --nv /path/pixart.sif. Put before `python`, which is the image's."""
    cache: CacheConfig | None = None
    """In place of the recipe's execution.cache."""
    stages: dict[Name, StageJob] = Field(default={})
    cost: CostConfig = CostConfig()

    @model_validator(mode="after")
    def _leaves_what_is_ours(self) -> Self:
        problems = [f"sbatch.{key}: {OWN_OPTIONS[key]}" for key in self.sbatch if key in OWN_OPTIONS]
        problems += [f"sbatch.{key}: write it without dashes" for key in self.sbatch if key.startswith("-")]
        if (self.environment_archive is None) != (self.environment_folder is None):
            problems.append("environment_archive and environment_folder go together: what is unpacked, and where to")
        for name in self.environment:
            if re.search(r"(^|_)(SECRET|TOKEN|PASSWORD|PASSWD|KEY)(_|$)", name.upper()):
                problems.append(
                    f"environment.{name} looks like a secret, which would stand in the job's script; "
                    "set it in the shell that submits, or in a file that only you can read"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node

    def nodes_of(self, stage: str, paper_gpus: int | None) -> str:
        """How many nodes a stage's job asks for."""
        own = self.stages.get(stage)
        if own is not None and own.nodes is not None:
            return own.nodes
        return str(-(-(paper_gpus or self.gpus_per_node) // self.gpus_per_node))

    def time_of(self, stage: str) -> str:
        """A stage's time limit."""
        own = self.stages.get(stage)
        return own.time if own is not None and own.time is not None else self.time

    def site(self) -> dict[str, str | float]:
        """What turns device time here into money, energy and emissions: the job notes it with each attempt."""
        gpu = {} if self.gpu is None else {"gpu": self.gpu}
        return {"name": self.description, **gpu, **self.cost.model_dump(exclude_none=True)}


def node_range(text: str) -> tuple[int, int]:
    """(least, most) nodes of `8` or `4-8`.

    Raises:
        ValueError: It is neither.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise ValueError(f"nodes {text!r} is neither a number from 1 on nor a range such as 4-8")
    return least, most


def seconds_of(time: str) -> int:
    """The seconds of a time limit as sbatch reads it."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:  # D-HH, D-HH:MM, D-HH:MM:SS
        parts += [0] * (3 - len(parts))
    elif len(parts) == 1:
        parts = [0, *parts, 0]
    hours, minutes, seconds = [0] * (3 - len(parts)) + parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def slurm_folder() -> Path:
    """The folder slurm/ of this package."""
    return next(folder for folder in FOLDERS if folder.is_dir())


def known_profiles() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in (slurm_folder() / "profiles").glob("*.yaml"))


def load_profile(name: str) -> Profile:
    """A profile by path, or by the name of one in slurm/profiles/; `base: NAME.yaml` builds on another one.

    Raises:
        ConfigError: There is none, or all that is wrong with it.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = slurm_folder() / "profiles" / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"there is no profile {name!r}",
            where=path,
            remedy=f"choose one of: {', '.join(known_profiles())}; or give the path of a copy that you have edited",
        )
    return validate(Profile, read_layers(path), path)
