#!/usr/bin/env bash
# From nothing to a trained model: set up, train a small network, evaluate, write a report; and show what it finds.
# It may be run again: a training that was stopped carries on, one that is done is only evaluated.
#
#     bash scripts/quickstart.sh                 the classes of scikit-learn's handwritten digits
#     bash scripts/quickstart.sh segmentation    the pixels of cell nuclei (examples/nuclei)
#     bash scripts/quickstart.sh detection       cell nuclei one by one
#
# More words are flags of main.py for the training, as --opts TRAIN.EPOCHS 2.
set -euo pipefail
cd "$(dirname "$0")/.."
data=examples/nuclei batch=4 most=4 # images of a step, and processes that share them at most
case "${1:-}" in
'' | -*)
    tag=digits data=quickstart/digits batch=32 most=32 cfg=configs/micro.yaml network=crossformer_micro
    metric=top1 called='Top-1 on the digits' next='ImageNet' command='configs/small.yaml --data-path /imagenet'
    ;;
segmentation)
    tag=nuclei batch=8 cfg=$data/nuclei.yaml network=semantic_fpn_crossformer_micro metric=miou called='mIoU of the nuclei'
    next='ADE20K' command='configs/segmentation/upernet_small.yaml --data-path /ade20k --pretrained crossformer-s.pth'
    ;;
detection)
    tag=nuclei cfg=$data/mask_rcnn.yaml network=mask_rcnn_crossformer_micro metric=box_ap called='Box AP of the nuclei'
    next='COCO' command='configs/detection/mask_rcnn_small.yaml --data-path /coco --pretrained crossformer-s.pth'
    ;;
*)
    echo "error: there is no quick start $1; say nothing (for digits), segmentation or detection" >&2
    exit 2
    ;;
esac
[[ ${1:--} = -* ]] || shift
. scripts/environment.sh requirements-quickstart.txt

[ $tag = nuclei ] || python scripts/make_digits.py $data
# 1, 2, 4, 8 ... processes, which divide the images of a step: one for each GPU, or two on the CPU
processes=$(python -c "import torch; gpus = min(torch.cuda.device_count(), $most) or 2; print(1 << gpus.bit_length() - 1)")
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the CPU processes share the cores
run() { python scripts/launch.py --standalone --nproc_per_node "$processes" main.py --cfg $cfg --data-path $data --output quickstart "$@"; }
results=quickstart/$network/$tag

start=$SECONDS
run --tag $tag --batch-size $((batch / processes)) "$@"
seconds=$((SECONDS - start))
run --tag $tag --eval --report --resume $results/checkpoints/best.pth
python scripts/report.py $results
if [ $tag = nuclei ]; then
    python predict.py --checkpoint $results/checkpoints/best.pth $data/images/val --overlay quickstart/found --sheet quickstart/found.png >quickstart/found.txt
fi

result=$(tail -n 1 $results/metrics.jsonl | python -c "import json; print('%.2f' % json.loads(input())['$metric'])")
cat <<TXT

$called: $result % (training took $seconds s on $processes processes, this time)
Report:   $results/report.html   (a page: curves, classes, what it gets wrong)
Results:  $results
$([ $tag = digits ] || echo "Found:    quickstart/found.png, and each image in quickstart/found")
Next, $next on 8 GPUs:
    torchrun --nproc_per_node 8 main.py --cfg $command
TXT
