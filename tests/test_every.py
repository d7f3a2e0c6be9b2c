"""What every method file promises: its runs from the command to the files they leave, checkpoints,
resume, half precision, failures, errors, two processes. And, once for all, the functions that have
one text in all files."""

import copy
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from tools import TINY, close, draw, lighten, quiet, refused, same

import byol
import common
import dino
import dinov2
import ibot
import moco
import pretext
import simclr

ROOT = Path(common.__file__).parent


class Method(NamedTuple):
    file: ModuleType
    chance: float  # the loss of a tiny run when nothing is learned
    argv: str = ""  # what a tiny run needs besides TINY
    other: str = "--arch resnet18"  # makes another network of it


METHODS = {
    "simclr": Method(simclr, math.log(31)),
    "moco": Method(moco, math.log(41), "--queue 40"),  # does not divide by the batch
    "byol": Method(byol, 2.0),
    "dino": Method(dino, math.log(512)),
    "ibot": Method(ibot, 1.5 * math.log(512), other="--arch vit_tiny"),  # half the crops: a mask
    "dinov2": Method(dinov2, 1.5 * math.log(64), "--koleo 0 --out-dim 64 --hidden 64 --arch "
                     "vit_nano --patch-size 8", "--arch vit_tiny"),  # KoLeo is of one process
    "pretext": Method(pretext, math.log(4), "--optimizer sgd --lr 0.5"),
}
LISTED = """method dataset epochs seed device versions linear_top1 knn_top1 head_linear_top1
    untrained_linear_top1 untrained_knn_top1 pixels_linear_top1 pixels_knn_top1 train_seconds
    total_seconds images_per_second peak_memory_mb verdict""".split()  # design, section 4
every = pytest.mark.parametrize("name", METHODS)
resnets = pytest.mark.parametrize("name", [k for k, m in METHODS.items()
                                           if not hasattr(m.file, "VITS")])


def tiny(name, *argv):
    """A tiny run -> its results and what it printed."""
    return quiet(METHODS[name].file, [*TINY, *METHODS[name].argv.split(), *argv])


@pytest.fixture
def light(monkeypatch):
    for method in METHODS.values():
        lighten(monkeypatch, method.file)


def load(folder, file="last.pt"):
    return torch.load(Path(folder) / file, weights_only=True)


