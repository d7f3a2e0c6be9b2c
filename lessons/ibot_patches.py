"""Hidden blocks, and parts that find each other: what patch tokens are taught and learn (iBOT).

Slides: "Contrastive Learning: Image BERT Pre-Training with Online Tokenizer (iBOT)", the masked
student. Paper: part-level correspondences: of the patch tokens of two views of an image, or of two
images of a class, those that are each other's nearest by cosine, the best twelve. Table 14: block
against random masks.

A single hidden patch can be guessed from its neighbours; of a hidden block one has to know what it
is part of. So a token is drawn to say which part of what it shows, and the same part elsewhere is
to say the same.

On `shapes` ibot.py's default run finds no parts yet. Two views, 12 x 12 patches: 8.0 % of the
matches are the same place (untrained 5.2, random pairs 2.2), 20 % are on the object in both (24,
7); two images of a class: 9 % (11, 3). At the size of the training, 4 x 4 patches: same place 29 %
(25, 19). One seed, 200 images.

    python ibot.py
    python lessons/ibot_patches.py runs/ibot-shapes-s0/last.pt
    python lessons/ibot_patches.py runs/ibot-shapes-s0/last.pt --size 32
    python lessons/ibot_patches.py checkpoint_teacher.pth --image cat1.jpg cat2.jpg --size 448

CHECKPOINT: last.pt or backbone.pt of ibot.py, or a released file (--arch, --patch-size). Options
that are not listed in --help go to ibot.py (--device, --branch, --data-dir). Writes
lessons/ibot_patches.csv and lessons/ibot_patches.png. The views are crops of 40 to 100 % of the
area, one mirrored, in other colours: which place of one is which of the other is known. On `shapes`
so are the objects. Random pairs: every patch of the one with every patch of the other. Images are
whole central squares: of `shapes` new ones, of other sets validation images.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
import ibot

OURS, BEST, VIEWS = "without labels", 12, "views of one image"
KEYS = "network", "two", "matches", "same_place", "both_on_object"


def network(path, args, others):
    """The teacher of a checkpoint and the options that it was made with."""
    found = common.read_checkpoint(path)
    known = found.get("meta", found.get("args"))
    options = ibot.options(others)
    if isinstance(known, dict):  # ours
        vars(options).update({k: known.get(k, v) for k, v in vars(options).items() if k not in (
            "device", "branch", "data_dir", "workers", "memory_limit")})
    else:
        options.arch, options.patch_size, options.image_size = args.arch, args.patch_size, 224
        options.out_dim, options.hidden = 2, 2
        if not (args.image or args.dataset):
            common.fail(f"{path} does not say which images it is for: name --image or --dataset")
    if options.arch not in ibot.VITS:
        common.fail(f"{path} holds a {options.arch}: patches have one of {', '.join(ibot.VITS)}")
    net = ibot.build(options)
    ibot.load_weights(net, path, options)
    return net, options


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


@torch.no_grad()
def tokens(net, images, run):
    """images (N, 3, S, S) in [0, 1] -> patch tokens after the final norm, (N, T, D)."""
    net = net.eval().to(run.device)
    return torch.cat([net.backbone((x.to(run.device) - net.mean) / net.std)[:, 1:].float().cpu()
                      for x in images.split(64)])


def mutual(a, b, most=BEST):
    """Patches that are each other's nearest by cosine, the best first: tokens (T, D), (U, D) ->
    index in a (M,), index in b (M,), M <= most."""
    cosine = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T  # (T, U)
    to, back = cosine.argmax(1), cosine.argmax(0)
    i = (back[to] == torch.arange(len(a))).nonzero().squeeze(1)
    i = i[cosine[i, to[i]].argsort(descending=True)[:most]]
    return i, to[i]


def draw_views(n, size):
    """Boxes in pixels (2, n, 4), top, left, height, width, and which of the two is mirrored
    (2, n, 1, 1)."""
    sizes, ratio = torch.full((2 * n, 2), size), (3 / 4, 4 / 3)
    boxes = common.random_boxes(sizes, (0.4, 1.0), ratio).view(2, n, 4)
    mirrored = torch.rand(n, 1, 1) < 0.5
    return boxes, torch.stack([mirrored, ~mirrored])


def cut(x, boxes, mirrored):
    """A view of each image: (N, C, S, S), (N, 4), (N, 1, 1) -> (N, C, S, S)."""
    x = common.crop_resize(x, boxes, x.shape[-1])
    return torch.where(mirrored.unsqueeze(1), x.flip(3), x)


def places(boxes, mirrored, side):
    """Centres of the patches of views, in pixels of their images: (N, 4), (N, 1, 1) -> (N, T, 2)
    of y, x."""
    step = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(step, step, indexing="ij")
    x = torch.where(mirrored, 1 - x, x)  # (N, side, side)
    top, left, height, width = boxes.view(-1, 4, 1, 1).unbind(1)
    return torch.stack([top + y * height, left + x * width], -1).flatten(1, 2)


def near(boxes, mirrored, side):
    """Which patches of two views are at most one patch apart along both axes, a patch being as
    large as it is in the two on average: (2, N, 4), (2, N, 1, 1) -> (N, T, T) bool."""
    a, b = (places(*view, side) for view in zip(boxes, mirrored))
    patch = boxes[:, :, 2:].mean(0) / side  # (N, 2)
    return ((a.unsqueeze(2) - b.unsqueeze(1)).abs() <= 1.0001 * patch[:, None, None]).all(-1)


def both(a, b, patch):
    """Which pairs of patches are mostly object on both sides: masks (N, 1, S, S) of the two images
    -> (N, T, T) bool."""
    a, b = (F.avg_pool2d(m.float(), patch).flatten(1) > 0.5 for m in (a, b))
    return a.unsqueeze(2) & b.unsqueeze(1)


def share(good, found=None):
    """Share in % of pairs of patches that are good: (N, T, T) bool, N lists of pairs or None for
    all of them -> float, None if it is not known what is good."""
    if good is None:
        return None
    hits = good if found is None else torch.cat([g[i, j] for g, (i, j) in zip(good, found)])
    return 100 * hits.float().mean().item()


def draw_masks(x, sides, options):
    """Columns of the figure, title -> an image (3, S, S) for every grid: what the student sees of
    x, hidden patches grey."""
    columns, g = {"image": [x] * len(sides)}, torch.Generator()
    for title, make in (("blocks", ibot.block_masks), ("random", ibot.random_masks)):
        for ratio in torch.linspace(*options.mask_ratio, 3).split(1):
            masks = [make(s, s, ratio, torch.rand(1, max(256, s * s), generator=g.manual_seed(
                options.seed + 1)))[0] for s in sides]
            columns[f"{title}, {ratio.item():.0%}"] = [torch.where(
                F.interpolate(m[None, None].float(), x.shape[1:])[0] > 0.5, 0.6, x) for m in masks]
    return columns


def figure(path, columns, sides, pairs):
    """Above the masks, a row per grid; below the correspondences, network -> [(title, image, image,
    pairs of patches, which are good (T, T) or None)]."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("matplotlib is not installed: no picture")
    across = max(map(len, pairs.values()))
    heights = [1.6 * len(sides) + 0.5, (5.3 / across + 0.1) * len(pairs) + 0.3]
    whole = Figure(figsize=(11, sum(heights)), layout="constrained")
    top, below = whole.subfigures(2, 1, height_ratios=heights)
    top.suptitle("What the student sees: hidden blocks; on the right, hidden single patches",
                 fontsize=10)
    for r, axes in enumerate(top.subplots(len(sides), len(columns), squeeze=False)):
        axes[0].set_ylabel(f"{sides[r]} x {sides[r]} patches", fontsize=8)
        for ax, (title, images) in zip(axes, columns.items()):
            ax.imshow(images[r].permute(1, 2, 0).numpy())
            ax.set_title(title if r == 0 else "", fontsize=8)
    below.suptitle(f"Patch tokens that are each other's nearest, the best {BEST}", fontsize=10)
    for (name, row), axes in zip(pairs.items(), below.subplots(len(pairs), across, squeeze=False)):
        axes[0].set_ylabel(name, fontsize=8)
        for ax, (title, a, b, found, good) in zip(axes, row):
            size, side = a.shape[-1], sides[-1]
            gap = torch.ones(3, size, size // 8)
            ax.imshow(torch.cat([a, gap, b], 2).permute(1, 2, 0).numpy())
            for n, ends in enumerate(zip(*(t.tolist() for t in found))):
                y, x = zip(*(((t // side + 0.5) * size / side, (t % side + 0.5) * size / side)
                             for t in ends))
                colour = f"C{n % 10}" if good is None else "lime" if good[ends] else "red"
                ax.plot([x[0], x[1] + size + size // 8], y, "o-", c=colour, lw=1.2, ms=3)
            ax.set_title(title if name == OURS else "", fontsize=8)
            ax.spines[:].set_visible(False)
    for ax in [*top.axes, *below.axes]:
        ax.set(xticks=[], yticks=[])
    whole.savefig(path, dpi=110)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.error = common.fail
    p.add_argument("checkpoint", help="last.pt or backbone.pt of ibot.py, or a released file")
    p.add_argument("--image", metavar="FILE", nargs="+", help="images, in place of a set")
    p.add_argument("--dataset", help="shapes, a torchvision set or a folder (that of the run)")
    p.add_argument("--images", type=common.number(int, 2), default=200, help="of the set (200)")
    p.add_argument("--size", type=common.number(int, 1), help="side in pixels (12 patches, or as "
                   "in training where that is more)")
    p.add_argument("--arch", default="vit_small", help="of a released file (vit_small)")
    p.add_argument("--patch-size", type=common.number(int, 1), default=16, help="the same (16)")
    p.add_argument("--out", default=str(Path(__file__).parent), help="folder of CSV and PNG")
    args, others = p.parse_known_args(argv)
    net, options = network(args.checkpoint, args, others)
    run, patch = common.setup(options.device), options.patch_size
    Path(args.out).mkdir(parents=True, exist_ok=True)
    options.dataset = args.dataset or options.dataset
    side = (args.size or max(options.image_size, 12 * patch)) // patch
    if side < 2:
        common.fail(f"--size {args.size} is less than two patches of {patch} pixels")
    x, labels, truth = load_images(args, options, side * patch, run)
    common.reseed(options.seed)
    boxes, mirrored = draw_views(len(x), side * patch)
    views = [common.color_jitter(cut(x, *v), 0.4, 0.4, 0.2, 0.1, p=0.8)
             for v in zip(boxes, mirrored)]
    order = labels.argsort(stable=True)
    order = torch.stack([order[:-1], order[1:]])
    a, b = order[:, labels[order[0]] == labels[order[1]]]  # neighbours of one class
    other = "images" + " of a class" * bool((labels >= 0).all())
    on = {VIEWS: None, other: None}
    if truth is not None:
        m = truth.float().unsqueeze(1)
        on = {VIEWS: both(*(cut(m, *v) > 0.5 for v in zip(boxes, mirrored)), patch),
              other: both(m[a], m[b], patch)}
    kinds = {VIEWS: (*views, near(boxes, mirrored, side)), other: (x[a], x[b], None)}
    kinds = {k: v for k, v in kinds.items() if len(v[0])}
    rows, pairs = [], {OURS: [], "random weights": []}
    for name, f in zip(pairs, (net, ibot.build(options))):
        for kind, (one, two, right) in kinds.items():
            found = [mutual(*t) for t in zip(tokens(f, one, run), tokens(f, two, run))]
            count = sum(len(i) for i, _ in found) / len(found)
            rows.append([name, kind, count, share(right, found), share(on[kind], found)])
            good, meant = (right, "same place") if kind == VIEWS else (on[kind], "both on object")
            title = f"two {kind}" + f" (green: {meant})" * (good is not None)
            for n in range(0, len(found), -(-len(found) // 2)):
                known = None if good is None else good[n]
                pairs[name].append((title, one[n], two[n], found[n], known))
    rows += [["random pairs", k, None, share(v[2]), share(on[k])] for k, v in kinds.items()]
    text = [[f"{v:.1f}" if isinstance(v, float) else v or "" for v in row] for row in rows]
    lines = [",".join(row) for row in [KEYS, *text]]
    common.write(f"{args.out}/ibot_patches.csv", "\n".join([*lines, ""]))
    sides = sorted({options.image_size // patch, side}, key=lambda s: s == side)
    figure(f"{args.out}/ibot_patches.png", draw_masks(x[0], sides, options), sides, pairs)
    print(f"\n{len(x)} images of {side} x {side} patches, the best {BEST} of each pair, in %")
    print(f"{'':38}{'matches':>9}{'same place':>12}{'both on object':>16}")
    for name, kind, count, place, objects in text:
        print(f"{name:16}{'two ' + kind:22}{count:>9}{place:>12}{objects:>16}")
    return rows


if __name__ == "__main__":
    main()
