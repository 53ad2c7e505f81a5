"""What the page answers: requests that name it by its own address and come from itself, with files that were uploaded."""

import socket
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LOCAL = ("localhost", "127.0.0.1", "::1")


class OwnRequests:
    """ASGI middleware: refuses requests whose Host is not an address of this page, or whose Origin is another page.

    Otherwise a web site that a visitor has open could send requests, or, with a name that it points to this machine (DNS
    rebinding), read the answers. `host`: where the page is served; `allowed_hosts`: further names, such as a proxy's.
    """

    def __init__(self, app: ASGIApp, host: str, allowed_hosts: Sequence[str] = ()) -> None:
        self.app, self.is_local = app, host in LOCAL
        names = {*LOCAL, host, *allowed_hosts, *(() if self.is_local else (socket.gethostname(), socket.getfqdn()))}
        self.names = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
            host, origin = headers.get("host", ""), headers.get("origin")
            if not self.is_own(host) or (origin is not None and urlsplit(origin).netloc != host):
                answer = PlainTextResponse(f"refused: this page is not {host!r}, or not {origin!r}\n", status_code=403)
                await answer(scope, receive, send)
                return
        with suppress(ClientDisconnect):  # the sender left
            await self.app(scope, receive, send)

    def is_own(self, host: str) -> bool:
        """Whether a Host header names this page. An IP address does where the page is served to a network."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
            return name in self.names or (not self.is_local and bool(ip_address(name)))
        except ValueError:
            return False


def check_uploads(value: Any, folder: Path) -> None:
    """Raises ValueError if a request names a file that was not uploaded to the app's own folder."""
    if isinstance(value, dict) and ({"path", "url"} & value.keys()):
        path = Path(str(value.get("path"))).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            raise ValueError("this file was not uploaded to this page")
    for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        check_uploads(entry, folder)
