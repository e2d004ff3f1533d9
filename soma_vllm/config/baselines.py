"""The methods to compare with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from soma_vllm.config.section import Positive, Ratio, Seconds, Section, Text


class Llmlingua2(Section):
    """Policy `llmlingua2`: the original, under a history compressed by LLMLingua-2."""

    model: Text | None = None
    """The compressor, such as microsoft/llmlingua-2-xlm-roberta-large-meetingbank, or its folder."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of each earlier message that is kept."""
    force_tokens: tuple[Text, ...] = ("\n",)
    """Tokens that are always kept."""


class Routellm(Section):
    """Policy `routellm`: each query goes to the original or the surrogate by RouteLLM's estimate."""

    router: Literal["bert", "mf", "random"] = "bert"
    """mf embeds every query at OpenAI (OPENAI_API_KEY); random is for comparison."""
    checkpoint: Text | None = None
    """The router's weights, such as routellm/bert_gpt4_augmented, or their folder; random has none."""
    threshold: Ratio | None = None
    """The original answers at this estimate of its win rate or above; `soma calibrate-router` finds a value."""


class Baselines(Section):
    """Methods to compare with; each runs in a process of its own, from packages that `make baselines`
    installs."""

    packages: Text = "{soma_home}/baselines"
    """Directory of those packages; {soma_home} is filled in. Packages of this environment are found as well."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the methods' own models compute."""
    threads: Positive = 1
    """Torch threads of each process on a CPU."""
    load_timeout_s: Seconds = 300.0
    """Longest start of a process, seconds, in which it loads its model; after it the policy is not
    available."""
    timeout_s: Seconds = 60.0
    """Longest wait for one compression or estimate, seconds; after it the original answers, under the full
    history."""
    llmlingua2: Llmlingua2 = Llmlingua2()
    routellm: Routellm = Routellm()
