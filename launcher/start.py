"""The command `launcher`, from its first line on: a start is mostly imports, and these make no garbage.

Python's collector would look at all that is imported again and again, for a fifth of the time. Whoever runs
for longer turns it on: launcher/main.py, launcher/supervisor.py, launcher/pump.py.
"""

from __future__ import annotations

import gc
from typing import NoReturn


def run() -> NoReturn:
    gc.disable()
    from launcher.main import run

    run()
