"""A chain as a picture: a lane for each process, SVG. Long waits are drawn shorter than in proportion: an
interval's width is the root of its time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from html import escape
from itertools import pairwise
from math import sqrt

from tracing.explaintext import clean, time
from tracing.legs import Leg, Slow

WIDTH, LEFT, RIGHT = 1040, 86, 14
ROW, GAP = 17, 7  # px: a row of a lane, between lanes
CHAR = 5.7  # px of a letter, about
WAIT, WORK, CPU, DISK, DELIVERY = "wait", "work", "cpu", "disk", "delivery"  # classes in the style sheet
NAMES = {
    CPU: "the CPU: access, or its handler", WAIT: "in a queue", WORK: "a process at work", DISK: "file I/O",
    DELIVERY: "until the CPU took the interrupt",
}  # fmt: skip


def classes(leg: Leg) -> tuple[str, str]:
    """Of the time before it was taken, and of the time after."""
    match leg.kind:
        case "vector":
            return DELIVERY, CPU
        case "posted" | "synchronous" | "mirrored" | "open-bus" | "split" | "unsent" | "eoi" | "answer":
            return WAIT, CPU
        case "disk":
            return WAIT, DISK
    return WAIT, WORK


def timeline(slow: Slow) -> str:
    """One <svg> element."""
    x = _axis(slow)
    lanes: dict[str, list[float]] = {}  # node -> for each of its rows, up to which x it is taken
    tops: list[tuple[Leg, int, float, float]] = []
    for leg in slow.legs:
        rows = lanes.setdefault(leg.node, [])
        begin = x(max(0, leg.at_ns - leg.waited_ns))
        end = max(x(leg.at_ns + max(leg.took_ns, 0)), x(leg.at_ns) + 5)
        row = next((i for i, taken in enumerate(rows) if taken <= begin - 2), len(rows))
        if row == len(rows):
            rows.append(0.0)
        rows[row] = end
        tops.append((leg, row, begin, end))
    starts: dict[str, int] = {}
    y = 4
    for node, rows in lanes.items():
        starts[node] = y
        y += len(rows) * ROW + GAP
    out = [f'<svg class="chart" viewBox="0 0 {WIDTH} {y + 24}" role="img" aria-label="timeline">']
    for i, (node, rows) in enumerate(lanes.items()):
        height = len(rows) * ROW
        out.append(f'<rect class="lane{i % 2}" x="0" y="{starts[node] - GAP // 2}" width="{WIDTH}" '
                   f'height="{height + GAP}"/>')  # fmt: skip
        out.append(f'<text class="node" x="8" y="{starts[node] + ROW / 2 + 4}">{_t(node[:14])}</text>')
    out += _ticks(slow, x, y)
    out += _links(tops, starts, x)
    for leg, row, begin, _ in tops:
        out += _bars(leg, starts[leg.node] + row * ROW, begin, x)
    free: dict[tuple[str, int], list[float]] = {}
    for leg, row, begin, _ in tops:
        free.setdefault((leg.node, row), []).append(begin)
    for leg, row, begin, end in tops:
        following = min((b for b in free[leg.node, row] if b > begin), default=WIDTH - RIGHT + 8.0)
        out += _label(leg, starts[leg.node] + row * ROW, begin, x(leg.at_ns), end, following)
    return "".join([*out, "</svg>"])


def _axis(slow: Slow) -> Callable[[int], float]:
    edges = {0, slow.took_ns}
    for leg in slow.legs:
        edges |= {leg.at_ns - leg.waited_ns, leg.at_ns, leg.at_ns + max(leg.took_ns, 0)}
    places = sorted(edge for edge in edges if 0 <= edge <= slow.took_ns)
    wide = [sqrt(b - a) for a, b in pairwise(places)]
    scale = (WIDTH - LEFT - RIGHT) / (sum(wide) or 1)
    xs = [float(LEFT)]
    for w in wide:
        xs.append(xs[-1] + w * scale)

    def x(ns: int) -> float:
        i = min(max(bisect_right(places, ns) - 1, 0), len(places) - 2) if len(places) > 1 else 0
        if len(places) < 2:
            return float(LEFT)
        part = (ns - places[i]) / (places[i + 1] - places[i])
        return xs[i] + min(max(part, 0.0), 1.0) * (xs[i + 1] - xs[i])

    return x


def _ticks(slow: Slow, x: Callable[[int], float], y: int) -> list[str]:
    moments = sorted({0, slow.took_ns, *(leg.at_ns for leg in slow.legs)})
    chosen: list[int] = [0]
    for ns in moments[1:-1]:
        if x(ns) - x(chosen[-1]) > 74 and x(slow.took_ns) - x(ns) > 74:
            chosen.append(ns)
    if slow.took_ns:
        chosen.append(slow.took_ns)
    out: list[str] = []
    for ns in chosen:
        anchor = "end" if ns == slow.took_ns and ns else "start" if not ns else "middle"
        out.append(f'<line class="grid" x1="{x(ns):.1f}" x2="{x(ns):.1f}" y1="0" y2="{y}"/>')
        label = time(ns) if ns else "0"
        out.append(f'<text class="tick" text-anchor="{anchor}" x="{x(ns):.1f}" y="{y + 14}">{label}</text>')
    return out


def _links(
    tops: list[tuple[Leg, int, float, float]], starts: dict[str, int], x: Callable[[int], float]
) -> list[str]:
    """From who sent a frame to who takes it, when it was sent."""
    out: list[str] = []
    last: dict[str, float] = {}  # where the last leg of a lane is
    for leg, row, begin, _ in tops:
        y = starts[leg.node] + row * ROW + ROW / 2
        if leg.sender in last and leg.sender != leg.node:
            out.append(f'<path class="link" d="M{begin:.1f} {last[leg.sender]:.1f}V{y:.1f}"/>')
        last[leg.node] = y
    return out


def _bars(leg: Leg, y: float, begin: float, x: Callable[[int], float]) -> list[str]:
    before, after = classes(leg)
    taken = x(leg.at_ns)
    out = ["<g>", f"<title>{_t(_told(leg))}</title>"]
    if leg.waited_ns > 0:
        out.append(f'<rect class="{before} thin" x="{begin:.1f}" y="{y + 5.5}" '
                   f'width="{max(taken - begin, 0.8):.1f}" height="6"/>')  # fmt: skip
    width = x(leg.at_ns + max(leg.took_ns, 0)) - taken
    if width >= 2.5:
        out.append(f'<rect class="{after}" rx="2" x="{taken:.1f}" y="{y + 2}" width="{width:.1f}" '
                   f'height="13"/>')  # fmt: skip
    else:
        out.append(f'<rect class="{after}" x="{taken - 1:.1f}" y="{y + 2}" width="2.5" height="13"/>')
    return [*out, "</g>"]


def _label(leg: Leg, y: float, begin: float, taken: float, end: float, following: float) -> list[str]:
    text = leg.text.partition(", from ")[0]
    room = following - end - 10
    taken_text = f'y="{y + 12.5}">'
    if len(text) * CHAR <= room:
        return [f'<text class="leg" x="{end + 4:.1f}" {taken_text}{_t(text)}</text>']
    if room > 9 * CHAR:
        short = text[: int(room / CHAR) - 1] + "…"
        return [f'<text class="leg" x="{end + 4:.1f}" {taken_text}{_t(short)}</text>']
    if taken - begin > (len(text) + 4) * CHAR:  # on the bar of its wait
        middle, wide = (begin + taken) / 2, len(text) * CHAR + 10
        return [
            f'<rect class="patch" x="{middle - wide / 2:.1f}" y="{y + 2}" width="{wide:.1f}" height="13"/>',
            f'<text class="leg" text-anchor="middle" x="{middle:.1f}" {taken_text}{_t(text)}</text>',
        ]
    return []


def _told(leg: Leg) -> str:
    parts = [leg.text, f"{leg.node}, process {leg.pid}", f"at +{time(leg.at_ns)}"]
    if leg.waited_ns:
        parts.append(f"waited {time(leg.waited_ns)}")
    if leg.took_ns:
        parts.append("never done" if leg.took_ns < 0 else f"took {time(leg.took_ns)}")
    return "\n".join([*parts, *([leg.detail] if leg.detail else [])])


def _t(text: str) -> str:
    return escape("\n".join(clean(line) for line in text.split("\n")))
