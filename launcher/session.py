"""One machine from its file to its end, the processes that `up` has forked in advance being given."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from bus.link import console_path
from devices.registry import make_settings
from launcher import spans
from launcher.affinity import CoreLoad, check_host_cpu, dialogue_cores
from launcher.checks import HostFacts, check_host, check_memory
from launcher.config import LinuxBoot, MachineConfig, read_config
from launcher.daemon import OnReady
from launcher.entries import EntryPoints
from launcher.facts import MachineDisk, MachineFacts
from launcher.forkserver import ForkServer
from launcher.journal import Journal
from launcher.launch import Launch
from launcher.options import UpOptions, check_writable
from launcher.plan import MachinePlan, child_specs, make_plan
from launcher.pump import Pump
from launcher.rings import rim_spec
from launcher.rundir import RunDir
from launcher.signals import Signals
from launcher.supervisor import Supervisor
from launcher.tsc_unsafe import TscClock

KEPT = ".kept"  # files of translations


def check(file: Path, facts: HostFacts, name: str | None = None) -> MachinePlan:
    """All that can be found wrong without starting anything."""
    config = read_config(file, name)
    check_host(facts)
    check_memory(config, facts)
    check_host_cpu(config)
    return make_plan(config)


def run_machine(
    options: UpOptions,
    entries: EntryPoints,
    facts: Callable[[], HostFacts],
    forkserver: ForkServer,
    pump: Pump | None,
    tsc: TscClock,
    load: CoreLoad,
    ready: OnReady | None,
) -> int:
    """The exit status; `ready` is called once the machine runs. Nothing is made before all input is good."""
    plan = check(options.file, facts(), options.name)
    config = plan.config
    if options.until is not None and plan.console is None:
        remedy = 'set backend = "console" in the settings of a serial port'
        raise config.error("device", "--until needs a console, and no device has one", remedy)
    if options.trace is not None:
        check_writable(options.trace)
    otlp, no_spans = _endpoint(config)
    signals = Signals()
    run_dir = RunDir.create(config.machine.name, plan.longest_file_name())
    with contextlib.ExitStack() as cleanup:
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
            rim=rim_spec(entries, others[:-1]),
            images=plan.boot.images,
            start=plan.boot.start,
            console=console_path(run_dir.path, plan.console) if plan.console else None,
            stop_on_reset=_stops(options, config),
            facts=_facts(plan),
            outlive=options.outlive or config.machine.on_launcher_death == "run",
            trace=config.machine.trace,
            otlp=otlp,
            trace_memory=int(config.machine.trace_memory),
            lock_fd=run_dir.lock_fd,
        )
        journal = Journal(config.machine.name, options.log_level)
        if first := first_translation(config):
            journal.tell(first)
        if no_spans:
            journal.tell(no_spans)
        supervisor = Supervisor(launch, forkserver, pump, signals, journal)
        if options.trace is not None:
            cleanup.callback(supervisor.draining(options.trace).finish)
        log = run_dir.path.with_name(f"{config.machine.name}.log")
        end = supervisor.live(options.timeout_s, lambda: ready(log) if ready is not None else None)
        if end.left:
            run_dir.leave()
        journal.tell_end(end.line)
        return end.status


def _endpoint(config: MachineConfig) -> tuple[str, str]:
    """Where spans go, and a line where the environment asks for some and there can't be any. ConfigError."""
    setting = config.machine.otlp
    if not setting:
        return spans.from_environment(os.environ)
    try:
        return spans.endpoint(setting, os.environ), ""
    except spans.BadEndpoint as error:
        missing = str(error) == spans.MISSING
        remedy = "or leave it out" if missing else 'write one like "http://localhost:4318", or leave it out'
        raise config.error("machine.otlp", str(error), remedy) from error


def first_translation(config: MachineConfig) -> str | None:
    """A line for the start that has no translation to take over; that of a small guest takes no time."""
    folder = config.translations_folder
    if folder is None or not isinstance(config.boot, LinuxBoot) or any(folder.glob(f"*/*{KEPT}")):
        return None
    return f"first start: the guest's code is translated as it runs, and kept in {folder} for the next"


def _facts(plan: MachinePlan) -> MachineFacts:
    config = plan.config
    text = config.file.read_text(encoding="utf-8")
    disks = []
    for device in plan.devices:
        settings = make_settings(device.cls, device.table.settings)
        for disk in device.cls.DISKS:
            path, read_only = getattr(settings, disk.setting), bool(getattr(settings, disk.read_only))
            disks.append(MachineDisk(device.table.name, disk.name, disk.setting, Path(path), read_only))
    file = str(config.file.absolute())
    return MachineFacts(config.machine.name, file, text, plan.console, config.cpu.host_cpu, tuple(disks))


def _stops(options: UpOptions, config: MachineConfig) -> bool:
    return (options.on_reset or config.machine.on_reset) == "stop"
