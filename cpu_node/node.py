"""The process of one CPU: the engine in the main thread, the bus in a second one.

The CPU's own accesses go out through an IoClient of the main thread. What comes in unasked (INT pin,
messages of I/O APICs, the launcher's requests) is received by the bus thread (cpu_node/bus_thread.py), whose
SIGALRM stops translated code wherever it is.
Left out: more than one CPU; INIT and start-up IPIs; NMI where the machine has no local APIC.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import mmap
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from bus import codemap
from bus.addressmap import AddressMap
from bus.clock import MachineClock
from bus.codemap import CodeMap
from bus.endpoint import Received
from bus.frames import (
    ApicMessage,
    Attend,
    Continue,
    ContinueReply,
    Event,
    Frame,
    Intr,
    Pause,
    PauseReply,
    Recording,
    Refused,
    Reset,
    ResetReply,
    Save,
    Shutdown,
    Stats,
    StatsReply,
    Timing,
    TimingReply,
)
from bus.io import IoClient
from bus.recorder import attached as recorder_of
from cpu_node import assembled, stubs_unsafe, timing
from cpu_node.attention import Attention
from cpu_node.bus_thread import BusThread
from cpu_node.counters import counters_of
from cpu_node.cpuid import CpuModel, host_flags
from cpu_node.engine import Engine
from cpu_node.errors import TripleFault
from cpu_node.lapic import LocalApic
from cpu_node.node_config import NodeConfig
from cpu_node.noting import CpuNotes
from cpu_node.rdtsc import OFFSET_FLAG
from cpu_node.standing import Standing
from cpu_node.state import CpuStateMismatch
from cpu_node.store import Store, version
from cpu_node.tlb import HOST_FLAG
from memory_node.client import attach

LOOK_UP_NS = 200_000_000  # while a device doesn't answer: is the machine to end?
LATE_NS = 10_000_000_000  # then the launcher hears of it
FLUSH_NS = 2_000_000  # posted writes wait no longer than this
TIMING_VARIABLE = "BACKPLANE_TIMING"  # in the environment: time from the start on; "cpu": CPU time
CLOSE_S = 2.0
GC_THRESHOLD = 20_000  # objects made between two looks for garbage: Python's 700 cost a boot one per cent
KEEP_AT_ONCE = 2 << 20  # bytes of translations that an idle CPU writes to the disk: some 50 ms
REPORTS_PER_KIND = 200  # a guest that probes everything must not fill the log
REPORTED_STATE = frozenset(("triple-fault",))

log = logging.getLogger(__name__)


class _Ended(Exception):
    """The machine is to end while a device is waited for."""


class _RunAnew(Exception):
    """Engine.run is to be left and called again."""


class Node:
    """Implements cpu_node.platform.Platform over the bus."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGALRM,))  # threads made from here on inherit it
        self.intr = False
        self._bus = BusThread(
            config.run_dir, config.node, config.launcher, self._waits, recorder_of(config.fds, config.node)
        )
        self._inbox = self._bus.inbox
        self._idle = False
        self._in_reset = False
        self._ending = False
        self._paused = config.clock_stopped_ns is not None
        self._pauses: list[Received] = []  # to be answered once the guest stands
        self._alarm_ns: int | None = None  # the engine's
        self._flush_ns: int | None = None
        self._armed_ns: int | None = None
        self._seen: set[tuple[Any, ...]] = set()
        self._reports: Counter[str] = Counter()
        self.clock = clock = MachineClock(config.clock_offset_ns, config.clock_stopped_ns)
        run_dir = Path(config.run_dir)
        ram_fd, size = attach(run_dir, "ram", True)
        code_fd, code_size = attach(run_dir, codemap.REGION, True)
        self._code_map = CodeMap(memoryview(mmap.mmap(code_fd, code_size)))
        mirror_fd, mirror_size = attach(run_dir, "mirror", False)
        mirror = None
        if mirror_size:
            mirror = memoryview(mmap.mmap(mirror_fd, mirror_size, prot=mmap.PROT_READ))
        os.close(mirror_fd)
        self._io = IoClient(
            run_dir,
            config.node,
            AddressMap.from_plain(config.map),
            mirror,
            time.monotonic_ns,
            self._open_bus,
            clock=clock,
            on_late=self._late,
            deadline_ns=LOOK_UP_NS,
            pic=config.controllers.pic,
            ioapics=config.controllers.ioapics,
        )
        host = host_flags(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace"))
        self._keep_assembled: Callable[[], None] = lambda: None
        folder, tag = Path(config.translations), version(host)
        if config.translations:
            assembled.load(folder, tag)
        stubs_unsafe.install()
        self._rdtsc = stubs_unsafe.host_rdtsc()
        told = host if config.features is None else host.intersection(config.features)
        model = CpuModel(tsc_hz=config.tsc_hz, has_apic=config.apic, host=told)
        apic = None
        if config.apic:
            apic = LocalApic(model.apic_id, model.crystal_hz, config.tsc_hz, clock)
        self.engine = Engine(ram_fd, mmap.mmap(ram_fd, size), self, model, apic, code_fd)
        os.close(code_fd)
        self._standing = Standing(self.engine, clock, config.tsc_hz, OFFSET_FLAG in host)
        self._cache = self.engine.contexts.cache
        if config.translations:
            self._cache.store = Store(folder, tag, time.time)
            self._keep_assembled = lambda: assembled.keep(folder, tag)
        self._kept_ns, self._kept_instructions = time.monotonic_ns(), 0
        if config.mmu != "windows" and config.user_mode != "direct":
            if HOST_FLAG in host:
                self.engine.use_tlb(choose=config.mmu == "auto")
            elif config.mmu == "tlb":
                log.warning('cpu.mmu = "tlb": this host\'s processor has no %s; windows are used', HOST_FLAG)
        if config.user_mode != "translated":
            from cpu_node.direct import choose  # imports python-ptrace, which takes its time

            self.engine.direct = choose.start(self.engine, ram_fd, config.user_mode, config.trap_backend)
        address_map = AddressMap.from_plain(config.map)
        self._notes = CpuNotes(config.node, config.fds, self._io, self.engine, address_map)
        self._late_nodes: set[str] = set()  # that the launcher was told of
        self._attention = Attention(self._io, self.clock())
        self._timing: timing.Timing | None = None
        how = os.environ.get(TIMING_VARIABLE, "")
        self._timing_wanted: bool | None = True if how else None
        self._timing_clock = time.thread_time_ns if how == "cpu" else time.perf_counter_ns

    # ---- the CPU's thread

    def run(self) -> None:
        """Until the launcher says Shutdown."""
        engine = self.engine
        self._bus.start()
        if self.config.state is None:
            engine.start(self.config.start)
        else:
            try:
                self.intr = self._standing.load(self.config.state)
            except CpuStateMismatch as error:
                self._bus.send(Event("refused", f"{self.config.node}: {error}"))
                self.close()
                return
            if not self._paused:
                self._standing.go_on(self.config.clock_offset_ns)
        gc.freeze()  # what is there now stays; what comes is mostly lines, which stay, too
        gc.set_threshold(GC_THRESHOLD)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM,))
        self._bus.send(Event("ready", self.config.node))
        while not self._ending:
            if self._paused:
                self._stand()
                continue
            try:
                engine.stopping = False
                self._time_if_wanted()
                if self._in_reset:
                    self._wait_in_reset()
                    continue
                engine.run()
            except _RunAnew:
                continue
            except _Ended:
                break
            except TripleFault:
                self.report("triple-fault", f"triple fault at {engine.where()}", engine.cpu.dump())
                self._in_reset = True
        self.close()

    def close(self) -> None:
        """Let everything said so far leave this process; keep what was translated."""
        self._io.close()
        self._bus.close(CLOSE_S)
        self._cache.keep(last=True)
        self._keep_assembled()
        if self._cache.store is not None:
            self._cache.store.close()

    def _keep_some(self) -> None:
        """While the guest has nothing to do: put translations on the disk, if there are enough new ones."""
        instructions, now_ns = self._cache.instructions, time.monotonic_ns()
        if (instructions - self._kept_instructions <= self.config.keep_after
                or now_ns - self._kept_ns < self.config.keep_every_s * 1e9):
            return
        self._kept_ns = now_ns
        if self._cache.keep(KEEP_AT_ONCE):
            self._kept_instructions = instructions
        self._keep_assembled()

    def fail(self, error: Exception) -> None:
        """Say where the guest was when the CPU node broke."""
        text = f"{self.config.node}: {type(error).__name__}: {' '.join(str(error).split())}"
        with contextlib.suppress(Exception):
            text += f" at {self.engine.where()}"
        log.critical("%s\n%s", text, traceback.format_exc())
        self._cache.store = None  # what led here is not for the next start
        self._bus.send(Event("cpu-error", text))
        self.close()

    def port_read(self, port: int, width: int) -> int:
        return self._io.port_read(port, width)

    def port_write(self, port: int, width: int, value: int) -> None:
        self._io.port_write(port, width, value)
        if self._flush_ns is None:
            self._flush_soon()

    def port_in_string(self, port: int, width: int, count: int) -> bytes:
        return self._io.port_in_string(port, width, count)

    def port_out_string(self, port: int, width: int, data: bytes) -> None:
        self._io.port_out_string(port, width, data)

    def mmio_read(self, pa: int, width: int) -> int:
        return self._io.mmio_read(pa, width)

    def mmio_write(self, pa: int, width: int, value: int) -> None:
        self._io.mmio_write(pa, width, value)
        if self._flush_ns is None:
            self._flush_soon()

    def int_ack(self) -> int | None:
        return self._io.int_ack()

    def eoi(self, vector: int) -> None:
        self._io.eoi(vector)

    def now_ns(self) -> int:
        return self.clock()

    def rdtsc(self) -> int:
        return self._rdtsc()

    def poll(self) -> None:
        """Take in what the bus thread received; flush what was posted long enough ago."""
        now_ns = self.clock()
        if self._flush_ns is not None and now_ns >= self._flush_ns:
            self._io.flush()
            self._flush_ns = None
        if self._attention:
            self._attention.look(now_ns)
        if self._alarm_ns is not None and now_ns >= self._alarm_ns:
            self._alarm_ns = None  # it has come; the engine sets the next one
        self._armed_ns = None
        self._arm()
        while self._inbox:
            self._take(self._inbox.popleft())
        if self._code_map.news():  # behind the inbox: a device writes memory before it says anything
            self.engine.contexts.dma_written(self._code_map.marked())
        if self._in_reset:
            self._wait_in_reset()
        if self._timing_wanted is not None:
            raise _RunAnew

    def idle(self, deadline_ns: int | None) -> None:
        self._io.flush()
        self._flush_ns = None
        self._keep_some()
        self._idle = True
        try:
            if self._inbox:
                return
            if self._attention:
                self._attention.look(self.clock())
                deadline_ns = self._attention.sooner(deadline_ns, self.clock())
            self._bus.wait_for_news(None if deadline_ns is None else self.clock.left_s(deadline_ns))
        finally:
            self._idle = False
        self._bus.forget_news()

    def set_alarm(self, deadline_ns: int | None) -> None:
        self._alarm_ns = deadline_ns
        self._arm()

    def report(self, kind: str, text: str, data: dict[str, Any]) -> None:
        if kind not in REPORTED_STATE:
            data = {}
            if (kind, text) in self._seen or self._reports[kind] >= REPORTS_PER_KIND:
                return
            self._seen.add((kind, text))
            self._reports[kind] += 1
        self._bus.send(Event(kind, text, data))

    def _open_bus(self, space: str, address: int, width: int, is_write: bool, value: int) -> None:
        key = (space, address, width, is_write)
        if key in self._seen or self._reports["open-bus"] >= REPORTS_PER_KIND:
            return
        self._seen.add(key)
        what = f"write of {value:#x} to" if is_write else "read of"
        self.engine.report("open-bus", f"{what} {space} {address:#06x}, which nobody owns,", at_next=True)

    def _late(self, node: str, frame: Frame, waited_ns: int) -> None:
        """A device has not answered: it is waited for, unless the machine is to end."""
        if any(isinstance(received.frame, Shutdown) for received in self._inbox):
            raise _Ended
        if waited_ns >= LATE_NS and node not in self._late_nodes:
            self._late_nodes.add(node)
            what = f"{type(frame).__name__} to {node} has not been answered for {waited_ns / 1e9:.0f} s"
            self._bus.send(Event("waiting", what))

    def _waits(self) -> bool:
        return self._idle or self._in_reset or self._paused

    def _flush_soon(self) -> None:
        if self._io.pending:
            self._flush_ns = self.clock() + FLUSH_NS
            self._arm()

    def _arm(self) -> None:
        """Set the host timer to whichever deadline comes first."""
        first = self._alarm_ns
        if self._flush_ns is not None and (first is None or self._flush_ns < first):
            first = self._flush_ns
        if self._attention:
            first = self._attention.sooner(first, self.clock())
        if first is None or (self._armed_ns is not None and self._armed_ns <= first):
            return
        self._armed_ns = first
        signal.setitimer(signal.ITIMER_REAL, max(self.clock.left_s(first), 1e-6))

    def _take(self, received: Received) -> None:
        frame, engine = received.frame, self.engine
        match frame:
            case Intr(level=level):
                self.intr = level
            case ApicMessage() as m:
                if engine.apic is not None and engine.apic.accept(
                    m.vector, m.delivery_mode, m.dest, bool(m.dest_mode), bool(m.trigger_level),
                    bool(m.level_assert),
                ):  # fmt: skip
                    self._notes.accepted(m.vector, received.header.span)
            case Pause():
                self._pauses.append(received)
                self._paused = engine.stopping = True
            case Continue(clock_ns=clock_ns, host_ns=host_ns):
                self._bus.answer(received, self._go_on(clock_ns - host_ns))
            case Save():
                self._bus.answer(received, self._standing.saved(self.intr, self._in_reset))
            case Stats():
                self._bus.answer(received, StatsReply(self._counters()))
            case Timing(on=on):
                self._timing_wanted = on
                self._bus.answer(received, TimingReply())
            case Recording():
                self._notes.look()
            case Attend(node=node):
                self._attention.pay(node, self.clock())
                self._arm()
            case Shutdown():
                self._ending = engine.stopping = True
                self._in_reset = self._paused = False
            case Reset(start=start):
                self._in_reset = not start
                if start:
                    self.intr = False
                    engine.start(start)
                self._bus.answer(received, ResetReply())
            case _ if received.asked:
                self._bus.answer(received, Refused(f"a CPU takes no {type(frame).__name__}"))

    def _wait_in_reset(self) -> None:
        """Nothing runs until the launcher gives a state to start from."""
        self._io.flush()
        while self._in_reset and not self._paused:
            self._wait_for_frames()

    def _wait_for_frames(self) -> None:
        if not self._inbox:
            self._bus.wait_for_news(None)
        self._bus.forget_news()
        while self._inbox:
            self._take(self._inbox.popleft())

    # ---- paused

    def _stand(self) -> None:
        """Between two instructions, until the launcher says Continue. Interrupts that arrive are kept."""
        self._io.flush()
        self._flush_ns = None
        self._standing.stop()
        while True:
            while self._pauses:
                reply = PauseReply(self._standing.clock_ns, self._io.positions())
                self._bus.answer(self._pauses.pop(), reply)
            if not self._paused:
                return
            self._wait_for_frames()

    def _go_on(self, clock_offset_ns: int) -> Frame:
        if not self._standing.now:
            return Refused("the CPU is not paused")
        self._standing.go_on(clock_offset_ns)
        self._paused = False
        self._armed_ns = None
        self._arm()
        return ContinueReply()

    def _counters(self) -> dict[str, Any]:
        """Both endpoints together; latency is the round trip of the CPU's accesses."""
        engine, io = self.engine, self._io.stats()
        own = self._bus.stats
        for name in ("frames_in", "frames_out", "bad_frames", "lost", "duplicated", "unroutable"):
            io[name] += own.get(name, 0)
        io.update(counters_of(engine))
        if self._timing is not None:
            io["timing"] = self._timing.clock.to_plain()
        return io

    def _time_if_wanted(self) -> None:
        """Switch timing; not while Engine.run runs, which holds what is to be wrapped."""
        wanted, self._timing_wanted = self._timing_wanted, None
        if wanted is None:
            return
        if self._timing is not None:
            self._timing.stop()
        self._timing = timing.Timing(self.engine, timing.Clock(self._timing_clock)) if wanted else None


def run(config: dict[str, Any]) -> None:
    """Entry point of the process."""
    logging.basicConfig(level=config.get("log_level", "warning").upper(), format="%(levelname)s: %(message)s")
    node = Node(msgspec.convert(config, NodeConfig))
    try:
        node.run()
    except Exception as error:
        node.fail(error)
        os._exit(1)  # no interpreter shutdown: its memory is full of views at fixed addresses
    os._exit(0)
