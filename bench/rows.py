"""The rows of `make bench`: what each is made of, what it must reach, and the arithmetic.

A round is one run of each machine ("series"): qemu, native, and Backplane's own: first and kept (boots
without and with translations of an earlier start), translated and auto (user code's two ways to run). Its
figures are times by program, in nanoseconds. Ratios are formed inside a round, between neighbouring runs, and
only then summed up over the rounds: a host's speed drifts. All figures are lower-is-better.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import exp, log
from statistics import median

Times = Mapping[str, float]  # program -> ns per operation
Round = Mapping[str, Times]  # series -> its times

BOOT, BOOT_CPU = "boot.ready", "boot.cpu"
UNITS_NS = {"ns": 1.0, "us": 1e3, "ms": 1e6, "s": 1e9}
BENCH_LINE = re.compile(r"BENCH (\S+) ([0-9.]+) (ns|us|ms|s)/")
OWN_SERIES = ("first", "kept", "translated", "auto")


@dataclass(frozen=True, slots=True)
class Row:
    """`programs` names guest programs; one that ends in a dot stands for all that begin so. The targets are
    ratios of Backplane's time, None where there is none; `groups` are what the guest must run for it."""

    part: str
    title: str
    programs: tuple[str, ...]
    series: str
    qemu: float | None
    native: float | None
    groups: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The title, with the mode where there may be several."""
        return f"{self.title}, {self.series}" if self.groups else self.title


def _compute(part: str, title: str, programs: str, groups: tuple[str, ...], qemu: float, native: float
             ) -> tuple[Row, Row]:
    return (Row(part, title, (programs,), "translated", qemu, native, groups),
            Row(part, title, (programs,), "auto", None, 1.1, groups))


SYSTEM_CALLS = ("sys.getppid_int80", "sys.getppid_vdso", "sys.read1", "sys.open_close")
ROWS: tuple[Row, ...] = (
    Row("boot", "boot to shell, first start", (BOOT,), "first", 0.6, None),
    Row("boot", "boot to shell, translations kept", (BOOT,), "kept", 0.4, None),
    Row("boot", "boot, CPU time, first start", (BOOT_CPU,), "first", None, None),
    Row("boot", "boot, CPU time, translations kept", (BOOT_CPU,), "kept", None, None),
    *_compute("int", "integer compute", "int.", ("int",), 0.25, 1.35),
    *_compute("fp", "x87 and SSE2 compute", "fp.", ("x87", "sse2"), 0.08, 1.15),
    *_compute("mem", "memory streams, pointer chasing", "mem.", ("mem",), 0.2, 1.3),
    *_compute("call", "calls, returns, indirect calls", "call.", ("call",), 0.3, 1.7),
    Row("sys", "system call", SYSTEM_CALLS, "translated", 1.0, None, ("sys",)),
    Row("sys", "system call", SYSTEM_CALLS, "auto", 1.0, None, ("sys",)),
    Row("proc", "fork and wait", ("proc.fork",), "translated", 1.0, None, ("proc",)),
    Row("proc", "fork, exec and wait", ("proc.forkexec",), "translated", 1.0, None, ("proc",)),
    Row("proc", "pipe round trip", ("proc.pipe",), "translated", 1.0, None, ("proc",)),
    Row("proc", "signal delivery", ("proc.signal",), "translated", 1.0, None, ("proc",)),
    Row("vm", "page fault", ("vm.fault_anon",), "translated", 1.0, None, ("vm",)),
    Row("vm", "mmap, touch, munmap", ("vm.mmap_munmap",), "translated", 1.0, None, ("vm",)),
    Row("vm", "mprotect", ("vm.mprotect",), "translated", 1.0, None, ("vm",)),
    Row("vm", "copy on write", ("vm.cow",), "translated", 1.0, None, ("vm",)),
    Row("jit", "new code, run once", ("jit.cold",), "translated", 2.0, None, ("jit",)),
    Row("jit", "code patched and run", ("jit.patch",), "translated", 2.0, None, ("jit",)),
    Row("jit", "code that patches itself", ("jit.smc_next",), "translated", 2.0, None, ("jit",)),
    Row("hw", "port I/O: OUT 80h, IN 64h", ("hw.outb_80", "hw.inb_64"), "translated", None, None, ("hw",)),
    Row("hw", "loading a segment register", ("hw.segload_fs", "hw.segload_es"), "translated", None, None,
        ("hw",)),
)
PARTS = tuple(dict.fromkeys(row.part for row in ROWS))


class Verdict(Enum):
    """A target is claimed only where all rounds reach it."""

    MET = "met"
    MISSED = "missed"
    OPEN = "within the spread"


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of Backplane's time to another's, over the rounds."""

    median: float
    lowest: float
    highest: float
    target: float | None

    @property
    def verdict(self) -> Verdict | None:
        if self.target is None:
            return None
        if self.highest <= self.target:
            return Verdict.MET
        return Verdict.MISSED if self.lowest > self.target else Verdict.OPEN


