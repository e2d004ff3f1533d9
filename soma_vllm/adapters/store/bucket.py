"""An object store as `object_store.py` needs it, over fsspec: paths below one URL, and one kind of error.

Guarantees: nothing is cached, so that another host's work is seen at once; whatever a backend raises arrives as
NotFound or AdapterError; deleting what is not there is no error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from soma_vllm.errors import AdapterError, NotFound, SomaError
from soma_vllm.private import masked


class Bucket:
    """What lies below a URL. Paths are relative, with slashes."""

    def __init__(self, url: str) -> None:
        """Raises AdapterError: no installed package opens this kind of URL."""
        self._url = url.rstrip("/")
        try:
            self._fs, base = fsspec.core.url_to_fs(self._url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise AdapterError(
                f"adapters.root: found {str(self)!r}, which cannot be opened: {error}"
            ) from error
        self._base = base.rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)

    def __str__(self) -> str:
        return masked(self._url)

    @property
    def digest(self) -> str:
        """Tells roots apart in a shared cache."""
        return hashlib.sha256(self._url.encode()).hexdigest()[:16]

    def claim(self, path: str, content: bytes) -> bool:
        """Create an object; False where there is one."""
        with self._errors(f"{path} not created"):
            self._make_room(path)
            if self._fs.exists(self._at(path)):
                return False
            try:
                if self._local:  # fsspec's own `create` looks, then writes
                    with self._fs.open(self._at(path), "xb") as file:
                        file.write(content)
                else:
                    self._fs.pipe_file(self._at(path), content, mode="create")
            except FileExistsError:
                return False
        return True

    def write(self, path: str, content: bytes) -> None:
        """Put an object."""
        with self._errors(f"{path} not written"):
            self._make_room(path)
            self._fs.pipe_file(self._at(path), content)

    def put(self, file: Path, path: str) -> None:
        """Upload a file.

        Raises:
            AdapterError: it did not arrive at its full length.
        """
        with self._errors(f"{path} not uploaded"):
            self._make_room(path)
            self._fs.put_file(str(file), self._at(path))
            size, expected = self._fs.info(self._at(path))["size"], file.stat().st_size
        if size != expected:
            raise AdapterError(f"{self}/{path}: found {size} bytes after the upload; expected {expected}")

    def fetch(self, path: str, file: Path) -> None:
        """Download an object. Raises NotFound, AdapterError."""
        with self._errors(f"{path} not fetched"):
            self._fs.get_file(self._at(path), str(file))

    def read(self, path: str) -> bytes:
        """An object's bytes. Raises NotFound, AdapterError."""
        with self._errors(f"{path} cannot be read"):
            content: bytes = self._fs.cat_file(self._at(path))
            return content

    def read_all(self, paths: Sequence[str]) -> Mapping[str, bytes]:
        """The bytes of those objects that are there, together where the backend can."""
        if not paths:
            return {}
        by_place = {self._at(path): path for path in paths}
        with self._errors("manifests cannot be read"):
            found: Mapping[str, Any] = self._fs.cat(list(by_place), on_error="omit")
            return {by_place[place]: content for place, content in found.items() if place in by_place}

    def has(self, path: str) -> bool:
        """Whether there is such an object."""
        with self._errors(f"{path} cannot be looked up"):
            try:
                self._fs.info(self._at(path))
            except FileNotFoundError:
                return False
            return True

    def names(self, folder: str) -> list[str]:
        """What lies directly in a folder; nothing where there is none."""
        with self._errors(f"{folder} cannot be listed"):
            try:
                found = self._fs.ls(self._at(folder), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    def remove(self, path: str) -> None:
        """Delete an object, if there is one."""
        with self._errors(f"{path} not deleted"):
            try:
                self._fs.rm_file(self._at(path))
            except FileNotFoundError:
                return

    def remove_below(self, folder: str) -> None:
        """Delete a folder with all that is left in it."""
        with self._errors(f"{folder} not deleted"):
            try:
                self._fs.rm(self._at(folder), recursive=True)
            except FileNotFoundError:
                return

    def _at(self, path: str) -> str:
        return f"{self._base}/{path}" if path else self._base

    def _make_room(self, path: str) -> None:
        """Make the folder of an object; object stores have none, and take this for nothing."""
        self._fs.makedirs(self._at(path).rsplit("/", 1)[0], exist_ok=True)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except SomaError:
            raise
        except FileNotFoundError as error:
            raise NotFound(masked(f"{self._url}: {what}: not found")) from error
        except Exception as error:  # the edge to another service: every backend has errors of its own
            told = f"{self._url}: {what}: {type(error).__name__}: {error}"
            raise AdapterError(masked(told)) from error