def strict_json(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def rows_of(folder):
    """metrics.jsonl without what a clock says."""
    rows = map(strict_json, (folder / "metrics.jsonl").read_text().splitlines())
    timed = ("images_per_second", "waiting")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


# ==================================================================================================
# The command
# ==================================================================================================


@pytest.fixture(scope="module", params=METHODS)
def finished(request, tmp_path_factory):
    """The file, started as a command in a folder with common.py and nothing else."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    for file in (f"{name}.py", "common.py"):
        shutil.copy(ROOT / file, folder)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    argv = [*TINY, *METHODS[name].argv.split(), "--epochs", "2", "--eval-every", "2"]
    done = subprocess.run([sys.executable, f"{name}.py", *argv], cwd=folder, env=env, text=True,
                          capture_output=True, timeout=240)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return SimpleNamespace(name=name, file=METHODS[name].file, out=done.stdout,
                           folder=folder / "runs" / f"{name}-shapes-s0")


def rebuilt(run):
    """The network that a run has written, from last.pt."""
    net = run.file.build(Namespace(**strict_json((run.folder / "args.json").read_text())))
    net.load_state_dict(load(run.folder)["state"][run.file.KEPT])
    return net.eval()


def test_a_run_writes_what_it_promises(finished):
    folder, name = finished.folder, finished.name
    assert {f.name for f in folder.iterdir()} == {
        "args.json", "metrics.jsonl", "results.json", "last.pt", "backbone.pt", "curves.png",
        "views.png"}
    results = strict_json((folder / "results.json").read_text())
    assert not [k for k in LISTED if k not in results]
    assert (results["method"], results["dataset"], results["device"]) == (name, "shapes", "cpu")
    tops = [v for k, v in results.items() if k.endswith("top1")]
    assert len(tops) == 8 and all(0 <= v <= 100 for v in tops) and max(tops) > 1
    rows, chance = rows_of(folder), METHODS[name].chance
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(0 < row["loss"] < 2 * chance and row["skipped"] == 0 for row in rows)
    assert "verdict" not in rows[0] and {"linear_top1", "knn_top1", "verdict"} <= rows[1].keys()
    options = strict_json((folder / "args.json").read_text())
    assert (options["batch_size"], options["limit"], options["epochs"]) == (16, 48, 2)
    for picture in ("curves.png", "views.png"):
        assert np.asarray(Image.open(folder / picture)).std() > 5
    backbone = load(folder, "backbone.pt")
    assert backbone.keys() == {"state_dict", "meta"} and backbone["meta"]["epochs"] == 2
    assert same(backbone["state_dict"], dict(rebuilt(finished).backbone.state_dict()))
    for said in ("recipe shapes:", f"chance {chance:.3f}", "6 steps", "untrained", "pixels",
                 results["verdict"]):
        assert said in finished.out, said


def test_the_printed_lines_load_the_backbone(finished):
    said = re.search(r"for \(RGB in \[0, 1\] - (\(.+?\))\) / (\(.+?\)):\n\n(import torch.+)",
                     finished.out, re.S)
    mean, std = (torch.tensor(eval(said[i])).view(3, 1, 1) for i in (1, 2))
    if "timm" in said[3]:
        pytest.importorskip("timm")
    exec(said[3].replace("runs/", f"{finished.folder.parent}/"), names := {})
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    net = rebuilt(finished)
    with torch.no_grad():
        h = net(x)[0]
        assert close(names["net"].eval()((x - mean) / std), h, 1e-5) and h.std() > 1e-3
    meta = load(finished.folder, "backbone.pt")["meta"]
    assert close(mean.flatten(), meta["mean"], 1e-6) and close(std.flatten(), meta["std"], 1e-6)


def test_eval_gives_the_same_and_a_finished_folder_is_left_alone(finished, monkeypatch):
    monkeypatch.setattr(common, "curves", lambda *_: None)
    folder, name = finished.folder, finished.name
    results = strict_json((folder / "results.json").read_text())
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    again, _ = tiny(name, "--out", folder, "--eval", folder / "last.pt")
    for k, v in results.items():
        if k.endswith("top1") or k.startswith("rank") or k in ("spread", "alignment", "uniformity"):
            assert again[k] == pytest.approx(v, abs=1e-3), k
    assert again["train_seconds"] == 0
    assert results["verdict"].startswith(again["verdict"])  # that of a run may go on to its steps
    monkeypatch.setattr(finished.file, "linear_probe", lambda *_: 0.0)  # once will do
    again, said = tiny(name, "--out", folder, "--eval", folder / "backbone.pt")
    for k in ("knn_top1", "untrained_knn_top1", "pixels_knn_top1", "rank_h"):
        assert again[k] == pytest.approx(results[k], abs=1e-3), k
    assert re.search("the heads? stays? random", said)
    assert before == {f.name: f.read_bytes() for f in folder.iterdir()}
    for n in (2, 3):
        assert (folder.parent / f"{folder.name}-{n}" / "results.json").exists()


@every
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        METHODS[name].file.main(["--help"])
    usage = capsys.readouterr().out
    groups = [usage.index(f"\n{g}:") for g in "run data method optimiser evaluation".split()]
    assert stopped.value.code == 0 and groups == sorted(groups) and f"runs/{name}-" in usage


@every
@pytest.mark.parametrize("row, side, n", [("shapes", None, 4000), ("small", 32, 50000),
                                          ("large", 300, 10**6)])
def test_recipes_fill_what_is_left_open(name, row, side, n, capsys):
    file = METHODS[name].file
    file.complete(args := file.options([]), side, n)
    said, recipe = capsys.readouterr().out, file.RECIPES[row]
    assert {k for k, v in vars(args).items() if v is None} == {
        "device", "out", "limit", "init", "eval"}
    assert recipe.keys() == file.RECIPES["shapes"].keys() and f"recipe {row}:" in said
    for k, v in recipe.items():
        if not callable(v):
            assert getattr(args, k) == (min(v, side or v) if k == "image_size" else v), k
        assert f" {k}=" in said
    file.complete(args := file.options("--lr 7 --image-size 24 --epochs 9".split()), side, n)
    assert (args.lr, args.image_size, args.epochs, args.eval_every) == (7, 24, 9, 3)


@pytest.mark.parametrize("name", ["dino", "ibot", "dinov2"])
def test_sizes_of_views(name, tmp_path, monkeypatch):
    """A local view is 3/7 of a global one in whole patches; what does not fit is said."""
    file = METHODS[name].file
    for side, patch, size in ((224, 16, 96), (224, 14, 98), (96, 16, 48), (32, 16, 16)):
        args = file.options(["--image-size", str(side), "--patch-size", str(patch)])
        file.complete(args, 300, 5000)
        assert args.local_size == size
    lighten(monkeypatch, file, report=False)
    for flags, warned in (("", []), ("--image-size 17", ["1 rows and columns"]),
                          ("--local-size 16", ["local views are not smaller"]),
                          ("--local-size 16 --local-crops 0", [])):
        usual = "--patch-size 8 --local-size 8 --epochs 1 --eval-every 0 --m 0 " + flags
        _, said = tiny(name, *usual.split(), "--out", tmp_path / "run")
        found = re.findall("^warning: (.*)", said, re.M)
        assert len(found) == len(warned) and all(map(str.startswith, found, warned)), (flags, found)


# ==================================================================================================
# Weights and images from elsewhere
# ==================================================================================================


@resnets
def test_torchvision_weights_in_and_timm_out(name, tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS[name].file, "report", lambda *_: {"verdict": "not looked at"})
    monkeypatch.setattr(common, "curves", lambda *_: None)
    torch.manual_seed(0)
    weights = torchvision.models.resnet18().state_dict()
    torch.save(weights, tmp_path / "official.pth")
    _, said = tiny(name, "--init", tmp_path / "official.pth", "--arch", "resnet18", "--lr", "1e-6",
                   "--epochs", "1", "--eval-every", "0", "--out", tmp_path / "run")
    assert "120 tensors loaded, missing 0, unexpected 0" in said
    made = load(tmp_path / "run", "backbone.pt")["state_dict"]
    for k in ("conv1.weight", "layer4.1.conv2.weight"):
        assert close(made[k], weights[k], 1e-4) and not torch.equal(made[k], weights[k])
    timm = pytest.importorskip("timm")
    other = timm.create_model("resnet18", num_classes=0)
    other.load_state_dict(made)  # strictly; num_classes=0 is without fc
    own = METHODS[name].file.resnet("resnet18", "7x7")
    own.load_state_dict(made)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert close(other.eval()(x), own.eval()(x), 1e-5)


@every
def test_images_without_labels(name, tmp_path, light):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24, 20, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for i, p in enumerate(pixels):
        Image.fromarray(p).save(tmp_path / "images" / f"{i:02}.png")
    results, said = tiny(name, "--dataset", tmp_path / "images", "--epochs", "1",
                         "--out", tmp_path / "run")
    assert "recipe small" in said and "verdict" in results and "rank_h" in results
    assert not [k for k in results if k.endswith("top1")]
    row, = rows_of(tmp_path / "run")
    assert 0 < row["loss"] < math.inf and "verdict" in row


# ==================================================================================================
# Half precision
# ==================================================================================================


@every
def test_half_precision_on_a_cpu(name, tmp_path, light):
    """Near to float32 and not the same; under fp16 the first steps go to find the scale."""
    rows = {}
    for amp in ("off", "bf16", "fp16"):
        results, said = tiny(name, "--amp", amp, "--eval-every", "0", "--out", tmp_path / amp)
        assert {"off": "None", "bf16": "torch.bfloat16", "fp16": "torch.float16"}[amp] in said
        assert all(math.isfinite(v) for k, v in results.items() if k.endswith("top1"))
        rows[amp] = rows_of(tmp_path / amp)
        assert rows[amp][-1]["skipped"] == 0
    for amp in ("bf16", "fp16"):
        assert 0 < abs(rows[amp][-1]["loss"] - rows["off"][-1]["loss"]) < 0.2, rows


# ==================================================================================================
# Stop and go on
# ==================================================================================================


def after(k, act, patch):
    """Call act() at the end of the k-th step from now on."""
    steps, agreed = [], common.Stop.agreed

    def counting(stop, device):
        steps.append(0)
        if len(steps) == k:
            act()
        return agreed(stop, device)

    patch.setattr(common.Stop, "agreed", counting)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def stopped_after(k, name, *argv):
    """A tiny run that gets a signal in its k-th step -> its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        after(k, terminate, patch)
        tiny(name, *argv)
    return stopped.value.code


@pytest.mark.parametrize("name, argv", [
    *((name, "--eval-every 1") for name in METHODS), ("byol", "--amp fp16 --optimizer lars")],
    ids=[*METHODS, "fp16"])
def test_resume_is_bitwise(name, argv, tmp_path, light):
    results = [tiny(name, *argv.split(), "--out", tmp_path / "whole")[0]]
    whole = load(tmp_path / "whole")
    assert len(rows_of(tmp_path / "whole")) == 3
    for k in (2, 3, 9):  # within an epoch, at its end, at the very end
        parts = tmp_path / f"parts{k}"
        argv_k = [*argv.split(), "--out", parts]
        assert stopped_after(k, name, *argv_k) == 128 + signal.SIGTERM
        saved = load(parts)
        assert saved["progress"]["step"] == k and not (parts / "results.json").exists()
        random.seed(k), np.random.seed(k), torch.manual_seed(k)  # nothing hangs on these
        results.append(tiny(name, *argv_k, "--resume")[0])
        assert same(load(parts)["state"], whole["state"]), k
        assert rows_of(parts) == rows_of(tmp_path / "whole"), k
        assert not same(saved["state"], whole["state"]) or k == 9
    figures = [{k: v for k, v in r.items() if k.endswith("top1") or k == "verdict"}
               for r in results]
    assert all(f == figures[0] for f in figures)


# ==================================================================================================
# Steps that are not finite
# ==================================================================================================


def poison(patch, file):
    """From now on the first image of a training batch has a pixel that is no number."""
    augment = file.augment

    def spoiling(views, args):
        seen = [v.clone() for v in augment(views, args)]
        for v in seen if len(views[0]) == args.batch_size else ():  # not those of views.png
            v[0, 0, 0, 0] = math.nan
        return seen

    patch.setattr(file, "augment", spoiling)


def moving(state, path=""):
    """What a step changes, by path, but for the counters of batch norm and of the log."""
    if isinstance(state, torch.Tensor):
        return {path: state}
    still = ("num_batches_tracked", "param_groups", "tally", "scaler")
    parts = [moving(v, f"{path}.{k}") for k, v in state.items() if not str(k).endswith(still)]
    return {k: t for part in parts for k, t in part.items()}


@every
def test_a_step_that_is_not_finite_changes_nothing(name, tmp_path, light):
    argv = ["--eval-every", "0", "--out"]
    stopped_after(2, name, *argv, tmp_path / "before")
    for kind in ("good", "spoilt"):
        shutil.copytree(tmp_path / "before", tmp_path / kind)
        with pytest.MonkeyPatch.context() as patch:
            if kind == "spoilt":
                poison(patch, METHODS[name].file)
            stopped_after(1, name, *argv, tmp_path / kind, "--resume")
    before, good, spoilt = (load(tmp_path / k)["state"] for k in ("before", "good", "spoilt"))
    tallies = good["tally"][-2:].tolist(), spoilt["tally"][-2:].tolist()
    assert tallies == ([0, 0], [0, 1])  # the epoch has ended; failures in a row
    before, good, spoilt = map(moving, (before, good, spoilt))
    assert same(before, spoilt)
    kinds = {k: (k.split(".")[1], "running" in k) for k in before if k != ".centers"}  # not in use
    changed = {kinds[k] for k in kinds if not torch.equal(before[k], good[k])}
    assert changed == set(kinds.values())  # weights, EMA, statistics, momentum, queue, ptr


@pytest.mark.parametrize("name, amp", [*((name, "off") for name in METHODS), ("simclr", "fp16")])
def test_a_run_that_keeps_failing_stops(name, amp, tmp_path, monkeypatch, light, capsys):
    argv = [*TINY, *METHODS[name].argv.split(), "--batch-size", "4", "--epochs", "8", "--amp", amp,
            "--eval-every", "0", "--out", tmp_path / "run"]
    stopped_after(2, name, *argv)
    good = (tmp_path / "run" / "last.pt").read_bytes()
    poison(monkeypatch, METHODS[name].file)
    error = refused(METHODS[name].file, [*argv, "--resume"], capsys)
    assert re.search(r"step 5[0-2]\b", error), error
    assert (tmp_path / "run" / "last.pt").read_bytes() == good
    first, *rows = rows_of(tmp_path / "run")
    assert first["skipped"] == 10 or amp == "fp16"
    assert len(rows) == 3  # an epoch of failures has no loss: 0 would be the best of all
    assert all(row["loss"] is None and row["skipped"] == 12 for row in rows)


# ==================================================================================================
# Errors
# ==================================================================================================


@every
@pytest.mark.parametrize("argv, names", [
    ("--epochs 0", "epochs"), ("--epochs many", "epochs"), ("--batch-size 1", "batch-size"),
    ("--lr inf", "lr"), ("--lr -1", "lr"), ("--weight-decay nan", "weight-decay"),
    ("--arch vit", "arch"), ("--amp fp8", "amp"), ("--image-size 0", "image-size"),
    ("--seed -1", "seed"), ("--limit 0", "limit"), ("--knn-tau 0", "knn-tau"),
    ("--no-such-option", "no-such-option"), ("--batch-size 4096", "batch-size"),
    ("--dataset nowhere", "nowhere"), ("--device tpu", "tpu"), ("--init none.pt", "none.pt"),
    ("--eval none.pt", "none.pt"), ("--dataset {empty}", "no images"), ("--resume", "last.pt"),
])
def test_wrong_options(name, argv, names, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    argv = argv.format(empty=tmp_path / "empty").split()
    argv = [*TINY, *METHODS[name].argv.split(), *argv, "--out", tmp_path / "run"]
    assert names in refused(METHODS[name].file, argv, capsys)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_wrong_checkpoints(finished, tmp_path, capsys):
    name, other = finished.name, METHODS[finished.name].other.split()
    backbone, last = finished.folder / "backbone.pt", finished.folder / "last.pt"
    out = ["--out", tmp_path / "run"]

    def said(*argv):
        argv = [*TINY, *METHODS[name].argv.split(), *argv]
        return refused(finished.file, argv, capsys)

    for file in (backbone, last):
        for option in ("--init", "--eval"):
            assert file.name in said(*out, option, file, *other)
    held = torch.load(backbone, weights_only=True)
    held["state_dict"]["one_more.weight"] = torch.zeros(2)  # holds all and something else
    torch.save(held, tmp_path / "more.pt")
    assert "more.pt" in said(*out, "--init", tmp_path / "more.pt")
    torch.save(torch.load(last, weights_only=True) | {"method": "another"}, tmp_path / "other.pt")
    assert "another" in said(*out, "--init", tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes(last.read_bytes()[:5000])
    assert "cut.pt" in said(*out, "--init", tmp_path / "cut.pt")  # test_common.py has more of them
    stopped_after(1, name, *out)
    for argv, names in (["--seed", 1], "seed"), (["--batch-size", 8], "batch_size"), (
            ["--lr", 0.01], "lr"), (other, "with"):
        assert names in said(*out, "--resume", *argv)
    kept = load(tmp_path / "run")
    torch.save(kept | {"method": "another", "args": kept["args"] | {"method": "another"}},
               tmp_path / "run" / "last.pt")
    assert "another" in said(*out, "--resume")
    for broken in ((tmp_path / "cut.pt").read_bytes(), backbone.read_bytes()):
        (tmp_path / "run" / "last.pt").write_bytes(broken)
        assert "last.pt" in said(*out, "--resume")
    assert "finished" in said("--resume", "--out", finished.folder)


# ==================================================================================================
# Two processes
# ==================================================================================================


def exact(name, *argv, training=False):
    """One epoch in float64 and without draws, in one process or more: what is left of a run is then
    the same but for rounding. Normalisation is in eval mode unless training. -> `moving` of its
    state, and its loss."""
    file, kept = METHODS[name].file, {}
    crops, build, train, single = file.crops, file.build, nn.Module.train, torch.Tensor.float

    def keep(path, method, args, state, progress):
        held = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
        kept.update(moving(copy.deepcopy(held)), loss=progress["rows"][0]["loss"])

    with pytest.MonkeyPatch.context() as patch:
        lighten(patch, file, report=False)
        patch.setattr(common, "save", keep)
        patch.setattr(file, "crops", lambda *args: [c._replace(scale=1.0, ratio=None)
                                                    for c in crops(*args)])
        patch.setattr(file, "augment", lambda views, args: [x.roll(2 * i, 3)
                                                            for i, x in enumerate(views)])
        patch.setattr(torch.Tensor, "float", lambda t: t.double() if t.ndim else single(t))
        if not training:
            patch.setattr(nn.Module, "train", lambda net, mode=True: train(net, False))
            patch.setattr(file, "build", lambda *args: build(*args).eval())
        torch.set_default_dtype(torch.float64)
        try:
            tiny(name, "--epochs", "1", "--eval-every", "0", *argv)
        finally:
            torch.set_default_dtype(torch.float32)
    assert sum(torch.is_tensor(t) and t.dtype == torch.float64 and t.abs().max() > 1e-3
               for t in kept.values()) > 12  # there is something to compare
    return kept


def apart(a, b, without="nothing"):
    """The largest difference of two dicts of numbers."""
    assert a.keys() == b.keys()
    return max(float((torch.as_tensor(a[k]) - b[k]).abs().max()) for k in a if without not in k)


class Detached(simclr.Gather):
    """Gather as it is often written: only what this process has made has a gradient."""

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def images_and_features():
    pixels = torch.randint(0, 256, (11, 3, 16, 16), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    images = common.Images(torch.arange(11), pixels, torch.full((11, 2), 16))
    args = simclr.options("--device cpu --workers 0 --arch resnet10 --stem 7x7 --dim 8".split())
    net, index = simclr.build(args).eval(), torch.tensor([3, 1, 4, 10, 5, 9, 2])
    return simclr.embed(lambda x: net(x[0]), [common.Crop(16, 1.0)], (images, index), args,
                        common.setup(args.device))


def shared_functions(rank):
    """embed, and update where the loss of the second process is not finite."""
    off = torch.amp.GradScaler("cpu", enabled=False)
    net, optimizer = small_net("sgd")
    before = copy.deepcopy(net.state_dict())
    found = {"features": images_and_features(),
             "failed": step_of(net, optimizer, off, 0, "loss" if rank else None)[1]}
    found["untouched"] = same(moving(before), moving(net.state_dict()))
    part = torch.tensor([1.0, 4.0]) * (1 + rank)
    optimizer.zero_grad()
    net(draw(6, 3, dtype=torch.float32)).mean().backward()
    found["losses"], found["finite"] = simclr.update(part, net, optimizer, off, [])
    return found


def shipped(name, rank, folder):
    """A run, and one that is stopped by a signal to the second process and goes on."""
    file, found, health = METHODS[name].file, {"buffers": []}, METHODS[name].file.health

    def looking(state, *args):
        results = health(state, *args)
        found["buffers"].append({k: b.clone() for k, b in state[file.KEPT].named_buffers()})
        return results

    argv = ["--epochs", "2", "--eval-every", "1", "--out"]
    with pytest.MonkeyPatch.context() as patch:
        lighten(patch, file)
        patch.setattr(file, "health", looking)
        found["results"], _ = tiny(name, *argv, f"{name}-whole")
        with pytest.MonkeyPatch.context() as patch:
            after(2, terminate if rank else lambda: None, patch)
            with pytest.raises(SystemExit) as stopped:
                tiny(name, *argv, f"{name}-parts")
        found["code"] = stopped.value.code
        dist.barrier()
        if rank:  # the folders of two machines are one
            shutil.copytree(folder / "0" / f"{name}-parts", f"{name}-parts")
        dist.barrier()
        tiny(name, *argv, f"{name}-parts", "--resume")
    return found


def two_processes(rank, port, folder):
    """What each of the two does; what it finds goes to folder/<rank>.pt."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_PORT=str(port),
                      MASTER_ADDR="127.0.0.1")
    (folder / str(rank)).mkdir()
    os.chdir(folder / str(rank))  # what a process writes lands here
    common.setup("cpu")
    found = {"shared": shared_functions(rank)}
    for name in METHODS:
        found[name] = {"exact": exact(name)} | shipped(name, rank, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simclr, "Gather", Detached)
        found["detached"] = exact("simclr")
        alone = dinov2.sinkhorn_knopp
        patch.setattr(dinov2, "sinkhorn_knopp", lambda x, tau, gather: alone(x, tau))
        found["alone"] = exact("dinov2")
    found["ema"] = exact("dinov2", "--centering", "ema")
    found["split"] = exact("moco", "--bn-splits", "2", training=True)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two processes have found, and their folder."""
    folder = tmp_path_factory.mktemp("both")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(two_processes, (port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)], folder


@every
def test_two_processes_are_one(name, both, tmp_path):
    """Three steps of the shipped file: weights, momentum, EMA, queue and loss are those of one
    process with the whole batch."""
    one = exact(name, "--out", tmp_path / "run")
    for found in both[0]:
        assert apart(found[name]["exact"], one) < 1e-10
    if name == "simclr":
        for found in both[0]:
            assert apart(found["detached"], one) > 1e-4
    if name == "dinov2":
        ema = exact(name, "--centering", "ema", "--out", tmp_path / "ema")
        for found in both[0]:
            assert apart(found["alone"], one) > 1e-4  # each process balances its own images
            assert apart(found["ema"], ema) < 1e-10


def test_two_processes_are_two_splits_of_batch_norm(both, tmp_path):
    """MoCo with statistics of the batch. Those it keeps for evaluation are of one process only."""
    one, whole = (exact("moco", "--bn-splits", k, "--out", tmp_path / k, training=True)
                  for k in ("2", "1"))
    for found in both[0]:
        assert apart(found["split"], one, without="running") < 1e-10
        assert apart(found["split"], whole, without="running") > 1e-3


@every
def test_two_processes_agree_stop_and_go_on(name, both):
    (first, second), folder = [found[name] for found in both[0]], both[1]
    for k, v in first["results"].items():
        if k.endswith("top1") or k in ("verdict", "spread", "rank_h", "rank_z"):
            assert v == second["results"][k], k
    # evaluation shares the images out: all processes need the same batch-norm statistics
    assert len(first["buffers"]) == 6 and same(first["buffers"], second["buffers"])
    assert first["code"] == second["code"] == 128 + signal.SIGTERM
    assert (folder / "0" / f"{name}-whole" / "results.json").exists()
    assert not (folder / "1" / f"{name}-whole").exists()
    whole, parts = (folder / "0" / f"{name}-{kind}" for kind in ("whole", "parts"))
    assert same(load(whole)["state"], load(parts)["state"]) and rows_of(whole) == rows_of(parts)


def test_two_processes_share_out_and_fail_together(both):
    features = images_and_features()
    for shared in (found["shared"] for found in both[0]):
        assert [t.shape[0] for t in shared["features"]] == [7, 7, 7]
        assert all(close(a, b, 1e-6) for a, b in zip(shared["features"], features))
        assert torch.equal(shared["features"][2], torch.tensor([3, 1, 4, 10, 5, 9, 2]))
        assert not shared["failed"] and shared["untouched"]
        assert shared["finite"] and close(shared["losses"], [1.5, 6.0], 1e-6)  # their mean


# ==================================================================================================
# One text in all files: the update
# ==================================================================================================


def small_net(kind):
    """A net with batch norm and its optimiser, made as in `train`."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    make = simclr.LARS if kind == "lars" else torch.optim.SGD
    fused = {} if kind == "lars" else {"fused": kind == "sgd"}
    optimizer = make(net.parameters(), 0.1, momentum=0.9, weight_decay=0.01, **fused)
    for p in net.parameters() if kind != "plain" else ():
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return net, optimizer


def step_of(net, optimizer, scaler, seed, poison=None, restore=True):
    """One step on fixed data, poisoned or not -> loss and finite, as `update` says."""
    x, buffers = draw(6, 3, seed=seed, dtype=torch.float32), []
    if restore:
        buffers = [(b, b.clone()) for b in net.buffers() if b.is_floating_point()]
    if poison == "input":
        x[2, 1] = math.nan
    loss = net(x).square().mean()
    loss = loss * (math.inf if poison == "loss" else 1)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if poison == "gradient":
        net[3].weight.grad[1, 2] = math.inf
    said, finite = simclr.update(loss, net, optimizer, scaler, buffers)
    assert torch.equal(said, loss.detach().view(1)) or not loss.isfinite() or dist.is_initialized()
    return said, bool(finite)


@pytest.mark.parametrize("kind", ["sgd", "lars"])
@pytest.mark.parametrize("poison", ["input", "loss", "gradient"])
def test_update_skips_what_is_not_finite(kind, poison):
    def held(*things):
        floating = {k: v for k, v in things[0].state_dict().items() if v.is_floating_point()}
        momentum = {i: s["momentum_buffer"] for i, s in things[1].state_dict()["state"].items()}
        return {k: v.clone() for k, v in {**floating, **momentum}.items()}

    off = torch.amp.GradScaler("cpu", enabled=False)
    net, optimizer = small_net(kind)
    for seed in range(3):  # in the very first step, and later
        before = held(net, optimizer)
        assert not step_of(net, optimizer, off, 10 + seed, poison)[1]
        assert same(held(net, optimizer), before)
        assert step_of(net, optimizer, off, seed)[1]
        assert not same(held(net, optimizer), before)
    other, optimizer_of_other = small_net(kind)
    for seed in range(3):
        step_of(other, optimizer_of_other, off, seed)
    assert same(held(net, optimizer), held(other, optimizer_of_other))
    if poison == "input":  # the test can fail: without `buffers` batch norm is spoilt
        step_of(net, optimizer, off, 0, poison, restore=False)
        assert net[1].running_mean.isnan().any()


@pytest.mark.parametrize("enabled", [False, True])
def test_update_is_plain_sgd_and_the_scale_halves(enabled):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
    net, optimizer = small_net("sgd")
    plain, optimizer_of_plain = small_net("plain")
    for seed in range(3):
        assert step_of(net, optimizer, scaler, seed)[1]
        loss = plain(draw(6, 3, seed=seed, dtype=torch.float32)).square().mean()
        optimizer_of_plain.zero_grad()
        loss.backward()
        optimizer_of_plain.step()
        for a, b in zip(net.parameters(), plain.parameters()):
            assert close(a, b, 1e-6)
    before = [p.clone() for p in net.parameters()]
    for halvings in (1, 2):
        assert not step_of(net, optimizer, scaler, 3, "gradient")[1]
        assert not enabled or scaler.get_scale() == 1024.0 / 2**halvings
    assert same(before, list(net.parameters()))


# ==================================================================================================
# One text in all files: evaluation
# ==================================================================================================


def blobs(n, spread, seed=0, scale=1.0):
    """n float32 points of three classes in 4 dimensions of very different size."""
    y = torch.arange(n) % 3
    x = torch.eye(3, 4, dtype=torch.float64)[y] + spread * draw(n, 4, seed=seed)
    return ((x + 2) * torch.tensor([1, 10, 0.1, 100]) * scale).float(), y


def test_knn():
    def by_hand(x, y, x_test, y_test, k, tau, votes=None):
        right = 0
        for q, target in zip(x_test.double().tolist(), y_test.tolist()):
            near = []
            for p, label in zip(x.double().tolist(), y.tolist()):
                near.append((sum(a * b for a, b in zip(p, q)) / math.hypot(*p) / math.hypot(*q),
                             label))
            near = sorted(near, reverse=True)[:k]
            vote = [sum((votes or math.exp(c / tau)) for c, label in near if label == j)
                    for j in range(3)]
            right += vote.index(max(vote)) == target
        return 100 * right / len(x_test)

    y, y_test = torch.arange(60) % 3, torch.arange(90) % 3
    x = (draw(3, 5)[y] + draw(60, 5, seed=1)).float()
    x_test = (draw(3, 5)[y_test] + draw(90, 5, seed=2)).float()
    for k, tau in ((1, 0.07), (5, 0.07), (20, 0.5), (500, 0.1)):
        bank = x, y, x_test, y_test, k, tau
        assert close(simclr.knn(*bank), by_hand(*bank))
        assert close(simclr.knn(x * 9, *bank[1:]), by_hand(*bank))  # cosine: scale is nothing
    assert by_hand(x, y, x_test, y_test, 500, 0.1) != by_hand(x, y, x_test, y_test, 500, 0.1, 1.0)
    far = 5 * torch.eye(3, 5)[y] + 0.1 * x, y, 5 * torch.eye(3, 5)[y_test] + 0.1 * x_test, y_test
    assert simclr.knn(*far, 20, 0.07) == 100
    noise = draw(600, 5, seed=3).float().split(300)
    assert 25 < simclr.knn(noise[0], torch.arange(300) % 3, noise[1], torch.arange(300) % 3,
                           20, 0.07) < 42


def newton(x, y, x_test, y_test, decay, mistake=None):
    """Top-1 of the exact minimum, found in float64 by Newton's method."""
    x, x_test = x.double(), x_test.double()
    if mistake != "not standardised":
        x, x_test = (x - x.mean(0)) / x.std(0), (x_test - x.mean(0)) / x.std(0)
    if mistake == "no bias":
        x, x_test = F.pad(x, (0, 1)), F.pad(x_test, (0, 1))
    else:
        x, x_test = F.pad(x, (0, 1), value=1.0), F.pad(x_test, (0, 1), value=1.0)
    decay = {"decay times 10": 10 * decay, "no decay": 0}.get(mistake, decay)

    def objective(w):
        w = w.view(x.shape[1], 3)
        penalised = w if mistake == "bias decays" else w[:-1]
        return F.cross_entropy(x @ w, y) + decay / 2 * penalised.square().sum()

    w = torch.zeros(3 * x.shape[1], dtype=torch.float64)
    for _ in range(30):
        g = torch.autograd.functional.jacobian(objective, w)
        w = w - torch.linalg.pinv(torch.autograd.functional.hessian(objective, w)) @ g
    assert mistake or torch.autograd.functional.jacobian(objective, w).norm() < 1e-8
    return 100 * ((x_test @ w.view(-1, 3)).argmax(1) == y_test).double().mean().item()


def test_linear_probe():
    x, y = blobs(240, 0.5)
    keep = (y != 0) | (torch.arange(240) % 4 == 0)  # uneven classes: the bias matters
    x, y = x[keep], y[keep]
    x_test, y_test = blobs(6000, 0.5, seed=1)
    for decay in (1.0, 0.1, 1e-3):
        exact, got = (f(x, y, x_test, y_test, decay) for f in (newton, simclr.linear_probe))
        assert abs(exact - got) < 0.1, decay
    exact = newton(x, y, x_test, y_test, 0.1)
    for mistake in ("no bias", "bias decays", "decay times 10", "no decay", "not standardised"):
        assert abs(newton(x, y, x_test, y_test, 0.1, mistake) - exact) > 2, mistake
    with torch.no_grad():  # as evaluation calls it; separable data, features of any scale
        assert simclr.linear_probe(*blobs(90, 0.1), *blobs(300, 0.1, seed=1), 1e-3) == 100
    noise = draw(1200, 4, seed=3).float().split(600)
    assert 25 < simclr.linear_probe(noise[0], y := torch.arange(600) % 3, noise[1], y, 0.1) < 42


def test_probes(monkeypatch):
    """The penalty is chosen on val; what test is read with is made from fit and val."""
    calls = []

    def probe(x, y, x_test, y_test, decay):
        calls.append((x, y, x_test, y_test, decay))
        return {1e-2: 50.0}.get(decay, 40.0) + len(x)

    monkeypatch.setattr(simclr, "linear_probe", probe)
    fit, val, test = (blobs(n, 0.1, seed=n) for n in (60, 30, 90))
    args = SimpleNamespace(knn_k=5, knn_tau=0.1)
    assert simclr.probes([fit, val], args) == (110, simclr.knn(*fit, *val, 5, 0.1))
    assert len({c[4] for c in calls}) == len(calls) == 5
    assert all(same(list(c[:4]), [*fit, *val]) for c in calls)
    bank = [torch.cat(t) for t in zip(fit, val)]
    assert simclr.probes([fit, val, test], args) == (140, simclr.knn(*bank, *test, 5, 0.1))
    assert len(calls) == 11 and same(list(calls[-1]), [*bank, *test, 1e-2])


def health_of(h, z1, z2):
    """`health` on a network that answers with these: image k is grey of brightness k / 255."""
    calls = []

    def net(x):
        calls.append(0)
        i = (x[:, 0, 4, 4] * 255).round().long()
        return h[i], (z1, z2)[(len(calls) - 1) % 2][i]

    grey = torch.arange(len(h), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()
    images = common.Images(torch.zeros(len(h), dtype=torch.int64), grey,
                           torch.full((len(h), 2), 8))
    args = simclr.options("--device cpu --no-crop --no-color --image-size 8 --blur 0".split())
    data = SimpleNamespace(val=(images, torch.arange(len(h))))
    return simclr.health({simclr.KEPT: net}, data, args, common.setup(args.device))


def test_health():
    n, D = 200, 64
    h = draw(n, 10).float() * torch.logspace(0, -3, 10)
    z1 = F.normalize(draw(n, D, seed=1)).float()
    z2 = F.normalize(z1 + 0.05 * draw(n, D, seed=2).float())
    got, a, b = health_of(h, z1, z2), z1.double().numpy(), z2.double().numpy()
    assert close(got["alignment"], sum(((p - q) ** 2).sum() for p, q in zip(a, b)) / n, 1e-4)
    pairs = [np.exp(-2 * ((a[i] - a[j]) ** 2).sum()) for i in range(n) for j in range(i)]
    assert close(got["uniformity"], math.log(sum(pairs) / len(pairs)), 1e-4)
    deviations = [math.sqrt(sum((v - c.mean()) ** 2 for v in c) / (n - 1)) for c in a.T]
    assert close(got["spread"], sum(deviations) / D * math.sqrt(D), 1e-4)
    for key, x in (("rank_h", h.double().numpy()), ("rank_z", a)):
        sigma = np.sqrt(np.linalg.eigvalsh(x.T @ x).clip(0))
        p = sigma / sigma.sum()
        rank = math.exp(-sum(q * math.log(q) for q in p if q > 0))
        assert close(got[key] / rank, 1.0, 1e-3), key
    assert got["verdict"].startswith("healthy")
    point = F.normalize(z1[:1] + 1e-3 * z2)
    angle = torch.linspace(0, 6, n)
    circle = F.pad(torch.stack([angle.cos(), angle.sin()], 1), (0, D - 2))
    for z, verdict in ((point, "collapsed to a point"), (z1[:1].expand(n, -1), "collapsed to a"),
                       (circle, "dimensional collapse")):
        assert health_of(h, z, z)["verdict"].startswith(verdict)  # though h is as it was
