"""Where the CPU node keeps things: host addresses, and offsets in the CPU state record.

One fact, one place: emitter and stubs ask here, they write no number of their own.
The record is reached through r15; what generated code touches often lies within a signed byte of it.
"""

from __future__ import annotations

# Host address space (47 bits). Python, its heap and libraries live above 0x5500_0000_0000.
CODE = 0x2000_0000_0000  # stubs, then the code cache
CODE_SIZE = 128 << 20  # within rel32 of each other
CODE_FIRST = 0x3000  # offset of the first translation; stubs below
RECORD = 0x2100_0000_0000
RECORD_SIZE = 0x2000
LOADABLE = RECORD + 0x100_0000  # what is known of each selector, LOADABLE_STRIDE bytes each
LOADABLE_STRIDE = 32
LOADABLE_SIZE = 0x1_0000 * LOADABLE_STRIDE
SCRATCH = 0x2180_0000_0000  # a small window of its own for single instructions (simulate.py)
SIGNAL_STACK = 0x2200_0000_0000
SIGNAL_STACK_SIZE = 1 << 18
TRANSLATOR = 0x2280_0000_0000  # fast_unsafe.py
TRANSLATOR_SIZE = 16 << 20
WINDOWS = 0x3000_0000_0000  # 4 GiB each, followed and preceded by 4 GiB that fault
WINDOW_STRIDE = 8 << 30
WINDOW_COUNT = 2048
# What the software TLB (tlb.py) keeps lies near the record, but for its two tables of a qword for each page.
GUARDED = RECORD + 0x200_0000  # a byte for each physical page: not 0 where writes must be noticed
GUARDED_SIZE = 1 << 20
TLB_PAGES = RECORD + 0x220_0000  # dwords, TLB_COUNT of them: linear pages that have an entry
TLB_PAGES_MAX = 1 << 14
TLB_SITES = RECORD + 0x240_0000  # 16 bytes each: host address of a probe, EIP of its instruction
TLB_SITES_COUNT = 1 << 14
TLB_READ = 0x2500_0000_0000
TLB_WRITE = TLB_READ + 0x80_0000
TLB_SIZE = 0x100_0000  # of both
TLB_BASE = TLB_READ + 12  # r13 in SOFT code: probes shift addresses right by its low bits, that is by 12
RAM = 0x2600_0000_0000  # guest memory as it is, at most 4 GiB
TOUCHED = 0x2140_0000_0000  # maps of touched.py, one for each window
TOUCHED_SIZE = 1 << 20
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
KERNEL_WINDOW = 0x130  # of the current space
KERNEL_TABLE = 0x138  # for the current mode but for the privilege; 0: not known
USER_WINDOW = 0x140
USER_TABLE = 0x148
CHANGED = 0x150  # 6 bytes: segment registers that an assist changed; for CS (and SS) how, LANDED_*
OUTER = 0x158  # 4 bytes, ES DS FS GS: not 0 where a return to CPL 3 would clear the register
SEGMENT_RAW = 0x160  # 6 qwords: descriptors that assists loaded
SYSENTER_READY = 0x190  # qword, not 0: the fields below are good
SYSENTER_EIP = 0x198
SYSENTER_ESP = 0x19C
SYSENTER_SELECTORS = 0x1A0  # CS and SS, words
SYSEXIT_SELECTORS = 0x1A4
SAVED_FLAGS = 0x1A8  # AH and OF, while an assist compares
CR0 = 0x1B0  # for MOV r32, CRn
CR2 = 0x1B4
CR3 = 0x1B8
CR4 = 0x1BC
ENTERED_USER = 0x1C0  # qword, counts assists that went to CPL 3
FX = 0x200  # fxsave image
# of IRET, and below it of INT n
RETURN_READY = 0x400  # dword, not 0: IRET may be assisted
KERNEL_CS = 0x404  # selector
KERNEL_CS_VA = 0x408  # its descriptor's linear address
USER_CS = 0x40C
USER_CS_VA = 0x410
USER_SS = 0x414
USER_SS_VA = 0x418
KERNEL_CS_RAW = 0x420
USER_CS_RAW = 0x428
USER_SS_RAW = 0x430
INT_GATE = 0x438  # GATE_* of the software interrupt that is known
TOUCHED_BY_SPACE = 0x470  # address of the current space's map of touched.py
TOUCHED_BY_KERNEL = 0x478
ASSISTS = 0x480  # addresses of the assist stubs
FAULT_GATE = 0x600  # GATE_* of #PF
TLB_COUNT = 0x640  # dword
TLB_VA = 0x644  # dword, of the access that missed
TLB_LAST = 0x648  # dword, its size - 1
TLB_IS_WRITE = 0x64C  # dword
TLB_CR2 = 0x650  # dword, the address that #PF is about
RAM_SIZE = 0x658  # qword
TLB_FILLS = 0x660  # qword, counts entries made
PAGE_FAULTS = 0x668  # qword, counts #PF of code at CPL 3
TSC_OFFSET = 0x670  # qword, what RDTSC adds to the host's counter in mode.TSC_OFFSET

# Offsets in the facts about a gate to CPL 0, INT_GATE or FAULT_GATE.
GATE_VECTOR = 0x00  # dword
GATE_VA = 0x04  # linear address of the gate
GATE_RAW = 0x08
GATE_CS_VA = 0x10
GATE_SS_VA = 0x14
GATE_CS_RAW = 0x18
GATE_SS_RAW = 0x20
GATE_EIP = 0x28
GATE_STACK_VA = 0x2C  # of ESP0 and SS0 in the TSS
GATE_SELECTORS = 0x30  # CS and SS, words
GATE_CLEARS_IF = 0x34  # dword, 0 for a trap gate

# Offsets in an entry of LOADABLE.
SELECTOR_PLAIN = 0  # dword: 1 may be loaded into FS and GS at CPL 0, 2 is null, 0 not known
SELECTOR_FLAT = 4  # dword: 1 may be loaded into DS and ES at CPL 0
SELECTOR_OUTER = 8  # byte, for OUTER
SELECTOR_BASE = 12  # dword
SELECTOR_RAW = 16  # qword: the descriptor
SELECTOR_VA = 24  # dword: its linear address

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
    EXIT_ASSIST,  # a host fault at FAULT_ADDRESS in an assist for the instruction at EIP
    EXIT_TLB,  # no entry for the access of TLB_VA; the probe is at FAULT_RIP
) = range(1, 10)
EXIT_NAMES = ("", "chain", "indirect", "simulate", "stale", "fault", "signal", "unentered", "assist", "tlb")

# Stubs, offsets in CODE.
STUB_ENTER = 0x000
STUB_LEAVE = 0x180
STUB_EXIT = 0x300  # + 0x20 * reason
STUB_HANDLER = 0x500
STUB_RESTORER = 0x700
STUB_RDTSC = 0x720
STUB_TLB_FLUSH = 0x740
STUB_ASSISTS = 0x800  # up to CODE_FIRST


def exit_stub(reason: int) -> int:
    """Offset in CODE of the stub that leaves with `reason`."""
    return STUB_EXIT + 0x20 * reason
