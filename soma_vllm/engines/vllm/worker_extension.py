"""What every worker of the surrogate can do beyond vLLM's own (`--worker-extension-cls`): read adapters aside.

vLLM reads an adapter's files inside its engine loop, between two steps of everybody's requests: 20 ms that all
of them wait. `soma_read_adapter` does that work in a thread of the lowest priority, and vLLM's own `add_lora`,
which follows, finds the weights in memory and has only to copy them into a slot. Guarantees:

* What `add_lora` gets is what vLLM's own loader made of the same files; nothing else of vLLM changes.
* An adapter that could not be read aside is read by `add_lora` as ever, and fails there as ever.
* At most `KEPT` adapters are kept for an `add_lora` that has yet to come; the oldest is dropped.

It leans on vLLM internals that `versions.py` pins (`LoRAModelRunnerMixin.lora_manager`,
`WorkerLoRAManager._load_adapter`), and does nothing with any other vLLM.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import Any

from soma_vllm.versions import vllm_is_supported

KEPT = 4
LOWEST_PRIORITY = 19


class ReadsAdaptersAside:
    """Methods that vLLM adds to its worker; `collective_rpc` calls them by name, with plain arguments."""

    model_runner: Any
    _soma_adapters: AdaptersAside

    def soma_read_adapter(self, name: str, number: int, path: str) -> None:
        """Begin to read an adapter's files, unless that has begun already."""
        if not vllm_is_supported():
            return
        if not hasattr(self, "_soma_adapters"):
            self._soma_adapters = AdaptersAside(self.model_runner.lora_manager)
        self._soma_adapters.begin(name, number, path)

    def soma_adapter_is_read(self, number: int) -> bool:
        """False while an adapter is being read; True once `add_lora` need not wait for the disk, or cannot be
        spared it."""
        return not hasattr(self, "_soma_adapters") or self._soma_adapters.is_done(number)


class AdaptersAside:
    """Adapters that were read, or are being read, and have not been added yet."""

    def __init__(self, manager: Any) -> None:
        """`manager` is vLLM's WorkerLoRAManager; from now on its loader looks here first."""
        self._manager = manager
        self._load = manager._load_adapter
        self._threads: OrderedDict[int, threading.Thread] = OrderedDict()
        self._read: dict[int, Any] = {}
        manager._load_adapter = self._take

    def begin(self, name: str, number: int, path: str) -> None:
        """Read in a thread."""
        from vllm.lora.request import LoRARequest

        if number in self._threads or number in self._manager.list_adapters():
            return
        request = LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)
        thread = threading.Thread(target=self._keep, args=(request,), name="soma-read-adapter", daemon=True)
        self._threads[number] = thread
        while len(self._threads) > KEPT:
            oldest, _ = self._threads.popitem(last=False)
            self._read.pop(oldest, None)
        thread.start()

    def is_done(self, number: int) -> bool:
        """Whether no thread is reading it."""
        thread = self._threads.get(number)
        return thread is None or not thread.is_alive()

    def _keep(self, request: Any) -> None:
        # A thread's own niceness, on Linux: the engine's threads come first wherever they have work.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
        try:
            lora = self._load(request)
            self._manager._adapter_manager._create_merged_loras_inplace(lora)
        except Exception:  # `add_lora` meets the same error, and reports it
            return
        if request.lora_int_id in self._threads:
            self._read[request.lora_int_id] = lora

    def _take(self, request: Any) -> Any:
        """vLLM's `_load_adapter`: what was read aside, else what the disk holds."""
        thread = self._threads.get(request.lora_int_id)
        if thread is not None:
            thread.join()  # first: what is not waited for any more is not kept
            self._threads.pop(request.lora_int_id, None)
        lora = self._read.pop(request.lora_int_id, None)
        return self._load(request) if lora is None else lora
