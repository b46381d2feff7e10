"""What the devices' journals cost: `make bench-live`.

    python -m bench.checkpoints [--rounds 7] [--document docs/live-swap.md]

Two machines run side by side, one with `checkpoints = false`. Each row is measured in one, then in the other,
in turn; its figure is the median of the ratios of such pairs, with the lowest and the highest. Time is the
host's, from the command to its end. The compute row touches no device; the others little else.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench import boot
from bench.machine import Machine, running
from bench.torture.report import write

BEGIN, END = "<!-- written by `make bench-live` -->", "<!-- end of what `make bench-live` writes -->"
DISK_MIB = 64
DONE = "ROW-DONE"


@dataclass(slots=True)
class Row:
    """`work`: so many `unit` in one run of `command`. `asked`: the ratio that it shall have at least."""

    name: str
    command: str
    work: float
    unit: str
    asked: float
    times_s: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})

    def ratios(self) -> list[float]:
        """Speed with journals by speed without, pair by pair."""
        return [off / on for on, off in zip(self.times_s[True], self.times_s[False], strict=True)]


def rows() -> list[Row]:
    return [
        Row("compute: sha256 of 24 MB", "sha256sum /tmp/data /tmp/data /tmp/data", 24, "MB/s", 0.97),
        Row("serial console: 16 KB", "cat /tmp/lines", 16, "KB/s", 0.90),
        Row("virtio console: 128 KB, in lines",
            "for i in 1 2 3 4 5 6 7 8; do cat /tmp/lines; done > /dev/hvc0", 128, "KB/s", 0.90),
        Row("disk: reads of 4 KB, one by one", "dd if=/dev/vda of=/dev/null bs=4k count=250 iflag=direct",
            250, "/s", 0.90),
        Row("disk: writes of 4 KB, one by one", "dd if=/tmp/data of=/dev/vda bs=4k count=250 oflag=direct",
            250, "/s", 0.90),
        Row("disk: 64 MB by the megabyte", f"dd if=/dev/vda of=/dev/null bs=1M count={DISK_MIB} iflag=direct",
            DISK_MIB, "MB/s", 0.90),
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


def measure(machines: dict[bool, Machine], rounds: int) -> list[Row]:
    for m in machines.values():
        m.wait_for("GUEST-READY")
        seconds(m, "dd if=/dev/zero of=/tmp/data bs=1M count=8; stty raw -echo < /dev/hvc0")
        seconds(m, "yes 0123456789abcdefghijklmnopqrstuvwxyz | head -c 16384 > /tmp/lines; exec 9>/dev/hvc0")
    measured = rows()
    for number in range(rounds + 1):  # the first is to warm up
        for row in measured:
            for on in (True, False) if number % 2 else (False, True):
                time_s = seconds(machines[on], row.command)
                print(f"  {row.name:40} {'with' if on else 'without':8} {time_s:7.2f} s", flush=True)
                if number:
                    row.times_s[on].append(time_s)
    return measured


def table(measured: Sequence[Row]) -> str:
    """In Markdown."""
    lines = ["| | with journals | without | with / without (spread) | asked |", "|---|---|---|---|---|"]
    for row in measured:
        on, off = (row.work / median(row.times_s[which]) for which in (True, False))
        ratios = row.ratios()
        spread = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        speeds = f"{on:.3g} {row.unit} | {off:.3g} {row.unit}"
        lines.append(f"| {row.name} | {speeds} | {spread} | {row.asked:g} |")
    pairs = len(measured[0].times_s[True])
    lines += ["", f"{pairs} pairs of each."]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.checkpoints", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--document", type=Path, help="write the table into this Markdown file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="backplane-") as name:
        folder = Path(name)
        with (
            running(str(machine(folder, "on", True))) as on,
            running(str(machine(folder, "off", False))) as off,
        ):
            measured = measure({True: on, False: off}, options.rounds)
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
