"""Policies decide who answers a turn. One file per policy; entry-point group `soma_vllm.policies`."""
