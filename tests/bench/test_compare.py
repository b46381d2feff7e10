"""What `make bench` runs, and in which order; the machines themselves are not started."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import boot, compare
from bench.rows import PARTS

REPO = Path(__file__).parents[2]
MACHINE = REPO / "machines" / "linux.toml"


def plan(*parts: str, missing: tuple[str, ...] = ()) -> compare.Plan:
    made = compare.Plan(parts, 4, MACHINE, 256, 60, native=True)
    made.missing = dict.fromkeys(missing, "not accepted")
    return made


def names(made: compare.Plan) -> list[list[str]]:
    return [[step.__name__ for step in steps] for steps in made.steps()]


def test_a_round_runs_what_its_rows_need() -> None:
    assert names(plan("boot")) == [["qemu_boot", "own_boots"]]
    assert names(plan("int", "vm")) == [["qemu_bench", "translated", "auto", "on_host"]]
    assert names(plan("int", missing=("auto",))) == [["qemu_bench", "translated", "on_host"]]
    assert names(plan("hw")) == [["qemu_bench", "translated"]]
    assert plan("fp", "vm").groups() == ["x87", "sse2", "vm"]
    assert plan("fp", "vm").groups("auto") == ["x87", "sse2"]


def test_answers_that_differ_are_named() -> None:
    made = plan("int")
    made.answers = {
        "CHECK int.a": {"qemu": "1", "translated": "1"},
        "CHECK int.b": {"qemu": "1", "translated": "2"},
        "MISMATCH proc.signal": {"qemu": "7"},
    }
    named = [line.partition(":")[0] for line in made.disagreements()]
    assert named == ["CHECK int.b", "MISMATCH proc.signal"]


def test_keys_that_a_machine_file_does_not_take_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boot, "SCRATCH", tmp_path)
    assert compare.why_not(MACHINE, {"user_mode": "translated"}) is None
    assert "nonsense" in str(compare.why_not(MACHINE, {"nonsense": "x"}))


@pytest.mark.parametrize("arguments", [["-n", "0"], ["--rows", "int,nothing"], ["--scale", "x"]])
def test_bad_arguments_are_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["compare", *arguments])
    with pytest.raises(SystemExit) as end:
        compare.main()
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]


def test_parts_are_known() -> None:
    assert compare._parts("boot,int") == ["boot", "int"]
    assert set(PARTS) == {"boot", "int", "fp", "mem", "call", "sys", "proc", "vm", "jit", "hw"}


def test_figures_can_be_shown_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(boot, "GUEST", tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    file, plot = tmp_path / "x.json", tmp_path / "x.svg"
    monkeypatch.setattr("sys.argv", ["compare", "--json", str(file), "--svg", str(plot)])
    options = compare._arguments()
    made = plan("int", missing=("auto",))
    made.rounds = [{"translated": {"int.a": 2.0}, "qemu": {"int.a": 8.0}}]
    results = [r for r in (compare.result_of(row, made.rounds) for row in made.rows()) if r is not None]
    facts = {"qemu": "QEMU 7.2 (x)", "cpu": "a CPU", "cores": 2, "others_cores": 0.01}
    compare._write(options, made, results, facts)
    first = plot.read_text()
    plot.unlink()
    monkeypatch.setattr("sys.argv", ["compare", "--again", str(file), "--svg", str(plot)])
    assert compare.main() == 0
    assert plot.read_text() == first
    assert "0.25 (0.25-0.25)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_figures_that_are_none(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    monkeypatch.setattr("sys.argv", ["compare", "--again", str(file)])
    assert compare.main() == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
