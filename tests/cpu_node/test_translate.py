"""The translator's bookkeeping: maps between guest and host, patches, borders; any bytes may come.

Pure: no CPU, no code cache.
"""

from __future__ import annotations

import random

import capstone
import pytest

from cpu_node import mode as modes
from cpu_node.decode import TooLong, Undefined, decode
from cpu_node.emit import Templates
from cpu_node.emit_soft import templates_of
from cpu_node.encode import JUMP_R8, MOV_R8
from cpu_node.line import PAGE, Line, page_line, single_line
from cpu_node.translate import MAX_INSTRUCTIONS, Translation, check_source, leaf_at, renew, translate
from tests.cpu_node.board import asm

VA = 0x8000_0000
POSITION = 0x2000
_HOST = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)


def _line(code: bytes, verify: bool = False, fill: bytes = b"\xf4", mode: int = 0) -> Line:
    return page_line(VA >> 12, 1, mode, code.ljust(PAGE, fill), verify)


def _apply(image: bytearray, made: Translation) -> None:
    """Put a translation and its patches into a code cache."""
    start = made.chunk.start - POSITION
    assert start == len(image)
    image += made.code
    for behind, target in made.patches:
        at = behind - 4 - POSITION
        image[at : at + 4] = (target - behind).to_bytes(4, "little", signed=True)


def _sweep(code: bytes) -> set[int]:
    """Offsets of host instructions."""
    return {at for at, _, _, _ in _HOST.disasm_lite(code, 0)}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("mode", [0, modes.USER, modes.NO_FPU, modes.USER | modes.SOFT])
@pytest.mark.parametrize("seed", range(3))
def test_any_bytes(seed: int, mode: int, verify: bool) -> None:
    """Random pages: from every entry a translation whose maps fit its code; jumps go where they should."""
    rng = random.Random(seed)
    page = bytes(rng.choice((rng.randrange(256), 0x0F, 0x8B, 0x74, 0xE8, 0xEB, 0x66)) for _ in range(PAGE))
    line = page_line(VA >> 12, 1, mode, page, verify)
    templates = templates_of(mode)
    image = bytearray()
    for _ in range(150):
        start = rng.randrange(PAGE)
        if start in line.host:
            continue
        made = translate(line, start, templates, POSITION + len(image))
        chunk = made.chunk
        assert chunk.end - chunk.start == len(made.code)
        assert list(chunk.hosts) == sorted(chunk.hosts)
        assert len(chunk.hosts) == len(chunk.offsets)
        boundaries = _sweep(made.code)
        for host, offset in zip(chunk.hosts, chunk.offsets, strict=True):
            assert host in boundaries
            assert line.host[offset] == chunk.start + host
        _apply(image, made)
    for offset, ends in line.waiting.items():
        assert offset not in line.host
        for behind in ends:  # each waits at a jump to an exit stub for its offset
            distance = int.from_bytes(image[behind - 4 - POSITION : behind - POSITION], "little", signed=True)
            stub = behind + distance - POSITION
            assert image[stub : stub + 2] == MOV_R8
            assert int.from_bytes(image[stub + 2 : stub + 6], "little") == VA + offset


def test_length_of_a_chunk_is_limited() -> None:
    line = _line(b"\x90" * PAGE)
    made = translate(line, 0, Templates(0), POSITION)
    assert len(made.chunk.hosts) == MAX_INSTRUCTIONS
    assert line.waiting == {MAX_INSTRUCTIONS: [POSITION + MAX_INSTRUCTIONS + 5]}


def test_code_that_runs_into_known_code_joins_it() -> None:
    line = _line(asm("inc eax\ninc ebx\ninc ecx\nret", VA))
    templates = Templates(0)
    first = translate(line, 2, templates, POSITION)
    second = translate(line, 0, templates, POSITION + len(first.code))
    assert len(second.chunk.hosts) == 2
    distance = -len(first.code) - len(second.code)
    assert second.code[-5:] == b"\xe9" + distance.to_bytes(4, "little", signed=True)


def test_backward_jump_goes_straight_to_its_target() -> None:
    line = _line(asm("top: dec ecx\njnz top\nret", VA))
    made = translate(line, 0, Templates(0), POSITION)
    assert made.code[2:8] == b"\x0f\x85" + (-8).to_bytes(4, "little", signed=True)
    assert not line.waiting


