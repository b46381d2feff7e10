"""One program's script under Backplane, under QEMU and natively, with the same files: what it printed.

Natively is in user, mount and process namespaces of our own (unshare(1)) with the tree as root: it needs no
root on the host, but a host that allows namespaces and executes 32-bit programs.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from bench.boot import CMDLINE, GUEST, REPO, Guest, qemu_command
from bench.programs.packages import Node, Tree, to_folder

MACHINE = REPO / "machines" / "linux.toml"
WORDS = f"{CMDLINE} quiet"
INIT = Path(__file__).with_name("init")
BEGIN, OUTPUT, MESSAGES, END = "PROGRAM-BEGIN", "PROGRAM-OUTPUT", "PROGRAM-MESSAGES", "PROGRAM-END"
FOLDERS = ("root", "tmp", "proc", "sys", "dev", "etc", "var", "busybox")
PASSWD = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
NATIVE = """\
mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" || exit 125
exec chroot "$1" /bin/busybox sh -c '/bin/busybox --install -s /busybox
cd /root; /bin/dash /program.sh < /dev/null; echo "status $?"'
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`output` is the script's; `problem` says why there is none, or what the kernel complained of."""

    output: list[str]
    seconds: float
    problem: str = ""


def furnish(tree: Tree, script: str) -> None:
    """Add to a program's files what runs it: busybox, the init, the script, a user."""
    for path in FOLDERS:
        tree.setdefault(path, Node(stat.S_IFDIR | (0o1777 if path == "tmp" else 0o755)))
    tree["usr/bin/busybox"] = Node(stat.S_IFREG | 0o755, (GUEST / "busybox").read_bytes())
    tree["usr/bin/sh"] = Node(stat.S_IFLNK | 0o777, b"dash")
    tree["init"] = Node(stat.S_IFREG | 0o755, INIT.read_bytes())
    tree["program.sh"] = Node(stat.S_IFREG | 0o755, script.encode())
    tree["etc/passwd"] = Node(stat.S_IFREG | 0o644, PASSWD)
    tree["etc/group"] = Node(stat.S_IFREG | 0o644, b"root:x:0:\n")


def backplane(initrd: Path, memory_mib: int, limit_s: float) -> Outcome:
    text = MACHINE.read_text()
    values = {
        "name": f"program-{initrd.stem}",
        "memory": f"{memory_mib}M",
        "kernel": GUEST / "vmlinuz",
        "initrd": initrd,
        "cmdline": WORDS,
    }
    for key, value in values.items():
        text, count = re.subn(rf'^{key} = ".*"$', f'{key} = "{value}"', text, count=1, flags=re.MULTILINE)
        assert count == 1, f"{MACHINE} has no line {key} = ..."
    file = initrd.with_suffix(".toml")
    file.write_text(text)
    command = [str(REPO / ".venv" / "bin" / "launcher"), "up", str(file)]
    return machine(command, limit_s, initrd.with_suffix(".backplane.log"))


def qemu(initrd: Path, memory_mib: int, limit_s: float) -> Outcome:
    guest = Guest(GUEST / "vmlinuz", initrd, WORDS, memory_mib)
    return machine(qemu_command(guest), limit_s, initrd.with_suffix(".qemu.log"))


def machine(command: list[str], limit_s: float, log: Path) -> Outcome:
    """Boot, keep the console in `log`, and take it apart; seconds are the script's alone."""
    stamps: dict[str, float] = {}
    lines: list[str] = []
    with open(log, "wb") as console, open(log.with_suffix(".err"), "wb") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        limit = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
        limit.start()
        assert process.stdout is not None
        try:
            for raw in process.stdout:
                console.write(raw)
                console.flush()
                line = raw.decode(errors="replace").rstrip()
                lines.append(line)
                stamps.setdefault(line, time.monotonic())
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            limit.cancel()
            process.wait()
    if END not in lines:
        what = "did not boot" if BEGIN not in lines else "did not end"
        return Outcome(lines[-5:], 0.0, f"{what} (status {process.returncode}); see {log}")
    output = lines[lines.index(OUTPUT) + 1 : lines.index(MESSAGES)]
    complaints = lines[lines.index(MESSAGES) + 1 : lines.index(END)]
    return Outcome(output, stamps[OUTPUT] - stamps[BEGIN], "; ".join(complaints[:3]))


def native(tree: Tree, folder: Path, limit_s: float) -> Outcome | None:
    """On this host's processor; None where the host can't."""
    folder.mkdir(parents=True)
    try:
        to_folder(tree, folder)
        command = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child"]
        command += ["/bin/sh", "-c", NATIVE, "native", str(folder)]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin:/busybox", "HOME": "/root", "LC_ALL": "C"}
        start = time.monotonic()
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=limit_s,
                check=False,
            )
        except FileNotFoundError:
            return None
        except subprocess.TimeoutExpired:
            return Outcome([], limit_s, "did not end")
        output = done.stdout.decode(errors="replace").splitlines()
        if done.returncode or not output or not output[-1].startswith("status "):
            return None
        return Outcome([line.rstrip() for line in output], time.monotonic() - start)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
