"""Where the kernels go in, where they must not, and that an orphan does not survive its parent."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support.guard import GUARD_S
from vllm.platforms.cpu import CpuPlatform

from soma_vllm.engines.vllm.general_plugin import (
    GROUPED_WRAPPER,
    die_with_parent,
    use_grouped_kernels,
    use_packed_linear,
)
from soma_vllm.machine import ISA_ENV

STOCK = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"


class GpuPlatform(CpuPlatform):
    def is_cpu(self) -> bool:
        return False


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_installing_twice_is_installing_once() -> None:
    platform = CpuPlatform()
    assert platform.get_punica_wrapper() == STOCK
    for _ in range(2):
        assert use_grouped_kernels(platform, supported=True)
        assert platform.get_punica_wrapper() == GROUPED_WRAPPER


def test_an_unknown_vllm_keeps_its_own_kernels_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    platform = CpuPlatform()
    logger = logging.getLogger("vllm.soma")
    logger.addHandler(caplog.handler)
    try:
        # Whatever packages that other tests have loaded make of the root logger's level.
        with caplog.at_level(logging.WARNING, logger=logger.name):
            assert not use_grouped_kernels(platform, supported=False)
    finally:
        logger.removeHandler(caplog.handler)
    assert platform.get_punica_wrapper() == STOCK
    assert "expected 0.32.*" in caplog.text


def test_base_products_stay_on_a_gpu_and_with_an_unknown_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_ENV, "avx2")
    assert not use_packed_linear(CpuPlatform(), supported=False)
    assert not use_packed_linear(GpuPlatform(), supported=True)


def test_a_gpu_keeps_its_kernels_whatever_the_version() -> None:
    platform = GpuPlatform()
    assert not use_grouped_kernels(platform, supported=True)
    assert platform.get_punica_wrapper() == STOCK


@pytest.mark.slow
def test_vllm_itself_builds_the_grouped_wrapper_after_loading_its_plugins() -> None:
    assert (
        run("""
        import os, sys
        os.environ["VLLM_PLUGINS"] = "soma_engine"
        from soma_vllm.engines.vllm.general_plugin import install
        from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper
        from vllm.plugins import load_general_plugins

        def built():
            return type(get_punica_wrapper(16, max_batches=4, device="cpu", max_loras=2)).__name__

        os.environ["SOMA_LORA_KERNELS"] = "stock"
        install()
        names = [built()]
        del os.environ["SOMA_LORA_KERNELS"]
        load_general_plugins()
        assert "soma_vllm.engines.vllm.kernels.lora_kernels" not in sys.modules
        install()
        names.append(built())
        print(*names)
        """)
        == "PunicaWrapperCPU GroupedPunicaWrapperCPU"
    )


def test_the_hook_itself_imports_neither_torch_nor_vllm() -> None:
    assert (
        run("""
        import sys
        import soma_vllm.engines.vllm.general_plugin
        print(sorted({"torch", "vllm"} & set(sys.modules)))
        """)
        == "[]"
    )


def test_a_process_nobody_spawned_is_not_tied_to_its_parent() -> None:
    assert die_with_parent() is False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="parent-death signals are Linux's")
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_child_ends_when_its_parent_is_killed(method: str, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import multiprocessing, signal
        from soma_vllm.engines.vllm.general_plugin import _tie_forked_children, die_with_parent

        def child():
            if {method!r} == "spawn":
                die_with_parent()
            print("tied", flush=True)
            signal.pause()

        if __name__ == "__main__":
            _tie_forked_children()
            process = multiprocessing.get_context({method!r}).Process(target=child)
            process.start()
            signal.pause()
        """),
        encoding="utf-8",
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent, parent.stdout as output:
        assert output.readline() == "tied\n"
        parent.kill()
        # The child holds the pipe's other end: this returns when the child, too, is gone.
        assert output.read() == ""
