"""What runs, and on what: engines, trainers, the server, and what is kept of sessions and adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from soma_vllm.config.section import Positive, Seconds, Section, Text
from soma_vllm.private import secret


class Engine(Section):
    """What both engines have in common. Devices are named here and nowhere else."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the engine computes; what else it needs there is under `gpu`, `cpu_cores` and the memory keys."""
    gpu: Text | None = None
    """CUDA_VISIBLE_DEVICES of this engine, e.g. "0" or "0,1"; null leaves the environment as it is."""
    cpu_cores: Text | None = None
    """Cores of this engine's threads on a CPU, e.g. "0" or "0-3"; null lets vLLM choose."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the weights. auto: the fastest that this machine has and that fits (`engines/arithmetic.py`)."""
    max_model_len: Positive = 4096
    """Longest prompt and answer together, tokens."""
    max_num_seqs: Positive = 16
    """Most requests that one engine step works on; further ones wait inside vLLM."""
    kv_cache_gib: Annotated[float, Field(gt=0)] = 1.0
    """Memory of the KV cache on a CPU, GiB."""
    block_size: Literal[16, 32, 64, 128] = 32
    """Tokens in a block of the KV cache on a CPU. Only whole blocks are found again in the next turn."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.45
    """Share of the GPU that this engine may take."""
    enforce_eager: bool | None = None
    """Whether vLLM runs without CUDA graphs; null: on a CPU only. On an H100, graphs made a step with adapters
    19 times as fast."""
    tool_parser: Text = "auto"
    """What reads calls of tools out of the model's text: a name of vLLM's (hermes, llama3_json, mistral, …);
    none: nothing; auto: by the model's chat template and architecture (`engines/vllm/parser_choice.py`)."""
    reasoning_parser: Text = "auto"
    """What parts thoughts from answers: a name of vLLM's (qwen3, deepseek_r1, …), none or auto, as above."""
    extra_args: tuple[Text, ...] = ()
    """Further arguments of `vllm serve`, verbatim; they overrule all others."""


class Original(Engine):
    """The large model: a child vLLM server, or any OpenAI-compatible endpoint."""

    url: Text | None = None
    """Base URL of an external endpoint (".../v1"); null starts a vLLM server as a child process."""
    api: Literal["openai", "vllm"] = "openai"
    """What the endpoint at `url` speaks: vllm allows vLLM's own extensions (token ids, scoring, priorities), as
    our own child always does."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 20
    """Log-probabilities per token that a vLLM original is asked for in turns that may be learned from; 0: none
    are."""
    api_key_env: Text | None = None
    """Name of the environment variable that holds the external endpoint's key."""
    draft_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens that the surrogate's weights draft for the child, which verifies them in one step: speculative
    decoding (policy `speculative`). 0: none. Both models must have one vocabulary."""
    name: Text | None = None
    """Model name in requests; null takes `original_model`'s own."""
    when_down: Literal["refuse", "surrogate"] = "refuse"
    """While the original is down, fails before its first token, or has no place for a request: answer 503, or
    let the plain surrogate answer."""
    connect_timeout_s: Seconds = 5.0
    """Longest wait for a connection to the original, seconds; after it the original is unavailable to that
    request."""
    first_token_timeout_s: Seconds = 600.0
    """Longest wait for the first event of a stream, seconds."""
    idle_timeout_s: Seconds = 300.0
    """Longest wait between two events of a stream, seconds; after it the stream ends with an error."""
    answer_timeout_s: Seconds = 1800.0
    """Longest wait for an answer that is not streamed, seconds."""
    max_in_flight: Positive = 1024
    """Most requests that are at the original at once."""
    queue_limit: Annotated[int, Field(ge=0)] = 1024
    """Most requests that wait for a place among those; further ones are refused at once."""
    queue_wait_s: Seconds = 10.0
    """Longest wait for such a place, seconds."""
    retries: Annotated[int, Field(ge=0)] = 1
    """How often a request is sent again whose connection failed before a byte of an answer came."""
    breaker_failures: Annotated[int, Field(ge=0)] = 5
    """Failures in a row (5xx, broken connections, timeouts) after which the original counts as down; 0: it
    never does."""
    breaker_open_s: Seconds = 10.0
    """For how long it then gets no request, seconds; after that one request tries it."""
    start_timeout_s: Seconds = 600.0
    """Longest start of the child server, seconds; after it soma-serve gives up, and a restarted child is
    ended."""


