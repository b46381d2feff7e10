"""What a channel's console has said: bytes by their position in all that it ever said, in a sparse file.

It lies in the memfd of the channel's rings (devices/ring.py) and outlives the process that writes it, so that
each client of the console can be sent what it has not got yet, by whatever process. What no client needs any
more is taken away but for the scroll-back; the rest of the file takes no memory.
"""

from __future__ import annotations

import os

from devices.counted_unsafe import punch

PAGE = 4096
FORGET_AT_ONCE = 256 << 10  # bytes


class History:
    """`start`: from which position on bytes are kept. The end is its user's to know."""

    def __init__(self, fd: int, offset: int, word: memoryview) -> None:
        """`offset`: in the file, of position 0. `word`: 8 bytes that outlive us, for `start`."""
        self._fd, self._offset = fd, offset
        self._start = word.cast("Q")

    @property
    def start(self) -> int:
        return self._start[0]

    def write(self, position: int, data: bytes) -> None:
        """May be done again."""
        view, at = memoryview(data), self._offset + position
        while view:
            done = os.pwrite(self._fd, view, at)
            view, at = view[done:], at + done

    def read(self, position: int, most: int) -> bytes:
        """Bytes from a position on, which must have been written."""
        return os.pread(self._fd, most, self._offset + position)

    def forget(self, position: int) -> None:
        """Nothing before this is needed any more: its memory is given back now and then."""
        before = self.start
        if position - before >= FORGET_AT_ONCE:
            self._start[0] = position
            punch(self._fd, (self._offset + before) // PAGE * PAGE, (self._offset + position) // PAGE * PAGE)

    def skip_to(self, position: int) -> None:
        """What comes before was not written."""
        self._start[0] = position

    def forget_all(self, position: int) -> None:
        """Keep nothing that comes before."""
        self._start[0] = position
        if end := (self._offset + position) // PAGE * PAGE - self._offset:
            punch(self._fd, self._offset, self._offset + end)
