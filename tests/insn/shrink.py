"""Makes a failing case small: fewer instructions, zero registers, default FPU state, empty and fewer pages.

`shrink(case, fails)` keeps every change after which `fails(case)` is still true, until none is left to try.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from cpu_node.decode import TooLong, Truncated, Undefined, decode
from tests.insn.state import ESP, FX_ST, FX_XMM, HLT, PAGE_SIZE, Case, Page, fx_image

NOP = 0x90
MAX_ROUNDS = 4
Change = Callable[[Case], Case]


def shrink(case: Case, fails: Callable[[Case], bool]) -> Case:
    for _ in range(MAX_ROUNDS):
        before = case
        for change in _changes(case):
            candidate = change(case)
            if candidate != case and fails(candidate):
                case = candidate
        if case == before:
            break
    return case


def _changes(case: Case) -> Iterator[Change]:
    yield from _code_changes(case)
    yield lambda c: replace(c, fx=fx_image())
    yield lambda c: replace(c, fx=fx_image()[:FX_ST] + c.fx[FX_ST:])
    for offset in (*range(FX_ST, FX_XMM, 16), *range(FX_XMM, FX_XMM + 128, 16)):
        yield lambda c, o=offset: replace(c, fx=c.fx[:o] + bytes(16) + c.fx[o + 16 :])  # type: ignore[misc]
    yield lambda c: replace(c, eflags=0)
    for bit in range(12):
        yield lambda c, b=bit: replace(c, eflags=c.eflags & ~(1 << b))  # type: ignore[misc]
    for reg in range(8):
        for value in (0, 1) if reg != ESP else ():
            yield lambda c, r=reg, v=value: replace(c, regs=(*c.regs[:r], v, *c.regs[r + 1 :]))  # type: ignore[misc]
    for page in case.pages:
        if page.va == case.eip & -PAGE_SIZE:
            continue
        yield lambda c, va=page.va: replace(c, pages=tuple(p for p in c.pages if p.va != va))  # type: ignore[misc]
        yield lambda c, va=page.va: _with_page(c, va, bytes(PAGE_SIZE))  # type: ignore[misc]
        for start in range(0, PAGE_SIZE, 512):
            yield lambda c, va=page.va, s=start: _zero_part(c, va, s)  # type: ignore[misc]


def _code_changes(case: Case) -> Iterator[Change]:
    starts = list(_instructions(case))
    for start, _ in starts:  # end earlier
        yield lambda c, s=start: _with_code(c, s, bytes((HLT,)) * (c.code_length - s))  # type: ignore[misc]
    for start, length in starts:
        yield lambda c, s=start, n=length: _with_code(c, s, bytes((NOP,)) * n)  # type: ignore[misc]


def _instructions(case: Case) -> Iterator[tuple[int, int]]:
    """(offset, length) one after the other from eip, as far as they decode."""
    code = case.code()
    offset = 0
    while offset < len(code):
        try:
            length = decode(code, offset).length
        except (Undefined, TooLong, Truncated):
            return
        yield offset, length
        offset += length


def _with_code(case: Case, offset: int, code: bytes) -> Case:
    for i, byte in enumerate(code):
        va = case.eip + offset + i
        page = next((p for p in case.pages if p.va == va & -PAGE_SIZE), None)
        if page is not None:
            at = va % PAGE_SIZE
            case = _with_page(case, page.va, page.data[:at] + bytes((byte,)) + page.data[at + 1 :])
    return case


def _zero_part(case: Case, va: int, start: int) -> Case:
    page = next((p for p in case.pages if p.va == va), None)
    if page is None:
        return case
    return _with_page(case, va, page.data[:start] + bytes(512) + page.data[start + 512 :])


def _with_page(case: Case, va: int, data: bytes) -> Case:
    pages = tuple(Page(va, data, p.writable) if p.va == va else p for p in case.pages)
    return replace(case, pages=pages)
