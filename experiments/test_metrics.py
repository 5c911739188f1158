"""Test experiments/metrics.py against known answers: python -m pytest experiments/test_metrics.py"""

import math
import warnings

import numpy as np
import pytest
import torch

from experiments import metrics
from experiments.metrics import (
    channel_statistics,
    column_seams,
    feature_statistics,
    features,
    frechet_distance,
    in_training,
    kernel_distance,
    seam_ratio,
    sliced_wasserstein,
)


def noise(seed, n, H, W):
    """Return n images of independent uniform pixels, uint8 (n, H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (n, H, W, 3), dtype=np.uint8)


def textures(seed, n, size):
    """Return n images of clouds, the red channel smoother than green, and green than blue."""
    spectrum = np.fft.fft2(np.random.default_rng(seed).normal(size=(n, size, size, 3)), axes=(1, 2))
    frequency = 1 / size + np.hypot.outer(np.fft.fftfreq(size), np.fft.fftfreq(size))[:, :, None]
    clouds = np.fft.ifft2(spectrum / frequency ** [2, 1.5, 1], axes=(1, 2)).real
    return (127 + 40 * clouds / clouds.std(axis=(0, 1, 2))).clip(0, 255).astype(np.uint8)


def flat(greys, size=17):
    """Return one image of `size` px in one grey for each of `greys`: every patch of an image is alike."""
    greys = np.round(greys).astype(np.uint8)
    return np.broadcast_to(greys[:, None, None, None], (len(greys), size, size, 3))


# ----------------------------------------------------------------------------------------------------------
# Laplacian pyramid


def test_blur_and_levels_of_a_point_by_hand():
    x = torch.zeros(1, 1, 32, 32)
    x[0, 0, 8, 8] = 1
    rows = torch.tensor([1.0, 4, 6, 4, 1])
    assert torch.equal(metrics.blur(x)[0, 0, 6:11, 6:11], torch.outer(rows, rows) / 256)
    # Along one axis the point becomes (1, 6, 1) / 16 in the half-size image; back at full size an even pixel
    # weighs those by (1, 6, 1) / 8, which makes 38 / 128, and an odd one by (4, 4) / 8, which makes 28 / 128.
    finest = metrics.laplacian_level(x, 0, 2)[0, 0]
    assert finest[8, 8] == 1 - (38 / 128) ** 2
    assert finest[8, 9] == -(38 / 128) * (28 / 128)
    coarsest = metrics.laplacian_level(x, 1, 2)[0, 0]
    assert coarsest.shape == (16, 16)
    assert coarsest[3:6, 4].tolist() == [6 / 256, 36 / 256, 6 / 256]


def test_blur_reflects_at_the_border():
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    # Reflected: 2 1 |0 1 2 and 5 6 |7| 6 5, so (2·1 + 1·4 + 0·6 + 1·4 + 2·1) / 16 lies above the 0.
    assert metrics.blur(ramp)[0, 0, 3].tolist() == [0.75, 1.125, 2, 3, 4, 5, 5.875, 6.25]
    assert torch.equal(metrics.blur(ramp.mT), metrics.blur(ramp).mT)


@pytest.mark.parametrize(
    "size, levels",
    [
        ((64, 64), 3),
        ((256, 768), 5),  # a panorama
        ((16, 16), 1),
        ((48, 48), 2),  # 24 would halve to 12
        ((36, 68), 2),  # 18 x 34 would halve to 9 x 17
        ((50, 64), 2),  # 25 is odd
        ((17, 17), 1),
    ],
)
def test_levels_rebuild_the_image(size, levels):
    assert metrics.count_levels(*size) == levels
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 255
    pyramid = [metrics.laplacian_level(x, level, levels) for level in range(levels)]
    assert [tuple(level.shape[2:]) for level in pyramid] == [
        (size[0] >> i, size[1] >> i) for i in range(levels)
    ]
    rebuilt = pyramid.pop()
    while pyramid:
        rebuilt = metrics.up(rebuilt) + pyramid.pop()
    torch.testing.assert_close(rebuilt, x, atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------------------------------
# Sliced Wasserstein distance


def test_descriptors_are_whole_normalised_patches_from_everywhere():
    images = np.empty((20, 19, 17, 3), dtype=np.uint8)
    images[..., 0] = 10 * np.arange(19)[:, None]  # y
    images[..., 1] = 10 * np.arange(17)  # x
    images[..., 2] = np.arange(20)[:, None, None]  # the index of the image
    cloud = metrics.descriptors("real", images, 0, 1, torch.Generator().manual_seed(0), "cpu")
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
        assert starts.unique().tolist() == list(range(positions))  # 7 px patches fit the border too
    assert (index == index[:, :1, :1, :1]).all() and len(index.unique()) == 20


def test_distance_of_known_distributions():
    # Grey images, black or white against uniform: normalised, ±1 against uniform on ±√3, whose Wasserstein
    # distance is the integral of |1 - √3 t| over t from 0 to 1. All 147 values of a patch are equal, so a
    # direction scales it by the absolute sum of its own, which is close to a standard normal: mean √(2/π).
    n, root, t = 256, math.sqrt(3), 1 / math.sqrt(3)
    distance = t / 2 + (1 - t) * (root - 1) / 2
    result = sliced_wasserstein(flat(np.repeat([0, 255], n // 2)), flat(np.linspace(0, 255, n)))
    assert result["levels"].keys() == {17}
    # 512 directions know that mean to 3 %: the absolute normal's deviation 0.6 over 0.8 over √512.
    assert result["mean"] == pytest.approx(1000 * math.sqrt(2 / math.pi) * distance, rel=0.1)


def test_floor_on_noise():
    # An odd side, so one level, the image itself; large enough that its patches hardly overlap.
    result = sliced_wasserstein(noise(0, 128, 97, 97), noise(1, 128, 97, 97))
    assert result["images"] == 128 and result["descriptors"] == 2**14
    # Two samples of n from a normal distribution Φ lie √(4 / πn) ∫ √(Φ (1 - Φ)) apart, and that integral is
    # 1.6147; the sum of 147 independent pixels is nearly normal.
    assert result["mean"] == pytest.approx(1000 * math.sqrt(4 / (math.pi * 2**14)) * 1.6147, rel=0.05)
    assert result["mean"] == result["levels"][97]


def test_equal_sets_score_the_floor_and_more_images_lower_it(monkeypatch):
    monkeypatch.setattr(metrics, "DIRECTIONS", 128)
    images = noise(0, 128, 64, 64)
    equal, other = sliced_wasserstein(images, images), sliced_wasserstein(images, noise(1, 128, 64, 64))
    assert list(equal["levels"]) == [64, 32, 16]
    assert equal["mean"] == pytest.approx(sum(equal["levels"].values()) / 3)
    assert 10 < equal["levels"][64] < other["levels"][64] * 1.1 < 20
    few = sliced_wasserstein(images[:32], images[32:64])
    assert few["levels"][64] == pytest.approx(2 * other["levels"][64], rel=0.15)  # a quarter: √4 as much


def worse(images, damage):
    """Return textures with one kind of damage."""
    n, size = images.shape[:2]
    if damage == "blur":
        copies = [np.roll(images, (i, j), axis=(1, 2)) for i in (0, 1) for j in (0, 1)]
        return np.mean(copies, axis=0).astype(np.uint8)
    if damage == "noise":
        return (images + np.random.default_rng(5).normal(0, 15, images.shape)).clip(0, 255).astype(np.uint8)
    if damage == "patches":  # each micro patch of 8 px moves within itself, so that seams show
        patches = images.reshape(n, size // 8, 8, size // 8, 8, 3)
        return np.roll(patches, (4, 4), axis=(2, 4)).reshape(images.shape)
    return images[..., ::-1]  # blue, green, red


def test_every_damage_raises_the_distance(monkeypatch):
    monkeypatch.setattr(metrics, "DIRECTIONS", 128)
    real, fake = textures(0, 96, 32), textures(1, 96, 32)
    floor = sliced_wasserstein(real, fake)["mean"]
    assert sliced_wasserstein(real, real)["mean"] < floor * 1.1
    distances = {
        damage: sliced_wasserstein(real, worse(fake, damage))["mean"] / floor
        for damage in ("blur", "noise", "patches", "channels")
    }
    assert min(distances.values()) > 1.1, distances


def test_distance_by_plain_loops(monkeypatch):
    """The definition once more, in float64 and one patch at a time; only the random numbers are shared."""
    monkeypatch.setattr(metrics, "PATCHES_PER_IMAGE", 5)
    monkeypatch.setattr(metrics, "DIRECTIONS", 6)
    monkeypatch.setattr(metrics, "DIRECTIONS_PER_LOT", 4)
    monkeypatch.setattr(metrics, "IMAGES_PER_CHUNK", 2)
    sets, generator = (textures(0, 3, 32), textures(1, 3, 32)), torch.Generator().manual_seed(7)
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256

    def filtered(image):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        h, w = image.shape[:2]
        return sum(kernel[i, j] * padded[i : i + h, j : j + w] for i in range(5) for j in range(5))

    expected = {}
    for px in (32, 16):
        clouds = []
        for images in sets:
            positions = [torch.randint(px - 6, (3, 5), generator=generator).numpy() for _ in "yx"]
            patches = []
            for b, image in enumerate(images.astype(float)):
                half = filtered(image)[::2, ::2]
                doubled = np.zeros((32, 32, 3))
                doubled[::2, ::2] = 4 * half
                level = image - filtered(doubled) if px == 32 else half
                for y, x in zip(positions[0][b], positions[1][b]):
                    patches.append(level[y : y + 7, x : x + 7].transpose(2, 0, 1))
            patches = np.array(patches)  # (15, 3, 7, 7)
            for c in range(3):
                patches[:, c] = (patches[:, c] - patches[:, c].mean()) / patches[:, c].std()
            clouds.append(patches.reshape(15, 147))
        distances = []
        for direction in torch.randn(6, 147, generator=generator).double().numpy():
            a, b = (np.sort(cloud @ direction / np.sqrt((direction**2).sum())) for cloud in clouds)
            distances.append(np.abs(a - b).mean())
        expected[px] = 1000 * np.mean(distances)
    result = sliced_wasserstein(*sets, seed=7)
    assert result["levels"] == pytest.approx(expected, rel=1e-4)
    assert result["mean"] == pytest.approx((expected[32] + expected[16]) / 2, rel=1e-4)


def test_what_the_low_pass_removes_moves_the_finest_level_alone():
    # The kernel is zero at a checkerboard, 1 - 4 + 6 - 4 + 1, at reflecting borders too: exactly.
    real, fake = noise(0, 16, 32, 32) // 2, noise(1, 16, 32, 32) // 2
    sign = (-1) ** np.add.outer(np.arange(32), np.arange(32))[:, :, None]
    marked = (fake + 64 + 60 * sign).astype(np.uint8)
    before, after = sliced_wasserstein(real, fake), sliced_wasserstein(real, marked)
    assert after["levels"][16] == pytest.approx(before["levels"][16], rel=1e-4)
    assert after["levels"][32] > 1.5 * before["levels"][32]


def test_colour_is_hidden_from_the_distance_and_shown_by_the_statistics():
    real, fake = noise(0, 16, 32, 32), noise(1, 16, 32, 32) // 4
    tinted = fake * np.array([1, 2, 4], dtype=np.uint8) + np.array([3, 2, 1], dtype=np.uint8)
    assert sliced_wasserstein(real, tinted)["levels"] == pytest.approx(
        sliced_wasserstein(real, fake)["levels"], rel=1e-3
    )
    (mean, deviation), (tinted_mean, tinted_deviation) = channel_statistics(fake), channel_statistics(tinted)
    np.testing.assert_allclose(tinted_mean, mean * [1, 2, 4] + [3, 2, 1])
    np.testing.assert_allclose(tinted_deviation, deviation * [1, 2, 4])


def test_result_depends_on_the_seed_alone(monkeypatch, tmp_path):
    real, fake = noise(0, 10, 32, 32), noise(1, 10, 32, 32)
    first = sliced_wasserstein(real, fake, seed=3)
    torch.manual_seed(1)
    monkeypatch.setattr(metrics, "IMAGES_PER_CHUNK", 3)
    np.save(tmp_path / "fake.npy", fake)
    assert sliced_wasserstein(real, np.load(tmp_path / "fake.npy", mmap_mode="r"), seed=3) == first
    assert sliced_wasserstein(real, fake, seed=4) != first


def test_reading_a_map_leaves_it_as_it_is_and_out_of_memory(tmp_path):
    stored = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (2048, 64, 64, 3))  # 25 MB
    stored[:] = noise(0, 2048, 64, 64)
    images = np.load(tmp_path / "a.npy", mmap_mode="c")
    images[0] = 7  # in memory only
    assert all((chunk[0] == 7).all() for chunk in [*metrics.chunks(images)][:1])
    assert (images[0] == 7).all()
    images = np.load(tmp_path / "a.npy", mmap_mode="r")
    before = mapped_megabytes()
    read = np.concatenate([*metrics.chunks(images)])
    assert mapped_megabytes() - before < 8
    assert np.array_equal(read, stored) and np.array_equal(read, images)
    images.sum()
    assert mapped_megabytes() - before > 20


def mapped_megabytes():
    """MB of files that lie in the memory of this process."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[2]) * 4096 / 2**20
    except OSError:
        pytest.skip("only Linux tells")


