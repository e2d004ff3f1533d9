#!/usr/bin/env bash
# Run every step of the calls on the CPU with tiny models.
#
#   bash benchmarks/gpu/rehearse.sh [1|2]...     both by default; 6 to 9 minutes on 2 idle cores, 16 on busy
#
# Needs make setup. Ends with "wrong: 0", or with what is wrong and exit code 1: the package has changed, and a
# step has to follow. Figures and logs stay in .gpu/rehearsal/out/.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
folder=$PWD/.gpu/rehearsal
rm -rf "$folder"
mkdir -p "$folder/out"
export PATH=${VENV:-$PWD/.venv}/bin:$PATH KIT_HOME=$folder OUT=$folder/out KIT_MODELS=$folder/models
export DEVICE=cpu TINY=--tiny UNPACK=0 OMP_NUM_THREADS=1 SLOW=3 TOTAL=1500
[ $# -gt 0 ] || set -- 1 2
for call in "$@"; do
  echo "[rehearsal] call $call"
  nice -n 10 bash "$here/call$call.sh" > "$OUT/call$call.txt" 2>&1 || true
done
python3 "$here/rehearsal/judge.py" "$OUT/results.jsonl"
