"""soma_vllm: multi-turn dialogues that begin on a large model and move to a small one, adapted per session.

Importing this package is cheap: torch, ray, vllm and fastapi load only in the rooms that need them.
"""

__version__ = "0.1.0"
