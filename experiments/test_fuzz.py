"""Files and command lines of strangers: python -m pytest experiments/test_fuzz.py; the long forms: -m stress

Whatever they hold, a command works or says in one line why not: no traceback, at most 10 seconds and 2 GB,
nothing opened or written but what was named, and no half of a result. Most tests need hypothesis.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import sys
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import coco_gan
import data
from coco_gan import Config, UserError
from experiments import ablations, evaluate, export, figures, plot, view

try:
    import hypothesis
    from hypothesis import strategies as st
except ImportError:
    hypothesis = None

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="cases run in processes that are forked"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
SECONDS, MEGABYTES = 10, 2048  # that a case may take
SIZES = dict(height=16, width=24, N=2, M=3, S=4, z_dim=8, width_g=2, width_d=2, batch_size=4)


# ----------------------------------------------------------------------------------------------------------
# One case after another, in a process that is watched


class Contents(bytes):
    """Of a file, too long to print."""

    def __repr__(self):
        return f"<{len(self)} bytes>"


def held() -> tuple[int, int]:
    """MB that this process, and the largest of those that it started, held at most."""
    who = coco_gan.resource.RUSAGE_SELF, coco_gan.resource.RUSAGE_CHILDREN
    return tuple(coco_gan.resource.getrusage(one).ru_maxrss // 2**10 for one in who)


OPENED, BEFORE = [], []


def note(event: str, arguments: tuple) -> None:
    """Of all that Python does: remember the files that it opens, and what only code of a stranger's does."""
    if event in ("open", "os.listdir", "os.scandir"):
        OPENED.append(str(arguments[0]))
    elif event in ("os.system", "os.exec", "socket.connect"):
        OPENED.append(f"bait: {event}")


@contextlib.contextmanager
def watched(case, seconds: int = SECONDS):
    """A hang ends the process; too much memory, and what a path in a file led to, are errors."""
    Path("case").write_text(ascii(case)[:2000])
    OPENED.clear()
    signal.alarm(seconds)
    yield
    signal.alarm(0)
    own, other = held()
    assert own - BEFORE[0] < MEGABYTES and other < MEGABYTES, f"{own} - {BEFORE[0]} MB, {other} MB"
    led = [name for name in OPENED if "bait:" in name or "/bait/" in f"{os.path.realpath(name)}/"]
    assert not led, led


def isolated(work):
    """What work() returns, in a process of its own; its error, or its end by a signal, fails the test."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            BEFORE[:] = held()
            sys.addaudithook(note)
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # as in data's processes
            answer = True, work()
        except BaseException:
            answer = False, traceback.format_exc()
        with open(writing, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    ended = f"signal {os.waitpid(child, 0)[1]} in {Path('case').read_text()}"
    good, value = pickle.loads(answer) if answer else (False, ended)
    if not good:
        pytest.fail(value[-5000:], pytrace=False)
    return value


def fuzz(build, check, examples: int, survived, fault: str) -> None:
    """Let check say of so many examples of build(draw) whether it "worked" or was "refused"."""
    if hypothesis is None:
        pytest.skip("needs hypothesis")
    hypothesis.configuration.set_hypothesis_home_dir(Path("hypothesis").absolute())
    outcomes = Counter()
    quiet = dict(database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    quiet |= dict(derandomize=True, phases=[hypothesis.Phase.generate])  # to shrink a file takes minutes

    @hypothesis.settings(max_examples=examples, **quiet)
    @hypothesis.given(st.composite(build)())
    def each(case):
        with watched(case):
            outcomes[check(case)] += 1

    def work():
        each()
        return outcomes

    outcomes = isolated(work)
    worked, refused = outcomes["worked"], outcomes["refused"]
    assert worked and refused, outcomes  # or they are too wild, or too tame
    survived(fault, worked + refused, f"{refused:,} were refused in one line, {worked:,} worked")


def forms(short: int, long: int):
    """How many examples: in the ordinary tests, and in the long form."""
    many = pytest.param(long, id="long", marks=pytest.mark.stress)
    return pytest.mark.parametrize("examples", [pytest.param(short, id="short"), many])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The working folder, alone in another, and bait/ further off; no GPU, which takes no forked process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("tree/work", "bait"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "tree" / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "tree"))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))


def tree() -> set[str]:
    ours = {"case", "cache", "hypothesis", ".lock"}
    return {str(path) for path in Path("..").rglob("*") if not {*path.parts} & ours}


def told(program, words: list[str], made: str = "../work/out") -> str:
    """Run a command: it worked, or one line on stderr says why not. Only what is `made` may be new."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")  # as strict as a terminal's, and stderr's is as lenient
    err, before = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace"), tree()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = program.main(words)
        except SystemExit as end:  # of --help
            status = end.code
        out.flush()
    err.flush()
    lines = err.buffer.getvalue().decode().split("\n")[:-1]
    lines = [
        line for line in lines if not line.startswith(("warning: ", "skipped ", "  ", "from ", "there is no"))
    ]
    lines = [line for line in lines if not line.endswith(" ready")]
    assert status in (0, 2) and len(lines) == status // 2, (status, lines)
    assert all(line.startswith("error: ") and line.isprintable() for line in lines), lines
    new = tree() - before
    assert not [name for name in new if status == 2 or not name.startswith(made)], new
    return "refused" if status else "worked"


