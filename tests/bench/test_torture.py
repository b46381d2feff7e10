"""The checks of `make torture`: each kind of fault is noticed. test_torture.py of tests/machine runs it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.torture import report
from bench.torture.blocks import BLOCK, Blocks, content
from bench.torture.faults import Fault, Plan
from bench.torture.streams import LINE, Stream, line_in, line_out

SALT, SEED, COUNT = 77, 5, 16
PLACE = 3  # where the blocks begin in the image, in blocks


class Guest:
    """The other end of a console."""

    def __init__(self, folder: Path) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / "console"))
        listener.listen()
        self.others: list[bytes] = []
        self.stream = Stream(folder / "console", "c", SALT, b"READY\n", self.others.append)
        self.sock, _ = listener.accept()
        listener.close()
        self.stream.start()

    def says(self, data: bytes) -> list[str]:
        """All that it says; what was wrong with it."""
        self.sock.sendall(data)
        self.sock.shutdown(socket.SHUT_WR)
        self.stream.join(60)
        assert not self.stream.is_alive()
        return self.stream.faults


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


def lines(first: int, last: int, taken: int = 0) -> bytes:
    return b"".join(line_out(b"G", n, taken, SALT) for n in range(first, last + 1))


def test_right_lines(guest: Guest) -> None:
    other = b"x" * (LINE - 1) + b"\n"
    assert guest.says(b"booting\r\nREADY\n" + lines(1, 2) + other + lines(3, 3, taken=2)) == []
    assert (guest.stream.number, guest.stream.taken, guest.others) == (3, 2, [other])
    assert guest.sock.recv(2 * LINE, socket.MSG_WAITALL) == line_in(1, SALT) + line_in(2, SALT)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:100] + data[101:],  # lost
        lambda data: data[:100] + data[99:100] + data[100:],  # twice
        lambda data: data[:LINE] + data[2 * LINE :] + lines(4, 5),
        lambda data: data[:LINE] + data[:LINE] + data[LINE:],
        lambda data: data[LINE : 2 * LINE] + data[:LINE] + data[2 * LINE :],
        lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
        lambda data: data[:LINE] + lines(2, 2, taken=9999) + data[2 * LINE :],
    ],
)
def test_wrong_lines(guest: Guest, spoil: Callable[[bytes], bytes]) -> None:
    data = lines(1, 3)
    assert spoil(data) != data
    assert guest.says(b"READY\n" + spoil(data))
    assert guest.stream.number < 3


def told(kind: str, sequence: int, first: int, count: int) -> bytes:
    return f"{kind} {sequence:08x} {first:08x} {count:08x}".ljust(LINE - 1, ".").encode() + b"\n"


class Disk:
    """An image with blocks that were all written once, and the journal of that."""

    def __init__(self, folder: Path) -> None:
        self.image = folder / "image"
        self.image.write_bytes(bytes((PLACE + COUNT) * BLOCK))
        self.blocks = Blocks(self.image, COUNT, SEED)
        self.write(1, 0, COUNT)

    def put(self, block: int, sequence: int) -> None:
        with self.image.open("r+b") as file:
            file.seek((PLACE + block) * BLOCK)
            file.write(content(block, sequence, SEED))

    def write(self, sequence: int, first: int, count: int, lost: int | None = None) -> None:
        self.blocks.take(told("W", sequence, first, count))
        for block in range(first, first + count):
            if block != lost:
                self.put(block, sequence)
        self.blocks.take(told("A", sequence, first, count))


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def test_acknowledged_and_there(disk: Disk) -> None:
    for sequence in range(2, 20):
        disk.write(sequence, sequence % 12, 4)
    disk.blocks.take(told("V", 19, COUNT, 0))
    disk.blocks.finish()
    assert disk.blocks.faults == []
    assert disk.blocks.checked == COUNT + 18 * 4


def test_acknowledged_and_lost(disk: Disk) -> None:
    disk.write(2, 0, 4, lost=2)
    for sequence in range(3, 9):
        disk.write(sequence, 8, 4)
    assert len(disk.blocks.faults) == 1
    assert "block 2 isn't there" in disk.blocks.faults[0]


def test_a_block_that_is_being_written_again(disk: Disk) -> None:
    disk.blocks.take(told("W", 2, 5, 1))
    disk.put(5, 3)  # the next run is under way already
    disk.blocks.take(told("A", 2, 5, 1))
    disk.blocks.take(told("W", 3, 5, 1))
    disk.blocks.take(told("A", 3, 5, 1))
    for sequence in range(4, 9):
        disk.write(sequence, 8, 4)
    assert disk.blocks.faults == []


def test_lost_at_the_end(disk: Disk) -> None:
    disk.write(2, 0, 4, lost=2)
    disk.blocks.take(told("V", 2, COUNT, 0))
    assert disk.blocks.faults == []
    disk.blocks.finish()
    assert disk.blocks.faults == ["image: 1 blocks are wrong at the end, as [2]"]


@pytest.mark.parametrize(
    "line",
    [
        told("A", 3, 0, 4),  # was not begun
        told("W", 3, 0, 4),  # not the next one
        told("E", 1, 7, 9),
        told("F", 1, 2, 0),
        told("S", 0xFFFF_FFFB, 1, 0),
        told("W", 2, 0, 4)[:-2] + b"x\n",
        b"W 0000000g",
    ],
)
def test_what_the_checker_may_not_say(disk: Disk, line: bytes) -> None:
    disk.blocks.take(line)
    assert len(disk.blocks.faults) == 1


def test_plans_follow_from_the_seed() -> None:
    one, again, other = (Plan.make("kill", 50, ["a", "b"], 0.1, seed) for seed in (1, 1, 2))
    assert one.steps == again.steps != other.steps
    assert {device for device, _ in one.steps} == {"a", "b"}
    assert all(0 <= wait_s < 0.2 for _, wait_s in one.steps)


def test_the_table(tmp_path: Path) -> None:
    done = [Fault("kill", "pit", 1, 0, 1, n * 1_000_000) for n in range(1, 101)]
    done += [Fault("swap", "pic", 1, 0, None, None), Fault("swap", "pic", 1, 0, 1, 2_500_000)]
    done.append(Fault("swap", "memory", 1, 0, 1, 9_000_000))  # of which the guest sees nothing
    rows = report.table(done, 500_000.0).splitlines()
    assert rows[2:] == [
        "| memory | 0 | - | - | - | 1 | 9.0 | 9.0 | 9.0 |",
        "| pic | 0 | - | - | - | 2 | 2.5 | 2.5 | 2.5 |",
        "| pit | 100 | 51.0 | 100.0 | 100.0 | 0 | - | - | - |",
        "| all | 100 | 51.0 | 100.0 | 100.0 | 2 | 2.5 | 2.5 | 2.5 |",
        "| all, in round trips | 100 | 102 | 200 | 200 | 2 | 5 | 5 | 5 |",
    ]
    document = tmp_path / "page.md"
    document.write_text(f"# Page\n{report.BEGIN}\nold\n{report.END}\nmore\n")
    report.write(document, "new\n")
    assert document.read_text() == f"# Page\n{report.BEGIN}\nnew\n{report.END}\nmore\n"
    document.write_text("# Page\n")
    with pytest.raises(ValueError, match="no section of ours"):
        report.write(document, "new\n")
