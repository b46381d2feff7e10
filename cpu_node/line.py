"""A line: the translation of one guest page at one linear address in one code mode.

An instruction that crosses a page border is a line of its own, of one instruction; so is a single step.
Left out: translations shared between linear addresses (host code holds guest addresses).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cpu_node.decode import Insn

if TYPE_CHECKING:
    from cpu_node.dispatch import Table
    from cpu_node.simulate import Simulator

# An instruction left to the simulator: its handler, itself, its bytes, the address behind it.
Simulated = tuple[Callable[["Simulator", Insn], None], Insn, bytes, int]

PAGE = 4096
PADDING = bytes(16)  # behind a page, so that decoding never runs off the end


@dataclass(slots=True, eq=False)
class Line:
    """Host code of a stretch of guest code."""

    va: int  # linear address of code[0]
    pa_pages: tuple[int, ...]  # physical page numbers the bytes came from
    mode: int
    code: bytes  # guest bytes, padded
    size: int  # of them real
    starts: int  # an instruction may start at offsets below this
    chain: int  # direct jumps may be chained to offsets below this (0: none)
    verify: bool = False  # host code checks its source bytes before each instruction
    host: dict[int, int] = field(default_factory=dict)  # offset -> offset in the code cache
    waiting: dict[int, list[int]] = field(default_factory=dict)  # offset -> ends of rel32 to patch
    tables: set[Table] = field(default_factory=set)
    entries: dict[int, int] = field(default_factory=dict)  # those of host that tables lead to
    kept: Chunk | None = None  # taken over from the store; not in `host` and `waiting` yet (unfold)
    stored: int = 0  # how many of its chunks the store has
    devices: set[int] = field(default_factory=set)  # offsets whose operands are devices: simulated at once
    simulated: dict[int, Simulated] = field(default_factory=dict)  # by offset
    known: bytes | None = None  # bit n: offset n is in host; None: not counted (fast_unsafe.py)
    alone: dict[int, int] = field(default_factory=dict)  # offset -> len(host) when nothing overlapped it

    def unfold(self) -> None:
        """Enter what was taken over from the store into `host` and `waiting`."""
        chunk, self.kept = self.kept, None
        if chunk is None:
            return
        self.known = None
        start = chunk.start
        self.host.update(zip(chunk.offsets, [start + host for host in chunk.hosts], strict=True))
        jumps = iter(chunk.jumps)
        for behind, target in zip(jumps, jumps, strict=True):
            self.waiting.setdefault(target, []).append(start + behind)


@dataclass(slots=True, eq=False)
class Chunk:
    """One run of the translator: maps host addresses back. Both arrays ascend together."""

    line: Line
    start: int  # offset in the code cache
    end: int
    hosts: array[int]  # host offset of each instruction, from start
    offsets: array[int]  # its guest offset in the line
    jumps: array[int]  # those to other chunks, known or to come: end of the rel32, from start; target offset


def page_line(va_page: int, pa_page: int, mode: int, code: bytes, verify: bool) -> Line:
    """The line of a whole page."""
    return Line(va_page << 12, (pa_page,), mode, code + PADDING, PAGE, PAGE, PAGE, verify)


def single_line(va: int, pa_pages: tuple[int, ...], mode: int, code: bytes, verify: bool = False) -> Line:
    """A line of the one instruction at `va`; every way out of it goes through the dispatch table."""
    return Line(va, pa_pages, mode, code + PADDING, len(code), 1, 0, verify)
