"""Make random models of real shapes, and adapters, in the folder of the models. What is there already is kept.

`--which small` makes the 0.5B shape and its adapters, for the engine and for training; `pair` adds the 1.5B
shape and the encoder, for soma-serve.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

from common import Step
from shapes import SHAPES, make_model, make_tokenizer, save, write_adapter

ADAPTERS = 64


def main() -> None:
    step = Step("models", which=("small", "pair"))
    from soma_vllm.models.tiny import make_tiny, read_texts

    wanted = {"small": "tiny" if step.tiny else "0.5b"}
    if step.options.which == "pair":
        wanted["large"] = "tiny-large" if step.tiny else "1.5b"
    tokenizer = None
    for role, shape in wanted.items():
        with step.part(role):
            if (step.models / role / "config.json").exists():
                continue
            began = step.seconds()
            if tokenizer is None:
                tokenizer = make_tokenizer(read_texts(), SHAPES[shape][5])
            model = make_model(shape, step.device, tokenizer)
            made = step.seconds() - began
            save(model, tokenizer, step.models / role)
            size = sum(file.stat().st_size for file in (step.models / role).glob("*.safetensors"))
            step.record(role, shape=shape, made_s=made, seconds=step.seconds() - began, gb=size / 1e9)
            del model
    if step.options.which == "pair" and not (step.models / "encoder").exists():
        with step.part("encoder"):
            made_in = step.models / "made"
            make_tiny(made_in)
            (made_in / "tiny-encoder").rename(step.models / "encoder")
            shutil.rmtree(made_in)
    with step.part("adapters"):
        write_adapters(step)


def write_adapters(step: Step) -> None:
    """Adapters 1 to 64 of the small model; four where only the pair is served, or in a rehearsal."""
    began = step.seconds()
    count = 4 if step.tiny or step.options.which == "pair" else ADAPTERS
    folders = [step.models / "adapters" / str(number) for number in range(1, count + 1)]
    missing = [folder for folder in folders if not (folder / "adapter_config.json").exists()]
    if not missing:
        return
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda at: write_adapter(step.models / "small", at, 8, int(at.name)), missing))
    size = (folders[0] / "adapter_model.safetensors").stat().st_size
    step.record("adapters", count=count, seconds=step.seconds() - began, mb_each=size / 1e6)


if __name__ == "__main__":
    main()
