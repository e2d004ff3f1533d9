"""Every kind of fault, in the order in which they are played: those that end the server come last."""

from __future__ import annotations

from faults import kills
from faults.clocks import clocks
from faults.databases import databases
from faults.durable import durable
from faults.files import files
from faults.fuzzing import fuzzing
from faults.moods import moods
from faults.servers import servers
from faults.soak import soak
from faults.suite import Fault

FAULTS = (
    Fault("soak", soak),
    Fault("fuzzing", fuzzing),
    Fault("database", databases),
    Fault("clock", clocks),
    Fault("durable", durable),
    Fault("files", files),
    Fault("original", moods),
    Fault("servers", servers),
    Fault("kill-trainer", kills.trainer),
    Fault("kill-surrogate", kills.surrogate),
    Fault("kill-server", kills.server),
    Fault("kill-original", kills.original),
)
