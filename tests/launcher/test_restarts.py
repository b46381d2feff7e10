"""The waits between restarts."""

from __future__ import annotations

from launcher.restarts import FIRST_WAIT_S, HEALTHY_S, LONGEST_WAIT_S, Restarts


def test_a_process_that_lived_is_restarted_at_once() -> None:
    restarts = Restarts()
    for n in range(1, 5):
        restarts.started(100.0 * n)
        assert restarts.ended(100.0 * n + HEALTHY_S) == 0
    assert restarts.count == 4


def test_one_that_ends_at_once_waits_longer_and_longer_but_not_for_ever() -> None:
    restarts, now, waits = Restarts(), 5.0, []
    for _ in range(200):
        restarts.started(now)
        assert restarts.due_s is None
        waits.append(restarts.ended(now))
        assert restarts.due_s == now + waits[-1]
        now += waits[-1]
    assert waits[0] == FIRST_WAIT_S
    assert waits == sorted(waits)
    assert waits[-1] == LONGEST_WAIT_S


def test_ps_shows_the_wait() -> None:
    restarts = Restarts()
    restarts.started(0)
    for _ in range(30):
        restarts.ended(0)
    assert restarts.state(1.0) == "restarts in 4.0 s"
