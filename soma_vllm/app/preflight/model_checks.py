"""Preflight checks of the models' folders, of the original's endpoint, and of adapters' ranks and slots."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from soma_vllm.adapters.store.base_model import tensors_of
from soma_vllm.app.preflight.machine_checks import Report
from soma_vllm.config import Config, Engine
from soma_vllm.documents import read_json
from soma_vllm.engines.memory import GB, read_object, weights_bytes
from soma_vllm.engines.vllm.arguments import LORA_RANKS, slot_rank
from soma_vllm.errors import DocumentError
from soma_vllm.private import masked, secret
from soma_vllm.scheduler.routing import DISPATCH_NAME


def check_model(report: Report, role: str, path: Path) -> bool:
    """True when the folder holds a model."""
    missing = [name for name in ("config.json", "*.safetensors") if not any(path.glob(name))]
    if missing:
        report.bad(f"{role}: {path} has no {' and no '.join(missing)}; expected a model's folder")
    elif damaged := list(_damaged(path)):
        for problem in damaged:
            report.bad(f"{role}: {path / problem}")
        return False
    else:
        report.good(f"{role}: {path.name}, {weights_bytes(path) / GB:.1f} GB of weights")
    return not missing


def _damaged(path: Path) -> Iterator[str]:
    """The files of a model that are cut off or no JSON, each with what is wrong."""
    for file in sorted(path.glob("*.json")):
        try:
            document = read_json(file)
        except DocumentError as error:
            yield f"{file.name}: {error}"
        else:
            if file.name == "config.json" and not isinstance(document, dict):
                yield f"{file.name}: found a {type(document).__name__}; expected an object"
    for file in sorted(path.glob("*.safetensors")):
        try:
            tensors = tensors_of(file)
        except (OSError, ValueError) as error:
            yield f"{file.name}: found no list of tensors ({error}); expected whole safetensors"
            continue
        end = max((found["data_offsets"][1] for found in tensors.values()), default=0)
        if end > (size := file.stat().st_size):
            yield f"{file.name}: found {size} bytes; expected at least {end}: it was cut off"


def check_names(report: Report, config: Config) -> None:
    """Each model that clients may ask for has a name of its own."""
    original, surrogate = config.original_name, config.surrogate_name
    expected = "expected a name of its own (original.name, surrogate.name)"
    for role, name in (("original", original), ("surrogate", surrogate)):
        if name.partition(":")[0] == DISPATCH_NAME:
            report.bad(f"{role}.name: found {name!r}, by which clients ask for dispatch; {expected}")
    if original == surrogate:
        report.bad(f"original.name, surrogate.name: found {original!r} for both models; {expected} for each")


def check_engine_model(report: Report, role: str, engine: Engine, path: Path) -> None:
    """The folder holds a model with a chat template, whose context is as long as configured."""
    if not check_model(report, role, path):
        return
    templates = [path / name for name in ("chat_template.jinja", "chat_template.json")]
    embedded = read_object(path / "tokenizer_config.json").get("chat_template")
    if not embedded and not any(template.is_file() for template in templates):
        report.bad(f"{role}: {path} has no chat template in tokenizer_config.json or chat_template.jinja")
    longest = read_object(path / "config.json").get("max_position_embeddings")
    if isinstance(longest, int) and engine.max_model_len > longest:
        report.bad(
            f"{role}.max_model_len: found {engine.max_model_len}; expected at most {longest}, the model's own"
        )


def check_draft(report: Report, original_path: Path, surrogate_path: Path) -> None:
    """vLLM refuses a draft model of another vocabulary size than the original's."""
    original, surrogate = (
        read_object(path / "config.json").get("vocab_size") for path in (original_path, surrogate_path)
    )
    if original == surrogate:
        report.good("the surrogate drafts for the original")
    else:
        report.bad(
            f"original.draft_tokens: found vocabularies of {original} (original) and {surrogate} (surrogate); "
            "expected one size, or draft_tokens: 0"
        )


def check_endpoint(report: Report, config: Config) -> None:
    """The original's URL is one, and its key is in the environment."""
    url, key = config.original.url, config.original.api_key_env
    if url is not None:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            report.good(f"the original is served by {parts.hostname}")
        else:
            report.bad(f"original.url: found {masked(url)}; expected http(s)://host[:port]/v1")
    if key is not None and not secret(key):
        report.bad(f"original.api_key_env: the environment variable {key} is not set")


def check_adapters(report: Report, config: Config) -> None:
    """vLLM has slots for the rank; what slots and their memory are wasted on is noted."""
    rank, surrogate = config.lora.rank, config.surrogate
    try:
        slot = slot_rank(rank)
    except ValueError as error:
        report.bad(str(error))
    else:
        if slot != rank:
            report.good(f"note: adapters of rank {rank} take slots of rank {slot}; vLLM has {LORA_RANKS}")
    if surrogate.max_loras > surrogate.max_num_seqs:
        report.good(
            f"note: surrogate.max_loras: {surrogate.max_loras} slots, but only {surrogate.max_num_seqs} "
            "requests at once (surrogate.max_num_seqs); the memory of further slots is never used"
        )
    if surrogate.max_cpu_loras == surrogate.max_loras:
        report.good(
            f"note: surrogate.max_cpu_loras: as many as slots, {surrogate.max_loras}; the adapter of every "
            "further session is read again whenever that session returns"
        )
