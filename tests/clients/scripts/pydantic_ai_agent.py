"""pydantic-ai: an agent whose instructions are made anew for every run, with the time of day."""

from datetime import datetime

from play import BASE_URL, KEY, MAX_TOKENS, play
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel("soma", provider=OpenAIProvider(base_url=BASE_URL, api_key=KEY))
agent = Agent(model, model_settings={"max_tokens": MAX_TOKENS, "temperature": 0})
history = []


@agent.instructions
def clock() -> str:
    return f"You are terse. It is {datetime.now():%H:%M:%S.%f}."


def say(question):
    global history
    result = agent.run_sync(question, message_history=history)
    history = result.all_messages()
    return {"text": result.output}


play(say)
