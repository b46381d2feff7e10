"""DMA and disks: order of effects, errors, locks, and a device process with a real file."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bus.frames import Line, PostedBatch, Read, ReadReply, Save, SaveReply, Write, WriteReply
from bus.grants import attach
from devices.base import BadDma
from devices.disks import IOV_MAX, BadDisk, DiskFile, Disks
from devices.dma import GuestRam
from devices.outside import Immediately
from devices.slot import Slot
from tests.devices import parts
from tests.devices.parts import Copier, CopierSettings
from tests.devices.test_host import Machine, start

CONTENT = bytes(n * 7 & 0xFF for n in range(2048))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


class Rig(Immediately):
    """A slot with memory and a real file; `effects` are lines, each with what memory held at that time."""

    def __init__(self, image: Path) -> None:
        self.ram = bytearray(1 << 16)
        self.effects: list[tuple[Any, bytes]] = []
        settings = CopierSettings(str(image))
        memory, disks = GuestRam(memoryview(self.ram)), Disks.open(Copier, settings)
        self.slot = Slot("dev", Copier, settings, {"line": 5}, self, lambda: 0, None, memory, disks)

    def to_controllers(self, frame: Line) -> None:
        self.effects.append((frame, bytes(self.ram[0x2000:0x2008])))

    def to_boot_cpu(self, frame: Any) -> None: ...
    def to_cpus(self, frame: Any) -> None: ...
    def to_launcher(self, frame: Any) -> None: ...
    def output(self, channel: str, data: bytes) -> None: ...

    def done(self) -> list[str]:
        reply = self.slot.handle(Save())
        assert isinstance(reply, SaveReply)
        done: list[str] = reply.state["device"]["fields"]["done"]
        return done


def test_dma_is_done_before_the_line_that_announces_it(image: Path) -> None:
    rig = Rig(image)
    rig.slot.handle(PostedBatch((("regs", 0, 1, 5),)))
    assert rig.effects == [(Line(5, True, "dev.line"), b"\1" + bytes(7))]


def test_a_step_reads_memory_as_it_was_before_it(image: Path) -> None:
    rig = Rig(image)
    rig.slot.handle(PostedBatch((("regs", 0, 1, 5), ("regs", 0, 1, 5))))
    assert rig.ram[0x2000] == 1


def test_disk_io_comes_after_the_answer_in_order_each_completion_a_step(image: Path) -> None:
    rig = Rig(image)
    assert rig.slot.handle(Write("regs", 0, 1, 4)) == WriteReply()
    assert (rig.done(), rig.ram[0x1000:0x1064]) == ([], bytes(100))
    rig.slot.run_disks()
    assert rig.done() == ["1:", "2:", "3:"]
    assert rig.ram[0x1000:0x1064] + rig.ram[0x3000:0x319C] == CONTENT[512:1024]
    assert rig.effects == [(Line(5, True, "dev.line"), bytes([0, 0, 1, 0, 0, 0, 0, 0]))]  # after the first


def test_a_write_lands_in_the_file(image: Path) -> None:
    rig = Rig(image)
    rig.ram[0x1000:0x1064], rig.ram[0x3000:0x319C] = b"a" * 100, b"b" * 412
    rig.slot.handle(Write("regs", 0, 1, 2))
    rig.slot.run_disks()
    assert image.read_bytes() == CONTENT[:512] + b"a" * 100 + b"b" * 412 + CONTENT[1024:]


def test_what_is_wrong_with_the_disk_is_a_line_for_the_device(image: Path) -> None:
    rig = Rig(image)
    rig.slot.handle(Write("regs", 0, 1, 7))
    rig.slot.run_disks()
    assert rig.done() == [f"4:read of {image}: {image} ends before byte 2048"]


def test_memory_that_is_not_there_is_refused_when_it_is_asked_for(image: Path) -> None:
    with pytest.raises(BadDma, match="not all in RAM"):
        Rig(image).slot.handle(Write("regs", 0, 1, 6))


@pytest.mark.parametrize(("pa", "size"), [(-1, 1), (65536, 1), (65535, 2), (0, -1), (1 << 40, 0)])
def test_dma_stays_in_ram(pa: int, size: int) -> None:
    ram = GuestRam(memoryview(bytearray(65536)))
    with pytest.raises(BadDma):
        ram.read(pa, size)
    with pytest.raises(BadDma):
        ram.views([(pa, size)])


def test_more_segments_than_one_call_takes(image: Path) -> None:
    ram = bytearray(4096)
    disk = DiskFile(image, False)
    segments = [(2 * n, 1) for n in range(IOV_MAX + 5)]
    disk.read(3, GuestRam(memoryview(ram)).views(segments))
    assert ram[: 2 * len(segments) : 2] == CONTENT[3 : 3 + len(segments)]
    disk.write(0, GuestRam(memoryview(ram)).views(segments))
    disk.flush()
    disk.close()
    assert image.read_bytes() == CONTENT[3 : 3 + len(segments)] + CONTENT[len(segments) :]


def test_a_write_never_makes_the_file_longer(image: Path) -> None:
    disk = DiskFile(image, False)
    with pytest.raises(EOFError, match="ends at byte 2048"):
        disk.write(2047, [memoryview(b"ab")])
    disk.close()
    assert image.read_bytes() == CONTENT


def test_two_writers_are_one_too_many(image: Path) -> None:
    first = DiskFile(image, False)
    for read_only in (False, True):
        with pytest.raises(BadDisk, match="is in use already"):
            DiskFile(image, read_only)
    first.close()
    readers = [DiskFile(image, True), DiskFile(image, True)]
    with pytest.raises(BadDisk, match="is in use already"):
        DiskFile(image, False)
    with pytest.raises(OSError, match="Bad file descriptor"):
        readers[0].write(0, [memoryview(b"x")])
    for reader in readers:
        reader.close()


def test_what_is_no_disk(tmp_path: Path) -> None:
    odd, empty = tmp_path / "odd", tmp_path / "empty"
    odd.write_bytes(bytes(513))
    empty.touch()
    for path, words in ((odd, "513 bytes long"), (empty, "0 bytes long"), (tmp_path, "cannot be written"),
                        (tmp_path / "none", "cannot be .* (No such file or directory)"),
                        (Path("/dev/null"), "neither a file nor a block device")):  # fmt: skip
        with pytest.raises(BadDisk, match=words.replace("(", r"\(").replace(")", r"\)")):
            DiskFile(path, False)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(BadDisk):
        DiskFile(odd, False)
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def machine(short_path: Path) -> Iterator[Machine]:
    machine = Machine(short_path)
    try:
        yield machine
    finally:
        machine.close()


def test_a_device_process_with_a_disk(machine: Machine, image: Path) -> None:
    regions = [{"name": "ram", "kind": "ram", "base": 0, "size": 1 << 16, "file": None},
               {"name": "code", "kind": "code", "base": 0, "size": 2 << 12, "file": None}]  # fmt: skip
    config = {"run_dir": str(machine.run_dir), "machine": "m", "regions": regions}
    machine.processes["memory"] = start("memory_node.node", config)
    machine.start("c", f"{parts.__file__}:Copier", settings={"file": str(image)})
    fd, size = attach(machine.run_dir, "ram", writable=True)
    ram = mmap.mmap(fd, size)
    os.close(fd)
    assert machine.ask("c", Write("regs", 0, 1, 1)) == WriteReply()
    assert machine.ask("c", Read("regs", 0, 1)) == ReadReply(1)  # done before this
    assert ram[0x1000:0x1064] + ram[0x3000:0x319C] == CONTENT[512:1024]
    ram[0x1000:0x1064] = b"z" * 100
    machine.ask("c", Write("regs", 0, 1, 2))
    machine.ask("c", Read("regs", 0, 1))
    assert image.read_bytes()[512:612] == b"z" * 100
