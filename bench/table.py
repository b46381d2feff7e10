"""Tables in plain text: the results of `make bench`, and any list of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.rows import Ratio, Result

HEAD = ("row", "Backplane", "QEMU", "ratio (spread)", "target", "", "native", "ratio (spread)", "target", "")


def aligned(rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Cells in columns; numbers of the columns in `left` are flush left, the others right."""
    cells = list(rows)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) if i in left else c.rjust(w)
                  for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in cells
    )


def table(results: Iterable[Result]) -> str:
    """One line per row; times are medians, of several programs the geometric mean of their times."""
    rows: list[Sequence[str]] = [HEAD]
    for r in results:
        rows.append((r.row.name, time(r.ours_ns), time(r.qemu_ns), *_cells(r.to_qemu),
                     time(r.native_ns), *_cells(r.to_native)))
    return aligned(rows, left=(0, 5, 9))


def _cells(ratio: Ratio | None) -> tuple[str, str, str]:
    if ratio is None:
        return "-", "-", ""
    target = "-" if ratio.target is None else f"{ratio.target:g}"
    verdict = ratio.verdict.value if ratio.verdict is not None else ""
    return f"{ratio.median:.2f} ({ratio.lowest:.2f}-{ratio.highest:.2f})", target, verdict


def time(ns: float | None) -> str:
    """Three digits and a unit."""
    if ns is None:
        return "-"
    for unit, scale in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= scale:
            return f"{ns / scale:.3g} {unit}"
    return f"{ns:.3g} ns"
