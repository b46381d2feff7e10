"""Snapshot and restore by command: what goes on, what is the same, what is refused."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from launcher import snapshot as files
from launcher.snapshot import Index, Snapshot
from memory_node.snapshot import digest
from tests.machine.drive import LAUNCHER, PATIENCE_S, RAW_NOTICE, ROOT, Screen, command, environment
from tests.machine.files import linux_machine
from tests.machine.test_virtio import machine as virtio_machine

pytestmark = pytest.mark.machine
HELLO = ROOT / "machines" / "hello.toml"
AWAY_S = 3.0
CLOCK_STEP_S = 1.01  # `date` counts whole seconds


@pytest.fixture
def hello(runtime: Path, tmp_path: Path) -> Path:
    """A snapshot of a machine that has said all it says by itself, and stood while it was asked twice."""
    file = tmp_path / "hello.snap"
    with Screen("up", HELLO, runtime=runtime) as screen:
        screen.wait_for("q powers off")
        command("pause", "hello", runtime=runtime)
        told = command("snapshot", "hello", file, runtime=runtime)
        assert re.fullmatch(rf"hello: {file}, \d+\.\d MiB\n", told)
        again = tmp_path / "again.snap"
        command("snapshot", "hello", again, runtime=runtime)
        assert again.read_bytes() == file.read_bytes()
        command("resume", "hello", runtime=runtime)
        told = command("snapshot", "hello", again, runtime=runtime)
        assert re.fullmatch(rf"hello: {again}, \d+\.\d MiB; it stood for \d+ ms\n", told)
        screen.type("goes on\r")
        screen.wait_for("goes on\r\n")
        screen.type("q")
        screen.finish(0)
    assert sorted(os.listdir(tmp_path)) == ["again.snap", "hello.snap"]
    return file


def test_a_restored_machine_goes_on(hello: Path, runtime: Path) -> None:
    with Screen("restore", hello, runtime=runtime) as screen:
        screen.wait_for(RAW_NOTICE)
        screen.type("Backplane\r")
        screen.wait_for("Backplane\r\n")
        screen.type("q")
        screen.finish(0)
        assert "tick" not in screen.text()  # it had said that
        assert screen.attributes() == screen.attributes_before
    assert not list(runtime.glob("*"))


def test_two_side_by_side(hello: Path, runtime: Path) -> None:
    with (
        Screen("restore", hello, "--name", "one", runtime=runtime) as one,
        Screen("restore", hello, "--name", "two", runtime=runtime) as two,
    ):
        for screen, text in ((one, "first"), (two, "second")):
            screen.wait_for(RAW_NOTICE)
            screen.type(f"{text}\r")
            screen.wait_for(f"{text}\r\n")
        assert "second" not in one.text()
        for screen in (one, two):
            screen.type("q")
            screen.finish(0)


def test_a_second_snapshot_where_nothing_ran_is_the_same(hello: Path, runtime: Path, tmp_path: Path) -> None:
    told = command("restore", hello, "--paused", "--detach", "--name", "other", runtime=runtime)
    assert told.startswith("other: paused; see `launcher resume other`")
    try:
        assert "paused" in command("ps", "other", runtime=runtime)
        command("snapshot", "other", tmp_path / "second.snap", runtime=runtime)
        assert (tmp_path / "second.snap").read_bytes() == hello.read_bytes()
        command("resume", "other", runtime=runtime)
        command("snapshot", "other", tmp_path / "third.snap", runtime=runtime)
    finally:
        command("down", "other", runtime=runtime)
    with Screen("restore", tmp_path / "third.snap", runtime=runtime) as screen:
        screen.wait_for(RAW_NOTICE)
        screen.type("q")
        screen.finish(0)


def test_a_snapshot_that_cannot_be_written_costs_nothing(runtime: Path, tmp_path: Path) -> None:
    with Screen("up", HELLO, runtime=runtime) as screen:
        screen.wait_for("tick 1")
        for file in (tmp_path / "none" / "a.snap", tmp_path):
            told = command("snapshot", "hello", file, runtime=runtime, check=False)
            assert "cannot be written" in told
            assert told.count("\n") == 1
        screen.wait_for("tick 5")
        screen.type("q")
        screen.finish(0)
    assert os.listdir(tmp_path) == []


def _rewritten(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a snapshot's index, with all its checksums right."""
    snapshot = Snapshot(file)
    plain = msgspec.to_builtins(snapshot.index, builtin_types=(bytes,))
    change(plain)
    data = msgspec.msgpack.encode(msgspec.convert(plain, Index))
    old = file.read_bytes()
    _, version, _, offset, _, _ = files._PRELUDE.unpack(old[: files._PRELUDE.size])
    head = files._PRELUDE.pack(files.MAGIC, version, 0, offset, len(data), bytes(16))[:-16]
    file.write_bytes(head + digest(head + data) + old[files._PRELUDE.size : offset] + data)


