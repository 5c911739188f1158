"""What the commands survive: python -m pytest experiments/test_faults.py, with -m stress far more often.

Each attempt is a process of its own, forked off one that has imported PyTorch already. Kills and signals come
at random moments, from a generator with a seed; where they land also depends on how fast the machine is.
"""

import contextlib
import ctypes
import errno
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import coco_gan
import data
from experiments import evaluate

if os.name != "posix":
    pytest.skip("signals and limits are those of POSIX", allow_module_level=True)
import resource

FORKS = multiprocessing.get_context("forkserver")
DISK = Path("disk")  # in the working folder: all that a command writes
RUN = DISK / "run"
TINY = "--height 16 --width 24 --N 2 --M 3 --S 4 --z-dim 8 --width-g 2 --width-d 2 --batch-size 4".split()
OFTEN = "--save-every 1 --log-every 1 --sample-every 1 --eval-every 2 --eval-count 4 --device cpu".split()
SELDOM = "--save-every", "1000"
FOREVER = 10**6
VARYING = "seconds", "seconds_left", "images_per_second", "peak_memory_mb", "steps"
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
REFUSED = 77  # status of a process that was not allowed to have a fault


def forms(short: int, long: int):
    """How often a test tries in the short form, which always runs, and in the long one."""
    long = pytest.param(long, id="long", marks=pytest.mark.stress)
    return pytest.mark.parametrize("tries", [pytest.param(short, id="short"), long])


# ----------------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def nursery():
    """Where all are forked off. With more than one thread they might wait for one that they do not have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        FORKS.set_forkserver_preload(["torch._dynamo", "experiments.evaluate", __name__])
        assert end(begin([], main=len)) == (0, "")


def begin(words: list[str], main=coco_gan.main):
    """Start main(words) in a process of its own, in this working folder; returns it and what it prints."""
    output, writer = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=child, args=(os.getcwd(), words, writer, main), daemon=True)
    process.start()
    writer.close()
    assert os.read(output.fileno(), 1) == b"\n"  # it is there
    return process, output


def child(folder: str, words: list[str], writer: Connection, main) -> None:
    os.chdir(folder)
    os.dup2(writer.fileno(), 1)
    os.dup2(writer.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started all with &,
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # or nohup did
    os.write(1, b"\n")
    writer.close()
    status = main(words)
    sys.stdout.flush()
    os._exit(status)


def read(output: Connection, until: str = "\0") -> str:
    """What a process prints, up to some words, or until nobody holds its output any more.

    A decoding process that outlives its parent would hold it, too.
    """
    text, last = b"", time.monotonic() + 100
    while until.encode() not in text:
        assert output.poll(max(last - time.monotonic(), 0)), f"hangs after: {text.decode()}"
        more = os.read(output.fileno(), 2**16)
        if not more:
            break
        text += more
    return text.decode()


def end(attempt, number: int = 0, until: str = "", after: float = 0.0) -> tuple[int, str]:
    """Wait for the end, or bring it about by a signal, some seconds after some words were printed.

    Returns: the exit status as a shell has it, and what was printed.
    """
    process, output = attempt
    try:
        text = read(output, until)
        if number:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(process.pid, number)
        text += read(output)
        process.join(100)
    finally:
        process.kill()  # if it goes on though it should not
        process.join()
    assert "Traceback" not in text and "Exception ignored" not in text, text
    return process.exitcode if process.exitcode >= 0 else 128 - process.exitcode, text


def succeed(words: list[str], main=coco_gan.main) -> str:
    status, text = end(begin(words, main))
    assert status == 0, text
    return text


def error_in(ended: tuple[int, str]) -> str:
    """The one line of a mistake or misfortune of the user's."""
    status, text = ended
    lines = [line for line in text.splitlines() if "rror" in line]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), text
    return lines[0]


