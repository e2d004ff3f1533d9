# Everything a person or a CI needs. Set-up is repeated where a lock file, setup.py or a C++ source changed.

SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
LOCK := requirements/$(DEVICE).lock
STAMP := $(VENV)/.installed-$(DEVICE)
# Where the CPU build of torch lies, if pip does not find it by itself, e.g.
#   make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=

export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1

.PHONY: help setup models tiny baselines demo smoke evaluate serve check test lint docs fast-services fast-rest bench faults dispatch study study-full load-tools load-test clients few-clients gpu-rehearsal lock clean

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make setup   create .venv from the pinned lock (3 to 6 minutes; seconds when it is there)
setup: $(STAMP)

$(STAMP): $(LOCK) setup.py $(wildcard soma_vllm/engines/vllm/kernels/*.cpp soma_vllm/engines/vllm/kernels/*.h) requirements/build.lock | $(BIN)/python
	@$(BIN)/python requirements/check_machine.py $(DEVICE)
	@echo "[setup] $(DEVICE): installing $$(grep -vc '^#' $(LOCK)) pinned packages into $(VENV)"
	@$(BIN)/python requirements/install.py requirements/build.lock $(PIP_ARGS)
	@$(BIN)/python requirements/install.py $(LOCK) $(PIP_ARGS)
	@$(BIN)/python requirements/install.py --project
	@rm -f $(VENV)/.installed-* && touch $@
	@echo "[setup] done"

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "[setup] found no $(PYTHON): install Python 3.11 (Debian, Ubuntu:" \
	  "apt install python3.11-venv python3.11-dev), or say where it is: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) requirements/check_machine.py $(DEVICE) >/dev/null
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "[setup] $(PYTHON) lacks its venv module" \
	  "(Debian, Ubuntu: apt install python3.11-venv)" >&2; exit 1; }

## make models  fetch the embedded pair and the encoder (about 2.5 GB of downloads, 3-5 minutes; once)
models: setup
	@$(BIN)/soma models fetch

tiny: setup
	@$(BIN)/soma models make-tiny

## make baselines  what policies llmlingua2 and routellm run, apart from .venv (about 130 MB of downloads, 20 seconds)
BASELINES := $(or $(SOMA_HOME),$(HOME)/.cache/soma-vllm)/baselines
baselines: $(BASELINES)/.installed

$(BASELINES)/.installed: requirements/baselines.lock | setup
	@echo "[baselines] installing into $(BASELINES)"
	@rm -rf $(BASELINES)
	@$(BIN)/python requirements/install.py $< --target $(BASELINES) --no-compile $(PIP_ARGS)
	@touch $@

## make demo    the main job on the embedded pair: warm start, adapter, switch, rollback (about MINUTES=15, 9 on a fast machine)
demo: models
	@echo "[demo] up to nine dialogues through a real pair, in about $(MINUTES) minutes; says first how long it will take here"
	@$(BIN)/soma replay --config configs/cpu_demo.yaml --dialogues dialogues/demo.json --out out/demo \
	  --minutes $(MINUTES) --first topic-change --first $(FORCED) --first rainfall-table \
	  --concurrency 3 --think-time 2 --await-verdicts --force-adapter $(FORCED) \
	  $(TO_SEE) --expect switch --expect adapter --expect rollback
	@echo '[demo] next: make serve, then in another terminal .venv/bin/python examples/chat.py, or any OpenAI client (README.md)'

MINUTES ?= 15

# Ten turns are few: adapters whether they pay or not, and a watch that is nervous enough to roll back.
TO_SEE := --set adaptation.payback=always --set gate.audit_rate=0.5 --set gate.drift_window=2 \
  --set gate.locality_threshold=0.85

## make smoke   the same loop on tiny random models, nothing to download (about 3 minutes)
smoke: tiny
	@$(BIN)/soma replay --config configs/tiny.yaml --dialogues dialogues/demo.json --out out/smoke \
	  --minutes 10 --first $(FORCED) --concurrency 4 --await-verdicts --force-adapter $(FORCED) \
	  --expect switch --expect adapter
	@echo "[smoke] next: make demo, the same with a real pair"

FORCED ?= house-style

## make evaluate  compare plain and trained surrogates on later turns (embedded pair, minutes a dialogue; EVALUATE="…" sets options)
evaluate: models
	@$(BIN)/soma evaluate --config $(PAIR) --dialogues $(DIALOGUES) --out out/evaluate $(EVALUATE)

PAIR ?= configs/cpu_demo.yaml
DIALOGUES ?= dialogues/demo.json
EVALUATE ?= --set prefix.mode=anchored

## make serve   the server on the embedded pair until Ctrl-C
serve: models
	@$(BIN)/soma-serve --config configs/cpu_demo.yaml

## make test    lint and the whole test suite, on real engines
test: models tiny baselines few-clients
	@echo "[test] the whole suite, on real engines; two parts side by side, the embedded pair last"
	@echo "[test] each part is shown when it is over; two at once need 20 GB of free memory, else one after the other"
	@$(MAKE) --no-print-directory -k -j$(AT_ONCE) --output-sync=target test-shared test-apart
	@$(MAKE) --no-print-directory test-real

AT_ONCE = $(shell awk '/MemAvailable/ { print ($$2 > 20e6) ? 2 : 1 }' /proc/meminfo)

# What shares one server, and all that needs none of it, beside each other: each is mostly waiting for engines.
SHARED = tests/clients $(shell grep -lw tiny_server tests/integration/test_*.py)
.PHONY: test-shared test-apart test-real
test-shared: setup
	@CLIENTS_EXPECTED="$(FEW_CLIENTS)" $(BIN)/python -m pytest $(SHARED)

test-apart: lint
	@$(BIN)/python -m pytest tests/unit tests/contract tests/integration $(addprefix --ignore=,$(SHARED))

test-real: setup
	@$(BIN)/python -m pytest tests/real

## make check   lint, types and the fast tests: nothing is downloaded, no engine is started (3.5 minutes on 2 cores)
check: setup
	@$(MAKE) --no-print-directory -j2 --output-sync=target lint fast-services fast-rest

SERVICES := tests/unit/scheduler tests/unit/sessions tests/unit/adaptation tests/unit/maintenance tests/unit/api tests/unit/adapters tests/contract
FAST := $(BIN)/python -m pytest -q -m "not slow"
fast-services: setup
	@$(FAST) $(SERVICES)

fast-rest: setup
	@$(FAST) tests/unit $(addprefix --ignore=,$(SERVICES))

## make lint    ruff and mypy
lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

## make docs    write docs/configuration.md and docs/metrics.md from the code anew
docs: setup
	@$(BIN)/python docs/generate.py

## make bench   what many adapters cost: vLLM's LoRA path against ours, on the embedded surrogate (about 12 minutes)
bench: models
	@$(BIN)/python benchmarks/lora_kernels.py
	@mkdir -p out
	@$(BIN)/python benchmarks/multi_lora.py --quick --json out/multi_lora.json --figure out/multi_lora.png

## make faults  what breaks under a server: kills, full disks, lying originals; ends with zeros (25 minutes beside other work; FAULTS="…")
faults: tiny
	@mkdir -p out
	@$(BIN)/python benchmarks/fault_suite.py --json out/faults.json $(FAULTS)

## make dispatch  dispatch alone, from 10 to 10,000 live sessions, and its pauses under 500 streams (about 10 minutes)
dispatch: setup
	@mkdir -p out
	@$(BIN)/python benchmarks/dispatch.py --json out/dispatch.json

## make study   latency, cost and task accuracy of policies on the embedded pair (laid out for 10 minutes on 2 cores; STUDY="…" sets options)
study: models tiny
	@$(BIN)/python benchmarks/throughput.py --workloads $(WORKLOADS) --json out/study/study.json --out out/study $(STUDY)

STUDY ?= --quick
WORKLOADS ?= benchmarks/workloads

## make study-full  every arm on the whole test part, both pairs (a night on 2 idle cores; goes on where it ended)
study-full: models tiny
	@$(MAKE) --no-print-directory study STUDY="--config configs/cpu_demo.yaml --config configs/cpu_weak.yaml"

## make load-tools  two load generators, each in its own environment under $$SOMA_HOME/tools (2.7 GB on disk, 3 minutes)
TOOLS := $(or $(SOMA_HOME),$(HOME)/.cache/soma-vllm)/tools
load-tools: $(TOOLS)/guidellm/.installed $(TOOLS)/aiperf/.installed

$(TOOLS)/%/.installed: requirements/%.lock
	@echo "[load-tools] installing $* into $(TOOLS)/$*"
	@rm -rf $(TOOLS)/$* && $(PYTHON) -m venv $(TOOLS)/$*
	@$(TOOLS)/$*/bin/python requirements/install.py $< $(PIP_ARGS)
	@touch $@

## make load-test  both of them against a server on tiny random models (docs/load.md, about 3 minutes)
load-test: load-tools tiny
	@$(BIN)/python -m pytest tests/integration/test_load_tools.py

## make clients  clients of others, in environments of their own under $$SOMA_HOME/clients, for tests/clients (1.8 GB on disk, 9 minutes beside other work)
CLIENTS := $(or $(SOMA_HOME),$(HOME)/.cache/soma-vllm)/clients
clients: $(patsubst requirements/clients/%.lock,$(CLIENTS)/%/.installed,$(wildcard requirements/clients/*.lock)) $(CLIENTS)/node/.installed

$(CLIENTS)/%/.installed: requirements/clients/%.lock
	@echo "[clients] installing $* into $(CLIENTS)/$*"
	@rm -f $@ && { test -x $(CLIENTS)/$*/bin/python || $(PYTHON) -m venv $(CLIENTS)/$*; }
	@$(CLIENTS)/$*/bin/python requirements/install.py $< --no-compile $(PIP_ARGS)
	@touch $@

$(CLIENTS)/node/.installed: requirements/clients/node/package-lock.json requirements/clients/node/package.json
	@if ! command -v npm >/dev/null; then echo "[clients] found no npm: clients in JavaScript are left out"; \
	  elif test -e $@ && cmp -s $< $(@D)/$(<F); then touch $@; \
	  else echo "[clients] installing node into $(@D)" && rm -f $@ && mkdir -p $(@D) && cp $^ $(@D) \
	    && npm ci --prefix $(@D) --prefer-offline --fetch-retries=1 --fetch-timeout=60000 --no-audit --no-fund --loglevel=error && touch $@; fi

# Those that make test installs, in seconds each. Where the first cannot be, its tests say so and fail; those in JavaScript
# need npm and its registry, and are skipped without them, as the others are.
FEW_CLIENTS := agents
few-clients:
	@$(MAKE) --no-print-directory -k $(FEW_CLIENTS:%=$(CLIENTS)/%/.installed) $(CLIENTS)/node/.installed || true

## make gpu-rehearsal  every step of benchmarks/gpu on the CPU with tiny models (6 to 9 minutes on 2 idle cores, 16 on busy ones)
gpu-rehearsal: setup
	@bash benchmarks/gpu/rehearse.sh

## make lock    resolve requirements/*.in anew (needs the package index)
lock: setup
	@$(BIN)/python requirements/resolve.py

## make clean   remove .venv and outputs; models under $$SOMA_HOME stay
clean:
	rm -rf $(VENV) out build *.egg-info .mypy_cache .ruff_cache .pytest_cache
