"""From a machine file to all that its processes are told: device classes, addresses, lines, start state.

Makes nothing and starts nothing, so that `launcher check` and every refusal leave no trace; only device
files named in the machine file are imported, which runs their top level.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bus.addressmap import AddressMap, MapConflict
from bus.link import console_path
from devices.base import Device
from devices.disks import BadDisk, Disks
from devices.registry import BadDeviceType, BadSettings, load_class, make_settings
from devices.tryout import shape
from devices.virtio_mmio import VirtioMmio
from launcher.boot_plan import BootPlan, VirtioPlace, prepare
from launcher.config import DeviceTable, MachineConfig
from launcher.entries import EntryPoints
from launcher.forkserver import ChildSpec
from launcher.names import CPU, MEMORY
from memory_node.client import SOCKET_NAME
from memory_node.regions import pc_regions

LOCAL_APIC = (0xFEE0_0000, 0xFEE0_1000)
CONSOLE_BACKEND = "console"
E820_NAMES = {1: "RAM", 2: "reserved", 3: "ACPI tables", 4: "ACPI NVS"}


@dataclass(frozen=True, slots=True)
class PlannedDevice:
    """One [[device]] with its class loaded and its settings checked."""

    table: DeviceTable
    cls: type[Device[Any]]
    mirror_page: int | None  # in the region "mirror"; None: nothing mirrored
    has_console: bool


@dataclass(frozen=True, slots=True)
class MachinePlan:
    """A machine that can be started."""

    config: MachineConfig
    boot: BootPlan
    address_map: AddressMap
    devices: tuple[PlannedDevice, ...]
    mirror_pages: int
    console: str | None  # the device that `up` shows

    @property
    def controllers(self) -> dict[str, Any]:
        """Names of the 8259 pair (or None) and of the I/O APICs."""
        pics = [d.table.name for d in self.devices if d.cls.NAME == "pic8259"]
        ioapics = [d.table.name for d in self.devices if d.cls.NAME == "ioapic"]
        return {"pic": pics[0] if pics else None, "ioapics": ioapics}

    def longest_file_name(self) -> str:
        """The longest name of a socket in the run directory."""
        names = [console_path(".", d.table.name).name for d in self.devices]
        return max([SOCKET_NAME, *names], key=len)


def make_plan(config: MachineConfig) -> MachinePlan:
    """Load classes, place ranges and lines, read the boot images; ConfigError names what does not fit."""
    address_map = AddressMap()
    devices = []
    pages = 0
    with ExitStack() as tried:  # disks stay open till all are: no two devices may have the same one
        for index, table in enumerate(config.devices):
            device = _plan_device(config, index, table, pages, tried)
            pages += device.mirror_page is not None
            _place(config, index, device, address_map)
            devices.append(device)
    _check_mmio(config, address_map)
    _check_controllers(config, devices)
    console = _pick_console(config, devices)
    boot = prepare(config, _virtio_places(config, devices))
    return MachinePlan(config, boot, address_map, tuple(devices), pages, console)


def child_specs(
    plan: MachinePlan,
    entries: EntryPoints,
    run_dir: Path,
    tsc_hz: int,
    dialogue_cores: tuple[int, ...],
    log_level: str,
) -> tuple[ChildSpec, tuple[ChildSpec, ...]]:
    """What to fork: the memory node, and then the devices and the CPU node."""
    machine = plan.config.machine.name
    shared = {"run_dir": str(run_dir), "machine": machine, "log_level": log_level}

    def spec(node: str, entry: str, config: dict[str, Any], cores: tuple[int, ...] = ()) -> ChildSpec:
        title, log = f"backplane {machine}: {node}", run_dir / f"{node}.log"
        return ChildSpec(node, entry, {"node": node, **shared, **config}, title, log, cores)

    file = plan.config.memory.file
    pages = max(1, plan.mirror_pages)  # the region is always there to attach
    regions = pc_regions(plan.config.memory_bytes, pages, str(file) if file else None)
    memory = spec(MEMORY, entries.memory, {"regions": [r.to_plain() for r in regions]})
    devices = [
        spec(d.table.name, entries.device, _device_config(plan, d), dialogue_cores) for d in plan.devices
    ]
    cpu = spec(CPU, entries.cpu, _cpu_config(plan, tsc_hz), dialogue_cores)
    return memory, (*devices, cpu)


def _device_config(plan: MachinePlan, device: PlannedDevice) -> dict[str, Any]:
    return {
        "type": device.table.type,
        "shape": shape(device.cls),
        "settings": device.table.settings,
        "irqs": device.table.irqs,
        "mirror_index": device.mirror_page,
        "controllers": [d.table.name for d in plan.devices if d.cls.CONTROLLER],
        "cpus": [CPU],
        "set_aside_after": plan.config.machine.set_aside_after,
        "checkpoints": plan.config.machine.checkpoints,
    }


def _cpu_config(plan: MachinePlan, tsc_hz: int) -> dict[str, Any]:
    return {
        "map": plan.address_map.to_plain(),
        "memory_size": plan.config.memory_bytes,
        "tsc_hz": tsc_hz,
        "apic": plan.config.cpu.apic,
        "user_mode": plan.config.cpu.user_mode,
        "translations": str(plan.config.translations_folder or ""),
        "trap_backend": plan.config.cpu.trap_backend,
        "mmu": plan.config.cpu.mmu,
        "controllers": plan.controllers,
        "start": plan.boot.start,
    }


def _plan_device(
    config: MachineConfig, index: int, table: DeviceTable, page: int, tried: ExitStack
) -> PlannedDevice:
    try:
        cls = load_class(table.type)
    except BadDeviceType as e:
        raise config.error(f"device[{index}].type", str(e), "correct it") from e
    try:
        settings = make_settings(cls, table.settings)
    except BadSettings as e:
        raise config.error(f"device[{index}].settings", str(e), "correct it") from e
    if cls.DISKS:
        settings, table = _with_absolute_disks(config, table, cls, settings)
        try:
            tried.callback(Disks.open(cls, settings).close)
        except BadDisk as e:
            raise config.error(f"device[{index}].settings", str(e), "name another file") from e
    mirrored = any(r.mirrored or r.latched for r in (*cls.PORTS, *cls.MMIO))
    console = any(getattr(settings, c.setting) == CONSOLE_BACKEND for c in cls.CHANNELS)
    return PlannedDevice(table, cls, page if mirrored else None, console)


def _with_absolute_disks(
    config: MachineConfig, table: DeviceTable, cls: type[Device[Any]], settings: Any
) -> tuple[Any, DeviceTable]:
    """Settings, and the table with them, in which a disk's path no longer depends on the folder."""
    folder = config.file.absolute().parent
    paths = {d.setting: str((folder / Path(getattr(settings, d.setting)).expanduser()).resolve())
             for d in cls.DISKS}  # fmt: skip
    table = msgspec.structs.replace(table, settings={**table.settings, **paths})
    return make_settings(cls, table.settings), table


