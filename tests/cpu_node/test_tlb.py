"""The software TLB: user code ends as it does with a window, and what a TLB must forget it forgets.

Pages that are neighbours in linear memory are shuffled in physical memory here, so that whatever crosses a
page border is in two pieces.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node.cpu import EAX, EBX, ECX, EDI, ESI
from cpu_node.errors import PF, UD
from cpu_node.layout import EXIT_ASSIST, EXIT_SIGNAL, EXIT_SIMULATE, EXIT_TLB
from tests.cpu_node.board import CODE, CODE3, COUNTER, DATA, DIRECTORY, MMIO, RW, US, Board, P
from tests.cpu_node.child import isolated

PAGES = 16  # from DATA on, shuffled
SHADOW = 0x300000  # where the pages of DATA lie
STRIDE = 7  # coprime to PAGES
READ_ONLY = 0x420000
ABSENT = READ_ONLY + 0x80000
OTHER_DIRECTORY = 0xE000
A, D = 0x20, 0x40
END = "\nud2"


def shuffled(va: int) -> int:
    """Physical address of `va` in DATA's pages."""
    page = (va - DATA >> 12) * STRIDE % PAGES
    return SHADOW + (page << 12) + (va & 0xFFF)


def user(soft: bool) -> Board:
    """CPL 3 with paging; #UD ends a program."""
    board = Board()
    board.paging()
    for n in range(PAGES):
        board.map(DATA + (n << 12), shuffled(DATA + (n << 12)))
    board.map(READ_ONLY, READ_ONLY, P | US)
    board.map(ABSENT, 0, 0)
    board.map(MMIO, MMIO)
    board.flat_segments(3)
    board.handler("hlt", UD)
    board.flush()
    board.engine.contexts.space.soft = soft
    board.engine.mode_changed()
    return board


def fill(board: Board) -> None:
    for n in range(PAGES << 10):
        va = DATA + 4 * n
        board.poke32(shuffled(va), n * 0x9E3779B1 >> 7 & 0x7F7F7F7F)


def both(text: str, prepare: Callable[[Board], None] = fill) -> Board:
    """The same with a window and with the TLB; returns the board that used the TLB."""
    ends = []
    for soft in (False, True):
        board = user(soft)
        prepare(board)
        board.run(text + END)
        image = bytes(board.ram[SHADOW : SHADOW + (PAGES << 12)])
        flags = board.peek32(board.regs[4] + 8) & 0xCD5  # what #UD pushed
        ends.append((list(board.regs), flags, image, board.faults))
    assert ends[0] == ends[1]
    return board


OPERANDS = {  # ESI, EDI
    "apart": (DATA + 0x100, DATA + 0x2200),
    "over page borders": (DATA + 0x0F80, DATA + 0x4FA0),
    "elements over page borders": (DATA + 0x0F83, DATA + 0x4FA1),
    "backwards over page borders": (DATA + 0x1080, DATA + 0x5061),
    "elements backwards over page borders": (DATA + 0x1081, DATA + 0x5063),
    "overlapping": (DATA + 0x1FF1, DATA + 0x1FF5),
}


