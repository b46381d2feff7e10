"""CPUID: what this processor claims, and the clocks that follow from it.

Source: Intel SDM vol. 2 page CPUID (tables 3-8 to 3-14), vol. 3B section 18.7.3 (TSC, crystal, APIC
timer); Linux 6.1 arch/x86/kernel/tsc.c native_calibrate_tsc() for leaf 15h used in 32-bit arithmetic.

The identity is family 6, model 1Ch, stepping 10 (Atom "Bonnell", an in-order core) although that core had no
SSE4: operating systems know in-order models as free of speculation bugs, and so build in none of the
mitigations (VERW at every return to user mode, retpolines) that cost most in a translator, while it is the
host CPU that speculates, on other code than the guest's compiler wrote.
Left out, and so not claimed: VME, PAE, NX, PSE-36, MCE, MCA, MTRR, CMPXCHG16B, MONITOR, VMX, x2APIC, XSAVE
and all that needs it, performance counters, topology leaf 0Bh.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from cpu_node.cpu import EAX, EBX, ECX, EDX, Cpu

VENDOR = b"GenuineIntel"
SIGNATURE = 0x000106CA  # family 6, model 1Ch, stepping 10 (stepping > 2: no PSE erratum AAE44)
MICROCODE_REVISION = 0x10A
MAX_LEAF, MAX_EXTENDED_LEAF, LIMITED_LEAF = 0x16, 0x80000008, 2
MISC_ENABLE_FAST_STRINGS, MISC_ENABLE_LIMIT_CPUID = 1 << 0, 1 << 22
MISC_ENABLE_RESET = MISC_ENABLE_FAST_STRINGS | 1 << 11 | 1 << 12  # BTS and PEBS unavailable

CRYSTAL_KHZ = 25_000  # the search for a crystal starts here
CRYSTAL_STEPS = 2_000
TSC_TOLERANCE = 0.5e-6

# (bit, claimed only if the host's /proc/cpuinfo shows this flag; None: the CPU node provides it itself)
LEAF1_EDX: tuple[tuple[int, str | None], ...] = (
    (0, "fpu"), (2, None), (3, None), (4, "tsc"), (5, None), (8, "cx8"), (11, None), (13, None),
    (15, "cmov"), (16, None), (19, "clflush"), (23, "mmx"), (24, "fxsr"), (25, "sse"), (26, "sse2"),
)  # fmt: skip  # FPU DE PSE TSC MSR CX8 SEP PGE CMOV PAT CLFSH MMX FXSR SSE SSE2
LEAF1_EDX_APIC = 1 << 9
LEAF1_ECX: tuple[tuple[int, str | None], ...] = (
    (0, "pni"), (9, "ssse3"), (19, "sse4_1"), (20, "sse4_2"), (23, "popcnt"),
)  # fmt: skip
LEAF1_ECX_CRYPTO: tuple[tuple[int, str | None], ...] = ((1, "pclmulqdq"), (25, "aes"))
LEAF1_ECX_TSC_DEADLINE = 1 << 24
LEAF7_EBX: tuple[tuple[int, str | None], ...] = ((1, None), (9, "erms"))  # TSC_ADJUST, ERMS
INVARIANT_TSC = 1 << 8  # 8000_0007h EDX
CLFLUSH_LINE = 8  # in quadwords: 64 bytes

# Leaf 2: B3h data TLB and B0h instruction TLB of 128 4 KiB entries, F0h 64-byte prefetch, FFh see leaf 4.
LEAF2 = (0xB0F0B301, 0xFF, 0, 0)
# Leaf 4, a row per subleaf: type (1 data, 2 instruction, 3 unified), level, ways, sets; lines of 64 bytes.
CACHES = ((1, 1, 8, 64), (2, 1, 8, 64), (3, 2, 8, 1024))

Leaf = tuple[int, int, int, int]  # EAX, EBX, ECX, EDX


def host_flags(cpuinfo: str) -> frozenset[str]:
    """The feature flags of the first processor in the text of the host's /proc/cpuinfo."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    raise ValueError("no 'flags' line in the host's /proc/cpuinfo")


