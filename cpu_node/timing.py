"""Where the CPU thread's time goes, measured when wanted: `launcher stats --timing on`, `make profile`.

A clock stands in one activity at a time. What is measured is wrapped at run time and unwrapped again, so it
costs nothing when off; on, an exit costs about a microsecond more. Time belongs to the innermost activity: a
page that is mapped for a fill counts as mapping. Switching on and off takes effect when Engine.run begins
anew, for it keeps `enter` in a local variable.
Left out: what generated code does without leaving; that is all "guest".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bus.asking import Target
from cpu_node import engine as engine_module
from cpu_node import gates
from cpu_node import host_unsafe as host
from cpu_node import layout as at

if TYPE_CHECKING:
    from cpu_node.dispatch import Table
    from cpu_node.engine import Engine

GUEST, LOOP, TRANSLATE, IDLE, BUS, MAP = "guest", "loop", "translate", "idle", "bus", "map"


class Clock:
    """Exclusive nanoseconds and counts by activity."""

    def __init__(self, now_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self.now_ns = now_ns
        self.current = LOOP
        self.totals: dict[str, list[int]] = {LOOP: [0, 0]}  # activity -> [count, ns]
        self._since = self.began_ns = now_ns()

    def switch(self, activity: str, counts: bool = True) -> str:
        """Begin an activity; the one that it interrupts. `counts` is False on the way back."""
        now = self.now_ns()
        previous = self.current
        self.totals[previous][1] += now - self._since
        self._since = now
        self.current = activity
        total = self.totals.get(activity)
        if total is None:
            total = self.totals[activity] = [0, 0]
        total[0] += counts
        return previous

    def wrapped(self, activity: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted as `activity`."""
        switch = self.switch

        def timed(*args: Any, **kwargs: Any) -> Any:
            before = switch(activity)
            try:
                return function(*args, **kwargs)
            finally:
                switch(before, False)

        return timed

    def to_plain(self) -> dict[str, Any]:
        """Total ns since it was started, and [count, ns] by activity."""
        self.switch(self.current, False)
        rows = {name: list(total) for name, total in self.totals.items() if total[1]}
        return {"total_ns": self._since - self.began_ns, "activities": rows}


class Timing:
    """Wraps an engine's parts; `stop` puts everything back."""

    def __init__(self, engine: Engine, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self._engine = engine
        self._undo: list[Callable[[], None]] = []
        self._put(engine.record, "enter", self._timed_enter(engine.record.enter))
        contexts = engine.contexts
        parts: list[tuple[Any, str, str]] = [
            (contexts.cache, "translate", TRANSLATE),
            (contexts, "fill", "fill a window"),
            (contexts, "flush", "flush and compare"),
            (contexts, "invlpg", "invlpg"),
            (engine.interrupts, "take_in", "events, interrupts"),
            (engine, "interpreted", "simulate, stepping"),
            (engine.platform, "idle", IDLE),
            (gates, "deliver", "deliver an exception"),
            (engine_module, "roll_back", "roll back"),
            (host, "map_file", MAP),
            (host, "protect", MAP),
            (host, "reserve", MAP),
            (Target, "ask", BUS),
        ]
        if engine.direct is not None:
            parts.append((engine.direct, "run", "direct: the node"))
            parts.append((engine.direct, "_wait", "direct: user code"))
        for owner, name, activity in parts:
            self._put(owner, name, self.clock.wrapped(activity, getattr(owner, name)))

    def stop(self) -> None:
        """Undo all wrapping."""
        while self._undo:
            self._undo.pop()()

    def _put(self, owner: Any, name: str, value: object) -> None:
        mine, old = name in vars(owner), getattr(owner, name)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, old) if mine else delattr(owner, name))

    def _timed_enter(self, enter: Callable[[], None]) -> Callable[[], None]:
        """Generated code as GUEST; from its return on, what the exit is for."""
        switch, d = self.clock.switch, self._engine.record.d
        reason_at, simulate = at.REASON // 4, at.EXIT_SIMULATE
        exits = [f"exit: {name}" for name in at.EXIT_NAMES]

        def timed() -> None:
            switch(GUEST)
            enter()
            reason = d[reason_at]
            switch(self._simulated() if reason == simulate else exits[reason])

        return timed

    def _simulated(self) -> str:
        eip = self._engine.record.d[at.EIP // 4]
        line = self._table().lines.get(eip >> 12)
        known = line.simulated.get(eip & 0xFFF) if line is not None else None
        return f"simulate: {known[1].row.mnemonic}" if known is not None else "simulate: first time"

    def _table(self) -> Table:
        """The dispatch table in use; contexts hear of a change of privilege later."""
        contexts, ha = self._engine.contexts, self._engine.record.q[at.TABLE // 8]
        if contexts.table.ha == ha:
            return contexts.table
        return next((table for table in contexts.all_tables() if table.ha == ha), contexts.table)
