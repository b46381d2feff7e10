"""`launcher trace`: what a machine's processes have noted, saved, followed or turned into another format.

The rings are read from here: the machine's processes know nothing of it, and go on whatever becomes of us.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from launcher.control import ask_with_descriptors
from launcher.errors import EXIT_DIED, EXIT_OK
from launcher.keeper import SOCKET as KEEPER
from launcher.options import check_writable
from launcher.rundir import CONTROL
from tracing.drain import TURN_S, Drain
from tracing.file import Writer
from tracing.meta import Meta
from tracing.rings import Ring


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """None: not asked for."""

    out: Path | None
    on: bool | None
    seconds: float | None
    since_s: float | None
    follow: bool


def trace(run_dir: Path, options: TraceOptions) -> int:
    """Of a running machine; the exit status."""
    if options.out is not None:
        check_writable(options.out)
    answer, fds = ask_with_descriptors(run_dir / CONTROL, "trace", run_dir.name, on=options.on)
    meta = msgspec.convert(answer["meta"], Meta)
    rings = [Ring(name, fd) for name, fd in zip(meta.rings, fds, strict=True)]
    if options.since_s is not None:
        meta = msgspec.structs.replace(meta, since_ns=meta.monotonic_ns - int(options.since_s * 1e9))
    if options.out is None:
        print(f"{run_dir.name}: {summary(rings)}")
        return EXIT_OK
    end = _Ends(run_dir, int(answer["pid"]))
    return save(rings, meta, options.out, options.seconds, end)


def summary(rings: Sequence[Ring]) -> str:
    """One line."""
    mib = sum(ring.tail - ring.oldest for ring in rings) / (1 << 20)
    state = "recording" if all(ring.on for ring in rings) else "not recording"
    return f"{state}; {len(rings)} rings hold {mib:.1f} MiB; save them with --out FILE"


class _Ends:
    """Whether a machine has ended; its launcher may have, and the machine go on."""

    def __init__(self, run_dir: Path, launcher: int) -> None:
        self._keeper = run_dir / KEEPER
        try:
            self._pidfd: int | None = os.pidfd_open(launcher)
        except ProcessLookupError:
            self._pidfd = None

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended by then."""
        if self._pidfd is not None:
            if not select.select([self._pidfd], [], [], timeout_s)[0]:
                return False
            os.close(self._pidfd)
            self._pidfd = None
        elif self._keeper.exists():
            time.sleep(timeout_s)
        return not self._keeper.exists()


def save(rings: Sequence[Ring], meta: Meta, file: Path, seconds: float | None, end: _Ends) -> int:
    """What the rings hold into a trace file, and for so many seconds what they get; Ctrl-C ends it sooner."""
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, stack: stopped.append(number))
    try:
        with file.open("wb") as out:
            drain = Drain(rings, Writer(out, meta))
            until_s = time.monotonic() + (seconds or 0.0)
            while not stopped and time.monotonic() < until_s and not end.wait(TURN_S):
                drain.turn()
            drain.finish()
    except OSError as error:
        print(f"launcher: {file}: the trace ends here: {error.strerror}", file=sys.stderr)
        return EXIT_DIED
    print(f"{meta.machine}: {file}, {file.stat().st_size / (1 << 20):.1f} MiB")
    return EXIT_OK
