"""Baseline: the original answers every turn, faster, with the surrogate as its draft model.

Speculative decoding happens inside the original's vLLM server (`original.draft_tokens`), so it holds for every
request that the original answers; this policy sends all of them there, and refuses to be taken for speculative
where nothing drafts.
"""

from __future__ import annotations

from soma_vllm.config import Config
from soma_vllm.errors import ConfigError
from soma_vllm.scheduler.policies.fixed import OriginalPolicy


class SpeculativePolicy(OriginalPolicy):
    """The original, with a draft model."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError: nothing drafts for the original."""
        drafts = config.original.draft_tokens
        if drafts == 0:
            problem = "found 0; expected the number of tokens that the surrogate drafts, such as 4"
            raise ConfigError("config", [f"original.draft_tokens: {problem}"])
        super().__init__(config)
        self.reason = f"policy speculative, {drafts} tokens drafted"
