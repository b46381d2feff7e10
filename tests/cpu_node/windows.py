"""What the host has mapped, against what windows believe and the page tables grant."""

from __future__ import annotations

from pathlib import Path

from cpu_node import layout as at
from cpu_node.contexts import Contexts
from tests.cpu_node.board import RW, US, P

WINDOWS_END = at.WINDOWS + at.WINDOW_COUNT * at.WINDOW_STRIDE


def host_mappings() -> list[tuple[int, int, bool, int]]:
    """(first, end, writable, file offset) of accessible mappings inside the windows."""
    out = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, offset = line.split()[:3]
        first, end = (int(part, 16) for part in span.split("-"))
        if at.WINDOWS <= first < WINDOWS_END and rights[0] == "r":
            out.append((first, end, rights[1] == "w", int(offset, 16)))
    return out


def mapping_count() -> int:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(at.WINDOWS <= int(line.split("-")[0], 16) < WINDOWS_END for line in lines)


def check(contexts: Contexts) -> None:
    """The host's mappings, page by page, against the windows' books and the protection of code."""
    host: dict[int, tuple[int, bool]] = {}
    for first, end, writable, offset in host_mappings():
        for ha in range(first, end, 4096):
            host[ha >> 12] = ((offset + ha - first) >> 12, writable)
    code = contexts.code
    booked = set()
    for space in contexts.spaces.values():
        for window in space.windows:
            base = window.ha >> 12
            for va_page, (pa_page, writable, _) in window.small.items():
                booked.add(base + va_page)
                assert host[base + va_page] == (pa_page, writable), f"page {va_page:#x}"
                assert (window, va_page) in code.small[pa_page]
            for va_big, (frame, writable, _) in window.big.items():
                assert (window, va_big) in code.big[frame]
                for k in range(1024):
                    if frame << 10 | k >= contexts.memory.size >> 12 or va_big << 10 | k in window.small:
                        continue
                    booked.add(base + (va_big << 10 | k))
                    pa_page, may_write = host[base + (va_big << 10 | k)]
                    assert pa_page == frame << 10 | k
                    assert writable or not may_write
    assert booked == set(host), f"not in the books: {[hex(p) for p in sorted(set(host) - booked)[:5]]}"
    mappings = sum(window.mappings() for space in contexts.spaces.values() for window in space.windows)
    split = contexts.code.splits() * 2 * len(contexts.spaces)
    assert mapping_count() <= mappings + split
    for page, (pa_page, writable) in host.items():
        assert not (writable and code.protected(pa_page)), f"code page {pa_page:#x} is writable at {page:#x}"


ALL = P | RW | US
