# Sourced by call1.sh and call2.sh: folders, environment, and how a step is run. Nothing is written outside
# $OUT, $KIT_HOME, $KIT_MODELS and what soma-serve itself keeps under $SOMA_HOME.
#
#   OUT         results.jsonl, log.txt and serve.txt; .gpu/out by default
#   SOMA_HOME   as for soma-serve; ~/.cache/soma-vllm by default
#   KIT_HOME    unpacked packages, models and caches, kept from call to call; $SOMA_HOME/gpu by default
#   KIT_MODELS  the models, 6 GB; $KIT_HOME/models by default (a folder in memory loads them faster)
#   TOTAL       seconds that the whole call may take
#   ONLY        names of the steps to run, separated by blanks; all by default
#   UNPACK      0: the environment has all packages already
#   DEVICE, TINY, SLOW  cpu, --tiny and a factor on all time limits: for rehearsals
KIT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$KIT/../.." || exit 1
export SOMA_HOME=${SOMA_HOME:-$HOME/.cache/soma-vllm}
export KIT_HOME=${KIT_HOME:-$SOMA_HOME/gpu}
export OUT=${OUT:-$PWD/.gpu/out} KIT_MODELS=${KIT_MODELS:-$KIT_HOME/models}
site=$KIT_HOME/site
export PYTHONPATH=$site:$PWD PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# Nothing is downloaded while steps run.
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 RAY_USAGE_STATS_ENABLED=0
# FlashInfer does not travel. The libraries hold blanked kernels, so each may be read only when it is launched.
export VLLM_USE_FLASHINFER_SAMPLER=0 CUDA_MODULE_LOADING=LAZY VLLM_WORKER_MULTIPROC_METHOD=spawn
# Loopback is the only network.
export VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo
# An engine's first start compiles Triton kernels for more than a minute; the next ones find them here.
export VLLM_CACHE_ROOT=$KIT_HOME/vllm TRITON_CACHE_DIR=$KIT_HOME/triton
export TORCHINDUCTOR_CACHE_DIR=$KIT_HOME/inductor
mkdir -p "$OUT" "$site" "$KIT_MODELS"
device=(--device "${DEVICE:-cuda}" ${TINY:+"$TINY"})

began=$(date +%s)
elapsed() { echo $(($(date +%s) - began)); }
note() { echo "[kit $(elapsed) s] $*" | tee -a "$OUT/log.txt"; }
record() { printf '{"step": "%s", "what": "%s"%s}\n' "$@" >> "$OUT/results.jsonl"; }

# step NAME SECONDS SCRIPT ARGUMENT...: steps/SCRIPT as a process group of its own under a time limit. The next
# step follows whatever the outcome. One with less than half its time left does not begin; that is recorded.
step() {
  local name=$1 limit=$(($2 * ${SLOW:-1})) script=$KIT/steps/$3 left start code=0
  shift 3
  [[ -z ${ONLY:-} || " $ONLY " == *" $name "* ]] || return 0
  left=$((${TOTAL:-600} - $(elapsed) - 4))
  if ((left < limit / 2)); then
    note "$name: skipped, $left s are left; expected $limit"
    record "$name" skipped ""
    return 0
  fi
  ((left < limit)) && limit=$left
  note "$name: begins, at most $limit s"
  start=$(date +%s)
  # A step ends by itself some seconds before its limit, with the figures that it has.
  timeout -k 3 "$limit" python3 "$script" "${device[@]}" "$@" --budget "$((limit - 6))" \
    >> "$OUT/log.txt" 2>&1 || code=$?
  record "$name" ended ", \"rc\": $code, \"seconds\": $(($(date +%s) - start))"
  note "$name: ended with $code after $(($(date +%s) - start)) s"
}

# The project's entry points, read from the checkout's own setup.py: vLLM finds its plugins by them.
entry_points() {
  python3 setup.py -q egg_info --egg-base "$site" >> "$OUT/log.txt" 2>&1 ||
    note "no entry points: setup.py egg_info failed, log.txt says why"
}

# The parts side by side, then byte code for all of it in the background.
unpack() {
  if [ -e "$site/.ready" ]; then note "unpacked already"; return 0; fi
  local part running=()
  for part in .gpu/parts/*.tar.xz; do
    { tar -xJf "$part" -C "$site" 2> /dev/null ||
      python3 -c "import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])" "$part" "$site"; } &
    running+=($!)
  done
  wait "${running[@]}"
  touch "$site/.ready"
  (python3 -m compileall -q -j 8 "$site/vllm" "$site" > /dev/null 2>&1 &)
  note "unpacked $(du -sm "$site" | cut -f1) MiB"
}

if [ "${UNPACK:-1}" = 1 ]; then unpack; fi
entry_points
