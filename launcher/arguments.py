"""The command line of `launcher`, taken apart.

Of the many commands only the one that was given is described to argparse, which takes its time for each;
all of them for what names none: `launcher --help`, a slip.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from launcher.errors import EXIT_MEANINGS
from launcher.options import DEFAULT_LEVEL, LEVELS

DESCRIPTION = "Run PCs whose every part is a process. A machine is described by a machine.toml file."
EPILOG = "\n".join(
    [
        "examples:",
        "  launcher up machines/linux.toml            boot it, its serial console in this terminal",
        "  launcher up --detach machines/linux.toml   the same in the background",
        "  launcher ps                                the processes of all running machines",
        "  launcher console uart0                     attach to a serial port; Ctrl-] then q leaves",
        "  launcher down linux                        end a machine",
        "",
        "exit status:",
        *(f"  {status:<6} {meaning}" for status, meaning in EXIT_MEANINGS.items()),
        "",
        "Running machines have a directory each in $BACKPLANE_RUNTIME_DIR, else in",
        "$XDG_RUNTIME_DIR/backplane, else in /tmp/backplane-<uid>; the messages of a detached one go",
        "to <name>.log there.",
    ]
)

COLUMNS = 80  # where there is no terminal
Add = Callable[..., argparse.ArgumentParser]  # makes the parser of a command


def parse(argv: Sequence[str]) -> Any:
    """The options, with `command`. SystemExit: told what is wrong, or what was asked for."""
    parser = argparse.ArgumentParser(
        "launcher", description=DESCRIPTION, epilog=EPILOG, formatter_class=_RawFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", prog="launcher")
    for describe in [COMMANDS[argv[0]]] if argv and argv[0] in COMMANDS else COMMANDS.values():
        describe(partial(commands.add_parser, formatter_class=_Formatter))
    return parser.parse_args(argv)


class _Formatter(argparse.HelpFormatter):
    """As wide as the terminal, which argparse asks shutil for: that takes as long as all the rest of it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_columns() - 2)


class _RawFormatter(_Formatter, argparse.RawDescriptionHelpFormatter):
    pass


def _columns() -> int:
    """As shutil.get_terminal_size has it."""
    if (wanted := os.environ.get("COLUMNS", "")).isdecimal() and int(wanted):
        return int(wanted)
    try:
        return os.get_terminal_size(1).columns or COLUMNS
    except OSError:
        return COLUMNS


def _up(add: Add) -> None:
    up = add(
        "up",
        help="start a machine",
        description="Start a machine, or go on with one that runs, and show its serial console here. In a "
        "terminal, keys go to the guest "
        "as they are (Ctrl-C too) and Ctrl-] then q ends the machine; otherwise standard input is fed to the "
        "console and its end just stops that.",
    )
    up.add_argument("machine", type=Path, metavar="MACHINE.toml", help="the machine file")
    up.add_argument("--detach", action="store_true", help="return when it runs, and leave it running")
    up.add_argument("--name", help="call the machine this instead of the file's machine.name")
    up.add_argument("--until", type=_text, metavar="TEXT", help="end the machine when TEXT is on its console")
    up.add_argument(
        "--timeout", type=_seconds, metavar="S", help="end it after S seconds, with exit status 4"
    )
    up.add_argument(
        "--log-level",
        choices=LEVELS,
        default=DEFAULT_LEVEL,
        help="what the processes report here (default: %(default)s; info adds accesses to ports nobody owns)",
    )
    up.add_argument(
        "--on-reset",
        choices=("restart", "stop"),
        help="when the guest resets itself: start again, or print the CPU state and exit with status 3 "
        "(default: the file's machine.on_reset)",
    )
    up.add_argument(
        "--outlive",
        action="store_true",
        help="let the machine run on if this launcher is killed; `launcher up` re-attaches then",
    )
    up.add_argument(
        "--trace", type=Path, metavar="FILE", help="write all that its processes note into this file"
    )


def _down(add: Add) -> None:
    _add_machine(add("down", help="end a running machine", description="End a running machine."))


def _pause(add: Add) -> None:
    _add_machine(add(
        "pause",
        help="stop a running machine, and its clocks",
        description="Stop a machine between two instructions. Its time stands still until `launcher resume`.",
    ))


def _resume(add: Add) -> None:
    _add_machine(add(
        "resume", help="let a paused machine go on", description="Let a paused machine go on from its time."
    ))


def _snapshot(add: Add) -> None:
    snapshot = add(
        "snapshot",
        help="write a running machine into a file",
        description="Write all of a machine, its memory, CPU and devices, into one file. It stands while "
        "that is done, and goes on afterwards if it ran. Disks are not copied: see docs/snapshots.md.",
    )
    snapshot.add_argument("machine", help="the machine's name")
    snapshot.add_argument("file", type=Path, metavar="FILE", help="replaced if it exists")


def _restore(add: Add) -> None:
    restore = add(
        "restore",
        help="start a machine from a snapshot",
        description="Start the machine of a snapshot where it was. Several may run side by side, each under "
        "a name of its own; what they write to disks is their own, and gone when they end.",
    )
    restore.add_argument("file", type=Path, metavar="FILE", help="what `launcher snapshot` wrote")
    restore.add_argument("--name", help="call the machine this instead of what it was called")
    restore.add_argument("--detach", action="store_true", help="return when it runs, and leave it running")
    restore.add_argument("--paused", action="store_true", help="let it stand until `launcher resume`")
    restore.add_argument("--until", type=_text, metavar="TEXT", help="end it when TEXT is on its console")
    restore.add_argument("--timeout", type=_seconds, metavar="S", help="end it after S seconds, status 4")
    restore.add_argument("--log-level", choices=LEVELS, default=DEFAULT_LEVEL, help="as of `up`")
    restore.add_argument("--outlive", action="store_true", help="let it run on if this launcher is killed")


