"""Paging as the guest sees it: rights, error codes, accessed and dirty bits, what a flush must forget.

Source: Intel SDM vol. 3A chapter 4 (4.3 32-bit paging, 4.6 access rights, 4.7 error codes, 4.8 A and D,
4.10 what INVLPG and MOV to CR3 invalidate).
"""

from __future__ import annotations

import itertools

import pytest

from cpu_node.cpu import CR0_WP, CR4_PSE, ESP
from cpu_node.errors import PF, UD
from cpu_node.paging import ERR_PRESENT, ERR_RESERVED, ERR_USER, ERR_WRITE
from tests.cpu_node.board import CODE, DATA, DIRECTORY, PS, RW, STACK, US, A, Board, D, P
from tests.cpu_node.child import isolated

VA = 0x4000_0000  # 4 MiB-aligned, nothing of the board's there
FRAME = 0x300000
BIG_FRAME = 0x800000
PDE = DIRECTORY + (VA >> 22 << 2)
RIGHTS = [r | w for r in (0, US) for w in (0, RW)]
ACCESSES = {"read": f"mov eax, [{VA + 16:#x}]\nud2", "write": f"mov [{VA + 16:#x}], eax\nud2",
            "execute": f"mov ebx, {VA + 16:#x}\njmp ebx"}
UD2 = b"\x0f\x0b"


def _board() -> Board:
    board = Board()
    board.paging()
    for frame in (FRAME, BIG_FRAME):
        board.ram[frame + 16 : frame + 18] = UD2
    return board


def _attempt(board: Board, access: str, cpl: int) -> None:
    board.faults.clear()
    board.flat(cpl)  # flushes
    board.run(ACCESSES[access])


def _expected_error(rights: int, wp: bool, cpl: int, access: str) -> int | None:
    """Error code of the page fault; None when the access is allowed [4.6.1, 4.7]."""
    write, user = access == "write", cpl == 3
    code = (ERR_WRITE if write else 0) | (ERR_USER if user else 0)
    if not rights & P:
        return code
    if (user and not rights & US) or (write and not rights & RW and (user or wp)):
        return code | ERR_PRESENT
    return None


def _check(board: Board, access: str, cpl: int, wp: bool, rights: int, entries: list[int]) -> None:
    """Try an access; `rights` is what all levels grant, `entries` where the entries lie, leaf last."""
    board.cpu.cr0 = board.cpu.cr0 & ~CR0_WP | (CR0_WP if wp else 0)
    before = [board.peek32(e) for e in entries]
    cr0 = board.cpu.cr0
    board.faults.clear()
    board.flat(cpl)
    board.cpu.cr0 = cr0
    board.flush()
    board.run(ACCESSES[access])
    after = [board.peek32(e) for e in entries]
    what = f"{access} at CPL {cpl}, WP {wp}, entries {[hex(e) for e in before]}"
    expected = _expected_error(rights, wp, cpl, access)
    assert board.translated
    if expected is None:
        assert board.fault.vector == UD, what
        assert after[:-1] == [e | A for e in before[:-1]], what
        assert after[-1] == before[-1] | A | (D if access == "write" else 0), what
    else:
        assert (board.fault.vector, board.fault.error) == (PF, expected), what
        assert board.fault.cr2 == VA + 16, what
        assert board.fault.eip == (VA + 16 if access == "execute" else CODE), what
        assert after == before, f"{what}: a fault must set neither A nor D"


@pytest.mark.parametrize("access", ACCESSES)
@isolated
def test_rights_of_4_kib_pages(access: str) -> None:
    board = _board()
    pte_pa = board.map(VA, FRAME)
    table = board.peek32(PDE) & ~0xFFF
    for pde, pte, cpl, wp in itertools.product(RIGHTS, RIGHTS, (0, 3), (False, True)):
        for present in (P | P << 1, P, P << 1):
            board.poke32(PDE, table | pde | (present & 1))
            board.poke32(pte_pa, FRAME | pte | (present >> 1 & 1))
            rights = pde & pte | (P if present == 3 else 0)
            _check(board, access, cpl, wp, rights, [PDE, pte_pa])


