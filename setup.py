"""Metadata and entry points. Pinned versions live in requirements/*.lock; these are the ranges."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """Requirement lines of requirements/<name>.in, without comments."""
    lines = (HERE / "requirements" / f"{name}.in").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


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
    name="soma-vllm",
    version="0.1.0",
    description="vLLM multi-LoRA serving of multi-turn dialogues that move from a large model to a small one",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11,<3.12",
    packages=find_packages(include=["soma_vllm", "soma_vllm.*"]),
    ext_modules=KERNELS,
    package_data={"soma_vllm": ["py.typed"], "soma_vllm.engines.vllm.kernels": ["*.cpp", "*.h"]},
    install_requires=requirements("base"),
    extras_require={name: requirements(name) for name in ("cpu", "cuda", "dev", "llmlingua", "routellm")},
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
