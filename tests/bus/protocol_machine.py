"""The machine of the model: its nodes, the connections between them, the guest's memory and a console, as one
value; what may happen next; what must never be so.

A state is a tuple of small integers, one for each part that has been met (`Parts`), and what a node does with
an event is worked out once for each of its own states: so the real Stream runs for every case, but seldom.

A connection that breaks is down until it is made anew. What was under way may still arrive until then, in
part, each way for itself; what is sent meanwhile is lost. `late`: of a broken connection, the connecting side
may read what had come even behind what comes over the new one (libzmq reads both pipes).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import bus.stream
from tests.bus.protocol_model import (
    LINES,
    LINKS,
    NODES,
    PROBE,
    STAMP,
    Cpu,
    Device,
    Frozen,
    Op,
    Rules,
    Scenario,
    Violation,
    joined,
)

State = tuple[int, ...]  # the ids of three nodes, three links, the world; faults left
SEQ_AT = 3  # of an encoded frame with a small number
CPU, DEV, PIC, LINK0, WORLD, LEFT = 0, 1, 2, 3, 6, 7
ANSWERS = {"a": 1, "r": 1, "R": 2}  # frames from the device to the CPU, by letter


class Step(NamedTuple):
    """Something that may happen."""

    label: tuple[Any, ...]
    state: State
    fault: bool  # it need not happen


class Parts:
    """Values of one kind, numbered as they are met."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._ids: dict[Hashable, int] = {}

    def id(self, value: Hashable) -> int:
        number = self._ids.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number


class View(NamedTuple):
    """What of a node's state the machine looks at."""

    up: bool
    reads: bool  # takes frames
    ops: bool  # has something left of its step
    behind: bool  # has steps to commit that were put off
    sends: bool  # CPU: may send its next frame
    process: str
    acked: tuple[int, ...]  # by link (None: not ours): what the other side said to have committed
    committed: tuple[int, ...]
    log: tuple[int, ...]  # committed
    done: bool  # nothing is left to do
    interrupts: tuple[int, ...]
    answers: tuple[int, ...]
    lives: tuple[int, ...] = ()


