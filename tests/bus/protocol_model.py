"""The nodes of the model that tests/bus/test_protocol.py explores: bus/stream.py's own Stream in each, around
it as little as is needed of an Endpoint (the same answers to a connection, to Resume, to a gap) and of a
device's host (step, journal, effects).

    cpu --link 0--> dev --link 1--> pic --link 2--> cpu        (who connects --> who is bound)

The CPU sends frames 1, 2, 3, ... to the device; for each the device does what the scenario's letter says:

    p  nothing but the step          d  a DMA write, then a Line to the pic
    D  two DMA writes, then a Line   a  a DMA write, then an answer, for which the CPU waits
    o  a byte of output              i  disk I/O, whose completion is a step of its own: a DMA write, a Line
    r  a frame back, unasked         R  two of them
    q  nothing that can be seen: the step is put off, and committed with a later one or when it likes
    m  as d, but the pic puts off that Line, which makes no interrupt

The CPU has no journal. Where a scenario says so it ends, too: another begins anew under its name, and sends
what is left of the program. With `cpu_bound` the device connects to it.

The pic is a device, too, and makes an interrupt frame for the CPU of each Line. What a step puts out is
stamped with the number of the process that ran it: a device is not deterministic, and what an uncommitted
step would have put out must never be seen.

Left out: Stream's BadFrame; the poison count; the mirror page (written anew from the state, in full).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

from bus.counters import Counters
from bus.frames import Eoi, Frame
from bus.stream import Need, Stream

LINKS = (("cpu", "dev"), ("dev", "pic"), ("pic", "cpu"))  # who connects, who is bound
CPU_BOUND = (("dev", "cpu"), *LINKS[1:])
LIFE = 42  # a CPU sends fewer frames: the base of the next one is so much higher
NODES = ("cpu", "dev", "pic")
STAMP = 10  # bits for the number of the process
PROBE = b""  # what a ROUTER gets first on a connection

Op = tuple[Any, ...]
Frozen = tuple[Any, ...]


class Violation(Exception):
    """An invariant does not hold."""


class Scenario(NamedTuple):
    """What is explored. `crashes` to `renewals`: how many of each may happen."""

    program: str  # a letter for each frame of the CPU
    window: int = 3
    ack_every: int = 2
    crashes: int = 0
    breaks: int = 0
    swaps: int = 0
    drops: int = 0  # single frames, on a connection that lives, with later ones behind them
    late: int = 0  # connections whose old frames the connecting side may read behind the new one's
    renewals: int = 0  # the CPU ends and begins anew
    cpu_bound: bool = False
    eager: bool = False  # the CPU goes on where the window is full, as an Endpoint does
    crashing: tuple[str, ...] = ("dev", "pic")
    breaking: tuple[int, ...] = (0, 1, 2)

    @property
    def links(self) -> tuple[tuple[str, str], ...]:
        return CPU_BOUND if self.cpu_bound else LINKS


@dataclass(frozen=True)
class Rules:
    """The protocol as it is, or with a fault put in."""

    stream: type[Stream] = Stream
    order: tuple[str, ...] = ("positions", "commit", "dma", "out", "send", "io")
    faults: frozenset[str] = frozenset()


# to which links the device (of l: the pic) sends frames, by letter; I is the completion of i
LINES = "dDim"  # letters of which a Line comes
SENDS = {"d": (1,), "D": (1,), "I": (1,), "m": (1,), "l": (2,), "a": (0,), "r": (0,), "R": (0, 0)}
COUNTERS = Counters()
FIELDS = tuple(f for f in Stream.__slots__ if f not in ("_counters", "_now_ns"))


def no_time() -> int:
    return 0


def freeze(stream: Stream) -> Frozen:
    values = (getattr(stream, f) for f in FIELDS)
    return tuple(tuple(v) if isinstance(v, deque) else v for v in values)


def thaw(cls: type[Stream], frozen: Frozen) -> Stream:
    stream = cls(COUNTERS, no_time)
    for field, value in zip(FIELDS, frozen, strict=True):
        setattr(stream, field, deque(value) if isinstance(value, tuple) else value)
    return stream


def payload_of(frame: Frame) -> int:
    assert isinstance(frame, Eoi)
    return frame.vector


def joined(before: tuple[int, ...], now: tuple[int, ...]) -> tuple[int, ...]:
    """What was seen before, and what one has seen who began with something of that or with what follows."""
    at = before.index(now[0]) if now and now[0] in before else len(before)
    both = min(len(before) - at, len(now))
    if before[at : at + both] != now[:both]:
        raise Violation(f"{now} is not what comes after {before}")
    return before + now[both:]


class Node:
    """What the CPU and devices share: the part of an Endpoint."""

    def __init__(self, name: str, scenario: Scenario, rules: Rules) -> None:
        self.name, self.scenario, self.rules = name, scenario, rules
        self.links = tuple(n for n, pair in enumerate(LINKS) if name in pair)
        self.binds = tuple(n for n, pair in enumerate(scenario.links) if name == pair[1])
        self.streams = {n: rules.stream(COUNTERS, no_time) for n in self.links}
        self.live: frozenset[int] = frozenset()  # links whose bound side has answered us
        self.out: list[Op] = []  # what the transition does outside: ("send", link, data) and others

    def arrived(self, link: int, data: bytes) -> int | None:
        """As Endpoint._from_router and _from_dealer: the payload of the frame, if it is the next one."""
        stream, faults = self.streams[link], self.rules.faults
        if data == PROBE:
            resume, *frames = stream.connected()
            if "no Resume at a connection" not in faults:
                self.put(link, resume)
            if "bound side does not repeat" not in faults:
                self.put(link, *frames)
            return None
        decoded = stream.decode(data)
        self.put(link, *stream.take_waiting())
        if decoded is Need.REPEAT:
            if link not in self.binds:
                self.live |= {link}
            if "Resume is ignored" not in faults:
                self.put(link, *stream.repeat())
        elif decoded is Need.RESUME:
            if "gap is not answered" not in faults:
                self.put(link, stream.resume())
        elif isinstance(decoded, tuple):
            return payload_of(decoded[1])
        return None

    def encode(self, link: int, payload: int) -> list[bytes]:
        """Number and retain a frame; what of it is to be sent, now or after the commit."""
        data = self.streams[link].encode(Eoi(payload), 0, 0)
        usable = link in self.binds or link in self.live
        return [data] if data is not None and usable else []

    def put(self, link: int, *frames: bytes) -> None:
        self.out += [("send", link, data) for data in frames]

    def frozen_part(self) -> Frozen:
        return tuple(freeze(s) for s in self.streams.values()), self.live

    def thaw_part(self, part: Frozen) -> None:
        streams, self.live = part
        self.streams = {
            n: thaw(self.rules.stream, s) for n, s in zip(self.links, streams, strict=True)
        }


class Cpu(Node):
    """Sends its program; has no journal."""

    def __init__(self, scenario: Scenario, rules: Rules) -> None:
        super().__init__("cpu", scenario, rules)
        self.sent, self.waits = 0, False
        self.answers: tuple[int, ...] = ()
        self.interrupts: tuple[int, ...] = ()
        self.lives: tuple[int, ...] = ()  # how much of the program was sent when each earlier one ended
        # what they have seen: answers, interrupts, numbers by link
        self.before: Frozen = ((), (), (-1,) * len(LINKS))

    def freeze(self) -> Frozen:
        return (self.sent, self.waits, self.answers, self.interrupts, self.lives, self.before,
                self.frozen_part())  # fmt: skip

    def thaw(self, frozen: Frozen) -> Cpu:
        self.sent, self.waits, self.answers, self.interrupts, self.lives, self.before, part = frozen
        self.thaw_part(part)
        return self

    @property
    def can_send(self) -> bool:
        shut = self.streams[0].full and not self.scenario.eager
        return self.sent < len(self.scenario.program) and not self.waits and not shut

    def send(self) -> None:
        self.sent += 1
        self.waits = self.scenario.program[self.sent - 1] == "a"
        self.put(0, *self.encode(0, self.sent))

    def renew(self) -> None:
        """End, and begin anew with nothing but a base that is above all numbers used so far."""
        answers, interrupts, _ = self.before
        self.before = joined(answers, self.answers), joined(interrupts, self.interrupts), self.taken()
        self.lives += (self.sent,)
        self.waits, self.answers, self.interrupts, self.live = False, (), (), frozenset()
        base = self.base if "begins anew from 1 on" not in self.rules.faults else 0
        self.streams = {n: self.rules.stream(COUNTERS, no_time, base) for n in self.links}

    @property
    def base(self) -> int:
        return LIFE * len(self.lives)

    def taken(self) -> tuple[int, ...]:
        """By link, the highest number that this one or an earlier one has taken; -1 for a link of others."""
        mine = [self.streams[n].seen if n in self.streams else -1 for n in range(len(LINKS))]
        return tuple(map(max, mine, self.before[2]))

    def take(self, link: int, data: bytes) -> None:
        payload, asked = self.arrived(link, data), False
        if payload is None:
            return
        if link == 0:
            number = payload >> STAMP
            asked = self.scenario.program[number - 1] == "a" and number > max(self.lives, default=0)
            if asked and not self.waits:
                raise Violation("an answer that nobody waits for")
            self.waits = self.waits and not asked
            self.answers += (payload,)
            self.out.append(("sees", payload))
        else:
            self.interrupts += (payload,)
            self.out.append(("sees", payload >> STAMP))
        if not asked and (ack := self.streams[link].acknowledgement()) is not None:
            self.put(link, ack)


class Device(Node):
    """The device or the interrupt controller: a process that may end at any point, and its journal."""

    def __init__(self, name: str, scenario: Scenario, rules: Rules) -> None:
        super().__init__(name, scenario, rules)
        self.process = "down"  # up, down, retired (of a swap)
        self.number = 0  # of the process
        self.log: tuple[int, ...] = ()  # the device's state: what it has handled, stamped
        self.waits_for = 0  # the frame whose disk I/O is under way
        self.ops: tuple[Op, ...] = ()  # what is left of the step
        # what is committed: log, waits_for, streams, effects; then how many of the DMA writes are done
        self.journal: Frozen = (self.log, 0, self.plain(), (), 0)
        self.standby: Frozen = ()  # only with a fault: what a new process has loaded too early
        self.old: Frozen = ()  # only with a fault: the memory of the process that was replaced

    def freeze(self) -> Frozen:
        volatile: Frozen = ()
        if self.process != "down":
            volatile = self.log, self.waits_for, self.ops, self.frozen_part()
        return self.process, self.number, self.journal, self.standby, self.old, volatile

    def thaw(self, frozen: Frozen) -> Device:
        self.process, self.number, self.journal, self.standby, self.old, volatile = frozen
        if volatile:
            self.log, self.waits_for, self.ops, part = volatile
            self.thaw_part(part)
        return self

    def plain(self) -> Frozen:
        plains = (self.streams[n].to_plain() for n in self.links)
        return tuple((sent, acked, seen, tuple(retained)) for sent, acked, seen, retained in plains)

    # --- a process

    def crash(self) -> None:
        self.process = "down"
        if self.old:  # the old one resumes, with what it remembers
            self.process, (self.log, self.waits_for, self.ops, part), self.old = "retired", self.old, ()
            self.thaw_part(part)

    def start(self) -> None:
        """A new process: load what was committed, go on with its effects."""
        faults = self.rules.faults
        if self.process == "retired" and "the old one resumes though the new one was live" in faults:
            self.old = self.log, self.waits_for, self.ops, self.frozen_part()
        journal = self.standby or self.journal
        self.process, self.standby, self.number = "up", (), self.number + 1
        self.log, self.waits_for, plains, effects, done = journal
        self.live = frozenset()
        for n, plain in zip(self.links, plains, strict=True):
            stream = self.streams[n] = self.rules.stream(COUNTERS, no_time)
            sent, _, seen, _ = plain
            stream.load(plain if "retained frames are not kept" not in faults else (sent, sent, seen, ()))
        left = [op for op in effects if op[0] != "dma" or op[1] >= done]
        if "effects end with the process" in faults:
            left = []
        self.ops = self.ordered(left)
        if "served before DMA is done" in faults:
            self.ops = ()

    def retire(self) -> None:
        if self.behind:
            self.commit(())
        self.process = "retired"
        self.live = frozenset()  # its sockets are closed

    def stand_by(self) -> None:
        self.standby = self.journal

    def resume(self) -> None:
        """The new process has failed: the old one goes on, with new sockets."""
        self.process = "up"

    # --- a step

    @property
    def behind(self) -> bool:
        """Has steps to commit that were put off."""
        return self.idle and self.log != self.journal[0]

    @property
    def idle(self) -> bool:
        return self.process == "up" and not self.ops

    def take(self, link: int, data: bytes) -> None:
        payload = self.arrived(link, data)
        if payload is None:
            return
        last = self.log[-1] >> STAMP if self.log else 0
        if self.name == "dev" and (payload <= last or (payload != last + 1 and not self.scenario.renewals)):
            raise Violation(f"frame {payload} is handled after frame {last}")
        self.log += (payload << STAMP | self.number,)
        letter = self.letter(payload)
        if letter == "q" or ("what is seen is put off" in self.rules.faults and letter == "r"):
            for back in SENDS.get(letter, ()):
                self.put(back, *self.encode(back, self.log[-1]))
            self.streams[link].put_off()
            self.acknowledge()
            return
        self.begin(letter, self.log[-1], len(self.log))
        if "a frame is thrown away without a commit" in self.rules.faults and letter == "p":
            self.ops = ()
        if "Ack before commit" in self.rules.faults:
            self.put(link, self.streams[link].resume())
        if not self.ops:
            self.acknowledge()
        if not self.rules.faults and self.rules.order == Rules.order:
            self.op()  # the commit; to end before it is the same as to end before the frame was taken
        if "a frame outside of steps" in self.rules.faults and letter == "p":
            self.put(1, *self.encode(1, self.log[-1]))

    def letter(self, payload: int) -> str:
        if self.name == "dev":
            return self.scenario.program[payload - 1]
        return "q" if self.scenario.program[(payload >> STAMP) - 1] == "m" else "l"

    def catch_up(self) -> None:
        """Commit what was put off, without a step of its own."""
        self.commit(())
        self.acknowledge()

    def commit(self, effects: tuple[Op, ...]) -> None:
        for stream in self.streams.values():
            stream.caught_up()
        self.journal = self.log, self.waits_for, self.plain(), effects, 0

    def begin(self, letter: str, stamp: int, number: int) -> None:
        """Run the device: collect the effects of the step."""
        for stream in self.streams.values():
            stream.caught_up()
        effects: list[Op] = [("commit",)]
        if "positions are committed before the state" in self.rules.faults:
            effects = [("positions",), ("commit",)]
        if letter in "dDaIm":
            effects += [("dma", at, stamp << 1 | at) for at in range(2 if letter == "D" else 1)]
        for link in SENDS.get(letter, ()):
            effects += [("send", link, data) for data in self.encode(link, stamp)]
        if letter == "o":
            effects.append(("out", stamp))
        self.waits_for = number if letter == "i" else 0
        if letter == "i":
            effects.append(("io", stamp))
        self.ops = self.ordered(effects)

    def ordered(self, effects: list[Op]) -> tuple[Op, ...]:
        order = self.rules.order
        ops = sorted(effects, key=lambda op: order.index(op[0]))
        marked = (((op, ("done", op[1] + 1)) if op[0] == "dma" else (op,)) for op in ops)
        return tuple(op for group in marked for op in group)

    def op(self) -> None:
        """The next atomic action of the step."""
        if not self.ops:
            return
        op, self.ops = self.ops[0], self.ops[1:]
        match op[0]:
            case "positions":
                self.journal = (*self.journal[:2], self.plain(), *self.journal[3:])
            case "commit":
                self.commit(tuple(op for op in self.ops if op[0] in ("dma", "out", "io")))
            case "send":
                self.put(op[1], op[2])
            case "done":
                if "dma_done is not stored" not in self.rules.faults:
                    self.journal = (*self.journal[:4], op[1])
            case "io":
                self.out.append(op)
                stamp = self.log[self.waits_for - 1]
                self.begin("I", stamp, self.waits_for)  # the completion
            case _:
                self.out.append(op)
        if not self.ops:
            self.acknowledge()

    def acknowledge(self) -> None:
        for link, stream in self.streams.items():
            if (data := stream.acknowledgement()) is not None:
                self.put(link, data)
