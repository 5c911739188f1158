"""What `evaluate` measures: distances between generated and real images, seams and colours.

    sliced_wasserstein(real, images)     # {64: ..., 32: ..., 16: ...}, a distance x 1,000 for each level
    sliced_wasserstein(real, more_real)  # its floor: at a finite count not even real images score 0
    seam_ratio(real, images, S=16)       # 1 is seamless

    x, y = (features(network, some) for some in (real, images))       # (n, 2048) each, of Inception
    frechet_distance(*feature_statistics(x), *feature_statistics(y))  # FID
    kernel_distance(x, y)                                             # KID x 1,000, and its deviation

Images are uint8 (n, H, W, 3): an array, or what is sliced like one. They are read a few at a time. Where they
have no contrast, a figure is not finite. The seam ratio and the azimuth variety are this project's own.
"""

import numpy as np
import torch
import torch.nn.functional as F

from data import UserError, counted

KERNEL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)  # one axis of [1 4 6 4 1] ⊗ [1 4 6 4 1] / 256
SMALLEST_LEVEL_PX = 16
PATCH_PX = 7
PATCHES_PER_IMAGE = 128
DIRECTIONS, DIRECTIONS_AT_ONCE = 512, 8
IMAGES_AT_ONCE = 16
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1000


def chunks(images):
    """Yield `images` (n, H, W, 3) as arrays of at most IMAGES_AT_ONCE images."""
    for start in range(0, len(images), IMAGES_AT_ONCE):
        yield np.array(images[start : start + IMAGES_AT_ONCE])


# ---- Laplacian pyramid (Burt and Adelson, "The Laplacian Pyramid as a Compact Image Code", 1983) -----------


def blur(x):
    """Low-pass x (B, C, h, w) with the 5 x 5 binomial kernel, reflecting at the borders; keeps the shape."""
    h, w = x.shape[2:]
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")
    # Sums of shifted copies, not conv2d, which on a GPU may round to TF32: these are float32 everywhere.
    x = sum(k * x[:, :, i : i + h] for i, k in enumerate(KERNEL))
    return sum(k * x[:, :, :, i : i + w] for i, k in enumerate(KERNEL))


def laplacian_pyramid(x):
    """Levels of x (B, C, H, W) with sides H, H/2, … while these are integers of at least 16, finest first.

    A level holds what the next coarser one cannot express; the last is the low-pass image itself, so that
    adding each level to the doubled sum of the coarser ones gives x back.
    """
    levels = []
    while x.shape[2] % 2 == x.shape[3] % 2 == 0 and min(x.shape[2:]) // 2 >= SMALLEST_LEVEL_PX:
        half, doubled = blur(x)[:, :, ::2, ::2], torch.zeros_like(x)
        doubled[:, :, ::2, ::2] = half
        levels.append(x - 4 * blur(doubled))  # times 4, for three of four of its pixels are zero
        x = half
    return [*levels, x]


# ---- Sliced Wasserstein distance (Karras et al., "Progressive Growing of GANs", ICLR 2018, section 5) ------


def descriptors(images, level, generator, device):
    """Cut random patches out of one pyramid level of every image, and normalise them over the set.

    Args: generator: CPU generator of the patch positions, the same for every device.
    Returns: float32 (P, 147), P = n * PATCHES_PER_IMAGE, each of the 3 channels with mean 0 and deviation 1.
    """
    n, h, w = len(images), images.shape[1] >> level, images.shape[2] >> level
    y = torch.randint(h - PATCH_PX + 1, (n, PATCHES_PER_IMAGE), generator=generator).to(device)
    x = torch.randint(w - PATCH_PX + 1, (n, PATCHES_PER_IMAGE), generator=generator).to(device)
    patches = torch.empty(n, PATCHES_PER_IMAGE, 3, PATCH_PX, PATCH_PX, device=device)
    start = 0
    for chunk in chunks(images):
        pixels = torch.from_numpy(chunk).to(device).permute(0, 3, 1, 2).float()  # (B, 3, H, W)
        windows = laplacian_pyramid(pixels)[level].unfold(2, PATCH_PX, 1).unfold(3, PATCH_PX, 1)
        windows = windows.permute(0, 2, 3, 1, 4, 5)  # a view: (B, h - 6, w - 6, 3, 7, 7)
        here = slice(start, start + len(chunk))
        patches[here] = windows[torch.arange(len(chunk), device=device)[:, None], y[here], x[here]]
        start += len(chunk)
    patches = patches.view(n * PATCHES_PER_IMAGE, 3, PATCH_PX**2)
    deviation, mean = torch.std_mean(patches, dim=(0, 2), correction=0, keepdim=True)
    return patches.sub_(mean).div_(deviation).flatten(1)  # in place: these are the bulk of the memory


