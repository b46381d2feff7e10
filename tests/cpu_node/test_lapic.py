"""Local APIC [SDM vol. 3A chapter 11]: priorities, LVT, ICR, errors, timer; state survives msgpack always."""

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_node.lapic import LocalApic
from cpu_node.lapic_state import LapicState, LapicStateMismatch, Mode, Reg

CRYSTAL, TSC_HZ = 25_000_000, 2_500_000_000
V = 0x41


class Clock:
    def __init__(self) -> None:
        self.ns = 1_000_000_000

    def __call__(self) -> int:
        return self.ns


def make(enabled: bool = True) -> tuple[LocalApic, Clock]:
    clock = Clock()
    apic = LocalApic(0, CRYSTAL, TSC_HZ, clock)
    if enabled:
        apic.write(Reg.SVR, 0x1FF)
    return apic, clock


@pytest.fixture
def apic() -> LocalApic:
    return make()[0]


def bits(apic, reg):
    return sum(apic.read(reg + 0x10 * i) << 32 * i for i in range(8))


RESET = [
    (Reg.ID, 0), (Reg.VERSION, 0x50014), (Reg.TPR, 0), (Reg.APR, 0), (Reg.PPR, 0), (Reg.LDR, 0),
    (Reg.DFR, 0xFFFFFFFF), (Reg.SVR, 0xFF), (Reg.ESR, 0), (Reg.ICR_LOW, 0), (Reg.ICR_HIGH, 0),
    (0x320, 0x10000), (0x330, 0x10000), (0x340, 0x10000), (0x350, 0x10000), (0x360, 0x10000),
    (0x370, 0x10000),
    (Reg.INITIAL_COUNT, 0), (Reg.CURRENT_COUNT, 0), (Reg.DIVIDE, 0),
]  # fmt: skip


@pytest.mark.parametrize(("reg", "value"), RESET)
def test_reset_values(reg, value):
    apic, _ = make(enabled=False)
    assert apic.read(reg) == value


WRITES = [
    (Reg.ID, 0xFFFFFFFF, 0xFF000000), (Reg.TPR, 0xFFFFFFFF, 0xFF), (Reg.LDR, 0xFFFFFFFF, 0xFF000000),
    (Reg.DFR, 0, 0x0FFFFFFF), (Reg.SVR, 0xFFFFFFFF, 0x3FF), (Reg.VERSION, 0, 0x50014), (Reg.PPR, 0xFF, 0),
    (Reg.ICR_HIGH, 0xFFFFFFFF, 0xFF000000), (Reg.DIVIDE, 0xFFFFFFFF, 0xB),
    (0x320, 0xFFFFFFFF, 0x700FF), (0x330, 0xFFFFFFFF, 0x107FF), (0x340, 0xFFFFFFFF, 0x107FF),
    (0x350, 0xFFFFFFFF, 0x1A7FF), (0x360, 0xFFFFFFFF, 0x1A7FF), (0x370, 0xFFFFFFFF, 0x100FF),
    (Reg.ISR, 0xFFFFFFFF, 0), (Reg.IRR, 0xFFFFFFFF, 0), (Reg.CURRENT_COUNT, 5, 0),
]  # fmt: skip


@pytest.mark.parametrize(("reg", "value", "back"), WRITES)
def test_writable_bits(apic, reg, value, back):
    apic.write(reg, value)
    assert apic.read(reg) == back


def test_one_interrupt(apic):
    assert apic.accept(V, Mode.FIXED)
    assert bits(apic, Reg.IRR) == 1 << V
    assert apic.pending_vector() == V
    assert apic.acknowledge() == V
    assert (bits(apic, Reg.IRR), bits(apic, Reg.ISR)) == (0, 1 << V)
    assert apic.read(Reg.PPR) == 0x40
    assert apic.pending_vector() is None
    assert apic.write(Reg.EOI, 0) is None
    assert (bits(apic, Reg.ISR), apic.read(Reg.PPR)) == (0, 0)


def test_priorities(apic):
    for vector in (0x31, 0x52, 0x51):
        apic.accept(vector, Mode.FIXED)
    assert apic.acknowledge() == 0x52
    assert apic.pending_vector() is None  # 51h is of the same class
    apic.accept(0x61, Mode.FIXED)
    assert apic.acknowledge() == 0x61
    apic.write(Reg.EOI, 0)
    assert apic.pending_vector() is None
    apic.write(Reg.EOI, 0)
    assert apic.acknowledge() == 0x51
    apic.write(Reg.EOI, 0)
    assert apic.acknowledge() == 0x31


