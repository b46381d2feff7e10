"""How long a restore takes: `make bench-restore`.

    python -m bench.restores [-n 20] [--snapshot FILE] [--document docs/snapshots.md]

A Linux of 256 MiB is booted to its shell and a snapshot of it taken (or one that you name is used). It is
restored again and again by `launcher restore --detach`. Times, all from the start of that command:
- running: the command has returned, the guest runs;
- responsive: a command typed then on its serial console has been answered by the guest's shell.
Beside each restore two yardsticks are taken: an interpreter that does nothing, and one that imports what
every command of the launcher needs first. Left out: files that are not in the host's page cache.
Exit status 1 if a median or the 90th percentile of "running" is not below what is asked (300 ms).
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench import boot
from bench.machine import LAUNCHER, NAME, linux, running
from bench.torture.report import quantile, write
from bus.link import console_path

BEGIN, END = "<!-- written by `make bench-restore` -->", "<!-- end of what `make bench-restore` writes -->"
ASKED_S = 0.3
MEMORY_MIB = 256
PATIENCE_S = 60.0
TYPED, ANSWER = b"echo R$((6*7))E\n", b"R42E"
RUNNING, RESPONSIVE, PLAIN, IMPORTS = (
    "running again: `restore --detach` has returned",
    "responsive: the shell has answered a typed command",
    "yardstick: `python -c pass`",
    "yardstick: `python -c 'import launcher.main'`",
)
Times = dict[str, list[float]]


def take_snapshot(file: Path) -> None:
    """Of a machine that stands at its shell's prompt."""
    with running(linux(boot.REPO / "machines" / "linux.toml", MEMORY_MIB)) as machine:
        machine.wait_for("GUEST-READY")
        machine.type(TYPED.decode())
        machine.wait_for(ANSWER.decode())
        time.sleep(1.0)  # what a boot leaves to be done: snapshots are mostly of idle machines
        env = {**os.environ, "BACKPLANE_RUNTIME_DIR": str(machine.run_dir.parent)}
        command = [LAUNCHER, "snapshot", NAME, str(file)]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)


def answered(run_dir: Path, device: str = "uart0") -> None:
    """Type a command at a machine's console and wait for what the shell says to it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as console:
        console.settimeout(PATIENCE_S)
        console.connect(str(console_path(run_dir, device)))
        console.sendall(TYPED)
        said = b""
        while ANSWER not in said:
            piece = console.recv(1 << 16)
            if not piece:
                sys.exit(f"the machine ended before it had answered; it has said {said[-300:]!r}")
            said += piece


def restore(file: Path, runtime: Path) -> tuple[float, float]:
    """Once: seconds until it runs, and until the shell has answered."""
    env = {**os.environ, "BACKPLANE_RUNTIME_DIR": str(runtime)}
    began = time.monotonic()
    command = [LAUNCHER, "restore", "--detach", "--name", NAME, str(file)]
    if subprocess.run(command, env=env, stdout=subprocess.DEVNULL).returncode:
        sys.exit("the machine was not restored")
    runs_s = time.monotonic() - began
    try:
        answered(runtime / NAME)
        return runs_s, time.monotonic() - began
    finally:
        subprocess.run([LAUNCHER, "down", NAME], env=env, stdout=subprocess.DEVNULL, check=True)


def interpreter(program: str) -> float:
    """Seconds that Python takes for it."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.monotonic() - began


def measure(file: Path, runs: int) -> Times:
    times: Times = {name: [] for name in (RUNNING, RESPONSIVE, PLAIN, IMPORTS)}
    with tempfile.TemporaryDirectory(prefix="backplane-") as runtime:
        for number in range(runs + 1):
            taken = (*restore(file, Path(runtime)), interpreter("pass"), interpreter("import launcher.main"))
            if not number:
                continue  # it was to warm up
            for name, time_s in zip(times, taken, strict=True):
                times[name].append(time_s)
            print(f"  {number:3}  " + "  ".join(f"{time_s * 1e3:6.0f}" for time_s in taken), flush=True)
    return times


def table(times: Times) -> str:
    """In Markdown."""
    lines = ["| ms | min | median | p90 | max |", "|---|---|---|---|---|"]
    for name, values in times.items():
        figures = (min(values), median(values), quantile(values, 0.9), max(values))
        lines.append(f"| {name} | {' | '.join(f'{value * 1e3:.0f}' for value in figures)} |")
    count = len(times[RUNNING])
    return "\n".join([*lines, "", f"{count} restores of {MEMORY_MIB} MiB on {os.cpu_count()} cores."])


def complaints(running_s: Sequence[float]) -> list[str]:
    """What is not as it is asked to be."""
    figures = {"median": median(running_s), "90th percentile": quantile(running_s, 0.9)}
    return [
        f"the {name} of running again is {value * 1e3:.0f} ms, not below {ASKED_S * 1e3:.0f}"
        for name, value in figures.items()
        if value >= ASKED_S
    ]


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.restores", description=__doc__.split("\n")[0])
    parser.add_argument("-n", type=int, default=20, help="restores (default: %(default)s)")
    parser.add_argument("--snapshot", type=Path, help="of a machine with a shell at uart0; default: boot one")
    parser.add_argument("--document", type=Path, help="write the table into this Markdown file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="backplane-") as folder:
        file = options.snapshot or Path(folder) / "linux.snap"
        if options.snapshot is None:
            take_snapshot(file)
        print("  run: ms until running, responsive, `python -c pass`, `import launcher.main`")
        times = measure(file, options.n)
    text = table(times)
    print(text)
    if options.document:
        write(options.document, text, BEGIN, END)
    wrong = complaints(times[RUNNING])
    for line in wrong:
        print(f"bench-restore: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
