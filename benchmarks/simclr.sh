#!/usr/bin/env bash
# The commands behind the published figures of simclr.py. From the root of the project:
#
#   bash benchmarks/simclr.sh shapes           the built-in set, 3 seeds, 2 CPU cores
#   bash benchmarks/simclr.sh cifar10-look     CIFAR-10 as a folder of files, a look on a CPU
#   bash benchmarks/simclr.sh clothing         photographs: in memory against streamed
#   bash benchmarks/simclr.sh cifar10          CIFAR-10, one GPU, 80 and 200 epochs
#   bash benchmarks/simclr.sh imagenet         ImageNet, 8 GPUs; IMAGENET=folder with train/ and val/
#   bash benchmarks/simclr.sh throughput       images/s, parts of a step, streaming
#   bash benchmarks/simclr.sh table            runs/*/results.json -> benchmarks/simclr.csv
#
# PYTHON, SEEDS, CIFAR_FILES, CLOTHING and IMAGENET can be set in the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
seeds=${SEEDS:-0 1 2}
cifar_files=${CIFAR_FILES:-data/cifar10-jpg} # <split>/<class>/*.jpg
clothing=${CLOTHING:-data/clothing-160}

shapes() {
    for seed in $seeds; do
        $python simclr.py --seed "$seed"
    done
}

cifar10_look() { # a tenth of the images and epochs: shows that it learns, not how far it gets
    $python simclr.py --dataset "$cifar_files" --limit 5000 --arch resnet10 --epochs 20 \
        --batch-size 256 --out runs/simclr-cifar10look-s0
}

clothing() { # the same run twice: only where the images come from differs
    for way in "memory 8" "streamed 0"; do
        read -r name gigabytes <<<"$way"
        $python simclr.py --dataset "$clothing" --image-size 64 --arch resnet10 --stem 7x7 \
            --optimizer sgd --lr 0.3 --weight-decay 1e-4 --blur 0 --epochs 10 --batch-size 128 \
            --memory-limit "$gigabytes" --out "runs/simclr-clothing-$name-s0"
    done
}

cifar10() {
    for epochs in 80 200; do
        for seed in $seeds; do
            $python simclr.py --dataset cifar10 --epochs "$epochs" --compile --seed "$seed" \
                --out "runs/simclr-cifar10-e$epochs-s$seed"
        done
    done
}

imagenet() { # one node; for several add --nnodes, --rdzv-backend c10d and --rdzv-endpoint HOST:PORT
    ${TORCHRUN:-torchrun} --standalone --nproc-per-node "${GPUS:-8}" simclr.py \
        --dataset "${IMAGENET:?set IMAGENET to the folder with train/ and val/}" \
        --batch-size 4096 --lr 0.3 --epochs 100 --compile --workers 16 \
        --out runs/simclr-imagenet-s0
}

throughput() { # the small recipe on a GPU, and files if the folder is there
    local files=()
    [ -d "$clothing" ] && files=(--folder "$clothing")
    $python benchmarks/throughput.py --image-size 32 --compile --steps 50 --images 50000 \
        --eval-images 10000 --variants contiguous unfused eager max-autotune \
        --out benchmarks/throughput-32.csv
    $python benchmarks/throughput.py --image-size 224 --compile --steps 20 --images 2048 \
        --variants contiguous unfused eager --out benchmarks/throughput-224.csv "${files[@]}"
}

table() {
    $python benchmarks/table.py --name 'simclr-*' --out benchmarks/simclr.csv
}

case ${1:-} in
shapes | clothing | cifar10 | imagenet | throughput | table) "$1" ;;
cifar10-look) cifar10_look ;;
*) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
