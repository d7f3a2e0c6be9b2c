"""From iBOT to DINOv2, one change at a time (DINOv2).

Slides: "DINOv2: Learning Robust Visual Features without Supervision", the table from iBOT to
DINOv2. Paper: Table 1 and Section 6.1. Its numbers are for ViT-L, trained on ImageNet-22k, k-NN and
linear probe on ImageNet-1k, one run per row, so the noise of a difference is unknown. Here every
row has several seeds, and a difference counts if it is at least two standard errors. With 3 seeds
about two of the 20 differences do so even if no change does anything.

The changes add up as on the slide: every row is dinov2.py with the options of the row above and one
more change (ROWS, below). The first row has no stochastic depth (iBOT's recipe: 0.1), since the
second adds it. LayerScale cannot be switched off; starting it at 1 comes closest. On toys the
second row starts it at 0.1, which is for networks of up to 18 blocks (Touvron et al. 2021, 1e-5 for
24). There are a third more patches of 14 pixels than of 16; for small images the side of a patch is
halved, which makes four times as many. The batch gets larger at the same number of epochs, so there
are fewer steps, and lr grows by the root of the ratio.

    python lessons/dinov2_table.py                         11 rows with 3 seeds, 3 epochs
    python lessons/dinov2_table.py --seeds 1               a third of them; the others can follow
    python lessons/dinov2_table.py --dataset cifar10 --arch vit_tiny --epochs 100 --compile
    python lessons/dinov2_table.py --dataset PATH --values paper --arch vit_large --epochs 500

Options that are not listed in --help go to dinov2.py, except those that a row sets. A run whose
results.json is in --runs is not repeated, and an interrupted one is resumed, so the table can be
made in parts. Writes lessons/dinov2_table.csv, a line per run, and lessons/dinov2_table.png. All
results but the slide's are on validation images, never on the test set.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import dinov2
from lessons import shared

# Values for toys, for images of up to 64 pixels, and the paper's, or one for all. What the paper
# does not give is from the released recipes: iBOT's before a change (warm-ups of 10 and 30 epochs
# of 800), and for the warm-ups DINOv2's after it (80 and 30 of 500).
VALUES = ("toys", "small", "paper")
BASE = {  # of all rows
    "image_size": (32, 32, 224), "local_size": (16, 16, 98), "lr": (4e-3, 1e-3, 1e-3),
    "m_end": 1.0}
ROWS = {  # -> {option: values}, the slide's k-NN and linear top-1
    "iBOT reproduced": ({
        "layer_scale": 1.0, "drop_path": 0.0, "out_dim": (128, 1024, 8192), "koleo": 0.0,
        "ffn": "mlp", "patch_size": (8, 8, 16), "m": (0.99, 0.996, 0.996),
        "warmup": (0.02, 0.0125, 0.0125), "tau_t_warmup": (0.1, 0.0375, 0.0375),
        "batch_size": (32, 256, 1024), "centering": "ema", "tied_heads": True}, 74.5, 83.2),
    "+ LayerScale and stochastic depth": ({
        "layer_scale": (0.1, 1e-5, 1e-5), "drop_path": (0.1, 0.1, 0.4)}, 75.4, 82.0),
    "+ more prototypes": ({"out_dim": (512, 4096, 131072)}, 76.6, 81.9),
    "+ KoLeo": ({"koleo": 0.1}, 78.9, 82.5),
    "+ SwiGLU": ({"ffn": "swiglu"}, 78.7, 83.1),
    "+ smaller patches": ({"patch_size": (4, 4, 14)}, 78.9, 83.5),
    "+ teacher momentum": ({"m": (0.985, 0.994, 0.994)}, 79.4, 83.6),
    "+ warm-up schedules": ({
        "warmup": (0.1, 0.16, 0.16), "tau_t_warmup": (0.3, 0.06, 0.06)}, 80.5, 83.8),
    "+ larger batch": ({"batch_size": (64, 512, 3072)}, 81.7, 84.7),
    "+ Sinkhorn-Knopp": ({"centering": "sinkhorn"}, 81.7, 84.7),
    "+ untied heads = DINOv2": ({"tied_heads": False}, 82.0, 84.5),
}
TOP1 = ("knn_top1", "linear_top1")
FLOORS = [f"untrained_{key}" for key in TOP1]
FREE = "out resume device data_dir workers memory_limit".split()  # may change between the parts


def column(table, values):
    """{option: values} -> {option: value}."""
    i = VALUES.index(values)
    return {k: v[i] if isinstance(v, tuple) else v for k, v in table.items()}


def options(values):
    """Row -> {option: value}, including those of the rows above."""
    chosen, table = {}, {}
    for row, (change, *_) in ROWS.items():
        chosen = chosen | column(change, values)
        table[row] = chosen
    return table


def flags(chosen):
    """{option: value} -> command line."""
    words = []
    for k, v in chosen.items():
        words.append(("--no-" if v is False else "--") + k.replace("_", "-"))
        if not isinstance(v, bool):
            words.append(str(v))
    return words


def results_of(folder, argv):
    """The results of dinov2.py with these options, on validation images; from this folder if they
    are there."""
    args = common.options("dinov2", __doc__, dinov2.OPTIONS, [*argv, "--out", str(folder)])
    asked = {k: v for k, v in vars(args).items() if k not in FREE}
    results, last, note = (folder / f for f in ("results.json", "last.pt", "asked.json"))
    args.resume = last.exists()
    if args.resume and (not note.exists() or json.loads(note.read_text()) != asked):
        common.fail(f"{folder} holds a run with other options; give another --runs")
    if results.exists():
        return json.loads(results.read_text())
    if not args.resume:  # a run that was killed before its first checkpoint leaves its folder
        (folder / "args.json").unlink(missing_ok=True)
    with shared.LabelledRun(args) as run:
        common.write(run.folder / "asked.json", json.dumps(asked))
        net, data = dinov2.train(args, run)
        found = dinov2.evaluate(net, data, args, run) | shared.untrained(dinov2, data, run)
        return run.finish(net.backbone, found, dinov2.MEAN, dinov2.STD, dinov2.loading(args))


def answer(means):
    """How many changes make a difference; means: a row for each of ROWS."""
    if means[0]["seeds"] == 1:
        return "One seed: no telling which differences are more than noise."
    pairs = [*zip(means, means[1:])]
    signs = [shared.compare(row, above, key) for key in TOP1 for above, row in pairs]
    counted = len(signs) - signs.count(0)
    # never yes; more than five are due to noise alone in only a few of a hundred tables
    return shared.answer([counted > 5, False], (
        f"{counted} of {len(signs)} differences from the row above are at least two standard "
        "errors; with 3 seeds chance alone gives about two."))


def draw(whole, means, epochs):
    """means: a row for each of ROWS."""
    left, right = whole.subplots(1, 2, sharey=True)
    names = [mean["row"] for mean in means]
    for i, (key, colour) in enumerate(zip(TOP1, ("tab:blue", "tab:orange")), 1):
        label = "k-NN" if key == "knn_top1" else "linear"
        top1, deviations, floor = ([mean[k] for mean in means]
                                   for k in (key, f"{key}_sd", f"untrained_{key}"))
        left.errorbar(top1, names, xerr=deviations, fmt="o-", c=colour, capsize=3, label=label)
        left.plot(floor, names, ":", c=colour, label=f"{label}, untrained")
        right.plot([row[i] for row in ROWS.values()], [*ROWS], "o-", c=colour)
    left.legend(fontsize=9)
    left.invert_yaxis()
    left.set(title=f"here, validation top-1 in %, after {epochs} epochs")
    right.set(title="slide, ImageNet top-1 in %, ViT-L")


def show(means):
    """Print the means over seeds, the differences from the row above with their standard errors,
    and the slide's differences."""
    for i, key in enumerate(TOP1, 1):
        print(f"\n{key} on validation images, its change, the change on the slide")
        for above, row in zip([means[0], *means], means):
            change, error = shared.difference(row, above, key)
            noise = "" if shared.compare(row, above, key) else "within noise"
            noise = f"± {error:3.1f} {noise}" if row["seeds"] > 1 else "one seed"
            slide = ROWS[row["row"]][i] - ROWS[above["row"]][i]
            print(f"{row['row']:34}{row[key]:5.1f} {change:+7.1f} {noise:19}{slide:+5.1f}")


