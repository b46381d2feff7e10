"""Snapshot files: written whole or not at all, the same for the same machine, refused when not whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import snapshot
from launcher.errors import EXIT_INPUT
from launcher.main import main
from launcher.snapshot import (
    FORMAT,
    BadSnapshot,
    DiskUse,
    Index,
    NodeRecord,
    Origin,
    Snapshot,
    SnapshotImages,
    Writer,
)
from memory_node.store import open_memfd

SIZE = 3 << 20
CPU = {"cpu": {}, "raw": b"\0\1"}
IMAGES = [(0x400, b"data area"), (0x100000, b"kernel" * 1000)]


def write(path: Path, **changes: object) -> Path:
    memory = open_memfd("test", SIZE)
    os.pwrite(memory, b"guest" * 2000, 0x10000)
    os.pwrite(memory, os.urandom(0) + bytes(range(256)) * 20, 0x200000)
    writer = Writer(path)
    values: dict[str, object] = {
        "origin": Origin("m", "/nowhere/m.toml", "[machine]\n"),
        "clock_ns": 123456789,
        "stop_on_reset": False,
        "console": None,
        "host_cpu": "auto",
        "start": {"eip": 1},
        "memory_size": SIZE,
        "pieces": writer.memory(memory, SIZE),
        "images": writer.images(IMAGES),
        "nodes": [NodeRecord("memory", {}, None), NodeRecord("cpu0", {"tsc_hz": 1}, CPU)],
        "disks": [],
        **changes,
    }
    writer.finish(Index(**values))  # type: ignore[arg-type]
    os.close(memory)
    return path


def read_all(path: Path) -> bytes:
    """All that a restored machine would read."""
    opened = Snapshot(path)
    memory = open_memfd("test", opened.index.memory_size)
    try:
        opened.fill(memory)
        assert list(SnapshotImages(opened)) == IMAGES
        return os.pread(memory, SIZE, 0)
    finally:
        os.close(memory)
        opened.close()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    memory = read_all(path)
    assert memory[0x10000:0x10005] == b"guest"
    assert memory[0x2000FF] == 0xFF
    index = Snapshot(path).index
    assert index.nodes[1].state == CPU
    assert index.clock_ns == 123456789
    assert os.listdir(tmp_path) == ["a"]


def test_a_snapshot_of_what_was_restored_is_the_same_file(tmp_path: Path) -> None:
    """Images are taken over as they are packed."""
    first = Snapshot(write(tmp_path / "a"))
    memory = open_memfd("test", SIZE)
    first.fill(memory)
    writer = Writer(tmp_path / "b")
    index = first.index
    pieces, images = writer.memory(memory, SIZE), writer.images(SnapshotImages(first))
    assert (pieces, images) == (index.pieces, index.images)
    writer.finish(index)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_open_snapshot_survives_its_file(tmp_path: Path) -> None:
    opened = Snapshot(write(tmp_path / "a"))
    (tmp_path / "a").unlink()
    assert list(SnapshotImages(opened)) == IMAGES


def test_an_abandoned_one_leaves_the_old_file(tmp_path: Path) -> None:
    before = write(tmp_path / "a").read_bytes()
    writer = Writer(tmp_path / "a")
    writer.data(b"half")
    writer.abandon()
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == before


def test_every_changed_byte_is_refused(tmp_path: Path) -> None:
    """Anywhere in the file: before a guest could run."""
    path = write(tmp_path / "a")
    whole = path.read_bytes()
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 0x40
        path.write_bytes(changed)
        with pytest.raises(BadSnapshot) as refused:
            read_all(path)
        assert "\n" not in str(refused.value)


def test_every_length_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(BadSnapshot, match=r"is cut off|is no snapshot"):
            read_all(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(BadSnapshot, match="is damaged: its length is wrong"):
        read_all(path)


def _no_file(path: Path) -> None:
    path.unlink()


def _other_file(path: Path) -> None:
    path.write_text("[machine]\nname = 'm'\nmemory = '64M'\n" * 3)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _newer(path: Path) -> None:
    snapshot.FORMAT = FORMAT + 1
    try:
        write(path)
    finally:
        snapshot.FORMAT = FORMAT


def _odd_index(path: Path) -> None:
    write(path, clock_ns="yesterday")


def _disk_gone(path: Path) -> None:
    write(path, disks=[DiskUse("vda", "disk", "file", str(path.with_name("gone.img")), False)])


def _disk_written(path: Path) -> None:
    disk = path.with_name("disk.img")
    disk.write_bytes(bytes(512))
    write(path, disks=[DiskUse("vda", "disk", "file", str(disk), False, 512, disk.stat().st_mtime_ns - 1)])


def _other_counter(path: Path) -> None:
    write(path)  # whose CPU node counts on 1 Hz


REFUSED: dict[Callable[[Path], None], str] = {
    _no_file: "cannot be read (No such file or directory); name a snapshot file",
    _other_file: "is no snapshot; name a file that `launcher snapshot` wrote",
    _empty: "is no snapshot",
    _cut: "is cut off: its end is missing; copy it again, or take another",
    _changed: "is damaged: the checksum of its index is wrong; copy it again, or take another",
    _newer: f"is of format {FORMAT + 1}, this program reads format {FORMAT}; restore it with the version",
    _odd_index: "is damaged: its index is not understood",
    _disk_gone: "vda.disk: its disk ",
    _disk_written: "was written to after the snapshot; take back the file as it was",
    _other_counter: "its guest counts on a time-stamp counter of 0.0000 GHz, this host's has ",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__.strip("_"))
def test_refused_with_one_line_and_status_2(
    spoil: Callable[[Path], None],
    tmp_path: Path,
    short_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BACKPLANE_RUNTIME_DIR", str(short_path / "run"))
    path = write(tmp_path / "m.snap")
    spoil(path)
    pid = os.fork()  # the command forks a fork server, which must have one thread to fork
    if pid == 0:
        os._exit(main(["restore", str(path)]))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == EXIT_INPUT
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith(f"launcher: {path}: ")
    assert REFUSED[spoil] in shown.err
    assert not list((short_path / "run").glob("*"))


@pytest.mark.parametrize("name", ["", "a/b", "x" * 40])
def test_a_bad_name_is_refused(
    name: str,
    tmp_path: Path,
    short_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BACKPLANE_RUNTIME_DIR", str(short_path / "run"))
    path = write(tmp_path / "m.snap")
    pid = os.fork()
    if pid == 0:
        os._exit(main(["restore", str(path), "--name", name]))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == EXIT_INPUT
    assert "cannot name a machine" in capfd.readouterr().err
