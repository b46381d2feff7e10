"""Bad input: one line, exit status 2, and no process, socket or file left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.checks import HostFacts
from launcher.main import main
from tests.devices import parts
from tests.launcher.conftest import Command, assert_nothing_left, machine_text

GIB = 1 << 30
EXTRA = '[[device]]\nname = "extra"\n'
UART = 'type = "uart16550"\nports = { regs = 0x2f8 }\n'

COPIER = f'[[device]]\nname = "c"\ntype = "{parts.__file__}:Copier"\nports = {{ regs = 0x500 }}\nsettings = '

CASES = {
    "unknown key": (
        machine_text('name = "a"\nmemroy = "16M"'),
        "machine.memroy: unknown key; did you mean 'memory'?",
    ),
    "unknown table": (machine_text(rest="[cpus]\n"), "cpus: unknown key; did you mean 'cpu'?"),
    "wrong type": (
        machine_text(rest="[cpu]\napic = 1\n"),
        "cpu.apic: is of type int; write a value of type bool",
    ),
    "no number of processes": (
        machine_text('name = "a"\nmemory = "16M"\nset_aside_after = 0'),
        "machine.set_aside_after: 0 processes can't have ended in a frame; write a number from 1 on",
    ),
    "wrong choice": (
        machine_text('name = "a"\nmemory = "16M"\non_reset = "explode"'),
        """machine.on_reset: 'explode' is not allowed here; write "restart" or "stop\"""",
    ),
    "unknown user mode": (
        machine_text(rest='[cpu]\nuser_mode = "native"\n'),
        """cpu.user_mode: 'native' is not allowed here; write "translated", "direct" or "auto\"""",
    ),
    "unknown trap back end": (
        machine_text(rest='[cpu]\ntrap_backend = "kvm"\n'),
        "cpu.trap_backend: 'kvm' is not allowed here; write",
    ),
    "unknown MMU": (
        machine_text(rest='[cpu]\nmmu = "hardware"\n'),
        """cpu.mmu: 'hardware' is not allowed here; write "auto", "windows" or "tlb\"""",
    ),
    "missing key": (machine_text('memory = "16M"'), "machine.name: is missing; add it"),
    "not TOML": ("[machine\n", "is not valid TOML"),
    "bad machine name": (
        machine_text('name = "a/b"\nmemory = "16M"'),
        "machine.name: 'a/b' cannot name a machine",
    ),
    "bad size": (machine_text('name = "a"\nmemory = "16X"'), "machine.memory: '16X' is no size"),
    "memory not in pages": (machine_text('name = "a"\nmemory = 16777217'), "not a multiple of 4 KiB"),
    "memory too small": (machine_text('name = "a"\nmemory = "8M"'), "less than 16 MiB"),
    "memory above 3 GiB": (machine_text('name = "a"\nmemory = "4G"'), "more than 3 GiB"),
    "missing kernel": (machine_text(boot='kind = "linux"\nkernel = "nothing"'), "nothing"),
    "no bzImage": (machine_text(boot='kind = "linux"\nkernel = "machine.toml"'), "machine.toml"),
    "missing source": (machine_text(boot='kind = "asm"\nsource = "nothing.S"'), "nothing.S"),
    "unknown kind of boot": (machine_text(boot='kind = "floppy"'), "boot.kind: 'floppy' is not allowed here"),
    "unknown device type": (
        machine_text(rest=EXTRA + 'type = "uart"'),
        "device[0].type: unknown device type 'uart'",
    ),
    "unknown region": (
        machine_text(rest=EXTRA + 'type = "uart16550"\nports = { rges = 1 }'),
        "device[0].ports: uart16550 has no 'rges': it has regs",
    ),
    "unknown line": (
        machine_text(rest=EXTRA + UART + "irqs = { out = 3 }"),
        "device[0].irqs: uart16550 has no 'out': it has intr",
    ),
    "missing region": (machine_text(rest=EXTRA + 'type = "uart16550"'), "wrong or missing: ['regs']"),
    "overlapping ports": (
        machine_text(rest=EXTRA + 'type = "uart16550"\nports = { regs = 0x3f8 }'),
        "port 0x3f8-0x3ff: both extra.regs (port 03f8-03ff) and uart0.regs (port 03f8-03ff) claim it",
    ),
    "overlapping IRQs": (
        machine_text(rest=EXTRA + UART + "irqs = { intr = 4 }"),
        "IRQ 4: both extra (intr) and uart0 (intr) drive it",
    ),
    "no such IRQ": (machine_text(rest=EXTRA + UART + "irqs = { intr = 16 }"), "IRQ 16"),
    "port beyond the space": (
        machine_text(rest=EXTRA + 'type = "uart16550"\nports = { regs = 0xfff8000 }'),
        "lies outside the port space",
    ),
    "two devices of one name": (
        machine_text(rest='[[device]]\nname = "uart0"\n' + UART),
        "device[1].name: a second device is named 'uart0'",
    ),
    "device named like a node": (
        machine_text(rest='[[device]]\nname = "memory"\n' + UART),
        "device[0].name: 'memory' is the name of another process",
    ),
    "bad setting": (
        machine_text(rest=EXTRA + UART + "settings = { baud = 9600 }"),
        "uart16550 has no setting 'baud'",
    ),
    "bad value of a setting": (
        machine_text(rest=EXTRA + UART + 'settings = { backend = "printer" }'),
        "device[0].settings: uart16550 settings: Invalid enum value 'printer'",
    ),
    "two consoles": (
        machine_text(rest=EXTRA + UART + 'settings = { backend = "console" }'),
        "machine.console: which of extra, uart0 is to be shown is not said; name one",
    ),
    "console that is none": (
        machine_text('name = "a"\nmemory = "16M"\nconsole = "pic"'),
        "machine.console: 'pic' has no console back end, these have: uart0",
    ),
    "missing device file": (
        machine_text(rest=EXTRA + 'type = "mydev.py:MyDevice"'),
        "mydev.py: there is no such file",
    ),
    "device file that raises": (
        machine_text(rest=EXTRA + 'type = "raises.py:A"'),
        "does not import: KeyError: 'x'",
    ),
    "device file that exits": (
        machine_text(rest=EXTRA + 'type = "exits.py:A"'),
        "does not import: SystemExit: 0",
    ),
    "device file of nonsense": (machine_text(rest=EXTRA + 'type = "nonsense.py:A"'), "A is not a subclass"),
    "device without its class": (machine_text(rest=EXTRA + 'type = "nonsense.py:B"'), "no class B"),
    "device that declares nonsense": (machine_text(rest=EXTRA + 'type = "declares.py:D"'), "PORTS is"),
    "host core that is not there": (
        machine_text(rest="[cpu]\nhost_cpu = 4096\n"),
        "this host has no core 4096",
    ),
    "translations in a folder without a slash": (
        machine_text(rest='[cpu]\ntranslations = "kepe"\n'),
        """cpu.translations: 'kepe' is not allowed here; write "keep", "off", or a folder""",
    ),
    "translations of a wrong type": (
        machine_text(rest="[cpu]\ntranslations = true\n"),
        "cpu.translations: is of type bool; write a value of type str",
    ),
    "memory file in no folder": (
        machine_text(rest='[memory]\nfile = "nowhere/ram.img"\n'),
        "memory.file: ",
    ),
    "memory file that is something else": (
        machine_text(rest='[memory]\nfile = "machine.toml"\n'),
        "it is something else",
    ),
    "disk without a file": (
        machine_text(rest=COPIER + "{}"),
        "device[0].settings: copier settings: Object missing required field `file`",
    ),
    "disk that is missing": (
        machine_text(rest=COPIER + '{ file = "no.img" }'),
        "no.img cannot be read (No such file or directory); name another file",
    ),
    "disk of an odd size": (
        machine_text(rest=COPIER + '{ file = "raises.py" }'),
        "raises.py is 8 bytes long, which is no multiple of 512 above 0",
    ),
    "virtio device without an IRQ": (
        machine_text(rest=EXTRA + 'type = "virtio-console"\nmmio = { regs = 0xd0000000 }\n'
                     + 'settings = { backend = "null" }'),
        "device[0].irqs: extra has no IRQ, a virtio device needs one; write irqs = { intr = 5 }",
    ),
    "one file for two disks": (
        machine_text(rest=COPIER + '{ file = "disk.img" }\n'
                     + COPIER.replace('"c"', '"d"').replace("0x500", "0x501") + '{ file = "./disk.img" }'),
        "disk.img is in use already, by this machine or another",
    ),
    "no interrupt controller": (
        machine_text(rest="[cpu]\napic = false\n")
        .replace("pic8259", "postcode")
        .replace(
            "ports = { master = 0x20, slave = 0xa0, elcr = 0x4d0 }", "ports = { post = 0x80, debug = 0xe9 }"
        ),
        "no interrupt could reach the CPU",
    ),
}

