"""machine.toml, read into typed and validated data.

What can be judged from the file alone is judged here: keys, types, sizes, names. What needs the
host (free memory, files, device classes) is judged in launcher/checks.py. Paths in the result are
absolute; in the file they are relative to the file's own folder.
Left out: includes, variables, several CPUs.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import msgspec

from launcher.errors import ConfigError
from launcher.launch import TRACE_MEMORY

PAGE = 4096
MIN_MEMORY = 16 << 20
MAX_MEMORY = 3 << 30  # above it the PC's I/O APIC, local APIC and firmware ranges begin
MIN_TRACE_MEMORY, MAX_TRACE_MEMORY = 8 << 20, 1 << 30
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
NODE_NAMES_TAKEN = ("cpu0", "memory", "launcher", "forkserver", "console", "consoles")


class Size(int):
    """A number of bytes, written "256M" or as a plain number."""


class MachineTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    name: str
    memory: Size
    on_reset: Literal["restart", "stop"] = "restart"
    trace: bool = True  # the flight recorder is on from the start; `launcher trace` switches it
    trace_memory: Size = Size(TRACE_MEMORY)  # that its rings have together
    otlp: str = ""  # the URL of a collector; see docs/stats.md
    checkpoints: bool = True  # else the end of a device's process is the machine's
    on_launcher_death: Literal["end", "run"] = "end"  # see docs/live-swap.md
    set_aside_after: int = 3  # processes of a device that ended in one frame; see docs/live-swap.md
    console: str | None = None  # the device shown by `up`; needed where several have a console


class CpuTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    apic: bool = True  # a local APIC in CPUID and in the tables the guest gets
    user_mode: Literal["translated", "direct", "auto"] = "translated"
    trap_backend: Literal["auto", "ptrace", "seccomp"] = "auto"  # how direct execution gets its traps
    mmu: Literal["auto", "windows", "tlb"] = "auto"  # how user code finds its memory; see docs/decisions/012
    host_cpu: int | Literal["auto", "any"] = "auto"  # see docs/decisions on CPU affinity
    translations: str = "keep"  # "keep", "off", or the folder to keep them in


class LinuxBoot(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag_field="kind", tag="linux"):
    kernel: Path
    cmdline: str = ""
    initrd: Path | None = None
    modules: Path | None = None  # an archive behind it with virtio drivers, where there is a virtio device


class AsmBoot(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag_field="kind", tag="asm"):
    source: Path


class MemoryTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    file: Path | None = None  # None: an anonymous memory file that goes with the machine


class DeviceTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    name: str
    type: str  # a built-in's name, or "path/to/file.py:Class" with the path made absolute
    ports: dict[str, int] = {}
    mmio: dict[str, int] = {}
    irqs: dict[str, int] = {}
    settings: dict[str, Any] = {}


class _MachineFile(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    machine: MachineTable
    boot: LinuxBoot | AsmBoot
    cpu: CpuTable = CpuTable()
    memory: MemoryTable = MemoryTable()
    device: list[DeviceTable] = []


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """One machine file. `file` is its path as the user gave it, for error lines."""

    file: Path
    machine: MachineTable
    cpu: CpuTable
    boot: LinuxBoot | AsmBoot
    memory: MemoryTable
    devices: tuple[DeviceTable, ...]

    @property
    def memory_bytes(self) -> int:
        return int(self.machine.memory)

    @property
    def translations_folder(self) -> Path | None:
        """Where translations are kept from one start to the next; None: nowhere."""
        match self.cpu.translations:
            case "off":
                return None
            case "keep":
                cache = os.environ.get("XDG_CACHE_HOME", "")  # one that isn't absolute is to be ignored
                base = Path(cache) if cache.startswith("/") else _home() / ".cache"
                return base / "backplane" / "translations"
            case folder:
                return (self.file.absolute().parent / Path(folder).expanduser()).resolve()

    def error(self, key: str, problem: str, remedy: str) -> ConfigError:
        return ConfigError(self.file, key, problem, remedy)


def _home() -> Path:
    """The user's home; "/" for a user without one, whose translations are then not kept."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")