def _of(plain: dict[str, Any], node: str) -> dict[str, Any]:
    state: dict[str, Any] = next(n for n in plain["nodes"] if n["node"] == node)["state"]
    return state


def _device_version(plain: dict[str, Any]) -> None:
    _of(plain, "uart0")["device"]["version"] = 99


def _device_field(plain: dict[str, Any]) -> None:
    del _of(plain, "pit")["device"]["fields"]["port_b"]


def _cpu_version(plain: dict[str, Any]) -> None:
    _of(plain, "cpu0")["version"] = 7


def _cpu_feature(plain: dict[str, Any]) -> None:
    _of(plain, "cpu0")["model"]["features"].append("avx9000")


REFUSED: dict[Callable[[dict[str, Any]], None], str] = {
    _device_version: "not restored: uart0: .*saved state UartState version 99 is not UartState version 1",
    _device_field: "not restored: pit: .*saved state does not fit",
    _cpu_version: "not restored: cpu0: a saved Cpu of version 7, this is Cpu version 1",
    _cpu_feature: "not restored: cpu0: its guest uses avx9000, which this host's processor lacks",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__.strip("_"))
def test_state_of_another_version_is_refused(
    change: Callable[[dict[str, Any]], None], hello: Path, runtime: Path
) -> None:
    _rewritten(hello, change)
    _check_refused(hello, runtime, REFUSED[change])