def crystal_ratio(tsc_hz: int) -> tuple[int, int, int]:
    """(crystal Hz, numerator, denominator) for leaf 15h, with crystal * numerator / denominator = tsc_hz.

    The crystal is a whole number of kHz, the product in kHz fits 32 bits, and the quotient in whole kHz is
    tsc_hz rounded down: so Linux, which computes it that way, gets both the TSC and the APIC timer right.
    """
    tsc_khz = tsc_hz // 1000
    denominator = 1000
    while (tsc_khz + CRYSTAL_KHZ) * denominator >= 1 << 32:
        denominator //= 2
    for step in range(CRYSTAL_STEPS):
        crystal = CRYSTAL_KHZ + (-step // 2 if step & 1 else step // 2)
        numerator = round(tsc_hz * denominator / (crystal * 1000))
        exact = crystal * 1000 * numerator / denominator
        if crystal * numerator // denominator == tsc_khz and abs(exact - tsc_hz) <= TSC_TOLERANCE * tsc_hz:
            return crystal * 1000, numerator, denominator
    raise ValueError(f"no crystal frequency near {CRYSTAL_KHZ} kHz fits a time-stamp counter of {tsc_hz} Hz")


def _bits(table: Iterable[tuple[int, str | None]], host: frozenset[str]) -> int:
    return sum(1 << bit for bit, flag in table if flag is None or flag in host)


@dataclass(frozen=True)
class CpuModel:
    """One processor identity. `host`: the host's flags, which mask what is executed natively."""

    tsc_hz: int
    has_apic: bool
    host: frozenset[str]
    apic_id: int = 0
    crypto: bool = False  # claim PCLMULQDQ and AES where the host has them
    signature: int = field(default=SIGNATURE, init=False)
    misc_enable_reset: int = field(default=MISC_ENABLE_RESET, init=False)
    microcode_revision: int = field(default=MICROCODE_REVISION, init=False)

    @cached_property
    def crystal(self) -> tuple[int, int, int]:
        """(Hz, numerator, denominator) of leaf 15h; the Hz are the local APIC timer's input clock too."""
        return crystal_ratio(self.tsc_hz)

    @property
    def crystal_hz(self) -> int:
        return self.crystal[0]

    @cached_property
    def brand(self) -> bytes:
        text = f"Backplane CPU (32-bit, translated) @ {self.tsc_hz / 1e9:.2f}GHz"
        return text.encode("ascii").ljust(48, b"\0")[:47] + b"\0"

    @property
    def features(self) -> list[str]:
        """The host's flags that the guest is told of."""
        tables = (LEAF1_EDX, LEAF1_ECX, LEAF7_EBX, LEAF1_ECX_CRYPTO if self.crypto else ())
        return sorted(flag for table in tables for _, flag in table if flag in self.host and flag is not None)

    def leaf(self, index: int, subleaf: int, apic_enabled: bool, limited: bool) -> Leaf:
        """The four registers. `limited`: IA32_MISC_ENABLE bit 22 is set.

        A leaf beyond the highest gives what the highest basic leaf gives, as on Intel's processors.
        """
        highest = LIMITED_LEAF if limited else MAX_LEAF
        if not (index <= highest or 0x80000000 <= index <= MAX_EXTENDED_LEAF):
            index = highest
        match index:
            case 0x0:
                name = [int.from_bytes(VENDOR[i : i + 4], "little") for i in (0, 4, 8)]
                return highest, name[0], name[2], name[1]
            case 0x1:
                return self._features(apic_enabled)
            case 0x2:
                return LEAF2
            case 0x4 if subleaf < len(CACHES):
                kind, level, ways, sets = CACHES[subleaf]
                return kind | level << 5 | 1 << 8, ways - 1 << 22 | 63, sets - 1, 0
            case 0x7 if subleaf == 0:
                return 0, _bits(LEAF7_EBX, self.host), 0, 0
            case 0x15:
                hz, numerator, denominator = self.crystal
                return denominator, numerator, hz, 0
            case 0x16:
                mhz = round(self.tsc_hz / 1e6)
                return mhz, mhz, 100, 0
            case 0x80000000:
                return MAX_EXTENDED_LEAF, 0, 0, 0
            case 0x80000002 | 0x80000003 | 0x80000004:
                at = (index - 0x80000002) * 16
                words = [int.from_bytes(self.brand[at + i : at + i + 4], "little") for i in (0, 4, 8, 12)]
                return words[0], words[1], words[2], words[3]
            case 0x80000006:
                _, _, ways, sets = CACHES[2]
                return 0, 0, ways * sets * 64 // 1024 << 16 | 6 << 12 | 64, 0  # 6: 8-way
            case 0x80000007:
                return 0, 0, 0, INVARIANT_TSC
            case 0x80000008:
                return 32 | 32 << 8, 0, 0, 0  # physical and linear address bits
            case _:
                return 0, 0, 0, 0

    def _features(self, apic_enabled: bool) -> Leaf:
        edx, ecx = _bits(LEAF1_EDX, self.host), _bits(LEAF1_ECX, self.host)
        if self.crypto:
            ecx |= _bits(LEAF1_ECX_CRYPTO, self.host)
        if self.has_apic:
            ecx |= LEAF1_ECX_TSC_DEADLINE
            edx |= LEAF1_EDX_APIC if apic_enabled else 0
        return self.signature, self.apic_id << 24 | 1 << 16 | CLFLUSH_LINE << 8, ecx, edx


def cpuid(cpu: Cpu) -> None:
    """CPUID."""
    regs, apic = cpu.regs, cpu.hooks.apic
    limited = bool(cpu.misc_enable & MISC_ENABLE_LIMIT_CPUID)
    apic_enabled = apic is not None and apic.enabled
    regs[EAX], regs[EBX], regs[ECX], regs[EDX] = cpu.model.leaf(regs[EAX], regs[ECX], apic_enabled, limited)
