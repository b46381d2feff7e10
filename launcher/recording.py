"""A machine's trace rings: who makes them, who may read them, and where a crash is saved.

The launcher keeps their descriptors, as it keeps the journals: so they outlive the processes that write them,
and its successor has them too. It never reads them: a file is written by a process of its own
(launcher/draining.py).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from bus import recorder
from bus.recorder import BLOCK
from launcher import report
from launcher.forkserver import ChildSpec
from launcher.launch import Launch
from launcher.names import CPU
from tracing.meta import Meta, meta_of
from tracing.rings import Ring

TRACE, TRACE_IO = "trace", "trace_io"  # names of descriptors; the second is that of the CPU's thread
FEWEST = 4  # blocks of a ring
CRASHES_KEPT = 4
CRASH_EVERY_S = 10.0  # no more are saved: a device that dies all the time fills no disk
FINISH_S = 15.0  # for a file to be written to its end when the machine has ended


def with_traces(launch: Launch) -> Launch:
    """Each process with a ring of its own, or two."""
    devices = len(launch.others) - 1 + (launch.rim is not None)
    half = launch.trace_memory // 2 // BLOCK
    each = max(FEWEST, half // (devices + 1))

    def of(spec: ChildSpec) -> ChildSpec:
        fds = {**spec.fds, TRACE: recorder.make(spec.node, each, launch.trace)}
        if spec.node == CPU:
            fds[TRACE_IO] = recorder.make(f"{spec.node}.io", max(FEWEST, half), launch.trace)
        return replace(spec, fds=fds)

    rim = None if launch.rim is None else of(launch.rim)
    return replace(launch, others=tuple(map(of, launch.others)), rim=rim)


def rings(launch: Launch) -> dict[str, int]:
    """Descriptors by the rings' names."""
    found = {}
    for spec in (*launch.others, *(() if launch.rim is None else (launch.rim,))):
        if TRACE in spec.fds:
            found[spec.node] = spec.fds[TRACE]
        if TRACE_IO in spec.fds:
            found[f"{spec.node}.io"] = spec.fds[TRACE_IO]
    return found


def switch(launch: Launch, on: bool) -> None:
    """Have all processes record from now on, or none."""
    for name, fd in rings(launch).items():
        Ring(name, fd, writable=True).switch(on)


def meta(launch: Launch, why: str = "") -> Meta:
    """What a trace file begins with."""
    cpu = next(spec for spec in launch.others if spec.node == CPU)
    irqs = {spec.node: dict(spec.config.get("irqs") or {}) for spec in launch.others}
    return meta_of(launch.machine, list(rings(launch)), map=cpu.config["map"], irqs=irqs, why=why)


class Draining:
    """A process that writes a trace file."""

    def __init__(self, launch: Launch, file: Path, why: str = "", go_on: bool = False) -> None:
        """`go_on`: until finish(), or until we end; else only what is there now."""
        import subprocess  # takes its time to import

        fds = list(rings(launch).values())
        command = [sys.executable, "-m", "launcher.draining", str(file), *map(str, fds)]
        self.file = file
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=fds)
        self._pidfd = os.pidfd_open(self._process.pid)
        assert self._process.stdin is not None
        plain = msgspec.msgpack.encode(meta(launch, why))
        self._process.stdin.write(len(plain).to_bytes(8, "little") + plain)
        self._process.stdin.flush()
        if not go_on:
            self._process.stdin.close()

    @property
    def over(self) -> bool:
        return self._process.poll() is not None

    def finish(self) -> None:
        """Returns when the file is complete, or it takes too long."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        report.wait_for_end(self._pidfd, FINISH_S)
        self._process.kill()
        self._process.wait()
        os.close(self._pidfd)


class CrashTraces:
    """What the rings hold when something crashes, in files beside the machine's run directory."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._last_s = -CRASH_EVERY_S
        self._running: list[Draining] = []

    def save(self, launch: Launch, why: str) -> Path | None:
        """Have it saved soon; the file, None where one was saved just now or nothing is recorded."""
        for draining in [d for d in self._running if d.over]:
            draining.finish()
            self._running.remove(draining)
        now_s = time.monotonic()
        names = rings(launch)
        if now_s - self._last_s < CRASH_EVERY_S or not any(Ring(n, fd).on for n, fd in names.items()):
            return None
        self._last_s = now_s
        machine = self._run_dir.name
        file = self._run_dir.with_name(f"{machine}.crash-{time.strftime('%Y%m%d-%H%M%S')}.bptrace")
        for old in _crashes(self._run_dir)[: -CRASHES_KEPT + 1]:
            old.unlink(missing_ok=True)
        self._running.append(Draining(launch, file, why))
        return file

    def finish(self) -> None:
        """Returns when all that is being saved is in its file."""
        for draining in self._running:
            draining.finish()


def _crashes(run_dir: Path) -> Sequence[Path]:
    return sorted(run_dir.parent.glob(f"{run_dir.name}.crash-*.bptrace"), key=os.path.getmtime)
