"""What each device and CPU of a machine does per second: the difference between two answers of `stats`.

Counters of a process begin anew with its successor; then only what that did is counted, never less than
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Rows = list[dict[str, Any]]
COLUMNS = (
    "DEVICE", "OPS/S", "P50", "P99", "MAX", "IN/S", "OUT/S", "IRQ/S", "POSTED/S", "BATCH",
    "LARGEST", "MIRRORED/S",
)  # fmt: skip


def device_table(before: Rows, now: Rows, seconds: float) -> list[tuple[str, ...]]:
    """COLUMNS and a row per device. Without a `before` (empty) rates are of all its process's life."""
    was, accesses, accesses_was = _counters(before), _accesses(now), _accesses(before)
    rows: list[tuple[str, ...]] = [COLUMNS]
    for row in now:
        counters = row.get("counters") or {}
        if "reads" not in counters:
            continue
        node = row["node"]
        of = _Rate(was.get(node, {}), counters, seconds)
        cpu = _Rate(accesses_was.get(node, {}), accesses.get(node, {}), seconds)
        rows.append((
            node,
            of("reads", "writes"),
            *(_time(counters.get(f"latency_{name}_ns", 0)) for name in ("p50", "p99", "max")),
            _bytes(of.number("bytes_in", "disk_written")),
            _bytes(of.number("bytes_out", "disk_read")),
            of("interrupts"),
            cpu("posted"),
            *(str(accesses.get(node, {}).get(name, 0) or "-") for name in ("batch_p50", "batch_max")),
            cpu("mirrored"),
        ))  # fmt: skip
    return rows


def cpu_lines(before: Rows, now: Rows, seconds: float) -> list[str]:
    """A line or two for each CPU."""
    was, lines = _counters(before), []
    for row in now:
        counters = row.get("counters") or {}
        if "exits" not in counters:
            continue
        old = was.get(row["node"], {})
        of = _Rate(old, counters, seconds)
        exits = _Rate(old.get("exits", {}), counters["exits"], seconds)
        most = sorted(counters["exits"], key=lambda name: -exits.number(name))[:5]
        shown = ", ".join(f"{name} {exits(name)}" for name in most if exits.number(name) >= 1)
        lines.append(f"{row['node']}: exits/s {shown or 'none'}")
        line = f"  instructions translated/s {of('instructions_translated')}; accesses/s that it waited for "
        lines.append(line + of("synchronous"))
        direct = counters.get("direct")
        if direct is not None:
            user = _Rate(old.get("direct") or {}, direct, seconds)
            times = [user.number(f"user_{mode}_ms") / 10 for mode in ("direct", "translated")]
            lines.append(f"  user code: {times[0]:.0f} % of the time direct, {times[1]:.0f} % translated")
    return lines


class _Rate:
    """Of counters of one process, then and now."""

    def __init__(self, before: Mapping[str, Any], now: Mapping[str, Any], seconds: float) -> None:
        self._before, self._now, self._seconds = before, now, seconds

    def number(self, *names: str) -> float:
        """Per second, of all of these together."""
        total = 0
        for name in names:
            now, before = self._now.get(name, 0), self._before.get(name, 0)
            total += now - before if now >= before else now
        return total / self._seconds

    def __call__(self, *names: str) -> str:
        return _count(self.number(*names))


def _counters(rows: Rows) -> dict[str, dict[str, Any]]:
    return {row["node"]: row.get("counters") or {} for row in rows}


def _accesses(rows: Rows) -> dict[str, dict[str, Any]]:
    """By device, of all CPUs."""
    for row in rows:
        if "devices" in (row.get("counters") or {}):
            devices: dict[str, dict[str, Any]] = row["counters"]["devices"]
            return devices
    return {}


def _count(number: float) -> str:
    return "-" if number == 0 else f"{number:.1f}" if number < 10 else f"{number:,.0f}"


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1000:
            return "-" if number == 0 else f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def _time(ns: int) -> str:
    return "-" if not ns else f"{ns / 1000:.0f} us" if ns < 10_000_000 else f"{ns / 1_000_000:.0f} ms"
