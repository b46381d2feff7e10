"""Segments that aren't flat: bases, limits, types and null selectors.

Source: Intel SDM vol. 3A 3.4.5 (descriptors), 5.3 (limit checks), 5.4 (type checks), 3.4.2 (null selectors).
"""

from __future__ import annotations

import pytest

from cpu_node.cpu import EAX, EBX, ECX, EDI, EDX, ESI, ESP
from cpu_node.descriptor import CS, DS, ES, FS, GS, SS, Segment, build, pack
from cpu_node.errors import GP
from cpu_node.errors import SS as SS_FAULT
from tests.cpu_node.board import CODE, CODE0, DATA, FIRST_FREE, RW, STACK, US, Board, P, asm
from tests.cpu_node.child import isolated

DATA_RIGHTS, BYTE_GRANULAR = 0xC093, 0x4093
BASE = DATA
PREFIX = {ES: "es", SS: "ss", DS: "ds", FS: "fs", GS: "gs"}


def _segment(base: int, limit: int, rights: int = BYTE_GRANULAR) -> Segment:
    """Limit in bytes."""
    return build(0x18, base, limit, rights)


# ---- FS and GS, translated


@pytest.mark.parametrize("index", [FS, GS])
@pytest.mark.parametrize("base", [0, 0x1234, BASE, 0xFFFFFF00, 0xC000_0000])
@isolated
def test_fs_and_gs_with_a_base_run_translated(index: int, base: int) -> None:
    """Base plus offset wraps at 4 GiB: what thread-local storage below the pointer relies on."""
    board = Board()
    board.segment(index, build(0x18, base, 0xFFFFFFFF, DATA_RIGHTS))
    offset = DATA + 0x40 - base & 0xFFFFFFFF
    near = DATA + 0x44 - base & 0xFFFFFFFF
    board.poke32(DATA + 0x40, 0x11223344)
    name = PREFIX[index]
    board.run(f"""
        mov eax, {name}:[{offset:#x}]
        mov ebx, {near:#x}
        mov {name}:[ebx], eax
        inc byte ptr {name}:[ebx]
        mov ecx, 4
        mov edx, {name}:[ebx+ecx*4-16]
        push dword ptr {name}:[ebx]
        pop esi
        lea edi, {name}:[ebx+1]
        mov {name}:[ebx+4], dl
        hlt""")
    assert not board.faults
    assert board.translated
    assert board.regs[EAX] == 0x11223344
    assert board.regs[EDX] == board.regs[ESI] == 0x11223345
    assert board.regs[EDI] == near + 1 & 0xFFFFFFFF
    assert board.ram[DATA + 0x48] == 0x45
    assert board.exits(3) <= 3  # simulated: AH..BH and the like only


@pytest.mark.parametrize("index", [FS, GS])
@isolated
def test_limits_of_fs_and_gs(index: int) -> None:
    board = Board()
    name = PREFIX[index]
    board.segment(index, _segment(BASE, 0xFF))
    board.run(f"mov eax, {name}:[0xfc]\nmov ebx, {name}:[0xfd]\nhlt")
    assert (board.fault.vector, board.fault.error) == (GP, 0)
    assert board.fault.eip == CODE + len(asm(f"mov eax, {name}:[0xfc]"))
    board.faults.clear()
    board.run(f"mov byte ptr {name}:[0xff], 1\nmov ax, {name}:[0xff]\nhlt")
    assert (board.fault.vector, board.fault.error) == (GP, 0)
    assert board.ram[BASE + 0xFF] == 1


@pytest.mark.parametrize("text", ["mov eax, {}:[0]", "mov {}:[0x200000], eax", "push dword ptr {}:[0]",
                                  "fld dword ptr {}:[0]", "movups xmm0, {}:[0]", "jmp dword ptr {}:[0]"])
@pytest.mark.parametrize("index", [FS, GS])
@isolated
def test_null_fs_and_gs(index: int, text: str) -> None:
    board = Board()
    board.run(f"xor eax, eax\nmov {PREFIX[index]}, ax\n{text.format(PREFIX[index])}\nhlt")
    assert (board.fault.vector, board.fault.error) == (GP, 0)


@isolated
def test_fs_is_switched_between_uses() -> None:
    """The base in use is that of the last load."""
    board = Board()
    for n in range(3):
        board.describe(FIRST_FREE + 8 * n, pack(DATA + 0x100 * n, 0xFFFFF, DATA_RIGHTS))
        board.poke32(DATA + 0x100 * n, n + 1)
    load = "mov eax, {}\nmov fs, ax\nshl ebx, 4\nor ebx, fs:[0]\n"
    board.run("".join(load.format(FIRST_FREE + 8 * n) for n in (0, 1, 2, 1, 0)) + "hlt")
    assert board.regs[EBX] == 0x12321


