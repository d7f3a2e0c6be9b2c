"""What patch and class tokens know without further training: PCA, matching, retrieval (DINOv2).

Slides: "DINOv2: Learning Robust Visual Features without Supervision", the coloured patches. Paper:
Figure 1 (the first principal components of the patch tokens, over images of a category), Figure 10
(patches matched between two images), Section 7.3 (retrieval by class token).

Nobody told the patches apart. If what varies most separates object from background, and what varies
next gives the same part of two objects the same colour, the network has found parts by itself.

On `shapes` dinov2.py's default run has learned colours: the first component tells blue objects from
red ones, not object from background (Jaccard 9 %, untrained 20, whole image 18), patches of an
object are matched to an object in 34 % of cases (56, 18). Class tokens have learned more: 17 % of
the five nearest are of the class, untrained 13, chance 10. One seed, 400 images.

    python dinov2.py
    python lessons/dinov2_features.py runs/dinov2-shapes-s0/last.pt
    python lessons/dinov2_features.py runs/dinov2-shapes-s0/last.pt --label 3 --size 64
    python lessons/dinov2_features.py dinov2_vits14_pretrain.pth --dataset PATH --size 448
    python lessons/dinov2_features.py dinov2_vits14_reg4_pretrain.pth --registers 4 \\
        --image dog1.jpg dog2.jpg dog3.jpg --size 448

CHECKPOINT: last.pt or backbone.pt of dinov2.py, or a released file (--arch, --patch-size,
--registers). Options that are not listed in --help go to dinov2.py (--device, --branch). Writes
lessons/dinov2_features.png: six images of a class, their foreground, their PCA, three pairs of them
matched, and queries with their nearest images. On `shapes`, where masks and classes are known, also
lessons/dinov2_features.csv, of all classes: the foreground against the mask, patches of an object
that are matched to an object, neighbours of the same class; beside the untrained network and
chance. Patches are taken from images of --size, class tokens at the size of the training. Images
are whole central squares: of `shapes` new ones, of other sets validation images.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import dinov2

OURS, COLUMNS, QUERIES = "without labels", 6, 3


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
        if not (args.image or args.dataset):
            common.fail(f"{path} does not say which images it is for: name --image or --dataset")
    if options.arch not in dinov2.VITS or options.ffn is None:
        common.fail(f"{path} holds a {options.arch}, not a ViT of dinov2.py")
    net = dinov2.build(options)
    dinov2.load_weights(net, path, options)
    return net, options


@torch.no_grad()
def tokens(net, images, run):
    """images (N, 3, S, S) in [0, 1] -> after the final norm, class tokens (N, D) and patch tokens
    (N, S / P, S / P, D)."""
    net, side, parts = net.eval().to(run.device), images.shape[-1] // net.backbone.patch_size, []
    for x in images.split(64):
        h = net.backbone((x.to(run.device) - net.mean) / net.std).float().cpu()
        parts.append((h[:, 0], h[:, 1 + net.backbone.registers :].unflatten(1, (side, side))))
    return tuple(torch.cat(part) for part in zip(*parts))


def components(x, k):
    """Scores on the first k principal components: (n, D) -> (n, k), their signs arbitrary."""
    x = (x - x.mean(0)).double()
    _, vectors = torch.linalg.eigh(x.T @ x)  # ascending
    return (x @ vectors[:, -k:].flip(1)).float()


def foreground(patches):
    """(N, h, w, D) -> bool (N, h, w): the first component of all patches together, cut at 0 (paper,
    Section 7.5). Its sign means nothing: the side more of the middle lies on is the object."""
    first = components(patches.flatten(0, 2), 1).view(patches.shape[:3])
    side = [slice(n // 4, n - n // 4) for n in patches.shape[1:3]]
    inner = (first > 0)[:, side[0], side[1]].float().mean()
    whole = (first > 0).float().mean()
    return first > 0 if inner >= whole else first < 0


def colours(patches, kept):
    """Three components of the kept patches alone as red, green and blue, the rest black:
    (N, h, w, D), bool (N, h, w) -> (N, h, w, 3) in [0, 1]."""
    out = torch.zeros(*kept.shape, 3)
    if kept.sum() > 3:
        scores = components(patches[kept], 3)
        low, high = scores.quantile(0.02, 0), scores.quantile(0.98, 0)
        out[kept] = 0.1 + 0.9 * ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return out


def matches(a, b):
    """The patch of a nearest to every patch of b by cosine: (T, D), (U, D) -> (U,)."""
    return (F.normalize(b, dim=-1) @ F.normalize(a, dim=-1).T).argmax(-1)


def nearest(h, k):
    """The k other images nearest to each by class token: (N, D) -> (N, k)."""
    h = F.normalize(h)
    return (h @ h.T).fill_diagonal_(-2.0).topk(min(k, len(h) - 1)).indices


def in_numbers(h, patches, labels, truth):
    """On images with masks, in %: mean Jaccard of the foreground, by PCA of every class by itself;
    patches of an object whose match in another image of the class is on its object; images of the
    same class among the five nearest."""
    patch = truth.shape[1] // patches.shape[1]
    on = F.avg_pool2d(truth.float().unsqueeze(1), patch).flatten(1) > 0.5  # (N, T)
    overlap, hits = [], []
    for label in labels.unique():
        of = (labels == label).nonzero().squeeze(1)
        found = foreground(patches[of]).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        mask = truth[of]
        overlap.append((found & mask).sum((1, 2)) / (found | mask).sum((1, 2)).clamp(min=1))
        for a, b in zip(of, of.roll(1)):
            hits.append(on[a][matches(patches[a].flatten(0, 1), patches[b].flatten(0, 1)[on[b]])])
    same = labels[nearest(h, 5)] == labels.unsqueeze(1)
    return [100 * v.float().mean().item() for v in (torch.cat(overlap), torch.cat(hits), same)]


def load_images(args, options, size, run):
    """Images (n, 3, size, size), labels (n,), -1 unknown, and of `shapes` masks, else None."""
    if options.dataset == "shapes" and not args.image:  # neither training (seed 0) nor test images
        x, labels, truth, _ = common.shapes(args.images, size, seed=2)
        return x / 255, labels, truth
    for file in args.image or ():
        try:
            common.rgb(Image.open(file))
        except Exception as error:  # whatever its decoder likes
            common.fail(f"--image {file} cannot be read ({type(error).__name__})")
    if args.image:
        images = common.Images(torch.full((len(args.image),), -1), files=args.image)
        index = torch.arange(len(args.image))
    else:
        data = common.Data(options.dataset, options.data_dir, options.limit)
        data.read(size, run.device, options.memory_limit, options.workers)
        images, index = data.val
    found = [(v[0].cpu(), images.labels[i]) for v, i in common.batches(
        images, index[: args.images], 64, [common.Crop(size, 1.0)], run.device)]
    return *(torch.cat(part) for part in zip(*found)), None


def enlarged(maps, size):
    """Values of patches as squares of pixels: (h, w, C) -> (size, size, C)."""
    return F.interpolate(maps.permute(2, 0, 1)[None], (size, size))[0].permute(1, 2, 0)


def overlay(maps, image):
    """Colours of patches (h, w, 3) over an image (S, S, 3), which is dark where they are black."""
    big = enlarged(maps, len(image))
    return torch.where((big > 0).any(-1, keepdim=True), 0.3 * image + 0.7 * big, 0.3 * image)


def matched(a, b, kept_a, kept_b):
    """Kept patches of a in the colours of their places, those of b in the colour of the patch of a
    that they match: (h, w, D), bool (h, w) -> 2 x (h, w, 3)."""
    y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in kept_a.shape), indexing="ij")
    places = 0.15 + 0.85 * torch.stack([x, 1 - (x + y) / 2, y], -1)
    one, two = places * kept_a.unsqueeze(-1), torch.zeros_like(places)
    if kept_a.any():
        two[kept_b] = places[kept_a][matches(a[kept_a], b[kept_b])]
    return one, two


def panels(x, labels, h, patches, shown, queries):
    """Rows of the figure: title -> [(picture (S, S, 3), text above it, colour of its frame)]."""
    x, p, near = x.permute(0, 2, 3, 1), patches[shown], nearest(h, COLUMNS - 1)
    kept = foreground(p)
    rows = {"images": [(x[i], "", None) for i in shown]}
    rows["foreground:\nfirst component"] = [
        (x[i] * (0.2 + 0.8 * enlarged(k.unsqueeze(-1).float(), x.shape[1])), "", None)
        for i, k in zip(shown, kept)]
    rows["three components\nof the foreground"] = [
        (enlarged(c, x.shape[1]), "", None) for c in colours(p, kept)]
    pairs = rows["same colour:\nmatched patches"] = []
    for i, j in zip(range(0, len(shown) - 1, 2), range(1, len(shown), 2)):
        one, two = matched(p[i], p[j], kept[i], kept[j])
        pairs += [(overlay(one, x[shown[i]]), "places", None),
                  (overlay(two, x[shown[j]]), "their matches", None)]
    for n, q in enumerate(queries if len(x) > 1 else ()):
        frames = ["green" if labels[i] == labels[q] else "red" for i in near[q]]
        rows[f"nearest class\ntokens ({n + 1})"] = [(x[q], "query", None)] + [
            (x[i], "", frame if labels[q] >= 0 else None) for i, frame in zip(near[q], frames)]
    return {title: cells for title, cells in rows.items() if cells}


def figure(path, rows):
    """A row of panels each; see `panels`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("matplotlib is not installed: no picture")
    whole = Figure(figsize=(1.5 * COLUMNS + 0.6, 1.55 * len(rows)), layout="constrained")
    grid = whole.subplots(len(rows), COLUMNS, squeeze=False)
    for axes, (title, cells) in zip(grid, rows.items()):
        axes[0].set_ylabel(title, fontsize=8)
        for ax in axes[len(cells) :]:
            ax.axis("off")
        for ax, (picture, text, frame) in zip(axes, cells):
            ax.imshow(picture.clamp(0, 1).numpy(), interpolation="nearest")
            ax.set_title(text, fontsize=7, pad=2)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set(color=frame or "black", linewidth=3 if frame else 0.5)
    whole.savefig(path, dpi=110)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.error = common.fail
    p.add_argument("checkpoint", help="last.pt or backbone.pt of dinov2.py, or a released file")
    p.add_argument("--image", metavar="FILE", nargs="+", help="images, in place of a set")
    p.add_argument("--dataset", help="shapes, a torchvision set or a folder (that of the run)")
    p.add_argument("--images", type=common.number(int, 2), default=400, help="of the set (400)")
    p.add_argument("--label", type=common.number(int, 0), help="class to show (of the first)")
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
    options.dataset = args.dataset or options.dataset
    size = (args.size or max(12 * patch, min(options.image_size, 224))) // patch * patch
    if not size:
        common.fail(f"--size {args.size} is less than a patch of {patch} pixels")
    x, labels, truth = load_images(args, options, size, run)
    of = labels == (labels[0] if args.label is None else args.label)
    if not of.any():
        common.fail(f"--label {args.label}: none of the {len(x)} images is of that class")
    shown = of.nonzero().squeeze(1)[:COLUMNS].tolist()
    fed = 2 * (min(size, options.image_size // patch * patch),)
    small = F.interpolate(x, fed, mode="bilinear", antialias=True)
    nets = {OURS: net} if truth is None else {OURS: net, "random weights": dinov2.build(options)}
    found = {k: (tokens(f, small, run)[0], tokens(f, x, run)[1]) for k, f in nets.items()}
    queries = [i for i in range(len(x)) if i not in shown[1:]][:QUERIES]
    figure(f"{args.out}/dinov2_features.png", panels(x, labels, *found[OURS], shown, queries))
    print(f"\n{len(x)} images of {size // patch} x {size // patch} patches, in %")
    if truth is None:
        return []
    table = {name: in_numbers(*tensors, labels, truth) for name, tensors in found.items()}
    area, same = truth.float().unsqueeze(1), labels.unsqueeze(1) == labels
    chance = area, F.avg_pool2d(area, patch) > 0.5, same[~torch.eye(len(x), dtype=torch.bool)]
    table["whole image or chance"] = [100 * t.float().mean().item() for t in chance]
    keys = "network,foreground_jaccard,object_to_object,same_class_of_5"
    lines = [",".join([name, *(f"{v:.1f}" for v in row)]) for name, row in table.items()]
    common.write(f"{args.out}/dinov2_features.csv", "\n".join([keys, *lines, ""]))
    print(f"{'':22}{'foreground, Jaccard':>20}{'object to object':>18}{'same class of 5':>17}")
    for name, (overlap, hits, same) in table.items():
        print(f"{name:22}{overlap:20.1f}{hits:18.1f}{same:17.1f}")
    return table


if __name__ == "__main__":
    main()