def sort_rows(x):
    """Sort each row. On the CPU in place with NumPy, 3 times as fast as PyTorch, which sorts indices, too."""
    if x.device.type != "cpu":
        return x.sort(dim=1).values
    x.numpy().sort(axis=1)
    return x


def level_distance(real, images, level, generator, device):
    """The sliced Wasserstein distance of one pyramid level.

    Projected onto one direction, the Wasserstein distance of two clouds of equal size is the mean absolute
    difference of the sorted values. This is its mean over 512 random directions.
    """
    clouds = [descriptors(some, level, generator, device) for some in (real, images)]
    directions = torch.randn(DIRECTIONS, clouds[0].shape[1], generator=generator)
    total = 0.0
    # The definition has 4 lots of 128 directions. All count alike, so a lot's size changes the memory only.
    lots = F.normalize(directions, dim=1).to(device).split(DIRECTIONS_AT_ONCE)
    for lot in counted(lots, len(lots), f"comparisons of SWD, level {level}"):
        a, b = (sort_rows(lot @ cloud.T) for cloud in clouds)  # (DIRECTIONS_AT_ONCE, P)
        total += (a - b).abs().mean(dim=1).sum().item()
    return total / DIRECTIONS


@torch.no_grad()
def sliced_wasserstein(real, images, seed=0, device="cpu"):
    """Measure how far apart the patches of two sets of images are, at every scale.

    The random positions of the patches differ between the sets, so the floor is above 0; it falls as the
    count grows. Each set is normalised by itself, which hides global colour errors: see `colours`.
    Memory: the descriptors of one level, 2 * n * 128 * 147 * 4 bytes at any image size, and a third more.

    Args: two sets of one shape, sides of at least 16 px; seed: of the patch positions and the directions.
    Returns: {height of the level in px: distance x 1,000}, finest first. Raises: UserError for smaller sides.
    """
    assert real.shape == images.shape
    H, W = real.shape[1:3]
    if min(H, W) < SMALLEST_LEVEL_PX:
        raise UserError(f"images of {H} x {W} pixels cannot be compared; give at least 16 a side")
    generator, levels = torch.Generator().manual_seed(seed), len(laplacian_pyramid(torch.zeros(1, 1, H, W)))
    distances = [level_distance(real, images, level, generator, device) for level in range(levels)]
    return {H >> level: 1000 * distance for level, distance in enumerate(distances)}


# ---- Seams, azimuth and colours ----------------------------------------------------------------------------


def differences(images, axis):
    """Sum the absolute differences of each row (axis 1) or column (2) to the next, the last to the first."""
    sums = np.zeros(images.shape[axis])
    for chunk in chunks(images):
        pixels = chunk.astype(np.int16)  # differences of uint8 would wrap round
        difference = np.abs(np.roll(pixels, -1, axis) - pixels)
        sums += difference.sum(axis=tuple({0, 1, 2, 3} - {axis}), dtype=np.int64)
    return sums


def border_over_inside(images, S, closed):
    """Divide the differences of neighbouring pixels across borders of micro patches by those inside them.

    Sums, not means: the counts of pairs are the same for real images, and cancel in the seam ratio.
    """
    border, inside = 0.0, 0.0
    for axis, meet in zip((1, 2), closed):
        steps = differences(images, axis).reshape(
            -1, S
        )  # a row per micro patch; the last is across its border
        inside += steps[:, :-1].sum()
        border += steps[: None if meet else -1, -1].sum()
    return border / inside


def seam_ratio(real, images, S, closed=(False, False)):
    """Measure how visible the borders of the micro patches are in generated images.

    The mean absolute difference of neighbouring pixels across the borders of micro patches, over the same
    inside them, divided by this of real images, in which the borders are nothing special. 1 is seamless,
    above 1 seams show, below 1 borders are too smooth.

    Args: S: side of a micro patch in px, at least 2; closed: as Config.closed. Where borders of the image
    meet, they count, too. The counts of the two sets may differ, the sides may not.
    """
    return border_over_inside(images, S, closed) / border_over_inside(real, S, closed)


def column_seams(real, images, S):
    """The seam ratio of each border between two columns of micro patches: (K,), the last of right and left.

    Relative to the inside of rows only. A panorama whose ends meet has about the same ratio everywhere.
    """
    steps = [differences(some, axis=2).reshape(-1, S) for some in (real, images)]
    of_real, of_images = (step[:, -1] / step[:, :-1].sum() for step in steps)
    return of_images / of_real


