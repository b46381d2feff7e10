"""Runs 32-bit code on the host CPU itself, in compatibility mode, at the guest's own addresses.

How: a 64-bit stub loads every register of the case and far-jumps to CS 23h.  The run always ends in a
signal (at the latest HLT is privileged); an assembly handler on an alternate stack notes where the kernel
put the frame, restores the host's registers and returns to the caller of the stub.  The frame is the
outcome: registers, trap number, error code, CR2, FXSAVE image.  About 5 us a run, plus 1 us per page.

Preconditions: Linux on x86-64 with FSGSBASE; the process is expendable (a wild store can hit anything below
4 GiB, and the handlers of SIGSEGV etc. are replaced for good), so only `tests.insn.worker` makes a
NativeRunner.  System calls by `int 80h`, SYSENTER or SYSCALL are stopped by a seccomp filter and come out
as stop kind "syscall".

Sources: Intel SDM volume 3, 3.4.5 and 9.8.5 (compatibility mode); Linux uapi/asm/sigcontext.h.
Left out: 16-bit code.
"""

from __future__ import annotations

import ctypes
import signal
import struct

from keystone import KS_ARCH_X86, KS_MODE_64, Ks

from tests.insn.low_memory import LowMemory, protect_text
from tests.insn.segments import CS, DS, ES, FS, GS, LDT, SS, base_of
from tests.insn.state import (
    AC,
    FX_SIZE,
    FX_XMM,
    FX_XMM_COUNT,
    GENERAL_PROTECTION,
    HLT,
    PAGE_FAULT,
    PAGE_SIZE,
    RF,
    VECTORS_WITH_ERROR,
    Case,
    CpuState,
    Stop,
)

HOST_CODE_SELECTOR = 0x33

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE, MAP_POPULATE = 0x2, 0x20, 0x100000, 0x8000
SYS_RT_SIGACTION, SYS_EXIT_GROUP, SYS_RT_SIGRETURN, SYS_MODIFY_LDT = 13, 231, 15, 154
WRITE_LDT = 0x11
SA_SIGINFO, SA_ONSTACK, SA_RESTART, SA_RESTORER, SA_NODEFER = (
    0x4,
    0x08000000,
    0x10000000,
    0x04000000,
    0x40000000,
)
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
SECCOMP_RET_ALLOW, SECCOMP_RET_TRAP = 0x7FFF0000, 0x00030000
AUDIT_ARCH_X86_64 = 0xC000003E

FAULT_SIGNALS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS)
TICK_SIGNAL = signal.SIGVTALRM
TICK_SECONDS = 0.01  # of its own time
TICKS_UNTIL_HUNG = 3

# The region that holds the stub, the record and the alternate stack: somewhere above 4 GiB.
REGION = 0x5A0000000000
HANDLER, RESTORER, RECORD, ALT_STACK, REGION_SIZE = 0x400, 0x600, 0x1000, 0x10000, 0x40000
ALT_STACK_SIZE = REGION_SIZE - ALT_STACK

# Offsets in the record.
HOST_RSP, HOST_FS, HOST_GS, SIGNAL, TICKS = 0, 8, 0x10, 0x18, 0x20
REGS, EFLAGS, FAR_POINTER, FX = 0x40, 0x80, 0x88, 0x200
SELECTORS, LAST_SELECTORS = 0xA0, 0xB0  # six words each: before; after (CS and SS are in the frame)
FRAME, FRAME_FX = 0x400, 0x600  # what the frame said
LOW = 0x900  # what low_memory hides
FX_USED = FX_XMM + 16 * FX_XMM_COUNT  # further on: XMM8 and up, and the kernel's notes

# Offsets in the kernel's ucontext: r8 at 40, then as in sigcontext.h.
UC_RDI, UC_CS, UC_FPSTATE = 104, 184, 224
UC_FORMAT = "<8Q 2Q 4H 4Q"  # rdi rsi rbp rbx rdx rax rcx rsp, rip eflags, cs gs fs ss, err trapno oldmask cr2

SAVED = ("rbx", "rbp", "r12", "r13", "r14", "r15")

ENTER = f"""
    {"; ".join(f"push {r}" for r in SAVED)}
    movabs rax, {REGION + RECORD}
    mov qword ptr [rax + {HOST_RSP}], rsp
    {protect_text(REGION + RECORD + LOW, hide=True)}
    movabs rax, {REGION + RECORD}
    rdfsbase rcx
    mov qword ptr [rax + {HOST_FS}], rcx
    rdgsbase rcx
    mov qword ptr [rax + {HOST_GS}], rcx
    mov dword ptr [rax + {TICKS}], 0
    fxrstor64 [rax + {FX}]
    mov es, word ptr [rax + {SELECTORS + 2 * ES}]
    mov ss, word ptr [rax + {SELECTORS + 2 * SS}]
    mov fs, word ptr [rax + {SELECTORS + 2 * FS}]
    mov gs, word ptr [rax + {SELECTORS + 2 * GS}]
    mov ds, word ptr [rax + {SELECTORS + 2 * DS}]
    push qword ptr [rax + {EFLAGS}]
    popfq
    mov ecx, dword ptr [rax + {REGS + 8}]
    mov edx, dword ptr [rax + {REGS + 16}]
    mov ebx, dword ptr [rax + {REGS + 24}]
    mov esp, dword ptr [rax + {REGS + 32}]
    mov ebp, dword ptr [rax + {REGS + 40}]
    mov esi, dword ptr [rax + {REGS + 48}]
    mov edi, dword ptr [rax + {REGS + 56}]
    mov eax, dword ptr [rax + {REGS}]
"""  # the far jump follows, see _assemble

