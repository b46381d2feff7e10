"""Assembly guests: assembled at start, refused with a line number."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.asm_boot import PROGRAM_PA, assemble
from launcher.boot_plan import prepare
from launcher.config import read_config
from launcher.errors import ConfigError

FILE = Path("guest.S")
MACHINE = '[machine]\nname = "a"\nmemory = "16M"\n[boot]\nkind = "asm"\nsource = "guest.S"\n'

REFUSED = {
    "unknown mnemonic": ("nop\nbogus eax\nnop\n", 2, "'bogus eax'"),
    "unknown symbol": ("start:\n  jmp start\n  jmp nowhere\n", 3, "'jmp nowhere'"),
    "bad operand": ("x = 1\n jmp later\n mov [later], eex\nlater:\n nop\n", 3, "'mov [later], eex'"),
    "the first of two": ("nop\nfoo\nbar\n", 2, "'foo'"),
    "a missing operand, which keystone would drop": ("nop\nmov eax,\nnop\n", 2, "'mov eax,'"),
}


def test_labels_and_constants_are_known_before_they_are_defined() -> None:
    assert assemble("jmp end\nmov dx, PORT\nend:\nPORT = 0x604\n", FILE) == bytes.fromhex("eb0466ba0406")
    assert assemble(".long here\nhere:\n", FILE) == (PROGRAM_PA + 4).to_bytes(4, "little")


@pytest.mark.parametrize(("source", "line", "text"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_names_the_line(source: str, line: int, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        assemble(source, FILE)
    assert str(caught.value).startswith(f"guest.S:{line}: keystone refuses {text} (")


def test_what_only_the_whole_shows_is_refused_too() -> None:
    for source in ("a:\n nop\na:\n nop\n", "loop far\n.space 300\nfar:\n nop\n"):
        with pytest.raises(ConfigError, match=r"guest\.S: keystone refuses the whole \("):
            assemble(source, FILE)


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"guest\.S: assembles to nothing"):
        assemble("# nothing here\n", FILE)


def test_a_missing_source_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(MACHINE)
    with pytest.raises(ConfigError, match=r"m\.toml: boot\.source: .*guest\.S cannot be read \(No such file"):
        prepare(read_config(tmp_path / "m.toml"))


def test_a_program_bigger_than_memory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(MACHINE)
    (tmp_path / "guest.S").write_text(".space 15728641\n")
    with pytest.raises(ConfigError, match="does not fit into memory"):
        prepare(read_config(tmp_path / "m.toml"))


def test_the_plan_of_the_hello_machine() -> None:
    plan = prepare(read_config(Path(__file__).parents[2] / "machines" / "hello.toml"))
    program = dict(plan.images)[PROGRAM_PA]
    assert plan.start["eip"] == PROGRAM_PA
    assert program.startswith(b"\xfa\xfc")  # cli, cld
    assert b"Hello from a PC made of processes.\r\n\0" in program
