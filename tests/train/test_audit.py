"""The audit: what runs log is proven over stops, kills and worlds, and whatever is changed in a log is caught and named."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixart_ds import files
from pixart_ds.cli import main
from pixart_ds.config.freeze import create_run
from pixart_ds.config.schema import ChainConfig, StageConfig
from pixart_ds.diffusion.noise import draw
from pixart_ds.diffusion.schedule import NUM_TIMESTEPS
from pixart_ds.engine import line as lines
from pixart_ds.errors import ConfigError, DataError
from pixart_ds.layout import MANIFEST_NAME, MARKER_NAME, CheckpointName, HandoverLayout
from pixart_ds.log import Log
from pixart_ds.plan.order import StepPlan
from pixart_ds.plan.random import key_of, raw_words
from pixart_ds.plan.shares import micro_batches
from pixart_ds.plan.work import Work
from pixart_ds.train import replay as replays
from pixart_ds.train import replay_pool
from pixart_ds.train.audit import Part, audit_run, show_step
from pixart_ds.train.audit_report import page, step_table
from pixart_ds.train.meter import Meter
from pixart_ds.train.replay import Coverage, Replay, compare, explain, hashes_of, philox_words
from pixart_ds.train.sets import open_sets, order_of
from pixart_ds.train.state import TrainState
from tests.helpers.sets import tiny_set
from tests.train.test_start import stage_of

BATCH, STEPS = 8, 24
DROPOUT = 0.25
GROUPS = ((1, 8), (0, 8), (1, 8), (2, 5), (1, 1), (0, 3))  # 33 samples: passes straddle steps
FIGURES = {"loss": 1.0, "grad_norm": 1.0}


class FakeRun:
    """A run whose launches log what training would, without training: shares, micro-batches and the loader's own draws."""

    def __init__(self, root: Path) -> None:
        tiny_set(root / "data", GROUPS)
        stage = stage_of(root / "data", {"source": "scratch"}, condition_dropout=DROPOUT)
        order = {"lanes": 3, "strip_length": 2, "window": 2}
        values = stage.model_dump(exclude={"order", "length", "global_batch_size"})
        self.config = StageConfig(**values, order=order, length={"steps": STEPS}, global_batch_size=BATCH)  # type: ignore[arg-type]
        self.root = root / "run"
        self.layout = create_run(self.root, ChainConfig(name="c", stages=(self.config,)), "c").stage("s")
        self.sets = open_sets(self.config)
        self.order = order_of(self.config, self.sets)
        self.states: dict[CheckpointName | None, TrainState] = {None: TrainState()}

    @property
    def replay(self) -> Replay:
        return Replay(self.order, "s", self.config.seed, DROPOUT, BATCH)

    def digest(self, images_seen: int, world: int) -> int:
        """A step's digest as ranks add it up."""
        total = 0
        for rank in range(world):
            for plan in micro_batches(self.order.share(images_seen, BATCH, rank, world), 2):
                for sample, visit in zip(plan.sample_id.tolist(), plan.visit.tolist(), strict=True):
                    draws = draw(self.config.seed, "s", sample, visit, (4, 2, 2), DROPOUT)
                    packed = struct.pack("<qqqQ", sample, visit, draws.timestep, draws.noise_key)
                    total += int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
        return total % 2**64

    def launch(
        self, attempt: int, launch: int, origin: CheckpointName | None, upto: int, *, world: int, saves: tuple[int, ...] = (),
        skips: tuple[int, ...] = (),
    ) -> list[CheckpointName]:  # fmt: skip
        """Logs the steps after `origin` up to step `upto`, with checkpoints after some; returns these."""
        folder = self.layout.attempt(attempt)
        folder.root.mkdir(parents=True, exist_ok=True)
        state = TrainState.from_json(self.states[origin].to_json())
        lines.write_start(self.layout, lines.Start((attempt, launch), origin, state.to_json()))
        saved = []
        with Meter(folder, self.config, Log("s", None), active=True, world_size=world, launch=launch) as meter:
            while state.images_seen < upto * BATCH:
                if state.leaves_out(state.images_seen):
                    state.advance(BATCH, applied=False)
                    meter.left_out(state)
                    continue
                digest = self.digest(state.images_seen, world)
                step = state.images_seen // BATCH + 1
                state.advance(BATCH, step not in skips)
                row = {**FIGURES, "applied": step not in skips}
                meter.record(state, row, Work(BATCH), digest=digest)
                if step in saves:
                    meter.sync_audit()
                    saved.append(self._save(CheckpointName(state.images_seen, attempt, launch), state))
        return saved

    def _save(self, name: CheckpointName, state: TrainState) -> CheckpointName:
        folder = self.layout.checkpoints / str(name)
        folder.mkdir(parents=True)
        files.write_json(folder / MANIFEST_NAME, {"state": {"state": state.to_json(), "order": self.order.fingerprint}})
        files.write_json(folder / MARKER_NAME, {"format": 1, "milestone": False})
        self.states[name] = TrainState.from_json(state.to_json())
        return name

    def finish(self, last: CheckpointName) -> None:
        state = self.states[last]
        handover = HandoverLayout(self.layout.handover)
        handover.root.mkdir()
        about = {"images_seen": state.images_seen, "order": self.order.fingerprint}
        files.write_json(handover.lineage, {"format": 1, "lineage": about})
        files.write_json(self.layout.done, {**state.to_json(), "attempt": last.attempt, "loss": 1.0})

    def lines(self, attempt: int) -> list[dict[str, Any]]:
        return list(files.read_json_lines(self.layout.attempt(attempt).audit))

    def rewrite(self, attempt: int, rows: list[dict[str, Any]]) -> None:
        self.layout.attempt(attempt).audit.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def audit(self, **options: Any) -> dict[str, Any]:
        (stage,) = audit_run(self.root, **options)["stages"]
        return dict(stage)


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    return FakeRun(tmp_path)


