"""Which address spaces use the software TLB for user code and which a window: `cpu.mmu = "auto"`.

The TLB makes every access dearer, a window every page that comes or goes. So user code that computes earns a
space its window, and page faults lose it. What each costs is measured (docs/decisions/012-software-tlb.md).
A stretch of user code is the time since the last look, when it is found running and no other space ran in
between; looks come with signals and while the CPU is halted, and the kernel's end of an interrupt causes one.
New spaces begin with the TLB, for most programs are short. Time is that of the thread's processor, so that
waiting for a busy host isn't taken for computing.
Left out: what the kernel does on behalf of the space; accesses that a program doesn't make.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpu_node.contexts import Contexts

SLOWER_PERCENT = 60  # a computing program with the TLB
FAULT_NS = 40_000  # what a page fault costs more with windows
GOAL_NS = 1_000_000  # to be earned before the other is chosen; about what the change costs
GOAL_MOST_NS = 64_000_000  # after changing to and fro
LONGEST_STRETCH_NS = 4_000_000  # a longer one was not all spent computing


class MmuChoice:
    """For the spaces of one CPU, while Contexts.soft is on."""

    def __init__(self, contexts: Contexts) -> None:
        self._contexts = contexts
        self._flushes = -1
        self._looked_ns = 0
        self._faults = 0
        self.went_to_window = 0
        self.went_to_tlb = 0

    def look(self, now_ns: int, user: bool, faults: int) -> bool:
        """`user`: CPL 3 was running; `faults`: page faults of user code so far, all told.

        True where the current space uses the other from now on.
        """
        contexts = self._contexts
        stretch, new_faults = now_ns - self._looked_ns, faults - self._faults
        whole = user and contexts.flushes == self._flushes
        self._looked_ns, self._faults = now_ns, faults
        self._flushes = contexts.flushes
        space = contexts.space
        if space.cr3 is None or not contexts.soft:
            return False
        earned = -new_faults * FAULT_NS
        if whole:
            earned += min(stretch, LONGEST_STRETCH_NS) * SLOWER_PERCENT // 100
        if not space.soft:
            earned = -earned
        space.balance_ns = max(0, space.balance_ns + earned)
        if space.balance_ns < space.goal_ns:
            return False
        space.balance_ns, space.goal_ns = 0, min(2 * space.goal_ns, GOAL_MOST_NS)
        space.soft = not space.soft
        if space.soft:
            self.went_to_tlb += 1
        else:
            self.went_to_window += 1
        return True