def test_changed_memory_is_refused_before_the_guest_runs(hello: Path, runtime: Path) -> None:
    piece = Snapshot(hello).index.pieces[0]
    data = bytearray(hello.read_bytes())
    data[piece.offset + piece.length // 2] ^= 1
    hello.write_bytes(data)
    _check_refused(hello, runtime, "is damaged: the checksum of the memory at 0x0 is wrong")


def _check_refused(file: Path, runtime: Path, pattern: str) -> None:
    done = subprocess.run(
        [LAUNCHER, "restore", str(file)], env=environment(runtime), cwd=ROOT, capture_output=True, text=True,
        timeout=PATIENCE_S, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, lines
    assert re.search(pattern, lines[0]), lines
    assert not list(runtime.glob("*"))


@pytest.mark.usefixtures("guest_files")
@pytest.mark.parametrize("kind", ["linux.toml", "linux-pic.toml"])
def test_linux_goes_on_with_its_own_time(kind: str, runtime: Path, tmp_path: Path) -> None:
    """Its files, its processes and its clocks; then it can even be reset."""
    file = tmp_path / "linux.snap"
    with Screen("up", linux_machine(tmp_path, kind, "linux"), runtime=runtime) as screen:
        screen.prompt()
        screen.run("n=0; while :; do n=$((n+1)); echo $n > /tmp/n; usleep 10000; done &")
        screen.run("dd if=/dev/urandom of=/tmp/data bs=64k count=64 2>/dev/null; md5sum /tmp/data > /tmp/sum")
        before = _times(screen)
        begun = time.monotonic()
        command("snapshot", "linux", file, runtime=runtime)
        screen.type("poweroff -f\n")
        screen.finish(0)
    time.sleep(AWAY_S)
    with Screen("restore", file, runtime=runtime) as screen:
        screen.wait_for(RAW_NOTICE)
        screen.type("\n")
        screen.prompt()
        after = _times(screen)
        outside = time.monotonic() - begun
        for name, earlier in before.items():
            passed = after[name] - earlier
            assert 0 <= passed <= outside - AWAY_S + CLOCK_STEP_S, f"{name}: {passed} of {outside}"
        assert screen.run("md5sum -c /tmp/sum").split() == ["/tmp/data:", "OK"]
        first = int(screen.run("cat /tmp/n"))
        screen.run("usleep 200000")
        assert int(screen.run("cat /tmp/n")) > first
        log = screen.run("dmesg | grep -i -e unstable -e stall -e lockup -e skew | head")
        assert not log.strip(), log
        screen.type("reboot -f\n")
        screen.prompt()
        assert float(screen.run("cat /proc/uptime").split()[0]) < after["uptime"] + outside
        screen.type("poweroff -f\n")
        screen.finish(0)


def _times(screen: Screen) -> dict[str, float]:
    shown = screen.run("cat /proc/uptime; date +%s").split()
    return {"uptime": float(shown[0]), "date": float(shown[2])}


@pytest.mark.usefixtures("guest_files")
def test_disks_are_copied_on_write(runtime: Path, tmp_path: Path) -> None:
    """Two machines from one snapshot write to their disk; the file stays as it is, and a snapshot of one of
    them has what it wrote."""
    image = tmp_path / "disk.img"
    image.touch()
    os.truncate(image, 16 << 20)
    first, second = tmp_path / "first.snap", tmp_path / "second.snap"
    with Screen("up", virtio_machine(tmp_path, "linux-disk.toml", "linux"), runtime=runtime) as screen:
        screen.prompt()
        screen.run("mke2fs -q /dev/vda >/dev/null; mkdir /a; mount -t ext2 /dev/vda /a")
        screen.run("echo common > /a/common")
        screen.run("sync; sync")
        command("pause", "linux", runtime=runtime)
        command("snapshot", "linux", first, runtime=runtime)
        told = command("restore", first, "--name", "early", runtime=runtime, check=False)
        assert "is being written to by a machine; end that machine first" in told
        command("down", "linux", runtime=runtime)
        screen.finish(0)
    content = image.read_bytes()
    with (
        Screen("restore", first, "--name", "one", runtime=runtime) as one,
        Screen("restore", first, "--name", "two", runtime=runtime) as two,
    ):
        for name, screen in (("one", one), ("two", two)):
            screen.wait_for(RAW_NOTICE)
            screen.type("\n")
            screen.prompt()
            screen.run(f"echo {name} > /a/mine; dd if=/dev/urandom of=/a/data bs=64k count=16 2>/dev/null")
            screen.run("md5sum /a/data > /a/sum; umount /a && mount -t ext2 /dev/vda /a")
            assert screen.run("cat /a/common /a/mine; md5sum -c /a/sum").split()[:2] == ["common", name]
        command("snapshot", "two", second, runtime=runtime)
        for name in ("one", "two"):
            command("down", name, runtime=runtime)
        one.finish(0)
        two.finish(0)
    assert image.read_bytes() == content
    with Screen("restore", second, runtime=runtime) as screen:
        screen.wait_for(RAW_NOTICE)
        screen.type("\n")
        screen.prompt()
        screen.run("umount /a && mount -t ext2 /dev/vda /a")
        shown = screen.run("cat /a/common /a/mine; md5sum -c /a/sum").split()
        assert shown == ["common", "two", "/a/data:", "OK"]
        screen.type("poweroff -f\n")
        screen.finish(0)
    assert image.read_bytes() == content
    os.utime(image)
    _check_refused(first, runtime, "was written to after the snapshot")