def troubled(run: FakeRun) -> FakeRun:
    """Four attempts at worlds 2, 3, 1 and 3: a stop, a kill, a resume from an older checkpoint, two launches, skipped steps."""
    (first,) = run.launch(1, 1, None, 6, world=2, saves=(6,), skips=(2,))
    second, _ = run.launch(2, 1, first, 15, world=3, saves=(9, 12))  # killed three steps after its second checkpoint
    third = run.launch(3, 1, second, 11, world=1, saves=(10,))[0]  # which was damaged; killed one step after its own
    run.launch(3, 2, third, 13, world=1)  # killed before it saved
    (last,) = run.launch(4, 1, third, 24, world=3, saves=(24,), skips=(11, 12))
    run.finish(last)
    return run


def test_words_and_hashes_are_those_of_the_loader() -> None:
    key = key_of("draws", 43, "s")
    samples, visits = np.array([0, 5, 2**40, 7]), np.array([0, 3, 1, 10**6])
    for purpose in (0, 1, 2):
        words = philox_words(key, samples, visits, purpose)
        for place, (sample, visit) in enumerate(zip(samples.tolist(), visits.tolist(), strict=True)):
            assert [int(part[place]) for part in words] == raw_words(key, (sample, visit, purpose), 2).tolist()
    assert replays._TIMESTEPS == NUM_TIMESTEPS
    (found,) = hashes_of(np.array([9]), np.array([1]), np.array([999]), np.array([2**64 - 1], np.uint64)).tolist()
    packed = struct.pack("<qqqQ", 9, 1, 999, 2**64 - 1)
    assert found == int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def test_draws_of_a_step_are_those_of_training(run: FakeRun) -> None:
    drawn = run.replay.draw(run.replay.plan(5))
    for place in range(BATCH):
        sample, visit = int(drawn.plan.sample_id[place]), int(drawn.plan.visit[place])
        draws = draw(run.config.seed, "s", sample, visit, (4, 4, 4), DROPOUT)
        assert drawn.timesteps[place] == draws.timestep
        assert drawn.dropped[place] == draws.dropped
        assert drawn.noise_keys[place] == draws.noise_key
    digests = np.concatenate([part for _, _, part in run.replay.chunks(1, STEPS)]).tolist()
    for world in (1, 2, 3, 5):
        assert [run.digest(BATCH * step, world) for step in range(STEPS)] == digests


