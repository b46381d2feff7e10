"""When the launcher leaves what with the fork server, for the launcher that comes after it.

Of a machine that ends with its launcher: nothing, until another launcher asks for it. Of one that is to
outlive it: all, at every change. A change is told behind the turn of the supervisor's loop in which it came,
so a launcher that is killed before has left what was before; launcher/reattach.py says what becomes of that.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from launcher.deposit import STATE, Deposit, DepositedImages, pack
from launcher.forkserver import ForkServer
from launcher.keeper import SOCKET
from launcher.pausing import Pausing
from launcher.processes import Processes
from memory_node.wire import FDS_MAX


class Depositing:
    """Of one supervisor."""

    def __init__(self, processes: Processes, pausing: Pausing, forkserver: ForkServer) -> None:
        self._processes, self._pausing, self._forkserver = processes, pausing, forkserver
        self._started_ns = 0
        self._images: DepositedImages | None = None
        self._last: tuple[Any, ...] | None = None

    def begin(self, started_ns: int) -> None:
        """The machine runs: whoever wants it may come. `started_ns`: since when, on CLOCK_MONOTONIC."""
        self._started_ns = started_ns
        launch = self._processes.launch
        facts = launch.facts
        listen = {
            "op": "listen",
            "path": str(launch.run_dir / SOCKET),
            "outlive": launch.outlive,
            "file": "" if facts is None else facts.file,
            "text": "" if facts is None else facts.text,
        }
        with contextlib.suppress(OSError):  # it has ended, and its pidfd says so
            self._forkserver.tell(listen, [launch.lock_fd])

    def update(self) -> str | None:
        """Deposit what has changed, if the machine is to outlive us; what to tell the user."""
        if not self._processes.launch.outlive or self._now() == self._last:
            return None
        try:
            self.deposit()
        except RuntimeError as e:
            return f"it will not outlive this launcher: {e}"
        return None

    def deposit(self) -> None:
        """RuntimeError: it can't be."""
        launch = self._processes.launch
        if self._images is None:
            self._images = DepositedImages.make(launch.images)
        self._last = self._now()
        deposit = Deposit(
            machine=launch.machine,
            run_dir=launch.run_dir,
            memory=launch.memory,
            others=launch.others,
            rim=launch.rim,
            start=launch.start,
            console=launch.console,
            stop_on_reset=launch.stop_on_reset,
            outlive=launch.outlive,
            facts=launch.facts,
            images=self._images.table,
            processes=self._processes.deposited(),
            kept=self._processes.kept.fds,
            offset_ns=self._pausing.offset_ns,
            clock_ns=self._pausing.clock_ns,
            started_ns=self._started_ns,
        )
        fds = pack(deposit, self._images.fd)
        try:
            if len(fds) > FDS_MAX:
                raise RuntimeError(f"it has too many descriptors to be left to another launcher ({len(fds)})")
            self._forkserver.tell({"op": "deposit"}, fds)
        except OSError as e:
            raise RuntimeError(f"the fork server does not take it: {e}") from e
        finally:
            os.close(fds[STATE])

    def _now(self) -> tuple[Any, ...]:
        """Another one where something has changed."""
        processes, pausing = self._processes, self._pausing
        return (
            tuple(processes.deposited().items()),
            processes.kept.changes,
            processes.launch,
            pausing.offset_ns,
            pausing.clock_ns,
        )
