"""Deliberate faults, each with a scenario in which the model must find it."""

from __future__ import annotations

from typing import NamedTuple

from bus.codec import encode
from bus.frames import Ack, Frame, Resume
from bus.stream import Stream
from tests.bus.protocol_model import Rules, Scenario


class Fault(NamedTuple):
    name: str
    rules: Rules
    scenario: Scenario


class NoGapCheck(Stream):
    __slots__ = ()

    def _judge(self, seq: int) -> bool:
        self.seen = max(self.seen, seq - 1)
        return super()._judge(seq)


class NoDuplicateCheck(Stream):
    __slots__ = ()

    def _judge(self, seq: int) -> bool:
        if 0 < seq <= self.seen:
            return True
        return super()._judge(seq)


class AckOfTheNext(Stream):
    __slots__ = ()

    def _position(self, frame: Ack | Resume) -> bytes:
        more = isinstance(frame, Resume)
        self.seen += more
        data = super()._position(frame)
        self.seen -= more
        return data


class AcksOpenNoWindow(Stream):
    __slots__ = ()

    def _acknowledged(self, ack: int) -> None:
        under_way = self._under_way
        super()._acknowledged(ack)
        self._under_way = under_way


class AcksForgetTooMuch(Stream):
    __slots__ = ()

    def _acknowledged(self, ack: int) -> None:
        super()._acknowledged(ack)
        if len(self._retained) > 1 and ack:
            self._retained.popleft()
            self._acked += 1


class NotRetained(Stream):
    __slots__ = ()

    def encode(self, frame: Frame, trace: int, span: int) -> bytes | None:
        data = super().encode(frame, trace, span)
        if data is not None:
            self._retained.pop()
            self._under_way -= 1
            self._acked += 1
        return data


class NoWindow(Stream):
    __slots__ = ()

    def take_waiting(self):  # type: ignore[no-untyped-def]
        return iter(())

    def repeat(self):  # type: ignore[no-untyped-def]
        self._under_way = 0
        yield from super().take_waiting()


class ToldByOneThatWaits(Stream):
    __slots__ = ()

    def encode(self, frame: Frame, trace: int, span: int) -> bytes | None:
        data = super().encode(frame, trace, span)
        self._told = self.seen
        return data


class NoAckAtResume(Stream):
    __slots__ = ()

    def repeat(self):  # type: ignore[no-untyped-def]
        _, *frames = super().repeat()
        return iter(frames)


class AckWithoutFirst(Stream):
    """A repetition does not say where it begins."""

    __slots__ = ()

    def _position(self, frame: Ack | Resume) -> bytes:
        return super()._position(type(frame)())


class FirstIsTheNext(Stream):
    """A repetition says that it begins with what is sent next."""

    __slots__ = ()

    def _position(self, frame: Ack | Resume) -> bytes:
        return super()._position(type(frame)(self._sent + 1))


class FirstClearsNoGap(Stream):
    """A repetition that lacks its beginning does not make it say Resume again."""

    __slots__ = ()

    def _repetition_from(self, first: int) -> None:
        self.seen = max(self.seen, first - 1)


class FirstIsForThoseWhoAskedOnly(Stream):
    """Who is new in place of another goes on where it was asked from, not where the repetition begins."""

    __slots__ = ()

    def _repetition_from(self, first: int) -> None:
        self._asked = False


class NeverAcks(Stream):
    __slots__ = ()

    def acknowledgement(self) -> bytes | None:
        return None


class AcksEarly(Stream):
    __slots__ = ()

    def acknowledgement(self) -> bytes | None:
        return encode(Ack(), 0, self.seen + 1, 0, 0, 0)


class AcksWhatIsPutOff(Stream):
    __slots__ = ()

    def put_off(self) -> None:
        pass


class NeverCaughtUp(Stream):
    __slots__ = ()

    def caught_up(self) -> None:
        pass


BREAK, CRASH, SWAP = Scenario("da", breaks=1), Scenario("da", crashes=1), Scenario("da", swaps=1, crashes=1)
SHUT = Scenario("RRRRR", window=2, eager=True)
NEW = Scenario("rp", renewals=1)
TIGHT = Scenario("dddd", window=2)