# ----------------------------------------------------------------------------------------------------------
# Colour and seams


def test_channel_statistics_match_numpy(monkeypatch):
    monkeypatch.setattr(metrics, "IMAGES_PER_CHUNK", 3)
    images = noise(0, 7, 5, 9)
    images[..., 1] = 255
    mean, deviation = channel_statistics(images)
    np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(deviation, images.std(axis=(0, 1, 2)), atol=1e-9)
    assert mean[1] == 255 and deviation[1] == 0


def painted(rows, columns):
    """Return two images, the sum of one value for each row and each column, uint8 (2, H, W, 3)."""
    image = np.add.outer(rows, columns).astype(np.uint8)[None, :, :, None]
    return np.broadcast_to(image, (2, *image.shape[1:3], 3))


def test_seam_ratio_by_hand():
    # 8 x 12 px in 4 px patches. Real: a checkerboard of 0 and 1, each pair of neighbours 1 apart. Fake: each
    # pixel 1 above the one before, but 5 across the border of the two rows of patches.
    real = np.zeros((3, 8, 12, 3), dtype=np.uint8)
    real[:, ::2, ::2] = real[:, 1::2, 1::2] = 1
    fake = painted([0, 1, 2, 3, 8, 9, 10, 11], range(12))
    # Borders: 12 pairs of 5 between the rows, 2 x 8 pairs of 1 between the columns; inside, 1.
    assert seam_ratio(real, fake, 4) == pytest.approx((12 * 5 + 16 * 1) / 28)
    # A cylinder adds 8 pairs of 11, last column to first; the other way 12 pairs of 11, last row to first.
    assert seam_ratio(real, fake, 4, wrap=(False, True)) == pytest.approx((60 + 16 + 88) / 36)
    assert seam_ratio(real, fake, 4, wrap=(True, False)) == pytest.approx((60 + 16 + 132) / 40)
    # Inside patches of 2 px: 4 · 12 + 6 · 8 pairs of 1; borders: 24 pairs of 1, 12 of 5 and 40 of 1.
    assert seam_ratio(real, fake, 2) == pytest.approx((24 + 60 + 40) / 76)
    # Steps down count as steps up do, and ten times every difference is the same ratio.
    assert seam_ratio(real, 10 * (25 - fake), 4) == pytest.approx(seam_ratio(real, fake, 4))


