"""tshark with our dissector: rows of fields of a pcapng file."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tracing.pcapng import DISSECTOR

PROGRAM = shutil.which("tshark")
needed = pytest.mark.skipif(not PROGRAM, reason="tshark isn't there: apt-get install tshark")
SEPARATOR = "\x1f"


def command(*more: str) -> list[str]:
    # Names of Lua scripts are relative to nothing: the path is absolute. -n: no names are looked up.
    return [PROGRAM or "tshark", "-n", "-X", f"lua_script:{DISSECTOR}", *more]


def rows(path: Path, *fields: str) -> list[list[str]]:
    """One row per packet, in the file's order; several values of a field are joined by '|'."""
    wanted = [word for field in fields for word in ("-e", field)]
    form = ["-T", "fields", "-E", f"separator={SEPARATOR}", "-E", "aggregator=|", "-E", "occurrence=a"]
    done = subprocess.run(command("-r", str(path), *form, *wanted), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert b"Lua" not in done.stderr, done.stderr.decode()
    return [line.split(SEPARATOR) for line in done.stdout.decode().removesuffix("\n").split("\n")]