@pytest.mark.parametrize(
    ("tpr", "in_service", "ppr"), [(0, None, 0), (0x35, None, 0x35), (0x35, 0x52, 0x50),
    (0x52, 0x51, 0x52), (0x62, 0x51, 0x62)]
)
def test_processor_priority(apic, tpr, in_service, ppr):
    if in_service is not None:
        apic.accept(in_service, Mode.FIXED)
        apic.acknowledge()
    apic.write(Reg.TPR, tpr)
    assert apic.read(Reg.PPR) == ppr
    apic.accept((ppr & 0xF0) | 0xF, Mode.FIXED) if ppr >= 0x10 else None
    assert apic.pending_vector() is None
    apic.accept((ppr & 0xF0) + 0x10, Mode.FIXED)
    assert apic.pending_vector() == (ppr & 0xF0) + 0x10


def test_spurious_when_the_task_priority_rose(apic):
    apic.accept(V, Mode.FIXED)
    apic.write(Reg.TPR, 0xF0)
    assert apic.acknowledge() == 0xFF
    assert bits(apic, Reg.ISR) == 0


def test_level_triggered_eoi_is_broadcast(apic):
    apic.accept(V, Mode.FIXED, level_triggered=True)
    assert bits(apic, Reg.TMR) == 1 << V
    apic.acknowledge()
    assert apic.write(Reg.EOI, 0) == V
    apic.accept(V, Mode.FIXED)  # the same vector, edge-triggered now
    apic.acknowledge()
    assert apic.write(Reg.EOI, 0) is None
    assert apic.write(Reg.EOI, 0) is None  # nothing in service


def test_level_deassert_is_no_request(apic):
    assert not apic.accept(V, Mode.FIXED, level_triggered=True, level_assert=False)


DESTINATIONS = [
    # id, LDR, DFR, destination, logical, mine
    (3, 0, ~0, 3, False, True), (3, 0, ~0, 4, False, False), (3, 0, ~0, 0xFF, False, True),
    (3, 0x04, ~0, 0x0C, True, True), (3, 0x04, ~0, 0x03, True, False), (3, 0x04, ~0, 0xFF, True, True),
    (3, 0, ~0, 0xFF, True, False), (3, 0x24, 0, 0x24, True, True), (3, 0x24, 0, 0x2C, True, True),
    (3, 0x24, 0, 0x34, True, False), (3, 0x24, 0, 0xF4, True, True), (3, 0x24, 0, 0x2B, True, False),
]  # fmt: skip


@pytest.mark.parametrize(("apic_id", "ldr", "dfr", "destination", "logical", "mine"), DESTINATIONS)
def test_destinations(apic, apic_id, ldr, dfr, destination, logical, mine):
    apic.write(Reg.ID, apic_id << 24)
    apic.write(Reg.LDR, ldr << 24)
    apic.write(Reg.DFR, dfr & 0xFFFFFFFF)
    assert apic.accept(V, Mode.LOWEST_PRIORITY, destination, logical) == mine
    assert bits(apic, Reg.IRR) == (1 << V if mine else 0)
    apic.write(Reg.ICR_HIGH, destination << 24)
    apic.write(Reg.ICR_LOW, 0x55 | (0x800 if logical else 0))
    assert bool(bits(apic, Reg.IRR) >> 0x55 & 1) == mine


@pytest.mark.parametrize(("shorthand", "arrives"), [(0, True), (1, True), (2, True), (3, False)])
def test_ipi_shorthands(apic, shorthand, arrives):
    apic.write(Reg.ICR_LOW, shorthand << 18 | V)
    assert (apic.pending_vector() == V) == arrives
    assert apic.read(Reg.ICR_LOW) == shorthand << 18 | V  # never busy


def test_ipi_modes(apic):
    apic.write(Reg.ICR_LOW, Mode.NMI << 8)
    assert apic.take_nmi()
    assert not apic.take_nmi()
    for mode in (Mode.INIT, Mode.STARTUP, Mode.SMI):
        apic.write(Reg.ICR_LOW, mode << 8 | 0x4000)
    apic.write(Reg.ICR_LOW, 2 << 18 | Mode.INIT << 8)
    assert apic.state.irr == 0