DEVICE_FILES = {
    "raises.py": "{}['x']\n",
    "exits.py": "raise SystemExit(0)\n",
    "nonsense.py": "class A: pass\n",
    "declares.py": (
        "from devices.base import *\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass S(DeviceState): x: int = 0\n"
        "class D(Device):\n  NAME = 'd'\n  STATE = S\n  PORTS = (1, 2)\n"
        "  def reset(self): pass\n  def read(self, region, offset, width): return 0\n"
        "  def write(self, region, offset, width, value): pass\n  def drive_lines(self): pass\n"
    ),
}


@pytest.fixture
def restored_signal() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def assert_one_line(errors: str, wanted: str) -> None:
    assert errors.startswith("launcher: ")
    assert errors.count("\n") == 1
    assert errors.endswith("\n")
    assert wanted in errors
    assert ";" in errors, "no remedy"


@pytest.mark.parametrize(("text", "wanted"), CASES.values(), ids=CASES.keys())
def test_check_refuses(
    text: str,
    wanted: str,
    tmp_path: Path,
    runtime: Path,
    capfd: pytest.CaptureFixture[str],
    restored_signal: None,
) -> None:
    (tmp_path / "machine.toml").write_text(text)
    for name, content in DEVICE_FILES.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "disk.img").write_bytes(bytes(1024))
    assert main(["check", str(tmp_path / "machine.toml")]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert_one_line(captured.err, wanted)
    assert not runtime.exists()


@pytest.mark.parametrize(
    "case", ["unknown key", "overlapping ports", "device file that raises", "missing source", "two consoles"]
)
def test_up_refuses_and_leaves_nothing(
    case: str, tmp_path: Path, runtime: Path, launcher: Callable[..., Command]
) -> None:
    text, wanted = CASES[case]
    (tmp_path / "machine.toml").write_text(text)
    for name, content in DEVICE_FILES.items():
        (tmp_path / name).write_text(content)
    for detach in ([], ["--detach"]):
        command = launcher("idle", "up", *detach, tmp_path / "machine.toml")
        assert command.finish() == 2
        assert command.output == b""
        assert_one_line(command.errors.decode(), wanted)
        assert_nothing_left(runtime)


def test_a_missing_machine_file(tmp_path: Path, runtime: Path, launcher: Callable[..., Command]) -> None:
    command = launcher("idle", "up", tmp_path / "nothing.toml")
    assert command.finish() == 2
    assert_one_line(command.errors.decode(), "nothing.toml: cannot be read (No such file or directory)")
    assert_nothing_left(runtime)


GOOD_HOST = HostFacts("x86_64", 0x2, 64 * GIB)


@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        (HostFacts("x86_64", 0x1, 64 * GIB), "no FSGSBASE"),
        (HostFacts("aarch64", 0x2, 64 * GIB), "its CPU is aarch64"),
        (HostFacts("x86_64", 0x2, 70 << 20), "16 MiB is beyond what the host has available, 70 MiB"),
    ],
    ids=["FSGSBASE", "architecture", "memory"],
)
@pytest.mark.parametrize("command", ["check", "up"])
def test_a_host_that_cannot_run_it(
    facts: HostFacts,
    wanted: str,
    command: str,
    machine_file: Path,
    runtime: Path,
    capfd: pytest.CaptureFixture[str],
    restored_signal: None,
) -> None:
    assert main([command, str(machine_file)], facts=lambda: facts) == 2
    assert_one_line(capfd.readouterr().err, wanted)
    assert_nothing_left(runtime)


