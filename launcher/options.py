"""The command line of `launcher up`, parsed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

LEVELS = ("debug", "info", "warning", "error")
DEFAULT_LEVEL = "warning"


@dataclass(frozen=True, slots=True)
class UpOptions:
    """None stands for what the machine file says, or for no limit."""

    file: Path
    name: str | None
    detach: bool
    until: str | None
    timeout_s: float | None
    log_level: str
    on_reset: str | None
    outlive: bool = False
