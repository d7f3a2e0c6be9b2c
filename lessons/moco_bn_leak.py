"""Why MoCo shuffles batch norm: with shared statistics the network cheats (MoCo).

Slides: "Momentum Contrast (MoCo)" (the pretext task). Paper: v1, Section 3.3, "Shuffling BN", and
Appendix A.9: without it the pretext accuracy rises to over 99.9 % in training and the k-NN top-1 on
validation images falls.

If query and key of an image were normalised in the same batch, its statistics tell them from the
keys in the queue, and the pretext task is solved without looking at the image. With --bn-splits 1
they are. With s splits the permutation of the keys puts a query and its key into different parts,
which share about 1/s of their images.

    python lessons/moco_bn_leak.py --limit 2000
    python lessons/moco_bn_leak.py --dataset cifar10 --epochs 100 --splits 1 8 --batch-size 256

Options that are not listed in --help go to moco.py. Writes lessons/moco_bn_leak.csv, a line per run
and epoch, and lessons/moco_bn_leak.png: over the epochs, pretext accuracy in training (share of
queries whose own key has the largest logit of all 1 + K), and linear and k-NN top-1 of h, on
validation images, never on the test set. While the queue fills, its random keys are easy to tell.
Parts of few images are noisy statistics, which cost accuracy of their own: compare 1 with the
smallest number that is enough.
"""

import functools
import sys
from pathlib import Path

import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import moco
from lessons import shared

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
    """A line for each number of parts; means: a row for each of them and epoch."""
    for ax, (key, label) in zip(whole.subplots(1, 3), PANELS.items()):
        shared.lines(ax, means, "bn_splits", "epoch", key)
        ax.set(ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
    whole.axes[0].legend(title="--bn-splits (1: the leak)", fontsize=8)


def main(argv=None):
    p = shared.parser(__doc__, "moco_bn_leak", epochs=8)
    p.add_argument("--splits", type=int, nargs="+", default=[1, 2, 4, 8], help="(1 2 4 8)")
    own, options = p.parse_known_args(argv)
    rows = []
    for seed in range(own.seeds):
        for splits in own.splits:
            flags = ["--eval-every", 1, *options, "--bn-splits", splits]
            _, data, run = shared.train(moco, own, f"splits {splits}", seed, flags, PretextRun)
            if not data.labelled:
                common.fail("these images have no labels, there is nothing to probe for")
            rows += [row | {"bn_splits": splits, "seed": seed} for row in run.rows]
    keys = ["loss", *PANELS]
    shared.write_csv(f"{own.out}/moco_bn_leak.csv", rows, ["bn_splits", "seed", "epoch", *keys])
    means = shared.over_seeds(rows, ["bn_splits", "epoch"], keys)
    shared.figure(f"{own.out}/moco_bn_leak.png", (12, 3.6), draw, means)
    shared.show([row for row in means if row["epoch"] == own.epochs], ["bn_splits", *keys])


if __name__ == "__main__":
    main()