def azimuth_variety(images, S):
    """How much the micro patches of one row of an image differ: the mean absolute difference of two of them.

    It is 0 if G ignores the azimuth; compare with that of real images.
    """
    total, turns = 0.0, range(S, images.shape[2], S)
    for chunk in chunks(images):
        pixels = chunk.astype(np.int16)
        total += sum(np.abs(pixels - np.roll(pixels, turn, axis=2)).mean() * len(chunk) for turn in turns)
    return total / (len(images) * len(turns))


def colours(images):
    """The mean and the deviation of each channel over all pixels of all images, 0 to 255, by their names."""
    sums = np.zeros((2, 3), np.int64)  # exact
    for chunk in chunks(images):
        pixels = chunk.reshape(-1, 3).astype(np.int64)
        sums += [pixels.sum(axis=0), (pixels**2).sum(axis=0)]
    mean, square = sums / (len(images) * images.shape[1] * images.shape[2])
    names = [f"{what}_{channel}" for what in ("mean", "deviation") for channel in ("red", "green", "blue")]
    return dict(zip(names, [*mean.tolist(), *np.sqrt(square - mean**2).tolist()]))


# ---- Distances of features: Fréchet (FID) and kernel (KID) -------------------------------------------------


@torch.no_grad()
def features(network, images, device="cpu"):
    """The features that a TorchScript network finds in images: float32 (n, d).

    It gets uint8 (B, 3, H, W), and return_features=True if its `forward` has such an argument. NVIDIA's
    Inception needs that; it resizes the images itself, as TensorFlow 1 did.
    Raises: UserError if the network fails, or gives anything but finite floats (B, d).
    """
    named = "return_features" in [argument.name for argument in network.forward.schema.arguments]
    options, found = {"return_features": True} if named else {}, []
    for chunk in chunks(images):
        pixels = torch.from_numpy(chunk).to(device).permute(0, 3, 1, 2).contiguous()
        try:
            x = network(pixels, **options)
        except (RuntimeError, torch.jit.Error) as error:  # the last line says what happened
            raise UserError(f"the network of --features fails: {str(error).splitlines()[-1]}") from error
        good = isinstance(x, torch.Tensor) and x.ndim == 2 and x.is_floating_point()
        if not good or not x.isfinite().all():
            what = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise UserError(f"the network of --features gives {what}, and not finite floats (n, d)")
        found.append(x.float().cpu().numpy())
    return np.concatenate(found)


def feature_statistics(x):
    """The mean (d,) and the covariance (d, d), with n - 1, of features (n, d), both float64."""
    mu = x.mean(axis=0, dtype=np.float64)
    centred = x - mu
    return mu, centred.T @ centred / (len(x) - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The squared Fréchet distance of two Gaussians; of Inception's features it is the FID.

    |μ₁ - μ₂|² + tr Σ₁ + tr Σ₂ - 2 tr (Σ₁Σ₂)^½. The last trace is the sum of the roots of the eigenvalues of
    Σ₁^½ Σ₂ Σ₁^½, which are those of Σ₁Σ₂; where a covariance is singular, rounding may take some below 0.

    Args: mu (d,), sigma (d, d) float64, as `feature_statistics` gives them.
    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule …", NeurIPS 2017.
    """
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T  # Σ₁^½
    cross = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)


def squared_mmd(x, y):
    """Estimate MMD² of (m, d) and (m, d) without bias, with the kernel (x·y / d + 1)³; it may be below 0."""
    m, d = x.shape
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    same = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)  # no image is compared with itself
    return same / (m * (m - 1)) - 2 * xy.mean()


def kernel_distance(x, y, seed=0):
    """KID x 1,000 of features (n, d) and (k, d): the mean and standard deviation over 100 random subsets.

    A subset has 1,000 images of each set, or half of the smaller set if that is less, at least 2. The mean is
    not biased by the count, as the Fréchet distance is.
    Source: Bińkowski et al., "Demystifying MMD GANs", ICLR 2018.
    """
    m, rng = min(KERNEL_SUBSET_SIZE, max(2, min(len(x), len(y)) // 2)), np.random.default_rng(seed)
    values = []
    for _ in range(KERNEL_SUBSETS):
        a, b = (some[rng.choice(len(some), m, replace=False)].astype(np.float64) for some in (x, y))
        values.append(1000 * squared_mmd(a, b))
    return float(np.mean(values)), float(np.std(values))
