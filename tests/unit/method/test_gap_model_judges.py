"""Judges that may stand in place of facts: a classifier from a folder, a model behind an endpoint."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from soma_vllm.config import Config, parse_config
from soma_vllm.errors import ConfigError, ModelError
from soma_vllm.method.gap.cross_encoder import CrossEncoderJudge
from soma_vllm.method.gap.gap_judge import open_judge
from soma_vllm.method.gap.llm_judge import LlmJudge

WORDS = ["[PAD]", "[UNK]", *["the", "shop", "is", "open", "closed", "on", "sundays", "secret"]]
PAIR = ("The shop is open on Sundays.", "The shop is closed on Sundays.")


def classifier(path: Path, labels: list[str]) -> Path:
    """A tiny random classifier with its tokenizer."""
    torch.manual_seed(3)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=len(WORDS),
        max_position_embeddings=34,
        id2label=dict(enumerate(labels)),
        initializer_range=1.0,
        **shape,
    )
    BertForSequenceClassification(config).save_pretrained(path)
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("labels", "same"),
    [
        (["contradiction", "neutral", "entailment"], 2),
        (["entailment", "not_entailment"], 0),
        (["not_duplicate", "duplicate"], 1),
        (["LABEL_0", "LABEL_1"], 1),
        (["LABEL_0"], None),
    ],
)
def test_a_classifiers_gap_is_the_doubt_of_its_less_sure_reading(
    tmp_path: Path, labels: list[str], same: int | None
) -> None:
    judge = CrossEncoderJudge(classifier(tmp_path, labels), 16)
    sure = []
    for texts in (PAIR, PAIR[::-1]):
        logits = judge._model(**judge._tokenizer([list(texts)], return_tensors="pt")).logits[0]
        sure.append(float(torch.sigmoid(logits[0]) if same is None else logits.softmax(0)[same]))
    assert sure[0] != pytest.approx(sure[1], abs=1e-6)
    found = judge.gaps([PAIR, PAIR[::-1], ("4", "4"), ('{"a": 1}', '{"a": 2}')])
    assert [one.value for one in found] == pytest.approx([1 - min(sure)] * 2 + [0.0, 1.0], abs=1e-5)


def test_a_long_pair_is_cut_to_what_the_classifier_reads(tmp_path: Path) -> None:
    judge = CrossEncoderJudge(classifier(tmp_path, ["no", "same"]), 256)
    (found,) = judge.gaps([("the shop " * 200, "is open " * 200)])
    assert 0.0 <= found.value <= 1.0


@pytest.mark.parametrize("labels", [["a", "b", "c"], ["entailment", "entailed", "no"]])
def test_labels_that_do_not_tell_are_refused(tmp_path: Path, labels: list[str]) -> None:
    with pytest.raises(ModelError, match=f"found the labels {', '.join(labels)}; expected one output"):
        CrossEncoderJudge(classifier(tmp_path, labels), 16)


def test_a_folder_without_a_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="found no sequence classifier"):
        CrossEncoderJudge(tmp_path, 16)
    folder = classifier(tmp_path / "model", ["no", "same"])
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"architectures": ["BertModel"]}))
    with pytest.raises(ModelError, match="found no sequence classifier"):
        CrossEncoderJudge(folder, 16)


class Endpoint(BaseHTTPRequestHandler):
    """Answers with what the test laid down, and keeps what it was asked."""

    server: Model

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers.get("Authorization"), json.loads(body)))
        self.server.go_on.wait(20)
        status, text = self.server.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Model(ThreadingHTTPServer):
    """A language model behind chat completions."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endpoint)
        self.asked: list[tuple[str, str | None, Any]] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.answer = (200, b"")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def says(self, text: object) -> None:
        self.answer = (200, json.dumps({"choices": [{"message": {"content": text}}]}).encode())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that no longer waits is none."""


@pytest.fixture
def model() -> Iterator[Model]:
    with Model() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("said", "value", "why"),
    [
        ("SAME", 0.0, ()),
        ("**Same.**", 0.0, ()),
        ("DIFFERENT: open, closed", 1.0, ("open, closed",)),
        ("<think>SAME? No.</think>\nDIFFERENT", 1.0, ()),
    ],
)
def test_a_model_says_whether_two_answers_agree(
    model: Model, said: str, value: float, why: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "k-1")
    model.says(said)
    judge = LlmJudge(f"{model.url}/", "judge-1", "JUDGE_KEY", 5.0)
    found = judge.gaps([PAIR, PAIR[::-1]])
    assert [(one.value, one.why, one.failure) for one in found] == [(value, why, None)] * 2
    (path, key, body), again = model.asked
    assert (path, key, body["model"], body["temperature"]) == (
        "/v1/chat/completions",
        "Bearer k-1",
        "judge-1",
        0,
    )
    assert again[2] == body
    assert json.loads(body["messages"][1]["content"]) == {"answer_1": PAIR[1], "answer_2": PAIR[0]}


def test_what_texts_alone_settle_is_not_sent_and_what_is_sent_is_bounded(model: Model) -> None:
    model.says("SAME")
    judge = LlmJudge(model.url, "judge-1", None, 5.0)
    found = judge.gaps([("4", " 4 "), ('{"a": 1}', '{"a": 2}'), ("the shop " * 5000, "is open " * 5000)])
    assert [one.value for one in found] == [0.0, 1.0, 0.0]
    ((_, key, body),) = model.asked
    assert key is None
    assert len(json.dumps(body)) < 20_000


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ((500, b"the shop"), "found status 500"),
        ((302, b""), "found status 302"),
        ((200, b"no json"), "found no verdict"),
        ((200, b'{"choices": []}'), "found no verdict"),
        ((200, b'{"choices": [{"message": {"content": null}}]}'), "found no verdict"),
        ((200, b'{"choices": [{"message": {"content": "The shop is the same."}}]}'), "found no verdict"),
    ],
)
def test_a_reply_without_a_verdict_is_a_failure_that_quotes_nothing(
    model: Model, answer: tuple[int, bytes], failure: str
) -> None:
    model.answer = answer
    (found,) = LlmJudge(model.url, "judge-1", None, 5.0).gaps([PAIR])
    assert found.value == 1.0
    assert found.failure is not None
    assert failure in found.failure
    assert "shop" not in found.failure


def test_an_endpoint_that_is_slow_or_away_is_a_failure(model: Model) -> None:
    model.go_on.clear()
    (slow,) = LlmJudge(model.url, "judge-1", None, 0.2).gaps([PAIR])
    assert slow.failure == "the judge did not answer within 0.2 s"
    (away,) = LlmJudge("http://127.0.0.1:9/v1", "judge-1", None, 5.0).gaps([PAIR])
    assert away.failure == "the judge could not be asked (ConnectError)"


def test_the_configuration_chooses_these_judges_and_asks_for_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unused: Any = None
    folder = classifier(tmp_path, ["no", "same"])
    by_folder = parse_config({"gate": {"gap": "cross_encoder", "judge_model": str(folder)}}, "test")
    assert isinstance(open_judge(by_folder, unused), CrossEncoderJudge)
    gate = {"gap": "llm", "judge_model": "m", "judge_url": "http://h/v1", "judge_api_key_env": "JUDGE_KEY"}
    monkeypatch.setenv("JUDGE_KEY", "k-1")
    assert isinstance(open_judge(parse_config({"gate": gate}, "test"), unused), LlmJudge)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="JUDGE_KEY is not set"):
        open_judge(parse_config({"gate": gate}, "test"), unused)
    with pytest.raises(ConfigError, match=r"gate.judge_model: found nothing; gate.gap: cross_encoder needs it"):
        parse_config({"gate": {"gap": "cross_encoder"}}, "test")
    with pytest.raises(ConfigError, match=r"gate.judge_model, gate.judge_url: found nothing"):
        parse_config({"gate": {"gap": "llm"}}, "test")
    assert Config().gate.judge_timeout_s == 30.0
