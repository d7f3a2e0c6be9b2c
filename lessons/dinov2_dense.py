"""Object and depth read off frozen patch tokens by one linear layer (DINOv2).

Slides: "DINOv2: Learning Robust Visual Features without Supervision", results. Paper: Section 7.4,
"Dense recognition": semantic segmentation (Table 10, "lin.") and monocular depth (Table 11, "lin.
1"): the backbone stays as it is, a linear layer maps each patch token to a class or to a depth, and
its coarse map is enlarged to pixels.

No label and no depth was ever shown to the network. What a single linear layer finds in a token was
there before, laid out plainly; the same layer on the untrained network and on the raw pixels of the
patch says how much of it training brought.

On `shapes` (12 x 12 patches, one seed) training brings nothing that the architecture has not: mIoU
92.5 % for dinov2.py's default run, 92.2 untrained, 91.6 raw pixels, 94.8 the truth with one value a
patch; depth RMSE 0.101, 0.099, 0.188, 0.084. An object is seen by its colour there, and depth from
colour and place, which untrained tokens hold.

    python dinov2.py
    python lessons/dinov2_dense.py runs/dinov2-shapes-s0/last.pt
    python lessons/dinov2_dense.py runs/dinov2-shapes-s0/last.pt --size 32

CHECKPOINT: last.pt or backbone.pt of dinov2.py, or a released file (--arch, --patch-size,
--registers). Options that are not listed in --help go to dinov2.py (--device, --branch). The images
are always new ones of `shapes`, whose masks and depths are known, some to fit the layers (a fifth
of them to choose the penalty), others to test. Logistic regression by L-BFGS on the share of a
patch that is object, ridge regression on its mean depth. Departures from the paper: no mmseg
recipe, no bins of depth, no class token beside the patches.

Writes lessons/dinov2_dense.csv, a line for each kind of features, and lessons/dinov2_dense.png:
image, truth and prediction. Beside the features stand predictions that look at no image (nothing
but background, the mean depth; the same at each place, as objects are seldom in a corner and the
floor comes nearer below) and the truth itself with one value a patch: so coarse are the patches.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import dinov2

OURS = "without labels"
PENALTIES = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4)
KEYS = ("miou", "iou_object", "accuracy", "rmse")


def network(path, args, others):
    """The teacher of a checkpoint and the options that it was made with."""
    found = common.read_checkpoint(path)
    known = found.get("meta", found.get("args"))
    options = dinov2.options(others)
    if isinstance(known, dict):  # ours
        vars(options).update({k: known.get(k, v) for k, v in vars(options).items() if k not in (
            "device", "branch", "data_dir", "workers", "memory_limit")})
    else:
        vars(options).update(
            arch=args.arch, patch_size=args.patch_size, registers=args.registers, image_size=518,
            out_dim=2, hidden=2, layer_scale=1.0, ffn=dinov2.VITS.get(args.arch, [None] * 4)[3])
    if options.arch not in dinov2.VITS or options.ffn is None:
        common.fail(f"{path} holds a {options.arch}, not a ViT of dinov2.py")
    net = dinov2.build(options)
    dinov2.load_weights(net, path, options)
    return net, options


@torch.no_grad()
def tokens(net, images, run):
    """images (N, 3, S, S) in [0, 1] -> patch tokens after the final norm, (N, S / P, S / P, D)."""
    net, side, parts = net.eval().to(run.device), images.shape[-1] // net.backbone.patch_size, []
    for x in images.split(256):
        h = net.backbone((x.to(run.device) - net.mean) / net.std)[:, 1 + net.backbone.registers :]
        parts.append(h.unflatten(1, (side, side)).float().cpu())
    return torch.cat(parts)


def pixels(images, patch):
    """The same of raw pixels: (N, 3, S, S) -> (N, S / P, S / P, 3 P P)."""
    side = images.shape[-1] // patch
    return F.unfold(images, patch, stride=patch).mT.unflatten(1, (side, side))


def per_patch(truth, patch):
    """Means over patches: (N, S, S) -> (N, S / P, S / P)."""
    return F.avg_pool2d(truth.float().unsqueeze(1), patch).squeeze(1)


def enlarge(maps, size):
    """(N, h, w) -> (N, size, size), bilinear."""
    return F.interpolate(maps.unsqueeze(1), size=(size, size), mode="bilinear").squeeze(1)


def standardised(x, mean, std):
    """(n, D) -> (n, D + 1) with a column of ones, for the bias."""
    return torch.cat([(x - mean) / std, torch.ones(len(x), 1)], 1)


def ridge(x, y, penalty):
    """argmin_w mean (x w - y)^2 + penalty |w|^2, the last column of x (the ones) free of it.

    x: (n, D), y: (n,) -> (D,).
    """
    free = torch.full((x.shape[1],), penalty, dtype=torch.float64)
    free[-1] = 0
    x, y = x.double(), y.double()
    return torch.linalg.solve(x.T @ x / len(x) + free.diag(), x.T @ y / len(x)).to(torch.float32)


def logistic(x, y, penalty):
    """argmin_w mean cross-entropy of sigmoid(x w) + penalty / 2 |w|^2, the bias free, by L-BFGS.

    x: (n, D), y: (n,) in [0, 1], the share of the patch that is object -> (D,).
    """
    w = torch.zeros(x.shape[1], requires_grad=True)
    lbfgs = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def objective():
        lbfgs.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ w, y) + penalty / 2 * w[:-1].square().sum()
        loss.backward()
        return loss

    lbfgs.step(objective)
    return w.detach()


def iou(found, truth):
    """Intersection over union of all pixels of all images together: bool tensors -> scalar."""
    return (found & truth).sum() / (found | truth).sum().clamp(min=1)


def scores(mask, depth, truth, far):
    """Mean IoU of object and background, that of the object, share of pixels that are right (all in
    %) and RMSE of the depth. mask, truth: (N, S, S) bool; depth, far: (N, S, S)."""
    both = torch.stack([iou(mask, truth), iou(~mask, ~truth)])
    return {"miou": 100 * both.mean().item(), "iou_object": 100 * both[0].item(),
            "accuracy": 100 * (mask == truth).float().mean().item(),
            "rmse": (depth - far).square().mean().sqrt().item()}


def best_fit(fit, x, y, held, penalties, loss):
    """fit on the patches that are not held out, the penalty with the smallest loss(output, target)
    on those that are; then on all of them. x: (n, D), y: (n,), held: (n,) bool -> w (D,)."""
    found = {p: loss(x[held] @ fit(x[~held], y[~held], p), y[held]).item() for p in penalties}
    return fit(x, y, min(found, key=found.get))


def linear(x, goals, x_test, size):
    """Patch features x (N, h, w, D) with goals, share of object and depth (N, h, w), of the images
    to fit -> logit of the object and depth, 2 x (M, S, S), of others with features x_test."""
    held = torch.zeros(x.shape[:3], dtype=torch.bool)
    held[: max(1, len(x) // 5)] = True  # whole images: patches of one are alike
    rows, mean, std = x.flatten(0, 2), x.flatten(0, 2).mean(0), x.flatten(0, 2).std(0) + 1e-6
    rows, test = (standardised(r, mean, std) for r in (rows, x_test.flatten(0, 2)))
    maps = []
    for fit, goal, loss in ((logistic, goals[0], F.binary_cross_entropy_with_logits),
                            (ridge, goals[1], F.mse_loss)):
        w = best_fit(fit, rows, goal.flatten(), held.flatten(), PENALTIES, loss)
        maps.append(enlarge((test @ w).view(x_test.shape[:3]), size))
    return maps


def figure(path, x, columns):
    """A row per image; columns: title -> masks (n, S, S) bool, or depths."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("matplotlib is not installed: no picture")
    whole = Figure(figsize=(1.5 * (1 + len(columns)), 1.5 * len(x) + 0.5), layout="constrained")
    for row, axes in enumerate(whole.subplots(len(x), 1 + len(columns), squeeze=False)):
        image = x[row].permute(1, 2, 0)
        for ax, (title, maps) in zip(axes, {"image": None, **columns}.items()):
            if maps is None:
                ax.imshow(image.numpy())
            elif maps.dtype == torch.bool:
                ax.imshow((image * (0.15 + 0.85 * maps[row].unsqueeze(-1))).numpy())
            else:
                ax.imshow(maps[row].numpy(), cmap="magma_r", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            if row == 0:
                ax.set_title(title, fontsize=8)
    whole.suptitle("One linear layer on frozen patch tokens: object (bright) and depth (dark is "
                   "far)", fontsize=9)
    whole.savefig(path, dpi=110)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.error = common.fail
    count = common.number(int, 5)
    p.add_argument("checkpoint", help="last.pt or backbone.pt of dinov2.py, or a released file")
    p.add_argument("--fit", type=count, default=400, help="images to fit the layers (400)")
    p.add_argument("--images", type=count, default=400, help="images to test them (400)")
    p.add_argument("--shown", type=common.number(int, 1), default=5, help="in the picture (5)")
    p.add_argument("--size", type=common.number(int, 1), help="side in pixels (12 patches, or as "
                   "in training where that is more)")
    p.add_argument("--arch", default="vit_small", help="of a released file (vit_small)")
    p.add_argument("--patch-size", type=common.number(int, 1), default=14, help="the same (14)")
    p.add_argument("--registers", type=common.number(int, 0), default=0, help="the same (0)")
    p.add_argument("--out", default=str(Path(__file__).parent), help="folder of CSV and PNG")
    args, others = p.parse_known_args(argv)
    net, options = network(args.checkpoint, args, others)
    run, patch = common.setup(options.device), options.patch_size
    Path(args.out).mkdir(parents=True, exist_ok=True)
    size = (args.size or max(12 * patch, min(options.image_size, 224))) // patch * patch
    if not size:
        common.fail(f"--size {args.size} is less than a patch of {patch} pixels")
    # neither training (seed 0) nor test images (1) of dinov2.py
    (x, _, *goals), (y, _, truth, far) = (
        common.shapes(n, size, seed) for n, seed in ((args.fit, 2), (args.images, 3)))
    x, y, goals = x / 255, y / 255, [per_patch(goal, patch) for goal in goals]
    features = {OURS: lambda x: tokens(net, x, run)}
    untrained = dinov2.build(options)
    features["random weights"] = lambda x: tokens(untrained, x, run)
    features["raw pixels"] = lambda x: pixels(x, patch)
    found = {name: linear(f(x), goals, f(y), size) for name, f in features.items()}
    place, depth = (goal.mean(0, keepdim=True) for goal in goals)
    found["each place its mean"] = [enlarge(m, size).expand_as(far) for m in (place - 0.5, depth)]
    found["constant"] = torch.zeros_like(far), depth.mean().expand_as(far)
    found["truth of each patch"] = [enlarge(per_patch(t, patch), size) for t in (
        truth.float() - 0.5, far)]
    found = {name: (mask > 0, depth) for name, (mask, depth) in found.items()}
    table = {name: scores(*maps, truth, far) for name, maps in found.items()}
    lines = ["features," + ",".join(KEYS)]
    for name, row in table.items():
        lines.append(name + "".join(f",{row[k]:.4g}" for k in KEYS))
    common.write(f"{args.out}/dinov2_dense.csv", "\n".join(lines) + "\n")
    n, names = args.shown, (OURS, "random weights")
    columns = {"object": truth[:n]} | {f"by {k}": found[k][0][:n] for k in names}
    columns |= {"depth": far[:n]} | {f"by {k} ": found[k][1][:n] for k in names}
    figure(f"{args.out}/dinov2_dense.png", y[:n], columns)
    print(f"\n{len(y)} new images of {size} x {size} pixels, {size // patch} x {size // patch} "
          f"patches; layers fitted on {len(x)} others")
    print(f"{'':26}{'mIoU, %':>9}{'object':>9}{'pixels':>9}{'depth RMSE':>13}")
    for name, row in table.items():
        print(f"{name:26}{row['miou']:9.1f}{row['iou_object']:9.1f}{row['accuracy']:9.1f}"
              f"{row['rmse']:13.4f}")
    return table


if __name__ == "__main__":
    main()
