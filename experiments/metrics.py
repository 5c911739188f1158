"""Compare generated with real images: sliced Wasserstein, Fréchet and kernel distance, seams, colours.

Images are uint8 (n, H, W, 3), an array or what is sliced like one, such as a memmap; they are read a few at a
time:

    from experiments.metrics import sliced_wasserstein  # and all the others
    sliced_wasserstein(real, fake)       # {"levels": {64: ..., 32: ..., 16: ...}, "mean": ..., counts}
    sliced_wasserstein(real, more_real)  # its floor: at a finite count not even real images score 0
    channel_statistics(fake)             # the global colour, which the sliced Wasserstein distance hides
    seam_ratio(real, fake, S=32)         # 1 is seamless
    column_seams(real, fake, S=32)       # the same for each border of a panorama, left and right included

    network = torch.jit.load("inception-2015-12-05.pt")  # NVIDIA's
    x, y = features(network, real), features(network, fake)           # (n, 2048) each
    frechet_distance(*feature_statistics(x), *feature_statistics(y))  # FID
    kernel_distance(x, y)                                             # KID x 1,000, and its deviation

Shapes: n images of H x W pixels, a chunk of B of them, C = 3 channels, P descriptors (patches) of a set, d
features of an image.

Sources: sliced Wasserstein distance, Karras et al., "Progressive Growing of GANs for Improved Quality,
Stability, and Variation" (ICLR 2018), section 5; Laplacian pyramid, Burt and Adelson, "The Laplacian Pyramid
as a Compact Image Code" (1983); FID, Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to
a Local Nash Equilibrium" (NeurIPS 2017); KID, Bińkowski et al., "Demystifying MMD GANs" (ICLR 2018). The seam
ratio is this project's own.
"""

import contextlib
import mmap

import numpy as np
import torch
import torch.nn.functional as F

KERNEL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)  # one axis of [1 4 6 4 1] ⊗ [1 4 6 4 1] / 256
SMALLEST_LEVEL_PX = 16
PATCH_PX = 7
PATCHES_PER_IMAGE = 128
DIRECTIONS = 512
# The definition takes its directions in 4 lots of 128. All count alike in the mean, so the size of a lot
# changes memory only; at 8, projecting and sorting need little beside the descriptors themselves.
DIRECTIONS_PER_LOT = 8
IMAGES_PER_CHUNK = 16
MOST_FEATURES = 8192  # their covariance takes 512 MB then
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1000
MOST_IMAGES = 10**6  # of one seed of an evaluation, so that two seeds share no image
PIXELS_PER_BATCH = 2**18  # generated at a time, 64 images of 64 x 64: memory goes with the pixels


def check_images(name, images):
    """Raise ValueError unless `images` is uint8 of shape (n, H, W, 3) with n of at least 1."""
    if not isinstance(getattr(images, "dtype", None), np.dtype):
        raise ValueError(f"{name} must be a uint8 NumPy array (n, H, W, 3), not a {type(images).__name__}")
    if images.dtype != np.uint8 or len(images.shape) != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(
            f"{name} must be uint8 (n, H, W, 3), at least one image; got {images.dtype} {images.shape}"
        )


def chunks(images):
    """Yield `images` (n, H, W, 3) as copies of consecutive pieces of at most IMAGES_PER_CHUNK images."""
    for start in range(0, len(images), IMAGES_PER_CHUNK):
        yield np.array(images[start : start + IMAGES_PER_CHUNK])
        # A map's pages would stay in this process's memory. Those of mode "c" hold changes, and have to.
        mapped = getattr(images, "_mmap", None)
        if mapped is not None and images.mode != "c" and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


# ----------------------------------------------------------------------------------------------------------
# Laplacian pyramid


def blur(x):
    """Low-pass x (B, C, h, w) with the 5 x 5 binomial kernel, reflecting at the borders; keeps the shape."""
    h, w = x.shape[2:]
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")
    # Sums of shifted copies, not conv2d, which on a GPU may round to TF32: these are float32 everywhere.
    x = sum(k * x[:, :, i : i + h] for i, k in enumerate(KERNEL))
    return sum(k * x[:, :, :, i : i + w] for i, k in enumerate(KERNEL))


def down(x):
    """Halve x (B, C, h, w) to (B, C, h/2, w/2): blur, then every second pixel."""
    return blur(x)[:, :, ::2, ::2]


