"""Segments that aren't flat, 16-bit code and stacks, addresses that wrap at 4 GiB.

Source: Intel SDM vol. 3A 3.4.5 (descriptors), 5.3 (limit checks), 5.4 (type checks), 3.4.2 (null selectors);
vol. 1 3.6 (operand and address size).
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


# ---- 16-bit code and stacks


def _code16(board: Board, text: str) -> Board:
    board.describe(FIRST_FREE, pack(CODE, 0xFFFF, 0x009B))
    board.load(text, CODE + 0x1000, 16)
    board.run(f".byte 0xea\n.long 0x1000\n.short {FIRST_FREE}")
    assert not board.translated
    return board


@isolated
def test_16_bit_code() -> None:
    board = Board()
    board.poke32(DATA, 0x12345678)
    _code16(board, """
        mov eax, 0x200000
        mov bx, [eax]
        mov ecx, [eax]
        xor edx, edx
        mov dx, 0xffff
        inc dx
        mov si, 3
    again:
        add di, 5
        dec si
        jnz again
        call sub1
        jmp over
    sub1:
        mov bp, sp
        ret
    over:
        hlt""")
    assert not board.faults
    assert board.regs[EBX] & 0xFFFF == 0x5678
    assert board.regs[ECX] == 0x12345678
    assert board.regs[EDX] == 0
    assert board.regs[EDI] == 15
    assert board.regs[5] & 0xFFFF == STACK - 4  # keystone's call pushes 32 bits


@isolated
def test_16_bit_addressing_and_strings() -> None:
    board = Board()
    board.ram[0x8000:0x8010] = bytes(range(16))
    board.segment(DS, build(0x18, 0, 0xFFFF, 0x0093))
    board.segment(ES, build(0x18, 0, 0xFFFF, 0x0093))
    board.regs[ESI], board.regs[EDI], board.regs[ECX] = 0xAAAA8000, 0xBBBB8800, 0xCCCC0010
    _code16(board, "rep movsb\nmov bx, 0x8000\nmov si, 3\nmov al, [bx+si+1]\nmov ah, [0x8005]\nloop over\n"
            "over: hlt")
    assert board.ram[0x8800:0x8810] == bytes(range(16))
    assert board.regs[EDI] == 0xBBBB8810
    assert board.regs[ECX] == 0xCCCCFFFF
    assert board.regs[EAX] & 0xFFFF == 0x0504


@isolated
def test_16_bit_stack() -> None:
    """SS.B clear: SP alone moves, and wraps at 64 KiB."""
    board = Board()
    board.segment(SS, build(0x18, 0x10000, 0xFFFF, 0x0093))
    board.regs[ESP] = 0x77770002
    board.run("push 0x1234\nhlt")
    assert board.fault.vector == SS_FAULT  # four bytes across the border
    board.faults.clear()
    board.run("push ax\npush ax\npush eax\npop ebx\npop cx\ncall next\nnext: ret 2" + "\nhlt" * 8)
    assert board.regs[ESP] >> 16 == 0x7777


PAIRS = (
    "push ax\npop bx", "push word ptr [esi]\npop word ptr [esi+4]", "pushf\npopf", "pushaw\npopaw",
    ".byte 0x66, 0x1e\n.byte 0x66, 0x1f", ".byte 0x66, 0x6a, 0xfe\npop cx",
    ".byte 0x66, 0xc8, 4, 0, 0\n.byte 0x66, 0xc9",
)  # fmt: skip


@pytest.mark.parametrize("text", PAIRS)
@isolated
def test_16_bit_operands_on_a_32_bit_stack(text: str) -> None:
    board = Board()
    board.regs[ESI] = DATA
    board.regs[5] = STACK
    board.poke32(DATA, 0x1234)
    board.regs[EAX] = 0xABCD
    board.run(text + "\nhlt")
    assert not board.faults
    assert board.regs[ESP] == STACK
    assert board.translated


# ---- 4 GiB


TOP = 0xFFFF_FFFE
WRAPPING = {
    "mov eax, [0xfffffffe]": 0x44332211, "mov esi, 0xfffffffe\nlodsd": 0x44332211,
    "mov ebx, 0xffffffff\nmovzx eax, word ptr [ebx]": 0x3322, "mov esi, 2\nmov eax, [esi-4]": 0x44332211,
    "mov ax, [0xffffffff]": 0x3322,
    "fild dword ptr [0xfffffffe]\npush eax\nfistp dword ptr [esp]\npop eax": 0x44332211,
    "mov ebx, 0xffffffff\nmov eax, [ebx*2]": 0x44332211,
}  # fmt: skip


@pytest.mark.parametrize("text", WRAPPING)
@isolated
def test_operands_wrap_at_4_gib(text: str) -> None:
    """The last bytes of the address space and the first, under paging."""
    board = Board()
    board.paging()
    board.map(0xFFFF_F000, 0x300000)
    board.ram[0x300FFE:0x301000] = b"\x11\x22"
    board.ram[0:2] = b"\x33\x44"
    board.flush()
    board.run(f"{text}\nhlt")
    assert not board.faults
    assert board.regs[EAX] == WRAPPING[text]


@isolated
def test_string_runs_over_the_top() -> None:
    """REP MOVSB upwards past 4 GiB, and downwards below 0."""
    board = Board()
    board.paging()
    board.map(0xFFFF_F000, 0x300000)
    board.ram[0x300FF8:0x301000] = b"abcdefgh"
    board.ram[0:8] = b"ijklmnop"
    board.flush()
    board.run(f"mov esi, 0xfffffff8\nmov edi, {DATA:#x}\nmov ecx, 16\nrep movsb\nmov ebx, esi\n"
              f"std\nmov esi, 7\nmov edi, {DATA + 0x2F:#x}\nmov ecx, 16\nrep movsb\nhlt")
    assert board.ram[DATA : DATA + 16] == b"abcdefghijklmnop"
    assert board.ram[DATA + 0x20 : DATA + 0x30] == b"abcdefghijklmnop"
    assert board.regs[EBX] == 8
    assert board.regs[ESI] == 0xFFFFFFF7


@isolated
def test_code_runs_over_the_top() -> None:
    board = Board()
    board.paging()
    board.map(0xFFFF_F000, 0x300000)
    code = asm("mov eax, 0x44332211\ninc eax\nret", 0)
    board.load(code[:3], 0x300FFD)
    board.load(code[3:], 0)
    board.flush()
    board.run("mov ebx, 0xfffffffd\ncall ebx\nhlt")
    assert not board.faults
    assert board.regs[EAX] == 0x44332212


@isolated
def test_jump_over_the_top() -> None:
    board = Board()
    board.paging()
    board.map(0xFFFF_F000, 0x300000)
    board.load(b"\xe9\x00\x01\x00\x00", 0x300FF0)  # to 0xF5
    board.load("mov eax, 3\njmp [0x80]", 0xF5)
    board.poke32(0x80, CODE + 0x100)
    board.load("hlt", CODE + 0x100)
    board.flush()
    board.run("mov ebx, 0xfffffff0\njmp ebx")
    assert board.regs[EAX] == 3



# ---- real mode and virtual-8086 mode


@isolated
def test_to_real_mode_and_back() -> None:
    """As boot loaders do it: 16-bit segments, PE off, an interrupt through the vector table, PE on again."""
    board = Board()
    board.describe(FIRST_FREE, pack(0, 0xFFFF, 0x009B))
    board.describe(FIRST_FREE + 8, pack(0, 0xFFFF, 0x0093))
    board.load(f"""
        mov ax, {FIRST_FREE + 8}
        mov ds, ax
        mov ss, ax
        mov es, ax
        mov eax, cr0
        and al, 0xfe
        mov cr0, eax
        .byte 0xea
        .short 0x7040, 0""", 0x7000, 16)
    board.load("""
        mov ax, 0x2000
        mov ds, ax
        mov ax, 0x7000
        mov sp, 0x8000
        mov byte ptr [0x10], 0x77
        mov bx, cs
        int 0x21
        mov eax, cr0
        or al, 1
        mov cr0, eax
        .byte 0x66, 0xea
        .long 0x100800
        .short 8""", 0x7040, 16)
    board.load("mov cx, 0x5678\n.byte 0xcf", 0x7100, 16)
    board.load("mov eax, 0x10\nmov ds, ax\nmov es, ax\nmov ss, ax\nmov esi, [0x20010]\nhlt", CODE + 0x800)
    board.cpu.idt_base, board.cpu.idt_limit = 0, 0x3FF
    board.poke32(0x21 * 4, 0x7100)
    board.run(f".byte 0xea\n.long 0x7000\n.short {FIRST_FREE}")
    assert not board.faults
    assert board.regs[EBX] & 0xFFFF == 0
    assert board.regs[ECX] & 0xFFFF == 0x5678
    assert board.regs[ESI] == 0x77
    assert board.regs[ESP] & 0xFFFF == 0x8000
    assert board.translated


@isolated
def test_virtual_8086_mode() -> None:
    """A task of 8086 code under a monitor: its INT is #GP, the monitor skips it and goes on."""
    board = Board()
    board.paging()
    board.load("mov ax, 0x2000\nmov ds, ax\nmov byte ptr [0x10], 0x55\n"
               "int 0x21\ninc cx\nint 0x22", 0x7000, 16)
    board.gate(13, CODE + 0x400)
    board.load("""
        add esp, 4
        mov eax, 0x10
        mov ds, eax
        inc ebx
        mov eax, [esp]
        add eax, 0x7000
        cmp byte ptr [eax+1], 0x22
        jz over
        add dword ptr [esp], 2
        .byte 0xcf
    over:
        mov edi, [esp+8]
        mov edx, [esp+4]
        mov esi, [0x20010]
        hlt""", CODE + 0x400)
    flags = 0x20002
    frame = (0, 0, 0, 0, 0x700, 0x800, flags, 0x700, 0)  # GS FS DS ES SS ESP EFLAGS CS EIP
    board.run("\n".join(f"push {word}" for word in frame) + "\nxor ecx, ecx\n.byte 0xcf")
    assert [f.vector for f in board.faults] == [GP, GP]
    assert board.regs[EBX] == 2
    assert board.regs[ECX] == 1
    assert board.regs[EDX] == 0x700
    assert board.regs[EDI] & 0x20000
    assert board.regs[ESI] == 0x55
