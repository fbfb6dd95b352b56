"""Published weights: from the cache where they lie there, else from the network, and checked by SHA-256 either way."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

import torch

from compress.errors import ModelError
from compress.extras import need
from compress.progress import Progress

IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")
"""The beginning of its SHA-256 in a file's name: resnet18-f37072fd.pth."""
SILENT_S = 60
"""Seconds after which a server that says nothing is given up."""
SHA256 = re.compile(r"[0-9a-f]{64}")


def cached_url(url: str) -> Path:
    """Where torch keeps what it downloaded from `url`, whether or not it is there."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name


def from_url(url: str, progress: Progress, *, place: str, sha256: str | None = None) -> Path:
    """The file that `url` names, in torch's cache. Nothing is asked for over the network where it lies there.

    Its SHA-256 must be `sha256`, or begin with what stands in its name. Raises ModelError where neither is known, for a
    file that is another, and for one that cannot be downloaded.
    """
    path = cached_url(url)
    named = IN_NAME.search(path.name)
    expected = sha256 or (named[1] if named else None)
    if expected is None:
        raise ModelError(place, f"nothing says what the SHA-256 of {url} is", "give it as `sha256`")
    if not path.is_file():
        progress.note(f"downloading {url}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            _fetch(url, partial)
            refuse_another(partial, expected, url)
            partial.replace(path)
        except ModelError as error:
            raise ModelError(place, f"cannot download {url}: {error.problem}", _instead(path)) from error
        except Exception as error:  # urllib, sockets, TLS, a full disk
            raise _unreachable(place, url, path, error) from error
        finally:
            partial.unlink(missing_ok=True)
    refuse_another(path, expected, url)
    return path


def from_hub(repository: str, name: str, progress: Progress, *, place: str, revision: str | None = None) -> Path:
    """A file of a repository on the Hugging Face hub, in that hub's cache; see `from_url`.

    Raises ModelError for a repository that has no such file too.
    """
    hub = need("huggingface_hub", "huggingface", place)
    known = cached_hub(repository, name, place=place, revision=revision)
    if known is None:
        progress.note(f"downloading {name} of {repository}")
        try:
            known = Path(hub.hf_hub_download(repository, name, revision=revision))
        except Exception as error:
            if "EntryNotFound" in type(error).__name__ and "Local" not in type(error).__name__:
                raise ModelError(place, f"{repository} has no {name}", "name another repository") from error
            folder = Path(hub.constants.HF_HUB_CACHE)
            raise _unreachable(place, f"{name} of {repository}", folder, error) from error
    blob = known.resolve().name  # large files are stored under their SHA-256, small ones under git's
    if SHA256.fullmatch(blob):
        refuse_another(known, blob, f"{name} of {repository}")
    return known


def cached_hub(repository: str, name: str, *, place: str, revision: str | None = None) -> Path | None:
    """The file where it lies in the hub's cache; the network is not asked."""
    hub = need("huggingface_hub", "huggingface", place)
    try:
        found = hub.try_to_load_from_cache(repository, name, revision=revision)
    except Exception as error:  # a name that no repository can have
        raise ModelError(place, f"`{repository}` is no folder, and no name of a repository", said(error)) from error
    return Path(found) if isinstance(found, str) else None


def refuse_another(path: Path, sha256: str, what: str) -> None:
    """Raises ModelError unless the SHA-256 of the file begins with `sha256`."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(sha256):
        problem = f"is not {what}: its SHA-256 begins with {found[:16]}, not with {sha256[:16]}"
        raise ModelError(path, problem, "remove it, so that it is downloaded again")


def said(error: Exception) -> str:
    """Kind and message of an error, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _fetch(url: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=SILENT_S) as answer, path.open("wb") as file:
            shutil.copyfileobj(answer, file)
    except urllib.error.HTTPError as error:
        error.close()
        raise


def _instead(path: Path) -> str:
    return f"fetch it where there is a network and put it into {path}, or name a file of yours as `weights`"


def _unreachable(place: str, what: str, path: Path, error: Exception) -> ModelError:
    return ModelError(place, f"cannot download {what} ({said(error)[:160]})", _instead(path))
