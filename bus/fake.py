"""A Link without sockets, for tests: what is sent is decoded and served at once, in the same thread.

`devices/fake.py` puts whole machines together with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from bus.codec import BadFrame
from bus.counters import Counters
from bus.frames import Frame, Refused
from bus.stream import Stream

Serve = Callable[[Frame], Frame | None]


class LocalLink:
    """Frames go through the codec and the sequence check, as on the wire. `sent` keeps them all."""

    def __init__(self, serve: Serve, now_ns: Callable[[], int]) -> None:
        self._serve = serve
        self._stream = Stream(Counters(), now_ns)
        self._answers: deque[bytes] = deque((self._stream.resume(),))
        self.sent: list[Frame] = []

    def send(self, data: bytes) -> None:
        try:
            decoded = self._stream.decode(data)
        except BadFrame as error:
            self._answer(Refused(str(error)), 0, 0)
            return
        if isinstance(decoded, tuple):
            header, frame = decoded
            self.sent.append(frame)
            answer = self._serve(frame)
            if answer is not None:
                self._answer(answer, header.trace, header.span)
        acknowledgement = self._stream.acknowledgement()
        if acknowledgement is not None:
            self._answers.append(acknowledgement)

    def _answer(self, frame: Frame, trace: int, span: int) -> None:
        data = self._stream.encode(frame, trace, span)
        assert data is not None  # answers never fill the window: each request acknowledges the last
        self._answers.append(data)

    def receive(self, timeout_ms: int) -> bytes | None:
        return self._answers.popleft() if self._answers else None

    def close(self) -> None:
        self._answers.clear()
