"""What all tests share: one thread, and reasons for tests that cannot run here."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

# a slow machine fails no test; a property is tried on the same examples each time, on others with --hypothesis-profile=random
for name, same in (("random", False), ("tests", True)):
    settings.register_profile(name, deadline=None, derandomize=same, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA GPU here"))