@pytest.fixture(scope="module")
def moment(photos, tmp_path_factory):
    """moment(i, rng): a random one while a training process starts (even i), or while it makes its steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("pace"))
        attempt, began = begin(new(photos)), time.monotonic()
        read(attempt[1], "step 1 ")
        start = time.monotonic() - began
        read(attempt[1], "step 9 ")
        step = (time.monotonic() - began - start) / 8
        end(attempt, signal.SIGKILL)

    def moment(i: int, rng: random.Random) -> dict:
        if i % 2:
            return dict(until="step ", after=rng.uniform(0, 3 * step))
        return dict(after=rng.uniform(0, start))

    return moment


# ----------------------------------------------------------------------------------------------------------
# Commands, and what is left of their files
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with nothing but an empty disk/."""
    monkeypatch.chdir(tmp_path)
    DISK.mkdir()
    return tmp_path


def empty_disk() -> None:
    shutil.rmtree(DISK)
    DISK.mkdir()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with photos.zip, which takes a while to decode, its cache, made undisturbed, and panoramas."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for number in range(200):
            coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
            coarse.resize((480, 320)).save(file := io.BytesIO(), "JPEG")
            archive.writestr(f"{number:03}.jpg", file.getvalue())
    (folder / "panoramas").mkdir()
    for number in range(3):
        coarse.resize((64, 32)).save(folder / "panoramas" / f"{number}.png")
    succeed([f"{folder}/photos.zip", f"{folder}/cache"], decode)
    return folder


def decode(words: list[str]) -> int:
    """decode([ZIP, CACHE]), as training begins with it."""
    try:
        data.load_images(words[0], 16, 24, cache=words[1], workers=2)
    except data.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def new(photos: Path, steps: int = FOREVER) -> list[str]:
    """The command of a new run."""
    where = f"train --run {RUN} --data {photos}/photos.zip --cache {photos}/cache --steps {steps}"
    return [*where.split(), *TINY, *OFTEN]


def go_on(photos: Path, steps: int = FOREVER) -> list[str]:
    """What a user does after an accident; asserts that what there is of the run is whole."""
    found = coco_gan.checkpoints(RUN)
    for path in found:
        coco_gan.read_checkpoint(path)
    if found:
        return [*f"train --resume {RUN} --cache {photos}/cache --steps {steps}".split(), *OFTEN]
    return new(photos, steps)


def done() -> int:
    """Steps up to the newest checkpoint."""
    return max([0, *(int(path.stem[-9:]) for path in coco_gan.checkpoints(RUN))])


