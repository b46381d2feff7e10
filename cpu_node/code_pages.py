"""Which physical pages hold translated code, and where they are shown: those places are read-only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpu_node.tlb import Tlb
    from cpu_node.window import Window


class CodePages:
    """Which physical pages hold translated code, and where they are mapped writable."""

    def __init__(self, tlb: Tlb) -> None:
        self.tlb = tlb
        self.lines: dict[int, set[object]] = {}  # physical page -> its lines
        self.mixed: set[int] = set()  # pages of code and data: not protected, translations verify themselves
        self.small: dict[int, set[tuple[Window, int]]] = {}  # physical page -> (window, linear page)
        self.big: dict[int, set[tuple[Window, int]]] = {}  # 4 MiB frame -> (window, linear 4 MiB page)

    def add(self, pa_page: int, line: object) -> bool:
        """A page has a line; True if it is protected from now on."""
        lines = self.lines.get(pa_page)
        if lines is not None:
            lines.add(line)
            return False
        self.lines[pa_page] = {line}
        if pa_page in self.mixed:
            return False
        self.protect(pa_page)
        return True

    def remove(self, pa_page: int) -> set[object] | None:
        """Forget a page's lines; returns them, None where it held no code.

        Where it is mapped it stays read-only until a write faults.
        """
        self.tlb.guarded[pa_page] = 0
        return self.lines.pop(pa_page, None)

    def clear(self) -> None:
        """Forget everything but where pages are mapped."""
        for pa_page in self.lines:
            self.tlb.guarded[pa_page] = 0
        self.lines.clear()
        self.mixed.clear()

    def protected(self, pa_page: int) -> bool:
        """Must writes to the page fault?"""
        return pa_page in self.lines and pa_page not in self.mixed

    def splits(self) -> int:
        """Into how many more mappings protection divides one of all memory, at most."""
        return 2 * len(runs(sorted(self.lines)))

    def protect(self, pa_page: int) -> None:
        """Make every mapping of the page read-only."""
        self.tlb.guarded[pa_page] = 1
        self.tlb.drop_writes()
        for window, va_page in self.small.get(pa_page, ()):
            if window.small[va_page][1]:
                window.set_writable(va_page, pa_page, False)
        for window, va_big in self.big.get(pa_page >> 10, ()):
            if window.big[va_big][1]:
                window.protect(va_big << 22 | (pa_page & 0x3FF) << 12, 4096, False)


def runs(pages: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, count)."""
    out: list[tuple[int, int]] = []
    for page in pages:
        if out and out[-1][0] + out[-1][1] == page:
            out[-1] = (out[-1][0], out[-1][1] + 1)
        else:
            out.append((page, 1))
    return out
