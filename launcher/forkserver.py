"""A warmed process that forks the machine's other processes.

It imports once what all of them need (60 ms and more each otherwise) and then forks on request, in a
millisecond. The child that needs most besides (the CPU node) is forked ahead of its request, and imports on
another core while this process imports the rest. This process is itself forked off the launcher before
either has a thread or a ZeroMQ context, and
keeps it so: contexts do not survive a fork. Chain of life: the kernel kills this process when the
launcher ends, however it ends, and the children when this process ends. But a launcher may leave its machine
to another one, and a machine may be meant to outlive it: launcher/keeper.py.

Requests and reports are records (memory_node/wire.py) on a socket pair:
  {"op": "fork", node, entry, config, title, log, fds} + fds  ->  {"op": "forked", node, pid} + its pidfd
  ... later, unasked                                           ->  {"op": "exited", node, pid, status}
  once, when a module does not import                          ->  {"op": "failed", error}
The child forked ahead is given its request as it is. A child finds descriptors in its config: `fds`, by name.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from launcher.entries import Preload
from launcher.errors import MachineDied
from launcher.keeper import Keeper
from launcher.process_unsafe import die_with_parent, set_thread_name
from memory_node import wire

STDERR = 2
Request = tuple[dict[str, Any], list[int]]
FORK_DEADLINE_S = 30.0  # for the imports and one fork, on a busy host


class ChildSpec(msgspec.Struct, frozen=True):
    """What one child is to run: `entry` is "package.module.function", called with `config`."""

    node: str
    entry: str
    config: dict[str, Any]
    title: str
    log: Path
    host_cpus: tuple[int, ...] = ()  # the cores it may run on once it is ready; empty: all
    fds: Mapping[str, int] = {}  # descriptors it is given, at most wire.FDS_MAX


class Child(msgspec.Struct):
    """A forked process, as the launcher sees it. `pidfd` becomes readable when it ends."""

    node: str
    pid: int
    pidfd: int


class ForkServer(msgspec.Struct):
    """The launcher's handle: `sock` becomes readable when there are reports."""

    pid: int
    pidfd: int
    sock: socket.socket
    statuses: dict[int, int] = {}  # wait status by pid
    stopped: bool = False
    is_child: bool = True  # else it was another launcher's

    @classmethod
    def start(cls, preload: Preload) -> ForkServer:
        """Fork it; it imports `preload` while the caller goes on. The caller must have one thread.

        What is shared by all is imported here before: this process needs it, too.
        """
        for module in preload.shared:
            with contextlib.suppress(Exception):  # the fork server will say so
                importlib.import_module(module)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            run_and_exit(lambda: _serve(theirs, parent, preload))
        theirs.close()
        ours.settimeout(FORK_DEADLINE_S)
        return cls(pid, os.pidfd_open(pid), ours)

    def fork(self, spec: ChildSpec) -> Child:
        """Fork one child; blocks until it exists. MachineDied when the fork server can't."""
        return self.fork_all([spec])[0]

    def fork_all(self, specs: Sequence[ChildSpec]) -> list[Child]:
        """Fork children of different nodes, which takes less than one by one."""
        children: dict[str, Child] = {}
        try:
            for spec in specs:
                request = {
                    "op": "fork",
                    "node": spec.node,
                    "entry": spec.entry,
                    "config": spec.config,
                    "title": spec.title,
                    "log": str(spec.log),
                    "fds": list(spec.fds),
                }
                wire.send_record(self.sock, request, tuple(spec.fds.values()))
            while len(children) < len(specs):
                report, fds = self._receive()
                if report["op"] == "forked":
                    node = str(report["node"])
                    children[node] = Child(node, int(report["pid"]), fds[0])
        except OSError as e:
            raise MachineDied(f"fork server (pid {self.pid}) does not answer: {e}") from e
        return [children[spec.node] for spec in specs]

    def read_reports(self) -> None:
        """Take in what has arrived, without waiting."""
        while select.select([self.sock], [], [], 0)[0]:
            try:
                self._receive()
            except MachineDied:
                return

    def wait_status(self, child: Child, timeout_s: float) -> int | None:
        """Wait status of a child that has ended; None when the fork server has not said it in time."""
        while child.pid not in self.statuses:
            if not select.select([self.sock], [], [], timeout_s)[0]:
                return None
            try:
                self._receive()
            except MachineDied:
                return None
        return self.statuses[child.pid]

    def tell(self, record: dict[str, Any], fds: Sequence[int]) -> None:
        """Something for its keeper. OSError, wire.BadRecord: it has not been told."""
        wire.send_record(self.sock, record, fds)

    def leave(self) -> None:
        """Let it go on without us."""
        self.stopped = True
        os.close(self.pidfd)
        self.sock.close()

    def stop(self) -> None:
        """End it and with it all its children. May be called again."""
        if self.stopped:
            return
        self.stopped = True
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        if self.is_child:
            os.waitpid(self.pid, 0)
        else:
            select.select([self.pidfd], [], [], FORK_DEADLINE_S)
        os.close(self.pidfd)
        self.sock.close()

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        try:
            received = wire.receive_record(self.sock)
        except ConnectionResetError:
            received = None
        if received is None:
            raise MachineDied(f"fork server (pid {self.pid}) died")
        report, fds = received
        if report["op"] == "exited":
            self.statuses[int(report["pid"])] = int(report["status"])
        elif report["op"] == "failed":
            raise MachineDied(f"fork server (pid {self.pid}): {report['error']}")
        return report, fds


