"""Weights of others: downloaded once, checked, kept."""

import pytest

from varlab.models import weight_files


def test_downloads_are_checked_and_kept(tmp_path, monkeypatch):
    from support.servers import http_server

    from varlab.files import sha256

    monkeypatch.setenv("VARLAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "w.pth").write_bytes(b"weights")
    digest = sha256(tmp_path / "w.pth")
    with http_server(tmp_path) as url:
        good = weight_files.WeightFile("w.pth", sha256=digest[:8], url=f"{url}/w.pth")
        assert weight_files.locate(good, "download").read_bytes() == b"weights"
        bad = weight_files.WeightFile("v.pth", sha256="00", url=f"{url}/w.pth")
        with pytest.raises(ValueError, match=r"is not v.pth: its checksum differs"):
            weight_files.locate(bad, "download")
        with pytest.raises(OSError, match="cannot be downloaded"):
            weight_files.locate(weight_files.WeightFile("u.pth", sha256="00", url=f"{url}/u.pth"), "download")
    assert weight_files.locate(good, "download").read_bytes() == b"weights"  # from the cache
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["w.pth"]
