"""Test experiments/metrics.py against known answers, and experiments/evaluate.py on tiny runs."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import coco_gan
from experiments import evaluate, metrics


def noise(seed, n, H, W):
    """n images of independent uniform pixels, uint8 (n, H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (n, H, W, 3), dtype=np.uint8)


def flat(greys, size=17):
    """One image in one grey for each of the greys."""
    greys = np.round(greys).astype(np.uint8)
    return np.broadcast_to(greys[:, None, None, None], (len(greys), size, size, 3))


# ---- Metrics -----------------------------------------------------------------------------------------------


def test_blur_and_levels_of_a_point_by_hand():
    x = torch.zeros(1, 1, 32, 32)
    x[0, 0, 8, 8] = 1
    rows = torch.tensor([1.0, 4, 6, 4, 1])
    assert torch.equal(metrics.blur(x)[0, 0, 6:11, 6:11], torch.outer(rows, rows) / 256)
    # Along one axis the point becomes (1, 6, 1) / 16 in the half-size image. Back at full size an even pixel
    # weighs those by (1, 6, 1) / 8, which makes 38 / 128, and an odd one by (4, 4) / 8, which makes 28 / 128.
    finest, coarsest = metrics.laplacian_pyramid(x)
    assert finest[0, 0, 8, 8] == 1 - (38 / 128) ** 2 and finest[0, 0, 8, 9] == -(38 / 128) * (28 / 128)
    assert coarsest.shape == (1, 1, 16, 16)
    assert coarsest[0, 0, 3:6, 4].tolist() == [6 / 256, 36 / 256, 6 / 256]
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)  # reflected at the borders: 2 1 |0 1 2 and 5 6 |7| 6 5
    assert metrics.blur(ramp)[0, 0, 3].tolist() == [0.75, 1.125, 2, 3, 4, 5, 5.875, 6.25]


@pytest.mark.parametrize(
    "size, sides", [((64, 64), [64, 32, 16]), ((256, 768), [256, 128, 64, 32, 16]), ((36, 68), [36, 18])]
)
def test_levels_halve_down_to_16_pixels(size, sides):
    assert [level.shape[2] for level in metrics.laplacian_pyramid(torch.zeros(1, 3, *size))] == sides


