"""`launcher stats`: what a machine's processes cost, and where the CPU's time goes.

Memory and mappings are read from /proc [proc(5)], everything else is asked for over the control socket. RSS
counts pages shared with other processes (the guest's RAM is shared) in full, PSS by share.
Left out: history; `--watch` shows the sums again and again.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import report
from launcher.control import ask
from launcher.errors import EXIT_OK
from launcher.rundir import CONTROL

COLUMNS = ("NODE", "PID", "STATE", "CPU", "RSS", "PSS", "MAPPINGS", "FRAMES IN", "OUT", "P50", "P99")
ACTIVITIES = ("ACTIVITY", "COUNT", "TIME", "SHARE", "EACH")
KIB = 1024


@dataclass(frozen=True, slots=True)
class StatsOptions:
    """None: not asked for."""

    as_json: bool = False
    prometheus: bool = False
    listen: tuple[str, int] | None = None
    once: bool = False
    watch_s: float | None = None
    timing: str | None = None


def stats(path: Path, options: StatsOptions) -> int:
    """Of a running machine; the exit status. `timing`, "on" or "off", is set first."""
    if options.timing is not None:
        ask(path / CONTROL, f"timing-{options.timing}", path.name)
        if options.watch_s is None:
            print(f"{path.name}: timing is {options.timing}")
            return EXIT_OK
    if options.listen is not None:
        from launcher.scrape import serve

        return serve(
            options.listen,
            lambda: metrics(path),
            lambda: (path / CONTROL).exists(),
            lambda where: print(f"{path.name}: {where}", flush=True),
        )
    if sys.stdout.isatty() and not (options.as_json or options.prometheus or options.once):
        from launcher.stats_live import live

        return live(path.name, lambda: gather(path), options.watch_s)
    while True:
        if options.prometheus:
            print(metrics(path), end="", flush=True)
        else:
            rows = gather(path)
            plain = {"machine": path.name, "rows": rows}
            print(json.dumps(plain) if options.as_json else text(path.name, rows), flush=True)
        if options.watch_s is None:
            return EXIT_OK
        time.sleep(options.watch_s)


def metrics(path: Path) -> str:
    """Prometheus text."""
    found: str = ask(path / CONTROL, "metrics", path.name)["text"]
    return found


def gather(path: Path) -> list[dict[str, Any]]:
    """A record per process of a running machine."""
    rows: list[dict[str, Any]] = ask(path / CONTROL, "stats", path.name)["rows"]
    for row in rows:
        row.update(process_memory(row["pid"]))
    return rows


def process_memory(pid: int) -> dict[str, int | None]:
    """rss_kib, pss_kib and the number of mappings; None where they can't be read."""
    found: dict[str, int | None] = {"rss_kib": None, "pss_kib": None, "mappings": None}
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]:
            name, _, rest = line.partition(":")
            if name in ("Rss", "Pss"):
                found[f"{name.lower()}_kib"] = int(rest.split()[0])
        with open(f"/proc/{pid}/maps", "rb") as maps:
            found["mappings"] = sum(1 for _ in maps)
    except OSError:
        pass
    return found


def text(machine: str, rows: list[dict[str, Any]]) -> str:
    """All tables of one machine."""
    parts = [f"machine {machine}", report.aligned([COLUMNS, *map(_cells, rows)], (0, 2))]
    for row in rows:
        counters = row.get("counters") or {}
        if "exits" in counters:
            parts += ["", row["node"], *_cpu_lines(counters)]
            if "timing" in counters:
                parts.append(timing_table(counters["timing"]))
            else:
                parts.append("  where its time goes is not measured; `launcher stats --timing on` begins to")
        elif words := _own(counters):
            parts.append(f"{row['node']}: {words}")
    return "\n".join(parts)


def timing_table(timing: dict[str, Any], most: int = 40) -> str:
    """Activities of the CPU thread, the longest first; the shares of what is not idle add up to 100 %."""
    activities = timing["activities"]
    busy_ns = max(sum(ns for name, (_, ns) in activities.items() if name != "idle"), 1)
    ordered = sorted(activities.items(), key=lambda item: -item[1][1])
    cells: list[tuple[str, ...]] = [ACTIVITIES]
    for name, (count, ns) in ordered[:most]:
        share = "-" if name == "idle" else f"{100 * ns / busy_ns:.1f} %"
        each = f"{ns / count / 1000:.1f} us" if count else "-"
        cells.append((name, str(count), f"{ns / 1e9:.3f} s", share, each))
    if rest := ordered[most:]:
        ns = sum(total[1] for _, total in rest)
        count = sum(total[0] for _, total in rest)
        share = f"{100 * ns / busy_ns:.1f} %"
        cells.append((f"{len(rest)} more", str(count), f"{ns / 1e9:.3f} s", share, "-"))
    return report.aligned(cells, (0,))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    node, pid, state, frames_in, frames_out, p50, p99, cpu, *_ = report.cells(row)
    mappings = row["mappings"]
    return (node, pid, state, cpu, _size(row["rss_kib"]), _size(row["pss_kib"]),
            "-" if mappings is None else str(mappings), frames_in, frames_out, p50, p99)


def _size(kib: int | None) -> str:
    return "-" if kib is None else f"{kib / KIB:.1f} MiB"


def _cpu_lines(c: dict[str, Any]) -> list[str]:
    exits = sorted(c["exits"].items(), key=lambda item: -item[1])
    code_mib = c["code_cache_bytes"] / KIB**2
    return [
        "  exits       " + ", ".join(f"{name} {count}" for name, count in exits),
        f"  translated  {c['instructions_translated']} instructions, {code_mib:.1f} MiB of host code; "
        f"all dropped {c['cache_flushes']} times",
        *_direct(c.get("direct")),
        f"  windows     {c['pages_filled']} fills, {c['spaces']} address spaces",
        f"  bus         {c['synchronous']} accesses waited for, "
        f"{c['posted']} posted writes in {c['batches']} batches",
    ]


def _direct(c: dict[str, Any] | None) -> list[str]:
    """Direct execution of user code, where the machine has it."""
    if c is None:
        return []
    exits = sorted(c["exits"].items(), key=lambda item: -item[1])
    direct_s, translated_s = c["user_direct_ms"] / 1000, c["user_translated_ms"] / 1000
    return [f"  direct      {direct_s:.2f} s of user code, {translated_s:.2f} s translated; {c['backend']}, "
            f"{c['children']} children" + "".join(f", {name} {count}" for name, count in exits)]


def _own(counters: dict[str, Any]) -> str:
    """Counters of a device or the memory beyond those of every endpoint."""
    hidden = ("frames_in", "frames_out")
    shown = {k: v for k, v in counters.items() if k not in hidden and not k.startswith("latency_") and v}
    return ", ".join(f"{name} {value}" for name, value in shown.items())
