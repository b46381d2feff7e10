"""Records of lines: moved code does what it did, and fits only where all that it depends on is the same."""

from __future__ import annotations

import random
from array import array

import capstone
import pytest

from cpu_node import mode as modes
from cpu_node.emit import Templates
from cpu_node.emit_soft import templates_of
from cpu_node.kept import Kept, pack, take_over, unpack
from cpu_node.line import PAGE, Chunk, Line, page_line, single_line
from cpu_node.translate import translate
from tests.cpu_node.board import asm

VA = 0x8000_0000
FIRST = 0x2000
_HOST = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
_HOST.detail = True
PROGRAM = """
    jz later
    call far
    jmp back
middle:
    add eax, 0x12345678
    jnz later
    ret
    .align 512
later:
    mov eax, [0x1000]
    loop later
    cpuid
    jmp middle
    .align 256
back:
    popfd
    jc 0x80000100
    jmp 0x80001000
    .align 1024
far:
    call eax
    ret"""


class Workshop:
    """A code cache that nothing runs in."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.image = bytearray(1 << 16)
        self.chunks: list[Chunk] = []
        self.position = FIRST
        self.templates = templates_of(line.mode)

    def translate(self, offset: int, limit: int = 250) -> None:
        made = translate(self.line, offset, self.templates, self.position, limit)
        self.image[self.position : self.position + len(made.code)] = made.code
        for behind, target in made.patches:
            self.image[behind - 4 : behind] = (target - behind).to_bytes(4, "little", signed=True)
        self.position += len(made.code) + 7  # as if other lines' chunks lay between
        if made.chunk.hosts:
            self.chunks.append(made.chunk)
        for offset in made.returns:
            if offset in self.line.host:
                self.line.entries[offset] = self.line.host[offset]

    def record(self) -> bytes:
        return pack(self.line, self.chunks, memoryview(self.image))

    def take_over(self, kept: Kept) -> None:
        chunk = take_over(kept, self.line, self.position)
        self.image[self.position : chunk.end] = kept.code
        self.position = chunk.end + 7
        self.chunks.append(chunk)
        self.line.unfold()


def page(code: bytes, va: int = VA, mode: int = 0, verify: bool = False) -> Line:
    return page_line(va >> 12, 1, mode, code.ljust(PAGE, b"\xf4"), verify)


def translated(code: bytes, offsets: tuple[int, ...] = (0,), **kind: object) -> Workshop:
    shop = Workshop(page(code, **kind))  # type: ignore[arg-type]
    for offset in offsets:
        if offset not in shop.line.host:
            shop.translate(offset)
    return shop


def follow(shop: Workshop, offset: int) -> list[bytes]:
    """Host instructions from a guest offset to the next: relative jumps by the guest offset they lead to."""
    at = {host: guest for guest, host in shop.line.host.items()}
    out: list[bytes] = []
    todo = [shop.line.host[offset]]
    while todo:
        host = todo.pop()
        while True:
            (insn,) = _HOST.disasm(bytes(shop.image[host : host + 16]), host, 1)
            if not insn.group(capstone.CS_GRP_BRANCH_RELATIVE):
                out.append(bytes(insn.bytes))
                if insn.mnemonic == "jmp":
                    break
            else:
                place = int(insn.op_str, 16)
                out.append(b"%s->%d" % (insn.mnemonic.encode(), at.get(place, -1)))
                if place not in at:
                    todo.append(place)
                if insn.mnemonic == "jmp":
                    break
            host += insn.size
            if host in at:
                out.append(b"->%d" % at[host])
                break
    return out


ENTRIES = (0, 512, 1024, 7)


def test_round_trip_of_bytes() -> None:
    shop = translated(asm(PROGRAM, VA), ENTRIES)
    kept = unpack(shop.record())
    assert len(shop.chunks) > 2
    assert set(kept.offsets) == set(shop.line.host)
    assert set(kept.entries) == set(shop.line.entries)
    assert len(kept.code) == sum(c.end - c.start for c in shop.chunks)


def test_moved_code_is_the_same_code() -> None:
    """Chunks that lay apart and jumped to each other: moved together, each jump leads where it led."""
    shop = translated(asm(PROGRAM, VA), ENTRIES)
    other = Workshop(page(asm(PROGRAM, VA)))
    other.position = 0x5001
    other.take_over(unpack(shop.record()))
    assert set(other.line.host) == set(shop.line.host)
    assert other.line.waiting.keys() == shop.line.waiting.keys()
    for offset in shop.line.host:
        assert follow(other, offset) == follow(shop, offset)
    for offset, place in other.line.entries.items():
        assert other.line.host[offset] == place


def test_line_taken_over_can_grow_and_be_kept_again() -> None:
    """A jump that left to have its target translated leads there when it is, in the next record too."""
    code = asm("jz later\nret\n.align 64\nlater: inc eax\njmp more\n.align 64\nmore: ret", VA)
    first = translated(code)
    assert set(first.line.waiting) == {64}
    second = Workshop(page(code))
    second.take_over(unpack(first.record()))
    second.translate(64)
    assert not second.line.waiting
    third = Workshop(page(code))
    third.take_over(unpack(second.record()))
    whole = translated(code, (0, 64))
    for offset in whole.line.host:
        assert follow(third, offset) == follow(second, offset) == follow(whole, offset)


def test_random_pages_survive_the_journey() -> None:
    """Code nobody wrote, entered anywhere, in three generations."""
    rng = random.Random(4)
    for _ in range(40):
        body = b"".join(rng.choice((
            b"\x90", b"\x40", b"\x75" + rng.randbytes(1), b"\xeb" + rng.randbytes(1),
            b"\x0f\x84" + rng.randrange(-300, 3000).to_bytes(4, "little", signed=True), b"\xc3", b"\x0f\xa2",
            b"\xe8" + rng.randrange(-300, 5000).to_bytes(4, "little", signed=True), rng.randbytes(2),
        )) for _ in range(900))[:PAGE]
        whole, generation = Workshop(page(body)), Workshop(page(body))
        for n in range(12):
            offset = rng.randrange(PAGE - 20)
            for shop in (whole, generation):
                shop.line.unfold()
                if offset not in shop.line.host:
                    shop.translate(offset, 20)
            if n % 4 == 3 and generation.chunks:
                kept = unpack(generation.record())
                generation = Workshop(page(body))
                assert kept.fits(generation.line)
                generation.position = rng.randrange(0x2000, 0x4000)
                generation.take_over(kept)
        assert set(whole.line.host) == set(generation.line.host)
        assert {k: len(v) for k, v in whole.line.waiting.items()} == {
            k: len(v) for k, v in generation.line.waiting.items()}
        for offset in whole.line.host:
            assert follow(whole, offset) == follow(generation, offset)


def test_every_byte_that_was_translated_is_compared() -> None:
    code = asm(PROGRAM, VA)
    kept = unpack(translated(code, ENTRIES).record())
    assert kept.fits(page(code))
    covered = {i for a, b in zip(kept.ranges[::2], kept.ranges[1::2], strict=True) for i in range(a, b)}
    assert covered.issuperset(range(7))
    assert 300 not in covered
    for i in range(PAGE):
        changed = bytearray(code.ljust(PAGE, b"\xf4"))
        changed[i] ^= 1
        assert kept.fits(page(bytes(changed))) == (i not in covered)


def test_bytes_decide_only_as_far_as_they_are_looked_at() -> None:
    """What follows the last instruction looked at may change freely; what it might depend on may not."""
    line = page(b"\x90\xc3")
    kept = unpack(translated(b"\x90\xc3").record())
    for i in range(2, PAGE):
        changed = bytearray(line.code[:PAGE])
        changed[i] ^= 0xFF
        other = page(bytes(changed))
        if kept.fits(other):  # then a translation of it is the same
            made = translate(other, 0, Templates(0), FIRST)
            assert made.code == kept.code


@pytest.mark.parametrize("change", ["devices", "size", "fewer devices"])
def test_what_else_a_line_must_agree_in(change: str) -> None:
    code = asm(PROGRAM, VA)
    shop = Workshop(page(code))
    shop.line.devices = {512}
    shop.translate(0)
    kept = unpack(shop.record())
    line = page(code)
    assert kept.fits(line)  # it leaves more to the simulator than it must
    if change == "devices":
        line.devices = {7}
        assert not kept.fits(line)
    elif change == "fewer devices":
        line.devices = {512}
        assert kept.fits(line)
    else:
        single = single_line(VA, (1, 2), 0, code[:20])
        assert not kept.fits(single)


def test_devices_come_along() -> None:
    shop = Workshop(page(asm(PROGRAM, VA)))
    shop.line.devices = {512}
    shop.translate(0)
    other = Workshop(page(asm(PROGRAM, VA)))
    other.take_over(unpack(shop.record()))
    assert other.line.devices == {512}


def test_covers() -> None:
    code = asm(PROGRAM, VA)
    less, more = unpack(translated(code).record()), unpack(translated(code, ENTRIES).record())
    assert more.covers(less)
    assert not less.covers(more)
    assert less.covers(less)
    other = unpack(translated(b"\x40" + code[1:], ENTRIES).record())
    assert not other.covers(less)
    assert not unpack(translated(code, mode=modes.USER).record()).covers(less)


def test_records_that_are_none() -> None:
    record = translated(asm(PROGRAM, VA), ENTRIES).record()
    for length in range(0, len(record), 3):
        with pytest.raises(ValueError, match="record"):
            unpack(record[:length])
    with pytest.raises(ValueError, match="record"):
        unpack(record + b"\0")


def test_unfolding_twice_changes_nothing() -> None:
    shop = translated(asm(PROGRAM, VA), ENTRIES)
    host = dict(shop.line.host)
    shop.line.unfold()
    assert shop.line.host == host
    assert shop.line.kept is None
    assert isinstance(shop.chunks[0].jumps, array)
