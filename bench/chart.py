"""The plot of `make bench`: each row's ratio to QEMU and to native on a logarithmic axis, as SVG text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import floor, log10
from xml.sax.saxutils import escape

from bench.rows import Ratio, Result, Verdict

LEFT, WIDTH, RIGHT, TOP, STEP = 310, 430, 130, 54, 22
LOWEST, HIGHEST = 0.01, 1000.0
COLOURS = {Verdict.MET: "#2e7d32", Verdict.OPEN: "#b26a00", Verdict.MISSED: "#b3261e", None: "#455a64"}
NAMESPACE = "http://www.w3.org/2000/svg"
STYLE = "font-family='system-ui,sans-serif' font-size='12'"


def svg(results: Sequence[Result], caption: str) -> str:
    """One line per row: filled dots to QEMU, hollow ones to native, bars from the least to the greatest."""
    highest = max([2.0, *(r.highest for result in results for r in _ratios(result))])
    lowest = min([0.1, *(r.lowest for result in results for r in _ratios(result))])
    low = 10.0 ** floor(log10(max(lowest, LOWEST)))
    high = min(highest * 1.3, HIGHEST)

    def x(ratio: float) -> float:
        return LEFT + WIDTH * log10(min(max(ratio, low), high) / low) / log10(high / low)

    bottom = TOP + STEP * len(results)
    out = [
        f"<svg xmlns='{NAMESPACE}' viewBox='0 0 {LEFT + WIDTH + RIGHT} {bottom + 48}' {STYLE}>",
        "<rect width='100%' height='100%' fill='#ffffff'/>",
        _text(10, 18, "Backplane's time / another's: left of 1 is faster", weight="bold"),
        _text(10, 36, "filled: QEMU TCG   hollow: native   bar: least to greatest   |: target", fill="#555"),
    ]
    tick = low
    while tick <= high:
        strong = abs(tick - 1) < 1e-9
        out.append(f"<line x1='{x(tick):.1f}' x2='{x(tick):.1f}' y1='{TOP - 8}' y2='{bottom}' "
                   f"stroke='{'#000' if strong else '#ddd'}'/>")
        out.append(_text(x(tick), bottom + 14, f"{tick:g}", anchor="middle", fill="#555"))
        tick *= 10
    for number, result in enumerate(results):
        y = TOP + STEP * number + STEP // 2
        out.append(_text(LEFT - 12, y + 4, result.row.name, anchor="end"))
        words = []
        for ratio, filled in ((result.to_qemu, True), (result.to_native, False)):
            if ratio is not None:
                out.append(_mark(x, y, ratio, filled))
                words.append(f"{ratio.median:.2g}" if filled else f"({ratio.median:.2g})")
        out.append(_text(LEFT + WIDTH + 12, y + 4, " ".join(words), fill="#333"))
    out.append(_text(10, bottom + 36, caption, fill="#555", size=10))
    return "\n".join([*out, "</svg>"]) + "\n"


def _ratios(result: Result) -> list[Ratio]:
    return [r for r in (result.to_qemu, result.to_native) if r is not None]


def _mark(x: Callable[[float], float], y: int, ratio: Ratio, filled: bool) -> str:
    colour = COLOURS[ratio.verdict]
    inside = colour if filled else "#ffffff"
    parts = [f"<line x1='{x(ratio.lowest):.1f}' x2='{x(ratio.highest):.1f}' y1='{y}' y2='{y}' "
             f"stroke='{colour}' stroke-width='3' stroke-opacity='0.45'/>"]
    if ratio.target is not None:
        at = x(ratio.target)
        parts.append(f"<line x1='{at:.1f}' x2='{at:.1f}' y1='{y - 7}' y2='{y + 7}' stroke='{colour}' "
                     f"stroke-width='1.5' stroke-dasharray='{'none' if filled else '2 2'}'/>")
    parts.append(f"<circle cx='{x(ratio.median):.1f}' cy='{y}' r='4' fill='{inside}' stroke='{colour}' "
                 "stroke-width='1.5'/>")
    return "".join(parts)


def _text(x: float, y: float, words: str, anchor: str = "start", fill: str = "#000", weight: str = "normal",
          size: int = 12) -> str:
    place = f"x='{x:.1f}' y='{y}' text-anchor='{anchor}'"
    return (f"<text {place} fill='{fill}' font-weight='{weight}' font-size='{size}'>"
            f"{escape(words)}</text>")
