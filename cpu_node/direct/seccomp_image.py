"""The program that a child of the seccomp back end starts as, and what it shares with the node.

One page of code, as of image.py. It makes itself ready: maps the list (which it can only read) and the frame
(shared with the node, written by both), starts the *mapper*, a process that shares its memory and nothing
else, takes all signals on an alternate stack in the frame, gives up all other memory and descriptors, and
has a filter installed that lets two system calls pass, both at one address of this page and one of them with
fixed arguments: kill(itself, SIGSTOP) and rt_sigreturn(). Every other one becomes SIGSYS.

From then on its only own code is the signal handler: note segment registers, stop, and when the node has
said SIGCONT, load them and return from the signal to what the node has put into its frame.
The mapper stops itself, too, and whenever it is continued makes the calls of the list.
Sources: signal(7), sigreturn(2), seccomp(2), clone(2); Linux asm/sigcontext.h, linux/seccomp.h.
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

# In the list's memory, behind the calls.
SETUP = LIST + 0x3000
PID, ALT_STACK, ACTION, FPROG, NAME, FILTER, COUNT = 0x000, 0x008, 0x040, 0x080, 0x0A0, 0x100, 0xF00
CAPACITY = (SETUP - LIST) // 64

HANDLER = TRAMPOLINE + 0x400
_CALL_SIZE = 2  # of SYSCALL
_SYS_SIGACTION, _SYS_SIGRETURN, _SYS_GETPID, _SYS_CLONE, _SYS_EXIT, _SYS_KILL = 13, 15, 39, 56, 60, 62
_SYS_GETPPID, _SYS_ALTSTACK, _SYS_SECCOMP = 110, 131, 317
_CLONE_FLAGS = 0x100 | 0x8000 | int(signal.SIGCHLD)  # CLONE_VM, CLONE_PARENT
_NO_NEW_PRIVS, _SET_FILTER, _SPEC_ALLOW = 38, 1, 4
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
_BEFORE_RETURN = f"""
    {chr(10).join(_loaded(name, place) for name, place in _SEGMENTS)}
    mov rax, [rbx+{FS_BASE}]
    wrfsbase rax
    mov rax, [rbx+{GS_BASE}]
    wrgsbase rax
    mov rsp, [rbx+{CONTEXT}]
    mov eax, {_SYS_SIGRETURN}
    syscall
"""


def program(parent: int) -> bytes:
    """The file to execute."""
    return elf(((START, _start(parent)), (HANDLER, _BEFORE_STOP + _BEFORE_RETURN)))


# Where system calls may come from: the addresses behind them are what the filter sees.
_BEHIND_STOP = HANDLER + len(assemble(_BEFORE_STOP, HANDLER))
_BEHIND_RETURN = _BEHIND_STOP + len(assemble(_BEFORE_RETURN, _BEHIND_STOP))
STOP_CALL, RETURN_CALL = _BEHIND_STOP - _CALL_SIZE, _BEHIND_RETURN - _CALL_SIZE


def setup(pid: int) -> bytes:
    """What the child finds at SETUP: its pid, stack_t, sigaction, filter."""
    code = _filter(pid, _BEHIND_STOP, _BEHIND_RETURN)
    out = bytearray(FILTER + len(code))
    struct.pack_into("<Q", out, PID, pid)
    struct.pack_into("<QIxxxxQ", out, ALT_STACK, STACK, 0, FRAME + FRAME_SIZE - STACK)
    struct.pack_into("<QQQQ", out, ACTION, HANDLER, _SA_FLAGS, HANDLER, (1 << 64) - 1)
    struct.pack_into("<HxxxxxxQ", out, FPROG, len(code) // 8, SETUP + FILTER)
    out[NAME : NAME + 15] = b"backplane-user\0"
    out[FILTER:] = code
    return bytes(out)


def _filter(pid: int, stop_ip: int, return_ip: int) -> bytes:
    """Classic BPF over struct seccomp_data: nr 0, arch 4, instruction pointer 8, arguments from 16 on."""
    load, equal, answer = 0x20, 0x15, 0x06
    rows: list[tuple[int, int, int, int]] = []

    def demand(offset: int, value: int, end: int) -> None:
        rows.append((load, 0, 0, offset))
        rows.append((equal, 0, end - len(rows) - 1, value))  # else to `end`

    # Two runs of demands; whichever fails goes on to the next one, or to the trap.
    first_end, second_end = 15, 25
    demand(4, _AUDIT_ARCH_X86_64, second_end)
    demand(12, stop_ip >> 32, second_end)
    for offset, value in ((0, _SYS_KILL), (8, stop_ip & 0xFFFF_FFFF), (16, pid), (24, _SIGSTOP), (28, 0)):
        demand(offset, value, first_end)
    rows.append((answer, 0, 0, _ALLOW))
    for offset, value in ((0, _SYS_SIGRETURN), (8, return_ip & 0xFFFF_FFFF)):
        demand(offset, value, second_end)
    rows.append((answer, 0, 0, _ALLOW))
    rows.extend([(answer, 0, 0, _TRAP)] * (second_end + 1 - len(rows)))
    return b"".join(struct.pack("<HBBI", *row) for row in rows)
