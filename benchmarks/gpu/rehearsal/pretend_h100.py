"""What vLLM chooses on an H100, without one: engine arguments are resolved and a model with LoRA is built.

Fails unless attention is FlashAttention. The argument is a folder made by `steps/models.py`:

    python benchmarks/gpu/rehearsal/pretend_h100.py MODEL_FOLDER
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import vllm.platforms as platforms
from vllm.platforms import cuda
from vllm.platforms.interface import DeviceCapability


class Pretended(cuda.NonNvmlCudaPlatform):
    """vLLM's CUDA platform with an H100's answers."""

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> Any:
        return DeviceCapability(9, 0)

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return "NVIDIA H100 80GB HBM3"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return 80 * 2**30

    @classmethod
    def device_count(cls) -> int:
        return 1

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:
        return 132

    @classmethod
    def log_warnings(cls) -> None:
        pass


platforms._current_platform = Pretended()

from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # noqa: E402
from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager  # noqa: E402
from vllm.model_executor.model_loader.utils import initialize_model  # noqa: E402

SHARED = {
    "max_model_len": 512,
    "max_num_seqs": 128,
    "kv_cache_memory_bytes": 2**28,
    "gpu_memory_utilization": 0.3,
}
LORA = {"enable_lora": True, "max_loras": 4, "max_cpu_loras": 8, "max_lora_rank": 8}
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 8, 32, 128]}

config: Any = None
for graphs in (True, False):
    more = {"compilation_config": GRAPHS} if graphs else {"enforce_eager": True}
    config = AsyncEngineArgs(model=sys.argv[1], **SHARED, **LORA, **more).create_engine_config()
    chosen = config.compilation_config
    print(
        f"graphs {graphs}: mode {chosen.mode}, {chosen.cudagraph_mode.name} {chosen.cudagraph_capture_sizes}, "
        f"model runner {'V2' if config.use_v2_model_runner else 'V1'}, {config.parallel_config.worker_cls}"
    )

with set_current_vllm_config(config):
    init_distributed_environment(1, 0, f"file://{sys.argv[1]}/rendezvous", 0, backend="gloo")
    initialize_model_parallel(1)
    torch.set_default_dtype(torch.bfloat16)
    model = initialize_model(vllm_config=config)
    backends = {
        str(module.attn_backend.get_name())
        for module in model.modules()
        if type(module).__name__ == "Attention"
    }
    manager = LRUCacheWorkerLoRAManager(config, torch.device("cpu"), {})
    manager.create_lora_manager(model, config)
    print(f"{type(model).__name__} with LoRA: attention {backends}")
    assert backends == {"FLASH_ATTN"}