def plain(value):
    """Without what differs from run to run, and with tensors as bytes, so that == compares to the bit."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items() if name not in VARYING}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return (value.dtype, bytes(value.numpy())) if isinstance(value, torch.Tensor) else value


def contents() -> dict[str, object]:
    """What is in the files on disk/, by their names."""
    found = {}
    for path in DISK.rglob("*"):
        if path.suffix == ".pt":
            found[path.name] = plain(coco_gan.read_checkpoint(path)[0])
        elif path.name == "log.jsonl":
            found[path.name] = plain(coco_gan.logged(path.parent))
        elif path.suffix == ".json":
            found[path.name] = plain(json.loads(path.read_text()))
        elif path.is_file():
            found[path.name] = path.read_bytes()
    return found


def assert_goes_on_bit_for_bit(photos: Path, only: tuple[str, ...] = ("",)) -> None:
    """After two steps more all files, or those whose names begin so, are as if nothing had happened."""
    steps = done() + 2
    succeed(go_on(photos, steps))
    found = contents()
    empty_disk()
    succeed(new(photos, steps))
    whole = contents()
    assert [n for n in found | whole if n.startswith(only) and found.get(n) != whole.get(n)] == []
    empty_disk()


# ----------------------------------------------------------------------------------------------------------
# kill -9
# ----------------------------------------------------------------------------------------------------------


@forms(50, 250)
def test_training_killed_at_random(tries, here, photos, moment, survived):
    """The run ends with the files of one that was never killed, and no others: nothing piles up."""
    rng, command, saving, starting = random.Random(0), new(photos), 0, 0
    for i in range(tries):
        before, half, began = done(), RUN / "checkpoint.tmp", time.time()
        end(begin(command), signal.SIGKILL, **moment(i, rng))
        saving += half.exists() and half.stat().st_mtime > began
        starting += done() == before
        command = go_on(photos)
    assert_goes_on_bit_for_bit(photos)
    where = f"{saving} while saving, {starting} before a step was saved"
    survived("kill -9 of training", tries, f"{where}; resumed: every file as undisturbed, bit for bit")


@forms(2, 50)
def test_a_run_behind_a_symbolic_link(tries, here, photos, moment, survived):
    rng, far = random.Random(0), here / "far"
    far.mkdir()
    RUN.symlink_to(far)
    succeed(new(photos, 1))
    for i in range(tries):
        end(begin(go_on(photos)), signal.SIGKILL, **moment(i, rng))
    succeed(["sample", "--checkpoint", str(RUN), "--out", "a.png", "--device", "cpu"])
    RUN.unlink()
    far.rename(RUN)
    assert_goes_on_bit_for_bit(photos)
    survived("kill -9 of a run behind a symbolic link", tries, "resumed: every file as undisturbed")


@forms(5, 200)
def test_decode_ended_at_random(tries, here, photos, survived):
    """Killed or asked to end: no decoding process stays, nothing half-made is used, and nothing is left."""
    rng, (whole,), writing = random.Random(0), (photos / "cache").iterdir(), 0
    command, began = [f"{photos}/photos.zip", str(DISK)], time.monotonic()
    succeed(command, decode)
    seconds = time.monotonic() - began
    for i in range(tries):
        number = (signal.SIGKILL, *SIGNALS)[i % 4]
        status, _ = end(begin(command, decode), number, after=rng.uniform(0, seconds))
        assert status in (0, 128 + number)
        cached, writing = DISK / whole.name, writing + any(DISK.glob("*.tmp"))
        if cached.exists():
            assert cached.read_bytes() == whole.read_bytes()
            empty_disk()
    succeed(command, decode)
    found = {name: pixels for name, pixels in contents().items() if pixels}  # not even begun: for a minute
    assert found == {whole.name: whole.read_bytes()}
    what = f"{writing} left half a file; started again: the same cache, and nothing else"
    survived("kill -9, SIGINT, SIGTERM, SIGHUP of decoding", tries, what)


# ----------------------------------------------------------------------------------------------------------
# Every command: killed between its changes of files, and with a disk that is full
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def commands(photos, tmp_path_factory):
    """Name: words, main, contents and sizes of its files, changes of files; of all commands that write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        succeed(new(photos, 2))
        run = DISK.rename("trained").absolute() / "run"
        sample = f"sample --checkpoint {run} --force --count 9 --device cpu --out disk/"
        measure = (
            f"--checkpoint {run} --cache {photos}/cache --count 8 --device cpu --force --json disk/a.json"
        )
        panorama = f"panorama {photos}/panoramas disk/new --size 16x48 --workers 1"
        commands = {
            "train": (new(photos, 3), coco_gan.main),
            "decode": ([f"{photos}/photos.zip", "disk/cache"], decode),
            "sample to a .png": (f"{sample}a.png".split(), coco_gan.main),
            "sample to a .jpg": (f"{sample}a.jpg".split(), coco_gan.main),
            "sample to a folder": (f"{sample}new/".split(), coco_gan.main),
            "evaluate --json": (measure.split(), evaluate.main),
            "data.py panorama": (panorama.split(), data.main),
        }
        for name, (words, main) in commands.items():
            DISK.mkdir()
            text = succeed(words, functools.partial(watched, math.inf, "", main))
            if name == "train":  # who begins it again has a step more to go
                succeed(go_on(photos, 4))
            sizes = [path.stat().st_size for path in DISK.rglob("*")]
            commands[name] = words, main, contents(), sizes, int(re.search(r"changes: (\d+)", text)[1])
            shutil.rmtree(DISK)
    return commands


def watched(number: float, fault: str, main, words: list[str]) -> int:
    """main(words), killed before its number-th change of a file, or not allowed any from then on."""
    count = itertools.count(1)

    def watch(event: str, details: tuple) -> None:
        writes = event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in ("os.rename", "os.remove", "os.mkdir")) and next(count) >= number:
            if fault == "kill -9":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(watch)
    status = main(words)
    print("changes:", next(count) - 1)
    return status


