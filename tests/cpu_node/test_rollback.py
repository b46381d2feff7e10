"""Every host instruction of every template, stopped at and rolled back: the guest must not notice.

A breakpoint goes into the host code where a signal could have stopped it; then what a signal does is done,
the stack below ESP is overwritten as an interrupt handler would, and the program goes on. The state rolled
back to must be one that the program has between two instructions (the simulator, stepping, says which those
are), and the end must be that of an undisturbed run.
"""

from __future__ import annotations

import pytest

from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node.cpu import ESP
from cpu_node.descriptor import FS, GS, build
from cpu_node.errors import UD, GuestFault
from cpu_node.flags import RF
from tests.cpu_node.board import CODE, DATA, STACK, STACK3, Board, asm
from tests.cpu_node.child import isolated
from tests.cpu_node.stopper import Stopper, host_instructions

# Keystone takes `pushf` and `push ds` for 16-bit ones, and knows no `rep movsd`.
SHAPES = {
    "copy": "mov eax, [esi]\nadd [esi+4], eax\n"
            "lock inc dword ptr [esi]\nxchg bl, [esi+ebx]\nshl eax, cl\nbswap eax",
    "high bytes": "mov ah, [esi]\nxchg [esi+1], bh\nadd dh, [esi+2]\nmov [esi+3], ch\nsub [esi], ah",
    "aligned": "movaps xmm0, [esi]\naddps xmm0, [esi+16]\nmovaps [esi+32], xmm0\nmovups xmm1, [esi+3]",
    "push": "push eax\npush esp\npush 0x12345678\npush 5\npush -5\n"
            "push dword ptr [esi]\npush dword ptr [esp+4]",
    "push overlapping": "push dword ptr [esp-2]\npush dword ptr [esp-3]\npush dword ptr [esp-4]",
    "pop": "push eax\npush ebx\npush ecx\npush esi\npop ebp\npop dword ptr [esi+8]\npop edx\npop edx",
    "pop overlapping": "push ebx\npush ecx\nmov ebp, esp\npop dword ptr [ebp+2]\npop eax",
    "pop esp": "lea ebp, [esp+4]\npush ebp\npop esp\npush 7",
    "pop through esp": "push ecx\npush ebx\npop dword ptr [esp+4]\npop eax",
    "pop through ecx": "push ebx\npush ebx\npop dword ptr [esi+ecx]\nmov ecx, esi\npop dword ptr [ecx]",
    "pusha popa": "pushal\nadd dword ptr [esp+4], 3\npopal",
    "pushf popf": "stc\npushfd\nxor dword ptr [esp], 0x8d5\npopfd\npushfd\npop eax\ncmc\npushfd",
    "popf direction": "pushfd\nor dword ptr [esp], 0x400\npopfd\nlodsb\ncld",
    "popf simulated": "pushfd\nor dword ptr [esp], 0x200000\npopfd\npushfd\npushfd\npopfd",
    "cli sti": "cli\nnop\nsti\nnop\nsti\npushfd\ncli\npushfd\npopfd",
    "leave": "push ebp\nmov ebp, esp\nsub esp, 12\nmov [ebp-4], eax\nleave\npush ebp",
    "call ret": "call one\njmp over\none: call two\nret\ntwo: push eax\nadd esp, 4\nret\nover: push 7\n"
                "push 9\ncall three\njmp end\nthree: ret 8\nend: nop",
    "indirect": "mov ebx, target\ncall ebx\nmov [esi], ebx\ncall dword ptr [esi]\nmov ebx, over\njmp ebx\n"
                "target: ret\nint3\nover: mov ebx, end\nmov [esi+4], ebx\njmp dword ptr [esi+4]\nint3\n"
                "end: push ebx\nnop",
    "jcc": "cmp eax, ebx\njz one\n"
           "jnz two\nint3\ntwo: jmp one\nint3\none: js three\nthree: jns four\nfour: nop",
    "loop": "mov ecx, 3\none: inc eax\nloop one\ntwo: inc ebx\ncmp ebx, 0x13\nloopne two\nmov ecx, 0\n"
            "jecxz three\nint3\nthree: mov ecx, 1\njecxz four\nloope four\nfour: nop",
    "strings": "mov edi, 0x200100\nmov ecx, 5\nrep movsb\nstosd\nlodsd\nmovsw\nscasb\n.byte 0xa7\n"
               "mov ecx, 9\nrepne scasb\nmov ecx, 4\nrepe cmpsb\nmov ecx, 3\n"
               "rep stosd\nstd\nlodsw\nmov ecx, 2\n.byte 0xf3, 0xa5\ncld",
    "segment registers": ".byte 0x1e\n.byte 0x0f, 0xa0\nmov eax, ds\nmov ax, cs\n"
                         "mov [esi], ss\npop eax\npop eax",
    "segment loads": ".byte 0x1e\nmov ecx, ds\n.byte 0x1f\nmov es, ecx\nmov [esi], ss\nmov es, [esi]\n"
                     "mov ebx, cr0\nmov edx, cr2\ninvlpg [esi+0x400000]\npush eax",
    "iret": "pushfd\n.byte 0x0e\ncall next\nnext: add dword ptr [esp], 5\n.byte 0xcf\npush eax",
    "fs": "mov eax, fs:[8]\nadd fs:[esi-0x200000+4], eax\npush dword ptr fs:[16]\nmov fs:[ebx+ecx*4], cl\n"
          "mov byte ptr gs:[4], 0x55\nmov eax, fs:[0]\nmov gs:[0], eax\nlea edx, [ebx+ecx]",
    "fs jump": "mov ebx, over\nmov fs:[12], ebx\njmp dword ptr fs:[12]\nint3\nover: nop",
    "fs call": "mov ebx, over\nmov fs:[12], ebx\ncall dword ptr fs:[12]\nnop\nover: pop eax\npush ebx",
    "xlat": "mov ebx, esi\nmov al, 7\nxlatb",
    "moffs": "mov eax, [0x200010]\nmov [0x200014], al\nmov ax, [0x200018]\nmov ds:[0x20001c], eax",
    "simulated": "daa\nmov eax, cr0\ncpuid\naam\nmov ecx, 4\nmov dx, 0x80\nout dx, al",
    "maskmov": "movdqu xmm0, [esi]\nmovdqu xmm1, [esi+16]\nmov edi, 0x200100\nmaskmovdqu xmm0, xmm1",
    "x87": "fld dword ptr [esi]\n"
           "fild dword ptr [esi+4]\nfaddp st(1)\nfstp qword ptr [esi+8]\nfnstsw ax\nmovd xmm3, eax",
    "lea": "lea eax, [ebx+ecx*4+5]\nlea ax, [ebx+2]\nlea edi, [esp+ebp]",
    "bits": "bt [esi], eax\nbts [esi], ecx\nlock btc [esi], ebx",
    "nop": "nop dword ptr [eax]\nprefetcht0 [eax]\nnop",
    "backward jump": "jmp one\ntwo: inc eax\njmp over\none: inc ebx\njmp two\nover: nop",
}
KERNEL_ONLY = ("cli sti", "simulated", "segment loads", "iret")
CROSSING = b"\x90" * 13 + asm("mov eax, 0x12345678\npush eax\ninc ebx\nud2", 0)  # at CODE + 4096 - 16


