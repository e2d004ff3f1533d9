"""The configuration: one strict model, read from YAML, with every mistake reported at once.

Guarantees: unknown keys are refused; values are never converted silently between types; a configuration
written for the reference implementation of SOMA loads unchanged (its keys keep their names and places); no
key exists that nothing reads. A threshold lives here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from soma_vllm.errors import ConfigError
from soma_vllm.types import Candidate

Positive = Annotated[int, Field(gt=0)]
Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Seconds = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """Base of every section: frozen, closed to unknown keys, strict about types (an int passes for a float)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Mining(Section):
    """Stage 1, soft-prompt mining on the surrogate (Eqs. 2 and 3)."""

    enabled: bool | Literal["auto"] = "auto"
    """True mines every session; False trains on the bare warm start, with equal weights. auto mines only where
    it was measured to help later turns (docs/LOG.md)."""
    hardness: Literal["divergence", "reference"] = "divergence"
    """How a turn's hardness r_t is read off; "reference" is the published code's inverted form, for studies."""
    soft_len: Annotated[int, Field(ge=1, le=256)] = 16
    """L, virtual tokens of the soft prompt."""
    n_candidates: Positive = 3
    """M, soft prompts mined from different random starts; the one of lowest objective is kept."""
    iters: Positive = 30
    lr: Annotated[float, Field(gt=0)] = 1.0e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1.0e-2
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    neighborhood_k: Positive = 32
    """k of Def. 3.1."""
    teacher_topm: Positive = 100
    """m, tokens of the surrogate's distribution that enter the expected embedding."""
    temperature: Annotated[float, Field(gt=0)] = 0.7
    """tau of Def. 3.1."""
    lambda_exp: Annotated[float, Field(ge=0)] = 1.0
    beta_anti_degen: Annotated[float, Field(ge=0)] = 0.05
    lambda_P: Annotated[float, Field(ge=0)] = 1.0e-4
    init_std: Annotated[float, Field(gt=0)] = 0.02
    scale: Annotated[float, Field(gt=0)] = 0.25
    max_prompt_tokens: Positive = 768
    """A longer prompt keeps its end."""
    max_teacher_tokens: Positive = 96
    """A longer answer keeps its beginning."""