def test_a_run_of_many_attempts_and_worlds_is_proven(run: FakeRun) -> None:
    stage = troubled(run).audit()
    assert stage["violation"] is None
    assert stage["proven"] == {"from_step": 1, "to_step": 24, "steps": 24, "images": 192, "passes": 192 / 33}
    assert [tuple(attempt.values()) for attempt in stage["attempts"]] == [
        (1, 1, 2, 1, 6, 0), (2, 1, 3, 7, 9, 6), (3, 1, 1, 10, 10, 1), (3, 2, 1, None, None, 3), (4, 1, 3, 11, 24, 0),
    ]  # fmt: skip
    assert stage["rework"] == {"steps": 10, "images": 80}
    assert stage["skipped_steps"] == 3
    text = page({"stages": [stage]})
    assert "s: proven\n" in text
    assert "steps     1 to 24 of 24: 192 images, 5.82 passes over 33 samples, each used 5 times or once more" in text
    assert "rework    10 steps, 80 images" in text


def test_several_processes_and_parts_give_the_same(run: FakeRun) -> None:
    troubled(run)
    alone, shared = run.audit(), run.audit(processes=3)
    for answer in (alone, shared):
        del answer["seconds"], answer["samples_per_second"]
    assert alone == shared
    part = run.audit(part=Part(5 * BATCH + 3, 20 * BATCH - 1))["proven"]
    assert (part["from_step"], part["to_step"]) == (6, 20)
    assert "s: proven from step 6 to 20" in page({"stages": [run.audit(part=Part(40, 160))]})
    rows = run.lines(4)
    rows[5]["digest"] = rows[9]["digest"] = "0" * 16
    run.rewrite(4, rows)
    assert run.audit(processes=3)["violation"]["step"] == 16
    assert run.audit(processes=3)["proven"]["steps"] == 15
    assert run.audit(part=Part(20 * BATCH))["violation"] is None


def test_a_running_stage_is_proven_up_to_its_newest_checkpoint(run: FakeRun) -> None:
    assert audit_run(run.root) == {"run": str(run.root), "proven": True, "stages": []}
    (first,) = run.launch(1, 1, None, 7, world=2, saves=(5,))
    with open(run.layout.attempt(1).audit, "a", encoding="utf-8") as log:
        log.write('{"images_seen": 64, "samp')  # being written, or torn by a kill
    stage = run.audit()
    assert stage["violation"] is None
    assert (stage["proven"]["steps"], stage["open_steps"], stage["rework"]["steps"]) == (5, 2, 0)
    assert "2 steps after the newest checkpoint" in page({"stages": [stage]})
    run.launch(1, 2, first, 6, world=1)  # the launch after a kill goes on in the same file
    text = run.layout.attempt(1).audit.read_text()
    assert '"samp\n{"images_seen": 48' in text
    assert [(row["launch"], row["world_size"]) for row in map(json.loads, text.splitlines()[-1:])] == [(2, 1)]
    stage = run.audit()
    assert stage["violation"] is None
    assert (stage["proven"]["steps"], stage["open_steps"], stage["rework"]["steps"]) == (5, 1, 2)


def test_before_the_first_checkpoint_there_is_nothing_to_prove(run: FakeRun) -> None:
    run.launch(1, 1, None, 3, world=2)
    stage = run.audit()
    assert (stage["violation"], stage["steps"], stage["open_steps"]) == (None, 0, 3)
    assert "nothing to prove yet" in page({"stages": [stage]})


def test_logs_of_earlier_versions_without_launch_and_world_are_read(run: FakeRun) -> None:
    (last,) = run.launch(1, 1, None, 24, world=2, saves=(24,))
    run.finish(last)
    run.rewrite(1, [{k: row[k] for k in ("images_seen", "samples", "applied", "digest")} for row in run.lines(1)])
    files.write_json(run.layout.attempt(1).env, {"world_size": 2})
    stage = run.audit()
    assert stage["violation"] is None
    assert [a["world_size"] for a in stage["attempts"]] == [2]


# ---- tampering: in the troubled run, attempt 4 logged steps 11 to 24, and line 3 of it is step 13 --------------------

Rows = list[dict[str, Any]]


def changed_digest(run: FakeRun, rows: Rows) -> None:
    digest = rows[2]["digest"]
    rows[2]["digest"] = digest[:-1] + ("0" if digest[-1] != "0" else "1")


def digest_of(run: FakeRun, step: int, change: Callable[[StepPlan], StepPlan]) -> str:
    """The digest of a step whose samples were changed."""
    return f"{run.replay.draw(change(run.replay.plan(step))).digest:016x}"


