"""Test experiments/evaluate.py on an untrained checkpoint: python -m pytest experiments/test_evaluate.py"""

import json

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
from experiments import evaluate
from experiments.metrics import column_seams, seam_ratio

PHOTOS, HELD_OUT = 20, 6
NAMES = ["SWD x 1,000, 32 px", "SWD x 1,000, 16 px", "SWD x 1,000, mean", "seam ratio"]
NAMES += [f"{name} {colour}" for name in ("mean", "deviation") for colour in ("red", "green", "blue")]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    assert "note: --count 2,048 is more than" in capsys.readouterr().out
    G = load(here / "held")
    assert np.array_equal(generated, to_uint8(full_image(G, latents(range(HELD_OUT), G.config.z_dim))))


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


def test_seed_and_weights_decide_the_images(here, monkeypatch):
    G = load(here / "held")
    images = evaluate.generate(G, 5, 0)
    assert np.array_equal(images, evaluate.generate(G, 5, 0))
    assert not np.array_equal(images, evaluate.generate(load(here / "held", raw=True), 5, 0))
    assert np.array_equal(evaluate.generate(G, 1, 3)[0], to_uint8(full_image(G, latents([3_000_000], 4)))[0])
    monkeypatch.setattr(evaluate, "PIXELS_PER_BATCH", 2 * 32 * 32)  # batches of 2, 2 and 1
    assert np.abs(images.astype(int) - evaluate.generate(G, 5, 0)).max() <= 1  # float32's rounding


def test_same_command_gives_the_same_figures(here, tmp_path):
    def figures(*arguments):
        command = ["--checkpoint", here / "held", "--count", 2, "--json", tmp_path / "a.json", *arguments]
        assert run(here, *command) == 0
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
        (["--checkpoint", "{here}/held", "--count", "2", "--json", "{here}"], "--json {here} cannot be"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_mistakes_end_in_one_line(here, capsys, arguments, message):
    assert run(here, *(text.format(here=here) for text in arguments)) == 2
    error = capsys.readouterr().err
    *progress, error = error.splitlines()  # the photographs may have to be decoded first
    assert error.startswith("error: " + message.format(here=here))
    assert not [line for line in progress if "ready" not in line]


def test_metrics_own_errors_are_a_line_too(here, compared, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "generate", lambda G, count, seed: np.zeros((count, 32, 32, 3), np.uint8))
    assert run(here, "--checkpoint", here / "held", "--count", 2) == 2
    assert capsys.readouterr().err.startswith("error: fake: no difference between any two pixels")


def test_a_panorama_has_figures_of_its_own(here, tmp_path, capsys):
    sizes = dict(height=16, width=32, S=8, z_dim=4, width_g=4, width_d=4, topology="cylinder")
    state = new_state(Config(**sizes, data=str(here / "photos"), crop="squash"), torch.device("cpu"))
    save_checkpoint(state, tmp_path, "other images", keep=1)
    assert run(here, "--checkpoint", tmp_path, "--count", 4, "--json", tmp_path / "a.json") == 0
    result = json.loads((tmp_path / "a.json").read_text())
    images = load_images(str(here / "photos"), 16, 32, crop="squash", cache=here / "cache")
    (real, more), fake = evaluate.choose_real(images, 0, 4), evaluate.generate(load(tmp_path), 4, 0)
    for column, shown in (("generated", fake), ("floor", more)):
        seams, figures = column_seams(real, shown, 8), result[column]
        assert figures["seam ratio"] == seam_ratio(real, shown, 8, (False, True))
        assert figures["seam ratio, right-left"] == seams[3]
        assert figures["seam ratio, columns"] == pytest.approx(seams[:3].mean())
        assert figures["azimuth variety"] == azimuth_variety(shown, 8) / azimuth_variety(real, 8)