def test_descriptors_are_normalized_patches_from_everywhere():
    images = np.empty((20, 19, 17, 3), dtype=np.uint8)
    images[..., 0] = 10 * np.arange(19)[:, None]  # y
    images[..., 1] = 10 * np.arange(17)  # x
    images[..., 2] = np.arange(20)[:, None, None]  # the index of the image
    cloud = metrics.descriptors(images, 0, torch.Generator().manual_seed(0), "cpu")
    assert cloud.shape == (20 * 128, 147)
    patches = cloud.view(20, 128, 3, 7, 7)
    torch.testing.assert_close(patches.mean(dim=(0, 1, 3, 4)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches.square().mean(dim=(0, 1, 3, 4)), torch.ones(3))
    y, x, index = patches.unbind(dim=2)
    for ramp, positions in ((y, 13), (x.mT, 11)):
        step = ramp[0, 0, 1, 0] - ramp[0, 0, 0, 0]
        expected = ramp[..., :1, :1] + step * torch.arange(7.0)[:, None]
        torch.testing.assert_close(ramp, expected.expand(20, 128, 7, 7), atol=1e-5, rtol=0)
        starts = ((ramp[..., 0, 0] - ramp[..., 0, 0].min()) / step).round()
        assert starts.unique().tolist() == list(range(positions))  # 7 pixels fit at the border, too
    assert (index == index[:, :1, :1, :1]).all() and len(index.unique()) == 20


def test_distance_of_known_distributions():
    """Grey images, black or white against uniform: normalized ±1 against uniform on ±√3.

    Their Wasserstein distance is the integral of |1 - √3 t| over t from 0 to 1. All 147 values of a patch are
    equal, so a direction scales it by |its sum|, of a unit vector in 147 dimensions on average √(2/π).
    """
    n = 600
    black_or_white, uniform = flat(255.0 * (np.arange(n) % 2)), flat(np.linspace(0, 255, n))
    ((_, distance),) = metrics.sliced_wasserstein(uniform, black_or_white).items()
    root = math.sqrt(3)
    integral = (1 / root - 0.5 / root) + (root / 2 - 1 + 0.5 / root)
    assert distance == pytest.approx(1000 * integral * math.sqrt(2 / math.pi), rel=0.08)


def test_the_floor_falls_with_the_count_and_what_differs_is_far():
    floors = []
    for n in (16, 128):
        (floor,) = metrics.sliced_wasserstein(noise(0, n, 16, 16), noise(1, n, 16, 16)).values()
        floors.append(floor)
    assert 0 < floors[1] < 0.5 * floors[0]
    smooth = np.repeat(np.repeat(noise(2, 128, 8, 8), 2, axis=1), 2, axis=2)
    (far,) = metrics.sliced_wasserstein(noise(0, 128, 16, 16), smooth).values()
    assert far > 2 * floors[1]
    with pytest.raises(evaluate.UserError, match="images of 15 x 16 pixels cannot be compared"):
        metrics.sliced_wasserstein(noise(0, 2, 15, 16), noise(0, 2, 15, 16))


def test_seams_azimuth_and_colours_have_their_known_answers():
    real = np.zeros((2, 8, 12, 3), np.uint8)
    real[:] = (np.arange(12) % 2)[:, None] * 10  # every step across is 10, none down
    images = real.copy()
    images[:, :, 4:8] = 10 - images[:, :, 4:8]  # steps across both borders between patches of 4 become 0
    assert metrics.seam_ratio(real, images, 4) == 0
    assert metrics.seam_ratio(real, real, 4, (False, True)) == 1
    assert metrics.column_seams(real, images, 4).tolist() == [0, 0, 1]  # the last: of right and left
    steps = np.broadcast_to((np.arange(12) // 4 * 10)[:, None], (2, 8, 12, 3)).astype(np.uint8)
    assert metrics.azimuth_variety(steps, 4) == pytest.approx(40 / 3)  # of 10, 10 and 20 around
    assert metrics.azimuth_variety(real, 4) == 0
    found = metrics.colours(
        np.stack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), (10, 20, 30), np.uint8)])
    )
    assert found["mean_red"] == 5 and found["mean_blue"] == 15 and found["deviation_green"] == 10


def test_frechet_and_kernel_distance_in_closed_form():
    rng = np.random.default_rng(0)
    d1, d2 = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 1.0])
    expected = 3 + sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in ((1, 4), (4, 4), (9, 1)))
    assert metrics.frechet_distance(np.zeros(3), d1, np.ones(3), d2) == pytest.approx(expected)
    x, y = rng.normal(size=(300, 5)), rng.normal(1, 2, size=(300, 5))
    linalg = pytest.importorskip("scipy.linalg")
    (mu1, s1), (mu2, s2) = metrics.feature_statistics(x), metrics.feature_statistics(y)
    np.testing.assert_allclose(s1, np.cov(x.T))
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * linalg.sqrtm(s1 @ s2).real)
    assert metrics.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected)
    mean, deviation = metrics.kernel_distance(x[:150], x[150:])
    assert abs(mean) < 2 * deviation < metrics.kernel_distance(x, y)[0]
    a, b = x[:4], y[:4]
    k = lambda p, q: (p @ q / 5 + 1) ** 3  # noqa: E731
    same = sum(k(p, q) for some in (a, b) for i, p in enumerate(some) for j, q in enumerate(some) if i != j)
    assert metrics.squared_mmd(a, b) == pytest.approx(
        same / 12 - 2 * np.mean([[k(p, q) for q in b] for p in a])
    )


