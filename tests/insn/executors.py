"""The ways to execute a case that are compared with the host CPU: one line each, and nothing else knows them.

A new one is a Runner of its own and a line here, and its table appears in docs/conformance.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from tests.insn.segments import FLAT
from tests.insn.state import AC, Case, CpuState

NATIVE = "native"
TRANSLATED, RESTARTED, NOT_FLAT, SIMULATED = "translated", "restarted", "not flat", "simulated"
DIRECT = {"ptrace": "direct", "seccomp": "direct, seccomp"}  # by trap back end
SOFT, SOFT_RESTARTED = "soft", "soft restarted"
SEEN_DIRECTLY = frozenset(("lar", "lsl", "verr", "verw", "into"))
SEGMENT_BASE = 0x12345000


class Runner(Protocol):
    def run(self, case: Case) -> CpuState: ...


class Executor(NamedTuple):
    """`make` is called once in a process of its own; it may take its signals and addresses."""

    what: str
    make: Callable[[], Runner]
    takes: Callable[[Case], bool] = lambda case: True
    works_here: Callable[[], bool] = lambda: True


def _native() -> Runner:
    from tests.insn.native_unsafe import NativeRunner

    return NativeRunner()


def _guest(simulate: bool = False, base: int = 0, on_demand: bool = False, direct: str = "",
           soft: bool = False) -> Runner:
    from tests.insn.guest import GuestRunner

    return GuestRunner(simulate, base, on_demand, direct, soft)


def _runs_directly(case: Case) -> bool:
    """docs/direct-execution.md says what is translated all the same, and what code can see."""
    sees = any(row.split()[1] in SEEN_DIRECTLY for row in case.rows)
    return case.cpl == 3 and case.selectors == FLAT and not case.eflags & AC and not sees


def _runs_softly(case: Case) -> bool:
    """Other cases are no different from those of translated code, or of the simulator."""
    return case.cpl == 3 and case.selectors == FLAT and not case.eflags & AC


def _host_probes() -> bool:
    from cpu_node.cpuid import host_flags
    from cpu_node.tlb import HOST_FLAG

    return HOST_FLAG in host_flags(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace"))


def _children_work(backend: str) -> bool:
    from cpu_node.direct.choose import MAKERS, examine
    from cpu_node.direct.exits import DirectUnavailable

    with suppress(DirectUnavailable):
        examine(MAKERS[backend])
        return True
    return False


def _direct(backend: str, what: str) -> Executor:
    return Executor(what, lambda: _guest(direct=backend), _runs_directly, lambda: _children_work(backend))


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
    DIRECT["ptrace"]: _direct(
        "ptrace",
        "user code in a traced child: cases of CPL 3 with flat segments, without alignment checks and "
        f"{', '.join(sorted(name.upper() for name in SEEN_DIRECTLY))}",
    ),
    SOFT: Executor(
        "user code that finds its data by the software TLB: cases of CPL 3 with flat segments, without "
        "alignment checks", lambda: _guest(soft=True), _runs_softly, _host_probes,
    ),
    SOFT_RESTARTED: Executor(
        "the same, with a fault at every memory operand as above",
        lambda: _guest(on_demand=True, soft=True), _runs_softly, _host_probes,
    ),
}  # fmt: skip


EVERY = {  # with those that docs/conformance.md has no column for
    **EXECUTORS,
    DIRECT["seccomp"]: _direct("seccomp", "as direct, by the other trap back end"),
}


def available(executors: Mapping[str, Executor] = EXECUTORS) -> tuple[str, ...]:
    """The executors that work on this host."""
    return tuple(name for name, executor in executors.items() if executor.works_here())


def make_runner(name: str) -> Runner:
    """Raises KeyError for an executor that doesn't exist."""
    return (ORACLE if name == NATIVE else EVERY[name]).make()
