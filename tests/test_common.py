"""common.py, and what every method file promises with it: options, a run and its files, signals and
resume, failed steps, processes, weights, features; then image operations, batches and sets.

The frame is tested with the cheapest file that shows it; what can differ from file to file, with
all of them."""

import contextlib
import copy
import errno
import inspect
import io
import json
import math
import multiprocessing.forkserver
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tools
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from tools import METHODS, ROOT, TINY, Watched, close, draw, every, fails, method, refused, same
from torchvision import datasets
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

import common
import dino
import simclr

CPU = torch.device("cpu")
NEEDED = {"moco": "--queue 40", "dinov2": "--koleo 0 --out-dim 64 --hidden 64 --patch-size 8",
          "pretext": "--optimizer sgd --lr 0.5"}  # by a tiny run; KoLeo is of one process


BARE = "--device cpu --workers 0 --limit 48".split()


def tiny(name, *argv):
    return [*TINY, *NEEDED.get(name, "").split(), *argv]


def load(folder, file="last.pt"):
    return torch.load(Path(folder) / file, weights_only=True)


def strict_json(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def rows_of(folder):
    """metrics.jsonl without what a clock says."""
    rows = map(strict_json, (Path(folder) / "metrics.jsonl").read_text().splitlines())
    timed = ("images_per_second", "waiting")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def far(a, b):
    return float((a - b).abs().max())


def noise(n, height, width, seed=0):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


# ==================================================================================================
# Errors, files, options
# ==================================================================================================


@tools.unix
def test_files_are_whole_or_as_they_were(tmp_path, capsys, monkeypatch):
    contents = {"a.txt": "text " * 99, "a.pt": lambda part: torch.save(torch.zeros(9999), part),
                "a.png": lambda part: Image.new("RGB", (99, 99)).save(part, format="png")}
    for name, content in contents.items():
        path = tmp_path / name
        common.write(path, content)
        before = path.read_bytes()
        Path(f"{path}.{os.getpid()}.part").symlink_to("/dev/full")  # a full disk
        assert name in fails(lambda: common.write(path, content), capsys)  # noqa: B023
        assert path.read_bytes() == before and len(before) > 99
    monkeypatch.setenv("RANK", "1")  # only the first process writes
    common.write(tmp_path / "b.txt", "text")
    assert {f.name for f in tmp_path.iterdir()} == contents.keys()


@tools.unix
@pytest.mark.parametrize("where", ["file/below.txt", "file/below.pt", "none/a.pt", "n" * 300])
def test_a_path_that_cannot_be_written(where, tmp_path, capsys):
    (tmp_path / "file").touch()
    content = (lambda part: torch.save(3, part)) if where.endswith("pt") else "text"
    assert where in fails(lambda: common.write(tmp_path / where, content), capsys)


def test_to_json():
    text = common.to_json({"a": [1, math.nan, (2.5, -math.inf)], "b": {"c": math.inf, "d": "e"}})
    assert text == '{"a": [1, null, [2.5, null]], "b": {"c": null, "d": "e"}}'


def test_number():
    whole, share = common.number(int, 1)["type"], common.number(float, 0, 1)["type"]
    assert whole("3") == 3 and share("1") == 1.0 and share("0") == 0.0
    for parse, text in ((whole, "0"), (whole, "1.5"), (share, "1.01"), (share, "nan"), (share, "x"),
                        (common.POSITIVE["type"], "inf"), (common.POSITIVE["type"], "0")):
        with pytest.raises(ValueError):
            parse(text)


@every
def test_the_table_is_the_command_line(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "999")
    with pytest.raises(SystemExit) as stopped:
        method(name).main(["--help"])
    usage = " ".join(capsys.readouterr().out.split())
    groups = [usage.index(f" {g}: ") for g in "run data method evaluation".split()]
    assert stopped.value.code == 0 and groups == sorted(groups) and f"runs/{name}-" in usage
    for option, (*defaults, allowed, meaning) in method(name).OPTIONS.items():
        flag = f"--{option.replace('_', '-')}"
        if allowed is not common.FLAG:
            meaning += f" ({' | '.join(map(common.show_value, defaults))})"
        assert len(defaults) == 3 and re.search(rf" {flag}[ ,].*?{re.escape(meaning)}", usage)
        allowed = {"choices": allowed} if isinstance(allowed, str) else allowed
        for wrong in ("nan", "-1", "many") if {"type", "choices"} & allowed.keys() else ():
            values = [flag] + [wrong] * allowed.get("nargs", 1)
            assert flag in fails(lambda: tools.options(method(name), values), capsys)  # noqa: B023


@every
def test_what_is_left_open_comes_from_the_recipe(name, capsys):
    file, columns = method(name), {"built-in": 0, "small": 1, "large": 2, "CPU": 0}
    for recipe, side, device in (("built-in", None, "cuda"), ("small", 32, "cuda"),
                                 ("large", 300, "cuda"), ("CPU", 28, "cpu"), ("large", 300, "cpu")):
        args = tools.completed(file, [], side, n=5000, device=device)
        printed = capsys.readouterr().out
        assert f"recipe {recipe}" in printed
        assert ("CPU (with a GPU " in printed) == (recipe == "CPU")
        values = {k: row[columns[recipe]] for k, row in file.OPTIONS.items()}
        if recipe == "CPU":
            values |= file.CPU
        if recipe in ("small", "large"):
            values["image_size"] = min(values["image_size"], side)
        for k, default in values.items():
            value = default(args, 5000) if callable(default) else default
            assert getattr(args, k) == ([*value] if isinstance(value, tuple) else value), k
            assert f" {k}=" in printed
        assert args.eval_every == math.ceil(args.epochs / 4) and args.images == 5000
        args = tools.completed(file, "--lr 7 --image-size 24 --epochs 9".split(), side)
        assert (args.lr, args.image_size, args.epochs, args.eval_every) == (7, 24, 9, 3)
    for recipe, size, device in (("small", 64, "cuda"), ("large", 96, "cuda"), ("CPU", 64, "cpu"),
                                 ("large", 96, "cpu")):
        args = tools.completed(file, ["--image-size", size], 300, device=device)
        printed = capsys.readouterr().out
        assert f"recipe {recipe}" in printed and args.image_size == size
        hinted = "--image-size 64 takes one for a CPU" in printed
        assert hinted == (recipe == "large" and device == "cpu")


def test_an_hour_of_a_core():
    """Fewer epochs of more or larger images, at least one and at most 200."""
    epochs = [tools.completed(simclr, ["--image-size", size], 64, n=n, device="cpu").epochs
              for size, n in ((32, 50_000), (32, 20_000), (64, 20_000), (64, 10**6), (32, 500))]
    assert epochs == [24, 60, 15, 1, 200]
    for file, epochs in (("byol", 16), ("moco", 30), ("dino", 12), ("ibot", 10), ("pretext", 3)):
        assert tools.completed(method(file), [], 32, n=50_000, device="cpu").epochs == epochs


def test_a_small_set_is_one_batch():
    """Unless a larger batch is asked for; from 8 images on in eights, for MoCo's parts."""
    assert tools.completed(simclr, [], 32, n=157).batch_size == 152
    assert tools.completed(simclr, [], 32, n=157, device="cpu").batch_size == 152
    with pytest.raises(SystemExit):
        tools.completed(simclr, ["--batch-size", 256], 32, n=157)
    assert tools.completed(simclr, [], 32, n=7).batch_size == 7
    with pytest.raises(SystemExit):
        tools.completed(simclr, [], 32, n=1)


@pytest.mark.parametrize("argv, names", [
    ("--epochs 0", "epochs"), ("--batch-size 1", "batch-size"), ("--seed -1", "seed"),
    ("--limit 0", "limit"), ("--amp fp8", "amp"), ("--no-such-option", "no-such-option"),
    ("--batch-size 4096", "batch-size"), ("--dataset nowhere", "nowhere"),
    ("--device tpu", "finds cpu"), ("--init none.pt", "none.pt"),
    ("--eval none.pt", "none.pt"), ("--dataset {empty}", "no images"),
    ("--init a.pt --eval b.pt", "one of the two"),
    ("--out {empty}/file/run", "file/run"), ("--out " + 300 * "n", "too long")])
def test_wrong_options(argv, names, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file").touch()
    argv = [word.format(empty=tmp_path / "empty") for word in argv.split()]
    assert names in refused(simclr, [*TINY, "--out", tmp_path / "run", *argv], capsys)
    assert not (tmp_path / "run" / "args.json").exists()  # the folder is free again


# ==================================================================================================
# A run: processes, folder, loop, signals
# ==================================================================================================

LOOP = {"epochs": (1, 1, 1, common.FROM_1, ""), "batch_size": (1, 1, 1, common.FROM_1, "")}


class Steps:
    """The data of a run without images: three steps an epoch."""

    per_epoch = 3

    def epoch(self, number, first, *_):
        return iter([(f"views {3 * number + i}", None) for i in range(first, 3)])


def opened(*argv):
    """A run, not of any file."""
    argv = ["--device", "cpu", "--epochs", "3", "--batch-size", "4", *map(str, argv)]
    args = common.options("loop", "A loop", LOOP, argv)
    args.eval_every = 2
    return common.Run(args)


def loop(run, bad=(), before=lambda step: None, evaluate=lambda: None, **state):
    """The loop of train without a network; the loss of step k is k, kl twice that, those of bad
    steps are not finite -> whether an evaluation was due, by epoch."""
    due = []
    run.restore(state)
    for epoch in run.epochs(Steps()):
        for step, views in run.batches(Steps(), epoch, []):
            assert views == f"views {step}"
            before(step)
            loss = torch.tensor(math.nan if step in bad else step)
            run.log(torch.tensor(step not in bad), loss=loss, kl=2 * loss, lr=0.1 * step)
        due.append(run.end_epoch(state))
        evaluate()
        run.save(state)
    return due


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run in one process."""
    with opened("--out", tmp_path_factory.mktemp("one") / "run") as run:
        yield run


def test_a_run_claims_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [str(opened().folder) for _ in range(3)]  # at once
    assert names == ["runs/loop-toys-s0", "runs/loop-toys-s0-2", "runs/loop-toys-s0-3"]
    torch.save({}, "x.pt")
    assert str(opened("--eval", "x.pt", "--seed", 7).folder) == "runs/loop-toys-s7-eval"
    for begun in (0, 0, 1):  # a run that fails before its first step frees its folder
        with pytest.raises(ZeroDivisionError), opened() as run:
            run.step = begun
            run.step = 1 / 0
        assert run.folder.name.endswith("-4")
    assert opened("--out", "runs/loop-toys-s0/").folder.name.endswith("-5")


def test_resume_takes_the_newest_run_that_was_interrupted(tmp_path, capsys):
    def resumed():
        return opened("--resume", "--out", tmp_path / "a").folder.name

    for name, files in (("a", "last.pt results.json"), ("a-2", "last.pt"), ("a-3", "last.pt"),
                        ("a-4", "last.pt results.json"), ("a-5", "")):
        (tmp_path / name).mkdir()
        for file in ["args.json", *files.split()]:
            (tmp_path / name / file).touch()
    for newest in ("a-3", "a-2"):
        assert resumed() == newest
        (tmp_path / newest / "results.json").touch()
    assert "finished" in fails(resumed, capsys)


def test_resume_begins_where_there_is_nothing_to_go_on_with(tmp_path, capsys):
    """A job that is started again and again has one command. A run that did not come to its first
    last.pt keeps its folder."""
    argv = ["--out", tmp_path / "a", "--resume"]
    for name in ("a", "a-2"):
        run = opened(*argv)
        assert run.folder.name == name and not run.args.resume
        assert "a run begins" in capsys.readouterr().out
    with run:
        assert loop(run) == [False, True, False]
    run = opened(*argv)
    assert run.folder.name == "a-2" and run.args.resume
    assert "a run begins" not in capsys.readouterr().out


@tools.unix
def test_a_run_that_goes_on_is_not_resumed(tmp_path, capsys):
    """Two processes would write one last.pt. What was stopped is free, in the same process, too."""
    argv = ["--out", tmp_path / "run"]
    with opened(*argv) as run:
        loop(run)
        with opened("--out", tmp_path / "other"):  # its own folder is free
            pass
        assert "still going on" in fails(opened(*argv, "--resume").__enter__, capsys)
    with opened(*argv, "--resume"):
        pass


def test_processes_and_devices(monkeypatch, tmp_path, capsys):
    for amp, dtype in (("auto", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert opened("--amp", amp, "--out", tmp_path / "run").dtype == dtype
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for version, processes, words in (("2.13.0", "1", "off on mps"),
                                      ("2.9.1", "1", "finds cpu here ("),
                                      ("2.13.0", "2", "finds cpu here (")):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        monkeypatch.setenv("WORLD_SIZE", processes)
        assert words in fails(lambda: opened("--device", "mps", "--amp", "fp16"), capsys)


def test_a_device_that_does_not_work(monkeypatch, tmp_path, capsys):
    def no_compiler(f):
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: none found\n\nSet T")

    def too_old(x):
        raise RuntimeError("CUDA error: no kernel image is available\nCUDA kernel errors might")

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert opened("--out", tmp_path / "run").folder.exists()
    error = fails(lambda: opened("--compile", "--out", tmp_path / "other"), capsys)
    assert error == "error: cpu with --compile does not work: InvalidCxxCompiler: none found\n"
    monkeypatch.setattr(torch, "neg", too_old)
    error = fails(lambda: opened("--out", tmp_path / "other"), capsys)
    assert error == "error: cpu does not work: CUDA error: no kernel image is available\n"
    assert not (tmp_path / "other").exists()


def test_out_of_memory(tmp_path, capsys):
    def call(error=None):
        with opened("--out", tmp_path / "run", "--batch-size", 64):
            if error:
                raise error
            torch.empty(2**60)

    cuda = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    mps = RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB")
    windows = RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")
    for error in (None, MemoryError(), cuda, mps, windows):
        words = fails(lambda: call(error), capsys)  # noqa: B023
        assert "the memory of cpu is not enough" in words and "--batch-size, now 64" in words
        assert not (tmp_path / "run" / "args.json").exists()  # the folder is free again
    with pytest.raises(RuntimeError, match="another"):
        call(RuntimeError("another"))


def test_copies_to_mps_are_waited_for():
    copies = SimpleNamespace(to=lambda device, non_blocking: non_blocking)
    for device, unwaited in (("cuda", True), ("cuda:0", True), ("mps", False), ("cpu", False)):
        assert common.to_device(copies, torch.device(device)) == unwaited
        assert common.to_device(copies, device) == unwaited
    assert "non_blocking" not in "".join(map(inspect.getsource, map(method, METHODS)))


def test_log_averages_what_is_good(tmp_path, capsys):
    def a_minute_later(step):
        assert (tmp_path / "run" / "last.pt").exists() == (step > 5)
        run.saved -= 61 if step == 5 else 0

    with opened("--out", tmp_path / "run") as run:
        run.chance = {"loss": 2.0}
        assert loop(run, (1, 3, 4, 5), a_minute_later) == [False, True, False]
    assert load(tmp_path / "run")["progress"]["step"] == 9
    rows = rows_of(tmp_path / "run")
    means = [(row["epoch"], row["loss"], row["kl"], row["skipped"]) for row in rows]
    # an epoch of failures has no loss: 0 would be the best of all
    assert means == [(1, 1.0, 2.0, 1), (2, None, None, 3), (3, 7.0, 14.0, 0)]
    assert [row["lr"] for row in rows] == pytest.approx([0.2, 0.5, 0.8])
    printed = capsys.readouterr().out
    assert "epoch 1: loss 1.000 (chance 2.000), kl 2.000, 1 steps skipped" in printed


@pytest.mark.parametrize("how", ["signal", "a minute"])
def test_an_evaluation_may_be_killed(how, tmp_path):
    """What was trained before it is saved."""
    def at_the_end_of_an_epoch(step):
        if step == 5 and how == "signal":
            signal.raise_signal(signal.SIGTERM)
        elif step == 5:
            run.saved -= 61

    def evaluate():
        saved.append((tmp_path / "run" / "last.pt").exists())

    saved, due = [], None
    with contextlib.suppress(SystemExit), opened("--out", tmp_path / "run") as run:
        due = loop(run, before=at_the_end_of_an_epoch, evaluate=evaluate)
    assert saved == ([False, True] if how == "signal" else [False, True, True])
    assert due == (None if how == "signal" else [False, True, False])


def test_a_run_that_keeps_failing_ends(tmp_path, capsys):
    bad = {step for step in range(2, 400) if step != 49}
    with opened("--epochs", 99, "--out", tmp_path / "run") as run:
        error = fails(lambda: loop(run, bad), capsys)
    assert "50 steps, up to 100:" in error  # 47 failures before the good step do not count
    assert not (tmp_path / "run" / "last.pt").exists()


@tools.unix
@pytest.mark.parametrize("world", [1, 2])
def test_a_closed_terminal(world, tmp_path, monkeypatch):
    """SIGHUP comes twice and saves, also before SIGTERM; after nohup it is ignored."""
    before = signal.getsignal(signal.SIGHUP)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # they are put back
    try:
        for then in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGHUP, then)
            run = opened("--out", tmp_path / str(then))
            next(run.epochs(Steps()))
            assert (signal.getsignal(signal.SIGHUP) == run._catch) == (then == signal.SIG_DFL)
        for _ in range(2):
            signal.raise_signal(signal.SIGHUP)
        assert run.signal == signal.SIGHUP and sys.stdout.name == sys.stderr.name == os.devnull
        run.world = world
        with contextlib.suppress(KeyboardInterrupt):  # which would end pytest
            signal.raise_signal(signal.SIGTERM)
        assert run.signal == signal.SIGTERM
        run.noticed -= 6
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        run.handlers.close()
        assert signal.getsignal(signal.SIGHUP) == then
        signal.signal(signal.SIGHUP, before)


def test_nothing_reads_the_output(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", sys.stdout)

    def run():
        with opened("--out", tmp_path / "run"):
            raise BrokenPipeError

    assert "nothing reads" in fails(run, capsys)


def test_the_printed_function_is_that_which_ran(monkeypatch):
    """At the end of a run the file may be another, or gone."""
    monkeypatch.setattr(inspect, "getsource", lambda f: 1 / 0)
    for name, network, kept in (("simclr", "convnet", "encoder"),
                                ("dino", "vit_conv", "conv_stem")):
        args = Namespace(arch=network, stem="7x7", patch_size=8, image_size=32)
        assert f"def {kept}(" in method(name).loading(args)
    monkeypatch.setattr(inspect, "getsource", lambda f: (_ for _ in ()).throw(OSError))
    assert common.source(common.source) == ""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_signals(first, tmp_path, capsys):
    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    before, steps, net = handlers(), [], nn.Linear(2, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with pytest.raises(SystemExit) as stopped, opened("--out", tmp_path / "run") as run:
        loop(run, before=lambda step: step == 4 and signal.raise_signal(first), net=net,
             x=torch.arange(3), scaler=scaler)
    assert stopped.value.code == 128 + first and handlers() == before
    assert "stopped after step 5 of 9" in capsys.readouterr().out
    other, x, its = nn.Linear(2, 2), torch.zeros(3, dtype=torch.int64), torch.amp.GradScaler("cpu")
    with opened("--out", tmp_path / "run", "--resume") as run:
        due = loop(run, before=steps.append, net=other, x=x, scaler=its)
    assert steps == [5, 6, 7, 8] and due == [True, False] and x.tolist() == [0, 1, 2]
    assert same(net.state_dict(), other.state_dict()) and its.get_scale() == 8
    assert [row["loss"] for row in rows_of(tmp_path / "run")] == [1, 4, 7]  # the half epoch counts
    with pytest.raises(SystemExit) as stopped, opened("--out", tmp_path / "b") as run:
        assert handlers() == before  # no checkpoint could answer a signal yet
        next(run.epochs(Steps()))
        signal.raise_signal(first)
        assert run.signal == first
        run.world = 2
        signal.raise_signal(first)  # from torchrun, which passes on what all have had
        steps.append("goes on")
        run.noticed -= 5 * (first == signal.SIGTERM)
        run.world = 1 + (first == signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # a second one ends it at once
    assert stopped.value.code == 130 and handlers() == before and steps[-1] == "goes on"


def test_a_signal_in_the_last_evaluation(tmp_path, capsys):
    with pytest.raises(SystemExit), opened("--epochs", 1, "--out", tmp_path / "run") as run:
        loop(run, evaluate=lambda: signal.raise_signal(signal.SIGTERM))
    assert "stopped after step 3 of 3" in capsys.readouterr().out
    assert load(tmp_path / "run")["progress"]["step"] == 3


@pytest.fixture
def no_curves(monkeypatch):
    """As if matplotlib were not there: it takes longer than a tiny run."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def test_main_outside_the_main_thread(tmp_path, no_curves):
    results, argv = [], [*TINY, *"--limit 16 --epochs 1 --eval-every 0 --out".split()]
    with contextlib.redirect_stdout(io.StringIO()):
        thread = threading.Thread(target=lambda: results.append(
            simclr.main([*argv, str(tmp_path / "run")])))
        thread.start()
        thread.join()
    assert "linear_top1" in results[0]


def test_a_log_file_has_every_line_at_once(tmp_path):
    line = ("import common, os, simclr, sys; args = common.options('x', '', simclr.OPTIONS, "
            "sys.argv[1:]); common.Run(args); os._exit(0)")  # without flushing
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    run = subprocess.run([sys.executable, "-c", line, "--out", tmp_path / "run"], cwd=ROOT,
                         env=env, capture_output=True)
    assert run.stdout.startswith(b"x on toys"), run.stderr


def test_a_long_epoch_is_heard_of_in_a_log_file(tmp_path, monkeypatch, capsys):
    clock, sleep = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sleep[0])

    def wait(step):
        sleep[0] += 130

    with opened("--out", tmp_path / "run", "--epochs", "1") as run:
        loop(run, before=wait)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step")]
    assert lines == ["step 3 of 3: loss 1.000, lr 0.2"]


@pytest.mark.parametrize("terminal, tool", [(True, True), (False, True), (True, False)])
def test_bar(terminal, tool, tmp_path, monkeypatch, capsys):
    if not tool:
        monkeypatch.setattr(common, "tqdm", None)
    elif common.tqdm is None:
        pytest.skip("no tqdm here")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with opened("--out", tmp_path / "run") as run:
        loop(run, before=lambda step: time.sleep(0.11))
    bar = capsys.readouterr().err
    assert ("epoch 3" in bar and "loss 6.500" in bar) == (terminal and tool)
    assert all(0 <= row["waiting"] < 0.5 < 10 < row["images_per_second"] < 37 for row in run.rows)


# ==================================================================================================
# Steps that fail
# ==================================================================================================


def held(state):
    """What a step changes, by path, but for the counters of batch norm and the scale of fp16."""
    if isinstance(state, torch.Tensor):
        return {"": state.clone()}
    state = state.state_dict() if hasattr(state, "state_dict") else state
    still = ("num_batches_tracked", "param_groups", "scaler")
    parts = {k: held(v) for k, v in state.items() if not str(k).endswith(still)}
    return {f".{k}{path}": t for k, part in parts.items() for path, t in part.items()}


class Poisoned(Watched):
    """The second step of a run has an image that is no number; `kept`: (ok, held) by step."""

    def restore(self, state):
        super().restore(state)
        self.kept = []

    def batches(self, *given):
        for step, views in super().batches(*given):
            for x in views if step == 1 else ():
                x[0, 0, 0, 0] = math.nan
            yield step, views

    def log(self, ok, **figures):
        self.kept.append((bool(ok), held(self.state)))
        super().log(ok, **figures)


@every
def test_a_failed_step_changes_nothing_and_labels_are_not_needed(name, tmp_path):
    argv = tiny(name, "--epochs", "1", "--eval-every", "0", "--out", tmp_path / "run")
    net, data, run = tools.train(method(name), argv, Poisoned)
    (first, a), (second, b), (third, c) = run.kept
    assert (first, second, third) == (True, False, True) and same(a, b)
    parts = {k: (k.split(".")[1], "running" in k) for k in a  # weights, EMA, moments, queue, ...
             if k != ".centers" or not torch.equal(b[k], c[k])}  # DINOv2's, not in use by default
    changed = {parts[k] for k in parts if not torch.equal(b[k], c[k])}
    assert changed == set(parts.values()) and len(changed) > 1
    assert run.rows[0]["skipped"] == 1 and math.isfinite(run.rows[0]["loss"])
    data.train.labels[:] = -1
    with contextlib.redirect_stdout(io.StringIO()):
        results = method(name).evaluate(net, data, run.args, run, test=True)
    assert {"verdict", "rank_h"} <= results.keys()
    assert not [k for k in results if k.endswith("top1")]


def small_net(kind):
    """A net with batch norm and its optimiser, made as in `train`."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    if kind == "adamw":
        return net, torch.optim.AdamW(net.parameters(), 0.02, weight_decay=0.5, fused=True)
    rule, more = (simclr.LARS, {}) if kind == "lars" else (torch.optim.SGD, {"fused": True})
    return net, rule(net.parameters(), 0.1, momentum=0.9, weight_decay=0.01, **more)


OFF = torch.amp.GradScaler("cpu", enabled=False)


def step_of(run, net, optimizer, scaler, seed, poison=None):
    """A step as in `train`, on fixed data, poisoned or not -> ok."""
    undo, x = common.Undo(net), draw(6, 3, seed=seed, dtype=torch.float32)
    if poison == "input":
        x[2, 1] = math.nan
    loss = net(x).square().mean()
    loss = loss * math.inf if poison == "loss" else loss
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if poison == "gradient":
        net[3].weight.grad[1, 2] = math.inf
    scaler.unscale_(optimizer)
    ok = run.update(optimizer, scaler, loss)
    undo(unless=ok)
    return bool(ok)


@pytest.mark.parametrize("kind", ["sgd", "lars", "adamw"])
@pytest.mark.parametrize("poison", ["input", "loss", "gradient"])
def test_update_skips_what_is_not_finite(kind, poison, one):
    def now():
        """Weights, statistics and moments; a moment that is not yet there is 0."""
        moments = {f"{i} {k}": optimizer.state.get(p, {}).get(k, torch.tensor(0.0)) + 0 * p
                   for i, p in enumerate(net.parameters())
                   for k in ("exp_avg", "exp_avg_sq", "momentum_buffer", "step")}
        return held({"net": net} | moments)

    (net, optimizer), (other, its) = small_net(kind), small_net(kind)
    for seed in range(3):  # in the very first step, and later
        before = now()
        assert not step_of(one, net, optimizer, OFF, 10 + seed, poison)
        assert same(now(), before)
        assert step_of(one, net, optimizer, OFF, seed) and step_of(one, other, its, OFF, seed)
        assert not same(now(), before)
    assert same(held({"net": net}), held({"net": other}))


@pytest.mark.parametrize("rule", [torch.optim.RMSprop, torch.optim.AdamW])
def test_update_is_for_fused_optimisers(rule, one, capsys):
    """The others would go on with NaN, or end in an assertion of PyTorch's."""
    net, _ = small_net("sgd")
    optimizer = rule(net.parameters(), 0.1)
    assert f"{rule.__name__} needs fused" in fails(
        lambda: step_of(one, net, optimizer, OFF, 0), capsys)


@pytest.mark.parametrize("enabled", [False, True])
def test_update_is_plain_sgd_and_the_scale_halves(enabled, one):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
    (net, optimizer), (plain, _) = small_net("sgd"), small_net("sgd")
    its = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    for seed in range(3):
        assert step_of(one, net, optimizer, scaler, seed)
        its.zero_grad()
        plain(draw(6, 3, seed=seed, dtype=torch.float32)).square().mean().backward()
        its.step()
        assert all(close(a, b, 1e-6) for a, b in zip(net.parameters(), plain.parameters()))
    before = [p.clone() for p in net.parameters()]
    for halvings in (1, 2):
        assert not step_of(one, net, optimizer, scaler, 3, "gradient")
        assert not enabled or scaler.get_scale() == 1024.0 / 2**halvings
    assert same(before, list(net.parameters()))


@pytest.mark.parametrize("name, half", [("simclr", "bf16"), *((m, "fp16") for m in METHODS)])
def test_half_precision_on_a_cpu(name, half, tmp_path):
    """The loss of the first step is near to float32's and not the same, or, where the gradient
    overflows at the scale to begin with, the step is left out and the scale is halved."""
    runs = []
    for amp in ("off", half):
        argv = f"--amp {amp} --limit 16 --epochs 1 --eval-every 0 --out".split()
        runs.append(tools.train(method(name), tiny(name, *argv, tmp_path / amp), Watched)[2])
    whole, halved = (run.rows[0] for run in runs)
    if halved["skipped"]:
        assert half == "fp16" and runs[1].state["scaler"].get_scale() == 2.0**15
    else:
        assert 0 < abs(whole["loss"] - halved["loss"]) < 0.05


# ==================================================================================================
# Weights from files
# ==================================================================================================


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def saved(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    return Namespace(method="toy", init=str(tmp_path / "a.pt"), eval=None,
                     resume=False)


def test_checkpoints_that_are_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("a text").write_text("no checkpoint")
    contents = {"code": {"x": Code()}, "no dict": [1], "cut": {"x": torch.zeros(999)}}
    for name, content in contents.items():
        torch.save(content, name)
    Path("cut").write_bytes(Path("cut").read_bytes()[:1500])
    for name in ("missing", "folder", "a text", *contents):
        error = fails(lambda: common.read_checkpoint(name), capsys)  # noqa: B023
        assert error.startswith(f"error: {name} ")
    assert not Path("ran").exists()


class Toy(nn.Module):
    def __init__(self, seed, out=2):
        torch.manual_seed(seed)
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, out)


THEIRS, OTHER = Toy(1).state_dict(), Toy(2).state_dict()
BACKBONE = {k.removeprefix("backbone."): v for k, v in THEIRS.items() if "head" not in k}
ALL = {k for k, v in THEIRS.items() if v.is_floating_point()}
BODY = {k for k in ALL if "head" not in k}


def halve(weights, net):
    return weights | {"backbone.2.weight": weights["backbone.2.weight"][:4]}


@pytest.mark.parametrize("content, more, expected", [
    (THEIRS, {}, ALL), (BACKBONE, {}, BODY),
    ({"state_dict": BACKBONE, "meta": {"lr": 1}}, {}, BODY),
    ({"method": "toy", "state": {"net": THEIRS, "net_ema": OTHER}}, {}, ALL),
    ({"method": "toy", "state": {"net_ema": THEIRS}}, {"kept": "net_ema"}, ALL),
    ({"student": THEIRS, "teacher": OTHER}, {"branch": "student"}, ALL),
    ({"teacher": {f"module.{k}": v for k, v in THEIRS.items()}, "epoch": 3}, {}, ALL),
    ({f"_orig_mod.module.{k}": v for k, v in THEIRS.items()}, {}, ALL),
    ({"model": {f"module._orig_mod.{k}": v for k, v in BACKBONE.items()}}, {}, BODY),
    ({k.replace("backbone.", "trunk."): v for k, v in THEIRS.items()},
     {"renames": [("^tr", "back"), ("kunk", "kbone")]}, ALL),
    (BACKBONE | {"fc.weight": torch.zeros(9, 4), "head.bias": torch.zeros(9)}, {}, BODY),
    ({k: v for k, v in BACKBONE.items() if "num_batches" not in k}, {}, BODY),
    ({k: v for k, v in THEIRS.items() if k != "head.bias"}, {}, BODY),
    (THEIRS | {"head.bias": torch.zeros(5)}, {}, BODY),
    (BACKBONE | {"2.weight": BACKBONE["2.weight"].repeat(2, 1)}, {"adapt": halve}, BODY)])
def test_load_weights(content, more, expected, tmp_path, capsys):
    net = Toy(0)
    before, args = copy.deepcopy(net.state_dict()), saved(tmp_path, content)
    if len(content) % 2:
        args.init, args.eval = None, args.init
    common.load_weights(net, args, **more)
    after, printed = net.state_dict(), capsys.readouterr().out
    assert {k for k in ALL if torch.equal(after[k], THEIRS[k])} == expected
    assert all(torch.equal(after[k], before[k]) for k in ALL - expected)
    # what the file has: the count of batch norm's steps is not in old ones
    assert re.search(rf": ({len(expected)}|{len(expected) + 1}) of \1 tensors loaded", printed)
    assert ("the head stays random" in printed) == (expected == BODY)


@pytest.mark.parametrize("content, words", [
    ({f"layer.{i}": torch.zeros(1) for i in range(999)}, "996 more"),
    (BACKBONE | {"one_more.weight": torch.zeros(2)}, "backbone.one_more.weight"),
    ({k: v for k, v in BACKBONE.items() if k != "0.bias"}, "it lacks backbone.0.bias,"),
    (BACKBONE | {"0.bias": torch.zeros(5)}, "backbone.0.bias"), ({}, "another network"),
    ({"method": "other", "state": {"net": THEIRS}}, "is a run of other"),
    ({"method": "toy", "state": {}}, "another network"), ({"state": THEIRS}, "another network"),
    ({"method": "toy", "state": {"net": BACKBONE}}, "it lacks head.weight, head.bias"),
    ({"method": "toy", "state": 3}, "a.pt"), ({0: torch.zeros(2)}, "another network")])
def test_another_network_is_refused_in_a_short_sentence(content, words, tmp_path, capsys):
    error = fails(lambda: common.load_weights(Toy(0), saved(tmp_path, content)), capsys)
    assert words in error and "a.pt" in error and len(error) < 500


def test_torchvision_weights_in_and_timm_out(tmp_path, capsys):
    torch.manual_seed(0)
    theirs, net = torchvision.models.resnet18(), simclr.SimCLR("resnet18", "7x7")
    common.load_weights(net, saved(tmp_path, theirs.state_dict()), mean=simclr.MEAN)
    printed = capsys.readouterr().out
    assert "120 of 120 tensors loaded" in printed and "less a mean of [0.485" in printed
    for own, meta in (dino.MEAN, {}), (simclr.MEAN, {"mean": simclr.MEAN}):
        made = {"state_dict": theirs.state_dict(), "meta": meta}
        common.load_weights(net, saved(tmp_path, made), mean=own)
        assert "warning" not in capsys.readouterr().out
    made = {"state_dict": theirs.state_dict(), "meta": {"mean": simclr.MEAN, "task": "jigsaw"}}
    common.load_weights(net, saved(tmp_path, made), mean=simclr.MEAN)
    assert "does not take RGB images" in capsys.readouterr().out
    timm, theirs.fc = pytest.importorskip("timm"), nn.Identity()
    other = timm.create_model("resnet18", num_classes=0)
    other.load_state_dict(net.backbone.state_dict())  # strictly; num_classes=0 is without fc
    with torch.no_grad():
        h, *others = [n.eval()(noise(2, 64, 64)) for n in (net.backbone, theirs, other)]
    assert close(h, others[0], 1e-5) and close(h, others[1], 1e-5) and h.std() > 1e-3


def test_a_vit_on_a_grid_that_is_no_square_is_refused(tmp_path, capsys):
    timm = pytest.importorskip("timm")
    net = timm.models.VisionTransformer(img_size=(16, 32), patch_size=8, embed_dim=128, depth=3,
                                        num_heads=4, num_classes=0)
    argv = ["--out", tmp_path / "run", "--init", saved(tmp_path, net.state_dict()).init]
    assert "another network" in refused(dino, tiny("dino", *argv, "--patch-size", "8"), capsys)


# ==================================================================================================
# Features and what they say
# ==================================================================================================


def test_embed(one):
    (images, index), crop = seven_images(), [common.Crop(16, 1.0)]
    mean, column, labels = features(one)
    x = images.pixels[index].float() / 255
    assert close(mean, x.mean((2, 3)), 1e-5) and column.shape == (7, 3, 16)
    assert torch.equal(labels, index)
    w = torch.ones(1, requires_grad=True)
    short = common.embed(lambda x: [(x[0] * w).half()], (images, index), crop, one, limit=3)
    assert short[0].shape == (3, 3, 16, 16) and short[0].dtype == torch.float32
    assert short[1].tolist() == [3, 4, 5] and not short[0].requires_grad  # evenly spaced
    crop = [common.Crop(16, (0.2, 1.0), RATIO)]
    drawn = [common.embed(lambda x: x, (images, index), crop, one) for _ in range(2)]
    assert same(*drawn) and far(drawn[0][0], x) > 0.1  # every evaluation has the same draws


def test_knn():
    def by_hand(k, tau, votes=None):
        correct = 0
        for q, target in zip(x_test.double().tolist(), y_test.tolist()):
            near = sorted(((sum(a * b for a, b in zip(p, q)) / math.hypot(*p) / math.hypot(*q), c)
                           for p, c in zip(x.double().tolist(), y.tolist())), reverse=True)[:k]
            vote = [sum((votes or math.exp(s / tau)) for s, c in near if c == j) for j in range(3)]
            correct += vote.index(max(vote)) == target
        return 100 * correct / len(x_test)

    y, y_test = torch.arange(60) % 3, torch.arange(90) % 3
    x = (draw(3, 5)[y] + draw(60, 5, seed=1)).float()
    x_test = (draw(3, 5)[y_test] + draw(90, 5, seed=2)).float()
    test = x_test, y_test
    for k, tau in ((1, 0.07), (5, 0.07), (20, 0.5), (500, 0.1)):
        for scale in (1, 9):  # cosine: scale is nothing
            assert close(common.knn((scale * x, y), test, k=k, tau=tau), by_hand(k, tau))
        fit, val = (x[:40], y[:40]), (x[40:], y[40:])  # for test both are the neighbours
        assert close(common.knn(fit, val, test, k=k, tau=tau), by_hand(k, tau))
    assert by_hand(500, 0.1) != by_hand(500, 0.1, 1.0)
    nearest = common.knn((x, y), test, k=1)  # alone counts where tau is tiny: no overflow
    assert common.knn((x, y), test, tau=1e-9) == nearest != common.knn((x, y), test, tau=0.1)
    assert math.isnan(common.knn((x * math.nan, y), test))
    assert math.isnan(common.knn((x, y), (x * math.inf, y), test))


def test_health():
    n, D = 200, 80
    h = draw(n, 10).float() * torch.logspace(0, -3, 10)
    z1 = F.normalize(draw(n, D, seed=1)).float()
    z2 = F.normalize(z1 + 0.05 * draw(n, D, seed=2).float())
    got, a, b = common.health(h, 3 * z1, 2 * z2, "labels"), z1.double().numpy(), z2.double().numpy()
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
    assert common.effective_rank(torch.zeros(4, 3)) == 1  # of dead units
    assert got["verdict"].startswith("healthy: z has spread ")
    angle = torch.linspace(0, 6, n)
    circle = F.pad(torch.stack([angle.cos(), angle.sin()], 1), (0, D - 2))
    point = F.normalize(z1[:1] + 1e-3 * z2)
    sphere = F.pad(F.normalize(draw(n, 3, seed=3)).float(), (0, D - 3))  # 3 % of 80 are 2.4
    for z, verdict in ((point, "collapsed to a point"), (z1[:1].expand(n, -1), "collapsed to a"),
                       (sphere, "healthy"), (circle, "dimensional collapse"),
                       (z1 * math.inf, "features are not")):
        assert common.health(h, z, z)["verdict"].startswith(verdict)  # though h is as it was
    assert common.health(h * math.nan, z1, z2)["verdict"] == "features are not finite"
    assert common.health(h, z1, z1, name="p", least=1.1)["verdict"].startswith("collapsed to a poi")
    assert common.health(h[:3], z1[:3], z2[:3]) == {"verdict": "3 images, too few to say"}
    assert common.health(h[:4], z1[:4], z2[:4]).keys() == got.keys()


# The linear probe stands in every method file, with one text

PENALTIES = (1.0, 0.1, 1e-3)
GIVEN = [0.3 * penalty for penalty in PENALTIES]  # as for ten classes; blobs have three


def blobs(n, spread, seed=0):
    """n float32 points of three classes in 4 dimensions of very different size."""
    y = torch.arange(n) % 3
    x = torch.eye(3, 4, dtype=torch.float64)[y] + spread * draw(n, 4, seed=seed)
    return ((x + 2) * torch.tensor([1, 10, 0.1, 100])).float(), y


def newton(x, y, x_test, y_test, penalty, mistake=None):
    """Top-1 of the exact minimum, found in float64 by Newton's method."""
    x, x_test = x.double(), x_test.double()
    if mistake != "not standardised":
        x, x_test = (x - x.mean(0)) / x.std(0), (x_test - x.mean(0)) / x.std(0)
    ones = 0.0 if mistake == "no bias" else 1.0
    x, x_test = F.pad(x, (0, 1), value=ones), F.pad(x_test, (0, 1), value=ones)
    penalty = {"penalty times 10": 10 * penalty, "no penalty": 0}.get(mistake, penalty)

    def objective(w):
        w = w.view(x.shape[1], 3)
        penalised = w if mistake == "bias decays" else w[:-1]
        return F.cross_entropy(x @ w, y) + penalty / 2 * penalised.square().sum()

    w = torch.zeros(3 * x.shape[1], dtype=torch.float64)
    for _ in range(12):
        g = torch.autograd.functional.jacobian(objective, w)
        w = w - torch.linalg.pinv(torch.autograd.functional.hessian(objective, w)) @ g
    assert mistake or torch.autograd.functional.jacobian(objective, w).norm() < 1e-8
    return 100 * ((x_test @ w.view(-1, 3)).argmax(1) == y_test).double().mean().item()


def test_regression_path():
    """Along the path, each fit is the exact minimum."""
    x, y = blobs(240, 0.5)
    keep = (y != 0) | (torch.arange(240) % 4 == 0)  # uneven classes: the bias matters
    data = x[keep], y[keep], *blobs(6000, 0.5, seed=1)
    with torch.no_grad():  # as evaluation calls it
        path = [*simclr.regression_path(*data, GIVEN)]
    assert path == pytest.approx([newton(*data, penalty) for penalty in PENALTIES], abs=0.1)
    for mistake in ("no bias", "bias decays", "penalty times 10", "no penalty", "not standardised"):
        assert abs(newton(*data, 0.1, mistake) - path[1]) > 2, mistake


def test_cross_entropy_part_by_part():
    x, y = blobs(50, 0.5)
    w = torch.randn(3, x.shape[1], requires_grad=True)
    b = torch.randn(3, requires_grad=True)
    plain = F.cross_entropy(F.linear(x, w, b), y)
    wanted = torch.autograd.grad(plain, (w, b))
    assert common.cross_entropy(x, w, b, y) == plain  # as it is, to the last bit
    for most in (7, 49, 50):
        kept = []  # shapes of what waits for the backward pass
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t, kept=kept: kept.append(tuple(t.shape)) or t, lambda t: t):
            loss = common.cross_entropy(x, w, b, y, most)
        assert loss.item() == pytest.approx(plain.item())
        assert torch.allclose(torch.cat([g.flatten() for g in torch.autograd.grad(loss, (w, b))]),
                              torch.cat([g.flatten() for g in wanted]), atol=1e-6)
        assert ((50, 3) in kept) == (most == 50) and (most == 50 or (most, 3) not in kept)


