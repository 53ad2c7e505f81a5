"""Which requests the page answers."""

import asyncio
import socket

import pytest
from starlette.requests import ClientDisconnect

from varlab.app.guard import OwnRequests, check_uploads


def test_a_sender_who_left_is_no_error():
    async def left(scope, receive, send):
        raise ClientDisconnect

    scope = {"type": "http", "headers": [(b"host", b"localhost")]}
    asyncio.run(OwnRequests(left, "localhost")(scope, nothing, nothing))


async def nothing(scope, receive, send):
    """An application that answers nothing."""


@pytest.mark.parametrize(
    ("host", "allowed", "header", "is_own"),
    [
        ("127.0.0.1", [], "127.0.0.1:7860", True),
        ("127.0.0.1", [], "[::1]:7860", True),
        ("127.0.0.1", [], "192.168.0.2:7860", False),
        ("127.0.0.1", [], "LOCALHOST", True),
        ("127.0.0.1", [], "", False),
        ("127.0.0.1", [], "[", False),
        ("127.0.0.1", ["lab.example"], "lab.example", True),
        ("0.0.0.0", [], "192.168.0.2:7860", True),
        ("0.0.0.0", [], f"{socket.gethostname()}:7860", True),
        ("0.0.0.0", [], "rebound.example", False),
    ],
)
def test_a_page_knows_its_names(host, allowed, header, is_own):
    assert OwnRequests(nothing, host, allowed).is_own(header) == is_own


def test_only_uploads_are_read(tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app/a.png").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "app/link.png").symlink_to(tmp_path / "b.png")
    check_uploads([None, 1, "text", {"layers": [{"path": str(tmp_path / "app/a.png")}]}], tmp_path / "app")
    for path in ("b.png", "app/link.png", "app/../b.png", "app", "app/none.png"):
        with pytest.raises(ValueError, match="this file was not uploaded to this page"):
            check_uploads([{"layers": [{"path": str(tmp_path / path), "meta": {}}]}], tmp_path / "app")
    with pytest.raises(ValueError, match="was not uploaded"):
        check_uploads({"url": "http://169.254.169.254/"}, tmp_path / "app")
