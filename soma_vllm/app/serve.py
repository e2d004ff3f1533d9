"""`soma-serve`: read the configuration, check the machine, serve."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console

from soma_vllm.config import Config, exposed, load_config, without_effect
from soma_vllm.errors import PreflightError, SomaError
from soma_vllm.private import HUB_TOKENS, SECRETS, masked, private_from_now_on, withhold
from soma_vllm.versions import versions

if TYPE_CHECKING:
    from soma_vllm.scheduler.policies.base import Policies

T = TypeVar("T")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def show_version(wanted: bool) -> None:
    """Callback of `--version`."""
    if wanted:
        typer.echo(versions())
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
]


@app.command()
def serve(
    config: Annotated[Path, typer.Option(help="YAML file, such as configs/cpu_demo.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, such as gate.accept_threshold=0.1.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check config, models and machine.")] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Wait for another server of this record to end.")
    ] = False,
    version: Version = False,
) -> None:
    """Serve dialogues that begin on the original and move to the surrogate."""
    private_from_now_on()
    console = Console(highlight=False, soft_wrap=True)
    try:
        _serve(config, overrides or [], check, take_over, console)
    except SomaError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            masked(f"soma-serve: {error}"), markup=False
        )
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("stopped before it was ready")
        raise typer.Exit(130) from None


def _serve(path: Path, overrides: list[str], check: bool, take_over: bool, console: Console) -> None:
    config = load_config(path, overrides).for_serving(str(path))
    keys = (config.access.admin_key_env, config.original.api_key_env, config.gate.judge_api_key_env)
    # The hub's own client reads its token from the environment.
    general = set(SECRETS) - (set(HUB_TOKENS) if config.adapters.root.startswith("hf://") else set())
    withhold((*general, *filter(None, (*keys, config.storage.url_env))))
    for line in without_effect(config):
        console.print(f"note       {line}", markup=False)
    for line in exposed(config):
        console.print(f"WARNING    {line}", markup=False, style="bold red")
    # Imported late: a wrong configuration is told in milliseconds.
    from soma_vllm.adapters.store.atomic_files import locked_alone
    from soma_vllm.app.preflight import preflight
    from soma_vllm.app.record import entered
    from soma_vllm.app.run_dir import make_run_dir
    from soma_vllm.app.server import ModelPaths, SomaServer
    from soma_vllm.app.terminal import log_as_configured, output_to
    from soma_vllm.engines.arithmetic import settle
    from soma_vllm.engines.child_process import tail
    from soma_vllm.models.hub import folder_here

    policies, (original, surrogate, encoder), problems = _found_here(config)
    if surrogate is not None and not problems:
        config, chosen = settle(config, original, surrogate)
        for line in chosen:
            console.print(f"machine    {line}", markup=False)
    for line in preflight(config, original, surrogate, encoder, problems, take_over and not check):
        console.print(f"checked    {line}", markup=False)
    if check:
        return
    assert policies is not None, "preflight has checked"
    assert surrogate is not None
    assert encoder is not None
    # An external original's weights are elsewhere; its tokenizer may be here all the same.
    named = None if config.original_model is None else folder_here(config.original_model)
    paths = ModelPaths(original, surrogate, encoder, original or named)
    import uvloop

    run_dir = make_run_dir(config.server.run_dir)
    log = run_dir / "surrogate.log"
    console.print(f"logs       {run_dir}", markup=False)
    wait = partial(console.print, "waiting   ", markup=False) if take_over else None
    problem = f"server.run_dir: found another server in {run_dir}; expected none"
    try:
        with ExitStack() as held:
            asyncio.run(entered(held, partial(locked_alone, run_dir, problem), wait))
            terminal = held.enter_context(output_to(log, config.server))
            log_as_configured(config.server, run_dir)
            screen = Console(file=terminal, highlight=False, soft_wrap=True)
            say = partial(screen.print, markup=False)
            uvloop.run(SomaServer(config, paths, policies, run_dir, say, take_over).run())
    except SomaError:
        raise
    except Exception as error:  # a process edge: whatever an engine died of, people get one message
        raise PreflightError(
            f"the surrogate failed ({type(error).__name__}: {error}); the end of {log}:\n{tail(log, 15)}"
        ) from error


def _found_here(
    config: Config,
) -> tuple[Policies | None, tuple[Path | None, Path | None, Path | None], list[str]]:
    """The policies, the folders of original, surrogate and encoder, and a line about each that is not here."""
    from soma_vllm.models.hub import local_path
    from soma_vllm.scheduler.policies.base import Policies

    problems: list[str] = []

    def attempt(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except SomaError as error:
            problems.append(" ".join(str(error).split()))
            return None

    def folder(model: str | None) -> Path | None:
        return None if model is None else attempt(partial(local_path, model))

    policies = attempt(partial(Policies, config))
    original = None if config.original.url is not None else folder(config.original_model)
    return policies, (original, folder(config.surrogate_model), folder(config.encoder.model)), problems


if __name__ == "__main__":
    app()