def _prepare(board: Board, start: int) -> None:
    """The state a program starts from."""
    board.ram[DATA : DATA + 0x1000] = bytes((7 * n + 3) & 0xFF for n in range(0x1000))
    board.ram[STACK - 0x200 : STACK + 16] = bytes((5 * n + 1) & 0xFF for n in range(0x210))
    board.ram[STACK3 - 0x200 : STACK3 + 16] = bytes((5 * n + 1) & 0xFF for n in range(0x210))
    board.regs[:] = [0x04030201, 3, 0x80, 0x10, STACK3 if board.cpu.cpl else STACK, 0x77, DATA, DATA + 0x80]
    board.cpu.eflags = 2
    board.engine.record.reset_fpu()
    board.engine.contexts.table.clear()
    board.engine.contexts.tlb.flush()
    board.cpu.halted = False
    board.faults.clear()
    board.cpu.eip = start


def _state(board: Board) -> tuple[object, ...]:
    esp = board.regs[ESP]
    record = board.engine.record
    # what lies below ESP counts for nothing
    return (
        board.cpu.eip, tuple(board.regs), board.cpu.eflags & ~RF,
        bytes(record.b[at.FX + 32 : at.FX + 288]), bytes(board.ram[DATA : DATA + 0x1000]),
        bytes(board.ram[esp : max(STACK, STACK3) + 16]),
    )  # fmt: skip


