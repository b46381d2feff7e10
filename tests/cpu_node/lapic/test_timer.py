"""The timer [SDM vol. 3A 11.5.4]."""

import pytest

from cpu_node.lapic_state import Reg
from tests.cpu_node.lapic.kit import V, bits, make


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
