"""Why MoCo shuffles batch norm: with shared statistics the network cheats (MoCo).

Slides: "Momentum Contrast (MoCo)" (the pretext task). Paper: v1, Section 3.3, "Shuffling BN", and
Appendix A.9: without it the pretext accuracy rises to over 99.9 % in training and the k-NN top-1 on
validation images falls.

If query and key of an image were normalised in the same batch, its statistics tell them from the
keys in the queue, and the pretext task is solved without looking at the image. With --bn-splits 1
they are. With s splits the permutation of the keys puts a query and its key into different parts,
which share about 1/s of their images.

    python lessons/moco_bn_leak.py
    python lessons/moco_bn_leak.py --dataset cifar10 --epochs 100 --splits 1 8 --batch-size 256

Options that are not listed in --help go to moco.py. Writes lessons/moco_bn_leak.csv, a line per run
and evaluation, and lessons/moco_bn_leak.png: over the epochs, pretext accuracy in training (share
of queries whose own key has the largest logit of all 1 + K), and linear and k-NN top-1 of h, on
validation images. While the queue fills, its random keys are easy to tell. Parts of few images are
noisy statistics, which cost accuracy of their own: compare 1 with the smallest number that is
enough.
"""

import functools
import sys
from pathlib import Path

import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import moco
from lessons import shared

CLAIM = "Shared batch statistics give the key away: the pretext task gets easier, h worse"
PANELS = {
    "pretext_top1": "pretext top-1 in training, %",
    "linear_top1": "linear top-1 of h, %",
    "knn_top1": "k-NN top-1 of h, %",
}


class PretextRun(common.Run):
    """A run that also logs in how many percent of the queries the own key has the largest logit."""

    def restore(self, state):
        super().restore(state)
        self.queue, self.vectors = state["queue"], {}
        for name in ("net", "net_ema"):  # f_q, f_k
            state[name].register_forward_hook(functools.partial(self.keep, name))

    def keep(self, name, net, inputs, outputs):
        self.vectors[name] = F.normalize(outputs[1].detach().float())

    def update(self, optimizer, scaler, loss):  # while the queue is that of the loss
        order = moco.permutation(self.args, self.step, self.device)
        q, k = self.vectors["net"], self.gather(self.vectors["net_ema"])[order.argsort()]
        own = (q * k.chunk(self.world)[self.rank]).sum(1)
        others = (q @ self.queue).amax(1)
        self.pretext_top1 = 100 * (own > others).float().mean()
        return super().update(optimizer, scaler, loss)

    def log(self, ok, **figures):
        super().log(ok, **figures, pretext_top1=self.pretext_top1)


def draw(whole, means):
    """A line for each number of parts; means: a row for each of them and evaluation."""
    rows = [row | {"line": named(row["bn_splits"])} for row in means]
    for ax, (key, label) in zip(whole.subplots(1, 3), PANELS.items()):
        shared.lines(ax, rows, "line", "epoch", key)
        ax.set(ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
        if f"untrained_{key}" in rows[0]:
            shared.floor(ax, rows[0][f"untrained_{key}"])
    whole.axes[0].legend(fontsize=8)


def named(splits):
    return "one batch norm (the leak)" if splits == 1 else f"{splits} parts, shuffled"


def answer(means):
    """At the end: one part against the next number of parts."""
    last = [row for row in means if row["epoch"] == means[-1]["epoch"]]
    leak, shuffled = last[0], last[1]
    easier = shared.compare(leak, shuffled, "pretext_top1") > 0
    worse = all(shared.compare(leak, shuffled, k) < 0 for k in ("linear_top1", "knn_top1"))
    a, b = (", ".join(f"{row[k]:.1f}" for k in PANELS) for row in (leak, shuffled))
    return shared.answer(easier and worse, (
        f"pretext top-1, linear probe and k-NN of h end at {a} % in one part and at {b} % in "
        f"{shuffled['bn_splits']}."))


def report(own, rows):
    """The table and the figure of the runs until now."""
    keys = ["loss", *PANELS, "untrained_linear_top1", "untrained_knn_top1"]
    shared.write_csv(f"{own.out}/moco_bn_leak.csv", rows, ["bn_splits", "seed", "epoch", *keys])
    means = shared.over_seeds(rows, ["bn_splits", "epoch"], keys)
    shared.figure(f"{own.out}/moco_bn_leak.png", (12, 4), draw, means, claim=CLAIM,
                  answer=answer(means))
    shared.show([row for row in means if row["epoch"] == own.epochs], ["bn_splits", *keys])


def main(argv=None):
    p = shared.parser(__doc__, "moco_bn_leak", epochs=8)
    p.add_argument("--splits", type=int, nargs="+", default=[1, 2, 4], help="(1 2 4)")
    own, options = p.parse_known_args(argv)
    if len(own.splits) < 2:
        common.fail("--splits: give two numbers at least, they are compared")
    options = ["--eval-every", max(own.epochs // 4, 1), *options]
    rows = []
    for seed in range(own.seeds):
        floor = {}
        for splits in own.splits:
            flags = [*options, "--bn-splits", splits]
            _, data, run = shared.train(moco, own, f"splits {splits}", seed, flags, PretextRun)
            if not data.labelled:
                common.fail("these images have no labels, there is nothing to probe for")
            floor = floor or shared.untrained(moco, data, run)
            for row in run.rows:
                if "verdict" in row:
                    rows.append(row | floor | {"bn_splits": splits, "seed": seed})
        report(own, rows)


if __name__ == "__main__":
    main()