def test_message_modes(apic):
    assert apic.accept(0, Mode.NMI)
    assert apic.take_nmi()
    assert apic.accept(0, Mode.EXTINT)
    assert apic.intr_pending()
    apic.acknowledge_intr()
    assert not apic.intr_pending()
    assert not apic.accept(0, Mode.INIT)
    assert not apic.accept(0, Mode.SMI)


# Errors [11.5.3]


def test_illegal_vectors(apic):
    apic.write(0x370, 0xFE)
    assert not apic.accept(5, Mode.FIXED)
    assert apic.pending_vector() == 0xFE
    assert apic.read(Reg.ESR) == 0  # only a write shows it
    apic.write(Reg.ESR, 0)
    assert apic.read(Reg.ESR) == 0x40
    apic.write(Reg.ESR, 0)
    assert apic.read(Reg.ESR) == 0
    apic.write(Reg.ICR_LOW, 1 << 18 | 3)
    apic.write(Reg.ESR, 0)
    assert apic.read(Reg.ESR) == 0x20


@pytest.mark.parametrize("offset", [0x000, 0x010, 0x040, 0x290, 0x3F0, 0x2F0])
def test_illegal_registers(apic, offset):
    assert apic.read(offset) == 0
    apic.write(Reg.ESR, 0)
    assert apic.read(Reg.ESR) == 0x80
    apic.write(offset, 1)
    apic.write(Reg.ESR, 0)
    assert apic.read(Reg.ESR) == 0x80


def test_an_illegal_error_vector_ends(apic):
    apic.write(0x370, 0x05)
    apic.read(0)
    apic.write(Reg.ESR, 0)
    assert apic.read(Reg.ESR) == 0xC0


# Disabled APICs [11.4.7.2]


def test_software_disable(apic):
    apic.accept(V, Mode.FIXED)
    apic.write(0x350, 0x700)
    apic.write(Reg.SVR, 0xFF)
    assert apic.read(0x350) == 0x10700
    apic.write(0x350, 0x700)
    assert apic.read(0x350) == 0x10700  # can't be unmasked
    assert not apic.accept(0x51, Mode.FIXED)
    apic.write(Reg.ICR_LOW, 1 << 18 | 0x61)
    assert apic.pending_vector() == V  # what was pending stays
    assert apic.accept(0, Mode.NMI)


def test_global_disable_gives_the_pins_back(apic):
    apic.set_lint(0, True)
    assert not apic.intr_pending()  # LINT0 is masked
    assert apic.set_base(0xFEE00100)
    assert not apic.enabled
    assert apic.intr_pending()
    apic.set_lint(1, True)
    assert apic.take_nmi()
    assert not apic.accept(V, Mode.FIXED)
    assert apic.set_base(0xFEE00900)
    assert apic.read(Reg.SVR) == 0xFF


@pytest.mark.parametrize("value", [0xFEE00901, 0xFEE00D00, 0x1FEE00900])
def test_reserved_base_bits(apic, value):
    assert not apic.set_base(value)
    assert apic.base == 0xFEE00900


# LINT pins


def test_virtual_wire():
    apic, _ = make(enabled=False)
    apic.virtual_wire()
    apic.set_lint(0, True)
    assert apic.intr_pending()
    apic.acknowledge_intr()
    assert apic.intr_pending()  # a level
    apic.set_lint(0, False)
    assert not apic.intr_pending()
    apic.set_lint(1, True)
    apic.set_lint(1, True)
    assert apic.take_nmi()
    assert not apic.take_nmi()


def test_masked_extint(apic):
    apic.write(0x350, 0x10700)
    apic.set_lint(0, True)
    assert not apic.intr_pending()
    apic.write(0x350, 0x700)
    assert apic.intr_pending()


def test_fixed_edge_lint(apic):
    apic.write(0x350, V)
    apic.set_lint(0, True)
    assert apic.acknowledge() == V
    apic.write(Reg.EOI, 0)
    assert apic.pending_vector() is None
    apic.set_lint(0, False)
    apic.set_lint(0, True)
    assert apic.pending_vector() == V
    assert not apic.intr_pending()


