"""Runs probes one after another; nothing that one of them does ends the doctor."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from pixart_ds.doctor.check import Check, Probe, failed, skipped
from pixart_ds.doctor.probes import gpu, machine
from pixart_ds.doctor.subject import Subject
from pixart_ds.errors import PixArtError

QUICK: tuple[Probe, ...] = (*machine.QUICK, *gpu.QUICK)
"""What can differ between the nodes of a job, and takes seconds."""

QUICK_LIMITS = 80.0, 105.0
"""Seconds of one probe, and of all: the supervisor waits two minutes for a node."""
FULL_LIMITS = 600.0, 3600.0
_OUR_BUG = "this is a bug of pixart-ds unless the text says otherwise: please report it with this line"


def full() -> tuple[Probe, ...]:
    """All probes. The others' libraries are imported now: the quick half is to be quick from a file system that 64 nodes read."""
    from pixart_ds.doctor.probes import config, data, network, slurm

    return (*machine.FULL, *gpu.FULL, *network.FULL, *data.FULL, *slurm.FULL, *config.FULL)


def examine(subject: Subject, probes: Sequence[Probe], limits: tuple[float, float]) -> list[Check]:
    """The checks of all probes, in their sequence.

    Args:
        subject: What is examined.
        probes: Which.
        limits: Seconds of each, and of all together. One that has not come back by then has failed, and is left behind.
    """
    end = time.monotonic() + limits[1]
    found: list[Check] = []
    for probe in probes:
        found += _one(probe, subject, min(limits[0], end - time.monotonic()))
    return found


def _one(probe: Probe, subject: Subject, deadline_s: float) -> list[Check]:
    name = f"{probe.__module__.rpartition('.')[2]}.{probe.__name__}"
    if deadline_s <= 0:
        return [skipped(name, "no time is left after those that hung")]
    found: list[Check] = []

    def look() -> None:
        found.extend(_guarded(probe, name, subject))

    # a thread can be left behind where a process cannot: a read from a file system that hangs is not to be interrupted
    thread = threading.Thread(target=look, name=name, daemon=True)
    thread.start()
    thread.join(deadline_s)
    if thread.is_alive():
        what = f"no answer within {deadline_s:.0f} s"
        return [failed(name, what, "see what hangs on this node (dmesg, mount), and leave the node out until then")]
    return found


def _guarded(probe: Probe, name: str, subject: Subject) -> list[Check]:
    try:
        said = probe(subject)
    except PixArtError as error:
        where = "" if error.where is None else f" ({error.where})"
        return [failed(name, f"{error.what}{where}", error.remedy or _OUR_BUG)]
    except Exception as error:  # whatever it is, the other probes are to have their say
        return [failed(name, f"the probe itself broke: {type(error).__name__}: {error}", _OUR_BUG)]
    return [said] if isinstance(said, Check) else said
