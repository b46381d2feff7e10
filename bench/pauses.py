"""Pauses that a guest sees when processes of devices are swapped and killed: `make bench-pauses`.

The guest reads a synchronous register of each device in turn, for ever, and notes how long each read took by
its time-stamp counter. A pause is the longest of all the reads while a device's process was replaced.
Row "no fault": the longest read in a time in which nothing was done, which is what the host's other work does
to it. All are also given as multiples of the bus round trip, the median of the reads in the same run. Then
come the launcher's own measure of a swap (docs/live-swap.md), and its parts.
"""

from __future__ import annotations

import argparse
import mmap
import random
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.machine import NAME, running
from launcher.control import ask
from launcher.tsc_unsafe import TscClock

RING_PA, RING = 0x40_0000, 1 << 18  # reads that are remembered
COUNT_PA = 0x20_0000
AFTER = 100  # rounds of reads that belong to a fault, once it is over
APART_S = 0.6  # a process that ends sooner after its start is restarted after a wait
MEMORY = 16 << 20
DEVICES = {"uart0": 0x3F8, "pic": 0x21, "pit": 0x40, "kbd": 0x60, "rtc": 0x71, "pm": 0x600}
GUEST = f"""
    xor ebp, ebp                # reads so far
again:
    xor ebx, ebx
next_port:
    mov dx, word ptr [ports+ebx*2]
    cmp dx, {DEVICES["pic"]}
    jne no_mask
    mov al, 0xff
    out dx, al                  # what makes the read behind it a synchronous one
no_mask:
    mov ecx, edx
    rdtsc
    mov edi, eax
    mov edx, ecx
    in al, dx
    rdtsc
    sub eax, edi
    mov ecx, ebp
    and ecx, {RING - 1}
    mov [ecx*4+{RING_PA}], eax
    inc ebp
    mov [{COUNT_PA}], ebp
    inc ebx
    cmp ebx, {len(DEVICES)}
    jb next_port
    jmp again
ports: .short {", ".join(map(str, DEVICES.values()))}
"""
MACHINE = """
[machine]
name = "pauses"
memory = "16M"
[cpu]
apic = false
[memory]
file = "{memory}"
[boot]
kind = "asm"
source = "{source}"
[[device]]
name = "uart0"
type = "uart16550"
ports = {{ regs = 0x3f8 }}
irqs = {{ intr = 4 }}
[[device]]
name = "pic"
type = "pic8259"
ports = {{ master = 0x20, slave = 0xa0, elcr = 0x4d0 }}
[[device]]
name = "pit"
type = "pit8254"
ports = {{ counters = 0x40, port_b = 0x61 }}
irqs = {{ out0 = 0 }}
[[device]]
name = "kbd"
type = "i8042"
ports = {{ data = 0x60, command = 0x64, port_a = 0x92 }}
irqs = {{ kbd = 1 }}
[[device]]
name = "rtc"
type = "rtc_cmos"
ports = {{ regs = 0x70 }}
irqs = {{ irq = 8 }}
[[device]]
name = "pm"
type = "acpi_pm"
ports = {{ pm = 0x600 }}
irqs = {{ sci = 9 }}
"""


class Reads:
    """The guest's notes, as they come. Times in ns."""

    def __init__(self, memory: mmap.mmap, hz: int) -> None:
        self._memory, self._ns = memory, 1e9 / hz

    def count(self) -> int:
        """Rounds so far."""
        return int(struct.unpack_from("<I", self._memory, COUNT_PA)[0]) // len(DEVICES)

    def wait(self, rounds: int) -> None:
        """Until so many have been made."""
        while self.count() < rounds:
            time.sleep(0.0005)

    def times(self, first: int, end: int) -> list[float]:
        """How long the reads took in the rounds from `first` on."""
        first = max(first, end - RING // len(DEVICES) + 1)
        reads = (n % RING * 4 + RING_PA for n in range(first * len(DEVICES), end * len(DEVICES)))
        return [struct.unpack_from("<I", self._memory, read)[0] * self._ns for read in reads]


def longest(reads: Reads, device: str, act: Callable[[str], object]) -> float:
    """The longest read during `act` on the device and soon after it, in ns."""
    first = reads.count()
    act(device)
    end = reads.count() + AFTER
    reads.wait(end)
    return max(reads.times(first, end))


def row(name: str, times: list[float], trip_ns: float) -> str:
    """One line of the table."""
    ordered = sorted(times)
    shown = [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.99, 1)]
    cells = "".join(f"{ns / 1e6:9.2f}" for ns in shown) + "".join(f"{ns / trip_ns:8.0f}" for ns in shown)
    return f"{name:26}{len(ordered):6}{cells}"


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.pauses", description="Pauses that a guest sees.")
    parser.add_argument("--swaps", type=int, default=300)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="backplane-") as folder:
        memory, source, machine = (Path(folder) / name for name in ("memory", "guest.S", "pauses.toml"))
        source.write_text(GUEST)
        machine.write_text(MACHINE.format(memory=memory, source=source))
        with running(str(machine)) as m:
            measure(m.control, memory, options.swaps, options.kills, options.seed)


def measure(control: Path, memory: Path, swaps: int, kills: int, seed: int) -> None:
    """Swap and kill in random order, print the table."""
    rng = random.Random(seed)
    clock = TscClock()
    time.sleep(0.2)
    with memory.open("rb") as file:
        reads = Reads(mmap.mmap(file.fileno(), MEMORY, prot=mmap.PROT_READ), clock.frequency_hz())
    reads.wait(1000)
    pauses: dict[str, dict[str, list[float]]] = {kind: {} for kind in ("swap", "kill", "no fault")}
    told: list[float] = []
    parts: dict[str, list[float]] = {}
    trips: list[float] = []
    ended = dict.fromkeys(DEVICES, 0.0)
    kinds = ["swap"] * swaps + ["kill"] * kills
    rng.shuffle(kinds)

    def swap(device: str) -> None:
        reply = ask(control, "swap", NAME, 60.0, device=device, type=None, settings={})
        if reply["pause_ns"] is not None:
            told.append(reply["pause_ns"])
        for part, ns in reply["parts_ns"].items():
            parts.setdefault(part, []).append(ns)

    for kind in kinds:
        device = rng.choice(list(DEVICES))
        time.sleep(max(0.0, ended[device] + APART_S - time.monotonic()))
        now = reads.count()
        trips += reads.times(now - 100, now)
        if kind == "swap":
            pause_ns = longest(reads, device, swap)
        else:
            pause_ns = longest(reads, device, lambda device: ask(control, "kill", NAME, device=device))
        ended[device] = time.monotonic()
        pauses[kind].setdefault(device, []).append(pause_ns)
        if rng.random() < 0.3:
            calm_ns = longest(reads, device, lambda device: time.sleep(0.1))
            pauses["no fault"].setdefault(device, []).append(calm_ns)
    trip_ns = sorted(trips)[len(trips) // 2]
    print(f"bus round trip, median of {len(trips)}: {trip_ns / 1000:.0f} us")
    print(f"{'':26}{'':6}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}{'p50 x':>8}{'p99 x':>8}{'max x':>8}")
    for kind, by_device in pauses.items():
        every = [pause for times in by_device.values() for pause in times]
        if every:
            print(row(f"{kind}, all", every, trip_ns))
        for device, times in sorted(by_device.items() if kind != "no fault" else ()):
            print(row(f"  {device}", times, trip_ns))
    if told:
        print(row("swap, as told", told, trip_ns))
    for part, times in parts.items():
        print(row(f"  {part}", times, trip_ns))


if __name__ == "__main__":
    main()