def test_seam_ratio_divides_by_the_real_one_and_is_1_on_noise(monkeypatch):
    monkeypatch.setattr(metrics, "IMAGES_PER_CHUNK", 3)
    seamed = painted([0, 1, 2, 3, 8, 9, 10, 11], range(12))
    other = painted([0, 2, 4, 6, 7, 9, 11, 13], 3 * np.arange(12))
    assert seam_ratio(seamed, seamed, 4) == 1
    assert seam_ratio(seamed, other, 4) == pytest.approx(1 / seam_ratio(other, seamed, 4))
    for wrap in ((False, False), (False, True), (True, True)):
        assert seam_ratio(noise(0, 20, 32, 48), noise(1, 30, 32, 48), 16, wrap) == pytest.approx(1, abs=0.05)


# ----------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    "real, fake, message",
    [
        (torch.zeros(2, 16, 16, 3), noise(0, 2, 16, 16), "real must be .* not a Tensor"),
        (noise(0, 2, 16, 16), noise(0, 2, 16, 16) / 255, "fake must be .* float64"),
        (noise(0, 2, 16, 16), noise(0, 2, 16, 16).transpose(0, 3, 1, 2), r"fake must be .*\(2, 3, 16, 16\)"),
        (noise(0, 2, 16, 16)[0], noise(0, 2, 16, 16), r"real must be .*\(16, 16, 3\)"),
        (noise(0, 0, 16, 16), noise(0, 0, 16, 16), "at least one image"),
        (noise(0, 3, 16, 16), noise(0, 2, 16, 16), r"\(3, 16, 16, 3\) and \(2, 16, 16, 3\)"),
        (noise(0, 2, 15, 64), noise(0, 2, 15, 64), "at least 16 px a side; got 15 x 64"),
        (noise(0, 2, 16, 16), flat(np.full(2, 37), size=16), "fake: a channel of the 16 x 16 px level"),
    ],
)
def test_sliced_wasserstein_says_what_is_wrong(real, fake, message):
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein(real, fake)