def _place(config: MachineConfig, index: int, device: PlannedDevice, address_map: AddressMap) -> None:
    table, cls = device.table, device.cls
    ports, mmio = {r.name for r in cls.PORTS}, {r.name for r in cls.MMIO}
    for key, given, known in (
        ("ports", table.ports, ports),
        ("mmio", table.mmio, mmio),
        ("irqs", table.irqs, set(cls.IRQS)),
    ):
        if stray := sorted(given.keys() - known):
            has = f"it has {', '.join(sorted(known))}" if known else f"it has no {key}"
            problem = f"{cls.NAME} has no {stray[0]!r}: {has}"
            raise config.error(f"device[{index}].{key}", problem, "correct the name")
    try:
        address_map.add_device(
            table.name, (*cls.PORTS, *cls.MMIO), {**table.ports, **table.mmio}, device.mirror_page
        )
        for line, irq in table.irqs.items():
            address_map.add_line(table.name, line, irq)
    except MapConflict as e:
        raise config.error(f"device[{index}]", str(e), "change the base address or IRQ of one") from e


def _virtio_places(config: MachineConfig, devices: list[PlannedDevice]) -> list[VirtioPlace]:
    places = []
    for index, device in enumerate(devices):
        if issubclass(device.cls, VirtioMmio):
            (region,), (line,) = device.cls.MMIO, device.cls.IRQS
            irq = device.table.irqs.get(line)
            if irq is None:
                problem = f"{device.table.name} has no IRQ, a virtio device needs one"
                raise config.error(f"device[{index}].irqs", problem, f"write irqs = {{ {line} = 5 }}")
            places.append(VirtioPlace(device.table.mmio[region.name], region.length, irq))
    return places


def _check_mmio(config: MachineConfig, address_map: AddressMap) -> None:
    for entry in address_map.entries("mmio"):
        if entry.base < config.memory_bytes:
            problem = f"{entry.node}: {entry} lies in RAM, which ends at {config.memory_bytes:08x}"
            raise config.error("device", problem, "move it up, or give the machine less memory")
        if config.cpu.apic and entry.base < LOCAL_APIC[1] and LOCAL_APIC[0] < entry.end:
            raise config.error("device", f"{entry.node}: {entry} is the local APIC's place", "move it")


def _check_controllers(config: MachineConfig, devices: list[PlannedDevice]) -> None:
    pics = [d.table.name for d in devices if d.cls.NAME == "pic8259"]
    if len(pics) > 1:
        raise config.error("device", f"{' and '.join(pics)} are both 8259 pairs", "keep one")
    if not config.cpu.apic and not pics:
        problem = "neither a local APIC (cpu.apic) nor a pic8259: no interrupt could reach the CPU"
        raise config.error("device", problem, "add one, or set apic = true in [cpu]")


def _pick_console(config: MachineConfig, devices: list[PlannedDevice]) -> str | None:
    names = [d.table.name for d in devices if d.has_console]
    wanted = config.machine.console
    if wanted is not None:
        if wanted not in names:
            has = f"these have: {', '.join(names)}" if names else "no device has"
            problem = f"{wanted!r} has no console back end, {has}"
            raise config.error("machine.console", problem, 'set backend = "console" in its settings')
        return wanted
    if len(names) > 1:
        problem = f"which of {', '.join(names)} is to be shown is not said"
        raise config.error("machine.console", problem, "name one")
    return names[0] if names else None


def describe(plan: MachinePlan) -> str:
    """What `launcher check` prints."""
    config = plan.config
    boot = {name: value for name, value in msgspec.to_builtins(config.boot, enc_hook=str).items() if value}
    types = [(d.table.name, d.table.type) for d in plan.devices]
    width = max((len(name) for name, _ in types), default=0)
    return "\n".join(
        [
            f"machine   {config.machine.name}",
            f"memory    {config.memory_bytes >> 20} MiB in {config.memory.file or 'an anonymous file'}",
            f"APIC      {'yes' if config.cpu.apic else 'no'}",
            f"boot      {', '.join(f'{name} {value}' for name, value in boot.items())}",
            f"console   {plan.console or 'none'}",
            f"on reset  {config.machine.on_reset}",
            "",
            *(f"{name:<{width}}  {kind}" for name, kind in types),
            "",
            plan.address_map.describe(),
            "",
            *(
                f"memory {base:08x}-{base + length - 1:08x}  {E820_NAMES.get(kind, kind)}"
                for base, length, kind in plan.boot.e820
            ),
        ]
    )
