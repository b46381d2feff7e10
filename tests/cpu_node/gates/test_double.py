"""Second faults, double faults, triple faults [SDM vol. 3A table 6-5]."""

import pytest

from cpu_node import gates
from cpu_node.errors import DB, DE, DF, GP, NP, PF, TS, UD, GuestFault, TripleFault
from cpu_node.errors import SS as SS_FAULT
from tests.cpu_node.gates.kit import EIP, V
from tests.cpu_node.kit import (
    CODE1,
    CODE3,
    HANDLER,
    TOP0,
)

B, C, P = UD, GP, PF  # benign, contributory, page fault


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        (None, GuestFault(C, 5), C), (None, GuestFault(P, 2, 7), P), (B, GuestFault(C, 5), C),
        (B, GuestFault(P, 2, 7), P),
        (C, GuestFault(B), B), (C, GuestFault(TS, 5), DF), (DE, GuestFault(SS_FAULT, 5), DF),
        (C, GuestFault(P, 2, 7), P),
        (P, GuestFault(B), B), (P, GuestFault(NP, 5), DF), (P, GuestFault(P, 2, 7), DF),
        (DF, GuestFault(B), B),
        (DB, GuestFault(C, 5), C), (17, GuestFault(C, 5), C),
    ],
)  # fmt: skip
def test_second_faults(first, second, result):
    assert gates.combined(first, second) == (result, 0 if result == DF else second.error)


@pytest.mark.parametrize("second", [GuestFault(GP, 0), GuestFault(PF, 0, 0), GuestFault(NP, 3)])
def test_triple_fault(second):
    with pytest.raises(TripleFault):
        gates.combined(DF, second)


def test_double_fault_in_the_whole(m):
    """#PF whose stack page is absent: #PF again, so #DF through a gate with a good stack."""
    m.interrupt_gate(PF)
    m.interrupt_gate(DF, selector=CODE1)
    m.ring(3)
    m.memory.absent.add((TOP0 - 4) >> 12)
    gates.deliver(m.cpu, PF, 4, cr2=0x1000)
    assert m.cpu.eip == HANDLER + DF
    assert m.stack32(3) == [0, EIP, CODE3]
    assert m.cpu.cr2 == TOP0 - 4  # of the second #PF: the first push


def test_triple_fault_in_the_whole(m):
    m.cpu.idt_limit = 0
    before = m.snapshot()
    with pytest.raises(TripleFault):
        gates.deliver(m.cpu, GP, 0)
    assert m.snapshot() == before


def test_three_in_a_row(m):
    """An interrupt whose gate is bad gives #GP, whose gate is bad too: #DF."""
    m.interrupt_gate(DF)
    gates.deliver(m.cpu, V, external=True)
    assert m.cpu.eip == HANDLER + DF
    assert m.stack32(2) == [0, EIP]
