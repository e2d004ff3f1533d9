"""The C++ extensions and the entry points. All other metadata is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).parent

# Optional: without a C++ compiler products are torch's. Python's own headers are all it includes, and
# the instructions it uses are looked up when it runs, so that one build serves every x86 machine.
KERNELS = [
    Extension(
        f"soma_vllm.engines.vllm.kernels.{name}",
        sources=[f"soma_vllm/engines/vllm/kernels/{name}.cpp"],
        depends=[str(header.relative_to(HERE)) for header in HERE.glob("soma_vllm/engines/vllm/kernels/*.h")],
        language="c++",
        extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-Wall", "-Wno-maybe-uninitialized"],
        extra_link_args=["-fopenmp"],
        optional=True,
    )
    for name in ("_lora_cpu", "_linear_cpu")
]

setup(
    ext_modules=KERNELS,
    entry_points={
        "console_scripts": [
            "soma = soma_vllm.cli.main:app",
            "soma-serve = soma_vllm.app.serve:app",
        ],
        "vllm.endpoint_plugins": ["soma = soma_vllm.api.plugin:SomaEndpointPlugin"],
        "vllm.general_plugins": ["soma_engine = soma_vllm.engines.vllm.general_plugin:install"],
        "soma_vllm.policies": [
            "soma = soma_vllm.scheduler.policies.soma:SomaPolicy",
            "original = soma_vllm.scheduler.policies.fixed:OriginalPolicy",
            "surrogate = soma_vllm.scheduler.policies.fixed:SurrogatePolicy",
            "history_prefix = soma_vllm.baselines.policies.history_prefix:HistoryPrefixPolicy",
            "history_ft = soma_vllm.baselines.policies.history_ft:HistoryFineTuningPolicy",
            "llmlingua2 = soma_vllm.baselines.policies.llmlingua2:Llmlingua2Policy",
            "routellm = soma_vllm.baselines.policies.routellm:RoutellmPolicy",
            "speculative = soma_vllm.baselines.policies.speculative:SpeculativePolicy",
        ],
    },
)