def test_endless_jump() -> None:
    line = _line(asm("top: jmp top", VA))
    made = translate(line, 0, Templates(0), POSITION)
    assert made.code == b"\xe9" + (-5).to_bytes(4, "little", signed=True)


def test_jump_is_not_followed_where_bytes_are_checked() -> None:
    code = asm("jmp over\nnop\nover: ret", VA)
    plain, checked = _line(code), _line(code, verify=True)
    assert len(translate(plain, 0, Templates(0), POSITION).chunk.hosts) == 2
    assert len(translate(checked, 0, Templates(0), POSITION).chunk.hosts) == 1


def test_calls_say_where_they_return_to() -> None:
    line = _line(asm("call one\none: call eax\ncall dword ptr [ebx]\nret", VA))
    assert translate(line, 0, Templates(0), POSITION).returns == [5, 7, 9]


def test_instruction_over_the_border_has_a_line_of_its_own() -> None:
    """In the page's line it is a jump through the dispatch table, without a place in the maps."""
    code = b"\x90" * (PAGE - 3) + asm("mov eax, 0x12345678", 0)
    line = page_line(VA >> 12, 1, 0, code[:PAGE], False)
    made = translate(line, PAGE - 4, Templates(0), POSITION)
    assert list(made.chunk.offsets) == [PAGE - 4]
    assert PAGE - 3 not in line.host
    assert made.code[1:] == MOV_R8 + (VA + PAGE - 3).to_bytes(4, "little") + JUMP_R8
    alone = single_line(VA + PAGE - 3, (1, 2), 0, code[PAGE - 3 :] + b"\xc3" * 8)
    made = translate(alone, 0, Templates(0), POSITION)
    assert list(made.chunk.offsets) == [0]
    assert made.code[:5] == asm("mov eax, 0x12345678", 0)
    assert made.code[-10:] == MOV_R8 + (VA + PAGE + 2).to_bytes(4, "little") + JUMP_R8


def test_end_of_the_page_goes_on_through_the_table() -> None:
    line = page_line(VA >> 12, 1, 0, b"\x90" * PAGE, False)
    made = translate(line, PAGE - 1, Templates(0), POSITION)
    assert made.code[-10:] == MOV_R8 + (VA + PAGE).to_bytes(4, "little") + JUMP_R8


def test_addresses_wrap_at_4_gib() -> None:
    last = page_line(0xFFFFF, 1, 0, b"\x90" * (PAGE - 2) + b"\xeb\x10", False)
    made = translate(last, PAGE - 2, Templates(0), POSITION)
    assert made.code[-10:] == MOV_R8 + (0x10).to_bytes(4, "little") + JUMP_R8
    first = page_line(0, 1, 0, (b"\xeb\xf0").ljust(PAGE, b"\x90"), False)
    made = translate(first, 0, Templates(0), POSITION)
    assert made.code[-10:] == MOV_R8 + (0xFFFFFFF2).to_bytes(4, "little") + JUMP_R8


def test_checks_cover_every_byte() -> None:
    """Each byte of an instruction is compared, none beyond it."""
    rng = random.Random(3)
    for _ in range(200):
        page = rng.randbytes(32).ljust(PAGE, b"\x90")
        try:
            length = decode(page, 0).length
        except (Undefined, TooLong):
            continue
        line = page_line(VA >> 12, 1, 0, page, True)
        check = check_source(line, 0, length)
        compared = bytearray()
        at = 0
        for _, size, name, operands in _HOST.disasm_lite(check, 0):
            if "gs:" in operands:
                width = {"dword": 4, "word": 2, "byte": 1}[operands.split(", ")[1].split()[0]]
                assert int.from_bytes(check[at + size - 4 : at + size], "little") == VA + len(compared)
            elif name == "lea":
                expected = -int.from_bytes(check[at + 3 : at + 7], "little", signed=True) & 0xFFFFFFFF
                compared += expected.to_bytes(4, "little")[:width]
            at += size
        assert compared == page[:length]


