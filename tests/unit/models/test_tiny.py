"""The tiny models have the form of real ones: they load, tokenize, generate and tell texts apart."""

import json

import pytest

from soma_vllm.errors import ModelError
from soma_vllm.models.catalog import TINY_NAMES, is_ready
from soma_vllm.models.tiny import make_tiny, read_texts


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    make_tiny(root / "models")
    return root / "models"


def chat(folder, text):
    """Greedy answer ids of one user turn."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    return answer[0, prompt["input_ids"].shape[1] :].tolist()


def test_all_three_models_are_ready(tiny):
    assert [name for name in TINY_NAMES if not is_ready(tiny / name)] == []


@pytest.mark.parametrize("text", ["plain words", "héllo 你好 🎉", "\t tabs\n\nand   spaces ", "x = {'a': [1]}"])
def test_any_text_round_trips_through_the_tokenizer(tiny, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "tiny-surrogate")
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_both_roles_share_one_tokenizer(tiny):
    files = [(tiny / name / "tokenizer.json").read_bytes() for name in ("tiny-original", "tiny-surrogate")]
    assert files[0] == files[1]


def test_the_chat_template_renders_chatml_with_single_special_tokens(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "tiny-original")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text).input_ids
    assert ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("name", ["tiny-original", "tiny-surrogate"])
def test_answers_depend_on_the_prompt(tiny, name):
    answers = {tuple(chat(tiny / name, text)) for text in ("Hi there", "How do I sort a list?", "Paris?")}
    assert len(answers) == 3


def test_the_end_token_is_possible_but_rare(tiny):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny / "tiny-surrogate"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    prompt = tokenizer(" ".join(read_texts()[:5]), return_tensors="pt")
    with torch.no_grad():
        ends = model(**prompt).logits.float().softmax(-1)[0, :, tokenizer.eos_token_id]
    assert ends.min() > 1e-5
    assert ends.mean() < 0.01


def test_the_same_texts_make_the_same_weights(tiny, tmp_path):
    import torch

    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    original, surrogate = make_tiny(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    for folder in (original, surrogate, tmp_path / "tiny-encoder"):
        again = (tiny / folder.name / "model.safetensors").read_bytes()
        assert (folder / "model.safetensors").read_bytes() == again


def test_the_encoder_puts_texts_that_share_words_nearer(tiny):
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "tiny-encoder")
    model = AutoModel.from_pretrained(tiny / "tiny-encoder")

    def vector(text):
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    base = vector("How do I read a file in Python?")
    near = torch.cosine_similarity(base, vector("How do I read a file line by line?"), dim=0)
    far = torch.cosine_similarity(base, vector("The capital of France lies on the Seine."), dim=0)
    assert near > far + 0.2


def test_tokenizers_learn_from_the_dialogues_given(tmp_path):
    (tmp_path / "b.json").write_text(json.dumps({"d1": ["zwölf Boxkämpfer", "jagen Viktor"]}))
    (tmp_path / "a.json").write_text(json.dumps({"d0": ["first"]}))
    assert read_texts(tmp_path) == ["first", "zwölf Boxkämpfer", "jagen Viktor"]


def test_without_dialogues_the_texts_of_the_package_are_used(tmp_path):
    assert read_texts(tmp_path / "missing") == read_texts() != []


def test_a_dialogue_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ModelError, match=r"bad\.json: expected JSON dialogues"):
        read_texts(tmp_path)
