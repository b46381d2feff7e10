"""`launcher trace`: what a machine's processes have noted, saved, followed, or turned into another format.

The rings are read from here: the machine's processes know nothing of it, and go on whatever becomes of us.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from launcher.control import ask_with_descriptors
from launcher.errors import EXIT_DIED, EXIT_OK, EXIT_OUTPUT, ConfigError, LauncherError
from launcher.keeper import SOCKET as KEEPER
from launcher.options import check_writable
from launcher.rundir import CONTROL
from launcher.trace_arguments import TraceOptions
from tracing.drain import TURN_S, Drain
from tracing.file import BadTrace, Trace, Writer
from tracing.joining import Filter
from tracing.meta import Meta
from tracing.rings import Ring

if TYPE_CHECKING:
    from tracing.live import Live
    from tracing.steps import NamesSymbols


class Stop:
    """Whether to end: by Ctrl-C, SIGTERM, or since the machine has ended or the time is over."""

    def __init__(self, run_dir: Path, launcher: int, seconds: float | None) -> None:
        """`seconds`: None: no limit. `launcher`: its pid; it may end and the machine go on."""
        self._asked = False
        self._keeper = run_dir / KEEPER
        self._until_s = None if seconds is None else time.monotonic() + seconds
        self._pidfd: int | None = None
        with suppress(ProcessLookupError):
            self._pidfd = os.pidfd_open(launcher)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def wait(self) -> bool:
        """For a turn; whether to end then."""
        timeout_s = TURN_S
        if self._until_s is not None:
            timeout_s = max(0.0, min(TURN_S, self._until_s - time.monotonic()))
        ended = False
        if self._pidfd is None:
            time.sleep(timeout_s)
            ended = not self._keeper.exists()
        elif select.select([self._pidfd], [], [], timeout_s)[0]:
            os.close(self._pidfd)
            self._pidfd = None
            ended = not self._keeper.exists()
        return ended or self._asked or (self._until_s is not None and time.monotonic() >= self._until_s)

    def _ask(self, number: int, stack: object) -> None:
        self._asked = True


def trace(run_dir: Path, options: TraceOptions) -> int:
    """Of a running machine; the exit status."""
    kind = options.format_of_out()
    if options.out is not None:
        check_writable(options.out)
    answer, fds = ask_with_descriptors(run_dir / CONTROL, "trace", run_dir.name, on=options.on)
    meta = msgspec.convert(answer["meta"], Meta)
    rings = [Ring(name, fd) for name, fd in zip(meta.rings, fds, strict=True)]
    check_devices(meta, options)
    if options.since_s is not None:
        meta = msgspec.structs.replace(meta, since_ns=meta.monotonic_ns - int(options.since_s * 1e9))
    if not options.follow and options.out is None and options.format is None:
        print(f"{run_dir.name}: {summary(rings)}")
        return EXIT_OK
    seconds = options.seconds if options.seconds is not None or options.follow else 0.0
    stop = Stop(run_dir, int(answer["pid"]), seconds)
    if options.out is None or kind in ("text", "pcapng"):
        return follow(rings, meta, options, kind, stop)
    if kind == "raw":
        return save(rings, meta, options.out, stop)
    raw = options.out.with_name(f"{options.out.name}.bptrace")
    try:
        return save(rings, meta, raw, stop, quiet=True) or convert(raw, options)
    finally:
        raw.unlink(missing_ok=True)


def check_devices(meta: Meta, options: TraceOptions) -> None:
    """ConfigError for a device that the machine doesn't have."""
    known = [name for name in meta.rings if not name.endswith(".io")]
    for name in options.devices:
        if name not in known:
            raise ConfigError(meta.machine, "", f"has no device {name!r}", f"it has {', '.join(known)}")


def summary(rings: Sequence[Ring]) -> str:
    """One line."""
    mib = sum(ring.tail - ring.oldest for ring in rings) / (1 << 20)
    state = "recording" if all(ring.on for ring in rings) else "not recording"
    return f"{state}; {len(rings)} rings hold {mib:.1f} MiB; save them with --out FILE"


def save(rings: Sequence[Ring], meta: Meta, file: Path, stop: Stop, quiet: bool = False) -> int:
    """What the rings hold into a trace file, and what they get until `stop`."""
    try:
        with file.open("wb") as out:
            drain = Drain(rings, Writer(out, meta))
            while not stop.wait():
                drain.turn()
            drain.finish()
    except OSError as error:
        print(f"launcher: {file}: the trace ends here: {error.strerror}", file=sys.stderr)
        return EXIT_DIED
    if not quiet:
        print(f"{meta.machine}: {file}, {file.stat().st_size / (1 << 20):.1f} MiB")
    return EXIT_OK


