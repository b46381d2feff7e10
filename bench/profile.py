"""Where guest time goes: `make profile` boots Linux with timing on and prints `launcher stats`.

    python -m bench.profile [--groups vm,proc [--program vm.cow]] [--scale 4] [--json FILE]

Without --groups: a boot to the shell. With it: one table for each benchmark program of these groups, from its
BEGIN line to its result. Timing costs about a microsecond per exit, so programs run slower than measured
elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import boot
from launcher import stats
from launcher.control import ask
from launcher.rundir import CONTROL

NAME = "profile"
LAUNCHER = str(boot.REPO / ".venv" / "bin" / "launcher")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__.split("\n")[0])
    parser.add_argument("--groups", default="", help="benchmark groups to run, like vm,proc")
    parser.add_argument("--program", default="", help="show only programs whose name begins so")
    parser.add_argument("--scale", type=int, default=4, help="divide the programs' work (default 4)")
    parser.add_argument("--machine", type=Path, default=boot.REPO / "machines" / "linux.toml")
    parser.add_argument("--memory", type=int, default=256, help="MiB of guest memory (default 256)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for what, rows in profiles(options):
        cpu = next(row for row in rows if row["node"] == "cpu0")
        if "timing" not in cpu["counters"]:
            sys.exit(f"{what}: the CPU node did not answer")
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
    initrd = boot.GUEST / ("initramfs-bench.cpio" if options.groups else "initramfs.cpio")
    guest = boot.Guest(boot.GUEST / "vmlinuz", initrd, f"{boot.CMDLINE} {words}".strip(), options.memory)
    file = boot.backplane_command(guest, options.machine)[-1]
    with running(file) as (run_dir, lines):
        for line in lines:
            if "GUEST-READY" in line and not options.groups:
                yield "boot to the shell", stats.gather(run_dir)
                return
            word, _, rest = line.partition(" ")
            name = rest.partition(" ")[0].strip()
            if word == "BEGIN":
                ask(run_dir / CONTROL, "timing-on", NAME)
            elif word == "BENCH" and name.startswith(options.program):
                yield line.strip(), stats.gather(run_dir)
            elif word == "BENCH-DONE":
                return


@contextlib.contextmanager
def running(file: str) -> Iterator[tuple[Path, Iterator[str]]]:
    """A machine with timing on: its run directory and the lines of its console."""
    with tempfile.TemporaryDirectory(prefix="backplane-") as runtime:
        env = {**os.environ, "BACKPLANE_RUNTIME_DIR": runtime, "BACKPLANE_TIMING": "1"}
        up = [LAUNCHER, "up", "--detach", "--name", NAME, file]
        if subprocess.run(up, env=env, stdout=sys.stderr).returncode:
            sys.exit("the machine did not start")
        try:
            console = subprocess.Popen([LAUNCHER, "console", "uart0"], env=env, text=True, errors="replace",
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            with console:
                assert console.stdout is not None
                try:
                    yield Path(runtime) / NAME, iter(console.stdout.readline, "")
                finally:
                    console.terminate()
        finally:
            subprocess.run([LAUNCHER, "down"], env=env, stdout=subprocess.DEVNULL, check=False)


if __name__ == "__main__":
    sys.exit(main())