class Lora(Section):
    """Stage 2, localized LoRA fine-tuning (Eq. 4)."""

    rank: Annotated[int, Field(ge=1, le=512)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    objective: Literal["nll", "kd"] = "kd"
    """kd: towards the original's own distribution, where it is known in the surrogate's vocabulary; towards the
    answer's words, as with nll, elsewhere."""
    top_layers: Positive | None = None
    """LoRA in this many upper layers only; what lies below them is computed once per session. null: in all."""
    checkpoints: tuple[Positive, ...] = ()
    """Step counts up to `steps` at which the adapter is judged on the held-out turns; the best one is kept, and
    training ends when they get worse. Empty: the last step alone."""
    init_from: str | None = None
    """Directory of an adapter of the same shape to start from (`soma distill`); null starts from nothing."""
    steps: Positive = 60
    batch_size: Positive | None = None
    """Turns per step; null takes all of them, which costs little more where they share their history."""
    lr: Annotated[float, Field(gt=0)] = 2.0e-4
    weight_decay: Annotated[float, Field(ge=0)] = 1.0e-2
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    max_seq_length: Positive = 1024
    early_stop_patience: Positive = 20
    early_stop_min_delta: Annotated[float, Field(ge=0)] = 1.0e-3

    @model_validator(mode="after")
    def _checkpoints_are_steps(self) -> Lora:
        if (
            list(self.checkpoints) != sorted(set(self.checkpoints))
            or max(self.checkpoints, default=0) > self.steps
        ):
            raise ValueError(
                f"lora.checkpoints: found {list(self.checkpoints)}; expected increasing numbers of at most "
                f"lora.steps: {self.steps}"
            )
        return self


class Gate(Section):
    """Stage 3, acceptance, locality and drift (Cor. 4.3). Gaps lie in [0, 2]."""

    accept_threshold: Annotated[float, Field(ge=0, le=2)] = 0.10
    """eps: the mean gap over held-out turns, plus `accept_margin`, may be at most this."""
    accept_margin: Annotated[float, Field(ge=0, le=2)] = 0.0
    min_agreement: Ratio = 0.0
    """Least share of held-out answer tokens that are the candidate's own first choice. 0: the plain surrogate
    is judged by its gaps alone and does not read the answers, which on a CPU takes some seconds."""
    min_gain: Ratio = 0.1
    """Share by which an adapter's held-out NLL must be less than the plain surrogate's."""
    locality_threshold: Annotated[float, Field(ge=0, le=2)] = 0.35
    """Largest cosine distance of a query to the warm start's centroid that the surrogate may answer."""
    drift_window: Positive = 4
    """Audits in the moving mean."""
    drift_threshold: Annotated[float, Field(ge=0, le=2)] = 0.30
    consecutive_to_rollback: Positive = 2
    """m_cons: breaches in a row that roll the session back."""
    encoder_max_tokens: Positive = 256
    readmit_factor: Annotated[float, Field(gt=0, le=1)] = 0.8
    """`accept_threshold` is multiplied by this for every rollback and refusal that the session has had:
    hysteresis."""
    audit: Literal["generate", "score"] = "generate"
    """How the original audits a turn of the surrogate's. generate: it answers too, and the gap is taken.
    score: it only reads the surrogate's answer, one prefill, and says how surprising it is."""
    audit_rate: Ratio = 0.25
    """Share of the surrogate's turns that the original audits, in the background."""
    audits_per_minute: Annotated[float, Field(gt=0)] = 30.0
    """Most audits of the original over all sessions, on average; after a pause a minute's worth at once."""
    audit_yields: bool = True
    """Audits run only while no user waits for the original, and give way when one comes."""
    audit_wait_s: Seconds = 60.0
    """An audit that has not had its turn within this time, or whose turn takes longer, is dropped."""
    surprise_threshold: Annotated[float, Field(gt=0)] = 2.0
    """Mean NLL of the surrogate's answers under the original, nats per token, that is drift (audit: score)."""


class Prefix(Section):
    """What the surrogate sees of a long history."""

    mode: Literal["full", "anchored", "sliding"] = "full"
    """full: everything. sliding: a summary and the last turns, as in the paper. anchored: the system message
    and turn 1 verbatim, a summary of the middle, the last turns; its window moves in steps."""
    anchor: Literal["first", "facts"] = "facts"
    """What the anchor keeps verbatim: turn 1 alone, or also later turns that bring facts (a passage, a table,
    code, numbers)."""
    anchor_words: Positive = 400
    """Most words of later turns in the anchor."""
    anchor_role: Literal["user", "system"] = "user"
    """Where the anchor stands. user: as turns, with their answers. system: in the system message, without them,
    which costs fewer tokens at the same agreement; needs a surrogate whose chat template knows that role."""
    summary_words: Annotated[int, Field(ge=0)] = 12
    """Words kept of each summarised query; 0 leaves those turns out without a word."""
    window_step: Positive = 2
    """Turns by which the anchored window moves at once, so that the prompt's head stays cacheable between."""


class Adaptation(Section):
    """When a session is adapted, and who may serve it then."""

    candidates: tuple[Candidate, ...] = (Candidate.PLAIN, Candidate.ADAPTER)
    """Compared on the same held-out turns; the cheapest that passes serves. The original is always the last."""
    allow_force_header: bool = False
    """Let a request's `X-SOMA-Force: plain|adapter` overrule the gate's verdict for its session (studies)."""
    cool_down_turns: Positive = 3
    """New turns answered by the original after a rollback or a refusal before the session is adapted again;
    twice as many after every further one."""
    max_trainings: Positive = 3
    """Trainings a session may have in its life."""
    train_timeout_s: Seconds = 900.0
    payback: Literal["auto", "always", "never"] = "auto"
    """Whether an adapter is trained where the plain surrogate does not pass. auto: where the turns that are
    still expected save more than it costs. always and never: for studies. The plain surrogate is judged in any
    case."""


class Payback(Section):
    """What is expected of sessions before this server has seen enough of its own, and when one counts as
    over."""

    remaining_turns: Annotated[float, Field(gt=0)] = 8.0
    """Further turns expected after any turn of a session."""
    weight: Annotated[float, Field(gt=0)] = 4.0
    """Observed sessions that each expectation here weighs as much as."""
    over_after_s: Seconds = 1800.0
    """A session that has been silent for this long has ended."""
    admitted: Ratio = 0.5
    """Share of trained adapters that the gate lets serve."""
    original_turn_s: Seconds = 5.0
    """Time that the original is busy per turn, turns beside each other sharing it; also per audit that
    generates."""
    surrogate_turn_s: Seconds = 1.0
    training_s: Seconds = 10.0
    """Time of a trainer per adapter: mining, fine-tuning and scoring. Where this says that adapters never pay,
    none is trained, and nothing corrects it: rather too low than too high."""


class Prices(Section):
    """What things cost, in any one currency: only ratios matter."""

    original_second: Annotated[float, Field(ge=0)] = 1.0
    """A second in which the original is busy, with however many turns."""
    surrogate_second: Annotated[float, Field(ge=0)] = 1.0
    trainer_second: Annotated[float, Field(ge=0)] = 1.0
    original_prompt_thousand: Annotated[float, Field(ge=0)] | None = None
    """A thousand prompt tokens of an original that is paid by the token; null: it is paid by the second."""
    original_completion_thousand: Annotated[float, Field(ge=0)] | None = None
    """A thousand tokens of its answers."""


class Llmlingua2(Section):
    """Policy `llmlingua2`: the original, under a history compressed by LLMLingua-2."""

    model: str | None = None
    """The compressor, such as microsoft/llmlingua-2-xlm-roberta-large-meetingbank, or its folder."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of each earlier message that is kept."""
    force_tokens: tuple[str, ...] = ("\n",)
    """Tokens that are always kept."""


class Routellm(Section):
    """Policy `routellm`: each query goes to the original or the surrogate by RouteLLM's estimate."""

    router: Literal["bert", "mf", "random"] = "bert"
    """mf embeds every query at OpenAI (OPENAI_API_KEY); random is for comparison."""
    checkpoint: str | None = None
    """The router's weights, such as routellm/bert_gpt4_augmented, or their folder; random has none."""
    threshold: Ratio | None = None
    """The original answers at this estimate of its win rate or above; `soma calibrate-router` finds a value."""


class Baselines(Section):
    """Methods to compare with; each runs in a process of its own, from packages that `make baselines`
    installs."""

    packages: str = "{soma_home}/baselines"
    """Directory of those packages; {soma_home} is filled in. Packages of this environment are found as well."""
    device: Literal["cpu", "cuda"] = "cpu"
    threads: Positive = 1
    load_timeout_s: Seconds = 300.0
    timeout_s: Seconds = 60.0
    """Longest wait for one compression or estimate; the original answers then, under the full history."""
    llmlingua2: Llmlingua2 = Llmlingua2()
    routellm: Routellm = Routellm()


class Engine(Section):
    """What both engines have in common. Devices are named here and nowhere else."""

    device: Literal["cpu", "cuda"] = "cpu"
    gpu: str | None = None
    """CUDA_VISIBLE_DEVICES of this engine, e.g. "0" or "0,1"; null leaves the environment as it is."""
    cpu_cores: str | None = None
    """Cores of this engine's threads on a CPU, e.g. "0" or "0-3"; null lets vLLM choose."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: Positive = 4096
    max_num_seqs: Positive = 16
    kv_cache_gib: Annotated[float, Field(gt=0)] = 1.0
    """Memory of the KV cache on a CPU."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.45
    """Share of the GPU that this engine may take."""
    enforce_eager: bool = True
    extra_args: tuple[str, ...] = ()
    """Further arguments of `vllm serve`, verbatim."""


class Original(Engine):
    """The large model: a child vLLM server, or any OpenAI-compatible endpoint."""

    url: str | None = None
    """Base URL of an external endpoint (".../v1"); null starts a vLLM server as a child process."""
    api: Literal["openai", "vllm"] = "openai"
    """What the endpoint at `url` speaks: vllm allows vLLM's own extensions (token ids, scoring, priorities), as
    our own child always does."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 20
    """Log-probabilities per token that a vLLM original is asked for during the warm start; 0 asks for none."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the external endpoint's key."""
    draft_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens that the surrogate's weights draft for the child, which verifies them in one step: speculative
    decoding (policy `speculative`). 0: none. Both models must have one vocabulary."""
    name: str | None = None
    """Model name in requests; null takes `original_model`'s own."""
    when_down: Literal["refuse", "surrogate"] = "refuse"
    """While the original is down: answer 503, or let the plain surrogate answer."""
    connect_timeout_s: Seconds = 5.0
    start_timeout_s: Seconds = 600.0


class Surrogate(Engine):
    """The small model: a vLLM engine with multi-LoRA inside soma-serve."""

    name: str | None = None
    max_loras: Positive = 4
    """Adapters that one engine step can mix: slots. The background uses one of them at times."""
    max_cpu_loras: Positive = 64
    """Adapters the engine keeps in memory; those of further sessions are read again when they return."""
    overflow: Literal["original", "wait"] = "original"
    """Who answers when `max_loras` other adapters are answering: the original at once, or the surrogate after a
    wait in a fair queue. After the wait, or where the queue is full, the original."""
    queue_limit: Annotated[int, Field(ge=0)] = 32
    """Most requests in that queue."""
    queue_wait_s: Seconds = 10.0
    """Longest wait in it."""
    tools: bool = False
    """Whether it may answer requests that define tools. Give it `--enable-auto-tool-choice` and a
    `--tool-call-parser` by `extra_args` then."""


class Training(Section):
    """The Ray actors that train."""

    workers: Positive = 1
    device: Literal["cpu", "cuda"] = "cpu"
    gpus_per_worker: Annotated[float, Field(ge=0)] = 1.0
    """Asked of Ray when device is cuda; a fraction shares a GPU."""
    threads: Positive = 1
    """Torch threads of a worker on a CPU."""
    nice: Annotated[int, Field(ge=0, le=19)] = 10
    """Scheduling niceness of a worker, so that training yields to the engines."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    ray_address: str | None = None
    """An existing Ray cluster; null starts a private one."""
    seed: int = 0


class Encoder(Section):
    """The gate's sentence encoder: fixed, never the adapted surrogate."""

    model: str = "all-minilm-l6-v2"
    threads: Positive = 1


class Server(Section):
    """Where soma-serve listens."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Of soma_vllm's own lines in the run folder's surrogate.log. No level writes what was said."""
    run_dir: str | None = None
    """Logs and sockets of a running server; null takes a fresh folder under $SOMA_HOME/run."""
    extra_routes: bool = False
    """true: vLLM's further routes (`/v1/messages`, `/inference/…`, …) are served too. They ask the surrogate,
    without sessions, dispatch or counting of tokens. false: they answer 404."""


class Storage(Section):
    """Where sessions live."""

    url: str = "sqlite+aiosqlite:///{soma_home}/sessions.db"
    """SQLAlchemy URL; {soma_home} and {run_dir} are filled in."""


class Retention(Section):
    """How long what was said, and what was learned from it, is kept."""

    text: Literal["until_adapted", "session", "never"] = "session"
    """What the store keeps of the conversation itself. session: all, as long as the session. until_adapted:
    while the session may still be learned from, which ends when it is switched or refused (and a refused one
    is then not judged again). never: nothing; memory holds it meanwhile."""
    text_ttl_s: Seconds | None = None
    """Stored text older than this is erased, whatever its session does; null: no limit of its own."""
    session_ttl_s: Seconds | None = 30 * 86400.0
    """A session unused for this long is removed with all it has; null: never."""


class Access(Section):
    """Who may ask. `soma keys` issues API keys."""

    mode: Literal["open", "keys"] = "open"
    """open: any bearer token is a tenant of its own. keys: only keys issued with `soma keys add` are served."""
    admin_key_env: str = "SOMA_ADMIN_KEY"
    """Name of the environment variable that holds the admin key; while it is unset nobody is an admin."""
    max_body_mib: Positive = 16
    """Largest request body."""
    cache_s: Annotated[float, Field(ge=0)] = 5.0
    """Seconds that a key looked up in the database is trusted: a revoked key is refused after at most that.
    While the database is away, a key seen earlier stays good."""


class Limits(Section):
    """How much one API key may ask; null: no limit. A key's own values, from `soma keys add`, come first."""

    requests_per_minute: Positive | None = None
    """In any 60 seconds."""
    tokens_per_minute: Positive | None = None
    """Prompt and completion, in any 60 seconds. Counted after each reply: the reply that passes the limit is
    still given, the next request is refused."""
    live_sessions: Positive | None = None
    """Sessions held at the same time."""
    adapters: Annotated[int, Field(ge=0)] | None = None
    """Adapters held at the same time; the original serves the sessions beyond. 0: none is ever trained."""


class Adapters(Section):
    """Where adapters live, and how many. Beyond a budget the least recently used is evicted and its session
    goes back to the original; pinned ones (`soma adapters pin`) stay. null: no limit."""

    root: str = "adapters_store"
    """Directory, relative to the working directory, or a URL that fsspec knows (s3://…, gs://…; its package
    has to be installed); {soma_home} and {run_dir} are filled in."""
    cache: str = "{soma_home}/adapters_cache"
    """Directory of this machine that holds what the engine reads, where root is a URL."""
    max_count: Positive | None = None
    """Adapters in all."""
    max_bytes: Positive | None = None
    """Bytes of adapters in all."""
    tenant_max_count: Positive | None = None
    """Adapters of one tenant. Unlike limits.adapters, which trains none beyond it, this one makes room."""
    tenant_max_bytes: Positive | None = None
    """Bytes of one tenant's adapters."""
    ttl_s: Seconds | None = None
    """Seconds without an append to its session after which an adapter is evicted."""


class Config(Section):
    """The whole configuration. The first six keys and `mining`, `lora`, `gate` are the reference's."""

    original_model: str | None = None
    """Local path, embedded model's name or Hugging Face id. May be null when `original.url` is given."""
    surrogate_model: str | None = None
    warm_window: Annotated[int, Field(ge=1, le=64)] = 4
    """W: turns the original answers before the session may move."""
    compressed_prefix_turns: Annotated[int, Field(ge=0)] = 2
    """K: last turns kept verbatim in a compressed prefix. 0: none."""
    max_new_tokens: Positive = 200
    """Longest answer generated for acceptance and audits, and the replay client's `max_tokens`."""
    acceptance_min_turns: Positive = 1
    """Latest warm turns that no adapter is trained on, to judge it on them. The plain surrogate, which learned
    from none, is judged on the whole warm start."""
    policy: str = "soma"
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

    def for_serving(self, source: str = "config") -> Config:
        """This configuration, once it names the models a server needs.

        Raises:
            ConfigError: a model is missing.
        """
        problems = []
        if self.original_model is None and self.original.url is None:
            problems.append("original_model: found null; expected a model, or original.url")
        if self.original.url is not None and self.original_model is None and self.original.name is None:
            problems.append("original.name: found null; expected the model's name at original.url")
        if self.surrogate_model is None:
            problems.append("surrogate_model: found null; expected a model")
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


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `section.key=value` overrides (values are YAML).

    Raises:
        ConfigError: with every mistake, each naming its key, what was found and what was expected.
    """
    source = str(path)
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(source, [f"cannot be read: {error.strerror}"]) from error
    except yaml.YAMLError as error:
        raise ConfigError(source, [f"is not YAML: {' '.join(str(error).split())}"]) from error
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise ConfigError(source, [f"found a {type(document).__name__}; expected a mapping of keys"])
    problems = [problem for text in overrides if (problem := _override(document, text))]
    return parse_config(document, source, problems)


def parse_config(document: Mapping[str, Any], source: str, problems: Sequence[str] = ()) -> Config:
    """Validate a mapping; `problems` found earlier are reported together with its own.

    Raises:
        ConfigError: with every mistake.
    """
    try:
        # JSON mode keeps strictness and still reads lists as tuples and strings as enums.
        config = Config.model_validate_json(json.dumps(document))
    except ValidationError as error:
        found = [line for item in error.errors() for line in _describe(dict(item))]
        raise ConfigError(source, [*problems, *found]) from None
    except TypeError as error:
        raise ConfigError(
            source, [*problems, f"holds a value YAML can express but a config cannot: {error}"]
        ) from error
    if problems:
        raise ConfigError(source, problems)
    return config


def _override(document: dict[str, Any], text: str) -> str | None:
    """Set one `a.b=value` in place; a line that says what is wrong, if anything is."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        return f"--set {text}: expected key=value, such as gate.accept_threshold=0.1"
    *sections, leaf = key.strip().split(".")
    node = document
    for section in sections:
        child = node.get(section)
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            return f"--set {text}: {section} is a value, not a section"
        node = child
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        return f"--set {text}: the value is not YAML"
    return None


def _describe(error: Mapping[str, Any]) -> list[str]:
    """One pydantic error as lines for people."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return [f"{where}: unknown key; expected {_siblings(error['loc'])}"]
    if error["type"] == "value_error":
        return str(error["ctx"]["error"]).splitlines()
    expectation = error["msg"].replace("Input should be", "expected")
    return [f"{where}: found {error['input']!r}; {expectation}"]


def _siblings(location: Sequence[str | int]) -> str:
    """The keys that would have been right where an unknown one stands."""
    model: type[BaseModel] = Config
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return "one of " + ", ".join(model.model_fields)
