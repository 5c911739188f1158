"""Test experiments/metrics.py against known answers: python -m pytest experiments/test_metrics.py"""

import math

import numpy as np
import pytest
import torch

from experiments import metrics
from experiments.metrics import channel_statistics, column_seams, seam_ratio, sliced_wasserstein


def noise(seed, n, H, W):
    """Return n images of independent uniform pixels, uint8 (n, H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (n, H, W, 3), dtype=np.uint8)


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


def test_equal_sets_score_the_floor_and_more_images_lower_it():
    images = noise(0, 128, 64, 64)
    equal, other = sliced_wasserstein(images, images), sliced_wasserstein(images, noise(1, 128, 64, 64))
    assert list(equal["levels"]) == [64, 32, 16]
    assert equal["mean"] == pytest.approx(sum(equal["levels"].values()) / 3)
    assert 10 < equal["levels"][64] < other["levels"][64] * 1.1 < 20
    few = sliced_wasserstein(images[:32], images[32:64])
    assert few["levels"][64] == pytest.approx(2 * other["levels"][64], rel=0.15)  # a quarter: √4 as much


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
