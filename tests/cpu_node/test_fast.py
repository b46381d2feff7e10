"""The inner loop in machine code against the one in Python: the same code and maps, for any bytes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from cpu_node import host_unsafe as host
from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node.emit import Templates
from cpu_node.emit_soft import templates_of
from cpu_node.fast_unsafe import FastTranslator
from cpu_node.line import PAGE, Line, page_line, single_line
from cpu_node.translate import translate
from tests.cpu_node.board import asm
from tests.cpu_node.child import isolated
from tests.golden.blocks import GROUPS

VA = 0xFFFF_F000
POSITION = 0x3000
MODES = (0, modes.USER, modes.NO_FPU, modes.USER | modes.NO_SSE, modes.TSC_SIMULATED,
         modes.USER | modes.SOFT)


def line_of(code: bytes, mode: int = 0, va: int = VA) -> Line:
    return page_line(va >> 12, 1, mode, code[:PAGE].ljust(PAGE, b"\xcc"), False)


class Pair:
    """One page translated by both, at the same places of the code cache."""

    def __init__(
        self, fast: FastTranslator, templates: Templates, code: bytes, mode: int = 0, va: int = VA
    ) -> None:
        self.fast, self.templates = fast, templates
        self.lines = line_of(code, mode, va), line_of(code, mode, va)
        self.position, self.ahead = POSITION, True
        self.cache = host.view8(at.CODE, at.CODE_SIZE)

    def translate(self, offset: int, limit: int = 250) -> int:
        """Both; returns how many instructions."""
        plain, quick = self.lines
        wanted = translate(plain, offset, self.templates, self.position, limit, self.ahead)
        made = self.fast.translate(
            quick, offset, self.templates, self.position, self.cache, limit, self.ahead
        )
        start, end = made.chunk.start, made.chunk.end
        assert bytes(self.cache[start:end]) == wanted.code
        for name in ("start", "end", "hosts", "offsets", "jumps"):
            assert getattr(made.chunk, name) == getattr(wanted.chunk, name), name
        assert made.chunk.line is quick
        assert made.returns == wanted.returns
        assert sorted(made.patches) == sorted(wanted.patches)
        assert plain.host == quick.host
        assert plain.waiting == quick.waiting
        self.position = end + 3
        return len(made.chunk.offsets)

    def everywhere(self, rng: random.Random, times: int) -> int:
        done = 0
        for _ in range(times):
            offset = rng.randrange(PAGE)
            if offset not in self.lines[0].host:
                done += self.translate(offset, rng.choice((1, 2, 30, 250)))
        return done


def plausible(rng: random.Random) -> bytes:
    """Code with much control flow in it."""
    pieces: list[Callable[[], bytes]] = [
        lambda: bytes((0x50 | rng.randrange(16),)),
        lambda: b"\x8b" + bytes((rng.randrange(256), rng.randrange(256))) + rng.randbytes(4),
        lambda: bytes((0x70 | rng.randrange(16), rng.randrange(256))),
        lambda: b"\x0f" + bytes((0x80 | rng.randrange(16),))
        + rng.randrange(-4200, 4200).to_bytes(4, "little", signed=True),
        lambda: b"\xe8" + rng.randrange(-4200, 4200).to_bytes(4, "little", signed=True),
        lambda: b"\xe9" + rng.randrange(-4200, 4200).to_bytes(4, "little", signed=True),
        lambda: b"\xeb" + rng.randbytes(1),
        lambda: bytes((0xE0 | rng.randrange(4),)) + rng.randbytes(1),
        lambda: b"\xff" + rng.randbytes(6),
        lambda: rng.choice((b"\xc3", b"\xc2\x08\x00", b"\xcd\x80", b"\x0f\x0b", b"\xf4", b"\x0f\xa2")),
        lambda: rng.choice((b"\x9c", b"\x9d", b"\x60", b"\x61", b"\xc9", b"\xf3\xa5", b"\xfb", b"\x64\xa1")),
        lambda: b"\x64\x8b" + rng.randbytes(5),
        lambda: b"\x66" * rng.randrange(12) + b"\x90",
        lambda: b"\x2e" * rng.randrange(12)
        + rng.choice((b"\x74\x05", b"\xe8\x05\x00\x00\x00", b"\xeb\x05", b"\xc3")),
        lambda: b"\x0f" + rng.randbytes(5),
        lambda: rng.randbytes(3),
    ]
    out = b""
    while len(out) < PAGE:
        out += rng.choice(pieces)()
    return out[:PAGE]


@pytest.mark.parametrize("mode", MODES)
@isolated
def test_code_full_of_jumps(mode: int) -> None:
    rng, fast, templates = random.Random(mode), FastTranslator(), templates_of(mode)
    done = 0
    for _ in range(60):
        va = rng.choice((0, 0x8000_0000, VA))
        done += Pair(fast, templates, plausible(rng), mode, va).everywhere(rng, 25)
    assert done > 4000


@isolated
def test_any_bytes() -> None:
    rng, fast, templates = random.Random(8), FastTranslator(), Templates(0)
    for _ in range(150):
        Pair(fast, templates, rng.randbytes(PAGE)).everywhere(rng, 25)


@isolated
def test_golden_blocks() -> None:
    fast = FastTranslator()
    for block in [block for group in GROUPS.values() for block in group]:
        code = block.text if isinstance(block.text, bytes) else asm(block.text, VA)
        Pair(fast, templates_of(block.mode), code, block.mode).translate(0)


@isolated
def test_end_of_the_page() -> None:
    """Code that ends with the page, runs on behind it, crosses it, and stops while it crosses."""
    fast, templates = FastTranslator(), Templates(0)
    for end in (b"\x90\x90", b"\xc3", b"\x0f", b"\xb8\x01", b"\x74", b"\x74\x01", b"\xe8\x01", b"\x0f\x0b",
                b"\xcd", b"\x64\xa1", b"\x0f\x20", b"\xea\x00\x00", b"\x66\x66", b"\xf0"):
        pair = Pair(fast, templates, b"\x90" * (PAGE - len(end)) + end)
        pair.translate(PAGE - len(end) - 3)
        for offset in range(PAGE - len(end), PAGE):
            if offset not in pair.lines[0].host:
                pair.translate(offset)


@isolated
def test_longest_chunks() -> None:
    fast, templates = FastTranslator(), Templates(0)
    for code in (b"\x60" * PAGE, b"\x9d" * PAGE, b"\x74\x00" * (PAGE // 2), b"\xe8\x00\x00\x00\x00" * 800,
                 asm("top: jmp top"), b"\xeb\xfe" * 2000, b"\xeb\x00" * 2000):
        Pair(fast, templates, code).translate(0)


@isolated
def test_after_the_other_translator_was_at_the_page() -> None:
    """What is known of a line doesn't depend on who translated it."""
    rng, fast, templates = random.Random(5), FastTranslator(), Templates(0)
    pair = Pair(fast, templates, plausible(rng))
    for number in range(20):
        offset = rng.randrange(PAGE)
        if offset in pair.lines[0].host:
            continue
        if number % 2:
            for line in pair.lines:
                made = translate(line, offset, templates, pair.position, 20)
                line.known = None
            pair.position = made.chunk.end
        else:
            pair.translate(offset, 20)


@isolated
def test_more_templates_than_there_is_room_for() -> None:
    """The trie in memory is begun anew; the one in Python stays."""
    rng, fast, templates = random.Random(6), FastTranslator(), Templates(0)
    code = plausible(rng)
    Pair(fast, templates, code).everywhere(rng, 20)
    for _ in range(5):
        fast._end = at.TRANSLATOR_SIZE - 0x10000 - 16 * rng.randrange(0x400)
        Pair(fast, templates, plausible(rng)).everywhere(rng, 20)
        assert fast._end < at.TRANSLATOR_SIZE // 2


@isolated
def test_lines_it_does_not_take() -> None:
    fast = FastTranslator()
    assert fast.takes(line_of(b""))
    verifying, with_devices = line_of(b""), line_of(b"")
    verifying.verify = True
    with_devices.devices.add(5)
    single = single_line(VA, (1, 2), 0, bytes(5))
    assert not any(fast.takes(line) for line in (verifying, with_devices, single))