def test_fixed_level_lint(apic):
    apic.write(0x350, 0x8000 | V)
    apic.set_lint(0, True)
    apic.acknowledge()
    apic.write(Reg.EOI, 0)
    assert apic.acknowledge() == V  # still high
    apic.set_lint(0, False)
    apic.write(Reg.EOI, 0)
    assert apic.pending_vector() is None


# Timer [11.5.4]


def fire_times(apic, clock, until_ns):
    """Run the machine's loop: sleep to the next deadline, tick, take the interrupt."""
    times = []
    while (deadline := apic.next_deadline_ns()) is not None and deadline <= until_ns:
        clock.ns = max(clock.ns, deadline)
        apic.tick(clock.ns)
        while apic.pending_vector() is not None:
            times.append((clock.ns, apic.acknowledge()))
            apic.write(Reg.EOI, 0)
    return times


DIVIDES = [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)]


@pytest.mark.parametrize(("code", "divisor"), DIVIDES)
def test_one_shot(code, divisor):
    apic, clock = make()
    start = clock.ns
    apic.write(Reg.DIVIDE, code)
    apic.write(0x320, V)
    apic.write(Reg.INITIAL_COUNT, 1000)
    assert apic.read(Reg.CURRENT_COUNT) == 1000
    clock.ns = start + 500 * divisor * 40
    assert apic.read(Reg.CURRENT_COUNT) == 500
    clock.ns -= 1
    assert apic.read(Reg.CURRENT_COUNT) == 501
    assert fire_times(apic, clock, start + 10**9) == [(start + 1000 * divisor * 40, V)]
    assert apic.read(Reg.CURRENT_COUNT) == 0
    assert apic.read(Reg.INITIAL_COUNT) == 1000


def test_periodic_does_not_drift():
    apic, clock = make()
    start = clock.ns
    apic.crystal_hz = 24_981_000  # 40.03 ns: no whole number
    apic.write(Reg.DIVIDE, 11)
    apic.write(0x320, 0x20000 | V)
    apic.write(Reg.INITIAL_COUNT, 99_924)  # 4 ms
    times = fire_times(apic, clock, start + 2 * 10**9 + 1000)
    assert len(times) == 500
    assert all(abs(t - start - 4_000_000 * (i + 1)) <= i + 1 for i, (t, _) in enumerate(times))


def test_missed_periods_come_as_one():
    apic, clock = make()
    apic.write(Reg.DIVIDE, 11)
    apic.write(0x320, 0x20000 | V)
    apic.write(Reg.INITIAL_COUNT, 25_000)  # 1 ms
    clock.ns += 10_500_000
    assert apic.read(Reg.CURRENT_COUNT) == 12_500
    assert apic.acknowledge() == V
    assert apic.pending_vector() is None
    assert apic.next_deadline_ns() == clock.ns + 500_000


def test_a_masked_timer_counts_but_is_silent():
    apic, clock = make()
    apic.write(Reg.DIVIDE, 11)
    apic.write(0x320, 0x10000 | V)
    apic.write(Reg.INITIAL_COUNT, 25_000)
    assert apic.next_deadline_ns() is None
    clock.ns += 500_000
    assert apic.read(Reg.CURRENT_COUNT) == 12_500
    clock.ns += 600_000
    apic.write(0x320, V)  # unmasked after it expired
    assert apic.pending_vector() is None
    assert apic.next_deadline_ns() is None


def test_count_zero_stops():
    apic, clock = make()
    apic.write(0x320, 0x20000 | V)
    apic.write(Reg.INITIAL_COUNT, 1000)
    apic.write(Reg.INITIAL_COUNT, 0)
    assert apic.next_deadline_ns() is None
    clock.ns += 10**9
    assert apic.read(Reg.CURRENT_COUNT) == 0
    assert apic.pending_vector() is None


def test_a_new_divisor_applies_to_what_is_left():
    apic, clock = make()
    apic.write(Reg.DIVIDE, 11)
    apic.write(0x320, V)
    apic.write(Reg.INITIAL_COUNT, 1000)
    clock.ns += 600 * 40
    apic.write(Reg.DIVIDE, 3)
    assert apic.read(Reg.CURRENT_COUNT) == 400
    assert apic.next_deadline_ns() == clock.ns + 400 * 16 * 40


