#!/usr/bin/env bash
# Build .gpu/parts/ of this checkout: the packages that a machine with a GPU and without a package index lacks.
#
#   bash benchmarks/gpu/build_kit.sh     5 to 8 minutes on 2 cores; 400 MB of downloads, 1.5 GB of disk at times
#
# A part is built again only when its list of packages or the pruning changed; FORCE=1 builds both. PYTHON names
# the Python whose pip downloads (default: python3), PIP_ARGS further arguments of pip.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
gpu=$PWD/.gpu
build=$gpu/build
python=${PYTHON:-python3}
largest=${LARGEST_MIB:-64}
mkdir -p "$gpu/parts"

# Wheels for CPython 3.12 on x86-64. pip matches the version of glibc exactly, so each is named.
download() {  # TARGET ARGUMENT...
  local target=$1 platforms=() glibc; shift
  for glibc in 2_5 2_12 2_17 2_24 2_26 2_27 2_28 2_31 2_34 2_35; do
    platforms+=(--platform "manylinux_${glibc}_x86_64")
  done
  platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
  # shellcheck disable=SC2086  # PIP_ARGS are words
  "$python" -m pip download -qq --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp "${platforms[@]}" ${PIP_ARGS:-} -d "$target" "$@"
}

# Everything that decides what a part holds.
identity() {  # NUMBER
  cat "$here/pack.py" "$here/keep_sm90.py" "$here/packages_$1.txt" | sha256sum | cut -c1-16
}

part() {  # NUMBER: .gpu/parts/NUMBER.tar.xz
  local number=$1 archive=$gpu/parts/$1.tar.xz wheels=$build/wheels$1 site=$build/site$1 expected found
  if [ "${FORCE:-0}" = 0 ] && [ -s "$archive" ] &&
    [ "$(cat "$gpu/parts/$number.identity" 2>/dev/null)" = "$(identity "$number")" ]; then
    echo "[kit] part $number is up to date"
    return
  fi
  rm -rf "$wheels" "$site"
  mkdir -p "$wheels"
  echo "[kit] part $number: downloading"
  download "$wheels" -r "$here/packages_$number.txt"
  expected=$(grep -vc '^#' "$here/packages_$number.txt")
  found=$(find "$wheels" -name '*.whl' | wc -l)
  [ "$found" = "$expected" ] || { echo "[kit] found $found wheels; expected $expected" >&2; exit 1; }
  PYTHONDONTWRITEBYTECODE=1 "$python" "$here/pack.py" "$wheels" "$site"
  rm -rf "$wheels"
  echo "[kit] part $number: compressing $(du -sm "$site" | cut -f1) MiB, 1 to 3 minutes"
  tar -c --sort=name --owner=0 --group=0 --mtime=@0 -C "$site" . |
    nice -n 10 xz -c --x86 --lzma2=preset=6,dict=128MiB > "$archive.partial"
  mv "$archive.partial" "$archive"
  identity "$number" > "$gpu/parts/$number.identity"
  rm -rf "$site"
}

mib() { awk '{printf "%.1f", $1 / 1048576}'; }
bytes() { du -cb "$@" | tail -1 | cut -f1; }

part 1
part 2
rm -rf "$build"

tree=$(git ls-files -co --exclude-standard -z | du -cb --files0-from=- 2>/dev/null | tail -1 | cut -f1)
parts=$(bytes "$gpu/parts")
total=$(echo $((tree + parts)) | mib)
echo "[kit] parts: $(bytes "$gpu/parts/1.tar.xz" | mib) and $(bytes "$gpu/parts/2.tar.xz" | mib) MiB"
echo "[kit] $total MiB travel with the checkout's $(echo "$tree" | mib); LARGEST_MIB is $largest"
awk -v total="$total" -v largest="$largest" 'BEGIN {exit total > largest - 1}' || {
  echo "[kit] found $total MiB; expected at most $((largest - 1)): send part 1 with the first call and part 2" \
    "with the second" >&2
  exit 1
}
