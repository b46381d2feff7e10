"""`launcher stats` on a terminal: what each device and CPU does, once a second, until Ctrl-C."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launcher.errors import EXIT_OK
from launcher.rates import Rows, cpu_lines, device_table

EVERY_S = 1.0


def live(machine: str, gather: Callable[[], Rows], every_s: float | None) -> int:
    """Returns after Ctrl-C. What `gather` raises leaves the terminal as it was."""
    every_s = EVERY_S if every_s is None else every_s
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    began_s, before = time.monotonic(), gather()
    try:
        with Live(console=Console(), auto_refresh=False) as shown:
            while True:
                time.sleep(every_s)
                now_s, now = time.monotonic(), gather()
                shown.update(picture(machine, before, now, now_s - began_s), refresh=True)
                began_s, before = now_s, now
    except KeyboardInterrupt:
        return EXIT_OK


def picture(machine: str, before: Rows, now: Rows, seconds: float) -> Group:
    """What is shown at one moment."""
    header, *rows = device_table(before, now, seconds)
    table = Table(title=f"machine {machine}", title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(header):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        quiet = all(cell == "-" for cell in (row[1], row[5], row[6], row[7], row[11]))
        table.add_row(*row, style="dim" if quiet else "")
    return Group(table, Text("\n".join(["", *cpu_lines(before, now, seconds)])))


def _leave(number: int, stack: Any) -> None:
    raise KeyboardInterrupt