class Machine:
    """A scenario under rules: its first state and the steps from any."""

    def __init__(self, scenario: Scenario, rules: Rules) -> None:
        self.scenario, self.rules = scenario, rules
        bus.stream.WINDOW, bus.stream.ACK_EVERY = scenario.window, scenario.ack_every
        self.nodes = tuple(Parts() for _ in NODES)
        self.links, self.worlds, self.lefts = Parts(), Parts(), Parts()
        self._views: tuple[list[View], ...] = ([], [], [])
        self._done: dict[tuple[Any, ...], tuple[int, tuple[Op, ...]]] = {}
        self._agree: dict[tuple[int, ...], bool] = {}

    def first(self) -> State:
        s, r = self.scenario, self.rules
        dev, pic = Device("dev", s, r), Device("pic", s, r)
        dev.start()
        pic.start()
        nodes = [part.id(node.freeze()) for part, node in zip(self.nodes, (Cpu(s, r), dev, pic), strict=True)]
        links = [self.links.id((True, (PROBE,), (), ())) for _ in LINKS]
        left = self.lefts.id((s.crashes, s.breaks, s.swaps, s.late, s.drops, s.renewals))
        return (*nodes, *links, self.worlds.id(((), ())), left)

    # --- what may happen

    def steps(self, state: State) -> Iterator[Step]:
        views = self.view(CPU, state[CPU]), self.view(DEV, state[DEV]), self.view(PIC, state[PIC])
        crashes, breaks, swaps, late, drops, renewals = self.lefts.values[state[LEFT]]
        for link, (connects, bound) in enumerate(self.scenario.links):
            up, out, back, old = self.links.values[state[LINK0 + link]]
            dealer, router = NODES.index(connects), NODES.index(bound)
            if out and views[router].reads:
                yield self._take(state, router, link, 1, out)
            if back and views[dealer].reads:
                yield self._take(state, dealer, link, 2, back)
            if old and views[dealer].reads:
                yield self._take(state, dealer, link, 3, old)
            if not up and views[dealer].up and views[router].up:
                yield self._link(state, ("connect", link), link, (True, (PROBE,), (), ()))
                if late and back:
                    made = self._link(state, ("connect, old frames", link), link, (True, (PROBE,), (), back))
                    yield Step(made.label, self._spend(made.state, 3), True)
            if drops and _may_drop(out):
                value = (up, out[1:], back, old)
                dropped = self._link(state, ("drop", link), link, value)
                yield Step(dropped.label, self._spend(dropped.state, 4), True)
            if drops and _may_drop(back):
                value = (up, out, back[1:], old)
                dropped = self._link(state, ("drop back", link), link, value)
                yield Step(dropped.label, self._spend(dropped.state, 4), True)
            if up and breaks and link in self.scenario.breaking:
                broken = self._link(state, ("break", link), link, (False, out, back, ()))
                yield Step(broken.label, self._spend(broken.state, 1), True)
        if views[CPU].sends:
            yield self._act(state, CPU, "send")
        if renewals:
            step = self._act(state, CPU, "renew")
            yield Step(step.label, self._spend(step.state, 5), True)
        for node in (DEV, PIC):
            view = views[node]
            if view.ops and view.up:
                yield self._act(state, node, "op")
            if view.behind:
                yield self._act(state, node, "catch_up")
            if view.process == "down":
                yield self._act(state, node, "start")
            elif view.process == "up" and crashes and NODES[node] in self.scenario.crashing:
                step = self._act(state, node, "crash")
                yield Step(step.label, self._spend(step.state, 0), True)
            if view.process == "retired":
                yield self._act(state, node, "start")
                yield self._act(state, node, "resume")
            elif swaps and node == DEV and view.process == "up" and self._may_retire(view):
                if "loaded before the old one has ended" in self.rules.faults:
                    yield self._act(state, node, "stand_by")
                step = self._act(state, node, "retire")
                yield Step(step.label, self._spend(step.state, 2), True)

    def _may_retire(self, view: View) -> bool:
        return not view.ops or "retires within a step" in self.rules.faults

    def _take(self, state: State, node: int, link: int, way: int, queue: tuple[bytes, ...]) -> Step:
        value = list(self.links.values[state[LINK0 + link]])
        value[way] = queue[1:]
        taken = self._link(state, (), link, tuple(value)).state
        return self._act(taken, node, "take", link, queue[0])

    def _link(self, state: State, label: tuple[Any, ...], link: int, value: Frozen) -> Step:
        return Step(label, _with(state, LINK0 + link, self.links.id(value)), False)

    def _spend(self, state: State, which: int) -> State:
        left = list(self.lefts.values[state[LEFT]])
        left[which] -= 1
        return _with(state, LEFT, self.lefts.id(tuple(left)))

    def _act(self, state: State, node: int, what: str, *args: Any) -> Step:
        """A node does something; then what it did outside is done to the links and the world."""
        key = (node, state[node], what, *args)
        known = self._done.get(key)
        if known is None:
            known = self._done[key] = self._work_out(node, state[node], what, args)
        state = _with(state, node, known[0])
        if what in ("crash", "retire", "start", "resume", "renew"):
            state = self._disconnected(state, node)
        for op in known[1]:
            state = self._outside(state, node, op)
        return Step((NODES[node], what, *args), state, False)

    def _work_out(
        self, node: int, number: int, what: str, args: tuple[Any, ...]
    ) -> tuple[int, tuple[Op, ...]]:
        frozen, scenario, rules = self.nodes[node].values[number], self.scenario, self.rules
        made: Cpu | Device
        made = Cpu(scenario, rules) if node == CPU else Device(NODES[node], scenario, rules)
        made.thaw(frozen)
        act: Callable[..., None] = getattr(made, what)
        act(*args)
        return self.nodes[node].id(made.freeze()), tuple(made.out)

    def _disconnected(self, state: State, node: int) -> State:
        """Its sockets are closed: nothing reaches it any more; what it sent may still arrive."""
        for link, (connects, bound) in enumerate(self.scenario.links):
            _, out, back, _ = self.links.values[state[LINK0 + link]]
            if NODES[node] in (connects, bound):
                value = (False, out, (), ()) if NODES[node] == connects else (False, (), back, ())
                state = _with(state, LINK0 + link, self.links.id(value))
        return state

    def _outside(self, state: State, node: int, op: Op) -> State:
        if op[0] == "send":
            up, out, back, old = self.links.values[state[LINK0 + op[1]]]
            if not up:
                return state
            if self.scenario.links[op[1]][0] == NODES[node]:
                value = (up, (*out, op[2]), back, old)
            else:
                value = (up, out, (*back, op[2]), old)
            return _with(state, LINK0 + op[1], self.links.id(value))
        dma, console = self.worlds.values[state[WORLD]]
        match op:
            case ("dma", _, value):
                dma = _absolute("DMA write", dma, value)
            case ("out" | "io" as what, value):
                console = _absolute("output" if what == "out" else "disk I/O", console, value)
            case ("sees", stamp) if self._letter(stamp) in "daDi" and not any(v >> 1 == stamp for v in dma):
                raise Violation("the CPU sees an answer or interrupt before the DMA writes of its step")
        return _with(state, WORLD, self.worlds.id((dma, console)))

    def _letter(self, stamp: int) -> str:
        return self.scenario.program[(stamp >> STAMP) - 1]

    # --- what must be so

    def view(self, node: int, number: int) -> View:
        views = self._views[node]
        while len(views) <= number:
            views.append(self._make_view(node, self.nodes[node].values[len(views)]))
        return views[number]

    def _make_view(self, node: int, frozen: Frozen) -> View:
        scenario, rules = self.scenario, self.rules
        if node == CPU:
            cpu = Cpu(scenario, rules).thaw(frozen)
            streams = {n: s.to_plain() for n, s in cpu.streams.items()}
            if len(streams[0][3]) > scenario.window and not scenario.eager:
                raise Violation("more is retained than the window takes")
            acked = tuple(streams[n][1] if n in streams else -1 for n in range(len(LINKS)))
            acked = tuple(number if number > cpu.base else -1 for number in acked)
            done = cpu.sent == len(scenario.program) and not cpu.waits
            return View(
                True, True, False, False, cpu.can_send, "up", acked, cpu.taken(), (), done,
                joined(cpu.before[1], cpu.interrupts), joined(cpu.before[0], cpu.answers), cpu.lives,
            )  # fmt: skip
        dev = Device(NODES[node], scenario, rules).thaw(frozen)
        log, _, plains, _, _ = dev.journal
        committed = dict(zip(dev.links, plains, strict=True))
        streams = {n: s.to_plain() for n, s in dev.streams.items()} if dev.process != "down" else committed
        return View(
            dev.process == "up", dev.idle, bool(dev.ops), dev.behind, False, dev.process,
            tuple(streams[n][1] if n in streams else -1 for n in range(len(LINKS))),
            tuple(committed[n][2] if n in committed else -1 for n in range(len(LINKS))),
            log, dev.idle and not dev.behind, (), (),
        )  # fmt: skip

    def check(self, state: State) -> None:
        """Raises Violation."""
        for parts in ((CPU, DEV), (DEV, PIC), (CPU, PIC), (DEV, WORLD)):
            key = (*parts, state[parts[0]], state[parts[1]])
            if key not in self._agree:
                self._agreement(*parts, state)
                self._agree[key] = True

    def _agreement(self, a: int, b: int, state: State) -> None:
        program = self.scenario.program
        one = self.view(a, state[a])
        if b == WORLD:
            dma, console = self.worlds.values[state[WORLD]]
            wanted = [s << 1 | at for s in one.log for at in range(_dma_writes(self._letter(s)))]
            _prefix("DMA writes", list(dma), wanted)
            _prefix("output", list(console), [s for s in one.log if self._letter(s) in "oi"])
            return
        other = self.view(b, state[b])
        for link in range(len(LINKS)):
            for who, whom in ((one, other), (other, one)):
                if who.acked[link] > whom.committed[link] >= 0:
                    raise Violation("an ack is above what is committed")
        if (a, b) == (CPU, DEV):
            self._complete_but_for_ends(other.log, one.lives)
            answers = [s for s in other.log for _ in range(ANSWERS.get(self._letter(s), 0))]
            _prefix("answers", list(one.answers), answers)
        elif (a, b) == (DEV, PIC):
            lines = [s for s in one.log if program[(s >> STAMP) - 1] in LINES]
            _prefix("Lines", [entry >> STAMP for entry in other.log], lines)
        else:
            passed_on = [s for s in other.log if self._letter(s >> STAMP) != "m"]
            _prefix("interrupts", list(one.interrupts), passed_on)

    def _complete_but_for_ends(self, log: tuple[int, ...], lives: tuple[int, ...]) -> None:
        """Of the frames of each CPU the device has handled the first so and so many."""
        numbers = [0, *(stamp >> STAMP for stamp in log)]
        for number, after in pairwise(numbers):
            if after != number + 1 and after - 1 not in lives:
                raise Violation(f"frame {after} is handled after frame {number}, by one and the same sender")

    def is_final(self, state: State) -> bool:
        """All is delivered and nothing moves."""
        views = self.view(CPU, state[CPU]), self.view(DEV, state[DEV]), self.view(PIC, state[PIC])
        program, (dma, console) = self.scenario.program, self.worlds.values[state[WORLD]]
        done = "".join(self._letter(stamp) for stamp in views[DEV].log)
        last = views[DEV].log[-1] >> STAMP if done else 0
        lines = sum(letter in LINES for letter in done)
        return (
            all(view.done for view in views)
            and all(self.links.values[number] == (True, (), (), ()) for number in state[LINK0:WORLD])
            and (last == len(program) or len(program) in views[CPU].lives)
            and len(views[PIC].log) == len(views[CPU].interrupts) + done.count("m") == lines
            and len(views[CPU].answers) == sum(ANSWERS.get(letter, 0) for letter in done)
            and len(dma) == sum(map(_dma_writes, done))
            and len(console) == sum(letter in "oi" for letter in done)
        )


def _dma_writes(letter: str) -> int:
    return {"d": 1, "D": 2, "a": 1, "i": 1, "m": 1}.get(letter, 0)


def _may_drop(queue: tuple[bytes, ...]) -> bool:
    """The first is a numbered frame, and a later one of its stream is behind it: its loss will be noticed."""
    return len(queue) > 1 and queue[0] != PROBE and 0 < queue[0][SEQ_AT] < max(d[SEQ_AT] for d in queue[1:])


def _with(state: State, at: int, value: int) -> State:
    return (*state[:at], value, *state[at + 1 :])


def _absolute(what: str, done: tuple[int, ...], value: int) -> tuple[int, ...]:
    """Done at an absolute position: the last one may be repeated, which changes nothing."""
    if value not in done:
        return (*done, value)
    if value != done[-1]:
        raise Violation(f"a {what} is repeated that is not the last one")
    return done


def _prefix(what: str, there: list[int], committed: list[int]) -> None:
    if there != committed[: len(there)]:
        raise Violation(f"{what} {there} are not the beginning of what was committed, {committed}")
