"""The whole configuration, and what must hold between its sections."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from soma_vllm.config.baselines import Baselines
from soma_vllm.config.learning import Adaptation, Gate, Lora, Mining, Payback, Prefix, Prices
from soma_vllm.config.section import Positive, Section, Text
from soma_vllm.config.serving import (
    Access,
    Adapters,
    Encoder,
    Limits,
    Original,
    Retention,
    Server,
    Sessions,
    Storage,
    Surrogate,
    Training,
)
from soma_vllm.errors import ConfigError
from soma_vllm.types import Candidate


class Config(Section):
    """The whole configuration. The first six keys and `mining`, `lora`, `gate` are the reference's."""

    original_model: Text | None = None
    """Local path, embedded model's name or Hugging Face id. May be null when `original.url` is given."""
    surrogate_model: Text | None = None
    """Local path, embedded model's name or Hugging Face id. Required by soma-serve."""
    warm_window: Annotated[int, Field(ge=1, le=64)] = 4
    """W: turns the original answers before the session may move."""
    compressed_prefix_turns: Annotated[int, Field(ge=0)] = 2
    """K: last turns kept verbatim in a compressed prefix. 0: none."""
    max_new_tokens: Positive = 200
    """Longest answer generated for acceptance and audits, and the replay client's `max_tokens`."""
    acceptance_min_turns: Positive = 1
    """Latest warm turns that no adapter is trained on, to judge it on them. The plain surrogate, which learned
    from none, is judged on the whole warm start."""
    policy: Text = "soma"
    """Entry point of group `soma_vllm.policies`."""
    mining: Mining = Mining()
    lora: Lora = Lora()
    gate: Gate = Gate()
    prefix: Prefix = Prefix()
    adaptation: Adaptation = Adaptation()
    original: Original = Original()
    surrogate: Surrogate = Surrogate()
    training: Training = Training()
    encoder: Encoder = Encoder()
    server: Server = Server()
    access: Access = Access()
    limits: Limits = Limits()
    sessions: Sessions = Sessions()
    storage: Storage = Storage()
    retention: Retention = Retention()
    adapters: Adapters = Adapters()
    payback: Payback = Payback()
    prices: Prices = Prices()
    baselines: Baselines = Baselines()

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        problems = []
        if self.acceptance_min_turns >= self.warm_window:
            problems.append(
                f"acceptance_min_turns: {self.acceptance_min_turns} leaves nothing of warm_window: "
                f"{self.warm_window} to train on; expected less than warm_window"
            )
        if self.surrogate.max_cpu_loras < self.surrogate.max_loras:
            problems.append(
                f"surrogate.max_cpu_loras: {self.surrogate.max_cpu_loras} is below surrogate.max_loras: "
                f"{self.surrogate.max_loras}; expected at least as many"
            )
        if self.surrogate.overflow == "wait" and self.surrogate.queue_limit == 0:
            problems.append("surrogate.queue_limit: found 0 with overflow: wait; expected at least 1")
        if not self.adaptation.candidates:
            problems.append("adaptation.candidates: found an empty list; expected plain, adapter, or both")
        if Candidate.ORIGINAL in self.adaptation.candidates:
            problems.append("adaptation.candidates: 'original' is implied; expected plain, adapter, or both")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def original_name(self) -> str:
        """The name under which the original is served."""
        return self.original.name or served_name(self.original_model)

    @property
    def surrogate_name(self) -> str:
        """The name under which the surrogate is served."""
        return self.surrogate.name or served_name(self.surrogate_model)

    def for_serving(self, source: str = "config") -> Config:
        """This configuration, once it names the models a server needs.

        Raises:
            ConfigError: a model is missing.
        """
        problems = []
        hint = "; give one in the file or by --set, or take configs/cpu_demo.yaml, which names a pair"
        if self.original_model is None and self.original.url is None:
            problems.append(f"original_model: found null; expected a model, or original.url{hint}")
        if self.original.url is not None and self.original_model is None and self.original.name is None:
            problems.append("original.name: found null; expected the model's name at original.url")
        if self.surrogate_model is None:
            problems.append(f"surrogate_model: found null; expected a model{hint}")
        if self.gate.audit == "score" and self.original.url is not None and self.original.api != "vllm":
            problems.append(
                f"gate.audit: found 'score' with original.api: {self.original.api!r}; expected generate, or "
                "original.api: vllm where the endpoint at original.url is a vLLM server"
            )
        if self.original.draft_tokens and self.original.url is not None:
            problems.append(
                f"original.draft_tokens: found {self.original.draft_tokens} with original.url; expected 0: "
                "only a child of ours can be given the surrogate as its draft model"
            )
        if problems:
            raise ConfigError(source, problems)
        return self


def served_name(model: str | None) -> str:
    """The name a model is served under: its last path component."""
    assert model is not None, "for_serving has checked"
    return model.rstrip("/").rsplit("/", 1)[-1].lower()
