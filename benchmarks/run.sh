#!/usr/bin/env bash
# The commands behind the published figures. METHOD is pretext, simclr, moco, byol, dino,
# ibot or dinov2; from the root:
#
#   bash benchmarks/run.sh METHOD shapes          the built-in set, 3 seeds, 2 CPU cores
#   bash benchmarks/run.sh METHOD cifar10-look    CIFAR-10 as a folder of files, a look on a CPU
#   bash benchmarks/run.sh METHOD cifar10         CIFAR-10, one GPU, 80 and 200 epochs, 3 seeds
#   bash benchmarks/run.sh METHOD imagenet        ImageNet, 8 GPUs; IMAGENET=folder with train/
#   bash benchmarks/run.sh METHOD throughput      images/s, parts of a step, streaming, one GPU
#   bash benchmarks/run.sh METHOD table           runs/METHOD-*/ -> rows of benchmarks/results.csv
#
# Options after that go to the command: `... simclr imagenet --batch-size 4096`. PYTHON, TORCHRUN,
# SEEDS, GPUS, CIFAR_FILES (<split>/<class>/*) and PHOTOS (a folder to stream) can be set, too.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
seeds=${SEEDS:-0 1 2}
method=${1:-} target=${2:-}
shift $(($# < 2 ? $# : 2))

shapes() {
    for seed in $seeds; do
        $python "$method.py" --seed "$seed" "$@"
    done
}

cifar10-look() { # a tenth of the images and epochs: shows that it learns, not how far it gets
    local arch=(--arch resnet10)
    case $method in ibot | dinov2) arch=(--arch vit_nano) ;; esac
    $python "$method.py" --dataset "${CIFAR_FILES:-data/cifar10-jpg}" --limit 5000 "${arch[@]}" \
        --epochs 20 --batch-size 256 --out "runs/$method-cifar10look-s0" "$@"
}

cifar10() {
    for epochs in 80 200; do
        for seed in $seeds; do
            $python "$method.py" --dataset cifar10 --epochs "$epochs" --compile --seed "$seed" \
                --out "runs/$method-cifar10-e$epochs-s$seed" "$@"
        done
    done
}

imagenet() { # one node; for several: TORCHRUN="torchrun --nnodes ... --rdzv-endpoint HOST:PORT"
    ${TORCHRUN:-torchrun --standalone} --nproc-per-node "${GPUS:-8}" "$method.py" --compile \
        --dataset "${IMAGENET:?set IMAGENET to the folder with train/ and val/}" \
        --out "runs/$method-imagenet-s0" "$@"
}

throughput() { # the recipes for small and for large images, and files if the folder is there
    local files=() photos=${PHOTOS:-data/clothing-160}
    [ -d "$photos" ] && files=(--folder "$photos")
    $python benchmarks/throughput.py "$method" --image-size 32 --compile --steps 50 \
        --images 50000 --eval-images 10000 --variants contiguous unfused eager max-autotune \
        --out "benchmarks/throughput-$method-32.csv" "$@"
    $python benchmarks/throughput.py "$method" --image-size 224 --compile --steps 20 \
        --images 2048 --variants contiguous unfused eager \
        --out "benchmarks/throughput-$method-224.csv" "${files[@]}" "$@"
}

table() {
    $python benchmarks/table.py --name "$method-*" --out benchmarks/results.csv "$@"
}

[ -f "$method.py" ] || target=
case $target in
shapes | cifar10-look | cifar10 | imagenet | throughput | table) "$target" "$@" ;;
*) sed -n '2,13s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
