"""When ranks are started again, and which rank the others wait for: pure decisions over many histories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pixart_ds.cluster.relaunch import Ending, Launch, delay_before_next
from pixart_ds.cluster.watch import PulseWatch
from pixart_ds.config.schema import DeadlinesConfig
from pixart_ds.layout import AttemptLayout


def crash(progress: bool = False, code: int = -9) -> Launch:
    return Launch("failed", False, code, progress)


def delay(*launches: Launch, retries: int = 3) -> float | None:
    return delay_before_next(list(launches), retries=retries, backoff_s=1.0)


@pytest.mark.parametrize("ending", ["done", "stopped"])
def test_what_has_ended_well_is_over(ending: Ending) -> None:
    assert delay(crash(), Launch(ending, False, None, True)) is None


def test_nothing_is_started_into_an_allocation_that_is_to_end() -> None:
    assert delay(Launch("failed", True, -9, False)) is None
    assert delay(Launch("rolled back", True, None, False)) is None


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_errors_that_come_again_are_not_tried_again(code: int) -> None:
    assert delay(crash(code=code)) is None


def test_crashes_without_progress_wait_longer_and_longer_and_end() -> None:
    assert [delay(*[crash()] * count) for count in range(1, 6)] == [1.0, 4.0, 16.0, None, None]
    assert delay(crash(), retries=0) is None


def test_a_new_checkpoint_begins_the_count_anew() -> None:
    assert delay(crash(), crash(), crash(progress=True)) == 1.0
    assert delay(*[crash(progress=True)] * 90) == 1.0
    assert delay(crash(progress=True), crash(), crash(), crash()) == 16.0


def test_a_roll_back_is_followed_at_once_and_is_no_crash() -> None:
    back = Launch("rolled back", False, None, False)
    assert delay(crash(), back) == 0.0
    assert delay(crash(), crash(), crash(), back, crash()) == 1.0


# ---- who hangs -----------------------------------------------------------------------------------------------------


class World:
    """Ranks' signs of life, written by hand, and a clock."""

    def __init__(self, folder: Path, size: int, **deadlines: float) -> None:
        self.attempt, self.now = AttemptLayout(folder / "0001"), 0.0
        self.attempt.pulses.mkdir(parents=True)
        self.ranks: list[dict[str, Any]] = []
        for rank in range(size):
            about = {"rank": rank, "launch": 1, "host": f"n{rank // 2}", "pid": 100 + rank, "beat": 0}
            self.ranks.append(
                {**about, "phase": "compute", "for_s": 0.1, "deadline": "step", "images_seen": 640, "own_s": 1.0}
            )
        limits = DeadlinesConfig(**{"step": 100.0, "start": 500.0, "silence": 30.0, **deadlines})
        self.watch = PulseWatch(self.attempt, 1, limits, size, clock=lambda: self.now)

    def after(self, seconds: float, *, silent: tuple[int, ...] = ()) -> str | None:
        """Lets time pass, in which all but some ranks give signs of life; what is found."""
        found = None
        for _ in range(int(seconds // 2)):
            self.now += 2.0
            for each in self.ranks:
                if each["rank"] not in silent:
                    each["beat"] += 1
                    self.attempt.pulse(each["rank"]).write_text(json.dumps(each))
            found = found or self.watch.look()
        return None if found is None else found.what

    def waiting(self, *but: int, seconds: float) -> None:
        for each in self.ranks:
            each.update({"for_s": seconds} if each["rank"] in but else {"for_s": seconds, "phase": "together"})


def test_ranks_that_move_are_left_alone(tmp_path: Path) -> None:
    world = World(tmp_path, 4)
    assert world.after(600) is None
    assert world.watch.first_step_at is not None


def test_a_step_that_nobody_saw_in_time_is_found_when_the_ranks_have_left(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    for each in world.ranks:
        each["images_seen"] = None
    world.after(4)
    world.watch.look_back()
    assert world.watch.first_step_at is None
    world.ranks[1]["images_seen"] = 32
    world.attempt.pulse(1).write_text(json.dumps(world.ranks[1]))
    world.now += 0.5
    world.watch.look_back()
    assert world.watch.first_step_at == 4.5


def test_a_rank_without_a_sign_of_life_is_named(tmp_path: Path) -> None:
    world = World(tmp_path, 4)
    assert world.after(10) is None
    assert world.after(28, silent=(2,)) is None
    assert world.after(6, silent=(2,)) == (
        "rank 2 on n1 (pid 102) has given no sign of life for 32 s, in the phase 'compute' after 640 images"
    )


def test_ranks_that_all_fall_silent_together_are_given_the_longer_deadline(tmp_path: Path) -> None:
    """Then it is the file system that does not tell."""
    world = World(tmp_path, 4)
    world.after(4)
    assert world.after(90, silent=(0, 1, 2, 3)) is None
    assert "has not moved for" in str(world.after(20, silent=(0, 1, 2, 3)))


def test_of_ranks_that_stand_still_the_one_is_named_that_the_others_wait_for(tmp_path: Path) -> None:
    world = World(tmp_path, 4)
    world.waiting(1, seconds=101)
    world.ranks[1]["phase"] = "data"
    assert world.after(2) == "rank 1 on n0 (pid 101) has not moved for 101 s, in the phase 'data' after 640 images"


def test_where_all_wait_for_each_other_all_are_named(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.waiting(seconds=101)
    told = str(world.after(2))
    assert "rank 0 on n0" in told
    assert "rank 1 on n0" in told
    assert "all ranks wait for each other" in told


def test_a_long_phase_has_its_own_deadline(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    for each in world.ranks:
        each.update({"deadline": "start", "images_seen": None, "for_s": 400})
    assert world.after(2) is None
    assert world.watch.first_step_at is None
    world.ranks[0]["for_s"] = 501
    assert "before its first step" in str(world.after(4))


def test_signs_of_an_earlier_launch_do_not_count(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    world.ranks[1] |= {"launch": 0, "for_s": 1e6}
    assert world.after(60) is None


def test_ranks_that_never_give_a_sign_of_life_are_named_and_no_node_is_blamed(tmp_path: Path) -> None:
    world = World(tmp_path, 4)
    del world.ranks[2:]
    for each in world.ranks:
        each |= {"images_seen": None, "deadline": "start", "phase": "together"}
    assert world.after(498) is None
    found = world.after(6)
    assert found is not None
    assert "no sign of life from ranks 2, 3 within 500 s" in found


def test_a_rank_that_others_wait_for_is_named_after_a_minute_and_again_after_an_hour(tmp_path: Path) -> None:
    world = World(tmp_path, 4, step=9999.0)
    world.ranks[3]["own_s"] = 1.4
    world.after(50)
    assert world.watch.newly_slow() == []
    world.after(20)
    (said,) = world.watch.newly_slow()
    assert said == ("rank 3 on n1 takes 1.40 s for its part of a step, the median rank 1.00 s: the others wait for it")
    world.after(3500)
    assert world.watch.newly_slow() == []
    world.after(200)
    assert len(world.watch.newly_slow()) == 1
    world.ranks[3]["own_s"] = 1.0
    world.after(4000)
    assert world.watch.newly_slow() == []
