"""Model-specific registers and the time-stamp counter [SDM vol. 4; vol. 3B 17.17]."""

import pytest

from cpu_node import msr
from cpu_node.cpu import CR4_TSD, EAX, ECX, EDX
from cpu_node.cpuid import MICROCODE_REVISION
from cpu_node.errors import GP, GuestFault
from cpu_node.lapic_state import BASE_RESET
from cpu_node.msr import Msr
from tests.cpu_node.kit import Machine

MODE = ("mode_changed",)


@pytest.fixture
def m() -> Machine:
    return Machine(with_apic=True)


READS = [
    (Msr.PLATFORM_ID, 0), (Msr.APIC_BASE, BASE_RESET), (Msr.FEATURE_CONTROL, 1), (Msr.TSC_ADJUST, 0),
    (Msr.BIOS_SIGN_ID, MICROCODE_REVISION << 32), (Msr.PLATFORM_INFO, 24 << 8),
    (Msr.MISC_FEATURES_ENABLES, 0),
    (Msr.SYSENTER_CS, 0), (Msr.MISC_ENABLE, 0x1801), (Msr.DEBUGCTL, 0), (Msr.PAT, 0x0007040600070406),
    (Msr.TSC_DEADLINE, 0),
]  # fmt: skip


@pytest.mark.parametrize(("index", "value"), READS)
def test_reset_values(m, index, value):
    m.cpu.regs[ECX] = index
    msr.rdmsr(m.cpu)
    assert m.cpu.regs[EDX] << 32 | m.cpu.regs[EAX] == value


WRITES = [
    # MSR, value, read back or fault
    (Msr.SYSENTER_CS, 0x60, 0x60), (Msr.SYSENTER_ESP, 0xC1234567, 0xC1234567),
    (Msr.SYSENTER_EIP, 0x5_C1234567, 0xC1234567), (Msr.PAT, 0x0007010600070106, 0x0007010600070106),
    (Msr.PAT, 0x02, (GP, 0)), (Msr.PAT, 0x08 << 56, (GP, 0)),
    (Msr.MISC_ENABLE, 0x1801 | 1 << 22, 0x1801 | 1 << 22),
    (Msr.MISC_ENABLE, 0x1800, 0x1800), (Msr.MISC_ENABLE, 1, (GP, 0)), (Msr.DEBUGCTL, 0, 0),
    (Msr.DEBUGCTL, 2, (GP, 0)),
    (Msr.MISC_FEATURES_ENABLES, 0, 0), (Msr.MISC_FEATURES_ENABLES, 1, (GP, 0)),
    (Msr.FEATURE_CONTROL, 0, (GP, 0)),
    (Msr.PLATFORM_ID, 0, (GP, 0)), (Msr.PLATFORM_INFO, 0, (GP, 0)),
    (Msr.BIOS_SIGN_ID, 0, MICROCODE_REVISION << 32), (Msr.APIC_BASE, 0xFEE00900, 0xFEE00900),
    (Msr.APIC_BASE, 0xFEC00100, 0xFEC00100), (Msr.APIC_BASE, 0xFEE00D00, (GP, 0)),
    (Msr.APIC_BASE, 0x1_FEE00900, (GP, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("index", "value", "result"), WRITES)
def test_writes(m, index, value, result):
    m.cpu.regs[ECX], m.cpu.regs[EAX], m.cpu.regs[EDX] = index, value & 0xFFFFFFFF, value >> 32
    if isinstance(result, tuple):
        assert m.faults(msr.wrmsr, m.cpu) == result
    else:
        msr.wrmsr(m.cpu)
        assert msr.read_msr(m.cpu, index) == result
    assert not [call for call in m.hooks.calls if call[0] == "unknown_msr"]


@pytest.mark.parametrize("index", [0, 0xFE, 0x250, 0x2FF, 0xC0000080, 0x179, 0x48, 0xFFFFFFFF])
def test_unknown(m, index):
    m.cpu.regs[ECX], m.cpu.regs[EAX], m.cpu.regs[EDX] = index, 5, 6
    assert m.faults(msr.rdmsr, m.cpu) == (GP, 0)
    assert m.faults(msr.wrmsr, m.cpu) == (GP, 0)
    assert m.hooks.calls == [("unknown_msr", index, False, 0), ("unknown_msr", index, True, 6 << 32 | 5)]


@pytest.mark.parametrize("index", [Msr.APIC_BASE, Msr.TSC_DEADLINE])
def test_no_apic_no_apic_msrs(index):
    m = Machine()
    with pytest.raises(GuestFault, match="#GP"):
        msr.read_msr(m.cpu, index)
    assert m.hooks.calls == [("unknown_msr", index, False, 0)]


@pytest.mark.parametrize("action", [msr.rdmsr, msr.wrmsr])
@pytest.mark.parametrize("mode", [1, 3, "virtual8086"])
def test_privilege(m, action, mode):
    if mode == "virtual8086":
        m.virtual8086()
    else:
        m.ring(mode)
    m.cpu.regs[ECX] = Msr.TSC
    assert m.faults(action, m.cpu) == (GP, 0)


def test_rdtsc(m):
    m.hooks.tsc = 0x1_FFFF_FFFE
    m.ring(3)
    msr.rdtsc(m.cpu)
    assert (m.cpu.regs[EDX], m.cpu.regs[EAX]) == (1, 0xFFFFFFFF)
    m.cpu.cr4 = CR4_TSD
    assert m.faults(msr.rdtsc, m.cpu) == (GP, 0)
    m.ring(0)
    msr.rdtsc(m.cpu)
    assert (m.cpu.regs[EDX], m.cpu.regs[EAX]) == (2, 0)


def test_rdpmc(m):
    assert m.faults(msr.rdpmc, m.cpu) == (GP, 0)


def test_writing_the_tsc_moves_tsc_adjust(m):
    m.hooks.tsc = 1000
    msr.write_msr(m.cpu, Msr.TSC, 5)
    assert m.cpu.tsc_adjust == (5 - 1001) % 2**64
    assert msr.read_msr(m.cpu, Msr.TSC) == 6
    assert m.hooks.calls == [MODE]
    msr.write_msr(m.cpu, Msr.TSC_ADJUST, 0)
    assert m.hooks.calls == [MODE, MODE]
    assert msr.tsc(m.cpu) == 1003
    msr.write_msr(m.cpu, Msr.TSC_ADJUST, 0)
    assert m.hooks.calls == [MODE, MODE]


def test_a_deadline_follows_the_tsc(m):
    apic = m.hooks.apic
    apic.write(0xF0, 0x1FF)
    apic.write(0x320, 0x40030)
    m.hooks.tsc = 0
    msr.write_msr(m.cpu, Msr.TSC_DEADLINE, 2_400_001)
    assert apic.next_deadline_ns() == 1_000_000
    msr.write_msr(m.cpu, Msr.TSC_ADJUST, 1_200_000)
    assert abs(apic.next_deadline_ns() - 500_000) < 3
    assert msr.read_msr(m.cpu, Msr.TSC_DEADLINE) == 2_400_001


def test_moving_the_apic_flushes(m):
    msr.write_msr(m.cpu, Msr.APIC_BASE, 0xFEC00900)
    assert m.hooks.apic.mmio_base == 0xFEC00000
    assert ("flush_tlb", True) in m.hooks.calls
