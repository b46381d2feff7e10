"""The cpio archive, read back by a reader of its own and by cpio where it is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from launcher.guest.cpio import Archive
from launcher.guest.initramfs import INIT, LOAD, MODPROBE, build, build_modules


def read_newc(archive: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """Name -> (mode, content, device numbers), by the kernel's buffer-format.rst."""
    found: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        assert at % 4 == 0
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, device, name_size = fields[1], fields[6], (fields[9], fields[10]), fields[11]
        name = archive[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        start = (at + 110 + name_size + 3) & ~3
        if name == b"TRAILER!!!\0":
            return found
        found[name[:-1].decode()] = (mode, archive[start : start + size], device)
        at = (start + size + 3) & ~3


def test_every_kind_of_entry() -> None:
    archive = Archive()
    archive.directory("/d")
    archive.file("/d/f", b"content", 0o640)
    archive.file("/d/empty", b"")
    archive.symlink("/d/l", "f")
    archive.character_device("/d/c", 5, 1)
    data = bytes(archive)
    assert len(data) % 512 == 0
    assert read_newc(data) == {
        "d": (0o40755, b"", (0, 0)),
        "d/f": (0o100640, b"content", (0, 0)),
        "d/empty": (0o100755, b"", (0, 0)),
        "d/l": (0o120777, b"f", (0, 0)),
        "d/c": (0o20600, b"", (5, 1)),
    }


def test_the_root_file_system_has_what_the_init_needs() -> None:
    plain = read_newc(build(b"busybox", INIT.read_bytes()))
    assert plain["init"] == (0o100755, INIT.read_bytes(), (0, 0))
    assert plain["init"][1].startswith(b"#!/bin/busybox sh\n")
    assert plain["bin/busybox"][:2] == (0o100755, b"busybox")
    assert plain["dev/console"] == (0o20600, b"", (5, 1))
    assert "etc/bench" not in plain
    bench = read_newc(build(b"busybox", b"", {"bench": b"1", "tiny": b"2"}))
    assert bench["bin/tiny"][1] == b"2"
    assert bench["etc/bench"][1] == b"on\n"


def test_the_same_input_gives_the_same_bytes() -> None:
    assert build(b"b", b"i", {"x": b"y"}) == build(b"b", b"i", {"x": b"y"})


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_cpio_unpacks_it(tmp_path: Path) -> None:
    archive = Archive()
    archive.directory("/d")
    archive.file("/d/f", b"content")
    archive.symlink("/d/l", "f")
    done = subprocess.run(["cpio", "-i", "--quiet"], input=bytes(archive), cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "d" / "l").read_bytes() == b"content"


def test_modules_are_an_archive_of_their_own() -> None:
    files = read_newc(build_modules({"b.ko": b"2", "a.ko": b"1"}))
    assert files["lib/modules/a.ko"] == (0o100644, b"1", (0, 0))
    assert files["lib/modules/load"][1] == LOAD.read_bytes()
    assert files["sbin/modprobe"] == (0o100755, MODPROBE.read_bytes(), (0, 0))
    assert list(files).index("lib/modules") < list(files).index("lib/modules/a.ko")
