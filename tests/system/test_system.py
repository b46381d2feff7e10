"""A seeded part of `make conformance-system`: our two executors, and QEMU and Unicorn where installed."""

from __future__ import annotations

import pytest

from tests.cpu_node.child import isolated
from tests.system import compare, qemu, runner, unicorn_first
from tests.system import places as p
from tests.system.backplane import SystemBoard
from tests.system.exclusions import excluded
from tests.system.subjects import SUBJECTS, scenario

SEED, EACH = 2025, 8


@pytest.mark.parametrize("subject", SUBJECTS)
@isolated
def test_translated_and_simulated_agree(subject: str) -> None:
    tallies = runner.run([(SEED, subject, index) for index in range(EACH)], False, False)
    assert tallies[subject].tried == EACH
    assert tallies[subject].different == []


@pytest.mark.skipif(bool(qemu.available()), reason=qemu.available())
@isolated
def test_qemu_agrees() -> None:
    names = [(SEED, subject, index) for subject in SUBJECTS for index in range(EACH)]
    board = SystemBoard()
    ends = 0
    for (_, subject, index), theirs in zip(
        names, qemu.run([scenario(*n).image() for n in names]), strict=True
    ):
        ours = board.execute(scenario(SEED, subject, index).image())
        lines, _ = runner.differing(subject, ours, theirs)
        assert not lines, f"{subject} {index}: {lines[:4]}; python -m tests.system.conformance --case " + (
            f'"{SEED}:{subject}:{index}"'
        )
        ends += ours is not None and compare.finished(ours)
    assert ends > 0.8 * len(names)


@pytest.mark.skipif(bool(unicorn_first.available()), reason=unicorn_first.available())
@isolated
def test_unicorn_agrees() -> None:
    board = SystemBoard()
    compared = 0
    for subject in SUBJECTS:
        for index in range(EACH):
            done, line = unicorn_first.compare_first(board, SEED, subject, index)
            assert not line, f"{subject} {index}: {line}"
            compared += done
    assert compared > 3 * EACH


@isolated
def test_every_subject_logs_what_it_is_about() -> None:
    """Vectors and privileges that the handlers of these scenarios must have seen."""
    board = SystemBoard()
    seen: dict[str, set[int]] = {}
    outer: set[int] = set()
    for subject in SUBJECTS:
        for index in range(EACH):
            arena = board.execute(scenario(SEED, subject, index).image())
            for event in compare.events(arena) if arena is not None else ():
                seen.setdefault(subject, set()).add(event.vector)
                outer.add(event.words[19] & 3)
    everywhere = set.union(*seen.values())
    assert {1, 3, 6, 7, 10, 11, 13, 14, p.END_OF_ACTION} <= everywhere
    assert 14 in seen["paging"]
    assert 1 in seen["debugging"]
    assert 7 in seen["FPU traps"]
    assert set(p.APIC_VECTORS) & seen["interrupts"]
    assert 10 in seen["task switches"]
    assert outer == {0, 1, 2, 3}


def test_a_difference_is_a_difference() -> None:
    """One bit more in a page table, a log entry or data is reported; a known one of QEMU's is counted."""
    ours = scenario(SEED, "paging", 0).image()
    for pa in (p.TABLE0 + 0x60, p.LOG + 0x48, p.DATA, p.GDT + 12):
        theirs = bytearray(ours)
        theirs[pa] ^= 0x40
        lines, masked = runner.differing("paging", ours, bytes(theirs))
        assert len(lines) == 1
        assert not masked
    assert runner.differing("paging", ours, None)[0]
    flags = bytearray(ours)
    flags[p.LOG + 18 * 4 + 2] ^= 1
    lines, masked = runner.differing("paging", ours, bytes(flags))
    assert (lines, masked) == ([], {"RF": 1})


def test_exclusions_cover_single_bits_only() -> None:
    assert excluded("gates", "GDT+c", 0x9B00, 0x9A00) is not None
    assert excluded("gates", "GDT+c", 0x9A00, 0x9B00) is None
    assert excluded("gates", "data+0", 0x9B00, 0x9A00) is None
    assert excluded("paging", "page table 0+4", 0x3007, 0x3027) is None
    assert excluded("paging", "log[0].frame0", 7, 5) is None
    assert excluded("read-modify-write paging", "log[0].frame0", 7, 5) is not None
