"""What recording costs: `make bench-tracing`.

    python -m bench.tracing [--rounds 7] [--document docs/tracing.md]

One machine; before each measurement recording is switched off, on (the flight recorder), or on with all that
is noted written to a file meanwhile. Each row is measured so in turn; its figures are the medians of the
ratios within a round, with the lowest and the highest. Time is the host's, from a command to its end.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.checkpoints import machine, rows, seconds
from bench.machine import LAUNCHER, NAME, Machine, running
from bench.torture.report import write

BEGIN, END = "<!-- written by `make bench-tracing` -->", "<!-- end of what `make bench-tracing` writes -->"
OFF, ON, FILE = "off", "flight recorder", "to a file"
WAYS = (OFF, ON, FILE)
ASKED = {ON: 1.05, FILE: 1.15}  # times what it takes without


@dataclass(slots=True)
class Row:
    name: str
    command: str
    times_s: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})

    def ratios(self, way: str) -> list[float]:
        """Time that way by time without, round by round."""
        return [s / off for s, off in zip(self.times_s[way], self.times_s[OFF], strict=True)]


@contextmanager
def recording(m: Machine, way: str, folder: Path) -> Iterator[None]:
    """While the block runs it is recorded that way."""
    env = {**os.environ, "BACKPLANE_RUNTIME_DIR": str(m.run_dir.parent)}
    switch = [LAUNCHER, "trace", NAME, "--off" if way == OFF else "--on"]
    subprocess.run(switch, env=env, check=True, stdout=subprocess.DEVNULL)
    if way != FILE:
        yield
        return
    save = [LAUNCHER, "trace", NAME, "--out", str(folder / "bench.bptrace"), "--seconds", "3600"]
    with subprocess.Popen(save, env=env, stdout=subprocess.PIPE) as process:
        while not (folder / "bench.bptrace").exists():
            pass
        yield
        process.terminate()
    (folder / "bench.bptrace").unlink()


def measure(m: Machine, folder: Path, rounds: int) -> list[Row]:
    m.wait_for("GUEST-READY")
    seconds(m, "dd if=/dev/zero of=/tmp/data bs=1M count=8; stty raw -echo < /dev/hvc0")
    seconds(m, "yes 0123456789abcdefghijklmnopqrstuvwxyz | head -c 16384 > /tmp/lines; exec 9>/dev/hvc0")
    measured = [Row(row.name, row.command) for row in rows()]
    for number in range(rounds + 1):  # the first is to warm up
        for row in measured:
            for way in WAYS[number % 3 :] + WAYS[: number % 3]:
                with recording(m, way, folder):
                    time_s = seconds(m, row.command)
                print(f"  {row.name:40} {way:16} {time_s:7.2f} s", flush=True)
                if number:
                    row.times_s[way].append(time_s)
    return measured


def table(measured: Sequence[Row]) -> str:
    """In Markdown."""
    lines = ["| times what it takes while off | flight recorder | all to a file | off |", "|---|---|---|---|"]
    for row in measured:
        cells = []
        for way in (ON, FILE):
            ratios = row.ratios(way)
            cells.append(f"{median(ratios):.3f} ({min(ratios):.2f}-{max(ratios):.2f})")
        lines.append(f"| {row.name} | {cells[0]} | {cells[1]} | {median(row.times_s[OFF]):.2f} s |")
    asked = " | ".join(f"{ASKED[way]:g}" for way in (ON, FILE))
    lines += [f"| asked | {asked} | |", "", f"{len(measured[0].times_s[OFF])} rounds."]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.tracing", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--document", type=Path, help="write the table into this Markdown file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="backplane-") as name:
        folder = Path(name)
        with running(str(machine(folder, "tracing", True))) as m:
            measured = measure(m, folder, options.rounds)
    text = table(measured)
    print(text)
    if options.document:
        write(options.document, text, BEGIN, END)
    slow = [f"{row.name}: {way}" for row in measured for way in ASKED if median(row.ratios(way)) > ASKED[way]]
    for what in slow:
        print(f"bench-tracing: {what}: slower than asked", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
