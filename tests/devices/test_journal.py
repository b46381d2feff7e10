"""The journal: what a process that ends at any point leaves to the next."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.journal import BadJournal, Journal


@pytest.fixture
def fd() -> Iterator[int]:
    fd = Journal.make("dev")
    yield fd
    os.close(fd)


def record(n: int, data: bytes = b"") -> tuple[Any, ...]:
    return ("State", 1, {"n": n, "data": data}, [], [{}, {}], {}, [], {}, (0, None))


def test_before_the_first_step_there_is_nothing(fd: int) -> None:
    assert Journal(fd).latest() is None


def test_a_new_process_finds_the_last_step(fd: int) -> None:
    journal = Journal(fd)
    for n in range(5):
        journal.commit(record(n, bytes(n * 1000)))
        latest = Journal(fd).latest()
        assert latest is not None
        assert latest.fields == {"n": n, "data": bytes(n * 1000)}


def test_a_record_that_was_being_written_is_not_found(fd: int) -> None:
    journal = Journal(fd)
    journal.commit(record(1))
    before = os.pread(fd, 4096, 0)  # with the word that says which half counts
    journal.commit(record(2))
    os.pwrite(fd, before, 0)  # as if the process had ended just before that store
    latest = Journal(fd).latest()
    assert latest is not None
    assert latest.fields["n"] == 1


def test_how_often_a_step_was_begun(fd: int) -> None:
    assert [Journal(fd).begin("cpu0.io", 7) for _ in range(3)] == [1, 2, 3]
    journal = Journal(fd)
    assert journal.begin("cpu0.io", 8) == 1
    assert journal.begin("pit", 8) == 1
    journal.commit(record(1))
    assert journal.begin("pit", 8) == 1  # committed: it can only be another with the same name
    assert Journal(fd).begin("cpu0.io", 7) == 4  # whatever came between


def test_a_step_that_is_put_off_has_not_ended_its_process(fd: int) -> None:
    for n in range(1, 4):
        journal = Journal(fd)
        assert journal.begin("disk0", 7) == 1
        journal.put_off()
        assert journal.begin("cpu0.io", 5) == n
    assert Journal(fd).latest() is None


def test_what_is_committed_besides_does_not_count(fd: int) -> None:
    for n in range(1, 5):
        journal = Journal(fd)
        journal.commit(record(0))  # what a new process says of itself
        assert journal.begin("pit", 1) == 1
        journal.commit(record(1))
        assert journal.begin("cpu0.io", 5) == n


def test_of_many_unfinished_steps_the_worst_are_remembered(fd: int) -> None:
    for _ in range(3):
        Journal(fd).begin("cpu0.io", 1)
    for n in range(100):
        Journal(fd).begin("pit", n)
    assert Journal(fd).begin("cpu0.io", 1) == 4


def test_dma_counts_are_those_of_the_last_step(fd: int) -> None:
    journal = Journal(fd)
    journal.commit(record(1))
    assert journal.dma_done() == 0
    journal.dma_written(3)
    assert Journal(fd).dma_done() == 3
    journal.commit(record(2))
    assert Journal(fd).dma_done() == 0


def test_what_is_said_outside_a_step_changes_only_its_stream(fd: int) -> None:
    journal = Journal(fd)
    journal.commit(record(4))
    journal.dma_written(2)
    journal.begin("cpu0.io", 9)
    journal.amend("launcher", (5, 4, 0, [b"frame"]))
    again = Journal(fd)
    latest = again.latest()
    assert latest is not None
    assert (latest.fields["n"], latest.streams[1]) == (4, {"launcher": [5, 4, 0, [b"frame"]]})
    assert (again.dma_done(), again.begin("cpu0.io", 9)) == (2, 2)


class Killed(Exception):
    """In place of the end of the process."""


class Words:
    """A journal's words, for a process that ends at the store behind the n-th."""

    def __init__(self, words: Any, stores: int) -> None:
        self._words, self._left = words, stores

    def __getitem__(self, at: int) -> int:
        return int(self._words[at])

    def __setitem__(self, at: int, value: int) -> None:
        if not self._left:
            raise Killed
        self._left -= 1
        self._words[at] = value


@pytest.mark.parametrize("amended", [False, True])
def test_wherever_a_process_ends_record_and_dma_count_belong_together(amended: bool) -> None:
    killed = 0
    for stores in range(20):
        fd = Journal.make("dev")
        journal = Journal(fd)
        journal.commit(record(1))
        journal.dma_written(2)
        journal._words = Words(journal._words, stores)  # type: ignore[assignment]
        try:
            if amended:
                journal.amend("launcher", (5, 4, 0, []))
            else:
                journal.commit(record(2))
        except Killed:
            killed += 1
        again = Journal(fd)
        latest = again.latest()
        assert latest is not None
        assert (latest.fields["n"], again.dma_done()) in ([(1, 2)] if amended else [(1, 2), (2, 0)])
        os.close(fd)
    assert 3 <= killed < 20


@given(lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=8))
def test_records_of_any_length(lengths: list[int]) -> None:
    fd = Journal.make("dev")
    try:
        for n, length in enumerate(lengths):
            Journal(fd).commit(record(n, bytes([n]) * length))
            latest = Journal(fd).latest()
            assert latest is not None
            assert latest.fields == {"n": n, "data": bytes([n]) * length}
    finally:
        os.close(fd)


def test_what_is_no_journal() -> None:
    fd = os.memfd_create("x")
    with pytest.raises(BadJournal, match="size"):
        Journal(fd)
    os.close(fd)
    fd = Journal.make("dev")
    os.pwrite(fd, b"12345678", 0)
    with pytest.raises(BadJournal, match="version"):
        Journal(fd)
    os.close(fd)
