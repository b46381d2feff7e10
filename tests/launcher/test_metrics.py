"""Counters as rates, as a picture on a terminal, and for Prometheus."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from bus.counters import Histogram
from launcher import metrics
from launcher.rates import COLUMNS, cpu_lines, device_table
from launcher.scrape import parse_address
from launcher.stats_live import picture
from tests.launcher.conftest import Command

Start = Callable[..., Command]


def device(reads: int, writes: int, out: int, interrupts: int, latencies: tuple[int, ...]) -> dict[str, Any]:
    histogram = Histogram()
    for ns in latencies:
        histogram.add(ns)
    counters = {
        "reads": reads, "writes": writes, "bytes_in": 0, "bytes_out": out, "interrupts": interrupts,
        "disk_requests": 0, "disk_read": 0, "disk_written": 0, "frames_in": 7, "frames_out": 8,
        "latency_p50_ns": histogram.quantile_ns(0.5), "latency_p99_ns": histogram.quantile_ns(0.99),
        "latency_max_ns": histogram.highest_ns, "latency_buckets": histogram.buckets(),
    }  # fmt: skip
    return {"node": "uart0", "pid": 7, "cpu_s": 1.5, "restarts": 2, "swaps": 3, "counters": counters}


def cpu(simulated: int, mirrored: int, direct_ms: int) -> dict[str, Any]:
    accesses = {
        "synchronous": 3,
        "posted": 90,
        "mirrored": mirrored,
        "batches": 9,
        "batch_p50": 8,
        "batch_max": 64,
    }
    counters = {
        "exits": {"simulate": simulated, "chain": 5}, "instructions_translated": 1000, "synchronous": 3,
        "devices": {"uart0": accesses}, "direct": {"user_direct_ms": direct_ms, "user_translated_ms": 0},
    }  # fmt: skip
    return {"node": "cpu0", "pid": 8, "cpu_s": 2, "restarts": 0, "swaps": 0, "counters": counters}


def test_rates_are_differences() -> None:
    before = [device(100, 50, 1000, 4, (1000,)), cpu(10, 200, 100)]
    now = [device(110, 70, 5000, 8, (1000, 9000, 20_000)), cpu(210, 1200, 1100)]
    header, row = device_table(before, now, 2.0)
    shown = dict(zip(header, row, strict=True))
    assert header == COLUMNS
    assert (shown["OPS/S"], shown["OUT/S"], shown["IRQ/S"], shown["MIRRORED/S"]) == (
        "15",
        "2 KiB",
        "2.0",
        "500",
    )
    assert (shown["BATCH"], shown["LARGEST"], shown["MAX"]) == ("8", "64", "20 us")
    text = "\n".join(cpu_lines(before, now, 2.0))
    assert "simulate 100" in text
    assert "50 % of the time direct" in text


def test_a_new_process_s_counters_give_no_negative_rates() -> None:
    before, now = [device(1000, 1000, 9999, 70, ())], [device(3, 1, 10, 0, ())]
    shown = dict(zip(*device_table(before, now, 1.0), strict=True))
    assert (shown["OPS/S"], shown["OUT/S"], shown["IRQ/S"]) == ("4.0", "10 B", "-")


def test_the_picture_has_all_of_it() -> None:
    console = Console(width=150, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(picture("m", [device(0, 0, 0, 0, ())], [device(9, 9, 9, 9, ()), cpu(1, 1, 1)], 1.0))
    text = console.export_text()
    assert all(column in text for column in COLUMNS)
    assert "uart0" in text
    assert "cpu0: exits/s" in text


def test_prometheus_reads_what_was_counted() -> None:
    rows = [device(110, 70, 5000, 8, (1000, 9000, 20_000)), cpu(210, 1200, 1100)]
    families = {f.name: f for f in text_string_to_metric_families(metrics.text('a "machine"', rows))}
    assert all(family.documentation for family in families.values())

    def value(name: str, **labels: str) -> float:
        family = families[f"backplane_{name}"]
        found = [s.value for s in family.samples if labels.items() <= s.labels.items()]
        assert len(found) == 1, (name, labels, family.samples)
        return found[0]

    assert value("device_operations", kind="read", device="uart0", machine='a "machine"') == 110
    assert value("device_operations", kind="write") == 70
    assert value("device_console_bytes", direction="out") == 5000
    assert value("cpu_accesses", **{"class": "mirrored"}, device="uart0") == 1200
    assert value("cpu_exits", exit="simulate") == 210
    assert value("cpu_user_seconds", mode="direct") == 1.1
    assert value("process_restarts", node="uart0") == 2
    samples = families["backplane_latency_seconds"].samples
    buckets = [(float(s.labels["le"]), s.value) for s in samples if s.name.endswith("_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[-1] == (float("inf"), 3)
    assert [s.value for s in samples if s.name.endswith("_count")] == [3]


def test_of_a_running_machine_by_command_and_over_http(
    machine_file: Path, runtime: Path, launcher: Start
) -> None:
    assert launcher("idle", "up", "--detach", machine_file).finish() == 0
    shown = launcher("idle", "stats", "--prometheus")
    assert shown.finish() == 0
    assert list(text_string_to_metric_families(shown.output.decode()))

    serving = launcher("idle", "stats", "--listen", "0")
    serving.read_until("/metrics")
    match = re.search(r"http://127.0.0.1:\d+/metrics", serving.output.decode())
    assert match is not None
    with urllib.request.urlopen(match[0]) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        families = {f.name: f for f in text_string_to_metric_families(answer.read().decode())}
    plain = launcher("idle", "stats", "--json")
    assert plain.finish() == 0
    pids = {str(row["pid"]) for row in json.loads(plain.output)["rows"]}
    assert {s.labels["pid"] for s in families["backplane_process_cpu_seconds"].samples} == pids
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(match[0].replace("metrics", "etc/passwd"))
    port = match[0].split(":")[2].split("/")[0]
    taken = launcher("idle", "stats", "--listen", port)
    assert taken.finish() == 2
    assert taken.errors.decode().startswith(f"launcher: 127.0.0.1:{port}: can't be listened on (")
    assert launcher("idle", "down").finish() == 0
    assert serving.finish() == 0


@pytest.mark.parametrize("text", ["", "x", "99999", "host:", "-1", "1.5", "::"])
def test_no_address_to_listen_on(text: str) -> None:
    with pytest.raises(ValueError, match="is no port to listen on, write it like 9100"):
        parse_address(text)


def test_an_address() -> None:
    assert parse_address("9100") == ("127.0.0.1", 9100)
    assert parse_address("0.0.0.0:80") == ("0.0.0.0", 80)