@pytest.mark.parametrize("where", OPERANDS)
@pytest.mark.parametrize("flag", ["cld", "std"])
@isolated
def test_strings(where: str, flag: str) -> None:
    source, target = OPERANDS[where]
    text = []
    for opcode, compares in ((0xA4, False), (0xAA, False), (0xAC, False), (0xA6, True), (0xAE, True)):
        for size in (1, 2, 4):
            op = f".byte {'0x66, ' if size == 2 else ''}{opcode + (size > 1):#x}"
            for prefix in ("", ".byte 0xf3", ".byte 0xf2") if compares else ("", ".byte 0xf3"):
                for count in (0, 1, 300 // size):
                    text.append(f"mov esi, {source}\nmov edi, {target}\nmov ecx, {count}\ncmp ecx, 5\n"
                                f"{flag}\n{prefix}\n{op}\nlahf\nadd ebx, eax\nrol ebx, 3\n"
                                "add ebx, esi\nadd ebx, edi\nadd ebx, ecx")
    board = both("\n".join(text))
    assert board.engine.record.q[at.TLB_FILLS // 8] > 0
    assert board.exits(EXIT_SIMULATE) < 5


@isolated
def test_equal_strings_are_compared_to_their_end() -> None:
    def alike(board: Board) -> None:
        for n in range(0x3000):
            board.ram[shuffled(DATA + n)] = board.ram[shuffled(DATA + 0x5003 + n)] = n & 0x7F

    text = f"cld\nmov esi, {DATA}\nmov edi, {DATA + 0x5003}\nmov ecx, 0x2800\n.byte 0xf3, 0xa6\nsete bl"
    board = both(text, alike)
    assert (board.regs[ECX], board.regs[EBX] & 0xFF) == (0, 1)


@isolated
def test_a_big_move_is_interrupted() -> None:
    """KICK is looked at between pages; what is done stays done."""
    board = user(True)
    fill(board)
    kicks = []

    def kick() -> None:
        kicks.append(board.regs[ECX])
        if len(kicks) < 5:
            board.engine.record.d[at.KICK // 4] = 1

    board.on_poll = kick
    text = f"cld\nmov esi, {DATA}\nmov edi, {DATA + 0x8000}\nmov ecx, 0x1c00\n.byte 0xf3, 0xa5"
    board.run(text + END)
    assert board.regs[ECX] == 0
    for n in range(0, 0x7000, 64):
        assert board.ram[shuffled(DATA + n)] == board.ram[shuffled(DATA + 0x8000 + n)]
    assert len(kicks) >= 5


ACCESSES = {
    "read": "mov eax, [{0}]\nadd ebx, eax",
    "write": "mov [{0}], esp",
    "read and write": "add dword ptr [{0}], 0x12345",
    "byte": "inc byte ptr [{0}]",
    "sse": "movdqu xmm0, [{0}]\npaddd xmm0, xmm0\nmovdqu [{0}], xmm0",
    "x87": "fld tbyte ptr [{0}]\nfstp tbyte ptr [{0}+32]",
    "locked": "lock xadd [{0}], ecx",
    "stack": ("mov edx, esp\nlea esp, [{0}]\npush 7\npush dword ptr [{0}+4]\npop dword ptr [{0}+12]\npopfd\n"
              "mov esp, edx"),
}


@pytest.mark.parametrize("name", ACCESSES)
@isolated
def test_accesses_across_pages(name: str) -> None:
    both("\n".join(ACCESSES[name].format(hex(DATA + 0x1FE0 + n)) for n in range(64)))


@isolated
def test_accessed_and_dirty() -> None:
    board = user(True)
    entries = DIRECTORY, *(board.map(DATA + (n << 12), shuffled(DATA + (n << 12))) for n in range(3))
    board.poke32(entries[0], board.peek32(entries[0]) & ~(A | D))
    board.flush()
    board.run(f"mov eax, [{DATA:#x}]\nmov [{DATA + 0x1000:#x}], eax" + END)
    assert [board.peek32(e) & (A | D) for e in entries] == [A, A, A | D, 0]
    board.flat_segments(3)
    board.run(f"mov [{DATA:#x}], eax" + END)
    assert board.peek32(entries[1]) & (A | D) == A | D


def counting(board: Board) -> None:
    """#PF counts, makes the page present and writable, and returns."""
    entries = board.map(READ_ONLY, READ_ONLY, P | US)
    board.handler(f"""
        push eax
        push ebx
        inc dword ptr [{COUNTER}]
        mov eax, [esp+8]
        mov ebx, [{COUNTER}]
        mov [{COUNTER}+ebx*8], eax
        mov eax, cr2
        mov [{COUNTER}+ebx*8+4], eax
        and eax, 0xfffff000
        or eax, 7
        mov ebx, eax
        shr ebx, 12
        mov [{entries - 4 * (READ_ONLY >> 12 & 0x3FF):#x}+ebx*4-{(READ_ONLY >> 22 << 12):#x}], eax
        invlpg [eax]
        pop ebx
        pop eax
        add esp, 4""", PF)


@isolated
def test_page_faults() -> None:
    """Error code, CR2 and EIP; the second time a probe faults its handler is entered without Python."""
    first, rounds = READ_ONLY + 0x10, 40
    board = user(True)
    counting(board)
    board.map(READ_ONLY, READ_ONLY, P | US)
    for n in range(1, rounds):
        board.map(READ_ONLY + (n << 12), 0, 0)
    board.flush()
    text = f"mov eax, {first}\nmov ecx, {rounds}\nagain: mov [eax], ecx\nadd eax, 0x1000\nloop again"
    board.run(text + END)
    assert board.peek32(COUNTER) == rounds
    seen = [(board.peek32(COUNTER + 8 * n), board.peek32(COUNTER + 8 * n + 4)) for n in range(1, rounds + 1)]
    assert seen == [(7, first)] + [(6, first + (n << 12)) for n in range(1, rounds)]
    assert [board.peek32(first + (n << 12)) for n in range(rounds)] == list(range(rounds, 0, -1))
    assert len([f for f in board.faults if f.vector == PF]) <= 2  # those that Python delivered
    assert board.exits(EXIT_TLB) <= 3
    assert board.engine.record.q[at.PAGE_FAULTS // 8] == rounds


@isolated
def test_the_frame_of_a_page_fault() -> None:
    board = user(True)
    board.handler(f"""
        inc dword ptr [{COUNTER}]
        mov eax, [{COUNTER}]
        pop dword ptr [{COUNTER}+eax*4]
        mov ebx, [esp]
        mov [{COUNTER}+0x100+eax*4], ebx
        mov ebx, [esp+4]
        mov [{COUNTER}+0x200+eax*4], ebx
        mov ebx, [esp+8]
        mov [{COUNTER}+0x300+eax*4], ebx
        mov ebx, [esp+12]
        mov [{COUNTER}+0x400+eax*4], ebx
        add dword ptr [esp], 6""", PF)
    fault = f".byte 0x8b, 0x0d\n.long {ABSENT + 0xFFF:#x}"  # 6 bytes: mov ecx, [...]
    board.run(f"mov edi, 3\nmov esp, {DATA + 0x800}\ncmp edi, edi\nagain:\n{fault}\ndec edi\njnz again" + END)
    rows = [[board.peek32(COUNTER + base + 4 * n) for n in (1, 2, 3)] for base in range(0, 0x500, 0x100)]
    eip = CODE + 12
    assert rows[0] == [4, 4, 4]
    assert rows[1] == [eip] * 3
    assert rows[2] == [CODE3] * 3
    assert [flags & 0x10FD5 for flags in rows[3]] == [0x10044, 0x10000, 0x10000]  # RF; ZF PF of CMP, of DEC
    assert rows[4] == [DATA + 0x800] * 3
    assert board.cpu.cr2 == ABSENT + 0xFFF


@pytest.mark.parametrize("size", [2, 4])
@isolated
def test_a_source_that_reaches_into_an_absent_page_faults_before_its_target(size: int) -> None:
    """Though the TLB knows the source's first page, and nothing of the target's."""
    source, border = ABSENT - size + 1, ABSENT
    text = (f"cld\nmov eax, [{ABSENT - 0x800}]\nmov ecx, 5\nmov esi, {source}\nmov edi, {border + 5}\n"
            f".byte 0xf3, {'0x66, ' if size == 2 else ''}0xa5")
    faults = []
    for soft in (False, True):
        board = user(soft)
        board.delivers = False
        board.run(text + END)
        (fault,) = board.faults
        faults.append(fault)
    assert faults[0] == faults[1]
    assert (faults[1].vector, faults[1].error, faults[1].cr2) == (PF, 4, border)


@isolated
def test_invlpg_and_cr3_forget() -> None:
    board = user(True)
    board.handler(f"mov dword ptr [{board.map(DATA, shuffled(DATA))}], {SHADOW + 0x5000 | 7}\n"
                  f"invlpg [{DATA}]", 0x80, dpl=3)
    board.handler("mov eax, cr3\nmov cr3, eax", 0x81, dpl=3)
    board.poke32(SHADOW + 0x5000, 0x1111)
    board.poke32(shuffled(DATA), 0x2222)
    board.flush()
    board.engine.contexts.space.soft = True
    board.engine.mode_changed()
    board.run(f"mov esi, [{DATA}]\nint 0x80\nmov edi, [{DATA}]\nint 0x81\nmov ebx, [{DATA}]" + END)
    assert (board.regs[ESI], board.regs[EDI], board.regs[EBX]) == (0x2222, 0x1111, 0x1111)
    board.poke32(board.map(DATA, shuffled(DATA)), shuffled(DATA) | 7)
    board.flat_segments(3)
    board.run(f"mov esi, [{DATA}]\nint 0x81\nmov edi, [{DATA}]" + END)
    assert (board.regs[ESI], board.regs[EDI]) == (0x1111, 0x2222)


@isolated
def test_code_that_is_written_is_translated_anew() -> None:
    """The writer has an entry for writing when the page gets its first translation."""
    board = user(True)
    target = DATA + 0x3000
    text = f"""
        mov ecx, 20
    again:
        mov byte ptr [{target}], 0xb8
        mov [{target + 1}], ecx
        mov byte ptr [{target + 5}], 0xc3
        mov eax, {target}
        call eax
        add ebx, eax
        loop again"""
    board.run(text + END)
    assert board.regs[EBX] == sum(range(1, 21))


@isolated
def test_devices_are_devices() -> None:
    board = user(True)
    board.run(f"mov dword ptr [{MMIO:#x}], 0x55\nmov eax, [{MMIO + 4:#x}]\nadd byte ptr [{MMIO:#x}], 1" + END)
    assert board.regs[EAX] == 0xFFFFFFFF
    assert board.mmio == [("w", MMIO, 4, 0x55), ("r", MMIO + 4, 4, 0xFFFFFFFF), ("r", MMIO, 1, 0x55),
                          ("w", MMIO, 1, 0x56)]


@isolated
def test_supervisor_pages_are_not_the_user_s() -> None:
    board = user(True)
    board.map(DATA, shuffled(DATA), P | RW)
    board.flush()
    board.delivers = False
    board.run(f"mov eax, [{DATA}]" + END)
    assert (board.fault.vector, board.fault.error, board.fault.cr2) == (PF, 5, DATA)


@isolated
def test_the_kernel_stack_may_be_absent_in_its_window() -> None:
    """The first #PF that is entered without Python may find nothing mapped where it pushes."""
    board = user(True)
    counting(board)
    board.run(f"mov [{ABSENT}], eax\nud2")
    board.faults.clear()
    board.map(ABSENT, 0, 0)
    board.engine.contexts.invlpg(ABSENT)
    for window in board.engine.contexts.space.windows:
        window.clear()
    board.flat_segments(3)
    board.run(f"mov [{ABSENT}], eax" + END)
    assert board.peek32(COUNTER) == 2
    assert board.exits(EXIT_ASSIST) >= 1


@isolated
def test_another_space_has_another_entry() -> None:
    board = user(True)
    board.engine.contexts.soft = True
    board.new_directory(OTHER_DIRECTORY)
    table = 0xD000
    board.ram[table : table + 4096] = board.ram[board.peek32(DIRECTORY) & ~0xFFF :][:4096]
    board.poke32(OTHER_DIRECTORY, table | 7)
    board.poke32(table + (DATA >> 10 & 0xFFC), shuffled(DATA + 0x1000) | 7)
    board.handler(f"mov eax, cr3\nxor eax, {DIRECTORY ^ OTHER_DIRECTORY}\nmov cr3, eax", 0x80, dpl=3)
    board.poke32(shuffled(DATA), 1)
    board.poke32(shuffled(DATA + 0x1000), 0x100)
    text = f"mov ecx, 100\nagain: add ebx, [{DATA}]\ninc dword ptr [{DATA}]\nint 0x80\nloop again"
    board.run(text + END)
    assert board.regs[EBX] == sum(1 + n for n in range(50)) + sum(0x100 + n for n in range(50))
    assert board.engine.mode & modes.SOFT == 0  # the handler's
    assert board.exits(EXIT_SIGNAL) == 0
