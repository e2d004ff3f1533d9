"""Check that the compiled libraries load and every module of the CUDA path imports; no GPU is needed."""

from __future__ import annotations

import importlib

import torch

MODULES = (
    "vllm._C_stable_libtorch",
    "vllm.vllm_flash_attn._vllm_fa3_C",
    "vllm.platforms.cuda",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu_worker",
    "vllm.lora.punica_wrapper.punica_gpu",
    "vllm.model_executor.models.qwen2",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.triton_attn",
    "vllm.v1.engine.async_llm",
    "vllm.entrypoints.launchers.api_server.entry",
    "soma_vllm.engines.vllm.internals",
    "soma_vllm.engines.vllm.worker_extension",
    "soma_vllm.api.plugin",
    "soma_vllm.app.server",
    "soma_vllm.training.pool",
    "soma_vllm.method.recipe",
    "ray",
)

for name in MODULES:
    importlib.import_module(name)
operations = [hasattr(torch.ops._C, name) for name in ("silu_and_mul", "rms_norm", "rotary_embedding")]
assert all(operations), operations
assert hasattr(torch.ops._vllm_fa3_C, "fwd")
print(f"{len(MODULES)} modules, torch {torch.__version__}: all loaded")
