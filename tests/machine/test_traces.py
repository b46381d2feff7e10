"""A full trace of Debian's kernel with a UART, a virtio disk and a virtio console: each access in a complete
chain, each interrupt with its cause, and the counts those of the guest and of the devices themselves."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bus.recorder import ASK, BATCH, FRAME, RIM_IN, RIM_OUT
from tests.machine.drive import Screen, command
from tests.machine.processes import titles
from tests.machine.test_virtio import machine
from tracing.chains import Chain, Step, chains, steps
from tracing.file import Trace

pytestmark = [pytest.mark.machine, pytest.mark.usefixtures("guest_files")]

SIZE = 16 << 20
BRACKETS = 5  # looks at the guest's own counts; at least one must not fall on an interrupt
MARKER = "printf x > /dev/hvc0"  # one write of hvc0's QueueNotify
LOCAL_TIMER = 0xEC  # LOCAL_TIMER_VECTOR of Linux on x86
KILLS = 12
CAUSES = ("access", "timer", "input", "typed", "disk-done")


def joined(file: Path) -> tuple[list[Step], list[Chain]]:
    with Trace(file) as trace:
        found = list(steps(trace))
        assert not trace.complaints
        assert not trace.lost
    return found, list(chains(found))


def judge(judged: list[Chain]) -> None:
    """At least 99.9 % of the accesses are in a complete chain."""
    accesses: dict[int, bool] = {}
    for chain in judged:
        for step in chain.steps:
            if step.kind in ("access", "open-bus"):
                accesses[id(step)] = accesses.get(id(step), True) and chain.complete
    lacking = Counter(chain.why_not for chain in judged if not chain.complete)
    assert len(accesses) > 10_000
    assert sum(accesses.values()) >= 0.999 * len(accesses), lacking


def guests_counts(text: str) -> dict[str, int]:
    """/proc/interrupts: row -> count."""
    rows = re.findall(r"^ *(\w+): +(\d+)", text, re.MULTILINE)
    return {name: int(count) for name, count in rows}


def row(step: Step) -> str:
    """Of /proc/interrupts, in which the guest counts this interrupt."""
    return str(step.irq) if step.irq >= 0 else "LOC" if step.record.flags == LOCAL_TIMER else "?"


def test_a_boot_in_complete_chains_and_the_counts_agree(tmp_path: Path, runtime: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(SIZE))
    file = tmp_path / "t.bptrace"
    config = machine(tmp_path, "linux-disk.toml", "traced")
    with Screen("up", config, "--trace", file, runtime=runtime) as screen:
        screen.prompt()
        screen.run("mke2fs -q /dev/vda >/dev/null; mkdir /a; mount -t ext4 /dev/vda /a")
        screen.run("dd if=/dev/urandom of=/a/data bs=64k count=40 2>/dev/null; sync; umount /a")
        screen.run("dd if=/dev/vda of=/dev/null bs=64k 2>/dev/null; cat /proc/cpuinfo")
        guest = [
            guests_counts(screen.run(f"{MARKER}; cat /proc/interrupts > /i; {MARKER}; cat /i"))
            for _ in range(BRACKETS)
        ]
        stats = json.loads(command("stats", "--json", runtime=runtime))
        screen.type("poweroff -f\r")
        screen.finish(0)
    found, judged = joined(file)
    judge(judged)
    batches(judged)
    causes(judged)
    as_the_guest_counts(found, guest)
    as_the_devices_count(file, {entry["node"]: entry.get("counters") for entry in stats["rows"]})


def batches(judged: list[Chain]) -> None:
    """What a device took in a batch is what the guest wrote, or read from the mirror, in that chain."""
    taken = 0
    for chain in judged:
        for step in chain.steps:
            writes = getattr(step.frame, "writes", ())
            if writes:
                accesses = [s for s in chain.steps if s.kind == "access" and s.way != "synchronous"]
                assert [s.record.two for s in accesses] == [value for *_, value in writes], chain.steps
                taken += len(writes)
    assert taken > 5_000


def causes(judged: list[Chain]) -> None:
    """Each interrupt that came by a line leads back to what a device was told, or did by itself."""
    lines = 0
    for chain in judged:
        vectors = [step for step in chain.steps if step.kind == "vector"]
        if any(step.irq >= 0 for step in vectors):
            lines += len(vectors)
            assert chain.complete, (chain.why_not, chain.steps)
            assert chain.root.kind in CAUSES, chain.steps
            assert any(step.kind == "frame" and step.name.startswith("Line") for step in chain.steps)
        else:
            assert {step.record.flags for step in vectors} <= {LOCAL_TIMER}
    assert lines > 100


def as_the_guest_counts(found: list[Step], guest: list[dict[str, int]]) -> None:
    """What the guest counted is what was delivered before it looked."""
    counted: Counter[str] = Counter()
    marks: list[Counter[str]] = []
    for step in found:
        if step.kind == "vector":
            counted[row(step)] += 1
        elif step.kind == "access" and step.name.startswith("hvc0 QueueNotify = 0x1"):
            marks.append(counted.copy())
    brackets = list(zip(marks[-2 * BRACKETS :: 2], marks[-2 * BRACKETS + 1 :: 2], strict=True))
    assert len(brackets) == len(guest) == BRACKETS
    exact: set[str] = set()
    for (before, after), told in zip(brackets, guest, strict=True):
        for name, count in told.items():
            assert before[name] <= count <= after[name], (name, count, before, after)
            if before[name] == after[name]:
                exact.add(name)
    assert exact >= {"0", "1", "4", "8", "9", "10", "ERR", "MIS"}, exact  # LOC ticks all the time
    assert counted["?"] == 0


def as_the_devices_count(file: Path, counters: dict[str, Any]) -> None:
    """Frames, accesses and bytes are as many as the processes themselves had counted when they were asked."""
    with Trace(file) as trace:
        names = trace.meta.rings
        rings = {name: list(records) for name, records in zip(names, trace.rings(), strict=True)}
        found = list(steps(trace))
    asked = {  # when each of them took the launcher's Stats
        step.ring.name: step.begin_ns for step in found if step.kind == "frame" and step.name == "Stats"
    }
    for name in names:
        if name not in ("cpu0", "cpu0.io"):
            taken = sum(r.kind == FRAME and r.time_ns <= asked[name] for r in rings[name])
            assert taken == counters[name]["frames_in"], name
    until_ns = asked["cpu0"]
    own = [record for record in rings["cpu0.io"] if record.time_ns <= until_ns]
    assert sum(r.kind == ASK for r in own) == counters["cpu0"]["synchronous"]
    assert sum(r.number for r in own if r.kind == BATCH) == counters["cpu0"]["posted"]
    assert sum(r.kind == BATCH for r in own) == counters["cpu0"]["batches"]
    frames = sum(r.kind == FRAME and r.time_ns <= until_ns for r in (*own, *rings["cpu0"]))
    assert frames == counters["cpu0"]["frames_in"]
    until_ns = asked["consoles"]
    for kind, name in ((RIM_OUT, "bytes_out"), (RIM_IN, "bytes_in")):
        moved = sum(r.number for r in rings["consoles"] if r.kind == kind and r.time_ns <= until_ns)
        assert moved == counters["consoles"][name]


def test_chains_of_a_disk_that_is_killed_and_swapped(tmp_path: Path, runtime: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(SIZE))
    file = tmp_path / "t.bptrace"
    config = machine(tmp_path, "linux-disk.toml", "traced")
    generator = random.Random(1)
    with Screen("up", config, "--trace", file, runtime=runtime) as screen:
        screen.prompt()
        loop = "while [ ! -e /stop ]; do dd if=/dev/vda of=/dev/null bs=256k iflag=direct 2>/dev/null; done"
        screen.run(f"({loop}; echo over > /done) &")
        for number in range(KILLS):
            while "disk0" not in (found := titles("traced")):
                screen.watch(0.05)
            os.kill(found["disk0"], signal.SIGKILL)
            screen.watch(generator.uniform(0.2, 0.5))
            if number % 4 == 3:
                swap = "swap", "traced", "disk0"
                while "launcher: " in (said := command(*swap, runtime=runtime, check=False)):
                    assert "process" in said  # it has none at the moment, or that ends while it is swapped
                    screen.watch(0.1)
        screen.run("touch /stop; wait; cat /done")
        screen.type("poweroff -f\r")
        screen.finish(0)
    _, judged = joined(file)
    judge(judged)
    pids = {step.pid for chain in judged for step in chain.steps if step.node == "disk0"}
    assert len(pids) >= KILLS  # not all lived long enough to note a step
    both = [chain for chain in judged if len({s.pid for s in chain.steps if s.node == "disk0"}) > 1]
    assert both
    for chain in both:  # from the guest's access to the interrupt's end, which two processes had a part in
        assert chain.complete, (chain.why_not, chain.steps)
        assert chain.root.kind == "access", chain.steps
        kinds = {step.kind for step in chain.steps}
        assert "disk" not in kinds or {"vector", "eoi"} <= kinds, chain.steps
