"""Pictures of a trace as a whole, SVG: histograms of latencies, who talks to whom, activity over time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from math import cos, hypot, log, log2, pi, sin

from tracing.activity import Activity
from tracing.explain import Explained
from tracing.explaintext import clean, number, time
from tracing.histogram import Histogram, together

WIDTH = 1040
DECADES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
DEVICES_MAX = 24
GRAPH_MAX = 20  # nodes


def _t(text: str) -> str:
    return escape(clean(text))


# --- histograms


def by_device(found: Explained) -> list[tuple[str, Histogram, Histogram]]:
    """(node, waits in its queue, its work), those with most frames first."""
    queued: dict[str, list[Histogram]] = {}
    handled: dict[str, list[Histogram]] = {}
    for pair in found.pairs.values():
        if pair.receiver.endswith(".io"):
            continue  # answers: nobody works there
        queued.setdefault(pair.receiver, []).append(pair.queued)
        handled.setdefault(pair.receiver, []).append(pair.handled)
    rows = [(node, together(parts), together(handled[node])) for node, parts in queued.items()]
    rows = [row for row in rows if row[1].count or row[2].count]
    return sorted(rows, key=lambda row: -row[1].count - row[2].count)[:DEVICES_MAX]


def histogram(node: str, queued: Histogram, handled: Histogram) -> str:
    """One <svg>: both on a logarithmic axis of time, four columns for a power of two are joined to two."""
    wide, high, left, top = 330.0, 132.0, 10.0, 26.0
    low, top_ns = DECADES[0], DECADES[-1]

    def x(ns: float) -> float:
        part = log(min(max(ns, low), top_ns) / low) / log(top_ns / low)
        return left + part * (wide - 2 * left)

    columns = 60
    bins = [[0.0] * columns, [0.0] * columns]
    for row, source in zip(bins, (queued, handled), strict=True):
        for begin, end, count in source.rows():
            first, last = _column(begin, low, top_ns, columns), _column(end, low, top_ns, columns)
            for place in range(first, last + 1):
                row[place] += count / (last + 1 - first)
    peak = max(*bins[0], *bins[1]) or 1.0
    step = (wide - 2 * left) / columns
    floor = high - 24
    out = [f'<svg class="chart small" viewBox="0 0 {wide:g} {high:g}" role="img" aria-label="latencies">']
    out.append(f'<text class="node" x="{left}" y="14">{_t(node[:20])}</text>')
    out.append(f'<text class="tick" text-anchor="end" x="{wide - left}" y="14">'
               f"{number(queued.count)} frames · half within {time(queued.quantile(0.5))} + "
               f"{time(handled.quantile(0.5))}</text>")  # fmt: skip
    for ns in DECADES:
        anchor = "start" if ns == low else "end" if ns == top_ns else "middle"
        label = {1_000: "≤1 us", 1_000_000: "1 ms", 1_000_000_000: "≥1 s"}.get(ns)
        out.append(f'<line class="grid" x1="{x(ns):.1f}" x2="{x(ns):.1f}" y1="{top}" y2="{floor}"/>')
        if label is not None or ns in (10_000, 100_000, 10_000_000, 100_000_000):
            text = label or time(ns).replace(".0 ", " ")
            out.append(
                f'<text class="tick" text-anchor="{anchor}" x="{x(ns):.1f}" y="{high - 9}">{text}</text>'
            )
    for row, name in zip(bins, ("wait", "work"), strict=True):
        points = [f"M{left} {floor}"]
        for place, many in enumerate(row):
            height = many / peak * (floor - top)
            points.append(f"L{left + place * step:.1f} {floor - height:.1f}H{left + (place + 1) * step:.1f}")
        out.append(f'<path class="{name} area" d="{"".join(points)}L{wide - left} {floor}Z"/>')
    return "".join(
        [*out, f'<line class="axis" x1="{left}" x2="{wide - left}" y1="{floor}" y2="{floor}"/></svg>']
    )


def _column(ns: int, low: int, high: int, columns: int) -> int:
    part = log(min(max(ns, low), high) / low) / log(high / low)
    return min(int(part * columns), columns - 1)


# --- who talks to whom


def talk(found: Explained) -> dict[tuple[str, str], tuple[int, int]]:
    """(sender, receiver) -> frames, ns in the queue. The CPU's two threads are one."""
    edges: dict[tuple[str, str], tuple[int, int]] = {}
    for pair in found.pairs.values():
        key = pair.sender.removesuffix(".io"), pair.receiver.removesuffix(".io")
        count, queued = edges.get(key, (0, 0))
        edges[key] = count + pair.count, queued + pair.queued.total
    return edges


