"""The memory node and `consoles` killed and swapped under a guest that talks and listens: it notices nothing,
and neither does who is connected to its console."""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memory_node.client import MemoryClient
from tests.machine.drive import LEAVE, ROOT, Screen, command
from tests.machine.files import asm_machine
from tests.machine.processes import left_behind, titles

pytestmark = pytest.mark.machine

COUNT_PA = 0x200000  # as in guests/talk.S
NODES = ("memory", "consoles")
RESET_AT_100 = """cmp ebx, 0x100
    jb next_line
    mov al, 0xfe                # pulse the reset line [i8042]
    out 0x64, al
    jmp next_line"""
DISK = """
[[device]]
name = "disk0"
type = "virtio_blk"
mmio = {{ regs = 0xd0000000 }}
irqs = {{ intr = 5 }}
settings = {{ file = "{file}" }}
"""


class Talk:
    """A guest that talks, who types at it, and somebody else who is connected to its console."""

    def __init__(self, screen: Screen, runtime: Path, memory: Path) -> None:
        self.screen, self.runtime, self.memory = screen, runtime, memory
        self.typed = 0
        self.other = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.other.connect(str(runtime / "m" / "console-uart0.sock"))
        self.others = b""

    def type(self, count: int) -> None:
        """Lines for the guest, some of them from the other one."""
        for _ in range(count):
            self.typed += 1
            self.screen.type(f"{self.typed:08x}\n")
            self.read()

    def read(self) -> None:
        self.screen.watch(0.001)
        while select.select([self.other], [], [], 0)[0]:
            piece = self.other.recv(1 << 16)
            assert piece, "the other one was hung up on"
            self.others += piece

    def go_on(self) -> None:
        """Until thirty more lines are there, and all that was typed has been heard."""
        start = self.screen.text().count("line ")
        while self.screen.text().count("line ") < start + 30 or self.heard() < self.typed:
            assert self.screen.alive, self.screen.failure("it has ended")
            self.read()

    def heard(self) -> int:
        return self.screen.text().count("heard ")

    def check(self) -> None:
        """Nothing is lost, nothing came twice."""
        text = self.screen.text()
        whole = re.findall(r"^(line|heard) ([0-9a-f]{8})$", text[: text.rindex("\n")], re.MULTILINE)
        lines = [int(number, 16) for what, number in whole if what == "line"]
        heard = [int(number, 16) for what, number in whole if what == "heard"]
        assert lines == list(range(1, len(lines) + 1))
        assert heard == list(range(1, self.typed + 1))
        with self.memory.open("rb") as f:
            f.seek(COUNT_PA)
            assert len(lines) >= int(struct.unpack("<I", f.read(4))[0])
        others = self.others.replace(b"\r\n", b"\n").decode()
        assert others.rpartition("\n")[0] in text.replace("\r", "")


@pytest.fixture
def talk(tmp_path: Path, runtime: Path) -> Iterator[Talk]:
    """A machine `m`; in the end it is asserted that all that was said and typed came once."""
    memory = tmp_path / "ram"
    machine = asm_machine(tmp_path, "talk", "m", memory_file=memory)
    with Screen("up", machine, runtime=runtime, errors=tmp_path / "err") as screen:
        screen.wait_for("line 00000010\r\n")
        talk = Talk(screen, runtime, memory)
        yield talk
        talk.go_on()
        screen.type(LEAVE)
        screen.finish(0)
        talk.check()
    assert not left_behind(runtime)


def successor(talk: Talk, node: str, *before: int) -> int:
    """Its pid, once it is there."""
    while (pid := titles("m").get(node)) in (None, *before):
        talk.read()
    assert pid is not None
    return pid


@pytest.mark.parametrize("node", NODES)
def test_killed_again_and_again(node: str, talk: Talk) -> None:
    rng, killed = random.Random(node), []
    for _ in range(8):
        pid = successor(talk, node, *killed)
        talk.type(rng.randrange(40))
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)
        talk.type(rng.randrange(20))
    talk.go_on()
    (row,) = [r for r in command("ps", runtime=talk.runtime).splitlines() if r.startswith(node)]
    assert row.split()[-2:] == ["8", "0"]
    for pid in killed:
        assert f"m: {node} (pid {pid}) was killed by SIGKILL" in talk.screen.errors()


