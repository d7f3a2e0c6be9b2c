"""What each patch shows and how far away it is, read from frozen tokens by a linear layer (DINOv2).

Slides: "DINOv2: Learning Robust Visual Features without Supervision", results. Paper: Section 7.4,
"Dense recognition tasks": semantic segmentation (Table 10, "lin.") and monocular depth (Table 11,
"lin. 1"): the backbone stays as it is, a linear layer maps each patch token to the classes or to a
depth, and its coarse map is enlarged to pixels.

The network was never shown a label or a depth. What a single linear layer finds in a token was
already there, in plain form; the same layer on the untrained network, on the raw pixels of the
patch, and on its pixels and place shows how much of it came from training. The place is one-hot: a
token holds it, too, and the farther up the ground is in an image, the farther away it is.

    for seed in 0 1 2; do python dinov2.py --seed $seed; done
    python lessons/dinov2_dense.py runs/dinov2-toys-s*/last.pt
    python lessons/dinov2_dense.py dinov2_vits14_pretrain.pth --arch vit_small --patch-size 14 \\
        --image-size 518 --finer 1 --images 100

CHECKPOINT: last.pt or backbone.pt of dinov2.py, or a released file; or several, for different
seeds. Options that are not listed in --help are those of dinov2.py (--device, --patch-size), by
default as in the run.

The images are always new ones from `toys`, whose classes, masks and depths are known: three
quarters to fit the layers, the rest to test, three times with other images (several checkpoints
take turns). The layers are logistic regression by L-BFGS on the share of a patch that each class
covers, and ridge regression on its mean depth. Departures from the paper: no mmseg recipe, no bins
of depth, no class token beside the patches.

Writes lessons/dinov2_dense.csv, a line for each kind of features and set of images, and
lessons/dinov2_dense.png: image, truth and predictions. For comparison it also scores the truth with
one value per patch, the best possible with patches this coarse. Depths run from 0.2 to 1 and have
no unit.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import dinov2
from lessons import checkpoint, shared
from lessons.checkpoint import per_patch

CLAIM = "A linear layer reads classes and depth from tokens that were trained without either"
OURS, PLACED, TRUTH = "DINOv2", "pixels and place", "truth of a patch"
PENALTY = 1e-3
KEYS = ["features", "seed", "miou", "accuracy", "rmse"]
COLOURS = torch.tensor([  # of the background and ten classes
    [20, 20, 20], [31, 119, 180], [255, 127, 14], [44, 160, 44], [214, 39, 40], [148, 103, 189],
    [140, 86, 75], [227, 119, 194], [160, 160, 160], [188, 189, 34], [23, 190, 207]]) / 255


def enlarge(maps, size):
    """(N, C, h, w) -> (N, C, size, size), bilinear."""
    return F.interpolate(maps, size=(size, size), mode="bilinear")


def standardised(x, mean, std):
    """(n, D) -> (n, D + 1) with a column of ones, for the bias."""
    x = (x - mean) / std
    return torch.cat([x, torch.ones(len(x), 1)], 1)


def ridge(x, y, penalty):
    """argmin_w mean (x w - y)^2 + penalty |w|^2, which spares the last column of x (the ones).

    x: (n, D), y: (n, 1) -> (D, 1).
    """
    x, y = x.double(), y.double()
    free = torch.full((x.shape[1],), penalty).double()
    free[-1] = 0
    w = torch.linalg.solve(x.T @ x / len(x) + free.diag(), x.T @ y / len(x))
    return w.float()


def logistic(x, y, penalty):
    """argmin_w mean cross-entropy of softmax(x w) + penalty / 2 |w|^2 by L-BFGS, bias unpenalised.

    x: (n, D), y: (n, C), the share of each class in a patch -> (D, C).
    """
    w = torch.zeros(x.shape[1], y.shape[1], requires_grad=True)
    lbfgs = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def objective():
        lbfgs.zero_grad()
        loss = F.cross_entropy(x @ w, y) + penalty / 2 * w[:-1].square().sum()
        loss.backward()
        return loss

    lbfgs.step(objective)
    return w.detach()


def scores(classes, far, truth, depth):
    """Mean over the classes of intersection over union, over all pixels of all images together,
    share of pixels that are right (both in %), and RMSE of the depth.

    classes, truth: (N, S, S) int, 0: background; far, depth: (N, S, S).
    """
    each = []
    for c in truth.unique():
        both = ((classes == c) & (truth == c)).sum()
        either = ((classes == c) | (truth == c)).sum()
        each.append(both / either)
    right = (classes == truth).float()
    error = (far - depth).square().mean().sqrt()
    return {
        "miou": 100 * torch.stack(each).mean().item(),
        "accuracy": 100 * right.mean().item(),
        "rmse": error.item(),
    }


def linear(x, shares, depth, x_test, size):
    """Fit both layers on patch features x (N, h, w, D) with the shares of the classes (N, h, w, C)
    and the depth (N, h, w, 1) -> predicted classes and depth, each (M, S, S), of the images with
    features x_test."""
    rows = x.flatten(0, 2)
    mean, std = rows.mean(0), rows.std(0) + 1e-6
    rows = standardised(rows, mean, std)
    test = standardised(x_test.flatten(0, 2), mean, std)
    maps = []
    for fit, goal in ((logistic, shares), (ridge, depth)):
        w = fit(rows, goal.flatten(0, 2), PENALTY)
        maps.append(enlarge((test @ w).unflatten(0, x_test.shape[:3]).movedim(3, 1), size))
    return maps[0].argmax(1), maps[1][:, 0]


def placed(features):
    """Patch features (N, h, w, D) with their place, one-hot -> (N, h, w, D + h w)."""
    n, h, w, _ = features.shape
    place = torch.eye(h * w).unflatten(0, (h, w)).expand(n, -1, -1, -1)
    return torch.cat([features, place], 3)


def predictions(net, images, seed, run):
    """For the test images, from each kind of features: name -> classes and depth (M, S, S); and
    these images with their truth: x (M, 3, S, S), classes and depth (M, S, S)."""
    x, labels, parts, depths, _ = images
    truth = torch.where(parts > 0, 1 + labels.view(-1, 1, 1), 0)
    x, size = x / 255, x.shape[-1]
    n, step = len(x) * 3 // 4, net.backbone.patch_size
    shares = per_patch(F.one_hot(truth).movedim(3, 1).flatten(0, 1), step)
    shares = shares.unflatten(0, (len(x), -1)).movedim(1, 3)  # (N, h, w, C)
    depth = per_patch(depths, step).unsqueeze(3)
    found, kinds = {}, checkpoint.kinds_of_features(dinov2, OURS, net, seed, run)
    kinds[PLACED] = lambda x: placed(kinds["pixels"](x))
    for name, f in kinds.items():
        features = f(x)
        found[name] = linear(features[:n], shares[:n], depth[:n], features[n:], size)
    s, d = (enlarge(v[n:].movedim(3, 1), size) for v in (shares, depth))
    found[TRUTH] = s.argmax(1), d[:, 0]
    return found, (x[n:], truth[n:], depths[n:])


def draw(whole, columns, means):
    """means: a row for each kind of features."""
    from matplotlib.patches import Patch

    above, below = whole.subfigures(2, 1, height_ratios=[1.7, 1])
    pictures, keys = above.subfigures(1, 2, width_ratios=[14, 1])
    checkpoint.grid(pictures, columns)
    for ax in pictures.axes:
        ax.images[0].set_clim(0.2, 1)  # of depths; pictures in colour have no limits
    names = ["background", *common.THINGS]
    keys.legend([Patch(color=c.tolist()) for c in COLOURS], names, loc="upper left", fontsize=7)
    near_far = keys.add_axes((0.15, 0.05, 0.2, 0.4))
    near_far.imshow(torch.linspace(1, 0.2, 50).view(-1, 1), extent=(0, 1, 0.2, 1), aspect="auto")
    near_far.set(xticks=[], yticks=[0.2, 0.6, 1])
    near_far.yaxis.tick_right()
    near_far.set_title("depth", fontsize=8)
    left, right = below.subplots(1, 2)
    shared.bars(left, means, "features", {"miou": ""})
    left.set(title="classes: mean IoU, %")
    shared.bars(right, means, "features", {"rmse": ""}, fmt="%.3f")
    right.set(title="depth, from 0.2 to 1, no unit: RMSE (less is better)")


def answer(ours, *floors, count):
    """Rows for kinds of features; count: number of checkpoints."""
    most = max(floors, key=lambda row: row["miou"])
    least = min(floors, key=lambda row: row["rmse"])
    ahead = [shared.compare(ours, most, "miou") > 0, shared.compare(ours, least, "rmse") < 0]
    return shared.answer(ahead, f"mean IoU of the classes {ours['miou']:.0f} %, by "
                         f"{most['features']} {most['miou']:.0f} %; error of the depth "
                         f"{ours['rmse']:.3f}, by {least['features']} {least['rmse']:.3f} "
                         f"({shared.plural(count, 'run')} of DINOv2).")


def main(argv=None):
    p = checkpoint.parser(__doc__)
    p.set_defaults(dataset=common.BUILT_IN)
    p.add_argument("--shown", **common.FROM_1, default=4, help="images in the picture (4)")
    own, options = p.parse_known_args(argv)
    if own.dataset != common.BUILT_IN:
        common.fail("--dataset: classes and depths of patches are known for toys alone")
    trained = [checkpoint.load(dinov2, own, options, path) for path in own.checkpoints]
    rows = []
    for seed in range(own.seeds):
        net, _, run = trained[seed % len(trained)]
        # neither training (seed 0) nor test images (1) of dinov2.py
        images = common.toys(own.images, checkpoint.side(own, run), seed=2 + seed)
        found, (x, truth, depths) = predictions(net, images, seed, run)
        for name, both in found.items():
            rows.append({"features": name, "seed": seed} | scores(*both, truth, depths))
    shown = {"truth": (truth, depths)} | {name: found[name] for name in [*found][:4]}
    columns = {"image": x}
    for name, (classes, _) in shown.items():
        columns[f"classes:\n{name}"] = COLOURS[classes].movedim(3, 1)
    for name, (_, far) in shown.items():
        columns[f"depth:\n{name}"] = far
    columns = {title: pictures[: own.shown] for title, pictures in columns.items()}
    shared.write_csv(f"{own.out}/dinov2_dense.csv", rows, KEYS)
    means = shared.over_seeds(rows, ["features"], KEYS[2:])
    shared.figure(f"{own.out}/dinov2_dense.png", (15, 9), draw, columns, means, claim=CLAIM,
                  answer=answer(*means[:4], count=min(own.seeds, len(trained))))
    shared.show(means, ["features", *KEYS[2:]], f"{shared.plural(own.seeds, 'set')} of images")
    return rows


if __name__ == "__main__":
    main()
