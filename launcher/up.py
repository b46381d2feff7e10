"""`launcher up`: the order of a start.

The fork server and the console process are forked first, while this process has no thread and no
ZeroMQ context. The fork server then imports what the machine's processes need while this process imports
what the launcher needs: that is why launcher/session.py is imported inside a function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from launcher.daemon import OnReady, run_in_background
from launcher.entries import EntryPoints
from launcher.errors import EXIT_OK
from launcher.forkserver import ForkServer
from launcher.keeper import SOCKET
from launcher.options import UpOptions
from launcher.pump import Pump, PumpOptions
from launcher.rundir import runtime_root

if TYPE_CHECKING:
    from launcher.checks import HostFacts


def up(options: UpOptions, entries: EntryPoints, facts: Callable[[], HostFacts] | None) -> int:
    """Run a machine; the exit status. `facts`: what is known of the host, None: this host's."""
    if not options.detach:
        return _run(options, entries, facts, None)
    log = run_in_background(lambda ready: _run(options, entries, facts, ready))
    if isinstance(log, int):
        return log
    name = log.stem
    print(f"{name}: running; see `launcher ps`, `launcher console`, `launcher down {name}`, {log}")
    return EXIT_OK


def _run(
    options: UpOptions,
    entries: EntryPoints,
    facts: Callable[[], HostFacts] | None,
    ready: OnReady | None,
) -> int:
    for socket in runtime_root().glob(f"*/{SOCKET}"):
        if socket.parent.name == _name(options):
            from launcher.reattach import here, reattach

            now = here(socket.parent)
            if now is not None:
                return reattach(options, socket.parent, now, ready)
    with contextlib.ExitStack() as cleanup:
        forkserver = ForkServer.start(entries.preload())
        cleanup.callback(forkserver.stop)
        pump = None
        if ready is None or options.until is not None:
            until = options.until.encode() if options.until is not None else None
            pump = Pump.start(PumpOptions(show=ready is None, until=until))
            cleanup.callback(pump.stop)
        from launcher.affinity import CoreLoad
        from launcher.tsc_unsafe import TscClock

        tsc, load = TscClock(), CoreLoad()
        from launcher.checks import HostFacts
        from launcher.session import run_machine

        known = facts or HostFacts.of_this_host
        return run_machine(options, entries, known, forkserver, pump, tsc, load, ready)


def _name(options: UpOptions) -> str:
    """Of the machine; ConfigError for what is wrong with its file."""
    if options.name is not None:
        return options.name
    from launcher.config import read_config

    return read_config(options.file, options.name).machine.name