def graph(found: Explained) -> str:
    """Nodes on an ellipse, the one that is talked to most in the middle; an arrow's width is the logarithm of
    its frames."""
    edges = talk(found)
    weight: dict[str, int] = {}
    for (a, b), (count, _) in edges.items():
        weight[a] = weight.get(a, 0) + count
        weight[b] = weight.get(b, 0) + count
    nodes = sorted(weight, key=lambda node: -weight[node])[:GRAPH_MAX]
    if not nodes:
        return ""
    peers = {node: sum(node in key for key in edges) for node in nodes}
    centre = max(nodes, key=lambda node: (peers[node], weight[node]))
    high, middle = 560, (WIDTH / 2, 280.0)
    around = _spread([node for node in nodes if node != centre], edges)
    places = {centre: middle}
    for i, node in enumerate(around):
        angle = 2 * pi * i / len(around) - pi / 2
        places[node] = middle[0] + 400 * cos(angle), middle[1] + 230 * sin(angle)
    out = [f'<svg class="chart" viewBox="0 0 {WIDTH} {high}" role="img" aria-label="who talks to whom">',
           '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" markerHeight="9" '
           'markerUnits="userSpaceOnUse" orient="auto">'
           '<path class="tip" d="M0 0.6L8 4L0 7.4Z"/></marker></defs>']  # fmt: skip
    most = max(count for count, _ in edges.values())
    labels: list[str] = []
    for (a, b), (count, queued) in sorted(edges.items(), key=lambda item: item[1]):
        if a in places and b in places and a != b:
            _arrow(out, labels, (a, b), count, queued, places[a], places[b], most)
    out += labels
    for node, (x, y) in places.items():
        radius = 20 + 12 * log2(1 + weight[node]) / log2(1 + max(weight.values()))
        out.append(f'<circle class="vertex" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"><title>{_t(node)}: '
                   f'{number(weight[node])} frames in and out</title></circle>'
                   f'<text class="node" text-anchor="middle" x="{x:.1f}" y="{y + 4:.1f}">'
                   f"{_t(node[:9])}</text>")  # fmt: skip
    return "".join([*out, "</svg>"])


