"""OpenAI's client, asynchronous: three dialogues at once, streamed."""

import asyncio

from openai import AsyncOpenAI
from play import BASE_URL, KEY, MAX_TOKENS, play

client = AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
dialogues = {name: [] for name in ("Ana", "Ben", "Cleo")}


async def ask(name, question):
    messages = dialogues[name]
    messages.append({"role": "user", "content": f"{name} asks: {question}"})
    stream = await client.chat.completions.create(
        model="soma", messages=messages, max_tokens=MAX_TOKENS, temperature=0, stream=True
    )
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
    messages.append({"role": "assistant", "content": text})
    return text


async def ask_all(question):
    return await asyncio.gather(*(ask(name, question) for name in dialogues))


with asyncio.Runner() as runner:
    play(lambda question: {"text": "\n".join(runner.run(ask_all(question)))})