@pytest.mark.parametrize(
    "real, fake, S, message",
    [
        (noise(0, 2, 16, 16), noise(0, 2, 16, 24), 8, r"\(16, 16\) and \(16, 24\)"),
        (noise(0, 2, 16, 24), noise(0, 2, 16, 24), 16, "S=16 for 16 x 24"),
        (noise(0, 2, 16, 16), noise(0, 2, 16, 16), 1, "at least 2"),
        (noise(0, 2, 16, 16), noise(0, 2, 16, 16), 16, "no borders"),
        (flat([0, 9], 16), noise(0, 2, 16, 16), 8, "real: no difference between any two pixels inside"),
        (painted([0, 1, 1, 2], [0, 1, 1, 2]), noise(0, 2, 4, 4), 2, "real: .* across the borders"),
        (noise(0, 2, 16, 16), flat([0, 9], 16), 8, "fake: no difference between any two pixels inside"),
    ],
)
def test_seam_ratio_says_what_is_wrong(real, fake, S, message):
    with pytest.raises(ValueError, match=message):
        seam_ratio(real, fake, S)


def test_channel_statistics_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"images must be .*\(2, 16, 16\)"):
        channel_statistics(noise(0, 2, 16, 16)[..., 0])


def test_column_seams_tell_the_borders_apart():
    ramp = np.array([0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 39], np.uint8)  # columns, in patches of 4
    real, fake = (
        np.broadcast_to(line[None, None, :, None], (3, 8, 12, 3)).copy() for line in (10 + 0 * ramp, ramp)
    )
    real[:, :, ::2] = 11  # every step is 1: borders 1, inside 9, of 9
    # Of fake the borders' steps are 5, 5 and, from 39 back to 0, 39; those inside are 8 of 1 and one of 21.
    np.testing.assert_allclose(column_seams(real, fake, 4), np.array([5, 5, 39]) / 29 * 9)
    assert column_seams(fake, fake, 4).tolist() == [1, 1, 1]
    rolled = np.roll(fake, 4, axis=2)
    np.testing.assert_allclose(column_seams(real, rolled, 4), np.array([39, 5, 5]) / 29 * 9)
    with pytest.raises(ValueError, match="no difference across the border after column 3"):
        column_seams(np.where(np.arange(12)[:, None] == 4, real[:, :, 3:4], real), fake, 4)


