"""Why does BYOL not collapse? What happens without each of its parts (BYOL, SimSiam).

Slides: "How does BYOL work?" (predictor, moving average); "What's special about BYOL?": no
negatives, though the same vector for all images is a perfect solution. Papers: BYOL, Section 5 (m =
0 collapses, as does no predictor) and Appendix I on a near-optimal predictor (m = 0 works where the
predictor learns faster); SimSiam (Chen & He 2020, arXiv 2011.10566), Section 4 (predictor and
stop-gradient are needed, the moving average is not).

A low loss does not mean that all is well: a network that collapses has the lowest. Look at z.

    python lessons/collapse.py
    python lessons/collapse.py --dataset cifar10 --epochs 50 --seeds 3

Options that are not listed in --help go to byol.py. Writes lessons/collapse.csv, a line per run and
epoch, and lessons/collapse.png: over training the loss, the spread of z (1: all over the sphere, 0:
at a point) and the k-NN top-1 of h. All figures are of validation images, never of the test set.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
import byol
import common
from lessons import shared

RUNS = {
    "BYOL": [],
    "no predictor": ["--no-predictor"],
    "m = 0": ["--m", "0"],
    "m = 0, predictor x 10": ["--m", "0", "--predictor-lr-scale", "10"],
    "no stop-gradient": ["--no-stop-gradient"],
}
PANELS = {"loss": "loss", "spread": "spread of z", "knn_top1": "k-NN of h, validation top-1, %"}
TOP1 = ["linear_top1", "knn_top1", "untrained_knn_top1"]  # of h, none without labels
KEYS = ["run", "seed", "epoch", "loss", "spread", "rank_z", "alignment", "uniformity", "rank_h",
        *TOP1, "verdict"]


def untrained(data, run):
    """k-NN of the network as it was at first."""
    if not data.labelled:
        return {}
    net = byol.build(run.args).to(run.device).eval()
    view = byol.central(run.args.image_size)
    fit, val = [common.embed(lambda x: net(*x)[:1], part, view, run) for part in data.splits(False)]
    return {"untrained_knn_top1": common.knn(fit, val, k=run.args.knn_k, tau=run.args.knn_tau)}


def draw(whole, means):
    """A line for each run; means: a row for each run and epoch."""
    panels = {k: title for k, title in PANELS.items() if k in means[0]}
    levels = {"loss": (2.0, "nothing learned"), "spread": (0.1, "a point")}
    if "knn_top1" in panels:
        levels["knn_top1"] = means[0]["untrained_knn_top1"], "untrained network"
    for ax, (key, title) in zip(whole.subplots(1, len(panels)), panels.items()):
        shared.lines(ax, means, "run", "epoch", key)
        level, label = levels[key]
        ax.axhline(level, ls=":", c="grey")
        ax.annotate(label, (1, level), fontsize=8, color="grey", va="bottom")
        ax.set(title=title)
        ax.set_ylim(bottom=0)
    whole.axes[0].legend(fontsize=8)


def main(argv=None):
    p = shared.parser(__doc__, "collapse", epochs=6)
    p.add_argument("--limit", type=int, default=2000, help="training images (2000)")
    own, options = p.parse_known_args(argv)
    options = ["--limit", own.limit, "--eval-every", 1, *options]
    rows = []
    for seed in range(own.seeds):
        for name, flags in RUNS.items():
            _, data, run = shared.train(byol, own, name, seed, [*options, *flags])
            same = {"run": name, "seed": seed} | untrained(data, run)
            for row in run.rows:
                rows.append(row | same | {"verdict": row["verdict"].split(":")[0]})
    keys = [k for k in KEYS if k in rows[0]]
    shared.write_csv(f"{own.out}/collapse.csv", rows, keys)
    means = shared.over_seeds(rows, ["run", "epoch"], keys[3:-1])
    width = 4.5 * len([k for k in PANELS if k in keys])
    shared.figure(f"{own.out}/collapse.png", (width, 4), draw, means)
    shown = [k for k in ("run", "seed", "loss", "spread", *TOP1, "verdict") if k in keys]
    shared.show([row for row in rows if row["epoch"] == own.epochs], shown)


if __name__ == "__main__":
    main()
