"""The engine's main loop: interrupts and what holds them off, HLT, RF, start and reset.

Source: Intel SDM vol. 3A 6.8 (interrupts enabled and disabled, shadows of STI and of loads of SS), 6.14;
vol. 2 pages of STI, POPF, IRET, HLT.
"""

from __future__ import annotations

import signal

import pytest

from cpu_node import layout as at
from cpu_node.cpu import CR0_TS, EAX, ECX
from cpu_node.descriptor import FS
from cpu_node.flags import IF, IOPL, RF
from tests.cpu_node.board import (
    CODE,
    CODE0,
    COUNT,
    COUNTER,
    DATA0,
    GDT,
    IRET_WITH,
    STACK,
    VECTOR,
    Board,
)
from tests.cpu_node.child import isolated
from tests.cpu_node.stopper import Stopper, host_instructions

# ---- interrupts and their shadows


@isolated
def test_interrupt_is_taken_where_interrupts_are_on() -> None:
    board = Board()
    board.handler()
    board.raise_interrupt(VECTOR)
    board.run("nop\nsti\nnop\nnop\ncli\nhlt")
    assert board.peek32(COUNTER) == 1
    assert board.vectors == []


@isolated
def test_interrupt_waits_while_interrupts_are_off() -> None:
    board = Board()
    board.handler()
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
    board.handler()
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
    board.handler()
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
    board.handler("mov ebx, [esp]\n" + COUNT)
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
    board.handler(f"{COUNT}\nadd dword ptr [esp], 2")
    board.raise_interrupt(VECTOR)
    board.run("sti\nhere: jmp here\nnop\ncli\nhlt")
    assert board.peek32(COUNTER) == 1


@isolated
def test_sti_with_interrupts_on_has_no_shadow() -> None:
    board = Board()
    board.handler()
    board.on_port = lambda port, value: board.raise_interrupt(VECTOR)
    board.run("sti\nnop\nout 0x80, al\nsti\nhlt\ncli\nhlt")
    assert board.peek32(COUNTER) == 1


@pytest.mark.parametrize("load", ["mov ss, ax", "push eax\npop ss"])
@isolated
def test_load_of_ss_holds_interrupts_for_one_instruction(load: str) -> None:
    """MOV SS; MOV ESP: no interrupt may see the new SS with the old ESP [6.8.3]."""
    board = Board()
    board.handler(f"lea ebx, [esp+12]\nmov edx, [esp]\n{COUNT}")
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
    board.handler(f"lea ebx, [esp+12]\n{COUNT}")
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
        board.handler(body, VECTOR + n)
    for n in (2, 0, 3, 1):
        board.raise_interrupt(VECTOR + n)
    board.run("sti\nnop\nnop\nnop\ncli\nhlt")
    assert board.peek32(order) == 0x3142


@isolated
def test_spurious_signal_without_interrupt() -> None:
    board = Board()
    board.handler()
    board.intr = True  # by the time of the acknowledgement the 8259 has nothing any more
    board.engine.record.d[at.KICK // 4] = 1
    board.run("sti\nnop\nnop\ncli\nhlt")
    assert board.peek32(COUNTER) == 0


# ---- HLT


@isolated
def test_hlt_ends_with_an_interrupt() -> None:
    board = Board()
    board.handler(f"mov ebx, [esp]\n{COUNT}")
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
    board.handler()
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
    board.handler(body, 2)
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
    board.handler("mov ebx, [esp+8]")
    board.on_port = lambda port, value: board.raise_interrupt(VECTOR)
    board.run(f"{IRET_WITH.format(RF | IF)}\nnop\nnop\nout 0x80, al\nnop\ncli\nhlt")
    assert board.regs[3] & IF
    assert board.regs[3] & RF == 0


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
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    board.run("here: jmp here")
    assert board.regs[6] == 5
    assert board.cpu.cpl == 0
