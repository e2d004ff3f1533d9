"""openai-agents: an agent on chat completions, with instructions made for every run and a session in SQLite."""

from datetime import datetime

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, SQLiteSession, set_tracing_disabled
from openai import AsyncOpenAI
from play import BASE_URL, KEY, MAX_TOKENS, play

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
agent = Agent(
    name="guide",
    instructions=lambda context, agent: f"You are terse. It is {datetime.now():%H:%M:%S.%f}.",
    model=OpenAIChatCompletionsModel("soma", client),
    model_settings=ModelSettings(max_tokens=MAX_TOKENS, temperature=0),
)
session = SQLiteSession("guide")

play(lambda question: {"text": Runner.run_sync(agent, question, session=session).final_output})
