"""LangChain: an agent with a checkpointer, whose system prompt is another one for every turn."""

from itertools import cycle

from langchain.agents import create_agent
from langchain.agents.middleware import dynamic_prompt
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from play import BASE_URL, KEY, MAX_TOKENS, play, seen

rooms = cycle(("the kitchen", "the garden, where it rains", "the cellar", "the attic among old letters"))
model = ChatOpenAI(
    model="soma",
    base_url=BASE_URL,
    api_key=KEY,
    max_tokens=MAX_TOKENS,
    temperature=0,
    max_retries=0,
    include_response_headers=True,
)


@dynamic_prompt
def whereabouts(request) -> str:
    return f"You are terse. The user is in {next(rooms)}."


agent = create_agent(model, tools=[], middleware=[whereabouts], checkpointer=InMemorySaver())
thread = {"configurable": {"thread_id": "1"}}


def say(question):
    reply = agent.invoke({"messages": [{"role": "user", "content": question}]}, thread)["messages"][-1]
    return {"text": reply.text, **seen(reply.response_metadata["headers"])}


play(say)
