"""A machine in the background, for measurements from outside: its console and its processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import boot
from launcher import stats
from launcher.rundir import CONTROL

LAUNCHER = str(boot.REPO / ".venv" / "bin" / "launcher")
NAME = "bench"
ANSWERS = 20  # times to ask a CPU node that is too busy to answer


class Machine:
    """One that runs. `lines` are its console's from the start on."""

    def __init__(self, run_dir: Path, console: subprocess.Popen[str], began: float) -> None:
        assert console.stdout is not None
        self.run_dir = run_dir
        self.control = run_dir / CONTROL
        self.began = began
        self.lines = iter(console.stdout.readline, "")
        self._console = console

    def wait_for(self, text: str) -> float:
        """Seconds from the start until a line with `text` has come."""
        last: list[str] = []
        for line in self.lines:
            if text in line:
                return time.monotonic() - self.began
            last = [*last[-9:], line]
        sys.exit(f"the machine ended before {text!r}; its last lines:\n{''.join(last)}")

    def type(self, text: str) -> None:
        """Keys for its serial console."""
        assert self._console.stdin is not None
        self._console.stdin.write(text)
        self._console.stdin.flush()

    def rows(self) -> list[dict[str, Any]]:
        """What `launcher stats --json` has, with the CPU's counters for sure."""
        for _ in range(ANSWERS):
            rows = stats.gather(self.run_dir)
            if any("exits" in (row.get("counters") or {}) for row in rows):
                return rows
        sys.exit("the CPU node does not answer")

    def cpu(self) -> dict[str, Any]:
        """The CPU node's row."""
        return next(row for row in self.rows() if "exits" in (row.get("counters") or {}))


@contextlib.contextmanager
def running(file: str, **environment: str) -> Iterator[Machine]:
    """Start `file` in the background, in a runtime directory of its own; end it."""
    with tempfile.TemporaryDirectory(prefix="backplane-") as runtime:
        env: Mapping[str, str] = {**os.environ, "BACKPLANE_RUNTIME_DIR": runtime, **environment}
        began = time.monotonic()
        up = [LAUNCHER, "up", "--detach", "--name", NAME, file]
        if subprocess.run(up, env=env, stdout=subprocess.DEVNULL).returncode:
            sys.exit("the machine did not start")
        try:
            console = subprocess.Popen([LAUNCHER, "console", "uart0"], env=env, text=True, errors="replace",
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            with console:
                try:
                    yield Machine(Path(runtime) / NAME, console, began)
                finally:
                    console.terminate()
        finally:
            subprocess.run([LAUNCHER, "down"], env=env, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, check=False)


def linux(machine: Path, memory_mib: int, words: str = "", bench: bool = False) -> str:
    """A machine file for the Linux guest with these words on its command line."""
    initrd = boot.GUEST / ("initramfs-bench.cpio" if bench else "initramfs.cpio")
    guest = boot.Guest(boot.GUEST / "vmlinuz", initrd, f"{boot.CMDLINE} {words}".strip(), memory_mib)
    return boot.backplane_command(guest, machine)[-1]
