"""An all-reduce of real processes."""

from __future__ import annotations

import re

import pytest

from pixart_ds.doctor.children.all_reduce import bus_bandwidth
from pixart_ds.doctor.probes import network
from tests.doctor.subjects import subject

pytestmark = pytest.mark.distributed


def test_two_gloo_processes_reduce_and_say_how_fast() -> None:
    check = network.all_reduce(subject())
    assert check.verdict in ("ok", "warning")  # whatever else runs on this machine
    assert re.match(r"all-reduce of 16\.8 MB over 2 gloo processes \(memory\): \S+ .?B/s of the bus", check.evidence)


def test_an_error_of_the_backend_is_a_failure_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    check = network.all_reduce(subject())
    assert check.verdict == "failed"
    assert check.evidence.startswith("2 ranks could not reduce: exit code 1: ")
    assert "none0" in check.evidence
    assert check.remedy == "see what of gloo fails: GLOO_SOCKET_IFNAME names an interface"


def test_bandwidth_of_the_bus() -> None:
    assert bus_bandwidth(800, 8, 2.0) == pytest.approx(700.0)  # 2 · 7/8 of 800 bytes in 2 s
