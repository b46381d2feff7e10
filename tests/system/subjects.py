"""What the scenarios are about: each subject changes the tables a little and adds random actions.

Random code keeps off what the SDM leaves undefined (flags, stale translations) and off accesses beyond
limits, which tests/insn compares with the host's processor.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.system.builder import Builder
from tests.system.pages import modifications, paging
from tests.system.privilege import debugging, fpu, interrupts, privileged, sysenter
from tests.system.sixteen import code16, virtual8086
from tests.system.transfers import data_segments, far_transfers, gates, returns, segments, tasks

SUBJECTS: dict[str, Callable[[Builder], None]] = {
    "segment loads": segments,
    "data segments": data_segments,
    "far transfers": far_transfers,
    "returns": returns,
    "gates": gates,
    "task switches": tasks,
    "paging": paging,
    "read-modify-write paging": modifications,
    "privileged instructions": privileged,
    "SYSENTER": sysenter,
    "debugging": debugging,
    "interrupts": interrupts,
    "FPU traps": fpu,
    "virtual-8086 mode": virtual8086,
    "16-bit code": code16,
}


def scenario(seed: int, subject: str, index: int, skip: frozenset[int] = frozenset()) -> Builder:
    """A scenario by its name; without the actions in `skip` the rest of it stays the same."""
    builder = Builder(random.Random(f"{seed}:{subject}:{index}"), skip)
    SUBJECTS[subject](builder)
    return builder
