"""IoClient: how the CPU thread reaches ports, memory-mapped registers and interrupt controllers.

One thread only; its sockets are its own (identity `<node>.io`), apart from those of the node's bus thread.

Order, as seen by one device: program order, always. Posted writes wait in a batch per device, and every
batch is sent before any synchronous access to any device, at flush(), when one holds 64 writes or its
oldest is 2 ms old at the next write, and at once for a register declared prompt. A mirrored read that a
posted write on its way could change (any but a relaxed one) is made synchronously.

How an access finds its device: bus/binding.py. Figures: docs/decisions/002-three-classes-of-io.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zmq

from bus.addressmap import AddressMap
from bus.asking import AccessRefused, Asking, DeviceGone, LatchState, OnLate, Target
from bus.binding import Binder, Bindings, OnOpenBus
from bus.frames import Eoi, IntAck, IntAckReply, StringIn, StringInReply, StringOut, StringOutReply
from bus.link import Link, ZmqLink
from bus.recorder import Instruction, Recorder
from bus.stream import Positions

__all__ = ["AccessRefused", "DeviceGone", "IoClient", "OnLate", "OnOpenBus"]

CLOSE_NS = 3_000_000_000  # for devices to commit what was sent
STRING_BYTES = 1 << 16  # longer strings travel in several messages


class IoClient:
    """See the module's docstring. `width` is 1, 2 or 4 bytes; values are unsigned and fit."""

    def __init__(
        self,
        run_dir: str | Path,
        node: str,
        address_map: AddressMap,
        mirror: memoryview | None,
        now_ns: Callable[[], int],
        on_open_bus: OnOpenBus,
        *,
        clock: Callable[[], int] | None = None,
        pic: str | None,
        ioapics: Sequence[str],
        deadline_ns: int = 10_000_000_000,
        on_late: OnLate | None = None,
        make_link: Callable[[str], Link] | None = None,
    ) -> None:
        """`mirror` is the whole region "mirror"; None makes mirrored reads synchronous. `clock`: the
        machine's, for the mirror's formulas; None: `now_ns`, which deadlines go by.

        After each deadline without an answer on_late is called and the wait goes on; without on_late
        DeviceGone is raised. `make_link` replaces the sockets (bus/fake.py).
        """
        self._map = address_map
        self._name = f"{node}.io"
        self._asking = Asking(self._name, now_ns, deadline_ns, on_late)
        self._context: zmq.Context[Any] | None = None
        if make_link is None:
            context = self._context = zmq.Context()

            def make_link(peer: str) -> Link:
                return ZmqLink(context, run_dir, f"{node}.io", peer)

        entries = [*address_map.entries("port"), *address_map.entries("mmio")]
        nodes = dict.fromkeys([*(e.node for e in entries), *([pic] if pic else []), *ioapics])
        self._targets = {peer: Target(peer, make_link(peer), self._asking) for peer in nodes}
        for entry in entries:
            target, name = self._targets[entry.node], entry.range.name
            target.latches += [LatchState(name, *latched) for latched in entry.range.latched]
            target.last.update(((name, offset), 0) for offset in entry.range.own)
        self._pic = self._targets[pic] if pic else None
        self._ioapics = [self._targets[peer] for peer in ioapics]
        binder = Binder(address_map, self._targets, mirror, clock or now_ns, on_open_bus)
        self._port_readers = Bindings(lambda port, width: (binder.reader("port", port, width), True))
        self._port_writers = Bindings(lambda port, width: (binder.writer("port", port, width), True))
        self._mmio_readers = Bindings(
            lambda pa, width: (binder.reader("mmio", pa, width), self.owns_mmio(pa))
        )
        self._mmio_writers = Bindings(
            lambda pa, width: (binder.writer("mmio", pa, width), self.owns_mmio(pa))
        )

    def port_read(self, port: int, width: int) -> int:
        return self._port_readers[port << 3 | width]()

    def port_write(self, port: int, width: int, value: int) -> None:
        self._port_writers[port << 3 | width](value)

    def mmio_read(self, pa: int, width: int) -> int:
        return self._mmio_readers[pa << 3 | width]()

    def mmio_write(self, pa: int, width: int, value: int) -> None:
        self._mmio_writers[pa << 3 | width](value)

    def owns_mmio(self, pa: int) -> bool:
        """Whether a device answers at this guest physical address."""
        return self._map.find("mmio", pa) is not None

    def port_in_string(self, port: int, width: int, count: int) -> bytes:
        """`rep ins`: `count` reads of the same port, as bytes in order."""
        entry = self._map.find("port", port)
        if entry is None or not entry.range.accepts(port - entry.base, width):
            return b"".join(self.port_read(port, width).to_bytes(width, "little") for _ in range(count))
        target, region, offset = self._targets[entry.node], entry.range.name, port - entry.base
        data = bytearray()
        while (left := count - len(data) // width) > 0:
            part = min(left, STRING_BYTES // width)
            reply = target.ask(StringIn(region, offset, width, part), StringInReply)
            if len(reply.data) != part * width:
                raise AccessRefused(f"{target.node}: {len(reply.data)} bytes for {part} reads of {width}")
            data += reply.data
        return bytes(data)

    def port_out_string(self, port: int, width: int, data: bytes) -> None:
        """`rep outs`: write `data` to the same port, `width` bytes at a time."""
        entry = self._map.find("port", port)
        if entry is None or not entry.range.accepts(port - entry.base, width):
            for at in range(0, len(data), width):
                self.port_write(port, width, int.from_bytes(data[at : at + width], "little"))
            return
        target, region, offset = self._targets[entry.node], entry.range.name, port - entry.base
        for at in range(0, len(data), STRING_BYTES):
            target.ask(StringOut(region, offset, width, data[at : at + STRING_BYTES]), StringOutReply)

    def int_ack(self) -> int | None:
        """INTA cycles at the 8259: the vector, or None when INT has gone low meanwhile: nothing happened."""
        if self._pic is None:
            raise AccessRefused("this machine has no 8259 to acknowledge")
        return self._pic.ask(IntAck(), IntAckReply).vector

    def eoi(self, vector: int) -> None:
        """End of a level-triggered interrupt, to every I/O APIC, after all that was posted."""
        self.flush()
        for target in self._ioapics:
            target.tell(Eoi(vector))

    @property
    def pending(self) -> bool:
        """Whether posted writes wait for flush()."""
        return bool(self._asking.waiting)

    def flush(self) -> None:
        """Send all posted writes. At HLT, and within 2 ms of any write while none follows."""
        self._asking.flush()

    def positions(self) -> Positions:
        """Of the connections to all devices."""
        return {f"{self._name}>{node}": target.positions() for node, target in self._targets.items()}

    def note(self, recorder: Recorder | None, instruction: Instruction) -> None:
        """Note from now on what the accesses lead to, or nothing; see bus/noted_io.py, which notes them."""
        self._asking.recorder, self._asking.instruction = recorder, instruction

    @property
    def nodes(self) -> list[str]:
        """The devices."""
        return list(self._targets)

    def attend(self, node: str) -> bool:
        """A new process is this device: repeat what it has not committed; False until it has asked for it."""
        target = self._targets.get(node)
        return target is None or target.attend()

    def stats(self) -> dict[str, Any]:
        asking = self._asking
        return {
            **asking.counters.to_plain(),
            "synchronous": asking.synchronous,
            "posted": asking.posted,
            "batches": asking.batches,
            "refused": asking.refused,
            "devices": {node: target.stats() for node, target in self._targets.items()},
        }

    def close(self) -> None:
        """Send what is pending and close the sockets."""
        self.flush()
        until_ns = self._asking.now_ns() + CLOSE_NS
        for target in self._targets.values():
            target.close(until_ns)
        if self._context is not None:
            self._context.term()
