"""The command line of `launcher trace`, taken apart. What it does: launcher/trace.py."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ConfigError

SUFFIXES = {
    ".bptrace": "raw", ".pftrace": "perfetto", ".perfetto-trace": "perfetto", ".pcapng": "pcapng",
    ".txt": "text",
}  # fmt: skip
FORMATS = ("raw", "perfetto", "pcapng", "text")
PORTS = re.compile(r"(?:0x)?([0-9a-f]{1,8})(?:-(?:0x)?([0-9a-f]{1,8}))?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """None and (): not asked for."""

    out: Path | None = None
    on: bool | None = None
    seconds: float | None = None
    since_s: float | None = None
    follow: bool = False
    format: str | None = None
    devices: tuple[str, ...] = ()
    ports: tuple[range, ...] = ()
    symbols: Path | None = None

    def format_of_out(self) -> str:
        """ConfigError where nothing says which."""
        if self.format is not None or self.out is None:
            return self.format or "text"
        found = SUFFIXES.get(self.out.suffix)
        if found is None:
            remedy = f"end it in {', '.join(SUFFIXES)}, or say --format {'|'.join(FORMATS)}"
            raise ConfigError(self.out, "", "its name says no format", remedy)
        return found


def describe(
    add: Callable[..., argparse.ArgumentParser], seconds: Callable[[str], float]
) -> argparse.ArgumentParser:
    """`add`: makes the parser of a command; `seconds`: the type of a time."""
    trace = add(
        "trace",
        help="save, follow or convert what a machine's processes have noted",
        description="Save what the processes of a running machine have noted of late (--out), and what they "
        "note from now on (--seconds, --follow); show it as it happens (--follow); or turn a trace file into "
        "another format. With nothing of that: say whether they are recording.",
    )
    trace.add_argument("what", metavar="MACHINE|FILE", help="the machine's name, or a trace file")
    trace.add_argument(
        "--out", type=Path, metavar="FILE", help=f"write it there; its name ends in {', '.join(SUFFIXES)}"
    )
    trace.add_argument("--format", choices=FORMATS, help="of what is written")
    trace.add_argument("--follow", action="store_true", help="go on until Ctrl-C, or the machine's end")
    trace.add_argument("--seconds", type=seconds, metavar="S", help="go on for so long")
    trace.add_argument("--since", type=seconds, metavar="S", help="only what is no older than this")
    trace.add_argument(
        "--devices", type=_names, default=(), metavar="NAME,...", help="only I/O that these take part in"
    )
    trace.add_argument(
        "--ports", type=_ports, default=(), metavar="PORTS", help="only I/O that begins there: 3f8-3ff,60"
    )
    trace.add_argument(
        "--symbols", type=Path, metavar="FILE", help="of the guest's kernel: System.map, kallsyms or vmlinux"
    )
    switch = trace.add_mutually_exclusive_group()
    switch.add_argument("--on", action="store_const", const=True, dest="on", help="begin to record")
    switch.add_argument("--off", action="store_const", const=False, dest="on", help="end to record")
    return trace


def options_of(options: Any) -> TraceOptions:
    return TraceOptions(
        out=options.out,
        on=options.on,
        seconds=options.seconds,
        since_s=options.since,
        follow=options.follow,
        format=options.format,
        devices=options.devices,
        ports=options.ports,
        symbols=options.symbols,
    )


def parse_ports(text: str) -> tuple[range, ...]:
    """ "3f8-3ff,60": ports, or addresses of memory-mapped registers, in hexadecimal. ValueError."""
    found = []
    for part in text.split(","):
        match = PORTS.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{part!r} is no port, write it like 3f8 or 3f8-3ff")
        first = int(match[1], 16)
        last = first if match[2] is None else int(match[2], 16)
        if last < first:
            raise ValueError(f"{part!r} ends before it begins")
        found.append(range(first, last + 1))
    return tuple(found)


def _ports(text: str) -> tuple[range, ...]:
    try:
        return parse_ports(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
