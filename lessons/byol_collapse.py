"""What keeps BYOL from collapsing, with no negatives (BYOL, SimSiam).

Slides: "How does BYOL work?" (predictor, moving average); "What's special about BYOL?": no
negatives, though the same vector for all images is a perfect solution. Papers: BYOL, Section 5 (it
collapses with m = 0 or no predictor) and Appendix I on a near-optimal predictor (m = 0 works if the
predictor learns faster); SimSiam (Chen & He 2020, arXiv 2011.10566), Section 4 (predictor and
stop-gradient are needed, the moving average is not).

A low loss does not mean that all is well: a network that collapses has the lowest. Look at z, and
at how good h is. BYOL with m = 0 is SimSiam: the target is the online network itself.

    python lessons/byol_collapse.py
    python lessons/byol_collapse.py --dataset cifar10 --limit 50000 --epochs 50

Options that are not listed in --help go to byol.py. Writes lessons/byol_collapse.csv, a line per
run and evaluation, and lessons/byol_collapse.png: the loss over training, and, on validation
images, the spread of z (1: all over the sphere, 0: one point) and the k-NN top-1 of h.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import byol
import common
from lessons import shared

CLAIM = "Without the predictor or the stop-gradient BYOL collapses, with the lowest loss of all"
RUNS = {
    "BYOL": [],
    "SimSiam (m = 0)": ["--m", "0"],
    "no predictor": ["--no-predictor"],
    "no stop-gradient": ["--no-stop-gradient"],
}
PANELS = {"loss": "loss", "spread": "spread of z", "knn_top1": "k-NN top-1 of h, %"}
TOP1 = ["linear_top1", "knn_top1", "untrained_knn_top1"]  # of h, none without labels
KEYS = ["run", "seed", "epoch", "loss", "spread", "rank_z", "alignment", "uniformity", "rank_h",
        *TOP1, "verdict"]


def draw(whole, means):
    """A line for each run; means: a row for each run and evaluation."""
    panels = {k: title for k, title in PANELS.items() if k in means[0]}
    levels = {"loss": (2.0, "nothing learned"), "spread": (0.1, "a point")}
    if "knn_top1" in panels:
        levels["knn_top1"] = means[0]["untrained_knn_top1"], "untrained network"
    for ax, (key, title) in zip(whole.subplots(1, len(panels)), panels.items()):
        shared.lines(ax, means, "run", "epoch", key)
        shared.floor(ax, *levels[key])
        ax.set(title=title)
        if key == "loss":  # a collapsed network's is close to 0
            ax.set_yscale("log")
        else:
            ax.set_ylim(bottom=0)
    whole.axes[0].legend(fontsize=8, loc="center right")


def answer(means):
    """Which runs end with z at a point?"""
    last = {row["run"]: row for row in means if row["epoch"] == means[-1]["epoch"]}
    spreads = ", ".join(f"{name} {row['spread']:.2f}" for name, row in last.items())
    cut = [row for name, row in last.items() if name.startswith("no ")]
    uncut = [row for name, row in last.items() if not name.startswith("no ")]
    whole, *_ = uncut
    holds = all(row["spread"] < 0.1 and shared.compare(row, other, "loss") < 0
                for row in cut for other in uncut)
    text = f"spread of z at the end: {spreads}"
    if "knn_top1" in whole:
        holds = holds and all(shared.compare(row, whole, "knn_top1") < 0 for row in cut)
        k_nn = ", ".join(f"{row['knn_top1']:.0f}" for row in last.values())
        floor = whole["untrained_knn_top1"]
        text += f"; k-NN of h, in the same order: {k_nn} % (untrained {floor:.0f})"
    return shared.answer([holds and whole["spread"] >= 0.1], text + ".")


def report(own, rows):
    """The table and the figure of the runs so far."""
    keys = [k for k in KEYS if k in rows[0]]
    shared.write_csv(f"{own.out}/byol_collapse.csv", rows, keys)
    means = shared.over_seeds(rows, ["run", "epoch"], keys[3:-1])
    width = 4 * len([k for k in PANELS if k in keys])
    shared.figure(f"{own.out}/byol_collapse.png", (width, 4), draw, means, claim=CLAIM,
                  answer=answer(means))
    shown = [k for k in ("run", "loss", "spread", *TOP1) if k in keys]
    shared.show([row for row in means if row["epoch"] == own.epochs], shown)


def main(argv=None):
    p = shared.parser(__doc__, "byol_collapse", epochs=12)
    p.add_argument("--limit", **common.FROM_1, default=2000, help="training images (2000)")
    own, options = p.parse_known_args(argv)
    options = ["--limit", own.limit, "--eval-every", max(own.epochs // 4, 1), *options]
    rows = []
    for seed in range(own.seeds):
        floor = {}
        for name, flags in RUNS.items():
            _, data, run = shared.train(byol, own, name, seed, [*options, *flags])
            floor = floor or shared.untrained(byol, data, run)
            same = {"run": name, "seed": seed} | floor
            for row in run.rows:
                if "verdict" in row:
                    rows.append(row | same | {"verdict": row["verdict"].split(":")[0]})
        report(own, rows)


if __name__ == "__main__":
    main()
