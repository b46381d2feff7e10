"""A running machine's launcher changes: `launcher up` where the machine runs already.

The new launcher gets all from the fork server (launcher/keeper.py), once the one before it has left or ended.
Nothing is read, locked or loaded for it; the guest does not notice. Also what is known of a machine that has
no launcher: who its processes are, and its end.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from bus.frames import PROTOCOL_VERSION
from launcher.control import NoAnswer, ask
from launcher.daemon import OnReady
from launcher.deposit import IMAGES, STATE, Deposit, unpack
from launcher.errors import EXIT_INPUT, ConfigError
from launcher.forkserver import FORK_DEADLINE_S, Child, ForkServer
from launcher.journal import Journal
from launcher.keeper import SOCKET, VERSION
from launcher.options import UpOptions
from launcher.pump import Pump, PumpOptions
from launcher.rundir import CONTROL, RunDir
from launcher.signals import Signals
from memory_node import wire

ATTACH_S = 60.0  # for the launcher before us to leave, on a busy host


class Here(msgspec.Struct, frozen=True):
    """A machine that runs. `launcher`: its pid, None: it has none."""

    keeper: int
    launcher: int | None
    file: str
    text: str
    nodes: tuple[tuple[str, int], ...]


class Inherited(msgspec.Struct):
    """What the new launcher has got. `processes`: of each node that one; those to be ended besides."""

    deposit: Deposit
    forkserver: ForkServer
    run_dir: RunDir
    images: int
    processes: dict[str, Child]
    strangers: list[Child]


def here(run_dir: Path) -> Here | None:
    """None where no machine can be re-attached to: none runs, or it is starting."""
    try:
        with contextlib.closing(wire.connect(run_dir / SOCKET, FORK_DEADLINE_S)) as sock:
            wire.send_record(sock, {"op": "who"})
            received = wire.receive_record(sock)
    except (OSError, wire.BadRecord):
        return None
    if received is None or received[0].get("op") != "here":
        return None
    record = received[0]
    nodes = tuple((str(node), int(pid)) for node, pid in record["nodes"])
    return Here(record["pid"], record["launcher"], record.get("file", ""), record.get("text", ""), nodes)


def end(run_dir: Path) -> bool:
    """End a machine that has no launcher; False where that isn't so. All of it has ended afterwards."""
    now = here(run_dir)
    if now is None or now.launcher is not None:
        return False
    with contextlib.suppress(ProcessLookupError):
        pidfds = [os.pidfd_open(pid) for pid in (now.keeper, *(pid for _, pid in now.nodes))]
        with contextlib.closing(wire.connect(run_dir / SOCKET, FORK_DEADLINE_S)) as sock:
            wire.send_record(sock, {"op": "end"})
            received = wire.receive_record(sock)
        ended = received is not None and received[0]["op"] == "ended"
        for pidfd in pidfds:
            if ended:
                select.select([pidfd], [], [], FORK_DEADLINE_S)
            os.close(pidfd)
        return ended
    return False


def check_same(options: UpOptions, name: str, now: Here) -> str | None:
    """ConfigError where another machine file is meant; a warning where the same one has changed."""
    try:
        text = options.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(options.file, "", f"cannot be read ({e})", "name the machine's file") from e
    if text == now.text:
        return None
    if os.path.realpath(options.file) == os.path.realpath(now.file):
        return f"{options.file} has changed since; the machine goes on as it was started"
    problem = f"a machine named {name!r} is running (launcher {now.launcher or 'none'}), from {now.file}"
    remedy = f"choose another name with --name, or stop it with `launcher down {name}`"
    raise ConfigError(options.file, "", problem, remedy)


