"""IoClient: how the CPU thread reaches ports, memory-mapped registers and interrupt controllers.

One thread only: the sockets are its own, apart from those of the node's bus thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bus.addressmap import AddressMap
from bus.ranges import Space

OnOpenBus = Callable[[Space, int, int, bool, int], None]  # space, address, width, is_write, value
OnLate = Callable[[str, str, int], None]  # node, what was asked, time waited in ns


class DeviceGone(RuntimeError):
    """A device has not answered within the deadline."""


class AccessRefused(RuntimeError):
    """A device answered an access with Refused."""


class IoClient:
    def __init__(
        self,
        run_dir: Path,
        node: str,
        address_map: AddressMap,
        mirror: memoryview | None,
        now_ns: Callable[[], int],
        on_open_bus: OnOpenBus,
        *,
        pic: str | None,
        ioapics: Sequence[str],
        deadline_ns: int = 10_000_000_000,
        on_late: OnLate | None = None,
    ) -> None:
        """`node` is the CPU node's name; the sockets' identity is `<node>.io`. `mirror` is the whole region
        "mirror". After each deadline without an answer on_late is called and the wait goes on; without
        on_late DeviceGone is raised."""
        raise NotImplementedError

    def port_read(self, port: int, width: int) -> int:
        raise NotImplementedError

    def port_write(self, port: int, width: int, value: int) -> None:
        raise NotImplementedError

    def mmio_read(self, pa: int, width: int) -> int:
        raise NotImplementedError

    def mmio_write(self, pa: int, width: int, value: int) -> None:
        raise NotImplementedError

    def owns_mmio(self, pa: int) -> bool:
        raise NotImplementedError

    def port_in_string(self, port: int, width: int, count: int) -> bytes:
        raise NotImplementedError

    def port_out_string(self, port: int, width: int, data: bytes) -> None:
        raise NotImplementedError

    def int_ack(self) -> int | None:
        """INTA cycles at the 8259: the vector, or None when INT has gone low meanwhile (nothing happened)."""
        raise NotImplementedError

    def eoi(self, vector: int) -> None:
        """End of a level-triggered interrupt, to every I/O APIC."""
        raise NotImplementedError

    def flush(self) -> None:
        """Send all posted writes. At HLT, and at least every 2 ms while any are pending."""
        raise NotImplementedError

    @property
    def pending(self) -> bool:
        """Whether posted writes wait for flush()."""
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        raise NotImplementedError
