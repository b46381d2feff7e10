"""Every state that the model can come to, and whether each run comes to its end.

`python -m tests.bus.protocol_explore` (`make model`) goes through the larger scenarios, too, and prints the
figures.
"""

from __future__ import annotations

import random
import sys
import time
from array import array
from dataclasses import dataclass
from typing import Any

from tests.bus.protocol_machine import Machine, State
from tests.bus.protocol_model import Rules, Scenario, Violation

Trace = list[tuple[Any, ...]]


class Failed(Exception):
    """The model has found a run that breaks a rule; `trace` is a shortest one."""

    def __init__(self, reason: str, trace: Trace) -> None:
        super().__init__("\n".join([reason, *map(str, trace)]))
        self.reason, self.trace = reason, trace


@dataclass(frozen=True)
class Explored:
    states: int
    transitions: int
    depth: int  # steps of the longest of the shortest ways to a state


def explore(scenario: Scenario, rules: Rules = Rules(), limit: int = 1 << 30) -> Explored:  # noqa: B008
    """All states, breadth first. Raises Failed.

    What does not fail: in each state the invariants hold; without further faults there is no way round in a
    circle, and where nothing can happen any more all is delivered. So every run ends, with all delivered, as
    soon as nothing more breaks.
    """
    machine = Machine(scenario, rules)
    first = machine.first()
    numbers: dict[State, int] = {first: 0}
    states, parents, depths = [first], array("l", [-1]), array("l", [0])
    sources, targets = array("l"), array("l")  # transitions that are no faults
    transitions = 0

    def trace(number: int, *last: tuple[Any, ...]) -> Trace:
        way: Trace = []
        while number:
            before = parents[number]
            way.append(next(s.label for s in machine.steps(states[before]) if s.state == states[number]))
            number = before
        return [*reversed(way), *last]

    at = 0
    while at < len(states):
        state, ends = states[at], True
        steps = machine.steps(state)
        label: tuple[Any, ...] = ()
        while True:
            try:
                step = next(steps, None)
                if step is None:
                    break
                label = step.label
                number = numbers.setdefault(step.state, len(states))
                if number == len(states):
                    states.append(step.state)
                    parents.append(at)
                    depths.append(depths[at] + 1)
                    machine.check(step.state)
            except Violation as violation:
                raise Failed(str(violation), trace(at, ("then, from", label))) from violation
            transitions += 1
            if not step.fault:
                ends = False
                sources.append(at)
                targets.append(number)
        if ends and not machine.is_final(state):
            raise Failed("nothing can happen any more, and not all is delivered", trace(at))
        if len(states) > limit:
            raise Failed(f"more than {limit} states", [])
        at += 1
    stuck = _circle(len(states), sources, targets)
    if stuck is not None:
        raise Failed("a run without an end", trace(stuck))
    return Explored(len(states), transitions, max(depths))


def _circle(count: int, sources: array[int], targets: array[int]) -> int | None:
    """A state on, or behind, a circle of transitions; None if there is no circle."""
    into = array("l", bytes(8 * count))
    begins = array("l", bytes(8 * (count + 1)))
    for source, target in zip(sources, targets, strict=True):
        begins[source + 1] += 1
        into[target] += 1
    for n in range(count):  # the sources come in order, so the targets of each are neighbours
        begins[n + 1] += begins[n]
    ready = [n for n in range(count) if not into[n]]
    left = count
    while ready:
        n = ready.pop()
        left -= 1
        for at in range(begins[n], begins[n + 1]):
            into[targets[at]] -= 1
            if not into[targets[at]]:
                ready.append(targets[at])
    return next((n for n in range(count) if into[n]), None) if left else None


def walk(scenario: Scenario, seed: int, rules: Rules = Rules(), calm: float = 20.0) -> int:  # noqa: B008
    """One random run to its end, a fault at about every `calm`-th step; how many steps. Raises Failed."""
    chance, machine = random.Random(seed), Machine(scenario, rules)
    state, trace = machine.first(), []
    while True:
        label: tuple[Any, ...] = ()
        try:
            steps = list(machine.steps(state))
            good, bad = [s for s in steps if not s.fault], [s for s in steps if s.fault]
            if not good:
                break
            step = chance.choice(bad if bad and chance.random() * calm < 1 else good)
            label, state = step.label, step.state
            machine.check(state)
        except Violation as violation:
            raise Failed(str(violation), [*trace, label]) from violation
        trace.append(label)
    if not machine.is_final(state):
        raise Failed("nothing can happen any more, and not all is delivered", trace)
    return len(trace)


