#!/usr/bin/env bash
# The second call: soma-serve as a whole, and training beside serving, in at most 300 s; on a fresh machine too.
# environment.sh lists its variables.
#
#   bash benchmarks/gpu/call2.sh
TOTAL=${TOTAL:-295}
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [ ! -e "$KIT_MODELS/go.json" ]; then  # a fresh machine
  step check 50 check.py
  for variant in default tuned; do
    step "lora_correct_$variant" 40 lora_correct.py --variant "$variant" &
  done
fi
step models 60 models.py --which pair
wait
step serve 190 serve.py
step beside 90 beside.py
note "call 2 done"
tail -c 9000 "$OUT/results.jsonl"
