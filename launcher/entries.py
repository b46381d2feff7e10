"""The programs that a machine's processes run. Imports nothing of ours: the fork server starts first."""

from __future__ import annotations

import msgspec


class Preload(msgspec.Struct, frozen=True):
    """Modules that processes need: all of them; the one that is forked ahead; the others."""

    shared: tuple[str, ...]
    ahead: str | None = None
    others: tuple[str, ...] = ()


class EntryPoints(msgspec.Struct, frozen=True):
    """What the processes run: "package.module.function", each called with its config."""

    cpu: str = "cpu_node.node.run"
    memory: str = "memory_node.node.run"
    device: str = "devices.host.run"
    rim: str = "devices.rim.run"

    def preload(self) -> Preload:
        """What the fork server imports once for all."""
        entries = (self.cpu, self.memory, self.device, self.rim)
        cpu, memory, device, rim = (entry.rpartition(".")[0] for entry in entries)
        shared = ("zmq", "msgpack", "msgspec", "logging", "bus.endpoint", "bus.mirror", "bus.addressmap",
                  "memory_node.store", "devices.rim")  # fmt: skip
        return Preload(shared, cpu, (memory, device, rim))
