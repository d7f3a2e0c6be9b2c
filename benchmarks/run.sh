#!/usr/bin/env bash
# The commands behind the published figures, from the root:
#
#   bash benchmarks/run.sh METHOD SET             METHOD.py on a --dataset, 3 seeds
#   bash benchmarks/run.sh METHOD imagenet        ImageNet, 8 GPUs; IMAGENET=folder with train/
#   bash benchmarks/run.sh METHOD throughput      images/s, parts of a step, streaming, one GPU
#   bash benchmarks/run.sh METHOD table           runs/METHOD-*/ -> rows of benchmarks/results.csv
#
# Options after that go to the command: `... simclr imagenet --batch-size 4096`. PYTHON, TORCHRUN,
# SEEDS, GPUS and PHOTOS (a folder to stream) can be set, too. CIFAR-10 is in cifar10.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
method=${1:-} target=${2:-}
shift $(($# < 2 ? $# : 2))

seeds() {
    local seed
    for seed in ${SEEDS:-0 1 2}; do
        "$python" "$method.py" --dataset "$target" --seed "$seed" "$@"
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
    "$python" benchmarks/throughput.py "$method" --image-size 32 --compile --steps 50 --limit 4000 \
        --variants contiguous unfused untried eager max-autotune \
        --out "benchmarks/throughput-$method-32.csv" "$@"
    "$python" benchmarks/throughput.py "$method" --image-size 224 --compile --steps 20 \
        --variants contiguous unfused untried eager \
        --out "benchmarks/throughput-$method-224.csv" ${files[@]+"${files[@]}"} "$@"
}

table() {
    "$python" benchmarks/table.py --name "$method-*" --out benchmarks/results.csv "$@"
}

[ -f "$method.py" ] || target=
case $target in
imagenet | throughput | table) "$target" "$@" ;;
?*) seeds "$@" ;;
*) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
