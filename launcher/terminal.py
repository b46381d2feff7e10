"""The user's terminal in raw mode, and back.

Source: termios(3), cfmakeraw. A process that is not in the terminal's foreground neither reads it nor
changes it: both would stop the process or take the terminal from the shell.
"""

from __future__ import annotations

import contextlib
import os
import termios

Attributes = list[int | list[bytes | int]]
IFLAG, OFLAG, CFLAG, LFLAG, CC = 0, 1, 2, 3, 6  # places in what tcgetattr returns
SANE = b"\x1b[0m\x1b[?25h"  # attributes off, cursor on: a guest that was cut off may have changed both


class Terminal:
    """The terminal behind one descriptor. `restore` may be called any number of times."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: Attributes = termios.tcgetattr(fd)

    @classmethod
    def of(cls, fd: int) -> Terminal | None:
        """The terminal, or None when fd is something else or we are in its background."""
        if not os.isatty(fd):
            return None
        try:
            in_foreground = os.tcgetpgrp(fd) == os.getpgrp()
        except OSError:  # not our session's terminal (as under `su -c`): no job control to respect
            in_foreground = True
        return cls(fd) if in_foreground else None

    def set_raw(self) -> None:
        """Every key goes through as it is, Ctrl-C too; what was typed before is kept."""
        raw = termios.tcgetattr(self._fd)
        raw[IFLAG] &= ~(
            termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
            | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
        )  # fmt: skip
        raw[OFLAG] &= ~termios.OPOST
        raw[LFLAG] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        raw[CFLAG] = raw[CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        raw[CC][termios.VMIN], raw[CC][termios.VTIME] = 1, 0
        termios.tcsetattr(self._fd, termios.TCSADRAIN, raw)

    def restore(self) -> None:
        """As it was found. Keys not read yet were meant for the guest: the shell must not run them."""
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(self._fd, termios.TCSAFLUSH, self._saved)
