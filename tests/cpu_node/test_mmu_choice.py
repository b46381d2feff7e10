"""When a space's user code leaves the software TLB for a window, and when it comes back."""

from __future__ import annotations

from cpu_node.mmu_choice import FAULT_NS, GOAL_MOST_NS, GOAL_NS, LONGEST_STRETCH_NS, SLOWER_PERCENT, MmuChoice
from cpu_node.window import Space
from tests.cpu_node.board import DATA, DIRECTORY, RW, US, Board, P
from tests.cpu_node.child import isolated

STRETCH_NS = 200_000
OTHER_TABLE = 0xD000
EARNED_NS = STRETCH_NS * SLOWER_PERCENT // 100


class Looks:
    """A MmuChoice that looks every STRETCH_NS."""

    def __init__(self) -> None:
        self.board = Board()
        self.board.paging()
        self.board.engine.contexts.soft = True
        self.choice = MmuChoice(self.board.engine.contexts)
        self.now_ns = self.faults = 0

    @property
    def space(self) -> Space:
        return self.board.engine.contexts.space

    def look(self, user: bool = True, faults: int = 0, after_ns: int = STRETCH_NS) -> bool:
        self.now_ns += after_ns
        self.faults += faults
        return self.choice.look(self.now_ns, user, self.faults)

    def until_changed(self, **how: int) -> int:
        count = 1
        while not self.look(**how):  # type: ignore[arg-type]
            count += 1
            assert count < 10_000
        return count


@isolated
def test_who_computes_gets_a_window() -> None:
    looks = Looks()
    looks.space.soft = True
    looks.look()  # from here on it is known to be running
    assert looks.until_changed() == -(-GOAL_NS // EARNED_NS)
    assert not looks.space.soft
    assert looks.choice.went_to_window == 1


@isolated
def test_who_faults_comes_back_and_has_to_compute_longer() -> None:
    looks = Looks()
    looks.space.soft = True
    looks.look()
    looks.until_changed()
    faults = STRETCH_NS // FAULT_NS
    looks.until_changed(faults=faults)
    assert looks.space.soft
    assert looks.choice.went_to_tlb == 1
    assert looks.until_changed() == -(-4 * GOAL_NS // EARNED_NS)
    for _ in range(20):
        looks.until_changed(faults=faults)
        looks.until_changed()
    assert looks.space.goal_ns == GOAL_MOST_NS


@isolated
def test_faults_keep_the_tlb() -> None:
    looks = Looks()
    looks.space.soft = True
    for _ in range(1000):
        assert not looks.look(faults=-(-EARNED_NS // FAULT_NS))


@isolated
def test_the_kernel_s_time_counts_for_nothing() -> None:
    looks = Looks()
    looks.space.soft = True
    for _ in range(1000):
        assert not looks.look(user=False)
    looks.look()
    assert looks.space.balance_ns == EARNED_NS


@isolated
def test_another_space_in_between_spoils_the_stretch() -> None:
    looks = Looks()
    looks.space.soft = True
    for _ in range(1000):
        looks.board.flush()
        assert not looks.look()


@isolated
def test_sleep_is_no_computing() -> None:
    looks = Looks()
    looks.space.soft = True
    looks.look()
    looks.look(after_ns=10**12)
    assert looks.space.balance_ns <= LONGEST_STRETCH_NS


@isolated
def test_another_program_in_the_page_directory_begins_anew() -> None:
    looks = Looks()
    board = looks.board
    looks.space.soft = True
    looks.until_changed()
    board.flat_segments(3)
    board.run(f"mov eax, [{DATA}]\nud2")
    board.flush()
    assert not looks.space.soft
    table = board.peek32(DIRECTORY) & ~0xFFF
    board.ram[OTHER_TABLE : OTHER_TABLE + 4096] = board.ram[table : table + 4096]
    board.poke32(DIRECTORY, OTHER_TABLE | P | RW | US)
    board.flush()
    assert looks.space.soft
    assert looks.space.goal_ns == GOAL_NS
