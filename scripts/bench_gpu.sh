#!/usr/bin/env bash
# Measures everything on a machine with one GPU, in runs of ten minutes: the same command goes on where it was.
#
#   bash scripts/bench_gpu.sh FOLDER [REFERENCE]
#
# FOLDER gets results.json and results.md (1.3B and 14B, 512x512 and 480x832, 1, 2 and 4 steps, both decoders),
# goldens_*.txt, traced/ (the costliest kernels, and the profiler's files) and, with the environment that
# scripts/reference_venv.sh made, reference.json. BUDGET is the seconds after which nothing new is started (default 540).
#
# On a machine without a network, first bring what it lacks:
#   pip download --dest wheels ".[cuda13]"           # where there is a network, same Python and processor
#   pip install --no-index --find-links wheels svd2-jax
set -euo pipefail
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "usage: bash scripts/bench_gpu.sh FOLDER [REFERENCE]" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
reference=${2:+$(cd "$2" && pwd)}
budget=${BUDGET:-540}
export SVD2_CACHE=${SVD2_CACHE:-$out/programs}
cd "$root"
svd2() { python -c 'from svd2_jax.cli import entry_point; entry_point()' "$@"; }
left() { echo $((budget - SECONDS)); }

# once FILE COMMAND...: runs it unless it was done, and keeps what it prints; false where the time is up or it failed.
once() {
  local file=$1
  shift
  [ -s "$out/$file" ] && return
  if [ "$(left)" -le 0 ]; then
    return 1
  fi
  echo "$file"
  if ! "$@" >"$out/$file.part"; then
    echo "failed: see $out/$file.part" >&2
    return 1
  fi
  mv "$out/$file.part" "$out/$file"
}

failed=0
for dtype in float32 bfloat16; do
  once "goldens_$dtype.txt" svd2 verify tests/goldens --dtype "$dtype" || failed=1
done
python scripts/bench_gpu.py --out "$out" --budget "$(left)"
if [ -n "$reference" ]; then
  # Both sides need room on the card.
  XLA_PYTHON_CLIENT_MEM_FRACTION=0.4 once reference.txt svd2 bench --restart --checkpoint random:wan-1.3b \
    --dtype bfloat16 --height 512 --width 512 --repeats 5 --part encode --part tick --part decode-wan \
    --part decode-taehv --part stream --against reference --reference "$reference" --json "$out/reference.json" || failed=1
fi
if [ "$(left)" -gt 0 ]; then
  python scripts/bench_gpu.py --out "$out/traced" --model wan-1.3b --size 512x512 --steps 2 --trace --budget "$(left)"
fi
if [ "$(left)" -le 0 ]; then
  echo "the time is up; the same command goes on with what is left"
fi
exit "$failed"
