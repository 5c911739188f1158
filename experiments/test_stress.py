"""What the commands survive: python -m pytest experiments/test_stress.py, and with -m stress far more often.

Each attempt of a fault is a process of its own, forked off one that has imported PyTorch. Kills and signals
come at random moments, from a generator with a seed; where they hit also depends on the machine's speed.
"""

import contextlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import coco_gan
import data
from experiments import ablations, evaluate, export, extrapolate, figures, panorama, plot, view

if os.name != "posix":
    pytest.skip("signals and limits are those of POSIX", allow_module_level=True)
import resource

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["coco_gan", "experiments.test_stress"])
TINY = "--height 16 --width 24 --N 2 --M 3 --S 4 --z-dim 8 --width-g 2 --width-d 2 --batch-size 4".split()
OFTEN = "--save-every 1 --log-every 1 --sample-every 1 --device cpu".split()
PHOTOS = "--data photos --cache cache".split()


def forms(short, long):
    """How often a test tries in the short form, which always runs, and in the long one."""
    long = pytest.param(long, id="long", marks=pytest.mark.stress)
    return pytest.mark.parametrize("tries", [pytest.param(short, id="short"), long])


def child(folder, argv, limit):
    """Run a command in a folder, with its output in the files out and err; limit: of a file's bytes."""
    os.chdir(folder)
    for name, number in (("../out", 1), ("../err", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    torch.set_num_threads(1)
    try:
        status = coco_gan.main(argv)
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)


def start(folder, argv, limit=None):
    process = FORKS.Process(target=child, args=(folder, argv, limit))
    process.start()
    return process


def run(folder, argv, limit=None):
    """The exit status of a command, and its lines on stderr."""
    process = start(folder, argv, limit)
    process.join(120)
    return process.exitcode, (folder.parent / "err").read_text().splitlines()


def files(folder):
    """The contents of all files that matter: tensors of checkpoints, and the bytes of others but the log."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".pt":
            contents = torch.load(path, weights_only=True)
            tensors = {name: t.numpy().tobytes() for name, t in contents["tensors"].items()}
            found[path.name] = tensors | {"step": contents["step"], "rng": contents["rng"].numpy().tobytes()}
        elif path.is_file() and path.name not in ("log.jsonl", ".lock") and path.suffix != ".tmp":
            found[path.name] = path.read_bytes()
    return found


def make_photos(folder, count):
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir(parents=True)
    for n in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"photos/{n:03}.jpg")


@pytest.fixture
def disk(tmp_path):
    """A working folder, with photographs in it."""
    make_photos(tmp_path / "disk", 12)
    return tmp_path / "disk"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What a run of 40 steps leaves, to compare with."""
    folder = tmp_path_factory.mktemp("undisturbed") / "disk"
    make_photos(folder, 12)
    status, errors = run(folder, ["train", "--run", "run", "--steps", "40", *TINY, *OFTEN, *PHOTOS])
    assert status == 0, errors
    return files(folder / "run")


def resume_until_done(disk, undisturbed):
    """Resume a run, or begin it again if it has no checkpoint; it ends as an undisturbed one does."""
    if not coco_gan.checkpoints(disk / "run"):
        shutil.rmtree(disk / "run", ignore_errors=True)
        words = ["train", "--run", "run", "--steps", "40", *TINY]
    else:
        words = ["train", "--resume", "run"]
    status, errors = run(disk, [*words, *OFTEN, "--cache", "cache", "--data", "photos"])
    assert status == 0, errors
    assert files(disk / "run") == undisturbed


@forms(4, 30)
def test_kill_9_in_training(tries, disk, undisturbed, survived):
    rng, early = random.Random(0), 0
    for _ in range(tries):
        shutil.rmtree(disk / "run", ignore_errors=True)
        process = start(disk, ["train", "--run", "run", "--steps", "40", *TINY, *OFTEN, *PHOTOS])
        time.sleep(rng.uniform(0.05, 2.5))
        process.kill()
        process.join()
        early += not coco_gan.checkpoints(disk / "run")
        resume_until_done(disk, undisturbed)
    survived(
        "kill -9 of training", tries, f"{early} before a checkpoint; resumed: as undisturbed, bit for bit"
    )


@forms(4, 50)
def test_kill_9_while_decoding(tries, tmp_path, survived):
    disk, rng, halves = tmp_path / "disk", random.Random(1), 0
    make_photos(disk, 400)
    expected = data.load_images(str(disk / "photos"), 16, 24, cache=tmp_path / "expected").tobytes()
    for _ in range(tries):
        shutil.rmtree(disk / "cache", ignore_errors=True)
        shutil.rmtree(disk / "run", ignore_errors=True)
        process = start(disk, ["train", "--run", "run", "--steps", "1", *TINY, *OFTEN, *PHOTOS])
        time.sleep(rng.uniform(0.01, 0.3))
        process.kill()
        process.join()
        halves += any((disk / "cache").glob(".*.tmp")) if (disk / "cache").exists() else 0
        found = data.load_images(str(disk / "photos"), 16, 24, cache=disk / "cache").tobytes()
        assert found == expected and len([*(disk / "cache").glob("*.npy")]) == 1
    survived(
        "kill -9 while decoding", tries, f"{halves} left a temporary file; started again: the same cache"
    )


@forms(3, 30)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_in_training_save(tries, number, disk, undisturbed, survived):
    rng, saved = random.Random(int(number)), 0
    for _ in range(-(-tries // 3)):
        shutil.rmtree(disk / "run", ignore_errors=True)
        process = start(disk, ["train", "--run", "run", "--steps", "40", *TINY, *OFTEN, *PHOTOS])
        while not (disk / "run/log.jsonl").exists() and process.is_alive():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode in (128 + number, 0, -number)  # 0: it was done; -number: it was about to end
        if process.exitcode == 128 + number:
            assert "go on with: python coco_gan.py train --resume run" in (disk.parent / "out").read_text()
            saved += 1
        resume_until_done(disk, undisturbed) if process.exitcode else None
    assert saved
    survived(
        f"{number.name} in training",
        tries // 3,
        f"{saved} saved, status {128 + number}; resumed: as undisturbed",
    )


@forms(5, 25)
def test_a_full_disk(tries, disk, undisturbed, survived):
    rng, refused = random.Random(2), 0
    for _ in range(tries):
        for name in ("run", "cache"):
            shutil.rmtree(disk / name, ignore_errors=True)
        limit = rng.choice([100, 1000, 5000, 14_000, 30_000, 100_000, 200_000])
        status, errors = run(disk, ["train", "--run", "run", "--steps", "40", *TINY, *OFTEN, *PHOTOS], limit)
        assert status in (0, 2), errors
        if status == 2:
            refused += 1
            assert errors[-1].startswith("error: ") and "File too large" in errors[-1], errors
            assert not [path for path in disk.rglob("*.tmp")]
        if (disk / "run").exists():
            resume_until_done(disk, undisturbed)
    assert refused
    survived(
        "no room on the disk", tries, f"{refused} ended in one line, status 2; begun again: as undisturbed"
    )


# ---- Hostile input -----------------------------------------------------------------------------------------


def damaged(contents, rng):
    """The bytes of a file, cut short, with bits flipped, with a piece repeated, or replaced by noise."""
    contents, kind = bytearray(contents), rng.randrange(4)
    at = rng.randrange(max(1, len(contents)))
    if kind == 0:
        return bytes(contents[:at])
    if kind == 1:
        for _ in range(rng.randrange(1, 20)):
            contents[rng.randrange(len(contents))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        contents[at:at] = contents[at : at + rng.randrange(1, 1000)]
    else:
        contents[at : at + 50] = rng.randbytes(50)
    return bytes(contents)


def some_image(rng):
    mode = rng.choice(["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "I", "F", "CMYK"])
    noise = np.random.default_rng(rng.randrange(10**6)).integers(
        0, 256, (rng.randrange(1, 40), 17, 3), np.uint8
    )
    image = Image.fromarray(noise).convert("L" if mode == "I;16" else mode).convert(mode)
    kinds = {"RGBA": ["PNG", "WEBP"], "LA": ["PNG"], "P": ["PNG", "GIF"], "I": ["TIFF"], "F": ["TIFF"]}
    kinds |= {"I;16": ["PNG"], "CMYK": ["JPEG", "TIFF"], "1": ["PNG", "BMP"], "L": ["JPEG", "PNG"]}
    file = io.BytesIO()
    image.save(file, rng.choice(kinds.get(mode, ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])))
    return file.getvalue()


@forms(300, 10_000)
def test_damaged_images_are_skipped_or_loaded(tries, survived):
    rng, refused, reasons = random.Random(3), 0, set()
    for result in data.in_threads(
        lambda k: data.decode_image(k, 8, 12, "center"), (damaged(some_image(rng), rng) for _ in range(tries))
    ):
        refused += isinstance(result, str)
        assert isinstance(result, str) and "\n" not in result or result.shape == (8, 12, 3)
        reasons.add(result if isinstance(result, str) else "")
    assert refused > tries / 4 and len(reasons) > 5
    survived("damaged images", tries, f"{refused:,} skipped with a reason, {tries - refused:,} loaded")


@forms(60, 1000)
def test_damaged_zips_are_one_line_or_loaded(tries, tmp_path, survived, capsys):
    rng, refused, path = random.Random(4), 0, tmp_path / "p.zip"
    for k in range(tries):
        with zipfile.ZipFile(path, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for name in rng.sample(["a.png", "../b.png", "/c.jpg", "d/e.PNG", "é.png", "__MACOSX/f.png"], 3):
                archive.writestr(name, some_image(rng) if rng.random() < 0.8 else b"none")
        path.write_bytes(damaged(path.read_bytes(), rng) if k % 3 else path.read_bytes())
        try:
            assert data.load_images(str(path), 8, 12, cache=tmp_path / "cache").shape[1:] == (8, 12, 3)
        except data.UserError as error:
            refused += 1
            assert "\n" not in str(error) and "--data" in str(error)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert {entry.name for entry in tmp_path.iterdir()} == {"p.zip"}  # names in a zip are no paths
    survived("damaged zips", tries, f"{refused:,} refused in one line, {tries - refused:,} loaded")


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def changed(contents, rng):
    """A checkpoint with something in it exchanged, missing, added, or of another type or shape."""
    odd = [None, -1, 10**12, 1.5, "x", [], {}, torch.zeros(2), torch.zeros(3).expand(10**9, 3), float("nan")]
    part = rng.choice([contents, contents["config"], contents["tensors"], contents["tensors"]])
    key = rng.choice([*part])
    kind = rng.randrange(5)
    if kind == 0:
        del part[key]
    elif kind == 1:
        part[key] = rng.choice(odd)
    elif kind == 2:
        part[key] = part[rng.choice([*part])]
    elif kind == 3:
        part["new"] = rng.choice(odd)
    elif isinstance(part[key], torch.Tensor):
        part[key] = part[key].double() if rng.random() < 0.5 else part[key].flatten()[:1]
    else:
        part[key] = Code() if rng.random() < 0.5 else contents
    return contents


@forms(60, 300)
def test_damaged_checkpoints_are_one_line_or_work(tries, disk, survived, capsys, monkeypatch):
    words = ["train", "--run", "run", "--steps", "1", *TINY, *OFTEN, *PHOTOS]
    monkeypatch.chdir(disk)
    assert coco_gan.main(words) == 0
    good, rng, refused = Path("run/checkpoint-000000001.pt").read_bytes(), random.Random(5), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for k in range(tries):
        path = Path("run/checkpoint-000000001.pt")
        if k % 2:
            path.write_bytes(damaged(good, rng))
        else:
            try:
                torch.save(changed(torch.load(io.BytesIO(good), weights_only=True), rng), path)
            except (ValueError, RecursionError):
                continue  # a checkpoint that holds itself cannot be written
        for name in ("a.png", "run/checkpoint-000000002.pt"):
            Path(name).unlink(missing_ok=True)
        for command in (
            ["sample", "--checkpoint", "run", "--count", "1", "--out", "a.png", "--device", "cpu"],
            ["train", "--resume", "run", "--steps", "2", *OFTEN, *PHOTOS],
        ):
            status = coco_gan.main(command)
            lines = capsys.readouterr().err.splitlines()
            errors = [line for line in lines if not line.endswith("images decoded")]
            assert status in (0, 2) and len(errors) == status / 2, errors
            assert status == 0 or errors[0].startswith("error: "), errors
            refused += status == 2
        assert not Path("ran").exists() and not Path("run/ran").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**21  # 2 GB, in units of 1 KB
    survived("damaged checkpoints, sampled and resumed", 2 * tries, f"{refused:,} refused in one line")


COMMANDS = {
    coco_gan.main: ("train", "sample"),
    figures.main: ("patches", "interpolate", "coordinates", "mix", "guided"),
    **{module.main: ("",) for module in (ablations, evaluate, export, extrapolate, panorama, plot, view)},
}
VALUES = [
    "0",
    "1",
    "-1",
    "2.5",
    "nan",
    "1e9",
    "99999999999999999999",
    "x",
    "",
    "é",
    "a.png",
    "run",
    ".",
    "../..",
    "4 4",
]


def flags_of(main, command, capsys):
    """The flags that --help names."""
    with contextlib.suppress(SystemExit):  # by argparse
        main([*command.split(), "--help"])
    return sorted({word.strip("[],") for word in capsys.readouterr().out.split() if word.startswith("--")})


@forms(120, 800)
def test_command_lines_are_one_line_or_work(tries, disk, survived, capsys, monkeypatch):
    monkeypatch.chdir(disk)
    assert coco_gan.main(["train", "--run", "run", "--steps", "1", *TINY, *OFTEN, *PHOTOS]) == 0
    commands = [(main, command) for main, names in COMMANDS.items() for command in names]
    flags = {(main, command): flags_of(main, command, capsys) for main, command in commands}
    rng, refused = random.Random(6), 0
    monkeypatch.setattr(coco_gan, "train_loop", lambda *args: 0)
    monkeypatch.setattr(ablations, "run", lambda *args: {})
    for _ in range(tries):
        main, command = rng.choice(commands)
        words = command.split() + (["run"] if main in (extrapolate.main, plot.main) else [])
        words += ["photos", "made"] if main is panorama.main else ["photos"] * (command == "guided")
        words += [] if main in (plot.main, panorama.main) else ["--device", "cpu"] * (main is not export.main)
        for flag in rng.sample(flags[main, command], min(rng.randrange(1, 4), len(flags[main, command]))):
            if flag not in ("--help", "--follow", "--serve", "--no-guided", "--device", "--gpu", "--cache"):
                words += [flag, *rng.choice(VALUES).split()]
        before = {path for path in disk.parent.rglob("*") if disk not in path.parents}
        status = main(words)
        errors = capsys.readouterr().err.splitlines()
        assert status in (0, 2) and not any("Traceback" in line for line in errors), (words, errors)
        assert status == 0 or errors[-1].startswith("error: "), (words, errors)
        refused += status == 2
        assert {path for path in disk.parent.rglob("*") if disk not in path.parents} == before
    assert tries / 3 < refused < tries
    survived(
        "command lines of all commands", tries, f"{refused:,} refused in one line, {tries - refused:,} worked"
    )
