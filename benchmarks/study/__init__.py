"""The parts of the latency and cost study; `throughput.py` beside this folder is its command and says what it
compares."""