def alone(namespaces: int) -> bool:
    """Whether this process now has these namespaces (CLONE_NEW… of Linux) for itself."""
    return sys.platform == "linux" and ctypes.CDLL(None).unshare(namespaces) == 0


def limited(size: int, fault: str, main, words: list[str]) -> int:
    """main(words), where files, or all of disk/, have no more bytes: a write may stop short there."""
    if fault == "small files":
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return main(words)
    mount = ctypes.CDLL(None).mount
    if not alone(0x20000) or mount(None, b"/", None, 0x44000, None):  # what is mounted now, nobody else sees
        return REFUSED
    if mount(b"none", bytes(DISK), b"tmpfs", 0, b"size=%d" % size):
        return REFUSED
    status = main(words)
    shutil.copytree(DISK, "left")
    return status


FAULTS = {
    "kill -9": "kill -9 before each change of a file, every command",
    "no room": "no room from each change of a file on, every command",
    "small files": "a limit on the size of files, every command",
    "small disk": "a small disk (tmpfs), every command",
}


@pytest.mark.parametrize("fault", FAULTS)
@forms(4, 200)
def test_a_command_begun_again(fault, tries, here, photos, commands, survived):
    """After a fault the same command again, or for training --resume, ends as if nothing had happened."""
    rng, ways, ended = random.Random(0), [], 0
    for name, (*_, sizes, changes) in commands.items():
        most = max(sizes) if fault == "small files" else sum(sizes)
        numbers = (int(most ** rng.uniform(0.3, 1)) for _ in range(15))
        ways += [(name, n) for n in (numbers if "small" in fault else range(1, changes + 1))]
    ways = rng.sample(ways, min(tries, len(ways)))
    for name, number in ways:
        words, main, whole, *_ = commands[name]
        how = functools.partial(limited if "small" in fault else watched, number, fault, main)
        status, text = end(begin(words, how))
        if status == REFUSED:
            pytest.skip("must not mount a disk of its own")
        if fault == "small disk":
            DISK.rmdir()
            Path("left").rename(DISK)
        if fault == "kill -9":
            assert status == 137, text
        elif status != 0:
            error_in((status, text))
        ended += status != 0
        left = contents()
        for file in left.keys() & whole.keys() - {"log.jsonl", "best.pt"}:
            assert left[file] == whole[file], (file, name, number)
        if "small" in fault:  # where files can still be deleted: no halves of any
            assert all(file in whole or file.endswith(".pt") for file in left), (left.keys(), name, number)
        succeed(go_on(photos, 4) if name == "train" else words, main)
        assert contents() == whole, (name, number)
        empty_disk()
    assert ended > len(ways) / 2
    what = "" if fault == "kill -9" else "one line, status 2; "
    survived(FAULTS[fault], ended, f"{what}begun again: every file as undisturbed")


# ----------------------------------------------------------------------------------------------------------
# The run folder: gone, read-only, wanted by two
# ----------------------------------------------------------------------------------------------------------


def ordinary(main, words: list[str]) -> int:
    """main(words), where even root has to obey a folder's mode: that of another user namespace."""
    return main(words) if os.getuid() or alone(0x10000000) else REFUSED


@pytest.mark.parametrize("fault", ["removed", "renamed", "made read-only", "under a file"])
@forms(1, 25)
def test_a_run_folder_that_is(fault, tries, here, photos, survived):
    """One line, and no half of a run where it was; what there is of it goes on."""
    rng = random.Random(0)
    for _ in range(tries):
        attempt = begin(new(photos), functools.partial(ordinary, coco_gan.main))
        read(attempt[1], f"step {rng.randint(1, 3)} ")
        time.sleep(rng.uniform(0, 0.1))
        if fault == "removed":
            while RUN.exists():  # new files come between
                shutil.rmtree(RUN, ignore_errors=True)
        elif fault == "renamed":
            RUN.rename("aside")
        elif fault == "made read-only":
            RUN.chmod(0o500)
        else:
            DISK.rename("aside")
            DISK.touch()
        ended = end(attempt)
        if ended[0] == REFUSED:
            pytest.skip("must not have a user namespace")
        assert f"--run {RUN} cannot be written" in error_in(ended)
        if fault == "under a file":
            DISK.unlink()
            Path("aside").rename(DISK)
        assert RUN.exists() == (fault in ("made read-only", "under a file"))
        if fault == "renamed":
            Path("aside").rename(RUN)
        elif fault == "made read-only":
            RUN.chmod(0o700)
        assert_goes_on_bit_for_bit(photos)
    survived(
        f"run folder {fault} while it trains", tries, "one line, status 2; resumed, if there: as undisturbed"
    )