def _trace(board: Board, start: int) -> set[tuple[object, ...]]:
    """(EIP, registers, IF) at every instruction boundary, by the simulator."""
    _prepare(board, start)
    seen = set()
    while not board.faults:
        assert len(seen) < 1000, "the program doesn't end"
        seen.add(_boundary(board))
        try:
            board.engine.simulator.step()
        except GuestFault as fault:
            board.engine.fault(fault)
    assert board.fault.vector == UD
    board.cpu.inhibit_interrupts = False
    return seen


def _boundary(board: Board) -> tuple[object, ...]:
    return f"{board.cpu.eip:x}", tuple(f"{r:x}" for r in board.regs), f"{board.cpu.eflags & 0x600:x}"


READS_BELOW_ESP = {"push overlapping"}
# POPA loads its registers one by one, POPF has the flags before ESP: both are done again from their start.
IMPRECISE = {"pusha popa", "popf direction"}


def _check_everywhere(board: Board, name: str, start: int) -> None:
    allowed = _trace(board, start)
    _prepare(board, start)
    board.resume()
    assert board.translated
    assert board.fault.vector == UD
    expected = _state(board)
    rolled_back: list[tuple[object, ...]] = []

    def look() -> None:
        rolled_back.append(_boundary(board))
        esp = board.regs[ESP]
        assert esp < 1 << 32
        if name not in READS_BELOW_ESP:
            board.ram[esp - 64 : esp] = bytes(range(0xC0, 0x100))

    stopper = Stopper(board, look)
    for offset in list(host_instructions(board)):
        _prepare(board, start)
        stopper.arm(offset)
        board.resume()
        stopper.disarm()
        where = f"{name}: host offset {offset:#x}, rolled back to {rolled_back[-1:]}"
        assert _state(board) == expected, where
        if stopper.stopped:
            assert name in IMPRECISE or rolled_back[-1] in allowed, where
    assert rolled_back


def _board(verify: bool, cpl: int, soft: bool = False) -> Board:
    board = Board()
    board.engine.contexts.soft = soft
    if cpl == 3:
        board.paging()
        board.flat(3)
    for index, base in ((FS, 0x200040), (GS, 0x200080)):
        board.segment(index, build(0x10 | cpl, base, 0xFFFFFFFF, 0xC0F3 if cpl else 0xC093))
    if verify:
        board.engine.contexts.code.mixed |= {CODE >> 12, (CODE >> 12) + 1}
    return board


@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verify"])
@pytest.mark.parametrize("name", SHAPES)
@isolated
def test_kernel(name: str, verify: bool) -> None:
    board = _board(verify, 0)
    board.load(SHAPES[name] + "\nud2")
    _check_everywhere(board, name, CODE)


@pytest.mark.parametrize("soft", [False, True], ids=["window", "soft"])
@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verify"])
@pytest.mark.parametrize("name", [n for n in SHAPES if n not in KERNEL_ONLY])
@isolated
def test_user(name: str, verify: bool, soft: bool) -> None:
    board = _board(verify, 3, soft)
    board.load(SHAPES[name] + "\nud2")
    _check_everywhere(board, name, CODE)
    assert bool(board.engine.mode & modes.SOFT) == soft


@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verify"])
@isolated
def test_crossing(verify: bool) -> None:
    board = _board(verify, 0)
    start = CODE + 4096 - 16
    board.load(CROSSING, start)
    _check_everywhere(board, "crossing", start)
