"""The ranks of one launch on several machines: those of this one, and what the others tell of theirs."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from pixart_ds.cluster.launchers import Failed, LaunchRequest, LocalRanks
from pixart_ds.cluster.rendezvous import Member
from pixart_ds.errors import EXIT_BUG
from pixart_ds.layout import StageLayout


class MachinesRanks:
    """See `Ranks`."""

    def __init__(
        self, layout: StageLayout, request: LaunchRequest, local: LocalRanks, members: Sequence[Member], world_size: int
    ) -> None:
        self.world_size = world_size
        self._layout, self._request, self._local, self._members = layout, request, local, members
        self._failed: Failed | None = None
        self._sent: set[int] = set()
        self._asked = False

    def send(self, number: signal.Signals) -> None:
        if number == signal.SIGTERM and self.failed() is None:
            self._asked = True
        self._local.send(number)
        if number == signal.SIGKILL and number in self._sent:  # the supervisor says it again and again
            return
        self._sent.add(number)
        for each in self._members:
            each.signal(number)

    def failed(self) -> Failed | None:
        """A rank that merely lost a peer gives its place to the cause, which another machine may tell of a moment later."""
        found = self._failures()
        if self._failed is not None:
            if self._failed.code != EXIT_BUG:
                return self._failed
            found = [
                each
                for each in found
                if each.code != EXIT_BUG
                and (each.rank is None or -each.code not in self._sent)  # what we sent explains nothing
            ]
        if found:
            self._failed = min(found, key=lambda each: each.code == EXIT_BUG)
        return self._failed

    def _failures(self) -> list[Failed]:
        """Machines that are lost, this machine's first failed rank, those of the others."""
        # as if killed: after a step, EXIT_BUG would be taken for that of a rank whose peer is to blame
        lost = [Failed(None, -signal.SIGKILL, each.name) for each in self._members if _is_lost(each)]
        here = self._local.failed()
        return [*lost, *([here] if here else []), *(failed for each in self._members for failed in each.failures)]

    def alive(self) -> bool:
        if self._local.alive() or any(not each.left and each.gone is None for each in self._members):
            return True
        self._go_on_without()
        return False

    def _go_on_without(self) -> None:
        """Where one machine's agent died or was asked to leave, its ranks were told to stop, and so all have saved and left. Nobody
        asked the stage to stop: the marker that says so is set aside, and the next launch goes on from what was saved.
        """
        lost = any(_is_lost(each) for each in self._members)
        stopped = self._request.attempt.stopped
        if lost and not self._asked and not os.path.lexists(self._layout.stop_request) and stopped.exists():
            os.rename(stopped, self._request.attempt.saved_for_a_machine(self._request.launch))

    def log_of(self, rank: int) -> Path:
        return self._local.log_of(rank)

    def listening(self) -> bool:
        return True

    def last_words(self, rank: int | None) -> str:
        return self._local.last_words(rank)


def _is_lost(member: Member) -> bool:
    """Whether its ranks are gone with it, or have left because it was asked to; before they have left, they may be saving."""
    return member.leaves is not None if member.left else member.gone is not None
