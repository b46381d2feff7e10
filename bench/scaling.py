"""`make bench-scaling`: boot time and memory for guests of several sizes, and how the code cache fills.

    python -m bench.scaling [--sizes 64,512,2048] [--json FILE]

Each guest is booted to its shell. RSS and PSS are those of the host's smaps_rollup; the CPU node's is divided
by what it is for: the code cache, the dispatch tables, the windows (the guest's RAM as the host shows it,
shared with the memory node), everything else (Python). Page tables of the host (VmPTE) are no part of RSS.
How long it runs before the code cache is dropped: the bytes that a busy minute adds (a shell that runs
programs all the time) against the room there is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from bench import boot
from bench.machine import Machine, linux, running
from bench.table import aligned
from cpu_node import layout as at

BUSY_S = 20.0
STORM = ("i=0; while :; do /bin/busybox true; /bin/busybox ls / >/dev/null; (:); i=$((i+1)); "
         "[ $((i%10)) = 0 ] && echo ROUND $i; done\n")
# What lies where in the CPU node's address space, lowest address first.
AREAS = (("other", 0), ("code", at.CODE), ("other", at.RECORD), ("windows", at.WINDOWS),
         ("tables", at.TABLES), ("other", at.TABLES + at.TABLE_COUNT * at.TABLE_SIZE))
AREA_WORDS = {"code": "code cache", "tables": "dispatch tables", "windows": "windows (guest RAM)",
              "other": "the rest (Python)"}
MIB = 1024  # KiB


def areas_kib(smaps: str) -> dict[str, int]:
    """RSS by area of the CPU node's address space, from /proc/<pid>/smaps [proc(5)]."""
    found = dict.fromkeys(("code", "tables", "windows", "other"), 0)
    area = "other"
    for line in smaps.splitlines():
        if start := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
            ha = int(start[1], 16)
            area = [name for name, first in AREAS if first <= ha][-1]
        elif line.startswith("Rss:"):
            found[area] += int(line.split()[1])
    return found


def measure(machine: Machine, memory_mib: int) -> dict[str, Any]:
    """One guest, from its start to a minute's work."""
    boot_s = machine.wait_for("GUEST-READY")
    rows = machine.rows()
    cpu = next(row for row in rows if row["node"] == "cpu0")
    pid = cpu["pid"]
    areas = areas_kib(Path(f"/proc/{pid}/smaps").read_text(encoding="ascii"))
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    page_tables = re.search(r"^VmPTE:\s+(\d+)", status, re.MULTILINE)
    before = cpu["counters"]["code_cache_bytes"]
    machine.type(STORM)
    began = time.monotonic()
    time.sleep(BUSY_S)
    after = machine.cpu()
    seconds = time.monotonic() - began
    return {
        "memory_mib": memory_mib,
        "boot_s": round(boot_s, 2),
        "processes": {row["node"]: {"rss_kib": row["rss_kib"], "pss_kib": row["pss_kib"]} for row in rows},
        "cpu_rss_kib": areas,
        "cpu_page_tables_kib": int(page_tables[1]) if page_tables else 0,
        "mappings": cpu["mappings"],
        "code_bytes_at_shell": before,
        "code_bytes_per_busy_minute": (after["counters"]["code_cache_bytes"] - before) * 60 / seconds,
        "cache_flushes": after["counters"]["cache_flushes"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=_sizes, default=[64, 512, 2048], help="MiB, like 64,512,2048")
    parser.add_argument("--machine", type=Path, default=boot.REPO / "machines" / "linux.toml")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    found = []
    for memory_mib in options.sizes:
        with running(linux(options.machine, memory_mib)) as machine:
            found.append(measure(machine, memory_mib))
        print(f"{memory_mib} MiB: shell after {found[-1]['boot_s']} s", flush=True)
    print()
    print(tables(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _sizes(text: str) -> list[int]:
    sizes = [int(word) if word.isdigit() else 0 for word in text.split(",")]
    if not all(16 <= size <= 3072 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} are no sizes from 16 to 3072")
    return sizes


def tables(found: list[dict[str, Any]]) -> str:
    """What was found, guest by guest in columns."""
    head = ("guest memory", *(f"{f['memory_mib']} MiB" for f in found))
    rows = [head, ("boot to the shell", *(f"{f['boot_s']:.2f} s" for f in found))]
    for node in found[0]["processes"]:
        cells = [f["processes"].get(node, {}) for f in found]
        both = (f"{_mib(c.get('rss_kib'))} / {_mib(c.get('pss_kib'))}" for c in cells)
        rows.append((f"{node}: RSS / PSS", *both))
    for area, words in AREA_WORDS.items():
        rows.append((f"cpu0, of its RSS: {words}", *(_mib(f["cpu_rss_kib"][area]) for f in found)))
    rows.append(("cpu0, host page tables", *(_mib(f["cpu_page_tables_kib"]) for f in found)))
    own = [f["cpu_rss_kib"]["code"] + f["cpu_rss_kib"]["tables"] + f["cpu_page_tables_kib"] for f in found]
    rows.append(("code, tables, page tables per guest MiB",
                 *(f"{kib / f['memory_mib']:.0f} KiB" for kib, f in zip(own, found, strict=True))))
    rows.append(("cpu0, host mappings", *(str(f["mappings"]) for f in found)))
    rows.append(("code cache at the shell", *(f"{f['code_bytes_at_shell'] / 2**20:.1f} MiB" for f in found)))
    rows.append(("code added in a busy minute",
                 *(f"{f['code_bytes_per_busy_minute'] / 2**20:.2f} MiB" for f in found)))
    rows.append((f"busy minutes until {at.CODE_SIZE >> 20} MiB are full", *(_minutes(f) for f in found)))
    return aligned(rows)


def _mib(kib: int | None) -> str:
    return "-" if kib is None else f"{kib / MIB:.1f} MiB"


def _minutes(f: dict[str, Any]) -> str:
    if f["code_bytes_per_busy_minute"] <= 0:
        return "never" if f["code_bytes_per_busy_minute"] == 0 else "dropped meanwhile"
    return f"{(at.CODE_SIZE - f['code_bytes_at_shell']) / f['code_bytes_per_busy_minute']:.0f}"


if __name__ == "__main__":
    sys.exit(main())
