"""For all tests."""

from __future__ import annotations

import signal

# A shell starts background jobs with SIGINT ignored, and children inherit that; tests send Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
