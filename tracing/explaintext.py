"""What `launcher explain` prints: text for people, or JSON. Pictures: tracing/report.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from tracing.explain import OF_A_KIND, WAYS, Explained, Pair, Register
from tracing.histogram import Histogram
from tracing.interrupts import Vector
from tracing.legs import Leg, Slow

SHARES = 4  # of a chain's time, in words
NO_CONTROL = dict.fromkeys((*range(32), *range(127, 160)), "?")


def clean(text: str) -> str:
    """Without control characters: names come from the trace."""
    return text.translate(NO_CONTROL)


def time(ns: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= scale * 0.9995:
            value = ns / scale
            digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
            return f"{value:.{digits}f} {unit}"
    return f"{ns:.0f} ns"


def number(value: int) -> str:
    return f"{value:,}".replace(",", " ")


def part(count: int, whole: int) -> str:
    """In %; 100 only if it is all."""
    if not whole:
        return "-"
    value = 100 * count / whole
    return f"{min(value, 99.99):.2f} %" if count < whole else "100 %"


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> Iterator[str]:
    """Cells in columns; those in `left` are flush left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = zip(row, widths, strict=True)
        yield (
            "  "
            + "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip()
        )


def text(found: Explained, top: int) -> Iterator[str]:
    """Lines."""
    for title, lines in sections(found, top):
        if title:
            yield ""
            yield title
        yield from (clean(line) for line in lines)


def sections(found: Explained, top: int) -> Iterator[tuple[str, Iterable[str]]]:
    yield "", summary(found)
    slowest = found.slowest(top)
    if slowest:
        yield f"Slowest chains (at most {OF_A_KIND} of a kind)", _slowest(found, slowest)
        yield "Chains by what began them (those that took longest altogether)", aligned(kinds(found, top))
    if found.registers:
        yield "Busiest registers", aligned(registers(found, top))
    if found.interrupts.vectors:
        yield (
            "Interrupts (delay: from the line's rise to the vector)",
            aligned(vectors(found, top), (0, 1, 2)),
        )
    yield "Interrupts that nobody handled", [f"  {line}" for line in unhandled(found)] or ["  none"]
    if found.waited:
        yield "Devices that the CPU waited for", aligned(waited(found, top))
    if found.pairs:
        title = "Who waited for whom (queue: from sent to taken; work: from taken to done)"
        yield title, aligned(pairs(found, top), (0, 8))
    yield "Chains that are not complete", _reasons(found, top)
    if found.lost:
        yield (
            "Records lost (overwritten before they were read)",
            aligned([(ring, number(count)) for ring, count in found.lost.items()]),
        )
    if found.replaced:
        yield (
            "Processes replaced",
            [
                f"  {at(found, r.at_ns)}  {r.node}: {r.after} ({r.title}) after {r.before}"
                for r in found.replaced[:top]
            ]
            + ([f"  and {len(found.replaced) - top} more"] if len(found.replaced) > top else []),
        )


def at(found: Explained, ns: int) -> str:
    """Seconds since the trace's beginning."""
    return f"{(ns - found.begin_ns) / 1e9:.6f} s"


def summary(found: Explained) -> list[str]:
    meta = found.meta
    lines = [f"{found.path.name}: machine {meta.machine}" + (f"; saved: {meta.why}" if meta.why else "")]
    if found.begin_ns:
        began = ""
        if meta.realtime_ns:
            seconds = (meta.realtime_ns - meta.monotonic_ns + found.begin_ns) / 1e9
            if 0 <= seconds < 1 << 36:
                began = f" from {datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
        lines.append(f"{time(found.end_ns - found.begin_ns)}{began}; {number(found.steps)} steps of "
                     f"{len(meta.rings)} rings")  # fmt: skip
    complete = found.chains - found.incomplete
    lines.append(f"{number(found.chains)} chains, {number(complete)} complete "
                 f"({part(complete, found.chains)}); {number(found.alone)} of them are one access that no "
                 "device was asked for")  # fmt: skip
    whole = found.accesses - found.accesses_incomplete
    lines.append(f"{number(found.accesses)} accesses of the guest, {number(whole)} in a complete chain "
                 f"({part(whole, found.accesses)})")  # fmt: skip
    return lines


