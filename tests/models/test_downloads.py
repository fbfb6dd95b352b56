"""Published weights over HTTP: once, whole, and only if they are what they should be."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compress.errors import ModelError
from compress.models.downloads import cached_url, from_url
from compress.progress import Silent

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[tuple[str, list[str]]]:
    """Address of a server for CONTENT, and what it was asked for; torch's cache is in tmp_path."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404 if "absent" in self.path else 200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}", asked
    served.shutdown()
    thread.join()
    served.server_close()


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.rglob("*") if path.is_file())


def test_a_file_is_downloaded_once_and_checked_each_time(server, tmp_path):
    address, asked = server
    url = f"{address}/net-{SHA256[:8]}.pth"
    path = from_url(url, Silent(), place="here")
    assert path == cached_url(url)
    assert path.read_bytes() == CONTENT
    assert from_url(url, Silent(), place="here") == path
    assert asked == [f"/net-{SHA256[:8]}.pth"]
    path.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(ModelError, match=r"is not http.*its SHA-256 begins with \w{16}, not with .*; remove it"):
        from_url(url, Silent(), place="here")


@pytest.mark.parametrize("name", ["net-00000000.pth", "absent-00000000.pth"])
def test_what_is_another_file_or_none_leaves_nothing_behind(server, tmp_path, name):
    with pytest.raises(ModelError, match="here: cannot download") as caught:
        from_url(f"{server[0]}/{name}", Silent(), place="here")
    assert "\n" not in str(caught.value)
    assert "name a file of yours as `weights`" in str(caught.value)
    assert left(tmp_path) == []


def test_a_name_without_a_hash_needs_one(server):
    url = f"{server[0]}/net.pth"
    with pytest.raises(ModelError, match=r"nothing says what the SHA-256 of .* is; give it as `sha256`"):
        from_url(url, Silent(), place="here")
    assert server[1] == []
    assert from_url(url, Silent(), place="here", sha256=SHA256).read_bytes() == CONTENT


def test_without_a_network_it_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    url = f"http://127.0.0.1:9/net-{SHA256[:8]}.pth"
    with pytest.raises(ModelError) as caught:
        from_url(url, Silent(), place="here")
    assert str(cached_url(url)) in caught.value.way_out