def test_linear_probe():
    """The penalty is chosen on val, never on test; the test's classifier is of fit and val."""
    fit, val, test = blobs(12, 0.9), blobs(90, 0.9, seed=10), blobs(900, 0.9, seed=20)
    on_val = [*simclr.regression_path(*fit, *val, GIVEN)]
    assert simclr.linear_probe(fit, val, penalties=GIVEN) == max(on_val) == on_val[1]
    both = torch.cat([fit[0], val[0]]), torch.cat([fit[1], val[1]])
    got = simclr.linear_probe(fit, val, test, GIVEN)
    assert got == pytest.approx(newton(*both, *test, 0.1), abs=0.3)  # two of 900
    assert newton(*fit, *test, 0.1) < got - 5  # of fit alone
    assert newton(*both, *test, 1.0) > got + 1  # another penalty would have been better on test
    without = fit[1] < 2
    rare = simclr.linear_probe((fit[0][without], fit[1][without]), val, test, GIVEN)
    assert abs(rare - got) < 10  # a class that is in val alone
    assert simclr.linear_probe(blobs(90, 0.1), blobs(300, 0.1, seed=1)) == 100  # separable
    no_fit, no_val = (fit[0] * math.inf, fit[1]), (val[0] * math.nan, val[1])
    assert math.isnan(simclr.linear_probe(no_fit, val, test))
    assert math.isnan(simclr.linear_probe(fit, no_val, test))


