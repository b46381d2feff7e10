"""The check of SOFT host code passes what the templates make, and finds a template that is wrong."""

from __future__ import annotations

import pytest

from cpu_node import emit_soft
from cpu_node import layout as at
from cpu_node import mode as modes
from cpu_node.assembled import assemble
from cpu_node.assist_stubs import assist_slot
from cpu_node.emit_soft import templates_of
from cpu_node.line import Line, page_line
from cpu_node.translate import Translation, translate
from tests.cpu_node.board import CODE, asm
from tests.fuzz.case import PAGE
from tests.fuzz.host_code import stray
from tests.fuzz.target import POSITION

SOFT = modes.USER | modes.SOFT
LOADS = (
    "mov eax, [ebx]", "movzx eax, word ptr [ebx+4]", "movups xmm0, [ebx]", "movaps xmm1, [ebx+ecx*4]",
    "fld tbyte ptr [ebx]", "fxrstor [ebx]", "frstor [ebx]", "fldenv [ebx]", "pop eax", "popad", "leave",
    "popfd", "ret", "ret 8", "jmp dword ptr [ebx]", "mov eax, fs:[ebx]", "bt [ebx], ecx", "cmp [ebx], eax",
    "test [ebx], eax", "mul dword ptr [ebx]", "fadd qword ptr [ebx]", "ldmxcsr [ebx]", "mov eax, [0x200000]",
)  # fmt: skip
STORES = (
    "mov [ebx], eax", "mov word ptr [ebx+4], 5", "movups [ebx], xmm0", "movaps [ebx+ecx*4], xmm1",
    "fstp tbyte ptr [ebx]", "fxsave [ebx]", "fnsave [ebx]", "fnstenv [ebx]", "push eax", "push 5",
    "push 0x12345678", "pushfd", "call 0x100020", "call ebx", "mov fs:[ebx], eax", "bts [ebx], ecx",
    ".byte 0x1e", "add [ebx], eax", "inc word ptr [ebx]", "lock cmpxchg8b [ebx]",
    "lock cmpxchg [ebx], edx", "xchg [ebx], eax", "neg dword ptr [ebx]", "stmxcsr [ebx]",
    "mov [0x200000], eax", "mov word ptr [ebx], ds", "rol dword ptr [ebx], 3", "movntdq [ebx], xmm1",
)  # fmt: skip
BOTH = ("push dword ptr [ebx]", "pop dword ptr [ebx]", "call dword ptr [ebx]", "pop dword ptr [esp+4]")
BYTES = ("mov al, [ebx]", "mov [ebx], al", "add [ebx], ch", "xlatb", "sete [ebx]", "mov [ebx], ah")
OTHERS = ("rep movsb", "cmpsb", "lodsw", "int 0x80", "sysenter", "mov eax, ebx", "loop 0x100000", "hlt")
INSIDE = at.RECORD_SIZE - 4


def made_of(text: str, verify: bool = False) -> tuple[Translation, Line]:
    page = (asm(text, CODE) + b"\xf4").ljust(PAGE, b"\xf4")
    line = page_line(CODE >> 12, CODE >> 12, SOFT, page, verify)
    return translate(line, 0, templates_of(SOFT), POSITION), line


@pytest.mark.parametrize("text", LOADS + STORES + BOTH + BYTES + OTHERS)
def test_templates_pass(text: str) -> None:
    for verify in (False, True):
        assert stray(*made_of(text, verify)) == []


def wrong_probe(
    monkeypatch: pytest.MonkeyPatch, cut: int = 0, write: bool | None = None, miss: int = 0
) -> None:
    """Probes of a byte less, in the other table, or that ask for less where they miss."""
    right = emit_soft.probe

    def probe(start: int, size: int, to_write: bool, save: bool = True, missed: bytes = b"") -> bytes:
        code = right(start, size - cut, to_write if write is None else write, save, missed)
        asked, less = (b"\x41\xb9" + (size - 1 - n).to_bytes(4, "little") for n in (0, miss))
        return code.replace(asked, less) if miss else code

    monkeypatch.setattr(emit_soft, "probe", probe)


