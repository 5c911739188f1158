"""Test experiments/figures.py on small untrained generators: python -m pytest experiments/test_figures.py

What is expected is worked out here from G itself: G(z, c'') with z and c'' written out anew, in NumPy.
"""

import errno
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import coco_gan
from coco_gan import Config, full_image, latents, new_state, save_checkpoint, to_uint8
from experiments import figures

H, S, R = 24, 8, 3
WIDTHS = {"plane": 32, "cylinder": 48, "torus": 48}  # 4, 6 and 6 micro patches


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with runs on a torus, on a cylinder, and on planes, the newest of 3 x 4 micro patches."""
    here = tmp_path_factory.mktemp("figures")
    runs = {"torus": ("torus", H, 48, S), "cylinder": ("cylinder", H, 48, S)}
    runs |= {"narrow": ("plane", H, S, S), "broad": ("plane", H, 8 * S, S), "large": ("plane", 32, 32, 16)}
    for name, (topology, height, width, side) in (runs | {"plane": ("plane", H, 32, S)}).items():
        run = here / "runs" / name
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(dict(topology=topology)))
        form = dict(height=height, width=width, S=side, N=2, M=min(2, width // side), topology=topology)
        state = new_state(Config(**form, z_dim=5, width_g=2, width_d=2), torch.device("cpu"))
        weight = state.G_average.conv.weight
        weight *= 1e-4  # where tanh is linear; untrained, it gives hardly anything but black and white
        weight *= 0.5 / full_image(state.G_average.eval(), latents(range(9), 5)).std()
        save_checkpoint(state, run, "images", keep=1)
    return here


@pytest.fixture
def run(here, monkeypatch, capsys):
    """Run a command in `here`; returns the exit status, and the lines of its output and of its errors."""
    monkeypatch.chdir(here)

    def run(command, *arguments):
        status = figures.main([command, "--device", "cpu", *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

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


def cells(picture, height, width):
    """The pictures that a grid holds: (rows, columns, height, width, 3)."""
    rows, columns = (picture.shape[0] + 2) // (height + 2), (picture.shape[1] + 2) // (width + 2)
    assert picture.shape == (rows * (height + 2) - 2, columns * (width + 2) - 2, 3)
    starts = [[(r * (height + 2), c * (width + 2)) for c in range(columns)] for r in range(rows)]
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
    assert run("mix")[:2] == (0, ["runs/mix.png"]) and (tmp_path / "runs/mix.png").exists()


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
        ("mix --steps 8", "unrecognized arguments: --steps 8"),
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
        ("mix --gif a.gif", "unrecognized arguments: --gif a.gif"),
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
        ("mix --colour", "unrecognized arguments: --colour"),
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


@pytest.mark.parametrize("command", ["interpolate", "coordinates", "mix"])
def test_full_memory_is_one_line_and_an_interruption_none(run, monkeypatch, command):
    def raising(error):
        def forward(*_):
            raise error

        return forward

    monkeypatch.setattr(coco_gan.Generator, "forward", raising(torch.OutOfMemoryError("out of memory")))
    assert run(command) == (2, [], ["error: memory of cpu is full; try a smaller figure"])
    monkeypatch.setattr(coco_gan.Generator, "forward", raising(KeyboardInterrupt()))
    assert run(command) == (130, [], [])
