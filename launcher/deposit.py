"""A machine as one launcher leaves it to the next: its state as bytes, and descriptors.

The state is a record of the dataclasses below; wherever one of them speaks of a descriptor it has its place
among those that go along. The first of these is a memfd with the record, the second one with the boot images,
for a reset. Where both are kept: launcher/keeper.py, whose VERSION goes up when anything here changes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from launcher.facts import MachineFacts
from launcher.forkserver import ChildSpec
from launcher.launch import Launch

STATE, IMAGES = 0, 1  # places of descriptors


class DepositedProcess(msgspec.Struct, frozen=True):
    """One node's. `ready`: as the launcher knew it."""

    pid: int
    ready: bool
    swaps: int
    restarts: int
    control: int | None


class Deposit(msgspec.Struct, frozen=True):
    """`images`: address and size of each, one behind the other. `kept`: descriptors of the rim, by name."""

    machine: str
    run_dir: Path
    memory: ChildSpec
    others: tuple[ChildSpec, ...]
    rim: ChildSpec | None
    start: dict[str, int]
    console: Path | None
    stop_on_reset: bool
    outlive: bool
    facts: MachineFacts | None
    images: tuple[tuple[int, int], ...]
    processes: dict[str, DepositedProcess]
    kept: dict[str, int]
    offset_ns: int
    clock_ns: int | None
    started_ns: int

    def launch(self, images: int) -> Launch:
        """What the machine is made of; `images`: the descriptor."""
        return Launch(
            machine=self.machine,
            run_dir=self.run_dir,
            memory=self.memory,
            others=self.others,
            rim=self.rim,
            images=DepositedImages(images, self.images),
            start=self.start,
            console=self.console,
            stop_on_reset=self.stop_on_reset,
            facts=self.facts,
            outlive=self.outlive,
        )

    def with_descriptors(self, place: Callable[[int], int]) -> Deposit:
        """With others in the place of each."""

        def of(spec: ChildSpec) -> ChildSpec:
            return replace(spec, fds={name: place(fd) for name, fd in spec.fds.items()})

        return replace(
            self,
            memory=of(self.memory),
            others=tuple(map(of, self.others)),
            rim=None if self.rim is None else of(self.rim),
            kept={name: place(fd) for name, fd in self.kept.items()},
            processes={
                node: p if p.control is None else replace(p, control=place(p.control))
                for node, p in self.processes.items()
            },
        )


class DepositedImages:
    """Boot images in a file of ours, one behind the other."""

    def __init__(self, fd: int, table: Sequence[tuple[int, int]]) -> None:
        self.fd, self.table = fd, tuple(table)

    @classmethod
    def make(cls, images: Iterable[tuple[int, bytes]]) -> DepositedImages:
        if isinstance(images, cls):
            return images
        fd, table = os.memfd_create("images", os.MFD_CLOEXEC), []
        for pa, data in images:
            view = memoryview(data)
            table.append((pa, len(view)))
            while view:
                view = view[os.write(fd, view) :]
        return cls(fd, table)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        at = 0
        for pa, size in self.table:
            yield pa, os.pread(self.fd, size, at)
            at += size


def pack(deposit: Deposit, images: int) -> list[int]:
    """The descriptors that are to be kept, of which the caller closes the first."""
    fds = [os.memfd_create("launch", os.MFD_CLOEXEC), images]

    def place(fd: int) -> int:
        if fd not in fds:
            fds.append(fd)
        return fds.index(fd)

    data = msgspec.msgpack.encode(deposit.with_descriptors(place), enc_hook=_plain)
    os.pwrite(fds[STATE], data, 0)
    return fds


def unpack(fds: Sequence[int]) -> Deposit:
    """The other way round. Raises ValueError; the descriptors stay the caller's."""
    data = os.pread(fds[STATE], os.fstat(fds[STATE]).st_size, 0)
    try:
        deposit = msgspec.msgpack.decode(data, type=Deposit, dec_hook=_typed)
        return deposit.with_descriptors(fds.__getitem__)
    except (msgspec.MsgspecError, IndexError) as e:
        raise ValueError(f"what the last launcher left cannot be read: {e}") from e


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value).__name__)


def _typed(kind: type, value: Any) -> Any:
    return kind(value)
