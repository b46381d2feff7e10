"""What a machine is made of beyond its processes, for those who write it down: snapshots.

Imports nothing of ours: every start needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec


class MachineDisk(msgspec.Struct, frozen=True):
    """A disk of a device. `overlay`: where the machine's writes go instead of `path`; None: into the file."""

    node: str
    disk: str
    setting: str  # of the device, that names the file
    path: Path
    read_only: bool
    overlay: Path | None = None


class MachineFacts(msgspec.Struct, frozen=True):
    """The machine file (its name for the machine, its path, its text), the device shown by `up`, disks."""

    name: str
    file: str
    text: str
    console: str | None
    host_cpu: int | Literal["auto", "any"]  # as launcher/config.py has it
    disks: tuple[MachineDisk, ...] = ()
