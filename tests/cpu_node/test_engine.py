"""The engine's main loop: interrupts at any moment, shadows, flags, exceptions, HLT, start and reset.

Source: Intel SDM vol. 3A 6.8 (interrupts enabled and disabled, shadows of STI and of loads of SS), 6.14,
6.15; vol. 2 pages of STI, POPF, IRET, HLT.
"""

from __future__ import annotations

import random
import signal

import pytest

from cpu_node import layout as at
from cpu_node.cpu import CR0_AM, CR0_EM, CR0_MP, CR0_TS, CR4_OSFXSR, CR4_OSXMMEXCPT, EAX, ECX, ESP
from cpu_node.descriptor import CS, DS, FS, SS, TRAP_GATE32, build, pack
from cpu_node.errors import AC, BP, BR, DE, GP, MF, NM, OF, PF, UD, XM, TripleFault
from cpu_node.flags import IF, IOPL, RF
from tests.cpu_node.board import (
    CODE,
    CODE0,
    DATA,
    DATA0,
    DIRECTORY,
    GDT,
    RW,
    STACK,
    STACK3,
    TSS,
    US,
    Board,
    P,
    asm,
)
from tests.cpu_node.child import isolated
from tests.cpu_node.stopper import Stopper, host_instructions

HANDLER = 0x110000
VECTOR = 0x40
COUNT = "inc dword ptr [0x210000]"
COUNTER = 0x210000
IRET = ".byte 0xcf"
# IRET to the next instruction with more flags set
IRET_WITH = "pushfd\nor dword ptr [esp], {}\n.byte 0x0e\ncall next\nnext: add dword ptr [esp], 5\n.byte 0xcf"


def _with_handler(board: Board, body: str = COUNT, vector: int = VECTOR, dpl: int = 0) -> None:
    """An interrupt handler that counts and returns."""
    va = HANDLER + 0x100 * vector
    board.load(f"{body}\n{IRET}", va)
    board.gate(vector, va, dpl)


# ---- interrupts and their shadows


@isolated
def test_interrupt_is_taken_where_interrupts_are_on() -> None:
    board = Board()
    _with_handler(board)
    board.raise_interrupt(VECTOR)
    board.run("nop\nsti\nnop\nnop\ncli\nhlt")
    assert board.peek32(COUNTER) == 1
    assert board.vectors == []


@isolated
def test_interrupt_waits_while_interrupts_are_off() -> None:
    board = Board()
    _with_handler(board)
    board.raise_interrupt(VECTOR)
    board.run("mov ecx, 1000\nhere: loop here\nhlt")
    assert board.peek32(COUNTER) == 0
    assert board.vectors == [VECTOR]


ENABLERS = {
    "sti": "sti\nnop",
    "popfd": "pushfd\nor dword ptr [esp], 0x200\npopfd",
    "popf": "pushf\nor word ptr [esp], 0x200\npopf",
    "iret": IRET_WITH.format(IF),
}  # fmt: skip


@pytest.mark.parametrize("arrival", ["before", "while off", "noticed"])
@pytest.mark.parametrize("enabler", ENABLERS)
@isolated
def test_pending_interrupt_comes_when_the_flag_is_set(enabler: str, arrival: str) -> None:
    """At once, not at the next signal."""
    board = Board()
    _with_handler(board)
    board.on_port = lambda port, value: board.raise_interrupt(VECTOR)
    if arrival == "before":
        board.raise_interrupt(VECTOR)
    noticed = "out 0x80, al\nnop\njmp on\non: nop\nin al, 0x80"
    noise = {"before": "", "while off": "out 0x80, al", "noticed": noticed}
    board.run(f"{noise[arrival]}\n{ENABLERS[enabler]}\nmov eax, [{COUNTER:#x}]\ncli\nhlt")
    assert board.regs[EAX] == 1
    assert board.idles == 1


