"""The legs of a chain: what came after what, how long it waited for its turn, how long it took.

Left out: marks of devices, and what a leg waited for inside a process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from bus.frames import KIND_OF, ApicMessage, Intr
from bus.recorder import WRITE
from tracing.chains import Chain, Step
from tracing.steps import KIND, dma_ranges

LEGS_MAX = 48  # of one chain; of longer ones those that took longest are kept
NOTHING = "nothing noted"
_TO_CPU = (KIND_OF[ApicMessage], KIND_OF[Intr])


@dataclass(slots=True)
class Leg:
    """Times in ns since the chain's beginning."""

    kind: str  # of its step; "posted" and other ways of accesses; "answer"
    node: str
    pid: int
    at_ns: int  # when it was taken
    waited_ns: int  # before that
    took_ns: int  # after that; -1: it was never done
    text: str
    detail: str = ""  # "eip 0xc0123456 outb+0x3", "DMA 2 pieces, 4112 bytes"
    waits: str = ""  # where the time of waiting is counted, see shares()
    works: str = ""  # where the time of the rest is counted
    sender: str = ""  # of a frame: who sent it
    times: int = 1  # of accesses that are shown as one


@dataclass(slots=True)
class Slow:
    """A chain, ready to be shown. Nothing of the trace is kept."""

    id: int
    kind: str
    begin_ns: int
    took_ns: int
    steps: int
    why_not: str
    legs: list[Leg]
    left_out: int  # legs
    shares: list[tuple[str, int]]  # where the time went, in words, and ns; the longest first
    cause: int  # chain of the interrupt whose handler began it, or 0


def shown(chain: Chain, kind: str) -> Slow:
    legs = legs_of(chain)
    took_ns = chain.end_ns - chain.begin_ns
    parts = shares(legs, took_ns)
    few = legs
    if len(legs) > LEGS_MAX:
        worth = sorted(range(len(legs)), key=lambda i: (i > 0, -legs[i].waited_ns - legs[i].took_ns))
        few = [legs[i] for i in sorted(worth[:LEGS_MAX])]
    return Slow(
        chain.id, kind, chain.begin_ns, took_ns, len(chain.steps), chain.why_not, few,
        len(legs) - len(few), parts, chain.root.cause,
    )  # fmt: skip


def legs_of(chain: Chain) -> list[Leg]:
    """In order of time. Accesses of one register that one batch took along are one leg."""
    legs: list[Leg] = []
    groups: dict[tuple[str, int], Leg] = {}
    last: dict[str, int] = {}  # what a later step waits for -> when that was
    begin_ns = chain.begin_ns
    eois = [step for step in chain.steps if step.kind == "eoi"]
    sent_ns = next(
        (s.queued_ns for s in chain.steps if s.kind == "frame" and not s.ring.cpu and s.span == chain.id), 0
    )
    for step in chain.steps:
        kind, node = step.kind, step.node
        leg = Leg(kind, node, step.pid, step.begin_ns - begin_ns, 0, 0, step.name)
        match kind:
            case "mark" | "process" | "lost":
                continue
            case "access" | "open-bus":
                leg.kind = step.way or kind
                group = (step.place.name if step.place else step.name, step.record.flags & WRITE)
                if leg.kind == "posted" and (before := groups.get(group)) is not None:
                    before.times += 1
                    continue
                groups[group] = leg
                _access(leg, step, sent_ns)
            case "frame":
                leg.waited_ns = max(0, step.begin_ns - step.queued_ns) if step.queued_ns else 0
                leg.sender = step.record.name.removesuffix(".io")
                leg.text = f"{step.name}, from {step.record.name}"
                if step.ring.cpu:
                    leg.kind = "answer"
                    leg.waits = f"for {step.record.name}'s answer to reach {node}"
                else:
                    _worked(leg, step)
                    leg.waits = f"in the queue of {step.ring.name}"
                    if step.items is not None and step.items[KIND] in _TO_CPU:
                        last["message"] = step.end_ns or step.begin_ns
            case "vector":
                if "message" in last:
                    leg.waited_ns = max(0, step.begin_ns - last.pop("message"))
                    leg.waits = f"until {node} took an interrupt"
                end = next((e for e in eois if e.begin_ns >= step.begin_ns
                            and e.record.flags == step.record.flags), None)  # fmt: skip
                if end is not None:
                    leg.took_ns = end.begin_ns - step.begin_ns
                    leg.works = "in the guest's handler"
                leg.detail = _where(step)
            case "eoi":
                leg.detail = _where(step)
            case "disk":
                _worked(leg, step)
                leg.works = f"in the file of {node}"
                last["disk"] = step.end_ns
            case "disk-done":
                leg.waited_ns = max(0, step.begin_ns - last.get("disk", step.begin_ns))
                leg.waits = f"until {node} saw that its I/O was done"
                _worked(leg, step)
            case "output":
                last[f"{node}:{step.record.name}"] = step.begin_ns
            case "terminal" | "input":
                came = "typed" if kind == "input" else step.record.name
                leg.waited_ns = max(0, step.begin_ns - last.get(came, step.begin_ns))
                leg.waits = f"until {node} took the bytes"
                if kind == "input":
                    _worked(leg, step)
            case "typed":
                last["typed"] = step.begin_ns
            case _:
                _worked(leg, step)
        legs.append(leg)
    for leg in legs:
        if leg.times > 1:
            leg.text += f" and {leg.times - 1} more"
    return legs


def _access(leg: Leg, step: Step, sent_ns: int) -> None:
    leg.detail = _where(step)
    if leg.kind == "posted":
        leg.took_ns = max(0, sent_ns - step.begin_ns) if sent_ns else 0
        leg.works = "before posted writes were sent"
    elif leg.kind == "synchronous":
        leg.took_ns = step.end_ns - step.begin_ns if step.end_ns else -1
        leg.works = "on the way, while the CPU waited"


def _worked(leg: Leg, step: Step) -> None:
    leg.took_ns = step.end_ns - step.begin_ns if step.end_ns else -1
    leg.works = f"in {step.node} at work"
    if step.dma:
        pieces = dma_ranges(step)
        size = sum(size for _, size, _ in pieces)
        leg.detail = f"DMA {len(pieces)} piece{'s'[: len(pieces) != 1]}, {size} bytes"


def _where(step: Step) -> str:
    symbols = step.ring.naming.symbols
    symbol = symbols.find(step.record.number) if symbols is not None else ""
    return f"eip {step.record.number:#010x} {symbol}".rstrip()


def shares(legs: Iterable[Leg], took_ns: int) -> list[tuple[str, int]]:
    """Where the time of a chain went: each moment counts for what began last of all that went on. The
    sum is `took_ns`."""
    spans: list[tuple[int, int, str]] = []  # begin, end, where
    for leg in legs:
        if leg.waited_ns > 0:
            spans.append((leg.at_ns - leg.waited_ns, leg.at_ns, leg.waits))
        if leg.took_ns > 0:
            spans.append((leg.at_ns, leg.at_ns + leg.took_ns, leg.works))
    edges = sorted({0, took_ns, *(min(max(t, 0), took_ns) for begin, end, _ in spans for t in (begin, end))})
    spans.sort()
    found: dict[str, int] = {}
    current: list[tuple[int, int, str]] = []
    following = 0
    for begin, end in pairwise(edges):
        while following < len(spans) and spans[following][0] <= begin:
            current.append(spans[following])
            following += 1
        current = [span for span in current if span[1] > begin]
        where = current[-1][2] if current else NOTHING
        found[where] = found.get(where, 0) + end - begin
    return sorted(found.items(), key=lambda item: -item[1])
