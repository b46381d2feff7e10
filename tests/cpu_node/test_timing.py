"""Timing: what is measured adds up, what was wrapped is put back, and the guest runs as before."""

from __future__ import annotations

import pytest

from cpu_node import engine as engine_module
from cpu_node import gates
from cpu_node import host_unsafe as host
from cpu_node.timing import Clock, Timing
from tests.cpu_node.board import DATA, Board
from tests.cpu_node.child import isolated


def clock(*readings: int) -> Clock:
    times = iter(readings)
    return Clock(lambda: next(times))


def test_time_belongs_to_the_innermost_activity() -> None:
    measured = clock(0, 10, 15, 17, 30, 100)
    outer = measured.wrapped("outer", lambda: measured.wrapped("inner", lambda: "x")())
    assert outer() == "x"
    plain = measured.to_plain()
    assert plain["total_ns"] == 100
    assert plain["activities"] == {"loop": [0, 10 + 70], "outer": [1, 5 + 13], "inner": [1, 2]}


def test_an_exception_ends_an_activity() -> None:
    measured = clock(0, 1, 3, 6)

    def fails() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        measured.wrapped("bad", fails)()
    assert measured.current == "loop"
    assert measured.to_plain()["activities"] == {"loop": [0, 1 + 3], "bad": [1, 2]}


@isolated
def test_a_guest_is_measured_and_left_as_it_was() -> None:
    board = Board()
    engine = board.engine

    def parts() -> tuple[object, ...]:
        return (engine.record.enter, engine.contexts.fill, gates.deliver, host.map_file,
                engine_module.roll_back)

    before = parts()
    timing = Timing(engine)
    assert engine.record.enter is not before[0]
    board.run(f"mov ebp, 3\nagain: cpuid\nmov dword ptr [{DATA:#x}], ecx\ndec ebp\njnz again\nhlt")
    timing.stop()
    assert parts() == before
    assert board.regs[5] == 0
    assert "fill" not in vars(engine.contexts)
    plain = timing.clock.to_plain()
    activities = plain["activities"]
    assert sum(ns for _, ns in activities.values()) == plain["total_ns"]
    assert activities["guest"][0] == sum(engine.exits.values())
    assert activities["simulate: cpuid"][0] + activities["simulate: first time"][0] >= 3
    assert activities["translate"][0] == engine.contexts.cache.translations
    assert activities["fill a window"][0] == engine.contexts.fills
