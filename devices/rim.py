"""The process `consoles`: sockets and log lines of all devices of a machine, at the rim of it.

A device process may end at any moment and another go on in its place; who is connected to its console shall
not notice. So the sockets are here; bytes come and go through rings (devices/ring.py) that outlive both.
Output is moved to consoles and logs as it comes, input into the rings while there is room.
This process may end at any moment as well, or be replaced by another: what it must not forget is in the
rings, in what lies behind them, in a table of the clients, in its journal (log lines) and with the launcher
(sockets).
After Shutdown, which comes when the devices have ended, all that is in the rings is delivered first; then
the consoles get their end.
Why it is a process of its own: docs/decisions/060-consoles-outlive-devices.md; how it is replaced:
docs/decisions/067-sends-that-the-kernel-counts.md.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import msgspec

from bus.control import Control
from bus.endpoint import LINGER_MS, Endpoint, Received
from bus.frames import Event, Frame, Ping, Pong, Refused, Shutdown, Stats, StatsReply
from bus.link import BadRunDir, console_path
from bus.recorder import RIM_IN, RIM_OUT, now_ns
from bus.recorder import attached as recorder_of
from devices.backends import log_lines
from devices.consoles import PIECE, Clients, Console, listen
from devices.journal import BadJournal, Journal
from devices.ring import BadRing, ChannelRings, wake, woken

NODE = "consoles"
FLUSH_S = 5.0  # how long an attached console may take for the last bytes
LISTENER = "listener:{node}:{channel}"  # name of a descriptor

log = logging.getLogger(__name__)
Kind = Literal["console", "log", "null"]


class ChannelConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One channel; its descriptors are `ring:<node>:<channel>` and `wake:<node>`."""

    node: str
    channel: str
    kind: Kind
    setting: str = ""  # of the device, that says which kind

    @property
    def key(self) -> str:
        return f"{self.node}:{self.channel}"


class RimConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What the launcher says to this process."""

    run_dir: str
    machine: str
    channels: list[ChannelConfig]
    fds: dict[str, int]  # and `wake_rim`, which devices wake us with; perhaps `control`, `journal`, `clients`
    # (a table), `client:<slot>` and `listener:<node>:<channel>` of earlier processes
    node: str = NODE
    launcher: str = "launcher"
    log_level: str = "warning"
    standby: bool = False  # take over from another process, when told to


class Way(Protocol):
    """Where a channel's bytes go to and come from."""

    moved_out: int  # bytes
    moved_in: int

    def move_out(self) -> int:
        """Take some output; how many bytes."""

    def read_fds(self) -> list[int]: ...

    def write_fds(self) -> list[int]: ...

    def ready(self, readable: set[int], writable: set[int]) -> None: ...

    def close(self, deadline_s: float) -> None:
        """What was taken is delivered; then this is no longer where the bytes go."""

    def release(self) -> None:
        """Another process goes on."""


class _Null:
    """Output vanishes, there is no input."""

    moved_in = 0

    def __init__(self, rings: ChannelRings) -> None:
        self._rings = rings
        self.moved_out = 0
        rings.output.lazy = True
        rings.history.forget_all(rings.output.head)

    def move_out(self) -> int:
        ring = self._rings.output
        count = ring.used()
        ring.head += count
        self._rings.history.skip_to(ring.head)
        self.moved_out += count
        return count

    def read_fds(self) -> list[int]:
        return []

    def write_fds(self) -> list[int]:
        return []

    def ready(self, readable: set[int], writable: set[int]) -> None:
        pass

    def close(self, deadline_s: float) -> None:
        self.move_out()

    def release(self) -> None:
        pass


class _Log(_Null):
    """Lines of output as events for the launcher, each once: `head` is where the first line begins that was
    not said in a committed step."""

    def __init__(self, rings: ChannelRings, key: str, rim: Rim) -> None:
        super().__init__(rings)
        rings.output.lazy = False
        self._key, self._rim = key, rim
        self._looked = -1  # tail of the ring, when it was looked at last
        rings.output.head = max(rings.output.head, rim.positions.get(key, 0))

    def move_out(self) -> int:
        return self._move(False)

    def close(self, deadline_s: float) -> None:
        while self._move(True):
            pass

    def _move(self, ended: bool) -> int:
        ring = self._rings.output
        if ring.tail == self._looked and not ended:
            return 0
        data = ring.peek(PIECE)
        self._looked = ring.head + len(data)
        lines, count = log_lines(data, ended)
        if count:
            head = ring.head + count
            node = self._key.partition(":")[0]
            self._rim.step([Event("log", line, {"node": node}) for line in lines], {self._key: head})
            ring.head = head
            self._rings.history.skip_to(head)
            self.moved_out += count
        return count


