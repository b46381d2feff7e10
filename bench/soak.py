"""`make soak`: a fork storm in the guest; host mappings and memory of the CPU node must stay flat.

    python -m bench.soak [--minutes 60] [--every 10] [--json FILE]

A shell forks, runs programs and waits for them without end. Sampled from outside: lines of /proc/<pid>/maps,
RSS and PSS, spaces, the code cache. It fails (status 1) when mappings come near what the host allows a
process, when the last third of the time needs clearly more than the middle third, or when the storm stalls.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from bench import boot
from bench.machine import Machine, linux, running
from bench.scaling import STORM
from bench.table import aligned

ALLOWED = Path("/proc/sys/vm/max_map_count")  # of the host, per process [proc(5)]
NEAR = 0.8  # of it
GROWTH = 1.10  # from the middle third to the last one
SLACK_MAPPINGS, SLACK_KIB = 1500, 8 << 10
COLUMNS = ("MINUTE", "ROUNDS", "MAPPINGS", "RSS", "PSS", "SPACES", "FILLS", "CODE CACHE", "DROPPED")
LINES = 24  # of the table


@dataclass(frozen=True, slots=True)
class Sample:
    """The CPU node at one moment; `rounds` of the guest's loop are done, three processes each."""

    seconds: float
    rounds: int
    mappings: int
    rss_kib: int
    pss_kib: int
    spaces: int
    fills: int
    code_bytes: int
    flushes: int


class Listener(threading.Thread):
    """Reads the console, and with it how far the guest's loop is."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(daemon=True)
        self.rounds = 0
        self._machine = machine

    def run(self) -> None:
        with contextlib.suppress(ValueError):  # it was closed
            for line in self._machine.lines:
                if found := re.search(r"ROUND (\d+)", line):
                    self.rounds = int(found[1])


def sample(machine: Machine, seconds: float, rounds: int) -> Sample:
    cpu = machine.cpu()
    c = cpu["counters"]
    return Sample(round(seconds, 1), rounds, cpu["mappings"], cpu["rss_kib"], cpu["pss_kib"], c["spaces"],
                  c["pages_filled"], c["code_cache_bytes"], c["cache_flushes"])


def verdicts(samples: Sequence[Sample], allowed: int) -> list[str]:
    """What is wrong, in words."""
    third = len(samples) // 3
    if third < 1:
        return ["too short: three samples at least"]
    wrong = []
    highest = max(s.mappings for s in samples)
    if highest > NEAR * allowed:
        wrong.append(f"{highest} mappings; the host allows {allowed}")
    middle, last = samples[third : 2 * third], samples[2 * third :]
    for name, slack in (("mappings", SLACK_MAPPINGS), ("rss_kib", SLACK_KIB), ("pss_kib", SLACK_KIB)):
        before, after = (mean(getattr(s, name) for s in part) for part in (middle, last))
        if after > GROWTH * before + slack:
            wrong.append(f"{name} grew from {before:.0f} to {after:.0f}, last third against the middle one")
    if samples[-1].rounds <= samples[-1 - third].rounds:
        wrong.append("the guest's loop stands still")
    return wrong


def table(samples: Sequence[Sample]) -> str:
    """Some of the samples, evenly spread, the last one always."""
    step = max(1, -(-len(samples) // LINES))
    shown = [*samples[:-1:step], samples[-1]]
    rows = [COLUMNS]
    for s in shown:
        rows.append((f"{s.seconds / 60:.1f}", str(s.rounds), str(s.mappings), f"{s.rss_kib / 1024:.1f} MiB",
                     f"{s.pss_kib / 1024:.1f} MiB", str(s.spaces), str(s.fills),
                     f"{s.code_bytes / 2**20:.1f} MiB", str(s.flushes)))
    return aligned(rows, left=())


def storm(machine: Machine, minutes: float, every_s: float) -> list[Sample]:
    """Let it rage; a sample each `every_s`."""
    machine.wait_for("GUEST-READY")
    listener = Listener(machine)
    listener.start()
    machine.type(STORM)
    samples: list[Sample] = []
    began = time.monotonic()
    while (seconds := time.monotonic() - began) < 60 * minutes:
        if samples:
            time.sleep(max(0.0, began + len(samples) * every_s - time.monotonic()))
            seconds = time.monotonic() - began
        samples.append(sample(machine, seconds, listener.rounds))
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default 60)")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between samples (default 10)")
    parser.add_argument("--machine", type=Path, default=boot.REPO / "machines" / "linux.toml")
    parser.add_argument("--memory", type=int, default=256, help="MiB of guest memory (default 256)")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    options = parser.parse_args()
    with running(linux(options.machine, options.memory)) as machine:
        samples = storm(machine, options.minutes, options.every)
    allowed = int(ALLOWED.read_text(encoding="ascii"))
    print(table(samples))
    print(f"{samples[-1].seconds / 60:.1f} minutes, {3 * samples[-1].rounds} processes started in the guest, "
          f"{len(samples)} samples; the host allows a process {allowed} mappings")
    if options.json:
        options.json.write_text(json.dumps([asdict(s) for s in samples], indent=1) + "\n")
    wrong = verdicts(samples, allowed)
    for line in wrong:
        print(f"soak: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
