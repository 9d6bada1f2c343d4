"""Quantities of different kinds cannot be mixed."""

from __future__ import annotations

import pytest

from pixart_ds.units import CarbonIntensity, DeviceTime, Emissions, Energy, Power


def test_like_is_added_to_like_only() -> None:
    assert Energy(1.5) + Energy(2) == Energy(3.5)
    with pytest.raises(TypeError, match="Energy and Emissions cannot be added"):
        Energy(1) + Emissions(1)  # type: ignore[operator]
    assert DeviceTime(7200).hours == 2
    assert DeviceTime(86400).days == 1


def test_power_over_device_time_is_energy_and_energy_emits() -> None:
    energy = DeviceTime(3600 * 8).at(Power(437))
    assert energy.kwh == pytest.approx(3.496)
    assert CarbonIntensity(57).of(energy).kg == pytest.approx(0.199272)
