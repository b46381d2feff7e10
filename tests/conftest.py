"""For all tests."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Machines keep their translations there; what the user has is neither used nor filled by tests.
if "BACKPLANE_TESTS" not in os.environ:  # not once more in pytest-xdist's workers
    os.environ["BACKPLANE_TESTS"] = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="backplane-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# A shell starts background jobs with SIGINT ignored, and children inherit that; tests send Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose name is short enough for sockets in folders in it; that of pytest's tmp_path, with the
    names of user, worker and test in it, may not be. The environment's TMPDIR may be anything, too."""
    with tempfile.TemporaryDirectory(prefix="bp", dir="/tmp") as name:
        yield Path(name)
