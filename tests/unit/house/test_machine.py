"""What a processor's flags say, and that the lower level can be had on any machine."""

from __future__ import annotations

import pytest

from soma_vllm.machine import (
    ISA_ENV,
    InstructionSet,
    describe,
    detected,
    instruction_set,
    level,
    lowered_environment,
    training_dtype,
)

ZEN4 = "fpu avx avx2 fma avx512f avx512dq avx512bw avx512vl avx512_bf16"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (ZEN4, InstructionSet.AVX512_BF16),
        ("avx2 fma avx512f avx512dq avx512bw avx512vl", InstructionSet.AVX512),
        ("sse4_2 avx avx2 fma", InstructionSet.AVX2),
        ("avx2", InstructionSet.OTHER),
        ("", InstructionSet.OTHER),
    ],
)
def test_flags_are_read_as_a_level(flags: str, expected: InstructionSet) -> None:
    assert level(flags) is expected


def test_the_lower_level_is_taken_on_request_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    if detected() is InstructionSet.OTHER:
        pytest.skip("this processor has no AVX2")
    for name, value in lowered_environment().items():
        monkeypatch.setenv(name, value)
    assert instruction_set() is InstructionSet.AVX2
    assert "avx2" in describe()
    assert training_dtype("auto", "cpu") == "float32"


def test_without_the_request_the_processor_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ISA_ENV, raising=False)
    assert instruction_set() is detected()
    assert training_dtype("bfloat16", "cpu") == "bfloat16"
    assert training_dtype("auto", "cuda") == "bfloat16"
