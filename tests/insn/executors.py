"""The ways to execute a case that are compared with the host CPU: one line each, and nothing else knows them.

A new one is a Runner of its own and a line here, and its table appears in docs/conformance.md: so will the
direct executor (user code in a traced child), whose Runner takes the cases of CPL 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from tests.insn.state import Case, CpuState

NATIVE = "native"
TRANSLATED, RESTARTED, NOT_FLAT, SIMULATED = "translated", "restarted", "not flat", "simulated"
SEGMENT_BASE = 0x12345000


class Runner(Protocol):
    def run(self, case: Case) -> CpuState: ...


class Executor(NamedTuple):
    """`make` is called once in a process of its own; it may take its signals and addresses."""

    what: str
    make: Callable[[], Runner]


def _native() -> Runner:
    from tests.insn.native_unsafe import NativeRunner

    return NativeRunner()


def _guest(simulate: bool = False, base: int = 0, on_demand: bool = False) -> Runner:
    from tests.insn.guest import GuestRunner

    return GuestRunner(simulate, base, on_demand)


ORACLE = Executor("the host CPU", _native)
EXECUTORS: dict[str, Executor] = {
    TRANSLATED: Executor("translated code, with the segments of the case (mostly flat ones)", _guest),
    RESTARTED: Executor(
        "the same, but no page is present until it is touched and none writable until it is written: "
        "every memory operand faults, and the instruction is restarted",
        lambda: _guest(on_demand=True),
    ),
    NOT_FLAT: Executor(
        f"every segment begins at {SEGMENT_BASE:#x} or so much higher than in the case, and so do the pages",
        lambda: _guest(base=SEGMENT_BASE),
    ),
    SIMULATED: Executor("the simulator alone", lambda: _guest(simulate=True)),
}


def make_runner(name: str) -> Runner:
    """Raises KeyError for an executor that doesn't exist."""
    return (ORACLE if name == NATIVE else EXECUTORS[name]).make()
