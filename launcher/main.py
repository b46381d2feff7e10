"""The command line: `launcher up | down | pause | resume | snapshot | restore | ps | ...`.

Imports little at its top, so that Ctrl-C has its quiet effect from the start.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launcher.arguments import parse
from launcher.errors import EXIT_OK, EXIT_OUTPUT, ConfigError, ending
from launcher.signals import die_quietly

if TYPE_CHECKING:
    from launcher.checks import HostFacts
    from launcher.entries import EntryPoints

def main(
    argv: Sequence[str] | None = None,
    *,
    entries: EntryPoints | None = None,
    facts: Callable[[], HostFacts] | None = None,
) -> int:
    """Run one command; the exit status. `entries` and `facts` replace the machine's programs and what is
    known of the host."""
    die_quietly()
    options = parse(sys.argv[1:] if argv is None else argv)
    if options.command not in ("up", "restore"):
        gc.enable()  # see launcher/start.py; for these two it is off until the machine runs
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
        case "explain":
            return _explain(options)
        case _:
            return _version()


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
    from launcher.stats import StatsOptions, stats

    chosen = StatsOptions(
        as_json=options.json,
        prometheus=options.prometheus,
        listen=options.listen,
        once=options.once,
        watch_s=options.watch,
        timing=options.timing,
    )
    return stats(_running(options.machine), chosen)


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
    from launcher.trace import convert, trace
    from launcher.trace_arguments import options_of

    chosen = options_of(options)
    file = Path(options.what)
    if file.suffix or "/" in options.what:
        return convert(file, chosen)
    return trace(_running(options.what), chosen)


def _explain(options: Any) -> int:
    from launcher.explain import ExplainOptions, explain

    chosen = ExplainOptions(options.trace, options.out, options.top, options.symbols, options.json)
    return explain(chosen)


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
        outlive=options.outlive,
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
