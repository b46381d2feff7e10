"""What a trace tells, as one HTML file with pictures: it loads nothing, and all of the trace is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from tracing import explaintext as told
from tracing.explain import OF_A_KIND, Explained
from tracing.explaintext import clean, number, part, time
from tracing.legs import Slow
from tracing.pictures import activity, by_device, graph, histogram
from tracing.timeline import NAMES, timeline

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # nothing is loaded, no script runs
STYLE = Path(__file__).with_name("report.css")


def report(found: Explained, top: int) -> str:
    """The whole file."""
    title = f"Trace of {found.meta.machine}"
    return "\n".join([
        "<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{_t(title)}</title>", f"<style>{STYLE.read_text(encoding='utf-8')}</style></head><body>",
        f"<h1>{_t(title)}</h1>", *_head(found), *_slowest(found, top), *_latencies(found), *_talk(found, top),
        *_activity(found), *_interrupts(found, top), *_registers(found, top), *_lacking(found, top),
        "</body></html>", "",
    ])  # fmt: skip


def _t(text: str) -> str:
    return escape(clean(text))


def _head(found: Explained) -> Iterator[str]:
    lines = told.summary(found)
    yield f"<p>{_t(found.path.name)}{'. ' + _t(lines[1].partition(';')[0]) if found.begin_ns else ''}</p>"
    for complaint in found.complaints:
        yield f'<p class="bad">{_t(complaint)}</p>'
    whole = found.accesses - found.accesses_incomplete
    lost = sum(found.lost.values())
    facts = [
        ("lasted", time(found.end_ns - found.begin_ns)), ("steps", number(found.steps)),
        ("chains", number(found.chains)),
        ("of these complete", part(found.chains - found.incomplete, found.chains)),
        ("accesses of the guest", number(found.accesses)),
        ("in a complete chain", part(whole, found.accesses)),
        ("records lost", number(lost)), ("processes replaced", number(len(found.replaced))),
    ]  # fmt: skip
    yield '<dl class="facts">'
    yield from (f"<div><dt>{name}</dt><dd>{_t(value)}</dd></div>" for name, value in facts)
    yield "</dl><nav>"
    names = ("slowest", "latencies", "talk", "activity", "interrupts", "registers", "lacking")
    yield from (f'<a href="#{name}">{TITLES[name]}</a>' for name in names)
    yield "</nav>"


TITLES = {
    "slowest": "Slowest chains", "latencies": "Latencies", "talk": "Who talks to whom",
    "activity": "Activity", "interrupts": "Interrupts", "registers": "Registers",
    "lacking": "What is lacking",
}  # fmt: skip


def _section(name: str, text: str) -> str:
    return f'<section id="{name}"><h2>{TITLES[name]}</h2><p>{text}</p>'


def _slowest(found: Explained, top: int) -> Iterator[str]:
    yield _section("slowest", "A chain is one I/O, from what began it to its end, over all processes. At "
                   f"most {OF_A_KIND} of a kind are shown. An interval's width is the root of its time, so "
                   "that short ones can be seen beside long waits; dotted lines are frames, at the moment "
                   "they were sent.")  # fmt: skip
    yield _legend(NAMES)
    for place, slow in enumerate(found.slowest(top), 1):
        yield from _chain(found, place, slow)
    yield f"<h3>By what began them</h3>{table(told.kinds(found, top))}</section>"


def _legend(names: dict[str, str]) -> str:
    entries = (f'<li><i class="{name}"></i>{text}</li>' for name, text in names.items())
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _chain(found: Explained, place: int, slow: Slow) -> Iterator[str]:
    yield f"<article><h3><b>{place}</b>{_t(time(slow.took_ns))} &nbsp;{_t(slow.kind)}</h3>"
    cause = f" · in the handler of chain <code>{slow.cause:#x}</code>" if slow.cause else ""
    why = f' · <span class="bad">{_t(slow.why_not)}</span>' if slow.why_not else ""
    yield (f"<p>{_t(told.mostly(slow))}<br>at {told.at(found, slow.begin_ns)} · chain "
           f"<code>{slow.id:#x}</code>{cause}{why}</p>")  # fmt: skip
    yield timeline(slow)
    rows: list[tuple[str, ...]] = [("at", "waited", "took", "who", "process", "what", "")]
    for leg in slow.legs:
        took = "not done" if leg.took_ns < 0 else time(leg.took_ns) if leg.took_ns else ""
        waited = time(leg.waited_ns) if leg.waited_ns else ""
        rows.append((f"+{time(leg.at_ns)}", waited, took, leg.node, str(leg.pid), leg.text, leg.detail))
    left_out = f", {slow.left_out} short ones left out" if slow.left_out else ""
    yield f"<details><summary>{len(slow.legs)} legs{left_out}</summary>{table(rows, (3, 5, 6))}</details>"
    yield "</article>"


def _latencies(found: Explained) -> Iterator[str]:
    yield _section("latencies", "How long frames waited in a process's queue, from sent to taken, and how "
                   "long it worked on them. The axis of time is logarithmic; height is the number of "
                   "frames.")  # fmt: skip
    yield _legend({"wait": "in its queue", "work": "its work"})
    yield '<div class="grid3">'
    yield from (histogram(*row) for row in by_device(found))
    yield "</div>"
    if found.waited:
        yield "<h3>Devices that the CPU waited for</h3>"
        yield table(told.waited(found, 1000))
    yield "</section>"


def _talk(found: Explained, top: int) -> Iterator[str]:
    yield _section("talk", "Frames on the bus. An arrow's width is the logarithm of their number.")
    yield graph(found)
    yield table(told.pairs(found, max(top, 10)), (0, 8))
    yield "</section>"


def _activity(found: Explained) -> Iterator[str]:
    yield _section("activity", f"Steps of each process, in intervals of {time(found.activity.bin_ns)}; each "
                   "row has a scale of its own.")  # fmt: skip
    yield activity(found.activity)
    yield "</section>"


def _interrupts(found: Explained, top: int) -> Iterator[str]:
    yield _section("interrupts", "Delay: from the rise of the line, as its device sent it, to the vector at "
                   "the CPU. To EOI: the guest's handler.")  # fmt: skip
    yield table(told.vectors(found, max(top, 20)), (0, 1, 2))
    yield "<h3>Nobody handled</h3>"
    yield _list(told.unhandled(found))
    yield "</section>"


def _registers(found: Explained, top: int) -> Iterator[str]:
    yield _section("registers", "Posted writes go in batches and nobody waits; mirrored reads are answered "
                   "from a shared page; for synchronous accesses the CPU waits.")  # fmt: skip
    yield table(told.registers(found, max(top, 20)), (0, 1))
    yield "</section>"


def _lacking(found: Explained, top: int) -> Iterator[str]:
    yield _section("lacking", "Chains that are not complete, and why; records that were overwritten before "
                   "they were read; processes that were replaced.")  # fmt: skip
    reasons = sorted(found.reasons.values(), key=lambda reason: -reason.count)
    entries = [
        f"{number(r.count)} chains: {r.example} (chain {r.chain:#x}, at {told.at(found, r.at_ns)})"
        for r in reasons[:top]
    ]
    entries += [f"{ring}: {number(count)} records lost" for ring, count in found.lost.items()]
    entries += [
        f"{r.node}: process {r.after} ({r.title}) after {r.before}, at {told.at(found, r.at_ns)}"
        for r in found.replaced[:top]
    ]
    yield _list(entries)
    yield "</section>"


def _list(entries: Sequence[str]) -> str:
    if not entries:
        return '<p class="good">Nothing.</p>'
    return f"<ul>{''.join(f'<li>{_t(entry)}</li>' for entry in entries)}</ul>"


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """The first row is the head."""

    def cells(row: Sequence[str], tag: str) -> str:
        begins = [f'<{tag} class="l">' if i in left else f"<{tag}>" for i in range(len(row))]
        return "".join(f"{begin}{_t(cell)}</{tag}>" for begin, cell in zip(begins, row, strict=True))

    head = cells(rows[0], "th")
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
