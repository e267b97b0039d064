#!/usr/bin/env bash
# Measure and test on one GPU in less than ten minutes, and write the tables of docs/performance.md.
#
#     bash scripts/gpu_report.sh [DATA_PATH [SHARDS]]
#
# DATA_PATH holds class folders of JPEGs, train/CLASS/*.jpg; SHARDS, what prepare_imagenet.py has made of them (made
# here where it is not given, which suits a sample and not all of ImageNet). Uses the python on PATH and no network.
# Figures, logs and report.md go to output/gpu_report. Exit status: 1 when a part has failed, 2 without a GPU.
set -uo pipefail
[ $# -ge 1 ] && data=$(realpath "$1") || data=
[ $# -ge 2 ] && shards=$(realpath "$2") || shards=
cd "$(dirname "$0")/.."
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: python on PATH has no torch that sees a GPU, and this report is about one" >&2
    exit 2
fi
if [ -n "$data" ] && [ ! -d "$data/train" ]; then
    echo "error: $data has no folder train/ with class folders of JPEGs" >&2
    exit 2
fi
output=output/gpu_report
rm -rf "$output"
mkdir -p "$output"
failed=0
deadline=570 # seconds for everything

# part NAME SECONDS COMMAND...: its output goes to NAME.log; one that fails or takes longer does not keep the others
part() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) began=$SECONDS
    shift 2
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 15 ]; then
        echo "$name: left out, for want of time"
        failed=1
    elif timeout --signal INT --kill-after 10 "$limit" "$@" >"$output/$name.log" 2>&1; then
        echo "$name: done in $((SECONDS - began)) s"
    else
        echo "$name: failed with status $? after $((SECONDS - began)) s (124: out of time); the end of $output/$name.log:"
        tail -n 15 "$output/$name.log"
        failed=1
    fi
}

half=(--precision bf16 --output "$output" --repeats 2)
part model 200 python scripts/benchmark.py model "${half[@]}" --batch-sizes 256 512 --models \
    crossformer_small plain_crossformer_small swin_tiny crossformer_base plain_crossformer_base swin_small \
    crossformer_large crossformerpp_small
part step 80 python scripts/benchmark.py step "${half[@]}" --batch-sizes 256 --models crossformer_small
part checkpoint 30 python scripts/benchmark.py checkpoint --output "$output" --repeats 3

if [ -n "$data" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir "$work/source"
    ln -s "$data/train" "$work/source/train"
    # A sample may have no images of its own to validate on, which nothing here does, but which the trainer asks for
    [ -d "$data/val" ] && ln -s "$data/val" "$work/source/val" || ln -s "$data/train" "$work/source/val"
    if [ -z "$shards" ]; then
        shards=$work/shards
        part shards 60 python scripts/prepare_imagenet.py "$work/source" "$shards" --short-side 320
        # A sample is repeated, else an epoch would end every few steps; its images then come from the page cache
        made=("$shards"/train/*.tar)
        images=$(for tar in "${made[@]}"; do tar tf "$tar"; done | wc -l)
        for ((copy = 1; images > 0 && copy < 20000 / images; copy++)); do
            for tar in "${made[@]}"; do cp "$tar" "${tar%.tar}-copy$copy.tar"; done
        done
    fi
    if [ $((deadline - SECONDS)) -lt 60 ]; then
        echo "training: left out, for want of time"
        failed=1
    else
        # Stopped by SIGTERM, to the process alone: its loader processes are to end with it and not before
        timeout --foreground --signal TERM --kill-after 30 40 python main.py --cfg configs/small.yaml \
            --data-path "$shards" --batch-size 256 --output "$output" --tag end_to_end --opts AMP bf16 \
            DATA.NUM_WORKERS "$(nproc)" TRAIN.EVAL_EVERY_EPOCHS 300 TRAIN.AUTO_RESUME False PRINT_FREQ 5 \
            >"$output/training.log" 2>&1
        if grep -q "stopped by SIGTERM" "$output/training.log"; then
            echo "training: done in 40 s"
        else
            echo "training: failed; the end of $output/training.log:"
            tail -n 15 "$output/training.log"
            failed=1
        fi
    fi
    part data 100 python scripts/benchmark.py data --data-path "$work/source" --prepared "$shards" --workers "$(nproc)" \
        --batches 20 --repeats 3 --output "$output"
fi

# Last, with the time that is left: most of it goes by in compiling
part tests 300 python -m pytest -m gpu -n 8 --dist load -q --continue-on-collection-errors tests/test_gpu.py tests/test_optimizer.py

python scripts/benchmark.py report --output "$output" --page docs/performance.md || failed=1
exit "$failed"
