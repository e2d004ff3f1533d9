"""The configuration: one strict model, read from YAML, with every mistake reported at once.

Guarantees: unknown keys are refused; no value is converted silently between types, but for a number that stands
where text is meant; a configuration written for the reference implementation of SOMA loads unchanged (its keys
keep their names and places); no key exists that nothing reads. A threshold lives here and nowhere else.
"""

from soma_vllm.config.baselines import Baselines, Llmlingua2, Routellm
from soma_vllm.config.effect import exposed, without_effect
from soma_vllm.config.learning import Adaptation, Gate, Lora, Mining, Payback, Prefix, Prices
from soma_vllm.config.load import load_config, parse_config
from soma_vllm.config.root import Config
from soma_vllm.config.section import Positive, Ratio, Seconds, Section
from soma_vllm.config.serving import (
    ANY_POLICY,
    Access,
    Adapters,
    Cors,
    Encoder,
    Engine,
    Limits,
    Original,
    Retention,
    Server,
    Storage,
    Surrogate,
    Training,
)

__all__ = [
    "ANY_POLICY",
    "Access",
    "Adaptation",
    "Adapters",
    "Baselines",
    "Config",
    "Cors",
    "Encoder",
    "Engine",
    "Gate",
    "Limits",
    "Llmlingua2",
    "Lora",
    "Mining",
    "Original",
    "Payback",
    "Positive",
    "Prefix",
    "Prices",
    "Ratio",
    "Retention",
    "Routellm",
    "Seconds",
    "Section",
    "Server",
    "Storage",
    "Surrogate",
    "Training",
    "exposed",
    "load_config",
    "parse_config",
    "without_effect",
]
