"""Runs scenarios in all executors of this host and says where they differ.

Ours, translated and by the simulator alone, must agree in every byte; QEMU but for what exclusions.py covers;
Unicorn, which delivers no interrupts, up to the first one.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from cpu_node import stubs_unsafe
from tests.system import compare, qemu, unicorn_first
from tests.system.backplane import SystemBoard
from tests.system.exclusions import excluded
from tests.system.subjects import scenario

Name = tuple[int, str, int]  # seed, subject, index


@dataclass(slots=True)
class Tally:
    """Of one subject. `masked` counts words of an arena by the exclusion that covers them."""

    tried: int = 0
    same: int = 0  # as QEMU, in every byte
    covered: int = 0  # as QEMU but for excluded words
    unicorn: int = 0  # compared with Unicorn
    masked: Counter[str] = field(default_factory=Counter)
    different: list[tuple[int, str]] = field(default_factory=list)  # index, what

    def add(self, other: Tally) -> None:
        self.tried += other.tried
        self.same += other.same
        self.covered += other.covered
        self.unicorn += other.unicorn
        self.masked += other.masked
        self.different += other.different


Tallies = dict[str, Tally]


def differing(subject: str, ours: bytes | None, theirs: bytes | None) -> tuple[list[str], Counter[str]]:
    """What differs and is not excluded, in words; and what is, counted."""
    masked: Counter[str] = Counter()
    if ours is None or theirs is None:
        if ours is theirs:
            return [], masked
        return [f"{'ours' if ours is None else 'theirs'} does not come to an end"], masked
    lines = []
    for _, place, a, b in compare.differences(ours, theirs):
        exclusion = excluded(subject, place, a, b)
        if exclusion is not None:
            masked[exclusion.name] += 1
        else:
            lines.append(f"{place}: {a:08x}, theirs {b:08x}")
    return lines, masked


def run(names: Sequence[Name], with_qemu: bool, with_unicorn: bool) -> Tallies:
    """In this process, where the stubs must be installed."""
    images = [scenario(*name).image() for name in names]
    theirs = qemu.run(images) if with_qemu else None
    translated, simulated = SystemBoard(), SystemBoard(simulated=True)
    tallies: Tallies = {}
    for number, (seed, subject, index) in enumerate(names):
        tally = tallies.setdefault(subject, Tally())
        tally.tried += 1
        ours = translated.execute(images[number])
        lines = [
            f"simulated alone, {line}" for line in differing("", ours, simulated.execute(images[number]))[0]
        ]
        if theirs is not None and not lines:
            lines, masked = differing(subject, ours, theirs[number])
            tally.masked += masked
            if not lines:
                if masked:
                    tally.covered += 1
                else:
                    tally.same += 1
        if with_unicorn and not lines:
            compared, line = unicorn_first.compare_first(translated, seed, subject, index)
            tally.unicorn += compared
            lines += [line] if line else []
        if lines:
            tally.different.append((index, "; ".join(lines[:4])))
    return tallies


def _worker(names: Sequence[Name], with_qemu: bool, with_unicorn: bool) -> Tallies:
    signal.setitimer(signal.ITIMER_REAL, 0)
    stubs_unsafe.install()
    return run(names, with_qemu, with_unicorn)


def sharded(names: Sequence[Name], shards: int, with_qemu: bool, with_unicorn: bool) -> Tallies:
    """The same over several processes."""
    stubs_unsafe.stub_image()  # assembled once, here
    parts = [(names[shard::shards], with_qemu, with_unicorn) for shard in range(shards)]
    whole: Tallies = {}
    with multiprocessing.get_context("fork").Pool(shards, maxtasksperchild=1) as pool:
        for tallies in pool.starmap(_worker, parts, chunksize=1):
            for subject, tally in tallies.items():
                whole.setdefault(subject, Tally()).add(tally)
    return whole


def shrink(name: Name, with_qemu: bool, with_unicorn: bool) -> frozenset[int]:
    """The actions that can be left out with a difference remaining; in this process."""
    skip: frozenset[int] = frozenset()
    translated, simulated = SystemBoard(), SystemBoard(simulated=True)
    for number in range(len(scenario(*name).texts)):
        image = scenario(*name, skip | {number}).image()
        ours = translated.execute(image)
        others = [("", simulated.execute(image))]
        if with_qemu:
            others += [(name[1], qemu.run([image])[0])]
        if any(differing(subject, ours, other)[0] for subject, other in others):
            skip |= {number}
    return skip
