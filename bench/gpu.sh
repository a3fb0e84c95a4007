#!/bin/sh
# What undula does on an accelerator, in at most six minutes: the laws there, steps and memory of training on a base of
# Llama-3-8B's shape, decoding with 16 and 64 adapters.  Builds and downloads nothing; needs torch, transformers and (for
# its kernels) triton beside undula; the laws need pytest, the comparison needs peft, each where it is installed.
#
#     sh bench/gpu.sh                  # prints one table
#     sh bench/gpu.sh --keep           # and writes bench/results/gpu-CARD.json
#     sh bench/gpu.sh --try            # tiny, on the CPU: whether the program runs
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
device=cuda small="" rounds=7 keep=""
for word in "$@"; do
    case $word in
        --keep) keep=--keep ;;
        --try) device=cpu small=--tiny rounds=1 ;;
        *) echo "gpu.sh takes --keep and --try, found $word" >&2; exit 2 ;;
    esac
done
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT
failed=0

run() { # NAME SECONDS COMMAND...: what it says stays in the table; one that fails or takes too long is told
    name=$1 limit=$2
    shift 2
    timeout "$limit" "$@" 2>"$out/$name.err" | tee "$out/$name.txt"
    [ -f "$out/$name.json" ] || { echo "FAILED: $name (not done in $limit s, or:)"; tail -5 "$out/$name.err"; failed=1; }
}

if ! $PYTHON -c "import torch, sys; sys.exit(not ('$device' == 'cpu' or torch.cuda.is_available()))"; then
    echo "torch finds no $device here: nothing was run" >&2
    exit 3
fi
if $PYTHON -c "import pytest" 2>/dev/null && [ "$device" != cpu ]; then
    UNDULA_DEVICE=$device timeout 110 $PYTHON -m pytest -q --few 3 tests/laws/test_laws.py tests/laws/test_kernels.py \
        tests/laws/test_routes.py tests/laws/test_triton.py >"$out/laws.txt" 2>&1 || failed=1
    tail -15 "$out/laws.txt"
else
    echo "the laws were not run: no pytest, or a trial on the CPU"
fi
run step 150 $PYTHON bench/step.py --device $device $small --rounds $rounds --threads 1 --json "$out/step.json"
run decode 80 $PYTHON bench/decode.py --device $device $small --json "$out/decode.json"
$PYTHON bench/gpu_table.py "$out" $keep || failed=1
exit $failed