@isolated
def test_read_only_fs() -> None:
    board = Board()
    board.segment(FS, build(0x18, BASE, 0xFFFFFFFF, 0xC091))
    board.poke32(BASE, 7)
    board.run("mov eax, fs:[0]\nmov fs:[0], eax\nhlt")
    assert board.regs[EAX] == 7
    assert (board.fault.vector, board.fault.error) == (GP, 0)


@pytest.mark.parametrize("rights", [0xC091, 0xC09B])
@isolated
def test_flat_but_not_writable_fs(rights: int) -> None:
    """No limit can be violated, the type still can."""
    board = Board()
    board.segment(FS, build(0x18, 0, 0xFFFFFFFF, rights))
    board.run(f"mov eax, fs:[{CODE}]\nmov byte ptr fs:[{DATA}], 1\nhlt")
    assert board.regs[EAX] == board.peek32(CODE)
    assert (board.fault.vector, board.fault.error) == (GP, 0)
    assert board.ram[DATA] == 0


@isolated
def test_execute_only_fs() -> None:
    board = Board()
    board.segment(FS, build(0x18, BASE, 0xFFFFFFFF, 0xC099))
    board.run("mov eax, fs:[0]\nhlt")
    assert (board.fault.vector, board.fault.error) == (GP, 0)


@isolated
def test_code_segment_in_fs_is_readable() -> None:
    board = Board()
    board.run(f"mov eax, {CODE0}\nmov fs, ax\nmov ebx, fs:[{CODE}]\nmov fs:[{DATA}], ebx\nhlt")
    assert board.regs[EBX] == board.peek32(CODE)
    assert (board.fault.vector, board.fault.error) == (GP, 0)


# ---- DS, ES, SS, CS


@pytest.mark.parametrize("index", [ES, SS, DS])
@isolated
def test_data_segments_with_a_base(index: int) -> None:
    board = Board()
    board.segment(index, build(0x18, 0x1000, 0xFFFFFFFF, DATA_RIGHTS))
    board.poke32(DATA, 0x55)
    board.poke32(DATA + 0x1000, 0x66)
    board.regs[ESI] = board.regs[EDI] = DATA
    board.run(f"mov eax, [{DATA:#x}]\nmov ebp, {DATA}\nmov ebx, [ebp]\nlodsd\nmov ecx, eax\n"
              "push 9\nmovsb\nhlt")
    assert not board.faults
    assert not board.translated
    assert board.regs[EBX] == (0x66 if index == SS else 0x55)
    assert board.regs[ECX] == (0x66 if index == DS else 0x55)
    assert board.peek32(STACK - 4 + (0x1000 if index == SS else 0)) == 9


LIMITED = {
    DS: {"mov eax, [0x100]": GP, "mov eax, [0xfe]": GP, "mov al, [0xff]": None, "mov [0xfd], eax": GP,
         "lodsd": GP, "movups xmm0, [0xf8]": GP, "fld tbyte ptr [0xf8]": GP, "inc dword ptr [0x200]": GP,
         "xlatb": GP, "cmpxchg8b [0xf9]": GP, "fxsave [0]": GP, "bt [0], esi": GP,
         "push dword ptr [0xfe]": GP,
         "lgdt [0xfb]": GP,
         "mov eax, cs:[0x1000]": None, "rep lodsb": GP, "invlpg [0x1000]": None, "lea eax, [0x1000]": None,
         "prefetcht0 [0x1000]": None, "verr [0xff]": GP, "les eax, [0xfb]": GP},
    ES: {"stosd": GP, "scasb": GP, "insb": GP, "mov eax, es:[0x100]": GP, "cmpsb": GP, "stosb": GP},
    SS: {"push eax": SS_FAULT, "pop eax": SS_FAULT, "call next\nnext: nop": SS_FAULT, "ret": SS_FAULT,
         "mov eax, [esp]": SS_FAULT, "mov eax, [ebp]": SS_FAULT, "mov eax, ss:[0x200]": SS_FAULT,
         "pushal": SS_FAULT,
         "popal": SS_FAULT, "pushfd": SS_FAULT, "popfd": SS_FAULT, "leave": SS_FAULT, "enter 0, 0": SS_FAULT,
         "push dword ptr [0]": SS_FAULT, "pop dword ptr [0]": SS_FAULT, ".byte 0x3e, 0x8b, 0x04, 0x24": None},
}  # fmt: skip
CASES = [(index, text) for index, texts in LIMITED.items() for text in texts]