# ----------------------------------------------------------------------------------------------------------
# Features


def scripted(network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but what there is of Inception
        return torch.jit.script(network)


class Pixel(torch.nn.Module):
    """Row 1, column 2 of each image: three features."""

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return x[:, :, 1, 2].double() / 4


class Named(torch.nn.Module):
    """As NVIDIA's: features only if asked for."""

    def forward(self, x, use_fp16: bool = False, return_features: bool = False):
        return x[:, :2, 0, 0].float() if return_features else x[:, :1, 0, 0].float()


@pytest.mark.parametrize("wrap", [scripted, lambda network: network])
def test_features_are_the_networks(monkeypatch, wrap):
    monkeypatch.setattr(metrics, "IMAGES_PER_CHUNK", 3)
    images = noise(0, 7, 4, 5)
    found = features(wrap(Pixel()), images)
    assert found.dtype == np.float32 and np.array_equal(found, images[:, 1, 2] / 4)
    if wrap is scripted:
        assert np.array_equal(features(wrap(Named()), images), images[:, 0, 0, :2])


@pytest.mark.parametrize(
    "network, message",
    [
        (lambda x: x.float(), r"gives torch.float32 \(3, 3, 4, 5\); floats \(3, d\), d up to 8, are due"),
        (lambda x: x[:, 0, 0, 0].float(), r"gives torch.float32 \(3,\)"),
        (lambda x: x[:2, :, 0, 0].float(), r"gives torch.float32 \(2, 3\)"),
        (lambda x: x[:, :, 0, 0], r"gives torch.uint8 \(3, 3\)"),
        (lambda x: x[:, :0, 0, 0].float(), r"gives torch.float32 \(3, 0\)"),
        (lambda x: x[:, :, :, 0].flatten(1).float(), r"gives torch.float32 \(3, 12\)"),  # more than 8
        (lambda x: x[:, : len(x), 0, 0].float(), r"uint8 \(1, 3, 4, 5\), gives torch.float32 \(1, 1\)"),
        (lambda x: (x[:, :, 0, 0],), "gives a tuple"),
        (lambda x: x[:, :, 0, 0] / 0.0, "gives values that are not finite"),
        (lambda x: x[:, :, 0, 0].double() + 1e60, "gives values that are not finite"),  # in float32
        (lambda x: x @ x.new_zeros(7), r"uint8 \(3, 3, 4, 5\), fails: .*size mismatch"),
    ],
)
def test_features_say_what_is_wrong(monkeypatch, network, message):
    monkeypatch.setattr(metrics, "IMAGES_PER_CHUNK", 3)
    monkeypatch.setattr(metrics, "MOST_FEATURES", 8)
    with pytest.raises(ValueError, match=message) as caught:
        features(network, noise(0, 4, 4, 5))
    assert "\n" not in str(caught.value)


def test_errors_of_torchscript_are_one_line():
    with pytest.raises(ValueError, match="fails: RuntimeError: .*index 1 out of range") as caught:
        features(scripted(Pixel()), noise(0, 2, 1, 5))
    assert "\n" not in str(caught.value)


def test_statistics_match_numpy():
    x = np.random.default_rng(0).normal(1000, [1, 2, 3], (5000, 3)).astype(np.float32)  # more than one piece
    x[:, 2] += x[:, 0]
    mu, sigma = feature_statistics(x)
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(mu, x.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(feature_statistics(x[:2])[1], np.cov(x[:2].astype(np.float64), rowvar=False))
    with pytest.raises(ValueError, match="at least 2 images; got 1"):
        feature_statistics(x[:1])


def turned(seed, *variances):
    """A covariance with these eigenvalues, in random directions."""
    d = len(variances)
    Q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))
    return Q @ np.diag(variances) @ Q.T


