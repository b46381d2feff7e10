"""The program that a child of the seccomp back end starts as, and what it shares with the node.

One page of code, as of image.py. It makes itself ready: maps the list (which it can only read) and the frame
(shared with the node, written by both), starts the *mapper*, a process that shares its memory and nothing
else, takes all signals on an alternate stack in the frame, gives up all other memory and descriptors, and
has a filter installed that lets two system calls pass, each at one address of this page and with fixed
arguments: kill(itself, SIGSTOP), and rt_sigprocmask() that blocks nothing. Every other one becomes SIGSYS.

From then on its only own code is the signal handler, which runs with all signals blocked: note segment
registers, stop, and when the node has said SIGCONT, load FPU and segment registers, unblock all signals, load
what the node has put into the frame and IRET. There is no rt_sigreturn: with a frame of one's own that can
block signals.
The mapper stops itself, too, and whenever it is continued makes the calls of the list.
Sources: signal(7), sigprocmask(2), seccomp(2), clone(2); Linux asm/sigcontext.h, linux/seccomp.h; Intel SDM
vol. 1 13.8 (XRSTOR), vol. 2A IRET.
"""

from __future__ import annotations

import signal
import struct

from cpu_node.direct.image import (
    LIST,
    LIST_SIZE,
    PAGE,
    PR_SET_NAME,
    PR_SET_PDEATHSIG,
    START,
    SYS_CLOSE_RANGE,
    SYS_MMAP,
    SYS_MUNMAP,
    SYS_PRCTL,
    TRAMPOLINE,
    USER_END,
    assemble,
    elf,
)
from cpu_node.direct.spawn_unsafe import FRAME_FD, LIST_FD

FRAME = LIST + 0x10000
FRAME_SIZE = 0x8000  # a page of words, then the alternate stack
STACK = FRAME + PAGE

# Words in the frame.
SIGNAL, CONTEXT, INFO, SEQUENCE, DS, ES, FS, GS, FS_BASE, GS_BASE, MAPPER, RESULT, LEFT = range(0, 104, 8)
WORDS = struct.Struct("<13Q")
FP_STATE, EXTENDED = 104, 112  # where the FPU's state lies; whether as XSAVE leaves it, or FXSAVE
RETURN = 128  # flags of the handler's last instructions, rdi rsi rbp rdx rcx rax rbx, rip cs rflags rsp ss

# In the list's memory, behind the calls.
SETUP = LIST + 0x3000
PID, ALT_STACK, ACTION, FPROG, NAME, NO_SIGNALS, FILTER = 0x000, 0x008, 0x040, 0x080, 0x0A0, 0x0C0, 0x100
COUNT = 0xF00
CAPACITY = (SETUP - LIST) // 64

HANDLER = TRAMPOLINE + 0x400
_CALL_SIZE = 2  # of SYSCALL
_SYS_SIGACTION, _SYS_SIGPROCMASK, _SYS_GETPID, _SYS_CLONE, _SYS_EXIT, _SYS_KILL = 13, 14, 39, 56, 60, 62
_SYS_GETPPID, _SYS_ALTSTACK, _SYS_SECCOMP = 110, 131, 317
_CLONE_FLAGS = 0x100 | 0x8000 | int(signal.SIGCHLD)  # CLONE_VM, CLONE_PARENT
_NO_NEW_PRIVS, _SET_FILTER, _SPEC_ALLOW = 38, 1, 4
_SIG_SETMASK, _MASK_SIZE = 2, 8
_SIGSTOP, _SIGKILL = int(signal.SIGSTOP), int(signal.SIGKILL)
_NOT_TAKEN = (_SIGKILL, int(signal.SIGCHLD), int(signal.SIGCONT), _SIGSTOP)
_AUDIT_ARCH_X86_64, _ALLOW, _TRAP = 0xC000_003E, 0x7FFF_0000, 0x0003_0000
_SA_FLAGS = 0x4 | 0x0400_0000 | 0x0800_0000  # SIGINFO, RESTORER, ONSTACK


def _tie_life(parent: int) -> str:
    return f"""
        mov eax, {SYS_PRCTL}
        mov edi, {PR_SET_PDEATHSIG}
        mov esi, {_SIGKILL}
        syscall
        mov eax, {_SYS_GETPPID}
        syscall
        cmp eax, {parent}
        jne give_up"""


def _map(va: int, size: int, prot: int, fd: int) -> str:
    return f"""
        mov eax, {SYS_MMAP}
        movabs rdi, {va}
        mov esi, {size}
        mov edx, {prot}
        mov r10d, 0x11
        mov r8d, {fd}
        xor r9d, r9d
        syscall"""


def _unmap(first: int, end: int) -> str:
    return f"mov eax, {SYS_MUNMAP}\nmovabs rdi, {first}\nmovabs rsi, {end - first}\nsyscall"


