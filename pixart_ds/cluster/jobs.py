"""A stage's job, and the one rendering of it: for the files in slurm/ and for what `pixart-ds launch` submits."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pixart_ds.config.profile import Profile
from pixart_ds.config.schema import StageConfig
from pixart_ds.train.attempt import SITE_VARIABLE

_EXAMPLES = {"partition": "gpu", "account": "project", "constraint": "v100-32g"}
"""What a person who edits a checked-in file is shown where the profile says nothing."""


HOLD = "#SBATCH --hold"


def job_name(run: Path, stage: str) -> str:
    """The name of a stage's jobs; runs of one name in different folders have different ones."""
    which = hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:6]
    name = re.sub(r"[^\w.-]", "_", run.absolute().name)
    return f"pixart-{name}-{stage}-{which}"


@dataclass(frozen=True)
class Place:
    """Where a job finds its run and its code.

    Attributes:
        run: Folder of the run.
        code: The run's frozen copy of the code.
        venv: The environment that the job enters.
        output: File of what the job's script prints; %j is its number.
    """

    run: Path
    code: Path
    venv: Path
    output: Path


@dataclass(frozen=True)
class JobSpec:
    """A stage's job at a site.

    Attributes:
        stage: The stage, for its name and the paper's figures.
        profile: The site.
        place: Of one run; None for the checked-in files, which find everything where they are submitted.
        sets: Overrides of `execution` that the stage is trained with, KEY=VALUE.
        exclude: Nodes that it shall not get.
        after: Jobs that must end well before it begins.
        held: Why it waits until it is released; None if it does not.
    """

    stage: StageConfig
    profile: Profile
    place: Place | None = None
    sets: Sequence[str] = ()
    exclude: Sequence[str] = ()
    after: Sequence[str] = ()
    held: str | None = None

    @property
    def name(self) -> str:
        """Of the job; where jobs wait behind each other, those of one name do."""
        return f"pixart-{self.stage.name}" if self.place is None else job_name(self.place.run, self.stage.name)

    @property
    def nodes(self) -> str:
        return self.profile.nodes_of(self.stage.name, self.stage.paper_gpus)

    @property
    def time(self) -> str:
        return self.profile.time_of(self.stage.name)

    def render(self) -> str:
        """The script for sbatch."""
        return "\n".join([*self._header(), "", *self._body()]) + "\n"

    def _header(self) -> Iterator[str]:
        stage, profile = self.stage, self.profile
        yield "#!/bin/bash"
        paper = ""
        if stage.paper_gpus is not None and stage.paper_gpu_days is not None:
            paper = f"; the paper used {stage.paper_gpus} V100s for {stage.paper_gpu_days:g} GPU-days"
        about = " ".join(stage.description.split())  # the first line that is no comment would end the header
        yield f"# {stage.name}: {about}{paper}."
        if self.place is None:
            yield f"# From the top of the checkout: sbatch slurm/{stage.name}.sbatch. The run's folder and modules: slurm/setup.sh."
            yield "# Edit partition, account, constraint and time below; or write a profile (slurm/profiles/): pixart-ds launch."
        yield f"#SBATCH --job-name={self.name}"
        for key in ("partition", "account", "qos", "constraint"):
            value = getattr(profile, key)
            if value is not None:
                yield header_option(key, value)
            elif self.place is None and key in _EXAMPLES:
                yield f"##SBATCH --{key}={_EXAMPLES[key]}"
        if self.place is None:
            yield "# Nodes as MIN-MAX, such as 4-8: an attempt takes what it gets, the next one may have more."
        yield f"#SBATCH --nodes={self.nodes}"
        if profile.exclusive:
            yield "#SBATCH --exclusive"
        yield header_option("gres", profile.gres or f"gpu:{profile.gpus_per_node}")
        yield f"#SBATCH --time={self.time}"
        yield from further_options(profile, self.exclude)
        yield header_option("output", self.place.output if self.place else f"{self.name}-%j.out")
        yield "# A preempted or requeued job starts again and resumes; its output goes on in the same file."
        yield "#SBATCH --requeue" if profile.requeue else "#SBATCH --no-requeue"
        yield "#SBATCH --open-mode=append"
        yield f"# The batch process, which is the supervisor, is warned {_span(profile.warning_s)} before the end: all ranks save."
        yield f"#SBATCH --signal=B:USR1@{profile.warning_s}"
        yield "# A lost node ends the launch, not the job: the supervisor starts the ranks again on the nodes that are left."
        yield "#SBATCH --no-kill"
        if not profile.requeue:
            yield "# Requeueing is forbidden here: a second job of this name waits behind the one that runs."
        yield from self._dependencies()
        yield "# No task counts here: they would freeze the number of nodes at the first start. The supervisor gives them to srun."

    def _dependencies(self) -> Iterator[str]:
        """What it waits for."""
        if waits := dependencies(self.profile, self.after):
            yield f"#SBATCH --dependency={waits}"
        if self.held is not None:
            yield "# Released when the stage before it is done."
            yield HOLD
            yield header_option("comment", self.held)

    def _body(self) -> Iterator[str]:
        place = self.place
        yield "# A warning that comes before the supervisor listens is passed on to it; untrapped, it would kill the job."
        yield "trap 'export PIXART_DS_ASKED=SIGUSR1' USR1"
        if place is None:
            yield 'source "$SLURM_SUBMIT_DIR/slurm/setup.sh"'
        else:
            yield f"export RUN={shlex.quote(str(place.run))}"
            if self.profile.environment_archive is None:
                yield f"export VENV={shlex.quote(str(place.venv))}"
            yield "# What turns this site's device time into money, energy and emissions; noted in the ledger."
            yield f"export {SITE_VARIABLE}={shlex.quote(json.dumps(self.profile.site(), ensure_ascii=False))}"
        yield from self.profile.setup
        for key, value in self.profile.environment.items():
            yield f"export {key}={shlex.quote(str(value))}"
        yield from self._unpack()
        if place is not None:
            yield f"source {shlex.quote(str(place.code / 'slurm' / 'setup.sh'))}"
        if self.profile.environment_archive is not None:
            yield 'export PATH="$VENV/bin:$PATH" # before what its own activate says, which may name another folder'
        yield " ".join(["exec", *self.command()])

    def _unpack(self) -> Iterator[str]:
        """The environment on the disk of each node."""
        profile = self.profile
        if profile.environment_archive is None:
            return
        slurm = '"$SLURM_SUBMIT_DIR/slurm"' if self.place is None else shlex.quote(str(self.place.code / "slurm"))
        yield "# The environment, unpacked onto each node's own disk, unless the same lies there."
        yield f'export VENV="{profile.environment_folder}"'
        yield (
            'srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export=ALL --overlap '
            f'--kill-on-bad-exit=0 bash {slurm}/unpack.sh {shlex.quote(profile.environment_archive)} "$VENV" || exit 3'
        )

    def command(self) -> list[str]:
        """The supervisor's command line, quoted for the shell."""
        profile = self.profile
        # console scripts name the folder that the environment was made in; where it was unpacked elsewhere, they start that one
        program = ["pixart-ds"] if profile.environment_archive is None else ['"$VENV/bin/python"', "-m", "pixart_ds"]
        words = [*program, "train", '"$RUN"', self.stage.name, "--launcher", "srun", "--device", profile.device]
        if profile.tasks_per_node is not None:
            words += ["--tasks-per-node", str(profile.tasks_per_node)]
        if profile.warning_s != Profile.model_fields["warning_s"].default:
            words += ["--warning", str(profile.warning_s)]
        if not profile.requeue:
            words += ["--successor"]
        if profile.container is not None:
            words += ["--container", shlex.quote(profile.container)]
        for each in (*cache_settings(profile), *self.sets):
            words += ["--set", shlex.quote(each)]
        return words