@pytest.mark.parametrize("node", NODES)
def test_swapped_again_and_again(node: str, talk: Talk) -> None:
    rng = random.Random(node)
    for _ in range(8):
        old = titles("m")[node]
        talk.type(rng.randrange(40))
        line = command("swap", "m", node, runtime=talk.runtime)
        new = titles("m")[node]
        assert f"m: {node} has a new process (pid {old} -> {new}), a pause of " in line
        assert old != new
        assert old not in titles("m").values()
    talk.go_on()
    (row,) = [r for r in command("ps", runtime=talk.runtime).splitlines() if r.startswith(node)]
    assert row.split()[-2:] == ["0", "8"]


def test_killed_by_command_and_with_the_device_at_the_same_time(talk: Talk) -> None:
    for _ in range(4):
        before = titles("m")
        talk.type(5)
        for node in ("consoles", "uart0"):
            said = command("kill", "m", node, runtime=talk.runtime)
            assert said == f"m: {node} (pid {before[node]}) killed\n"
        talk.type(5)
        for node in ("consoles", "uart0"):
            successor(talk, node, before[node])
        talk.go_on()


@pytest.mark.parametrize("node", NODES)
def test_no_types_and_no_settings(node: str, talk: Talk) -> None:
    before = titles("m")
    for option in (["--set", "backend=log"], ["--with", "uart16550"]):
        said = command("swap", "m", node, *option, runtime=talk.runtime, check=False)
        assert said == f"launcher: m: {node}: it is no device, and has no types and no settings\n"
    assert titles("m") == before


def test_another_back_end(tmp_path: Path, runtime: Path) -> None:
    """From nowhere to a console and a log, and back."""
    machine = asm_machine(tmp_path, "talk", "m")
    machine.write_text(machine.read_text().replace('backend = "console"', 'backend = "null"'))
    path = runtime / "m" / "console-uart0.sock"
    log = "m: uart0: log: line "
    with Screen("up", machine, "--log-level", "info", runtime=runtime, errors=tmp_path / "err") as screen:
        until(screen, lambda: "uart0  " in command("ps", runtime=runtime))
        until(screen, lambda: "starting" not in command("ps", runtime=runtime))
        for _ in range(2):
            assert not path.exists()
            command("swap", "m", "uart0", "--set", "backend=console", runtime=runtime)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.connect(str(path))
                text = read_until(client, b"line ", 50)
                client.send(b"abc\n")
                os.kill(titles("m")["consoles"], signal.SIGKILL)
                text += read_until(client, b"heard 00000abc\r\n", 1)
                until(screen, lambda: "starting" not in command("ps", runtime=runtime))
                command("swap", "m", "uart0", "--set", "backend=log", runtime=runtime)
                text += read_until(client, b"no such text", 1)  # to its end
            numbers = [int(n, 16) for n in re.findall(rb"^line (.{8})\r\n", text, re.MULTILINE)]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            assert len(numbers) >= 50
            assert not path.exists()
            before = screen.errors().count(log)
            until(screen, lambda n=before: screen.errors().count(log) > n + 20)
            command("swap", "m", "uart0", "--set", "backend=null", runtime=runtime)
        screen.type("\x03")
        screen.finish(130)


def test_another_back_end_while_consoles_are_swapped(tmp_path: Path, runtime: Path) -> None:
    """Whichever comes first: the process that there is then does as the device's settings say."""
    machine = asm_machine(tmp_path, "talk", "m")
    machine.write_text(machine.read_text().replace('backend = "console"', 'backend = "null"'))
    path = runtime / "m" / "console-uart0.sock"
    with Screen("up", machine, runtime=runtime) as screen:
        until(screen, lambda: "uart0  " in command("ps", runtime=runtime))
        until(screen, lambda: "starting" not in command("ps", runtime=runtime))
        for kind in ("console", "null") * 3:
            swap = threading.Thread(target=lambda: command("swap", "m", "consoles", runtime=runtime))
            swap.start()
            command("swap", "m", "uart0", "--set", f"backend={kind}", runtime=runtime)
            swap.join()
            assert path.exists() == (kind == "console")
            if kind == "console":
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                    client.connect(str(path))
                    assert read_until(client, b"line ", 20).count(b"line ") >= 20
        screen.type("\x03")
        screen.finish(130)


def until(screen: Screen, condition: Callable[[], bool]) -> None:
    while not condition():
        assert screen.alive, screen.failure("it has ended")
        screen.watch(0.02)


