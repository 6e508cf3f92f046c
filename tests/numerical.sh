#!/usr/bin/env bash
# Run the tests marked `numerical` under every instruction set that torch can use on this processor, with one and two
# threads, or under the combinations that are given: tests/numerical.sh default:2 avx2:1. torch chooses the instruction
# set when it is loaded, so each combination runs in its own process.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python

best=$(env -u ATEN_CPU_CAPABILITY $python -c 'import torch; print(torch.backends.cpu.get_cpu_capability())')
case $best in
    AVX512*) levels="default avx2 avx512" ;;
    AVX2*) levels="default avx2" ;;
    *) levels="default" ;;
esac
combinations=$*
if [ -z "$combinations" ]; then
    for level in $levels; do combinations+=" $level:1 $level:2"; done
fi
for combination in $combinations; do
    level=${combination%:*} threads=${combination#*:}
    if [[ " $levels " != *" $level "* ]]; then
        echo "=== numerical tests: this processor has no $level"
        continue
    fi
    echo "=== numerical tests: instruction set $level of $best, threads: $threads"
    workers=$([ "$threads" = 1 ] && echo auto || echo 0)
    ATEN_CPU_CAPABILITY=$level OMP_NUM_THREADS=$threads $python -m pytest tests/unit -m numerical -q \
        --numprocesses "$workers" --dist loadfile --durations=3
done
