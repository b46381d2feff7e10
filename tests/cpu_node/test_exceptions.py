"""Exceptions of translated code: what the host raised becomes the guest's, or is none of its business.

Source: Intel SDM vol. 3A 6.15 (each exception), 2.5 (CR0.EM, MP, TS), table 6-5 (double faults).
"""

from __future__ import annotations

import pytest

from cpu_node import layout as at
from cpu_node.cpu import CR0_AM, CR0_EM, CR0_MP, CR0_TS, CR4_OSFXSR, CR4_OSXMMEXCPT, EAX
from cpu_node.errors import AC, BR, DE, GP, MF, NM, PF, UD, XM, TripleFault
from tests.cpu_node.board import (
    CODE,
    COUNT,
    COUNTER,
    DATA,
    DIRECTORY,
    HANDLER,
    STACK,
    Board,
    asm,
)
from tests.cpu_node.child import isolated
from tests.cpu_node.stopper import Stopper

FAULTS = {
    "div by zero": ("xor ecx, ecx\ndiv ecx", DE, None),
    "div overflow": ("mov edx, 5\nmov ecx, 1\ndiv ecx", DE, None),
    "idiv memory": (f"mov dword ptr [{DATA:#x}], 0\nidiv dword ptr [{DATA:#x}]", DE, None),
    "aam": (".byte 0xd4, 0", DE, None),
    "ud2": ("ud2", UD, None), "no row": (".byte 0x0f, 0x05", UD, None),
    "lock": (".byte 0xf0, 0x40", UD, None),
    "too long": (".byte " + ", ".join(["0x2e"] * 15) + ", 0x90", GP, 0),
    "movaps": (f"movaps xmm0, [{DATA + 4:#x}]", GP, 0), "movntdq": (f"movntdq [{DATA + 8:#x}], xmm0", GP, 0),
    "ldmxcsr": (f"mov dword ptr [{DATA:#x}], 0x10000\nldmxcsr [{DATA:#x}]", GP, 0),
    "fxsave": (f"fxsave [{DATA + 8:#x}]", GP, 0),
    "cs write": ("mov cs:[0x200000], eax", GP, 0), "null load": ("mov ax, 0\nmov ss, ax", GP, 0),
    "beyond gdt": ("mov ax, 0xfff8\nmov ds, ax", GP, 0xFFF8),
    "bound": (f"mov eax, -1\nbound eax, [{DATA:#x}]", BR, None),
    "x87": ("fninit\npush 0x37b\nfldcw [esp]\nfld1\nfldz\nfdivp st(1)\nfwait", MF, None),
    "x87 next": ("fninit\npush 0x37b\nfldcw [esp]\nfld1\nfldz\nfdivp st(1)\nfld1", MF, None),
    "sse": ("push 0x1d80\nldmxcsr [esp]\npush 0\nmovss xmm0, [esp]\nmov eax, 0x3f800000\n"
            "movd xmm1, eax\ndivss xmm1, xmm0", XM, None),
}  # fmt: skip


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("name", FAULTS)
@isolated
def test_exception(name: str, cpl: int) -> None:
    text, vector, error = FAULTS[name]
    board = Board()
    if cpl:
        board.paging()
        board.flat(3)
    board.run(text + "\nhlt")
    assert (board.fault.vector, board.fault.error) == (vector, error)
    last = len(asm(text)) - (1 if name == "too long" else 0)
    if name == "x87":
        assert board.ram[board.fault.eip] == 0x9B
    elif name != "x87 next":
        assert CODE <= board.fault.eip < CODE + last
        assert b"\xf4" not in board.ram[board.fault.eip : CODE + last]


