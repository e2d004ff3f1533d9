"""Chat with a running soma-serve from a terminal: each line of input is a turn; end with Ctrl-D.

    python examples/chat.py     # talks to what `make serve` starts
    python examples/chat.py https://soma.example/v1 --api-key KEY --session my-dialogue

Nothing here is special to soma_vllm but the headers it prints: which engine answered, in which phase, and why.
"""

import argparse
import os
import sys

from openai import APIConnectionError, APIStatusError, OpenAI


def main() -> int:
    """Exit code: 1 where the server cannot be reached or refuses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url", nargs="?", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="soma", help="soma, or soma:<policy>")
    parser.add_argument("--session", help="the dialogue's name; without one the transcript identifies it")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", "anything"))
    options = parser.parse_args()
    headers = {"X-Session-ID": options.session} if options.session else {}
    messages: list[dict[str, str]] = []
    with OpenAI(base_url=options.base_url, api_key=options.api_key, default_headers=headers) as client:
        while query := ask():
            messages.append({"role": "user", "content": query})
            try:
                answer = say(client, options, messages)
            except (APIConnectionError, APIStatusError) as error:
                print(f"{options.base_url}: {error}", file=sys.stderr)
                return 1
            messages.append({"role": "assistant", "content": answer})
    return 0


def ask() -> str:
    """The next line that says something, or nothing at the end of the input."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    return next((text for line in sys.stdin if (text := line.strip())), "")


def say(client: OpenAI, options: argparse.Namespace, messages: list[dict[str, str]]) -> str:
    """Print the answer as it comes, then what the headers say of it."""
    raw = client.chat.completions.with_raw_response.create(
        model=options.model, messages=messages, max_tokens=options.max_tokens, stream=True
    )
    pieces = []
    for chunk in raw.parse():
        if chunk.choices and (piece := chunk.choices[0].delta.content):
            pieces.append(piece)
            print(piece, end="", flush=True)
    told = {name: raw.headers.get(f"X-SOMA-{name}") or "-" for name in ("Engine", "Adapter", "Phase", "Reason")}
    print(f"\n[{', '.join(f'{name.lower()}: {value}' for name, value in told.items())}]")
    return "".join(pieces)


if __name__ == "__main__":
    sys.exit(main())
