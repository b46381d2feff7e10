"""Chains: the steps of one I/O, from what began it to its end, over all processes.

A chain is complete when nothing is lacking that its steps say must be there:

- it begins with an access, a timer, input, disk I/O that is done, an interrupt without a cause (the local
  APIC's timer), or a frame of somebody who is not in the trace;
- each request was taken by its device, handled to the end, and answered; each batch of posted writes taken
  and handled;
- each timer, input or disk I/O was handled to the end;
- each interrupt message that a controller sent arrived, was delivered, and has ended (an 8259's only has to
  be delivered: its end is an access like others);
- all output was passed on by `consoles`, if that is in the trace;
- no record of a ring that it passed was lost while it lasted.

What a killed process had begun counts when its successor has done it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bus.frames import KIND_OF, ApicMessage, IntAck, Intr, Ping
from tracing.joining import FIXED, LOWEST, NMI, NMI_VECTOR, Filter, steps
from tracing.steps import HEADER_ITEMS, KIND, SEQ, SPAN, Step

__all__ = ["Chain", "Filter", "Step", "chains", "steps"]

OVER_NS = 1_000_000_000  # without a step: it is over
HOPE_NS = 60_000_000_000  # the same, while something is lacking
OPEN_MAX = 20_000  # chains that are not over
STEPS_MAX = 10_000  # of one chain; what follows is another one
APIC_MESSAGE, INTR, INT_ACK = (KIND_OF[cls] for cls in (ApicMessage, Intr, IntAck))
CONTROL = KIND_OF[Ping]  # frames of this kind and above are no I/O
_BEGINS = ("access", "open-bus", "timer", "input", "typed", "disk-done", "process", "lost")
_SENT = "it led to no frame in the trace"
_Need = tuple[object, ...]


class Chain:
    """One chain. `why_not`: what is lacking first, in words, if it isn't complete."""

    __slots__ = ("_needs", "_outputs", "_why", "end_ns", "id", "steps")

    def __init__(self, id: int) -> None:
        self.id = id
        self.steps: list[Step] = []  # in order of time
        self.end_ns = 0
        self._needs: dict[_Need, str] = {}  # what has to come, and what is lacking if it doesn't
        self._outputs: dict[tuple[str, int], str] = {}  # (channel, end) -> the same
        self._why = ""

    @property
    def root(self) -> Step:
        return self.steps[0]

    @property
    def begin_ns(self) -> int:
        return self.steps[0].begin_ns

    @property
    def why_not(self) -> str:
        return self._why or next(iter((*self._needs.values(), *self._outputs.values())), "")

    @property
    def complete(self) -> bool:
        return not self._why and not self.waits

    @property
    def waits(self) -> bool:
        """Something that may come is lacking."""
        return bool(self._needs or self._outputs)

    def spoil(self, why: str) -> None:
        self._why = self._why or why

    def add(self, step: Step, rings: frozenset[str]) -> None:
        """`rings`: those in the trace."""
        if not self.steps and not _may_begin(step, rings):
            self.spoil(f"it begins before the trace: first comes {step.kind} {step.name} at {step.node}")
        self.steps.append(step)
        self.end_ns = max(self.end_ns, step.begin_ns, step.end_ns)
        match step.kind:
            case "access":
                self._access(step)
            case "frame":
                self._frame(step, rings)
            case "vector":
                self._met(("vector", step.record.flags))
                self._met(("intr", step.node))
                if step.way == "apic" and step.record.flags != NMI_VECTOR:
                    self._needs["eoi", step.record.flags] = f"vector {step.record.flags:#x} has not ended"
            case "eoi":
                if not self._met(("eoi", step.record.flags)):
                    self.spoil(f"vector {step.record.flags:#x} was delivered before the trace")
            case "timer" | "input" | "disk" | "disk-done":
                self._done(
                    step, (step.node, step.kind, step.record.name, step.record.number, step.record.two)
                )
            case "process":
                if step.end_ns:  # what was begun at this node is done
                    for key in [key for key in self._needs if key[0] == "done" and key[1] == step.node]:
                        self._met(key)
            case "mark":
                owner = step.within
                if step.record.name == "irq" and owner is not None and not _is(owner, INT_ACK):
                    self._more(("message", step.node), f"the message of line {step.record.one} never arrived")
            case "output":
                if step.way == "":
                    end = step.record.one + step.record.number
                    key = f"{step.node}:{step.record.name}", end
                    self._outputs[key] = f"output of {step.node} was not passed on"
            case "terminal":
                end = step.record.one + step.record.number
                for key in list(self._outputs):
                    if key[0] == step.record.name and key[1] <= end:
                        del self._outputs[key]

    def _access(self, step: Step) -> None:
        if step.way == "unsent":
            self.spoil(f"{step.name}: {_SENT}")
        elif self.id:
            node = step.place.node if step.place is not None else ""
            self._needs["taken", self.id] = f"{node} has not taken {step.name}"
            if step.way == "synchronous" or (
                step.way == "posted" and self.id in step.also and step.end_ns == 0
            ):
                self._needs["answer", self.id] = f"{node} has not answered {step.name}"

    def _frame(self, step: Step, rings: frozenset[str]) -> None:
        items = step.items
        if items is None:
            self.spoil(f"{step.node} took a frame of {step.record.number} bytes that can't be read")
            return
        if step.ring.cpu:  # an answer
            self._met(("answer", step.span))
            return
        self._met(("taken", step.span))
        self._done(step, (step.node, step.record.name, items[SEQ], items[SPAN]))
        kind, cpu = items[KIND], step.ring.node
        if kind == APIC_MESSAGE and f"{cpu}.io" in rings and len(items) > HEADER_ITEMS + 1:
            self._less(("message", step.record.name))
            vector, mode = items[HEADER_ITEMS : HEADER_ITEMS + 2]
            if mode in (FIXED, LOWEST, NMI):
                vector = NMI_VECTOR if mode == NMI else vector
                self._needs["vector", vector] = f"vector {vector:#x} was not delivered"
        elif kind == INTR and f"{cpu}.io" in rings and len(items) > HEADER_ITEMS:
            if items[HEADER_ITEMS]:
                self._needs["intr", cpu] = "the 8259's interrupt was not acknowledged"
            else:
                self._met(("intr", cpu))

    def _done(self, step: Step, key: _Need) -> None:
        if step.end_ns:
            self._met(("done", *key))
        else:
            self._needs["done", *key] = f"process {step.pid} of {step.node} has not done {step.name}"

    def _more(self, key: _Need, why: str) -> None:
        count = 1
        while (*key, count) in self._needs:
            count += 1
        self._needs[*key, count] = why

    def _less(self, key: _Need) -> None:
        count = 1
        while (*key, count + 1) in self._needs:
            count += 1
        self._met((*key, count))

    def _met(self, key: _Need) -> bool:
        return self._needs.pop(key, None) is not None

    def acknowledged(self, cpu: str) -> None:
        """The 8259's INT has been dealt with, by whichever interrupt."""
        self._met(("intr", cpu))


