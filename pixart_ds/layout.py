"""Every name inside a run directory, spelt once (architecture: On disk)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_CHECKPOINT = re.compile(r"img-(\d{12})-a(\d{4})-l(\d{2})")


@dataclass(frozen=True)
class RunLayout:
    """One execution of a chain."""

    root: Path

    @property
    def chain(self) -> Path:
        return self.root / "chain.yaml"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def code(self) -> Path:
        """Folder of the frozen copies of the code that attempts run."""
        return self.root / "code"

    @property
    def report(self) -> Path:
        """The cost report as a page, written anew at the end of each attempt."""
        return self.root / "report.html"

    @property
    def budget(self) -> Path:
        """What the run may use up, and who has changed it when."""
        return self.root / "budget.json"

    @property
    def bad_nodes(self) -> Path:
        """Nodes of the cluster that jobs of this run leave out for a while, a line each."""
        return self.root / "bad-nodes.jsonl"

    @property
    def sacct(self) -> Path:
        """Slurm's rows of the run's jobs as last seen, a line each; its database forgets."""
        return self.root / "sacct.jsonl"

    def stage(self, name: str) -> StageLayout:
        return StageLayout(self.root / name)


@dataclass(frozen=True)
class StageLayout:
    """One stage of a run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "stage.yaml"

    @property
    def deepspeed(self) -> Path:
        return self.root / "deepspeed.json"

    @property
    def changes(self) -> Path:
        """Changes of what is trained that a person has allowed, a line each."""
        return self.root / "changes.jsonl"

    @property
    def skips(self) -> Path:
        """The images that are left out because training went wrong there."""
        return self.root / "skips.json"

    @property
    def submissions(self) -> Path:
        """Folder of the job scripts that were submitted, and of what they print."""
        return self.root / "submissions"

    @property
    def stop_request(self) -> Path:
        """A file that asks the stage to stop at the next step boundary."""
        return self.root / "stop"

    @property
    def machines(self) -> Path:
        """Folder of what concerns machines that train together without Slurm: who may join, and what ssh said."""
        return self.root / "machines"

    @property
    def machines_token(self) -> Path:
        """The secret that a machine shows to join; only the run's owner reads it."""
        return self.machines / "token"

    def machine_log(self, host: str) -> Path:
        """What the agent on a host said that was started by ssh, and ssh itself."""
        return self.machines / f"{host}.txt"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def checkpoints_elsewhere(self) -> Path:
        """If it is there: where the checkpoints lie instead."""
        return self.root / "checkpoints.json"

    @property
    def previews(self) -> Path:
        return self.root / "previews"

    def preview(self, images_seen: int) -> Path:
        """The sheet that was drawn at a clock."""
        return self.previews / f"img-{images_seen:012d}.png"

    @property
    def sheet(self) -> Path:
        """Sample grid of what the stage handed over, where one was drawn."""
        return self.root / "sheet.png"

    @property
    def handover(self) -> Path:
        return self.root / "handover"

    @property
    def done(self) -> Path:
        return self.root / "DONE.json"

    def attempt(self, number: int) -> AttemptLayout:
        return AttemptLayout(self.attempts / f"{number:04d}")

    def all_attempts(self) -> list[AttemptLayout]:
        """The attempts there are, oldest first."""
        if not self.attempts.is_dir():
            return []
        return [AttemptLayout(p) for p in sorted(self.attempts.iterdir()) if p.name.isdigit()]


@dataclass(frozen=True)
class AttemptLayout:
    """One allocation's life inside a stage."""

    root: Path

    @property
    def number(self) -> int:
        return int(self.root.name)

    @property
    def env(self) -> Path:
        return self.root / "env.json"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def audit(self) -> Path:
        return self.root / "audit.jsonl"

    @property
    def saves(self) -> Path:
        """A line for each committed checkpoint: how long training stood still, and when it counted."""
        return self.root / "saves.jsonl"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of the TensorBoard event files: the attempt's own."""
        return self.root

    @property
    def heartbeat(self) -> Path:
        return self.root / "heartbeat"

    @property
    def stopped(self) -> Path:
        """Rank 0's marker: asked to stop, saved, committed."""
        return self.root / "stopped.json"

    def saved_for_a_machine(self, launch: int) -> Path:
        """The same marker, set aside: one machine's ranks alone were asked to leave, and the others go on."""
        return self.root / f"stopped-l{launch:02d}.json"

    @property
    def outcome(self) -> Path:
        return self.root / "outcome.json"

    def start(self, launch: int) -> Path:
        """Which checkpoint and skips a launch started from; durable before its first step."""
        return self.root / f"start-l{launch:02d}.json"

    def rolled_back(self, launch: int) -> Path:
        """Rank 0's marker: training went wrong, and the next launch is to start from an earlier checkpoint; with the evidence."""
        return self.root / f"rolled-back-l{launch:02d}.json"

    @property
    def refused(self) -> Path:
        """A line for each step that all ranks refused: which samples had which losses."""
        return self.root / "refused.jsonl"

    @property
    def pulses(self) -> Path:
        """Folder of the ranks' own signs of life."""
        return self.root / "ranks"

    def pulse(self, rank: int) -> Path:
        return self.pulses / f"{rank:05d}.json"

    def hang(self, launch: int) -> Path:
        """What was seen when ranks stopped moving."""
        return self.root / f"hang-l{launch:02d}.json"

    def rank_log(self, launch: int, rank: int) -> Path:
        """What a rank printed; under srun rank 0 alone has one."""
        return self.root / f"rank-{rank:05d}-l{launch:02d}.txt"

    def node_log(self, launch: int, node: str) -> Path:
        """What the other ranks of a node printed, each line with its rank in front: `13: …`."""
        return self.root / f"node-{node}-l{launch:02d}.txt"

    @property
    def guardian_log(self) -> Path:
        """What the task said that watches over the job's script."""
        return self.root / "guardian.txt"

    def srun_log(self, launch: int) -> Path:
        """What srun itself said: which task ended how, on which node."""
        return self.root / f"srun-l{launch:02d}.txt"


@dataclass(frozen=True, order=True)
class CheckpointName:
    """`img-000171000000-a0003-l01`: the clock, the attempt and the launch that wrote it."""

    images_seen: int
    attempt: int
    launch: int

    def __str__(self) -> str:
        return f"img-{self.images_seen:012d}-a{self.attempt:04d}-l{self.launch:02d}"

    @classmethod
    def parse(cls, name: str) -> CheckpointName | None:
        """The parts of a folder's name, or None where it is no checkpoint's."""
        found = _CHECKPOINT.fullmatch(name)
        return cls(*map(int, found.groups())) if found else None


FROZEN_NAME = "frozen.json"
"""Of a frozen copy of the code: what it was copied from."""

MANIFEST_NAME = "manifest.json"
"""Of a checkpoint."""
MARKER_NAME = "COMMITTED"
"""The file that makes a checkpoint count."""


def rank_file_name(rank: int, world_size: int) -> str:
    """A rank's file in a checkpoint."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


@dataclass(frozen=True)
class HandoverLayout:
    """What a stage gives to the next one."""

    root: Path

    @property
    def raw(self) -> Path:
        return self.root / "raw.safetensors"

    @property
    def ema(self) -> Path:
        return self.root / "ema.safetensors"

    @property
    def lineage(self) -> Path:
        """Written last: a handover without it is not there."""
        return self.root / "lineage.json"