def read_config(file: Path, name: str | None = None) -> MachineConfig:
    """Read and validate one machine file; `name` replaces the machine's name (`--name`)."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(file, "", f"cannot be read ({e.strerror})", "name an existing machine file") from e
    except UnicodeDecodeError as e:
        raise ConfigError(file, "", f"is not UTF-8 text ({e.reason})", "name a TOML machine file") from e
    try:
        plain = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(file, "", f"is not valid TOML ({e})", "correct that line") from e
    if name is not None and isinstance(plain.get("machine"), dict):
        plain["machine"]["name"] = name
    return _validated(file, plain)


def _validated(file: Path, plain: dict[str, Any]) -> MachineConfig:
    folder = file.absolute().parent

    def hook(kind: type, value: object) -> object:
        if kind is Size:
            return parse_size(value)
        if kind is Path and isinstance(value, str):
            return (folder / Path(value).expanduser()).resolve()
        raise ValueError(f"Expected `str`, got `{_toml_type(value)}`")

    try:
        parsed = msgspec.convert(plain, _MachineFile, dec_hook=hook)
    except msgspec.ValidationError as e:
        raise _explained(file, plain, str(e)) from e
    devices = tuple(_with_absolute_type(folder, d) for d in parsed.device)
    config = MachineConfig(file, parsed.machine, parsed.cpu, parsed.boot, parsed.memory, devices)
    _check_names(config)
    _check_set_aside(config)
    _check_memory_size(config)
    _check_trace_memory(config)
    _check_translations(config)
    return config


def parse_size(value: object) -> Size:
    """Bytes from 16777216, "64M", "1G"; ValueError with a readable reason otherwise."""
    if isinstance(value, int) and not isinstance(value, bool):
        return Size(value)
    if isinstance(value, str) and (m := re.fullmatch(r"(\d+)\s*([KMG]?)(?:i?B)?", value.strip())):
        return Size(int(m[1]) * UNITS[m[2]])
    raise ValueError(f'{value!r} is no size, write it like "256M"')


def _with_absolute_type(folder: Path, device: DeviceTable) -> DeviceTable:
    path, colon, cls = device.type.rpartition(":")
    if not colon:
        return device
    return msgspec.structs.replace(device, type=f"{(folder / Path(path).expanduser()).resolve()}:{cls}")


def _check_names(config: MachineConfig) -> None:
    rule = "use up to 32 letters, digits, - and _, starting with a letter or digit"
    if not NAME.fullmatch(config.machine.name):
        raise config.error("machine.name", f"{config.machine.name!r} cannot name a machine", rule)
    seen: set[str] = set()
    for i, device in enumerate(config.devices):
        key = f"device[{i}].name"
        if not NAME.fullmatch(device.name):
            raise config.error(key, f"{device.name!r} cannot name a device", rule)
        if device.name in NODE_NAMES_TAKEN:
            raise config.error(key, f"{device.name!r} is the name of another process", "choose another name")
        if device.name in seen:
            raise config.error(key, f"a second device is named {device.name!r}", "choose another name")
        seen.add(device.name)


def _check_set_aside(config: MachineConfig) -> None:
    if config.machine.set_aside_after < 1:
        problem = f"{config.machine.set_aside_after} processes can't have ended in a frame"
        raise config.error("machine.set_aside_after", problem, "write a number from 1 on")


def _check_memory_size(config: MachineConfig) -> None:
    size = config.memory_bytes
    if size % PAGE:
        raise config.error("machine.memory", f"{size} bytes is not a multiple of 4 KiB", "round it")
    if size < MIN_MEMORY:
        raise config.error("machine.memory", f"{size} bytes is less than 16 MiB", 'write at least "16M"')
    if size > MAX_MEMORY:
        raise config.error("machine.memory", f"{size} bytes is more than 3 GiB", 'write at most "3G"')


def _check_trace_memory(config: MachineConfig) -> None:
    if not MIN_TRACE_MEMORY <= config.machine.trace_memory <= MAX_TRACE_MEMORY:
        problem = f"{int(config.machine.trace_memory)} bytes are not between 8 MiB and 1 GiB"
        raise config.error("machine.trace_memory", problem, 'write a size like "32M"')


def _check_translations(config: MachineConfig) -> None:
    wanted = config.cpu.translations
    if wanted not in ("keep", "off") and "/" not in wanted:
        remedy = 'write "keep", "off", or a folder with a "/" in it'
        raise config.error("cpu.translations", f"{wanted!r} is not allowed here", remedy)


# ---- msgspec's message into ours -------------------------------------------------------------


def _explained(file: Path, plain: dict[str, Any], message: str) -> ConfigError:
    """msgspec says "Object contains unknown field `x` - at `$.machine`"; say key, problem, remedy."""
    problem, _, at = message.partition(" - at `$")
    key = at.rstrip("`").lstrip(".").replace("[...]", "")
    if m := re.match(r"Object contains unknown field `(.*)`", problem):
        known = _known_keys(key, plain)
        import difflib  # for this line alone

        near = difflib.get_close_matches(m[1], known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else "known here: " + ", ".join(known)
        return ConfigError(file, f"{key}.{m[1]}".lstrip("."), "unknown key", remedy)
    if m := re.match(r"Object missing required field `(.*)`", problem):
        return ConfigError(file, f"{key}.{m[1]}".lstrip("."), "is missing", "add it")
    if m := re.match(r"Invalid enum value (.*)", problem):
        return ConfigError(file, key, f"{m[1]} is not allowed here", _choices(key))
    if m := re.match(r"Invalid value (.*)", problem):
        return ConfigError(file, key, f"{m[1]} is not allowed here", _choices(key))
    if m := re.match(r"Expected `(.*)`, got `(.*)`", problem):
        wanted, got = m[1].replace("object", "table"), m[2].replace("object", "table")
        return ConfigError(file, key, f"is of type {got}", f"write a value of type {wanted}")
    return ConfigError(file, key, problem, "correct it")


def _table_at(key: str, plain: dict[str, Any]) -> type:
    if key == "boot":
        boot = plain.get("boot", {})
        return AsmBoot if boot.get("kind") == "asm" else LinuxBoot
    name = key.partition("[")[0].partition(".")[0]
    tables: dict[str, type] = {
        "machine": MachineTable,
        "cpu": CpuTable,
        "memory": MemoryTable,
        "device": DeviceTable,
    }
    return tables.get(name, _MachineFile)


def _known_keys(key: str, plain: dict[str, Any]) -> list[str]:
    table = _table_at(key, plain)
    keys = list(get_type_hints(table))
    return ["kind", *keys] if table in (LinuxBoot, AsmBoot) else keys


def _choices(key: str) -> str:
    choices = {
        "machine.on_reset": 'write "restart" or "stop"',
        "machine.on_launcher_death": 'write "end" or "run"',
        "cpu.user_mode": 'write "translated", "direct" or "auto"',
        "cpu.trap_backend": 'write "auto", "ptrace" or "seccomp"',
        "cpu.mmu": 'write "auto", "windows" or "tlb"',
        "cpu.host_cpu": 'write "auto", "any" or the number of a host CPU',
        "boot.kind": 'write "linux" or "asm"',
    }
    return choices.get(key, "correct it")


def _toml_type(value: object) -> str:
    return {"str": "str", "int": "int", "float": "float", "bool": "bool", "list": "array"}.get(
        type(value).__name__, "object"
    )