def repeated(run: FakeRun, rows: Rows) -> None:
    def change(plan: StepPlan) -> StepPlan:
        return plan.take(np.array([0, 0, *range(2, BATCH)]))

    rows[2]["digest"] = digest_of(run, 13, change)


def other_visit(run: FakeRun, rows: Rows) -> None:
    def change(plan: StepPlan) -> StepPlan:
        visits = plan.visit.copy()
        visits[4] -= 1
        return StepPlan(**{**vars(plan), "visit": visits})

    rows[2]["digest"] = digest_of(run, 13, change)


def left_out(run: FakeRun, rows: Rows) -> None:
    rows[2]["digest"] = digest_of(run, 13, lambda plan: plan.take(slice(1, BATCH)))


def of_a_later_step(run: FakeRun, rows: Rows) -> None:
    def change(plan: StepPlan) -> StepPlan:
        later = run.replay.plan(15)
        new = np.flatnonzero(~np.isin(later.sample_id, plan.sample_id))[:1]
        return StepPlan.join([plan.take(slice(1, BATCH)), later.take(new)])

    rows[2]["digest"] = digest_of(run, 13, change)


def exchanged_digests(run: FakeRun, rows: Rows) -> None:
    rows[2]["digest"], rows[3]["digest"] = rows[3]["digest"], rows[2]["digest"]


def removed(run: FakeRun, rows: Rows) -> None:
    del rows[2]


def doubled(run: FakeRun, rows: Rows) -> None:
    rows.insert(2, rows[1])


def doubled_at_the_end(run: FakeRun, rows: Rows) -> None:
    rows.append(rows[-1])


def swapped(run: FakeRun, rows: Rows) -> None:
    rows[2], rows[3] = rows[3], rows[2]


def foreign(run: FakeRun, rows: Rows) -> None:
    (rows[2],) = [row for row in run.lines(2) if row["images_seen"] == 13 * BATCH]


def fewer_samples(run: FakeRun, rows: Rows) -> None:
    rows[2]["samples"] = BATCH - 1


def unskipped(run: FakeRun, rows: Rows) -> None:
    rows[1]["applied"] = True


CASES = [
    (changed_digest, 13, "digest", "no exchange of a single sample gives it"),
    (repeated, 13, "digest", "had been used in place of"),
    (other_visit, 13, "digest", "had been seen at visit 1 instead of 2|had been seen at visit 2 instead of 3"),
    (left_out, 13, "digest", "had been left out"),
    (of_a_later_step, 13, "digest", "of step 15, had been used in place of"),
    (exchanged_digests, 13, "digest", "it is the digest of step 14"),
    (removed, 13, "missing", "step 13 is not in the log: its line is lost; attempt 2 logged it"),
    (doubled, 13, "twice", "where step 13 should stand, step 12 is logged a second time"),
    (doubled_at_the_end, 24, "twice", "step 24 is logged a second time"),
    (swapped, 13, "sequence", "step 14 is logged before step 13"),
    (foreign, 13, "foreign", "a line of attempt 2 stands in the log of attempt 4"),
    (fewer_samples, 13, "samples", "7 samples were used instead of the 8 of a step"),
    (unskipped, 24, "clock", "says that 21 steps were applied and 3 skipped up to step 24, the logs say 22 and 2"),
]


@pytest.mark.parametrize(("change", "step", "kind", "what"), CASES, ids=[case[0].__name__ for case in CASES])
def test_what_was_changed_in_a_log_is_caught_and_named(
    run: FakeRun, change: Callable[[FakeRun, Rows], None], step: int, kind: str, what: str
) -> None:
    rows = troubled(run).lines(4)
    change(run, rows)
    run.rewrite(4, rows)
    stage = run.audit()
    violation = stage["violation"]
    assert (violation["kind"], violation["step"], violation["attempt"]) == (kind, step, 4)
    assert any(text in violation["what"] for text in what.split("|")), violation["what"]
    text = page({"stages": [stage]})
    assert f"s: NOT PROVEN, step {step} is the first violation" in text
    assert violation["what"] in " ".join(text.split())  # wrapped
    assert violation["remedy"]


