"""The arithmetic of `make bench`, its table and its plot; the timing itself is no test."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from bench.chart import svg
from bench.rows import ROWS, Ratio, Row, Verdict, checks_of, result_of, times_of
from bench.table import aligned, table, time

INT = Row("int", "integer", ("int.",), "translated", 0.5, 2.0, ("int",))


def test_times_are_read_in_nanoseconds() -> None:
    lines = ["BEGIN int.a", "BENCH int.a 1.5 ms/1M-sieve", "BENCH int.b 20.25 ns/byte", "BENCH proc.c 3 us/x",
             "CHECK int.a 0001", "noise BENCH int.z 1 ns/x"]
    assert times_of(lines) == {"int.a": 1.5e6, "int.b": 20.25, "proc.c": 3000.0}


def test_answers_and_complaints() -> None:
    assert checks_of(["CHECK int.a 0001", "MISMATCH proc.signal 3", "BENCH int.a 1 ns/x"]) == {
        "CHECK int.a": "0001",
        "MISMATCH proc.signal": "3",
    }


def test_a_row_is_the_geometric_mean_and_its_ratios_are_formed_round_by_round() -> None:
    rounds = [
        {"translated": {"int.a": 1.0, "int.b": 4.0, "fp.a": 9.0}, "qemu": {"int.a": 8.0, "int.b": 8.0},
         "native": {"int.a": 1.0, "int.b": 1.0}},
        {"translated": {"int.a": 2.0, "int.b": 8.0}, "qemu": {"int.a": 4.0, "int.b": 64.0},
         "native": {"int.a": 4.0, "int.b": 4.0}},
    ]  # fmt: skip
    result = result_of(INT, rounds)
    assert result is not None
    assert result.ours_ns == pytest.approx(3.0)  # of 2 and 4
    assert result.qemu_ns == pytest.approx(12.0)  # of 8 and 16
    assert result.to_qemu is not None
    assert result.to_native is not None
    assert (result.to_qemu.lowest, result.to_qemu.highest) == (pytest.approx(0.25), pytest.approx(0.25))
    assert (result.to_native.lowest, result.to_native.highest) == (pytest.approx(1.0), pytest.approx(2.0))
    assert result.verdict is Verdict.MET


def test_a_program_that_the_other_has_not_run_makes_no_ratio() -> None:
    result = result_of(INT, [{"translated": {"int.a": 1.0, "int.b": 1.0}, "qemu": {"int.a": 1.0}}])
    assert result is not None
    assert result.to_qemu is None
    assert result.verdict is None


def test_a_row_nobody_ran_is_none() -> None:
    assert result_of(INT, [{"translated": {"fp.a": 1.0}}, {}]) is None


@pytest.mark.parametrize(
    ("lowest", "highest", "target", "verdict"),
    [(0.1, 0.5, 0.5, Verdict.MET), (0.4, 0.6, 0.5, Verdict.OPEN), (0.51, 0.6, 0.5, Verdict.MISSED),
     (0.1, 0.2, None, None)],
)  # fmt: skip
def test_a_target_counts_only_if_every_round_met_it(
    lowest: float, highest: float, target: float | None, verdict: Verdict | None
) -> None:
    assert Ratio(0.5, lowest, highest, target).verdict is verdict


def test_the_worse_of_two_targets_is_the_rows() -> None:
    rounds = [{"translated": {"int.a": 1.0}, "qemu": {"int.a": 9.0}, "native": {"int.a": 0.1}}]
    result = result_of(INT, rounds)
    assert result is not None
    assert result.verdict is Verdict.MISSED


def test_rows_have_names_of_their_own_and_groups_that_exist() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    known = {"int", "x87", "sse2", "mem", "sys", "proc", "vm", "call", "jit", "hw"}
    for row in ROWS:
        assert set(row.groups) <= known
        assert bool(row.groups) == (row.part != "boot")


def test_table_and_plot_have_a_line_for_each_row() -> None:
    rounds = [{"translated": {"int.a": 2.0}, "qemu": {"int.a": 9.0}, "native": {"int.a": 1.0}}]
    result = result_of(INT, rounds)
    assert result is not None
    assert table([result]).splitlines()[1].split()[:8] == [
        "integer,", "translated", "2", "ns", "9", "ns", "0.22", "(0.22-0.22)",
    ]  # fmt: skip
    drawn = ET.fromstring(svg([result, result], "a < b"))
    circles = drawn.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 4
    xs = [float(circle.attrib["cx"]) for circle in circles[:2]]
    assert xs[0] < xs[1]  # 0.22 of QEMU's lies left of 2 times native


def test_columns_are_aligned() -> None:
    assert aligned([("a", "1"), ("bbb", "100")]) == "a      1\nbbb  100"
    assert [time(v) for v in (None, 1.234, 12345, 2.5e6, 3e9)] == ["-", "1.23 ns", "12.3 us", "2.5 ms", "3 s"]