def main(argv=None):
    p = shared.parser(__doc__, "dinov2_table", epochs=3)
    p.add_argument("--values", choices=VALUES, help="values of the rows (toys, other data: small)")
    own, others = p.parse_known_args(argv)
    shared.refuse(others)
    args = common.options("dinov2", __doc__, dinov2.OPTIONS, others)
    values = own.values or ("toys" if args.dataset == common.BUILT_IN else "small")
    base = [*flags(column(BASE, values)), *f"--epochs {own.epochs} --eval-every 0".split(), *others]
    rows = []
    for seed in range(own.seeds):
        for number, (row, chosen) in enumerate(options(values).items()):
            found = results_of(Path(own.runs) / f"{number}-s{seed}",
                               [*base, *flags(chosen), "--seed", str(seed)])
            rows.append(found | {"row": row, "seconds": found["train_seconds"]})
    shared.write_csv(f"{own.out}/dinov2_table.csv", rows, [
        "row", "seed", "epochs", *chosen, *TOP1, *FLOORS, "seconds", "rank_h", "spread"])
    means = shared.over_seeds(rows, ["row"], [*TOP1, *FLOORS])
    shared.figure(f"{own.out}/dinov2_table.png", (12, 5), draw, means, found["epochs"],
                  claim="Ten changes lead from iBOT to DINOv2", answer=answer(means))
    show(means)
    return means


if __name__ == "__main__":
    main()
