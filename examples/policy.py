"""A policy of your own: after the warm start, the plain surrogate answers every other turn.

Put this file into a package of yours and name the class in an entry point of it, in pyproject.toml:

    [project.entry-points."soma_vllm.policies"]
    every_other = "policy:EveryOther"

Once that package is installed beside soma_vllm, `policy: every_other` in the configuration chooses it for the
server, `model: soma:every_other` for one request. docs/policies.md says what a policy may rely on.
"""

from soma_vllm.types import Role, Route


class EveryOther:
    """Even turns after the warm start go to the surrogate, all others to the original."""

    adapting = None  # sessions under this policy are not adapted

    def __init__(self, config):
        self._warm = config.warm_window

    def route(self, session, query):
        """Pure and fast: this is on the path of every request."""
        turn = query.builds_on + 1
        engine = Role.SURROGATE if turn > self._warm and turn % 2 == 0 else Role.ORIGINAL
        return Route(engine, None, query.messages, f"turn {turn}, warm start {self._warm}")
