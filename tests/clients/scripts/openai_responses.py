"""OpenAI's client: responses that go on from the previous one, under instructions with the time of day."""

from datetime import datetime

from openai import OpenAI
from play import BASE_URL, KEY, MAX_TOKENS, play, seen

client = OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
previous = None


def say(question):
    global previous
    raw = client.responses.with_raw_response.create(
        model="soma",
        input=question,
        instructions=f"You are terse. It is {datetime.now():%H:%M:%S.%f}.",
        previous_response_id=previous,
        max_output_tokens=MAX_TOKENS,
        temperature=0,
    )
    response = raw.parse()
    previous = response.id
    return {"text": response.output_text, **seen(raw.headers)}


play(say)
