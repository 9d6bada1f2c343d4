"""What is done for a chain of jobs, whatever state it is in."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pixart_ds.plan.chain import Action, QueueJob, StageFacts, decide

NAMES = ("stage1", "stage2", "stage3")


def stage(name: str, origin: str | None = None, **about: Any) -> StageFacts:
    return StageFacts(name, origin, about.pop("done", False), **about)


def waiting(number: str, *after: str, reason: str = "Dependency", held: bool = False) -> QueueJob:
    return QueueJob(number, False, reason, frozenset(after), held)


def running(number: str) -> QueueJob:
    return QueueJob(number, True)


def told(actions: list[Action]) -> list[tuple[str, tuple[str, ...], str | None]]:
    return [(each.do, each.jobs, each.behind) for each in actions]


def test_a_new_chain_is_submitted_each_behind_its_origin() -> None:
    found = decide([stage("stage1"), stage("stage2", "stage1"), stage("stage3", "stage2")])
    assert told(found) == [("submit", (), None), ("submit", (), "stage1"), ("submit", (), "stage2")]


def test_what_is_done_is_passed_over_and_what_moves_is_left_alone() -> None:
    stages = [
        stage("stage1", done=True),
        stage("stage2", "stage1", jobs=(running("12"),)),
        stage("stage3", "stage2", jobs=(waiting("13", "12"),)),
    ]
    found = decide(stages)
    assert told(found) == [("nothing", (), None), ("leave", ("12",), None), ("leave", ("13",), "stage2")]
    assert found[2].why == "waits for stage2"
    assert decide(stages, retry=True) == found, "there is nothing to retry"


def test_a_job_that_waits_its_turn_says_why() -> None:
    (action,) = decide([stage("stage1", jobs=(waiting("11", reason="Resources"),))])
    assert (action.do, action.why) == ("leave", "waits: Resources")


def test_a_failure_is_told_and_what_comes_after_waits() -> None:
    stages = [
        stage("stage1", done=True),
        stage("stage2", "stage1", failure="attempt 3 failed: no set"),
        stage("stage3", "stage2", jobs=(waiting("13", "12", reason="DependencyNeverSatisfied"),)),
    ]
    found = decide(stages)
    assert told(found) == [("nothing", (), None), ("tell", (), None), ("wait", ("13",), "stage2")]
    assert found[1].why == "attempt 3 failed: no set"
    again = decide(stages, retry=True)
    assert told(again) == [("nothing", (), None), ("submit", (), None), ("mend", ("13",), "stage2")]


def test_a_job_behind_one_that_was_cancelled_gets_another_dependency() -> None:
    stages = [
        stage("stage1", jobs=()),
        stage("stage2", "stage1", jobs=(waiting("12", "11", reason="DependencyNeverSatisfied"),)),
        stage("stage3", "stage2", jobs=(waiting("13", "12"),)),
    ]
    assert told(decide(stages)) == [("submit", (), None), ("mend", ("12",), "stage1"), ("leave", ("13",), "stage2")]


def test_a_job_behind_one_that_failed_before_its_stage_was_done_otherwise_begins() -> None:
    stages = [
        stage("stage1", done=True),
        stage("stage2", "stage1", jobs=(waiting("12", "11", reason="DependencyNeverSatisfied"),)),
    ]
    assert told(decide(stages))[1] == ("mend", ("12",), None)


def test_a_job_behind_another_than_the_stages_own_is_put_behind_that() -> None:
    stages = [stage("stage1", jobs=(running("15"),)), stage("stage2", "stage1", jobs=(waiting("12", "11"),))]
    assert told(decide(stages))[1] == ("mend", ("12",), "stage1")


def test_where_requeueing_is_forbidden_jobs_are_held_until_their_stage_is_done() -> None:
    pair = (waiting("12", reason="JobHeldUser", held=True), waiting("13", reason="JobHeldUser", held=True))
    before = stage("stage1", jobs=(running("11"), waiting("14")))
    assert told(decide([before, stage("stage2", "stage1", jobs=pair)]))[1] == ("leave", ("12", "13"), "stage1")
    done = stage("stage1", done=True)
    assert told(decide([done, stage("stage2", "stage1", jobs=pair)]))[1] == ("mend", ("12", "13"), None)


def test_an_array_that_failed_is_told_and_not_passed_over() -> None:
    """Its data were not prepared: without a word from the user nothing trains."""
    first = stage("stage1", jobs=(waiting("11", "71", reason="DependencyNeverSatisfied"),))
    second = stage("stage2", "stage1", jobs=(waiting("12", "11"),))
    found = decide([first, second])
    assert told(found) == [("tell", ("11",), None), ("wait", ("12",), "stage1")]
    assert found[0].why == "waits for job 71, which did not end well"
    for again in (decide([first, second], retry=True), decide([first, second], after=["stage1"])):
        assert told(again) == [("mend", ("11",), None), ("leave", ("12",), "stage1")]
    both = stage("stage2", "stage1", jobs=(waiting("12", "11", "72", reason="DependencyNeverSatisfied"),))
    assert decide([stage("stage1", jobs=(running("11"),)), both])[1].why == "waits for job 72, which did not end well"


def test_a_stage_that_needs_no_other_does_not_wait() -> None:
    found = decide([stage("stage1", failure="no set"), stage("stage2"), stage("stage3", "stage1")])
    assert [each.do for each in found] == ["tell", "submit", "wait"]


@pytest.mark.parametrize("seed", range(300))
def test_doing_it_leads_to_a_chain_that_needs_nothing(seed: int) -> None:
    """Whatever state three stages are in: once it is done, the same command changes nothing, and every stage can begin."""
    chance = random.Random(seed)
    stages: list[StageFacts] = []
    for number, name in enumerate(NAMES):
        origin = NAMES[number - 1] if number else None
        jobs: tuple[QueueJob, ...] = ()
        done = chance.random() < 0.3 and (not stages or stages[-1].done)
        if not done and chance.random() < 0.6:
            reason = chance.choice(["Dependency", "Resources", "DependencyNeverSatisfied"])
            after = [chance.choice(["10", "11", "12", "99"])] if origin else []
            ready = not stages or stages[-1].done
            jobs = (running(str(10 + number)),) if ready and chance.random() < 0.3 else ()
            jobs = jobs or (waiting(str(10 + number), *after, reason=reason),)
        failure = "a cause" if not done and not jobs and chance.random() < 0.4 else None
        stages.append(stage(name, origin, done=done, jobs=jobs, failure=failure))
    found = decide(stages, retry=True)
    assert not {each.do for each in found} & {"tell", "wait"}
    after: list[StageFacts] = []
    for facts, action in zip(stages, found, strict=True):
        jobs = facts.jobs
        if action.do in ("submit", "mend"):
            behind = next((each for each in after if each.name == action.behind), None)
            number = jobs[0].number if jobs else f"2{facts.name[-1]}"
            numbers = [] if behind is None else [job.number for job in behind.jobs]
            jobs = (waiting(number, *numbers, reason="Dependency" if numbers else "Priority"),)
        after.append(stage(facts.name, facts.origin, done=facts.done, jobs=jobs))
    again = decide(after)
    assert {each.do for each in again} <= {"nothing", "leave"}, (stages, found, again)
