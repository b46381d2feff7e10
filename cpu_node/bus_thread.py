"""The CPU node's second thread: what comes in unasked is received here, queued, and announced by SIGALRM.

The CPU thread takes frames from `inbox` and gives its own to `send` and `answer`; neither waits for the
other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from bus.endpoint import Endpoint, Received
from bus.frames import Frame, PauseReply, Ping, Pong, Stats
from bus.recorder import Recorder

log = logging.getLogger(__name__)


class BusThread:
    """Made by the CPU thread, which blocks SIGALRM first: threads inherit that."""

    def __init__(
        self, run_dir: str, node: str, launcher: str, waits: Callable[[], bool], recorder: Recorder | None
    ) -> None:
        """`waits`: whether the CPU thread is, or will be, in `wait_for_news`."""
        self.inbox: deque[Received] = deque()
        self.stats: dict[str, Any] = {}  # of the endpoint, when Stats was asked for last
        self._outbox: deque[tuple[Received | None, Frame]] = deque()
        self._run_dir, self._node, self._launcher, self._waits = run_dir, node, launcher, waits
        self._to_bus = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._to_cpu = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._recorder = recorder
        self._closing = False
        self._ready = threading.Event()
        self._cpu_thread = threading.get_ident()
        self._thread = threading.Thread(target=self._serve, name="bus", daemon=True)

    # ---- the CPU's thread

    def start(self) -> None:
        """Returns when the node can be reached."""
        self._thread.start()
        self._ready.wait()

    def send(self, frame: Frame) -> None:
        """To the launcher."""
        self._outbox.append((None, frame))
        os.eventfd_write(self._to_bus, 1)

    def answer(self, received: Received, frame: Frame) -> None:
        self._outbox.append((received, frame))
        os.eventfd_write(self._to_bus, 1)

    def wait_for_news(self, timeout_s: float | None) -> None:
        """Until something is in the inbox, or may be; None: no limit, 0 or less: don't wait."""
        if timeout_s is None or timeout_s > 0:
            select.select([self._to_cpu], [], [], timeout_s)

    def forget_news(self) -> None:
        """Before the inbox is emptied."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._to_cpu)

    def close(self, timeout_s: float) -> None:
        """Let everything said so far leave this process."""
        self._closing = True
        os.eventfd_write(self._to_bus, 1)
        self._thread.join(timeout_s)

    # ---- the bus thread

    def _serve(self) -> None:
        try:
            with Endpoint(self._run_dir, self._node) as endpoint:
                endpoint.recorder = self._recorder
                endpoint.bind()
                endpoint.connect(self._launcher)
                self._ready.set()
                while not self._closing:
                    self._turn(endpoint)
        except Exception:
            log.critical("bus thread: %s", traceback.format_exc())
            os._exit(1)

    def _turn(self, endpoint: Endpoint) -> None:
        endpoint.wait(None, [self._to_bus])
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._to_bus)
        if self._recorder is not None:
            self._recorder.look()
        news = False
        for received in endpoint.receive():
            if isinstance(received.frame, Ping):
                endpoint.reply(received, Pong())
                continue
            if isinstance(received.frame, Stats):
                self.stats = endpoint.stats()
            self.inbox.append(received)
            news = True
        if news:
            if self._waits():
                os.eventfd_write(self._to_cpu, 1)
            signal.pthread_kill(self._cpu_thread, signal.SIGALRM)
        while self._outbox:
            to, frame = self._outbox.popleft()
            if isinstance(frame, PauseReply):  # what has come here is taken before any later Save
                frame = PauseReply(frame.clock_ns, {**frame.frames, **endpoint.positions()})
            if to is None:
                endpoint.send(self._launcher, frame)
            else:
                endpoint.reply(to, frame)
