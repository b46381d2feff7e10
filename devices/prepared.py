"""What a process of a device can have ready before it is the device: until it takes over, another may be.

Nothing here writes what that one writes (journal, mirror page, bytes in rings), takes its frames or locks its
disks.
"""

from __future__ import annotations

import mmap
import os

from bus import codemap
from bus.codemap import CodeMap
from bus.endpoint import Endpoint
from bus.grants import attach
from bus.mirror import MirrorWriter, page_of, slots
from devices import rehearsal
from devices.dma import GuestRam
from devices.host_config import HostConfig
from devices.journal import Journal
from devices.registry import load_class, make_settings
from devices.ring import ChannelRings
from devices.tryout import try_out

MIRROR_REGION, RAM_REGION = "mirror", "ram"


class Prepared:
    """Of one process. Raises BadDeviceType, BadSettings, GrantRefused, BadJournal, BadRunDir."""

    def __init__(self, config: HostConfig) -> None:
        self._config = config
        self.cls = load_class(config.type)
        self.settings = make_settings(self.cls, config.settings)
        journal = config.fds.get("journal") if config.checkpoints else None
        self.journal = Journal(journal) if journal is not None else None
        self.ram: GuestRam | None = None
        if self.cls.DMA:
            self.ram = GuestRam(self._region(RAM_REGION), CodeMap(self._region(codemap.REGION)))
        self._slots = slots((*self.cls.PORTS, *self.cls.MMIO))
        self._page: memoryview | None = None
        if config.mirror_index is not None and self._slots:
            self._page = page_of(self._region(MIRROR_REGION), config.mirror_index)
        rings = ((name.partition(":"), fd) for name, fd in config.fds.items())
        self.rings = {channel: ChannelRings(fd) for (kind, _, channel), fd in rings if kind == "ring"}
        self._endpoint: Endpoint | None = None

    def rehearse(self) -> None:
        """Do with the present state what is possible beside the process that has it.

        Raises StateMismatch, and whatever the class raises.
        """
        record = self.journal.latest() if self.journal is not None else None
        state = None if record is None else record.device()
        try_out(self._config.type, self.cls, self.settings, self._config.shape, state)
        if record is not None and not self.cls.DMA:
            rehearsal.step(self._config.node, self.cls, self.settings, self._config.irqs, record)
        rehearsal.talk(self._config.run_dir, self._config.node)
        self._endpoint = self._make_endpoint()
        self._endpoint.prepare(self._config.peers())

    def take_endpoint(self) -> Endpoint:
        """Each time another."""
        endpoint, self._endpoint = self._endpoint, None
        return endpoint or self._make_endpoint()

    def mirror_writer(self) -> MirrorWriter | None:
        """A new one, which empties the page; None: the device has no mirror."""
        return MirrorWriter(self._page, self._slots) if self._page is not None else None

    def _make_endpoint(self) -> Endpoint:
        return Endpoint(self._config.run_dir, self._config.node)

    def _region(self, name: str) -> memoryview:
        """One of the memory node's regions, to read and write."""
        fd, size = attach(self._config.run_dir, name, writable=True)
        try:
            return memoryview(mmap.mmap(fd, size))
        finally:
            os.close(fd)