class Rim:
    """See the module's docstring."""

    def __init__(self, config: RimConfig, control: Control | None, kept: Mapping[str, int]) -> None:
        """`kept`: sockets of an earlier process, ours from now on."""
        self._config, self._control = config, control
        self._wake = config.fds["wake_rim"]
        self._turns = 0
        self._stopping = self._retiring = False
        self._journal = Journal(config.fds["journal"]) if "journal" in config.fds else None
        record = self._journal.latest() if self._journal is not None else None
        self.positions: dict[str, int] = dict(record.outputs) if record is not None else {}
        self._endpoint = Endpoint(config.run_dir, config.node)
        self._endpoint.recorder = self._recorder = recorder_of(config.fds, config.node)
        self._endpoint.connect(config.launcher)
        if record is not None:
            self._endpoint.load(record.streams)
        self._endpoint.bind()
        kept = dict(kept)
        self._listeners = {name: kept.pop(name) for name in list(kept) if name.startswith("listener:")}
        self._clients = Clients(config.fds.get("clients"), control, kept)
        self._channels = list(config.channels)
        self._rings = [ChannelRings(config.fds[f"ring:{channel.key}"]) for channel in config.channels]
        self._ways = [self._way(number) for number in range(len(config.channels))]
        self._told_in = [0] * len(self._ways)  # bytes of input that the devices were told of
        self._clients.forget_others()

    def run(self) -> bool:
        """Until Shutdown (True), or until another process is to take over (False)."""
        self.step([Event("ready", self._config.node)])
        wake(self._wake)  # the rings may hold something already
        while not self._stopping and not self._retiring:
            self._turn()
        if self._retiring:
            for way in self._ways:
                way.release()
            self._endpoint.close(0 if self._journal is not None else LINGER_MS)
            return False
        while self._move_out():
            pass
        for way in self._ways:
            way.close(FLUSH_S)
        self._endpoint.close()
        return True

    def step(
        self, events: list[Event], positions: Mapping[str, int] | None = None,
        answer: tuple[Received, Frame] | None = None,
    ) -> None:  # fmt: skip
        """Say something, once, whatever process ends: it is committed before it is sent.

        `positions`: what of logs has been said with it, by channel."""
        self._endpoint.hold()
        for event in events:
            self._endpoint.send(self._config.launcher, event)
        if answer is not None:
            self._endpoint.reply(*answer)
        self.positions.update(positions or {})
        if self._journal is not None:
            streams = self._endpoint.to_plain()
            self._journal.commit(("", 0, None, None, streams, self.positions, [], {}, (0, None)))
        self._endpoint.release()

    def _turn(self) -> None:
        self._turns += 1
        ways = self._ways
        own = [self._wake] if self._control is None else [self._wake, self._control.fileno()]
        read_fds = [*own, *(fd for way in ways for fd in way.read_fds())]
        write_fds = [fd for way in ways for fd in way.write_fds()]
        readable, writable = self._endpoint.wait(None, read_fds, write_fds)
        if self._wake in readable:
            woken(self._wake)
            readable.remove(self._wake)
        if self._control is not None and self._control.fileno() in readable:
            self._obey(self._control)
            if self._retiring:
                return
        if readable or writable:
            for way in ways:
                way.ready(readable, writable)
        if self._move_out() > PIECE // 2:
            wake(self._wake)  # there is more, but frames and clients first
        self._tell_devices_of_input()
        for received in self._endpoint.receive():
            self._handle(received)

    def _move_out(self) -> int:
        """Some output of all; how many bytes it was at most of one."""
        most = 0
        for number, way in enumerate(self._ways):
            if count := way.move_out():
                most = max(most, count)
                self._note(RIM_OUT, number, count, self._rings[number].output.head)
                if self._rings[number].output.waiting:
                    wake(self._wake_of(number))
        return most

    def _tell_devices_of_input(self) -> None:
        for number, way in enumerate(self._ways):
            ring = self._rings[number].input
            if full := not ring.room():
                ring.waiting = True
                full = not ring.room()  # or it was emptied before it could see that
            ring.waiting = full
            if way.moved_in != self._told_in[number] or full:
                self._note(RIM_IN, number, way.moved_in - self._told_in[number], ring.tail)
                self._told_in[number] = way.moved_in
                wake(self._wake_of(number))

    def _note(self, kind: int, number: int, count: int, end: int) -> None:
        """So many bytes of a stream have been passed on, up to this position."""
        if self._recorder is not None and count and self._recorder.look():
            self._recorder.long(kind, count, self._channels[number].key, now_ns(), end - count)

    def _handle(self, received: Received) -> None:
        match received.frame:
            case Shutdown():
                self._stopping = True
            case Ping():
                self.step([], answer=(received, Pong()))
            case Stats():
                moved = {
                    "bytes_out": sum(way.moved_out for way in self._ways),
                    "bytes_in": sum(way.moved_in for way in self._ways),
                    "turns": self._turns,
                }
                self.step([], answer=(received, StatsReply({**self._endpoint.stats(), **moved})))
            case frame if received.asked:
                self.step([], answer=(received, Refused(f"{NODE} takes no {type(frame).__name__}")))
            case frame:
                self.step([])
                log.warning("%s answered %s", received.peer, frame)

    def _obey(self, control: Control) -> None:
        record, _ = control.hear()
        match record["op"]:
            case "retire":
                self._retiring = True
            case "channel":
                self._change(msgspec.convert(record["channel"], ChannelConfig))
                control.changed()

    def _change(self, channel: ChannelConfig) -> None:
        """A channel's bytes go somewhere else from now on; what was said before is dealt with as before."""
        keys = [c.key for c in self._channels]
        number = keys.index(channel.key)
        before, self._channels[number] = self._channels[number], channel
        if before.kind == channel.kind:
            return
        while self._ways[number].move_out():
            pass
        self._ways[number].close(FLUSH_S)
        name = LISTENER.format(node=channel.node, channel=channel.channel)
        if before.kind == "console" and self._control is not None:
            self._control.let_go(name)
        self._ways[number] = self._way(number)
        wake(self._wake)

    def _way(self, number: int) -> Way:
        channel, rings = self._channels[number], self._rings[number]
        match channel.kind:
            case "console":
                name = LISTENER.format(node=channel.node, channel=channel.channel)
                if name in self._listeners:
                    listener = socket.socket(fileno=self._listeners.pop(name))
                else:
                    listener = listen(console_path(self._config.run_dir, channel.node))
                    if self._control is not None:
                        self._control.keep(name, listener.fileno())
                return Console(rings, listener, self._clients, number)
            case "log":
                return _Log(rings, channel.key, self)
            case "null":
                return _Null(rings)

    def _wake_of(self, number: int) -> int:
        return self._config.fds[f"wake:{self._channels[number].node}"]


def run(config: dict[str, Any]) -> None:
    """Entry point of the process; ends with SystemExit(0), or 1 when it can't start.

    `config` has the fields of RimConfig; what is wrong with it is one line in the log.
    """
    parsed = msgspec.convert(config, RimConfig)
    logging.basicConfig(level=parsed.log_level.upper(), format=f"{parsed.node}: %(levelname)s: %(message)s")
    control = Control(parsed.fds["control"]) if "control" in parsed.fds else None
    standby = parsed.standby and control is not None
    kept = {name: fd for name, fd in parsed.fds.items() if name.startswith(("client:", "listener:"))}
    try:
        if standby and control is not None:
            for fd in kept.values():  # it gets those of then
                os.close(fd)
            kept = control.stand_by()
        rim = Rim(parsed, control, kept)
        if standby and control is not None:
            control.live()
            control.connected(time.monotonic_ns())
        while not rim.run():
            assert control is not None
            control.retired()
            rim = Rim(parsed, control, control.wait_to_resume())
    except (BadRing, BadRunDir, BadJournal) as error:
        log.error("%s", error)
        if standby and control is not None:
            control.refuse(str(error))
        raise SystemExit(1) from error
    raise SystemExit(0)