def _may_begin(step: Step, rings: frozenset[str]) -> bool:
    if step.kind == "frame":
        control = step.items is not None and step.items[KIND] >= CONTROL
        nothing = _is(step, INT_ACK) and step.irq < 0  # an INTA that came too late is of no other chain
        return control or nothing or step.record.name not in rings
    return step.kind in _BEGINS or (step.kind == "vector" and step.way == "apic" and step.irq < 0)


def _is(step: Step, kind: int) -> bool:
    return step.items is not None and step.items[KIND] == kind


def chains(steps: Iterable[Step]) -> Iterator[Chain]:
    """Each when it is over: nothing of it for a second, or for a minute while something is lacking."""
    return _Chains().run(steps)


class _Chains:
    def __init__(self) -> None:
        self._open: dict[int, Chain] = {}  # the one with the latest step last
        self._typed: dict[int, Step] = {}  # chains of nothing but this
        self._intr: dict[int, Chain] = {}  # wait for the 8259's interrupt to be acknowledged
        self._gaps: list[Step] = []
        self._rings: frozenset[str] = frozenset()
        self._looked_ns = 0

    def run(self, steps: Iterable[Step]) -> Iterator[Chain]:
        """See chains()."""
        opened = self._open
        for step in steps:
            if step.begin_ns - self._looked_ns > OVER_NS // 4 or len(opened) > OPEN_MAX:
                yield from self._over(step.begin_ns)
                self._looked_ns = step.begin_ns
            if step.ring.name not in self._rings:
                self._rings = step.ring.naming.rings
            kind = step.kind
            if not step.chain:
                if kind == "lost":
                    self._gap(step)
                elif kind not in ("process", "mark"):
                    chain = Chain(0)
                    chain.add(step, self._rings)
                    if kind == "terminal" or kind == "eoi":
                        chain.spoil("it begins before the trace")
                    yield self._judged(chain)
                continue
            if kind == "typed":
                self._typed[step.chain] = step
                continue
            for id in (step.chain, *step.also) if step.also else (step.chain,):
                before = opened.pop(id, None)
                chain = before or Chain(id)
                if before is None:
                    if kind == "input" and (typed := self._typed.get(step.cause)) is not None:
                        chain.add(typed, self._rings)
                        typed.way = "taken"
                elif len(chain.steps) >= STEPS_MAX:
                    chain.spoil(f"it has more than {STEPS_MAX} steps")
                    yield self._judged(chain)
                    chain = Chain(id)
                opened[id] = chain
                chain.add(step, self._rings)
            if (kind == "frame" and _is(step, INTR)) or kind == "vector":
                self._acknowledge(step)
        yield from self._over(1 << 64)

    def _acknowledge(self, step: Step) -> None:
        """INT of the 8259 rises for one line and may be acknowledged for another."""
        if step.kind == "frame" and step.items is not None and step.items[HEADER_ITEMS:] == [True]:
            if step.chain in self._open:
                self._intr[step.chain] = self._open[step.chain]
        elif step.kind == "frame" or step.way == "8259":
            for chain in self._intr.values():
                chain.acknowledged(step.node)
            self._intr.clear()

    def _gap(self, step: Step) -> None:
        self._gaps.append(step)
        if len(self._gaps) > 1000:
            del self._gaps[0]

    def _judged(self, chain: Chain) -> Chain:
        for gap in self._gaps:
            meanwhile = gap.begin_ns <= chain.end_ns and chain.begin_ns <= gap.end_ns
            if meanwhile and any(step.ring is gap.ring for step in chain.steps):
                chain.spoil(f"{gap.record.number} records of {gap.ring.name} were lost meanwhile")
        return chain

    def _over(self, now_ns: int) -> Iterator[Chain]:
        opened = self._open
        crowded = max(0, len(opened) - OPEN_MAX // 2) if len(opened) > OPEN_MAX else 0
        for id, chain in list(opened.items()):
            quiet_ns = now_ns - chain.end_ns
            if crowded <= 0 and quiet_ns < OVER_NS:
                break
            if crowded > 0 or quiet_ns > HOPE_NS or not chain.waits:
                crowded -= 1
                del opened[id]
                self._intr.pop(id, None)
                yield self._judged(chain)
        for id, typed in list(self._typed.items()):
            if now_ns - typed.begin_ns < OVER_NS:
                break
            del self._typed[id]
            if typed.way != "taken":
                chain = Chain(id)
                chain.add(typed, self._rings)
                chain.spoil("no device took it")
                yield self._judged(chain)
