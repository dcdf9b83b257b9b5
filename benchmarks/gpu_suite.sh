#!/usr/bin/env bash
# The GPU programme: five calls, for a card that is lent for minutes, the first two for what it has to measure first.
#
#   benchmarks/gpu_suite.sh update    tests of a layer's pass; updates by outlines, the head, steps of 0.5B and 1.5B
#   benchmarks/gpu_suite.sh critic    tests of experts; PPO beside GRPO, overlapping kernels, mixtures in budgets
#   benchmarks/gpu_suite.sh families  tests of sampling's kernels; sampling from a hybrid and two mixtures, products
#   benchmarks/gpu_suite.sh tests     every GPU test; uneven completions, budgets
#   benchmarks/gpu_suite.sh beside    a step beside the peers', sampling from a 7B
#   DRY_RUN=1 ...                     the same commands with tiny sizes, on a CPU
#
# Each takes at most 4 minutes and a half after everything has been imported, once, in up to half a minute. Tests begin
# then, and beside them what measures memory alone, and what is timed after them runs once for its kernels. Each part
# has a time limit of its own (suite.py) and is saved as soon as it is there, the most valuable first.
# Results go to OUT if that is set, which begins with those of this checkout, or else to RESULTS (benchmarks/results).
# PYTHON is the interpreter. Words after the call are passed on, without tests: names of parts, --again.
set -uo pipefail
cd "$(dirname "$0")/.."
call=${1:-}
case $call in update | critic | families | tests | beside) shift ;; *) sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
export python=${PYTHON:-python}
export results=${OUT:-${RESULTS:-benchmarks/results}}
tests_s=190 # 1,143 tests took an H200's 16 cores 177 s
update_s=75
update="tests/test_layer_pass.py tests/test_outlined.py"
critic_s=75
critic="tests/test_gpu_runs.py::test_a_run_that_goes_on_is_the_run_that_was_not_stopped
tests/test_expert_product.py tests/test_delta_step.py tests/test_sinks.py tests/test_experts.py"
families_s=75
families="tests/test_decode_layer.py tests/test_nf4_product.py tests/test_decode_attention.py
tests/test_sample_tokens.py tests/test_int8_product.py tests/test_head_8bit.py"
mkdir -p "$results"
[ -z "${OUT:-}" ] || cp benchmarks/results/nvidia-*.json "$results" 2>/dev/null
for folder in kernels benchmarks; do # links that an archive may have lost
    [ -e "lowmem_grpo/$folder" ] || ln -s "../$folder" "lowmem_grpo/$folder"
done

run_tests() { # seconds, name of the file, and words for pytest
    found="$results/${DRY_RUN:+dry-run-}$2.txt" limit=${DRY_RUN:+0}
    "$python" -m lowmem_grpo.benchmarks.measure | tee "$found"
    workers=$("$python" -c "import xdist" 2>/dev/null && echo "-n 11 --dist load")
    # A run that is cut short says why tests failed only if it is interrupted.
    timeout -s INT -k 10 "${limit:-$1}" "$python" -m pytest -v --tb=short -m gpu ${DRY_RUN:+--collect-only} $workers \
        "${@:3}" >>"$found" 2>&1
    echo "exit status $?" >>"$found"
    grep -E "^(FAILED|ERROR) " "$found"
    tail -n 40 "$found"
}
export -f run_tests
beside=
if [ $# -eq 0 ]; then
    case $call in
        update) beside="run_tests $update_s gpu-tests-update $update" ;;
        critic) beside="run_tests $critic_s gpu-tests-critic $critic" ;;
        families) beside="run_tests $families_s gpu-tests-families $families" ;;
        tests) beside="run_tests $tests_s gpu-tests" ;;
    esac
fi
# Words of a list are on lines of their own, which ended the command.
"$python" -m lowmem_grpo.benchmarks --call "$call" --output_dir "$results" ${beside:+--beside "${beside//$'\n'/ }"} \
    ${DRY_RUN:+--dry_run} "$@"
