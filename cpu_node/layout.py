"""Where the CPU node keeps things: host addresses, and offsets in the CPU state record.

One fact, one place: emitter and stubs ask here, they write no number of their own.
The record is reached through r15; what generated code touches often lies within a signed byte of it.
"""

from __future__ import annotations

# Host address space (47 bits). Python, its heap and libraries live above 0x5500_0000_0000.
CODE = 0x2000_0000_0000  # stubs, then the code cache
CODE_SIZE = 128 << 20  # within rel32 of each other
CODE_FIRST = 0x1000  # offset of the first translation; stubs below
RECORD = 0x2100_0000_0000
RECORD_SIZE = 0x2000
SCRATCH = 0x2180_0000_0000  # a small window of its own for single instructions (simulate.py)
SIGNAL_STACK = 0x2200_0000_0000
SIGNAL_STACK_SIZE = 1 << 18
WINDOWS = 0x3000_0000_0000  # 4 GiB each, followed and preceded by 4 GiB that fault
WINDOW_STRIDE = 8 << 30
WINDOW_COUNT = 2048
TABLES = 0x4000_0000_0000  # dispatch tables: 8 bytes for each guest address
TABLE_SIZE = 8 << 32
TABLE_COUNT = 512

# Offsets in the CPU state record.
HOST_RSP = 0x00
ENTRY = 0x08  # where `enter` jumps to
WINDOW = 0x10  # GS base
TABLE = 0x18  # r14
REASON = 0x20  # dword, why generated code was left (EXIT_*)
EIP = 0x24  # dword
FS_POINTER = 0x28  # address of the FS base, or of nothing when FS may not be used plainly
GS_POINTER = 0x30
KICK = 0x38  # dword, a signal came
PENDING = 0x3C  # dword, an interrupt waits for EFLAGS.IF
SYSTEM_FLAGS = 0x40  # dword, EFLAGS less IF and what the host's flags hold
INTERRUPT_FLAG = 0x44  # dword, 0 or 0x200
FS_BASE = 0x48  # dword
GS_BASE = 0x4C  # dword
SELECTORS = 0x50  # 6 words: ES, CS, SS, DS, FS, GS
EFLAGS = 0x60  # qword, host flags: status flags and DF
SIMULATE_SLOT = 0x68  # addresses of exit stubs, for code that must not depend on where it lies
STALE_SLOT = 0x70
CHAIN_SLOT = 0x78
REGS = 0x80  # 8 qwords
SCRATCH_REGS = 0xC0  # r8 to r13
FAULT_ADDRESS = 0x100
FAULT_RIP = 0x108
FAULT_ERROR = 0x110
FAULT_TRAP = 0x118
FAULT_SIGNAL = 0x120  # dword
HOST_MXCSR = 0x128
FX = 0x200  # fxsave image

STATUS_FLAGS = 0xCD5  # in the host's flags: CF PF AF ZF SF DF OF
OTHER_FLAGS = 0x3F7100  # in SYSTEM_FLAGS: TF IOPL NT RF VM AC VIF VIP ID

# Exits of generated code (REASON).
(
    EXIT_CHAIN,  # a jump inside a page, not translated yet; r8d is the target
    EXIT_INDIRECT,  # a dispatch table entry is empty; r8d is the target
    EXIT_SIMULATE,  # the instruction at EIP is the simulator's
    EXIT_STALE,  # the code at EIP is not what was translated
    EXIT_FAULT,  # a host fault at FAULT_RIP
    EXIT_SIGNAL,  # SIGALRM at FAULT_RIP
    EXIT_UNENTERED,  # SIGALRM before the first guest instruction
) = range(1, 8)
EXIT_NAMES = ("", "chain", "indirect", "simulate", "stale", "fault", "signal", "unentered")

# Stubs, offsets in CODE.
STUB_ENTER = 0x000
STUB_LEAVE = 0x180
STUB_EXIT = 0x300  # + 0x20 * reason
STUB_HANDLER = 0x500
STUB_RESTORER = 0x700
STUB_RDTSC = 0x720


def exit_stub(reason: int) -> int:
    """Offset in CODE of the stub that leaves with `reason`."""
    return STUB_EXIT + 0x20 * reason
