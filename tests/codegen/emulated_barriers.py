"""The barriers of a program that is emulated on the CPU, whose groups of warps are threads."""

from __future__ import annotations

import threading
from typing import Any

#: Seconds after which a wait counts as a deadlock.
PATIENCE = 60.0
#: Threads of a group of warps.
GROUP = 128


class Barrier:
    """An mbarrier: a phase ends when all arrivals and bytes that it waits for have come."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.count, self.pending, self.bytes, self.phase = 0, 0, 0, 0

    def change(self, arrivals: int, transfer: int) -> None:
        with self.condition:
            self.pending -= arrivals
            self.bytes += transfer
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.pending, self.phase = self.count, self.phase ^ 1
                self.condition.notify_all()

    def wait(self, parity: int) -> None:
        with self.condition:
            ended = self.condition.wait_for(lambda: self.phase != parity, PATIENCE)
        assert ended, "deadlock"


class NamedBarriers:
    """The barriers of a program that have numbers: as many threads as an instruction says meet at one."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.arrived: dict[int, int] = {}
        self.meetings: dict[int, int] = {}

    def arrive(self, number: int, threads: int) -> int:
        """A group of four warps arrives, and doesn't wait; how many meetings there have been before."""
        with self.condition:
            before = self.meetings.get(number, 0)
            self.arrived[number] = self.arrived.get(number, 0) + GROUP
            assert 0 <= number < 16 and self.arrived[number] <= threads
            if self.arrived[number] == threads:
                self.arrived[number], self.meetings[number] = 0, before + 1
                self.condition.notify_all()
        return before

    def wait(self, number: int, threads: int) -> None:
        with self.condition:
            before = self.arrive(number, threads)
            ended = self.condition.wait_for(lambda: self.meetings.get(number, 0) > before, PATIENCE)
        assert ended, "deadlock"

    @property
    def idle(self) -> bool:
        """Whether nobody who has arrived was left alone."""
        return not any(self.arrived.values())


class Barriers:
    """Several of them."""

    def __init__(self, count: int) -> None:
        self.members = [Barrier() for _ in range(count)]

    def index(self, n: Any) -> Barrier:
        return self.members[int(n)]