def _ps(add: Add) -> None:
    ps = add(
        "ps",
        help="list the processes of running machines",
        description="List every process: node, pid, state, bus frames in and out, latency (half and 99 % of "
        "the frames took at most this long), CPU time, restarts.",
    )
    ps.add_argument("machine", nargs="?", help="only this one (default: all)")


def _stats(add: Add) -> None:
    stats = add(
        "stats",
        help="show what the processes of a running machine cost",
        description="On a terminal: what each device and CPU does per second, until Ctrl-C. Else, or with "
        "--once, each process's memory and mappings, all counters, and, where it is measured, where "
        "the CPU's time goes: guest code, exits by kind, translation, page mappings, waiting for devices.",
    )
    _add_machine(stats)
    how = stats.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    how.add_argument("--prometheus", action="store_true", help="print it as Prometheus text")
    how.add_argument(
        "--listen", type=_address, metavar="[HOST:]PORT", help="serve that at /metrics until the machine ends"
    )
    how.add_argument("--once", action="store_true", help="print tables once, also on a terminal")
    stats.add_argument("--watch", type=_seconds, metavar="S", help="again every S seconds until Ctrl-C")
    stats.add_argument(
        "--timing",
        choices=("on", "off"),
        help="begin (anew) or end to measure where the CPU's time goes; an exit costs about 1 us more then",
    )


def _console(add: Add) -> None:
    console = add(
        "console",
        help="attach to a serial port of a running machine",
        description="Attach to a serial port. What it has said before is shown first. Ctrl-] then q leaves; "
        "the machine goes on.",
    )
    console.add_argument("device", help="a device whose back end is the console, like uart0")
    console.add_argument("--machine", help="the machine's name (default: the only one that runs)")


def _swap(add: Add) -> None:
    swap = add(
        "swap",
        help="replace the process of a device while the guest runs",
        description="Replace the process of a device by a fresh one, of the same class or of another that "
        "declares the same ports. What can't work leaves the old process running, and says why.",
    )
    _add_device(swap)
    swap.add_argument("--with", dest="with_type", metavar="FILE.py:Class", help="another implementation")
    swap.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting")


def _dev(add: Add) -> None:
    dev = add(
        "dev",
        help="run a device from a file, anew whenever the file is saved",
        description="Swap a device for what a file says, again and again when it is saved. A file that "
        "doesn't load leaves the device as it is, and the error is shown.",
    )
    _add_device(dev)
    dev.add_argument("--watch", required=True, metavar="FILE.py[:Class]", help="the file")


def _kill(add: Add) -> None:
    _add_device(add(
        "kill",
        help="kill the process of a device; another goes on",
        description="kill -9 of a device's process. Another one goes on where it was.",
    ))


def _trace(add: Add) -> None:
    from launcher.trace_arguments import describe  # takes its time to import

    describe(add, _seconds)


def _explain(add: Add) -> None:
    explain = add(
        "explain",
        help="say what a trace tells",
        description="Say what a trace file tells: the slowest chains, the busiest registers, interrupts, who "
        "waited for whom, what is lacking. See docs/explain.md.",
    )
    explain.add_argument("trace", type=Path, metavar="TRACE", help="what `launcher trace --out` wrote")
    explain.add_argument("--out", "--html", type=Path, metavar="FILE.html", help="write a report instead")
    explain.add_argument("--top", type=_count, metavar="N", default=10, help="rows of a table (%(default)s)")
    explain.add_argument("--symbols", type=Path, metavar="FILE", help="System.map, kallsyms or vmlinux")
    explain.add_argument("--json", action="store_true", help="print one JSON object; times in ns")


def _check(add: Add) -> None:
    check = add(
        "check",
        help="validate a machine file",
        description="Validate a machine file and print its address and IRQ map. Starts nothing.",
    )
    check.add_argument("machine", type=Path, metavar="MACHINE.toml", help="the machine file")


def _version(add: Add) -> None:
    add("version", help="print versions", description="Print versions.")


COMMANDS: dict[str, Callable[[Add], None]] = {
    "up": _up,
    "down": _down,
    "pause": _pause,
    "resume": _resume,
    "snapshot": _snapshot,
    "restore": _restore,
    "ps": _ps,
    "stats": _stats,
    "console": _console,
    "swap": _swap,
    "dev": _dev,
    "kill": _kill,
    "trace": _trace,
    "explain": _explain,
    "check": _check,
    "version": _version,
}


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("machine", help="the machine's name")
    parser.add_argument("device", help="the device's name, see `launcher ps`")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("machine", nargs="?", help="the machine's name (default: the only one that runs)")


def _text(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("an empty text is there from the start")
    return value


def _address(text: str) -> tuple[str, int]:
    from launcher.scrape import parse_address

    try:
        return parse_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(value: str) -> int:
    if not value.isascii() or not value.isdigit() or not 0 < int(value) <= 10_000:
        raise argparse.ArgumentTypeError(f"{value!r} is no number from 1 to 10000")
    return int(value)


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{value!r} is no number of seconds above 0")
    return seconds
