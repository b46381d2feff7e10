"""Processes in words: rows of `launcher ps`, the line about a dead one, the CPU's registers."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bus.frames import Event, Frame
from launcher.errors import one_line

if TYPE_CHECKING:
    from launcher.processes import Process

END_MS = 5000  # for the kernel to finish ending a process that was killed
LOG_TAIL = 4096
STATES = {"R": "running", "S": "waiting", "D": "disk wait", "T": "stopped", "t": "traced", "Z": "ended"}
COLUMNS = ("NODE", "PID", "STATE", "FRAMES IN", "OUT", "P50", "P99", "CPU", "RESTARTS", "SWAPS")
REGISTERS = (
    ("eax", "ebx", "ecx", "edx"),
    ("esi", "edi", "ebp", "esp"),
    ("eip", "eflags", "cpl"),
    ("cr0", "cr2", "cr3", "cr4"),
)
SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs", "ldtr", "tr")  # selector, base, limit, rights, usable
TABLES = ("gdt", "idt")  # base, limit
DEBUG_REGISTERS = (0, 1, 2, 3, 6, 7)  # 4 and 5 are 6 and 7


def ps_row(node: str, pid: int, counters: dict[str, Any] | None) -> dict[str, Any]:
    """One process; `counters` of its endpoint, None where it has none or did not answer."""
    state, cpu_s = process_state(pid)
    row = {"node": node, "pid": pid, "state": state, "cpu_s": cpu_s, "restarts": 0, "swaps": 0}
    for name in ("frames_in", "frames_out", "latency_p50_ns", "latency_p99_ns"):
        row[name] = counters.get(name) if counters else None
    return row


def process_state(pid: int) -> tuple[str, float]:
    """State in words and CPU seconds used, of /proc/<pid>/stat [proc(5)]."""
    try:
        words = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return "gone", 0.0
    ticks = int(words[11]) + int(words[12])
    return STATES.get(words[0], words[0]), ticks / os.sysconf("SC_CLK_TCK")


def table(rows: list[dict[str, Any]]) -> str:
    """`launcher ps` for one machine."""
    return aligned([COLUMNS, *map(cells, rows)], (0, 2))


def aligned(cells: list[tuple[str, ...]], left: tuple[int, ...]) -> str:
    """Rows in columns: those in `left` are text, the others are numbers and flush right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """What `launcher ps` shows of a process."""
    return (
        row["node"],
        str(row["pid"]),
        row["state"],
        _count(row["frames_in"]),
        _count(row["frames_out"]),
        _time(row["latency_p50_ns"]),
        _time(row["latency_p99_ns"]),
        f"{row['cpu_s']:.2f} s",
        str(row["restarts"]),
        str(row["swaps"]),
    )


def _count(n: int | None) -> str:
    return "-" if n is None else str(n)


def _time(ns: int | None) -> str:
    if ns is None:
        return "-"
    return f"{ns / 1000:.0f} us" if ns < 10_000_000 else f"{ns / 1_000_000:.0f} ms"


def frame_name(frame: Frame) -> str:
    """A frame in a word or two: "ResetReply", "Event ready"."""
    return f"Event {frame.kind}" if isinstance(frame, Event) else type(frame).__name__


def obituary(node: str, process: Process, status: int | None) -> str:
    """One line about a process that died: which, how, its last frame to us, the end of its log."""
    parts = [f"{node} (pid {process.child.pid}) {_how(status)}"]
    if process.last_frame:
        ago_s = (time.monotonic_ns() - process.last_frame_ns) / 1e9
        parts.append(f"its last frame to the launcher was {process.last_frame}, {ago_s:.1f} s before")
    if process.last_words:
        parts.append(process.last_words)
    elif last := last_line(process.log):
        parts.append(f"its log ends: {last}")
    return "; ".join(parts)


def _how(status: int | None) -> str:
    """A wait status [wait(2)] in words."""
    if status is None:
        return "died"
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exited with status {code}"
    return f"was killed by {signal.Signals(-code).name}"


def last_line(log: Path) -> str:
    """The last line of a log that is not empty; "" if there is none."""
    try:
        with log.open("rb") as f:
            f.seek(max(0, log.stat().st_size - LOG_TAIL))
            lines = [line for line in f.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return one_line(lines[-1]) if lines else ""


def cpu_state_lines(state: dict[str, Any]) -> Iterator[str]:
    """The CPU's state as lines of `name=value`: registers in their usual order, then what else is there."""
    rest = dict(state)
    for group in REGISTERS:
        present = [f"{name}={_hex(rest.pop(name))}" for name in group if name in rest]
        if present:
            yield " ".join(present)
    for name in SEGMENTS:
        if name in rest:
            selector, base, limit, rights, usable = rest.pop(name)
            unusable = "" if usable else " unusable"
            yield f"{name}={selector:04x} base={base:08x} limit={limit:08x} rights={rights:04x}{unusable}"
    for name in TABLES:
        if name in rest:
            base, limit = rest.pop(name)
            yield f"{name} base={base:08x} limit={limit:04x}"
    if "dr" in rest:
        values = rest.pop("dr")
        yield " ".join(f"dr{n}={values[n]:08x}" for n in DEBUG_REGISTERS)
    for name, value in rest.items():
        yield f"{name}={_hex(value)}"


def _hex(value: Any) -> str:
    return f"{value:08x}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def wait_for_end(pidfd: int, timeout_s: float = END_MS / 1000) -> None:
    """Wait until a process that was killed, or is about to end, is gone."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll(timeout_s * 1000)
