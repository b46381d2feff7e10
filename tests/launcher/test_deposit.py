"""What one launcher leaves to the next: there and back, and what is made of it where the first was killed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from msgspec.structs import replace

from launcher.deposit import IMAGES, Deposit, DepositedImages, DepositedProcess, pack, unpack
from launcher.facts import MachineDisk, MachineFacts
from launcher.forkserver import Child, ChildSpec
from launcher.reattach import sort_out

DISK = MachineDisk("vda", "d", "file", Path("/d"), False)
FACTS = MachineFacts("m", "/m.toml", "text", "uart0", "auto", (DISK,))
CPU = DepositedProcess(13, True, 0, 0, None)


def spec(node: str, **fds: int) -> ChildSpec:
    config = {"node": node, "blob": b"\0\xff", "deep": {"list": [1, "two", None]}}
    return ChildSpec(node, "a.b", config, node, Path(f"/{node}.log"), (0, 1), fds)


def deposit(a: int, b: int) -> Deposit:
    return Deposit(
        machine="m",
        run_dir=Path("/run/m"),
        memory=spec("memory", ram=a),
        others=(spec("uart0", journal=b, wake=a), spec("cpu0")),
        rim=None,
        start={"eip": 0x100000},
        console=Path("/run/m/console-uart0.sock"),
        stop_on_reset=False,
        outlive=True,
        facts=FACTS,
        images=((0x1000, 5), (0x100000, 3)),
        processes={"uart0": DepositedProcess(12, True, 1, 2, b), "cpu0": CPU},
        kept={"client": a},
        offset_ns=-7,
        clock_ns=None,
        started_ns=1 << 50,
    )


def test_a_deposit_goes_there_and_back_with_other_descriptors() -> None:
    a, b = os.pipe()
    images = DepositedImages.make([(0x1000, b"hello"), (0x100000, b"abc")])
    packed = pack(deposit(a, b), images.fd)
    assert packed[IMAGES:] == [images.fd, a, b]  # each once
    there = [os.dup(fd) for fd in packed]
    back = unpack(there)
    assert back == deposit(there[2], there[3])
    launch = back.launch(there[IMAGES])
    assert list(launch.images) == [(0x1000, b"hello"), (0x100000, b"abc")]
    assert list(DepositedImages.make(launch.images)) == list(images)
    for fd in (*there, *packed):
        os.close(fd)


def test_what_is_no_deposit_is_refused_in_one_line() -> None:
    fd = os.memfd_create("state")
    for data in (b"", b"\xc1", b"\x80"):
        os.ftruncate(fd, 0)
        os.pwrite(fd, data, 0)
        with pytest.raises(ValueError, match="what the last launcher left cannot be read") as caught:
            unpack([fd])
        assert "\n" not in str(caught.value)
    os.close(fd)
    a, b = os.pipe()
    packed = pack(deposit(a, b), a)
    with pytest.raises(ValueError, match="cannot be read"):
        unpack(packed[:2])  # fewer descriptors than it speaks of
    for fd in {*packed, a, b}:
        os.close(fd)


def child(node: str, pid: int) -> Child:
    return Child(node, pid, -1)


ONE = {"uart0": DepositedProcess(12, True, 0, 0, None)}


@pytest.mark.parametrize(
    ("live", "ended", "process", "to_end"),
    [
        ([12], [], 12, []),
        ([], [12], 12, []),  # it ended while there was no launcher
        ([12], [99], 12, []),  # a new one that was refused
        ([12, 30], [], 12, [12, 30]),  # in the middle of a swap: who writes the journal?
        ([30], [12], 30, [30]),  # one whose start the deposit doesn't know
        ([], [30], 30, []),
        ([], [], None, []),
    ],
)
def test_whose_process_is_a_nodes(
    live: list[int], ended: list[int], process: int | None, to_end: list[int]
) -> None:
    a_deposit = replace(deposit(0, 1), processes=ONE)
    others = [child("pic", 77)]
    found, strangers = sort_out(
        a_deposit, [*others, *(child("uart0", pid) for pid in live)], [child("uart0", pid) for pid in ended]
    )
    assert ("uart0" in found) == (process is not None)
    if process is not None:
        assert found["uart0"].pid == process
    assert [stranger.pid for stranger in strangers] == to_end
