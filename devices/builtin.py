"""All built-in devices, imported: by the fork server, so that no device's process has to."""

from __future__ import annotations

import importlib

from devices.registry import BUILT_IN

for _name in BUILT_IN:
    importlib.import_module(f"devices.{_name}")
