"""The command line: `launcher up | down | pause | resume | snapshot | restore | ps | ...`.

Imports little at its top, so that Ctrl-C has its quiet effect from the start.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launcher.errors import EXIT_MEANINGS, EXIT_OK, EXIT_OUTPUT, ConfigError, ending
from launcher.options import DEFAULT_LEVEL, LEVELS
from launcher.signals import die_quietly

if TYPE_CHECKING:
    from launcher.checks import HostFacts
    from launcher.entries import EntryPoints

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


def main(
    argv: Sequence[str] | None = None,
    *,
    entries: EntryPoints | None = None,
    facts: Callable[[], HostFacts] | None = None,
) -> int:
    """Run one command; the exit status. `entries` and `facts` replace the machine's programs and what is
    known of the host."""
    die_quietly()
    options = _parser().parse_args(argv)
    return ending(lambda: _command(options, entries, facts))


def _command(options: Any, entries: EntryPoints | None, facts: Callable[[], HostFacts] | None) -> int:
    match options.command:
        case "up":
            return _up(options, entries, facts)
        case "check":
            return _check(options, facts)
        case "ps":
            return _ps(options)
        case "stats":
            return _stats(options)
        case "down":
            return _down(options)
        case "pause" | "resume":
            return _pause_or_resume(options)
        case "snapshot":
            return _snapshot(options)
        case "restore":
            return _restore(options, entries)
        case "console":
            return _console(options)
        case "swap" | "dev" | "kill":
            return _live(options)
        case "trace":
            return _trace(options)
        case _:
            return _version()


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("launcher", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    up = commands.add_parser(
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

    down = commands.add_parser("down", help="end a running machine", description="End a running machine.")
    _add_machine(down)
    _add_machine(commands.add_parser(
        "pause",
        help="stop a running machine, and its clocks",
        description="Stop a machine between two instructions. Its time stands still until `launcher resume`.",
    ))
    _add_machine(commands.add_parser(
        "resume", help="let a paused machine go on", description="Let a paused machine go on from its time."
    ))
    snapshot = commands.add_parser(
        "snapshot",
        help="write a running machine into a file",
        description="Write all of a machine, its memory, CPU and devices, into one file. It stands while "
        "that is done, and goes on afterwards if it ran. Disks are not copied: see docs/snapshots.md.",
    )
    snapshot.add_argument("machine", help="the machine's name")
    snapshot.add_argument("file", type=Path, metavar="FILE", help="replaced if it exists")
    restore = commands.add_parser(
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
    ps = commands.add_parser(
        "ps",
        help="list the processes of running machines",
        description="List every process: node, pid, state, bus frames in and out, latency (half and 99 % of "
        "the frames took at most this long), CPU time, restarts.",
    )
    ps.add_argument("machine", nargs="?", help="only this one (default: all)")
    stats = commands.add_parser(
        "stats",
        help="show what the processes of a running machine cost",
        description="Show each process's memory and mappings, all counters, and, where it is measured, where "
        "the CPU's time goes: guest code, exits by kind, translation, page mappings, waiting for devices.",
    )
    _add_machine(stats)
    stats.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    stats.add_argument("--watch", type=_seconds, metavar="S", help="print again every S seconds until Ctrl-C")
    stats.add_argument(
        "--timing",
        choices=("on", "off"),
        help="begin (anew) or end to measure where the CPU's time goes; an exit costs about 1 us more then",
    )
    console = commands.add_parser(
        "console",
        help="attach to a serial port of a running machine",
        description="Attach to a serial port. What it has said before is shown first. Ctrl-] then q leaves; "
        "the machine goes on.",
    )
    console.add_argument("device", help="a device whose back end is the console, like uart0")
    console.add_argument("--machine", help="the machine's name (default: the only one that runs)")

    swap = commands.add_parser(
        "swap",
        help="replace the process of a device while the guest runs",
        description="Replace the process of a device by a fresh one, of the same class or of another that "
        "declares the same ports. What can't work leaves the old process running, and says why.",
    )
    _add_device(swap)
    swap.add_argument("--with", dest="with_type", metavar="FILE.py:Class", help="another implementation")
    swap.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting")
    dev = commands.add_parser(
        "dev",
        help="run a device from a file, anew whenever the file is saved",
        description="Swap a device for what a file says, again and again when it is saved. A file that "
        "doesn't load leaves the device as it is, and the error is shown.",
    )
    _add_device(dev)
    dev.add_argument("--watch", required=True, metavar="FILE.py[:Class]", help="the file")
    kill = commands.add_parser(
        "kill",
        help="kill the process of a device; another goes on",
        description="kill -9 of a device's process. Another one goes on where it was.",
    )
    _add_device(kill)
    trace = commands.add_parser(
        "trace",
        help="save what a machine's processes have noted",
        description="Save what the processes of a running machine have noted of late, or, with --seconds, "
        "what they note from now on as well. Without --out: say whether they do.",
    )
    trace.add_argument("machine", help="the machine's name")
    trace.add_argument("--out", type=Path, metavar="FILE", help="a trace file")
    switch = trace.add_mutually_exclusive_group()
    switch.add_argument("--on", action="store_const", const=True, dest="on", help="begin to record")
    switch.add_argument("--off", action="store_const", const=False, dest="on", help="end to record")
    trace.add_argument("--seconds", type=_seconds, metavar="S", help="go on for so long, or until Ctrl-C")
    trace.add_argument("--since", type=_seconds, metavar="S", help="only what is no older than this")
    check = commands.add_parser(
        "check",
        help="validate a machine file",
        description="Validate a machine file and print its address and IRQ map. Starts nothing.",
    )
    check.add_argument("machine", type=Path, metavar="MACHINE.toml", help="the machine file")
    commands.add_parser("version", help="print versions", description="Print versions.")
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("machine", help="the machine's name")
    parser.add_argument("device", help="the device's name, see `launcher ps`")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("machine", nargs="?", help="the machine's name (default: the only one that runs)")


def _text(value: str) -> str:
    if not value:
        raise argparse.ArgumentTypeError("an empty text is there from the start")
    return value


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{value!r} is no number of seconds above 0")
    return seconds


# ---- commands --------------------------------------------------------------------------------


def _up(options: Any, entries: EntryPoints | None, facts: Callable[[], HostFacts] | None) -> int:
    from launcher.entries import EntryPoints
    from launcher.options import UpOptions
    from launcher.up import up

    chosen = UpOptions(
        file=options.machine,
        name=options.name,
        detach=options.detach,
        until=options.until,
        timeout_s=options.timeout,
        log_level=options.log_level,
        on_reset=options.on_reset,
        outlive=options.outlive,
        trace=options.trace,
    )
    return up(chosen, entries or EntryPoints(), facts)


def _check(options: Any, facts: Callable[[], HostFacts] | None) -> int:
    from launcher.checks import HostFacts
    from launcher.plan import describe
    from launcher.session import check

    print(describe(check(options.machine, (facts or HostFacts.of_this_host)())))
    return EXIT_OK


def _ps(options: Any) -> int:
    from launcher import report
    from launcher.control import NoAnswer, ask
    from launcher.rundir import CONTROL, running_machines

    machines = running_machines() if options.machine is None else [_running(options.machine)]
    if not machines:
        print("no machine is running")
    for i, path in enumerate(machines):
        if i:
            print()
        print(f"machine {path.name}")
        try:
            print(report.table(ask(path / CONTROL, "ps", path.name)["rows"]))
        except NoAnswer as e:  # it is starting or ending: the others are still of interest
            print(e)
            _print_nodes(path)
    return EXIT_OK


def _print_nodes(run_dir: Path) -> None:
    """The processes of a machine that has no launcher."""
    from launcher import report
    from launcher.reattach import here

    now = here(run_dir)
    if now is not None and now.launcher is None:
        nodes = (("forkserver", now.keeper), *now.nodes)
        print(report.table([report.ps_row(node, pid, None) for node, pid in nodes]))


def _stats(options: Any) -> int:
    from launcher.stats import stats

    return stats(_running(options.machine), options.json, options.watch, options.timing)


def _down(options: Any) -> int:
    from launcher.control import down
    from launcher.reattach import end
    from launcher.rundir import CONTROL, launcher_pid, remove_if_dead

    path = _running(options.machine)
    if end(path):  # it has no launcher
        remove_if_dead(path)
    else:
        down(path / CONTROL, path.name, launcher_pid(path))
    print(f"{path.name}: ended")
    return EXIT_OK


def _pause_or_resume(options: Any) -> int:
    from launcher.control import ask
    from launcher.rundir import CONTROL

    path = _running(options.machine)
    ask(path / CONTROL, options.command, path.name)
    print(f"{path.name}: {options.command}d")
    return EXIT_OK


def _live(options: Any) -> int:
    from launcher import live

    run_dir = _running(options.machine)
    match options.command:
        case "swap":
            return live.swap(run_dir, options.device, options.with_type, options.set)
        case "dev":
            return live.develop(run_dir, options.device, options.watch)
        case _:
            return live.kill(run_dir, options.device)


def _trace(options: Any) -> int:
    from launcher.trace import TraceOptions, trace

    chosen = TraceOptions(options.out, options.on, options.seconds, options.since, follow=False)
    return trace(_running(options.machine), chosen)


def _snapshot(options: Any) -> int:
    from launcher.control import SNAPSHOT_S, ask
    from launcher.rundir import CONTROL

    path = _running(options.machine)
    folder = options.file.absolute().parent
    if options.file.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(options.file, "", "cannot be written", "name a file in a folder of yours")
    answer = ask(path / CONTROL, "snapshot", path.name, SNAPSHOT_S, file=str(options.file.absolute()))
    stood = f"; it stood for {answer['stood_ns'] / 1e6:.0f} ms" if answer["stood_ns"] else ""
    print(f"{path.name}: {options.file}, {answer['size'] / (1 << 20):.1f} MiB{stood}")
    return EXIT_OK


def _restore(options: Any, entries: EntryPoints | None) -> int:
    from launcher.entries import EntryPoints
    from launcher.restore import RestoreOptions, restore

    chosen = RestoreOptions(
        file=options.file,
        name=options.name,
        detach=options.detach,
        paused=options.paused,
        until=options.until,
        timeout_s=options.timeout,
        log_level=options.log_level,
    )
    return restore(chosen, entries or EntryPoints())


def _console(options: Any) -> int:
    from launcher.attach import attach_console

    return attach_console(_running(options.machine), options.device)


def _running(name: str | None) -> Path:
    """The run directory of the machine that is meant."""
    from launcher.rundir import running_machines

    machines = {path.name: path for path in running_machines()}
    running = ", ".join(machines) or "none"
    if name is not None:
        if name not in machines:
            raise ConfigError(name, "", "no machine of this name is running", f"running: {running}")
        return machines[name]
    if len(machines) != 1:
        problem = "no machine is running" if not machines else "several machines are running"
        remedy = "start one with `launcher up`" if not machines else f"name one of {running}"
        raise ConfigError("machine", "", problem, remedy)
    return next(iter(machines.values()))


def _version() -> int:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from bus.frames import PROTOCOL_VERSION

    try:
        backplane = version("backplane")
    except PackageNotFoundError:
        backplane = "(not installed)"
    print(f"backplane {backplane}, bus protocol {PROTOCOL_VERSION}, ", end="")
    print(f"Python {platform.python_version()}, Linux {platform.release()}")
    return EXIT_OK


def _reader_gone() -> bool:
    """Whether nobody reads our standard output any more."""
    import select

    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def run() -> NoReturn:
    """The command `launcher`. It ends at once: what an interpreter does in the end only takes time."""
    try:
        status = main()
    except BrokenPipeError:
        if not _reader_gone():
            raise
        os._exit(EXIT_OUTPUT)  # `launcher ps | head`
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        status = status or EXIT_OUTPUT
    os._exit(status)


if __name__ == "__main__":
    run()
