"""Why MoCo shuffles batch norm: with shared statistics the network cheats (MoCo).

Slides: "Momentum Contrast (MoCo)" (the pretext task). Paper: v1, Section 3.3, "Shuffling BN", and
the appendix: without it the pretext accuracy rises to over 99.9 % in training and the k-NN top-1 on
validation images falls.

Query and key of an image are told from the keys in the queue by the statistics of the batch they
were normalised with, if both were in the same batch: the pretext task is solved without looking at
the image. With --bn-splits 1 they are. With s splits the permutation of the keys puts a query and
its key into different parts, which share about 1/s of their images.

    python lessons/moco_bn_leak.py                         4 short runs on `shapes`, 2 CPU cores
    python lessons/moco_bn_leak.py --dataset cifar10 --epochs 100 --splits 1 8 --batch-size 256

Options that are not listed in --help go to moco.py. Writes lessons/moco_bn_leak.csv, a line per run
and epoch, and lessons/moco_bn_leak.png: over the epochs, pretext accuracy in training (share of
queries whose own key has the largest logit of all 1 + K), and linear and k-NN top-1 of h, on
validation images, never on the test set. While the queue fills, its random keys are easy to tell.
Parts of few images are noisy statistics, which cost accuracy of their own: compare 1 with the
smallest number that is enough.
"""

import argparse
import json
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import moco

PANELS = {"pretext_top1": "pretext top-1 in training, %", "linear_top1": "linear top-1 of h, %",
          "knn_top1": "k-NN top-1 of h, %"}
KEYS = ("bn_splits", "seed", "epoch", "loss", *PANELS)


def run(argv, folder):
    """One run of moco.py -> its line for each epoch, with the pretext accuracy."""
    info_nce, right = moco.info_nce, []

    @torch.no_grad()
    def watched(q, k, queue):
        right.append(((q * k).sum(1) > (q @ queue).amax(1)).float().mean())

    def both(q, k, queue, tau):
        watched(q, k, queue)
        return info_nce(q, k, queue, tau)

    # The last epoch has been evaluated on validation images: no report on the test images.
    with mock.patch.multiple(moco, info_nce=both, report=lambda *_: {}):
        moco.main([*argv, "--eval-every", "1", "--out", str(folder)])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shares = 100 * torch.stack(right).view(len(rows), -1).mean(1)
    return [row | {"pretext_top1": share} for row, share in zip(rows, shares.tolist())]


def figure(path, rows):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("matplotlib is not installed: no picture")
    whole = Figure(figsize=(12, 3.6), layout="constrained")
    for ax, (key, label) in zip(whole.subplots(1, 3), PANELS.items()):
        for s in sorted({row["bn_splits"] for row in rows}):
            epochs = sorted({row["epoch"] for row in rows})
            values = [mean(rows, s, epoch, key) for epoch in epochs]
            ax.plot(epochs, values, ".-", label=f"bn-splits {s}" + ", the leak" * (s == 1))
        ax.set(xlabel="epoch", ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
    whole.axes[0].legend(fontsize=8)
    whole.savefig(path)


def mean(rows, splits, epoch, key):
    """Over the seeds."""
    values = [row[key] for row in rows if (row["bn_splits"], row["epoch"]) == (splits, epoch)]
    return sum(values) / len(values)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--splits", type=int, nargs="+", default=[1, 2, 4, 8], help="(1 2 4 8)")
    p.add_argument("--epochs", type=int, default=8, help="of each run (8)")
    p.add_argument("--seeds", type=int, default=1, help="number of seeds; the figure has means (1)")
    p.add_argument("--runs", default="runs/lessons/moco_bn_leak", help="folder of the runs")
    p.add_argument("--out", default=str(Path(__file__).parent), help="folder of CSV and PNG")
    args, others = p.parse_known_args(argv)
    rows = []
    for seed in range(args.seeds):
        for s in args.splits:
            folder = common.run_folder(f"{args.runs}/splits{s}-s{seed}", False)  # a free name
            own = ["--epochs", str(args.epochs), "--seed", str(seed)]
            found = run([*own, *others, "--bn-splits", str(s)], folder)
            rows += [row | {"bn_splits": s, "seed": seed} for row in found]
    if "linear_top1" not in rows[0]:
        common.fail("these images have no labels, there is nothing to probe for")
    lines = [KEYS] + [[f"{v:.5g}" if isinstance(v := row[k], float) else str(v) for k in KEYS]
                      for row in rows]
    common.write(f"{args.out}/moco_bn_leak.csv", "".join(",".join(line) + "\n" for line in lines))
    figure(f"{args.out}/moco_bn_leak.png", rows)
    print(f"\nafter {args.epochs} epochs" + "".join(f"{label:>31}" for label in PANELS.values()))
    for s in args.splits:
        print(f"bn-splits {s:<5}" + "".join(f"{mean(rows, s, args.epochs, k):31.1f}"
                                            for k in PANELS))


if __name__ == "__main__":
    main()
