"""What every vLLM process of this project runs first (entry point group `vllm.general_plugins`).

`install` may run any number of times, in API servers, engine cores and workers. It guarantees:

* On a CPU, with a vLLM whose internals are known, LoRA products come from `lora_kernels.py`. With any other
  vLLM the stock kernels stay, with a warning, since those answer base-model requests wrongly in batches with
  adapters.
* On a CPU with AVX2 and no AVX-512, products of bf16 base weights come from `linear.py`; with an unknown vLLM
  they stay, with a warning, since they are only slow.
* A process that another one started ends when its parent does, even when that one was killed: an engine core
  never outlives its API server.

It imports no LoRA kernels: vLLM resolves the wrapper by name where a model with LoRA is built.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
from typing import Any

from soma_vllm.machine import InstructionSet, instruction_set
from soma_vllm.versions import SUPPORTED_VLLM, installed_vllm, vllm_is_supported

KERNELS_ENV = "SOMA_LORA_KERNELS"
"""Set to "stock" to keep vLLM's own LoRA kernels, for comparisons."""

GROUPED_WRAPPER = "soma_vllm.engines.vllm.kernels.lora_kernels.GroupedPunicaWrapperCPU"

# A child of vLLM's own logger, which vLLM has given its handlers by the time plugins load.
logger = logging.getLogger("vllm.soma")

_PR_SET_PDEATHSIG = 1


def install() -> None:
    """Install the kernels and tie this process, and those it will fork, to their parents. Idempotent."""
    die_with_parent()
    _tie_forked_children()
    from vllm.platforms import current_platform

    use_packed_linear(current_platform, supported=vllm_is_supported())
    if os.environ.get(KERNELS_ENV) == "stock":
        logger.info("%s=stock: LoRA kernels left as vLLM has them", KERNELS_ENV)
        return
    use_grouped_kernels(current_platform, supported=vllm_is_supported())


def use_packed_linear(platform: Any, *, supported: bool) -> bool:
    """Have layers on a CPU `platform` without bf16 in hardware multiply by `linear.py`; True when they do.

    vLLM looks `dispatch_cpu_unquantized_gemm` up in its module at each layer's loading; it has no extension
    point there (`--linear-backend` chooses among its own).
    """
    if not platform.is_cpu() or instruction_set() is not InstructionSet.AVX2:
        return False
    if not supported:
        logger.warning(
            "products of base weights left as vLLM has them: found vLLM %s, expected %s*",
            installed_vllm(),
            SUPPORTED_VLLM,
        )
        return False
    from vllm.model_executor.layers import utils

    from soma_vllm.engines.vllm.kernels import linear

    if not linear.is_worthwhile():
        return False
    if not hasattr(utils.dispatch_cpu_unquantized_gemm, "soma_stock"):
        dispatch = linear.dispatching(utils.dispatch_cpu_unquantized_gemm)
        dispatch.soma_stock = utils.dispatch_cpu_unquantized_gemm  # type: ignore[attr-defined]
        utils.dispatch_cpu_unquantized_gemm = dispatch
    return True


def use_grouped_kernels(platform: Any, *, supported: bool) -> bool:
    """Make a CPU `platform` name the grouped wrapper; True when it does.

    Here vLLM is changed rather than extended: `get_punica_wrapper` is asked once, by
    `vllm.lora.punica_wrapper.punica_selector`, for the qualified name of the wrapper's class. Only a
    platform plugin could answer it officially, and that would have to replace the whole platform.
    """
    if not platform.is_cpu():
        return False
    if not supported:
        logger.warning(
            "LoRA kernels left as vLLM has them: found vLLM %s, expected %s*. On a CPU, requests without an "
            "adapter may then be answered with another request's adapter",
            installed_vllm(),
            SUPPORTED_VLLM,
        )
        return False
    platform.get_punica_wrapper = _grouped_wrapper
    return True


def _grouped_wrapper() -> str:
    return GROUPED_WRAPPER


@functools.cache
def _tie_forked_children() -> None:
    # A forked child inherits "plugins are loaded" from its parent, so that vLLM never calls install in it.
    multiprocessing.util.register_after_fork(die_with_parent, lambda tie: tie())


def die_with_parent() -> bool:
    """Ask Linux for SIGTERM when the parent's thread that started this process ends; True when asked.

    Only in processes made by `multiprocessing`: any other parent may be meant to end first.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        logger.warning(
            "cannot tie this process to its parent; it may outlive a server that is killed: %s",
            os.strerror(ctypes.get_errno()),
        )
        return False
    if not parent.is_alive():
        # It was gone before we asked, so no signal will ever come.
        os.kill(os.getpid(), signal.SIGTERM)
    return True
