"""The parts of `benchmarks/multi_lora.py`."""