def test_the_first_of_several_violations_is_told(run: FakeRun) -> None:
    rows = troubled(run).lines(4)
    removed(run, rows)
    unskipped(run, rows)
    run.rewrite(4, rows)
    early = run.lines(1)
    early[3]["digest"] = "12"
    run.rewrite(1, early)
    violation = run.audit()["violation"]
    assert (violation["kind"], violation["step"], violation["attempt"]) == ("digest", 4, 1)
    assert violation["logged"] == "0000000000000012"
    assert violation["where"].endswith("attempts/0001/audit.jsonl, line 4")


def test_a_damaged_line_and_a_lost_log_are_named(run: FakeRun) -> None:
    path = troubled(run).layout.attempt(4).audit
    text = path.read_text().split("\n")
    path.write_text("\n".join([*text[:2], "?" * 40, *text[3:]]))
    assert "step 13 is not in the log" in (what := run.audit()["violation"]["what"])
    assert "line 3 of the file cannot be read" in what
    listed = show_step(run.root, "s", 20)
    assert not listed["proven"]
    assert "the logs do not reach this step: step 13 is not in the log" in step_table(listed)
    path.unlink()
    assert run.audit()["violation"]["step"] == 11


@pytest.mark.parametrize(
    "change", [{"digest": "f" * 17}, {"digest": "-1"}, {"samples": 8.0}, {"applied": "no"}, {"images_seen": None}]
)
def test_a_line_that_no_meter_wrote_cannot_be_read(run: FakeRun, change: dict[str, Any]) -> None:
    rows = troubled(run).lines(4)
    rows[2] |= change
    run.rewrite(4, rows)
    assert "line 3 of the file cannot be read" in run.audit()["violation"]["what"]


def test_rework_may_be_lost(run: FakeRun) -> None:
    rows = troubled(run).lines(2)
    run.rewrite(2, rows[:3])  # steps 7 to 9 count
    assert run.audit()["violation"] is None
    run.rewrite(2, rows[:2])
    violation = run.audit()["violation"]
    assert (violation["kind"], violation["step"]) == ("missing", 9)


def test_a_lost_start_file_is_named(run: FakeRun) -> None:
    troubled(run).layout.attempt(2).start(1).unlink()
    violation = run.audit()["violation"]
    assert "resumed from attempt 2, launch 1, which has no start file" in violation["what"]
    assert violation["where"].endswith("start-l01.json")


def test_a_set_that_was_put_in_the_place_of_another_is_caught(run: FakeRun, tmp_path: Path) -> None:
    troubled(run)
    (tmp_path / "data").rename(tmp_path / "old")
    tiny_set(tmp_path / "data", ((1, 8), (0, 8), (1, 8), (2, 5), (1, 4)))
    stage = run.audit()
    assert stage["violation"]["kind"] == "data"
    assert "was trained on another order of the data" in stage["violation"]["what"]
    assert stage["violation"]["logged"] == run.order.fingerprint
    assert str(tmp_path / "data") in stage["violation"]["remedy"]
    assert "s: NOT PROVEN\n" in page({"stages": [stage]})
    with pytest.raises(DataError, match="another order of the data"):
        show_step(run.root, "s", 3)


def test_a_stage_that_ends_too_early_is_caught(run: FakeRun) -> None:
    (last,) = run.launch(1, 1, None, 23, world=2, saves=(23,))
    run.finish(last)
    assert "done at 184 images; its length is 192" in run.audit()["violation"]["what"]


# ---- every sample once in each pass ---------------------------------------------------------------------------------


class Repeating:
    """An order that gives a sample of its fourth step a second time in the fifth."""

    def __init__(self, run: FakeRun) -> None:
        self.order = run.order

    def step(self, images_seen: int, batch: int) -> StepPlan:
        plan = self.order.step(images_seen, batch)
        if images_seen == 4 * BATCH:
            before = self.order.step(3 * BATCH, batch)
            return StepPlan.join([before.take(slice(0, 1)), plan.take(slice(1, batch))])
        return plan


def test_an_order_that_repeats_a_sample_is_caught_although_digests_agree(run: FakeRun) -> None:
    faulty = Replay(Repeating(run), "s", 43, DROPOUT, BATCH)  # type: ignore[arg-type]
    logged = np.concatenate([part for _, _, part in faulty.chunks(1, STEPS)])
    outcome = compare(faulty, 1, logged, 33)
    assert (outcome.wrong, outcome.expected) == (5, None)
    repeated_id = run.order.step(3 * BATCH, BATCH).sample_id[0]
    assert outcome.fault == f"sample {repeated_id} is used at visit 0 out of turn"


