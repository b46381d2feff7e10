"""From the `type` of a machine file's [[device]] to a class, and from its settings to an object.

`type` is the short name of a built-in device or `path/to/file.py:Class`. Whatever is wrong with it is a
BadDeviceType whose message is one line.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import msgspec

from bus.mirror import slots
from bus.ranges import BadRange
from devices.base import Channel, Device, DeviceState, Disk, MmioRange, PortRange

BUILT_IN = {
    "uart16550": "Uart16550",
    "pic8259": "Pic8259",
    "pit8254": "Pit8254",
    "rtc_cmos": "RtcCmos",
    "i8042": "I8042",
    "postcode": "PostCode",
    "acpi_pm": "AcpiPm",
    "ioapic": "IoApic",
    "virtio_blk": "VirtioBlk",
    "virtio_console": "VirtioConsole",
}  # module in devices/ -> class


class BadDeviceType(ValueError):
    """A device type that is unknown, doesn't import, or declares nonsense."""


class BadSettings(ValueError):
    """Settings that the device's SETTINGS class does not take."""


def is_built_in(type_name: str) -> bool:
    return _module_name(type_name) in BUILT_IN


def _module_name(type_name: str) -> str:
    return type_name.replace("-", "_")  # "virtio-blk" is virtio_blk


def load_class(type_name: str) -> type[Device[Any]]:
    """The device class, its declarations checked."""
    path, colon, class_name = type_name.rpartition(":")
    if is_built_in(type_name):
        return _built_in(_module_name(type_name))
    if not colon:
        known = ", ".join(sorted(BUILT_IN))
        raise BadDeviceType(
            f"unknown device type {type_name!r}: use one of {known}, or path/to/file.py:Class"
        )
    return _checked(type_name, _import_file(Path(path)), class_name)


@functools.cache
def _built_in(name: str) -> type[Device[Any]]:
    return _checked(name, importlib.import_module(f"devices.{name}"), BUILT_IN[name])


def _checked(type_name: str, module: ModuleType, class_name: str) -> type[Device[Any]]:
    cls = getattr(module, class_name, None)
    if cls is None:
        raise BadDeviceType(f"{type_name}: the file has no class {class_name}")
    if not (isinstance(cls, type) and issubclass(cls, Device)):
        raise BadDeviceType(f"{type_name}: {class_name} is not a subclass of devices.base.Device")
    complaint = next(_complaints(cls), None)
    if complaint is not None:
        raise BadDeviceType(f"{type_name}: {complaint}")
    return cls


def make_settings(cls: type[Device[Any]], values: dict[str, Any]) -> Any:
    """An instance of cls.SETTINGS from the machine file's table."""
    known = [f.name for f in fields(cls.SETTINGS)]
    stray = sorted(set(values) - set(known))
    if stray:
        can = f"it has {', '.join(known)}" if known else "it has none"
        raise BadSettings(f"{cls.NAME} has no setting {stray[0]!r}: {can}")
    try:
        return msgspec.convert(values, cls.SETTINGS)
    except msgspec.ValidationError as error:
        raise BadSettings(f"{cls.NAME} settings: {error}") from error


def _import_file(path: Path) -> ModuleType:
    if path.suffix != ".py":
        raise BadDeviceType(f"{path}: a device file is a .py file")
    if not path.is_file():
        raise BadDeviceType(f"{path}: there is no such file")
    name = f"device_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_AsItIsNow(name, str(path)))
    if spec is None or spec.loader is None:
        raise BadDeviceType(f"{path}: Python cannot load it")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        text = " ".join(str(error).split()) or "no message"
        raise BadDeviceType(f"{path}: does not import: {type(error).__name__}: {text}") from error
    return module


class _AsItIsNow(importlib.machinery.SourceFileLoader):
    """Compiles the source: kept bytecode counts as fresh for a second, where an edit leaves the size."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def _complaints(cls: type[Device[Any]]) -> Iterator[str]:
    """What is wrong with the class's declarations, as sentences."""
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        yield f"{cls.__name__} does not define {', '.join(missing)}"
    for name in ("NAME", "STATE"):
        if not hasattr(cls, name):
            yield f"{cls.__name__} does not declare {name}"
            return
    yield from _tuple_complaints(cls)
    ranges = (*cls.PORTS, *cls.MMIO)
    names = [r.name for r in ranges]
    if len(set(names)) != len(names):
        yield f"two regions have the same name among {names}"
    try:
        slots(ranges)
    except BadRange as error:
        yield str(error)
    for what, base in (("STATE", DeviceState), ("SETTINGS", object)):
        value = getattr(cls, what)
        if not (isinstance(value, type) and is_dataclass(value) and issubclass(value, base)):
            yield f"{what} is {value!r}, not a dataclass" + (" derived from DeviceState" * (what == "STATE"))
            return
    settings = {f.name for f in fields(cls.SETTINGS)}
    for channel in cls.CHANNELS:
        if channel.setting not in settings:
            yield f"channel {channel.sends!r}: SETTINGS has no {channel.setting!r}"
    for disk in cls.DISKS:
        for setting in sorted({disk.setting, disk.read_only} - settings):
            yield f"disk {disk.name!r}: SETTINGS has no {setting!r}"
        if not cls.DMA:
            yield f"disk {disk.name!r}: a device with disks declares DMA"
    for method, arguments in (("read", ("", 0, 1)), ("write", ("", 0, 1, 0))):
        try:
            inspect.signature(getattr(cls, method)).bind(None, *arguments)
        except TypeError:
            yield f"{method} does not take (self, region, offset, width{', value' * (method == 'write')})"


def _tuple_complaints(cls: type[Device[Any]]) -> Iterator[str]:
    kinds = (("PORTS", PortRange), ("MMIO", MmioRange), ("IRQS", str), ("CHANNELS", Channel), ("DISKS", Disk))
    for what, kind in kinds:
        value = getattr(cls, what)
        if not isinstance(value, tuple) or not all(isinstance(item, kind) for item in value):
            yield f"{what} is {value!r}, not a tuple of {kind.__name__}"
            return
    if len(set(cls.IRQS)) != len(cls.IRQS):
        yield f"IRQS {cls.IRQS} names a line twice"
