"""Names in a run directory."""

from __future__ import annotations

from pathlib import Path

from pixart_ds.layout import CheckpointName, RunLayout


def test_checkpoint_names_read_back_and_sort_by_the_clock_first() -> None:
    names = [CheckpointName(171_000_000, 3, 1), CheckpointName(5, 12, 2), CheckpointName(171_000_000, 2, 9)]
    assert str(names[0]) == "img-000171000000-a0003-l01"
    assert [CheckpointName.parse(str(name)) for name in names] == names
    assert sorted(names) == [names[1], names[2], names[0]]
    for other in ("img-1-a1-l1", ".img-000171000000-a0003-l01.7.tmp", "img-000171000000-a0003-l01.tmp", "handover"):
        assert CheckpointName.parse(other) is None


def test_attempts_are_listed_oldest_first_and_strangers_are_ignored(tmp_path: Path) -> None:
    stage = RunLayout(tmp_path).stage("stage2")
    assert stage.all_attempts() == []
    for name in ("0010", "0002", "notes"):
        (stage.attempts / name).mkdir(parents=True)
    assert [attempt.number for attempt in stage.all_attempts()] == [2, 10]
    assert stage.attempt(2).start(1).name == "start-l01.json"
