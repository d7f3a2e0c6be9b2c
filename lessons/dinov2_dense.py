"""Object and depth read off frozen patch tokens by one linear layer (DINOv2).

Slides: "DINOv2: Learning Robust Visual Features without Supervision", results. Paper: Section 7.4,
"Dense recognition tasks": semantic segmentation (Table 10, "lin.") and monocular depth (Table 11,
"lin. 1"): the backbone stays as it is, a linear layer maps each patch token to a class or to a
depth, and its coarse map is enlarged to pixels.

No label and no depth was ever shown to the network. What a single linear layer finds in a token was
there before, laid out plainly; the same layer on the untrained network and on the raw pixels of the
patch says how much of it training brought.

    python dinov2.py
    python lessons/dinov2_dense.py runs/dinov2-toys-s0/last.pt
    python lessons/dinov2_dense.py runs/dinov2-toys-s0/last.pt --size 32
    python lessons/dinov2_dense.py dinov2_vits14_pretrain.pth --arch vit_small --patch-size 14 \\
        --image-size 518 --limit 100

CHECKPOINT: last.pt or backbone.pt of dinov2.py, or a released file. Options that are not listed in
--help are those of dinov2.py (--device, --patch-size); what is not given is as in the run. --size
is 12 patches, or as in training where that is more, up to 224.

The images are always new ones of `toys`, whose masks and depths are known, some to fit the layers
(a fifth of them to choose the penalty), others to test. Logistic regression by L-BFGS on the share
of a patch that is object, ridge regression on its mean depth. Departures from the paper: no mmseg
recipe, no bins of depth, no class token beside the patches.

Writes lessons/dinov2_dense.csv, a line for each kind of features, and lessons/dinov2_dense.png:
image, truth and prediction. Beside the features stand predictions that look at no image (nothing
but background, the mean depth; the same at each place, as objects are seldom in a corner and the
floor comes nearer below) and the truth itself with one value a patch: so coarse are the patches.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import dinov2
from lessons import checkpoint, shared
from lessons.checkpoint import per_patch

OURS = "without labels"
PENALTIES = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4)
KEYS = ["features", "miou", "iou_object", "accuracy", "rmse"]


def pixels(images, patch):
    """Raw pixels in place of tokens: (N, 3, S, S) -> (N, S / P, S / P, 3 P P)."""
    side = images.shape[-1] // patch
    return F.unfold(images, patch, stride=patch).mT.unflatten(1, (side, side))


def enlarge(maps, size):
    """(N, h, w) -> (N, size, size), bilinear."""
    return F.interpolate(maps.unsqueeze(1), size=(size, size), mode="bilinear").squeeze(1)


def standardised(x, mean, std):
    """(n, D) -> (n, D + 1) with a column of ones, for the bias."""
    x = (x - mean) / std
    return torch.cat([x, torch.ones(len(x), 1)], 1)


def ridge(x, y, penalty):
    """argmin_w mean (x w - y)^2 + penalty |w|^2, the last column of x (the ones) free of it.

    x: (n, D), y: (n,) -> (D,).
    """
    x, y = x.double(), y.double()
    free = torch.full((x.shape[1],), penalty).double()
    free[-1] = 0
    w = torch.linalg.solve(x.T @ x / len(x) + free.diag(), x.T @ y / len(x))
    return w.float()


def logistic(x, y, penalty):
    """argmin_w mean cross-entropy of sigmoid(x w) + penalty / 2 |w|^2, the bias free, by L-BFGS.

    x: (n, D), y: (n,) in [0, 1], the share of the patch that is object -> (D,).
    """
    w = torch.zeros(x.shape[1], requires_grad=True)
    lbfgs = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def objective():
        lbfgs.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ w, y)
        loss = loss + penalty / 2 * w[:-1].square().sum()
        loss.backward()
        return loss

    lbfgs.step(objective)
    return w.detach()


def iou(found, truth):
    """Intersection over union of all pixels of all images together: bool tensors -> scalar."""
    both = (found & truth).sum()
    either = (found | truth).sum()
    return both / either.clamp(min=1)


def scores(mask, depth, truth, far):
    """Mean IoU of object and background, that of the object, share of pixels that are correct (all
    in %) and RMSE of the depth. mask, truth: (N, S, S) bool; depth, far: (N, S, S)."""
    each = torch.stack([iou(mask, truth), iou(~mask, ~truth)])
    correct = (mask == truth).float()
    error = (depth - far).square().mean().sqrt()
    return {
        "miou": 100 * each.mean().item(),
        "iou_object": 100 * each[0].item(),
        "accuracy": 100 * correct.mean().item(),
        "rmse": error.item(),
    }


def best_fit(fit, x, y, held, loss):
    """fit on the patches that are not held out, the penalty with the smallest loss(output, target)
    on those that are; then on all of them. x: (n, D), y: (n,), held: (n,) bool -> w (D,)."""
    found = {}
    for penalty in PENALTIES:
        w = fit(x[~held], y[~held], penalty)
        found[penalty] = loss(x[held] @ w, y[held]).item()
    return fit(x, y, min(found, key=found.get))


def linear(x, share, depth, x_test, size):
    """Patch features x (N, h, w, D) with the share of object and the depth (N, h, w) of the images
    to fit -> logit of the object and depth, 2 x (M, S, S), of others with features x_test."""
    held = torch.zeros_like(share, dtype=torch.bool)
    held[: max(1, len(x) // 5)] = True  # whole images: patches of one are alike
    rows = x.flatten(0, 2)
    mean, std = rows.mean(0), rows.std(0) + 1e-6
    rows = standardised(rows, mean, std)
    test = standardised(x_test.flatten(0, 2), mean, std)
    maps = []
    for fit, goal, loss in ((logistic, share, F.binary_cross_entropy_with_logits),
                            (ridge, depth, F.mse_loss)):
        w = best_fit(fit, rows, goal.flatten(), held.flatten(), loss)
        maps.append(enlarge((test @ w).view(x_test.shape[:3]), size))
    return maps


def main(argv=None):
    p = checkpoint.parser(__doc__)
    p.set_defaults(dataset=common.BUILT_IN)
    p.add_argument("--fit", **common.number(int, 5), default=400, help="to fit the layers (400)")
    p.add_argument("--shown", **common.FROM_1, default=5, help="in the picture (5)")
    own, options = p.parse_known_args(argv)
    net, _, run = checkpoint.load(dinov2, own, options)
    patch = run.args.patch_size
    size = checkpoint.side(own, run)
    # neither training (seed 0) nor test images (1) of dinov2.py
    x, _, parts, depths, _ = common.toys(own.fit, size, seed=2)
    masks = parts > 0
    share = per_patch(masks, patch)
    depth = per_patch(depths, patch)
    y, _, parts, depths, _ = common.toys(own.images, size, seed=3)
    masks = parts > 0
    x = x / 255
    y = y / 255
    found = {}
    for name, f in ((OURS, net), ("random weights", dinov2.build(run.args))):
        tokens = [checkpoint.tokens(f, images, run)[1] for images in (x, y)]
        found[name] = linear(tokens[0], share, depth, tokens[1], size)
    found["raw pixels"] = linear(pixels(x, patch), share, depth, pixels(y, patch), size)
    found["each place its mean"] = [
        enlarge(share.mean(0, keepdim=True) - 0.5, size).expand_as(depths),
        enlarge(depth.mean(0, keepdim=True), size).expand_as(depths),
    ]
    found["constant"] = [torch.zeros_like(depths), depth.mean().expand_as(depths)]
    found["truth of each patch"] = [
        enlarge(per_patch(masks, patch) - 0.5, size),
        enlarge(per_patch(depths, patch), size),
    ]
    table = {}
    columns = {"image": y, "object": checkpoint.lit(y, masks), "depth": depths}
    for name, (logit, far) in found.items():
        table[name] = scores(logit > 0, far, masks, depths)
        if name in (OURS, "random weights"):
            columns[f"object, {name}"] = checkpoint.lit(y, logit > 0)
            columns[f"depth, {name}"] = far
    rows = [[name, *row.values()] for name, row in table.items()]
    checkpoint.table(f"{own.out}/dinov2_dense.csv", KEYS, rows)
    columns = {title: pictures[: own.shown] for title, pictures in columns.items()}
    shape = (1.5 * len(columns), 1.5 * own.shown)
    shared.figure(f"{own.out}/dinov2_dense.png", shape, checkpoint.grid, columns)
    return table


if __name__ == "__main__":
    main()