@isolated
def test_sti_hlt_loses_no_wakeup() -> None:
    """An interrupt between STI and HLT must be taken after HLT began: stop at every host instruction."""
    board = Board()
    _with_handler(board)
    program = f"nop\nsti\nhlt\ncli\nmov eax, [{COUNTER:#x}]\nhlt"
    asleep = []

    def idle() -> None:
        if board.cpu.eflags & IF:
            asleep.append(board.cpu.eip)
            board.raise_interrupt(VECTOR)
        else:
            board.engine.stopping = True

    board.on_idle = idle
    board.run(program)
    stopped_at = []

    def stop() -> None:
        stopped_at.append(board.cpu.eip)
        board.raise_interrupt(VECTOR)

    stopper = Stopper(board, stop)
    for offset in list(host_instructions(board)):
        board.poke32(COUNTER, 0)
        asleep.clear()
        stopped_at.clear()
        board.flat()
        board.engine.contexts.table.clear()
        stopper.arm(offset)
        board.cpu.eflags = 2
        board.run(None)
        stopper.disarm()
        if stopped_at and stopped_at[0] <= CODE + 2:
            assert asleep == [], f"host offset {offset:#x}: HLT slept through the interrupt"
            assert board.regs[EAX] == 1


@pytest.mark.parametrize("after", ["jmp here\nhere: nop", "call here\nhere: pop eax", "ret", "mov eax, cr0"])
@isolated
def test_shadow_of_sti_covers_any_instruction(after: str) -> None:
    """The handler must see EIP behind the instruction that follows STI."""
    board = Board()
    _with_handler(board, "mov ebx, [esp]\n" + COUNT)
    program = f"push 0x100040\nnop\nnop\nsti\n{after}\nnop\nnop\ncli\nhlt"
    board.load("nop\ncli\nhlt", CODE + 0x40)
    board.run(program)
    sti = board.ram.find(b"\xfb", CODE)
    shadowed = sti + 1
    stopper = Stopper(board, lambda: board.raise_interrupt(VECTOR))
    taken = set()
    for offset in list(host_instructions(board)):
        board.flat()
        board.engine.contexts.table.clear()
        board.cpu.eflags = 2
        board.regs[3] = 0
        stopper.arm(offset)
        board.run(None)
        stopper.disarm()
        if stopper.stopped and board.regs[3]:
            taken.add(board.regs[3])
    assert taken
    assert shadowed not in taken


@isolated
def test_sti_alone_in_a_loop_lets_interrupts_in() -> None:
    """STI; JMP to itself: the shadow must end."""
    board = Board()
    _with_handler(board, f"{COUNT}\nadd dword ptr [esp], 2")
    board.raise_interrupt(VECTOR)
    board.run("sti\nhere: jmp here\nnop\ncli\nhlt")
    assert board.peek32(COUNTER) == 1


@isolated
def test_sti_with_interrupts_on_has_no_shadow() -> None:
    board = Board()
    _with_handler(board)
    board.on_port = lambda port, value: board.raise_interrupt(VECTOR)
    board.run("sti\nnop\nout 0x80, al\nsti\nhlt\ncli\nhlt")
    assert board.peek32(COUNTER) == 1


@pytest.mark.parametrize("load", ["mov ss, ax", "push eax\npop ss"])
@isolated
def test_load_of_ss_holds_interrupts_for_one_instruction(load: str) -> None:
    """MOV SS; MOV ESP: no interrupt may see the new SS with the old ESP [6.8.3]."""
    board = Board()
    _with_handler(board, f"lea ebx, [esp+12]\nmov edx, [esp]\n{COUNT}")
    board.on_port = lambda port, value: board.raise_interrupt(VECTOR)
    if "push" in load:
        load = "push eax\nout 0x80, al\n.byte 0x17"
    else:
        load = "out 0x80, al\nmov ss, ax"
    board.load("cli\nhlt", 0x120000)
    board.run(f"mov eax, {DATA0}\nsti\nnop\ncli\n{load}\nsti\nmov esp, 0x8800\nnop\ncli\nhlt")
    assert board.peek32(COUNTER) == 1
    assert board.regs[3] == 0x8800


