"""Launching machines with fake CPU nodes, in pipes or in a terminal, and looking at what is left."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launcher.control import ask
from launcher.rundir import CONTROL

ROOT = Path(__file__).parents[2]
PR_SET_CHILD_SUBREAPER = 36
PATIENCE_S = 240.0  # a bound on hanging, not an expectation

DEVICES = """
[[device]]
name = "uart0"
type = "uart16550"
ports = { regs = 0x3f8 }
irqs = { intr = 4 }
settings = { backend = "console" }

[[device]]
name = "pic"
type = "pic8259"
ports = { master = 0x20, slave = 0xa0, elcr = 0x4d0 }
"""


def machine_text(
    machine: str = 'name = "fake"\nmemory = "16M"', boot: str | None = None, rest: str = ""
) -> str:
    boot = f'kind = "asm"\nsource = "{ROOT}/machines/hello/hello.S"' if boot is None else boot
    return f"[machine]\n{machine}\n[boot]\n{boot}\n{rest}\n{DEVICES}"


@pytest.fixture(scope="session", autouse=True)
def subreaper() -> None:
    """Orphans of what tests start become our children, so that they can be found."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@pytest.fixture(autouse=True)
def runtime(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = short_path / "run"
    monkeypatch.setenv("BACKPLANE_RUNTIME_DIR", str(root))
    return root


@pytest.fixture
def machine_file(tmp_path: Path) -> Path:
    path = tmp_path / "machine.toml"
    path.write_text(machine_text())
    return path


def stat_words(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()


def descendants(root: int) -> set[int]:
    """Pids of all living processes below `root`; zombies don't count."""
    children: dict[int, set[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                words = stat_words(int(entry.name))
                if words[0] != "Z":
                    children.setdefault(int(words[1]), set()).add(int(entry.name))
    found: set[int] = set()
    todo = [root]
    while todo:
        below = children.get(todo.pop(), set()) - found
        found |= below
        todo += below
    return found


def machine_processes() -> dict[int, str]:
    """pid -> command line of what lives below us and is a launcher or was started by one."""
    found = {}
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if "multiprocessing.resource_tracker" not in line:
                found[pid] = line
    return found


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {PATIENCE_S:g} s")
        time.sleep(0.005)


def wait_running(run_dir: Path) -> None:
    """Until all processes of the machine are ready."""

    def running() -> bool:
        if not (run_dir / CONTROL).exists():
            return False
        rows = ask(run_dir / CONTROL, "ps", run_dir.name)["rows"]
        nodes = {row["node"] for row in rows}
        return "cpu0" in nodes and not any("starting" in row["state"] for row in rows)

    wait_until(running, f"{run_dir.name} runs")


@dataclass
class Command:
    """A launcher command that runs. In a terminal, standard error goes there, too."""

    process: subprocess.Popen[bytes]
    master: int | None  # our end of its terminal
    slave: int | None
    output: bytes = b""
    errors: bytes = b""
    before: list[object] = field(default_factory=list)  # terminal attributes at the start

    @property
    def pid(self) -> int:
        return self.process.pid

    def read_until(self, text: str) -> None:
        """Read output until `text` is in it."""
        deadline = time.monotonic() + PATIENCE_S
        while text.encode() not in self.output:
            assert time.monotonic() < deadline, f"no {text!r} in {self.output!r}"
            assert self._read(0.1), f"ended before {text!r}: {self.output!r} {self.errors!r}"

    def type(self, text: str) -> None:
        data = text.encode()
        if self.master is not None:
            os.write(self.master, data)
        else:
            assert self.process.stdin is not None
            self.process.stdin.write(data)
            self.process.stdin.flush()

    def close_input(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def finish(self) -> int:
        """Wait for the end, reading all output; the exit status (-n for signal n)."""
        deadline = time.monotonic() + PATIENCE_S
        while self._read(0.1):
            assert time.monotonic() < deadline, f"does not end: {self.output!r} {self.errors!r}"
        return self.process.wait(PATIENCE_S)

    def part(self, name: str) -> int:
        """Pid of the process whose thread name is `name`, among this command's."""
        for pid in descendants(self.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == name[:15]:
                    return pid
        raise AssertionError(f"no process {name}")

    def terminal_attributes(self) -> list[object]:
        assert self.slave is not None
        return list(termios.tcgetattr(self.slave))

    def _read(self, timeout_s: float) -> bool:
        """Read what there is; False once everything has ended and been read."""
        ended = self.process.poll() is not None
        sources = {}
        if self.master is not None:
            sources[self.master] = "output"
        for stream, name in ((self.process.stdout, "output"), (self.process.stderr, "errors")):
            if stream is not None and not stream.closed:
                sources[stream.fileno()] = name
        ready = select.select(list(sources), [], [], 0 if ended else timeout_s)[0]
        got = False
        for fd in ready:
            data = os.read(fd, 65536)
            setattr(self, sources[fd], getattr(self, sources[fd]) + data)
            got = got or bool(data)
        if not got and not ended and ready:
            time.sleep(0.01)  # pipes are at their end, the process is not
        return got or not ended


@pytest.fixture
def launcher(runtime: Path) -> Iterator[Callable[..., Command]]:
    """launcher("ENTRY", "up", ...) starts a command; at the end, nothing may be left of any."""
    commands: list[Command] = []
    before_us = descendants(os.getpid())  # helpers of other tests', which live as long as pytest

    def start(entry: str, *arguments: object, terminal: bool = False) -> Command:
        line = [sys.executable, "-m", "tests.launcher.drive", entry, *map(str, arguments)]
        if terminal:
            master, slave = pty.openpty()
            before = list(termios.tcgetattr(slave))

            def own_terminal() -> None:
                os.setsid()
                os.close(os.open(os.ttyname(slave), os.O_RDWR))  # becomes the controlling terminal

            process = subprocess.Popen(
                line, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, preexec_fn=own_terminal
            )
            commands.append(Command(process, master, slave, before=before))
        else:
            process = subprocess.Popen(
                line,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            commands.append(Command(process, None, None))
        return commands[-1]

    yield start
    for command in commands:
        if command.process.poll() is None:
            command.process.send_signal(signal.SIGKILL)
            command.process.wait()
        for fd in (command.master, command.slave):
            if fd is not None:
                os.close(fd)
        for stream in (command.process.stdin, command.process.stdout, command.process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
    for pid in descendants(os.getpid()) - before_us:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def assert_nothing_left(runtime: Path, expected_files: tuple[str, ...] = ()) -> None:
    """No process, socket or file of any machine, but what led to a crash."""
    wait_until(lambda: not machine_processes(), f"{machine_processes()} end")
    found = [path for path in runtime.rglob("*") if path.suffix != ".bptrace"] if runtime.exists() else []
    left = sorted(str(path.relative_to(runtime)) for path in found)
    assert left == list(expected_files)