def _spread(nodes: Sequence[str], edges: dict[tuple[str, str], tuple[int, int]]) -> list[str]:
    """Those with many peers far from each other, so that their arrows have room."""
    degree = {node: sum(node in key for key in edges) for node in nodes}
    ordered = sorted(nodes, key=lambda node: (-degree[node], node))
    places: list[str | None] = [None] * len(ordered)
    hubs = [node for node in ordered if degree[node] > 5]
    for i, node in enumerate(hubs):
        places[i * len(ordered) // len(hubs)] = node
    rest = iter([node for node in ordered if node not in hubs])
    return [node if node is not None else next(rest) for node in places]


def _arrow(
    out: list[str], labels: list[str], names: tuple[str, str], count: int, queued: int,
    a: tuple[float, float], b: tuple[float, float], most: int,
) -> None:  # fmt: skip
    far = hypot(b[0] - a[0], b[1] - a[1]) or 1
    ux, uy = (b[0] - a[0]) / far, (b[1] - a[1]) / far
    side = 0.09 * far + 6
    mid = (a[0] + b[0]) / 2 - uy * side, (a[1] + b[1]) / 2 + ux * side
    begin, end = _towards(a, mid, 33), _towards(b, mid, 36)
    width = 0.8 + 5.2 * log2(1 + count) / log2(1 + most)
    opacity = 0.25 + 0.6 * log2(1 + count) / log2(1 + most)
    out.append('<path class="edge" marker-end="url(#tip)" '
               f'style="stroke-width:{width:.1f};opacity:{opacity:.2f}" '
               f'd="M{begin[0]:.1f} {begin[1]:.1f}Q{mid[0]:.1f} {mid[1]:.1f} {end[0]:.1f} {end[1]:.1f}">'
               f"<title>{_t(names[0])} to {_t(names[1])}: {number(count)} frames, "
               f"{time(queued / count)} in the queue on average</title></path>")  # fmt: skip
    if count * 50 >= most:
        x, y = (a[0] + b[0]) / 4 + mid[0] / 2, (a[1] + b[1]) / 4 + mid[1] / 2
        labels.append(
            f'<text class="tick halo" text-anchor="middle" x="{x:.1f}" y="{y + 3:.1f}">{number(count)}</text>'
        )


def _towards(a: tuple[float, float], b: tuple[float, float], far: float) -> tuple[float, float]:
    whole = hypot(b[0] - a[0], b[1] - a[1]) or 1
    return a[0] + (b[0] - a[0]) / whole * far, a[1] + (b[1] - a[1]) / whole * far


# --- activity


def activity(shown: Activity) -> str:
    """A row for each node, steps per second over time; each row has its own scale."""
    rows = sorted(shown.rows.items(), key=lambda item: -sum(item[1].steps))[:DEVICES_MAX]
    bins = shown.bins
    if not rows or not bins:
        return ""
    left, right, row_high, gap = 86, 118, 28, 8
    high = len(rows) * (row_high + gap) + 26
    step = (WIDTH - left - right) / bins
    out = [f'<svg class="chart" viewBox="0 0 {WIDTH} {high}" role="img" aria-label="activity over time">']
    whole_s = bins * shown.bin_ns / 1e9
    for s in _round(whole_s):
        x = left + s / whole_s * (WIDTH - left - right)
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{high - 22}"/>'
                   f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{high - 8}">'
                   f"{s:g} s</text>")  # fmt: skip
    for place, (node, row) in enumerate(rows):
        floor = (place + 1) * (row_high + gap)
        peak = max(row.steps) or 1
        points = [f"M{left} {floor}"]
        for i, count in enumerate(row.steps[:bins]):
            points.append(
                f"L{left + i * step:.1f} {floor - count / peak * row_high:.1f}H{left + (i + 1) * step:.1f}"
            )
        points.append(f"L{WIDTH - right} {floor}Z")
        per_s = peak * 1e9 / shown.bin_ns
        out.append(f'<text class="node" x="8" y="{floor - 6}">{_t(node[:14])}</text>'
                   f'<path class="pulse" d="{"".join(points)}"/>'
                   f'<line class="axis" x1="{left}" x2="{WIDTH - right}" y1="{floor}" y2="{floor}"/>'
                   f'<text class="tick" x="{WIDTH - right + 8}" y="{floor - 6}">'
                   f"up to {_rate(per_s)}/s</text>")  # fmt: skip
    return "".join([*out, "</svg>"])


def _rate(per_s: float) -> str:
    return number(round(per_s)) if per_s < 99_950 else f"{per_s / 1000:.0f} k"


def _round(whole: float) -> Iterable[float]:
    """Round moments, up to ten."""
    step = 1e-6
    while whole / step > 10:
        for factor in (2, 2.5, 2):
            step *= factor
            if whole / step <= 10:
                break
    return [i * step for i in range(int(whole / step) + 1)]
