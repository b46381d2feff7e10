"""State survives msgpack at any moment."""

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_node.lapic import LocalApic
from cpu_node.lapic_state import LapicState, LapicStateMismatch, Reg
from tests.cpu_node.lapic.kit import CRYSTAL, TSC_HZ, make


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
