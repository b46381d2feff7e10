"""What the process `consoles` is told (devices/rim.py), and what lies between it and the devices.

The launcher keeps the descriptors, so that a new process gets what the one before it had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from msgspec.structs import replace

from devices import rim
from devices.consoles import make_table
from devices.journal import Journal
from devices.ring import ChannelRings, make_wake
from launcher.entries import EntryPoints
from launcher.forkserver import ChildSpec

Row = dict[str, str]  # devices.rim.ChannelConfig
KINDS = get_args(rim.Kind)


def rim_spec(
    entries: EntryPoints, devices: Sequence[ChildSpec], channels: list[Row] | None = None
) -> ChildSpec | None:
    """None where no device has a channel. `channels`: if they are known; else the devices' classes say."""
    if channels is None:
        channels = [row for device in devices for row in _channels(device)]
    if not channels:
        return None
    like = devices[0]
    config = {name: like.config[name] for name in ("run_dir", "machine", "log_level")}
    title, log = f"backplane {config['machine']}: {rim.NODE}", like.log.with_name(f"{rim.NODE}.log")
    return ChildSpec(rim.NODE, entries.rim, {**config, "channels": channels}, title, log)


def _channels(device: ChildSpec) -> list[Row]:
    from devices.registry import BadDeviceType, BadSettings, load_class, make_settings

    try:
        cls = load_class(device.config["type"])
        settings = make_settings(cls, device.config["settings"])
    except (BadDeviceType, BadSettings):
        return []  # its own process says what is wrong
    rows = []
    for channel in cls.CHANNELS:
        kind = getattr(settings, channel.setting)
        if kind in KINDS:  # else so does it
            node = {"node": device.node, "channel": channel.sends, "setting": channel.setting}
            rows.append({**node, "kind": kind})
    return rows


def with_rings(spec: ChildSpec, devices: Sequence[ChildSpec]) -> tuple[ChildSpec, list[ChildSpec]]:
    """The rim and the devices with new rings and eventfds, and the rim with what it must not forget."""
    wake_rim = make_wake()
    wakes: dict[str, int] = {}
    rings: dict[str, dict[str, int]] = {}  # by node, by channel
    for row in spec.config["channels"]:
        node, channel = row["node"], row["channel"]
        wakes.setdefault(node, make_wake())
        rings.setdefault(node, {})[channel] = ChannelRings.make(f"{node}.{channel}")
    own = {"journal": Journal.make(rim.NODE), "clients": make_table(), "wake_rim": wake_rim}
    own |= {f"wake:{node}": fd for node, fd in wakes.items()}
    own |= {f"ring:{node}:{channel}": fd for node, rows in rings.items() for channel, fd in rows.items()}
    return replace(spec, fds={**spec.fds, **own}), [
        device
        if device.node not in wakes
        else replace(device, fds={
            **device.fds, "wake_rim": wake_rim, "wake_device": wakes[device.node],
            **{f"ring:{channel}": fd for channel, fd in rings[device.node].items()},
        })
        for device in devices
    ]  # fmt: skip


def changed(spec: ChildSpec, node: str, settings: Mapping[str, Any]) -> tuple[ChildSpec, list[Row]]:
    """The rim as a device's new settings want it, and the rows that are others than before.

    What a setting that isn't given stands for is known to the device's class; it is taken to be as it was.
    """
    rows, new = [], []
    for row in spec.config["channels"]:
        kind = settings.get(row["setting"], row["kind"]) if row["node"] == node else row["kind"]
        rows.append({**row, "kind": kind})
        if kind != row["kind"]:
            new.append(rows[-1])
    return replace(spec, config={**spec.config, "channels": rows}), new
