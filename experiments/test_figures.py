"""Test experiments/figures.py on small untrained generators: python -m pytest experiments/test_figures.py

What is expected is worked out here from G itself: G(z, c'') with z and c'' written out anew, in NumPy.
"""

import errno
import json
import math
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.func import functional_call

import coco_gan
from coco_gan import Config, full_image, latents, new_state, save_checkpoint, spectral_norm, to_uint8
from data import load_images
from experiments import export, figures

H, S, R = 24, 8, 3
WIDTHS = {"plane": 32, "cylinder": 48, "torus": 48}  # 4, 6 and 6 micro patches
h, w = 2 * S, 3 * S  # of a macro patch of the guided ones
GUIDED = "guided photo.png --checkpoint runs/guided-plane"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with runs on a torus, on a cylinder, and on planes, the newest of 3 x 4 micro patches."""
    here = tmp_path_factory.mktemp("figures")
    runs = {"torus": ("torus", H, 48, S), "cylinder": ("cylinder", H, 48, S)}
    runs |= {"narrow": ("plane", H, S, S), "broad": ("plane", H, 8 * S, S), "large": ("plane", 32, 32, 16)}
    runs = {f"guided-{topology}": (topology, H, width, S) for topology, width in WIDTHS.items()} | runs
    for name, (topology, height, width, side) in (runs | {"plane": ("plane", H, 32, S)}).items():
        run = here / "runs" / name
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(dict(topology=topology)))
        form = dict(height=height, width=width, S=side, N=2, M=min(2, width // side), topology=topology)
        form |= dict(guided=True, M=3) if "guided" in name else {}
        state = new_state(Config(**form, z_dim=5, width_g=2, width_d=2), torch.device("cpu"))
        weight = state.G_average.conv.weight
        weight *= 1e-4  # where tanh is linear; untrained, it gives hardly anything but black and white
        weight *= 0.5 / full_image(state.G_average.eval(), latents(range(9), 5)).std()
        save_checkpoint(state, run, "images", keep=1)
    save(photograph(0, H, 32), here / "photo.png")
    return here


@pytest.fixture
def run(here, monkeypatch, capsys):
    """Run a command in `here`; returns the exit status, and the lines of its output and of its errors."""
    monkeypatch.chdir(here)

    def run(command, *arguments):
        status = figures.main([command, "--device", "cpu", *map(str, arguments)])
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if not line.startswith("from runs/")]
        return status, out.splitlines(), errors

    return run


@pytest.fixture
def draw(run, tmp_path):
    """The picture of a command line, as (h, w, 3) int."""

    def draw(line, topology="plane"):
        out = tmp_path / "a.png"
        arguments = (*line.split(), "--checkpoint", f"runs/{topology}", "--out", out, "--force")
        assert run(*arguments) == (0, [str(out)], [])
        return np.array(Image.open(out)).astype(int)

    return draw


def load(here, topology="plane"):
    return coco_gan.load(here / "runs" / topology)


def photograph(seed, height, width, mode="RGB"):
    """Soft spots of colour, as an image of Pillow's."""
    spots = np.random.default_rng(seed).integers(0, 256, (4, 5, len(mode)), np.uint8)
    return Image.fromarray(spots.squeeze()).resize((width, height), Image.Resampling.BICUBIC)