class Surrogate(Engine):
    """The small model: a vLLM engine with multi-LoRA inside soma-serve."""

    name: Text | None = None
    """Model name in requests; null takes `surrogate_model`'s own."""
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
    """Longest wait in that queue, seconds."""
    tools: bool | Literal["checked"] = "checked"
    """Whether it may answer requests that define tools. checked: in sessions in which it called the same
    functions with the same arguments as the original wherever that might have called one in the warm start
    (`gate.min_tool_turns`). true: wherever it answers. false: never."""


class Training(Section):
    """The Ray actors that train."""

    workers: Positive = 1
    """Trainers, each a Ray actor with a copy of the surrogate: so many trainings run at the same time."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where trainers compute."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 1.0
    """Asked of Ray when device is cuda; a fraction shares a GPU."""
    threads: Positive = 1
    """Torch threads of a worker on a CPU."""
    nice: Annotated[int, Field(ge=0, le=19)] = 10
    """Scheduling niceness of a worker, so that training yields to the engines."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto: bfloat16 on a GPU or where the processor has bf16 products, else float32 where memory suffices."""
    ray_address: Text | None = None
    """An existing Ray cluster; null starts a private one."""
    seed: int = 0
    """Seed of mining and training, and of the choice of the turns that are audited."""


class Encoder(Section):
    """The gate's sentence encoder: fixed, never the adapted surrogate."""

    model: Text = "all-minilm-l6-v2"
    """Local path, embedded model's name or Hugging Face id of a sentence encoder."""
    threads: Positive = 1
    """Torch threads of the encoder, which runs on the CPU."""


class Cors(Section):
    """Which web pages may ask this server from a browser. `X-SOMA-*` headers are shown to their scripts."""

    allow_origins: tuple[str, ...] = ("http://localhost:*", "http://127.0.0.1:*")
    """Origins of the pages, e.g. https://chat.example.org; `*` stands for a part of one, and alone for all of
    them. Empty: none. Anyone's page asks with the keys that it has; with `access.mode: open` it needs none."""
    max_age_s: Annotated[int, Field(ge=0)] = 600
    """Seconds for which a browser remembers that it may ask."""


class Server(Section):
    """Where soma-serve listens."""

    host: Text = "127.0.0.1"
    """Address that soma-serve listens on; 0.0.0.0 for every interface."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """TCP port."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Of soma_vllm's own lines; vLLM's and uvicorn's begin at warning. No level logs conversation text."""
    log_format: Literal["text", "json"] = "text"
    """Of the lines on stderr and in the run folder's surrogate.log. json: one object a line."""
    log_max_bytes: Annotated[int, Field(ge=0)] = 64 * 1024**2
    """Size from which surrogate.log is continued in a new file; 0: never."""
    log_backups: Positive = 5
    """Older files that are kept: surrogate.log.1 is the newest."""
    drain_s: Seconds = 30.0
    """Longest wait for the requests under way when the server is told to end (SIGTERM, Ctrl-C), seconds; new
    ones are refused with 503. A second signal ends it at once."""
    run_dir: Text | None = None
    """Logs and sockets of a running server; null takes a fresh folder under $SOMA_HOME/run."""
    cors: Cors = Cors()
    keep_alive_s: Annotated[float, Field(ge=0)] = 15.0
    """Seconds of silence after which a stream sends a comment, so that no proxy cuts it, and after which one
    that waits for its first token begins: with status 200 and the headers of the turn as it was routed. An
    error that comes later is an event of the stream. 0: never."""
    replies_mib: Positive = 256
    """What the answers under way may hold in memory until their turns are recorded, MiB of text; one that finds
    no room goes to its client all the same, and its turn is not recorded whole."""
    extra_routes: bool = False
    """true: vLLM's further routes (`/inference/…`, …) are served too. They ask the surrogate,
    without sessions, dispatch or counting of tokens. false: they answer 404."""

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


