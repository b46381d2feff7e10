"""What the processor claims [SDM vol. 2 CPUID], and that Linux gets its clocks right from it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_node.cpu import EAX, EBX, ECX, EDX
from cpu_node.cpuid import SIGNATURE, CpuModel, cpuid, crystal_ratio, host_flags
from tests.cpu_node.kit import HOST, TSC_HZ, Machine


def leaf(m, index, subleaf=0):
    m.cpu.regs[EAX], m.cpu.regs[ECX] = index, subleaf
    cpuid(m.cpu)
    return tuple(m.cpu.regs[r] for r in (EAX, EBX, ECX, EDX))


@pytest.fixture
def m() -> Machine:
    return Machine(with_apic=True)


def text(words):
    return b"".join(w.to_bytes(4, "little") for w in words)


def test_vendor_and_range(m):
    eax, ebx, ecx, edx = leaf(m, 0)
    assert eax == 0x16
    assert text((ebx, edx, ecx)) == b"GenuineIntel"
    assert leaf(m, 0x80000000) == (0x80000008, 0, 0, 0)


def test_identity(m):
    eax, ebx, _, _ = leaf(m, 1)
    assert eax == SIGNATURE
    assert (eax >> 8 & 0xF, eax >> 4 & 0xF | eax >> 12 & 0xF0, eax & 0xF) == (6, 0x1C, 10)
    assert ebx == 0x0001_0800


EDX_BITS = {
    "FPU": 0, "DE": 2, "PSE": 3, "TSC": 4, "MSR": 5, "CX8": 8, "APIC": 9, "SEP": 11, "PGE": 13, "CMOV": 15,
    "PAT": 16, "CLFSH": 19, "MMX": 23, "FXSR": 24, "SSE": 25, "SSE2": 26,
}  # fmt: skip
ECX_BITS = {"SSE3": 0, "SSSE3": 9, "SSE4.1": 19, "SSE4.2": 20, "POPCNT": 23, "TSC deadline": 24}


def test_features_are_exactly_these(m):
    _, _, ecx, edx = leaf(m, 1)
    assert edx == sum(1 << bit for bit in EDX_BITS.values())
    assert ecx == sum(1 << bit for bit in ECX_BITS.values())
    assert leaf(m, 7) == (0, 1 << 1 | 1 << 9, 0, 0)
    assert leaf(m, 7, 1) == (0, 0, 0, 0)
    assert leaf(m, 0x80000001) == (0, 0, 0, 0)  # no NX, no long mode
    assert leaf(m, 0x80000007) == (0, 0, 0, 1 << 8)
    assert leaf(m, 0x80000008)[0] == 0x2020


def test_the_apic_bit_follows_the_apic(m):
    m.hooks.apic.set_base(0xFEE00100)
    assert not leaf(m, 1)[3] & 1 << 9
    without = Machine()
    _, _, ecx, edx = leaf(without, 1)
    assert not edx & 1 << 9
    assert not ecx & 1 << 24


def test_host_masks_what_runs_natively():
    model = CpuModel(TSC_HZ, True, HOST - {"sse4_2", "popcnt", "erms", "clflush"})
    _, _, ecx, edx = model.leaf(1, 0, True, False)
    assert ecx == sum(1 << bit for bit in ECX_BITS.values()) & ~(1 << 20 | 1 << 23)
    assert edx == sum(1 << bit for bit in EDX_BITS.values()) & ~(1 << 19)
    assert model.leaf(7, 0, True, False)[1] == 1 << 1
    assert CpuModel(TSC_HZ, True, HOST, crypto=True).leaf(1, 0, True, False)[2] & (1 << 25 | 2) == 1 << 25 | 2


def test_host_flags():
    text = "processor\t: 0\nflags\t\t: fpu tsc sse2\nbugs:\n\nflags: other\n"
    assert host_flags(text) == {"fpu", "tsc", "sse2"}
    with pytest.raises(ValueError, match="flags"):
        host_flags("processor: 0")


def test_caches(m):
    sizes = []
    for subleaf in range(5):
        eax, ebx, ecx, _ = leaf(m, 4, subleaf)
        if not eax & 0x1F:
            break
        size = ((ebx >> 22) + 1) * ((ebx & 0xFFF) + 1) * (ecx + 1)
        sizes.append((eax & 0x1F, eax >> 5 & 7, size))
    assert sizes == [(1, 1, 32 << 10), (2, 1, 32 << 10), (3, 2, 512 << 10)]
    assert leaf(m, 0x80000006)[2] >> 16 == 512
    assert leaf(m, 2)[0] & 0xFF == 1


def test_brand_string(m):
    brand = text(w for i in (2, 3, 4) for w in leaf(m, 0x80000000 + i))
    assert len(brand) == 48
    assert brand.rstrip(b"\0") == b"Backplane CPU (32-bit, translated) @ 2.40GHz"


def test_leaves_beyond_the_range_give_the_highest_basic_leaf(m):
    highest = leaf(m, 0x16)
    assert highest == (2400, 2400, 100, 0)
    for index in (0x17, 0x40000000, 0x80000009, 0xFFFFFFFF):
        assert leaf(m, index) == highest


@pytest.mark.parametrize("index", [3, 5, 6, 8, 9, 0xA, 0xB, 0xD, 0x14])
def test_empty_leaves(m, index):
    assert leaf(m, index) == (0, 0, 0, 0)


def test_limit_cpuid(m):
    m.cpu.misc_enable |= 1 << 22
    assert leaf(m, 0)[0] == 2
    assert leaf(m, 0x15) == leaf(m, 2)


def linux_tsc_khz(denominator, numerator, hz):
    """native_calibrate_tsc() of Linux 6.1: 32-bit unsigned arithmetic in kHz."""
    return ((hz // 1000) * numerator & 0xFFFFFFFF) // denominator


@given(st.integers(600_000_000, 6_200_000_000))
def test_leaf_15h_gives_linux_the_right_clocks(tsc_hz):
    denominator, numerator, hz, _ = CpuModel(tsc_hz, True, HOST).leaf(0x15, 0, True, False)
    assert linux_tsc_khz(denominator, numerator, hz) == tsc_hz // 1000
    assert abs(hz * numerator / denominator - tsc_hz) <= 1e-6 * tsc_hz
    assert hz % 1000 == 0
    assert hz // 1000 * 1000 // 250 * 250 == hz  # lapic_timer_period at HZ=250 is exact


def test_the_apic_timer_runs_at_the_crystal():
    m = Machine(with_apic=True)
    assert m.hooks.apic.crystal_hz == m.cpu.model.crystal_hz == leaf(m, 0x15)[2]


def test_a_hopeless_frequency_is_refused():
    with pytest.raises(ValueError, match="crystal"):
        crystal_ratio(1000)
