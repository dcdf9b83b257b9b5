#!/usr/bin/env bash
# The whole GPU programme: the tests that need a GPU, then every part of the suite, the most valuable first.
#
#   benchmarks/gpu_suite.sh             again and again until it says "all done": a call ends within ALLOWED_S (540) seconds
#   benchmarks/gpu_suite.sh PART ...    these parts alone
#   DRY_RUN=1 benchmarks/gpu_suite.sh   the same commands with tiny sizes, on a CPU
#
# Results go to RESULTS (benchmarks/results), which is also where a later call sees what is done; OUT, if set, gets a copy.
set -uo pipefail
cd "$(dirname "$0")/.."
begun=$SECONDS
options=()
allowed=${ALLOWED_S:-540}
results=${RESULTS:-benchmarks/results}
python=${PYTHON:-python}
mkdir -p "$results"
for folder in kernels benchmarks; do # links that an archive may have lost
    [ -e "lowmem_grpo/$folder" ] || ln -s "../$folder" "lowmem_grpo/$folder"
done
copy() { [ -z "${OUT:-}" ] || cp -r "$results/." "$OUT/"; }
trap copy EXIT

tests="$results/gpu-tests.txt"
if [ -n "${DRY_RUN:-}" ]; then
    options=(--dry_run)
    tests="$results/dry-run-gpu-tests.txt"
fi
# Once, and with half of the time, so that every call has some for the rest: `rm` its file to have it again.
if [ $# -eq 0 ] && [ ! -e "$tests" ]; then
    # Most of their time goes into compiling kernels; -v, since a run that is cut short prints no summary.
    workers=$("$python" -c "import xdist" 2>/dev/null && echo "-n 8 --dist loadfile")
    timeout $((allowed / 2)) "$python" -m pytest -v --tb=short -m gpu ${DRY_RUN:+--collect-only} $workers >"$tests.part" 2>&1
    echo "exit status $?" >>"$tests.part"
    mv "$tests.part" "$tests"
    tail -n 40 "$tests"
fi
left=$((allowed - SECONDS + begun))
"$python" -m lowmem_grpo.benchmarks --output_dir "$results" --allowed_s "$left" "${options[@]}" "$@"
