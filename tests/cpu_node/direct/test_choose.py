"""Hosts that forbid ptrace, seccomp or both: what is left is used, with one line in the log."""

from __future__ import annotations

import logging

import pytest

from cpu_node.direct import choose
from cpu_node.direct.choose import MAKERS, Findings, examine
from cpu_node.direct.exits import DirectUnavailable, TrapBackend
from tests.cpu_node.board import Board
from tests.cpu_node.child import isolated
from tests.cpu_node.direct.forbid_unsafe import forbid


def forbid_or_skip(names: list[str]) -> None:
    try:
        forbid(names)
    except OSError as error:
        pytest.skip(f"this host allows no seccomp filter: {error}")


class Lines(logging.Handler):
    """The messages that a log would have."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        choose.log.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.mark.parametrize("name", sorted(MAKERS))
@isolated
def test_each_works_where_the_other_is_forbidden(name: str) -> None:
    try:
        examine(MAKERS[name])
    except DirectUnavailable as error:
        pytest.skip(f"this host forbids it: {error}")
    others = [other for other in MAKERS if other != name]
    forbid_or_skip(others)
    log, board = Lines(), Board()
    direct = choose.start(board.engine, board.fd, "direct", "auto")
    assert direct is not None
    assert direct.backend.name == name
    (line,) = log.lines
    assert line.startswith(f"trap back end {name}, as others do not work here ({others[0]}: ")


@pytest.mark.parametrize("wanted", ["auto", *sorted(MAKERS)])
@isolated
def test_where_all_are_forbidden_user_code_is_translated(wanted: str) -> None:
    forbid_or_skip(list(MAKERS))
    log, board = Lines(), Board()
    assert choose.start(board.engine, board.fd, "auto", wanted) is None
    (line,) = log.lines
    assert line.startswith("user code is translated: no trap back end works here (")
    assert all(name in line for name in (MAKERS if wanted == "auto" else [wanted]))


@isolated
def test_nothing_is_said_where_all_work() -> None:
    log, board = Lines(), Board()
    direct = choose.start(board.engine, board.fd, "auto", "auto")
    if not log.lines:
        assert direct is not None
        assert direct.auto is not None


@isolated
def test_ptrace_is_taken_unless_the_other_is_clearly_faster() -> None:
    speeds = {"ptrace": 5000, "seccomp": 7000}

    def examined(make: type[TrapBackend]) -> Findings:
        name = next(name for name, maker in MAKERS.items() if maker is make)
        return Findings(speeds[name], (), 0)

    choose.examine = examined  # type: ignore[assignment]
    board = Board()
    for ptrace_ns, fastest in ((5000, "ptrace"), (8000, "ptrace"), (12000, "seccomp")):
        speeds["ptrace"] = ptrace_ns
        direct = choose.start(board.engine, board.fd, "direct", "auto")
        assert direct is not None
        assert direct.backend.name == fastest


