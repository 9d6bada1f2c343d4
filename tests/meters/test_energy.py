"""How energy is added up: counters, trapezoids, gaps, and what is assumed where nothing can be read."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pixart_ds.meters import energy, readers
from pixart_ds.meters.energy import EnergyMeter, best_reader
from pixart_ds.meters.readers import ConstantReader, Notes, Reading, board_power
from pixart_ds.rates import rate_table


class Script:
    """A reader that says what it is told to, one list or error for each sample."""

    source: readers.Source = "nvml-energy"

    def __init__(self, *answers: list[Reading] | Exception) -> None:
        self._answers: Iterator[list[Reading] | Exception] = iter(answers)
        self.closed = False

    def read(self, now: float) -> list[Reading]:
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def note(self) -> str | None:
        return None

    def close(self) -> None:
        self.closed = True


def counter(joules: float, watts: float | None = None) -> Reading:
    return Reading(joules, watts=watts, watts_from="nvml-power")


def power(watts: float, source: readers.Source = "nvml-power") -> Reading:
    return Reading(watts=watts, watts_from=source)


def measured(*samples: tuple[float, Reading | Exception], every_s: float = 5.0) -> dict[str, object]:
    """What a meter of one GPU says after these samples."""
    answers = (said if isinstance(said, Exception) else [said] for _, said in samples)
    meter = EnergyMeter("cuda", 1, every_s=every_s, reader=Script(*answers))
    for now, _ in samples:
        meter.sample(now)
    return meter.to_json()


def test_a_counter_is_exact_whatever_the_power_was_between() -> None:
    said = measured((100, counter(5000, 1)), (105, counter(6500, 999)), (110.5, counter(6600.25, 1)))
    assert said == {
        "source": "nvml-energy",
        "joules": 1600.25,
        "device_seconds": 10.5,
        "devices": 1,
        "boundary": "board",
        "note": None,
    }
    json.dumps(said)


def test_trapezoid_of_a_trace_at_one_hertz_is_right_within_two_percent() -> None:
    def watts(t: float) -> float:  # steps of 11 s, with a save every minute
        return 200 + 80 * math.sin(2 * math.pi * t / 11) - (120 if t % 60 < 4 else 0)

    fine = [k / 100 for k in range(600 * 100)]
    true = sum(watts(t) for t in fine) / 100
    said = measured(*((t, power(watts(t))) for t in range(601)), every_s=1.0)
    assert said["joules"] == pytest.approx(true, rel=0.02)
    assert said["device_seconds"] == 600
    assert said["source"] == "nvml-power"


def test_trapezoid_takes_the_measured_intervals_not_the_wished_ones() -> None:
    said = measured((0, power(100)), (1, power(300)), (8, power(300)), (8.5, power(100)))
    assert said["joules"] == 200 * 1 + 300 * 7 + 200 * 0.5
    assert said["device_seconds"] == 8.5


def test_a_counter_that_runs_back_is_bridged_by_power() -> None:
    said = measured((0, counter(9000, 200)), (5, counter(10000, 200)), (10, counter(7, 300)), (15, counter(1007, 0)))
    assert said["joules"] == 1000 + 250 * 5 + 1000
    assert said["device_seconds"] == 15
    assert said["source"] == "nvml-power"  # the weakest that was used
    assert "ran back" in str(said["note"])
    assert "66.7% by nvml-energy, 33.3% by nvml-power" in str(said["note"])


def test_a_counter_that_runs_back_without_power_leaves_its_interval_uncovered() -> None:
    said = measured((0, counter(9000)), (5, counter(10000)), (10, counter(7)), (15, counter(507)))
    assert (said["joules"], said["device_seconds"], said["source"]) == (1500, 10, "nvml-energy")


def test_a_counter_that_stands_still_does_not_count() -> None:
    still = [(t, Reading(0.0, watts=20, watts_from="estimate")) for t in (0.0, 5.0, 10.0)]
    said = measured(*still)
    assert (said["joules"], said["device_seconds"], said["source"]) == (200, 10, "estimate")
    assert "stands still" in str(said["note"])
    assert (
        measured((0, counter(5)), (0.02, counter(5)))["device_seconds"] == 0.02
    )  # it moves in steps of some milliseconds


def test_a_counter_covers_the_time_for_which_the_process_was_stopped() -> None:
    said = measured((0, counter(0, 300)), (5, counter(1500, 300)), (5000, counter(9500, 300)))
    assert (said["joules"], said["device_seconds"], said["note"]) == (9500, 5000, None)


def test_power_leaves_a_gap_uncovered_and_goes_on() -> None:
    said = measured((0, power(300)), (50, power(300)), (101, power(300)), (106, power(300)))
    assert (said["joules"], said["device_seconds"]) == (300 * 55, 55)
    assert said["note"] == "a gap between two samples is not covered"


def test_a_counter_that_was_silent_covers_its_silence_unless_power_did() -> None:
    silent = Reading()
    assert measured((0, counter(0)), (5, silent), (10, counter(900)))["joules"] == 900
    with_power = measured((0, counter(0, 100)), (5, power(100)), (10, counter(900, 100)), (15, counter(1400, 100)))
    assert with_power["joules"] == 500 + 500 + 500
    assert with_power["device_seconds"] == 15


def test_no_time_is_covered_twice() -> None:
    both, only_counter, only_power, silent = counter(0, 100), counter(500), power(100), Reading()
    said = measured((0, both), (5, only_counter), (10, only_power), (15, silent), (20, only_power), (25, silent))
    assert (said["joules"], said["device_seconds"]) == (500 + 1000, 15)


def test_two_sources_at_the_ends_of_an_interval_count_as_the_weaker() -> None:
    said = measured((0, power(100)), (5, power(200, "nvml-utilisation")))
    assert (said["source"], said["joules"]) == ("nvml-utilisation", 750)


def test_counters_of_different_eras_are_not_compared() -> None:
    said = measured((0, Reading(10.0, 0)), (5, Reading(9999.0, 1)), (10, Reading(10000.0, 1)))
    assert (said["joules"], said["device_seconds"]) == (1, 5)


def test_eight_gpus_are_counted_once_for_the_node() -> None:
    meter = EnergyMeter("cuda", 8, reader=Script(*([power(300)] * 8 for _ in range(3))))
    for now in (0, 5, 10):
        meter.sample(now)
    assert meter.to_json()["joules"] == 8 * 300 * 10
    assert meter.to_json()["device_seconds"] == 80
    assert meter.to_json()["devices"] == 8


def test_errors_do_not_escape_and_sampling_goes_on() -> None:
    said = measured((0, counter(0)), (5, RuntimeError("the driver is in a mood")), (10, counter(700)))
    assert (said["joules"], said["device_seconds"]) == (700, 10)
    assert said["note"] == "a sample failed (RuntimeError: the driver is in a mood)"


def test_notes_stay_short() -> None:
    notes = Notes()
    for number in range(100):
        notes.add(f"error {number}")
        notes.add("error 0")
    text = notes.text()
    assert text is not None
    assert text.startswith("error 0 (101 times); error 1; ")
    assert len(text) < 200


def test_before_the_first_sample_it_says_nothing_wrong() -> None:
    said = EnergyMeter("cuda", 4).to_json()
    assert (said["source"], said["joules"], said["device_seconds"], said["boundary"]) == ("tdp", 0, 0, "board")
    assert EnergyMeter("cpu", 4).to_json()["boundary"] == "core"
    EnergyMeter("cpu", 4).stop()  # as an error before the start would


def test_the_thread_samples_at_once_and_once_more_at_the_end() -> None:
    ticks = iter(range(0, 1000, 5))
    script = Script(*([counter(100.0 * sample)] for sample in range(5)))
    meter = EnergyMeter("cuda", 1, every_s=3600, reader=script, clock=lambda: next(ticks)).start()
    meter.stop()
    said = meter.to_json()
    assert (said["joules"], said["device_seconds"]) == (100, 5)
    assert script.closed
    meter.stop()
    assert meter.to_json() == said


def test_a_reader_that_fails_always_ends_nothing() -> None:
    meter = EnergyMeter("cuda", 1, every_s=3600, reader=Script(ValueError("never"), ValueError("never"))).start()
    meter.stop()
    assert meter.to_json()["note"] == "a sample failed (ValueError: never) (2 times)"
    assert meter.to_json()["device_seconds"] == 0


def test_a_driver_that_hangs_keeps_nobody_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = threading.Event(), threading.Event()

    class Hangs(Script):
        def read(self, now: float) -> list[Reading]:
            asked.set()
            answer.wait()
            return [power(1)]

    monkeypatch.setattr(energy, "_STOP_S", 0.01)
    meter = EnergyMeter("cuda", 1, reader=Hangs()).start()
    asked.wait()
    meter.stop()
    assert meter.to_json()["joules"] == 0
    answer.set()


def test_without_nvml_the_tdp_is_assumed_and_the_note_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # Python's own sign that a module cannot be imported
    meter = EnergyMeter("cuda", 8, kind="v100-sxm2")
    for now in (0, 5, 10):
        meter.sample(now)
    said = meter.to_json()
    assert (said["source"], said["boundary"]) == ("tdp", "board")
    assert said["joules"] == 8 * 10 * rate_table().devices["v100-sxm2"].board_watts
    assert said["note"] == (
        "NVML: the package nvidia-ml-py is not installed; 300 W for each GPU assumed (TDP of v100-sxm2)"
    )


def test_a_gpu_of_unknown_kind_is_taken_for_the_usual_one() -> None:
    assert board_power("h100").words == "700 W for each GPU assumed (TDP of h100)"
    for kind in (None, "riva-128", "cpu-core"):
        assert board_power(kind).words == "300 W for each GPU assumed (GPU of unknown kind; TDP of v100-sxm2)"


def test_without_rapl_ten_watts_a_core_are_assumed(tmp_path: Path) -> None:
    meter = EnergyMeter("cpu", 2, reader=best_reader("cpu", 2, powercap=tmp_path))
    for now in (0, 5):
        meter.sample(now)
    assert meter.to_json() == {
        "source": "estimate",
        "joules": 100,
        "device_seconds": 10,
        "devices": 2,
        "boundary": "core",
        "note": "there is no RAPL: 10 W for each core assumed",
    }


def test_another_package_called_pynvml_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", sys)  # it has none of the names
    reader = best_reader("cuda", 1, "h100")
    assert isinstance(reader, ConstantReader)
    assert "module 'sys' has no attribute" in str(reader.note())


@pytest.mark.gpu
def test_a_real_gpu_takes_a_believable_power() -> None:
    import torch

    devices = torch.cuda.device_count()
    matrices = [torch.randn(2048, 2048, device=f"cuda:{index}") for index in range(devices)]
    meter = EnergyMeter("cuda", devices, every_s=0.2).start()
    until = time.monotonic() + 2
    while time.monotonic() < until:
        for matrix in matrices:
            matrix @ matrix
        for index in range(devices):
            torch.cuda.synchronize(index)
    meter.stop()
    said = meter.to_json()
    assert said["source"] in ("nvml-energy", "nvml-power"), said
    assert said["devices"] == devices
    assert said["device_seconds"] > devices, said
    assert 10 < said["joules"] / said["device_seconds"] < 1500, said
