"""`launcher console DEVICE`: a running machine's serial port in this terminal."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import EXIT_OK, EXIT_OUTPUT, ConfigError, MachineDied
from launcher.pump import Pump, PumpOptions

PREFIX, SUFFIX = "console-", ".sock"


def attach_console(run_dir: Path, device: str) -> int:
    """Until the user leaves or the machine ends; the exit status.

    The console process (launcher/pump.py) does it all, and restores the terminal should this one be killed.
    """
    path = run_dir / f"{PREFIX}{device}{SUFFIX}"
    if not path.exists():
        found = sorted(p.name[len(PREFIX) : -len(SUFFIX)] for p in run_dir.glob(f"{PREFIX}*{SUFFIX}"))
        has = f"these have: {', '.join(found)}" if found else "no device has one"
        raise ConfigError(run_dir.name, device, "no such device with a console", has)
    pump = Pump.start(PumpOptions(show=True))
    try:
        pump.connect(path)
        while (record := pump.read()) is not None:
            match record["op"]:
                case "leave":
                    return EXIT_OK
                case "closed":
                    pump.say(f"{run_dir.name}: {device} has ended")
                    return EXIT_OK
                case "output-closed":
                    return EXIT_OUTPUT
                case "failed":
                    raise MachineDied(f"{run_dir.name}: {record['error']}")
        raise MachineDied(f"{run_dir.name}: the console process (pid {pump.pid}) died")
    finally:
        pump.leave()
