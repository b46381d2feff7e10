"""A local APIC with a clock of its own."""


from cpu_node.lapic import LocalApic
from cpu_node.lapic_state import Reg

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


def bits(apic, reg):
    return sum(apic.read(reg + 0x10 * i) << 32 * i for i in range(8))
