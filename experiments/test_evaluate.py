"""Test experiments/evaluate.py on an untrained checkpoint: python -m pytest experiments/test_evaluate.py"""

import contextlib
import hashlib
import io
import json
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from coco_gan import (
    Config,
    azimuth_variety,
    fingerprint_of,
    full_image,
    latents,
    load,
    new_state,
    save_checkpoint,
    split,
    to_uint8,
)
from data import load_images
from experiments import evaluate, metrics
from experiments.metrics import column_seams, seam_ratio

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
PHOTOS, HELD_OUT = 20, 6
NAMES = ["SWD x 1,000, 32 px", "SWD x 1,000, 16 px", "SWD x 1,000, mean", "seam ratio"]
NAMES += [f"{name} {colour}" for name in ("mean", "deviation") for colour in ("red", "green", "blue")]


def write_photos(folder, count, seed):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Folders of photographs, and runs that held some of the first folder out, none and one."""
    here = tmp_path_factory.mktemp("evaluate")
    for seed, (name, count) in enumerate((("photos", PHOTOS), ("others", PHOTOS), ("few", 3))):
        write_photos(here / name, count, seed)
    images = load_images(str(here / "photos"), 32, 32, cache=here / "cache")
    for name, holdout in (("held", HELD_OUT), ("all", 0), ("one", 1)):
        sizes = dict(height=32, width=32, S=8, z_dim=4, width_g=4, width_d=4)
        config = Config(**sizes, holdout=holdout, data=str(here / "photos"))
        (here / name).mkdir()
        state = new_state(config, torch.device("cpu"))
        state.G_average.conv.bias += 0.5  # as if trained: the average is not the weights
        save_checkpoint(state, here / name, fingerprint_of(images), keep=1)
    return here


def run(here, *arguments):
    return evaluate.main(["--device", "cpu", "--cache", str(here / "cache"), *map(str, arguments)])


def test_table_and_json_agree(here, tmp_path, capsys):
    assert run(here, "--checkpoint", here / "held", "--count", 4, "--json", tmp_path / "a.json") == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["generated"]) == list(result["floor"]) == NAMES
    assert list(result["real"]) == NAMES[4:]
    assert (result["count"], result["real_images"], result["weights"]) == (4, "held-out", "averaged")
    assert result["checkpoint"] == str(here / "held" / "checkpoint-000000000.pt")
    assert 0 < result["seconds"] < 60
    for name in NAMES:
        values = [result[column][name] for column in ("real", "generated", "floor") if name in result[column]]
        (row,) = [line for line in out.splitlines() if line.startswith(name)]
        assert row.removeprefix(name).split() == [f"{value:.2f}" for value in values]
    # The photographs are noise, and less like an untrained model's smooth images than like each other.
    assert result["floor"]["SWD x 1,000, mean"] < result["generated"]["SWD x 1,000, mean"]
    assert out.count("warning:") == 1 and "note:" not in out


@pytest.fixture
def compared(monkeypatch):
    """The sets that the distance is measured between, in the order of the calls; nothing is measured."""
    sets = []

    def record(real, fake, **_):
        sets.append((real, fake))
        return {"levels": {}, "mean": 0.0}

    monkeypatch.setattr(evaluate, "sliced_wasserstein", record)
    return sets


def numbers_of(images, here, name="photos"):
    """The place of each of `images` among all; no two of them are alike."""
    stored = load_images(str(here / name), 32, 32, cache=here / "cache")
    places = {image.tobytes(): i for i, image in enumerate(stored)}
    return [places[image.tobytes()] for image in images]


def test_held_out_images_are_compared(here, compared, capsys):
    assert run(here, "--checkpoint", here / "held") == 0
    (real, more), (again, generated) = compared
    train, held_out = split(PHOTOS, HELD_OUT)
    assert numbers_of(real, here) == numbers_of(again, here) == held_out.tolist()
    assert len(set(numbers_of(more, here)) & set(train.tolist())) == HELD_OUT
    assert "note: --count 16,384 is more than" in capsys.readouterr().out
    G = load(here / "held")
    assert np.array_equal(generated, to_uint8(full_image(G, latents(range(HELD_OUT), G.config.z_dim))))
    assert run(here, "--checkpoint", here / "held", "--seed", 2, "--count", 2) == 0
    z = latents([2_000_000, 2_000_001], G.config.z_dim)
    assert np.array_equal(compared[3][1], to_uint8(full_image(G, z)))


@pytest.mark.parametrize(
    "checkpoint, data, note",
    [("all", "photos", "training saw the real images"), ("held", "others", "this is another set of images")],
)
def test_without_held_out_images_all_are_divided_in_two(here, compared, capsys, checkpoint, data, note):
    assert run(here, "--checkpoint", here / checkpoint, "--data", here / data, "--count", PHOTOS) == 0
    real, more = compared[0]
    assert len(real) == len(more) == PHOTOS // 2
    assert sorted(numbers_of(real, here, data) + numbers_of(more, here, data)) == list(range(PHOTOS))
    assert f"note: {note}" in capsys.readouterr().out


def test_enough_images_need_no_warning(here, compared, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "RELIABLE_COUNT", HELD_OUT)
    assert run(here, "--checkpoint", here / "held", "--count", HELD_OUT) == 0
    out = capsys.readouterr().out
    assert "warning:" not in out and "note:" not in out


def test_seed_and_weights_decide_the_images(here, tmp_path, monkeypatch):
    def generate(G, count, seed):
        return evaluate.generate(G, count, seed, tmp_path)

    G = load(here / "held")
    images = generate(G, 5, 0)
    assert np.array_equal(images, generate(G, 5, 0))
    assert not np.array_equal(images, generate(load(here / "held", raw=True), 5, 0))
    assert np.array_equal(generate(G, 1, 3)[0], to_uint8(full_image(G, latents([3_000_000], 4)))[0])
    monkeypatch.setattr(metrics, "PIXELS_PER_BATCH", 2 * 32 * 32)  # batches of 2, 2 and 1
    assert np.abs(images.astype(int) - generate(G, 5, 0)).max() <= 1  # float32's rounding


def test_images_lie_in_a_file_that_is_gone_afterwards(here, tmp_path, monkeypatch):
    batches = []

    def draw(G, z):
        batches.append(len(z))
        return torch.zeros(len(z), 3, 32, 32)

    monkeypatch.setattr(evaluate, "full_image", draw)
    G, count = load(here / "held"), 4000
    with traced() as peak:
        images = evaluate.generate(G, count, 0, tmp_path)
    assert images.shape == (count, 32, 32, 3) and sum(batches) == count and max(batches) == 256
    assert peak() < images.nbytes / 4 and isinstance(images, np.memmap)
    assert (images == 128).all() and not [*tmp_path.iterdir()]


@contextlib.contextmanager
def traced():
    """Yield a function that tells the most bytes that Python and NumPy held inside."""
    tracemalloc.start()
    try:
        yield lambda: peak
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


def test_a_full_disk_is_a_line(here, monkeypatch, capsys):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate.tempfile, "TemporaryFile", full)
    assert run(here, "--checkpoint", here / "held", "--count", 2) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: --cache {here}/cache cannot be written: No space left on device")


def test_real_images_are_read_as_they_are_looked_at(monkeypatch):
    released = []
    monkeypatch.setattr(evaluate, "release_pages", released.append)
    images = np.random.default_rng(0).integers(0, 256, (4000, 32, 32, 3), dtype=np.uint8)
    with traced() as peak:
        sets = evaluate.choose_real(images, 0, 2000)
        parts = [np.stack([part[0].copy() for part in metrics.chunks(some)]) for some in sets]
    assert peak() < images.nbytes / 8
    assert len(released) == 2 * 125 and all(some is images for some in released)
    for some, part in zip(sets, parts):
        assert some.shape == (2000, 32, 32, 3) and some.dtype == np.uint8 and len(some) == len([*some])
        assert np.array_equal(part, images[some.numbers[::16]]) and np.array_equal(some[3:5], some[:5][3:])
    assert not set(sets[0].numbers) & set(sets[1].numbers)


def test_same_command_gives_the_same_figures(here, tmp_path):
    def figures(*arguments):
        command = ["--checkpoint", here / "held", "--count", 2, "--json", tmp_path / "a.json", "--force"]
        assert run(here, *command, *arguments) == 0
        result = json.loads((tmp_path / "a.json").read_text())
        return [result[column] for column in ("real", "generated", "floor")]

    first = figures()
    assert figures() == first
    assert figures("--seed", 1)[1:] != first[1:]
    assert figures("--raw")[1] != first[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--checkpoint", "{here}/none"], "--checkpoint {here}/none does not exist"),
        (["--checkpoint", "{here}/few"], "--checkpoint {here}/few holds no checkpoint"),
        (["--checkpoint", "{here}/held", "--count", "1"], "--count 1 is out of range; give 2 to 1000000"),
        (["--checkpoint", "{here}/held", "--count", "many"], "argument --count: invalid int value: 'many'"),
        (["--checkpoint", "{here}/held", "--seed", "-1"], "--seed -1 is out of range"),
        (["--checkpoint", "{here}/held", "--data", "{here}/few"], "--data {here}/few has 3 images: too few"),
        (["--checkpoint", "{here}/one"], "--data {here}/photos has 20 images, 1 of them held out: too few"),
        (["--features", "{here}/none"], "--features {here}/none does not exist"),
        (["--features", "{here}/few"], "--features {here}/few does not exist; give a TorchScript file"),
        (["--features", "{here}/few/00.png"], "--features {here}/few/00.png is no TorchScript that can be"),
        (["--features", "{here}/{state}"], "--features {here}/{state} is no TorchScript that can be"),
        (["--statistics", "{here}/none"], "--statistics and --save-statistics are of a network; give"),
        (["--save-statistics", "{here}/none"], "--statistics and --save-statistics are of a network; give"),
        (
            ["--features", "x", "--statistics", "{here}/none", "--save-statistics", "{here}/none"],
            "--statistics replaces what --save-statistics would write; give one of them",
        ),
        (["--colour"], "--colour is unknown"),
    ],
)
def test_mistakes_end_in_one_line(here, capsys, arguments, message):
    names = dict(here=here, state="held/checkpoint-000000000.pt")
    assert run(here, "--checkpoint", here / "held", *(text.format(**names) for text in arguments)) == 2
    error = capsys.readouterr().err
    *progress, error = error.splitlines()  # the photographs may have to be decoded first
    assert error.startswith("error: " + message.format(**names))
    assert not [line for line in progress if "ready" not in line]


def test_metrics_own_errors_are_a_line_too(here, compared, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "generate", lambda G, count, *_: np.zeros((count, 32, 32, 3), np.uint8))
    assert run(here, "--checkpoint", here / "held", "--count", 2) == 2
    assert capsys.readouterr().err.startswith("error: fake: no difference between any two pixels")


def test_a_panorama_has_figures_of_its_own(here, tmp_path, capsys):
    sizes = dict(height=16, width=32, S=8, z_dim=4, width_g=4, width_d=4, topology="cylinder")
    state = new_state(Config(**sizes, data=str(here / "photos"), crop="squash"), torch.device("cpu"))
    save_checkpoint(state, tmp_path, "other images", keep=1)
    assert run(here, "--checkpoint", tmp_path, "--count", 4, "--json", tmp_path / "a.json") == 0
    result = json.loads((tmp_path / "a.json").read_text())
    images = load_images(str(here / "photos"), 16, 32, crop="squash", cache=here / "cache")
    (real, more), fake = evaluate.choose_real(images, 0, 4), evaluate.generate(load(tmp_path), 4, 0, tmp_path)
    for column, shown in (("generated", fake), ("floor", more)):
        seams, figures = column_seams(real, shown, 8), result[column]
        assert figures["seam ratio"] == seam_ratio(real, shown, 8, (False, True))
        assert figures["seam ratio, right-left"] == seams[3]
        assert figures["seam ratio, columns"] == pytest.approx(seams[:3].mean())
        assert figures["azimuth variety"] == azimuth_variety(shown, 8) / azimuth_variety(real, 8)


# ----------------------------------------------------------------------------------------------------------
# What is written


def test_files_that_exist_are_kept_and_asked_about_first(here, compared, tmp_path, capsys):
    (tmp_path / "a").write_text("mine")
    for flag in ("--json", "--save-statistics"):
        more = ["--features", here / "none"] if flag != "--json" else []
        for name, why in (("a", "exists already"), ("none/a", "cannot be written"), (".", "exists already")):
            path = tmp_path / name
            assert run(here, "--checkpoint", here / "held", flag, path, *more) == 2
            assert capsys.readouterr().err.startswith(f"error: {flag} {path} {why}")
    assert run(here, "--checkpoint", here / "held", "--json", tmp_path, "--force") == 2
    assert compared == [] and (tmp_path / "a").read_text() == "mine"
    assert run(here, "--checkpoint", here / "held", "--json", tmp_path / "a", "--force") == 0
    assert json.loads((tmp_path / "a").read_text())["count"] == HELD_OUT
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# ----------------------------------------------------------------------------------------------------------
# Features


class Four(torch.nn.Module):
    """Four pixels of the red channel, and the same of green with return_features."""

    def forward(self, x, return_features: bool = False):
        return x[:, int(return_features), 3, :4].float() / 2550


class Plain(torch.nn.Module):
    def forward(self, x):
        return x[:, 0, 3, :2].float() / 255


class Flat(torch.nn.Module):
    def forward(self, x):
        return x.float()


class Broken(torch.nn.Module):
    def forward(self, x):
        return x[:, 0, 0] / torch.zeros(1)


@pytest.fixture(scope="module")
def networks(here):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but what there is of Inception
        for network in (Four, Plain, Flat, Broken):
            torch.jit.script(network()).save(str(here / f"{network.__name__}.pt"))
    return here


def command(here, network, *arguments):
    return run(here, "--checkpoint", here / "held", "--features", here / network, *arguments)


def test_features_by_hand(networks, tmp_path, capsys):
    here, name = networks, "Four.pt"
    assert command(here, name, "--json", tmp_path / "a.json") == 0
    out, result = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    images = load_images(str(here / "photos"), 32, 32, cache=here / "cache")
    sets = [
        *evaluate.choose_real(images, HELD_OUT, 99),
        evaluate.generate(load(here / "held"), HELD_OUT, 0, tmp_path),
    ]
    real, more, fake = (some[:][:, 3, :4, 1].astype(np.float32) / 2550 for some in sets)
    of_real = metrics.feature_statistics(real)
    for column, x in (("generated", fake), ("floor", more)):
        figures = result[column]
        fid = metrics.frechet_distance(*of_real, *metrics.feature_statistics(x))
        assert figures["Frechet distance"] == pytest.approx(fid)
        kid = figures["kernel distance x 1,000"], figures["kernel distance x 1,000, deviation"]
        assert kid == pytest.approx(metrics.kernel_distance(real, x))
    digest = hashlib.sha256((here / name).read_bytes()).hexdigest()
    assert (result["features"], result["sha256"]) == (str(here / name), digest)
    assert f"4 features of {here / name}, SHA-256 {digest}" in out and "FID" not in result["floor"]
    assert "note: that is not NVIDIA's" in out
    fid = [result[column]["Frechet distance"] for column in ("generated", "floor")]
    (row,) = [line for line in out.splitlines() if line.startswith("Frechet distance  ")]
    assert [float(text) for text in row.split()[2:]] == pytest.approx(fid, rel=0.05) and max(fid) < 0.05
    assert "warning: 6 images are too few for a covariance of 4 features (under 2,000)" in out


def test_only_nvidias_file_gives_an_fid(networks, tmp_path, monkeypatch, capsys):
    here = networks
    monkeypatch.setattr(evaluate, "INCEPTION", hashlib.sha256((here / "Four.pt").read_bytes()).hexdigest())
    monkeypatch.setattr(evaluate, "RELIABLE_COUNT", 3)  # 6 images, 4 features
    assert command(here, "Four.pt", "--json", tmp_path / "a.json") == 0
    assert {"FID", "KID x 1,000"} <= json.loads((tmp_path / "a.json").read_text())["floor"].keys()
    out = capsys.readouterr().out
    assert "NVIDIA" not in out and "warning" not in out
    assert command(here, "Four.pt", "--count", 4) == 0
    assert "warning: 4 images are too few for a covariance of 4 features (under 5)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "network, message",
    [
        ("Flat.pt", "gives torch.float32 (2, 3, 32, 32); floats (2, d), d up to 8192, are due"),
        ("Broken.pt", "gives values that are not finite"),
    ],
)
def test_networks_that_give_no_features_are_refused_first(networks, compared, capsys, network, message):
    assert command(networks, network) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: --features {networks / network}: the network of features, given uint8")
    assert message in error and compared == []


# ----------------------------------------------------------------------------------------------------------
# Statistics


@pytest.fixture
def saved(networks, tmp_path, compared, capsys):
    """Statistics of the held-out images, and the figures of the run that wrote them."""
    arguments = ["--save-statistics", tmp_path / "real.npz", "--json", tmp_path / "a.json"]
    assert command(networks, "Four.pt", *arguments) == 0
    compared.clear()
    capsys.readouterr()
    return tmp_path / "real.npz", json.loads((tmp_path / "a.json").read_text())


def test_statistics_stand_for_the_real_images(networks, saved, tmp_path, capsys):
    here, (path, first) = networks, saved
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(str(file["about"]))
        real = load_images(str(here / "photos"), 32, 32, cache=here / "cache")[
            split(PHOTOS, HELD_OUT)[1].numpy()
        ]
        x = real[:, 3, :4, 1] / np.float32(2550)
        np.testing.assert_allclose(file["mu"], x.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(file["sigma"], np.cov(x, rowvar=False), rtol=1e-5)
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
    assert about == {
        "network": "Four.pt",
        "sha256": first["sha256"],
        "images": fingerprint_of(real),
        "count": HELD_OUT,
        "height": 32,
        "width": 32,
    }

    def figures(*arguments):
        command = ["--statistics", path, "--json", tmp_path / "b.json", "--force", *arguments]
        assert run(here, "--checkpoint", here / "held", "--features", here / "Four.pt", *command) == 0
        return json.loads((tmp_path / "b.json").read_text())

    again, others = figures(), figures("--data", here / "others", "--count", HELD_OUT)
    for column in ("generated", "floor"):
        assert again[column] == first[column]
    assert again["statistics"] == str(path) and first["statistics"] is None
    assert f"Frechet distance: against 6 images, by {path}" in capsys.readouterr().out
    # The same generated images against the same statistics, whatever the other real images.
    assert others["generated"]["Frechet distance"] == first["generated"]["Frechet distance"]
    assert others["floor"]["Frechet distance"] != first["floor"]["Frechet distance"]


def test_statistics_of_few_images_are_warned_of(networks, saved, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "RELIABLE_COUNT", 3)
    assert command(networks, "Four.pt", "--statistics", saved[0]) == 0
    assert "warning" not in capsys.readouterr().out
    rewrite(saved[0], about={**about_of(saved[0]), "count": 4})
    assert command(networks, "Four.pt", "--statistics", saved[0]) == 0
    assert "warning: 4 images are too few for a covariance of 4 features" in capsys.readouterr().out


def test_statistics_of_another_network_or_size_are_refused(networks, saved, compared, capsys):
    here, (path, _) = networks, saved
    assert command(here, "Plain.pt", "--statistics", path) == 2
    made = f"error: --statistics {path} was made by Four.pt of 32 x 32 px, and not by this {here}/Plain.pt"
    assert capsys.readouterr().err.startswith(made)
    rewrite(path, about={**about_of(path), "height": 64})
    assert command(here, "Four.pt", "--statistics", path) == 2
    assert "of 64 x 32 px, and not by this" in capsys.readouterr().err
    assert command(here, "Four.pt", "--statistics", here / "none") == 2
    assert f"--statistics {here}/none does not exist; make one by" in capsys.readouterr().err
    assert compared == []


def about_of(path):
    with np.load(path) as file:
        return json.loads(str(file["about"]))


def rewrite(path, **changed):
    """Replace arrays of an .npz; {name: None} leaves one out."""
    with np.load(path) as file:
        arrays = {**file, **changed}
    if isinstance(arrays["about"], dict):
        arrays["about"] = json.dumps(arrays["about"])
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def header(shape, descr="<f8"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def later_header(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_2_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue()


def bomb(path, name, contents):
    """Replace one member of an .npz by raw bytes."""
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in {**members, f"{name}.npy": contents}.items():
            archive.writestr(member, data)


def flip(path, place):
    contents = bytearray(path.read_bytes())
    contents[contents.index(place) + 200] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize(
    "tamper, message",
    [
        (lambda path: path.write_bytes(b""), "File is not a zip file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-400]), "File is not a zip file"),
        (lambda path: rewrite(path, sigma=None), "There is no item named 'sigma.npy' in the archive"),
        (lambda path: rewrite(path, mu=np.full(4, np.nan)), "a number is not finite"),
        (lambda path: rewrite(path, sigma=np.full((4, 4), np.inf)), "a number is not finite"),
        (lambda path: rewrite(path, sigma=np.triu(np.ones((4, 4)))), "sigma is no covariance"),
        (lambda path: rewrite(path, sigma=-np.eye(4)), "sigma is no covariance"),
        (lambda path: rewrite(path, sigma=np.eye(3)), "mu is float64 (4,) and sigma float64 (3, 3)"),
        (lambda path: rewrite(path, mu=np.zeros((4, 1))), "mu is float64 (4, 1) and sigma"),
        (lambda path: rewrite(path, mu=np.zeros(4, np.float32)), "mu is float32 (4,) and sigma"),
        (lambda path: rewrite(path, mu=np.array([None] * 4)), "Object arrays cannot be loaded"),
        (lambda path: rewrite(path, about=np.array("[]")), "it does not tell what made it"),
        (lambda path: rewrite(path, about=np.array("{")), "Expecting property name"),
        (lambda path: rewrite(path, about={**about_of(path), "count": "6"}), "it does not tell what made it"),
        (lambda path: rewrite(path, about={**about_of(path), "count": 1}), "sigma is no covariance"),
        (lambda path: rewrite(path, about={"count": 6}), "it does not tell what made it"),
        (lambda path: bomb(path, "mu", header((2**40,))), "mu would be float64 (1099511627776,)"),
        (
            lambda path: bomb(path, "sigma", header((2**20, 2**20))),
            "sigma would be float64 (1048576, 1048576)",
        ),
        (lambda path: bomb(path, "about", header((), "<U99999999")), "about would be <U99999999 ()"),
        (lambda path: bomb(path, "mu", header((4,)) + bytes(10**6)), "mu is longer than it says"),
        (lambda path: bomb(path, "mu", header((4,)) + bytes(31)), "EOF"),
        (lambda path: bomb(path, "mu", later_header((2**40,))), "cannot be used: "),
        (lambda path: rewrite(path, mu=np.float64(0), sigma=np.float64(0)), "cannot be used: "),
        (lambda path: rewrite(path, mu=np.ones((2, 2)), sigma=np.ones((2, 2, 2, 2))), "cannot be used: "),
        (lambda path: flip(path, b"sigma.npy"), "Bad CRC-32"),
        (lambda path: rewrite(path, mu=np.zeros(3), sigma=np.eye(3)), "has 3 features, --features gives 4"),
    ],
)
def test_strange_statistics_are_refused_first(networks, saved, compared, capsys, tamper, message):
    tamper(saved[0])
    with traced() as peak:
        assert command(networks, "Four.pt", "--statistics", saved[0]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: --statistics {saved[0]} ") and message in error
    assert peak() < 2**25 and compared == []


# ----------------------------------------------------------------------------------------------------------
# While training


def test_figures_in_training_are_of_seed_1_and_leave_the_model_alone(here, tmp_path):
    G = load(here / "held")
    before, real = {k: v.clone() for k, v in G.state_dict().items()}, np.zeros((3, 32, 32, 3), np.uint8)
    real[:] = np.random.default_rng(0).integers(0, 256, real.shape)

    def generate(first, last):
        return to_uint8(full_image(G, latents(range(first, last), G.config.z_dim)))

    figures = metrics.in_training(generate, real, G.config.S, G.config.closed)
    fake = evaluate.generate(G, 3, 1, tmp_path)
    assert figures["seam_ratio"] == pytest.approx(seam_ratio(real, fake, 8), rel=1e-2)
    assert figures["swd"] == pytest.approx(metrics.sliced_wasserstein(real, fake)["mean"], rel=1e-2)
    assert not G.training and all(torch.equal(v, before[k]) for k, v in G.state_dict().items())