@pytest.mark.parametrize(("index", "text"), CASES)
@isolated
def test_limit_violations(index: int, text: str) -> None:
    """A fault of the right kind, with nothing changed."""
    board = Board()
    board.segment(index, _segment(0 if index == SS else BASE, 0xFF))
    esp = 0x1000 if index == SS else STACK
    board.regs[:] = [1, 3, 3, 0xC0, esp, 0x1000, 0xFE, 0x100]
    if text in ("bt [0], esi", "xlatb", "verr [0xff]"):
        board.regs[ESI] = 0x10000
        board.regs[EBX] = 0x1000
    before = list(board.regs)
    vector = LIMITED[index][text]
    board.run(f"{text}\nhlt")
    if vector is None:
        assert not board.faults
        return
    assert (board.fault.vector, board.fault.error, board.fault.eip) == (vector, 0, CODE)
    if text == "rep lodsb":  # two bytes were inside
        before[EAX] = board.regs[EAX]
        before[ESI], before[ECX] = before[ESI] + 2, before[ECX] - 2
    assert list(board.regs) == before


@isolated
def test_expand_down_stack() -> None:
    """Valid above the limit only."""
    board = Board()
    board.segment(SS, build(0x18, 0, 0x7FFF, 0x4097))
    board.regs[ESP] = 0x8008
    board.run("push eax\npush eax\npush eax\nhlt")
    assert (board.fault.vector, board.fault.eip) == (SS_FAULT, CODE + 2)
    assert board.regs[ESP] == 0x8000


@isolated
def test_code_segment_with_a_base() -> None:
    board = Board()
    board.describe(FIRST_FREE, pack(CODE, 0xFFFFF, 0xC09B))
    board.load("mov eax, cs:[0x2000]\ncall next\nnext: pop ebx\njmp over\nnop\nover: hlt", CODE + 0x1000)
    board.poke32(CODE + 0x2000, 77)
    board.run(f".byte 0xea\n.long 0x1000\n.short {FIRST_FREE}")
    assert board.regs[EAX] == 77
    assert board.regs[EBX] == 0x1000 + len(asm("mov eax, cs:[0x2000]")) + 5


BEYOND = ("jmp 0x102000", "mov eax, 0x2000\njmp eax", "push 0x2000\nret", "call 0x102000",
          "cmp eax, eax\njz 0x102000")


@pytest.mark.parametrize("text", BEYOND)
@isolated
def test_code_segment_limit(text: str) -> None:
    """#GP(0) at the jump for targets beyond the limit."""
    board = Board()
    board.segment(CS, build(FIRST_FREE, CODE, 0x1FFF, 0x409B))
    board.load(asm(text, CODE), CODE)
    board.regs[ECX] = 1
    board.run(None, 0)
    assert (board.fault.vector, board.fault.error) == (GP, 0)
    assert board.ram[CODE + board.fault.eip] in (0xE9, 0xFF, 0xC3, 0xE8, 0x0F)


@isolated
def test_running_off_the_end_of_a_code_segment() -> None:
    board = Board()
    board.segment(CS, build(FIRST_FREE, CODE, 0x0F, 0x409B))
    board.load(b"\x90" * 14 + asm("mov eax, 5"), CODE)
    board.run(None, 0)
    assert (board.fault.vector, board.fault.error, board.fault.eip) == (GP, 0, 14)


@isolated
def test_ds_null_in_ring_0_while_unused() -> None:
    """Null data segments are legal until used; strings, pushes and code go on."""
    board = Board()
    board.run(f"xor eax, eax\nmov ds, ax\nmov es, ax\npush 7\npop ebx\nmov eax, cs:[{CODE}]\n"
              f"mov ecx, [{DATA}]\nhlt")
    assert board.regs[EBX] == 7
    assert (board.fault.vector, board.fault.error) == (GP, 0)


@isolated
def test_back_to_flat_is_back_to_translated() -> None:
    board = Board()
    board.describe(FIRST_FREE, pack(DATA, 0xFFFFF, DATA_RIGHTS))
    board.poke32(DATA, 1)
    board.poke32(0, 2)
    board.run(f"mov eax, ds\nmov ecx, {FIRST_FREE}\nmov ds, cx\nmov ebx, [0]\nmov ds, ax\nmov edx, [0]\nhlt")
    assert (board.regs[EBX], board.regs[EDX]) == (1, 2)
    assert board.translated


@isolated
def test_user_data_segment_limit_with_paging() -> None:
    """As Linux 2.4 or a sandbox would: CPL 3 with 3 GiB segments."""
    board = Board()
    board.paging()
    board.map(0xC000_0000, DATA, P | RW | US)
    board.flat_segments(3)
    board.segment(DS, build(0x23, 0, 0xBFFFFFFF, 0xC0F3))
    board.run(f"mov eax, [{DATA:#x}]\nmov eax, es:[0xc0000000]\nmov eax, [0xc0000000]\nud2")
    assert (board.fault.vector, board.fault.error) == (GP, 0)
