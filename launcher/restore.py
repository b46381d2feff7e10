"""`launcher restore`: a machine from a snapshot file.

A start is mostly imports, in this process and in the fork server, each on a core; the memory is unpacked by
another process meanwhile (unpacking.py). So nothing is imported here that a restored machine doesn't need: no
plan is made, the file says what each process is to be told. Disks that the guest writes to get an overlay in
the run directory, so that one snapshot serves many machines.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from launcher.daemon import OnReady, run_in_background
from launcher.entries import EntryPoints
from launcher.errors import EXIT_OK, ConfigError
from launcher.forkserver import ChildSpec, ForkServer
from launcher.unpacking import Unpacking

if TYPE_CHECKING:
    from launcher.affinity import CoreLoad
    from launcher.facts import MachineDisk
    from launcher.pump import Pump
    from launcher.snapshot import DiskUse, Index, NodeRecord, Snapshot
    from launcher.tsc_unsafe import TscClock

OVERLAY = "{node}-{disk}.overlay"
TSC_TOLERANCE = 1e-3  # of the frequency that the guest was told


class RestoreOptions(msgspec.Struct, frozen=True):
    """None stands for what the snapshot says, or for no limit."""

    file: Path
    name: str | None
    detach: bool
    paused: bool
    until: str | None
    timeout_s: float | None
    log_level: str
    outlive: bool = False


class Restored(msgspec.Struct):
    """What the supervisor needs besides: the time to go on from, and when memory is complete."""

    clock_ns: int
    stay_paused: bool
    await_memory: Callable[[], None]  # raises LauncherError


def restore(options: RestoreOptions, entries: EntryPoints) -> int:
    """Run a restored machine; the exit status."""
    if not options.detach:
        return _run(options, entries, None)
    log = run_in_background(lambda ready: _run(options, entries, ready))
    if isinstance(log, int):
        return log
    name = log.stem
    state = "paused; see `launcher resume" if options.paused else "running; see `launcher ps`, `launcher down"
    print(f"{name}: {state} {name}`, {log}")
    return EXIT_OK


def _run(options: RestoreOptions, entries: EntryPoints, ready: OnReady | None) -> int:
    with contextlib.ExitStack() as cleanup:
        unpacking = Unpacking(options.file)
        cleanup.callback(unpacking.close)
        forkserver = ForkServer.start(entries.preload())
        cleanup.callback(forkserver.stop)
        pump = None
        if ready is None or options.until is not None:
            from launcher.pump import Pump, PumpOptions

            until = options.until.encode() if options.until is not None else None
            pump = Pump.start(PumpOptions(show=ready is None, until=until))
            cleanup.callback(pump.stop)
        from launcher.affinity import CoreLoad
        from launcher.snapshot import Snapshot
        from launcher.tsc_unsafe import TscClock

        tsc, load = TscClock(), CoreLoad()
        snapshot = Snapshot(options.file)
        cleanup.callback(snapshot.close)
        return _run_machine(options, entries, forkserver, pump, tsc, load, snapshot, unpacking, ready)


def _run_machine(
    options: RestoreOptions,
    entries: EntryPoints,
    forkserver: ForkServer,
    pump: Pump | None,
    tsc: TscClock,
    load: CoreLoad,
    snapshot: Snapshot,
    unpacking: Unpacking,
    ready: OnReady | None,
) -> int:
    from launcher.affinity import dialogue_cores
    from launcher.facts import MachineFacts
    from launcher.journal import Journal
    from launcher.launch import Launch
    from launcher.rings import rim_spec
    from launcher.rundir import RunDir
    from launcher.signals import Signals
    from launcher.snapshot import SnapshotImages
    from launcher.spans import from_environment
    from launcher.supervisor import Supervisor

    index = snapshot.index
    otlp, no_spans = from_environment(os.environ)
    name = options.name if options.name is not None else index.origin.name
    _check_name(name)
    if options.until is not None and index.console is None:
        raise ConfigError(options.file, "", "--until needs a console, and no device has one", "leave it out")
    signals = Signals()
    run_dir = RunDir.create(name, max((f"console-{n.node}.sock" for n in index.nodes), key=len))
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(run_dir.remove)
        disks = [_disk(options.file, use, run_dir.path, snapshot) for use in index.disks]
        _check_tsc(options.file, index, tsc.frequency_hz())
        cores = dialogue_cores(index.host_cpu, load)
        shared = {"run_dir": str(run_dir.path), "machine": name, "log_level": options.log_level}
        memory = unpacking.memory()
        specs = [_spec(record, entries, shared, cores, disks, memory) for record in index.nodes]
        restored = Restored(index.clock_ns, options.paused, unpacking.wait)
        launch = Launch(
            machine=name,
            run_dir=run_dir.path,
            memory=specs[0],
            others=tuple(specs[1:]),
            rim=rim_spec(entries, specs[1:-1], index.channels),
            images=SnapshotImages(snapshot),
            start=index.start,
            console=run_dir.path / f"console-{index.console}.sock" if index.console else None,
            stop_on_reset=index.stop_on_reset,
            facts=MachineFacts(index.origin.name, index.origin.file, index.origin.text, index.console,
                               index.host_cpu, tuple(disks)),
            restored=restored,
            outlive=options.outlive,
            otlp=otlp,
            lock_fd=run_dir.lock_fd,
        )
        journal = Journal(name, options.log_level)
        if no_spans:
            journal.tell(no_spans)
        supervisor = Supervisor(launch, forkserver, pump, signals, journal)
        log = run_dir.path.with_name(f"{name}.log")
        end = supervisor.live(options.timeout_s, lambda: ready(log) if ready is not None else None)
        if end.left:
            run_dir.leave()
        journal.tell_end(end.line)
        return end.status


def _check_name(name: str) -> None:
    import re

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}", name):  # as launcher/config.py has it
        rule = "use up to 32 letters, digits, - and _, starting with a letter or digit"
        raise ConfigError("--name", "", f"{name!r} cannot name a machine", rule)


def _check_tsc(file: Path, index: Index, hz: int) -> None:
    """The guest has been told a frequency, and can't be told another."""
    told = next((n.config["tsc_hz"] for n in index.nodes if "tsc_hz" in n.config), hz)
    if abs(told - hz) > TSC_TOLERANCE * told:
        has, needs = f"{hz / 1e9:.4f} GHz", f"{told / 1e9:.4f} GHz"
        problem = f"its guest counts on a time-stamp counter of {needs}, this host's has {has}"
        raise ConfigError(file, "", problem, "restore it on a host like the one it comes from")


