"""A user at a terminal: `launcher` commands in a pseudo-terminal of their own, and what is on the screen.

The command is the terminal's session leader and in its foreground, as under a login: a process in the
background would get no raw mode. A failing wait shows the end of the console, `launcher ps` and the logs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

from tests.machine.processes import assert_gone, descendants, kill

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / ".venv" / "bin" / "launcher"
PATIENCE_S = 600.0  # hosts are shared and slow; a bound on hanging, not an expectation
LEAVE = "\x1dq"
RAW_NOTICE = "Ctrl-] then q leaves"
CURSOR_QUERY = b"\x1b[6n"  # ECMA-48 DSR 6: busybox asks at each prompt, and gets along without an answer
PROMPT = re.compile(rb"/ # [^\n]{0,20}?" + re.escape(CURSOR_QUERY))
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # ECMA-48 control sequences
KILLED = b"and is killed"  # told of a process that does not end in order
TAIL = 3000


class Screen:
    """One launcher command in a terminal. Use as a context manager: afterwards nothing of it is alive.

    `errors`: a file for standard error, which else is the terminal like the rest.
    """

    def __init__(self, *arguments: object, runtime: Path, errors: Path | None = None) -> None:
        self.runtime, self._errors = runtime, errors
        self.output = b""
        self._mark = 0  # output before this place has been looked at
        self._prompted = -1  # where the last prompt ended
        self._before_us = descendants(os.getpid())
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", 50, 200, 0, 0))
        self.attributes_before = self.attributes()
        self.started = time.monotonic()
        with contextlib.nullcontext(self.slave) if errors is None else errors.open("wb") as stderr:
            self.process = subprocess.Popen(
                [LAUNCHER, *map(str, arguments)],
                stdin=self.slave,
                stdout=self.slave,
                stderr=stderr,
                cwd=ROOT,
                env=environment(runtime),
                start_new_session=True,
                preexec_fn=_take_terminal,
            )

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        kill(descendants(os.getpid()) - self._before_us)
        self.process.wait()
        assert_gone(self._before_us)
        os.close(self.master)
        os.close(self.slave)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def attributes(self) -> list[object]:
        """The terminal's, as tcgetattr returns them."""
        return list(termios.tcgetattr(self.slave))

    # ---- keyboard and screen

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def text(self, start: int = 0) -> str:
        """What was shown, without control sequences, lines ending in "\\n"."""
        return normalised(self.output[start:])

    def wait_for(self, pattern: str | re.Pattern[bytes], timeout_s: float = PATIENCE_S) -> re.Match[bytes]:
        """Until `pattern` (a plain string, or a compiled one) appears behind what was waited for before."""
        wanted = re.compile(re.escape(pattern.encode())) if isinstance(pattern, str) else pattern
        deadline = time.monotonic() + timeout_s
        while True:
            found = wanted.search(self.output, self._mark)
            if found is not None:
                self._mark = found.end()
                return found
            if not self.alive and not self._read(0):
                status = self.process.returncode
                raise self.failure(f"the launcher ended (status {status}) before {wanted.pattern!r}")
            if time.monotonic() > deadline:
                raise self.failure(f"no {wanted.pattern!r} within {timeout_s:g} s")
            self._read(0.2)

    def watch(self, seconds: float) -> None:
        """Read what comes during this time, or until the launcher ends."""
        deadline = time.monotonic() + seconds
        while self.alive and (left := deadline - time.monotonic()) > 0:
            self._read(min(left, 0.02))

    def finish(self, status: int | None, timeout_s: float = PATIENCE_S) -> int:
        """Read on to the end of the launcher; its exit status (-n: killed by signal n).

        It must be `status`, if one is given.
        """
        deadline = time.monotonic() + timeout_s
        while self.alive:
            if time.monotonic() > deadline:
                raise self.failure(f"does not end within {timeout_s:g} s")
            self._read(0.05)
        self.drain()
        if status not in (None, self.process.returncode):
            raise self.failure(f"exit status {self.process.returncode}, not {status}")
        if KILLED in (self.output if self._errors is None else self._errors.read_bytes()):
            raise self.failure("a process did not end when told to")
        return self.process.returncode

    def drain(self) -> None:
        """Read all that has been shown so far."""
        while self._read(0):
            pass

    def errors(self) -> str:
        """Standard error, where it went into a file."""
        assert self._errors is not None
        return normalised(self._errors.read_bytes())

    def wait_gone(self) -> None:
        """Until no process of this machine is left, and everything they have shown is read."""
        deadline = time.monotonic() + PATIENCE_S
        while descendants(os.getpid()) - self._before_us:
            if time.monotonic() > deadline:
                raise self.failure("processes are left")
            self._read(0.02)
        self.drain()

    def _read(self, timeout_s: float) -> bool:
        """Read once; True when there was something."""
        if not select.select([self.master], [], [], timeout_s)[0]:
            return False
        try:
            piece = os.read(self.master, 65536)
        except OSError:  # EIO: nobody has the other end open
            piece = b""
        self.output += piece
        return bool(piece)

    # ---- a guest's shell

    def prompt(self, timeout_s: float = PATIENCE_S) -> None:
        """Until the shell asks for a command."""
        self._prompted = self.wait_for(PROMPT, timeout_s).end()

    def at_prompt(self) -> bool:
        """Nothing has been shown, and hence nothing typed, since the shell last asked for a command."""
        self.drain()
        return self._prompted == len(self.output)

    def run(self, command: str, timeout_s: float = PATIENCE_S) -> str:
        """Type a command at the prompt; what it printed, once the next prompt is there."""
        self.type(command + "\n")
        return self.result(timeout_s)

    def result(self, timeout_s: float = PATIENCE_S) -> str:
        """The lines between the one that is being typed and the next prompt."""
        start = self._mark
        self.prompt(timeout_s)
        shown = normalised(self.output[start : self._mark])
        return shown.partition("\n")[2].rpartition("/ # ")[0]

    # ---- failures

    def failure(self, what: str) -> AssertionError:
        """An error that tells what there is to know about this machine."""
        parts = [what, f"console, its last {TAIL} characters:", self.text()[-TAIL:]]
        if self._errors is not None:
            parts += ["standard error:", self.errors()[-TAIL:]]
        if self.alive:
            parts += ["launcher ps:", command("ps", runtime=self.runtime, check=False)]
        for log in sorted(self.runtime.glob("*/*.log")):
            with contextlib.suppress(OSError):
                if text := log.read_text(errors="replace")[-TAIL:]:
                    parts += [f"{log.name}:", text]
        return AssertionError("\n".join(parts))


def normalised(output: bytes) -> str:
    """Terminal output as text: no control sequences, "\\n" line ends."""
    text = ESCAPES.sub("", output.decode(errors="replace"))
    return re.sub(r"\r+\n", "\n", text).replace("\r", "")


def command(*arguments: object, runtime: Path, check: bool = True) -> str:
    """A launcher command that ends by itself; its standard output (and error, without `check`)."""
    done = subprocess.run(
        [LAUNCHER, *map(str, arguments)],
        env=environment(runtime),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        stdin=subprocess.DEVNULL,
    )
    if check and done.returncode:
        raise AssertionError(f"launcher {arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout if check else done.stdout + done.stderr


def environment(runtime: Path) -> dict[str, str]:
    return {**os.environ, "BACKPLANE_RUNTIME_DIR": str(runtime), "TERM": "xterm"}


def _take_terminal() -> None:
    """In the child, a new session's leader: standard input becomes its controlling terminal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # pytest's own choices are not a login's
