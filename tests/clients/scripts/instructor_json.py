"""instructor: an object for an answer, of one form and of another by turns."""

from typing import Literal

import instructor
from openai import OpenAI
from play import BASE_URL, KEY, play
from pydantic import BaseModel

client = instructor.from_openai(
    OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0), mode=instructor.Mode.JSON_SCHEMA
)
messages = []


class Weather(BaseModel):
    """What the sky is like."""

    sky: Literal["clear", "cloudy"]
    windy: bool


class Colour(BaseModel):
    """What a wall is painted in."""

    colour: Literal["red", "blue"]


def say(question):
    messages.append({"role": "user", "content": question})
    found, completion = client.chat.completions.create_with_completion(
        model="soma",
        messages=messages,
        response_model=(Weather, Colour)[len(messages) // 2 % 2],
        max_tokens=64,
        temperature=0,
        max_retries=0,
    )
    messages.append({"role": "assistant", "content": completion.choices[0].message.content})
    return {"text": found.model_dump_json()}


play(say)
