"""The fault suite: what breaks under a server, and what its clients and its record then lack.

`matrix.py` names the faults, `suite.py` plays them, `row.py` holds the figures, `talk.py` the client whose
every answer is checked. Each other file is one kind of fault. `benchmarks/fault_suite.py` is the command.
"""
