"""Products of vLLM engines on a CPU, and the plugin that puts them in place."""