def _slowest(found: Explained, slowest: Sequence[Slow]) -> Iterator[str]:
    for place, slow in enumerate(slowest, 1):
        if place > 1:
            yield ""
        cause = f", in the handler of chain {slow.cause:#x}" if slow.cause else ""
        why = f", not complete: {slow.why_not}" if slow.why_not else ""
        yield (f"  {place}. {time(slow.took_ns)}  {slow.kind}, at {at(found, slow.begin_ns)}, "
               f"chain {slow.id:#x}{cause}{why}")  # fmt: skip
        yield f"     {mostly(slow)}"
        rows = [("", "at", "waited", "took", "who", "what")]
        rows += [("  ", f"+{time(leg.at_ns)}", *_times(leg), leg.node, _what(leg)) for leg in slow.legs]
        yield from aligned(rows, (0, 4, 5))
        if slow.left_out:
            yield f"     {slow.left_out} short legs are left out"


def mostly(slow: Slow) -> str:
    """Where the time went."""
    if not slow.took_ns:
        return "an instant"
    shown = [(100 * ns / slow.took_ns, where) for where, ns in slow.shares[:SHARES]]
    return ", ".join(f"{percent:.0f} % {where}" for percent, where in shown if percent >= 0.5)


def _times(leg: Leg) -> tuple[str, str]:
    waited = time(leg.waited_ns) if leg.waited_ns else ""
    took = "not done" if leg.took_ns < 0 else time(leg.took_ns) if leg.took_ns else ""
    return waited, took


def _what(leg: Leg) -> str:
    ways = f" ({leg.kind})" if leg.kind in WAYS else ""
    return f"{leg.text}{ways}" + (f"  {leg.detail}" if leg.detail else "")


# --- tables: the first row is the head; also tracing/report.py's


def _quantiles(histogram: Histogram) -> tuple[str, str, str]:
    if not histogram.count:
        return "-", "-", "-"
    return time(histogram.quantile(0.5)), time(histogram.quantile(0.99)), time(histogram.max)


def kinds(found: Explained, top: int) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "chains", "not complete", "half within", "99 % within", "longest")]
    for kind in sorted(found.kinds.values(), key=lambda k: -k.took.total)[:top]:
        rows.append((kind.name, number(kind.took.count), number(kind.incomplete), *_quantiles(kind.took)))
    return rows


def registers(found: Explained, top: int) -> list[tuple[str, ...]]:
    head = ("", "", "accesses", "posted", "mirrored", "synchronous", "nobody's", "CPU waited", "each, 99 %")
    rows: list[tuple[str, ...]] = [head]
    for r in found.registers[:top]:
        ways = [r.ways.get(way, 0) for way in ("posted", "mirrored", "synchronous", "open-bus")]
        rows.append((
            r.name, "write" if r.write else "read", number(r.count), *(number(n) if n else "-" for n in ways),
            time(r.waited.total) if r.waited.count else "-", _quantiles(r.waited)[1],
        ))  # fmt: skip
    return rows


def vectors(found: Explained, top: int) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("line", "from", "vector", "count", "delay: half", "99 %", "longest",
                                    "to EOI: half", "99 %", "longest")]  # fmt: skip
    for v in found.interrupts.busiest[:top]:
        line = found.interrupts.lines.get(v.irq)
        source = ", ".join(line.sources) if line is not None else ""
        rows.append((
            f"{v.irq}" if v.irq >= 0 else "-", source or origin(v),
            f"{v.vector:#04x} {'8259' if v.way == '8259' else 'APIC'}", number(v.count),
            *_quantiles(v.latency), *_quantiles(v.handled),
        ))  # fmt: skip
    return rows


def origin(v: Vector) -> str:
    if v.spurious:
        return "spurious"
    return "the CPU's own timer" if v.way == "own" else "a message" if v.way == "message" else "8259"


def unhandled(found: Explained) -> list[str]:
    """Lines."""
    rows: list[str] = []
    for use in sorted(found.interrupts.lines.values(), key=lambda use: use.irq):
        line = f"line {use.irq} ({', '.join(use.sources)})"
        if use.ignored:
            rows.append(f"{line}: {number(use.ignored)} of {number(use.rises)} rises led to nothing, since "
                        "it was masked or one before was still pending; the first at "
                        f"{at(found, use.first_ignored_ns)}")  # fmt: skip
        if use.lost:
            rows.append(f"{line}: {number(use.lost)} of {number(use.rises)} rises were sent on and never "
                        f"delivered; the first at {at(found, use.first_lost_ns)}")  # fmt: skip
    for cpu, vector, at_ns in found.interrupts.unsent:
        rows.append(f"vector {vector:#04x}: arrived at {cpu} at {at(found, at_ns)} and was never delivered")
    if found.interrupts.unacknowledged_ns:
        since = at(found, found.interrupts.unacknowledged_ns)
        rows.append(f"the 8259's INT: high since {since} and never acknowledged")
    for v in found.interrupts.busiest:
        if v.spurious:
            rows.append(f"vector {v.vector:#04x}: {number(v.count)} spurious")
        elif v.unended:
            rows.append(f"vector {v.vector:#04x} (line {v.irq if v.irq >= 0 else '-'}): {number(v.unended)} "
                        "delivered and never ended; the first at "
                        f"{at(found, v.first_unended_ns)}")  # fmt: skip
    return rows