def read_until(client: socket.socket, text: bytes, count: int) -> bytes:
    """Until a text has come so often, or the connection ends."""
    data = b""
    while data.count(text) < count and (piece := client.recv(1 << 16)):
        data += piece
    return data


def test_memory_is_the_same_and_devices_attach_it_again(talk: Talk) -> None:
    """Whatever process of the memory node there is: the machine's memory, its marks, who asks of it."""
    with MemoryClient(talk.runtime / "m") as client:
        command("pause", "m", runtime=talk.runtime)
        client.set_mark("before")
        before = pages(talk.memory)
        command("resume", "m", runtime=talk.runtime)
        for device in ("uart0", "pit", "kbd"):
            pids = titles("m")
            os.kill(pids["memory"], signal.SIGKILL)
            os.kill(pids[device], signal.SIGKILL)
            talk.type(3)
            for node in ("memory", device):
                successor(talk, node, pids[node])
            talk.go_on()
            command("swap", "m", device, runtime=talk.runtime)
            command("swap", "m", "memory", runtime=talk.runtime)
        command("pause", "m", runtime=talk.runtime)
        after = pages(talk.memory)
        changed = [n for n in range(len(after)) if before[n] != after[n]]
        assert COUNT_PA // 4096 in changed
        assert list(client.written_since("before")) == changed
        fd, size = client.attach("ram", False)
        assert os.pread(fd, size, 0) == b"".join(after)
        os.close(fd)
        command("resume", "m", runtime=talk.runtime)


def pages(memory: Path) -> list[bytes]:
    data = memory.read_bytes()
    return [data[at : at + 4096] for at in range(0, len(data), 4096)]


def test_a_reset_by_the_launcher_needs_no_memory_node(tmp_path: Path, runtime: Path) -> None:
    """Images are loaded again while it is stopped: the launcher has the memory itself."""
    machine = asm_machine(tmp_path, "numbers", "m", replace={"jmp next_line": RESET_AT_100})
    with Screen("up", machine, runtime=runtime, errors=tmp_path / "err") as screen:
        screen.wait_for("line 00000040\r\n")
        os.kill(titles("m")["memory"], signal.SIGSTOP)
        screen.wait_for("line 00000100\r\n")
        screen.wait_for("line 00000001\r\n")
        screen.wait_for("line 00000040\r\n")
        os.kill(titles("m")["memory"], signal.SIGCONT)
        screen.type(LEAVE)
        screen.finish(0)


def test_another_file_for_a_disk(tmp_path: Path, runtime: Path) -> None:
    """Relative paths are those of who asks; a restored machine's writes belong to the file it came with."""
    for name in ("one.img", "two.img"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    machine = asm_machine(tmp_path, "numbers", "m", devices=DISK.format(file=tmp_path / "one.img"))
    snapshot = tmp_path / "m.snap"
    other = os.path.relpath(tmp_path / "two.img", ROOT)  # the command's folder
    with Screen("up", machine, runtime=runtime) as screen:
        screen.wait_for("line 00000010\r\n")
        assert open_files("m", "disk0") >= {tmp_path / "one.img"}
        command("swap", "m", "disk0", "--set", f"file={other}", runtime=runtime)
        assert open_files("m", "disk0") >= {tmp_path / "two.img"}
        said = command("swap", "m", "disk0", "--set", "file=no/such.img", runtime=runtime, check=False)
        assert "no/such.img" in said
        assert len(said.splitlines()) == 1
        os.kill(titles("m")["disk0"], signal.SIGKILL)
        until(screen, lambda: "two.img" in str(open_files("m", "disk0")))
        command("snapshot", "m", snapshot, runtime=runtime)
        screen.type(LEAVE)
        screen.finish(0)
    with Screen("restore", snapshot, runtime=runtime) as screen:
        screen.wait_for(re.compile(rb"line 0000....\r\n"))
        said = command("swap", "m", "disk0", "--set", f"file={other}", runtime=runtime, check=False)
        assert said == (
            "launcher: m: disk0: its disk is that of a snapshot, whose settings cannot be changed\n"
        )
        assert open_files("m", "disk0") >= {tmp_path / "two.img"}
        screen.type(LEAVE)
        screen.finish(0)


def open_files(machine: str, node: str) -> set[Path]:
    pid = titles(machine).get(node)
    found = set()
    for fd in Path(f"/proc/{pid}/fd").glob("*") if pid is not None else ():
        with contextlib.suppress(OSError):
            found.add(fd.readlink())
    return found