@forms(2, 40)
def test_two_processes_on_one_run(tries, here, photos, survived):
    succeed(new(photos, 9))
    rng, whole = random.Random(0), contents()
    for _ in range(tries):
        empty_disk()
        for steps in (5, 9):
            words = go_on(photos, steps)
            first = begin(words)
            time.sleep(rng.uniform(0, 0.3))
            winner, loser = sorted([end(begin(words)), end(first)])
            assert winner[0] == 0
            told = "in use by another process|is not empty|trained further just now|has done 9 steps already"
            told += "|checkpoint-.*.pt cannot be read: No such file"  # the other has just deleted it
            assert re.search(told, error_in(loser))
        assert contents() == whole
    survived(
        "two processes on one run, new and resumed", 2 * tries, "one trains, undisturbed; the other says so"
    )


@forms(1, 40)
def test_three_processes_on_one_cache(tries, here, photos, survived):
    rng, (whole,) = random.Random(0), (photos / "cache").iterdir()
    for _ in range(tries):
        attempts = []
        for _ in range(3):
            attempts.append(begin([f"{photos}/photos.zip", str(DISK)], decode))
            time.sleep(rng.uniform(0, 0.3))
        assert [end(attempt)[0] for attempt in attempts] == [0, 0, 0]
        assert contents() == {whole.name: whole.read_bytes()}
        empty_disk()
    survived("three processes on one cache", tries, "all end well, with the same cache, and nothing else")


# ----------------------------------------------------------------------------------------------------------
# Signals, terminals and pipes
# ----------------------------------------------------------------------------------------------------------


@forms(6, 150)
def test_training_stopped_at_random(tries, here, photos, moment, survived):
    rng, saved = random.Random(0), 0
    for i in range(tries):
        when, before = moment(i, rng), done()
        status, text = end(begin([*go_on(photos), *SELDOM]), SIGNALS[i % 3], **when)
        assert status == 128 + SIGNALS[i % 3], text
        if done() > before:
            assert f"stopped and saved {coco_gan.checkpoints(RUN)[-1]}; go on with" in text
            saved += 1
        else:  # before the first step
            assert "until" not in when and "saved" not in text
    assert_goes_on_bit_for_bit(photos, only=("checkpoint", "sample"))  # who is to stop measures no more
    what = f"130, 143, 129; {saved} among steps, and saved; resumed: weights and pictures as undisturbed"
    survived("SIGINT, SIGTERM, SIGHUP in training", tries, what)


