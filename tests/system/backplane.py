"""Scenarios on our CPU, translated or by the simulator alone, where stubs_unsafe.install() has run."""

from __future__ import annotations

from cpu_node import mode as modes
from cpu_node.descriptor import build
from cpu_node.errors import TripleFault
from tests.cpu_node.board import Board, BoardEngine
from tests.system import common
from tests.system import places as p


class SystemBoard(Board):
    """One board for all scenarios of a process. `simulated`: every instruction by the simulator."""

    def __init__(self, simulated: bool = False) -> None:
        super().__init__(with_apic=True)
        self.delivers = True
        engine = self.engine
        if simulated:
            whole = engine._set_mode

            def stepping() -> None:
                whole()
                engine.mode |= modes.STEP

            engine._set_mode = stepping  # type: ignore[method-assign]

    def execute(self, image: bytes) -> bytes | None:
        """The arena after the scenario; None for one that halted for ever."""
        self.forget()
        self.delivers = True
        engine, cpu = self.engine, self.cpu
        assert isinstance(engine, BoardEngine)
        assert engine.apic is not None
        engine.apic.reset()
        cpu.cr0, cpu.cr4, cpu.eflags = 0x11, 0, 2
        cpu.tr = build(0, 0, 0xFFFF, 0x8B)  # as at RESET
        self.ram[: p.SIZE] = image
        engine.contexts.forget_all()
        engine.flush_tlb(True)
        engine.mode_changed()
        cpu.eip = common.START
        engine.stopping = False
        self.reports.clear()
        try:
            engine.run()
        except TripleFault:
            return self.ram[: p.SIZE]
        return None