@pytest.mark.parametrize("text", LOADS + STORES + BOTH)
def test_an_access_wider_than_its_probe_is_found(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_probe(monkeypatch, cut=1)
    assert any("that were looked up" in line for line in stray(*made_of(text)))


@pytest.mark.parametrize("text", STORES + BOTH)
def test_a_write_behind_a_read_probe_is_found(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_probe(monkeypatch, write=False)
    assert any("a write behind a probe for reading" in line for line in stray(*made_of(text)))


@pytest.mark.parametrize("text", LOADS + STORES + BOTH)
def test_a_miss_that_asks_for_less_is_found(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_probe(monkeypatch, miss=1)
    assert any("bytes were looked up" in line for line in stray(*made_of(text)))


CHANGES = {
    "another table for the last byte": ("498b4ccdf4", "498b8ccdf4ff7f00"),
    "a displacement behind the tables": ("4f8b4ccdf4", "4f8b4ccd7f"),
    "the address isn't shifted": ("c44213f7c8", "4589c1"),
    "another shift count": ("c4e213f7c9", "c4e20bf7c9"),
    "an entry may be none": ("450fb6d1", "41ba01000000"),
    "ok without asking": ("e314", "eb14"),
    "begins somewhere else": ("4c8d15", "4c8d1d"),
    "ECX is lost": ("4989cc", "4c89e1"),
    "a byte further": ("438b4408ff", "438b440800"),
    "a byte before": ("438b4408ff", "438b4408fe"),
    "another register": ("438b4408ff", "438b441bff"),
    "an address of its own": ("438b4408ff", "8b03"),
    "by way of GS": ("438b4408ff", "65678b03"),
    "written instead": ("438b4408ff", "43894408ff"),
    "wider": ("438b4408ff", "4b8b4408ff"),
    "R8 changes": ("4c89e1", "4c89e14189d8"),
    "R13 changes": ("4c89e1", "4c89e14989dd"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_template_with_one_wrong_instruction_is_found(what: str) -> None:
    old, new = (bytes.fromhex(text) for text in CHANGES[what])
    made, line = made_of("mov eax, [ebx]")
    assert made.code.count(old) == 1
    where = made.code.index(old)
    made.code = made.code[:where] + new + made.code[where + len(old) :]
    grown = len(new) - len(old)
    made.chunk.end += grown
    for index, host in enumerate(made.chunk.hosts):
        made.chunk.hosts[index] = host + (grown if host > where else 0)
    found = stray(made, line)
    assert found
    if grown:  # and not for the jump alone that leads elsewhere now
        assert any("into nowhere" not in text and "no host instruction" not in text for text in found)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("mov eax, [rbx]", "not through the TLB"),
        ("mov eax, gs:[ebx]", "a segment"),
        ("mov rax, [r13+rbx*8-12]", "no page's number"),
        ("mov eax, [r8+r9-1]", "no probe has found it"),
        ("mov eax, [r9]", "not through the TLB"),
        (f"mov dword ptr [r15+{INSIDE}], eax", "not to be written"),
        (f"mov rax, [r15+{INSIDE}]", "behind the record"),
        ("push rax", "the guest's stack"),
        ("mov rsp, rax", "RSP changes"),
        ("mov rsp, [r15]", ""),  # and stays there
        ("lea r14, [rax]", "r14 changes"),
        ("xlatb", "must not be here"),
        ("stosb", "not through the TLB"),
        ("jmp rax", "not a jump through a table"),
        ("jmp [r14+r8*8]", "r8 may be anything"),
        (f"jmp [r15+{at.SIMULATE_SLOT}]", "r8 may be anything"),
        (f"mov r8d, 5\njmp [r15+{assist_slot('iret')}]", "no exit or assist of CPL 3"),
        (f"mov r8d, 5\njmp [r15+{assist_slot('tlb_write')}]", "not what the probe missed"),
        (f"mov r9d, 0\njmp [r15+{assist_slot('tlb_movsb')}]", "not as assists for strings take it"),
        ("jmp .+0x100000", "into nowhere"),
    ],
)  # fmt: skip
def test_stray_host_code_is_found(text: str, why: str) -> None:
    made, line = made_of("mov eax, [ebx]")
    assert stray(made, line) == []
    added = b"\xe9\x00\x10\x00\x00" if text.startswith("jmp .+") else assemble(text, 0)
    made.code = added + made.code
    made.chunk.hosts[1] += len(added)
    made.chunk.end += len(added)
    found = stray(made, line)
    assert any((why or "the stack is the host's") in text for text in found), found


def test_a_jump_into_a_template_is_found() -> None:
    for text in ("mov eax, [ebx]\njne 0x100000", "mov eax, [ebx]\nloop 0x100000"):
        made, line = made_of(text)
        assert stray(made, line) == []
        where = made.chunk.hosts[2] - 4
        rel = int.from_bytes(made.code[where : where + 4], "little", signed=True)
        for off in (3, 8):  # the second and the third instruction of the probe
            wrong = (rel + 3 + off).to_bytes(4, "little", signed=True)
            made.code = made.code[:where] + wrong + made.code[where + 4 :]
            assert any("back into a template" in line_ for line_ in stray(made, line))
