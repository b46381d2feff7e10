"""Several processes with one store, killed or not."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from cpu_node.line import PAGE
from cpu_node.store import MOST_FILES
from tests.cpu_node.store.kit import (
    files,
    found,
    opened,
    record,
    warnings,
)
from tests.cpu_node.test_kept import VA


def forked(body: object) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            body()  # type: ignore[operator]
        finally:
            os._exit(0)
    return pid


def test_writers_at_the_same_time(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every record of each of them is there in the end, and every file whole."""
    writers, rounds = 4, 2 * MOST_FILES

    def write(writer: int) -> None:
        for n in range(rounds):
            store = opened(folder)
            store.add([record(n, va=VA + writer * PAGE)])
            store.close()

    for pid in [forked(lambda w=w: write(w)) for w in range(writers)]:
        os.waitpid(pid, 0)
    store = opened(folder)
    missing = [(w, n) for w in range(writers) for n in range(rounds)
               if not found(store, n, va=VA + w * PAGE)]
    assert missing == []
    assert warnings(caplog) == []
    assert len(files(folder)) < writers * rounds


def test_writer_killed_at_any_moment(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What was there stays, what is there is whole."""
    opened(folder).add([record(5)])
    rng = random.Random(3)

    def write() -> None:
        while True:
            store = opened(folder)
            store.add([record(n) for n in range(8)])
            store.close()

    for _ in range(15):
        pid = forked(write)
        time.sleep(rng.uniform(0.01, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        store = opened(folder)
        assert found(store, 5) is not None
        store.close()
    assert warnings(caplog) == []
