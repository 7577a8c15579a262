#!/usr/bin/env bash
# NVIDIA's compute-sanitizer over the tests of the CUDA operators: reads and writes out of bounds (memcheck), races in
# shared memory (racecheck), reads of uninitialised memory (initcheck). Needs a GPU and the CUDA toolkit; about
# three minutes. Prints the last lines of each, and ends with status 1 if any found something.
#
#   benchmarks/sanitize_cuda.sh [LOG]        PYTHON=...: the interpreter (default .venv/bin/python)
#                                            SELECT=...: which tests (pytest's -k)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
log=${1:-build/sanitize_cuda.txt}
python=${PYTHON:-.venv/bin/python}
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
[ -x "$sanitizer" ] || { echo "no compute-sanitizer: install the CUDA toolkit, or set CUDA_HOME" >&2; exit 2; }
# Small scenes, and each operator forwards and backwards: a checked kernel takes a hundred times as long.
select=${SELECT:-"cuda and (float32_agrees or screen_gradient or hides_its or infinite_parameters or contiguous or l1_and_ssim \
  or sigma_from or project_and_its or empty_results)"}
tests=(tests/test_folded_rasterizer.py tests/test_general_rasterizer.py tests/test_losses.py)
mkdir -p "$(dirname "$log")"
: > "$log"
status=0
for tool in memcheck racecheck initcheck; do
  # Without torch's cache of memory every tensor is an allocation of its own, with an end that is looked at. Kernels of
  # torch's own are left out, but where writes count: a sort by CUB fills what our kernels read.
  only=(--kernel-regex kns=medgs)
  [ "$tool" != initcheck ] || only=()
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" "${only[@]}" --error-exitcode 99 \
    --target-processes all "$python" -m pytest -q -p no:cacheprovider "${tests[@]}" -k "$select" > "$log.part" 2>&1
  ended=$?
  { echo "== $tool: exit status $ended"; tail -n 4 "$log.part"; } | tee -a "$log"
  [ "$ended" -eq 0 ] || { status=1; grep -m 20 "=========" "$log.part"; }
done
rm -f "$log.part"
exit "$status"
