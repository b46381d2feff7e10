"""What was added is found again, by the key of its page; many files become one, within a limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpu_node import mode as modes
from cpu_node.line import PAGE
from cpu_node.store import MOST_FILES, version
from tests.cpu_node.store.kit import (
    BODY,
    files,
    found,
    opened,
    record,
)
from tests.cpu_node.test_kept import ENTRIES, VA, page, translated


def test_what_was_added_is_found_by_this_store_and_the_next(folder: Path) -> None:
    first = opened(folder)
    assert found(first) is None
    first.add([record(0), record(1)])
    for store in (first, opened(folder)):
        for number in (0, 1):
            kept = found(store, number)
            assert kept is not None
            assert number.to_bytes(4, "little") in kept.code
        assert found(store, 2) is None


def test_the_newest_record_that_fits_is_taken(folder: Path) -> None:
    first = opened(folder)
    first.add([translated(BODY).record()])
    first.add([translated(BODY, ENTRIES).record()])
    for store in (first, opened(folder)):
        kept = store.find(page(BODY))
        assert kept is not None
        assert len(kept.offsets) == len(translated(BODY, ENTRIES).line.host)


CHANGES = {
    "linear address": {"va": VA + PAGE},
    "user": {"mode": modes.USER},
    "no FPU": {"mode": modes.NO_FPU},
    "no SSE": {"mode": modes.NO_SSE},
    "RDTSC": {"mode": modes.TSC_SIMULATED},
    "verifying": {"verify": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_key(folder: Path, change: str) -> None:
    store = opened(folder)
    store.add([record()])
    assert found(store) is not None
    assert found(store, **CHANGES[change]) is None
    store.add([record(**CHANGES[change])])
    assert found(store, **CHANGES[change]) is not None


def test_another_version_sees_nothing(folder: Path) -> None:
    opened(folder).add([record()])
    assert found(opened(folder, bytes(32))) is None


def test_version_depends_on_sources_assembler_and_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tags = {version(["sse", "fpu"]), version(["fpu"])}
    assert version(["fpu", "sse"]) in tags
    monkeypatch.setattr("cpu_node.store.assembler_version", lambda: b"0")
    tags.add(version(["fpu"]))
    monkeypatch.setattr("cpu_node.store.__file__", str(tmp_path / "store.py"))
    for text in ("", "x = 1", "x = 2"):
        (tmp_path / "store.py").write_text(text)
        tags.add(version(["fpu"]))
    (tmp_path / "more.py").write_text("")
    tags.add(version(["fpu"]))
    assert len(tags) == 7


def test_many_files_become_one_that_holds_everything_once(folder: Path) -> None:
    for number in range(MOST_FILES):
        opened(folder).add([record(number), record(99)])
    assert len(files(folder)) == MOST_FILES
    opened(folder).add([record(MOST_FILES)])
    (file,) = files(folder)
    assert file.stat().st_size < (MOST_FILES + 3) * (len(record()) + 100)
    store = opened(folder)
    assert all(found(store, number) for number in (*range(MOST_FILES + 1), 99))


def test_what_was_used_last_stays_when_there_is_too_much(folder: Path) -> None:
    limit = 2 * MOST_FILES * (len(record()) + 200) // 2
    for number in range(MOST_FILES):
        opened(folder, limit=limit).add([record(number)])
    for more in range(20, 20 + MOST_FILES):
        store = opened(folder, limit=limit)
        assert found(store, 0) is not None  # used each time
        store.add([record(more)])
        store.close()
    store = opened(folder, limit=limit)
    assert found(store, 0) is not None
    assert found(store, 1) is None


def test_the_limit_holds_over_all_versions(folder: Path) -> None:
    limit = 5 * len(record())
    for number in range(30):
        store = opened(folder, bytes([number % 10]) * 32, limit)
        store.add([record(number)])
        store.close()
        assert sum(f.stat().st_size for f in files(folder)) <= limit
    assert found(opened(folder, bytes([9]) * 32, limit), 29) is not None
