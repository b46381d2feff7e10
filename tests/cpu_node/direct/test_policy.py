"""When an address space goes direct and comes back; and that nothing of it can be seen."""

from __future__ import annotations

import pytest

from cpu_node.direct.choose import MAKERS
from cpu_node.direct.execution import Clocks
from cpu_node.direct.policy import EARN_MOST_NS, EARN_NS, LOSE_NS, PAGE_NS, Auto, Pace
from cpu_node.errors import UD
from cpu_node.window import Space
from tests.cpu_node.board import COUNTER, DATA, Board
from tests.cpu_node.child import isolated
from tests.cpu_node.direct.boards import direct_of, user_board

TRAP_NS = 50_000
MS = 1_000_000


def test_long_stretches_earn_their_way() -> None:
    auto, pace = Auto(TRAP_NS), Pace()
    stretches = 0
    while not auto.translated(pace, 4 * MS, 1):
        stretches += 1
    assert pace.direct
    assert stretches == EARN_NS // (4 * MS - auto.price_ns)
    assert auto.went_direct == 1


def test_short_stretches_never_do() -> None:
    auto, pace = Auto(TRAP_NS), Pace()
    for _ in range(10_000):
        assert not auto.translated(pace, auto.price_ns - 1, 1)
        assert not auto.translated(pace, 100 * MS, 100 * MS // auto.price_ns + 1)
    assert pace == Pace()


def test_a_child_that_must_be_shown_much_has_to_be_earned() -> None:
    auto, pace = Auto(TRAP_NS), Pace()
    earned = auto.price_ns + EARN_NS + 100 * PAGE_NS
    assert not auto.translated(pace, earned - 1, 1, pages=100)
    assert not pace.direct
    assert auto.translated(pace, auto.price_ns + 1, 1, pages=100)


def test_who_traps_comes_back_and_must_earn_more() -> None:
    auto, pace = Auto(TRAP_NS), Pace(direct=True)
    traps = 1
    while not auto.direct(pace, 1000):
        traps += 1
    assert traps == LOSE_NS // (auto.price_ns - 1000) + 1
    assert pace == Pace(direct=False, balance_ns=0, goal_ns=2 * EARN_NS)
    for _ in range(20):
        pace.direct = True
        while not auto.direct(pace, 0):
            pass
    assert pace.goal_ns == EARN_MOST_NS


def test_who_stays_long_is_trusted_again() -> None:
    auto, pace = Auto(TRAP_NS), Pace(direct=True, goal_ns=8 * EARN_NS)
    for _ in range(1000):
        assert not auto.direct(pace, 4 * MS)
    assert pace.goal_ns == EARN_NS


ITERATIONS, TRAPS = 600_000, 300
END_STRETCH = "push es; pop es;"  # the simulator's, where it is translated; nothing else ends a stretch here
# counts its iterations in [DATA + 4]; the test's clock runs by that
COMPUTE = (END_STRETCH + "mov ecx, {2}; a{0}: imul eax, eax, 1103515245; add eax, ecx; add [{1}], eax;"
           "inc dword ptr [{1}+4]; loop a{0};" + END_STRETCH)
TRAP = "mov ecx, {1}; b{0}: int 0x80; loop b{0};"
NS_PER_ITERATION = 100


@pytest.mark.parametrize("backend", sorted(MAKERS))
@isolated
def test_a_program_that_computes_and_traps_by_turns(backend: str) -> None:
    """It goes direct and comes back, and ends in the same state as when it is translated throughout."""
    outcomes = []
    rounds = "".join(COMPUTE.format(2 * n, DATA, ITERATIONS) + COMPUTE.format(2 * n + 1, DATA, ITERATIONS)
                     + TRAP.format(n, TRAPS) for n in range(3))
    for how in (None, backend):
        auto = Auto(TRAP_NS) if how else None
        board = user_board(how, auto)
        board.handler(f"inc dword ptr [{COUNTER}]", 0x80, dpl=3)
        board.handler("hlt", UD)
        if auto is not None:
            direct_of(board).clocks = by_progress(board)
        board.run(rounds + "ud2")
        data = board.ram[DATA : DATA + 4096]
        outcomes.append((list(board.regs), board.peek32(COUNTER), data, board.faults))
        if auto is not None:
            assert (auto.went_direct, auto.came_back) == (3, 3)
            counters = direct_of(board).counters()
            assert counters["user_translated_ms"] == 3 * ITERATIONS * NS_PER_ITERATION // MS
            assert counters["user_direct_ms"] == 3 * ITERATIONS * NS_PER_ITERATION // MS
    assert outcomes[0] == outcomes[1]


def by_progress(board: Board) -> Clocks:
    """Time passes while the program computes, and for nothing else; the same on every host."""

    def now() -> int:
        return board.peek32(DATA + 4) * NS_PER_ITERATION

    return Clocks(now, lambda pid: now())


@isolated
def test_a_new_space_is_translated() -> None:
    board = user_board(None)
    assert isinstance(board.engine.contexts.space, Space)
    assert board.engine.contexts.space.pace == Pace()
