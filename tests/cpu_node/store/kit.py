"""Stores with records that can be told apart."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cpu_node.kept import Kept, unpack
from cpu_node.store import SUFFIX, Store
from tests.cpu_node.board import asm
from tests.cpu_node.test_kept import ENTRIES, PROGRAM, VA, page, translated

TAG = bytes(range(32))
BODY = asm(PROGRAM, VA)


class Clock:
    def __init__(self) -> None:
        self.seconds = 1_000_000.0

    def __call__(self) -> float:
        self.seconds += 1
        return self.seconds


CLOCK = Clock()


def opened(folder: Path, tag: bytes = TAG, limit: int = 1 << 20) -> Store:
    return Store(folder, tag, CLOCK, limit)


def record(number: int = 0, **kind: object) -> bytes:
    """A record that differs from those of other numbers in its code."""
    return translated(code(number), ENTRIES, **kind).record()


def code(number: int) -> bytes:
    return BODY.replace(b"\x78\x56\x34\x12", number.to_bytes(4, "little"))


def found(store: Store, number: int = 0, **kind: object) -> Kept | None:
    return store.find(page(code(number), **kind))  # type: ignore[arg-type]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*/*{SUFFIX}"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def expected(number: int) -> bytes:
    return unpack(record(number)).code
