"""The judgement of `make soak` and the figures of `make bench-scaling`; no machine is started."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.scaling import _sizes, areas_kib, tables
from bench.soak import Sample, table, verdicts
from cpu_node import layout as at

ALLOWED = 65530
FLAT = [
    Sample(10.0 * n, 100 * n, 9000 + n % 7, 200_000, 150_000, 40, 1000 * n, 5 << 20, 0) for n in range(30)
]


def test_flat_is_fine() -> None:
    assert verdicts(FLAT, ALLOWED) == []


@pytest.mark.parametrize("name", ["mappings", "rss_kib", "pss_kib"])
def test_growth_is_found(name: str) -> None:
    grown = [replace(s, **{name: int(getattr(s, name) * (1 + n / 20))}) for n, s in enumerate(FLAT)]
    (line,) = verdicts(grown, ALLOWED)
    assert line.startswith(f"{name} grew from ")


def test_many_mappings_are_found_and_a_stalled_guest() -> None:
    assert verdicts([replace(s, mappings=60_000) for s in FLAT], ALLOWED) == [
        "60000 mappings; the host allows 65530"
    ]
    assert verdicts([replace(s, rounds=500) for s in FLAT], ALLOWED) == ["the guest's loop stands still"]
    assert verdicts(FLAT[:2], ALLOWED) == ["too short: three samples at least"]


def test_the_table_ends_with_the_last_sample() -> None:
    lines = table(FLAT * 10).splitlines()
    assert len(lines) <= 27
    assert lines[-1].split()[:3] == ["4.8", "2900", "9001"]


def test_memory_is_told_apart_by_address() -> None:
    smaps = "\n".join(
        f"{start:x}-{start + 0x1000:x} rw-p 00000000 00:00 0\nSize: 4 kB\nRss: {kib} kB"
        for start, kib in ((0x400000, 1), (at.CODE, 2), (at.RECORD, 4), (at.WINDOWS + 0x5000, 8),
                           (at.TABLES, 16), (at.TABLES + at.TABLE_SIZE, 32), (0x5555_0000_0000, 64))
    )  # fmt: skip
    assert areas_kib(smaps) == {"code": 2, "tables": 48, "windows": 8, "other": 69}


def test_guests_are_columns() -> None:
    found = {
        "memory_mib": 64, "boot_s": 5.0, "processes": {"cpu0": {"rss_kib": 2048, "pss_kib": 1024}},
        "cpu_rss_kib": {"code": 1024, "tables": 1024, "windows": 0, "other": 0}, "cpu_page_tables_kib": 2048,
        "mappings": 7, "code_bytes_at_shell": 0, "code_bytes_per_busy_minute": at.CODE_SIZE / 10,
        "cache_flushes": 0,
    }  # fmt: skip
    lines = tables([found, {**found, "memory_mib": 128, "code_bytes_per_busy_minute": 0}]).splitlines()
    assert lines[0].split() == ["guest", "memory", "64", "MiB", "128", "MiB"]
    assert lines[-1].split()[-2:] == ["10", "never"]
    (per_mib,) = [line.split() for line in lines if "per guest MiB" in line]
    assert per_mib[-4:] == ["64", "KiB", "32", "KiB"]


def test_sizes() -> None:
    assert _sizes("64,2048") == [64, 2048]
    with pytest.raises(Exception, match="no sizes"):
        _sizes("64,8")