@pytest.mark.parametrize(("cr0", "text", "vector"), [
    (CR0_TS, "fld1", NM), (CR0_EM, "fld1", NM), (CR0_TS, "paddd mm0, mm1", NM),
    (CR0_EM, "paddd mm0, mm1", UD),
    (CR0_TS, "addps xmm0, xmm1", NM), (CR0_EM, "addps xmm0, xmm1", UD), (CR0_TS, "fxsave [0x200000]", NM),
    (CR0_EM, "fxsave [0x200000]", UD), (CR0_TS, "fwait", None), (CR0_TS | CR0_MP, "fwait", NM),
    (CR0_MP, "fwait", None), (CR0_EM, "fwait", None), (CR0_TS, "sfence", None), (CR0_TS, "emms", NM),
    (CR0_TS, "clflush [0x200000]", None), (CR0_EM, "mfence", None),
    (CR0_TS, "prefetcht0 [0x200000]", None), (CR0_TS, "movnti [0x200000], eax", None),
    (CR0_TS, "popcnt eax, eax", None),
])
@isolated
def test_device_not_available(cr0: int, text: str, vector: int | None) -> None:
    """[vol. 3 2.5, table 2-2; vol. 2 tables of exceptions of each instruction]"""
    board = Board()
    board.cpu.cr0 |= cr0
    board.engine.mode_changed()
    board.run(f"{text}\nhlt")
    assert [f.vector for f in board.faults] == ([] if vector is None else [vector])


@isolated
def test_ts_is_cleared_by_the_handler() -> None:
    """Lazy FPU switching: #NM, CLTS, IRET, and the instruction runs; then TS is set again."""
    board = Board()
    board.handler(f"{COUNT}\nclts", NM)
    board.run("mov eax, cr0\nor eax, 8\nmov cr0, eax\nfld1\nfld1\nmov cr0, eax\nfld1\nfstp st(0)\nhlt")
    assert board.peek32(COUNTER) == 2


@pytest.mark.parametrize("instruction", ["addps xmm0, xmm1", "ldmxcsr [0x200000]", "movd eax, xmm1"])
@isolated
def test_sse_without_osfxsr(instruction: str) -> None:
    board = Board()
    board.cpu.cr4 &= ~CR4_OSFXSR
    board.engine.mode_changed()
    board.run(f"fld1\n{instruction}\nhlt")
    assert board.fault.vector == UD


@isolated
def test_simd_exception_without_osxmmexcpt_is_undefined_opcode() -> None:
    """[vol. 3 6.15, interrupt 19; table 2-6]"""
    board = Board()
    board.cpu.cr4 &= ~CR4_OSXMMEXCPT
    board.run(FAULTS["sse"][0] + "\nhlt")
    assert board.fault.vector == UD


@pytest.mark.parametrize("text", ["lock inc dword ptr [esi]", "lock xadd [esi], eax", "xchg [esi], eax",
                                  "lock cmpxchg8b [esi]", "lock bts dword ptr [esi], 3"])
