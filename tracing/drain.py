"""From rings into a trace file, beside a machine that runs: bytes are copied, nothing is looked at.

What was noted goes to the file a little later, since a step's record is completed when the step is over. Who
is too slow for the machine loses what was overwritten meanwhile; the file says how much (tracing/file.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from bus.recorder import BLOCK
from tracing.file import Writer
from tracing.rings import Ring

SETTLE_NS = 300_000_000  # after this time a record is as it will be
TURN_S = 0.1  # how often a drain should have its turn
PIECE_MIN = BLOCK // 4  # bytes; fewer wait, as small pieces don't compress well


class Drain:
    """Of some rings, from their oldest on. OSError is the caller's, from turn() and finish()."""

    def __init__(self, rings: Sequence[Ring], writer: Writer) -> None:
        self._rings, self._writer = rings, writer
        self._done = [ring.oldest for ring in rings]
        self._tails: deque[tuple[int, list[int]]] = deque()  # when they were seen, positions

    def turn(self, now_ns: int | None = None) -> None:
        """Write what has settled. Call it every TURN_S."""
        now_ns = time.monotonic_ns() if now_ns is None else now_ns
        self._tails.append((now_ns, [ring.tail for ring in self._rings]))
        settled: list[int] | None = None
        while self._tails and self._tails[0][0] <= now_ns - SETTLE_NS:
            settled = self._tails.popleft()[1]
        if settled is None:
            return
        for number, upto in enumerate(settled):
            if upto - self._done[number] >= PIECE_MIN:
                self._write(number, upto)

    def finish(self) -> None:
        """Write the rest, as it is now, and the end of the file."""
        for number, ring in enumerate(self._rings):
            self._write(number, ring.tail)
        self._writer.end()

    def _write(self, number: int, upto: int) -> None:
        for position, data in self._rings[number].pieces(self._done[number], upto):
            self._writer.piece(number, position, data)
        self._done[number] = upto