@pytest.mark.parametrize("access", ACCESSES)
@isolated
def test_rights_of_4_mib_pages(access: str) -> None:
    board = _board()
    for pde, cpl, wp, present in itertools.product(RIGHTS, (0, 3), (False, True), (P, 0)):
        board.poke32(PDE, BIG_FRAME | PS | pde | present)
        _check(board, access, cpl, wp, pde | present, [PDE])


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("access", ACCESSES)
@isolated
def test_reserved_bits_of_a_4_mib_entry(access: str, cpl: int) -> None:
    board = _board()
    for bit in range(13, 22):
        board.poke32(PDE, BIG_FRAME | PS | US | RW | P | 1 << bit)
        _attempt(board, access, cpl)
        code = ERR_PRESENT | ERR_RESERVED | (ERR_WRITE if access == "write" else 0) | (ERR_USER if cpl else 0)
        assert (board.fault.vector, board.fault.error, board.fault.cr2) == (PF, code, VA + 16)
        assert board.peek32(PDE) & (A | D) == 0


@isolated
def test_without_pse_the_size_bit_is_ignored() -> None:
    board = _board()
    pte_pa = board.map(VA, FRAME)
    board.poke32(PDE, board.peek32(PDE) | PS)
    board.cpu.cr4 &= ~CR4_PSE
    board.ram[FRAME + 16 : FRAME + 20] = b"four"
    board.flush()
    board.run(f"mov eax, [{VA + 16:#x}]\nhlt")
    assert board.regs[0] == int.from_bytes(b"four", "little")
    assert board.peek32(pte_pa) & A


@isolated
def test_pse_is_switched_by_the_guest() -> None:
    """The same entry as a table, then as a 4 MiB page, then as a table again [4.10.4.1]."""
    board = _board()
    table = 0x400000  # as a 4 MiB frame its first page is this very table
    board.poke32(table, FRAME | P | RW | US)
    board.poke32(PDE, table | PS | P | RW | US)
    board.poke32(FRAME, 0x1111)
    board.poke32(table + 4, 0)
    read = f"mov ecx, [{VA:#x}]"
    board.run(f"""
        mov eax, cr4
        and eax, {~CR4_PSE & 0xFFFFFFFF:#x}
        mov cr4, eax
        {read}
        mov esi, ecx
        or eax, {CR4_PSE:#x}
        mov cr4, eax
        {read}
        mov edi, ecx
        and eax, {~CR4_PSE & 0xFFFFFFFF:#x}
        mov cr4, eax
        {read}
        hlt""")
    assert not board.faults
    assert board.regs[6] == 0x1111
    assert board.regs[7] & ~0xFFF == FRAME
    assert board.regs[1] == 0x1111


@isolated
def test_write_protect_is_switched_by_the_guest() -> None:
    """CR0.WP counts from the next instruction on, whatever was mapped before."""
    board = _board()
    board.map(VA, FRAME, P)
    program = f"""
        mov eax, cr0
        and eax, {~CR0_WP & 0xFFFFFFFF:#x}
        mov cr0, eax
        mov dword ptr [{VA:#x}], 7
        or eax, {CR0_WP:#x}
        mov cr0, eax
        mov ebx, [{VA:#x}]
        mov dword ptr [{VA:#x}], 8
        hlt"""
    board.run(program)
    assert (board.fault.vector, board.fault.error) == (PF, ERR_PRESENT | ERR_WRITE)
    assert board.peek32(FRAME) == 7
    assert board.regs[3] == 7
    # and the other way: a page known to be read-only becomes writable
    board.faults.clear()
    board.run(f"""
        mov ebx, [{VA:#x}]
        mov eax, cr0
        and eax, {~CR0_WP & 0xFFFFFFFF:#x}
        mov cr0, eax
        mov dword ptr [{VA:#x}], 9
        hlt""")
    assert not board.faults
    assert board.peek32(FRAME) == 9


# ---- kinds of accesses

