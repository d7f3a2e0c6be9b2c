"""What users run into: half an environment, taken ports, names that no terminal prints, layouts and
files of other kinds. Each fault ends in one sentence, or is told, or does no harm."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from test_common import TRAIN, opened, saved, stopped_after, tiny, tree
from tools import ROOT, TINY, fails, options, quiet, refused, train, unix

import common
import moco
import simclr

# ==================================================================================================
# Processes
# ==================================================================================================


@pytest.fixture
def port():
    """One that is taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield str(taken.getsockname()[1])


@pytest.mark.parametrize("given, word", [
    ("RANK=1", "below 1"), ("WORLD_SIZE=2", "RANK"), ("RANK=0 WORLD_SIZE=2", "MASTER_ADDR"),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1", "MASTER_PORT"),
    ("WORLD_SIZE=two", "'two'"), ("WORLD_SIZE=", "''"), ("WORLD_SIZE=-1", "'-1'"),
    ("RANK=0 WORLD_SIZE=0", "below 0"), ("RANK=2 WORLD_SIZE=2", "below 2"), ("RANK=x", "'x'"),
    ("LOCAL_WORLD_SIZE=x", "'x'"), ("RANK=0 WORLD_SIZE=1.5", "'1.5'"),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=taken", "do not meet"),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=99999", "do not meet"),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={port}", "do not meet")])
def test_half_an_environment_of_torchrun(given, word, port, monkeypatch, capsys, tmp_path):
    for pair in given.format(port=port).split():
        monkeypatch.setenv(*pair.split("="))
    assert word in fails(lambda: opened("--out", tmp_path / "run"), capsys)
    assert not (tmp_path / "run").exists()


def test_a_share_of_the_cores(monkeypatch):
    whole = common.cores()
    for share, expected in (("0", whole), ("1", whole), ("999", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", share)
        assert common.cores() == expected


def test_more_processes_than_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    error = fails(lambda: opened("--device", "cuda"), capsys)
    assert "LOCAL_RANK is '4', and has to be a whole number below 4" in error


@unix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_ends_a_wait_for_other_processes(number, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = subprocess.Popen(
        [sys.executable, ROOT / "simclr.py", *TINY, "--out", tmp_path / "run"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=str(port)))
    for _ in range(1200):  # until it listens
        with socket.socket() as other:
            if not other.connect_ex(("127.0.0.1", port)):
                break
        time.sleep(0.1)
    assert run.poll() is None  # it waits
    run.send_signal(number)
    try:
        assert run.wait(30) in (-number, 1, 128 + number)
    finally:
        run.kill()


# ==================================================================================================
# Options, names, folders, files
# ==================================================================================================


@pytest.mark.parametrize("option", ["dataset", "out", "init", "eval", "device", "data-dir"])
def test_an_empty_value_is_refused(option, capsys):
    assert f"--{option} is" in fails(lambda: options(simclr, [f"--{option}", ""]), capsys)


@unix
def test_names_that_a_terminal_cannot_print(tmp_path):
    """Bytes that are no text, control characters, and letters that its encoding does not have."""
    folder = tmp_path / "caf\udce9 \u65e5"
    tree(folder, **TRAIN)
    (folder / "train" / "b").rename(folder / "train" / "b\udcff\n\x1b[31m")
    (folder / "train" / "a" / "\u65e5\n.jpg").write_bytes(b"no image")
    argv = [*TINY, "--batch-size", "8", "--epochs", "1", "--eval-every", "0"]
    for encoding in ("utf-8:strict", "ascii:strict"):
        run = subprocess.run(
            [sys.executable, "-c", "import sys; sys.modules['matplotlib.figure'] = None; "
             "import simclr; simclr.main()", *argv, "--dataset", folder], cwd=tmp_path,
            capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding,
                                                   "PYTHONPATH": str(ROOT)})
        assert run.returncode == 0 and not run.stderr, run.stderr
        assert rb"\n.jpg): cannot" in run.stdout and b"\x1b" not in run.stdout


def test_errors_are_one_line(capsys):
    error = fails(lambda: common.fail("of a file named a\nb\r\x1b[2Jc\udce9"), capsys)
    assert error == "error: of a file named a\\nb\\r\\x1b[2Jc\\udce9\n"


@unix
def test_the_folder_of_a_dataset_with_a_relative_name(tmp_path, monkeypatch):
    (tmp_path / "photos" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "photos" / "x")
    for name in (".", "../x", f"{tmp_path}/photos/x/"):
        with pytest.raises(ZeroDivisionError), opened("--dataset", name) as run:
            run.step = 1 / 0
        assert str(run.folder) == "runs/loop-x-s0"


def test_a_broken_file_in_a_set_smaller_than_a_batch(tmp_path):
    """The default batch is what is left, not what is listed."""
    for i in range(64):
        path = tmp_path / "images" / ("test" if i < 16 else "train") / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (3 * i, 40, 90)).save(path)
    path.write_bytes(b"")
    argv = "--epochs 1 --eval-every 0 --image-size 16 --device cpu".split()
    results = simclr.main([*argv, "--dataset", f"{tmp_path / 'images'}", "--out",
                           f"{tmp_path / 'run'}"])
    assert results["batch_size"] == 40  # of 47 in eights, not of 48


def test_an_interrupt_before_the_first_step_is_one_word(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended, opened("--out", tmp_path / "run"):
        raise KeyboardInterrupt
    assert ended.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "run" / "args.json").exists()


def test_a_refused_resume_changes_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    simclr.main([*TINY, "--epochs", "1", "--out", f"{folder}"])
    (folder / "results.json").unlink()  # as if it had been stopped
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    for file, words in ((moco, "the run had method simclr, not moco"), (simclr, "the run had")):
        argv = [*TINY, "--epochs", "1", "--seed", "3", "--out", folder, "--resume"]
        assert words in refused(file, argv, capsys)
    assert before == {f.name: f.read_bytes() for f in folder.iterdir()}


def test_what_a_run_started_from_is_not_needed_to_resume_it(tmp_path):
    class Stopping(common.Run):
        def save(self, state):
            self.signal = 15 if self.step == self.per_epoch else 0
            super().save(state)

    argv = [*TINY, "--epochs", "2", "--out", f"{tmp_path / 'run'}"]
    simclr.main([*TINY, "--epochs", "1", "--out", f"{tmp_path / 'first'}"])
    file = tmp_path / "first" / "backbone.pt"
    with pytest.raises(SystemExit):
        train(simclr, [*argv, "--init", f"{file}"], Stopping)
    file.unlink()
    assert simclr.main([*argv, "--init", f"{file}", "--resume"])["epochs"] == 2


def test_a_random_head_has_no_verdict(tmp_path):
    simclr.main([*TINY, "--epochs", "1", "--out", f"{tmp_path / 'run'}"])
    for file, verdict in (("backbone.pt", False), ("last.pt", True)):
        results = simclr.main([*TINY, "--eval", f"{tmp_path / 'run' / file}", "--out",
                               f"{tmp_path / file}"])
        assert ("the head is random" not in results["verdict"]) == verdict
        assert ("head_knn_top1" in results) == verdict and "knn_top1" in results


@pytest.mark.parametrize("file", ["no/f.npz", ".", "f.csv"])
def test_features_that_cannot_be_written_are_refused_first(file, tmp_path, capsys):
    argv = [*TINY, "--out", tmp_path / "run", "--embed", tmp_path / file]
    assert "a .npz file in a folder" in refused(simclr, argv, capsys)
    assert not (tmp_path / "run").exists()


def test_standard_error_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert simclr.main([*TINY, "--epochs", "1", "--out", f"{tmp_path / 'run'}"])


def test_resume_where_a_folder_in_between_is_free(tmp_path):
    def touch(name, *files):
        (tmp_path / name).mkdir(exist_ok=True)
        for file in files:
            (tmp_path / name / file).touch()
            time.sleep(0.02)  # the clock of a file system is coarse

    def resumed():
        return opened("--resume", "--out", tmp_path / "run").folder.name

    touch("run-2", "args.json", "last.pt")
    assert resumed() == "run-2"  # `run` is deleted
    touch("run")
    assert resumed() == "run-2"  # `run` has failed, and is free
    touch("run", "args.json", "last.pt")
    assert resumed() == "run"  # begun again, and stopped after run-2
    touch("run", "results.json")
    assert resumed() == "run-2"
    touch("run-7", "args.json", "last.pt")
    assert resumed() == "run-7"


@unix
@pytest.mark.parametrize("out", ["/proc/run", "/sys/run", "file", "file/run", "loop/run"])
def test_a_folder_that_cannot_be_made(out, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    error = refused(simclr, [*TINY, "--out", tmp_path / out], capsys)
    assert out in error and "no folder can be made" in error


@pytest.mark.parametrize("raised", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_no_part_is_left_behind(raised, tmp_path):
    def content(part):
        part.write_text("half")
        raise raised

    with pytest.raises((SystemExit, KeyboardInterrupt)):
        common.write(tmp_path / "a.pt", content)
    assert not list(tmp_path.iterdir())


def test_resume_with_other_data_of_the_same_number(tmp_path, capsys):
    """Other names, or other labels; another path is no difference."""
    root = Path(tree(tmp_path / "one", train__a=20, train__b=20, test__a=1))
    for file in [*(root / "train" / "b").iterdir()]:
        file.rename(file.with_name(f"b{file.name}"))
    argv = tiny("simclr", "--eval-every", "0", "--arch", "convnet", "--stem", "7x7", "--lr", "0.5",
                "--out", str(tmp_path / "run"), "--dataset")
    stopped_after(1, "simclr", *argv[len(tiny("simclr")):], root)
    root = root.rename(tmp_path / "two")
    file = root / "train" / "a" / "9.png"  # the last of a, or of the same name the first of b
    for other in ("a/new.png", "b/9.png"):
        moved = file.rename(root / "train" / other)
        assert "checksum" in refused(simclr, [*argv, root, "--resume"], capsys)
        moved.rename(file)
    stopped_after(2, "simclr", *argv[len(tiny("simclr")):], root, "--resume")


# ==================================================================================================
# Checkpoints
# ==================================================================================================

NET = simclr.SimCLR("convnet").backbone.state_dict()


def loaded(content, tmp_path):
    args = options(simclr, ["--init", saved(tmp_path, content).init, "--arch", "convnet"])
    args.head, args.dim, args.stem = "linear", 8, "7x7"
    net = simclr.build(args)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    common.load_weights(net, args)
    return net.backbone.state_dict()


@pytest.mark.parametrize("content", [
    {"method": "simclr", "state": {"net": None}}, {"method": "simclr", "state": {"net": [1]}},
    {"method": "simclr", "state": {}}, {"state_dict": None}, {1: torch.zeros(2)}, {},
    {k: v.to_sparse() if v.ndim else v for k, v in NET.items()},
    {k: v.to("meta") for k, v in NET.items()}, {k: v[None] for k, v in NET.items()},
    {k: v * math.nan if v.is_floating_point() else v for k, v in NET.items()},
    {f"{k}\n": v for k, v in NET.items()}, {k.encode(): v for k, v in NET.items()}],
    ids="none list empty-state null numbers empty sparse meta deeper nan lines bytes".split())
def test_a_checkpoint_of_another_kind_is_refused(content, tmp_path, capsys):
    fails(lambda: loaded(content, tmp_path), capsys)


@pytest.mark.parametrize("prefix", ["model.", "encoder.", "net.", "module.encoder.",
                                    "_orig_mod.module.", "model.backbone.", "module.model."])
def test_prefixes_of_wrappers_are_stripped(prefix, tmp_path):
    found = loaded({"state_dict": {prefix + k: v for k, v in NET.items()}, "epoch": 3}, tmp_path)
    assert all(torch.equal(found[k], v) for k, v in NET.items())


# ==================================================================================================
# Layouts and images
# ==================================================================================================


def found(root, capsys):
    """The images of each part, and what is told of them."""
    data = common.Data(str(root))
    return {k: len(v) for k, (v, _) in data.parts.items()}, capsys.readouterr().out


def test_what_is_not_used_is_told(tmp_path, capsys):
    tree(tmp_path, **TRAIN, valid__a=2, valid__b=2, Test__b=3, spare__a=5, train__none=0, runs=1)
    parts, out = found(tmp_path, capsys)  # a class without images is none
    assert parts == {"train": 20, "val": 4, "test": 3}
    assert "2 classes (a, b);" in out and "folders not entered: runs, spare\n" in out


@unix
def test_flat_splits_and_no_splits(tmp_path, capsys):
    tree(tmp_path, train=9, test=3)
    parts, out = found(tmp_path, capsys)
    assert parts == {"train": 9} and f"all of {tmp_path}/train is for training" in out
    assert "not entered: test\n" in out
    (tmp_path / "train").rename(tmp_path / "cats")
    parts, out = found(tmp_path, capsys)
    assert parts == {"train": 12} and f"all of {tmp_path} is for training" in out


@pytest.mark.parametrize("counts, word", [
    (dict(test=1, test__a=2), "test has images of no class of train: 0.png"),
    (dict(val__images=2), "val has images of no class of train: images"),
    (dict(test=3), "test has images of no class"),
    (dict(val__a=2, valid__a=2), "two folders for the val split"),
    (dict(Train__a=2, Train__b=1), "two folders for the train split"),
    (dict(test__c=2, train__c=0), "test has images of no class of train: c")])
def test_layouts_that_are_refused(counts, word, tmp_path, capsys):
    tree(tmp_path, **TRAIN, **counts)
    assert word in fails(lambda: found(tmp_path, capsys), capsys)


@pytest.mark.parametrize("b", [{}, {"train__b": 1}])
def test_two_images_are_too_few(b, tmp_path, capsys):
    tree(tmp_path, train__a=1 if b else 2, test__a=1, **b)
    argv = [*TINY, "--batch-size", "2", "--out", tmp_path / "run"]
    for more in (["--dataset", tmp_path], ["--limit", "2"]):
        assert "too few training images" in refused(simclr, [*argv, *more], capsys)


def test_a_run_is_not_put_among_its_images(tmp_path, capsys):
    """They would be taken for those of the run, and be gone when it is resumed. Above them, or
    beside them in a folder of its own, a run is left out."""
    data = tmp_path / "data"
    tree(data, train__a=20, train__b=20, test__a=2)
    tree(tmp_path / "flat", **{"": 40})
    argv = [*TINY, "--epochs", 1, "--dataset", data, "--out"]
    for out in (".", "train", "train/a", "test/a"):
        for more in ([], ["--dataset", tmp_path / "flat", "--labelled", data / "train" / ".."]):
            error = refused(simclr, [*argv, data / out, *more], capsys)
            assert "is a folder of the images" in error
            assert (data / out).exists() and not (data / out / "args.json").exists()
    assert "over the number" in refused(simclr, [*argv, data / "run", "--batch-size", 64], capsys)
    for out in (data / "train" / "run", tmp_path):
        quiet(simclr, [*argv, out])
        assert found(data, capsys)[0] == {"train": 40, "test": 2}


def test_an_option_that_is_misspelled(capsys):
    for word, name in (("--labeled", "--labelled"), ("--image_size", "--image-size"),
                       ("--batch", "--batch-size")):
        error = fails(lambda: options(simclr, [f"{word}=64"]), capsys)  # noqa: B023
        assert error == (f"error: unrecognized arguments: {word}=64 (for {word}, did you mean "
                         f"{name}?)\n")
    for argv in (["--xyz", "1"], ["--zzz", "my--data"]):
        assert "did you mean" not in fails(lambda: options(simclr, argv), capsys)  # noqa: B023


def test_a_file_that_somebody_reads_is_replaced_later(tmp_path, monkeypatch, capsys):
    """On Windows an open file cannot be replaced."""
    replace, waits = os.replace, []
    monkeypatch.setattr(common.time, "sleep", waits.append)
    windows = SimpleNamespace(name="nt", replace=lambda a, b: locked(a, b), getpid=os.getpid,
                              environ=os.environ)
    monkeypatch.setattr(common, "os", windows)

    def locked(a, b):
        if len(waits) < free:
            raise PermissionError(13, "it is open")
        replace(a, b)

    for free in (0, 2):
        common.write(tmp_path / "a.txt", str(free))
        assert (tmp_path / "a.txt").read_text() == str(free) and len(waits) == free
    free = 99
    assert "it is open" in fails(lambda: common.write(tmp_path / "a.txt", "99"), capsys)
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"] and len(waits) == 5
    windows.name = "posix"
    assert "it is open" in fails(lambda: common.write(tmp_path / "a.txt", "99"), capsys)
    assert len(waits) == 5


def test_the_last_table_says_on_how_many_images(tmp_path):
    argv = [*TINY, "--epochs", 1, "--eval-every", 0, "--out", tmp_path / "run"]
    _, out = quiet(simclr, argv)
    assert f"\n{'top-1 in % on 48 test images':36}   linear   k-NN\n" in out


def test_a_run_that_was_killed_is_no_data(tmp_path, capsys):
    tree(tmp_path, x=4, x__run=1, y=2)
    for file in ("args.json", "views.png"):
        (tmp_path / "x" / "run" / file).touch()
    (tmp_path / "y" / "args.json").touch()  # of something else
    assert found(tmp_path, capsys)[0] == {"train": 6}


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0,
                    reason="needs the right to become somebody else")
def test_folders_that_may_not_be_read_are_named(tmp_path, capsys):
    tree(tmp_path, a=3, b=3)
    (tmp_path / "a").chmod(0)
    try:
        for folder in [tmp_path, *tmp_path.parents][:3]:
            folder.chmod(0o755)
        os.seteuid(65534)
        parts, out = found(tmp_path, capsys)
    finally:
        os.seteuid(0)
    assert parts == {"train": 3} and "Permission denied" in out and "/a'" in out


RAMP = np.linspace(0, 1, 400).reshape(20, 20)


@pytest.mark.parametrize("values, low, high", [
    (2 * RAMP - 1, 0, 255), (1000 * RAMP - 1000, 0, 255), (3000 * RAMP - 1000, 0, 251),
    (1e6 * RAMP, 0, 243), (np.where(RAMP > 0, RAMP, np.nan), 0, 255),
    (np.where(RAMP > 0, 200 * RAMP, np.inf), 0, 200), (0 * RAMP - 5, 0, 0), (12 * RAMP, 0, 204),
    (1.1 * RAMP, 0, 93), (np.where(RAMP < 1, 1000 * RAMP, 65535), 0, 255),
    (70 * RAMP + 20, 40, 180), (255 * RAMP, 0, 255), (65535 * RAMP, 0, 255),
    (np.where(RAMP > 0, 200 * RAMP + 20, -9999), 0, 220)],
    ids="negative all-negative hounsfield large nan inf flat counts quotient hot-pixel dim 8-bit "
        "16-bit no-data".split())
def test_deep_images_of_any_range(values, low, high, tmp_path):
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "a.tif")
    pixels = common.read_image(tmp_path / "a.tif", 20)
    assert abs(int(pixels.min()) - low) <= 1 and abs(int(pixels.max()) - high) <= 1
    assert (np.diff(pixels.reshape(-1, 3)[1:].astype(int), axis=0) >= 0).all()  # still a ramp


def test_text_beside_the_pixels_is_no_reason_to_go_without_them(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("notes", "b" * 3_000_000, zip=True)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png", pnginfo=text)
    assert common.read_image(tmp_path / "a.png", 20).shape == (20, 20, 3)


def test_what_is_missing_is_noticed_before_the_set_is_read(tmp_path, monkeypatch, capsys):
    assert "none.pt" in fails(lambda: options(simclr, ["--init", "none.pt"]), capsys)
    assert options(simclr, ["--init", "none.pt", "--resume"]).init == "none.pt"
    monkeypatch.setattr(common.Data, "load", lambda *_: pytest.fail("it is read"))
    argv = [*TINY, "--labelled", tmp_path / "nowhere", "--out", tmp_path / "run"]
    assert "nowhere" in refused(simclr, argv, capsys)
