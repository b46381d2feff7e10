"""What the devices' journals cost: `make bench-live`.

    python -m bench.checkpoints [--rounds 7] [--rows disk] [--document docs/live-swap.md]

Two machines run side by side on one core, one with `checkpoints = false`. Each row is measured in one, then
in the other, in turn, some of them several times in a round; its figure is the median of the ratios of such
pairs, with the quartiles. Time is the host's, from the command to its end. Processor time is that of all the
machine's processes; its ratio varies less on a host with other work. The compute row touches no device; the
others little else.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

from bench import boot
from bench.machine import Machine, running
from bench.torture.report import write

BEGIN, END = "<!-- written by `make bench-live` -->", "<!-- end of what `make bench-live` writes -->"
DISK_MIB = 64
DONE = "ROW-DONE"


@dataclass(slots=True)
class Row:
    """`work`: so many `unit` in one run of `command`. `asked`: the ratio that it shall have at least.
    `pairs`: runs in each machine in one round."""

    name: str
    command: str
    work: float
    unit: str
    asked: float
    pairs: int = 1
    times_s: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    cpu_s: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})

    def ratios(self) -> list[float]:
        """Speed with journals by speed without, pair by pair."""
        return _ratios(self.times_s)


def _ratios(times_s: dict[bool, list[float]]) -> list[float]:
    return [off / on for on, off in zip(times_s[True], times_s[False], strict=True)]


def rows() -> list[Row]:
    return [
        Row("compute: sha256 of 24 MB", "sha256sum /tmp/data /tmp/data /tmp/data", 24, "MB/s", 0.97),
        Row("serial console: 16 KB", "cat /tmp/lines", 16, "KB/s", 0.90),
        Row("virtio console: 16 KB, in lines", "cat /tmp/lines > /dev/hvc0", 16, "KB/s", 0.90),
        Row("disk: reads of 4 KB, one by one", "dd if=/dev/vda of=/dev/null bs=4k count=250 iflag=direct",
            250, "/s", 0.90, 4),
        Row("disk: writes of 4 KB, one by one", "dd if=/tmp/data of=/dev/vda bs=4k count=250 oflag=direct",
            250, "/s", 0.90, 4),
        Row("disk: 64 MB by the megabyte", f"dd if=/dev/vda of=/dev/null bs=1M count={DISK_MIB} iflag=direct",
            DISK_MIB, "MB/s", 0.90, 4),
    ]  # fmt: skip


def machine(folder: Path, name: str, checkpoints: bool) -> Path:
    """machines/linux-disk.toml, its disk in `folder`."""
    image = folder / f"{name}.img"
    with image.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    values = {
        "memory": "128M",
        "kernel": boot.GUEST / "vmlinuz",
        "initrd": boot.GUEST / "initramfs.cpio",
        "modules": boot.GUEST / "modules.cpio",
    }
    text = (boot.REPO / "machines" / "linux-disk.toml").read_text(encoding="utf-8")
    for key, value in values.items():
        text, count = re.subn(rf'^{key} = ".*"$', f'{key} = "{value}"', text, count=1, flags=re.MULTILINE)
        assert count == 1, key
    text = text.replace('file = "disk.img"', f'file = "{image}"')
    text = text.replace("[cpu]\n", f"[cpu]\nhost_cpu = {max(os.sched_getaffinity(0))}\n", 1)
    text = text.replace("[machine]\n", f"[machine]\ncheckpoints = {str(checkpoints).lower()}\n", 1)
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def seconds(machine: Machine, command: str) -> float:
    """From the typing of a command to its end."""
    began = time.monotonic()
    machine.type(f"{command} 2>/dev/null; echo {DONE[:4]}''{DONE[4:]}\n")
    machine.wait_for(DONE)
    return time.monotonic() - began


def cpu_seconds(machine: Machine) -> float:
    """Of all its processes so far, the host's kernel included."""
    tasks = [task for row in machine.rows() for task in Path(f"/proc/{row['pid']}/task").iterdir()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def measure(machines: dict[bool, Machine], rounds: int, which: str = "") -> list[Row]:
    for m in machines.values():
        m.wait_for("GUEST-READY")
        seconds(m, "dd if=/dev/zero of=/tmp/data bs=1M count=8; stty raw -echo < /dev/hvc0")
        seconds(m, "yes 0123456789abcdefghijklmnopqrstuvwxyz | head -c 16384 > /tmp/lines; exec 9>/dev/hvc0")
    measured = [row for row in rows() if which in row.name]
    for row in measured:  # to warm up
        for m in machines.values():
            seconds(m, row.command)
    for number in range(rounds):
        for row in measured:
            for again in range(row.pairs):
                for on in (True, False) if (number + again) % 2 else (False, True):
                    measure_one(row, on, machines[on])
    return measured


def measure_one(row: Row, on: bool, machine: Machine) -> None:
    before_s = cpu_seconds(machine)
    row.times_s[on].append(seconds(machine, row.command))
    row.cpu_s[on].append(cpu_seconds(machine) - before_s)
    name = f"{row.name:32} {'with' if on else 'without':8}"
    print(f"  {name} {row.times_s[on][-1]:6.2f} s {row.cpu_s[on][-1]:6.2f} s", flush=True)


def table(measured: Sequence[Row]) -> str:
    """In Markdown."""
    lines = ["| | with journals | without | with / without (quartiles) | by processor time | asked | pairs |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in measured:
        on, off = (row.work / median(row.times_s[which]) for which in (True, False))
        speeds = f"{on:.3g} {row.unit} | {off:.3g} {row.unit}"
        spreads = f"{_spread(row.ratios())} | {_spread(_ratios(row.cpu_s))}"
        lines.append(f"| {row.name} | {speeds} | {spreads} | {row.asked:g} | {len(row.ratios())} |")
    return "\n".join(lines)


def _spread(ratios: list[float]) -> str:
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{median(ratios):.2f} ({low:.2f}-{high:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.checkpoints", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", default="", help="those with this in their name")
    parser.add_argument("--document", type=Path, help="write the table into this Markdown file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="backplane-") as name:
        folder = Path(name)
        with (
            running(str(machine(folder, "on", True))) as on,
            running(str(machine(folder, "off", False))) as off,
        ):
            measured = measure({True: on, False: off}, options.rounds, options.rows)
    text = table(measured)
    print(text)
    if options.document:
        write(options.document, text, BEGIN, END)
    slow = [row.name for row in measured if median(row.ratios()) < row.asked]
    for name in slow:
        print(f"bench-live: {name}: slower with journals than asked", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