def up(x):
    """Double x (B, C, h, w) to (B, C, 2h, 2w): zeros between the pixels, then blur."""
    B, C, h, w = x.shape
    spread = x.new_zeros(B, C, 2 * h, 2 * w)
    spread[:, :, ::2, ::2] = x
    return 4 * blur(spread)  # one pixel in four is not zero, so the factor 4 restores the brightness


def count_levels(H, W):
    """Count the pyramid levels H, H/2, ...: while sides stay whole and at least SMALLEST_LEVEL_PX."""
    levels = 1
    while H % 2 == W % 2 == 0 and min(H, W) // 2 >= SMALLEST_LEVEL_PX:
        H, W, levels = H // 2, W // 2, levels + 1
    return levels


def laplacian_level(x, level, levels):
    """Return one level of the Laplacian pyramid of `levels` levels of x.

    A level holds what the next coarser one cannot express; the last is the low-pass image itself, so that
    adding each level to the doubled sum of the coarser ones gives x back.

    Args:
        x: float (B, C, H, W), H and W divisible by 2 ** (levels - 1).
        level: 0, the finest, to levels - 1.
    Returns:
        (B, C, H / 2**level, W / 2**level), in the units of x.
    """
    for _ in range(level):
        x = down(x)
    return x if level == levels - 1 else x - up(down(x))


# ----------------------------------------------------------------------------------------------------------
# Sliced Wasserstein distance


def descriptors(name, images, level, levels, generator, device):
    """Cut random patches out of one pyramid level of every image, and normalise them over the set.

    Args:
        name: of the set, for the error.
        images: uint8 (n, H, W, 3).
        generator: CPU generator of the patch positions, the same for every device.
    Returns:
        float32 (P, 147), P = n * PATCHES_PER_IMAGE, each of the 3 channels with mean 0 and deviation 1.
    Raises:
        ValueError: a channel of the level is constant, which cannot be normalised.
    """
    n, h, w = len(images), images.shape[1] >> level, images.shape[2] >> level
    y = torch.randint(h - PATCH_PX + 1, (n, PATCHES_PER_IMAGE), generator=generator).to(device)
    x = torch.randint(w - PATCH_PX + 1, (n, PATCHES_PER_IMAGE), generator=generator).to(device)
    patches = torch.empty(n, PATCHES_PER_IMAGE, 3, PATCH_PX, PATCH_PX, device=device)
    start = 0
    for chunk in chunks(images):
        pixels = torch.from_numpy(chunk).to(device).permute(0, 3, 1, 2).float()  # (B, 3, H, W)
        windows = laplacian_level(pixels, level, levels).unfold(2, PATCH_PX, 1).unfold(3, PATCH_PX, 1)
        windows = windows.permute(0, 2, 3, 1, 4, 5)  # a view: (B, h - 6, w - 6, 3, 7, 7)
        here = slice(start, start + len(chunk))
        patches[here] = windows[torch.arange(len(chunk), device=device)[:, None], y[here], x[here]]
        start += len(chunk)
    patches = patches.view(n * PATCHES_PER_IMAGE, 3, PATCH_PX**2)
    deviation, mean = torch.std_mean(patches, dim=(0, 2), correction=0, keepdim=True)
    if deviation.min() == 0:
        raise ValueError(f"{name}: a channel of the {h} x {w} px level is one value in all {n} images")
    return patches.sub_(mean).div_(deviation).flatten(1)  # in place: these are the bulk of the memory


def sort_rows(x):
    """Sort each row of x (rows, P); x may be overwritten."""
    if x.device.type != "cpu":
        return x.sort(dim=1).values
    x.numpy().sort(axis=1)  # in place, and 3 times as fast as torch's, which also sorts indices
    return x


