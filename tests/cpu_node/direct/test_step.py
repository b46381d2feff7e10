"""Single steps of user code that runs directly: TF is set there by POPF, and nobody is told."""

from __future__ import annotations

import pytest

from cpu_node.direct.choose import MAKERS
from cpu_node.errors import DB, UD
from tests.cpu_node.board import CODE, COUNTER, MMIO
from tests.cpu_node.child import isolated
from tests.cpu_node.direct.boards import user_board

FLAG = "mov eax, 1; xor ecx, ecx; pushfd; or dword ptr [esp], 0x100"
STEPPED = {  # what POPF lets step is no affair of the host's alone
    "a write to its own page": f"{FLAG}; popfd; inc byte ptr [{CODE + 0x800}]; inc ecx; inc ecx; ud2",
    "device memory": f"{FLAG}; popfd; mov edx, [{MMIO}]; inc ecx; inc ecx; ud2",
    "into a page with cpuid": f"{FLAG}; jmp {CODE + 0xFFF}",
}  # fmt: skip


@pytest.mark.parametrize("backend", sorted(MAKERS))
@pytest.mark.parametrize("name", STEPPED)
@isolated
def test_the_step_after_a_popf(backend: str, name: str) -> None:
    """#DB comes after the next instruction, whoever does that one."""
    seen = []
    for how in (None, backend):
        board = user_board(how)
        board.map(MMIO, MMIO)
        board.flush()
        board.handler(f"inc dword ptr [{COUNTER}]; mov [{COUNTER + 4}], ecx; and dword ptr [esp+8], ~0x100; "
                      f"push dword ptr [esp]; pop dword ptr [{COUNTER + 8}]", DB)
        board.handler("hlt", UD)
        board.ram[CODE + 0xFFF : CODE + 0x1008] = b"\x9d\x40\x0f\xa2\x41\x41\x41\x0f\x0b"  # POPF; INC; CPUID
        board.run(STEPPED[name])
        seen.append(([board.peek32(COUNTER + 4 * n) for n in range(3)], list(board.regs), board.faults))
        for space in board.engine.contexts.spaces.values():
            space.close()
    assert seen[0] == seen[1]
    assert seen[0][0][:2] == [1, 0]
