"""virtio console: one port, a byte stream each way.

Reference: Virtual I/O Device (VIRTIO) Version 1.2, section 5.3; transport and queues are virtio_mmio.py's.
QueueNotify is synchronous: Linux waits in a loop for the used element of what it has sent.
Left out: several ports (VIRTIO_CONSOLE_F_MULTIPORT) and with them the control queues, the window's size,
emergency write.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from devices.base import BadDma, Channel
from devices.virtio_mmio import VirtioMmio, VirtioState, registers
from devices.virtqueue import BadRing, gather, scatter

RECEIVE, TRANSMIT = 0, 1  # [5.3.2]
QUEUE_SIZE = 64


@dataclass(frozen=True, slots=True)
class VirtioConsoleSettings:
    backend: Literal["console", "log", "null"] = "console"


@dataclass(slots=True)
class VirtioConsoleState(VirtioState):
    pass


class VirtioConsole(VirtioMmio[VirtioConsoleState]):
    NAME = "virtio_console"
    MMIO = (registers(posted_notify=False),)
    CHANNELS = (Channel("out", "in"),)
    SETTINGS = VirtioConsoleSettings
    STATE = VirtioConsoleState
    DEVICE_ID = 3
    QUEUES = (QUEUE_SIZE, QUEUE_SIZE)

    def notified(self, queue: int) -> None:
        rings = self.queue(queue)
        if queue == RECEIVE:
            sum(self._rooms())  # BadRing here, where it can be told
            return
        sent = False
        for chain in rings.chains():
            self.wiring.send("out", gather(self.wiring, chain.readable))
            rings.push(chain.head, 0)
            sent = True
        if sent:
            self.used(queue)

    def room(self, channel: str) -> int:
        try:
            return sum(self._rooms())
        except (BadRing, BadDma):
            return 0

    def receive(self, channel: str, data: bytes) -> None:
        rings = self.queue(RECEIVE)
        with self.judged():
            for chain in rings.chains():
                taken = scatter(self.wiring, chain.writable, data)
                rings.push(chain.head, taken)
                data = data[taken:]
                if not data:
                    break
            self.used(RECEIVE)
        self.drive_lines()

    def _rooms(self) -> Iterator[int]:
        if self.running():
            for chain in self.queue(RECEIVE).chains(take=False):
                yield chain.room
