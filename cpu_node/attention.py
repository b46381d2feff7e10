"""Devices whose processes are new: the CPU thread looks at their sockets until they have been heard.

A new process asks for the frames that its predecessor has not committed; nobody else would hear that while
the guest has nothing to do with the device.
"""

from __future__ import annotations

from bus.io import IoClient

MEET_NS = 60_000_000_000  # for how long the first answer of a device is looked out for
EVERY_NS = 2_000_000  # how often to look at the socket of a device whose process is new,
FOR_NS = 1_000_000_000  # and for how long: it may have been heard before we were told


class Attention:
    """Of one CPU. Times are those of the machine's clock."""

    def __init__(self, io: IoClient, now_ns: int) -> None:
        self._io = io
        self._until = dict.fromkeys(io.nodes, now_ns + MEET_NS)  # devices -> until when

    def __bool__(self) -> bool:
        """Whether there is something to look out for."""
        return bool(self._until)

    def pay(self, node: str, now_ns: int) -> None:
        """A new process of this device has been started."""
        self._until[node] = now_ns + FOR_NS

    def look(self, now_ns: int) -> None:
        for node, until_ns in list(self._until.items()):
            if self._io.attend(node) or now_ns >= until_ns:
                del self._until[node]

    def sooner(self, deadline_ns: int | None, now_ns: int) -> int | None:
        """`deadline_ns`, or when to look again, if that comes first."""
        if not self._until:
            return deadline_ns
        soon_ns = now_ns + EVERY_NS
        return soon_ns if deadline_ns is None else min(deadline_ns, soon_ns)
