"""Every lesson once, on next to nothing: it runs and writes its table and its figure."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--limit", "80", "--image-size", "16", "--epochs", "1"]


def lesson(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "lessons" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name, rows, own", [
    ("head", 3, ["--batch-size", "16"]),
    ("augmentations", 4, ["--batch-size", "16"]),
    ("collapse", 5, ["--batch-size", "16"]),
    ("temperature", 3, ["--taus", "0.2", "1", "--batch-sizes", "32"]),
    ("moco_steps", 5, ["--batch-size", "16"]),
    ("moco_bn_leak", 2, ["--batch-size", "16", "--splits", "1", "2"]),
    ("dino_collapse", 8, ["--batch-size", "16", "--every", "3"]),
    ("pretext_tasks", 3 + 2, ["--batch-size", "16", "--tasks", "colorization", "patch"]),
])
def test_lesson(tmp_path, name, rows, own):
    lesson(name).main([*TINY, *own, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)])
    assert len((tmp_path / f"{name}.csv").read_text().splitlines()) == 1 + rows
    assert (tmp_path / f"{name}.png").stat().st_size > 5000


@pytest.mark.parametrize("name, own", [
    ("ms", "--ms 0 0.9"), ("queues", "--queues 40 --seeds 2")])
def test_moco_ablations(tmp_path, name, own):
    lesson("moco_steps").main([*TINY, *own.split(), "--batch-size", "16",
                               "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)])
    assert len((tmp_path / f"moco_steps-{name}.csv").read_text().splitlines()) == 1 + 2
    assert (tmp_path / f"moco_steps-{name}.png").stat().st_size > 5000


def test_finetune(tmp_path):
    import simclr

    simclr.main([*TINY, "--eval-every", "0", "--out", str(tmp_path / "run")])
    rows = lesson("finetune").main([
        str(tmp_path / "run" / "backbone.pt"), "--limit", "80", "--epochs", "1", "--min-steps", "2",
        "--lrs", "0.1", "--seeds", "1", "--out", str(tmp_path)])
    assert len(rows) == 9 and {row["start"] for row in rows} >= {"fine-tuned", "frozen"}
    assert len((tmp_path / "finetune.csv").read_text().splitlines()) == 10
    assert (tmp_path / "finetune.png").stat().st_size > 5000


def test_backbone_is_fed_as_in_its_training(tmp_path):
    import byol

    byol.main([*TINY, "--batch-size", "16", "--eval-every", "0", "--out", str(tmp_path)])
    backbone, meta = lesson("finetune").rebuild(tmp_path / "backbone.pt")
    net = byol.build(SimpleNamespace(**meta))
    net.load_state_dict(torch.load(tmp_path / "last.pt", weights_only=True)["state"]["net"])
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    h, _, _ = net.eval()(x)
    assert torch.allclose(backbone.eval()(x), h) and not torch.allclose(backbone.net(x), h)


def test_attention(tmp_path):
    import dino
    module, run = lesson("attention"), tmp_path / "run"
    dino.main([*TINY, "--batch-size", "16", "--eval-every", "0", "--device", "cpu",
               "--out", str(run)])

    def made(file, *argv):
        rows = module.main([str(run / file), *argv, "--device", "cpu", "--out", str(tmp_path)])
        assert (tmp_path / "attention.png").stat().st_size > 5000
        assert len((tmp_path / "attention.csv").read_text().splitlines()) == 1 + len(rows)
        return rows

    rows = made("last.pt", "--images", "12", "--size", "40", "--supervised-epochs", "1")
    best = {row[0]: float(row[2]) for row in rows if row[1] in ("best", "")}
    assert len(rows) == 3 * 5 + 1 and len(best) == 4 and all(0 < v < 100 for v in best.values())
    assert best["without labels"] >= max(float(row[2]) for row in rows[:4])
    common.picture(tmp_path / "an image.png", [torch.rand(1, 3, 40, 40)])
    rows = made("backbone.pt", "--image", str(tmp_path / "an image.png"), "--size", "64")
    assert [row[1] for row in rows] == ["1", "2", "3", "4"] and all(row[2] == "" for row in rows)


def test_attention_masks():
    """The smallest set of patches with 60 % of the mass, and its overlap, by hand."""
    module, g = lesson("attention"), torch.Generator().manual_seed(0)
    attention = torch.rand(2, 3, 9, generator=g) ** 3
    for w, kept in zip(attention.flatten(0, 1), module.holding(attention, 0.6).flatten(0, 1)):
        order, mass, most = w.argsort(descending=True).tolist(), 0.0, []
        while mass < 0.6 * w.sum():
            most.append(order[len(most)])
            mass += w[most[-1]].item()
        assert sorted(most) == kept.nonzero().flatten().tolist()
    found = module.masks(attention.unflatten(2, (3, 3)), 0.6, 12)
    kept = module.holding(attention, 0.6).unflatten(2, (3, 3))
    assert torch.equal(found, kept.repeat_interleave(4, 2).repeat_interleave(4, 3))
    a, b = (torch.rand(2, 5, 5, generator=g) > 0.4 for _ in range(2))
    for i in range(2):
        pairs = [(p, q) for p, q in zip(a[i].flatten().tolist(), b[i].flatten().tolist())]
        both, either = sum(p and q for p, q in pairs), sum(p or q for p, q in pairs)
        assert module.jaccard(a, b)[i].item() == pytest.approx(both / either)
