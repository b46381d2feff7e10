"""Events that take the guest out of its instruction stream.

Source: Intel SDM vol. 3A, chapter 6 (June 2021 and later number it so); [6.3] table 6-1 for the vectors.
Left out: #MC, #VE, #CP (machine check, virtualisation and CET aren't claimed in CPUID).
"""

from __future__ import annotations

DE = 0  # divide error
DB = 1  # debug
NMI = 2
BP = 3  # breakpoint (INT3)
OF = 4  # overflow (INTO)
BR = 5  # BOUND range exceeded
UD = 6  # invalid opcode
NM = 7  # device (FPU) not available
DF = 8  # double fault
TS = 10  # invalid TSS
NP = 11  # segment not present
SS = 12  # stack-segment fault
GP = 13  # general protection
PF = 14  # page fault
MF = 16  # x87 floating-point error
AC = 17  # alignment check
XM = 19  # SIMD floating-point exception

VECTOR_NAMES = {
    DE: "#DE", DB: "#DB", NMI: "NMI", BP: "#BP", OF: "#OF", BR: "#BR", UD: "#UD", NM: "#NM", DF: "#DF",
    TS: "#TS", NP: "#NP", SS: "#SS", GP: "#GP", PF: "#PF", MF: "#MF", AC: "#AC", XM: "#XM",
}  # fmt: skip

WITH_ERROR_CODE = frozenset((DF, TS, NP, SS, GP, PF, AC))  # [6.13]


class GuestFault(Exception):
    """An exception of the guest CPU. Raised before any guest-visible state changed."""

    def __init__(self, vector: int, error: int | None = None, cr2: int | None = None) -> None:
        super().__init__(vector, error, cr2)
        self.vector = vector
        self.error = error
        self.cr2 = cr2

    def __str__(self) -> str:
        text = VECTOR_NAMES.get(self.vector, f"vector {self.vector}")
        if self.error is not None:
            text += f"({self.error:#x})"
        if self.cr2 is not None:
            text += f" at {self.cr2:#010x}"
        return text


class TaskSwitchFault(GuestFault):
    """A fault after a task switch was committed [7.3]: it belongs to the new task, whose EIP is in place."""


class TripleFault(Exception):
    """A fault while delivering a double fault: the CPU shuts down [6.15, interrupt 8]."""


def general_protection(error: int = 0) -> GuestFault:
    return GuestFault(GP, error)
