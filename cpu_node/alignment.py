"""Alignment checking of CPL 3: #AC where EFLAGS.AC and CR0.AM are set.

Source: Intel SDM vol. 3A 6.15, interrupt 17 and table 6-7. While both are set, code of CPL 3 runs in the
simulator, one instruction at a time.
Left out: instruction fetches are never checked, nor are 16-byte operands (what demands alignment there is
#GP; AMD checks the others, Intel doesn't); of a memory access that would fault for its page too, #AC comes
first.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from cpu_node.errors import AC, GuestFault
from cpu_node.observe import observe, stop

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cpu_node.paging import GuestMemory

# By operand size: words, dwords, far pointers, qwords, extended reals, the x87 environment and state.
_ALIGNMENT = {2: 2, 4: 4, 6: 4, 8: 8, 10: 8, 14: 2, 28: 4, 94: 2, 108: 4}


@contextmanager
def checked(memory: GuestMemory) -> Iterator[None]:
    """Accesses with the user's rights raise GuestFault(AC) when misaligned."""
    observe(memory, _check, probes=True)
    try:
        yield
    finally:
        stop(memory)


def _check(va: int, width: int, writes: bool, user: bool) -> None:
    if user and va & _ALIGNMENT.get(width, 1) - 1 and va + width <= 1 << 32:  # else #SS or #GP comes first
        raise GuestFault(AC, 0)