@dataclass(frozen=True, slots=True)
class Result:
    """A row's figures: medians in ns (geometric means where a row has several programs), and the ratios."""

    row: Row
    rounds: int
    ours_ns: float
    qemu_ns: float | None
    native_ns: float | None
    to_qemu: Ratio | None
    to_native: Ratio | None

    @property
    def verdict(self) -> Verdict | None:
        """Of both targets together."""
        verdicts = {r.verdict for r in (self.to_qemu, self.to_native) if r is not None and r.verdict}
        for worst in (Verdict.MISSED, Verdict.OPEN, Verdict.MET):
            if worst in verdicts:
                return worst
        return None


def times_of(lines: Iterable[str]) -> dict[str, float]:
    """The benchmark's BENCH lines as ns by program."""
    found = (BENCH_LINE.match(line) for line in lines)
    return {m[1]: float(m[2]) * UNITS_NS[m[3]] for m in found if m}


def checks_of(lines: Iterable[str]) -> dict[str, str]:
    """The answers that the programs print, and their complaints; where two machines differ one is wrong."""
    words = [line.split() for line in lines if line.startswith(("CHECK ", "MISMATCH "))]
    return {" ".join(w[:2]): " ".join(w[2:]) for w in words}


def geometric_mean(values: Sequence[float]) -> float:
    return exp(sum(map(log, values)) / len(values))


def result_of(row: Row, rounds: Sequence[Round]) -> Result | None:
    """The row over those rounds that have it; None when none has."""
    having = [r for r in rounds if _programs(row, r.get(row.series, {}))]
    if not having:
        return None
    ours = [_mean(row, r, row.series) for r in having]
    qemu = _against(row, having, "qemu", row.qemu)
    native = _against(row, having, "native", row.native)
    return Result(row, len(having), median(v for v in ours if v is not None), qemu[0], native[0],
                  qemu[1], native[1])


def _programs(row: Row, times: Times) -> list[str]:
    wanted = row.programs
    return [p for p in times if p in wanted or any(w.endswith(".") and p.startswith(w) for w in wanted)]


def _mean(row: Row, single: Round, series: str) -> float | None:
    """Geometric mean over the row's programs; None where the series has not all that Backplane's has."""
    times, names = single.get(series, {}), _programs(row, single[row.series])
    if any(times.get(name, 0) <= 0 for name in names):
        return None
    return geometric_mean([times[name] for name in names])


def _against(row: Row, rounds: Sequence[Round], other: str, target: float | None
             ) -> tuple[float | None, Ratio | None]:
    pairs = [(a, b) for r in rounds
             if (a := _mean(row, r, row.series)) is not None and (b := _mean(row, r, other)) is not None]
    if not pairs:
        return None, None
    ratios = [a / b for a, b in pairs]
    return median(b for _, b in pairs), Ratio(median(ratios), min(ratios), max(ratios), target)