def follow(rings: Sequence[Ring], meta: Meta, options: TraceOptions, kind: str, stop: Stop) -> int:
    """Text or packets as it happens, to a file or standard output."""
    from tracing.live import Live

    if kind not in ("text", "pcapng"):
        remedy = "name a file with --out, or follow as text or pcapng"
        raise ConfigError("--format", "", f"{kind} can't be followed", remedy)
    live = Live(rings, meta, load_symbols(options), chosen(options))
    out = sys.stdout.buffer if options.out is None else options.out.open("wb")
    put = _packets(out, meta, live) if kind == "pcapng" else _lines(out, meta, live)
    ended = False
    try:
        while not ended:
            ended = stop.wait()
            live.read(ended)
            put(ended)
            out.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_OUTPUT
    except OSError as error:
        print(f"launcher: {options.out}: the trace ends here: {error.strerror}", file=sys.stderr)
        return EXIT_DIED
    if live.lost:
        print(f"launcher: {live.lost} records were overwritten before they were read", file=sys.stderr)
    return EXIT_OK


def _packets(out: IO[bytes], meta: Meta, live: Live) -> Callable[[bool], None]:
    from tracing.pcapng import Writer as PacketWriter

    writer = PacketWriter(out, meta)

    def put(ended: bool) -> None:
        found = [(r.time_ns, number, r) for number, records in enumerate(live.records) for r in records]
        for _, number, record in sorted(found, key=lambda item: item[0]):
            writer.record(number, record)
        if ended:
            writer.end()
        else:
            writer.flush()

    return put


def _lines(out: IO[bytes], meta: Meta, live: Live) -> Callable[[bool], None]:
    from tracing.lines import Lines

    lines = Lines(meta, colour=out.isatty() and "NO_COLOR" not in os.environ)

    def put(ended: bool) -> None:
        for step in live.steps(ended):
            out.write(f"{lines.line(step)}\n".encode())

    return put


def convert(file: Path, options: TraceOptions) -> int:
    """A trace file into another format. Of a damaged one what is before the damage, and a line."""
    kind = options.format_of_out()
    if options.out is not None:
        check_writable(options.out)
    try:
        with Trace(file) as trace:
            check_devices(trace.meta, options)
            with open(1, "wb", closefd=False) if options.out is None else options.out.open("wb") as out:
                _write(trace, kind, out, options)
            for line in trace.complaints:
                print(f"launcher: {line}", file=sys.stderr)
            lost = sum(trace.lost.values())
    except BadTrace as error:
        raise LauncherError(str(error)) from error
    except BrokenPipeError:
        return EXIT_OUTPUT
    except OSError as error:
        raise LauncherError(f"{error.filename or options.out}: {error.strerror}") from error
    if lost:
        print(f"launcher: {file}: {lost} records were overwritten before they were read", file=sys.stderr)
    if options.out is not None:
        print(f"{trace.meta.machine}: {options.out}, {options.out.stat().st_size / (1 << 20):.1f} MiB")
    return EXIT_OK


def _write(trace: Trace, kind: str, out: IO[bytes], options: TraceOptions) -> None:
    from tracing.joining import steps

    if kind == "raw":
        raise ConfigError("--format", "", "it is a raw trace already", "name another format")
    if kind == "pcapng":
        from tracing import pcapng

        pcapng.export(trace, out)
        return
    found = steps(trace, load_symbols(options), chosen(options))
    if kind == "perfetto":
        from tracing import perfetto

        perfetto.export(found, trace.meta, out)
        return
    from tracing.lines import Lines

    lines = Lines(trace.meta, colour=out.isatty() and "NO_COLOR" not in os.environ)
    for step in found:
        out.write(f"{lines.line(step)}\n".encode())


def chosen(options: TraceOptions) -> Filter | None:
    """None: all."""
    if not options.devices and not options.ports:
        return None
    return Filter(frozenset(options.devices), options.ports)


def load_symbols(options: TraceOptions) -> NamesSymbols | None:
    """ConfigError for a file without any."""
    if options.symbols is None:
        return None
    from tracing.symbols import BadSymbols, Symbols

    try:
        return Symbols.load(options.symbols)
    except BadSymbols as error:
        raise LauncherError(str(error)) from error
