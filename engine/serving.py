"""A page on this machine to drop images on: what ``predict.py --serve`` shows."""

import base64
import io
import json
import secrets
import signal
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from PIL import Image

from utils.errors import UserError
from utils.files import reason_of
from utils.names import printable

HOST = "127.0.0.1"
"""This machine alone can reach it."""
LARGEST = 32 << 20
"""Bytes of an image at most."""
WIDEST = 1600
"""Pixels of a picture that is sent back, on its longer side."""
PAGE = Path(__file__).with_suffix(".html")
SILENCE_SECONDS = 30
"""So long a connection may say nothing."""

Answer = Callable[[Path], tuple[dict[str, Any], Image.Image | None]]
"""From an image file to its record (``predictions`` as pairs of a name and a share, or ``error``) and a picture."""


class Server(ThreadingHTTPServer):
    """Serves the page, and answers it one image at a time.

    Args:
        answer: is called by one thread at a time.
        title: what the page says of the model.
        port: 0 takes a free one.

    Raises:
        UserError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, answer: Answer, title: str, port: int):
        self.answer, self.title = answer, printable(title)
        self.computing = threading.Lock()
        try:
            super().__init__((HOST, port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"port {port} cannot be served on: {reason_of(error)}; choose another: --serve N"
            ) from error

    def handle_error(self, request, client_address) -> None:
        """Say nothing of those who have gone away."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """Answers ``GET /`` with the page and ``POST /predict``, whose body is an image file, with JSON."""

    server: Server
    timeout = SILENCE_SECONDS
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if not self._is_ours():
            return
        if self.path != "/":
            self._send(404, {"error": "there is nothing here"})
            return
        nonce = secrets.token_urlsafe()
        title = self.server.title.replace("&", "&amp;").replace("<", "&lt;")
        page = PAGE.read_text(encoding="utf-8").replace("{{ nonce }}", nonce).replace("{{ title }}", title)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src blob: data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self._send(200, page.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": policy})

    def do_POST(self) -> None:
        if not self._is_ours():
            return
        if self.path != "/predict":
            self._send(404, {"error": "there is nothing here"})
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._send(411, {"error": "the request does not say how long the image is"})
        elif int(length) > LARGEST:
            self._send(413, {"error": f"an image may have {LARGEST >> 20} MB at most"})
        else:
            self._send(*self._answer(self.rfile.read(int(length))))

    def _answer(self, data: bytes) -> tuple[int, dict[str, Any]]:
        try:
            with NamedTemporaryFile(prefix="image-") as file:
                file.write(data)
                file.flush()
                with self.server.computing:
                    record, picture = self.server.answer(Path(file.name))
        except Exception as error:  # of one image; the server goes on
            return 500, {"error": reason_of(error)}
        if "error" in record:
            return 400, {"error": str(record["error"]).replace(file.name, "the image")}
        content: dict[str, Any] = {"predictions": record["predictions"]}
        if picture is not None:
            picture.thumbnail((WIDEST, WIDEST))
            picture.save(out := io.BytesIO(), "PNG")
            content["picture"] = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
        return 200, content

    def _is_ours(self) -> bool:
        """Refuse what other pages in the browser may send here, under a name of theirs or in the user's.

        The port may be another where it is forwarded.
        """
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host.partition(":")[0] in (HOST, "localhost") and origin in (None, f"http://{host}"):
            return True
        self._send(403, {"error": f"open this page as {self.server.address}"})
        return False

    def _send(
        self, status: int, content: dict[str, Any] | bytes, kind: str = "application/json", headers: dict | None = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        about = {"Content-Type": kind, "Content-Length": str(len(data)), "X-Content-Type-Options": "nosniff"}
        about |= {"Cache-Control": "no-store", **(headers or {})}
        if status != 200:
            about["Connection"] = "close"  # what else was sent has not been read
            self.close_connection = True
        for name, value in about.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments) -> None:
        """Say nothing of each request."""


def serve(answer: Answer, title: str, port: int) -> None:
    """Serve until Ctrl-C; see :class:`Server`."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # whoever goes away in the middle of an answer ends nothing
    with Server(answer, title, port) as server:
        print(f"{printable(title)}: open {server.address} and drop images on it; Ctrl-C ends it", flush=True)
        server.serve_forever(poll_interval=0.1)
