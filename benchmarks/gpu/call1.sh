#!/usr/bin/env bash
# The first call: kernels, training and engine, in at most 400 s. environment.sh lists its variables.
#
#   bash benchmarks/gpu/call1.sh
#
# What the run of docs/results/gpu.md did not reach comes early; the last steps are the first to drop out.
TOTAL=${TOTAL:-395}
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
timeout 20 nvidia-smi >> "$OUT/log.txt" 2>&1

step check 60 check.py
# None of these is timed, and compiling Triton kernels is the processor's work: they run side by side.
step models 50 models.py --which small &
for variant in default tuned one-stage narrow; do
  sleep 0.1
  step "lora_correct_$variant" 55 lora_correct.py --variant "$variant" &
done
wait
step engine_lora_graphs 140 engine.py --lora --graphs
step engine_plain_graphs 70 engine.py --graphs
step lora_cost 80 lora_cost.py
step training 60 training.py --which small
step engine_lora_eager 90 engine.py --lora
step training_large 60 training.py --which large
note "call 1 done"
tail -c 9000 "$OUT/results.jsonl"