def save(image, path, orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(exist_ok=True)
    image.save(path, exif=exif)


def cells(picture, height, width, gap=2):
    """The pictures that a grid holds: (rows, columns, height, width, 3)."""
    down, across = height + gap, width + gap
    rows, columns = (picture.shape[0] + gap) // down, (picture.shape[1] + gap) // across
    assert picture.shape == (rows * down - gap, columns * across - gap, 3)
    starts = [[(r * down, c * across) for c in range(columns)] for r in range(rows)]
    return np.array([[picture[y : y + height, x : x + width] for y, x in row] for row in starts])


def plain(G, *seeds):
    """What `sample` draws of each seed alone: (n, H, W, 3) int."""
    one_by_one = [full_image(G, latents([seed], 5)) for seed in seeds]
    return to_uint8(torch.cat(one_by_one)).astype(int)


def arc(seed_a, seed_b, weight):
    """The latent between two seeds', in float64: direction on the great circle, length in proportion."""
    a, b = latents([seed_a, seed_b], 5).double().numpy()
    across = b - a * (a @ b) / (a @ a)  # b's part at a right angle to a
    angle = math.atan2(np.linalg.norm(across) * np.linalg.norm(a), a @ b)
    direction = np.cos(weight * angle) * a / np.linalg.norm(a)
    direction += np.sin(weight * angle) * across / np.linalg.norm(across)
    return direction * ((1 - weight) * np.linalg.norm(a) + weight * np.linalg.norm(b))


def patch(G, z, i, j):
    """G(z, c'') at row i and column j, whole or not, by the paper's formulas: (S, S, 3) in 0 to 255."""
    (down, across), K = G.config.closed, G.config.K
    c = []
    for index, count, closed in ((i, R, down), (j, K, across)):
        theta = math.pi * (-1 + 2 * index / count)
        c += [math.cos(theta), math.sin(theta)] if closed else [-1 + 2 * index / (count - 1)]
    z, c = torch.tensor(np.array([z])).float(), torch.tensor([c])
    return (G(z, c)[0].permute(1, 2, 0).numpy() + 1) * 127.5


def image(G, z):
    """The full image of a latent, put together by hand: (H, W, 3) in 0 to 255."""
    rows = [np.concatenate([patch(G, z, i, j) for j in range(G.config.K)], axis=1) for i in range(R)]
    return np.concatenate(rows)


def differs(a, b):
    return np.abs(np.subtract(a, b)).max()


# ----------------------------------------------------------------------------------------------------------
# The parts
# ----------------------------------------------------------------------------------------------------------


def test_slerp_turns_and_lengthens_evenly():
    a, b = latents([1, 2], 128) * torch.tensor([[1.0], [0.5]])
    path = figures.slerp(a, b, torch.linspace(0, 1, 9))
    assert path.dtype == torch.float32 and torch.equal(path[0], a) and torch.equal(path[8], b)
    lengths = path.double().norm(dim=1)
    assert torch.allclose(lengths.diff(), (b.norm() - a.norm()).double() / 8, atol=1e-5)
    u = path.double() / lengths[:, None]
    turns = torch.acos((u[1:] * u[:-1]).sum(1))
    assert turns[0] > 0.1 and torch.allclose(turns, torch.acos(u[0] @ u[8]) / 8, atol=1e-6)


@pytest.mark.parametrize("z_dim", [1, 128])
@pytest.mark.parametrize("factor", [1, -1])
def test_slerp_of_latents_on_one_line_is_that_line(z_dim, factor):
    a = latents([3], z_dim)[0]
    path = figures.slerp(a, factor * a, torch.tensor([0, 0.25, 1]))
    assert torch.allclose(path, torch.stack([a, a * (0.75 + 0.25 * factor), a * factor]), atol=1e-6)


def test_positions_are_even_and_whole_where_trained():
    assert figures.positions(4, 7, closed=False).tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert figures.positions(6, 4, closed=True).tolist() == [0, 1.5, 3, 4.5]
    assert figures.positions(1, 3, closed=False).tolist() == [0, 0, 0]
    for count in range(2, 40):
        for between in range(1, 25):
            for closed, steps in ((False, (count - 1) * between + 1), (True, count * between)):
                whole = figures.positions(count, steps, closed)[::between]
                assert whole.tolist() == list(range(count)), (count, between, closed)


@pytest.mark.parametrize(
    "K, border, blend, closed, expected",
    [
        (4, 2, 1, False, [0, 0, 0.5, 1, 1]),
        (4, 2, 2, False, [0, 0.25, 0.5, 0.75, 1]),
        (6, 2, 1, False, [0, 0, 0.5, 1, 1, 1, 1]),
        (3, 1, 3, False, [1 / 3, 0.5, 2 / 3, 5 / 6]),  # wider than A's side: no column is A's
        (6, 3, 1, True, [0.5, 0, 0, 0.5, 1, 1, 0.5]),
        (8, 4, 2, True, [0.5, 0.25, 0, 0.25, 0.5, 0.75, 1, 0.75, 0.5]),
        (7, 2, 1, True, [0.5, 0, 0.5, 1, 1, 1, 1, 0.5]),
    ],
)
def test_weights_of_a_blend(K, border, blend, closed, expected):
    assert figures.blend_weights(K, border, blend, closed).tolist() == pytest.approx(expected)


# ----------------------------------------------------------------------------------------------------------
# The pictures
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", WIDTHS)
def test_interpolation_goes_from_plain_image_to_plain_image_on_the_arc(draw, here, topology):
    G = load(here, topology)
    pictures = cells(draw("interpolate --seed 5,2,9 --steps 5", topology), H, WIDTHS[topology])
    pictures = pictures.swapaxes(0, 1)  # wider than high: a column a pair
    first, second, third = plain(G, 5, 2, 9)
    assert pictures.shape[:2] == (2, 5) and differs(first, second) > 50
    assert np.array_equal(pictures[0, 0], first) and np.array_equal(pictures[0, 4], second)
    assert np.array_equal(pictures[1, 0], second) and np.array_equal(pictures[1, 4], third)
    for row, (a, b) in enumerate(((5, 2), (2, 9))):
        for k in (1, 2, 3):
            assert differs(pictures[row, k], image(G, arc(a, b, k / 4))) < 0.51
        straight = image(G, latents([a, b], 5).numpy().mean(0))
        assert differs(pictures[row, 2], straight) > 2


def test_a_strip_of_images_that_are_not_wide_lies():
    upright, wide = np.zeros((1, 3, 5, 4, 3), np.uint8), np.zeros((1, 3, 4, 5, 3), np.uint8)
    assert figures.sheet(upright).shape == (5, 3 * 6 - 2, 3) and figures.sheet(wide).shape == (
        3 * 6 - 2,
        5,
        3,
    )


def test_interpolation_of_one_micro_patch(draw, here):
    G, (first, second) = load(here), plain(load(here), 0, 7)
    for at, i, j in (("", 1, 1), ("--at 2,0", 2, 0), ("--at 0,3", 0, 3)):
        (strip,) = cells(draw(f"interpolate --patches --seed 0,7 --steps 4 {at}"), S, S)
        part = slice(i * S, i * S + S), slice(j * S, j * S + S)
        assert len(strip) == 4
        assert differs(strip[0], first[part]) <= 1 and differs(strip[3], second[part]) <= 1  # a batch's size
        assert differs(strip[1], patch(G, arc(0, 7, 1 / 3), i, j)) < 0.51


@pytest.mark.parametrize("seeds", [(4, 6), (4, 6, 1)])
def test_a_loop_goes_round_without_a_jump(run, here, tmp_path, monkeypatch, seeds):
    kept, G = [], load(here)
    monkeypatch.setattr(figures, "save_animation", lambda frames, path: kept.extend(frames))
    listed = ",".join(map(str, seeds))
    assert run("interpolate", "--seed", listed, "--steps", 4, "--gif", tmp_path / "a.gif")[0] == 0
    n = len(seeds)
    assert len(kept) == 3 * n
    for k, (a, b) in enumerate(zip(seeds, seeds[1:] + seeds[:1])):
        assert np.array_equal(kept[3 * k], plain(G, a)[0])
        assert differs(kept[3 * k + 1], image(G, arc(a, b, 1 / 3))) < 0.51
        assert differs(kept[3 * k + 2], image(G, arc(a, b, 2 / 3))) < 0.51


@pytest.mark.parametrize("ending", ["gif", "WEBP"])
def test_an_animation_repeats_for_ever(run, here, tmp_path, ending):
    path, G = tmp_path / f"a.{ending}", load(here, "torus")
    arguments = ("--seed", "3,8", "--steps", 3, "--gif", path, "--checkpoint", "runs/torus")
    assert run("interpolate", *arguments) == (0, [str(path)], [])
    expected = [image(G, arc(3, 8, weight)) for weight in (0, 0.5, 1, 0.5)]
    with Image.open(path) as animation:
        assert (animation.n_frames, animation.info["loop"]) == (4, 0)
        for k in range(4):
            animation.seek(k)
            errors = [np.abs(animation.convert("RGB") - frame).mean() for frame in expected]
            assert errors[k] == min(errors)


@pytest.mark.parametrize("topology", WIDTHS)
def test_coordinates_at_and_between_the_trained_ones(draw, here, topology):
    G, K = load(here, topology), WIDTHS[topology] // S
    down, across = G.config.closed
    steps = {"plane": 7, "cylinder": 12, "torus": 12}[topology]
    y = [k * R / steps if down else k * (R - 1) / (steps - 1) for k in range(steps)]
    x = [k * K / steps if across else k * (K - 1) / (steps - 1) for k in range(steps)]
    picture = draw(f"coordinates --seed 6 --steps {steps} --at 2,3", topology)
    inner = cells(picture[S + 8 :, S + 8 :], S, S)
    (strip,), side = cells(picture[:S, S + 8 :], S, S), cells(picture[S + 8 :, :S], S, S)[:, 0]
    z, trained = latents([6], 5)[0].numpy(), plain(G, 6)[0]
    assert inner.shape[:2] == (steps, steps) and differs(trained[:S, :S], trained[-S:, -S:]) > 20
    whole = 0
    for k in range(steps):
        assert differs(strip[k], patch(G, z, 2, x[k])) < 0.51
        assert differs(side[k], patch(G, z, y[k], 3)) < 0.51
        for m in range(steps):
            assert differs(inner[k, m], patch(G, z, y[k], x[m])) < 0.51
            if y[k] % 1 == x[m] % 1 == 0:
                part = slice(int(y[k]) * S, int(y[k] + 1) * S), slice(int(x[m]) * S, int(x[m] + 1) * S)
                assert differs(inner[k, m], trained[part]) <= 1  # float32's, by the size of a batch
                whole += 1
    assert (
        whole == {"plane": 4 * 3, "cylinder": 6 * 1, "torus": 6 * 3}[topology] + (topology == "cylinder") * 6
    )
    lines = (
        cells(picture[S + 3 : S + 4, S + 8 :], 1, S)[0],
        cells(picture[S + 8 :, S + 3 : S + 4], S, 1)[:, 0],
    )
    for line, position in zip(lines, (x, y)):
        assert [not mark.any() for mark in line] == [p % 1 == 0 for p in position]
        assert all(mark.min() == mark.max() for mark in line)


def test_coordinates_of_several_latents_are_a_block_each(draw):
    both, one = draw("coordinates --seed 6,1 --steps 3"), draw("coordinates --seed 1 --steps 3")
    h, w, _ = one.shape
    assert both.shape == (h, 2 * w + S, 3) or both.shape == (2 * h + S, w, 3)
    assert np.array_equal(both[-h:, -w:], one) and not np.array_equal(both[:h, :w], one)


def faded(G, seed_a, seed_b, weights):
    """A blend by hand: across each column, from the image of its left edge's weight to its right edge's."""
    images = [image(G, arc(seed_a, seed_b, weight)) for weight in weights]
    result = np.empty_like(images[0])
    for x in range(G.config.width):
        j, part = x // S, (x % S + 0.5) / S
        result[:, x] = (1 - part) * images[j][:, x] + part * images[j + 1][:, x]
    return result


@pytest.mark.parametrize(
    "topology, flags, border, weights",
    [
        ("plane", "", 2, [0, 0, 0.5, 1, 1]),
        ("broad", "", 4, [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]),
        ("plane", "--border 3 --blend 2", 3, [0, 0, 0.25, 0.5, 0.75]),
        ("plane", "--border 1", 1, [0, 0.5, 1, 1, 1]),
        ("cylinder", "", 3, [0.5, 0, 0, 0.5, 1, 1, 0.5]),
        ("torus", "--border 4 --blend 2", 4, [0.5, 0.25, 0, 0.25, 0.5, 0.75, 0.5]),
    ],
)
def test_mix(draw, here, topology, flags, border, weights):
    G = load(here, topology)
    pictures = cells(draw(f"mix --seed 3,8 {flags}", topology), H, G.config.width)[:, 0]
    a, b = plain(G, 3, 8)
    assert len(pictures) == 4 and differs(a, b) > 50
    assert np.array_equal(pictures[0], a) and np.array_equal(pictures[3], b)
    hard, blend, x = pictures[1], pictures[2], border * S
    assert np.array_equal(hard[:, :x], a[:, :x]) and np.array_equal(hard[:, x:], b[:, x:])
    assert differs(blend, faded(G, 3, 8, weights)) < 0.51
    for j, edges in enumerate(zip(weights, weights[1:])):
        for weight, whole in ((0, a), (1, b)):
            same = np.array_equal(blend[:, j * S : j * S + S], whole[:, j * S : j * S + S])
            assert same == (edges == (weight, weight))


def test_mix_of_more_latents_goes_from_each_to_the_next(draw, here):
    pictures = cells(draw("mix --seed 3,8,5"), H, 32)
    assert pictures.shape[:2] == (4, 2)
    for column, (a, b) in enumerate(((3, 8), (8, 5))):
        assert np.array_equal(pictures[[0, 3], column], plain(load(here), a, b))


# ----------------------------------------------------------------------------------------------------------
# From a patch of a photograph
# ----------------------------------------------------------------------------------------------------------


def macro(G, z, i, j):
    """s' at row i and column j, whole or not, put together by hand: (h, w, 3) in 0 to 255."""
    rows = [np.concatenate([patch(G, z, i + n, j + m) for m in range(3)], axis=1) for n in range(2)]
    return np.concatenate(rows)


def wrapped(image, top, left):
    """The macro patch that begins at a pixel of a full image, round its borders."""
    return np.roll(image, (-top, -left), axis=(0, 1))[:h, :w]


def judged(here, topology, patches):
    """z = Q(x') and A(x') as a place in micro patches, of patches (B, h, w, 3), by the formulas of A and Q.

    Their batch norm is that of 128 generated macro patches: crops of full images, at trained places.
    """
    G = load(here, f"guided-{topology}")
    state = new_state(G.config, torch.device("cpu"))
    contents = torch.load(next((here / f"runs/guided-{topology}").glob("*.pt")), weights_only=True)
    for name in "DAQ":
        getattr(state, name).load_state_dict(contents[name])
    rng = torch.Generator().manual_seed(0)
    z = coco_gan.latent(128, 5, rng)
    place = coco_gan.draw_places(replace(G.config, batch_size=128), rng)
    images = full_image(G, z).permute(0, 2, 3, 1).numpy()
    made = [wrapped(image, *place) for image, *place in zip(images, *place)]

    def feature(patches):
        x = torch.tensor(np.array(patches)).float().permute(0, 3, 1, 2)
        zeros = torch.zeros(len(x), G.config.c_dim)
        return functional_call(state.D, spectral_norm(state.D, iterate=False), (x, zeros))[1]

    def head(net):
        p = {name: value.detach() for name, value in spectral_norm(net, iterate=False).items()}
        first, ours = (
            feature(x) @ p["linear1.weight"].T + p["linear1.bias"]
            for x in (made, np.array(patches) / 127.5 - 1)
        )
        a = (ours - first.mean(0)) / (first.var(0) + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"]
        a = torch.where(a > 0, a, 0.2 * a)
        return torch.tanh(a @ p["linear2.weight"].T + p["linear2.bias"]).detach().double().numpy()

    def position(c, count, closed):
        if closed:
            return (math.atan2(c[1], c[0]) + math.pi) / math.tau * count
        return float(c[0] + 1) / 2 * (count - 1)

    (rows, columns), (down, across) = PLACES[topology], G.config.closed
    places = [(position(c, rows, down), position(c[1 + down :], columns, across)) for c in head(state.A)]
    return head(state.Q), places


PLACES = {"plane": (2, 2), "cylinder": (2, 6), "torus": (3, 6)}  # where macro patches may begin


def outline(place, config):
    """The pixels around the macro patch at a place in pixels, round the borders that meet."""
    (top, left), around = place, set()
    for y in range(top - 1, top + h + 1):
        for x in range(left - 1, left + w + 1):
            if y in (top - 1, top + h) or x in (left - 1, left + w):
                y_, x_ = (
                    p % size if closed else min(max(p, 0), size - 1)
                    for p, size, closed in zip((y, x), (H, config.width), config.closed)
                )
                around.add((y_, x_))
    return around


def drawn(image, config, red=None, blue=None):
    """A copy with outlines, in dashes of four pixels where the two coincide."""
    image = np.array(image).astype(int)
    red, blue = (outline(place, config) if place else set() for place in (red, blue))
    for y, x in red | blue:
        dash = (y, x) in red and ((y, x) not in blue or (y + x) // 4 % 2 == 0)
        image[y, x] = (255, 0, 0) if dash else (0, 0, 255)
    return image


def panels(row, width):
    """The four pictures of a row: photograph, x', s' and full image; all between them is white."""
    row, x, found = row.copy(), 0, []
    for height, across in ((H, width), (h + 2, w + 2), (h + 2, w + 2), (H, width)):
        top = (len(row) - height) // 2
        found.append(row[top : top + height, x : x + across].copy())
        row[top : top + height, x : x + across] = 255
        x += across + 6
    assert row.shape[1] == x - 6 and (row == 255).all()
    return found


def edge(panel):
    """The colour of the line around a panel, if it is one."""
    colours = {tuple(pixel) for line in (panel[0], panel[-1], panel[:, 0], panel[:, -1]) for pixel in line}
    return colours.pop() if len(colours) == 1 else None


TOLD = re.compile(r"(\S+): (?:patch at (\d+),(\d+), )?predicted at (\d+),(\d+); error (\d+\.\d) of 255")


@pytest.mark.parametrize("topology, at", [("plane", (5, 7)), ("cylinder", (8, 40)), ("torus", (20, 41))])
def test_guided(run, here, tmp_path, topology, at):
    G, width = load(here, f"guided-{topology}"), WIDTHS[topology]
    photos = [np.array(photograph(seed, H, width)) for seed in range(5)]
    patches = [wrapped(photo, *at) for photo in photos] + [np.array(photograph(9, h, w))]
    for number, photo in enumerate([*photos, patches[5]]):
        save(Image.fromarray(photo), tmp_path / f"photos/{number}.png")
    arguments = (tmp_path / "photos", "--at", f"{at[0]},{at[1]}", "--checkpoint", f"runs/guided-{topology}")
    status, lines, errors = run("guided", *arguments, "--out", tmp_path / "a.png")
    assert (status, errors, lines.pop()) == (0, [], str(tmp_path / "a.png"))
    picture = np.array(Image.open(tmp_path / "a.png")).astype(int)
    rows = cells(picture, H, 2 * (width + w + 2) + 18, gap=24)
    rows, crossing, told = rows.reshape(-1, *rows.shape[2:]), 0, []
    for b, (z, place) in enumerate(zip(*judged(here, topology, patches))):
        photo, x_macro, s_macro, full = panels(rows[b], width)
        predicted = round(place[0] * S) % H, round(place[1] * S) % width
        crossing += predicted[0] + h > H or predicted[1] + w > width
        if b < 5:
            assert np.array_equal(photo, drawn(photos[b], G.config, red=at, blue=predicted))
            assert edge(x_macro) == (255, 0, 0)
        else:  # the place is unknown: no red
            white = np.full((H, width, 3), 255)
            white[:h, :w] = patches[b]
            assert np.array_equal(
                photo, drawn(np.roll(white, predicted, axis=(0, 1)), G.config, blue=predicted)
            )
            assert edge(x_macro) == (255, 255, 255)
        assert np.array_equal(x_macro[1:-1, 1:-1], patches[b])
        expected = macro(G, z, *place)
        assert edge(s_macro) == (0, 0, 255) and differs(s_macro[1:-1, 1:-1], expected) < 0.6
        assert differs(full, drawn(image(G, z).round(), G.config, blue=predicted)) <= 1
        told.append(np.sqrt(np.mean((expected - patches[b]) ** 2)))
        name, *numbers, error = TOLD.fullmatch(lines[b]).groups()
        assert name == f"{b}.png" and abs(float(error) - told[-1]) < 0.06
        assert numbers == [str(n) if b < 5 else None for n in at] + [str(n) for n in predicted]
    assert (rows[6:] == 255).all() and len(lines) == 7
    mean = re.fullmatch(r"mean of 6: error (\d+\.\d) of 255", lines[6])
    assert abs(float(mean[1]) - np.mean(told)) < 0.06
    assert len(set(told)) == 6 and (crossing > 0) == any(G.config.closed)


def test_a_place_that_rounds_to_the_border_that_closes_is_the_first(run, here, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "positions_of", lambda c, config: torch.tensor([[2.95, 5.97]]))
    arguments = ("guided", "photo.png", "--checkpoint", "runs/guided-torus", "--out", tmp_path / "a.png")
    status, lines, _ = run(*arguments)
    assert status == 0 and "predicted at 0,0;" in lines[0] and len(lines) == 2  # no mean of one


@pytest.mark.parametrize("topology", WIDTHS)
def test_positions_are_the_inverse_of_coordinates(topology):
    form = dict(height=H, width=WIDTHS[topology], S=S, N=2, M=3, topology=topology)
    config, (rows, columns) = Config(**form), PLACES[topology]
    down, across = config.closed
    i = torch.linspace(0, rows if down else rows - 1, 13)[: 12 if down else 13]
    j = torch.linspace(0, columns if across else columns - 1, 25)[: 24 if across else 25]
    i, j = (p.flatten() for p in torch.meshgrid(i, j, indexing="ij"))
    found = figures.positions_of(coco_gan.macro_coordinates(config, i, j), config)
    for there, p, count, closed in zip(found.unbind(1), (i, j), (rows, columns), config.closed):
        apart = (there - p).abs()
        assert (apart.minimum(count - apart) if closed else apart).max() < 1e-5
        assert there.min() >= 0 and (there.max() < count if closed else there.max() <= count - 1)
    # A says cos θ and sin θ each for itself: their direction counts, and not their length.
    shorter = figures.positions_of(0.3 * coco_gan.macro_coordinates(config, i, j), config)
    for k, closed in enumerate(config.closed):
        assert torch.allclose(shorter[:, k], found[:, k], atol=1e-5) == closed


def test_positions_where_there_is_one_place_only():
    config = Config(height=16, width=24, S=8, N=2, M=2)
    assert figures.positions_of(torch.tensor([[0.3, 0.5]]), config).tolist() == [[0, 0.75]]


@pytest.mark.parametrize("topology", WIDTHS)
def test_macro_patches_are_crops_of_the_full_image_and_lie_anywhere_between(here, topology):
    G, (z,) = load(here, f"guided-{topology}"), latents([4], 5)
    whole, (rows, columns) = full_image(G, z[None])[0].permute(1, 2, 0).numpy(), PLACES[topology]
    at = torch.tensor([(i, j) for i in range(rows) for j in range(columns)])
    made = figures.macro_patches(G, z.expand(len(at), -1), at).permute(0, 2, 3, 1).numpy()
    assert made.shape == (rows * columns, h, w, 3)
    for (i, j), one in zip(at.tolist(), made):
        assert differs(one, wrapped(whole, i * S, j * S)) < 1e-5
    (between,) = to_uint8(figures.macro_patches(G, z[None], torch.tensor([[0.25, 0.6]])))
    assert differs(between, macro(G, z.numpy(), 0.25, 0.6)) < 0.51
    assert differs(between, macro(G, z.numpy(), 0, 1)) > 5


def rms(a, b):
    """Root mean square difference of each two of patches (B, 3, h, w) in [-1, 1], in 0 to 255."""
    return (127.5 * (a - b)).double().square().flatten(1).mean(1).sqrt()


def test_refinement_comes_closer_and_stays_inside(here):
    G, wanted, at = load(here, "guided-torus"), latents(range(6), 5), 3 * latents(range(6), 2).abs()
    x_macro = figures.macro_patches(G, wanted, at)
    start = (wanted + 0.5 * latents(range(10, 16), 5)).clamp(-1, 1)
    kept = start.clone()
    z, before, after = figures.refine(G, start, x_macro, at, 80)
    assert torch.equal(start, kept) and not z.requires_grad and z.abs().max() <= 1
    torch.testing.assert_close(before.double(), rms(figures.macro_patches(G, start, at), x_macro))
    torch.testing.assert_close(after.double(), rms(figures.macro_patches(G, z, at), x_macro))
    assert (after < 0.3 * before).all() and before.min() > 1
    alone, *_ = figures.refine(G, start[4:5], x_macro[4:5], at[4:5], 80)
    torch.testing.assert_close(alone, z[4:5], atol=0.01, rtol=0)  # each for itself


def test_refinement_for_a_patch_out_of_reach_ends_at_the_bounds(here):
    G, at = load(here, "guided-plane"), torch.zeros(4, 2)
    far = figures.macro_patches(G, 9 * latents(range(4), 5), at)
    z, before, after = figures.refine(G, 0.99 * latents(range(4), 5).sign(), far, at, 30)
    assert z.abs().max() <= 1 and (after < before).all()


def test_refinement_returns_nothing_worse(here):
    G, z, at = load(here, "guided-plane"), latents(range(3), 5), torch.tensor([[0, 0.5], [1, 0], [0.3, 0]])
    x_macro = figures.macro_patches(G, 0.9 * z, at)
    near = 0.9 * z + 0.001  # nearer than what is left of a first step of 0.05
    for start, steps in ((near, 1), (near, 0), (latents(range(3, 6), 5), 0)):
        same, before, after = figures.refine(G, start, x_macro, at, steps)
        assert torch.equal(same, start) and torch.equal(before, after) and before.all()


def test_refined_pictures_are_what_is_told(run, here, tmp_path):
    def errors_of(steps):
        arguments = ("photo.png", "--checkpoint", "runs/guided-plane", "--refine", steps, "--force")
        status, (line, _), _ = run("guided", *arguments, "--out", tmp_path / "a.png")
        _, x_macro, s_macro, _ = panels(np.array(Image.open(tmp_path / "a.png")).astype(int), 32)
        apart = np.sqrt(np.mean((x_macro - s_macro)[1:-1, 1:-1] ** 2))
        told = re.search(r"; error (\S+) of 255" + (f", (\\S+) after {steps} steps$" if steps else "$"), line)
        return [float(number) for number in told.groups()], apart

    (plain,), apart = errors_of(0)
    assert abs(apart - plain) < 0.3
    (before, after), apart = errors_of(40)
    assert before == plain and after < 0.95 * before and abs(apart - after) < 0.3


def test_sheets_are_made_a_few_at_a_time(run, here, tmp_path, monkeypatch):
    for seed in range(5):
        save(photograph(seed, H, 32), tmp_path / f"photos/{seed}.png")
    arguments = ("guided", tmp_path / "photos", "--refine", 3, "--checkpoint", "runs/guided-plane", "--force")
    assert run(*arguments, "--out", tmp_path / "a.png")[0] == 0
    whole, at_a_time = np.array(Image.open(tmp_path / "a.png")).astype(int), []
    forward = coco_gan.Generator.forward

    def watched(G, z, c):
        at_a_time.append(len(z))
        return forward(G, z, c)

    monkeypatch.setattr(figures, "at_once", lambda config: 2)
    monkeypatch.setattr(coco_gan.Generator, "forward", watched)
    assert run(*arguments, "--out", tmp_path / "a.png")[0] == 0
    assert max(at_a_time) == 2 * 6  # of 6 micro patches each
    assert differs(np.array(Image.open(tmp_path / "a.png")), whole) <= 2


def test_at_once_holds_so_many_pixels_and_one_at_least():
    assert figures.at_once(Config()) == 64  # of 32 x 32
    assert figures.at_once(Config(height=1024, width=1024, S=256)) == 1


@pytest.mark.parametrize("ending", ["png", "JPG", "webp"])
def test_guided_is_the_same_again(run, here, tmp_path, ending):
    for name in "ab":
        arguments = (*GUIDED.split(), "--refine", 3, "--out", tmp_path / f"{name}.{ending}")
        assert run(*arguments)[0] == 0
    assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


def test_guided_from_a_file_and_of_the_newest_weights(run, here, tmp_path):
    path = next((here / "runs/guided-plane").glob("*.pt"))
    pictures = []
    for where, flags in ((path.parent, ()), (path, ()), (path, ("--raw",)), (path, ("--at", "4,4"))):
        out = tmp_path / f"{len(pictures)}.png"
        assert run("guided", "photo.png", "--checkpoint", where, "--out", out, *flags)[0] == 0
        pictures.append(np.array(Image.open(out)))
    assert np.array_equal(pictures[0], pictures[1]) and np.array_equal(pictures[0], pictures[3])  # the middle
    assert not np.array_equal(pictures[0], pictures[2])
    status, lines, _ = run("guided", "photo.png", "--checkpoint", "runs/guided-cylinder", "--panorama")
    assert (status, lines[-1]) == (0, "runs/guided-cylinder/guided.png") and "patch at 4,12" in lines[0]


# What becomes of a photograph


def config(**changes):
    return Config(**dict(height=H, width=32, S=S, N=2, M=3) | changes)


def test_photographs_are_upright_before_they_are_measured(tmp_path):
    path = tmp_path / "a.png"
    save(photograph(1, w, h), path, orientation=6)  # the upper left corner of the file is to be upper right
    photo, x_macro, place = figures.read_photo(path, (0, 0), config())
    assert photo is place is None and np.array_equal(x_macro, np.rot90(photograph(1, w, h), -1))
    save(photograph(1, h, 30), path)
    assert figures.read_photo(path, (0, 0), config())[0].shape == (H, 32, 3)
    save(photograph(1, h, 30), path, orientation=8)
    with pytest.raises(ValueError, match="^is 16 x 30, smaller than a macro patch, 24 x 16$"):
        figures.read_photo(path, (0, 0), config())
    save(photograph(1, 32, H), path, orientation=3)
    turned = photograph(1, 32, H).rotate(180)
    photo, *_ = figures.read_photo(path, (0, 0), config(height=32, width=H))
    assert np.array_equal(photo, turned)


def test_photographs_are_cut_as_for_training(tmp_path):
    path = tmp_path / "a.png"
    wide = np.array(photograph(1, 2 * H, 100))
    save(Image.fromarray(wide), path)
    photo, x_macro, place = figures.read_photo(path, (3, 8), config())
    shrunk = Image.fromarray(wide[:, 18:82]).resize((32, H), Image.Resampling.LANCZOS)  # the middle, 4:3
    assert place == (3, 8) and differs(photo, np.array(shrunk).astype(int)) <= 3
    assert np.array_equal(x_macro, photo[3 : 3 + h, 8 : 8 + w])
    squashed, *_ = figures.read_photo(path, (3, 8), config(crop="squash"))
    assert differs(squashed, np.array(Image.fromarray(wide).resize((32, H), 1)).astype(int)) <= 3
    for crop in ("celeba", "celeba-syn"):  # of images that are no CelebA's, the middle
        assert np.array_equal(figures.read_photo(path, (3, 8), config(crop=crop))[0], photo)
    aligned = np.array(photograph(2, 218, 178))
    save(Image.fromarray(aligned), path)
    for crop in ("celeba", "celeba-syn"):
        photo, *_ = figures.read_photo(path, (0, 0), config(height=128, width=128, crop=crop))
        assert np.array_equal(photo, aligned[50:178, 25:153])


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA"])
def test_grey_photographs_and_those_with_transparency(tmp_path, mode):
    path, image = tmp_path / "a.png", photograph(5, H, 32, mode)
    save(image, path)
    photo, x_macro, _ = figures.read_photo(path, (0, 0), config())
    pixels = np.array(image.convert("RGBA")).astype(float)
    opaque = pixels[..., 3:] / 255
    assert photo.shape == (H, 32, 3) and differs(photo, pixels[..., :3] * opaque + 255 * (1 - opaque)) < 1.5


def test_of_a_folder_unreadable_photographs_are_named_and_others_left_alone(run, here, tmp_path):
    folder = tmp_path / "photos"
    for name in ("b.PNG", "a.jpg", "deeper/c.png", ".hidden.png"):
        save(photograph(1, H, 32), folder / name)
    save(photograph(1, 9, 9), folder / "small.webp")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "b.PNG").read_bytes()[:99])
    (folder / "folder.png").mkdir()
    (folder / "gone.png").symlink_to("nowhere")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.png")
    status, lines, errors = run(
        *GUIDED.replace("photo.png", str(folder)).split(), "--out", tmp_path / "o.png"
    )
    assert status == 0 and [line.split(":")[0] for line in lines] == [
        "a.jpg",
        "b.PNG",
        "mean of 2",
        str(tmp_path / "o.png"),
    ]
    assert [error.split(": ")[0] for error in errors] == [
        f"skipped {folder / name}" for name in ("cut.png", "empty.png", "gone.png", "small.webp", "text.png")
    ]
    assert errors[1].endswith(": is empty") and errors[2].endswith(": No such file or directory")
    assert errors[3].endswith(": is 9 x 9, smaller than a macro patch, 24 x 16")
    assert errors[4].endswith(": is no image that Pillow can read")


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_names_that_are_no_text_can_be_told(run, here, tmp_path):
    folder = tmp_path / "photos"
    save(photograph(1, H, 32), folder / os.fsdecode(b"\xe9.png"))
    out = tmp_path / "o.png"
    status, lines, _ = run(*GUIDED.replace("photo.png", str(folder)).split(), "--out", out)
    assert status == 0 and lines[0].encode().startswith("�.png: ".encode())


GUIDED_PLANE = "runs/guided-plane/checkpoint-000000000.pt"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            "photo.png --checkpoint runs/plane",
            "runs/plane/checkpoint-000000000.pt was trained without the head Q, which guides; name a run "
            "of train --guided by --checkpoint",
        ),
        ("photo.png --checkpoint exported.pt", "exported.pt holds averaged weights only; give the run that"),
        ("photo.png --checkpoint halved.pt", "halved.pt is damaged, or of another version ('A'); give"),
        ("small.png", "small.png: is 23 x 40, smaller than a macro patch, 24 x 16; give another photograph"),
        ("broken.png", "broken.png: is no image that Pillow can read; give another photograph"),
        ("none.png", "none.png: No such file or directory; give another photograph"),
        ("photo.png/a.png", "photo.png/a.png: Not a directory; give another photograph"),
        ("bomb.png", "bomb.png: Image size (100000000 pixels) exceeds limit"),
        ("bare", "bare holds no image; looked for .jpg .jpeg .png"),
        ("ruined", "ruined holds no photograph that can be used; give another folder"),
        ("many", "many makes 21504 pixels of 8 photographs; give fewer, for at most 20000"),
        ("photo.png --at 9,0", "--at 9,0 is outside of the image; give 0 to 8 and 0 to 8"),
        ("photo.png --at 0,9", "--at 0,9 is outside of the image; give 0 to 8 and 0 to 8"),
        ("photo.png --at=-1,0", "--at -1,0 is no place; give top,left in pixels, like 8,0"),
        ("photo.png --at middle", "--at middle is no place; give top,left in pixels, like 8,0"),
        (
            "photo.png --at 0,48 --checkpoint runs/guided-cylinder",
            "--at 0,48 is outside of the image; give 0 to 8 and 0 to 47",
        ),
        (
            "photo.png --at 24,0 --checkpoint runs/guided-torus",
            "--at 24,0 is outside of the image; give 0 to 23 and 0 to 47",
        ),
        ("photo.png --refine -1", "--refine -1 is out of range; give 0 to 10000"),
        ("photo.png --refine 10001", "--refine 10001 is out of range; give 0 to 10000"),
        ("photo.png --seed 1", "--seed is unknown"),
        ("", "the following arguments are required: PHOTO"),
        ("photo.png --out photo.png", "--out photo.png exists already; name another, or add --force"),
        (
            "photo.png --panorama",
            f"--panorama needs a cylinder, and {GUIDED_PLANE} is on a plane; leave out --panorama",
        ),
    ],
)
def test_mistakes_with_photographs_end_in_one_line(run, here, monkeypatch, arguments, message):
    if not (here / "bare").exists():
        (here / "bare/deeper").mkdir(parents=True)
        save(photograph(1, H, 32), here / "bare/deeper/a.png")
        save(photograph(1, 40, 23), here / "small.png")
        save(Image.new("1", (10_000, 10_000)), here / "bomb.png")
        (here / "broken.png").write_text("no image")
        (here / "ruined").mkdir()
        (here / "ruined/a.png").touch()
        for number in range(8):
            save(photograph(number, H, 32), here / f"many/{number}.png")
        assert export.main(["--checkpoint", "runs/guided-plane", "--out", str(here / "exported.pt")]) == 0
        contents = torch.load(here / GUIDED_PLANE, weights_only=True)
        del contents["A"]
        torch.save(contents, here / "halved.pt")
    before = sorted(here.rglob("*"))
    if arguments.startswith("many"):
        monkeypatch.setattr(figures, "MOST_PIXELS", 20_000)
    if "--checkpoint" not in arguments:
        arguments += " --checkpoint runs/guided-plane"
    status, _, errors = run("guided", *arguments.split())
    assert status == 2 and errors[-1].startswith(f"error: {message}")
    assert len(errors) == 1 + arguments.startswith("ruined") and sorted(here.rglob("*")) == before