# rdi = signal, rdx = ucontext.  The frame is copied while RSP is still on the alternate stack: afterwards a
# tick may overwrite it.  AC, if the case set it, would make faults of unaligned accesses here.
# A fault of the process itself ends it with status 139.
HANDLE = f"""
    pushfq
    and dword ptr [rsp], {~AC & 0xFFFFFFFF}
    popfq
    movabs rax, {REGION + RECORD}
    cmp edi, {int(TICK_SIGNAL)}
    je tick
    cmp word ptr [rdx + {UC_CS}], {HOST_CODE_SELECTOR}
    je crash
stop:
    mov word ptr [rax + {LAST_SELECTORS + 2 * ES}], es
    mov word ptr [rax + {LAST_SELECTORS + 2 * DS}], ds
    mov word ptr [rax + {LAST_SELECTORS + 2 * FS}], fs
    mov word ptr [rax + {LAST_SELECTORS + 2 * GS}], gs
    mov qword ptr [rax + {SIGNAL}], rdi
    lea rsi, [rdx + {UC_RDI}]
    lea rdi, [rax + {FRAME}]
    mov ecx, {struct.calcsize(UC_FORMAT) // 8}
    rep movsq
    mov rsi, qword ptr [rdx + {UC_FPSTATE}]
    lea rdi, [rax + {FRAME_FX}]
    mov ecx, {FX_SIZE // 8}
    rep movsq
    xor ecx, ecx
    mov fs, ecx
    mov gs, ecx
    mov rcx, qword ptr [rax + {HOST_FS}]
    wrfsbase rcx
    mov rcx, qword ptr [rax + {HOST_GS}]
    wrgsbase rcx
    mov rsp, qword ptr [rax + {HOST_RSP}]
    {protect_text(REGION + RECORD + LOW, hide=False)}
    {"; ".join(f"pop {r}" for r in reversed(SAVED))}
    ret
tick:
    cmp word ptr [rdx + {UC_CS}], {HOST_CODE_SELECTOR}
    je resume
    inc dword ptr [rax + {TICKS}]
    cmp dword ptr [rax + {TICKS}], {TICKS_UNTIL_HUNG}
    jae stop
resume:
    ret
crash:
    mov edi, 139
    mov eax, {SYS_EXIT_GROUP}
    syscall
"""

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class _KernelSigaction(ctypes.Structure):
    _fields_ = [
        ("handler", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("restorer", ctypes.c_uint64),
        ("mask", ctypes.c_uint64),
    ]


class _Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


class _SockFprog(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def _check(ok: bool, what: str) -> None:
    if not ok:
        raise OSError(ctypes.get_errno(), what)


def _map(va: int, size: int, prot: int) -> None:
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_POPULATE
    _check(libc.mmap(va, size, prot, flags, -1, 0) == va, f"mmap of {size:#x} bytes at {va:#x}")


def trap_32_bit_system_calls() -> None:
    """From now on a system call by the 32-bit entries is SIGSYS; x86-64 ones pass.  Cannot be undone."""
    instructions = (
        (0x20, 0, 0, 4),  # load seccomp_data.arch
        (0x15, 1, 0, AUDIT_ARCH_X86_64),  # equal: skip one
        (0x06, 0, 0, SECCOMP_RET_TRAP),
        (0x06, 0, 0, SECCOMP_RET_ALLOW),
    )
    program = b"".join(struct.pack("<HBBI", *i) for i in instructions)
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "prctl no_new_privs")
    fprog = _SockFprog(len(instructions), program)
    _check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(fprog)) == 0, "seccomp filter")


