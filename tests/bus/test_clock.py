"""The machine's clock: an offset, standing, going on."""

from __future__ import annotations

from bus.clock import MachineClock


def test_it_is_the_hosts_with_an_offset() -> None:
    host = [1000]
    clock = MachineClock(-300, host_ns=lambda: host[0])
    assert clock() == 700
    host[0] += 50
    assert clock() == 750
    assert clock.left_s(1_000_000_750) == 1.0


def test_it_stands_until_it_goes_on() -> None:
    host = [1000]
    clock = MachineClock(host_ns=lambda: host[0])
    assert clock.stop() == 1000
    host[0] += 500
    assert clock() == clock.stop() == clock.stopped_ns == 1000
    clock.go_on(1000 - host[0])
    assert clock.stopped_ns is None
    assert clock() == 1000
    host[0] += 7
    assert clock() == 1007


def test_it_may_stand_from_the_start() -> None:
    clock = MachineClock(0, 42, lambda: 9)
    assert clock() == 42
    clock.go_on(100)
    assert clock() == 109
