"""Interrupts of one CPU: what is due, whether it may come now, and waiting for the next while halted.

Source: Intel SDM vol. 3A 6.8 (IF and the shadows of STI and MOV SS), 6.7 (NMI), 10.8 (the local
APIC's order).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bus.recorder import VECTOR, Recorder
from cpu_node import gates
from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node.errors import NMI

if TYPE_CHECKING:
    from cpu_node.engine import Engine

_STI = 0xFB


class Interrupts:
    """Of the engine's CPU. The engine asks when KICK is set, one may be due, or the CPU is halted."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cpu = engine.cpu
        self.platform = engine.platform
        self.apic = engine.apic
        self.recorder: Recorder | None = None  # while what is delivered is to be noted
        self.shadow_over = False  # the instruction before this one had interrupts held off
        self._alarm: int | None = None

    def take_in(self, reason: int) -> None:
        """Take in what arrived; deliver an interrupt if one is due; wait while halted.

        `reason`: the last exit. Behind EXIT_SIMULATE there is no translated STI to have a shadow.
        """
        cpu, platform, apic = self.cpu, self.platform, self.apic
        d = self.engine.record.d
        d[at.KICK // 4] = 0
        platform.poll()
        if self.engine.stopping:
            if d[at.INTERRUPT_FLAG // 4] and reason != at.EXIT_SIMULATE and self._behind_sti():
                cpu.inhibit_interrupts = True  # who goes on from here knows nothing of `reason`
            self.shadow_over = False
            return  # a halted CPU would wait for something else to arrive
        if apic is not None:
            apic.set_lint(0, platform.intr)
            apic.tick(platform.now_ns())
            if not cpu.nmi_blocked and not cpu.inhibit_interrupts and apic.take_nmi():
                cpu.halted = False
                self._deliver(NMI)
            deadline = apic.next_deadline_ns()
            if deadline != self._alarm:
                self._alarm = deadline
                platform.set_alarm(deadline)
        waiting = self._waiting()
        if waiting and d[at.INTERRUPT_FLAG // 4] and reason != at.EXIT_SIMULATE and self._behind_sti():
            cpu.inhibit_interrupts = True
        self.shadow_over = False
        if waiting and d[at.INTERRUPT_FLAG // 4] and not cpu.inhibit_interrupts:
            vector = self._acknowledge()
            if vector is not None:
                cpu.halted = False
                self._deliver(vector)
            waiting = self._waiting()
        d[at.PENDING // 4] = waiting
        if waiting and d[at.INTERRUPT_FLAG // 4]:
            d[at.KICK // 4] = 1
        elif cpu.halted and not d[at.KICK // 4]:
            platform.idle(self._alarm)
            d[at.KICK // 4] = 1

    def _deliver(self, vector: int) -> None:
        if self.recorder is not None:
            self.recorder.short(VECTOR, vector, self.cpu.eip)
        gates.deliver(self.cpu, vector, external=True)

    def _behind_sti(self) -> bool:
        """May translated code just have executed STI? Then one more instruction comes first [6.8.1].

        Where the byte before EIP is something else's, or STI found IF set, the interrupt waits for nothing.
        """
        if self.shadow_over or self.cpu.halted or self.engine.mode & modes.INTERPRETED:
            return False
        before = self.cpu.eip - 1 & 0xFFFFFFFF
        line = self.engine.contexts.table.lines.get(before >> 12)
        return line is not None and line.code[before & 0xFFF] == _STI

    def _waiting(self) -> bool:
        apic = self.apic
        if apic is None:
            return self.platform.intr
        return apic.pending_vector() is not None or apic.intr_pending()

    def _acknowledge(self) -> int | None:
        """The vector to deliver; None when the 8259 has nothing any more."""
        apic = self.apic
        if apic is not None:
            if apic.pending_vector() is not None:
                return apic.acknowledge()
            apic.acknowledge_intr()
        return self.platform.int_ack()
