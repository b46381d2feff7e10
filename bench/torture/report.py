"""The result in words: the table of pauses by device, and what is written into docs/live-swap.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.torture.faults import Fault

BEGIN, END = "<!-- written by `make torture` -->", "<!-- end of what `make torture` writes -->"
QUANTILES = (0.5, 0.99, 1.0)
UNSEEN = ("consoles", "memory")  # without a connection to the CPU: their pauses are their own


def quantile(values: Sequence[float], q: float) -> float:
    """Of what is not empty: the value that so many are not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def table(done: Sequence[Fault], trip_ns: float) -> str:
    """Markdown: a row for each process, then all devices'; the same as multiples of the bus round trip."""
    rows = ["| | kills | p50 ms | p99 ms | max ms | swaps | p50 ms | p99 ms | max ms |",
            "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for device in sorted({fault.device for fault in done}):
        rows.append(_row(device, [f for f in done if f.device == device], 1e6, "{:.1f}"))
    devices = [f for f in done if f.device not in UNSEEN]
    rows.append(_row("all", devices, 1e6, "{:.1f}"))
    rows.append(_row("all, in round trips", devices, trip_ns, "{:.0f}"))
    return "\n".join(rows)


def _row(name: str, faults: Sequence[Fault], unit_ns: float, form: str) -> str:
    cells = [name]
    for kind in ("kill", "swap"):
        these = [f for f in faults if f.kind == kind]
        pauses = [f.pause_ns for f in these if f.pause_ns is not None]
        cells.append(str(len(these)))
        cells += [form.format(quantile(pauses, q) / unit_ns) if pauses else "-" for q in QUANTILES]
    return f"| {' | '.join(cells)} |"


def write(document: Path, text: str, begins: str = BEGIN, ends: str = END) -> None:
    """Put `text` between the marks of a Markdown file."""
    before, begin, rest = document.read_text(encoding="utf-8").partition(begins)
    _, end, after = rest.partition(ends)
    if not begin or not end:
        raise ValueError(f"{document} has no section of ours: {begins} ... {ends}")
    document.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")