CROSSING = VA + 0xFFE
KINDS = {
    "mov": (f"mov eax, [{CROSSING:#x}]", False), "mov store": (f"mov [{CROSSING:#x}], eax", True),
    "add": (f"add [{CROSSING:#x}], eax", True), "cmp": (f"cmp [{CROSSING:#x}], eax", False),
    "xchg": (f"xchg [{CROSSING:#x}], eax", True), "lock xadd": (f"lock xadd [{CROSSING:#x}], eax", True),
    "cmpxchg8b": (f"cmpxchg8b [{CROSSING - 2:#x}]", True),
    "movdqu": (f"movdqu xmm0, [{CROSSING - 6:#x}]", False),
    "movdqu store": (f"movdqu [{CROSSING - 6:#x}], xmm0", True),
    "fld": (f"fld qword ptr [{CROSSING:#x}]", False), "fstp": (f"fld1\nfstp tbyte ptr [{CROSSING:#x}]", True),
    "fnsave": (f"fnsave [{CROSSING - 50:#x}]", True),
    "push": ("push eax", True), "push m": (f"push dword ptr [{DATA:#x}]", True),
    "call": ("call next\nnext: nop", True),
    "pushal": ("pushal", True), "pushfd": ("pushfd", True), "enter": ("enter 0, 0", True),
    "pop": ("pop eax", False), "pop m": (f"pop dword ptr [{CROSSING:#x}]", True), "ret": ("ret", False),
    "popal": ("popal", False), "popfd": ("popfd", False), "leave": ("leave", False),
    "movsb": ("rep movsb", True), "movs from": ("xchg esi, edi\n.byte 0xa5", False),
    "stosd": ("stosd", True), "lodsd": ("xchg esi, edi\nlodsd", False),
    "scasd": ("scasd", False), "bts": (f"bts [{CROSSING:#x}], eax", True),
    "sgdt": (f"sgdt [{CROSSING:#x}]", True), "lgdt": (f"lgdt [{CROSSING:#x}]", False),
    "insd": ("insd", True), "outsd": ("xchg esi, edi\noutsd", False),
    "les": (f"les eax, [{CROSSING:#x}]", False),
    "mov sreg": (f"mov word ptr [{VA + 0xFFF:#x}], ds", True),
    "xlat": (f"mov ebx, {VA + 0x1000:#x}\nxlatb", False), "bound": (f"bound eax, [{CROSSING:#x}]", False),
    "jmp m": (f"jmp [{CROSSING:#x}]", False), "call m": (f"call [{CROSSING:#x}]", False),
    "moffs": (f".byte 0xa1\n.long {CROSSING:#x}", False),
}  # fmt: skip
STACKED = {  # ESP (or EBP) off the page border
    "push": 2, "push m": 2, "call": 2, "pushal": 2, "pushfd": 2, "enter": 2, "pop": -2, "ret": -2,
    "popal": -2, "popfd": -2, "leave": -2,
}  # fmt: skip
UNDOUBLED = {"xlat"}  # one byte: on the second page only


@pytest.mark.parametrize("missing", ["first", "second", "read-only second"])
@pytest.mark.parametrize("kind", KINDS)
@isolated
def test_operand_across_pages(kind: str, missing: str) -> None:
    """The fault is of the page that is missing, and nothing has been written [4.7: CR2]."""
    text, writes = KINDS[kind]
    board = _board()
    first, second = (0, P | RW | US) if missing == "first" else (P | RW | US, 0)
    if missing == "read-only second":
        second = P | US
    board.map(VA, FRAME, first)
    board.map(VA + 0x1000, FRAME + 0x5000, second)
    pattern = bytes(n & ~1 for n in range(256)) * 16  # as flags: no TF
    board.ram[FRAME : FRAME + 0x1000] = pattern
    board.ram[FRAME + 0x5000 : FRAME + 0x6000] = pattern
    border = VA + 0x1000
    board.flat()
    board.regs[:] = [0, 4, 0x80, 0, STACK, border - 2, DATA, border - 2]
    if kind in STACKED:
        board.regs[ESP] = border + STACKED[kind]
    before = list(board.regs)
    board.run(text + "\nhlt")
    rips = len(board.faults)
    if (missing == "read-only second" and not writes) or (kind in UNDOUBLED and missing == "first"):
        assert not board.faults or kind in ("les", "lgdt", "bound", "jmp m", "call m", "ret", "leave")
        return
    assert rips == 1, board.faults
    fault = board.fault
    assert fault.vector == PF, fault
    reads_first = kind in ("add", "xchg", "lock xadd", "cmpxchg8b", "bts")
    code = (ERR_WRITE if writes else 0) | (ERR_PRESENT if missing == "read-only second" else 0)
    assert fault.error == code or (reads_first and fault.error == code & ~ERR_WRITE), fault
    if missing == "first":
        assert VA <= fault.cr2 < border, fault
    elif kind == "fnsave":  # the host looks at the last byte first
        assert border <= fault.cr2 < border + 108, fault
    else:
        assert fault.cr2 == border, fault
    assert board.ram[FRAME : FRAME + 0x1000] == pattern or kind == "movsb"
    assert board.ram[FRAME + 0x5000 : FRAME + 0x6000] == pattern
    if "xchg esi" not in text and "ebx," not in text and kind != "popal":
        moved = 2 if kind == "movsb" and missing != "first" else 0
        before[1], before[6], before[7] = before[1] - moved, before[6] + moved, before[7] + moved
        assert list(board.regs) == before


