"""Machine files for the tests: the repository's own, changed a little, and small ones for assembly guests."""

from __future__ import annotations

import re
from pathlib import Path

from tests.machine.drive import ROOT

GUEST = ROOT / "build" / "guest"
GUESTS = Path(__file__).parent / "guests"
CMDLINE = "console=ttyS0 panic=-1 nokaslr mitigations=off no_timer_check"

DEVICES = """
[[device]]
name = "uart0"
type = "uart16550"
ports = { regs = 0x3f8 }
irqs = { intr = 4 }
settings = { backend = "console" }

[[device]]
name = "pic"
type = "pic8259"
ports = { master = 0x20, slave = 0xa0, elcr = 0x4d0 }

[[device]]
name = "pit"
type = "pit8254"
ports = { counters = 0x40, port_b = 0x61 }
irqs = { out0 = 0 }

[[device]]
name = "kbd"
type = "i8042"
ports = { data = 0x60, command = 0x64, port_a = 0x92 }
irqs = { kbd = 1 }

[[device]]
name = "pm"
type = "acpi_pm"
ports = { pm = 0x600 }
irqs = { sci = 9 }
"""


def linux_machine(
    folder: Path,
    base: str,
    name: str,
    words: str = "",
    memory: str = "256M",
    initrd: str = "initramfs.cpio",
) -> Path:
    """machines/`base` under another name, with `words` more on the kernel's command line."""
    values = {
        "name": name,
        "memory": memory,
        "kernel": GUEST / "vmlinuz",
        "initrd": GUEST / initrd,
        "cmdline": f"{CMDLINE} {words}".strip(),
    }
    text = (ROOT / "machines" / base).read_text()
    for key, value in values.items():
        text, count = re.subn(rf'^{key} = ".*"$', f'{key} = "{value}"', text, count=1, flags=re.MULTILINE)
        assert count == 1, f"{base} has no line {key} = ..."
    return _written(folder, name, text)


def asm_machine(
    folder: Path,
    guest: str,
    name: str,
    replace: dict[str, str] | None = None,
    devices: str = "",
    memory_file: Path | None = None,
) -> Path:
    """A small PC for guests/`guest`.S, in which words are replaced first."""
    source = (GUESTS / f"{guest}.S").read_text()
    for word, text in (replace or {}).items():
        assert word in source
        source = source.replace(word, text)
    assembly = folder / f"{name}.S"
    assembly.write_text(f"{source}\n{(GUESTS / 'common.S').read_text()}")
    memory = f'[memory]\nfile = "{memory_file}"\n' if memory_file else ""
    machine = f'[machine]\nname = "{name}"\nmemory = "16M"\n[cpu]\napic = false\n'
    boot = f'[boot]\nkind = "asm"\nsource = "{assembly}"\n'
    return _written(folder, name, f"{machine}{boot}{memory}{DEVICES}{devices}")


def _written(folder: Path, name: str, text: str) -> Path:
    file = folder / f"{name}.toml"
    file.write_text(text)
    return file