def test_a_folder_that_cannot_be_listed_is_no_fault_of_out(run, here, monkeypatch):
    def listdir(folder):
        raise PermissionError(errno.EACCES, "Permission denied", folder)

    (here / "closed").mkdir()
    monkeypatch.setattr(os, "listdir", listdir)
    message = "error: closed cannot be listed: Permission denied; give another folder"
    assert run(*GUIDED.replace("photo.png", "closed").split()) == (2, [], [message])


def test_training_with_q_finds_place_and_latent_of_generated_patches(tmp_path):
    """200 steps on toy faces; of four seeds, L_Q came to 0.17 to 0.29, A's error to 0.17 to 0.31 of chance,
    and the distance of patches to 0.45 to 0.61 of that between two latents'.
    """
    images = torch.tensor(np.array(load_images("toy:faces", 16, 16, toy_count=512, cache=tmp_path)))
    form = dict(height=16, width=16, S=4, z_dim=4, guided=True, precision="fp32", average=0.99)
    state = new_state(Config(**coco_gan.CPU | form), torch.device("cpu"))
    for _ in range(200):
        numbers = torch.arange(len(images))
        coco_gan.train_step(
            state, coco_gan.draw_batch(state.config, images, numbers, state.rng, state.device)
        )
    path = save_checkpoint(state, tmp_path, "images", keep=1)
    G = coco_gan.load(path)
    D, A, Q = figures.load_judge(path, G)

    z, places = latents(range(256), 4), torch.cartesian_prod(torch.arange(3), torch.arange(3)).repeat(29, 1)
    at = places[:256].float()
    s_macro = figures.macro_patches(G, z, at)
    h = figures.feature(D, s_macro)
    found, places = Q(h), figures.positions_of(A(h), state.config)
    assert 0.45 < z.abs().mean() < 0.55  # what Q errs by if it only says 0
    assert (z - found).abs().mean() < 0.35
    chance = (at - at.mean(0)).square().sum(1).mean()  # what A errs by if it always says the mean
    assert (at - places).square().sum(1).mean() < 0.5 * chance
    again, other = figures.macro_patches(G, found, places), figures.macro_patches(G, z.roll(1, 0), at)
    assert rms(again, s_macro).mean() < 0.65 * rms(other, s_macro).mean()


