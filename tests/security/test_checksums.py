"""What is downloaded is taken with its SHA-256 only, and so is what lies in a cache under its name."""

import hashlib

import pytest
import torch

from compress.errors import ModelError
from compress.models.downloads import cached_url, from_url, refuse_another
from compress.progress import Silent

CONTENT = b"weights of a network"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Makes an address of a file with that content, and an empty cache for it."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))

    def publish(name: str, content: bytes) -> str:
        (tmp_path / "server").mkdir(exist_ok=True)
        (tmp_path / "server" / name).write_bytes(content)
        return (tmp_path / "server" / name).as_uri()

    return publish


def test_a_file_with_its_hash_is_taken(published):
    url = published(f"net-{SHA256[:8]}.pth", CONTENT)
    assert from_url(url, Silent(), place="model").read_bytes() == CONTENT
    plain = published("net.pth", CONTENT)
    assert from_url(plain, Silent(), place="model", sha256=SHA256).read_bytes() == CONTENT


def test_another_file_under_that_name_is_not_and_is_not_kept(published):
    url = published(f"net-{SHA256[:8]}.pth", CONTENT + b"!")
    with pytest.raises(ModelError, match="cannot download"):
        from_url(url, Silent(), place="model")
    assert not cached_url(url).exists()


def test_a_file_of_the_cache_that_was_changed_is_refused(published):
    url = published(f"net-{SHA256[:8]}.pth", CONTENT)
    from_url(url, Silent(), place="model").write_bytes(CONTENT + b"!")
    with pytest.raises(ModelError, match="its SHA-256 begins with"):
        from_url(url, Silent(), place="model")


def test_an_address_that_says_no_hash_is_asked_for_one(published):
    with pytest.raises(ModelError, match="nothing says what the SHA-256"):
        from_url(published("net.pth", CONTENT), Silent(), place="model")


def test_a_prefix_is_compared_with_the_whole_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    refuse_another(path, SHA256, "file")
    with pytest.raises(ModelError):
        refuse_another(path, "0" * 64, "file")


def test_packages_of_the_emulated_system_are_signed(tmp_path):
    """apt's checks are on: no source is marked as trusted, and nothing unsigned is allowed."""
    from pathlib import Path

    from compress.targets import emulated

    sources = [path.read_text(encoding="utf-8") for path in Path(emulated.__file__).parent.glob("*.py")]
    assert any("apt-get" in text for text in sources)
    for text in sources:
        for word in (
            "trusted=yes",
            "allow-unauthenticated",
            "AllowUnauthenticated",
            "AllowInsecureRepositories",
            "trusted-host",
        ):
            assert word.lower() not in text.lower(), word
