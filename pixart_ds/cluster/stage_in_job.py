"""`pixart-ds stage-in --profile P`: a job that fills the caches of a stage's nodes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixart_ds.cluster import bad_nodes, frozen
from pixart_ds.cluster.jobs import Place, cache_settings, further_options, header_option, job_name
from pixart_ds.cluster.slurm import call, own_jobs
from pixart_ds.config.profile import Profile
from pixart_ds.config.schema import StageConfig
from pixart_ds.errors import ConfigError, MachineError
from pixart_ds.layout import RunLayout

FOLDER = "stage-in"
"""Below a stage's submissions: scripts and outputs, apart from those of the jobs that train."""


@dataclass(frozen=True)
class StageInJob:
    """A job that fills caches.

    Attributes:
        stage: With the cache that it is trained with.
        profile: The site.
        place: Of the run.
        sets: Overrides of `execution`, KEY=VALUE.
        exclude: Nodes that it shall not get.
    """

    stage: StageConfig
    profile: Profile
    place: Place
    sets: Sequence[str] = ()
    exclude: Sequence[str] = ()

    @property
    def name(self) -> str:
        return f"{job_name(self.place.run, self.stage.name)}-{FOLDER}"

    @property
    def nodes(self) -> str:
        """One where all nodes read the same copy."""
        if self.stage.execution.cache.mode == "shared":
            return "1"
        return self.profile.nodes_of(self.stage.name, self.stage.paper_gpus)

    def render(self) -> str:
        """The script for sbatch."""
        return "\n".join([*self._header(), "", *self._body()]) + "\n"

    def _header(self) -> Iterator[str]:
        profile = self.profile
        shared = self.stage.execution.cache.mode == "shared"
        where = (
            "into a copy that all nodes read" if shared else "into the cache of each of its nodes, which stays there"
        )
        yield "#!/bin/bash"
        yield f"# {self.stage.name}: copies the shards that it reads {where}."
        yield f"#SBATCH --job-name={self.name}"
        for key in ("partition", "account", "qos", "constraint"):
            if (value := getattr(profile, key)) is not None:
                yield header_option(key, value)
        yield f"#SBATCH --nodes={self.nodes}"
        yield "# One task on each node; it needs no GPU."
        yield "#SBATCH --ntasks-per-node=1"
        yield f"#SBATCH --time={profile.time_of(self.stage.name)}"
        yield from further_options(profile, self.exclude)
        yield header_option("output", self.place.output)
        yield "# Started again, it keeps what is there."
        yield "#SBATCH --requeue" if profile.requeue else "#SBATCH --no-requeue"
        yield "#SBATCH --open-mode=append"

    def _body(self) -> Iterator[str]:
        place = self.place
        yield f"export RUN={shlex.quote(str(place.run))}"
        yield f"export VENV={shlex.quote(str(place.venv))}"
        yield from self.profile.setup
        for key, value in self.profile.environment.items():
            yield f"export {key}={shlex.quote(str(value))}"
        yield f"source {shlex.quote(str(place.code / 'slurm' / 'setup.sh'))}"
        words = ["pixart-ds", "stage-in", '"$RUN"', self.stage.name]
        if self.stage.execution.cache.mode != "shared":
            words += ["--nodes", '"$SLURM_NNODES"', "--node", '"$SLURM_NODEID"']
        for each in (*cache_settings(self.profile), *self.sets):
            words += ["--set", shlex.quote(each)]
        yield "# Which node of how many it is, each task knows; a node that fails does not end the others."
        yield " ".join(
            [
                'exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export=ALL --label',
                "--kill-on-bad-exit=0 bash -c",
                shlex.quote(" ".join(["exec", *words])),
            ]
        )


@dataclass(frozen=True)
class Submitted:
    """What was submitted, or would be.

    Attributes:
        spec: The job.
        text: Its script.
        job: Its number; None where nothing was submitted.
        output: File of what it prints, %j being its number.
        notes: What a person should know.
    """

    spec: StageInJob
    text: str
    job: str | None
    output: Path
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.spec.name,
            "job": self.job,
            "nodes": self.spec.nodes,
            "script": self.text,
            "notes": list(self.notes),
        }


def submit(
    run: RunLayout,
    stage: StageConfig,
    profile: Profile,
    sets: Sequence[str] = (),
    *,
    dry_run: bool = False,
    update_code: bool = False,
) -> Submitted:
    """Submits the job that fills a stage's caches.

    Args:
        run, stage: The stage with the profile's cache.
        profile: The site.
        sets: Overrides of `execution`.
        dry_run: Only say what would be submitted.
        update_code: Freeze the code anew.

    Raises:
        ConfigError: Such a job is there already.
        MachineError: Slurm is not here, or refuses.
    """
    code = frozen.freeze(run, FOLDER, update=update_code, dry_run=True)
    folder = run.stage(stage.name).submissions.absolute() / FOLDER
    place = Place(run.root.absolute(), code.folder, Path(sys.prefix), folder / "%j.out")
    spec = StageInJob(stage, profile, place, tuple(sets), tuple(bad_nodes.excluded(run)))
    if there := own_jobs(spec.name):
        raise ConfigError(
            f"job {there[0]['job']} stages this stage in already ({there[0]['state'].lower()})",
            where=spec.name,
            remedy=f"wait for it, or end it: scancel {there[0]['job']}",
        )
    text = spec.render()
    job = None
    if not dry_run:
        frozen.freeze(run, FOLDER, update=update_code)
        job = _sbatch(text, folder)
    return Submitted(spec, text, job, place.output, tuple(notes_of(stage, profile)))


def notes_of(stage: StageConfig, profile: Profile) -> Iterator[str]:
    """What a person should know of a job before it runs."""
    cache = stage.execution.cache
    if cache.mode != "node-persistent":
        return
    if "nodelist" not in profile.sbatch:
        yield (
            "Slurm may give the stage other nodes than this job; those fetch what they miss. To keep it on the same: "
            "sbatch: {nodelist: …} in the profile, which both jobs obey, or a constraint that only these nodes have"
        )
    if cache.folder is None:
        yield (
            "execution.cache.folder is not named: the cache lies in $TMPDIR, which many sites make anew for each job and remove "
            "with it; name a folder on the node's own disk that stays"
        )


def _sbatch(text: str, folder: Path) -> str:
    """Submits a script, which is kept beside its output; the job's number."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / ".new.sbatch"
    script.write_text(text, encoding="utf-8")
    answer = call("sbatch", "--parsable", str(script))
    if answer.returncode:
        script.unlink()
        said = " ".join(answer.stderr.replace("sbatch: error:", "").split())
        raise MachineError(
            f"sbatch refused the job: {said}", where=folder, remedy="change the profile, or its options here"
        )
    job = answer.stdout.strip().split(";")[0]
    script.rename(folder / f"{job}.sbatch")
    return job
