"""`launcher stats`: of a running machine with a CPU that executes nothing, and its tables by themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.stats import COLUMNS, process_memory, text, timing_table
from tests.launcher.conftest import Command, assert_nothing_left

Start = Callable[..., Command]

CPU = {
    "frames_in": 5, "frames_out": 7, "latency_p50_ns": 1000, "latency_p99_ns": 2000,
    "exits": {"chain": 3, "simulate": 40}, "instructions_translated": 1234, "code_cache_bytes": 1 << 20,
    "cache_flushes": 2, "pages_filled": 77, "spaces": 4, "synchronous": 8, "posted": 9, "batches": 3,
}  # fmt: skip


def test_stats_of_a_running_machine(machine_file: Path, runtime: Path, launcher: Start) -> None:
    assert launcher("idle", "up", "--detach", machine_file).finish() == 0
    stats = launcher("idle", "stats")
    assert stats.finish() == 0
    lines = stats.output.decode().splitlines()
    assert lines[0] == "machine fake"
    assert lines[1].split() == " ".join(COLUMNS).split()
    assert [line.split()[0] for line in lines[2:9]] == [
        "launcher", "forkserver", "memory", "consoles", "uart0", "pic", "cpu0",
    ]  # fmt: skip

    silent = True
    while silent:  # a busy host: some answer later than it waits
        plain = launcher("idle", "stats", "fake", "--json")
        assert plain.finish() == 0
        shown = json.loads(plain.output)
        silent = any("silent" in row["state"] for row in shown["rows"])
    assert shown["machine"] == "fake"
    for row in shown["rows"]:
        assert row["rss_kib"] >= row["pss_kib"] > 0
        assert row["mappings"] > 10
    rows = {row["node"]: row for row in shown["rows"]}
    assert rows["uart0"]["counters"]["frames_in"] > 0

    switched = launcher("idle", "stats", "--timing", "on")
    assert switched.finish() == 0
    assert switched.output == b"fake: timing is on\n"

    watch = launcher("idle", "stats", "--watch", "0.05")
    watch.read_until("machine fake")
    watch.output = b""
    watch.read_until("machine fake")
    assert launcher("idle", "down").finish() == 0
    assert watch.finish() in (2, 5)  # there is nothing to watch any more
    assert watch.errors.decode().startswith(("launcher: ", "fake: "))
    assert_nothing_left(runtime, ("fake.log",))


@pytest.mark.parametrize(
    "arguments", [["--watch", "0"], ["--watch", "x"], ["--timing", "maybe"], ["--jsn"], ["a", "b"]]
)
def test_bad_arguments(arguments: list[str], launcher: Start) -> None:
    command = launcher("idle", "stats", *arguments)
    assert command.finish() == 2
    assert b"error: " in command.errors.splitlines()[-1]


def row(node: str, counters: dict[str, object]) -> dict[str, object]:
    memory = {"rss_kib": 2048, "pss_kib": 1024, "mappings": 321}
    return {"node": node, "pid": 1, "state": "waiting", "cpu_s": 0.5, "restarts": 0, "swaps": 0,
            "frames_in": 1, "frames_out": 2, "latency_p50_ns": None, "latency_p99_ns": None,
            "counters": counters, **memory}


def test_all_counters_are_shown() -> None:
    shown = text("m", [row("cpu0", CPU), row("uart0", {"frames_in": 3, "lost": 0, "bytes_out": 17})])
    assert "2.0 MiB  1.0 MiB       321" in shown
    assert "exits       simulate 40, chain 3" in shown
    assert "1234 instructions, 1.0 MiB of host code; all dropped 2 times" in shown
    assert "77 fills, 4 address spaces" in shown
    assert "8 accesses waited for, 9 posted writes in 3 batches" in shown
    assert "not measured; `launcher stats --timing on`" in shown
    assert "uart0: bytes_out 17" in shown
    direct = {"user_direct_ms": 1500, "user_translated_ms": 20, "backend": "ptrace", "children": 3,
              "exits": {"PageFault": 2, "SystemCall": 9}}  # fmt: skip
    line = "direct      1.50 s of user code, 0.02 s translated; ptrace, 3 children, SystemCall 9, PageFault 2"
    assert line in text("m", [row("cpu0", {**CPU, "direct": direct})])
    timed = {**CPU, "timing": {"total_ns": 10, "activities": {"guest": [2, 8_000]}}}
    assert "guest" in text("m", [row("cpu0", timed)]).splitlines()[-1]


def test_shares_leave_idling_out() -> None:
    activities = {"guest": [4, 3_000_000], "idle": [1, 9_000_000], "map": [2, 1_000_000]}
    lines = timing_table({"total_ns": 13_000_000, "activities": activities}).splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["idle", "guest", "map"]
    assert [line.split()[4] for line in lines] == ["-", "75.0", "25.0"]
    short = timing_table({"total_ns": 13_000_000, "activities": activities}, most=1)
    assert "2 more" in short.splitlines()[-1]


def test_memory_of_a_process_that_is_gone() -> None:
    assert process_memory(1 << 30) == {"rss_kib": None, "pss_kib": None, "mappings": None}
    own = process_memory(os.getpid())
    assert all(own.values())