class Storage(Section):
    """Where sessions are stored."""

    url: Text = "sqlite+aiosqlite:///{soma_home}/sessions.db"
    """SQLAlchemy URL; {soma_home} and {run_dir} are filled in. One with a password belongs in the environment
    (`url_env`)."""
    url_env: Text = "SOMA_STORAGE_URL"
    """Name of the environment variable that holds the URL where `url` is not given."""
    queue_mib: Positive = 256
    """Conversation text, MiB, that may wait in memory for a database that is away or slow; beyond it the
    original answers, and turns are not recorded."""

    @property
    def location(self) -> str:
        """The URL that holds: the one that is given, the environment's, or the default."""
        given = "url" in self.model_fields_set
        return self.url if given else secret(self.url_env) or self.url


class Sessions(Section):
    """By what requests are recognised as one dialogue."""

    headers: tuple[str, ...] = (
        "X-Session-ID",
        "X-OpenWebUI-Chat-Id",
        "X-LiteLLM-Session-Id",
        "X-Conversation-Id",
        "session_id",
    )
    """Request headers that may name the dialogue; the first that is there does."""
    body_fields: tuple[str, ...] = ("metadata.session_id", "litellm_session_id", "session_id")
    """Fields of the request's body that may name it where no header does; a dot leads into an object. Add
    `prompt_cache_key` only where clients send another one with each dialogue."""
    history: Literal["client", "server"] = "client"
    """Whose history is answered when a request names its dialogue and holds no earlier answer. client: what the
    request holds. server: the recorded turns are put before it, where their text is kept."""
    max_messages: Positive = 10_000
    """Most messages of a request."""
    memory_mib: Positive = 256
    """Memory that sessions may take, MiB, nearly. Beyond it those that have been idle longest are packed, which
    costs their next requests about a millisecond, then left to the database alone."""


class Retention(Section):
    """How long conversation text, and what was learned from it, is kept."""

    text: Literal["until_adapted", "session", "never"] = "session"
    """What the store keeps of the conversation itself. session: all, as long as the session. until_adapted:
    while the session may still be learned from. never: nothing; it is in memory alone. Under the last two
    the text is erased when the session is switched or refused, and a refused session is not judged again."""
    text_ttl_s: Seconds | None = None
    """Age at which stored text is erased, seconds, whatever its session does; null: no such limit."""
    session_ttl_s: Seconds | None = 30 * 86400.0
    """Seconds without use after which a session is removed, with its text and adapter; null: never."""


class Access(Section):
    """Which API keys are served. `soma keys` issues them."""

    mode: Literal["open", "keys"] = "open"
    """open: any bearer token is a tenant of its own. keys: only keys issued with `soma keys add` are served."""
    admin_key_env: Text = "SOMA_ADMIN_KEY"
    """Name of the environment variable that holds the admin key; while it is unset, no request is an
    administrator's."""
    max_body_mib: Positive = 16
    """Largest request body, MiB."""
    cache_s: Annotated[float, Field(ge=0)] = 5.0
    """Seconds for which a key that was looked up in the database is trusted: a revoked key is refused after at
    most that. While the database is away, a key that was seen earlier stays valid."""


ANY_POLICY = "*"


class Limits(Section):
    """What one API key may use; null: no limit. A key's own values, from `soma keys add`, come first."""

    requests_per_minute: Positive | None = None
    """In any 60 seconds."""
    tokens_per_minute: Positive | None = None
    """Prompt and completion, in any 60 seconds. Counted after each reply: the reply that passes the limit is
    still given, the next request is refused."""
    live_sessions: Positive | None = None
    """Sessions held at the same time."""
    adapters: Annotated[int, Field(ge=0)] | None = None
    """Adapters held at the same time; the original serves the sessions beyond. 0: none is ever trained."""
    policies: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Policies that a request may choose although they train, or start a package that may ask a third party
    (history_ft, llmlingua2, routellm, …); `*`: all. The configured policy, and those that do neither, need no
    leave, and the admin key none at all."""


class Adapters(Section):
    """Where adapters are stored, and how many of this server's record. Beyond a budget the least recently used
    is evicted and its session goes back to the original; pinned ones (`soma adapters pin`) stay. null: no
    limit."""

    root: Text = "adapters_store"
    """Directory, relative to the working directory, or a URL that fsspec knows (s3://…, gs://…; its package
    has to be installed); {soma_home} and {run_dir} are filled in."""
    cache: Text = "{soma_home}/adapters_cache"
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
