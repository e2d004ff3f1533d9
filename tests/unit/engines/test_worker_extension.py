"""Reading adapters beside the engine's loop, on a stand-in for vLLM's LoRA manager."""

from __future__ import annotations

import threading
import types
from typing import Any

import pytest

from soma_vllm.engines.vllm.worker_extension import KEPT, ReadsAdaptersAside


class Manager:
    """vLLM's WorkerLoRAManager, as far as the extension sees it; reading waits for `go`."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.read: list[tuple[int, str]] = []
        self.merged: list[str] = []
        self.resident: set[int] = set()
        self.broken: set[int] = set()
        self._adapter_manager = self

    def _load_adapter(self, request: Any) -> str:
        assert self.go.wait(10)
        self.read.append((request.lora_int_id, threading.current_thread().name))
        if request.lora_int_id in self.broken:
            raise ValueError("damaged")
        return f"weights of {request.lora_int_id}"

    def _create_merged_loras_inplace(self, lora: str) -> None:
        self.merged.append(lora)

    def list_adapters(self) -> set[int]:
        return self.resident


class Worker(ReadsAdaptersAside):
    def __init__(self, manager: Manager) -> None:
        self.model_runner = types.SimpleNamespace(lora_manager=manager)


@pytest.fixture
def manager() -> Manager:
    return Manager()


@pytest.fixture
def worker(manager: Manager) -> Worker:
    return Worker(manager)


def request(number: int) -> Any:
    return types.SimpleNamespace(lora_int_id=number)


def wait(worker: Worker, number: int) -> None:
    for _ in range(1000):
        if worker.soma_adapter_is_read(number):
            return
        threading.Event().wait(0.005)
    raise AssertionError(f"adapter {number} was not read")


def test_an_adapter_is_read_once_in_a_thread_and_found_in_memory_by_the_engine(
    worker: Worker, manager: Manager
) -> None:
    worker.soma_read_adapter("a", 7, "/a")
    worker.soma_read_adapter("a", 7, "/a")
    wait(worker, 7)
    assert manager._load_adapter(request(7)) == "weights of 7"
    assert manager.read == [(7, "soma-read-adapter")]
    assert manager.merged == ["weights of 7"]


def test_the_engine_goes_on_while_an_adapter_is_being_read(worker: Worker, manager: Manager) -> None:
    manager.go.clear()
    worker.soma_read_adapter("a", 7, "/a")
    assert not worker.soma_adapter_is_read(7)
    manager.go.set()
    wait(worker, 7)


def test_an_engine_that_asks_too_early_waits_for_the_reader_and_reads_nothing_twice(
    worker: Worker, manager: Manager
) -> None:
    manager.go.clear()
    worker.soma_read_adapter("a", 7, "/a")
    threading.Timer(0.2, manager.go.set).start()
    assert manager._load_adapter(request(7)) == "weights of 7"
    assert manager.read == [(7, "soma-read-adapter")]


def test_an_adapter_that_nobody_read_aside_is_read_by_the_engine_as_ever(
    worker: Worker, manager: Manager
) -> None:
    assert worker.soma_adapter_is_read(3)
    worker.soma_read_adapter("a", 7, "/a")
    assert manager._load_adapter(request(3)) == "weights of 3"
    wait(worker, 7)
    assert (3, threading.current_thread().name) in manager.read


def test_a_damaged_adapter_fails_where_the_engine_asks_for_it_and_nowhere_else(
    worker: Worker, manager: Manager
) -> None:
    manager.broken.add(7)
    worker.soma_read_adapter("a", 7, "/a")
    wait(worker, 7)
    with pytest.raises(ValueError, match="damaged"):
        manager._load_adapter(request(7))


def test_an_adapter_in_the_engine_is_not_read_again(worker: Worker, manager: Manager) -> None:
    manager.resident.add(7)
    worker.soma_read_adapter("a", 7, "/a")
    assert worker.soma_adapter_is_read(7)
    assert manager.read == []


def test_what_is_never_added_does_not_pile_up(worker: Worker, manager: Manager) -> None:
    for number in range(1, KEPT + 4):
        worker.soma_read_adapter("a", number, "/a")
        wait(worker, number)
    assert len(worker._soma_adapters._read) == KEPT
    assert manager._load_adapter(request(1)) == "weights of 1"
    assert manager.read.count((1, threading.current_thread().name)) == 1
