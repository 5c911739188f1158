"""Tests of locogan.py, in its order: python -m pytest related/test_locogan.py"""

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.conftest import one_thread  # noqa: F401

# isort: split
import coco_gan
from related import locogan
from related.locogan import PRESETS, Config, Generator, LocoGAN, noise_image, positions, render, view

CPU = torch.device("cpu")
# Nothing is square or equal, so that rows and columns that are mixed up show.
UNEVEN = dict(height=32, width=40, L=2, master=3, width_g=4, width_d=2, mix=1, batch_size=4, precision="fp32")
SIZE = torch.tensor([32, 40])


def uneven(**fields):
    return Config(**UNEVEN | fields).check()


def generator(config):
    """G in evaluation mode, with weights so large that each pixel depends on all cells that it can."""
    torch.manual_seed(1)
    G = Generator(config).eval().requires_grad_(False)
    for p in G.parameters():
        p.copy_(0.5 + 0.1 * torch.randn_like(p) if p.dim() == 1 else torch.randn_like(p) / len(p) ** 0.5 / 2)
    return G


def where(start, step):
    return torch.tensor([start]), torch.tensor([step])


def near(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_positions_known_answers():
    found = positions(Config(), *where([0.0, 0.5], [1 / 8, 1 / 8]), 4, 3, border=2)  # cells of 16 px
    rows = torch.tensor([-1.375, -1.125, -0.875, -0.625, -0.375, -0.125, 0.125, 0.375])
    columns = torch.tensor([-0.375, -0.125, 0.125, 0.375, 0.625, 0.875, 1.125])
    assert torch.equal(found, torch.stack([rows[:, None].expand(8, 7), columns.expand(8, 7)])[None])  # (y, x)
    pixels = positions(Config(), *where([0.0, 0.0], [1 / 128, 1 / 128]), 64, 64)
    assert pixels[0, :, 0, 0].tolist() == [-0.9921875, -0.9921875]
    for topology, channels in (("cylinder", 3), ("torus", 4)):
        found = positions(uneven(topology=topology), *where([0.0, 0.0], [1 / 4, 1 / 4]), 3, 8)
        assert found.shape == (1, channels, 3, 8)
        near(found[0, -2:].square().sum(0), torch.ones(3, 8))
        near(found[..., :4], found[..., 4:])  # p and p + 1
        near(found[0, -2:, 0, 0], torch.tensor([0.5, 0.5]).sqrt())  # θ = 45°


def test_parameter_counts():
    for fields, known in (({}, 11_376_483), (PRESETS["ffhq128-released"], 2_921_347)):
        assert sum(p.numel() for p in Generator(Config(**fields)).parameters()) == known
    D = locogan.discriminator(Config())
    assert sum(p.numel() for p in D.parameters()) == 2_766_785
    assert [hasattr(layer, "v") for layer in D if isinstance(layer, torch.nn.Conv2d)] == [True] * 4 + [False]
    with torch.device("meta"):
        for preset in PRESETS.values():
            LocoGAN(Config(**preset).check(), torch.device("meta"))


@pytest.mark.parametrize("L, sides", [(4, [12, 20, 36, 68, 65]), (3, [12, 20, 36, 33]), (2, [12, 20, 17])])
def test_sides_and_reach(L, sides):
    """8 cells become these sides; cell i changes the pixels u(i-1) … u(i+2), and no others."""
    G, u, seen, at = generator(Config(L=L, width_g=4)), 2**L, [], where([0.0, 0.0], [0.1, 0.1])
    for conv in [*G.convs, G.last]:
        conv.register_forward_hook(lambda conv, x, y: seen.append(y.shape[2]))
    assert G(torch.randn(1, 18, 8, 8), *at).shape == (1, 3, 4 * u, 4 * u) and seen == sides
    noise = torch.randn(1, 18, 12, 11)
    before = G(noise, *at)
    noise[:, :, 2 + 4, 2 + 3] += 1  # cell (4, 3)
    changed = (G(noise, *at) != before).any(dim=1)[0]
    assert changed.any(dim=1).nonzero().flatten().tolist() == list(range(3 * u, 6 * u + 1))
    assert changed.any(dim=0).nonzero().flatten().tolist() == list(range(2 * u, 5 * u + 1))


@pytest.mark.parametrize("topology", coco_gan.TOPOLOGIES)
def test_crops_of_a_noise_image_equal_the_whole(topology):
    config = uneven(topology=topology)
    G, u, here = generator(config), config.u, view(config)
    noise = noise_image(config, 5, here)
    full = G(noise, *where(*here[1:3]))
    part = G(noise[:, :, 3:11, 4:12], *where([3 / 8, 4 / 10], [1 / 8, 1 / 10]))
    near(part, full[:, :, 3 * u : 7 * u, 4 * u : 8 * u])
    here = view(config, (520, 1032))  # so many pixels that they are made in bands
    noise = noise_image(config, 5, here)
    near(render(G, noise, here), G(noise, *where(*here[1:3])))


def batch_of(config, images, rng):
    return locogan.draw_batch(config, images, torch.arange(len(images)), rng, CPU)


def batches(config, shape=(32, 40), times=200):
    """Of a store whose pixels are their coordinates: first and last pixel of crops, by x and by position."""
    y, x = np.meshgrid(*map(np.arange, shape), indexing="ij")
    images = torch.from_numpy(np.stack([y, x, 0 * x], -1).astype(np.uint8)[None])
    rng = torch.Generator().manual_seed(0)
    drawn = [batch_of(config, images, rng) for _ in range(times)]
    x, noise, start, step = (torch.cat(some) for some in zip(*drawn))
    assert x.shape[1:] == (3, 16, 16) and noise.shape[1:] == (5, 8, 8)
    x = ((x + 1) * 127.5)[:, :2]
    return x[:, :, 0, 0], x[:, :, -1, -1], start * SIZE, (start + 4 * step) * SIZE - 1, noise


@pytest.mark.parametrize("topology", coco_gan.TOPOLOGIES)
def test_real_crops_and_positions_agree(topology):
    config = uneven(topology=topology)
    first, last, start, end, noise = batches(config)
    near(first, start)
    near(last, end.round() % SIZE)  # crops wrap on closed axes
    most = [full - 1 if closed else full - 16 for full, closed in zip((32, 40), config.closed)]
    assert start.round().amin(0).tolist() == [0, 0] and start.round().amax(0).tolist() == most
    master, local = noise[:, :3], noise[:, 3:]
    assert torch.equal(master, master[:, :, :1, :1].expand_as(master))  # one number for all cells
    assert len(master[:, 0, 0, 0].unique()) == len(first) and len(local.unique()) > 0.99 * local.numel()


def test_options_of_batches():
    assert set(batches(uneven(every_px=8))[0].round().flatten().tolist()) == {0, 8, 16, 24}
    first, last, start, end, _ = batches(uneven(zoom=0.5))
    assert (first - start).abs().max() < 1 and (last - end).abs().max() < 1  # pixels: bilinear
    assert (end - start).min() < 9 and ((end - start).round() == 15).float().mean() > 0.3
    first, _, start, end, _ = batches(uneven(mixed=True))
    width = 16 * 40 / (end - start + 1)[:, 1]  # of the image, which is the middle of the stored one
    near(first[:, 1], start[:, 1] / 40 * width + (40 - width.round()) // 2)
    assert width.min().round() == 32 and width.max().round() == 40
    # A crop from anywhere in a texture, without wrapping, has any position in the period.
    first, last, start, *_ = batches(uneven(topology="torus", data="texture.png"), shape=(48, 60), times=400)
    near(last, first + 15)
    assert first.round().amax(0).tolist() == [32, 44] and start.round().amax(0).tolist() == [31, 39]
    assert torch.corrcoef(torch.cat([first, start], 1).T)[:2, 2:].abs().max() < 0.1


def test_which_parameters_each_step_changes_and_at_which_rates(monkeypatch):
    gan, changes, rates = LocoGAN(uneven(lr_g=4e-3, lr_d=8e-3, slow=1), CPU), [], []

    def spy(optimizer, loss):
        before = {name: p.clone() for name, p in gan.named_parameters()}
        rates.append(optimizer.param_groups[0]["lr"])
        coco_gan.update(optimizer, loss)
        changes.append({name for name, p in gan.named_parameters() if not torch.equal(p, before[name])})

    monkeypatch.setattr(locogan, "update", spy)
    before = {name: t.clone() for name, t in gan.state_dict().items()}
    images = torch.randint(0, 256, (3, 32, 40, 3), dtype=torch.uint8)
    locogan.train_step(gan, *batch_of(gan.config, images, gan.rng), torch.tensor(0.5))
    assert changes == [{f"{net}.{name}" for name, _ in getattr(gan, net).named_parameters()} for net in "DG"]
    after = gan.state_dict()
    assert not any(torch.equal(t, before[name]) for name, t in after.items() if name.endswith(".v"))
    for name in gan.G_ema.state_dict():  # of G as it made s: half of the new statistics, and the old weights
        if name.endswith("running_mean"):
            near(after[f"G_ema.{name}"], after[f"G.{name}"] / 2)
        elif not name.endswith("running_var"):
            assert torch.equal(after[f"G_ema.{name}"], before[f"G.{name}"])
    gan.step = 1
    locogan.train_step(gan, *batch_of(gan.config, images, gan.rng), torch.tensor(0.5))
    assert rates == [8e-3, 4e-3, 2e-3, 1e-3]  # of D and G


def test_losses_known_answers():
    gan = LocoGAN(uneven(lr_d=0.0), CPU)
    torch.nn.init.zeros_(gan.D[-2].weight)  # all scores are the bias
    batch = batch_of(gan.config, torch.zeros(1, 32, 40, 3, dtype=torch.uint8), gan.rng)
    for bias in (0.0, 2.0):
        gan.D[-2].bias.data.fill_(bias)
        real, generated, p = np.log1p(np.exp(-bias)), np.log1p(np.exp(bias)), 1 / (1 + np.exp(-bias))
        losses = locogan.train_step(gan, *batch, torch.tensor(0.0)).tolist()
        assert losses == pytest.approx([(real + generated) / 2, real, p, p])


def test_periodic_pictures_repeat_to_the_bit():
    config = uneven(topology="torus")
    G, here = generator(config), view(config, periodic=(True, True), turns=3)
    picture = render(G, noise_image(config, 5, here), here)
    assert torch.equal(picture, picture[:, :, :32, :40].tile(3, 3))
    cells = tuple(np.arange(-2, 3 * n + 2) % n for n in (8, 10))  # turns made at once join, too
    near(picture, G(noise_image(config, 5, (cells,)), *where([0.0, 0.0], [1 / 8, 1 / 10])))
    here = view(config, periodic=(True, False), turns=2)  # almost periodic in x
    picture = render(G, noise_image(config, 5, here), here)
    assert torch.equal(picture[:, :, :32], picture[:, :, 32:])
    assert (picture[..., :40] - picture[..., 40:]).abs().mean() > 1e-3


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """draw(flags): the pictures of `sample`, as a list."""
    monkeypatch.chdir(tmp_path)
    gan = LocoGAN(uneven(), CPU)
    gan.G_ema.load_state_dict(generator(gan.config).state_dict())
    coco_gan.save_checkpoint(gan, tmp_path / "checkpoint-1.pt", "")

    def draw(flags):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert locogan.main(["sample", "--checkpoint", ".", "--out", f"{out}/", *flags.split()]) == 0
        return [np.asarray(Image.open(file)).astype(int) for file in sorted(out.glob("*.png"))]

    return draw


def test_sample(draw):
    A, B = draw("--seed 3 4")
    assert A.shape == (32, 40, 3) and np.array_equal(draw("--seed 2 --count 3")[2], B)
    a, mixed, b = draw("--transplant 3,4 --at 2,3,3,4")
    changed = (mixed != A).any(axis=2)
    assert np.array_equal(a, A) and np.array_equal(b, B)
    assert changed[4:25, 8:33].mean() > 0.5 and changed.sum() == changed[4:25, 8:33].sum()
    _, right, lower, _ = draw("--mix 3,4")
    assert np.array_equal(right[:, :16], A[:, :16]) and np.array_equal(right[:, 25:], B[:, 25:])
    assert np.array_equal(lower[:12], A[:12]) and np.array_equal(lower[21:], B[21:])
    first, middle, last = draw("--interpolate 3,4 --to 48x24 --count 3")
    assert np.array_equal(first, A) and middle.shape == (40, 32, 3)
    assert np.array_equal(last, draw("--seed 4 --count 1 --size 48x24")[0])
    assert draw("--seed 3 --count 1 --size 49x33")[0].shape == (49, 33, 3)
    assert abs(draw("--seed 3 --count 1 --size 48x56 --extend")[0][8:40, 8:48] - A).max() <= 1


TINY = "--height 32 --width 40 --L 2 --width-g 4 --width-d 2 --batch-size 4 --precision fp32 --cache cache"


@pytest.mark.parametrize("data, topology", [("photos", "plane"), ("photos/0.png", "torus")])
def test_resume_is_bit_identical(tmp_path, monkeypatch, data, topology):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for n in range(3):
        pixels = np.random.default_rng(n).integers(0, 256, (50, 70, 3), np.uint8)
        Image.fromarray(pixels).save(f"photos/{n}.png")
    for flags in ("--run a --steps 4", "--run b --steps 2", "--resume b --steps 4"):
        assert locogan.main(f"train {flags} --data {data} --topology {topology} {TINY}".split()) == 0
    a, b = (torch.load(f"{run}/checkpoint-000000004.pt") for run in "ab")
    assert torch.equal(a["rng"], b["rng"])
    assert all(torch.equal(t, b["tensors"][name]) for name, t in a["tensors"].items())


def test_mistakes_are_one_line(draw, capsys):
    for flags, says in (
        ("train --height 36 --L 3", "--height 36"),
        ("train --topology torus --width 24 --height 32 --L 2", "--width 24"),
        ("sample --checkpoint . --size 3", "HEIGHTxWIDTH"),
        ("sample --checkpoint . --periodic x", "--periodic x"),
        ("sample --checkpoint . --transplant 1,2 --at 6,0,3,1", "--at"),
    ):
        assert locogan.main(flags.split()) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and says in error
