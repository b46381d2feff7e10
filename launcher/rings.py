"""What the process `consoles` is told (devices/rim.py), and the rings between it and the devices.

The launcher keeps the descriptors, so that a new process gets what the one before it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from devices import rim
from devices.registry import BadDeviceType, BadSettings, load_class, make_settings
from devices.ring import ChannelRings, make_wake
from launcher.entries import EntryPoints
from launcher.forkserver import ChildSpec


def rim_spec(entries: EntryPoints, devices: Sequence[ChildSpec]) -> ChildSpec | None:
    """None where no device has a console or a log."""
    channels = [row for device in devices for row in _channels(device)]
    if not channels:
        return None
    like = devices[0]
    config = {name: like.config[name] for name in ("run_dir", "machine", "log_level")}
    title, log = f"backplane {config['machine']}: {rim.NODE}", like.log.with_name(f"{rim.NODE}.log")
    return ChildSpec(rim.NODE, entries.rim, {**config, "channels": channels}, title, log)


def _channels(device: ChildSpec) -> list[dict[str, str]]:
    try:
        cls = load_class(device.config["type"])
        settings = make_settings(cls, device.config["settings"])
    except (BadDeviceType, BadSettings):
        return []  # its own process says what is wrong
    kinds = {channel.sends: getattr(settings, channel.setting) for channel in cls.CHANNELS}
    return [{"node": device.node, "channel": channel, "kind": kind}
            for channel, kind in kinds.items() if kind in rim.KINDS]  # fmt: skip


def with_rings(spec: ChildSpec, devices: Sequence[ChildSpec]) -> tuple[ChildSpec, list[ChildSpec]]:
    """The rim and the devices with new rings and eventfds."""
    wake_rim = make_wake()
    wakes: dict[str, int] = {}
    rings: dict[str, dict[str, int]] = {}  # by node, by channel
    for row in spec.config["channels"]:
        node, channel = row["node"], row["channel"]
        wakes.setdefault(node, make_wake())
        rings.setdefault(node, {})[channel] = ChannelRings.make(f"{node}.{channel}")
    own = {f"wake:{node}": fd for node, fd in wakes.items()}
    own |= {f"ring:{node}:{channel}": fd for node, rows in rings.items() for channel, fd in rows.items()}
    return replace(spec, fds={**spec.fds, "wake_rim": wake_rim, **own}), [
        device
        if device.node not in wakes
        else replace(device, fds={
            **device.fds, "wake_rim": wake_rim, "wake_device": wakes[device.node],
            **{f"ring:{channel}": fd for channel, fd in rings[device.node].items()},
        })
        for device in devices
    ]  # fmt: skip
