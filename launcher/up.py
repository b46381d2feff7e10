"""`launcher up`: from a machine file to a running machine and its end.

Order matters. The fork server and the console process are forked first, while this process has no
thread and no ZeroMQ context, and import in parallel with the reading of the machine file. Nothing is
made on disk before all input has been found good.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from devices.host import console_path
from launcher.affinity import CoreLoad, check_host_cpu, dialogue_cores
from launcher.checks import HostFacts, check_host, check_memory
from launcher.config import MachineConfig, read_config
from launcher.daemon import OnReady, run_in_background
from launcher.errors import EXIT_OK
from launcher.forkserver import ForkServer
from launcher.journal import DEFAULT_LEVEL, Journal
from launcher.plan import EntryPoints, MachinePlan, child_specs, make_plan
from launcher.pump import Pump, PumpOptions
from launcher.rundir import RunDir
from launcher.signals import Signals
from launcher.supervisor import Launch, MachineEnd, Supervisor
from launcher.tsc_unsafe import TscClock

LOG = "launcher.log"  # in the run directory, of a detached launcher


@dataclass(frozen=True, slots=True)
class UpOptions:
    """The command line of `up`."""

    file: Path
    name: str | None = None
    detach: bool = False
    until: str | None = None
    timeout_s: float | None = None
    log_level: str = DEFAULT_LEVEL
    on_reset: str | None = None


def up(options: UpOptions, entries: EntryPoints, facts: Callable[[], HostFacts]) -> int:
    """Run a machine; the exit status."""
    if not options.detach:
        return _run(options, entries, facts, None)
    status = run_in_background(lambda ready: _run(options, entries, facts, ready))
    if status is None:
        name = read_config(options.file, options.name).machine.name
        print(f"{name}: running; see `launcher ps`, `launcher console`, `launcher down {name}`")
        return EXIT_OK
    return status


def check(file: Path, facts: HostFacts) -> MachinePlan:
    """All that can be found wrong without starting anything."""
    config = read_config(file)
    _check_config(config, facts)
    return make_plan(config)


def _check_config(config: MachineConfig, facts: HostFacts) -> None:
    check_host(facts)
    check_memory(config, facts)
    check_host_cpu(config)


def _run(
    options: UpOptions, entries: EntryPoints, facts: Callable[[], HostFacts], ready: OnReady | None
) -> int:
    tsc, load = TscClock(), CoreLoad()
    with contextlib.ExitStack() as cleanup:
        forkserver = ForkServer.start(entries.preload())
        cleanup.callback(forkserver.stop)
        pump = None
        if ready is None or options.until is not None:
            until = options.until.encode() if options.until is not None else None
            pump = Pump.start(PumpOptions(show=ready is None, until=until))
            cleanup.callback(pump.stop)
        config = read_config(options.file, options.name)
        _check_config(config, facts())
        plan = make_plan(config)
        if options.until is not None and plan.console is None:
            raise config.error("device", "--until needs a console, and no device has one",
                               'set backend = "console" in the settings of a serial port')  # fmt: skip
        signals = Signals()
        run_dir = RunDir.create(config.machine.name, plan.longest_file_name())
        cleanup.callback(run_dir.remove)
        cores = dialogue_cores(config.cpu.host_cpu, load)
        memory, others = child_specs(
            plan, entries, run_dir.path, tsc.frequency_hz(), cores, options.log_level
        )
        launch = Launch(
            machine=config.machine.name,
            run_dir=run_dir.path,
            memory=memory,
            others=others,
            images=plan.boot.images,
            start=plan.boot.start,
            console=console_path(run_dir.path, plan.console) if plan.console else None,
            stop_on_reset=(options.on_reset or config.machine.on_reset) == "stop",
        )
        journal = Journal(config.machine.name, options.log_level)
        supervisor = Supervisor(launch, forkserver, pump, signals, journal)
        end = supervisor.live(
            options.timeout_s, lambda: ready(run_dir.path / LOG) if ready is not None else None
        )
        _tell_end(journal, end, options.log_level)
        return end.status


def _tell_end(journal: Journal, end: MachineEnd, level: str) -> None:
    journal.tell(end.line)
    if hidden := journal.hidden():
        journal.tell(f"not shown at log level {level}: {hidden}")