def _close_from(fd: int) -> str:
    return f"mov eax, {SYS_CLOSE_RANGE}\nmov edi, {fd}\nmov esi, -1\nxor edx, edx\nsyscall"


_STOP_SELF = f"mov eax, {_SYS_KILL}\nmov edi, r15d\nmov esi, {_SIGSTOP}\nsyscall"


def _start(parent: int) -> str:
    not_taken = "\n".join(f"cmp r12d, {number}\nje next_signal" for number in _NOT_TAKEN)
    return f"""
        {_tie_life(parent)}
        {_map(LIST, LIST_SIZE, 1, LIST_FD)}
        {_map(FRAME, FRAME_SIZE, 3, FRAME_FD)}
        movabs rbx, {FRAME}
        movabs rbp, {SETUP}
        mov eax, {_SYS_GETPID}
        syscall
        mov r15d, eax
        {_STOP_SELF}
        mov eax, {_SYS_CLONE}
        mov edi, {_CLONE_FLAGS}
        xor esi, esi
        xor edx, edx
        xor r10d, r10d
        xor r8d, r8d
        syscall
        test eax, eax
        jz mapper
        js give_up
        mov [rbx+{MAPPER}], rax
        mov eax, {_SYS_ALTSTACK}
        lea rdi, [rbp+{ALT_STACK}]
        xor esi, esi
        syscall
        mov r12d, 1
    take_signal:
        {not_taken}
        mov eax, {_SYS_SIGACTION}
        mov edi, r12d
        lea rsi, [rbp+{ACTION}]
        xor edx, edx
        mov r10d, 8
        syscall
    next_signal:
        inc r12d
        cmp r12d, 32
        jne take_signal
        {_unmap(0, TRAMPOLINE)}
        {_unmap(TRAMPOLINE + PAGE, LIST)}
        {_unmap(LIST + LIST_SIZE, FRAME)}
        {_unmap(FRAME + FRAME_SIZE, USER_END)}
        mov eax, {SYS_PRCTL}
        mov edi, {PR_SET_NAME}
        lea rsi, [rbp+{NAME}]
        syscall
        {_close_from(0)}
        mov eax, {SYS_PRCTL}
        mov edi, {_NO_NEW_PRIVS}
        mov esi, 1
        xor edx, edx
        xor r10d, r10d
        xor r8d, r8d
        syscall
        mov eax, {_SYS_SECCOMP}
        mov edi, {_SET_FILTER}
        mov esi, {_SPEC_ALLOW}
        lea rdx, [rbp+{FPROG}]
        syscall
        test eax, eax
        jnz give_up
        ud2
    give_up:
        mov eax, {_SYS_EXIT}
        mov edi, 3
        syscall
    mapper:
        {_tie_life(parent)}
        {_close_from(1)}
        mov eax, {_SYS_GETPID}
        syscall
        mov r15d, eax
    wait_for_list:
        {_STOP_SELF}
        movabs r12, {LIST}
        mov r13, [rbp+{COUNT}]
        xor r14d, r14d
    next_call:
        test r13, r13
        jz list_done
        mov rax, [r12]
        mov rdi, [r12+8]
        mov rsi, [r12+16]
        mov rdx, [r12+24]
        mov r10, [r12+32]
        mov r8, [r12+40]
        mov r9, [r12+48]
        syscall
        add r12, 64
        dec r13
        cmp rax, -4095
        jb next_call
        mov r14, rax
    list_done:
        mov [rbx+{RESULT}], r14
        mov [rbx+{LEFT}], r13
        jmp wait_for_list
    """


def _noted(name: str, place: int) -> str:
    return f"mov eax, {name}\nmov [rbx+{place}], rax"


def _loaded(name: str, place: int) -> str:
    return f"mov rax, [rbx+{place}]\nmov {name}, ax"


