"""The command line of `launcher up`, parsed."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from launcher.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")
DEFAULT_LEVEL = "warning"


class UpOptions(msgspec.Struct, frozen=True):
    """None stands for what the machine file says, or for no limit."""

    file: Path
    name: str | None
    detach: bool
    until: str | None
    timeout_s: float | None
    log_level: str
    on_reset: str | None
    outlive: bool = False
    trace: Path | None = None  # a file for all that is noted


def check_writable(file: Path) -> None:
    """ConfigError if a file can't be written there."""
    folder = file.absolute().parent
    new = not file.exists()
    if file.is_dir() or not (os.access(folder, os.W_OK | os.X_OK) if new else os.access(file, os.W_OK)):
        raise ConfigError(file, "", "cannot be written", "name a file in a folder of yours")
