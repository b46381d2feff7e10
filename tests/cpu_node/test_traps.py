"""Single steps and interrupt shadows where they meet other instructions; each was wrong once.

Source: Intel SDM vol. 3A 6.8.1 (STI), 6.12.1.3, 17.3.1.4 (single-step).
"""

from __future__ import annotations

from cpu_node.descriptor import TRAP_GATE32
from cpu_node.errors import DB, TS, UD
from tests.cpu_node.board import CODE, COUNTER, HANDLER, IRET, RW, STACK, TSS, A, Board, P
from tests.cpu_node.child import isolated


@isolated
def test_into_that_does_nothing_is_stepped() -> None:
    """INTO with OF clear is an instruction like any other: the trap comes behind it."""
    board = Board()
    board.gate(DB, HANDLER, kind=TRAP_GATE32)
    board.load(f"mov eax, [esp]\nmov [{COUNTER} + edi*4], eax\ninc edi\n{IRET}", HANDLER)
    board.run(
        "pushfd\nor dword ptr [esp], 0x100\npopfd\n.byte 0xce\nnop\n"
        "pushfd\nand dword ptr [esp], ~0x100\npopfd\nhlt"
    )
    steps = [board.peek32(COUNTER + 4 * i) - CODE for i in range(board.regs[7])]
    first = steps.index(10)  # behind INTO
    assert steps[first : first + 2] == [10, 11]


@isolated
def test_iret_to_behind_sti_has_no_shadow() -> None:
    """A second interrupt is taken at once when IRET sets IF, also where a STI stands before EIP."""
    board = Board()
    board.gate(0x40, HANDLER)
    board.gate(0x41, HANDLER + 0x100)
    board.load(f"mov ebx, [esp]\n{IRET}", HANDLER)
    board.load(f"mov edx, [esp]\nmov ebp, esi\n{IRET}", HANDLER + 0x100)
    board.raise_interrupt(0x40)
    board.raise_interrupt(0x41)
    board.run("xor esi, esi\nnop\nsti\nsti\ninc esi\ninc esi\ncli\nhlt")
    assert board.regs[3] == board.regs[2] == CODE + 5
    assert board.regs[5] == 0


@isolated
def test_int_n_at_cpl_3_takes_the_vector_it_names() -> None:
    """Each INT n through its own gate, also when another vector came before at CPL 3 and was learned."""
    board = Board()
    board.paging()
    for vector in (0x50, 0x51, 0x52):
        board.handler(f"add dword ptr [{COUNTER} + {4 * (vector - 0x50)}], 1", vector, dpl=3)
    board.gate(UD, HANDLER)
    board.load("hlt", HANDLER)
    board.flat(3)
    board.run("mov esi, 5\nagain: int 0x50\nint 0x51\nint 0x51\nint 0x52\ndec esi\njnz again\nud2")
    assert [board.peek32(COUNTER + 4 * i) for i in range(3)] == [5, 10, 5]


@isolated
def test_iret_of_a_nested_task_reads_no_stack() -> None:
    """IRET with NT goes by the back link: nothing of the stack is looked at, and no A bit set."""
    board = Board()
    board.gate(TS, HANDLER)
    board.load("hlt", HANDLER)
    board.paging()
    board.poke32(TSS, 0)
    empty = board.map(STACK, STACK, P | RW)
    board.flush()
    board.run(f"mov esp, {STACK}\npushfd\nor dword ptr [esp], 0x4000\npopfd\n{IRET}")
    assert board.faults[-1].vector == TS
    assert not board.peek32(empty) & A