@torch.no_grad()
def sliced_wasserstein(real, fake, *, seed=0, device="cpu"):
    """Measure how far apart the patches of two sets of images are, at every scale.

    At each level of the Laplacian pyramid both sets become clouds of points, random 7 x 7 x 3 patches.
    Projected onto one direction, the Wasserstein distance of two clouds of equal size is the mean absolute
    difference of the sorted values; it is averaged over 512 random directions and multiplied by 1,000.
    0 would be equal clouds, but the positions of the patches differ between the sets, so the floor is above 0
    and falls as the count grows: give the figure of one set of real images against another beside it.
    Each set is normalised by itself, which hides global colour errors: see `channel_statistics`.

    Memory: the descriptors of one level, 2 * n * 128 * 147 * 4 bytes at any image size, and what sorting
    needs: for n = 16,384 on the CPU 2.5 GB, and 3.3 GB measured at the peak of the whole process (256 x 256).

    Args:
        real, fake: uint8 (n, H, W, 3), same shape, sides of at least 16 px; arrays or memmaps.
        seed: of the patch positions and the directions; the result is a function of it.
        device: where the pyramids, projections and sorting are computed.
    Returns:
        "levels": {height of the level in px: distance x 1,000}, finest first; "mean": their mean;
        "images": n; "descriptors": n * 128, the points of each cloud.
    Raises:
        ValueError: not uint8 (n, H, W, 3), shapes differ, sides too small, or a channel is constant.
    Source: Karras et al. (ICLR 2018), section 5.
    """
    check_images("real", real)
    check_images("fake", fake)
    if real.shape != fake.shape:
        raise ValueError(f"real and fake must have one shape and count; got {real.shape} and {fake.shape}")
    n, H, W, _ = real.shape
    if min(H, W) < SMALLEST_LEVEL_PX:
        raise ValueError(f"images must measure at least {SMALLEST_LEVEL_PX} px a side; got {H} x {W}")
    generator = torch.Generator().manual_seed(seed)
    levels, distances = count_levels(H, W), {}
    for level in range(levels):
        clouds = [
            descriptors(name, images, level, levels, generator, device)
            for name, images in (("real", real), ("fake", fake))
        ]
        directions = torch.randn(DIRECTIONS, clouds[0].shape[1], generator=generator)
        directions = F.normalize(directions, dim=1).to(device)
        total = 0.0
        for lot in directions.split(DIRECTIONS_PER_LOT):
            a, b = (sort_rows(lot @ cloud.T) for cloud in clouds)  # (DIRECTIONS_PER_LOT, P)
            total += (a - b).abs().mean(dim=1).sum().item()
        distances[H >> level] = 1000 * total / DIRECTIONS
        del clouds  # before the next level makes its own
    return {
        "levels": distances,
        "mean": sum(distances.values()) / levels,
        "images": n,
        "descriptors": n * PATCHES_PER_IMAGE,
    }


# ----------------------------------------------------------------------------------------------------------
# Colour and seams


def channel_statistics(images):
    """Return the mean and the standard deviation of each channel over all pixels of all images.

    Args:
        images: uint8 (n, H, W, 3).
    Returns:
        mean, deviation: float64 (3,) each, 0 to 255.
    Raises:
        ValueError: not uint8 (n, H, W, 3).
    """
    check_images("images", images)
    # A histogram is exact at any count, and gives the two-pass deviation from one pass over the images.
    counts = np.zeros((3, 256))
    for chunk in chunks(images):
        counts += [np.bincount(chunk[..., c].ravel(), minlength=256) for c in range(3)]
    frequency = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256)
    mean = frequency @ values
    return mean, np.sqrt((frequency * (values - mean[:, None]) ** 2).sum(axis=1))


def line_steps(images, axis):
    """Sum the differences of each line (axis 1: row, 2: column) to the next, the last to the first."""
    steps = np.zeros(images.shape[axis])
    for chunk in chunks(images):
        pixels = chunk.astype(np.int16)  # differences of uint8 would wrap round
        difference = np.abs(np.roll(pixels, -1, axis) - pixels)
        steps += difference.sum(axis=tuple({0, 1, 2, 3} - {axis}), dtype=np.int64)
    return steps


def border_over_inside(name, images, S, wrap):
    """Divide the differences of neighbouring pixels across borders by those inside micro patches.

    Sums, not means: the numbers of pairs are those of the other set, and cancel between the two ratios.
    """
    totals = np.zeros(2)  # [inside, across a border]
    for axis, closed in ((1, wrap[0]), (2, wrap[1])):
        steps = line_steps(images, axis)
        lines = np.arange(len(steps) if closed else len(steps) - 1)
        across = (lines + 1) % S == 0
        totals += np.bincount(across, steps[lines], minlength=2)
    if totals[0] == 0:
        raise ValueError(f"{name}: no difference between any two pixels inside the patches, so no seam ratio")
    return totals[1] / totals[0]


