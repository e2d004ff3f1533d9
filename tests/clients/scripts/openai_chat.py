"""OpenAI's client, synchronous: chat completions, every other one streamed by its helper."""

from openai import OpenAI
from play import BASE_URL, KEY, MAX_TOKENS, play, seen

client = OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
messages = []


def say(question):
    messages.append({"role": "user", "content": question})
    request = {"model": "soma", "messages": messages, "max_completion_tokens": MAX_TOKENS, "temperature": 0}
    if len(messages) % 4 == 1:
        with client.chat.completions.stream(**request) as stream:
            for _ in stream:
                pass
            message = stream.current_completion_snapshot.choices[0].message  # whole or cut at its length
        shown = {}
    else:
        raw = client.chat.completions.with_raw_response.create(**request)
        message, shown = raw.parse().choices[0].message, seen(raw.headers)
    messages.append(message)
    return {"text": message.content, **shown}


play(say)
