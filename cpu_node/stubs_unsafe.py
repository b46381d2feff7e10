"""The hand-written machine code around translations: enter, leave, exits, the signal handler.

Assembled by keystone, or kept from an earlier start (assembled.py). No C or Python runs on a signal frame:
the handler notes where the fault was, points the interrupted context at an exit stub and returns.
Register use inside generated code: see layout.py and docs/how-it-works.md.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable

from cpu_node import host_unsafe as host
from cpu_node import layout as at
from cpu_node import tlb_stubs
from cpu_node.assembled import assemble
from cpu_node.assist_stubs import assist_image

_REGS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
_CALLEE_SAVED = ("rbx", "rbp", "r12", "r13", "r14", "r15")

# struct ucontext, mcontext gregs [asm/sigcontext.h]
_UC_RIP, _UC_EFLAGS, _UC_ERR, _UC_TRAPNO, _UC_CR2 = 168, 176, 192, 200, 216


def _enter() -> str:
    lines = [f"push {r}" for r in _CALLEE_SAVED]
    lines += [
        f"movabs r15, {at.RECORD:#x}",
        f"mov [r15+{at.HOST_RSP}], rsp",
        f"mov r13, [r15+{at.WINDOW}]",
        "wrgsbase r13",
        f"mov r14, [r15+{at.TABLE}]",
        f"fxrstor64 [r15+{at.FX}]",
        f"push qword ptr [r15+{at.EFLAGS}]",
        "popfq",
    ]
    lines += [f"mov {r}, [r15+{at.REGS + 8 * i}]" for i, r in enumerate(_REGS)]
    lines.append(f"jmp qword ptr [r15+{at.ENTRY}]")
    return "\n".join(lines)


def _leave() -> str:
    lines = [f"mov [r15+{at.REGS + 8 * i}], {r}" for i, r in enumerate(_REGS)]
    lines += [f"mov [r15+{at.SCRATCH_REGS + 8 * i}], r{8 + i}" for i in range(6)]
    lines += [
        f"mov rsp, [r15+{at.HOST_RSP}]",
        "pushfq",
        f"pop qword ptr [r15+{at.EFLAGS}]",
        f"fxsave64 [r15+{at.FX}]",
        "fninit",
        f"ldmxcsr [r15+{at.HOST_MXCSR}]",
        "cld",
    ]
    lines += [f"pop {r}" for r in reversed(_CALLEE_SAVED)]
    lines.append("ret")
    return "\n".join(lines)


def _exit(reason: int) -> str:
    keep_eip = reason in (at.EXIT_FAULT, at.EXIT_SIGNAL, at.EXIT_UNENTERED, at.EXIT_TLB)
    store = "" if keep_eip else f"mov dword ptr [r15+{at.EIP}], r8d\n"
    return f"{store}mov dword ptr [r15+{at.REASON}], {reason}\njmp {at.CODE + at.STUB_LEAVE:#x}"


def _handler(assists: dict[str, int], flags_from: str, tails_end: str) -> str:
    """handler(signo in edi, siginfo in rsi, ucontext in rdx)"""
    return f"""
        movabs rax, {at.RECORD:#x}
        mov rcx, [rdx+{_UC_RIP}]
        movabs r10, {at.CODE:#x}
        mov r9, rcx
        sub r9, r10
        cmp edi, {int(signal.SIGALRM)}
        je async
        mov dword ptr [rax+{at.FAULT_SIGNAL}], edi
        mov r8, [rdx+{_UC_CR2}]
        mov [rax+{at.FAULT_ADDRESS}], r8
        mov r8, [rdx+{_UC_ERR}]
        mov [rax+{at.FAULT_ERROR}], r8
        mov r8, [rdx+{_UC_TRAPNO}]
        mov [rax+{at.FAULT_TRAP}], r8
        lea r8, [r10+{at.exit_stub(at.EXIT_INDIRECT)}]
        test rcx, rcx
        jz redirect
        cmp r9, {at.STUB_ASSISTS}
        jb foreign
        lea r8, [r10+{assists["fix"]}]
        cmp r9, {assists[flags_from]}
        jb redirect
        lea r8, [r10+{assists["fix_flags"]}]
        cmp r9, {at.CODE_FIRST}
        jb redirect
        cmp r9, {at.CODE_SIZE}
        jae foreign
        mov [rax+{at.FAULT_RIP}], rcx
        lea r8, [r10+{at.exit_stub(at.EXIT_FAULT)}]
    redirect:
        mov [rdx+{_UC_RIP}], r8
        ret
    async:
        mov dword ptr [rax+{at.KICK}], 1
        mov dword ptr [rax+{at.PENDING}], 1
        lea r8, [r10+{at.exit_stub(at.EXIT_UNENTERED)}]
        mov [rax+{at.ENTRY}], r8
        cmp r9, {assists["tail_return"]}
        jb done
        lea r8, [r10+{assists["tail_return"]}]
        cmp r9, {assists["tail_jump"]}
        jb redirect
        lea r8, [r10+{assists["tail_jump"]}]
        cmp r9, {assists[tails_end]}
        jb redirect
        cmp r9, {at.CODE_FIRST}
        jb done
        cmp r9, {at.CODE_SIZE}
        jae done
        mov [rax+{at.FAULT_RIP}], rcx
        lea r8, [r10+{at.exit_stub(at.EXIT_SIGNAL)}]
        mov [rdx+{_UC_RIP}], r8
    done:
        ret
    foreign:
        sub rsp, 40
        mov qword ptr [rsp], 0
        mov qword ptr [rsp+8], {0x0400_0000:#x}
        lea r8, [r10+{at.STUB_RESTORER}]
        mov [rsp+16], r8
        mov qword ptr [rsp+24], 0
        mov rsi, rsp
        xor edx, edx
        mov r10d, 8
        mov eax, 13
        syscall
        add rsp, 40
        ret
    """


@functools.cache
def _assists() -> tuple[bytes, dict[str, int]]:
    """Host code of the assists from STUB_ASSISTS on, and each one's offset in CODE."""
    code, offsets = b"", {}
    for name, text in assist_image().pieces:
        offset = offsets[name] = at.STUB_ASSISTS + len(code)
        known = {other: hex(at.CODE + place) for other, place in offsets.items()}
        code += assemble(text.format(**known), at.CODE + offset)
    return code, offsets


@functools.cache
def stub_image() -> bytes:
    """All stubs, at their offsets of layout.py."""
    code, offsets = _assists()
    image = assist_image()
    pieces = [
        (at.STUB_ENTER, _enter()),
        (at.STUB_LEAVE, _leave()),
        (at.STUB_HANDLER, _handler(offsets, image.flags_from, image.tails_end)),
        (at.STUB_RESTORER, "mov eax, 15\nsyscall"),
        (at.STUB_TLB_FLUSH, tlb_stubs.flush()),
        (at.STUB_RDTSC, "rdtsc\nshl rdx, 32\nor rax, rdx\nret"),
        *((at.exit_stub(reason), _exit(reason)) for reason in range(1, len(at.EXIT_NAMES))),
    ]
    stubs = [(offset, assemble(text, at.CODE + offset)) for offset, text in pieces]
    return _placed([*stubs, (at.STUB_ASSISTS, code)])


def _placed(pieces: list[tuple[int, bytes]]) -> bytes:
    image = bytearray(b"\xcc" * at.CODE_FIRST)
    end = 0
    for offset, code in sorted(pieces):
        if offset < end:
            raise AssertionError(f"stub at {offset:#x} overlaps the one before, which ends at {end:#x}")
        image[offset : offset + len(code)] = code
        end = offset + len(code)
    assert end <= at.CODE_FIRST
    return bytes(image)


def assist_addresses() -> dict[str, int]:
    """Name of each assist -> host address."""
    return {name: at.CODE + offset for name, offset in _assists()[1].items()}


def host_rdtsc() -> Callable[[], int]:
    """The time-stamp counter as translated code reads it."""
    return host.function64(at.CODE + at.STUB_RDTSC)


def install() -> None:
    """Maps code cache, record and signal stack, and takes the fault signals for the calling thread."""
    rwx = host.PROT_READ | host.PROT_WRITE | host.PROT_EXEC
    host.map_anonymous(at.CODE, at.CODE_SIZE, rwx)
    host.advise(at.CODE, at.CODE_SIZE, host.MADV_HUGEPAGE)
    host.map_anonymous(at.RECORD, at.RECORD_SIZE, host.PROT_READ | host.PROT_WRITE)
    host.map_anonymous(at.LOADABLE, at.LOADABLE_SIZE, host.PROT_READ | host.PROT_WRITE)
    host.map_anonymous(at.SIGNAL_STACK, at.SIGNAL_STACK_SIZE, host.PROT_READ | host.PROT_WRITE)
    image = stub_image()
    host.view8(at.CODE, len(image))[:] = image
    host.set_signal_stack(at.SIGNAL_STACK, at.SIGNAL_STACK_SIZE)
    handler, restorer = at.CODE + at.STUB_HANDLER, at.CODE + at.STUB_RESTORER
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP):
        host.set_signal_handler(number, handler, restorer, restart=False)
    host.set_signal_handler(signal.SIGALRM, handler, restorer, restart=True)