def seam_ratio(real, fake, S, wrap=(False, False)):
    """Measure how visible the borders of the micro patches are in generated images.

    The mean absolute difference of neighbouring pixels across the borders of micro patches, over the same
    inside them, rows and columns together; this of the generated images, divided by this of real images, in
    which the borders are nothing special. 1 is seamless, above 1 seams show, below 1 borders are too smooth.

    Args:
        real, fake: uint8 (n, H, W, 3); the counts may differ, the sides may not.
        S: side of a micro patch in px, at least 2, dividing H and W.
        wrap: (vertically, horizontally), whether the last line borders on the first: (False, True) is a
            cylinder, whose left-right border counts as one more.
    Returns:
        float, 0 or above.
    Raises:
        ValueError: not uint8 (n, H, W, 3), sides differ, S has no borders or no inside, or images without
            any difference where one is divided by.
    """
    check_images("real", real)
    check_images("fake", fake)
    if real.shape[1:] != fake.shape[1:]:
        raise ValueError(f"real and fake must have one size; got {real.shape[1:3]} and {fake.shape[1:3]}")
    H, W = real.shape[1:3]
    if S < 2 or H % S or W % S:
        raise ValueError(f"S must be at least 2 and divide both sides; got S={S} for {H} x {W}")
    if H == W == S and not any(wrap):
        raise ValueError(f"images of {H} x {W} are one micro patch of S={S} each and have no borders")
    real_ratio = border_over_inside("real", real, S, wrap)
    if real_ratio == 0:
        raise ValueError("real: no difference between any two pixels across the borders, so no seam ratio")
    return float(border_over_inside("fake", fake, S, wrap) / real_ratio)


def column_seams(real, fake, S):
    """The seam ratio of each border between two columns of micro patches, the last that of right and left.

    As in `seam_ratio`, but of columns only, and each border by itself; a panorama whose ends meet has about
    the same figure everywhere.

    Args, raises: as of seam_ratio; W at least 2 S.
    Returns:
        float64 (W / S,), each 0 or above.
    """
    seam_ratio(real, fake, S, (False, True))  # for its checks
    steps = [
        line_steps(images, axis=2).reshape(-1, S) for images in (real, fake)
    ]  # the last of each row: a border
    if steps[0][:, :-1].sum() == 0 or steps[1][:, :-1].sum() == 0:
        raise ValueError("real or fake: no difference between any two columns inside the patches")
    of_real, of_fake = (step[:, -1] / step[:, :-1].sum() for step in steps)
    if of_real.min() == 0:
        raise ValueError(
            f"real: no difference across the border after column {S * (of_real.argmin() + 1) - 1}"
        )
    return of_fake / of_real


# ----------------------------------------------------------------------------------------------------------
# Distances of features: Fréchet (FID) and kernel (KID)


@torch.no_grad()
def features(network, images, device="cpu"):
    """Apply a network to uint8 (n, H, W, 3), a few images at a time, for its features: float32 (n, d).

    It is given uint8 (B, 3, H, W), and return_features=True if it is TorchScript whose `forward` has such an
    argument. NVIDIA's Inception needs that; it resizes the images itself, as TensorFlow 1 did.
    Raises: ValueError, one line: the network fails, or gives no floating-point (B, d), all finite, d up to
    MOST_FEATURES.
    """
    check_images("images", images)
    schema = getattr(getattr(network, "forward", None), "schema", None)
    named = schema is not None and "return_features" in [argument.name for argument in schema.arguments]
    found, start, options = None, 0, {"return_features": True} if named else {}
    for chunk in chunks(images):
        pixels = torch.from_numpy(chunk).to(device).permute(0, 3, 1, 2).contiguous()  # (B, 3, H, W)
        who = f"the network of features, given uint8 {tuple(pixels.shape)},"
        try:
            x = network(pixels, **options)
        except Exception as error:  # the last line of TorchScript's says what happened
            why = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
            raise ValueError(f"{who} fails: {why}") from error
        d = x.shape[1] if isinstance(x, torch.Tensor) and x.ndim == 2 and x.is_floating_point() else 0
        if not 1 <= d <= MOST_FEATURES or x.shape != (len(chunk), d if found is None else found.shape[1]):
            gives = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
            due = f"floats ({len(chunk)}, d), d up to {MOST_FEATURES}, are due"
            raise ValueError(f"{who} gives {gives}; {due}")
        found = np.empty((len(images), d), np.float32) if found is None else found
        found[start : start + len(chunk)] = x = x.float().cpu().numpy()
        if not np.isfinite(x).all():
            raise ValueError(f"{who} gives values that are not finite")
        start += len(chunk)
    return found


