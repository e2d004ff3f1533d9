"""Names, paths and hub ids become something an engine can load, or an error that says what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from soma_vllm.errors import ModelError
from soma_vllm.models.catalog import CATALOG, DEMO_NAMES, is_ready, resolve
from soma_vllm.models.home import soma_home


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def put_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


def test_an_existing_directory_resolves_to_its_absolute_path(tmp_path, monkeypatch):
    put_model(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert resolve("mine") == tmp_path / "mine"
    assert resolve(tmp_path / "mine") == tmp_path / "mine"


def test_a_hub_id_is_returned_unchanged():
    assert resolve("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"


@pytest.mark.parametrize("name", [*CATALOG, "tiny-original", "tiny-surrogate", "tiny-encoder"])
def test_a_known_model_resolves_to_its_folder_once_it_is_there(home, name):
    folder = put_model(home / "models" / name)
    assert resolve(name) == folder


def test_an_embedded_model_that_is_not_here_names_the_command_that_brings_it():
    with pytest.raises(ModelError, match="soma models fetch smollm2-135m-instruct"):
        resolve("smollm2-135m-instruct")


def test_a_tiny_model_that_is_not_here_names_the_command_that_makes_it():
    with pytest.raises(ModelError, match="soma models make-tiny"):
        resolve("tiny-surrogate")


@pytest.mark.parametrize("name", ["no-such-model", "./no/such", "/no/such", "../up", "a/b/c", ""])
def test_anything_else_is_an_error_that_quotes_it_and_lists_what_is_accepted(name):
    with pytest.raises(ModelError) as caught:
        resolve(name)
    message = str(caught.value)
    assert repr(name) in message
    assert "qwen2.5-coder-0.5b-instruct" in message
    assert "org/name" in message


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_without_configuration_weights_or_tokenizer_is_not_ready(tmp_path, missing):
    folder = put_model(tmp_path / "model")
    assert is_ready(folder)
    (folder / missing).unlink()
    assert not is_ready(folder)


def test_the_demo_asks_only_for_embedded_models():
    assert set(DEMO_NAMES) <= set(CATALOG)


def test_without_soma_home_models_live_in_the_users_cache(monkeypatch):
    monkeypatch.delenv("SOMA_HOME")
    assert soma_home() == Path.home() / ".cache" / "soma-vllm"


def test_naming_and_fetching_models_loads_neither_torch_nor_transformers():
    program = (
        "import sys, soma_vllm.models.fetch, soma_vllm.cli.models\n"
        "print(sorted({'torch', 'transformers', 'vllm', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