def test_frechet_distance_of_known_gaussians():
    zero, mu = np.zeros(3), np.array([1.0, -2, 2])
    A, B = turned(0, 1, 4, 9), turned(0, 4, 4, 25)  # with common directions: (1-2)² + (2-2)² + (3-5)²
    assert frechet_distance(mu, A, zero, A) == pytest.approx(9)
    assert frechet_distance(zero, A, zero, B) == pytest.approx(5)
    assert frechet_distance(zero, B, mu, A) == pytest.approx(14)
    # In two dimensions tr √M = √(tr M + 2 √det M), whatever the directions.
    A, B = turned(1, 1, 9), turned(2, 4, 5)
    cross = math.sqrt(np.trace(A @ B) + 2 * math.sqrt(np.linalg.det(A @ B)))
    assert frechet_distance(zero[:2], A, mu[:2], B) == pytest.approx(5 + 10 + 9 - 2 * cross)


def test_frechet_distance_of_singular_covariances():
    # (v vᵀ w wᵀ)^½ has the trace |v·w|.
    v, w = np.random.default_rng(0).normal(size=(2, 6))
    zero = np.zeros(6)
    expected = v @ v + w @ w - 2 * abs(v @ w)
    assert frechet_distance(zero, np.outer(v, v), zero, np.outer(w, w)) == pytest.approx(expected)
    assert frechet_distance(zero, np.outer(v, v), zero, np.outer(v, v)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(zero, np.outer(v, v), zero, np.zeros((6, 6))) == pytest.approx(v @ v)
    few = np.random.default_rng(1).normal(size=(20, 50)).astype(np.float32)  # fewer images than features
    assert frechet_distance(*feature_statistics(few), *feature_statistics(few)) == pytest.approx(0, abs=1e-5)
    moved = frechet_distance(*feature_statistics(few), *feature_statistics(few + np.float32(2)))
    assert moved == pytest.approx(4 * 50, rel=1e-5)


def test_frechet_distance_agrees_with_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(300, 40)) @ rng.normal(size=(40, 40)) for _ in range(2))
    (mu1, A), (mu2, B) = feature_statistics(x), feature_statistics(y + 1)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(A + B - 2 * linalg.sqrtm(A @ B).real)
    assert frechet_distance(mu1, A, mu2, B) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"got \(3,\), \(3, 3\), \(2,\), \(3, 3\)"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(3))
    with pytest.raises(ValueError, match=r"got \(3,\), \(2, 2\), \(3,\), \(2, 2\)"):
        frechet_distance(np.zeros(3), np.eye(2), np.zeros(3), np.eye(2))


