#!/usr/bin/env bash
# The GPU programme: eight calls, for a card that is lent for minutes.
#
#   benchmarks/gpu_suite.sh tests     4 minutes: versions, every GPU test, whole steps of a 0.5B and a 1.5B model
#   benchmarks/gpu_suite.sh decode    5 minutes: tests of sampling's kernels; steps by kernel, overlapping, and uneven
#   benchmarks/gpu_suite.sh update    4 minutes: tests of a layer's pass; updates by outlines and by the model's own layers
#   benchmarks/gpu_suite.sh speed     3 minutes: sampling from a 7B, and the head
#   benchmarks/gpu_suite.sh beside    5 minutes: budgets, and a step beside the peers'
#   benchmarks/gpu_suite.sh critic    4 minutes: a step of PPO beside one of GRPO; a 7B in 6 GB
#   benchmarks/gpu_suite.sh families  5 minutes: tests that no GPU has run; sampling from a hybrid and two mixtures
#   benchmarks/gpu_suite.sh fit       5 minutes: a step of each of those within a budget; choices of products
#   DRY_RUN=1 ...                     the same commands with tiny sizes, on a CPU
#
# The most valuable comes first, each part has a time limit of its own (suite.py) and is saved as soon as it is there.
# Results go to OUT if that is set, which begins with those of this checkout, or else to RESULTS (benchmarks/results).
# PYTHON is the interpreter. Words after the call are passed on: names of parts, --again.
set -uo pipefail
cd "$(dirname "$0")/.."
call=${1:-}
case $call in tests | decode | update | speed | beside | critic | families | fit) shift ;; *) sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
python=${PYTHON:-python}
results=${OUT:-${RESULTS:-benchmarks/results}}
tests_s=120 # most goes into compiling kernels: 790 tests took an H200's 16 cores 106 s
decode_s=70 # 487 of them
decode="tests/test_decode_layer.py tests/test_nf4_product.py tests/test_decode_attention.py tests/test_sample_tokens.py
tests/test_int8_product.py tests/test_head_8bit.py"
update_s=60
update="tests/test_layer_pass.py tests/test_outlined.py"
new_s=60
new="tests/test_gpu_runs.py::test_a_run_that_goes_on_is_the_run_that_was_not_stopped
tests/test_expert_product.py tests/test_delta_step.py tests/test_sinks.py tests/test_experts.py"
mkdir -p "$results"
[ -z "${OUT:-}" ] || cp benchmarks/results/nvidia-*.json "$results" 2>/dev/null
for folder in kernels benchmarks; do # links that an archive may have lost
    [ -e "lowmem_grpo/$folder" ] || ln -s "../$folder" "lowmem_grpo/$folder"
done

run_tests() { # seconds, name of the file, how xdist hands out tests, and words for pytest
    found="$results/${DRY_RUN:+dry-run-}$2.txt" limit=${DRY_RUN:+0}
    "$python" -m lowmem_grpo.benchmarks.measure | tee "$found"
    workers=$("$python" -c "import xdist" 2>/dev/null && echo "-n 11 --dist $3")
    # A run that is cut short says why tests failed only if it is interrupted.
    timeout -s INT -k 10 "${limit:-$1}" "$python" -m pytest -v --tb=short -m gpu ${DRY_RUN:+--collect-only} $workers \
        "${@:4}" >>"$found" 2>&1
    echo "exit status $?" >>"$found"
    grep -E "^(FAILED|ERROR) " "$found"
    tail -n 40 "$found"
}
if [ $# -eq 0 ]; then
    [ "$call" != tests ] || run_tests $tests_s gpu-tests loadfile
    [ "$call" != decode ] || run_tests $decode_s gpu-tests-decode load $decode
    [ "$call" != update ] || run_tests $update_s gpu-tests-update load $update
    # Most of these compile kernels, and four are whole runs in one file.
    [ "$call" != families ] || run_tests $new_s gpu-tests-families load $new
fi
"$python" -m lowmem_grpo.benchmarks --call "$call" --output_dir "$results" ${DRY_RUN:+--dry_run} "$@"
