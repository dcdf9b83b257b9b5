#!/usr/bin/env bash
# The GPU programme: four calls, for a card that is lent for minutes.
#
#   benchmarks/gpu_suite.sh tests   4 minutes: versions, every GPU test, whole steps of a 0.5B and a 1.5B model
#   benchmarks/gpu_suite.sh speed   5 minutes: sampling and the head
#   benchmarks/gpu_suite.sh beside  5 minutes: budgets, and a step beside the peers'
#   benchmarks/gpu_suite.sh critic  2 minutes: a step of PPO beside one of GRPO
#   DRY_RUN=1 ...                   the same commands with tiny sizes, on a CPU
#
# The most valuable comes first, each part has a time limit of its own (suite.py) and is saved as soon as it is there.
# Results go to OUT if that is set, which begins with those of this checkout, or else to RESULTS (benchmarks/results).
# PYTHON is the interpreter. Words after the call are passed on: names of parts, --again.
set -uo pipefail
cd "$(dirname "$0")/.."
call=${1:-}
case $call in tests | speed | beside | critic) shift ;; *) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
python=${PYTHON:-python}
results=${OUT:-${RESULTS:-benchmarks/results}}
tests_s=120 # most goes into compiling kernels: 790 tests took an H200's 16 cores 106 s
mkdir -p "$results"
[ -z "${OUT:-}" ] || cp benchmarks/results/nvidia-*.json "$results" 2>/dev/null
for folder in kernels benchmarks; do # links that an archive may have lost
    [ -e "lowmem_grpo/$folder" ] || ln -s "../$folder" "lowmem_grpo/$folder"
done

if [ "$call" = tests ] && [ $# -eq 0 ]; then
    found="$results/${DRY_RUN:+dry-run-}gpu-tests.txt"
    "$python" -m lowmem_grpo.benchmarks.measure | tee "$found"
    workers=$("$python" -c "import xdist" 2>/dev/null && echo "-n 11 --dist loadfile")
    # -v, since a run that is cut short prints no summary.
    timeout $tests_s "$python" -m pytest -v --tb=short -m gpu ${DRY_RUN:+--collect-only} $workers >>"$found" 2>&1
    echo "exit status $?" >>"$found"
    tail -n 40 "$found"
fi
"$python" -m lowmem_grpo.benchmarks --call "$call" --output_dir "$results" ${DRY_RUN:+--dry_run} "$@"
