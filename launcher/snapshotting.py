"""Taking a snapshot of a running machine: pause, ask everybody, write in a thread, go on.

The machine stands from the first question until the file is complete. Whoever asked is answered then; a
machine that was paused before stays so. Left out: writing while the guest runs on.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from bus.frames import Save, SaveReply
from launcher.facts import MachineDisk
from launcher.names import CPU
from launcher.pausing import Ask, NotQuiet, Pausing
from launcher.snapshot import DiskUse, Index, NodeRecord, Origin, Writer
from memory_node.snapshot import Damaged

if TYPE_CHECKING:
    from launcher.launch import Launch

# of a node's config: what is another's in another life of the machine
OWN = frozenset(("node", "run_dir", "machine", "log_level", "clock_offset_ns", "clock_stopped_ns", "state",
                 "features", "overlays", "fds", "standby"))  # fmt: skip


class _Work(msgspec.Struct):
    """One snapshot on its way."""

    client: int
    file: Path
    was_paused: bool
    begun_ns: int
    memory: int  # descriptor
    thread: threading.Thread | None = None
    error: str = ""
    size: int = 0


class Snapshots:
    """Of one supervisor; its loop waits on `descriptors` and calls `finish` when one is readable."""

    def __init__(self, launch: Callable[[], Launch], pausing: Pausing, ask: Ask,
                 answer: Callable[[int, dict[str, Any]], None]) -> None:
        """`launch`: the machine as it is now, swaps of its devices included."""
        self._launch, self._pausing, self._ask, self._answer = launch, pausing, ask, answer
        self._done = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._work: _Work | None = None

    @property
    def busy(self) -> bool:
        return self._work is not None

    def descriptors(self) -> list[int]:
        return [self._done]

    def begin(self, client: int, request: dict[str, Any], devices: list[str]) -> None:
        """Pause the machine, note everybody's state, and have the file written."""
        file = request.get("file")
        if not isinstance(file, str) or not os.path.isabs(file):
            self._answer(client, {"error": "a snapshot needs the absolute path of a file"})
            return
        work = _Work(client, Path(file), self._pausing.paused, time.monotonic_ns(), -1)
        try:
            self._pausing.pause(CPU, devices)
            states = {node: self._state(node) for node in (*devices, CPU)}
            work.memory = os.dup(self._launch().memory.fds["ram"])
            size = os.fstat(work.memory).st_size
        except (NotQuiet, RuntimeError) as e:
            self._go_on(work, devices)
            self._answer(client, {"error": f"no snapshot: {e}"})
            return
        work.thread = threading.Thread(target=self._write, args=(work, size, states), name="snapshot")
        self._work = work
        work.thread.start()

    def finish(self, devices: list[str]) -> None:
        """The file is there, or is not: let the machine go on, answer."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._done)
        work, self._work = self._work, None
        if work is None or work.thread is None:
            return
        work.thread.join()
        os.close(work.memory)
        self._go_on(work, devices)
        stood_ns = time.monotonic_ns() - work.begun_ns
        self._answer(work.client, {"error": work.error} if work.error else
                     {"size": work.size, "stood_ns": 0 if work.was_paused else stood_ns})

    def close(self) -> None:
        """Wait for what is being written: a file is whole, or isn't there."""
        if self._work is not None and self._work.thread is not None:
            self._work.thread.join()
        os.close(self._done)

    def _go_on(self, work: _Work, devices: list[str]) -> None:
        if not work.was_paused:
            with contextlib.suppress(NotQuiet):  # whoever does not answer is seen by its pidfd
                self._pausing.resume(CPU, devices)

    def _state(self, node: str) -> dict[str, Any]:
        reply = self._ask(node, Save())
        if not isinstance(reply, SaveReply):
            raise RuntimeError(f"{node} answered Save with {reply}")
        return reply.state

    def _write(self, work: _Work, size: int, states: dict[str, dict[str, Any]]) -> None:
        try:
            writer = Writer(work.file)
        except OSError as e:
            work.error = f"{work.file} cannot be written ({e.strerror})"
        else:
            try:
                work.size = writer.finish(self._index(writer, work, size, states))
            except (OSError, Damaged) as e:
                writer.abandon()
                work.error = f"{work.file} could not be written: {' '.join(str(e).split())}"
            except BaseException:
                writer.abandon()
                work.error = f"{work.file} could not be written"
                raise
        finally:
            os.eventfd_write(self._done, 1)

    def _index(self, writer: Writer, work: _Work, size: int, states: dict[str, dict[str, Any]]) -> Index:
        launch, clock_ns = self._launch(), self._pausing.clock_ns
        facts = launch.facts
        assert facts is not None
        assert clock_ns is not None
        pieces = writer.memory(work.memory, size)
        return Index(
            origin=Origin(facts.name, facts.file, facts.text),
            clock_ns=clock_ns,
            stop_on_reset=launch.stop_on_reset,
            console=facts.console,
            host_cpu=facts.host_cpu,
            start=dict(launch.start),
            memory_size=size,
            pieces=pieces,
            images=writer.images(launch.images),
            nodes=[
                NodeRecord(spec.node, {k: v for k, v in spec.config.items() if k not in OWN},
                           states.get(spec.node))
                for spec in (launch.memory, *launch.others)
            ],
            disks=[_use(writer, _now(launch, disk)) for disk in facts.disks],
            channels=launch.rim.config["channels"] if launch.rim is not None else [],
        )


def _now(launch: Launch, disk: MachineDisk) -> MachineDisk:
    """The disk as the device's settings have it now: a swap may have changed them."""
    settings = next(s.config.get("settings", {}) for s in launch.others if s.node == disk.node)
    path = Path(settings.get(disk.setting, disk.path))
    return disk if path == disk.path else replace(disk, path=path)


def _use(writer: Writer, disk: MachineDisk) -> DiskUse:
    """What is to be remembered of a disk, all that was written to it being on it."""
    fd = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not disk.read_only and disk.overlay is None:
            os.fdatasync(fd)
        info = os.fstat(fd)
        size = os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
    overlay_size, changes = 0, None
    if disk.overlay is not None:
        overlay = os.open(disk.overlay, os.O_RDONLY | os.O_CLOEXEC)
        try:
            overlay_size = os.fstat(overlay).st_size
            changes = writer.memory(overlay, overlay_size) or None
            overlay_size = overlay_size if changes else 0
        finally:
            os.close(overlay)
    return DiskUse(disk.node, disk.disk, disk.setting, str(disk.path), disk.read_only, size, info.st_mtime_ns,
                   overlay_size, changes)


