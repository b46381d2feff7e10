"""Waiting for a child in generated code, so that a kick of the CPU node ends the wait and none is missed.

The node is kicked by SIGALRM. Its handler (stubs_unsafe.py) changes where `enter` goes and, when the signal
finds generated code running, where that goes on; so a wait4() made from the code cache either isn't begun
or is left at once, whenever the signal comes. A wait4() of Python's would be restarted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpu_node import layout as at
from cpu_node.assembled import assemble
from cpu_node.cache import SINGLE

if TYPE_CHECKING:
    from cpu_node.engine import Engine

_CODE = SINGLE + 0x800  # of the page for single instructions; single.py uses its beginning
_STATUS = 0xF00  # in the scratch page, behind the operands of single.py
_SYS_WAIT4, _OPTIONS = 61, 0x4000_0002  # __WALL, WUNTRACED


class Waiting:
    """`Waiting(engine)(pid)` is exits.Wait."""

    def __init__(self, engine: Engine) -> None:
        self._record = engine.record
        self._code = engine.single.code
        self._status = engine.single.scratch
        self._for = self._behind = -1

    def __call__(self, pid: int) -> int | None:
        d, q, enter, status = self._record.d, self._record.q, self._record.enter, self._status
        if pid != self._for:
            self._install(pid)
        while True:
            q[at.ENTRY // 8] = at.CODE + _CODE
            if d[at.KICK // 4]:
                return None
            enter()
            reason = d[at.REASON // 4]
            done = reason == at.EXIT_SIMULATE or (reason == at.EXIT_SIGNAL
                                                  and q[at.FAULT_RIP // 8] >= self._behind)
            if done and q[at.REGS // 8] == pid:  # RAX
                return int.from_bytes(status[_STATUS : _STATUS + 4], "little")

    def _install(self, pid: int) -> None:
        call = assemble(f"""
            mov eax, {_SYS_WAIT4}
            mov edi, {pid}
            movabs rsi, {at.SCRATCH + _STATUS:#x}
            mov edx, {_OPTIONS:#x}
            xor r10d, r10d
            syscall
        """, at.CODE + _CODE)
        code = call + assemble(f"xor r8d, r8d\njmp qword ptr [r15+{at.SIMULATE_SLOT}]", 0)
        self._code[_CODE : _CODE + len(code)] = code
        self._behind = at.CODE + _CODE + len(call)
        self._for = pid
