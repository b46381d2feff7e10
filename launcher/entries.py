"""The programs that a machine's processes run. Imports nothing: the fork server starts before all else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EntryPoints:
    """What the processes run: "package.module.function", each called with its config."""

    cpu: str = "cpu_node.node.run"
    memory: str = "memory_node.node.run"
    device: str = "devices.host.run"

    def preload(self) -> list[str]:
        """Modules that the fork server imports once for all."""
        entries = [entry.rpartition(".")[0] for entry in (self.cpu, self.memory, self.device)]
        return ["zmq", "msgpack", "msgspec", "capstone", *entries]
