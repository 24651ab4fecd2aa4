"""A web server on this machine that cuts, stalls and lies as a test wants it to, and a data set of six small images."""

import hashlib
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from datasets.download import RemoteFile

PIXELS = 784
IMAGES = np.random.default_rng(0).integers(0, 2, (6, PIXELS), dtype=np.uint8)
CONTENT = IMAGES.tobytes()
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


class Server:
    """Serves `files` (name to bytes) while in its context.

    Each answer takes the next word of `answers`, and the last one for ever: `whole`; a number, after which many bytes
    the connection is cut; `stall`, which sends 100 bytes and then nothing until `go` is set; `silent`, which sends
    nothing at all until then; `chunked`, cut in the middle of a chunk; `elsewhere`, a range that was not asked for; or
    an error such as `HTTP 503`. `asked` has the path and the range of each request.
    """

    def __init__(self, files=None, answers=("whole",), ranges=True):
        self.files = {"images.raw": CONTENT} if files is None else files
        self.answers = list(answers)
        self.ranges = ranges
        self.asked = []
        self.go = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                with suppress(ConnectionError):
                    outer.answer(self)

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self.go.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def answer(self, handler):
        with self._lock:
            self.asked.append((handler.path, handler.headers["Range"]))
            word = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        content = self.files.get(handler.path.lstrip("/"))
        if content is None or str(word).startswith("HTTP"):
            handler.send_error(404 if content is None else int(word.split()[1]))
            return
        if word == "silent":
            self.go.wait()
            return
        begin = self._begin(handler)
        if begin and begin >= len(content):
            handler.send_error(416)
            return
        if begin:
            handler.send_response(206)
            told = begin + 1 if word == "elsewhere" else begin
            handler.send_header("Content-Range", f"bytes {told}-{len(content) - 1}/{len(content)}")
        else:
            handler.send_response(200)
        body = content[begin:]
        if word == "chunked":
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            handler.wfile.write(b"%x\r\n" % len(body) + body[:100])
            return
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: {"stall": 100, "whole": None, "elsewhere": None}.get(word, word)])
        if word == "stall":
            self.go.wait()

    def _begin(self, handler):
        asked = handler.headers["Range"]
        return int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0


def read(path: Path):
    """Return the splits of the small data set."""
    content = path.read_bytes()
    if len(content) != len(CONTENT):
        raise ValueError(f"{len(CONTENT):,} bytes")
    images = np.frombuffer(content, np.uint8).reshape(-1, PIXELS)
    return {"train": images[:4], "valid": images[4:5], "test": images[5:]}


def remote_file(checksum=SHA256):
    return RemoteFile("images.raw", read, checksum)