class NativeRunner:
    """`run(case) -> CpuState` on the host CPU.  One per process."""

    def __init__(self) -> None:
        _map(REGION, REGION_SIZE, PROT_READ | PROT_WRITE | PROT_EXEC)
        self._assemble()
        self._record = (ctypes.c_char * (PAGE_SIZE)).from_address(REGION + RECORD)
        self._enter = ctypes.PYFUNCTYPE(None)(REGION)
        self._low = LowMemory()
        self._mapped: dict[int, bool] = {}  # va -> writable
        self._held: dict[int, bytes] = {}  # va -> what the page holds, where that is known
        stack = _Stack(REGION + ALT_STACK, 0, ALT_STACK_SIZE)
        _check(libc.sigaltstack(ctypes.byref(stack), None) == 0, "sigaltstack")
        for number in (*FAULT_SIGNALS, TICK_SIGNAL):
            flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART | SA_RESTORER | SA_NODEFER
            action = _KernelSigaction(REGION + HANDLER, flags, REGION + RESTORER, 0)
            _check(
                libc.syscall(SYS_RT_SIGACTION, int(number), ctypes.byref(action), None, 8) == 0, "sigaction"
            )
        for index, entry in enumerate(LDT):
            desc = entry.user_desc(index)
            _check(libc.syscall(SYS_MODIFY_LDT, WRITE_LDT, desc, len(desc)) == 0, "modify_ldt")
        trap_32_bit_system_calls()
        signal.setitimer(signal.ITIMER_VIRTUAL, TICK_SECONDS, TICK_SECONDS)

    def _assemble(self) -> None:
        ks = Ks(KS_ARCH_X86, KS_MODE_64)
        enter = bytes(ks.asm(ENTER, REGION)[0])
        far_jump_end = len(enter) + 6
        enter += b"\xff\x2d" + struct.pack(
            "<i", RECORD + FAR_POINTER - far_jump_end
        )  # ljmp m16:32, RIP-relative
        handler = bytes(ks.asm(HANDLE, REGION + HANDLER)[0])
        restorer = bytes(ks.asm(f"mov eax, {SYS_RT_SIGRETURN}; syscall", REGION + RESTORER)[0])
        assert len(enter) <= HANDLER
        assert HANDLER + len(handler) <= RESTORER
        for offset, code in ((0, enter), (HANDLER, handler), (RESTORER, restorer)):
            ctypes.memmove(REGION + offset, code, len(code))

    def run(self, case: Case) -> CpuState:
        self._place(case)
        struct.pack_into("<8Q", self._record, REGS, *case.regs)
        struct.pack_into("<QIH", self._record, EFLAGS, case.eflags | 0x202, case.eip, case.selectors[CS])
        struct.pack_into("<6H", self._record, SELECTORS, *case.selectors)
        struct.pack_into(f"{FX_SIZE}s", self._record, FX, case.fx)
        low = self._low.table()
        struct.pack_into(f"{len(low)}s", self._record, LOW, low)
        self._enter()
        return self._outcome(case)

    def _place(self, case: Case) -> None:
        wanted = {page.va: page.writable for page in case.pages}
        for va in [va for va in self._mapped if va not in wanted]:
            _check(libc.munmap(va, PAGE_SIZE) == 0, "munmap")
            del self._mapped[va]
            self._held.pop(va, None)
        for page in case.pages:
            writable = self._mapped.get(page.va)
            held = self._held.get(page.va)
            if held is page.data and writable == page.writable:
                continue
            if writable is None:
                _map(page.va, PAGE_SIZE, PROT_READ | PROT_WRITE | PROT_EXEC)
            elif not writable:
                self._protect(page.va, True)
            ctypes.memmove(page.va, page.data, PAGE_SIZE)
            if (
                not page.writable
            ):  # written before, so its host page table entry is present: error code bit 0 is right
                self._protect(page.va, False)
            self._mapped[page.va] = page.writable
            self._held[page.va] = page.data

    @staticmethod
    def _protect(va: int, writable: bool) -> None:
        prot = PROT_READ | PROT_EXEC | (PROT_WRITE if writable else 0)
        _check(libc.mprotect(va, PAGE_SIZE, prot) == 0, "mprotect")

    def _outcome(self, case: Case) -> CpuState:
        (number,) = struct.unpack_from("<Q", self._record, SIGNAL)
        edi, esi, ebp, ebx, edx, eax, ecx, esp, eip, eflags, cs, _gs, _fs, ss, error, vector, _mask, cr2 = (
            struct.unpack_from(UC_FORMAT, self._record, FRAME)
        )
        es, _, _, ds, fs, gs = struct.unpack_from("<6H", self._record, LAST_SELECTORS)
        changed = {}
        for page in case.pages:
            data = ctypes.string_at(page.va, PAGE_SIZE)
            if data != page.data:
                changed[page.va] = data
                del self._held[page.va]
        if number == TICK_SIGNAL:
            stop = Stop("hung")
        elif number == signal.SIGSYS:
            stop = Stop("syscall")
        elif vector == GENERAL_PROTECTION and self._byte_at(base_of(cs) + eip & 0xFFFFFFFF) == HLT:
            stop = Stop("hlt")
        else:
            error = error & 0xFFFF if vector in VECTORS_WITH_ERROR else 0
            stop = Stop("fault", vector, error, cr2 if vector == PAGE_FAULT else 0)
        return CpuState(
            stop,
            eip & 0xFFFFFFFF,
            tuple(r & 0xFFFFFFFF for r in (eax, ecx, edx, ebx, esp, ebp, esi, edi)),
            eflags & ~RF,
            bytes(self._record.raw[FRAME_FX : FRAME_FX + FX_USED]).ljust(FX_SIZE, b"\0"),
            changed,
            (es, cs, ss, ds, fs, gs),
        )

    def _byte_at(self, va: int) -> int:
        if va & -PAGE_SIZE not in self._mapped:
            return -1
        return ctypes.string_at(va, 1)[0]