# ---- inside the fork server ------------------------------------------------------------------


class _Ahead(msgspec.Struct):
    """A child that has no request yet: it imports its module and waits."""

    module: str
    pid: int
    pidfd: int
    sock: socket.socket

    @classmethod
    def fork(cls, module: str) -> _Ahead:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            run_and_exit(lambda: _run_ahead(parent, theirs, module))
        theirs.close()
        return cls(module, pid, os.pidfd_open(pid), ours)

    def take(self, request: dict[str, Any], fds: Sequence[int]) -> tuple[int, int] | None:
        """Make it the child that is asked for: its pid and pidfd; None when it is there no more."""
        try:
            wire.send_record(self.sock, request, fds)
        except OSError:
            os.close(self.pidfd)
            return None
        finally:
            self.sock.close()
        return self.pid, self.pidfd


def _serve(sock: socket.socket, launcher: int, preload: Preload) -> None:
    die_with_parent(launcher)
    close_other_descriptors(sock.fileno())
    os.setsid()  # a Ctrl-C at the terminal is for the launcher to act on
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_title("backplane: fork server", "forkserver")
    gc.disable()  # what is imported stays
    _import(sock, preload.shared)
    ahead = _Ahead.fork(preload.ahead) if preload.ahead is not None else None
    _import(sock, preload.others)
    gc.freeze()  # children share these pages as long as no collection touches them
    redirect_standard(os.devnull)
    children: dict[int, tuple[int, str]] = {}  # pidfd -> pid, node
    from bus.frames import PROTOCOL_VERSION  # the launcher need not wait for it

    keeper = Keeper(sock, launcher, PROTOCOL_VERSION)
    while True:
        fd = _next_readable([*keeper.descriptors(), *children])
        if fd in children:
            pid, node = children.pop(fd)
            _, status = os.waitpid(pid, 0)
            keeper.ended(node, pid, fd, status)
        elif keeper.launcher is None or fd != keeper.launcher.fileno():
            if not keeper.turn(fd, children):
                return
        else:
            requests = _requests(keeper.launcher)
            if not requests:
                if not keeper.left(children):
                    return
                continue
            to_fork = []
            for request in requests:
                if request[0]["op"] == "fork":
                    to_fork.append(request)
                else:
                    keeper.obey(*request)
            if to_fork and not children:  # the first: now we know whose fork server this is
                set_title(f"backplane {to_fork[0][0]['config']['machine']}: fork server", "forkserver")
            forked = []
            for request in tuple(to_fork):
                if ahead is not None and _module(request[0]) == ahead.module:
                    if (child := ahead.take(*request)) is not None:
                        to_fork.remove(request)
                        forked.append((request, child))
                    ahead = None
            for (record, fds), (pid, pidfd) in [*forked, *_fork_children(to_fork)]:
                for fd_of_child in fds:
                    os.close(fd_of_child)
                children[pidfd] = (pid, record["node"])
                report = {"op": "forked", "node": record["node"], "pid": pid}
                with contextlib.suppress(OSError):  # it has just ended: we see that next
                    wire.send_record(keeper.launcher, report, [pidfd])