# What `make test` goes through: about a minute in all.
SCENARIOS = {
    "crashes": Scenario("dDa", window=2, crashes=2),
    "crash, connection": Scenario("dar", window=2, crashes=1, breaks=1, late=1),
    "connections": Scenario("dpa", window=2, breaks=2, late=1),
    "swap, crash": Scenario("dpa", swaps=1, crashes=1, crashing=("dev",)),
    "swap, connection": Scenario("da", swaps=1, breaks=1),
    "disk, output": Scenario("Dio", window=2, crashes=2, crashing=("dev",)),
    "shut windows": Scenario("RRRR", window=2, eager=True, breaks=1),
    "shut windows, crash": Scenario("rdRr", window=2, breaks=1, crashes=1, breaking=(0,), crashing=("dev",)),
    "window of one": Scenario("dddd", window=1, ack_every=1, crashes=1, breaks=1, breaking=(1,)),
    "lost frames": Scenario("ddr", drops=10, breaks=1),
    "put off": Scenario("qqdr", window=2, crashes=1, breaks=1, breaking=(0,), crashing=("dev",)),
    "put off, interrupts": Scenario("mdm", window=2, crashes=2, crashing=("pic",)),
    "put off, swap": Scenario("qrq", window=2, swaps=1, crashes=1, crashing=("dev",)),
    "begins anew": Scenario("dr", window=2, renewals=1, crashes=1, crashing=("dev",)),
    "begins anew, bound": Scenario("rd", window=2, renewals=1, late=1, cpu_bound=True),
}
# What `make model` goes through besides.
LARGER = {
    "everything": Scenario("da", crashes=1, breaks=1, swaps=1, late=1, drops=1),
    "crashes, connection": Scenario("dar", window=2, crashes=2, breaks=1),
    "crashes, connections": Scenario("da", crashes=2, breaks=2),
    "swap, crashes": Scenario("dai", window=2, crashes=2, swaps=1),
    "three crashes": Scenario("dpD", window=2, crashes=3),
    "put off, crashes": Scenario("qmqa", window=2, crashes=2, breaks=1),
    "put off, everything": Scenario("qm", crashes=1, breaks=1, swaps=1, late=1, drops=1),
    "put off, anew": Scenario("qr", window=2, crashes=1, renewals=1, late=1, crashing=("dev",)),
    "anew, connection": Scenario("da", renewals=1, breaks=1, late=1),
    "anew, bound, crash": Scenario("da", renewals=1, crashes=1, late=1, cpu_bound=True),
    "begins anew twice": Scenario("dr", window=2, renewals=2, late=1),
    "anew twice, bound": Scenario("dr", window=2, renewals=2, late=1, cpu_bound=True),
    "four frames": Scenario("daio", window=2, crashes=1, breaks=1),
}


KINDS = ("crashes", "breaks", "swaps", "late", "drops", "renewals")


def main() -> int:
    head = f"{'scenario':22} {'frames':7} {'faults':45}"
    print(f"{head} {'states':>9} {'transitions':>12} {'depth':>5} {'s':>6}")
    total = [0, 0]
    for name, scenario in {**SCENARIOS, **LARGER}.items():
        started = time.process_time()
        try:
            found = explore(scenario)
        except Failed as failed:
            print(f"{name}: {failed}")
            return 1
        took = time.process_time() - started
        counts = {n: getattr(scenario, n) for n in KINDS}
        faults = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        figures = f"{found.states:9,} {found.transitions:12,} {found.depth:5} {took:6.1f}"
        print(f"{name:22} {scenario.program:7} {faults:45} {figures}", flush=True)
        total = [total[0] + found.states, total[1] + found.transitions]
    print(f"{total[0]:,} states, {total[1]:,} transitions: invariants hold, each run ends, all is delivered")
    return 0


if __name__ == "__main__":
    sys.exit(main())
