#!/usr/bin/env bash
# Everything behind the CIFAR-10 figures, from the root; stages in this order are `all`:
#
#   bash benchmarks/cifar10.sh STAGE ... [-- OPTIONS of every run]
#
#   throughput   images/s of all seven files at 32 and 224 pixels, parts of a step
#   supervised   the ceilings, ResNet-18 and ViT-Tiny with labels, 200 epochs
#   simclr80     SimCLR, 80 epochs
#   main         200 epochs: simclr moco byol, dino with a ResNet-18 and with the ViT of its recipe
#   rest         200 epochs: ibot dinov2 pretext (rotation)
#   long         1000 epochs: simclr moco byol, dino with a ResNet-18
#   look         small networks on 10,000 images, 20 epochs: 10 to 25 minutes a file on a CPU
#   table        all of runs/ -> benchmarks/cifar10.csv, and pictures beside it
#
# All but look and table are for one GPU. What is finished is left alone and what was cut goes on
# where it was, so the same command can be given again. Every run but those of look is evaluated a
# second time with the 200 neighbours of the published figures (-k200-).
#
# DATA: a set or a folder <split>/<class>/* (cifar10; look: data/cifar10-jpg). PYTHON, SEEDS ("0").
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} seeds=${SEEDS:-0} data=${DATA:-cifar10}
name=$(basename "$data")
# lightly's for this network and set: SGD, batch norm in the head, no local crops
dino_resnet=(--arch resnet18 --optimizer sgd --lr 0.12 --weight-decay 5e-4 --weight-decay-end 5e-4
    --head-bn --out-dim 2048 --tau-t 0.04 --m 0.99 --local-crops 0)
order=(throughput supervised simclr80 main rest long look table)
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
    if [ -f "$out/last.pt" ]; then resume=(--resume); fi
    $python "$@" --out "$out" "${resume[@]}" "${options[@]}"
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
        if [ -f "benchmarks/throughput-$method-224.csv" ]; then # the last that is written
            echo "benchmarks/throughput-$method-224.csv is there: skipped"
        else
            bash benchmarks/run.sh "$method" throughput "${options[@]}"
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

look() { # networks and heads as in the recipes of the built-in set
    # of 5e-4, 2e-3 and 4e-3 for the ViT with labels the first was worst on validation images
    local seed method own convnet=(--arch convnet)
    local vit=(--arch vit_nano --patch-size 8 --drop-path 0)
    local command=(--dataset "${DATA:-data/cifar10-jpg}" --limit 10000 --epochs 20 --batch-size 128)
    for seed in $seeds; do
        for method in simclr moco byol pretext dino ibot dinov2; do
            case $method in
            dino) own=(--out-dim 512 --head-bn --tau-t 0.04) ;;
            ibot) own=(--out-dim 512 --head-bn --tau-t 0.04 --tau-t-patch 0.04) ;;
            dinov2) own=(--out-dim 128 --tau-t 0.01 --koleo 0.02 --layer-scale 1) ;;
            pretext) own=("${convnet[@]}" --epochs 8) ;; # of four turned images
            *) own=("${convnet[@]}") ;;
            esac
            case $method in
            dino | ibot | dinov2) own+=("${vit[@]}" --local-crops 0 --hidden 512 --lr 4e-3) ;;
            esac
            run "runs/$method-cifar10look-s$seed" "$method.py" "${command[@]}" --eval-every 5 \
                "${own[@]}" --seed "$seed"
        done
        run "runs/supervised-simclr-cifar10look-s$seed" benchmarks/supervised.py simclr \
            "${command[@]}" "${convnet[@]}" --seed "$seed"
        run "runs/supervised-dino-cifar10look-s$seed" benchmarks/supervised.py dino \
            "${command[@]}" "${vit[@]}" --lr 2e-3 --seed "$seed"
    done
}

table() {
    local csv=benchmarks/cifar10.csv
    $python benchmarks/table.py --name '*cifar10*' --out $csv
    if grep -q -- "^[^,]*-$name-e" $csv; then
        $python benchmarks/figure.py --csv $csv --name "*-$name-e*" --peers \
            --out "benchmarks/$name.png"
    fi
    if grep -q -- "^[^,]*-cifar10look," $csv; then
        $python benchmarks/figure.py --csv $csv --name '*-cifar10look' \
            --out benchmarks/cifar10look.png
    fi
}

for stage in "${stages[@]}"; do
    [[ " ${order[*]} " == *" $stage "* ]] || stages=()
done
if ((${#stages[@]} == 0)); then
    sed -n '2,20s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
for stage in "${stages[@]}"; do "$stage"; done
