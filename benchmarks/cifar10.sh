#!/usr/bin/env bash
# Everything behind the CIFAR-10 results, from the root; `all` is these stages in this order:
#
#   bash benchmarks/cifar10.sh STAGE ... [-- OPTIONS of every run]
#
#   throughput   images/s of all seven files at 32 and 224 pixels, parts of a step
#   supervised   the ceilings, ResNet-18 and ViT-Tiny with labels, 200 epochs
#   simclr80     SimCLR, 80 epochs
#   main         200 epochs: simclr moco byol, dino with a ResNet-18 and with the ViT of its recipe
#   rest         200 epochs: ibot dinov2 pretext (rotation)
#   long         1000 epochs: simclr moco byol, dino with a ResNet-18
#   table        all of runs/ -> benchmarks/cifar10.csv, and pictures beside it
#
# and, not in `all`, for a machine without a GPU:
#
#   cpu          the CPU recipes: 12 to 65 minutes per file on one core
#
# The others are for one GPU, with --compile. Finished runs are skipped, interrupted ones resumed,
# so the same command can be given again. Every method trained there is evaluated again with the 200
# neighbours of the published results (-k200-).
#
# DATA: a set or a folder <split>/<class>/* (cifar10). PYTHON, SEEDS ("0").
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} seeds=${SEEDS:-0} data=${DATA:-cifar10}
name=$(basename "$data")
# lightly's recipe for this network and set: SGD, batch norm in the head, no local crops
dino_resnet=(--arch resnet18 --optimizer sgd --lr 0.12 --weight-decay 5e-4 --weight-decay-end 5e-4
    --head-bn --out-dim 2048 --tau-t 0.04 --m 0.99 --local-crops 0)
order=(throughput supervised simclr80 main rest long table)
stages=()
while (($#)) && [ "$1" != -- ]; do
    [ "$1" = all ] && stages+=("${order[@]}") || stages+=("$1")
    shift
done
options=("${@:2}")

run() { # FOLDER COMMAND ...
    local out=$1 resume=()
    shift
    if [ -f "$out/results.json" ]; then
        echo "$out is finished: skipped"
        return
    fi
    # a run killed before its first last.pt starts over in the same folder
    if [ -f "$out/last.pt" ]; then resume=(--resume); else rm -f "$out/args.json"; fi
    "$python" "$@" --out "$out" ${resume[@]+"${resume[@]}"} ${options[@]+"${options[@]}"}
}

train() { # METHOD NAME EPOCHS OPTIONS ...
    local seed out=runs/$2-$name-e$3
    local command=("$1.py" --dataset "$data" --epochs "$3" "${@:4}")
    for seed in $seeds; do
        run "$out-s$seed" "${command[@]}" --compile --seed "$seed"
        run "$out-k200-s$seed" "${command[@]}" --seed "$seed" --eval "$out-s$seed/last.pt" \
            --knn-k 200 --knn-tau 0.1
    done
}

throughput() {
    local method
    for method in simclr moco byol dino ibot dinov2 pretext; do
        if [ -f "benchmarks/throughput-$method-224.csv" ]; then # written last
            echo "benchmarks/throughput-$method-224.csv is there: skipped"
        else
            bash benchmarks/run.sh "$method" throughput ${options[@]+"${options[@]}"}
        fi
    done
}

supervised() {
    local seed method
    for seed in $seeds; do
        for method in simclr dino; do
            run "runs/supervised-$method-$name-e200-s$seed" benchmarks/supervised.py "$method" \
                --dataset "$data" --epochs 200 --compile --seed "$seed"
        done
    done
}

simclr80() {
    train simclr simclr 80
}

main() {
    local method
    for method in simclr moco byol; do train "$method" "$method" 200; done
    train dino dino-resnet18 200 "${dino_resnet[@]}"
    train dino dino 200
}

rest() {
    local method
    for method in ibot dinov2 pretext; do train "$method" "$method" 200; done
}

long() {
    local method
    for method in simclr moco byol; do train "$method" "$method" 1000; done
    train dino dino-resnet18 1000 "${dino_resnet[@]}"
}

cpu() { # the recipe that each file takes without a GPU, and the ceilings
    local seed method
    for seed in $seeds; do
        for method in simclr moco byol pretext dino ibot dinov2; do
            run "runs/$method-$name-cpu-s$seed" "$method.py" --dataset "$data" --device cpu \
                --seed "$seed"
        done
        run "runs/supervised-simclr-$name-cpu-s$seed" benchmarks/supervised.py simclr --device cpu \
            --dataset "$data" --arch convnet_wide --epochs 10 --batch-size 256 \
            --seed "$seed"
        run "runs/supervised-dino-$name-cpu-s$seed" benchmarks/supervised.py dino --device cpu \
            --dataset "$data" --epochs 12 --lr 2e-3 --batch-size 128 --seed "$seed"
    done
}

table() {
    local csv=benchmarks/cifar10.csv
    "$python" benchmarks/table.py --name "*$name*" --out $csv
    if grep -q -- "^[^,]*-$name-e" $csv; then
        "$python" benchmarks/figure.py --csv $csv --name "*-$name-e*" --peers \
            --out "benchmarks/$name.png"
    fi
    if grep -q -- "^[^,]*-$name-cpu," $csv; then
        "$python" benchmarks/course.py --name "*-$name-cpu-s*" --out "benchmarks/$name-cpu"
    fi
}

for stage in ${stages[@]+"${stages[@]}"}; do
    [[ " ${order[*]} cpu " == *" $stage "* ]] || stages=()
done
if ((${#stages[@]} == 0)); then
    sed -n '2,22s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
for stage in "${stages[@]}"; do "$stage"; done