def _disk(file: Path, use: DiskUse, run_dir: Path, snapshot: Snapshot) -> MachineDisk:
    """A disk as the restored machine has it; ConfigError when it isn't what it was."""
    from launcher.facts import MachineDisk

    path = Path(use.path)
    where = f"{use.node}.{use.disk}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise ConfigError(file, where, f"its disk {path} cannot be read ({e.strerror})", "put it back") from e
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go with the descriptor: the device locks it anew
        size, mtime_ns = os.lseek(fd, 0, os.SEEK_END), os.fstat(fd).st_mtime_ns
    except BlockingIOError as e:
        problem = f"its disk {path} is being written to by a machine"
        raise ConfigError(file, where, problem, "end that machine first") from e
    finally:
        os.close(fd)
    if (size, mtime_ns) != (use.size, use.mtime_ns):
        remedy = "take back the file as it was, time stamp included"
        raise ConfigError(file, where, f"its disk {path} was written to after the snapshot", remedy)
    overlay = None
    if not use.read_only:
        overlay = run_dir / OVERLAY.format(node=use.node, disk=use.disk)
        snapshot.fill_overlay(use, overlay)
    return MachineDisk(use.node, use.disk, use.setting, path, use.read_only, overlay)


def _spec(
    record: NodeRecord,
    entries: EntryPoints,
    shared: dict[str, Any],
    cores: tuple[int, ...],
    disks: list[MachineDisk],
    memory: int,
) -> ChildSpec:
    """What to fork for a node: as it was, under this machine's name, beginning with its state."""
    node, state = record.node, record.state
    config = {"node": node, **shared, **record.config}
    title, log = f"backplane {shared['machine']}: {node}", Path(shared["run_dir"]) / f"{node}.log"
    if state is None:
        return ChildSpec(node, entries.memory, config, title, log, fds={"ram": memory})
    config["state"] = state
    if "tsc_hz" in config:
        config["features"] = state["model"]["features"]
        return ChildSpec(node, entries.cpu, config, title, log, cores)
    if overlays := {d.disk: str(d.overlay) for d in disks if d.node == node and d.overlay is not None}:
        config["overlays"] = overlays
    return ChildSpec(node, entries.device, config, title, log, cores)