def feature_statistics(x):
    """Return the mean (d,) and the covariance (d, d) of features (n, d), with n - 1, both float64.

    A few thousand rows at a time, for float64 takes twice the memory of the features.
    Raises: ValueError: a single image.
    """
    if len(x) < 2:
        raise ValueError(f"a covariance takes at least 2 images; got {len(x)}")
    rows = [slice(start, start + 4096) for start in range(0, len(x), 4096)]
    mu = sum(x[some].sum(axis=0, dtype=np.float64) for some in rows) / len(x)
    sigma = np.zeros((len(mu), len(mu)))
    for some in rows:
        centred = x[some] - mu
        sigma += centred.T @ centred
    return mu, (sigma + sigma.T) / (2 * (len(x) - 1))  # symmetric to the bit


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Return the squared Fréchet distance of two Gaussians; of Inception's features it is the FID.

    |μ₁ - μ₂|² + tr Σ₁ + tr Σ₂ - 2 tr (Σ₁Σ₂)^½. The last trace is the sum of the roots of the eigenvalues of
    Σ₁^½ Σ₂ Σ₁^½, which are those of Σ₁Σ₂; where a covariance is singular, rounding may take some below 0.

    Args: mu (d,), sigma (d, d), as `feature_statistics` gives them; computed in float64.
    Raises: ValueError: shapes that do not fit.
    Source: Heusel et al. (NeurIPS 2017).
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if not (mu1.ndim == 1 and mu1.shape == mu2.shape and sigma1.shape == sigma2.shape == mu1.shape * 2):
        shapes = ", ".join(str(a.shape) for a in (mu1, sigma1, mu2, sigma2))
        raise ValueError(f"mu1, sigma1, mu2, sigma2 must be (d,), (d, d), (d,), (d, d); got {shapes}")
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


def kernel_distance(x, y, *, seed=0):
    """Return KID x 1,000 of features (n, d) and (k, d): mean and standard deviation over 100 random subsets.

    A subset has 1,000 images of each set, or half of the smaller set if that is less, at least 2. The mean is
    not biased by the count, as the Fréchet distance is.
    Raises: ValueError: fewer than 2 images, or d differs.
    Source: Bińkowski et al. (ICLR 2018).
    """
    n = min(len(x), len(y))
    if n < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features must be (n, d) and (k, d), n and k at least 2; got {x.shape}, {y.shape}")
    m, rng = min(KERNEL_SUBSET_SIZE, max(2, n // 2)), np.random.default_rng(seed)
    values = [
        squared_mmd(*(a[rng.choice(len(a), m, replace=False)].astype(np.float64) for a in (x, y)))
        for _ in range(KERNEL_SUBSETS)
    ]
    return float(1000 * np.mean(values)), float(1000 * np.std(values))


# ----------------------------------------------------------------------------------------------------------
# While training


def in_training(generate, real, S, wrap=(False, False), device="cpu"):
    """Figures for training to log: {"swd": mean SWD x 1,000, "seam_ratio": ...}, always of the same latents.

    One that the images do not have, of one grey, under 16 px or of one micro patch, is left out. No global
    random state is used. Memory: the generated images, and what `sliced_wasserstein` takes.

    Args:
        generate: (first, last) -> uint8 (last - first, H, W, 3), the images of seeds first to last - 1. These
            begin at MOST_IMAGES, as those of `evaluate --seed 1` do.
        real: uint8 (n, H, W, 3), compared with as many.
        S, wrap: as of `seam_ratio`.
    Raises: ValueError: not uint8 (n, H, W, 3), or sizes differ.
    """
    check_images("real", real)
    n, H, W, _ = real.shape
    B, end = max(1, PIXELS_PER_BATCH // (H * W)), MOST_IMAGES + n
    fake = np.empty(real.shape, np.uint8)
    for i in range(MOST_IMAGES, end, B):
        images = generate(i, min(i + B, end))
        check_images("fake", images)
        if images.shape != (due := (min(B, end - i), H, W, 3)):
            raise ValueError(f"generated images must be {due}; got {images.shape}")
        fake[i - MOST_IMAGES :][: len(images)] = images
    figures = {}
    with contextlib.suppress(ValueError):
        figures["swd"] = sliced_wasserstein(real, fake, device=device)["mean"]
    with contextlib.suppress(ValueError):
        figures["seam_ratio"] = seam_ratio(real, fake, S, wrap)
    return figures
