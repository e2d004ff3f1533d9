"""Open WebUI's requests in their shapes (its own program is not run): one chat, named by its header.

Knowledge is put before the newest question alone. Titles, tags and follow-ups are asked for beside it: each is
one message that holds the chat as text, under the chat's own id.
"""

from openai import OpenAI
from play import BASE_URL, KEY, MAX_TOKENS, play, seen

TASKS = {
    "title": "Generate a concise, 3-5 word title with an emoji summarizing the chat history.",
    "tags": "Generate 1-3 broad tags categorizing the main themes of the chat history.",
    "follow-ups": "Suggest 3-5 relevant follow-up questions that the user might naturally ask next.",
}
client = OpenAI(
    base_url=BASE_URL,
    api_key=KEY,
    max_retries=0,
    default_headers={"X-OpenWebUI-Chat-Id": "8c1f9a52", "X-OpenWebUI-User-Id": "u1"},
)
history = []


def beside(task):
    """A side request about the last messages, as the application asks for it after an answer."""
    told = "\n".join(f"{message['role'].upper()}: {message['content']}" for message in history[-6:])
    content = f"### Task:\n{TASKS[task]}\n### Chat History:\n<chat_history>\n{told}\n</chat_history>"
    client.chat.completions.create(
        model="soma", messages=[{"role": "user", "content": content}], max_completion_tokens=MAX_TOKENS
    )


def say(question):
    number = len(history) // 2 + 1
    knowledge = (
        "### Task:\nRespond to the user query using the provided context.\n\n<context>\n"
        f'<source id="{number}">Ferry {number} sails at {number + 6}:30.</source>\n</context>\n\n'
    )
    raw = client.chat.completions.with_raw_response.create(
        model="soma",
        messages=[*history, {"role": "user", "content": f"{knowledge}{question}"}],
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in raw.parse() if chunk.choices)
    history.extend(({"role": "user", "content": question}, {"role": "assistant", "content": text}))
    for task in TASKS if number == 1 else ("follow-ups",):
        beside(task)
    return {"text": text, **seen(raw.headers)}


play(say)
