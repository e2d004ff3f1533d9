"""aider by its own Python interface, one file in the chat: each question comes with the file, and reminders."""

import os
from pathlib import Path

from play import BASE_URL, KEY, play

os.environ |= {"OPENAI_API_BASE": BASE_URL, "OPENAI_API_KEY": KEY}

from aider.coders import Coder
from aider.io import InputOutput
from aider.models import Model

# aider keeps no answer that ended for its length: the tiny models are made to end theirs.
ENDED = {"min_tokens": 8, "logit_bias": {"2": 100}}

file = Path("ferry.py")
model = Model("openai/soma")
model.extra_params = {"max_tokens": 64, "extra_body": ENDED}
coder = Coder.create(
    main_model=model,
    edit_format="ask",
    io=InputOutput(yes=True, pretty=False, fancy_input=False),
    fnames=[str(file)],
    use_git=False,
    map_tokens=0,
)
count = 0


def say(question):
    global count
    count += 1
    file.write_text(f"SAILINGS = {count}\n")  # as its user edits it between questions
    return {"text": coder.run(with_message=question)}


file.write_text("SAILINGS = 0\n")
play(say)