_SEGMENTS = (("ds", DS), ("es", ES), ("fs", FS), ("gs", GS))
_BEFORE_STOP = f"""
    movabs rbx, {FRAME}
    mov [rbx+{SIGNAL}], rdi
    mov [rbx+{CONTEXT}], rdx
    mov [rbx+{INFO}], rsi
    {chr(10).join(_noted(name, place) for name, place in _SEGMENTS)}
    rdfsbase rax
    mov [rbx+{FS_BASE}], rax
    rdgsbase rax
    mov [rbx+{GS_BASE}], rax
    inc qword ptr [rbx+{SEQUENCE}]
    movabs rbp, {SETUP}
    mov eax, {_SYS_KILL}
    mov rdi, [rbp+{PID}]
    mov esi, {_SIGSTOP}
    syscall
"""
_XRSTOR64_RSI, _FXRSTOR64_RSI = (".byte 0x48, 0x0f, 0xae, " + modrm for modrm in ("0x2e", "0x0e"))
_BEFORE_UNBLOCK = f"""
    mov rsi, [rbx+{FP_STATE}]
    mov eax, -1
    mov edx, -1
    cmp qword ptr [rbx+{EXTENDED}], 0
    je legacy
    {_XRSTOR64_RSI}
    jmp loaded
legacy:
    {_FXRSTOR64_RSI}
loaded:
    {chr(10).join(_loaded(name, place) for name, place in _SEGMENTS)}
    mov rax, [rbx+{FS_BASE}]
    wrfsbase rax
    mov rax, [rbx+{GS_BASE}]
    wrgsbase rax
    lea rsp, [rbx+{RETURN}]
    mov eax, {_SYS_SIGPROCMASK}
    mov edi, {_SIG_SETMASK}
    lea rsi, [rbp+{NO_SIGNALS}]
    xor edx, edx
    mov r10d, {_MASK_SIZE}
    syscall
"""
_BEFORE_RETURN = f"""
    {chr(10).join(f"xor r{number}d, r{number}d" for number in range(8, 16))}
    popfq
    pop rdi
    pop rsi
    pop rbp
    pop rdx
    pop rcx
    pop rax
    pop rbx
    iretq
"""


def program(parent: int) -> bytes:
    """The file to execute."""
    return elf(((START, _start(parent)), (HANDLER, _BEFORE_STOP + _BEFORE_UNBLOCK + _BEFORE_RETURN)))


# Where system calls may come from: the addresses behind them are what the filter sees.
_BEHIND_STOP = HANDLER + len(assemble(_BEFORE_STOP, HANDLER))
_BEHIND_UNBLOCK = _BEHIND_STOP + len(assemble(_BEFORE_UNBLOCK, _BEHIND_STOP))
STOP_CALL, UNBLOCK_CALL = _BEHIND_STOP - _CALL_SIZE, _BEHIND_UNBLOCK - _CALL_SIZE
# A signal may come there, where nothing is blocked and no code of the guest's has run yet. RSP has left the
# alternate stack by then: a second frame lies where the first did, so that there are never more.
RETURNING = range(_BEHIND_UNBLOCK, _BEHIND_UNBLOCK + len(assemble(_BEFORE_RETURN, _BEHIND_UNBLOCK)))


def setup(pid: int) -> bytes:
    """What the child finds at SETUP: its pid, stack_t, sigaction, an empty sigset_t, filter."""
    code = _filter(pid)
    out = bytearray(FILTER + len(code))
    struct.pack_into("<Q", out, PID, pid)
    struct.pack_into("<QIxxxxQ", out, ALT_STACK, STACK, 0, FRAME + FRAME_SIZE - STACK)
    struct.pack_into("<QQQQ", out, ACTION, HANDLER, _SA_FLAGS, HANDLER, (1 << 64) - 1)
    struct.pack_into("<HxxxxxxQ", out, FPROG, len(code) // 8, SETUP + FILTER)
    out[NAME : NAME + 15] = b"backplane-user\0"
    out[FILTER:] = code
    return bytes(out)


def _filter(pid: int) -> bytes:
    """Classic BPF over struct seccomp_data: nr 0, arch 4, instruction pointer 8, arguments from 16 on."""
    load, equal, answer = 0x20, 0x15, 0x06
    no_signals = SETUP + NO_SIGNALS
    allowed = (
        ((0, _SYS_KILL), (8, _BEHIND_STOP & 0xFFFF_FFFF), (16, pid), (24, _SIGSTOP), (28, 0)),
        ((0, _SYS_SIGPROCMASK), (8, _BEHIND_UNBLOCK & 0xFFFF_FFFF), (16, _SIG_SETMASK),
         (24, no_signals & 0xFFFF_FFFF), (28, no_signals >> 32), (32, 0), (36, 0), (40, _MASK_SIZE), (44, 0)),
    )  # fmt: skip
    common = ((4, _AUDIT_ARCH_X86_64), (12, _BEHIND_STOP >> 32))
    rows: list[tuple[int, int, int, int]] = []
    end = 2 * len(common) + sum(2 * len(demands) + 1 for demands in allowed)

    def demand(demands: tuple[tuple[int, int], ...], otherwise: int) -> None:
        for offset, value in demands:
            rows.append((load, 0, 0, offset))
            rows.append((equal, 0, otherwise - len(rows) - 1, value))

    demand(common, end)
    for demands in allowed:
        demand(demands, len(rows) + 2 * len(demands) + 1)  # what fails goes on behind the answer
        rows.append((answer, 0, 0, _ALLOW))
    rows.append((answer, 0, 0, _TRAP))
    return b"".join(struct.pack("<HBBI", *row) for row in rows)
