"""The process `consoles`: sockets and log lines of all devices of a machine, at the rim of it.

A device process may end at any moment and another go on in its place; who is connected to its console shall
not notice. So the sockets are here, and bytes come and go through rings (devices/ring.py) that outlive both.
Output is moved to the back ends (devices/backends.py) as it comes, input into the rings while there is room.
After Shutdown, which comes when the devices have ended, all that is in the rings is delivered first; then
the consoles get their end. Started anew, it goes on with what the rings hold; its clients must connect again.
Why it is a process of its own: docs/decisions/060-consoles-outlive-devices.md.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import msgspec

from bus.endpoint import Endpoint, Received
from bus.frames import Event, Ping, Pong, Refused, Shutdown, Stats, StatsReply
from bus.link import BadRunDir, console_path
from devices.backends import SCROLL_BACK, BackEnd, ConsoleBackEnd, LogBackEnd
from devices.ring import BadRing, ChannelRings, wake, woken

NODE = "consoles"
KINDS = ("console", "log")  # of back ends that are here
FLUSH_S = 5.0  # how long an attached console may take for the last bytes
PIECE = 64 << 10  # bytes moved before others have their turn

log = logging.getLogger(__name__)


class ChannelConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One channel; its descriptors are `ring:<node>:<channel>` and `wake:<node>`."""

    node: str
    channel: str
    kind: Literal["console", "log"]


class RimConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What the launcher says to this process."""

    run_dir: str
    machine: str
    channels: list[ChannelConfig]
    fds: dict[str, int]  # and `wake_rim`, which devices wake us with
    node: str = NODE
    launcher: str = "launcher"
    log_level: str = "warning"


@dataclass(slots=True)
class _Way:
    """One channel, from its rings to its back end and back."""

    rings: ChannelRings
    back_end: BackEnd
    wake_device: int
    moved_out: int = 0  # bytes
    moved_in: int = 0

    def move_out(self) -> bool:
        """Some output; whether there is more."""
        ring = self.rings.output
        data = ring.peek(PIECE)
        if data:
            self.back_end.write(data)
            self.moved_out += len(data)
            ring.head += len(data)
            if ring.waiting:
                wake(self.wake_device)
        return ring.used() > 0

    def move_in(self) -> None:
        """All input there is room for."""
        ring, some = self.rings.input, False
        while room := min(ring.room(), ring.size // 4):
            data = self.back_end.take(room)
            if not data:
                break
            ring.put(data)
            self.moved_in += len(data)
            some = True
        ring.waiting = full = ring.room() == 0
        if some or full:
            wake(self.wake_device)


class Rim:
    """See the module's docstring."""

    def __init__(self, config: RimConfig) -> None:
        self._config = config
        self._wake = config.fds["wake_rim"]
        self._turns = 0
        self._stopping = False
        self._endpoint = Endpoint(config.run_dir, config.node)
        self._endpoint.bind()
        self._endpoint.connect(config.launcher)
        self._ways = [self._way(channel) for channel in config.channels]

    def run(self) -> int:
        """Until Shutdown; returns the exit status."""
        self._tell_launcher(Event("ready", self._config.node))
        wake(self._wake)  # the rings may hold something already
        while not self._stopping:
            self._turn()
        while self._move_out():
            pass
        for way in self._ways:
            way.back_end.close(FLUSH_S)
        self._endpoint.close()
        return 0

    def _turn(self) -> None:
        self._turns += 1
        back_ends = [way.back_end for way in self._ways]
        read_fds = [self._wake, *(fd for b in back_ends for fd in b.read_fds())]
        write_fds = [fd for b in back_ends for fd in b.write_fds()]
        readable, writable = self._endpoint.wait(None, read_fds, write_fds)
        if self._wake in readable:
            woken(self._wake)
            readable.remove(self._wake)
        if readable or writable:
            for back_end in back_ends:
                back_end.ready(readable, writable)
        if self._move_out():
            wake(self._wake)  # but frames and clients first
        for way in self._ways:
            way.move_in()
        for received in self._endpoint.receive():
            self._handle(received)

    def _move_out(self) -> bool:
        left = [way.move_out() for way in self._ways]  # all of them, not up to the first
        return any(left)

    def _handle(self, received: Received) -> None:
        match received.frame:
            case Shutdown():
                self._stopping = True
            case Ping():
                self._endpoint.reply(received, Pong())
            case Stats():
                moved = {
                    "bytes_out": sum(way.moved_out for way in self._ways),
                    "bytes_in": sum(way.moved_in for way in self._ways),
                    "turns": self._turns,
                }
                self._endpoint.reply(received, StatsReply({**self._endpoint.stats(), **moved}))
            case frame if received.asked:
                self._endpoint.reply(received, Refused(f"{NODE} takes no {type(frame).__name__}"))
            case frame:
                log.warning("%s answered %s", received.peer, frame)

    def _way(self, channel: ChannelConfig) -> _Way:
        fds = self._config.fds
        rings = ChannelRings(fds[f"ring:{channel.node}:{channel.channel}"])
        back_end: BackEnd
        if channel.kind == "console":
            back_end = ConsoleBackEnd(console_path(self._config.run_dir, channel.node))
            back_end.write(rings.output.back(SCROLL_BACK))
        else:
            back_end = LogBackEnd(partial(self._log_line, channel.node))
        return _Way(rings, back_end, fds[f"wake:{channel.node}"])

    def _log_line(self, node: str, text: str) -> None:
        self._tell_launcher(Event("log", text, {"node": node}))

    def _tell_launcher(self, frame: Event) -> None:
        self._endpoint.send(self._config.launcher, frame)


def run(config: dict[str, Any]) -> None:
    """Entry point of the process; ends with SystemExit(0), or 1 when it can't start.

    `config` has the fields of RimConfig; what is wrong with it is one line in the log.
    """
    parsed = msgspec.convert(config, RimConfig)
    logging.basicConfig(level=parsed.log_level.upper(), format=f"{parsed.node}: %(levelname)s: %(message)s")
    try:
        rim = Rim(parsed)
    except (BadRing, BadRunDir) as error:
        log.error("%s", error)
        raise SystemExit(1) from error
    raise SystemExit(rim.run())
