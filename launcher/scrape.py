"""`launcher stats --listen`: a machine's metrics over HTTP, for a scraper that knows no control socket.

GET /metrics, and nothing else; it ends with the machine, or by Ctrl-C.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from launcher.errors import EXIT_OK, ConfigError, LauncherError
from launcher.metrics import CONTENT_TYPE

LOOPBACK = "127.0.0.1"


def parse_address(text: str) -> tuple[str, int]:
    """ "[HOST:]PORT"; ValueError."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ValueError(f"{text!r} is no port to listen on, write it like 9100 or 0.0.0.0:9100")
    return host or LOOPBACK, int(port)


def serve(
    address: tuple[str, int],
    metrics: Callable[[], str],
    alive: Callable[[], bool],
    tell: Callable[[str], None],
) -> int:
    """Answer while the machine is alive. `tell` is told where, once it can be asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/metrics":
                self.send_error(404, "there is only /metrics")
                return
            try:
                body = metrics().encode()
            except LauncherError:
                self.send_error(503, "the machine does not answer")
                return
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    try:
        server = ThreadingHTTPServer(address, Handler)
    except (OSError, socket.gaierror) as error:
        where = f"{address[0]}:{address[1]}"
        raise ConfigError(where, "", f"can't be listened on ({error.strerror})", "choose another") from error
    with server:
        server.timeout = 1.0
        host, port = server.server_address[:2]
        tell(f"http://{host!s}:{port}/metrics")
        while alive():
            server.handle_request()
    return EXIT_OK
