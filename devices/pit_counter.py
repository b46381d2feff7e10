"""One counter of an 8254, by formula: nothing counts down, everything is computed from the elapsed clocks.

Reference: Intel 8254 data sheet, 231164-005 (September 1993), "Mode definitions" and "Read operations".
`elapsed` is the number of CLK pulses since the counting element was loaded; it is -1 from the write of the
count to the CLK pulse that loads it. Left out: what a count of 1 in modes 2 and 3 does, which is illegal.
"""

from __future__ import annotations

from dataclasses import dataclass

CLOCK_HZ = 1_193_182  # 14.31818 MHz / 12
NS = 1_000_000_000
ACCESS_LSB, ACCESS_MSB, ACCESS_BOTH = 1, 2, 3
STATUS_OUT, STATUS_NULL_COUNT, STATUS_ACCESS_SHIFT, STATUS_MODE_SHIFT = 0x80, 0x40, 4, 1
EDGE_CLOCKS_MIN = 60  # 50 us: of a faster train only every n-th edge is signalled; it would drown the host
NONE = -1


@dataclass(slots=True)
class PitCounter:
    mode_bits: int = 0  # as written: 6 and 7 mean 2 and 3
    access: int = ACCESS_BOTH
    bcd: bool = False
    gate: bool = True
    count: int = 0  # clocks, 1 to the modulus; what the counting element is (re)loaded with
    next_count: int = 0  # modes 2 and 3: waits for the end of the running (half) cycle; 0 = none
    takeover: int = 0  # the elapsed clocks at that end
    written: bool = False  # a count was written since the control word
    started: bool = False  # the counting element was loaded since the control word
    running: bool = False
    start_clock: int = 0  # while running: elapsed = held + CLK pulses since this one
    held: int = 0
    edges_done: int = 0  # rising edges of OUT since the load that have been signalled
    write_low: int = NONE  # first byte of a count, waiting for the second
    read_high: bool = False  # the next read gives the high byte
    latched_count: int = NONE
    latched_status: int = NONE

    @property
    def mode(self) -> int:
        return self.mode_bits & 3 if self.mode_bits & 2 else self.mode_bits

    def program(self, access: int, mode_bits: int, bcd: bool) -> None:
        """A control word: OUT goes to its initial level, counting ends [control word format]."""
        self.mode_bits, self.access, self.bcd = mode_bits, access, bcd
        self.written = self.started = self.running = self.read_high = False
        self.next_count = self.held = self.edges_done = 0
        self.write_low = self.latched_count = self.latched_status = NONE

    def write(self, value: int, now_ns: int) -> None:
        """One byte of the count, as the access mode says."""
        if self.access == ACCESS_BOTH and self.write_low == NONE:
            self.write_low = value
            if self.mode == 0:  # the first byte stops the counting and sets OUT low [mode 0]
                self.started = self.running = False
            return
        raw = {
            ACCESS_LSB: value,
            ACCESS_MSB: value << 8,
            ACCESS_BOTH: value << 8 | max(self.write_low, 0),
        }[self.access]
        self.write_low = NONE
        self._set_count(_from_bcd(raw) if self.bcd else raw, now_ns)

    def _set_count(self, raw: int, now_ns: int) -> None:
        count = raw or self._modulus()
        if self.mode in (2, 3) and self.started:
            elapsed = max(self.elapsed(now_ns), 0)
            cycle, high = elapsed // self.count * self.count, self._high_clocks()
            first_half = self.mode == 3 and elapsed - cycle < high < self.count
            self.next_count, self.takeover = count, cycle + (high if first_half else self.count)
            return
        self.count, self.written = count, True
        if self.mode not in (1, 5):  # those wait for a trigger at GATE
            self._load(now_ns)
            self.running = self.gate

    def set_gate(self, level: bool, now_ns: int) -> None:
        """GATE enables modes 0 and 4, enables and restarts 2 and 3, triggers 1 and 5 [figure 21]."""
        rises, self.gate = level and not self.gate, level
        if self.mode in (1, 5):
            if rises and self.written:
                self._load(now_ns)
            return
        if rises and self.started:
            if self.mode in (2, 3):
                self.count, self.next_count = self.next_count or self.count, 0
                self._load(now_ns)
            self.start_clock, self.running = _clock(now_ns), True
        elif not level and self.running:
            self.held, self.running = self.elapsed(now_ns), False

    def _load(self, now_ns: int) -> None:
        self.started = self.running = True
        self.start_clock, self.held, self.edges_done = _clock(now_ns), -1, 0

    def advance(self, now_ns: int) -> int:
        """Take over a waiting count if its time has come; how many rising edges of OUT are now due."""
        due = 0
        if self.next_count and self.running and self.elapsed(now_ns) >= self.takeover:
            in_mid_cycle = self.takeover % self.count
            due = 0 if in_mid_cycle else 1
            self.count, self.next_count, self.edges_done = self.next_count, 0, 0
            self.held += (self._high_clocks() if in_mid_cycle else 0) - self.takeover
        return due + self._take_edges(self._edges(self.elapsed(now_ns)))

    def _take_edges(self, edges: int) -> int:
        due, self.edges_done = max(edges - self.edges_done, 0), max(edges, self.edges_done)
        return due

    def _edges(self, elapsed: int) -> int:
        """Rising edges of OUT in the first `elapsed` clocks that are to be signalled."""
        if not self.started:
            return 0
        match self.mode:
            case 2 | 3:
                return max(elapsed, 0) // self._clocks_per_edge()
            case 0 | 1:
                return int(elapsed >= self.count)
            case _:
                return int(elapsed > self.count)  # a strobe of one clock

    def _clocks_per_edge(self) -> int:
        """Modes 2 and 3."""
        return self.count * max(1, EDGE_CLOCKS_MIN // self.count)

    def next_edge_ns(self) -> int | None:
        """When the first edge comes that isn't signalled yet, or a waiting count is taken over."""
        if not self.running:
            return None
        if self.mode in (2, 3):
            clocks = self.takeover if self.next_count else (self.edges_done + 1) * self._clocks_per_edge()
            return self._time_of(clocks)
        if self.edges_done:
            return None
        return self._time_of(self.count + (1 if self.mode in (4, 5) else 0))

    def elapsed(self, now_ns: int) -> int:
        return self.held + _clock(now_ns) - self.start_clock if self.running else self.held

    def _time_of(self, elapsed: int) -> int:
        """The first nanosecond at which that many clocks have elapsed."""
        return -(-(self.start_clock + elapsed - self.held) * NS // CLOCK_HZ)

    def out(self, now_ns: int) -> bool:
        """The OUT pin."""
        if not self.started:
            return self.mode != 0
        elapsed = self.elapsed(now_ns)
        match self.mode:
            case 0 | 1:
                return elapsed >= self.count
            case 2:
                return not self.gate or max(elapsed, 0) % self.count != self.count - 1
            case 3:
                return not self.gate or max(elapsed, 0) % self.count < self._high_clocks()
            case _:
                return elapsed != self.count

    def rises_once_ns(self) -> int | None:
        """When OUT goes high for good; 0 if it stays as it is, None if it goes on changing."""
        if not self.running:
            return 0
        return self._time_of(self.count) if self.mode in (0, 1) else None

    def value(self, now_ns: int) -> int:
        """The counting element, as a read gives it."""
        elapsed = max(self.elapsed(now_ns), 0)
        if self.mode == 3 and self.count:
            place, high = elapsed % self.count, self._high_clocks()
            left = (self.count & ~1) - 2 * (place if place < high else place - high)
        elif self.mode == 2 and self.count:
            left = self.count - elapsed % self.count
        else:
            left = self.count - elapsed
        left %= self._modulus()
        return _to_bcd(left) if self.bcd else left

    def status(self, now_ns: int) -> int:
        """The status byte of the read-back command."""
        null = not self.started or bool(self.next_count) or self.elapsed(now_ns) < 0
        return (
            (STATUS_OUT if self.out(now_ns) else 0)
            | (STATUS_NULL_COUNT if null else 0)
            | self.access << STATUS_ACCESS_SHIFT
            | self.mode_bits << STATUS_MODE_SHIFT
            | self.bcd
        )

    def latch_count(self, now_ns: int) -> None:
        """Counter latch command; a second one before the read changes nothing."""
        if self.latched_count == NONE:
            self.latched_count = self.value(now_ns)

    def latch_status(self, now_ns: int) -> None:
        if self.latched_status == NONE:
            self.latched_status = self.status(now_ns)

    def read(self, now_ns: int) -> int:
        """One byte: the latched status, else the latched count, else the counting element."""
        if self.latched_status != NONE:
            status, self.latched_status = self.latched_status, NONE
            return status
        whole = self.value(now_ns) if self.latched_count == NONE else self.latched_count
        high = self.access == ACCESS_MSB or self.read_high
        if self.access == ACCESS_BOTH:
            self.read_high = not self.read_high
        if not self.read_high:
            self.latched_count = NONE
        return whole >> 8 if high else whole & 0xFF

    def _modulus(self) -> int:
        return 10_000 if self.bcd else 0x10000

    def _high_clocks(self) -> int:
        """Mode 3: for how many clocks of a cycle OUT is high."""
        return (self.count + 1) // 2


def _clock(now_ns: int) -> int:
    """Number of the last CLK pulse."""
    return now_ns * CLOCK_HZ // NS


def _from_bcd(raw: int) -> int:
    return sum((raw >> 4 * digit & 0xF) * 10**digit for digit in range(4))


def _to_bcd(value: int) -> int:
    return sum(value // 10**digit % 10 << 4 * digit for digit in range(4))