def samples(ids: list[int], visits: list[int]) -> StepPlan:
    nothing = np.zeros(len(ids), np.int64)
    return StepPlan(nothing, nothing, nothing, nothing, np.array(ids), np.array(visits), nothing)


def test_coverage_counts_passes() -> None:
    coverage = Coverage(4)
    assert coverage.add(samples([2, 0, 3, 2], [0, 0, 0, 1])) is None  # two passes in one step
    assert coverage.problem(4, 3) is None
    assert coverage.problem(4, 4) == "1 samples came 2 times instead of 0, in 4 images of 4 samples"
    assert coverage.add(samples([0, 2], [1, 3])) == 1
    later = Coverage(4)
    assert later.add(samples([1, 3], [1, 1])) is None
    assert later.problem(2, 4) == "sample 1 came first at visit 1: its earlier visits are lost"
    joined = Coverage(4)
    assert joined.add(samples([1, 3, 0], [0, 0, 0])) is None
    assert joined.join(later) is None
    assert joined.count.tolist() == [1, 2, 0, 2]
    assert joined.join(later) == 1


def test_a_sample_used_twice_is_explained(run: FakeRun) -> None:
    plan = run.replay.plan(7)
    extra = StepPlan.join([plan, plan.take(slice(2, 3))])
    text = explain(run.replay, 7, run.replay.draw(extra).digest, STEPS)
    assert text == f"it is as if sample {plan.sample_id[2]}, of step 7, had been used once more"


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_and_its_exit_codes(run: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    troubled(run)
    assert main(["audit", str(run.root)]) == 0
    assert capsys.readouterr().out.startswith("s: proven\n")
    rows = run.lines(4)
    changed_digest(run, rows)
    run.rewrite(4, rows)
    assert main(["audit", str(run.root), "--stage", "s", "--json"]) == 4
    answer = json.loads(capsys.readouterr().out)
    assert not answer["proven"]
    assert answer["stages"][0]["violation"]["step"] == 13
    assert main(["audit", str(run.root), "--step", "13"]) == 4
    assert "other samples were used" in capsys.readouterr().out
    assert main(["audit", str(run.root), "--to", str(12 * BATCH)]) == 0
    assert main(["audit", str(run.root), "--step", "25"]) == 2
    assert "s has the steps 1 to 24" in capsys.readouterr().err


def test_a_step_is_listed(run: FakeRun) -> None:
    run.launch(1, 1, None, 6, world=2, saves=(6,), skips=(2,))
    answer = show_step(run.root, None, 2)
    plan = run.order.step(BATCH, BATCH)
    assert [row["sample_id"] for row in answer["samples"]] == plan.sample_id.tolist()
    assert [row["name"] for row in answer["samples"]] == [f"pictures/{n}.png" for n in plan.sample_id]
    row = answer["samples"][3]
    draws = draw(run.config.seed, "s", row["sample_id"], row["visit"], (4, 4, 4), DROPOUT)
    assert (row["timestep"], row["dropped"], row["noise_key"]) == (
        draws.timestep,
        draws.dropped,
        f"{draws.noise_key:016x}",
    )
    assert answer["logged"] == {
        "digest": answer["digest"],
        "attempt": 1,
        "launch": 1,
        "applied": False,
        "left_out": False,
    }
    text = step_table(answer)
    assert (
        f"s, step 2: images 9 to 16\ndigest {answer['digest']}, as logged by attempt 1, launch 1, step not applied"
        in text
    )
    assert len(text.splitlines()) == 5 + BATCH
    assert show_step(run.root, "s", 20)["logged"] is None
    assert "no checkpoint's log holds this step yet" in step_table(show_step(run.root, "s", 20))


def test_a_step_needs_a_stage_where_there_are_several(run: FakeRun) -> None:
    with pytest.raises(ConfigError, match="does not say of which stage"):
        show_step(run.root, None, 1)


def test_progress_is_one_line_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr(replay_pool, "_QUIET_SECONDS", 0.0)
    progress = replay_pool._Progress("audit of s", 2000)
    assert not progress.add(500)
    progress.clear()
    assert "audit of s   25%  500 of 2 k samples" in shown.getvalue()
    assert shown.getvalue().endswith("\r\x1b[K")
