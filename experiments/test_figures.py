"""Test experiments/figures.py on small untrained networks: python -m pytest experiments/test_figures.py"""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.func import functional_call

import coco_gan as core
from coco_gan import COCOGAN, Config, full_image, grid, latents, micro_patches, spectral_norm, to_uint8
from experiments import figures

S, H, WIDTHS = 8, 24, {"plane": 32, "cylinder": 48, "torus": 48}  # 3 x 4 and 3 x 6 micro patches
h, w, TOYS = 2 * S, 3 * S, core.ASSETS / "toy_faces.pt"  # h, w: of a macro patch


def new_model(topology="plane"):
    form = dict(height=H, width=WIDTHS[topology], N=2, M=3, S=S, z_dim=5, width_g=2, width_d=2, guided=True)
    gan = COCOGAN(Config(**form, topology=topology), torch.device("cpu"))
    gan.G_ema.conv.weight *= 1e-4  # untrained, G gives hardly anything but black and white
    gan.G_ema.conv.weight *= 0.5 / full_image(gan.G_ema, latents(range(9), 5)).std()
    return gan


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Run a command on an untrained model: (lines of its output, its bare picture or None).

    What would be written above and beside the picture is in run.captions, and its zoom.
    """
    monkeypatch.chdir(tmp_path)
    captions = []

    def caption(picture, zoom, above=(), beside=()):
        captions.append((zoom, [*above], [*beside]))
        return picture

    monkeypatch.setattr(figures, "caption", caption)

    def run(line, topology="plane"):
        core.save_checkpoint(new_model(topology), tmp_path / f"{topology}.pt", "images")
        command, *rest = line.split()
        status = figures.main([command, "--checkpoint", f"{topology}.pt", "--device", "cpu", *rest])
        out, err = capsys.readouterr()
        assert status == (2 if "error: " in err else 0)
        picture = tmp_path / f"{topology}-{command}.png"
        return (out + err).splitlines(), np.array(Image.open(picture)) if picture.exists() else None

    run.captions = captions
    return run


def drawn(G, z):
    """What `sample` draws of each latent alone: (n, H, W, 3) uint8."""
    return to_uint8(torch.cat([full_image(G, one) for one in z.split(1)]))


def near(a, b):  # float32 rounds differently in batches of different sizes
    return np.shape(a) == np.shape(b) and np.abs(np.subtract(a, b, dtype=float)).max() <= 1


def test_slerp_turns_and_lengthens_evenly():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])
    path = torch.tensor([[2, 0], [5 / 3 * 0.75**0.5, 5 / 6], [1.5 * 0.5**0.5] * 2, [0, 1]])
    torch.testing.assert_close(figures.slerp(a, b, torch.tensor([0, 1 / 3, 0.5, 1])), path)
    a, b = latents([1, 2])
    assert torch.equal(figures.slerp(a, b, torch.tensor([0, 1])), torch.stack([a, b]))
    for end in (a, -a):  # no arc
        torch.testing.assert_close(figures.slerp(a, end, torch.tensor([0.25]))[0], a.lerp(end, 0.25))


def test_positions_and_weights():
    assert figures.positions(4, 7, closed=False).tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert figures.positions(6, 4, closed=True).tolist() == [0, 1.5, 3, 4.5]
    assert figures.blend_weights(8, closed=False).tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert figures.blend_weights(6, closed=True).tolist() == [0.5, 0, 0, 0.5, 1, 1, 0.5]
    for config in (new_model(topology).config for topology in WIDTHS):
        at = torch.tensor([(0, 0), (0.3, 0.75), (1, 1)])
        torch.testing.assert_close(figures.positions_of(core.macro_coordinates(config, *at.T), config), at)


def test_frames_stay_in_the_image_or_wrap_around():
    images = figures.frame(np.zeros((2, 6, 7, 3), np.uint8), (0, 4), (3, 3), (9, 0, 9), (False, True))
    expected = "#..#### #..#... #..#... #..#### ....... .......".split()
    line = np.array([[letter == "#" for letter in row] for row in expected])
    assert np.array_equal(images, np.broadcast_to(line[..., None] * np.array([9, 0, 9]), images.shape))


def test_captions_stand_above_and_beside_the_enlarged_picture():
    picture = np.random.default_rng(0).integers(0, 200, (20, 30, 3), np.uint8)
    drawn = figures.caption(picture, 3, [(4, "a")], [(7, "b")])
    (top, left), bare = (size - 3 * side for size, side in zip(drawn.shape, (20, 30))), drawn[-60:, -90:]
    assert np.array_equal(bare, picture.repeat(3, axis=0).repeat(3, axis=1)) and top > 0 and left > 0
    (y, x), (y_beside, x_beside) = (
        (part < 128).any(axis=2).nonzero() for part in (drawn[:top], drawn[:, :left])
    )
    assert left + 12 <= x.min() and x.max() < left + 24 and top + 21 <= y_beside.min() < top + 36
    assert np.array_equal(figures.caption(picture, 1), picture)
    long = figures.caption(picture, 1, [(25, "as long as it takes")])
    assert long.shape[1] > 100 and (long[:, -20:] < 128).any()  # it is not cut off


def test_captions_say_which_is_which(run):
    beside = [(0, "full image"), (H + 8, "macro patch"), (H + h + 16, "micro patch")]
    mixed = [(0, "A"), (H + 2, "A beside B"), (2 * H + 4, "A into B"), (3 * H + 6, "B")]
    for line, *expected in (
        ("patches --seed 7 --count 2", [(0, "seed 7"), (40, "seed 8")], beside),
        ("interpolate --seed 5 2 9 --at 0 0", [], [(0, "seeds 5 to 2"), (S + 2, "seeds 2 to 9")]),
        ("interpolate --seed 5 2 9", [(0, "seeds 5 to 2"), (34, "seeds 2 to 9")], []),  # in columns
        ("mix --seed 3 8", [(0, "seeds 3, 8")], mixed),
    ):
        run(f"{line} --zoom 1")
        assert run.captions.pop() == (1, *expected)
    run("coordinates --seed 6 4 --steps 6 --at 2 3")
    (zoom, above, beside), (_, again, _) = run.captions
    assert zoom == 128 // H and "seed 6, in row 2" in above[0][1] and "seed 4, in row 2" in again[0][1]
    assert above[0][0] == beside[0][0] == S + 8 and beside[0][1] == "in column 3"


def test_patches_are_cut_out_of_their_images(run):
    _, picture = run("patches --seed 7 --count 4")
    images = drawn(new_model().G_ema, latents([7, 8, 9, 10], 5))
    for b, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        column, macro = picture[:, 40 * b :][:, :32], images[b, i * S :, j * S :][:h, :w]
        assert near(column[:H], images[b]) and near(column[H + 8 :][:h, :w], macro)
        assert near(column[-S:, :S], macro[:S, :S])


@pytest.mark.parametrize("topology", WIDTHS)
def test_interpolation_goes_from_image_to_image(topology, run, monkeypatch):
    G, z, loop = new_model(topology).G_ema, latents([5, 2, 9], 5), []
    monkeypatch.setattr(figures, "save_animation", lambda pictures, path: loop.extend(pictures))
    weights = torch.linspace(0, 1, 5, dtype=torch.float64)
    path = [drawn(G, figures.slerp(a, b, weights)) for a, b in zip(z, z.roll(-1, 0))]  # (3, 5, H, W, 3)
    assert np.array_equal([images[0] for images in path], drawn(G, z))
    _, picture = run("interpolate --seed 5 2 9 --steps 5", topology)
    columns = [images[k] for k in range(5) for images in path[:2]]  # wider than high: a column a pair
    assert np.array_equal(picture, grid(np.array(columns), 2))
    _, strip = run("interpolate --seed 5 2 --steps 5 --at 2 1", topology)
    assert near(strip, grid(path[0][:, 2 * S :, S : 2 * S], 5))
    run("interpolate --seed 5 2 9 --steps 5 --gif a.gif", topology)
    assert np.array_equal(loop, [image for images in path for image in images[:4]])


@pytest.mark.parametrize("topology", WIDTHS)
def test_coordinates_at_and_between_the_trained_ones(topology, run):
    G, z = new_model(topology).G_ema, latents([6], 5)
    y, x = (figures.positions(n, 6, closed) for n, closed in zip((3, G.config.K), G.config.closed))
    _, picture = run("coordinates --seed 6 --steps 6 --at 2 3", topology)
    for part, rows, columns in (
        (picture[S + 8 :, S + 8 :], y, x),
        (picture[:S, S + 8 :], torch.tensor([2.0]), x),
        (picture[S + 8 :, :S], y, torch.tensor([3.0])),
    ):
        i, j = (t.flatten() for t in torch.meshgrid(rows, columns, indexing="ij"))
        assert near(part, grid(to_uint8(micro_patches(G, z.expand(len(i), -1), i, j)), len(columns)))
    for position, line in ((x, picture[S + 3, S + 8 :]), (y, picture[S + 8 :, S + 3])):
        marks = [line[k * (S + 2) :][:S].any() for k in range(6)]  # black beside trained positions
        assert marks == (position % 1 != 0).tolist()


@pytest.mark.parametrize("topology", WIDTHS)
def test_mix_is_a_on_the_left_and_b_on_the_right(topology, run):
    G, z, K = new_model(topology).G_ema, latents([3, 8], 5), WIDTHS[topology] // S
    first, hard, blend, last = (run("mix --seed 3 8", topology)[1][k * (H + 2) :][:H] for k in range(4))
    a, b = drawn(G, z)
    half = np.arange(K * S)[:, None] < K // 2 * S
    assert np.array_equal([first, hard, last], [a, np.where(half, a, b), b]) and not near(a, b)
    edges = drawn(G, figures.slerp(*z, figures.blend_weights(K, G.config.closed[1])))
    for x in range(K * S):
        j, part = x // S, (x % S + 0.5) / S
        assert near(blend[:, x], (1 - part) * edges[j][:, x] + part * edges[j + 1][:, x])


def test_heads_predict_as_in_training_on_generated_patches(tmp_path):
    gan = new_model("torus")
    core.save_checkpoint(gan, tmp_path / "a.pt", "images")
    D, *heads = figures.load_heads(tmp_path / "a.pt", gan.G_ema)
    rng = torch.Generator().manual_seed(0)  # the patches that the batch norms have seen
    z, at = core.sample_latents(128, 5, rng), core.sample_positions(gan.config, rng)
    inputs = figures.macro_patches(gan.G_ema, z, torch.stack(at, dim=1) / S), torch.zeros(128, 4)
    _, h = D(*inputs)
    torch.testing.assert_close(h, functional_call(gan.D, spectral_norm(gan.D, iterate=False), inputs)[1])
    for head, net in zip(heads, (gan.A, gan.Q)):
        expected = functional_call(net, spectral_norm(net, iterate=False), (h,))  # with the statistics of h
        torch.testing.assert_close(head(h), expected, atol=0.01, rtol=0)


def test_refinement_lowers_the_error_and_stays_inside():
    G, z, start = new_model().G_ema, *latents([1, 2], 5).split(1)
    x_macro, at = full_image(G, z)[..., S : S + h, :w], torch.tensor([[1.0, 0.0]])
    before = 127.5 * (full_image(G, start)[..., S : S + h, :w] - x_macro).square().mean().sqrt().item()
    best, first, least = figures.refine(G, start, x_macro, at, 60)
    assert first == pytest.approx(before) and least < 0.3 * first
    assert figures.refine(G, z.sign(), 2 * x_macro, at, 9)[0].abs().max() <= 1
    assert figures.refine(G, best, x_macro, at, 0)[1] == pytest.approx(least, abs=1e-3)
    assert figures.refine(G, z, x_macro, at, 3)[2] == pytest.approx(0, abs=1e-3)  # it keeps the best


def test_guided_draws_photographs_patches_and_full_images(run, tmp_path):
    (tmp_path / "photos").mkdir()
    photos = np.random.default_rng(0).integers(0, 255, (4, H, 32, 3), np.uint8)
    for number, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / f"photos/{number}.png")
    (tmp_path / "photos/1.png").write_text("no image")
    lines, picture = run("guided photos --count 3 --at 5 7")
    assert [name for _, name in run.captions[0][1]] == ["photograph", "its patch", "generated", "full image"]
    assert [x for x, _ in run.captions[0][1]] == [0, 38, 70, 102]
    assert len(picture) == 2 * H + 24 and "1.png" in lines[-1] and not any("3.png" in line for line in lines)
    row, red, blue = picture[-H:], figures.RED, figures.BLUE
    photo, x_macro, s_macro, full = row[:, :32], row[3:21, 38:64], row[3:21, 70:96], row[:, 102:]
    assert np.array_equal(x_macro[1:-1, 1:-1], photos[2][5:21, 7:31]) and (x_macro[[0, -1]] == red).all()
    D, A, Q = figures.load_heads(tmp_path / "plane.pt", G := new_model().G_ema)
    _, feature = D(
        torch.tensor(photos[2:, 5:21, 7:31]).permute(0, 3, 1, 2)[:1] / 127.5 - 1, torch.zeros(1, 2)
    )
    at = (S * figures.positions_of(A(feature), G.config)[0]).round().int().tolist()
    assert near(full, figures.frame(drawn(G, Q(feature))[0], at, (h, w), blue))
    line = (photo == blue).all(axis=2)
    assert np.array_equal(photo[~line], figures.frame(photos[2], (5, 7), (h, w), red)[~line])
    assert (s_macro[:, [0, -1]] == blue).all() and (full[line] == blue).all() and line.any()
    error = np.sqrt(np.square(s_macro[1:-1, 1:-1] - x_macro[1:-1, 1:-1].astype(float)).mean())
    assert float(lines[1].split()[-3]) == pytest.approx(error, abs=0.5)


def test_mistakes_are_one_line(run):
    for line, message in (
        ("interpolate --seed 4", "--seed 4 is one seed; interpolate takes two or more"),
        ("coordinates --steps 1", "--steps 1 is too few; give 2 or more"),
        ("coordinates --at 0 4", "--at 0 4 is outside of the image; give 0 to 2 and 0 to 3"),
        ("guided none.png", "none.png has no photograph that can be used: 'none.png': [Errno 2] No such"),
        (f"guided a.png --checkpoint {TOYS}", f"{TOYS} has no head Q; name a checkpoint of train --guided"),
        ("guided a.png --at 9 0", "--at 9 0 is outside of the image; give 0 to 8 and 0 to 8"),
    ):
        (error,), _ = run(line)
        assert error.startswith(f"error: {message}")