def test_checks_by_the_tlb_cover_every_byte() -> None:
    """The same for SOFT: one probe of the whole instruction, then each byte of it."""
    rng = random.Random(4)
    for length in range(1, 16):
        page = rng.randbytes(length).ljust(PAGE, b"\x90")
        check = check_source(_line(page, True, mode=modes.USER | modes.SOFT), 0, length)
        compared, sizes, at, width = bytearray(), [], 0, 0
        for _, size, name, operands in _HOST.disasm_lite(check, 0):
            if name.startswith("mov") and operands.startswith("r8d, ") and "[r9" in operands:
                width = {"dword": 4, "word": 2, "byte": 1}[operands.split(", ")[1].split()[0]]
                assert check[at + size - 1] == len(compared)
            elif name == "lea" and operands.startswith("ecx, [r8") and width:
                expected = -int.from_bytes(check[at + 3 : at + 7], "little", signed=True) & 0xFFFFFFFF
                compared += expected.to_bytes(4, "little")[:width]
            elif name == "mov" and operands.startswith("r9d, "):
                sizes.append(int(operands.split(", ")[1], 0))
            at += size
        assert compared == page[:length]
        assert sizes == [length - 1]


CHANGED = {
    "immediate": ("mov eax, 1", "mov eax, 0x12345678"),
    "displacement": ("mov eax, [0x1000]", "mov eax, [0x2000]"),
    "both": ("mov dword ptr [esi+0x1000], 1", "mov dword ptr [esi+0x7000], 9"),
    "byte": ("add bl, 1", "add bl, 0x7f"),
    "pushed": ("push 0x1234", "push 0x4321"),
    "SSE": ("pshufd xmm0, xmm1, 3", "pshufd xmm0, xmm1, 7"),
    "segment": ("mov dword ptr fs:[0x1000], 1", "mov dword ptr fs:[0x2000], 5"),
}


@pytest.mark.parametrize("mode", [0, modes.USER | modes.SOFT], ids=modes.describe)
@pytest.mark.parametrize("name", CHANGED)
def test_renewed_instruction_is_what_a_new_translation_makes(name: str, mode: int) -> None:
    old, new = (asm(f"nop\n{text}\nnop\nret", VA) for text in CHANGED[name])
    templates = templates_of(mode)
    line, fresh = _line(old, verify=True, mode=mode), _line(new, verify=True, mode=mode)
    made = translate(line, 0, templates, POSITION)
    wanted = translate(fresh, 0, templates, POSITION)
    code = renew(line, 1, new[1:].ljust(32, b"\0"), templates)
    assert code is not None
    place = line.host[1] - POSITION
    assert made.code[:place] + code + made.code[place + len(code) :] == wanted.code
    assert line.code[: len(new)] == new


REFUSED = {
    "nothing changed": ("mov eax, 1", "mov eax, 1"),
    "another register": ("mov eax, 1", "mov ecx, 1"),
    "another length": ("add ebx, 1", "add ebx, 0x12345678"),
    "a jump": ("jz 0x80000010", "jz 0x80000018"),
    "a call": ("call 0x80000010", "call 0x80000018"),
    "the simulator's": ("int 0x80", "int 0x81"),
    "undefined": ("mov eax, 1", ".byte 0x0f, 0xff"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_renewed(name: str) -> None:
    old, new = (asm(f"nop\n{text}\nnop\nret", VA) for text in REFUSED[name])
    line, templates = _line(old, verify=True), Templates(0)
    translate(line, 0, templates, POSITION)
    before = line.code
    assert renew(line, 1, new[1:].ljust(32, b"\0"), templates) is None
    assert line.code == before


@pytest.mark.parametrize("other", [2, 0])
def test_instruction_that_another_overlaps_is_not_renewed(other: int) -> None:
    """Code that is entered in the middle of an instruction: one change is a change of two."""
    code = b"\xb0\xb8\x90\x90\x90\x90\xc3"  # mov al, 0b8h, then nops; or mov eax, imm32 at 1
    line, templates = _line(code, verify=True), Templates(0)
    translate(line, 1, templates, POSITION)
    text = (b"\xb8\x91\x90\x90\x90" if other == 2 else b"\xb8\x90\x90\x90\x91") + bytes(16)
    translate(line, other, templates, POSITION + 0x1000)
    assert renew(line, 1, text, templates) is None


def test_what_no_check_guards_is_not_renewed() -> None:
    line, templates = _line(asm("mov eax, 1\nret", VA)), Templates(0)
    translate(line, 0, templates, POSITION)
    assert renew(line, 0, asm("mov eax, 2\nret", VA).ljust(32, b"\0"), templates) is None


def test_leaf_at_finds_what_translate_uses() -> None:
    code = asm("lock add dword ptr [eax*4+ebx+0x1000], 5\nmov eax, 1\nret", VA).ljust(64, b"\0")
    templates = Templates(0)
    first = leaf_at(templates, code, 0)
    assert leaf_at(templates, code, 0) is first
    assert leaf_at(templates, code, first[1])[1] == 5