def test_kernel_distance_by_hand(monkeypatch):
    # Of the products over d + 1: within x (3 + 1) / 2 + 1 = 3, within y 1, between them 2, 2, 2 and 4; cubed,
    # 27 + 1 - 2 (8 + 8 + 8 + 64) / 4.
    x, y = (np.array(a, np.float32) for a in ([[1, 1], [3, 1]], [[0, 2], [2, 0]]))
    assert metrics.squared_mmd(x, y) == -16
    assert kernel_distance(x, y) == (-16000, 0)  # both images in each subset
    # x is 0 or 1, y is 1: 11/4 + 8 - 2 · 9/2. With a part p of 1, a subset has about 7 (1 - p)², and the p of
    # 1,000 out of 4,000 deviates by √(1/4000 · 3/4).
    monkeypatch.setattr(metrics, "KERNEL_SUBSETS", 10)
    x, y = np.arange(4000.0)[:, None] % 2, np.ones((3000, 1))
    mean, deviation = kernel_distance(x, y)
    assert mean == pytest.approx(1750, rel=0.05)
    assert deviation == pytest.approx(7000 * math.sqrt(0.75 / 4000), rel=0.5)  # as 10 subsets know it


def test_kernel_distance_is_not_biased(monkeypatch):
    monkeypatch.setattr(metrics, "KERNEL_SUBSETS", 20)

    def mean_of(move):
        sets = (np.random.default_rng(seed).normal(size=(2, 60, 8)) for seed in range(40))
        return np.mean([kernel_distance(x, y + move, seed=3)[0] for x, y in sets])

    # With the images compared with themselves, 2 (E k(x, x) - E k(x, x')) / 30, about 500, would be added.
    assert abs(mean_of(0)) < 30
    assert mean_of(1) > 1000


def test_kernel_distance_depends_on_the_seed_and_takes_any_counts():
    x, y = np.random.default_rng(0).normal(size=(2, 50, 3))
    assert kernel_distance(x, y, seed=1) == kernel_distance(x, y, seed=1) != kernel_distance(x, y, seed=2)
    assert np.isfinite(kernel_distance(x[:3], y)).all()
    for bad in (x[:1], x[:, :2]):
        with pytest.raises(ValueError, match="features must be"):
            kernel_distance(bad, y)


# ----------------------------------------------------------------------------------------------------------
# While training


def test_figures_in_training_are_those_of_the_same_images(monkeypatch):
    monkeypatch.setattr(metrics, "PIXELS_PER_BATCH", 3 * 32 * 48)
    asked, fake, real = [], noise(0, 8, 32, 48), noise(1, 8, 32, 48)

    def generate(first, last):
        asked.append((first, last))
        return fake[first - 10**6 : last - 10**6]

    np.random.seed(3)
    torch.manual_seed(3)
    states = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    figures = in_training(generate, real, 16, (False, True))
    assert asked == [(10**6, 10**6 + 3), (10**6 + 3, 10**6 + 6), (10**6 + 6, 10**6 + 8)]
    assert figures == {
        "swd": sliced_wasserstein(real, fake)["mean"],
        "seam_ratio": seam_ratio(real, fake, 16, (False, True)),
    }
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_figures_in_training_leave_out_what_there_is_not():
    real = noise(0, 4, 16, 16)
    assert in_training(lambda first, last: real[: last - first] * 0, real, 8) == {}  # all black
    assert in_training(lambda first, last: real, real, 16).keys() == {"swd"}  # a single micro patch
    assert in_training(lambda first, last: real[:, :8, :8], real[:, :8, :8], 4) == {"seam_ratio": 1}
    with pytest.raises(ValueError, match=r"must be \(4, 16, 16, 3\); got \(4, 16, 8, 3\)"):
        in_training(lambda first, last: real[:, :, :8], real, 8)
    with pytest.raises(ValueError, match=r"got \(3, 16, 16, 3\)"):  # one too few
        in_training(lambda first, last: real[:3], real, 8)
    with pytest.raises(ValueError, match="fake must be uint8"):
        in_training(lambda first, last: real / 255, real, 8)