# ==================================================================================================
# Pictures
# ==================================================================================================


def test_curves(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rows = [{"epoch": 0, "top_1": 9.0}, {"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1}]
    panels = {"loss": ["loss"], "accuracy": ["top_1", "never_there"]}
    common.curves(tmp_path / "curves.png", rows, panels)
    image = Image.open(tmp_path / "curves.png")
    assert image.format == "PNG" and image.width > image.height > 100
    assert np.asarray(image.convert("L")).std() > 10
    common.curves(tmp_path / "empty.png", [], panels)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    common.curves(tmp_path / "none.png", rows, panels)
    assert {f.name for f in tmp_path.iterdir()} == {"curves.png", "empty.png"}


@pytest.mark.parametrize("sides", [(16, 16, 8), (224, 96)])
def test_picture(tmp_path, sides):
    tones = torch.linspace(0.1, 0.9, 2 * len(sides)).view(2, -1)  # (rows, columns)
    columns = [tones[:, i].view(2, 1, 1, 1).expand(2, 3, s, s) for i, s in enumerate(sides)]
    common.picture(tmp_path / "views.png", columns)
    image = Image.open(tmp_path / "views.png")
    pixels = torch.from_numpy(np.array(image)).float() / 255
    assert image.format == "PNG" and pixels.ndim == 3
    cell = [s // n for s, n in zip(pixels.shape, (2, len(sides)))]
    assert min(cell) >= 96
    middles = pixels[cell[0] // 2 :: cell[0], cell[1] // 2 :: cell[1]]
    assert far(middles, tones.unsqueeze(2)) < 0.01


# ==================================================================================================
# Image operations
# ==================================================================================================

RATIO = (3 / 4, 4 / 3)


def whole_boxes(n, height, width, smallest):
    """(n, 4) boxes of whole pixels, top, left, height, width, anywhere in the image."""
    rng, boxes = np.random.default_rng(0), []
    for _ in range(n):
        h, w = rng.integers(smallest, height + 1), rng.integers(smallest, width + 1)
        boxes.append([rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w])
    return torch.tensor(boxes)


@pytest.mark.parametrize("height, width, smallest, out", [
    (40, 31, 1, 8), (40, 31, 1, 48), (9, 64, 9, 9), (1, 5, 1, 4), (30, 900, 2, 24)])
def test_crop_resize_is_resized_crop(height, width, smallest, out):
    boxes = whole_boxes(30, height, width, smallest)
    x = F.pad(noise(30, height, width), (0, 7, 0, 5), value=100.0)  # padding must not show
    got = common.crop_resize(x, boxes.float(), out)
    for image, box, crop in zip(x, boxes.tolist(), got):
        assert far(crop, TF.resized_crop(image, *box, [out, out], antialias=True)) < 1e-5
    plain = TF.resized_crop(x[0], *boxes[0], [out, out], antialias=False)
    assert far(got[0], plain) > 0.05 or out > 20 or height < 10  # the test can fail


def kolmogorov_smirnov(a, b):
    """Largest distance of two empirical distribution functions, over its 0.1 % bound."""
    a, b, points = a.sort()[0], b.sort()[0], torch.cat([a, b])
    cdf = [torch.searchsorted(s, points, right=True) / len(s) for s in (a, b)]
    return float((cdf[0] - cdf[1]).abs().max() / (1.95 * (1 / len(a) + 1 / len(b)) ** 0.5))


@pytest.mark.parametrize("height, width", [(60, 60), (40, 120)])
def test_random_boxes_are_torchvisions(height, width):
    common.reseed(1)
    image, n = torch.empty(3, height, width), 2000
    sizes = torch.tensor([[height, width]]).expand(n, 2)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, (0.08, 1.0), RATIO)
                           for _ in range(n)])

    def statistics(boxes):
        top, left, h, w = boxes.float().unbind(1)
        return zip([top, left, h, w, h * w, (w / h).log()])

    def furthest(scale):
        ours = common.random_boxes(sizes, scale, RATIO)
        return max(kolmogorov_smirnov(*a, *b) for a, b in zip(statistics(ours), statistics(theirs)))

    assert furthest((0.08, 1.0)) < 1 < furthest((0.08, 0.25))


def test_random_boxes_reach_every_place():
    """A pixel of 3 x 4 is each of the twelve, and a box is no smaller than one."""
    sizes = torch.tensor([[3, 4]]).expand(500, 2)
    for scale in ((1 / 12, 1 / 12), (0.001, 0.001)):
        boxes = common.random_boxes(sizes, scale, (1.0, 1.0))
        assert (boxes[:, 2:] == 1).all() and len(boxes.unique(dim=0)) == 12


def test_random_boxes_fall_back_to_the_centre():
    for size in ((3, 2000), (2000, 3), (1, 7), (1, 1)):
        box = RandomResizedCrop.get_params(torch.empty(3, *size), (0.5, 1.0), RATIO)
        ours = common.random_boxes(torch.tensor([size]).expand(20, 2), (0.5, 1.0), RATIO)
        assert (ours == torch.tensor(box)).all()


def test_central_boxes():
    sizes = torch.tensor([[10, 20], [33, 17], [1, 9]])
    whole = [[0, 5, 10, 10], [8, 0, 17, 17], [0, 4, 1, 1]]
    assert common.central_boxes(sizes, 1.0).tolist() == whole
    assert common.central_boxes(sizes, 0.5).tolist()[0] == [2, 7, 5, 5]


def test_color_jitter_is_torchvisions_in_the_drawn_order():
    n, most, hue = 24, torch.tensor([[0.8], [0.7], [0.6]]), 0.2
    x = noise(n, 7, 9)
    before = x.clone()
    common.reseed(4)
    got = common.color_jitter(x, *most.flatten().tolist(), hue, p=1.0)
    assert torch.equal(x, before)
    # the same draws again: who, factors, shifts, order of three, place of hue by quarters
    common.reseed(4)
    torch.rand(n)
    factor = 1 + (2 * torch.rand(3, n) - 1) * most
    shift = (2 * torch.rand(n) - 1) * hue
    order, shuffle = torch.rand(3, n).argsort(0), torch.rand(n).argsort()
    ops = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation]

    def jitter(row, hue_at):
        steps = [(ops[k], float(factor[k, row])) for k in order[:, row].tolist()]
        steps.insert(hue_at, (TF.adjust_hue, float(shift[row])))
        image = x[shuffle[row]]
        for op, by in steps:
            image = op(image, by)
        return image

    elsewhere = 0
    for row in range(n):
        theirs = [jitter(row, hue_at) for hue_at in range(4)]
        mine = got[shuffle[row]]
        assert far(mine, theirs[row * 4 // n]) < 1e-5
        elsewhere += far(mine, theirs[(row * 4 // n + 2) % 4]) > 1e-3
    assert elsewhere > n // 2  # the place of hue shows, and all four occur
    assert len({tuple(column) for column in order.T.tolist()}) > 3


def test_single_operations_are_torchvisions():
    x = torch.cat([noise(4, 24, 31), noise(4, 24, 31).round()])  # with greys, ties, pure colours
    x[0] = x[0, :1]
    for shift in (-0.5, -0.21, 0.0, 0.1, 0.37, 0.5):
        got = common.turn_hue(x, torch.full((8, 1, 1, 1), shift))
        assert far(got, TF.adjust_hue(x, shift)) < 1e-5
    for sigma, taps in ((0.1, 3), (1.0, 5), (2.0, 9), (1.3, 23), (0.7, 1)):
        expected = TF.gaussian_blur(x, [taps, taps], [sigma, sigma])
        assert far(common.blur(x, (sigma, sigma), taps, p=1.0), expected) < 1e-5
    x = (x * 255).round() / 255  # as images come: some values are the threshold
    assert torch.equal(common.flip(x, 1.0), TF.horizontal_flip(x))
    assert far(common.grey(x, 1.0), TF.rgb_to_grayscale(x, 3)) < 1e-6
    for threshold in (0.5, 0.2, 128 / 255):
        assert torch.equal(common.solarize(x, 1.0, threshold), TF.solarize(x, threshold))


@pytest.mark.parametrize("name", [m for m in ("dino", "ibot", "dinov2") if m in METHODS])
def test_small_local_views_are_blurred(name, monkeypatch):
    """A kernel of one pixel, a tenth of 16, would leave them as they are."""
    widths = []
    monkeypatch.setattr(common, "blur", lambda x, sigma, taps, p: widths.append(taps) or x)
    args = tools.completed(method(name), ["--blur", 0, 0, 1, "--local-crops", 1])
    method(name).augment([torch.rand(2, 3, s, s) for s in (32, 32, 16)], args)
    assert widths == [3]


@pytest.mark.parametrize("op, versions", [
    (common.flip, 2), (common.grey, 2), (common.solarize, 2),
    (lambda x, p: common.blur(x, (0.3, 2.0), 5, p), None),
    (lambda x, p: common.color_jitter(x, 0.4, 0.4, 0.4, 0.1, p), None)],
    ids=["flip", "grey", "solarize", "blur", "color_jitter"])
def test_every_image_has_its_own_draw(op, versions):
    x = noise(1, 6, 6).expand(400, -1, -1, -1)
    common.reseed(5)
    assert far(op(x, 0.0), x) < 1e-5
    y = op(x, 0.3)
    kept = (y - x).abs().amax((1, 2, 3)) < 1e-5
    assert abs(kept.float().mean() - 0.7) < 0.08  # 3.5 standard deviations
    different = len(y[~kept].mul(1e5).round().unique(dim=0)) + 1
    assert different == versions or versions is None and different > 0.9 * int((~kept).sum())
    assert y.min() >= 0 and y.max() <= 1 + 1e-6


# ==================================================================================================
# Batches
# ==================================================================================================

VIEWS = [common.Crop(16, (0.2, 1.0), RATIO, count=2), common.Crop(8, (0.05, 0.3), RATIO)]
CENTRE = [common.Crop(16, 1.0)]
SIZES = [(40, 30), (401, 400), (96, 128), (400, 401), (64, 64), (37, 50), (150, 333), (20, 20),
         (77, 99)]


def photo(height, width, seed=0):
    """A smooth picture, as photos are: what JPEG and a different resampling leave alone."""
    rng, y = np.random.default_rng(seed), np.linspace(0, 3, height)[:, None, None]
    x, a = np.linspace(0, 3, width)[None, :, None], rng.uniform(0.5, 2, (2, 3))
    return np.uint8(127 + 120 * np.sin(a[0] * x + a[1] * y))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for i, (height, width) in enumerate(SIZES):
        Image.fromarray(photo(height, width, i)).save(root / f"{i}.{'jpg' if i % 2 else 'png'}")
    return root


def stored(root, memory_gb=8.0):
    """The images of a folder, in memory or with 0 GB streamed."""
    data = common.Data(str(root))
    data.read(16, CPU, memory_gb, 1)
    assert bool(data.train.files) == (memory_gb == 0)
    return data.train


def served(images, crops, order=None, workers=0, seed=(7, 1), first=0, size=2):
    """[views..., index, a draw of the consumer] of every batch."""
    order = torch.arange(len(images.labels)) if order is None else order
    found = common.batches(images, order, size, crops, CPU, workers, seed, first)
    return [[*views, index, torch.rand(3)] for views, index in found]


def test_batches_depend_on_the_seed_and_the_place_alone(photos):
    memory, streamed = stored(photos), stored(photos, 0.0)
    got = served(memory, VIEWS)
    x1, x2, local, index, _ = got[0]
    assert x1.shape == x2.shape == (2, 3, 16, 16) and local.shape == (2, 3, 8, 8)
    assert x1.dtype == torch.float32 and index.tolist() == [0, 1]
    assert 0 <= min(v.min() for v in got[0][:3]) and 0.4 < max(v.max() for v in got[0][:3]) <= 1
    assert [len(b[0]) for b in got] == [2, 2, 2, 2, 1] and far(x1, x2) > 0.01
    torch.rand(5)
    rest = torch.arange(4, len(SIZES))
    for images, workers in ((memory, 0), (streamed, 0), (streamed, 2)):
        again = served(images, VIEWS, workers=workers)
        assert all(far(a, b) < 1e-5 for p, q in zip(got, again) for a, b in zip(p, q))
        assert same(again, served(images, VIEWS, workers=workers))
        assert not same(again, served(images, VIEWS, workers=workers, seed=(7, 2)))
        assert same(again[2:], served(images, VIEWS, rest, workers, first=2))


def test_reseed_tells_all_tuples_apart():
    tuples = [(0,), (1,), (0, 1), (1, 1), (1, 2), (2, 1), (1, 2, 3), (1, 3, 2), (2**31, 1, 0, 1)]
    drawn = [common.reseed(*t) or torch.rand(1).item() for t in [*tuples, (1, 2, 3)]]
    assert len(set(drawn)) == len(tuples) and drawn[-1] == drawn[6]


@pytest.mark.parametrize("scale", [1.0, 0.875])
@pytest.mark.parametrize("memory_gb", [8.0, 0.0])
def test_a_central_view_is_torchvisions(photos, scale, memory_gb):
    views = served(stored(photos, memory_gb), [common.Crop(16, scale)])
    for i, (view, size) in enumerate(zip(torch.cat([v[0] for v in views]), SIZES)):
        x = torch.from_numpy(photo(*size, i)).permute(2, 0, 1) / 255
        side = round(min(size) * scale)
        expected = TF.resize(TF.center_crop(x, [side, side]), [16, 16], antialias=True)
        assert far(view, expected) < (0.2 if min(size) == 20 else 0.03)  # JPEG's coarse colours
        assert far(view.mT, expected) > 0.6  # wide images lie transposed in memory


@pytest.mark.parametrize("memory_gb", [8.0, 0.0])
def test_all_of_a_wide_image_is_used_for_crops(tmp_path, memory_gb):
    x = np.zeros((20, 40, 3), np.uint8)
    x[:, :, 0], x[:, :, 1] = np.arange(40) * 6, np.arange(20)[:, None] * 12
    high = np.ascontiguousarray(x.transpose(1, 0, 2))
    for i, image in enumerate([x, high] * 50):
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    images = stored(tmp_path, memory_gb)
    view = served(images, [common.Crop(8, (0.05, 0.2), RATIO)], size=100)[0][0]
    across, down = view[:, 0].mean((1, 2)) * 255 / 6, view[:, 1].mean((1, 2)) * 255 / 12
    for kind in (slice(0, None, 2), slice(1, None, 2)):
        assert across[kind].min() < 8 and across[kind].max() > 32
        assert down[kind].min() < 5 and down[kind].max() > 15
    gained = view.diff(dim=3)[0::2, 0], view.diff(dim=2)[1::2, 0]
    assert all((g >= -1e-6).all() for g in gained)  # red grows along the longer side of both


def test_a_broken_file_leaves_the_stream_and_others_stand_in(photos, capsys):
    good = [str(f) for f in sorted(photos.iterdir())]
    broken = [os.fsdecode(b"caf\xe9.jpg"), *(f"/none/{i}.jpg" for i in range(8))]
    files = [f for pair in zip(good, broken) for f in pair]
    images = common.Images(torch.arange(18), files=[*files], shorter=48)
    for epoch in range(2):
        found = torch.cat([b[1] for b in served(images, CENTRE, workers=1, seed=(0, epoch))])
        assert found[::2].tolist() == list(range(0, 18, 2))  # what can be read stays in its place
        assert (found % 2).max() == 0 and len(set(found[1::2].tolist())) > 4
    assert images.files == [None if f in broken else f for f in files]
    out = capsys.readouterr().out
    assert out.count("left out") == 9 and "caf\\udce9.jpg" in out and "No such file" in out


@pytest.mark.parametrize("memory_gb", [8.0, 0.0])
def test_nothing_readable_is_an_error(tmp_path, capsys, memory_gb):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_text("no image")
    data = common.Data(str(tmp_path))
    assert "can be read" in fails(lambda: data.read(16, CPU, memory_gb, 2), capsys)
    images = common.Images(torch.zeros(2), files=["a.jpg", "b.jpg"], shorter=9)
    assert "can be read" in fails(lambda: served(images, CENTRE), capsys)


# ==================================================================================================
# Sets
# ==================================================================================================

READ = (16, CPU, 8.0, 1)  # size, device, memory_gb, workers
TRAIN = dict(train__a=12, train__b=8)


def tree(root, **counts):
    """root/<part>/<class>/<i>.png, `part__class=count`."""
    for where, count in counts.items():
        folder = root.joinpath(*where.split("__"))
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (20, 24), (10 * i, 100, 0)).save(folder / f"{i}.png")
    return str(root)


def classes_of(files):
    return ["ab".index(Path(f).parent.name) for f in files]


@pytest.mark.parametrize("counts, train, fit, val, test", [
    (TRAIN | dict(val__a=3, val__b=4, test__a=2, test__b=3), 20, 20, 7, 5),
    (TRAIN | dict(validation__a=3, validation__b=4, test__b=3), 20, 20, 7, 3),
    (TRAIN | dict(val__a=3, val__b=4), 20, 17, 3, 7),
    (dict(Train__a=12, Train__b=8, Test__a=3, Test__b=1), 20, 17, 3, 4),
    (TRAIN, 17, 15, 2, 3)],
    ids=["train val test", "train validation test", "train val", "Train Test", "train"])
def test_folders_with_labels(tmp_path, counts, train, fit, val, test, capsys):
    data = common.Data(tree(tmp_path, **counts))
    data.read(*READ)
    parts = {"fit": data.fit, "val": data.val, "test": data.test}
    assert len(data.train.labels) == len(data.train.pixels) == train and data.labelled
    assert {k: len(index) for k, (_, index) in parts.items()} == dict(fit=fit, val=val, test=test)
    members = [{(id(images), i) for i in index.tolist()} for images, index in parts.values()]
    assert len(set.union(*members)) == fit + val + test  # no image in two of them
    for part in (data.fit, data.val):  # of every class a tenth is held out
        assert set(part[0].labels[part[1]].tolist()) == {0, 1}
    assert common.Data(str(tmp_path)).parts["train"][0] == data.parts["train"][0]
    for files, labels in data.parts.values():
        assert classes_of(files) == labels.tolist()
    printed = capsys.readouterr().out
    assert "2 classes (a, b); images: " in printed and f" train {train}" in printed
    assert data.side == 20


@pytest.mark.parametrize("counts", [dict(x=6, y__deep=5), dict(train=11)], ids=["tree", "train"])
def test_folders_without_labels(tmp_path, counts, capsys):
    data = common.Data(tree(tmp_path, **counts))
    data.read(*READ)
    assert not data.labelled and set(data.train.labels.tolist()) == {-1}
    assert len(data.train.labels) == 11 and len(data.fit[1]) == 9 and len(data.val[1]) == 2
    printed = capsys.readouterr().out
    assert "no train/<class>/*, so no labels: all of" in printed and "train 11; 0 other" in printed


@pytest.mark.parametrize("memory_gb", [8.0, 0.0], ids=["in memory", "streamed"])
def test_embed_writes_every_image_once(tmp_path, memory_gb):
    root = Path(tree(tmp_path / "set", train__a=12, train__b=8, test__b=3))
    (root / "train" / "b" / "5.png").write_text("broken")
    data = common.Data(str(root))
    data.read(16, CPU, memory_gb, 1)
    run = SimpleNamespace(args=SimpleNamespace(embed=str(tmp_path / "file"), workers=1, seed=0),
                          world=1, rank=0, device=CPU, autocast=contextlib.nullcontext)
    common.export(lambda views: [views[0].mean((2, 3))], data, CENTRE, run)
    with np.load(tmp_path / "file") as saved:
        h, name, split, label = (saved[k] for k in ("h", "name", "split", "label"))
        assert saved["classes"].tolist() == ["a", "b"]
    files = [Path(n) for n in name]
    assert len({*files}) == len(h) == 22 and root / "train" / "b" / "5.png" not in files
    assert split.tolist() == [f.parts[-3] for f in files] == ["train"] * 19 + ["test"] * 3
    assert label.tolist() == classes_of(files)
    colours = np.array([[10 * int(f.stem), 100, 0] for f in files]) / 255
    assert np.abs(h - colours).max() < 1e-6


@tools.unix
def test_folders_by_unusual_names(tmp_path, monkeypatch, capsys):
    root = tree(tmp_path / "cifar10", train__a=20, train__b=20, val__a=2, val__b=2)
    monkeypatch.chdir(tmp_path)
    for name in (f"/{root}", "./cifar10", f"{root}/", "cifar10/../cifar10"):
        assert common.Data(name).classes == ["a", "b"]
    monkeypatch.chdir(root)
    assert common.Data(".").classes == ["a", "b"]
    (tmp_path / "cifar10" / "toys").mkdir()
    common.Data("toys")
    assert "not the folder: that is --dataset ./toys" in capsys.readouterr().out


def test_odd_images_are_told_of(tmp_path, capsys):
    """Those that are deep, have pages, or have become black or white, in a sample from all over."""
    tree(tmp_path, **{"": 3})
    frames = [Image.new("RGB", (20, 20), colour) for colour in ((35, 0, 0), (255, 220, 255))]
    frames[0].save(tmp_path / "preview.jpg", format="MPO", save_all=True, append_images=frames[1:])
    frames[1].save(tmp_path / "light.png")
    common.Data(str(tmp_path))
    assert "sample" not in capsys.readouterr().out
    frames = [Image.new("L", (20, 20), 100 + i) for i in range(2)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (20, 20), (9, 20, 3)).save(tmp_path / "b.png")
    Image.new("L", (20, 20), 250).save(tmp_path / "c.png")
    for i in range(3):
        grey16(0, 900).save(tmp_path / f"d{i}.png")
    (tmp_path / "broken.png").touch()
    common.Data(str(tmp_path))
    out = capsys.readouterr().out
    for told in ("3 deeper than 8 bits", "1 with several pages", "2 almost black or almost white"):
        assert f"sample of 12 images: {told}" in out
    for i in range(200):
        Image.new("L", (20, 20), 100).save(tmp_path / f"a{i}.png")
        Image.new("L", (20, 20), 0).save(tmp_path / f"e{i}.png")
    common.Data(str(tmp_path))
    black = re.search(r"sample of 64 images: (\d+) almost", capsys.readouterr().out)[1]
    assert 15 < int(black) < 49


def test_grey_images_are_named(tmp_path, capsys):
    for i in range(3):
        Image.new("L", (20, 20), 40 * i).save(tmp_path / f"{i}.png")
    common.Data(str(tmp_path))
    assert "grey images: all three channels are the same\n" in capsys.readouterr().out
    Image.new("RGB", (20, 20), (1, 2, 3)).save(tmp_path / "3.png")
    common.Data(str(tmp_path))
    assert "grey images" not in capsys.readouterr().out


def test_probes_on_another_set(tmp_path, capsys):
    """--labelled: its images are what is probed, those of --dataset train and are judged."""
    mine, labelled = tree(tmp_path / "mine", x=40), tree(tmp_path / "set", **TRAIN, test__b=7)
    argv = ["--dataset", mine, "--labelled", labelled, "--image-size", 16, "--batch-size", 8,
            "--epochs", 1, "--device", "cpu", "--arch", "convnet", "--out", tmp_path / "run"]
    results, out = tools.quiet(simclr, argv)
    assert "40 training images, 4 for validation" in out and "20, test 7" in out
    assert all(0 <= results[k] <= 100 for k in ("linear_top1", "untrained_knn_top1"))
    _, data, _ = tools.train(simclr, argv)
    assert len(data.val[1]) == 4 and data.labelled
    parts = data.splits(True)
    assert [len(index) for _, index in parts] == [17, 3, 7] and parts[:2] == data.splits(False)
    assert all(torch.equal(i, whole[1]) for (_, i), whole in zip(parts, (
        data.probed.fit, data.probed.val, data.probed.test)))
    assert [images.labels[index].min() >= 0 for images, index in parts] == [True] * 3
    argv[3] = mine
    assert f"--labelled {mine} has no labels" in refused(simclr, argv, capsys)


@tools.unix
def test_what_is_no_data_is_left_out(tmp_path, capsys):
    """Hidden names, other files, runs; links are followed, once."""
    tree(tmp_path / "data", train__a=3, test__a=2)
    tree(tmp_path / "elsewhere", x=4)
    a = tmp_path / "data" / "train" / "a"
    for hidden in ("train/.ipynb_checkpoints", "train/a/.thumbs", "train/a/run", "train/@eaDir",
                   "train/a/@eaDir", "__MACOSX"):
        tree(tmp_path / "data" / hidden, **{"": 2})
    shutil.copy(a / "0.png", a / "._0.png")
    os.mkfifo(a / "pipe.png")  # to open it is to wait
    for file in ("notes.txt", "b.heic0", "run/args.json", "run/views.png"):
        (a / file).touch()
    (a / "linked").symlink_to(tmp_path / "elsewhere")
    (a / "loop").symlink_to(a)
    data = common.Data(str(tmp_path / "data"))
    assert len(data.parts["train"][0]) == 7
    out = capsys.readouterr().out
    assert "one class only, so accuracies say nothing; images: train 7, test 2; 3 other" in out


@pytest.mark.parametrize("counts, word", [
    (dict(), "no images"), (dict(train__a=0), "no images"),
    (TRAIN | dict(test__B=3), "test has images of no class of train: B"),
    (TRAIN | dict(test__a=0), "test"), (TRAIN | dict(val__a=0, test__a=3), "val"),
    (dict(train__a=1), "train")],
    ids=["empty", "empty class", "other classes", "empty test", "empty val", "one image"])
def test_folders_that_lack_images_fail_at_once(tmp_path, capsys, counts, word):
    def go():
        data = common.Data(tree(tmp_path, **counts))
        data.read(*READ)
        assert len(data.test[1])

    assert word in fails(go, capsys)


def test_images_beside_the_classes_have_no_label(tmp_path, capsys):
    """They are for training: no probe is fitted, chosen or tested on one."""
    data = common.Data(tree(tmp_path, train=31, train__a=20, train__b=20))
    told = "2 classes (a, b), 31 training images without a label; images: train 67, test 4"
    assert told in capsys.readouterr().out
    data.read(*READ)
    assert (data.train.labels == -1).sum() == 31 and data.classes == ["a", "b"]
    assert all((images.labels[index] >= 0).all() for images, index in data.splits(test=True))
    for name, label in zip(data.train.names, data.train.labels.tolist()):
        assert os.path.basename(os.path.dirname(name)) == ["a", "b", "train"][label]


def test_hold_out():
    labels = torch.tensor([0] * 60 + [1] + [2] * 2 + [3] * 11)
    kept, tenth = common.hold_out(labels)
    assert sorted([*kept.tolist(), *tenth.tolist()]) == list(range(74))
    assert labels[tenth].bincount().tolist() == [6, 0, 1, 2]  # the only one stays
    assert (tenth[:6] > 8).any()


def test_limit(tmp_path):
    root = tree(tmp_path, **TRAIN, test__a=9, test__b=2)
    five, eight, many = (common.Data(root, limit=n) for n in (5, 8, 100))
    for part, counts in (("train", [5, 8, 20]), ("test", [5, 8, 11])):
        assert [len(d.parts[part][0]) for d in (five, eight, many)] == counts
    assert eight.parts["train"][0][:5] == five.parts["train"][0]
    for files, labels in eight.parts.values():
        assert classes_of(files) == labels.tolist()
    root = tree(tmp_path / "no test", **TRAIN)
    few, rest = common.Data(root, limit=12).parts["train"][0], common.Data(root).parts["test"][0]
    assert len(few) == 12 and not {*few} & {*rest}  # with any limit the test images are held out


def test_memory_limit_is_of_what_the_images_take(tmp_path, capsys):
    tree(tmp_path, x=60)
    for i, size in enumerate(((900, 40), (40, 900))):  # the middle: 80 x 40, and 40 x 80 turned
        Image.new("RGB", size).save(tmp_path / "x" / f"long{i}.png")
    data = common.Data(str(tmp_path))
    take = 62 * 3 * 80 * 40 / 2**30
    for memory_gb, streamed in ((1.01 * take, False), (0.99 * take, True)):
        data.read(16, CPU, memory_gb, 2)
        assert bool(data.train.files) == streamed == (data.train.pixels is None)
        assert ("streamed" in capsys.readouterr().out) == streamed


def test_memory_limit_fits_the_machine(monkeypatch):
    table = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 16 * 2**18}
    monkeypatch.setattr(os, "sysconf", table.get, raising=False)
    assert tools.options(simclr, []).memory_limit == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert tools.options(simclr, []).memory_limit == 2
    table["SC_PHYS_PAGES"] *= 64
    monkeypatch.setattr(Path, "read_text", lambda path: str(4 * 2**30))
    assert tools.options(simclr, []).memory_limit == 0.5  # a container's
    monkeypatch.setattr(Path, "read_text", lambda path: "max\n")
    assert tools.options(simclr, []).memory_limit == 8
    monkeypatch.delattr(os, "sysconf")
    assert tools.options(simclr, []).memory_limit == 2


@pytest.mark.parametrize("number, left", [(errno.EIO, 3), (errno.ENOENT, 0), (None, 0)])
def test_a_disk_that_fails_for_a_while_costs_no_image(tmp_path, monkeypatch, number, left):
    Image.fromarray(photo(9, 9, 0)).save(tmp_path / "x.png")
    opened, pauses, failing = Image.open, [], [OSError(number, "why")] * 3

    def open_(file):
        if failing:
            raise failing.pop()
        return opened(file)

    monkeypatch.setattr(Image, "open", open_)
    monkeypatch.setattr(time, "sleep", pauses.append)
    image = common.read_image(tmp_path / "x.png", 48)
    assert len(pauses) == left and isinstance(image, str) == (left == 0)
    failing += [OSError(errno.EIO, "why")] * 9
    assert "why" in common.read_image(tmp_path / "x.png", 48) and sum(pauses) < 120


@pytest.mark.parametrize("there", [(20, 0), (-2, 0), (0, 1)], ids=str)
def test_processes_that_find_other_images_stop_at_once(tmp_path, monkeypatch, capsys, there):
    def gather(found, mine):
        found[:] = mine, tuple(a + b for a, b in zip(mine, there))

    monkeypatch.setattr(common.dist, "all_gather_object", gather)
    argv = [*TINY, "--batch-size", "4", "--dataset", tree(tmp_path, **TRAIN)]
    run = SimpleNamespace(folder=tmp_path / "run", device=CPU, world=2)
    args = tools.options(simclr, argv)
    error = fails(lambda: common.load_data(args, simclr.OPTIONS, run, simclr.CPU), capsys)
    assert f"the same images: {args.images}, {args.images + there[0]}" in error


def test_a_process_that_fails_does_not_wait_for_the_others(tmp_path, monkeypatch):
    """destroy_process_group may do so, while they wait for it."""
    left = []
    monkeypatch.setattr(common.atexit, "unregister", left.append)
    for world, error, stopped, count in (
            (2, None, 0, 0), (1, ZeroDivisionError, 0, 0), (2, ZeroDivisionError, 0, 1),
            (2, SystemExit, 15, 1)):
        with contextlib.suppress(ZeroDivisionError, SystemExit), opened(
                "--out", tmp_path / "run") as run:
            run.world, run.stopped = world, stopped
            if error:
                raise error
        assert left == [common.dist.destroy_process_group] * count


def test_a_broken_file_that_two_threads_read(monkeypatch):
    images = common.Images(torch.arange(2), files=["a", "b"], shorter=9)

    def read(file, shorter):
        if file == "a":
            images.files[0] = None  # by the other one
            return "broken"
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr(common, "read_image", read)
    assert images.read(0)[0] == 1


def test_of_a_million_files_few_are_read_to_know_what_they_take(monkeypatch):
    read = []

    def image(file, shorter):
        read.append(file)
        return np.zeros((8, 8, 3), np.uint8) if file % 7 else "broken"

    monkeypatch.setattr(common, "read_image", image)
    assert common.read_all(range(50_000), 8, 0.001, 2) is None and len(read) <= 2000
    images = common.read_all(range(2500), 8, 0.001, 2)  # 0.48 of 1.07 MB
    assert [isinstance(x, str) for x in images] == [i % 7 == 0 for i in range(2500)]


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (30, 30)], ids=str)
def test_an_image_lies_in_memory_as_pad_copies_it(tmp_path, size):
    Image.fromarray(photo(*size, 0)).save(tmp_path / "x.png")
    image = common.read_image(tmp_path / "x.png", 48)
    assert (image == photo(*size, 0)).all()
    planes = torch.from_numpy(image).permute(2, 0, 1)  # the slow part, done in parallel
    assert (planes.mT if size[0] < size[1] else planes).is_contiguous()


@pytest.mark.parametrize("device", ["cuda", "cpu", "mps"])
def test_a_gpu_copies_streamed_images_from_pinned_memory(photos, monkeypatch, device):
    zeros, pinned = torch.zeros, []
    monkeypatch.setattr(common, "to_device", lambda x, device: x)
    monkeypatch.setattr(torch, "zeros", lambda *shape, pin_memory=False, **more: (
        pinned.append(pin_memory), zeros(*shape, **more))[1])
    images = common.Images(torch.arange(2), files=[*map(str, photos.iterdir())][:2], shorter=9)
    [*common.batches(images, torch.arange(2), 2, CENTRE, device)]
    assert pinned[0] == (device == "cuda")


def test_broken_files_are_skipped_counted_and_listed(tmp_path, capsys):
    root = tree(tmp_path, train__a=5, train__b=5, test__a=2)
    file = tmp_path / "train" / "a" / "cut.jpg"
    Image.fromarray(photo(90, 90)).save(file)
    file.write_bytes(file.read_bytes()[:1000])
    (tmp_path / "train" / "b" / "text.jpg").write_text("no image")
    data = common.Data(root)
    data.read(*READ)
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5
    out = capsys.readouterr().out
    assert re.search(r"2 image file\(s\) \(.*cut.jpg, .*text.jpg\): .*truncated", out)


def grey16(low, high):
    """From low at the left to high at the right."""
    return Image.fromarray(np.linspace(low, high, 400).reshape(20, 20).astype(np.uint16)).rotate(90)


def palette():
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 200, 30, 60])
    image.paste(0, (0, 0, 10, 20))
    return image


