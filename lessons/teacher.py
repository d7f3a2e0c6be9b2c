"""The teacher has to follow its student slowly (DINO).

Slides: "How does DINO work?", where the teacher "is just a slowly updated version of the student".
Paper: Figure 6: throughout training the momentum teacher is better than the student, and so gives
it targets of a higher quality.

If it does not lag behind (m = 0), student and teacher chase each other. After every epoch both
networks are evaluated by k-NN of h on the validation images. The teacher's momentum m rises to 1 by
half a cosine (paper), stays at its first value (dino.py on `toys`), or is 0: then the teacher is
the student itself.

    python lessons/teacher.py
    python lessons/teacher.py --dataset cifar10 --epochs 50

Options that are not listed in --help go to dino.py. Writes lessons/teacher.csv, a line for each
network and epoch, and lessons/teacher.png.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import dino
from lessons import shared

CLAIM = "The teacher has to follow slowly: if it is the student itself, less is learned"
RISING, CONSTANT, ZERO = "rises to 1 (paper)", "stays constant", "is 0"
SCHEDULES = [RISING, CONSTANT, ZERO]
KEYS = ["m", "seed", "epoch", "network", "knn_top1"]


class TwoNets(shared.LabelledRun):
    """A run that evaluates student and teacher after every epoch, with this schedule of m."""

    def __init__(self, schedule, args):
        super().__init__(args)
        self.schedule, self.found = schedule, []

    def restore(self, state):
        super().restore(state)
        self.nets = {"student": state["net"], "teacher": state["net_ema"]}
        if self.schedule == ZERO:
            self.args.m = 0.0
        self.args.m_end = 1.0 if self.schedule == RISING else self.args.m

    def epochs(self, data):
        self.data = data
        yield from super().epochs(data)

    def end_epoch(self, state):
        due = super().end_epoch(state)
        if not self.stopped:  # by a signal
            for name, net in self.nets.items():
                self.found.append({"epoch": self.rows[-1]["epoch"], "network": name,
                                   "knn_top1": knn(net, self.data, self)})
        return due


def knn(net, data, run):
    """k-NN top-1 of h in %: validation images by their nearest training images."""
    net.eval()
    view = dino.central(run.args.image_size)
    fit, val = [common.embed(lambda x: net(*x)[:1], part, view, run)
                for part in data.splits(test=False)]
    net.train()
    return common.knn(fit, val, k=run.args.knn_k, tau=run.args.knn_tau)


def draw(whole, means, floor):
    """means: a row for each schedule, network and epoch."""
    left, right = whole.subplots(1, 2, sharey=True)
    rising = [row for row in means if row["m"] == RISING]
    shared.lines(left, rising, "network", "epoch", "knn_top1")
    left.set(title=f"momentum {RISING}", ylabel="k-NN top-1 of h, %")
    teachers = [row for row in means if row["network"] == "teacher"]
    shared.lines(right, teachers, "m", "epoch", "knn_top1")
    right.set(title="teachers whose momentum ...")
    for ax in (left, right):
        shared.floor(ax, floor)
        ax.legend(fontsize=9)


def answer(rows, means):
    """Top-1 of the last teachers; how far a teacher is ahead of its student over all epochs."""
    leads = []
    for m, seed in dict.fromkeys((row["m"], row["seed"]) for row in rows if row["m"] != ZERO):
        top1 = {name: [row["knn_top1"] for row in rows
                       if (row["m"], row["seed"], row["network"]) == (m, seed, name)]
                for name in ("student", "teacher")}
        lead = [t - s for s, t in zip(*top1.values())]
        leads.append({"m": m, "lead": sum(lead) / len(lead)})
    leads = ", ".join(f"{row['lead']:.1f} ± {row['lead_sd']:.1f} if it {row['m']}"
                      for row in shared.over_seeds(leads, ["m"], ["lead"]))
    last = {row["m"]: row for row in means if row["network"] == "teacher"
            and row["epoch"] == means[-1]["epoch"]}
    ends = ", ".join(f"{row['knn_top1']:.0f} % if m {m}" for m, row in last.items())
    ahead = shared.compare(last[RISING], last[ZERO], "knn_top1") > 0
    return shared.answer([ahead], f"the teacher ends at {ends}. Points by which it is ahead of its "
                         f"student, averaged over the epochs: {leads}.")


def main(argv=None):
    p = shared.parser(__doc__, "teacher", epochs=8)
    own, options = p.parse_known_args(argv)
    rows, floors = [], []
    for seed in range(own.seeds):
        for schedule in SCHEDULES:
            kind = functools.partial(TwoNets, schedule)
            net, data, run = shared.train(dino, own, f"m {schedule}", seed, options, kind)
            rows += [{"m": schedule, "seed": seed} | row for row in run.found]
        floors.append(knn(dino.build(run.args).to(run.device), data, run))
    shared.write_csv(f"{own.out}/teacher.csv", rows, KEYS)
    means = shared.over_seeds(rows, ["m", "epoch", "network"], ["knn_top1"])
    floor = sum(floors) / len(floors)
    shared.figure(f"{own.out}/teacher.png", (9, 4.5), draw, means, floor, claim=CLAIM,
                  answer=answer(rows, means))
    return rows


if __name__ == "__main__":
    main()
