"""A device that is swapped a hundred times in the middle of a transfer: every byte arrives once."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
from pathlib import Path

import pytest

from tests.machine.drive import Screen, command
from tests.machine.test_virtio import machine

pytestmark = [pytest.mark.machine, pytest.mark.usefixtures("guest_files")]

SWAPS = 100
SIZE = 100 << 20
BLOCK = 16 << 10  # of a request; small, so that the transfer takes its time
SPOKEN, HEARD = 64 << 10, 128 << 10  # bytes of a console, out again and again, and in


def swap(device: str, runtime: Path) -> None:
    assert f"m: {device} is " in command("swap", "m", device, runtime=runtime)


def test_100_mb_through_the_disk(tmp_path: Path, runtime: Path) -> None:
    """From the first half of a disk to its second half, past the guest's page cache."""
    image = tmp_path / "disk.img"
    data = random.Random(1).randbytes(SIZE)
    image.write_bytes(data + bytes(SIZE))
    with Screen("up", machine(tmp_path, "linux-disk.toml", "m"), runtime=runtime) as screen:
        screen.prompt()
        count = SIZE // BLOCK
        copy = f"dd if=/dev/vda of=/dev/vda bs={BLOCK} count={count} seek={count} iflag=direct oflag=direct"
        screen.type(f"{copy} conv=notrunc,fsync 2>&1; echo status $?\n")
        while image.open("rb").read(SIZE + BLOCK)[SIZE:] != data[:BLOCK]:
            screen.watch(0.05)  # until it has begun
        for _ in range(SWAPS):
            swap("disk0", runtime)
        assert "status 0" in screen.result()
        digest = hashlib.sha256(data).hexdigest()
        read = f"dd if=/dev/vda bs=1M skip={SIZE >> 20} iflag=direct 2>/dev/null"
        assert screen.run(f"{read} | sha256sum").split()[0] == digest
        screen.type("poweroff -f\r")
        screen.finish(0)
    assert hashlib.sha256(image.read_bytes()[SIZE:]).hexdigest() == digest


class Console(threading.Thread):
    """Hears all that is said there, until the machine ends."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        self.heard = bytearray()

    def run(self) -> None:
        while data := self.sock.recv(65536):
            self.heard += data


def test_the_virtio_console_both_ways(tmp_path: Path, runtime: Path) -> None:
    """The guest says the same again and again, and hears something, until that and the swaps are done."""
    rng = random.Random(2)
    spoken, heard = rng.randbytes(SPOKEN), rng.randbytes(HEARD)
    (tmp_path / "disk.img").write_bytes(spoken)
    with Screen("up", machine(tmp_path, "linux-disk.toml", "m"), runtime=runtime) as screen:
        screen.prompt()
        screen.run("exec 4<>/dev/hvc0; stty raw -echo <&4; cat /dev/vda > /tmp/spoken")
        screen.run(f"(head -c {HEARD} <&4 | sha256sum > /tmp/sum; touch /tmp/heard) &")
        screen.run("(while [ ! -e /tmp/heard ] || [ ! -e /tmp/stop ]; do cat /tmp/spoken >&4; done) &")
        other = Console(runtime / "m" / "console-hvc0.sock")
        other.start()
        part = HEARD // SWAPS + 1
        for at in range(0, HEARD, part):
            other.sock.sendall(heard[at : at + part])
            swap("hvc0", runtime)
        screen.run("touch /tmp/stop; wait")
        assert screen.run("cat /tmp/sum").split()[0] == hashlib.sha256(heard).hexdigest()
        screen.type("poweroff -f\r")
        screen.finish(0)
        other.join(60)
    assert not other.is_alive()
    times, rest = divmod(len(other.heard), SPOKEN)
    assert (times > 0, rest) == (True, 0)
    assert other.heard == spoken * times
