"""Errors that end a command with one line and a documented exit status.

The exit statuses of `launcher` are all here; `launcher --help` prints this table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

EXIT_OK = 0  # the guest powered off, `--until` was seen, the user left, or `down`
EXIT_INPUT = 2  # bad input: machine file, image, option, host
EXIT_RESET = 3  # the guest reset with on_reset = "stop"
EXIT_TIMEOUT = 4  # `--timeout` passed
EXIT_DIED = 5  # a process of the machine died or did not start
EXIT_OUTPUT = 141  # standard output was closed (128 + SIGPIPE)
EXIT_SIGNAL = 128  # plus the number of the signal that ended the command: 130 for Ctrl-C

EXIT_MEANINGS = {
    "0": "the guest powered off, --until was seen, the user left, or `launcher down`",
    "2": "bad input: machine file, kernel, option, or a host that cannot run it",
    "3": 'the guest reset itself and on_reset is "stop"',
    "4": "--timeout passed",
    "5": "a process of the machine died or did not start",
    "128+n": "ended by signal n (130: Ctrl-C; 141: standard output was closed)",
}


class LauncherError(Exception):
    """An error the user sees as one line; `exit_status` ends the command."""

    exit_status: int = EXIT_INPUT


class ConfigError(LauncherError):
    """Bad input: which file, which key in it, what is wrong, what to do about it.

    `file` is the file the user named (machine file, kernel, initrd, device file, directory),
    `key` is dotted like `boot.kernel`, or "" where the whole file is meant.
    """

    def __init__(self, file: str | Path, key: str, problem: str, remedy: str) -> None:
        self.file, self.key, self.problem, self.remedy = str(file), key, problem, remedy
        where = f"{file}: {key}" if key else str(file)
        super().__init__(one_line(f"{where}: {problem}; {remedy}"))


class MachineDied(LauncherError):
    """A process of the machine ended when it should not have."""

    exit_status = EXIT_DIED


def ending(body: Callable[[], int]) -> int:
    """Run a command's body; a LauncherError becomes its line on standard error and its exit status."""
    try:
        return body()
    except LauncherError as e:
        print(f"launcher: {e}", file=sys.stderr)
        return e.exit_status


def one_line(text: str) -> str:
    """`text` with every run of white space, line ends included, made one blank."""
    return " ".join(text.split())
