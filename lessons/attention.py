"""The class token attends to the object, and nobody told it where that is (DINO).

Slides: Figure 1 (self-attention of the class token on the heads of the last layer), Figure 4 with
its table: the patches that hold 60 % of the attention, against the object's true mask. Jaccard
similarity on PASCAL VOC12, ViT-S/16: random weights 22.0, supervised 27.3, DINO 45.9.

The token has to give every crop of an image the same answer, and what the crops share is usually
the object; a supervised token needs only as much of the object as reveals its class.

    python dino.py --epochs 100 --out runs/dino-long
    for seed in 0 1; do python benchmarks/supervised.py dino --lr 4e-3 --seed $seed; done
    python lessons/attention.py runs/dino-long/last.pt \\
        --supervised runs/supervised-dino-toys-s*/backbone.pt
    python lessons/attention.py dino_deitsmall8_pretrain.pth --patch-size 8 --finer 1 --dataset PATH

CHECKPOINT: last.pt or backbone.pt of dino.py, or a released file; or several, for different seeds.
Options that are not listed in --help are those of dino.py (--device, --patch-size), by default as
in the run. Images are whole central squares: new ones for `toys`, validation images for other sets,
never test images.

Writes lessons/attention.png and, on `toys`, where the objects are known, lessons/attention.csv.
The checkpoint is compared with the same network with random weights and after training with labels,
three times with other images and weights (several files of a kind take turns). The paper takes the
best head for each image. This small network has three, and with random weights each attends to a
fixed blob near the middle: the best of three blobs is a good guess. So the attention is averaged
over the heads; the best head for each image is in the CSV.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import dino
from lessons import checkpoint, shared

CLAIM = "The class token attends to the object: more after DINO than with labels"
DINO, RANDOM, SUPERVISED = "DINO", "random weights", "supervised"
OF_SLIDE = {RANDOM: 22.0, SUPERVISED: 27.3, DINO: 45.9}
KEYS = ["network", "seed", "jaccard", "best_head", "share_of_image", "whole_image"]


def attention_maps(vit, x):
    """Self-attention of the last block: (N, 3, H, W) -> (N, heads, 1 + T, 1 + T). Row i says how
    much token i takes from each token; the class token comes first."""
    *blocks, last = vit.blocks
    x = vit.tokens(vit.patch_embed(x))
    for block in blocks:
        x = block(x)
    qkv = last.attn.qkv(last.norm1(x))
    qkv = qkv.unflatten(2, (3, last.attn.heads, -1))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, 1 + T, D / heads) each
    s = q @ k.mT * q.shape[-1] ** -0.5
    return s.softmax(-1)


@torch.no_grad()
def class_maps(net, x):
    """From the class token to patches: (N, 3, S, S) in [0, 1] -> (N, heads, S / P, S / P)."""
    net.eval()
    side = x.shape[-1] // net.backbone.patch_size
    x = x.to(net.mean.device)
    w = attention_maps(net.backbone, (x - net.mean) / net.std)
    return w[:, :, 0, 1:].unflatten(2, (side, side)).cpu()


def holding(attention, mass):
    """(..., T) -> bool: the smallest set of patches that holds this share of the attention (the
    released visualize_attention.py)."""
    value, index = attention.sort(dim=-1)
    share = value.cumsum(-1) / value.sum(-1, keepdim=True)
    none = torch.zeros_like(attention, dtype=torch.bool)
    return none.scatter(-1, index, share > 1 - mass)


def masks(attention, mass, size):
    """Maps (N, heads, h, w) -> the patches that hold this share (N, heads, size, size), bool."""
    kept = holding(attention.flatten(2), mass).view_as(attention)
    return F.interpolate(kept.float(), size) > 0.5  # nearest


def jaccard(found, truth):
    """(..., H, W) bool -> (...): intersection over union."""
    both = (found & truth).sum((-2, -1))
    either = (found | truth).sum((-2, -1))
    return both / either.clamp(min=1)


def measure(net, x, truth, mass):
    """Images (n, 3, S, S) and objects (n, S, S) bool -> the values of a row in %, and the masks of
    the mean over the heads (n, S, S)."""
    maps = class_maps(net, x)  # (n, heads, S / P, S / P)
    found = masks(maps.mean(1, keepdim=True), mass, x.shape[-1])[:, 0]
    each = jaccard(masks(maps, mass, x.shape[-1]), truth.unsqueeze(1))  # (n, heads)
    figures = {
        "jaccard": jaccard(found, truth),
        "best_head": each.amax(1),
        "share_of_image": found.float(),
        "whole_image": jaccard(torch.ones_like(truth), truth),  # which needs no attention
    }
    return {k: 100 * v.mean().item() for k, v in figures.items()}, found


def lit(images, masks):
    """Images (n, 3, S, S), dark outside the masks (n, S, S)."""
    return images * (0.15 + 0.85 * masks.unsqueeze(1))


def draw(whole, columns, means, title):
    """columns of pictures: title -> (n, ...); means: a row for each network, or none."""
    if not means:
        return checkpoint.grid(whole, columns)
    left, right = whole.subfigures(1, 2, width_ratios=[2.2, 1])
    checkpoint.grid(left, columns)
    ax = right.subplots()
    shared.bars(ax, means, "network", {"jaccard": "here", "of_slide": "slide, PASCAL VOC12"},
                hatched=["of_slide"])
    shared.floor(ax, means[0]["whole_image"], "whole image")
    ax.set(title=title)
    ax.legend(loc="upper left", fontsize=9)


def answer(means, counts, mass):
    """means: a row for each network, DINO last; counts: how many networks of each."""
    *others, ours = means
    ahead = all(shared.compare(ours, row, "jaccard") > 0 for row in others)
    parts = [f"{row['network']} {row['jaccard']:.0f} ± {row['jaccard_sd']:.0f} % "
             f"(networks: {counts[row['network']]})" for row in means]
    return shared.answer([ahead], f"Jaccard similarity of the patches that hold {mass:.0%} of the "
                         f"attention and the object: {', '.join(parts)}.")


def main(argv=None):
    p = checkpoint.parser(__doc__)
    p.add_argument("--shown", **common.FROM_1, default=5, help="images in the picture (5)")
    p.add_argument("--mass", **common.SHARE, default=0.6, help="share of attention in a mask (0.6)")
    p.add_argument("--supervised", nargs="+", metavar="FILE", default=[],
                   help="backbone.pt of benchmarks/supervised.py dino")
    own, options = p.parse_known_args(argv)
    trained, labelled = ([checkpoint.load(dino, own, options, path) for path in paths]
                         for paths in (own.checkpoints, own.supervised))
    rows = []
    for seed in range(own.seeds):
        net, data, run = trained[seed % len(trained)]
        x, _, parts = checkpoint.images(own, data, run, seed)
        if parts is None:
            break
        args = argparse.Namespace(**vars(run.args) | {"seed": seed})
        nets = {RANDOM: checkpoint.refine(dino.build(args).to(run.device), own.finer)}
        if labelled:
            nets[SUPERVISED], *_ = labelled[seed % len(labelled)]
        found = {}
        for name, f in (nets | {DINO: net}).items():
            figures, found[name] = measure(f, x, parts > 0, own.mass)
            rows.append({"network": name, "seed": seed, "of_slide": OF_SLIDE[name]} | figures)
    shown = x[: own.shown]
    columns = {"image": shown}
    for i, head in enumerate(class_maps(net, shown).unbind(1), 1):
        columns[f"DINO, head {i}"] = head
    if not rows:
        shape = (1.4 * len(columns), 1.4 * len(shown))
        return shared.figure(f"{own.out}/attention.png", shape, draw, columns, [], "")
    for name, mask in ({"object": parts > 0} | found).items():
        columns[name] = lit(shown, mask[: own.shown])
    counts = {RANDOM: own.seeds, SUPERVISED: min(own.seeds, len(labelled)),
              DINO: min(own.seeds, len(trained))}
    shared.write_csv(f"{own.out}/attention.csv", rows, KEYS)
    means = shared.over_seeds(rows, ["network"], [*KEYS[2:], "of_slide"])
    shared.figure(f"{own.out}/attention.png", (13, 6), draw, columns, means,
                  f"Jaccard similarity of {own.mass:.0%} of the attention\nand the object, %",
                  claim=CLAIM, answer=answer(means, counts, own.mass))
    shared.show(means, ["network", *KEYS[2:]], f"{shared.plural(own.seeds, 'set')} of images")
    return rows


if __name__ == "__main__":
    main()
