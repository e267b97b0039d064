#!/usr/bin/env bash
# From nothing to a trained model: set up, train micro on scikit-learn's handwritten digits, evaluate, draw the curves.
# It may be run again: a training that was stopped carries on, one that is done is only evaluated.
#
#     bash scripts/quickstart.sh [more flags of main.py for the training, as --opts TRAIN.EPOCHS 2]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements-quickstart.txt

python scripts/make_digits.py quickstart/digits
# 1, 2, 4, 8 ... processes, which divide the 32 images of a step: one for each GPU, or two on the CPU
processes=$(python -c 'import torch; gpus = min(torch.cuda.device_count(), 32) or 2; print(1 << gpus.bit_length() - 1)')
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the CPU processes share the cores
run() { python scripts/launch.py --standalone --nproc_per_node "$processes" main.py --cfg configs/micro.yaml --output quickstart "$@"; }
results=quickstart/crossformer_micro/digits

start=$SECONDS
run --data-path quickstart/digits --tag digits --batch-size $((32 / processes)) "$@"
seconds=$((SECONDS - start))
run --data-path quickstart/digits --tag digits_eval --eval --resume $results/checkpoints/best.pth
python scripts/plot_curves.py $results

top1=$(tail -n 1 quickstart/crossformer_micro/digits_eval/metrics.jsonl | python -c 'import json; print("%.2f" % json.loads(input())["top1"])')
cat <<TXT

Top-1 on the digits: $top1 % (training took $seconds s on $processes processes, this time)
Curves:   $results/curves.png   (tensorboard --logdir $results/tensorboard)
Results:  $results

Next, ImageNet on 8 GPUs:
    torchrun --nproc_per_node 8 main.py --cfg configs/small.yaml --data-path /imagenet
TXT
