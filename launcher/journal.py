"""What the launcher tells the user: one line each, on standard error.

While a console is shown, lines go through the console process, which knows whether the terminal is raw.
Reports of the guest's doings that come again and again are told once each.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from bus.frames import Event
from launcher.errors import one_line
from launcher.options import LEVELS

if TYPE_CHECKING:
    from launcher.pump import Pump

LEVEL_OF_KIND = {
    "open-bus": "info",  # every Linux probes for things that aren't there
    "unknown-msr": "info",
    "bad-opcode": "warning",
    "reset": "info",
    "triple-fault": "warning",
    "halted-forever": "warning",
}  # other kinds say it in data["level"], or are "info"
DISTINCT_MAX = 1000  # texts remembered, against repetition


class Journal:
    """Lines of one machine, at or above a level."""

    def __init__(self, machine: str, level: str) -> None:
        self._machine = machine
        self._threshold = LEVELS.index(level)
        self._pump: Pump | None = None
        self._told: set[str] = set()
        self._hidden: Counter[str] = Counter()

    def use_console(self, pump: Pump) -> None:
        """From now on a console is shown on the terminal."""
        self._pump = pump

    def console_ended(self) -> None:
        self._pump = None

    def event(self, node: str, event: Event) -> None:
        """A node's news, unless its level is below ours or it was told before."""
        level = LEVEL_OF_KIND.get(event.kind) or str(event.data.get("level", "info"))
        line = f"{node}: {event.kind}: {one_line(event.text)}"
        if level not in LEVELS or LEVELS.index(level) < self._threshold:
            self._hidden[event.kind] += 1
        elif line not in self._told:
            if len(self._told) < DISTINCT_MAX:
                self._told.add(line)
            self.tell(line)

    def log(self, node: str, log: Path) -> None:
        """All that a process has written into its log, where the level is "info" or below."""
        if LEVELS.index("info") >= self._threshold:
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
                self.tell(f"{node}: {line}")

    def tell(self, text: str) -> None:
        """Every line of `text`, after the machine's name."""
        for line in text.splitlines():
            if self._pump is not None:
                self._pump.say(f"{self._machine}: {line}")
            else:
                print(f"{self._machine}: {line}", file=sys.stderr, flush=True)

    def tell_end(self, line: str) -> None:
        """Why the machine has ended, and what was not told meanwhile."""
        self.tell(line)
        if hidden := self.hidden():
            self.tell(f"not shown at log level {LEVELS[self._threshold]}: {hidden}")

    def hidden(self) -> str:
        """What was not told because of the level, like "12 open-bus, 2 unknown-msr"; "" if nothing."""
        return ", ".join(f"{n} {kind}" for kind, n in sorted(self._hidden.items()))
