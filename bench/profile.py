"""Where guest time goes: `make profile` boots Linux with timing on and prints `launcher stats`.

    python -m bench.profile [--groups vm,proc [--program vm.cow]] [--scale 4] [--json FILE]

Without --groups: a boot to the shell. With it: one table for each benchmark program of these groups, from its
BEGIN line to its result. Timing costs about a microsecond per exit, so programs run slower than measured
elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import boot
from bench.machine import NAME, linux, running
from launcher import stats
from launcher.control import ask


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__.split("\n")[0])
    parser.add_argument("--groups", default="", help="benchmark groups to run, like vm,proc")
    parser.add_argument("--program", default="", help="show only programs whose name begins so")
    parser.add_argument("--scale", type=int, default=4, help="divide the programs' work (default 4)")
    parser.add_argument("--cpu", action="store_true", help="count CPU time: for a host that is busy")
    parser.add_argument("--machine", type=Path, default=boot.REPO / "machines" / "linux.toml")
    parser.add_argument("--memory", type=int, default=256, help="MiB of guest memory (default 256)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for what, rows in profiles(options):
        cpu = next(row for row in rows if row["node"] == "cpu0")
        found[what] = rows
        if options.groups:
            print(f"\n{what}\n{stats.timing_table(cpu['counters']['timing'], 16)}", flush=True)
        else:
            print(stats.text(what, rows))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found else 1


def profiles(options: argparse.Namespace) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(what ran, rows of `launcher stats`) as they come."""
    words = f"bench=on bgroups={options.groups} bscale={options.scale} end=halt" if options.groups else ""
    file = linux(options.machine, options.memory, words, bool(options.groups))
    with running(file, BACKPLANE_TIMING="cpu" if options.cpu else "1") as machine:
        if not options.groups:
            machine.wait_for("GUEST-READY")
            yield "boot to the shell", machine.rows()
            return
        for line in machine.lines:
            word, _, rest = line.partition(" ")
            name = rest.partition(" ")[0].strip()
            if word == "BEGIN":
                ask(machine.control, "timing-on", NAME)
            elif word == "BENCH" and name.startswith(options.program):
                yield line.strip(), machine.rows()
            elif word == "BENCH-DONE":
                return


if __name__ == "__main__":
    sys.exit(main())