def damaged(draw, contents: bytes) -> Contents:
    """Some bits flipped, bytes put in, cut out or repeated, or the end cut off."""
    contents = bytearray(contents)
    for kind in draw(st.lists(st.sampled_from("flip put cut repeat end".split()), min_size=1, max_size=3)):
        at, length = draw(st.integers(0, len(contents))), draw(st.integers(1, 64))
        if kind == "flip" and at < len(contents):
            contents[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "put":
            contents[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
        elif kind == "cut":
            del contents[at : at + length]
        elif kind == "repeat":
            contents[at:at] = contents[at : at + length]
        elif kind == "end":
            del contents[at:]
    return Contents(contents)


def members_of(contents: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(contents)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members, method: int = zipfile.ZIP_STORED) -> Contents:
    """Args: members: pairs of a name, or ZipInfo, and contents."""
    with zipfile.ZipFile(file := io.BytesIO(), "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that comes twice
        for name, contents in members:
            archive.writestr(name, contents)
    return Contents(file.getvalue())


def zeros_packed(count: int) -> bytes:
    """So many times 64 MB of zeros, each in 64 KB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    part = packer.compress(bytes(2**26)) + packer.flush(zlib.Z_FULL_FLUSH)
    return part * count + zlib.compressobj(9, zlib.DEFLATED, -15).flush()


def claiming(contents: bytes, name: bytes, size: int) -> bytes:
    """Let a zip say of its stored member that it is packed, and unpacks to so many bytes."""
    contents = bytearray(contents)
    for start, method, length in ((contents.index(name) - 30, 8, 22), (contents.rindex(name) - 46, 10, 24)):
        struct.pack_into("<H", contents, start + method, zipfile.ZIP_DEFLATED)
        struct.pack_into("<I", contents, start + length, size)
    return bytes(contents)


def strange():
    """A value where another is expected."""
    edges = [0, 1, 255, 256, 1024, 4095, 4096, 16384, 65536, 10**9, 2**31, 2**63 - 1, 2**63, 10**30]
    numbers = [st.sampled_from(edges), st.integers(-(2**70), 2**70), st.floats()]
    others = [st.none(), st.booleans(), st.text(max_size=9), st.lists(st.integers(), max_size=3)]
    return st.one_of(*numbers, *others)


def place(draw, node):
    """A container somewhere within dictionaries and lists, and a key of it."""
    while True:
        key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], dict | list) or not node[key] or not draw(st.integers(0, 9)):
            return node, key
        node = node[key]


# ----------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint after two steps on photographs."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "photos").mkdir()
    for seed in range(4):
        noise = np.random.default_rng(seed).integers(0, 256, (16, 24, 3), np.uint8)
        Image.fromarray(noise).save(folder / "photos" / f"{seed}.png")
    words = f"train --device cpu --guided --steps 2 --data {folder}/photos --run {folder}/run".split()
    words += [word for name, value in SIZES.items() for word in (coco_gan.flag(name), str(value))]
    assert coco_gan.main([*words, "--cache", f"{folder}/cache"]) == 0
    return folder / "run" / "checkpoint-000000002.pt"


COMMANDS_OF_CHECKPOINTS = {
    "sample": "sample --device cpu --viewport 0,0,3,5 --count 1 --out out.png --checkpoint m",
    "raw": "sample --device cpu --viewport 0,0,3,5 --count 1 --out out.png --raw --checkpoint m",
    "export": "--out out.npz --checkpoint m",
    "resume": "train --device cpu --steps 3 --cache CACHE --resume m",
    "from": "train --device cpu --steps 3 --cache CACHE --from m --extrapolate 1 --run out",
}


def try_checkpoint(checkpoint: Path, command: str, contents: bytes) -> str:
    for folder in ("m", "out"):
        shutil.rmtree(folder, ignore_errors=True)
    for path in Path().glob("out.*"):
        path.unlink()
    shutil.copytree(checkpoint.parent, "m")
    Path("m", checkpoint.name).write_bytes(contents)
    words = COMMANDS_OF_CHECKPOINTS[command].replace("CACHE", f"{checkpoint.parents[1]}/cache").split()
    if words[0] == "train":
        words += what_not_to_train(contents)
    made = "../work/m" if command == "resume" else "../work/out"
    outcome = told(export if command == "export" else coco_gan, words, made)
    if os.path.exists("out.png"):
        assert Image.open("out.png").size == (5, 3)
    return outcome


def what_not_to_train(contents: bytes) -> list[str]:
    """A large configuration may be trained, and then takes long; images are read from where it says."""
    with contextlib.suppress(Exception):
        config = Config(**torch.load(io.BytesIO(contents), weights_only=True)["config"])
        hypothesis.assume(config.data.endswith("photos") or not os.path.exists(config.data))
        coco_gan.check_config(config)
        if config.batch_size * config.N * config.M * config.S**2 + config.height * config.width > 2**14:
            return ["--dry-run"]
    return []


TENSORS = {
    "double": lambda t: t.double(),
    "int": lambda t: t.to(torch.int32),
    "complex": lambda t: t.to(torch.complex64),
    "shorter": lambda t: t.flatten()[:-1],
    "longer": lambda t: torch.cat([t.flatten()] * 3),
    "turned": lambda t: t.T if t.dim() == 2 else t.unsqueeze(0),
    "nan": lambda t: t * float("nan"),
    "inf": lambda t: t + float("inf"),
    "large": lambda t: t * 1e30,
    "sparse": lambda t: t.to_sparse() if t.dim() else t,
    "meta": lambda t: t.to("meta"),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "parameter": lambda t: torch.nn.Parameter(t.float()),
    "spread": lambda t: torch.zeros((), dtype=t.dtype).expand(t.shape),
    "huge": lambda t: torch.zeros((), dtype=t.dtype).expand(2**20, 2**20),
    "empty": lambda t: t.flatten()[:0],
}


def changed_entries(draw, contents: dict) -> tuple[str, bytes]:
    """A checkpoint, saved again, with one to three entries changed, and what was done to them."""
    contents, done = copy.deepcopy(contents), []
    for kind in draw(st.lists(st.sampled_from("value tensor swap drop add".split()), min_size=1, max_size=3)):
        node, key = place(draw, contents)
        done.append(f"{kind} {key}")
        if kind == "value":
            node[key] = draw(strange())
        elif kind == "tensor":
            name, t = draw(st.sampled_from(list(TENSORS))), node[key]
            plain = isinstance(t, torch.Tensor) and t.layout == torch.strided and t.device.type == "cpu"
            plain = plain and not t.is_quantized and t.numel() < 2**16  # not changed before
            node[key] = TENSORS[name](t.detach() if plain else torch.ones(3))
            done.append(name)
        elif kind == "swap":
            other, there = place(draw, contents)
            node[key], other[there] = other[there], node[key]
        elif kind == "drop":
            del node[key]
        elif isinstance(node, dict):
            node[draw(st.text(max_size=5))] = draw(strange())
    with contextlib.suppress(RecursionError):  # what is swapped may come to lie in itself
        torch.save(contents, file := io.BytesIO())
    return " ".join(done), Contents(file.getvalue())


@forms(40, 2000)
def test_changed_entries_of_checkpoints(examples, checkpoint, survived):
    whole = torch.load(checkpoint, weights_only=True)

    def build(draw):
        return draw(st.sampled_from(list(COMMANDS_OF_CHECKPOINTS))), *changed_entries(draw, whole)

    fault = "checkpoints: entries swapped, missing, added, of other types and shapes"
    fuzz(build, lambda case: try_checkpoint(checkpoint, case[0], case[2]), examples, survived, fault)


@forms(40, 2000)
def test_changed_bytes_of_checkpoints(examples, checkpoint, survived):
    whole = checkpoint.read_bytes()

    def build(draw):
        command = draw(st.sampled_from(list(COMMANDS_OF_CHECKPOINTS)))
        kind = draw(st.sampled_from("file file pickle pickle member packed twice drop".split()))
        if kind == "file":
            return command, kind, damaged(draw, whole)
        members = members_of(whole)
        name = "archive/data.pkl" if kind == "pickle" else draw(st.sampled_from(list(members)))
        contents, method = members.pop(name), zipfile.ZIP_DEFLATED if kind == "packed" else zipfile.ZIP_STORED
        first = [(name, contents)] if kind == "twice" else []
        last = [(name, contents if kind == "packed" else damaged(draw, contents))] if kind != "drop" else []
        return command, f"{kind} {name}", zipped([*first, *members.items(), *last], method)

    fault = "checkpoints: bits flipped, cut short, pickles and members changed"
    fuzz(build, lambda case: try_checkpoint(checkpoint, case[0], case[2]), examples, survived, fault)


def resaved(checkpoint: Path, config: dict = {}, **entries) -> bytes:
    contents = torch.load(checkpoint, weights_only=True)
    torch.save({**contents, "config": {**contents["config"], **config}, **entries}, file := io.BytesIO())
    return file.getvalue()


def pickled(code: bytes) -> bytes:
    return zipped([("a/data.pkl", b"\x80\x02" + code + b"."), ("a/version", b"3\n")])


def of_one_number(checkpoint: Path) -> bytes:
    """The weights of a large model, 300 MB of them, all of which are one number."""
    large = dict(width_g=128, z_dim=4096)
    with torch.device("meta"):
        like = coco_gan.Generator(Config(**{**SIZES, **large})).state_dict()
    spread = {name: torch.zeros((), dtype=t.dtype).expand(t.shape) for name, t in like.items()}
    return resaved(checkpoint, large, G_average=spread)


def not_a_number(checkpoint: Path) -> bytes:
    average = torch.load(checkpoint, weights_only=True)["G_average"]
    average["conv.bias"][1] = float("nan")
    return resaved(checkpoint, G_average=average)


def part_of_an_average(checkpoint: Path) -> bytes:
    """Adam's C would write beyond its end."""
    adam = torch.load(checkpoint, weights_only=True)["opt_G"]
    adam["state"][0]["exp_avg"] = torch.zeros(1)
    return resaved(checkpoint, opt_G=adam)


def one_bit(checkpoint: Path) -> bytes:
    contents = bytearray(checkpoint.read_bytes())
    weight = torch.load(checkpoint, weights_only=True)["G_average"]["linear.weight"]
    contents[contents.index(weight.numpy().tobytes())] ^= 1
    return bytes(contents)


def packed_bomb(checkpoint: Path) -> bytes:
    members = {**members_of(checkpoint.read_bytes()), "archive/data/0": zeros_packed(48)}
    return claiming(zipped(members.items()), b"archive/data/0", 48 * 2**26)


ODD_PATCH = dict(N=1, M=1, S=4095, height=4095, width=4095)
LONG_WORD = b"c_codecs\nencode\nX\0\0\x10\0" + "é".encode() * 2**19 + b"X\x08\0\0\0punycode\x86R"
HOSTILE = {
    "one layer of terabytes": lambda c: resaved(c, ODD_PATCH),
    "many channels": lambda c: resaved(c, {"width_g": 1024, "z_dim": 4096}),
    "many patches": lambda c: resaved(c, {"height": 16384, "width": 65536}),
    "an end of a line": lambda c: resaved(c, {"precision": "a\nb"}),
    "a command to the terminal": lambda c: resaved(c, {"crop": "\x1b[2J"}),
    "a number for a path": lambda c: resaved(c, {"data": 5}),
    "a step of text": lambda c: resaved(c, step="x"),
    "no images": lambda c: resaved(c, images=None),
    "a part of an average": part_of_an_average,
    "a weight that is no number": not_a_number,
    "a large model of one number": of_one_number,
    "one bit": one_bit,
    "3 GB of zeros": packed_bomb,
    "a bytearray of 4 GB": lambda c: pickled(b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\1\x85R"),
    "an encoding that takes minutes": lambda c: pickled(LONG_WORD),
    "code": lambda c: pickled(b"cos\nsystem\nX\4\0\0\0true\x85R"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoints_are_refused(name, checkpoint):
    contents = HOSTILE[name](checkpoint)
    command = "resume" if name == "a part of an average" else "sample"

    def work():
        with watched(name):
            return try_checkpoint(checkpoint, command, contents)

    assert isolated(work) == "refused"


def test_what_is_not_needed_of_a_checkpoint_is_not_believed(checkpoint):
    """No path in it is followed to sample, and Adam's settings are those of the configuration."""
    adam = torch.load(checkpoint, weights_only=True)["opt_G"]
    adam["param_groups"][0] |= dict(lr="x", betas=None, amsgrad=True)
    led = resaved(checkpoint, {"data": "../../bait"}, images="../../bait")
    cases = [("sample", led), ("raw", led), ("export", led), ("resume", resaved(checkpoint, opt_G=adam))]

    def work():
        for command, contents in cases:
            with watched(command):
                assert try_checkpoint(checkpoint, command, contents) == "worked"

    isolated(work)


# ----------------------------------------------------------------------------------------------------------
# Zips and images


def directly(work, options, names, read, per_chunk, workers):
    """What data._in_processes gives, without a second for processes of their own."""
    for name in names:
        try:
            yield bytes(getattr(data, work)(read(name), *options)), 1, []
        except Exception as error:
            yield b"", 1, [f"{name!r}: {data.reason_of(error)}"]


class Load:
    """load_images as a command."""

    @staticmethod
    def main(words: list[str]) -> int:
        try:
            images = data.load_images(words[0], 8, 12, cache="out", workers=1, crop=words[1], panorama=True)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        assert images.shape[1:] == (8, 12, 3) and len(images) > 0 and "tmp" not in str(os.listdir("out"))
        return 0


MODES = "1 L P LA PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I F I;16 I;16B".split()
WAYS = [*((kind, {}) for kind in data.FORMATS), ("JPEG", dict(progressive=True))]
WAYS += [("WEBP", dict(lossless=True))]
WAYS += [("TIFF", dict(compression=compression)) for compression in ("tiff_lzw", "packbits", "tiff_deflate")]


def encoded(image: Image.Image, kind: str, **options) -> Contents:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of mode I as PNG, which newer Pillows refuse
        image.save(file := io.BytesIO(), kind, **options)
    return Contents(file.getvalue())


def all_images() -> list[tuple[str, bytes]]:
    """A name and contents, for every mode of Pillow's in every format that has it, small, and some frames."""
    noise, found = np.random.default_rng(0).integers(0, 256, (18, 36, 3), np.uint8), []
    for mode in MODES:
        try:
            image = Image.fromarray(noise).convert(mode)
        except ValueError:  # no way leads there
            image = Image.new(mode, (36, 18))
        for kind, options in WAYS:
            with contextlib.suppress(OSError, KeyError, ValueError):  # which this format cannot have
                contents = encoded(image, kind, **options)
                Image.open(io.BytesIO(contents)).load()  # some Pillows cannot read what they wrote
                found.append((f"{mode} {kind} {options}", contents))
    frames = dict(save_all=True, append_images=[Image.new("P", (36, 18), n) for n in range(3)])
    several = [(kind, encoded(Image.new("P", (36, 18)), kind, **frames)) for kind in ("GIF", "WEBP", "TIFF")]
    return found + several


def names_of_members():
    names = "../up.png ../../bait/up.png /tmp/x.png C:\\x.png a/../../b.png a.png a.png f.png in.zip n\nl.png"
    names += (
        " \x1b[2J.png é.jpg px.png nx.png py.png ny.png pz.png nz.png .png a.png/ " + "deep/" * 50 + ".gif"
    )
    return st.sampled_from(names.split(" ")) | st.text(min_size=1, max_size=9).map(lambda text: text + ".png")


def changed_zip(draw, images: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """Strange names, links, packing and members; then strange fields in its headers, and damage anywhere."""
    members, done = [("good.png", images[0][1])], []
    for _ in range(draw(st.integers(1, 6))):
        info = zipfile.ZipInfo(draw(names_of_members()))
        info.compress_type = draw(st.sampled_from([0, 8, 12, 14]))
        info.external_attr = draw(st.sampled_from([0, 0o120777 << 16, 0o010644 << 16, 0o040755 << 16]))
        kind, contents = draw(st.sampled_from(images))
        contents = draw(st.sampled_from([contents, b"../../bait/secret.png", zipped([("a.png", contents)])]))
        members.append((info, contents))
        done.append(f"{info.filename!a} of {kind}")
    contents = bytearray(zipped(members))
    for _ in range(draw(st.integers(0, 3))):
        mark, length = draw(st.sampled_from([(b"PK\1\2", 46), (b"PK\3\4", 30), (b"PK\5\6", 22)]))
        start = draw(st.sampled_from([contents.find(mark), contents.rfind(mark)]))
        at = start + draw(st.integers(4, length + 5))  # also in the name
        value = draw(st.sampled_from([b"\xff" * 4, b"\1", b"\x7f"]) | st.binary(min_size=1, max_size=4))
        contents[at : at + len(value)] = value
        done.append(f"{mark[2:]} + {at - start} = {value!r}")
    return " ".join(done), damaged(draw, contents) if draw(st.booleans()) else Contents(contents)


@forms(100, 4000)
def test_changed_zips(examples, survived, monkeypatch):
    images = all_images()

    def build(draw):
        return *changed_zip(draw, images), draw(st.sampled_from(["center", "celeba-syn", "panorama"]))

    def check(case):
        shutil.rmtree("out", ignore_errors=True)
        os.mkdir("out")
        Path("photos.zip").write_bytes(case[1])
        if case[2] != "panorama":
            return told(Load, ["photos.zip", case[2]])
        return told(data, "panorama photos.zip out --size 4x12 --workers 1".split())

    monkeypatch.setattr(data, "_in_processes", directly)
    fuzz(build, check, examples, survived, "zips: names, links, nested, encrypted, sums, sizes, damage")


@forms(200, 10_000)
def test_changed_images(examples, survived, monkeypatch):
    images = all_images()

    def build(draw):
        name, contents = draw(st.sampled_from(images))
        return name, draw(st.sampled_from(data.ENDINGS)), damaged(draw, contents)

    def check(case):
        for folder in ("photos", "out"):
            shutil.rmtree(folder, ignore_errors=True)
            os.mkdir(folder)
        Path("photos", f"a{case[1]}").write_bytes(case[2])
        return told(Load, ["photos", "center"])

    monkeypatch.setattr(data, "_in_processes", directly)
    fuzz(build, check, examples, survived, "images of every mode and format: damaged, cut, other endings")


def test_every_mode_and_ending_loads():
    images = all_images() + [(f"dot {kind}", encoded(Image.new("L", (1, 1)), kind)) for kind in data.FORMATS]
    os.mkdir("photos")
    for number, (_, contents) in enumerate(images):
        Path("photos", f"{number}{data.ENDINGS[number % len(data.ENDINGS)]}").write_bytes(contents)
    assert len(data.load_images("photos", 8, 12, cache="out", workers=1)) == len(images) > 90


def png_that_says(width: int, height: int) -> bytes:
    fields = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    end = struct.pack(">I", zlib.crc32(fields)) + struct.pack(">I", 99) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + fields + end


@forms(2000, int(Image.MAX_IMAGE_PIXELS**0.5))
def test_bombs_are_skipped_and_what_is_just_small_enough_is_not(examples, capfd, survived):
    """Examples are pixels a side: in the long form, all that Pillow allows."""
    jpeg = encoded(Image.new("L", (3000, 3000)), "JPEG", progressive=True)
    gif, most = encoded(Image.new("L", (9, 9)), "GIF"), (examples, examples)
    scan, frame = jpeg[jpeg.rindex(b"\xff\xda") : -2], gif[gif.index(b",", 13) : -1]
    files = {
        "60000.png": png_that_says(60_000, 60_000),
        "beyond.png": zeros_packed(48),
        "inside.png": zeros_packed(7),
        "scans.jpg": jpeg[:-2] + 5000 * scan + jpeg[-2:],
        "frames.gif": gif[:-1] + 9999 * frame + gif[-1:],
        "most.webp": encoded(Image.new("RGBA", most), "WEBP", lossless=True, method=0),
        "most.png": encoded(Image.new("I;16", most), "PNG"),
        "most.tif": encoded(Image.new("F", most), "TIFF", compression="tiff_lzw"),
    }
    contents = zipped(files.items())
    for name, count in ((b"beyond.png", 48), (b"inside.png", 7)):
        contents = claiming(contents, name, count * 2**26)
    Path("photos.zip").write_bytes(contents)
    os.mkdir("photos")
    for name in files.keys() - {"beyond.png", "inside.png"}:
        Path("photos", name).write_bytes(files[name])
    Path("photos", "sparse.png").touch()
    os.truncate("photos/sparse.png", 2**40)

    def work():
        for source in ("photos.zip", "photos"):
            with watched(source, SECONDS * (1 + examples // 2000)):
                assert len(data.load_images(source, 8, 12, cache="out", workers=1)) == 4

    isolated(work)
    said = capfd.readouterr().err
    assert "'60000.png': Image size (3600000000 pixels) exceeds" in said
    assert "'beyond.png': unpacks to 3,221,225,472 bytes" in said and "'inside.png': Bad CRC-32" in said
    assert "'sparse.png': has 1,099,511,627,776 bytes" in said and " scans of 3000 x 3000 pixels" in said
    survived("images and zips: bombs, and the largest that are allowed", 2 * len(files), "skipped, or loaded")


# ----------------------------------------------------------------------------------------------------------
# Statistics, logs and results


@forms(100, 5000)
def test_changed_statistics(examples, survived):
    about = dict(zip(evaluate.ABOUT, ["net.pt", "ab" * 32, "4x8x8x3-00", 9, 8, 8]))
    arrays = {"mu": np.arange(4.0), "sigma": np.eye(4), "about": np.array(json.dumps(about))}

    def saved(**changed) -> Contents:
        np.savez(file := io.BytesIO(), **{**arrays, **changed})
        return Contents(file.getvalue())

    def build(draw):
        kind, members = draw(st.sampled_from("file member about array".split())), members_of(saved())
        name = draw(st.sampled_from(list(members)))
        if kind == "file":
            return kind, damaged(draw, saved())
        if kind == "member":
            return name, zipped({**members, name: damaged(draw, members[name])}.items())
        if kind == "about":
            key, value = draw(st.sampled_from(list(about))), draw(strange())
            return f"{key} is {value}", saved(about=json.dumps({**about, key: value}))
        like = draw(st.sampled_from("<f8 <f4 <i8 <c16 |S3 <U2 |b1 <M8[s] |V2".split()))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        return f"{name} is {like} {shape}", saved(**{name.removesuffix(".npy"): np.zeros(shape, like)})

    def check(case):
        Path("s.npz").write_bytes(case[1])
        try:
            mu, sigma, _ = evaluate.read_statistics("s.npz")
        except UserError as error:
            assert str(error).startswith("--statistics s.npz ") and str(error).isprintable()
            return "refused"
        assert sigma.shape == (len(mu), len(mu)) and np.isfinite(sigma).all()
        return "worked"

    fuzz(build, check, examples, survived, "statistics for FID: damaged, of other shapes and types")


@forms(40, 1500)
def test_changed_logs_and_results(examples, checkpoint, survived):
    run = checkpoint.parent
    resume = f"train --device cpu --steps 3 --cache {run.parent}/cache --resume runs/m"
    newest = "sample --device cpu --panorama --out runs/m/o.png --viewport 0,0,1,1"
    commands = [
        (coco_gan, resume, run / "log.jsonl"),
        (coco_gan, newest, run / "config.json"),
        (plot, "runs/m", run / "log.jsonl"),
        (ablations, "--table --json runs/m/ablations.json", coco_gan.ASSETS / "ablations.json"),
    ]

    def build(draw):
        program, words, path = draw(st.sampled_from(commands))
        kind, contents = draw(st.sampled_from("damage value deep".split())), json.loads(path.read_bytes())
        if kind == "damage":
            return program, words, path.name, damaged(draw, path.read_bytes())
        node, key = place(draw, contents)
        node[key] = draw(strange())
        deep = "[" * 10**5 if kind == "deep" else ""
        return program, words, path.name, Contents(f"{deep}{json.dumps(contents)}\n".encode())

    def check(case):
        program, words, name, contents = case
        shutil.rmtree("runs", ignore_errors=True)
        shutil.copytree(run, "runs/m")
        Path("runs/m", name).write_bytes(contents)
        return told(program, words.split(), made="../work/runs/m")

    fuzz(build, check, examples, survived, "logs, results and configurations in JSON")


# ----------------------------------------------------------------------------------------------------------
# Command lines. A word that begins with ? is either what follows, or a strange one.

COMMANDS = [
    (coco_gan, "train --dry-run --device cpu"),
    (coco_gan, "sample --device cpu --checkpoint run --count 2 --out out.png"),
    (data, "panorama ?photos ?out --size 4x8 --workers 1"),
    (evaluate, "--checkpoint run --count 2 --data ?photos"),
    (export, "--checkpoint run --out out.npz"),
    (figures, "interpolate --device cpu --checkpoint run --out out.png"),
    (figures, "guided --device cpu --checkpoint run --out out.png ?photos/0.png"),
    (plot, "?run --out out.png"),
    (ablations, "--table --json results.json"),
    (view, "--device cpu --checkpoint run --size 9x9 --out out.png"),
]
WORDS = """folder folder.png pipe pipe.png dead.png /dev/null /dev/zero ~ ~nobody nowhere/out.png text.png
    text.png/out.png . .. run out.npz out.png out.jpg OUT.PNG 0 -1 1 2 3 16 1e999 nan inf 0x10 1_0 ٣ +2 1.5
    0,0,4,4 -3,0,2,2 1-3 3-1 1,1 1,0 4x8 -- -h é 日本 toy:faces cylinder""".split()
WORDS += ["", " 4", "4 ", "a\nb", "\x1b[2J", "\udcff.png", "cuda:" + "1" * 5000, "0-999999," * 9999 + "1"]
WORDS += ["9" * 18, "9" * 30, "9" * 5000, str(2**63), "x" * 300, "x" * 300 + ".png", "x" * 10**5]


def flags_of(program, line: str) -> list[str]:
    """As its help lists them."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        program.main([*line.split()[: line[0].isalpha()], "--help"])
    return re.findall(r"^  (--[\w-]+)", out.getvalue(), re.M)


@pytest.fixture
def strange_files(here, checkpoint):
    for name in ("run", "photos", "cache"):
        shutil.copytree(checkpoint.parents[1] / name, name)
    shutil.copy(coco_gan.ASSETS / "ablations.json", "results.json")
    for ending in ("", ".png"):
        os.mkdir(f"folder{ending}")
        os.mkfifo(f"pipe{ending}")
    os.mkdir("runs")
    os.mkdir("runs/pipes")
    for name in ("checkpoint-1.pt", "config.json", "log.jsonl"):
        os.mkfifo(f"runs/pipes/{name}")
    os.symlink("nowhere", "dead.png")
    Path("text.png").write_text("text")


SAMPLE = "sample --device cpu --checkpoint run --viewport 0,0,2,2".split()


@pytest.mark.parametrize(
    "program, words, outcome",
    [
        (coco_gan, [*SAMPLE, "--seed", "0-999999," * 9999 + "1", "--out", "out.png"], "refused"),
        (coco_gan, [*SAMPLE, "--batch-size", "9" * 30], "refused"),
        (coco_gan, [*SAMPLE, "--count", "2", "--out", "out\udcff.png"], "worked"),
        (coco_gan, [*SAMPLE, "--checkpoint", "a\nb"], "refused"),
        (coco_gan, "sample --device cpu --viewport 0,0,2,2 --out out.png".split(), "worked"),
        (coco_gan, "sample --device cpu --viewport 0,0,2,2 --out out.png --panorama".split(), "worked"),
        (coco_gan, [*SAMPLE, "--checkpoint", "/dev/zero"], "refused"),
        (coco_gan, ["sample", "--device", "cuda:" + "1" * 5000], "refused"),
        (coco_gan, ["train", "--dry-run", "--data", "\udcff"], "worked"),
        (figures, ["guided", "pipe", "--checkpoint", "run", "--out", "out.png"], "refused"),
        (figures, ["guided", "/dev/zero", "--checkpoint", "run", "--out", "out.png"], "refused"),
        (ablations, ["--table", "--json", "/dev/zero"], "refused"),
        (plot, ["runs/pipes"], "refused"),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, list) else "",
)
def test_hostile_command_lines(program, words, outcome, strange_files):
    def work():
        with watched(words):
            return told(program, words)

    assert isolated(work) == outcome


@forms(150, 4000)
def test_command_lines(examples, strange_files, survived):
    commands = [(program, line, flags_of(program, line)) for program, line in COMMANDS]

    def build(draw):
        name = st.binary(max_size=9).map(lambda name: os.fsdecode(name.translate(None, b"\0/")))
        number = st.floats() | st.integers().filter(lambda n: not 50 < n < 10**7)  # of images, and work
        odd = st.sampled_from(WORDS) | name | number.map(str)
        program, line, flags = draw(st.sampled_from(commands))
        words = [draw(st.just(word[1:]) | odd) if word[0] == "?" else word for word in line.split()]
        for flag in draw(st.lists(st.sampled_from(flags), max_size=3)):
            words += draw(st.sampled_from([[flag], [flag, draw(odd)], [f"{flag}={draw(odd)}"]]))
        return program, words

    def check(case):
        before = tree()
        outcome = told(*case, made="..")
        for name in sorted(tree() - before, reverse=True):
            os.rmdir(name) if os.path.isdir(name) else os.remove(name)
        return outcome

    fuzz(build, check, examples, survived, "command lines of ten commands")
