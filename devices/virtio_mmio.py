"""A virtio device on memory-mapped registers: features, queues, status, interrupts.

Reference: Virtual I/O Device (VIRTIO) Version 1.2, sections 2.1 to 2.4, 3.1 and 4.2. A class for one kind of
device derives from VirtioMmio; see virtio_blk.py.
A driver that breaks a rule gets DEVICE_NEEDS_RESET and the launcher a "log" event; after a reset all is well.

Interrupts. A step's used elements are in memory before its line rises, but what the driver says of interrupts
(virtqueue.wants_interrupts) is read before that. So "none" is not believed: an interrupt is *owed*, and what
the driver says is read once more in a later step, a timer's. InterruptACK is posted: what is used between the
driver's look at the queue and the arrival of the ACK is owed, too, as the line has not risen for it.

Left out: the legacy interface, shared memory regions, VIRTIO_F_RING_RESET, writable configuration space.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from devices.base import BadDma, Device, DeviceState, MirrorValue, MmioRange
from devices.virtqueue import BadRing, QueueState, Virtqueue

MAGIC, VERSION, VENDOR = 0x74726976, 2, 0x4C504B42  # "virt"; "BKPL"
CONFIG, LENGTH = 0x100, 0x200

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8  # status [2.1]
NEEDS_RESET, FAILED = 64, 128
USED_BUFFER, CONFIG_CHANGE = 1, 2  # interrupt status [4.2.2]
F_INDIRECT_DESC, F_VERSION_1 = 1 << 28, 1 << 32  # [6]

DEVICE_FEATURES_SEL, DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x14, 0x20, 0x24  # [4.2.2]
QUEUE_SEL, QUEUE_NUM, QUEUE_READY, QUEUE_NOTIFY = 0x30, 0x38, 0x44, 0x50
INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x60, 0x64, 0x70
QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE = 0x80, 0x90, 0xA0  # low half; the high one is 4 above
QUEUE_PARTS = {QUEUE_DESC: "desc", QUEUE_DRIVER: "driver", QUEUE_DEVICE: "device"}
SHM_LENGTH, SHM_END = 0xB0, 0xC0

_NAMES = {  # [4.2.2]
    0x00: "MagicValue", 0x04: "Version", 0x08: "DeviceID", 0x0C: "VendorID", 0x10: "DeviceFeatures",
    DEVICE_FEATURES_SEL: "DeviceFeaturesSel", DRIVER_FEATURES: "DriverFeatures",
    DRIVER_FEATURES_SEL: "DriverFeaturesSel", QUEUE_SEL: "QueueSel", 0x34: "QueueNumMax",
    QUEUE_NUM: "QueueNum", QUEUE_READY: "QueueReady", QUEUE_NOTIFY: "QueueNotify",
    INTERRUPT_STATUS: "InterruptStatus", INTERRUPT_ACK: "InterruptACK", STATUS: "Status",
    QUEUE_DESC: "QueueDescLow", QUEUE_DESC + 4: "QueueDescHigh", QUEUE_DRIVER: "QueueDriverLow",
    QUEUE_DRIVER + 4: "QueueDriverHigh", QUEUE_DEVICE: "QueueDeviceLow", QUEUE_DEVICE + 4: "QueueDeviceHigh",
    0xAC: "SHMSel", SHM_LENGTH: "SHMLenLow", SHM_LENGTH + 4: "SHMLenHigh", 0xB8: "SHMBaseLow",
    0xBC: "SHMBaseHigh", 0xC0: "QueueReset", 0xFC: "ConfigGeneration", CONFIG: "Config",
}  # fmt: skip
_SETUP = (DEVICE_FEATURES_SEL, DRIVER_FEATURES, DRIVER_FEATURES_SEL, QUEUE_SEL, QUEUE_NUM,
          *(part + half for part in QUEUE_PARTS for half in (0, 4)))  # fmt: skip


def registers(posted_notify: bool) -> MmioRange:
    """The one region. STATUS and QUEUE_READY are synchronous: who stops a queue has its memory back."""
    notify = frozenset({QUEUE_NOTIFY} if posted_notify else ())
    return MmioRange(
        "regs",
        LENGTH,
        widths=(1, 2, 4),
        posted=notify | {*_SETUP, INTERRUPT_ACK},
        prompt=notify,
        mirrored=frozenset(range(INTERRUPT_STATUS, INTERRUPT_STATUS + 4)),
        names=_NAMES,
    )


@dataclass(slots=True)
class VirtioState(DeviceState):
    status: int = 0
    device_features_sel: int = 0
    driver_features_sel: int = 0
    driver_features: int = 0
    queue_sel: int = 0
    interrupts: int = 0
    owed: list[int] = field(default_factory=list)  # queues with used elements that no interrupt has announced
    generation: int = 0
    queues: list[QueueState] = field(default_factory=list)


S = TypeVar("S", bound=VirtioState)


class VirtioMmio(Device[S]):
    """The transport. `QUEUES`: the greatest size of each queue."""

    IRQS = ("intr",)
    DMA = True
    DEVICE_ID: ClassVar[int]  # [5]
    QUEUES: ClassVar[tuple[int, ...]]

    def features(self) -> int:
        """The device's own feature bits (0 to 23)."""
        return 0

    def config(self) -> bytes:
        """The device's configuration space, as it is."""
        return b""

    @abstractmethod
    def notified(self, queue: int) -> None:
        """The driver has made buffers available in a queue that is ready. May raise BadRing and BadDma."""

    def fresh_state(self) -> S:
        """The state after a reset."""
        state: S = self.STATE()  # type: ignore[assignment]
        state.queues = [QueueState() for _ in self.QUEUES]
        return state

    def reset(self) -> None:
        self.state = self.fresh_state()
        self.drive_lines()

    def drive_lines(self) -> None:
        s = self.state
        self.wiring.set_irq("intr", s.interrupts != 0)
        self.wiring.set_timer("owed", 0 if s.owed and not s.interrupts & USED_BUFFER else None)

    def mirror(self) -> Mapping[tuple[str, int], MirrorValue]:
        values: dict[tuple[str, int], MirrorValue] = {("regs", INTERRUPT_STATUS + n): 0 for n in (1, 2, 3)}
        values["regs", INTERRUPT_STATUS] = self.state.interrupts
        return values

    def timer(self, name: str) -> None:
        """Raise the interrupt that is owed, if the driver wants it: what it announces is in memory by now."""
        s = self.state
        owed, s.owed = s.owed, []
        with self.judged():
            if any(self.queue(number).wants_interrupts() for number in owed if s.queues[number].ready):
                s.interrupts |= USED_BUFFER
        self.drive_lines()

    # --- for the devices

    def queue(self, number: int) -> Virtqueue:
        s = self.state
        return Virtqueue(self.wiring, s.queues[number], bool(s.driver_features & F_INDIRECT_DESC))

    def running(self) -> bool:
        return bool(self.state.status & DRIVER_OK) and not self.state.status & NEEDS_RESET

    def used(self, queue: int) -> None:
        """Elements were pushed to the queue in this step: announce them."""
        s = self.state
        if s.interrupts & USED_BUFFER or not self.queue(queue).wants_interrupts():
            if queue not in s.owed:
                s.owed.append(queue)
        else:
            s.interrupts |= USED_BUFFER

    @contextmanager
    def judged(self) -> Iterator[None]:
        """What the driver has done wrong in its rings breaks the device, not its process."""
        try:
            yield
        except (BadRing, BadDma) as error:
            self._broken(error)

    def _broken(self, error: Exception) -> None:
        """Nothing more is done until the driver resets the device [2.1.2]."""
        s = self.state
        self.wiring.event("log", f"{self.NAME}: {error}: the device waits for a reset by its driver")
        if s.status & DRIVER_OK:
            s.interrupts |= CONFIG_CHANGE
        s.status |= NEEDS_RESET
        s.owed.clear()

    def config_changed(self) -> None:
        """Configuration space has other values now [2.5.1]."""
        s = self.state
        s.generation = s.generation + 1 & 0xFFFFFFFF
        if s.status & DRIVER_OK:
            s.interrupts |= CONFIG_CHANGE

    # --- registers

    def read(self, region: str, offset: int, width: int) -> int:
        if offset >= CONFIG:
            config = self.config().ljust(LENGTH - CONFIG, b"\0")
            return int.from_bytes(config[offset - CONFIG : offset - CONFIG + width], "little")
        return self._register(offset & ~3) >> 8 * (offset & 3) & (1 << 8 * width) - 1

    def _register(self, offset: int) -> int:
        s = self.state
        queue = s.queues[s.queue_sel] if s.queue_sel < len(s.queues) else None
        match offset:
            case 0x00:
                return MAGIC
            case 0x04:
                return VERSION
            case 0x08:
                return self.DEVICE_ID
            case 0x0C:
                return VENDOR
            case 0x10:
                return self._offered() >> 32 * min(s.device_features_sel, 2) & 0xFFFFFFFF
            case 0x34:
                return self.QUEUES[s.queue_sel] if queue is not None else 0
            case 0x44:
                return int(queue is not None and queue.ready)
            case 0x60:
                return s.interrupts
            case 0x70:
                return s.status
            case 0xFC:
                return s.generation
            case _ if SHM_LENGTH <= offset < SHM_END:
                return 0xFFFFFFFF  # there is no such region [4.2.2]
            case _:
                return 0

    def write(self, region: str, offset: int, width: int, value: int) -> None:
        if width != 4 or offset >= CONFIG:
            return  # [4.2.2.2]: the driver must not
        s = self.state
        match offset:
            case 0x14:
                s.device_features_sel = value
            case 0x20:
                if s.driver_features_sel < 2 and not s.status & FEATURES_OK:
                    shift = 32 * s.driver_features_sel
                    s.driver_features = s.driver_features & ~(0xFFFFFFFF << shift) | value << shift
            case 0x24:
                s.driver_features_sel = value
            case 0x30:
                s.queue_sel = value
            case 0x50:
                self._notify(value)
            case 0x64:
                s.interrupts &= ~value
            case 0x70:
                self._set_status(value)
            case _ if s.queue_sel < len(s.queues):
                self._set_queue(offset, value, s.queues[s.queue_sel])
        self.drive_lines()

    def _offered(self) -> int:
        return self.features() | F_INDIRECT_DESC | F_VERSION_1

    def _set_status(self, value: int) -> None:
        s = self.state
        if value == 0:
            self.reset()
            return
        if value & FEATURES_OK and not s.status & FEATURES_OK:
            fits = s.driver_features & F_VERSION_1 and not s.driver_features & ~self._offered()
            if not fits:
                value &= ~FEATURES_OK  # the driver looks [3.1.1]
        s.status = value & 0xFF | s.status & NEEDS_RESET

    def _set_queue(self, offset: int, value: int, queue: QueueState) -> None:
        if offset == QUEUE_READY:
            size, greatest = queue.size, self.QUEUES[self.state.queue_sel]
            if value & 1 and (not 0 < size <= greatest or size & size - 1):
                self._broken(BadRing(f"a queue of {size} descriptors"))
                return
            queue.ready = bool(value & 1)
            if not queue.ready:
                queue.next_avail = queue.next_used = 0
        elif queue.ready:
            return  # [4.2.2.2]: the driver must not
        elif offset == QUEUE_NUM:
            queue.size = value
        elif offset & ~4 in QUEUE_PARTS:
            name, shift = QUEUE_PARTS[offset & ~4], 8 * (offset & 4)
            setattr(queue, name, getattr(queue, name) & ~(0xFFFFFFFF << shift) | value << shift)

    def _notify(self, queue: int) -> None:
        if self.running() and queue < len(self.QUEUES) and self.state.queues[queue].ready:
            with self.judged():
                self.notified(queue)
