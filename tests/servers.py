"""Servers on this machine that hold a folder of shards, and that fail as real ones do."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread


class Faults:
    """What goes wrong: for each request that finds a file, the next entry of `plan`; nothing once the plan is used up."""

    def __init__(self, *plan: str) -> None:
        self.plan, self.requests = list(plan), 0

    def next(self) -> str:
        self.requests += 1
        return self.plan.pop(0) if self.plan else ""


@contextmanager
def http_server(folder: Path, faults: Faults | None = None, knows_ranges: bool = True) -> Iterator[str]:
    """URL of a web server for the files of a folder.

    Faults: `503`, `cut` (half of the answer, then the connection breaks), `stall` (no byte for 3 s), `slow` (in small pieces),
    `404`.
    """
    faults = faults or Faults()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_HEAD(self) -> None:
            self.answer(has_body=False)

        def do_GET(self) -> None:
            self.answer(has_body=True)

        def answer(self, has_body: bool) -> None:
            file = folder / self.path.lstrip("/")
            fault = faults.next() if has_body and file.suffix == ".tar" else ""
            if not file.is_file() or fault in ("404", "503"):
                self.send_response(int(fault or 404))
                self.send_header("Content-Length", "0")
                self.send_header("Connection", "close")
                self.end_headers()
                return
            content, status = file.read_bytes(), 200
            asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            whole = len(content)
            if asked and knows_ranges:
                status, content = 206, content[int(asked[1]) : int(asked[2]) + 1]
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if status == 206:
                self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{whole}")
            if knows_ranges:
                self.send_header("Accept-Ranges", "bytes")
            self.send_header("Connection", "close")
            self.end_headers()
            if not has_body:
                return
            if fault == "stall":
                time.sleep(3)
            elif fault == "cut":
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            elif fault == "slow":
                for start in range(0, len(content), 4096):
                    self.wfile.write(content[start : start + 4096])
                    time.sleep(0.01)
            else:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
