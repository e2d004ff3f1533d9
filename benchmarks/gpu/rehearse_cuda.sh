#!/usr/bin/env bash
# Does the CUDA build in .gpu/parts/ load beside the packages of the machine with the GPU? Needs no GPU.
#
#   bash benchmarks/gpu/rehearse_cuda.sh     about 8 minutes, 2.5 GB of downloads, 7 GB in .gpu/rehearsal_cuda/
#
# Worth it after packages_*.txt, pack.py or rehearsal/image.txt changed. PYTHON312 names a Python 3.12, PIP_ARGS
# further arguments of pip. Needs gcc.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
folder=$PWD/.gpu/rehearsal_cuda
python=$folder/venv/bin/python
read -ra pip_args <<< "${PIP_ARGS:-}"
mkdir -p "$folder/stub" "$folder/models"
if [ ! -e "$folder/venv/.installed" ]; then
  "${PYTHON312:-python3.12}" -m venv "$folder/venv"
  nice -n 10 "$python" -m pip install -qq --no-cache-dir "${pip_args[@]}" -r "$here/rehearsal/image.txt"
  touch "$folder/venv/.installed"
fi
rm -rf "$folder/site"
mkdir "$folder/site"
for part in .gpu/parts/*.tar.xz; do tar -xJf "$part" -C "$folder/site"; done
"$python" setup.py -q egg_info --egg-base "$folder/site"

# The driver's library, as far as the loader wants to see it.
cat > "$folder/stub/libcuda.c" << 'STUB'
int cuGetProcAddress_v2(const char *name, void **at, int version, unsigned long long flags, int *status) {
  *at = 0;
  return 500;
}
int cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) { return 500; }
int cuTensorMapEncodeTiled(void) { return 500; }
STUB
gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$folder/stub/libcuda.so.1" "$folder/stub/libcuda.c"

export LD_LIBRARY_PATH=$folder/stub PYTHONPATH=$folder/site:$PWD:$here/steps PYTHONDONTWRITEBYTECODE=1
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_HOST_IP=127.0.0.1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
export OUT=$folder KIT_MODELS=$folder/models CUDA_VISIBLE_DEVICES=
rm -f "$OUT/results.jsonl"
run() {
  echo "[rehearsal] $*"
  nice -n 10 timeout 300 "$python" "$@"
}
run "$here/steps/models.py" --device cpu --tiny --which small
run "$here/rehearsal/imports.py"
run "$here/rehearsal/pretend_h100.py" "$KIT_MODELS/small"
run "$here/steps/training.py" --device cpu --tiny
run "$here/rehearsal/trimmed_ray.py" "$KIT_MODELS/small"
# vLLM's own Triton kernels in Triton's interpreter, which wants an older numpy (about a minute).
rm -rf "$folder/numpy"
"$python" -m pip install -qq --no-cache-dir --no-deps "${pip_args[@]}" --target "$folder/numpy" numpy==2.2.6
export PYTHONPATH=$folder/numpy:$PYTHONPATH TRITON_INTERPRET=1
run "$here/steps/lora_correct.py" --device cpu --tiny --budget 200
run "$here/rehearsal/judge.py" "$OUT/results.jsonl"
echo "[rehearsal] good; rm -r .gpu/rehearsal_cuda frees its 7 GB"
