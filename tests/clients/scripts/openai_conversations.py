"""OpenAI's client: responses within a conversation that the server keeps."""

from openai import OpenAI
from play import BASE_URL, KEY, MAX_TOKENS, play, seen

client = OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
conversation = client.conversations.create()


def say(question):
    raw = client.responses.with_raw_response.create(
        model="soma",
        input=question,
        conversation=conversation.id,
        max_output_tokens=MAX_TOKENS,
        temperature=0,
    )
    return {"text": raw.parse().output_text, **seen(raw.headers)}


play(say)
