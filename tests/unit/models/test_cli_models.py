"""`soma models` prints what is there, and errors as one line."""

import pytest
from typer.testing import CliRunner

from soma_vllm.cli.models import app


@pytest.fixture
def soma_models(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMA_HOME", str(tmp_path))
    return lambda *words: CliRunner().invoke(app, list(words))


def test_ls_lists_every_known_model_and_its_state(soma_models, tmp_path):
    folder = tmp_path / "models" / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes(b"x" * 1024)
    lines = {line.split()[0]: line for line in soma_models("ls").stdout.splitlines()}
    assert "ready" in lines["smollm2-135m-instruct"]
    assert "3 KiB" in lines["smollm2-135m-instruct"]
    assert str(folder) in lines["smollm2-135m-instruct"]
    assert "not fetched" in lines["qwen2.5-coder-1.5b-instruct"]
    assert "not made" in lines["tiny-surrogate"]


def test_fetching_an_unknown_model_is_one_line_and_exit_code_1(soma_models):
    result = soma_models("fetch", "gpt-17")
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "'gpt-17'" in errors[0]
    assert "Traceback" not in result.output


def test_make_tiny_says_where_the_pair_is(soma_models, tmp_path):
    result = soma_models("make-tiny", "--into", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "out" / "tiny-surrogate") in result.stdout