def waited(found: Explained, top: int) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "requests", "altogether", "half within", "99 % within", "longest")]
    for node, histogram in sorted(found.waited.items(), key=lambda item: -item[1].total)[:top]:
        name = node or "open bus"
        rows.append((name, number(histogram.count), time(histogram.total), *_quantiles(histogram)))
    return rows


def pairs(found: Explained, top: int) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("", "frames", "queue: all", "half", "99 %", "work: all", "half", "99 %", "")
    ]
    for pair in sorted(found.pairs.values(), key=lambda p: -p.queued.total)[:top]:
        named = sorted(pair.kinds.items(), key=lambda item: -item[1])
        rows.append((
            f"{pair.sender} > {pair.receiver}", number(pair.count),
            time(pair.queued.total), *_quantiles(pair.queued)[:2],
            time(pair.handled.total) if pair.handled.count else "-", *_quantiles(pair.handled)[:2],
            ", ".join(f"{name} {number(count)}" for name, count in named[:3]),
        ))  # fmt: skip
    return rows


def _reasons(found: Explained, top: int) -> Iterator[str]:
    if not found.reasons:
        yield "  none"
        return
    ordered = sorted(found.reasons.values(), key=lambda reason: -reason.count)
    for reason in ordered[:top]:
        where = f"chain {reason.chain:#x}, at {at(found, reason.at_ns)}"
        yield f"  {number(reason.count)}: {reason.example} ({where})"
    if len(ordered) > top:
        yield f"  and {len(ordered) - top} other reasons"


# --- JSON


def plain(found: Explained, top: int) -> dict[str, Any]:
    """Times in ns; those of the slowest chains and of reasons are CLOCK_MONOTONIC."""
    return {
        "trace": str(found.path), "machine": found.meta.machine, "why": found.meta.why,
        "begin_ns": found.begin_ns, "end_ns": found.end_ns, "steps": found.steps,
        "chains": found.chains, "incomplete": found.incomplete, "alone": found.alone,
        "accesses": found.accesses, "accesses_incomplete": found.accesses_incomplete,
        "complaints": found.complaints, "lost": found.lost,
        "replaced": [asdict(entry) for entry in found.replaced],
        "slowest": [asdict(slow) for slow in found.slowest(top)],
        "kinds": [{"name": kind.name, "incomplete": kind.incomplete, **kind.took.plain()}
                  for kind in sorted(found.kinds.values(), key=lambda k: -k.took.total)],
        "registers": [_register(register) for register in found.registers],
        "lines": [asdict(line) for line in found.interrupts.lines.values()],
        "vectors": [_vector(vector) for vector in found.interrupts.busiest],
        "waited": {node: histogram.plain() for node, histogram in found.waited.items()},
        "pairs": [_pair(pair) for pair in found.pairs.values()],
        "reasons": [asdict(reason) for reason in found.reasons.values()],
    }  # fmt: skip


def _register(r: Register) -> dict[str, Any]:
    return {"name": r.name, "device": r.node, "write": r.write, "count": r.count, "ways": r.ways,
            "waited": r.waited.plain()}  # fmt: skip


def _vector(v: Vector) -> dict[str, Any]:
    return {"line": v.irq, "vector": v.vector, "way": v.way, "count": v.count, "again": v.again,
            "unended": v.unended, "spurious": v.spurious, "delay": v.latency.plain(),
            "handled": v.handled.plain()}  # fmt: skip


def _pair(pair: Pair) -> dict[str, Any]:
    return {"sender": pair.sender, "receiver": pair.receiver, "count": pair.count, "bytes": pair.size,
            "kinds": pair.kinds, "undone": pair.undone, "queued": pair.queued.plain(),
            "handled": pair.handled.plain()}  # fmt: skip