@forms(1, 60)
def test_stopped_while_it_starts_or_ends(tries, survived):
    """The program itself, and not a fork of it."""
    rng, stopped, seconds = random.Random(3), 0, 1.0
    command = [sys.executable, "-X", "importtime", coco_gan.__file__, "train", "--dry-run", "--device", "cpu"]
    for i in range(tries):
        began = time.monotonic()
        with subprocess.Popen(command, stdout=-1, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout:  # its first import; until then Ctrl-C is Python's own affair
                if line.endswith(" argparse\n"):
                    break
            time.sleep(rng.uniform(0, seconds))
            process.send_signal(SIGNALS[i % 3])
            text = "".join(line for line in process.stdout if not line.startswith("import time:"))
        assert "Traceback" not in text and "Exception ignored" not in text, text
        assert process.returncode in (0, -SIGNALS[i % 3], 128 + SIGNALS[i % 3])
        stopped += process.returncode != 0
        seconds = time.monotonic() - began if process.returncode == 0 else seconds
    assert stopped
    survived("SIGINT, SIGTERM, SIGHUP while PyTorch loads", stopped, "130, 143, 129; no traceback")


def on_terminal(name: str, everything: bool, main, words: list[str]) -> int:
    os.setsid()
    terminal = os.open(name, os.O_RDWR)  # now it is this process's own: its end comes as SIGHUP
    for number in (0, 1, 2) if everything else (0, 1):
        os.dup2(terminal, number)
    os.write(1, b"\n")
    return main(words)


def into_pipe(name: str, main, words: list[str]) -> int:
    os.dup2(os.open(name, os.O_WRONLY), 1)
    os.write(1, b"\n")
    return main(words)


@pytest.mark.parametrize("what, status", [("a terminal that goes away", 129), ("train piped to head", 141)])
@forms(2, 60)
def test_nobody_reads_what_is_printed(what, status, tries, here, photos, moment, survived):
    rng = random.Random(0)
    os.mkfifo("pipe")
    for i in range(tries):
        ours, theirs = os.openpty()
        main = functools.partial(on_terminal, os.ttyname(theirs), i % 4 > 1, coco_gan.main)
        if "head" in what:
            main = functools.partial(into_pipe, "pipe", coco_gan.main)
        when, before = moment(i, rng), done()
        attempt = begin([*go_on(photos), *SELDOM], main)
        with Connection(os.open("pipe", os.O_RDONLY) if "head" in what else os.dup(ours)) as reader:
            read(reader, "\n")
            os.close(theirs)
            os.close(ours)
            read(reader, when.get("until", ""))
            time.sleep(when["after"])
        assert end(attempt) == (status, "")
        assert done() > before or "until" not in when
    assert_goes_on_bit_for_bit(photos, only=("checkpoint", "sample"))
    survived(what, tries, f"{status}; resumed: weights and pictures as undisturbed")


# ----------------------------------------------------------------------------------------------------------
# Numbers that are not finite
# ----------------------------------------------------------------------------------------------------------


def poisoned(step: int, place: str, which: int, value: float, main, words: list[str]) -> int:
    """main(words), where at a step a loss, or a weight or its gradient, gets a value."""
    train_step = coco_gan.train_step

    def poison(state: coco_gan.State, batch: coco_gan.Batch) -> torch.Tensor:
        print("step made:", state.step + 1)
        if state.step + 1 != step:
            return train_step(state, batch)
        parameters = [p for net in coco_gan.networks(state) for p in net.parameters()]
        p = parameters[which % len(parameters)]
        if place == "gradient":
            p.register_hook(lambda gradient: torch.full_like(gradient, value))
        elif place == "weight":
            p.data[(0,) * p.dim()] = value
        losses = train_step(state, batch)
        if place == "loss":
            losses[which % len(losses)] = value
        return losses

    coco_gan.train_step = poison
    return main(words)


@forms(3, 150)
def test_numbers_that_are_not_finite(tries, here, photos, survived):
    rng, rarely = random.Random(0), "--log-every 3 --save-every 4 --sample-every 5 --eval-every 9".split()
    for i in range(tries):
        place, step = ("gradient", "loss", "weight")[i % 3], rng.randint(1, 9)
        value, which = rng.choice([math.nan, math.inf, -math.inf]), rng.randrange(1000)
        main = functools.partial(poisoned, step, place, which, value, coco_gan.main)
        ended = end(begin([*new(photos), *rarely], main))
        line, (*_, made) = error_in(ended), re.findall(r"step made: (\d+)", ended[1])
        assert step <= int(made) < step + 3 and done() == (step - 1) // 4 * 4
        good = f"the last good checkpoint is {RUN}/checkpoint-{done():09d}.pt"
        assert (good if done() else "no checkpoint was written yet") in line
        assert "try lower --lr-g and --lr-d, or --precision fp32" in line
        assert_goes_on_bit_for_bit(photos, only=("checkpoint",))
    what = "stopped within --log-every steps, one line, status 2; resumed: weights as undisturbed"
    survived("NaN or infinity in a loss, gradient or weight", tries, what)
