"""The CPU thread's accesses, noted in a trace ring while recording is on.

While it is off nothing of this is called: `on` puts functions in place of those of an IoClient, `off` takes
them away.
"""

from __future__ import annotations

from bus.addressmap import AddressMap
from bus.io import IoClient
from bus.ranges import Space
from bus.recorder import LONG, MMIO, POSTED, WRITE, Instruction, Recorder

FUNCTIONS = ("port_read", "port_write", "mmio_read", "mmio_write", "port_in_string", "port_out_string")


class _WriteFlags(dict[int, int]):
    """`address << 3 | width` -> flags of a write."""

    def __init__(self, address_map: AddressMap, space: Space) -> None:
        super().__init__()
        self._map, self._space = address_map, space

    def __missing__(self, key: int) -> int:
        address, width = key >> 3, key & 7
        flags = width | WRITE | (MMIO if self._space == "mmio" else 0)
        for byte in range(width):
            entry = self._map.find(self._space, address + byte)
            if entry is not None and address + byte - entry.base in entry.range.posted:
                flags |= POSTED
        if self._space == "port" or flags & POSTED:
            self[key] = flags
        return flags


class NotedIo:
    """Of one IoClient."""

    def __init__(
        self, io: IoClient, recorder: Recorder, address_map: AddressMap, instruction: Instruction
    ) -> None:
        self._io, self._recorder = io, recorder
        self._map, self._instruction = address_map, instruction
        self.is_on = False

    def look(self) -> bool:
        """Do as the ring says; whether recording is on."""
        if self._recorder.look() != self.is_on:
            (self._off if self.is_on else self._on)()
        return self.is_on

    def _on(self) -> None:
        io, recorder, instruction = self._io, self._recorder, self._instruction
        access, fill_in = recorder.access, recorder.value
        port_flags, mmio_flags = _WriteFlags(self._map, "port"), _WriteFlags(self._map, "mmio")
        read_port, write_port, read_mmio, write_mmio, read_string, write_string = (
            getattr(io, name) for name in FUNCTIONS
        )

        def port_read(port: int, width: int) -> int:
            place = access(width, instruction, port, 0)
            value: int = read_port(port, width)
            fill_in(place, value)
            return value

        def port_write(port: int, width: int, value: int) -> None:
            access(port_flags[port << 3 | width], instruction, port, value)
            write_port(port, width, value)

        def mmio_read(pa: int, width: int) -> int:
            place = access(width | MMIO, instruction, pa, 0)
            value: int = read_mmio(pa, width)
            fill_in(place, value)
            return value

        def mmio_write(pa: int, width: int, value: int) -> None:
            access(mmio_flags[pa << 3 | width], instruction, pa, value)
            write_mmio(pa, width, value)

        def port_in_string(port: int, width: int, count: int) -> bytes:
            access(width | LONG, instruction, port, count)
            data: bytes = read_string(port, width, count)
            return data

        def port_out_string(port: int, width: int, data: bytes) -> None:
            access(width | LONG | WRITE, instruction, port, len(data) // width)
            write_string(port, width, data)

        own = (port_read, port_write, mmio_read, mmio_write, port_in_string, port_out_string)
        for name, function in zip(FUNCTIONS, own, strict=True):
            setattr(io, name, function)
        io.note(recorder, instruction)
        self.is_on = True

    def _off(self) -> None:
        for name in FUNCTIONS:
            delattr(self._io, name)
        self._io.note(None, self._instruction)
        self.is_on = False
