"""Steps as lines of text, one each: for `launcher trace --follow`, files, and grep.

    12:31:07.482913  uart0     4f2a1  frame      PostedBatch uart0 THR = 0x41   waited 84 us, took 31 us

Time of day at which the step began; the node; the end of the chain's id, which all steps of one I/O have in
common (`.....` where a step is alone); the kind; what it is; for what took time, how long it waited and took.
A step that was never done says so. Lines are as long as what they tell; nothing is cut.
"""

from __future__ import annotations

import time

from tracing.meta import Meta
from tracing.steps import Step

CHAIN_DIGITS = 5
SHORT_NS = 1_000  # what took less is an instant
# SGR parameters [ECMA-48]: of kinds; of chains, so that one I/O is seen among others
KINDS = {
    "access": "36", "open-bus": "31", "frame": "32", "vector": "35", "eoi": "35", "disk": "33",
    "terminal": "34", "typed": "34", "process": "1;31", "lost": "1;31", "mark": "2",
}  # fmt: skip
CHAINS = ("31", "32", "33", "34", "35", "36", "91", "92", "93", "94", "95", "96")
INSTANTS = ("access", "mark", "eoi", "vector", "output", "terminal", "typed", "process", "lost", "open-bus")


class Lines:
    """Of one trace."""

    def __init__(self, meta: Meta, colour: bool = False) -> None:
        self._offset_ns = meta.realtime_ns - meta.monotonic_ns
        self._colour = colour
        self._second, self._text = -1, ""

    def line(self, step: Step) -> str:
        """Without its end."""
        chain = (
            f"{step.chain & (1 << 4 * CHAIN_DIGITS) - 1:0{CHAIN_DIGITS}x}"
            if step.chain
            else "." * CHAIN_DIGITS
        )
        kind = f"{step.kind:9}"
        if self._colour:
            if step.chain:
                chain = f"\x1b[{CHAINS[step.chain % len(CHAINS)]}m{chain}\x1b[0m"
            if code := KINDS.get(step.kind):
                kind = f"\x1b[{code}m{kind}\x1b[0m"
        name = step.name
        if not name.isprintable():
            name = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in name)
        return f"{self._time(step.begin_ns)}  {step.node:9} {chain}  {kind}  {name}{_took(step)}"

    def _time(self, ns: int) -> str:
        second, rest = divmod(ns + self._offset_ns, 1_000_000_000)
        if second != self._second:
            self._second, self._text = second, time.strftime("%H:%M:%S", time.localtime(second))
        return f"{self._text}.{rest // 1000:06}"


def _took(step: Step) -> str:
    parts = []
    if step.queued_ns and step.begin_ns - step.queued_ns >= SHORT_NS:
        parts.append(f"waited {_duration(step.begin_ns - step.queued_ns)}")
    if not step.end_ns:
        parts.append("not done")
    elif step.end_ns - step.begin_ns >= SHORT_NS and step.kind not in INSTANTS[1:]:
        parts.append(f"took {_duration(step.end_ns - step.begin_ns)}")
    return f"   {', '.join(parts)}" if parts else ""


def _duration(ns: int) -> str:
    return f"{ns / 1e6:.1f} ms" if ns >= 1_000_000 else f"{ns // 1000} us"
