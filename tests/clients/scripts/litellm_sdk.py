"""LiteLLM as a library, every other answer streamed."""

import litellm
from play import BASE_URL, KEY, MAX_TOKENS, play, seen

messages = []


def say(question):
    messages.append({"role": "user", "content": question})
    stream = len(messages) % 4 == 1
    reply = litellm.completion(
        model="openai/soma",
        api_base=BASE_URL,
        api_key=KEY,
        messages=messages,
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=stream,
        num_retries=0,
    )
    if stream:
        reply, shown = litellm.stream_chunk_builder(list(reply)), {}
    else:
        shown = seen(reply._response_headers)
    messages.append(reply.choices[0].message.model_dump())
    return {"text": reply.choices[0].message.content, **shown}


play(say)