# ---- The command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a cylinder of three checkpoints, with its cache beside it."""
    folder = tmp_path_factory.mktemp("evaluate")
    config = "--height 16 --width 32 --S 4 --z-dim 4 --width-g 2 --width-d 2 --batch-size 4 --steps 3"
    words = f"{config} --topology cylinder --holdout 40 --keep 3 --save-every 1 --device cpu".split()
    place = ["--run", str(folder / "run"), "--cache", str(folder / "cache")]
    assert coco_gan.main(["train", *words, *place]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("run")


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_every_checkpoint_is_scored_and_the_best_is_kept(run, capsys):
    assert evaluate.main(["run", "--count", "30", "--device", "cpu"]) == 0
    found = lines("run/evaluation.jsonl")
    assert [entry["step"] for entry in found] == [1, 2, 3]
    best = min(found, key=lambda entry: entry["swd"])
    assert coco_gan.read_checkpoint(run / "best.pt")[1]["step"] == best["step"]
    names = {"swd", "swd_16", "seam_ratio", "seam_ratio_ends", "azimuth_variety", "mean_red", "swd_floor"}
    assert all(names <= entry.keys() for entry in found) and found[0]["real_images"] == "held-out"
    out = capsys.readouterr().out
    assert "30 images of each checkpoint, and 30 of toy:faces that training did not see" in out
    assert evaluate.main(["run/best.pt", "--count", "30", "--device", "cpu", "--json", "one.jsonl"]) == 0
    assert lines("one.jsonl")[0]["swd"] == best["swd"]  # the same latents and real images every time


def test_following_ends_with_the_last_step(run, monkeypatch):
    kept = {path: path.read_bytes() for path in coco_gan.checkpoints(run)}
    *_, last = kept
    last.unlink()

    def wait(seconds):
        last.write_bytes(kept[last])

    monkeypatch.setattr(evaluate.time, "sleep", wait)
    assert evaluate.main(["run", "--follow", "--count", "8", "--device", "cpu"]) == 0
    assert [entry["step"] for entry in lines("run/evaluation.jsonl")] == [1, 2, 3]


class Colours(torch.nn.Module):
    def forward(self, x):
        return x.float().mean(dim=(2, 3))


def test_features_and_their_statistics(run, capsys):
    torch.jit.script(Colours()).save("colours.pt")
    base = ["run/checkpoint-000000003.pt", "--count", "30", "--device", "cpu", "--features", "colours.pt"]
    assert evaluate.main([*base, "--save-statistics", "real.npz", "--json", "a.jsonl"]) == 0
    assert evaluate.main([*base, "--statistics", "real.npz", "--json", "b.jsonl"]) == 0
    (a,), (b,) = lines("a.jsonl"), lines("b.jsonl")
    assert a["frechet_distance"] == b["frechet_distance"] > 5 * abs(a["frechet_distance_floor"])
    assert "is not NVIDIA's Inception; compare with no published FID or KID" in capsys.readouterr().out
    about = json.dumps(dict(network="x", sha256="0", height=16, width=32, count=9))
    np.savez("other.npz", mu=np.zeros(3), sigma=np.eye(3), about=about)
    np.savez("odd.npz", mu=np.zeros(3), sigma=np.eye(2), about=about)
    Path("text.npz").write_text("none")
    for name, message in (
        ("other.npz", "was made by x of 16 x 32 pixels, and not by this --features"),
        ("odd.npz", "--statistics odd.npz cannot be used: mu is float64 (3,) and sigma float64 (2, 2)"),
        ("text.npz", "--statistics text.npz cannot be used"),
        ("nowhere.npz", "No such file"),
    ):
        assert evaluate.main([*base, "--statistics", name]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and message in error


@pytest.mark.parametrize(
    "words, message",
    [
        ("nowhere", "nowhere is no checkpoint and no run folder with one"),
        ("run --statistics real.npz", "--statistics and --save-statistics are of a network; give --features"),
        ("run --features run/config.json", "--features run/config.json is no TorchScript that can be loaded"),
        ("run --count 0", "argument --count"),
    ],
)
def test_mistakes_are_one_line(words, message, run, capsys):
    assert evaluate.main([*words.split(), "--device", "cpu"]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error