@isolated
def test_host_that_forbids_split_locks(text: str) -> None:
    """Its #AC is not the guest's: the instruction is simulated."""
    board = Board()
    engine = board.engine
    board.load(f"nop\n{text}\nhlt")

    def outcome() -> tuple[object, ...]:
        board.ram[DATA : DATA + 128] = bytes(range(128))
        board.regs[:] = [1, 2, 3, 4, STACK, 6, DATA + 62, 8]
        board.run(None)
        assert not board.faults
        return list(board.regs), bytes(board.ram[DATA : DATA + 128]), board.cpu.eflags

    expected = outcome()
    stopper = Stopper(board, lambda: None)
    stopper.arm(engine.contexts.table.lines[CODE >> 12].host[1])
    stopped = []

    def fault() -> None:
        stopper.disarm()
        stopped.append(1)
        engine.record.q[at.FAULT_RIP // 8] -= 1
        engine.record.q[at.FAULT_TRAP // 8] = 17
        type(engine)._host_fault(engine)

    engine._host_fault = fault  # type: ignore[method-assign]
    assert outcome() == expected
    assert stopped == [1]


# ---- double and triple faults


@isolated
def test_triple_fault_ends_the_run() -> None:
    board = Board()
    board.delivers = True
    board.cpu.idt_limit = 0
    with pytest.raises(TripleFault):
        board.run("mov eax, 7\nud2")
    assert board.cpu.eip == CODE + 5
    assert board.regs[EAX] == 7


@isolated
def test_double_fault() -> None:
    board = Board()
    board.gate(8, HANDLER)
    board.load("pop eax\npop ebx\nhlt", HANDLER)
    board.run("div dword ptr [0x200000]")  # #DE, whose gate isn't there: #NP or #GP, so #DF
    assert board.regs[EAX] == 0
    assert board.regs[3] == CODE


@isolated
def test_page_fault_while_delivering_a_page_fault() -> None:
    board = Board()
    board.paging()
    board.flat(3)
    board.map(STACK - 0x1000, 0, 0)
    board.map(STACK - 1 & ~0xFFF, 0, 0)
    board.flush()
    board.delivers = True
    board.gate(PF, HANDLER)
    with pytest.raises(TripleFault):
        board.run("mov eax, [0x70000000]")
    assert board.cpu.cr2 == STACK - 4


# ---- alignment checking

MISALIGNED = {
    "mov eax, [esi+1]": True, "mov eax, [esi+2]": True, "mov eax, [esi+4]": False, "mov ax, [esi+1]": True,
    "mov al, [esi+1]": False, "mov [esi+3], eax": True, "inc dword ptr [esi+2]": True,
    "add esp, 2\npush eax": True,
    "add esp, 2\npop eax": True, "add esp, 2\ncall next\nnext: nop": True, "fld qword ptr [esi+4]": True,
    "fld tbyte ptr [esi+8]": False, "movsd xmm0, [esi+4]": True, "movups xmm0, [esi+4]": False,
    "movzx eax, byte ptr [esi+3]": False, "inc esi\nlodsd": True, "lodsb\nlodsb\nlodsb": False,
    "lea eax, [esi+1]": False, "fnstenv [esi+2]": True, "bt [esi+1], eax": True,
    "xor eax, eax\nbound eax, [esi+4]": False, "bound eax, [esi+2]": True, "bound ax, [esi+1]": True,
    "xor eax, eax\nbound ax, [esi+2]": False, ".byte 0xc4, 0x46, 4": False, ".byte 0xc4, 0x46, 2": True,
    ".byte 0x66, 0xc4, 0x46, 2": False, ".byte 0x66, 0xc4, 0x46, 1": True,
}  # fmt: skip


@pytest.mark.parametrize("text", MISALIGNED)
@isolated
def test_alignment_check(text: str) -> None:
    """#AC(0) at CPL 3 with CR0.AM and EFLAGS.AC, else none [vol. 3 6.15, interrupt 17]."""
    board = Board()
    for cpl, am, ac in ((3, True, True), (3, True, False), (3, False, True), (0, True, True)):
        board.forget()
        board.ram[DIRECTORY:CODE] = bytes(CODE - DIRECTORY)
        board.paging()
        board.flat_segments(cpl)
        board.cpu.cr0 = board.cpu.cr0 & ~CR0_AM | (CR0_AM if am else 0)
        flags = 0x40000 if ac else 0
        board.run(f"mov esi, {DATA:#x}\npush {2 | flags:#x}\npopfd\n{text}\nud2")
        faults = [(AC, 0)] if MISALIGNED[text] and (cpl, am, ac) == (3, True, True) else [(UD, None)]
        assert [(f.vector, f.error) for f in board.faults] == faults, (cpl, am, ac)


@isolated
def test_what_wraps_is_no_matter_of_alignment() -> None:
    """The segment's limit comes before alignment: with flat segments, a word at FFFFFFFFh."""
    board = Board()
    board.paging()
    board.flat_segments(3)
    board.cpu.cr0 |= CR0_AM
    board.run("push 0x40002\npopfd\nmov ax, [0xffffffff]\nud2")
    assert board.fault.vector in (PF, GP)