def reattach(options: UpOptions, run_dir: Path, now: Here, ready: OnReady | None) -> int:
    """Be the launcher of a running machine from now on; the exit status."""
    name = run_dir.name
    warning = check_same(options, name, now)
    with contextlib.ExitStack() as cleanup:
        pump = None
        if ready is None or options.until is not None:
            until = options.until.encode() if options.until is not None else None
            pump = Pump.start(PumpOptions(show=ready is None, until=until))
            cleanup.callback(pump.stop)
        signals = Signals()
        inherited = attach(run_dir, name)
        cleanup.callback(inherited.forkserver.stop)
        cleanup.callback(inherited.run_dir.remove)
        from launcher.supervisor import Supervisor

        deposit = inherited.deposit
        launch = replace(
            deposit.launch(inherited.images),
            stop_on_reset=deposit.stop_on_reset if options.on_reset is None else options.on_reset == "stop",
            outlive=deposit.outlive or options.outlive,
            lock_fd=inherited.run_dir.lock_fd,
        )
        journal = Journal(name, options.log_level)
        before = f"launcher {now.launcher}" if now.launcher is not None else "no launcher"
        journal.tell(f"re-attached to the running machine, which had {before}")
        if warning is not None:
            journal.tell(warning)
        if options.until is not None and launch.console is None:
            journal.tell("--until needs a console, and no device has one")
        supervisor = Supervisor(launch, inherited.forkserver, pump, signals, journal, inherited)
        log = run_dir.with_name(f"{name}.log")
        end = supervisor.live(options.timeout_s, lambda: ready(log) if ready is not None else None)
        if end.left:
            inherited.run_dir.leave()
        journal.tell_end(end.line)
        return end.status


def attach(run_dir: Path, name: str) -> Inherited:
    """Have the launcher that there is leave, and take everything over. NoAnswer, ConfigError: nothing
    has changed."""
    try:
        sock = wire.connect(run_dir / SOCKET, ATTACH_S)
    except OSError as e:
        raise NoAnswer(f"{name}: it has just ended") from e
    try:
        return _attach(sock, run_dir, name)
    except BaseException:
        sock.close()
        raise


def _attach(sock: socket.socket, run_dir: Path, name: str) -> Inherited:
    wire.send_record(sock, {"op": "attach", "version": VERSION, "protocol": PROTOCOL_VERSION})
    record, fds = _receive(sock, name)
    if record["op"] == "busy":
        ask(run_dir / CONTROL, "leave", name, by=os.getpid())
        record, fds = _receive(sock, name)
    lock, *pidfds = fds
    _, deposited = _receive(sock, name)
    try:
        deposit = unpack(deposited)
    except ValueError as e:
        raise NoAnswer(f"{name}: {e}", EXIT_INPUT) from e
    os.close(deposited[STATE])
    keeper = int(record["pid"])
    sock.settimeout(FORK_DEADLINE_S)
    forkserver = ForkServer(keeper, os.pidfd_open(keeper), sock, is_child=False)
    live = [Child(node, pid, pidfd) for (node, pid), pidfd in zip(record["live"], pidfds, strict=False)]
    ended = []
    for (node, pid, status), pidfd in zip(record["ended"], pidfds[len(live) :], strict=True):
        ended.append(Child(node, pid, pidfd))
        forkserver.statuses[pid] = status
    (run_dir / CONTROL).unlink(missing_ok=True)  # the last one's
    processes, strangers = sort_out(deposit, live, ended)
    return Inherited(
        deposit, forkserver, RunDir.adopt(run_dir, lock), deposited[IMAGES], processes, strangers
    )


def sort_out(
    deposit: Deposit, live: Sequence[Child], ended: Sequence[Child]
) -> tuple[dict[str, Child], list[Child]]:
    """Which process is a node's; those that must be ended.

    A launcher that was killed in the middle of a swap, or between the start of a process and its deposit,
    leaves processes that the deposit doesn't know, or two of a node. Then none of these may go on: a third
    does, from the journal.
    """
    processes, strangers = {}, []
    for node, known in deposit.processes.items():
        running = [child for child in live if child.node == node]
        if [child.pid for child in running] == [known.pid]:
            processes[node] = running[0]
            continue
        strangers += running
        last = [child for child in (*running, *ended) if child.node == node]
        if last:
            processes[node] = last[0]
    return processes, strangers


def _receive(sock: socket.socket, name: str) -> tuple[dict[str, Any], list[int]]:
    try:
        received = wire.receive_record(sock)
    except (OSError, wire.BadRecord) as e:
        raise NoAnswer(f"{name}: its fork server does not answer: {e}") from e
    if received is None:
        raise NoAnswer(f"{name}: it has just ended")
    if received[0]["op"] == "refused":
        raise NoAnswer(f"{name}: {received[0]['error']}", EXIT_INPUT)
    return received