def test_periodic_to_one_shot_stops_after_the_next():
    apic, clock = make()
    start = clock.ns
    apic.write(Reg.DIVIDE, 11)
    apic.write(0x320, 0x20000 | V)
    apic.write(Reg.INITIAL_COUNT, 25_000)
    clock.ns += 1_500_000
    apic.tick(clock.ns)
    apic.write(0x320, V)
    assert [t for t, _ in fire_times(apic, clock, start + 10**9)] == [clock.ns]
    assert clock.ns == start + 2_000_000


def test_tsc_deadline():
    apic, clock = make()
    apic.set_tsc_deadline(5000, 0)
    assert apic.read_tsc_deadline() == 0  # not in this mode
    apic.write(0x320, 0x40000 | V)
    apic.write(Reg.INITIAL_COUNT, 1000)
    assert (apic.read(Reg.INITIAL_COUNT), apic.next_deadline_ns()) == (0, None)
    apic.set_tsc_deadline(2_500_000 + 100, 100)
    assert apic.next_deadline_ns() == clock.ns + 1_000_000
    assert apic.read(Reg.CURRENT_COUNT) == 0
    assert apic.read_tsc_deadline() == 2_500_100
    clock.ns += 1_000_000
    assert apic.read_tsc_deadline() == 0
    assert apic.acknowledge() == V
    apic.set_tsc_deadline(50, 100)  # in the past: at once
    apic.tick(clock.ns)
    assert bits(apic, Reg.IRR) == 1 << V
    apic.set_tsc_deadline(10**12, 100)
    apic.set_tsc_deadline(0, 100)
    assert apic.next_deadline_ns() is None


def test_leaving_tsc_deadline_mode_disarms():
    apic, _ = make()
    apic.write(0x320, 0x40000 | V)
    apic.set_tsc_deadline(10**9, 0)
    apic.write(0x320, V)
    assert apic.next_deadline_ns() is None
    apic.write(Reg.INITIAL_COUNT, 1000)
    apic.write(0x320, 0x40000 | V)
    assert (apic.next_deadline_ns(), apic.read(Reg.INITIAL_COUNT)) == (None, 0)


# State


def test_a_foreign_state_is_refused(apic):
    saved = apic.save()
    saved["version"] = 99
    with pytest.raises(LapicStateMismatch):
        apic.load(saved)
    saved = apic.save()
    saved["fields"].popitem()
    with pytest.raises(LapicStateMismatch):
        apic.load(saved)


OFFSETS = [*Reg, 0x330, 0x340, 0x350, 0x360]
STEPS = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(OFFSETS), st.integers(0, 0xFFFFFFFF)),
    st.tuples(st.just("read"), st.sampled_from(OFFSETS), st.just(0)),
    st.tuples(st.just("accept"), st.integers(0, 255), st.integers(0, 7)),
    st.tuples(st.just("lint"), st.integers(0, 1), st.integers(0, 1)),
    st.tuples(st.just("wait"), st.integers(0, 10**7), st.just(0)),
    st.tuples(st.just("acknowledge"), st.just(0), st.just(0)),
    st.tuples(st.just("deadline"), st.integers(0, 10**8), st.just(0)),
)


def step(apic, clock, op, a, b):
    match op:
        case "write":
            return apic.write(a, b)
        case "read":
            return apic.read(a)
        case "accept":
            return apic.accept(a, b)
        case "lint":
            return apic.set_lint(a, bool(b))
        case "acknowledge":
            return apic.acknowledge()
        case "deadline":
            return apic.set_tsc_deadline(a, clock.ns * 5 // 2)
    clock.ns += a
    apic.tick(clock.ns)
    return apic.take_nmi()


@settings(max_examples=200, deadline=None)
@given(before=st.lists(STEPS, max_size=40), after=st.lists(STEPS, max_size=20))
def test_state_survives_msgpack_at_any_moment(before, after):
    old, clock = make()
    for op in before:
        step(old, clock, *op)
    new = LocalApic(0, CRYSTAL, TSC_HZ, clock)
    new.load(msgpack.unpackb(msgpack.packb(old.save())))
    for op in after:
        now = clock.ns
        expected = step(old, clock, *op)
        clock.ns = now
        assert step(new, clock, *op) == expected
        assert new.intr_pending() == old.intr_pending()
        assert new.next_deadline_ns() == old.next_deadline_ns()
    assert new.save() == old.save()
    assert isinstance(new.state, LapicState)