def _ordered(*order: str) -> Rules:
    return Rules(order=order)


def _with(*names: str) -> Rules:
    return Rules(faults=frozenset(names))


FAULTS = (
    # the stream
    Fault("a gap is not noticed", Rules(NoGapCheck), BREAK),
    Fault("a duplicate is taken", Rules(NoDuplicateCheck), BREAK),
    Fault("Resume says one too many", Rules(AckOfTheNext), BREAK),
    Fault("Ack says one too many", Rules(AcksEarly), BREAK),
    Fault("an ack opens no window", Rules(AcksOpenNoWindow), TIGHT),
    Fault("an ack forgets one more", Rules(AcksForgetTooMuch), Scenario("ddd", breaks=1)),
    Fault("what is sent is not retained", Rules(NotRetained), BREAK),
    Fault("what waits for the window is not sent", Rules(NoWindow), Scenario("RR", window=2)),
    Fault("a frame that waits counts as an Ack", Rules(ToldByOneThatWaits), SHUT),
    Fault("no Ack in answer to Resume", Rules(NoAckAtResume), Scenario("RRR", window=2, breaks=1)),
    Fault("no Ack at all", Rules(NeverAcks), TIGHT),
    # a connection
    Fault("Resume is ignored", _with("Resume is ignored"), BREAK),
    Fault("no Resume at a connection", _with("no Resume at a connection"), BREAK),
    Fault("the bound side does not repeat", _with("bound side does not repeat"), BREAK),
    Fault("a gap is not answered", _with("gap is not answered"), Scenario("dd", drops=1)),
    Fault("a gap is answered once for all", Rules(FirstClearsNoGap), Scenario("pp", drops=2)),
    # who begins anew
    Fault("begins anew from 1 on", _with("begins anew from 1 on"), NEW),
    Fault("a repetition doesn't say its first", Rules(AckWithoutFirst), NEW),
    Fault("says the next as its first", Rules(FirstIsTheNext), NEW),
    Fault("does not go on from the first", Rules(FirstIsForThoseWhoAskedOnly), NEW),
    # a step
    Fault("sent before the commit", _ordered("send", "commit", "dma", "out", "io"), CRASH),
    Fault("DMA before the commit", _ordered("dma", "commit", "out", "send", "io"), CRASH),
    Fault("output before the commit", _ordered("out", "commit", "dma", "send", "io"),
          Scenario("o", crashes=1)),
    Fault("disk I/O before the commit", _ordered("io", "commit", "dma", "send"), Scenario("i", crashes=1)),
    Fault("frames before DMA", _ordered("commit", "send", "dma", "out", "io"), Scenario("a")),
    Fault("positions before the state", _with("positions are committed before the state"), CRASH),
    Fault("Ack before the commit", _with("Ack before commit"), CRASH),
    Fault("a frame is thrown away, uncommitted", _with("a frame is thrown away without a commit"),
          Scenario("ppda", window=1, ack_every=1, crashes=1)),
    Fault("a frame outside of steps", _with("a frame outside of steps"), Scenario("pa", crashes=1)),
    # a step that is put off
    Fault("what is put off is acknowledged", Rules(AcksWhatIsPutOff), Scenario("qq", window=2)),
    Fault("Resume acknowledges what is put off", Rules(AcksWhatIsPutOff), Scenario("q", breaks=1)),
    Fault("what was put off is never acknowledged", Rules(NeverCaughtUp), Scenario("qqd", window=2)),
    Fault("what is seen is put off", _with("what is seen is put off"), Scenario("r", crashes=1)),
    # a new process
    Fault("dma_done is not stored", _with("dma_done is not stored"), Scenario("D", crashes=1)),
    Fault("effects end with the process", _with("effects end with the process"), CRASH),
    Fault("retained frames are not kept", _with("retained frames are not kept"), CRASH),
    Fault("frames are served before DMA is done", _with("served before DMA is done"), CRASH),
    # a swap
    Fault("loaded before the old one has ended", _with("loaded before the old one has ended"), SWAP),
    Fault("the old one resumes though the new one was live",
          _with("the old one resumes though the new one was live"), SWAP),
    Fault("retires within a step", _with("retires within a step", "effects end with the process"), SWAP),
)  # fmt: skip
