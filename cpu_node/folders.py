"""Folders and files of machine code: they must be the user's, and nobody else's to write to."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class Refused(Exception):
    """A folder or file that cannot be trusted or understood; the text says why."""


def open_folder(folder: Path, parent: int | None, make: bool = True) -> int:
    """A descriptor of the folder, made if need be, that is the user's alone to write to. OSError, Refused."""
    if make:
        with contextlib.suppress(FileExistsError):
            if parent is None:
                folder.parent.mkdir(parents=True, exist_ok=True)
            os.mkdir(folder, 0o700, dir_fd=parent)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        check_owner(os.fstat(fd), str(folder))
    except Refused:
        os.close(fd)
        raise
    return fd


def check_owner(status: os.stat_result, name: str) -> None:
    if status.st_uid != os.geteuid():
        raise Refused(f"{name} belongs to another user")
    if status.st_mode & 0o022:
        raise Refused(f"{name} can be written by others")