@isolated
def test_load_of_ss_with_interrupts_on() -> None:
    board = Board()
    _with_handler(board, f"lea ebx, [esp+12]\n{COUNT}")
    board.load(f"mov eax, {DATA0}\nsti\nnop\nmov ss, ax\nmov esp, 0x8800\nnop\ncli\nhlt")
    original = board.engine.simulator.step

    def step():  # type: ignore[no-untyped-def]
        row = original()
        if row.mnemonic == "mov" and board.cpu.inhibit_interrupts:
            board.raise_interrupt(VECTOR)
        return row

    board.engine.simulator.step = step  # type: ignore[method-assign]
    board.run(None)
    assert board.peek32(COUNTER) == 1
    assert board.regs[3] == 0x8800


@isolated
def test_interrupts_one_after_the_other() -> None:
    board = Board()
    order = 0x211000
    for n in range(4):
        body = f"mov eax, [{order:#x}]\nshl eax, 4\nor eax, {n + 1}\nmov [{order:#x}], eax"
        _with_handler(board, body, VECTOR + n)
    for n in (2, 0, 3, 1):
        board.raise_interrupt(VECTOR + n)
    board.run("sti\nnop\nnop\nnop\ncli\nhlt")
    assert board.peek32(order) == 0x3142


@isolated
def test_spurious_signal_without_interrupt() -> None:
    board = Board()
    _with_handler(board)
    board.intr = True  # by the time of the acknowledgement the 8259 has nothing any more
    board.engine.record.d[at.KICK // 4] = 1
    board.run("sti\nnop\nnop\ncli\nhlt")
    assert board.peek32(COUNTER) == 0


# ---- HLT


@isolated
def test_hlt_ends_with_an_interrupt() -> None:
    board = Board()
    _with_handler(board, f"mov ebx, [esp]\n{COUNT}")
    times = []

    def idle() -> None:
        times.append(1)
        if len(times) == 3:
            board.raise_interrupt(VECTOR)
        elif len(times) > 3:
            board.engine.stopping = True

    board.on_idle = idle
    board.run("sti\nhlt\nmov ecx, 7\ncli\nhlt")
    assert board.peek32(COUNTER) == 1
    assert board.regs[ECX] == 7
    assert board.regs[3] == CODE + 2
    assert len(times) == 4


@isolated
def test_hlt_with_interrupts_off_waits_for_ever() -> None:
    board = Board()
    _with_handler(board)
    count = []

    def idle() -> None:
        count.append(1)
        board.raise_interrupt(VECTOR)
        if len(count) == 5:
            board.engine.stopping = True

    board.on_idle = idle
    board.run("hlt\nmov ecx, 7\nhlt")
    assert len(count) == 5
    assert board.regs[ECX] == 0


@isolated
def test_nmi_wakes_and_is_blocked_until_iret() -> None:
    board = Board(with_apic=True)
    apic = board.engine.apic
    assert apic is not None
    apic.virtual_wire()
    body = f"{COUNT}\nmov eax, [{COUNTER:#x}]\nout 0x81, al\nnop\nnop\nmov eax, esp\nout 0x82, eax"
    _with_handler(board, body, 2)
    nested = []

    def port(number: int, value: int) -> None:
        if number == 0x81 and value == 1:
            nested.append(board.peek32(COUNTER))
            apic.accept(0, 4, 0xFF, False, False, True)  # another NMI inside the handler
            board.engine.record.d[at.KICK // 4] = 1

    board.on_port = port
    idles = []

    def idle() -> None:
        idles.append(1)
        if len(idles) == 1:
            apic.accept(0, 4, 0xFF, False, False, True)
        else:
            board.engine.stopping = True

    board.on_idle = idle
    board.run(f"hlt\nmov ecx, esp\nmov edx, [{COUNTER:#x}]\nhlt")
    assert nested == [1]
    assert board.peek32(COUNTER) == 2
    assert board.regs[ECX] == STACK
    esps = [value for _, port, _, value in board.ports if port == 0x82]
    assert esps == [STACK - 12, STACK - 12], "the second NMI was taken inside the first one's handler"


# ---- flags


@isolated
def test_pushfd_shows_neither_rf_nor_vm() -> None:
    """RF comes back with IRET, lasts for one instruction and is never pushed by PUSHFD [vol. 1 3.4.3]."""
    board = Board()
    board.run(f"{IRET_WITH.format(RF)}\nnop\npushfd\npop eax\npushfd\npop ebx\nhlt")
    assert not board.faults
    assert board.regs[EAX] & RF == 0
    assert board.regs[3] & RF == 0


@isolated
def test_rf_ends_after_one_instruction() -> None:
    """What a fault pushed and IRET restored must not be in the frame of the next interrupt."""
    board = Board()
    _with_handler(board, "mov ebx, [esp+8]")
    board.on_port = lambda port, value: board.raise_interrupt(VECTOR)
    board.run(f"{IRET_WITH.format(RF | IF)}\nnop\nnop\nout 0x80, al\nnop\ncli\nhlt")
    assert board.regs[3] & IF
    assert board.regs[3] & RF == 0


@pytest.mark.parametrize("iopl", [0, 3])
@isolated
def test_popfd_at_cpl_3(iopl: int) -> None:
    """IF changes only where CPL <= IOPL, IOPL never; TF would trap, so it stays clear here."""
    board = Board()
    board.paging()
    board.flat(3)
    board.cpu.eflags = 2 | iopl << 12
    board.run("push 0x204ad7\npopfd\npushfd\npop ebx\npush 0x2\npopfd\npushfd\npop ecx\nud2")
    expected = (0x204AD7 & ~(IF | IOPL)) | iopl << 12 | (IF if iopl == 3 else 0)
    assert board.regs[3] == expected
    assert board.regs[ECX] == 2 | iopl << 12
    assert board.fault.vector == UD


PRIVILEGED = (
    "cli", "sti", "hlt", "in al, dx", "out 0x80, al", "insb", "mov eax, cr0", "mov cr3, eax", "mov eax, dr7",
    "clts", "invlpg [eax]", "wbinvd", "lgdt [eax]", "rdmsr", "wrmsr", "ltr ax", "lmsw ax", "sysexit",
)  # fmt: skip


@pytest.mark.parametrize("text", PRIVILEGED)
@isolated
def test_privileged_instructions_at_cpl_3(text: str) -> None:
    board = Board()
    board.paging()
    board.flat(3)
    board.poke32(TSS + 0x64, 0xFFFF0000)  # no I/O permission map
    board.run(f"nop\n{text}\nud2")
    assert (board.fault.vector, board.fault.error, board.fault.eip) == (GP, 0, CODE + 1)


@isolated
def test_iopl_3_allows_what_it_should() -> None:
    board = Board()
    board.paging()
    board.flat(3)
    board.cpu.eflags = 2 | IOPL
    board.run("sti\nnop\npushfd\npop ebx\ncli\npushfd\npop ecx\nout 0x80, al\nud2")
    assert board.fault.vector == UD
    assert board.regs[3] & IF
    assert not board.regs[ECX] & IF
    assert board.ports == [("out", 0x80, 1, board.regs[EAX] & 0xFF)]


# ---- exceptions of translated code

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
    _with_handler(board, f"{COUNT}\nclts", NM)
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


# ---- software interrupts, privilege


@isolated
def test_int_n_and_iret_between_privileges() -> None:
    board = Board()
    board.paging()
    board.flat(3)
    board.gate(0x80, HANDLER, dpl=3, kind=TRAP_GATE32)
    board.load(f"mov ebx, esp\nmov ecx, [esp+12]\nadd eax, 5\n{IRET}", HANDLER)
    board.gate(UD, HANDLER + 0x800)
    board.load("mov edi, [esp+12]\nhlt", HANDLER + 0x800)
    board.run("mov eax, 1\nint 0x80\nint 0x80\nmov esi, esp\nud2")
    assert board.regs[EAX] == 11
    assert board.regs[3] == STACK - 20
    assert board.regs[ECX] == STACK3
    assert board.regs[6] == STACK3
    assert board.regs[7] == STACK3
    assert board.cpu.cpl == 0
    assert board.cpu.seg[SS].selector == DATA0


@isolated
def test_int_n_checks_the_gate_s_privilege() -> None:
    board = Board()
    board.paging()
    board.flat(3)
    board.gate(0x81, HANDLER)
    board.delivers = False
    board.run("int 0x81")
    assert (board.fault.vector, board.fault.error) == (GP, 0x81 << 3 | 2)
    board.faults.clear()
    board.delivers = False
    board.load("nop", HANDLER)
    board.run("int3")
    assert (board.fault.vector, board.fault.error) == (GP, 3 << 3 | 2)


@pytest.mark.parametrize(("text", "vector", "behind"), [
    ("int3", BP, 1), (".byte 0xce", OF, 1), (".byte 0xf1", 1, 1), ("int 0x50", 0x50, 2),
])
@isolated
def test_software_interrupts_push_the_next_instruction(text: str, vector: int, behind: int) -> None:
    board = Board()
    board.gate(vector, HANDLER)
    board.load("pop ebx\nhlt", HANDLER)
    board.run(f"mov al, 0x7f\nadd al, 1\n{text}\nhlt")
    assert board.regs[3] == CODE + 4 + behind


@isolated
def test_sysenter_and_sysexit() -> None:
    board = Board()
    board.paging()
    for selector, rights in ((0x50, 0xC09B), (0x58, 0xC093), (0x60, 0xC0FB), (0x68, 0xC0F3)):
        board.describe(selector, pack(0, 0xFFFFF, rights))
    board.load("inc ebx\nmov edx, ebp\nmov ecx, edi\nsysexit", HANDLER)
    board.load(f"mov edi, esp\nmov ebp, {CODE + 0x1010:#x}\nsysenter\nhlt", CODE + 0x1000)
    board.load("inc ebx\npush ebx\nud2", CODE + 0x1010)
    board.run(f"""
        xor edx, edx
        mov ecx, 0x174
        mov eax, 0x50
        wrmsr
        inc ecx
        mov eax, {STACK - 0x100:#x}
        wrmsr
        inc ecx
        mov eax, {HANDLER:#x}
        wrmsr
        xor ebx, ebx
        mov ecx, {STACK3:#x}
        mov edx, {CODE + 0x1000:#x}
        sysexit""")
    assert board.fault.vector == UD
    assert board.cpu.cpl == 3
    assert board.regs[3] == 2
    assert board.regs[ESP] == STACK3 - 4
    assert board.cpu.seg[CS].selector == 0x63
    assert board.cpu.seg[SS].selector == 0x6B


@isolated
def test_fault_in_user_code_and_back() -> None:
    """A page fault at CPL 3 is repaired by the handler; the instruction runs again."""
    board = Board()
    board.paging()
    pte_pa = board.map(0x4000_0000, 0x300000, 0)
    board.flat(3)
    board.gate(PF, HANDLER)
    repair = f"mov dword ptr [{pte_pa:#x}], {0x300000 | P | RW | US:#x}"
    board.load(f"mov eax, cr2\n{repair}\nadd esp, 4\n{IRET}", HANDLER)
    board.gate(UD, HANDLER + 0x100)
    board.load("hlt", HANDLER + 0x100)
    board.run("mov ecx, 3\nagain: inc dword ptr [0x40000010]\nloop again\nud2")
    assert [f.vector for f in board.faults] == [PF, UD]
    assert board.peek32(0x300010) == 3


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


# ---- start and reset


def _start(eip: int) -> dict[str, int]:
    names = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
    tables = {"gdt_base": GDT, "gdt_limit": 0xFFF, "cs": CODE0, "ds": DATA0}
    return {**dict.fromkeys(names, 0), **tables, "eip": eip, "esp": STACK}


@isolated
def test_start_gives_a_defined_state_whatever_was_before() -> None:
    """RESET at any point: memory was loaded anew, no old mapping, translation, flag or FPU state is left."""
    board = Board()
    engine = board.engine
    for round_ in range(3):
        look = "fld1\nfldz\nmov ebx, cr0\nmov ecx, cr3\npushfd\npop edx\nhlt"
        board.load(f"mov eax, {round_ + 1}\n{look}", CODE)
        board.ram[CODE : CODE + 5] = b"\xb8" + (round_ + 10).to_bytes(4, "little")  # behind the CPU's back
        engine.start(_start(CODE))
        board.resume()
        assert board.regs[EAX] == round_ + 10
        assert board.regs[3] & 0x8001_0001 == 1
        assert board.regs[ECX] == 0
        assert board.regs[2] == 2
        assert board.cpu.seg[FS].flat
        assert board.engine.record.b[at.FX + 4] == 0b11000000  # abridged tags: two pushed, not four
        # leave a mess: user mode, paging, TF-free flags, TS, breakpoints, a pending interrupt, halted
        board.paging()
        board.map(0x4000_0000, 0x300000)
        board.flat(3)
        board.cpu.eflags = 2 | IF | IOPL
        board.faults.clear()
        board.run("mov eax, [0x40000000]\nfld1\nud2")
        board.raise_interrupt(VECTOR)
        board.vectors.clear()
        board.intr = False
        board.cpu.dr[7] |= 1
        board.cpu.cr0 |= CR0_TS
        board.cpu.nmi_blocked = board.cpu.halted = board.cpu.inhibit_interrupts = True
        board.cpu.pending_debug = 1
        board._tables = 0
        board.ram[0x10000:0x20000] = bytes(0x10000)


@isolated
def test_reset_in_the_middle_of_a_run() -> None:
    """As the node does it: from poll(), inside the engine's loop."""
    board = Board()
    engine = board.engine
    board.paging()
    board.flat(3)
    board.load("mov esi, 5\nhlt", CODE + 0x2000)
    polls = []

    def poll() -> None:
        polls.append(1)
        if len(polls) == 2:
            engine.start(_start(CODE + 0x2000))

    board.on_poll = poll
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    board.run("here: jmp here")
    assert board.regs[6] == 5
    assert board.cpu.cpl == 0


# ---- interrupts at random moments

STORM = f"""
    mov ecx, 1000000
    mov esi, {DATA:#x}
    mov edi, {DATA + 0x800:#x}
    mov ebx, 0x12345
    fld1
top:
    push ebx
    push ecx
    call work
    pop ecx
    pop eax
    add edx, eax
    adc ebp, 0
    imul ebx, ebx, 1103515245
    add ebx, 12345
    mov eax, ebx
    shr eax, 22
    and eax, 0x3fc
    xor [esi+eax], ebx
    pushfd
    pop eax
    and eax, 0x8d5
    add edx, eax
    test ecx, 0xff
    jnz no
    push ecx
    push esi
    push edi
    mov ecx, 0x100
    rep movsb
    pop edi
    pop esi
    pop ecx
    stc
    pushfd
    popfd
    adc edx, 0
no:
    fadd st(0), st(0)
    fsqrt
    dec ecx
    jnz top
    cli
    hlt
work:
    push ebp
    mov ebp, esp
    sub esp, 16
    pushal
    mov eax, [ebp+8]
    rol eax, 3
    mov [ebp-4], eax
    popal
    xor ebx, [ebp-4]
    sti
    lea esp, [ebp-16]
    leave
    ret
"""


def _storm_state(board: Board) -> tuple[object, ...]:
    return (list(board.regs), board.cpu.eflags & 0xCD5, bytes(board.ram[DATA : DATA + 0x1000]),
            bytes(board.engine.record.b[at.FX + 32 : at.FX + 160]))


@pytest.mark.parametrize("where", ["kernel", "user", "mixed", "interpreted"])
@pytest.mark.parametrize("kind", ["signals", "interrupts"])
@isolated
def test_storm(kind: str, where: str) -> None:
    """SIGALRM at random moments; each brings an interrupt in the second form. The end must be the same."""
    seed = 3
    rounds = {"kernel": 1_000_000, "user": 1_000_000, "mixed": 150_000, "interpreted": 300}[where]
    program = STORM.replace("mov ecx, 1000000", f"mov ecx, {rounds}")

    if where == "user":
        program = program.replace("    cli\n    hlt\n", "    ud2\n").replace("    sti\n", "")

    def fresh() -> Board:
        board.ram[DATA : DATA + 0x1000] = bytes(n * 7 & 0xFF for n in range(0x1000))
        board.poke32(COUNTER, 0)
        board.engine.record.reset_fpu()
        board.flat_segments(3 if where == "user" else 0)
        if where == "interpreted":
            board.segment(DS, build(DATA0, 0, 0xFFFFFFF, 0xC093))
        board.regs[:4] = [0, 0, 0, 0]
        board.regs[5:8] = [0, 0, 0]
        board.cpu.eflags = 2 | (IF if where == "user" else 0)
        return board

    board = Board()
    if where == "user":
        board.paging()
        board.gate(UD, HANDLER + 0x800)
        board.load("cli\nhlt", HANDLER + 0x800)
    if where == "mixed":
        board.engine.contexts.code.mixed.add(CODE >> 12)
    body = f"pushal\n{COUNT}\nmov eax, -1\nadd eax, 2\nxor ebx, ebx\nxor ebp, ebp\npopal"
    _with_handler(board, body)
    fresh().run(program)
    assert board.cpu.halted
    expected = _storm_state(board)
    moments = random.Random(seed)
    signals = [0]

    def poll() -> None:
        signals[0] += 1
        if kind == "interrupts" and not board.vectors:
            board.vectors.append(VECTOR)
            board.intr = True
        signal.setitimer(signal.ITIMER_REAL, moments.uniform(20e-6, 400e-6))

    fresh()
    board.on_poll = poll
    signal.setitimer(signal.ITIMER_REAL, 0.0001)
    board.run(None)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert _storm_state(board) == expected
    assert signals[0] > 20
    if kind == "interrupts":
        assert board.peek32(COUNTER) > 20



# ---- alignment checking

MISALIGNED = {
    "mov eax, [esi+1]": True, "mov eax, [esi+2]": True, "mov eax, [esi+4]": False, "mov ax, [esi+1]": True,
    "mov al, [esi+1]": False, "mov [esi+3], eax": True, "inc dword ptr [esi+2]": True,
    "add esp, 2\npush eax": True,
    "add esp, 2\npop eax": True, "add esp, 2\ncall next\nnext: nop": True, "fld qword ptr [esi+4]": True,
    "fld tbyte ptr [esi+8]": False, "movsd xmm0, [esi+4]": True, "movups xmm0, [esi+4]": False,
    "movzx eax, byte ptr [esi+3]": False, "inc esi\nlodsd": True, "lodsb\nlodsb\nlodsb": False,
    "lea eax, [esi+1]": False, "fnstenv [esi+2]": True, "bt [esi+1], eax": True,
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