def cache_settings(profile: Profile) -> list[str]:
    """The profile's cache as overrides of a stage."""
    given = {} if profile.cache is None else profile.cache.model_dump(exclude_unset=True)
    return [f"execution.cache.{key}={value}" for key, value in given.items()]


def dependencies(profile: Profile, after: Sequence[str]) -> str:
    """What a job waits for, as sbatch takes it: that these jobs end well, and where jobs go in pairs, those of its own name."""
    own = [] if profile.requeue else ["singleton"]
    return ",".join([*own, *([":".join(["afterok", *after])] if after else [])])


def further_options(profile: Profile, exclude: Sequence[str]) -> Iterator[str]:
    """Lines of the header: what the profile adds, and the nodes that are left out."""
    for key, value in profile.sbatch.items():
        if value is not False:
            yield f"#SBATCH --{key}" if value is True else header_option(key, value)
    if exclude:
        yield header_option("exclude", ",".join(exclude))


def header_option(key: str, value: object) -> str:
    """A line of a job's header."""
    text = str(value)
    return f"#SBATCH --{key}=" + (f'"{text}"' if re.search(r"\s", text) else text)


def _span(seconds: int) -> str:
    return f"{seconds // 60} minutes" if seconds % 60 == 0 and seconds > 60 else f"{seconds} seconds"