@pytest.mark.parametrize("blocker", ["file", "proc"])
def test_a_runtime_directory_that_cannot_be_written(
    blocker: str,
    tmp_path: Path,
    machine_file: Path,
    runtime: Path,
    monkeypatch: pytest.MonkeyPatch,
    launcher: Callable[..., Command],
) -> None:
    (tmp_path / "blocker").write_text("")
    root = tmp_path / "blocker" if blocker == "file" else Path("/proc/nowhere")
    monkeypatch.setenv("BACKPLANE_RUNTIME_DIR", str(root))
    command = launcher("idle", "up", machine_file)
    assert command.finish() == 2
    assert_one_line(command.errors.decode(), "the run directory can't be made")
    assert_nothing_left(runtime)


def test_a_runtime_directory_whose_path_is_too_long(
    tmp_path: Path, machine_file: Path, monkeypatch: pytest.MonkeyPatch, launcher: Callable[..., Command]
) -> None:
    monkeypatch.setenv("BACKPLANE_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    command = launcher("idle", "up", machine_file)
    assert command.finish() == 2
    assert_one_line(command.errors.decode(), "too long for a socket")
    assert not (tmp_path / ("x" * 100)).exists()


def test_a_second_machine_of_the_same_name(
    machine_file: Path, runtime: Path, launcher: Callable[..., Command]
) -> None:
    first = launcher("idle", "up", machine_file)
    first.read_until("hello")
    another = machine_file.with_name("another.toml")
    another.write_text(machine_file.read_text() + "# another\n")
    second = launcher("idle", "up", another)
    assert second.finish() == 2
    assert_one_line(second.errors.decode(), f"a machine named 'fake' is running (launcher {first.pid})")
    third = launcher("poweroff", "up", "--name", "other", machine_file)
    assert third.finish() == 0
    first.process.send_signal(signal.SIGTERM)
    assert first.finish() == 128 + signal.SIGTERM
    assert_nothing_left(runtime)


def test_a_memory_file_of_another_machine(
    tmp_path: Path, runtime: Path, launcher: Callable[..., Command]
) -> None:
    (tmp_path / "machine.toml").write_text(machine_text(rest='[memory]\nfile = "ram.img"\n'))
    first = launcher("idle", "up", tmp_path / "machine.toml")
    first.read_until("hello")
    second = launcher("idle", "up", "--name", "other", tmp_path / "machine.toml")
    assert second.finish() == 2
    assert_one_line(second.errors.decode(), "ram.img is another machine's memory")
    os.kill(first.pid, signal.SIGINT)
    assert first.finish() == 130
    assert (tmp_path / "ram.img").stat().st_size == 16 << 20
    assert_nothing_left(runtime)


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["up"], ["up", "x", "--timeout", "0"], ["up", "x", "--timeout", "soon"],
     ["up", "x", "--until", ""], ["up", "x", "--log-level", "loud"], ["up", "x", "--on-reset", "panic"]],
)  # fmt: skip
def test_bad_options(arguments: list[str], capfd: pytest.CaptureFixture[str], restored_signal: None) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "launcher" in capfd.readouterr().err
