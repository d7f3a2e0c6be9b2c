"""What the projection head discards, and why it is dropped (SimCLR).

Slides: "Explain in simple terms why we drop the projection head when moving to downstream tasks",
and "What did we learn from SimCLR?": a nonlinear head helps the model learn better representations.
Paper: Section 4.2, Figure 8: mlp > linear > none, and h is better than z = g(h) by over 10 points;
Table 3: h reveals which transformation was applied to an image, z much less.

The loss asks z to be the same for both views, so it discards what the augmentation changes (flips
change the horizontal position x, jitter the lightness, crops position and size), whether or not a
downstream task needs it. With a head in between, only g has to discard it and h may keep it;
without one, h discards it. Here the hidden factors of the built-in set are read from both by ridge
regression, and the class by a linear probe: R^2 and top-1 on validation images.

    python lessons/head.py
    python lessons/head.py --epochs 20 --seeds 5

Options that are not listed in --help go to simclr.py. Writes lessons/head.csv, a line per run, and
lessons/head.png.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import simclr
from lessons import shared

CLAIM = "The head g discards what flips and jitter change, so h does not have to"
HEADS = ["none", "linear", "mlp"]
FACTORS = ["x", "y", "radius", "lightness"]
OF = ["untrained", "h", "z"]
BARS = {"untrained": "h, untrained", "none": "h, trained without head", "h": "h, with head",
        "z": "z = g(h)"}
TOP1 = {"linear_top1": "h", "head_linear_top1": "z = g(h)"}


def r2(fit, val, penalty=1e-3):
    """R^2 of ridge regression on val; each part: features (n, d), goals (n, F) -> (F,)."""
    (x, y), (x_val, y_val) = fit, val
    mean, std, centre = x.mean(0), x.std(0) + 1e-6, y.mean(0)
    x, x_val = (x - mean) / std, (x_val - mean) / std
    ridge = penalty * len(x) * torch.eye(x.shape[1], device=x.device)
    w = torch.linalg.solve(x.T @ x + ridge, x.T @ (y - centre))
    wrong = (x_val @ w + centre - y_val).square().sum(0)
    return 1 - wrong / (y_val - y_val.mean(0)).square().sum(0)


def hidden_factors(net, data, run):
    """R^2 of every factor in h and z of the network, and in h of the untrained one."""
    *_, factors = common.toys(len(data.train.labels), run.args.image_size, seed=0)
    y = torch.stack([factors[k] for k in FACTORS], 1).to(run.device)
    net.eval()
    floor = simclr.build(run.args).to(run.device).eval()
    view = simclr.central(run.args.image_size)
    parts = []
    for images, index in data.splits(test=False):
        h, z, untrained, _ = common.embed(lambda x: (*net(*x), floor(*x)[0]), (images, index), view,
                                          run)
        parts.append(({"h": h, "z": z, "untrained": untrained}, y[index.to(y.device)]))
    scores = {}
    for name in OF:
        found = r2(*[(features[name], goals) for features, goals in parts])
        scores |= {f"{name}_{k}": v for k, v in zip(FACTORS, found.tolist())}
    return scores


KEYS = [*TOP1, "untrained_linear_top1", *[f"{name}_{k}" for name in OF for k in FACTORS]]


def draw(whole, means):
    """means: a row for each head."""
    left, right = whole.subplots(1, 2, width_ratios=[2.2, 1])
    mlp, rows = means[-1], []
    for k in FACTORS:
        row = {"factor": k}
        for name in OF:
            row |= {name: mlp[f"{name}_{k}"], f"{name}_sd": mlp[f"{name}_{k}_sd"]}
        rows.append(row | {"none": means[0][f"h_{k}"], "none_sd": means[0][f"h_{k}_sd"]})
    shared.bars(left, rows, "factor", BARS, hatched=["z"], fmt="%.2f")
    left.set(ylabel="R² of ridge regression", title="hidden factors (head: MLP)")
    left.legend(fontsize=8, ncols=4, loc="upper center")
    shared.bars(right, means, "head", TOP1, hatched=["head_linear_top1"])
    shared.floor(right, mlp["untrained_linear_top1"])
    right.set(ylabel="linear probe, top-1, %", title="class", xlabel="g during training")
    right.legend(fontsize=8, ncols=2, loc="upper center")


def answer(means):
    """Do z, and h without a head, say less than h about what flips and jitter change?"""
    mlp, none = means[-1], means[0]
    parts, lost = [], []
    for k in FACTORS:
        h, z = f"h_{k}", f"z_{k}"
        parts.append(f"{k} {mlp[h]:.2f}, {mlp[z]:.2f}, {none[h]:.2f}")
        if shared.compare(mlp, mlp, h, z) > 0 and shared.compare(mlp, none, h) > 0:
            lost.append(k)
    better = {1: "better than", 0: "as good as", -1: "worse than"}
    return shared.answer([{"x", "lightness"} <= {*lost}], (
        f"R² in h, in z and in h without a head: {'; '.join(parts)}. For the class h is "
        f"{better[shared.compare(mlp, none, 'linear_top1')]} without a head "
        f"({mlp['linear_top1']:.1f} and {none['linear_top1']:.1f} %)."))


def report(own, rows):
    """The table and the figure of the runs so far."""
    shared.write_csv(f"{own.out}/head.csv", rows, ["head", "seed", "epochs", *KEYS])
    means = shared.over_seeds(rows, ["head"], KEYS)
    shared.figure(f"{own.out}/head.png", (11, 4.3), draw, means, claim=CLAIM, answer=answer(means))
    shared.show(means, ["head", *TOP1, *[f"{name}_x" for name in OF]])


def main(argv=None):
    p = shared.parser(__doc__, "head", epochs=6)
    p.add_argument("--dataset", choices=[common.BUILT_IN], help="whose hidden factors are known")
    own, options = p.parse_known_args(argv)
    shared.refuse(options, "--labelled")
    rows = []
    for seed in range(own.seeds):
        for head in HEADS:
            net, data, run = shared.train(simclr, own, head, seed, [*options, "--head", head])
            rows.append(vars(run.args) | run.rows[-1] | shared.untrained(simclr, data, run)
                        | hidden_factors(net, data, run))
        report(own, rows)


if __name__ == "__main__":
    main()