# ---- accessed and dirty bits


@pytest.mark.parametrize("big", [False, True], ids=["4K", "4M"])
@pytest.mark.parametrize("flush", ["invlpg", "cr3", "cr0"])
@isolated
def test_cleared_accessed_and_dirty_bits_are_set_again(flush: str, big: bool) -> None:
    board = _board()
    if big:
        entry, base = PDE, BIG_FRAME | PS | P | RW | US
        board.poke32(PDE, base)
    else:
        entry, base = board.map(VA, FRAME), FRAME | P | RW | US
    how = {"invlpg": f"invlpg [{VA:#x}]", "cr3": "mov ebx, cr3\nmov cr3, ebx",
           "cr0": f"mov ebx, cr0\nxor ebx, {CR0_WP:#x}\nmov cr0, ebx"}[flush]
    board.run(f"""
        mov eax, [{VA:#x}]
        mov ecx, [{entry:#x}]
        mov [{VA:#x}], eax
        mov edx, [{entry:#x}]
        mov dword ptr [{entry:#x}], {base:#x}
        {how}
        mov eax, [{VA:#x}]
        mov esi, [{entry:#x}]
        mov dword ptr [{entry:#x}], {base | A:#x}
        {how}
        mov [{VA + 4:#x}], eax
        mov edi, [{entry:#x}]
        hlt""")
    assert not board.faults
    flags = [board.regs[n] & (A | D) for n in (1, 2, 6, 7)]
    assert flags == [A, A | D, A if flush != "cr0" else flags[2], A | D if flush != "cr0" else flags[3]]


@isolated
def test_accessed_bits_are_set_for_touched_pages_only() -> None:
    board = _board()
    entries = [board.map(VA + n * 0x1000, FRAME + n * 0x1000) for n in range(16)]
    board.run(f"mov eax, [{VA + 0x4000:#x}]\nmov [{VA + 0x7000:#x}], eax\nmov eax, [{VA + 0x8FFE:#x}]\nhlt")
    flags = [board.peek32(e) & (A | D) for e in entries]
    assert flags == [A if n in (4, 8, 9) else A | D if n == 7 else 0 for n in range(16)]


@isolated
def test_a_write_after_a_read_sets_the_dirty_bit() -> None:
    """Also on a page that came along with its neighbour."""
    board = _board()
    entries = [board.map(VA + n * 0x1000, FRAME + n * 0x1000, P | RW | US | A) for n in range(8)]
    board.run(f"mov eax, [{VA:#x}]\nmov ebx, [{VA + 0x3000:#x}]\nmov [{VA + 0x3000:#x}], eax\nhlt")
    assert [board.peek32(e) & D for e in entries] == [0, 0, 0, D, 0, 0, 0, 0]


@isolated
def test_execution_sets_accessed_only() -> None:
    board = _board()
    pte_pa = board.map(VA, FRAME)
    board.load(b"\xf4", CODE)
    board.ram[FRAME] = 0xF4
    board.run(f"mov eax, {VA:#x}\njmp eax")
    assert board.cpu.eip == VA + 1
    assert board.peek32(pte_pa) & (A | D) == A