def _next_readable(fds: Sequence[int]) -> int:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return poll.poll()[0][0]


def _requests(sock: socket.socket) -> list[Request]:
    """All that have come; none when the launcher has gone."""
    requests: list[Request] = []
    while not requests or select.select([sock], [], [], 0)[0]:
        try:
            received = wire.receive_record(sock)
        except OSError:  # it ended before it had read all of our reports
            break
        if received is None:
            break
        requests.append(received)
    return requests


def _import(sock: socket.socket, modules: Sequence[str]) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as e:  # whatever a broken installation raises, the launcher shall print it
            wire.send_record(sock, {"op": "failed", "error": f"{module} does not import: {e!r}"})
            raise


def _run_ahead(parent: int, sock: socket.socket, module: str) -> None:
    die_with_parent(parent)
    close_other_descriptors(sock.fileno())
    os.setsid()
    redirect_standard(os.devnull)
    set_title("backplane: not yet asked for", "ahead")
    with contextlib.suppress(Exception):  # imported again when the log is open, it says there what is wrong
        importlib.import_module(module)
    received = wire.receive_record(sock)
    if received is not None:
        sock.close()
        _run_request(*received)


def _before_fork(request: dict[str, Any]) -> None:
    """Let the program do here what each of its processes would else do for itself."""
    program = sys.modules.get(_module(request))
    if (prepare := getattr(program, "before_fork", None)) is not None:
        with contextlib.suppress(Exception):  # the process will say what is wrong
            prepare(request["config"])


def _fork_children(requests: Sequence[Request]) -> list[tuple[Request, tuple[int, int]]]:
    """With pid and pidfd of each.

    What this process touches between two forks it has to copy anew, so it does nothing there.
    """
    for record, _ in requests:
        _before_fork(record)
    parent, pids = os.getpid(), []
    for record, fds in requests:
        pid = os.fork()
        if pid == 0:
            run_and_exit(partial(_run_child, parent, record, fds))
        pids.append(pid)
    return [(request, (pid, os.pidfd_open(pid))) for request, pid in zip(requests, pids, strict=True)]


def _run_child(parent: int, request: dict[str, Any], fds: Sequence[int]) -> None:
    die_with_parent(parent)
    close_other_descriptors(*fds)
    os.setsid()
    _run_request(request, fds)


def _run_request(request: dict[str, Any], fds: Sequence[int]) -> None:
    redirect_standard(request["log"])
    set_title(request["title"], request["node"])
    gc.freeze()
    gc.enable()
    function = request["entry"].rpartition(".")[2]
    config = request["config"]
    if fds:
        config["fds"] = dict(zip(request["fds"], fds, strict=True))
    getattr(importlib.import_module(_module(request)), function)(config)


def _module(request: dict[str, Any]) -> str:
    return str(request["entry"].rpartition(".")[0])


def run_and_exit(body: Callable[[], None]) -> NoReturn:
    """Run `body` as all that this forked process does: no clean-up code of the parent's runs."""
    gc.freeze()  # a collection could close, by number, what belonged to an inherited object
    status = 1
    try:
        body()
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def close_other_descriptors(*kept: int) -> None:
    """Close all that was inherited but the standard three and `kept`, so that ends of pipes are seen."""
    low = STDERR + 1
    for fd in sorted(kept):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def redirect_standard(log: str | Path) -> None:
    """Standard input from nowhere, standard output and error into a file: our user's pipes get their end."""
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(null)
    os.close(out)
    sys.stdout = os.fdopen(1, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)


def set_title(title: str, thread_name: str) -> None:
    """What `ps` shows, and what `top` and /proc/<pid>/comm show."""
    from setproctitle import setproctitle

    setproctitle(title)
    set_thread_name(thread_name)  # after setproctitle, which sets it too