KINDS = {  # name -> image, how to save it, colour of its left and right quarter
    "grey.png": (Image.new("L", (20, 20), 100), {}, (100,) * 3, (100,) * 3),
    "bilevel.png": (Image.new("1", (20, 20), 1), {}, (255,) * 3, (255,) * 3),
    "cmyk.jpg": (Image.new("CMYK", (20, 20), (0, 255, 255, 0)), {}, (254, 0, 0), (254, 0, 0)),
    "16bit.png": (grey16(0, 65535), {}, (32,) * 3, (223,) * 3),
    "12bit.png": (grey16(0, 4095), {}, (32,) * 3, (223,) * 3),
    "float.tiff": (Image.new("F", (20, 20), 0.5), {}, (127,) * 3, (127,) * 3),
    "alpha.png": (Image.new("RGBA", (20, 20), (9, 9, 9, 0)), {}, (255,) * 3, (255,) * 3),
    "grey-alpha.png": (Image.new("LA", (20, 20), (0, 128)), {}, (127,) * 3, (127,) * 3),
    "palette.png": (palette(), {}, (0, 0, 0), (200, 30, 60)),
    "palette-transparent.png": (palette(), {"transparency": 0}, (255,) * 3, (200, 30, 60)),
    "palette.gif": (palette(), {"transparency": 0}, (255,) * 3, (200, 30, 60)),
    "wide.png": (Image.new("RGB", (2000, 3), (9, 99, 199)), {}, (9, 99, 199), (9, 99, 199)),
    "tall.jpg": (Image.new("RGB", (3, 2000), (90, 90, 90)), {}, (90,) * 3, (90,) * 3),
    "metadata.jpg": (Image.new("RGB", (20, 20), (90, 90, 90)),
                     {"exif": b"Exif\0\0II*\0\x08\0\0\0\xff\xff garbage"}, (90,) * 3, (90,) * 3),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_in_memory_and_streamed(tmp_path, name):
    image, how, left, right = KINDS[name]
    image.save(tmp_path / name, **how)
    for memory_gb in (8.0, 0.0):
        x = served(stored(tmp_path, memory_gb), CENTRE)[0][0][0] * 255
        for part, colour in ((x[:, :, :4], left), (x[:, :, -4:], right)):
            assert far(part.mean((1, 2)), torch.tensor(colour)) < 3, memory_gb


def test_long_images_stay_sharp(tmp_path):
    Image.fromarray(photo(60, 900)).save(tmp_path / "a.png")
    assert common.read_image(tmp_path / "a.png", 48).shape == (48, 96, 3)
    assert common.read_image(tmp_path / "a.png", 99).shape == (60, 120, 3)


@pytest.mark.parametrize("orientation, turn", [
    (1, None), (2, "FLIP_LEFT_RIGHT"), (3, "ROTATE_180"), (4, "FLIP_TOP_BOTTOM"),
    (5, "TRANSPOSE"), (6, "ROTATE_90"), (7, "TRANSVERSE"), (8, "ROTATE_270")])
def test_exif_rotation(tmp_path, orientation, turn):
    """The camera stored the picture turned, and wrote down how: it comes upright."""
    upright = Image.fromarray(photo(160, 240, 3))
    camera = upright.transpose(getattr(Image.Transpose, turn)) if turn else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    camera.save(tmp_path / "a.jpg", exif=exif, quality=95)
    expected = TF.resize(TF.center_crop(TF.pil_to_tensor(upright) / 255, [160, 160]), [16, 16])
    images = stored(tmp_path)
    assert images.sizes.tolist() == [[48, 72]]
    assert (served(images, CENTRE)[0][0][0] - expected).abs().mean() < 3 / 255


@pytest.mark.parametrize("name, kind, shape", [
    ("cifar10", "CIFAR10", (32, 32, 3)), ("cifar100", "CIFAR100", (32, 32, 3)),
    ("fashionmnist", "FashionMNIST", (28, 28)), ("stl10", "STL10", (96, 96, 3)),
    ("imagenette", "Imagenette", (160, 160, 3))])
def test_sets_of_torchvision(monkeypatch, tmp_path, name, kind, shape):
    pixels = np.random.default_rng(0).integers(0, 256, (30, *shape), np.uint8)
    labels = [-1 if name == "stl10" and i >= 10 else i % 3 for i in range(30)]

    def fake(root, download, size="160px", split="train", train=True):
        assert download and size == "160px"
        n = 30 if train and split in ("train", "train+unlabeled") else 4
        return [(Image.fromarray(p), label) for p, label in zip(pixels[:n], labels)]

    monkeypatch.setattr(datasets, kind, fake)
    data = common.Data(name, tmp_path)
    data.read(*READ)
    assert data.side == shape[0] and data.labelled
    assert data.train.labels.tolist() == labels and data.train.labels.dtype == torch.int64
    expected = torch.from_numpy(pixels if pixels.ndim == 4 else np.stack([pixels] * 3, 3))
    assert torch.equal(data.train.pixels, expected.permute(0, 3, 1, 2))
    assert data.train.sizes.tolist() == [list(shape[:2])] * 30
    known = 10 if name == "stl10" else 30  # of three classes
    assert [len(p[1]) for p in (data.fit, data.val, data.test)] == [known - 3, 3, 4]
    assert data.train.labels[torch.cat([data.fit[1], data.val[1]])].min() >= 0
    # PyTorch built without processes, as for some small machines
    monkeypatch.setattr(common, "dist", SimpleNamespace(is_available=lambda: False))
    three = common.Data(name, tmp_path, limit=3)
    three.read(*READ)
    assert len(three.train.labels) == len(three.test[1]) == 3
    assert torch.equal(three.train.pixels, data.train.pixels[three.train.names])  # by number


def test_a_set_that_is_not_there(monkeypatch, tmp_path, capsys):
    for name in ("cifar11", ""):
        error = fails(lambda: common.Data(name), capsys)  # noqa: B023
        assert f"'{name}', from {os.getcwd()}, is neither" in error
    monkeypatch.setattr(datasets, "CIFAR10", lambda *_, **__: 1 / 0)
    error = fails(lambda: common.Data("cifar10", tmp_path), capsys)
    assert "cifar10" in error and "division" in error and str(tmp_path) in error


@pytest.mark.parametrize("name", ["dino", "ibot", "dinov2"])
def test_convolutional_stem(name, capsys):
    """The printed lines rebuild the ViT of the built-in set in timm; views that it cannot halve."""
    pytest.importorskip("timm")
    file = method(name)
    args = tools.completed(file, ["--patch-size", 4])
    vit, x = file.build(args).backbone.eval(), draw(2, 3, 32, 32, dtype=torch.float32)
    assert args.arch == "vit_conv" and vit.patch_embed(x).shape == (2, 96, 8, 8)
    exec(file.loading(args), names := {})
    names["net"].load_state_dict(vit.state_dict())
    assert close(names["net"].eval().forward_features(x).detach(), vit(x).detach(), 1e-5)
    wrong = ["--patch-size 6 --image-size 36", "--image-size 36", "--patch-size 1"]
    for flags in wrong + ["--hires-epochs 1 --hires-size 52"] * (name == "dinov2"):
        args = tools.completed(file, flags.split())
        assert "vit_conv has to be 2, 4" in fails(lambda: file.check(args, 100), capsys)  # noqa: B023


# ==================================================================================================
# The built-in set
# ==================================================================================================


@pytest.mark.parametrize("size", [16, 33])
def test_toys(size):
    n = 107
    images, labels, parts, depth, factors = made = common.toys(n, size, 5)
    assert images.shape == (n, 3, size, size) and images.dtype == torch.uint8
    assert labels.shape == (n,) and labels.dtype == torch.int64
    assert parts.shape == depth.shape == (n, size, size) and depth.is_floating_point()
    assert all(f.shape == (n,) for f in factors.values())
    assert same(made, common.toys(n, size, 5))
    assert not torch.equal(images, common.toys(n, size, 6)[0])
    counts = labels.bincount(minlength=10)
    assert len(common.THINGS) == len(counts) == 10 and counts.max() - counts.min() <= 1
    assert (labels[1:] != labels[:-1]).any() and images.float().std() > 10
    masks = parts > 0
    share = masks.float().mean((1, 2))
    assert share.min() > 0.05 and share.max() < 0.7
    for kind, thing in enumerate(common.THINGS.values()):  # each of its parts can be seen
        assert parts[labels == kind].unique().tolist() == [*range(thing.count(";") + 2)]
    near, distant = ((depth * m).sum((1, 2)) / m.sum((1, 2)) for m in (masks, ~masks))
    assert (near < distant).all() and depth.isfinite().all()
    thing, ground = ((images.float().mean(1) * m).sum((1, 2)) / m.sum((1, 2))
                     for m in (masks, ~masks))
    assert (thing > ground + 10).all()  # always brighter
    few = common.toys(3, size, 5)[0]
    assert few.shape == (3, 3, size, size)


def test_toys_factors():
    """The factors are those of the picture: its size and centre of gravity, and its lightness."""
    images, labels, parts, _, f = common.toys(400, 64, 1)
    y, x, extent = position_and_size(images, parts > 0).T
    inside = (f["x"].abs() < 0.2) & (f["y"].abs() < 0.2)
    for seen, drawn in ((2 * x - 1, f["x"]), (1 - 2 * y, f["y"]), (extent, f["radius"])):
        assert torch.corrcoef(torch.stack([seen, drawn])[:, inside])[0, 1] > 0.9
    bright = torch.stack([i.float()[:, m].mean() for i, m in zip(images, parts > 0)])
    assert torch.corrcoef(torch.stack([bright, f["lightness"]]))[0, 1] > 0.9
    fish = labels == [*common.THINGS].index("fish")  # the tail, part 1, is behind
    tail = position_and_size(images[fish], parts[fish] == 1)[:, 1]
    assert ((tail < x[fish]) == (f["direction"][fish] > 0)).all()


def test_covered_and_textures():
    x, y = 2 * torch.rand(2, 5000, generator=torch.Generator().manual_seed(0)) - 1
    disc = common.covered(["+.2,0,.5,.4"], x, y)
    assert torch.equal(disc, ((x - 0.2) / 0.5) ** 2 + (y / 0.4) ** 2 < 1)
    roof = common.covered(["+0,.1,.6,.2,.3"], x, y)  # .6 wide at y -.2, .2 at y .4
    assert torch.equal(roof, (x.abs() < 0.6 - (y + 0.2) * 2 / 3) & ((y - 0.1).abs() < 0.3))
    ring = common.covered(["+0,0,.8,.8", "-0,0,.5,.5"], x, y)
    assert torch.equal(ring, (x**2 + y**2 < 0.64) & (x**2 + y**2 >= 0.25))
    both = common.covered(["+-.5,0,.2,.2", "+.5,0,.2,.2"], x, y)
    assert torch.equal(both, (x.abs() - 0.5) ** 2 + y**2 < 0.04)
    for name, texture in common.TEXTURES.items():  # about half of it is bright
        bright = (texture(x, y) > 0).float().mean()
        assert bright == 0 if name == "plain" else 0.35 < bright < 0.65, name


def test_toys_through_data(tmp_path):
    data = common.Data("toys", tmp_path, limit=40)
    data.read(24, CPU, 8.0, 0)
    assert data.side is None and data.labelled and not list(tmp_path.iterdir())
    assert data.train.pixels.shape == (40, 3, 24, 24) and data.test[0].pixels.shape[0] == 40
    assert [len(p[1]) for p in (data.fit, data.val, data.test)] == [30, 10, 40]
    flat = [{tuple(p) for p in part.pixels.flatten(1).tolist()}
            for part in (data.train, data.test[0])]
    assert not flat[0] & flat[1]


def colours(images):
    """(n, 57): share of the pixels of each channel under each of 19 values."""
    values = torch.linspace(25, 255, 19)
    return torch.stack([(images < v).float().mean((2, 3)) for v in values], 2).flatten(1)


def position_and_size(images, masks):
    """(n, 3): centre of gravity and extent of the object."""
    m, size = masks.float(), masks.shape[-1]
    area, at = m.sum((1, 2)).clamp(min=1), torch.arange(size) / size
    y, x = (m.sum(2) * at).sum(1) / area, (m.sum(1) * at).sum(1) / area
    return torch.stack([y, x, (area / size**2).sqrt()], 1)


def test_guards_of_toys():
    """What colours, place and size, and raw pixels tell of the class: not much; a leak shows."""
    images, labels, parts, _, _ = common.toys(3000, 32, 0)

    def linear(x):
        return next(simclr.regression_path(x[::2], labels[::2], x[1::2], labels[1::2], [1e-2]))

    def knn(x):
        return common.knn((x[::2], labels[::2]), (x[1::2], labels[1::2]))

    place = position_and_size(images, parts > 0)
    assert linear(place) < 15 and linear(colours(images)) < 30 and knn(colours(images)) < 45
    assert knn(images.flatten(1).float()) < 46
    tinted = images * (1 - 0.1 * labels.view(-1, 1, 1, 1) * torch.tensor([1, 0, 0]).view(3, 1, 1))
    moved = torch.stack([p.roll(2 * int(c) - 9, 1) for p, c in zip(parts, labels)])
    assert linear(colours(tinted)) > 60 and linear(position_and_size(images, moved > 0)) > 17



# ==================================================================================================
# In the background: processes of their own
# ==================================================================================================


def command(name, folder, argv):
    """What `python NAME.py` does in a folder with common.py and nothing else."""
    for module in [*METHODS, "common", "tools"]:
        sys.modules.pop(module, None)
    sys.path[:] = [str(folder), *(p for p in sys.path if not p.startswith(str(ROOT)))]
    sys.argv = [f"{name}.py", *argv]
    os.chdir(folder)
    torch.set_num_threads(1)
    with open("out.txt", "w") as out, contextlib.redirect_stdout(out):
        runpy.run_path(f"{name}.py", run_name="__main__")


def files_for(name, folder):
    folder.mkdir()
    for file in (f"{name}.py", "common.py"):
        shutil.copy(ROOT / file, folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def background(request, tmp_path_factory):
    """Starts what the tests that were asked for will wait for: two processes that meet, and one
    for every file, on Linux forked from one that has imported what takes long."""
    folder, both, runs = tmp_path_factory.mktemp("background"), [], {}
    items = [item for item in request.session.items if item.path == request.path]
    context = torch.multiprocessing.get_context("spawn")
    if sys.platform == "linux":
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torchvision", "matplotlib.figure"])
        multiprocessing.forkserver.ensure_running()  # before a test changes the environment
    if any("both" in item.fixturenames for item in items):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        both = [context.Process(target=two_processes, args=(r, port, folder), daemon=True)
                for r in (0, 1)]
        for process in both:
            process.start()

    def run_all(names):
        for name in names:
            argv = tiny(name, *"--epochs 2 --eval-every 2".split())
            run = context.Process(target=command, args=(name, files_for(name, folder / name), argv))
            run.start()
            run.join()
            runs[name].set_result(run.exitcode)

    names = {i.callspec.params["finished"] for i in items if "finished" in i.fixturenames}
    runs.update({name: Future() for name in METHODS if name in names})
    threading.Thread(target=run_all, args=([*runs],), daemon=True).start()
    return SimpleNamespace(folder=folder, both=both, runs=runs)


@pytest.fixture(scope="module", params=METHODS)
def finished(request, background):
    """A run of two epochs, started as a command -> its name, folder, output."""
    assert background.runs[request.param].result() == 0
    folder = background.folder / request.param
    return request.param, next((folder / "runs").iterdir()), (folder / "out.txt").read_text()


@pytest.fixture(scope="module")
def both(background):
    """What each of two processes has found, and their folder."""
    for process in background.both:
        process.join()
        assert process.exitcode == 0
    found = [torch.load(background.folder / f"{r}.pt", weights_only=False) for r in (0, 1)]
    return found, background.folder


# ==================================================================================================
# Whole runs: what they leave, stop and go on
# ==================================================================================================


def test_a_run_writes_what_it_promises(finished):
    name, folder, out = finished
    assert {f.name for f in folder.iterdir()} == {
        "args.json", "metrics.jsonl", "results.json", "last.pt", "backbone.pt", "curves.png",
        "views.png"}
    results = strict_json((folder / "results.json").read_text())
    for k in """method dataset epochs seed device versions train_seconds total_seconds
            images_per_second peak_memory_mb verdict""".split():
        assert k in results, k
    names = [f"{k}{probe}_top1" for k in ("", "head_", "untrained_", "pixels_")
             for probe in ("linear", "knn")]
    texts = ["validation: linear", "test: linear", "h of the untrained network", "raw pixels"]
    if name == "pretext":  # rotation has no z
        names = [k for k in names if "head" not in k]
    if name == "weak":  # trains the classifier itself, beside its floor and its ceiling
        names = [f"{k}_accuracy" for k in ("label_model", "majority", "truth")]
        texts = ["floor: majority, ceiling: truth", "validation: ", "test: "]
    tops = [results[k] for k in names]
    assert all(0 <= v <= 100 for v in tops) and max(tops) > 1
    assert {k for k in results if k.endswith(("top1", "accuracy"))} == {*names}
    first, second = rows_of(folder)
    chance = float(re.search(r"^epoch 1: loss .*? \(chance (\S+)\)", out, re.M)[1])
    for row in (first, second):
        assert 0 < row["loss"] < 2 * chance and row["skipped"] == 0
    assert "verdict" not in first and {*names[:2], "verdict"} <= second.keys()
    args = strict_json((folder / "args.json").read_text())
    assert (args["method"], args["batch_size"], args["images"]) == (name, 16, 48)
    for picture in ("curves.png", "views.png"):
        assert np.asarray(Image.open(folder / picture)).std() > 5
    for text in ("recipe built-in:", "6 steps", *texts, results["verdict"]):
        assert text in out, text


def test_the_backbone_is_the_one_that_was_evaluated(finished):
    """Printed lines, backbone.pt and last.pt give its features; --eval gives the figures again, and
    leaves the folder of the run as it is."""
    name, folder, out = finished
    text = re.search(r"for \(RGB in \[0, 1\] - (\(.+?\))\) / (\(.+?\)):\n\n(import torch.+)", out,
                     re.S)
    mean, std = (torch.tensor(eval(text[i])).view(3, 1, 1) for i in (1, 2))
    if "timm" in text[3]:
        pytest.importorskip("timm")
    exec(text[3], names := {})  # from anywhere
    x, meta = noise(2, 16, 16), load(folder, "backbone.pt")["meta"]
    with torch.no_grad():
        h = names["net"]((x - mean) / std)  # in evaluation mode
    assert close(mean.flatten(), meta["mean"], 1e-6) and close(std.flatten(), meta["std"], 1e-6)
    assert meta["epochs"] == 2 and h.std() > 1e-3
    results = strict_json((folder / "results.json").read_text())
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    for source in ("last.pt", "backbone.pt"):
        file = folder.parent / "h.npz"
        argv = [*BARE, "--eval", folder / source, "--out", folder, "--embed", file]
        net, data, run = tools.train(method(name), argv)  # made as the run's, without its options
        net.eval()
        with torch.no_grad():
            own = method(name).features(net, x, run.args) if name == "pretext" else net(x)
        assert close(own[0], h, 1e-5)
        assert run.seconds == 0 and run.folder.parent == folder.parent
        if source == "last.pt" or name == "simclr":  # of a backbone alone z is random
            with contextlib.redirect_stdout(io.StringIO()):
                again = method(name).evaluate(net, data, run.args, run, test=True)
            random = "head", "spread", "alignment", "uniformity", "rank_z"
            for k, v in again.items():
                if k != "verdict" and not (source == "backbone.pt" and k.startswith(random)):
                    assert v == pytest.approx(results[k], abs=1e-3), k
            with np.load(file) as saved, torch.no_grad():
                five = names["net"]((data.train.pixels[:5] / 255 - mean) / std)
                assert close(saved["h"][:5], five, 1e-5)
    assert before == {f.name: f.read_bytes() for f in folder.iterdir()}


def test_eval_of_other_images(finished, tmp_path):
    """They are seen as the run saw its own, whatever their size; an option that is given counts."""
    name, folder, _ = finished
    if name == "weak":
        pytest.skip("its rules know the built-in set alone")
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.fromarray(photo(90, 100, i)).save(tmp_path / "images" / f"{i}.png")
    argv = [*BARE, "--eval", folder / "backbone.pt", "--dataset", tmp_path / "images", "--out",
            tmp_path / "run"]
    for more, size in (((), 16), (("--image-size", 24), 24)):
        _, data, run = tools.train(method(name), [*argv, *more])
        assert run.args.image_size == size and data.side == 90
        assert run.args.arch == load(folder, "backbone.pt")["meta"]["arch"]


def test_eval_of_another_method(finished, tmp_path, capsys):
    """Of its run the network alone is taken over; where it is unknown a sentence says so."""
    name, folder, _ = finished
    argv = [*BARE, "--eval", folder / "backbone.pt", "--out", tmp_path / "run"]
    for other in map(method, METHODS):
        known = load(folder, "backbone.pt")["meta"]["arch"] in other.OPTIONS["arch"][3]["choices"]
        if known and (name == "dinov2") == (other.__name__ == "dinov2"):  # which has LayerScale
            with common.Run(args := tools.options(other, argv)) as run:
                other.train(args, run)
            assert args.image_size == 16 and (args.epochs == 2) == (other.__name__ == name)
            assert ("recipe of the file" in capsys.readouterr().out) == (other.__name__ == name)
        else:
            words = "another network" if known else "does not have"
            assert words in refused(other, argv, capsys)


def test_what_a_run_started_from_is_not_recalled(tmp_path):
    """--branch student of a released file: the run's own file is evaluated by its teacher."""
    made = {"method": "dino", "branch": "student", "out_dim": 7}
    torch.save({"method": "dino", "args": made}, tmp_path / "last.pt")
    args = Namespace(method="dino", eval=tmp_path / "last.pt")
    assert common.recall(args) == {"method": "dino", "out_dim": 7}


def test_a_file_is_evaluated_on_the_set_of_its_run(tmp_path):
    file = str(tmp_path / "last.pt")
    for made, *sets in (({"method": "loop", "dataset": "a", "labelled": "c"}, "a", "c"),
                        ({"method": "dino", "dataset": "a"}, "a", None), ({}, "toys", None)):
        torch.save({"meta": made}, file)
        for flags, expected in (([], sets), (["--dataset", "b"], ["b", None]),
                                (["--labelled", "d"], [sets[0], "d"])):
            args = common.options("loop", "A loop", LOOP, ["--eval", file, *flags])
            assert [args.dataset, args.labelled] == expected
    assert common.options("loop", "A loop", LOOP, []).dataset == "toys"


def stopped_after(k, name, *argv):
    """A tiny run, stopped by a signal in its k-th step."""
    class Stopping(common.Run):
        def log(self, ok, **figures):
            if self.step + 1 == k:
                signal.raise_signal(signal.SIGTERM)
            super().log(ok, **figures)

    with pytest.raises(SystemExit) as stopped:
        tools.train(method(name), tiny(name, *argv), Stopping)
    assert stopped.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("name", [k for k in ("simclr", "moco", "dino") if k in METHODS])
def test_resume_is_bit_for_bit(name, tmp_path):
    argv = ["--epochs", "2", "--eval-every", "2" if name == "simclr" else "0", "--out"]
    tools.train(method(name), tiny(name, *argv, tmp_path / "whole"))
    whole = load(tmp_path / "whole")
    for k in (3, 6) if name == "simclr" else (2,):  # at the end of an epoch, or within one
        parts = tmp_path / f"parts{k}"
        stopped_after(k, name, *argv, parts)
        saved = load(parts)
        assert saved["progress"]["step"] == k
        assert not same(saved["state"], whole["state"]) or k == 6
        saved["progress"]["total"] += 1000
        torch.save(saved, parts / "last.pt")
        common.reseed(k)  # nothing hangs on these
        tools.train(method(name), tiny(name, *argv, parts, "--resume"))
        assert same(load(parts)["state"], whole["state"]), k
        assert load(parts)["progress"]["total"] > 1000  # seconds of both parts
        assert rows_of(parts) == rows_of(tmp_path / "whole") and len(rows_of(parts)) == 2


@tools.unix
def test_a_process_that_gets_sigterm_goes_on(tmp_path):
    argv = "--epochs 500 --eval-every 0 --out".split()
    folder = files_for("simclr", tmp_path / "cwd")
    process = subprocess.Popen([sys.executable, "-u", "simclr.py", *tiny("simclr", *argv, "run")],
                               cwd=folder, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("epoch 1:"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM and not process.stderr.read()
    step = load(folder / "run")["progress"]["step"]
    assert not (folder / "run" / "results.json").exists()
    stopped_after(step + 2, "simclr", *argv, folder / "run", "--resume")
    assert load(folder / "run")["progress"]["step"] == step + 2 > 4


def test_resume_is_refused(tmp_path, capsys):
    images = Path(tree(tmp_path / "images", train__a=20, train__b=20))
    last = tmp_path / "run" / "last.pt"
    small = [simclr.OPTIONS[k][0] for k in ("arch", "stem")]
    argv = ["--arch", small[0], "--stem", small[1], "--lr", 0.5, "--eval-every", 0, "--out",
            tmp_path / "run", "--dataset"]
    stopped_after(1, "simclr", *argv, images)
    good = last.read_bytes()

    def error(more=""):
        return refused(simclr, tiny("simclr", *argv, images, "--resume", *more.split()), capsys)

    for more, begun in (("--seed 1", "seed 0"), ("--lr 1", "lr 0.5"), ("--head none", "head mlp")):
        assert f"the run had {begun}, not" in error(more)
    (images / "train" / "a" / "0.png").rename(tmp_path / "0.png")
    assert "the run had images 36, not 35" in error()
    (tmp_path / "0.png").rename(images / "train" / "a" / "0.png")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    for broken in (good[:5000], (tmp_path / "other.pt").read_bytes()):
        last.write_bytes(broken)
        assert "last.pt" in error()
    last.write_bytes(good)
    assert strict_json((tmp_path / "run" / "args.json").read_text())["lr"] == 0.5
    tools.train(simclr, tiny("simclr", *argv, f"{images}/", "--resume", "--workers", "1"))  # same


# ==================================================================================================
# Two processes
# ==================================================================================================


class Exact(Watched):
    """Nothing is drawn, and normalisation is in eval mode unless `training`: in float64 what is
    left of a run is the same for any number of processes, but for rounding."""

    training = False

    def __init__(self, args):
        self.nets = []
        super().__init__(args)

    def compiled(self, f):
        if not isinstance(f, nn.Module):  # augment
            return lambda views, *_: [x.roll(2 * i, 3) for i, x in enumerate(views)]
        self.nets.append(f)
        return f

    def batches(self, data, epoch, crops):
        for net in self.nets:
            net.train(self.training)
        crops = [c._replace(scale=1.0, ratio=None) for c in crops]
        return super().batches(data, epoch, crops)


class Training(Exact):
    training = True


class Detached(Exact):
    """gather as it is often written: only what this process has made has a gradient."""

    def gather(self, x):
        parts = super().gather(x).detach().chunk(self.world)
        return torch.cat([x if r == self.rank else part for r, part in enumerate(parts)])


class Alone(Exact):
    """Each process for itself, but for the gradients."""

    def gather(self, x):
        return x

    def mean(self, x):
        return x


MISTAKES = {"simclr": [Detached], "dino": [Alone], "dinov2": [Alone]}
ALSO = {"moco": ["--bn-splits 2", Training], "dinov2": ["--centering ema", Exact]}


def exact(name, folder, flags="", kind=Exact):
    """What an epoch in float64 leaves: `held` of its state."""
    single = torch.Tensor.float
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda t: t.double() if t.ndim else single(t))
        torch.set_default_dtype(torch.float64)
        try:
            argv = tiny(name, *"--epochs 1 --eval-every 0".split(), *flags.split(), "--out", folder)
            _, _, run = tools.train(method(name), argv, kind)
        finally:
            torch.set_default_dtype(torch.float32)
    found = held(run.state)
    assert sum(t.dtype == torch.float64 and t.abs().max() > 1e-3 for t in found.values()) > 12
    return found


def apart(a, b, without="nothing"):
    """The largest difference of two dicts of tensors."""
    assert a.keys() == b.keys()
    return max(far(a[k].double(), b[k].double()) for k in a if without not in k)


def seven_images():
    pixels = (noise(11, 16, 16) * 255).byte()
    images = common.Images(torch.arange(11), pixels, torch.full((11, 2), 16))
    return images, torch.tensor([3, 1, 4, 10, 5, 9, 2])


def features(run):
    return common.embed(lambda x: (x[0].mean((2, 3)), x[0][:, :, 0]), seven_images(),
                        [common.Crop(16, 1.0)], run)


def shared_functions(rank):
    """embed, mean, gather, and update where the loss of the second process is not finite."""
    with opened("--workers", 0, "--out", "shared") as run:
        x = (torch.arange(6.0).view(3, 2) + 10 * rank).requires_grad_()
        (run.gather(x) * torch.arange(12).view(6, 2)).sum().backward()
        net, optimizer = small_net("sgd")
        before = held({"net": net})
        ok = step_of(run, net, optimizer, OFF, rank, "loss" if rank else None)
        return {"features": features(run), "mean": run.mean(torch.tensor([1.0, 4.0]) * (1 + rank)),
                "gathered": run.gather(x).detach(), "grad": x.grad, "ok": ok,
                "untouched": same(before, held({"net": net}))}


def two_processes(rank, port, folder):
    """What each of the two does; what it finds goes to folder/<rank>.pt."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=str(port),
                      MASTER_ADDR="127.0.0.1")
    os.chdir(folder)
    sys.modules["matplotlib.figure"] = None  # it takes longer than a tiny run
    found = {"shared": shared_functions(rank)}
    for name in METHODS:
        kinds = [Exact, *MISTAKES.get(name, [])]
        found[name] = [exact(name, "x", kind=kind) for kind in kinds]
        if name in ALSO:
            found[f"{name} also"] = exact(name, "x", *ALSO[name])
    argv = ["--epochs", "2", "--eval-every", "1", "--out"]
    found["results"], _ = tools.quiet(simclr, tiny("simclr", *argv, "whole"))
    stopped_after(2 if rank else 0, "simclr", *argv, "parts")
    tools.train(simclr, tiny("simclr", *argv, "parts", "--resume"))
    torch.save(found, f"{rank}.pt")


def test_gather_keeps_the_gradient(monkeypatch):
    """On the second of two processes; DistributedDataParallel halves the sum of both."""
    other, x = draw(3, 2), draw(3, 2, seed=1).requires_grad_()
    monkeypatch.setattr(common.dist, "all_gather",
                        lambda parts, own: [p.copy_(t) for p, t in zip(parts, (other, own))])
    whole = common.Run.gather(SimpleNamespace(world=2, rank=1), x)
    weights = draw(6, 2, seed=2)
    (whole * weights).sum().backward()
    assert torch.equal(whole, torch.cat([other, x])) and close(x.grad, 2 * weights[3:])


@every
def test_two_processes_are_one(name, both, tmp_path):
    """Three steps of the file: weights, moments, EMA, queue and centre are those of one process
    with the whole batch."""
    alone = exact(name, tmp_path / "run")
    for found in both[0]:
        assert apart(found[name][0], alone) < 1e-10
        for kind, mistake in zip(MISTAKES.get(name, []), found[name][1:]):
            assert apart(mistake, alone) > 1e-4, kind  # DINOv2 balances its own images alone
        if name in ALSO:  # MoCo's statistics for evaluation are of one process only
            also = exact(name, tmp_path / "also", *ALSO[name])
            assert apart(found[f"{name} also"], also, without="running") < 1e-10
            assert apart(found[f"{name} also"], alone, without="running") > 1e-4


def test_two_processes_agree_stop_and_go_on(both, tmp_path, no_curves):
    (first, second), folder = both
    argv = ["--eval", folder / "whole" / "last.pt", "--out", tmp_path / "run"]
    again, _ = tools.quiet(simclr, tiny("simclr", *argv))
    for k, v in first["results"].items():
        if k.endswith("top1") or k in ("verdict", "spread", "rank_h", "rank_z"):
            assert v == second["results"][k], k
        if k.endswith("top1"):  # batch norm's statistics are those of the first
            assert v == pytest.approx(again[k], abs=1e-3), k
    whole, parts = folder / "whole", folder / "parts"
    assert (whole / "results.json").exists() and not (folder / "whole-2").exists()
    assert same(load(whole)["state"], load(parts)["state"]) and rows_of(whole) == rows_of(parts)


def test_two_processes_share_out_and_fail_together(both, one):
    rows, weights = torch.arange(6.0).view(3, 2), torch.arange(12).view(2, 3, 2)
    for rank, found in enumerate(found["shared"] for found in both[0]):
        assert all(close(a, b, 1e-6) for a, b in zip(found["features"], features(one)))
        assert close(found["mean"], [1.5, 6.0], 1e-6)
        assert torch.equal(found["gathered"], torch.cat([rows, rows + 10]))
        assert torch.equal(found["grad"], 2.0 * weights[rank])  # of the losses of both
        assert not found["ok"] and found["untouched"]


@pytest.mark.parametrize("name", [m for m in METHODS if m != "weak"])
def test_what_is_probed(name, tmp_path, monkeypatch):
    """Views of validation images as in training for the verdict, central squares of the splits for
    the rest: test images in the last evaluation alone. An untrained network is its own floor; raw
    pixels are those of at most 32 x 32."""
    file, embed, seen, votes = method(name), common.embed, [], []

    def recorded(f, part, crops, *run, **limit):
        found = embed(f, part, crops, *run, **limit)
        seen.append((part, crops, found[0]))
        return found

    argv = "--epochs 1 --eval-every 0 --image-size 40 --knn-k 3 --knn-tau 0.5 --out".split()
    _, data, run = tools.train(file, tiny(name, *argv, tmp_path / "run"))
    monkeypatch.setattr(common, "embed", recorded)
    monkeypatch.setattr(common, "knn", lambda *parts, **given: votes.append(given) or 0.0)
    monkeypatch.setattr(file, "linear_probe", lambda *parts: 0.0)
    for test, splits in ((False, ["fit", "val"]), (True, ["fit", "val", "test"] * 3)):
        seen.clear()
        net = file.build(run.args)
        before = copy.deepcopy(net.state_dict())
        file.evaluate(net, data, run.args, run, test)
        assert net.training and same(before, net.state_dict())
        assert len(seen) == 1 + len(splits)
        for (part, crops, _), split in zip(seen, ["val", *splits]):
            images, index = getattr(data, split)
            assert part[0] is images and torch.equal(part[1], index)
            assert (crops[0].ratio is None) == (crops is not seen[0][1])
        assert seen[0][1] == file.crops(run.args)[:1]
    assert all(torch.equal(own[2], floor[2]) for own, floor in zip(seen[1:4], seen[4:7]))
    assert all(pixels[2].shape[1] == 3 * 32 * 32 for pixels in seen[7:])
    assert all(given == {"k": 3, "tau": 0.5} for given in votes)
    assert file.central(64) == [common.Crop(64, 1.0)]
    assert file.central(65) == [common.Crop(65, 0.875)]


@pytest.mark.parametrize("name", [m for m in "moco byol dino ibot dinov2".split() if m in METHODS])
def test_the_average_starts_where_the_network_does(name, tmp_path):
    """With --init, too: at the weights of the file, not at random ones."""
    class Starting(Watched):
        def epochs(self, data):
            self.start = [copy.deepcopy(self.state[k].state_dict()) for k in ("net", "net_ema")]
            return super().epochs(data)

    argv = tiny(name, "--epochs", 1, "--eval-every", 0, "--out", tmp_path / "run")
    file = method(name)
    _, _, run = tools.train(file, [*argv, "--seed", 1])
    _, _, run = tools.train(file, [*argv, "--init", run.folder / "last.pt"], Starting)
    assert same(*map(dict, run.start))
    assert not same(dict(run.start[0]), dict(file.build(run.args).state_dict()))


def test_limit_has_all_classes(tmp_path):
    """Of a fixed shuffle, as files lie in the order of their classes."""
    data = common.Data(tree(tmp_path, train__a=30, train__b=30, test__a=30, test__b=30), limit=20)
    for _, labels in data.parts.values():
        assert {*labels.tolist()} == {0, 1}


def test_the_side_of_a_set_is_its_median(tmp_path):
    """By which a recipe is chosen: one large image does not make it a set of large ones."""
    for i, size in enumerate([(30, 40), (40, 30), (900, 800)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    assert common.Data(str(tmp_path)).side == 30


def test_every_epoch_and_every_seed_has_its_own_order():
    data = common.Data("toys", limit=64)
    data.read(*READ)
    run = SimpleNamespace(device=CPU, rank=0, world=1)

    def order(number, seed):
        found = data.epoch(number, 0, 16, [common.Crop(8, 1.0)], run, seed)
        return torch.cat([index for _, index in found]).tolist()

    orders = [order(*which) for which in ((0, 0), (1, 0), (0, 1), (1, 0))]
    assert all(sorted(o) == [*range(64)] for o in orders) and orders[1] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_resume_with_another_number_of_processes_is_refused(tmp_path, capsys):
    stopped_after(2, "simclr", "--out", tmp_path / "run")
    saved = load(tmp_path / "run")
    saved["args"]["processes"] = 2
    torch.save(saved, tmp_path / "run" / "last.pt")
    argv = tiny("simclr", "--out", tmp_path / "run", "--resume")
    assert "processes 2, not 1" in refused(simclr, argv, capsys)


@every
def test_images_of_64_pixels_are_small(name):
    file = method(name)
    for side, column in ((64, 1), (65, 2)):
        assert tools.completed(file, [], side).arch == file.OPTIONS["arch"][column]