# ----------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["interpolate", "coordinates", "mix"])
def test_figures_lie_beside_the_newest_checkpoint_and_are_the_same_again(run, here, command):
    names = [here / f"runs/plane/{command}{end}.png" for end in ("", "-2")]
    for name in names:
        assert run(command) == (0, [str(name.relative_to(here))], [])
    assert names[0].read_bytes() == names[1].read_bytes()
    assert run(command, "--panorama") == (0, [f"runs/cylinder/{command}.png"], [])
    with Image.open(names[0]) as first, Image.open(here / f"runs/cylinder/{command}.png") as other:
        assert np.array(first).shape != np.array(other).shape or command == "coordinates"


def test_the_newest_checkpoint_is_named(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    for more, told in (
        ([], "from runs/plane/checkpoint-000000000.pt\n"),
        (["--checkpoint", "runs/plane"], ""),
    ):
        assert figures.main(["coordinates", "--device", "cpu", *more]) == 0
        assert capsys.readouterr().err == told


@pytest.mark.parametrize("command", ["interpolate", "coordinates", "mix"])
def test_flags_reach_the_picture(draw, command):
    picture = draw(command)
    assert np.array_equal(picture, draw(f"{command} --seed {'1' if command == 'coordinates' else '1,2'}"))
    for flag in ("--raw", "--seed 3,4", "--seed 2-3"):
        other = draw(f"{command} {flag}")
        assert other.shape != picture.shape or not np.array_equal(other, picture)


@pytest.mark.parametrize("ending, kind", [("jpg", "JPEG"), ("WEBP", "WEBP"), ("png", "PNG")])
def test_the_name_tells_the_kind_and_force_replaces(run, tmp_path, ending, kind):
    out = tmp_path / "new" / f"a.{ending}"
    for arguments in ((), ("--force",)):
        assert run("mix", "--out", out, *arguments) == (0, [str(out)], [])
        with Image.open(out) as picture:
            assert (picture.format, picture.size) == (kind, (32, 4 * 26 - 2))


def test_without_a_run_it_is_the_shipped_model_and_runs_keeps_the_figure(run, tmp_path, here, monkeypatch):
    assets = tmp_path / "assets"
    assets.mkdir()
    shutil.copy(next((here / "runs/plane").glob("*.pt")), assets / "toy_faces.pt")
    monkeypatch.setattr(coco_gan, "ASSETS", assets)
    monkeypatch.chdir(tmp_path)
    status, out, (told,) = run("mix")
    assert told.endswith("this is toy_faces.pt, which comes with the program")
    assert (status, out) == (0, ["runs/mix.png"]) and (tmp_path / "runs/mix.png").exists()


PLANE, NARROW = "runs/plane/checkpoint-000000000.pt", "runs/narrow/checkpoint-000000000.pt"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("interpolate --seed 4", "--seed 4 is one seed, and interpolate needs 2 or more, like 1,2"),
        ("mix --seed 4", "--seed 4 is one seed, and mix needs 2 or more, like 1,2"),
        ("interpolate --seed 4,", "--seed 4, is no list of seeds; give one like 0,1,4-6"),
        ("coordinates --seed -1", "--seed -1 is no list of seeds; give one like 0,1,4-6"),
        ("interpolate --steps 1", "--steps 1 is out of range; give 2 to 1000"),
        ("coordinates --steps 1001", "--steps 1001 is out of range; give 2 to 1000"),
        ("coordinates --steps many", "argument --steps: invalid int value: 'many'"),
        ("mix --steps 8", "--steps is unknown, did you mean --seed?"),
        (
            "interpolate --seed 1-88 --steps 1000",
            "--steps 1000 --seed 1-88 makes 67584000 pixels; give fewer",
        ),
        (
            "coordinates --seed 1,2 --steps 1000",
            "--steps 1000 --seed 1,2 makes 128256128 pixels; give fewer, for at most 67108864",
        ),
        ("mix --seed 1-30000", "--seed 1-30000 makes 92160000 pixels; give fewer, for at most 67108864"),
        ("interpolate --patches --at 3,0", "--at 3,0 is outside of the image; give 0 to 2 and 0 to 3"),
        ("coordinates --at 0,4", "--at 0,4 is outside of the image; give 0 to 2 and 0 to 3"),
        ("coordinates --at=-1,0", "--at -1,0 is no place; give row,column of a micro patch, like 2,0"),
        ("coordinates --at 1", "--at 1 is no place; give row,column of a micro patch, like 2,0"),
        ("interpolate --at 1,1", "--at 1,1 is the place of a micro patch; add --patches, or leave it out"),
        ("mix --border 0", "--border 0 is out of range; give 1 to 3 micro patches"),
        ("mix --border 4", "--border 4 is out of range; give 1 to 3 micro patches"),
        ("mix --panorama --border 5", "--border 5 is out of range; give 2 to 4 micro patches"),
        ("mix --border half", "argument --border: invalid int value: 'half'"),
        ("mix --blend 0", "--blend 0 is out of range; give 1 to 4 micro patches"),
        ("mix --blend 5", "--blend 5 is out of range; give 1 to 4 micro patches"),
        (
            "mix --checkpoint runs/narrow",
            f"--checkpoint {NARROW} is 1 micro patches wide, on a plane; mix needs 2 there, give another",
        ),
        ("mix --checkpoint none", "--checkpoint none does not exist; give a checkpoint file or a run folder"),
        (
            "mix --panorama --checkpoint runs/plane",
            f"--panorama needs a cylinder, and {PLANE} is on a plane; leave out --panorama",
        ),
        ("interpolate --gif a.png", "--gif a.png has no known ending; give .gif, .webp"),
        ("mix --gif a.gif", "--gif is unknown"),
        ("mix --out a.txt", "--out a.txt has no known ending; give .png, .jpg"),
        ("mix --out runs", "--out runs has no known ending; give .png, .jpg"),
        ("interpolate --out a.png --gif a.gif", "argument --gif: not allowed with argument --out"),
        ("mix --out taken.png", "--out taken.png exists already; name another, or add --force to replace it"),
        (
            "interpolate --gif taken.gif",
            "--gif taken.gif exists already; name another, or add --force to replace it",
        ),
        ("mix --out taken.png/a.png", "--out taken.png/a.png cannot be written: "),
        (
            "interpolate --patches --steps 1000 --seed 1,2 --out a.webp --checkpoint runs/large",
            "--out a.webp would be 17998 x 16 pixels, and .webp holds 16383 a side; give another ending, or",
        ),
        ("mix --device abacus", "--device abacus is unknown; give auto, cpu"),
        ("mix --colour", "--colour is unknown"),
        ("guess", "argument command: invalid choice: 'guess'"),
    ],
)
def test_mistakes_end_in_one_line(run, here, arguments, message):
    for name in ("taken.png", "taken.gif"):
        (here / name).touch()
    before = sorted(here.rglob("*"))
    status, out, (error,) = run(*arguments.split())
    assert (status, out) == (2, []) and error.startswith(f"error: {message}")
    assert sorted(here.rglob("*")) == before and not (here / "taken.png").stat().st_size


@pytest.mark.parametrize("arguments", ["--out full.png", "--gif full.gif"])
def test_full_disk_is_one_line_and_leaves_nothing(run, here, monkeypatch, arguments):
    def save(image, file, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    message = f"error: {arguments} cannot be written: No space left on device; name another place"
    assert run("interpolate", *arguments.split()) == (2, [], [message])
    assert not list(here.glob("*full*"))


@pytest.mark.parametrize("command", ["interpolate", "coordinates", "mix", GUIDED])
def test_full_memory_is_one_line_and_an_interruption_none(run, monkeypatch, command):
    def raising(error):
        def forward(*_):
            raise error

        return forward

    monkeypatch.setattr(coco_gan.Generator, "forward", raising(torch.OutOfMemoryError("out of memory")))
    assert run(*command.split()) == (2, [], ["error: memory of cpu is full; try a smaller figure"])
    monkeypatch.setattr(coco_gan.Generator, "forward", raising(KeyboardInterrupt()))
    assert run(*command.split()) == (130, [], [])
