"""A local folder for any model a configuration can name; the only place that may download from a hub."""

from __future__ import annotations

from pathlib import Path

from soma_vllm.errors import ModelError
from soma_vllm.models.catalog import resolve
from soma_vllm.private import HUB_TOKENS, as_the_user_has_it, secret


def local_path(name: str) -> Path:
    """Folder of a local path, an embedded name or a Hugging Face id (fetched into its own cache if need be).

    Raises:
        ModelError: the model is not on this machine and cannot be fetched.
    """
    found = resolve(name)
    if isinstance(found, Path):
        return found
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        token = next(filter(None, map(secret, HUB_TOKENS)), None)
        with as_the_user_has_it():
            return Path(snapshot_download(found, allow_patterns=patterns, token=token))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {found}: not in the local Hugging Face cache, and the hub did not give it "
            f"({type(error).__name__}); expected a reachable hub, a local path or an embedded name"
        ) from error


def folder_here(name: str) -> Path | None:
    """Folder of a local path or an embedded name that is on this machine; None otherwise. Fetches nothing."""
    try:
        found = resolve(name)
    except ModelError:
        return None
    return found if isinstance(found, Path) else None
