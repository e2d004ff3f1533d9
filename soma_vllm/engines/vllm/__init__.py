"""The only home of vLLM's internals, behind the version check of `soma_vllm.versions`."""
