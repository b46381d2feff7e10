"""What the CPU's thread notes in its trace ring: accesses of devices (bus/noted_io.py), interrupts, EOIs."""

from __future__ import annotations

from collections.abc import Mapping

from bus.addressmap import AddressMap
from bus.io import IoClient
from bus.noted_io import NotedIo
from bus.recorder import ACCEPTED, EOI, attached
from cpu_node.engine import Engine


class CpuNotes:
    """Of one CPU node."""

    def __init__(
        self, node: str, fds: Mapping[str, int], io: IoClient, engine: Engine, address_map: AddressMap
    ) -> None:
        """`fds`: the ring is `trace_io`; without it nothing is ever noted. BadRing."""
        self._engine = engine
        self._recorder = recorder = attached(fds, node, "trace_io")
        self._io = None if recorder is None else NotedIo(io, recorder, address_map, engine.simulator)
        self.look()

    def accepted(self, vector: int, span: int) -> None:
        """The local APIC has taken a message, the frame of this span."""
        if self._io is not None and self._io.is_on and self._recorder is not None:
            self._recorder.short(ACCEPTED, vector, span & 0xFFFF_FFFF)

    def look(self) -> None:
        """Begin or end, as the ring says; between two instructions."""
        recorder, engine = self._recorder, self._engine
        if self._io is None or recorder is None:
            return
        on, simulator = self._io.look(), engine.simulator
        engine.interrupts.recorder = recorder if on else None
        if engine.apic is None:
            return
        if on:
            engine.apic.on_eoi = lambda vector: recorder.short(EOI, vector, simulator.at)
        else:
            engine.apic.on_eoi = lambda vector: None
