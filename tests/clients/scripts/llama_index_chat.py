"""LlamaIndex: its chat engine on OpenAILike, streamed."""

from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.llms.openai_like import OpenAILike
from play import BASE_URL, KEY, MAX_TOKENS, play

llm = OpenAILike(
    model="soma",
    api_base=BASE_URL,
    api_key=KEY,
    is_chat_model=True,
    context_window=2048,
    max_tokens=MAX_TOKENS,
    temperature=0,
    max_retries=0,
)
engine = SimpleChatEngine.from_defaults(llm=llm, system_prompt="You are terse.")

play(lambda question: {"text": "".join(engine.stream_chat(question).response_gen)})
