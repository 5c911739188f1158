"""LocoGAN: images of any size from noise images, in one file that reads from top to bottom.

    python -m related.locogan train                    # toy faces; with --data ./photos, photographs
    python -m related.locogan train --data brick.jpg   # one texture, which will tile
    python -m related.locogan sample --size 48x80      # any size; --help names all that can be drawn

G is convolutional and pads nothing: it turns a noise image of h x w cells into a picture of u·h x u·w pixels.
Learning is local: D compares crops of real images with crops that G makes for the same positions.

Source: Struski et al., "LocoGAN – Locally Convolutional GAN", arXiv 2002.07897. Sections, figures and tables
named below are that paper's; "the released code" is its authors'. Rows always come first: (y, x).

    L, u         layers of G that double the sides, and the side of a cell in pixels, 2^L; crops have 4u
    noise        a noise image: (B, C, h + 4, w + 4), h x w cells and a BORDER of 2 around them. Its channels:
                 master plan, one Gaussian draw an image; local plan, one Gaussian draw a cell (figure 4)
    start, step  where the first cell begins and how far it is to the next, (B, 2), in fractions of the image
    at           the P position channels, which say where each cell or pixel is
    x, s         B real crops, and the generated crops s = G(noise, start, step) of the same positions
"""

from __future__ import annotations

import argparse
import copy
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

import coco_gan
from coco_gan import LAYOUT, cast, option, spectral_norm, to_device, to_uint8, update
from data import CROPS, EXTENSIONS, UserError, make_folder, read_file, read_rgb
from kernels import crop_patches

# ---- Configuration (section 4): each field is a flag of `train`, and is in every checkpoint ----------------

BORDER = 2  # cells of noise around a picture, which G needs, for it pads nothing


@dataclass(frozen=True)
class Config:
    height: int = option(128, (1, 16384), "height in pixels of an image, or of a texture's period")
    width: int = option(128, (1, 65536), "width in pixels of an image, or of a texture's period")
    mixed: bool = option(False, None, "cut images to random widths, from --height to --width")
    L: int = option(4, (1, 8), "layers of G that double the sides; crops have a side of 4 times 2^L pixels")
    topology: str = option("plane", coco_gan.TOPOLOGIES, "which borders of an image meet")
    master: int = option(16, (0, 4096), "channels of the master plan")
    local: int = option(2, (0, 4096), "channels of the local plan")
    positions: str = option("all", ("all", "first", "none"), "which layers of G have position channels")
    mix: int = option(0, (0, 8), "1 x 1 convolutions before the others of G")
    width_g: int = option(128, (1, 1024), "channels before G's last layer; earlier: 2, 4, 8, … times")
    width_d: int = option(64, (1, 1024), "channels after D's first layer; later: 2, 4, 8, … times")
    lr_g: float = option(2e-4, (0, 1), "learning rate of G")
    lr_d: float = option(2e-4, (0, 1), "learning rate of D")
    slow: int = option(10**9, (0, 10**9), "step from which on both learning rates are a quarter")
    beta1: float = option(0.5, (0, 0.9999), "Adam's β1")
    beta2: float = option(0.999, (0, 0.999999), "Adam's β2")
    batch_size: int = option(64, (2, 65536), "crops per step, of all processes together")
    steps: int = option(300_000, (1, 10**9), "training steps, each of D and of G")
    ema: float = option(0.999, (0, 0.999999), "decay of the moving average of G's weights; 0: none")
    precision: str = option("auto", coco_gan.PRECISIONS, "of the layers of G and D")
    seed: int = option(0, (0, 2**63 - 1), "seed of the weights, the batches and the noise")
    data: str = option("toy:faces", None, "folder or zip of images, one image, toy:faces or toy:landscapes")
    crop: str = option("auto", CROPS, "what is cut out; squash: nothing, the image is resized")
    every_px: int = option(1, (1, 4096), "crops start at multiples of this many pixels")
    zoom: float = option(1.0, (0.25, 1), "half of the crops have from this part of their side on, enlarged")
    holdout: int = option(0, (0, 10**9), "images kept out of training, for evaluation")

    @property
    def u(self) -> int:
        return 2**self.L

    @property
    def closed(self) -> tuple[bool, bool]:
        return coco_gan.TOPOLOGIES[self.topology]

    @property
    def P(self) -> int:
        return 0 if self.positions == "none" else 2 + sum(self.closed)

    @property
    def texture(self) -> bool:
        """Whether the data is one image, whose crops have no position of their own (section 4.2)."""
        return self.data.lower().endswith(EXTENSIONS) and not Path(self.data).is_dir()

    def check(self) -> Config:
        """Return the configuration if it makes a model. Raises: UserError, which names the flag, if not."""
        coco_gan.check_fields(self)
        for name, px, closed in zip(("height", "width"), (self.height, self.width), self.closed):
            least = 8 * self.u if closed else 4 * self.u  # in a shorter period, a crop would see noise twice
            if px % self.u or px < least:
                raise UserError(f"--{name} {px} is no multiple of {self.u} from {least} on; or change --L")
        if self.mixed and (self.texture or any(self.closed) or self.width < self.height):
            raise UserError("--mixed is for images on a plane, with --width from --height on; leave it out")
        return self


CPU = dict(L=3, width_g=32, mix=1, lr_g=1e-3, lr_d=2e-3, beta1=0.0, beta2=0.9, batch_size=16)
PRESETS = {  # those for CPUs, and `steps`, are ours; the paper's have the sizes of section 4
    "toy": CPU | dict(height=32, width=32, L=2, width_g=64, zoom=0.6, slow=10_000, steps=13_500),
    "faces64": CPU | dict(height=64, width=64, slow=26_000, steps=28_000),
    "texture": CPU | dict(height=64, width=64, topology="torus", local=8, width_d=32, slow=4500, steps=7000),
    "panorama": CPU
    | dict(height=32, width=96, topology="cylinder", data="toy:landscapes", slow=5700, steps=8500),
    "ffhq128": dict(),  # tables 1 and 2; loss, rates and batch size, which it leaves out: released code
    "ffhq128-released": dict(width_g=64, positions="first", every_px=64),
    "lsun128": dict(width=176, mixed=True),
    "strip": dict(height=64, width=192, topology="cylinder"),
    "tile": dict(height=192, width=192, topology="torus"),
}


# ---- Position channels (section 3, "Adding spatial information"; section 4.2) ------------------------------


def positions(config: Config, start, step, rows: int, columns: int, border: int = 0) -> torch.Tensor:
    """The position channels of rows x columns cells or pixels, and of a border around them.

    Args: start, step: (B, 2), see the header. Each cell or pixel has the position p of its centre.
    Returns: (B, P, …): 2p - 1 of an open axis, from -1 to 1 in the image; cos 2πp, sin 2πp of a closed one.
    Deviation: the paper resizes the channels of the noise to each layer. Here they are exact in each layer.
    """
    axes, size = [], (rows + 2 * border, columns + 2 * border)
    for n, closed in enumerate(config.closed):
        i = torch.arange(size[n], device=start.device) - border + 0.5
        p = start[:, n, None] + i * step[:, n, None]  # (B, size[n])
        p = [torch.cos(2 * torch.pi * p), torch.sin(2 * torch.pi * p)] if closed else [2 * p - 1]
        axes.append(torch.stack(p, dim=1).unsqueeze(3 - n).expand(-1, -1, *size))
    return torch.cat(axes, dim=1)[:, : config.P].contiguous(memory_format=LAYOUT)


# ---- Networks (section 3, "Architecture"; tables 1 and 2) --------------------------------------------------


def init_weights(net: nn.Module) -> nn.Module:
    """Weights N(0, 0.02), those of batch norms N(1, 0.02), biases 0, as in the released code."""
    for name, p in net.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name), std=0.02) if "weight" in name else nn.init.zeros_(p)
    return net.to(memory_format=LAYOUT)


class Generator(nn.Module):
    """G: a picture from a noise image (table 1).

    A transposed convolution of kernel 4, stride 2, padding 3 makes 2n - 4 of n and reads no padding, so the
    border stays 2. The last layer makes u·h + 1 of u·h + 4. Cell i changes the pixels u(i-1) … u(i+2) only.
    Deviation: the paper's border is 3, its outermost cells change nothing. The 1 x 1 convolutions are ours.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        later = config.P if config.positions == "all" else 0  # position channels of all layers but the first
        channels = [config.width_g << k for k in reversed(range(config.L))]  # …, 4, 2, 1 times width_g
        inputs = [width + later for width in [channels[0]] * config.mix + channels]
        inputs = [config.master + config.local + config.P, *inputs]
        self.convs = nn.ModuleList(nn.Conv2d(c, channels[0], 1, bias=False) for c in inputs[: config.mix])
        for pair in zip(inputs[config.mix :], channels):
            self.convs.append(nn.ConvTranspose2d(*pair, 4, stride=2, padding=3, bias=False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(conv.out_channels) for conv in self.convs)
        self.last = nn.ConvTranspose2d(inputs[-1], 3, 4, stride=1, padding=3)
        init_weights(self)

    def forward(self, noise, start, step):  # (B, C, h + 4, w + 4), … -> (B, 3, u·h, u·w) in [-1, 1]
        h, w = (side - 2 * BORDER for side in noise.shape[2:])
        at = positions(self.config, start, step, h, w, BORDER)
        x = torch.cat([noise, at], dim=1).to(self.last.weight.dtype, memory_format=LAYOUT)
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x)))
            if conv.stride[0] == 2:
                h, w, step = 2 * h, 2 * w, step / 2
                at = positions(self.config, start, step, h, w, BORDER)
            if self.config.positions == "all":
                x = torch.cat([x, at.to(x.dtype)], dim=1)  # (B, … + P, h + 4, w + 4)
        return torch.tanh(self.last(x)[:, :, :-1, :-1].float())


def discriminator(config: Config) -> nn.Sequential:
    """D: the scores (B,) of crops beside the position channels of their pixels (table 2, without sigmoid)."""
    D, channels = nn.Sequential(), [3 + config.P, *(config.width_d << k for k in range(config.L))]
    for pair in zip(channels, channels[1:]):
        D.extend([nn.Conv2d(*pair, 4, stride=2, padding=1), nn.LeakyReLU(0.2)])  # as in the released code
        D[-2].register_buffer("v", F.normalize(torch.randn(16 * pair[0]), dim=0))  # for spectral_norm
    D.extend([nn.Conv2d(channels[-1], 1, 4), nn.Flatten(0)])  # the last is not normalized (section 3)
    return init_weights(D)


# ---- Batches: local learning (section 3; figure 5) ---------------------------------------------------------


def load_stored(config: Config, cache: str) -> np.ndarray:
    """The images, (n, height, width, 3) uint8, or one texture (1, H, W, 3), its shorter side 512 pixels."""
    if not config.texture:
        return coco_gan.load_stored(config, cache)
    try:
        image = read_rgb(read_file(config.data))
    except Exception as error:  # Pillow raises whatever its decoders meet
        raise UserError(f"--data {config.data} cannot be read: {error}; give another image") from error
    scale = 512 / min(image.size)
    return np.array(image.resize([min(round(px * scale), 2**14) for px in image.size]))[None]


def draw_batch(config: Config, images, indices, rng, device) -> list[torch.Tensor]:
    """Draw images, positions and noise. Cells are independent, so that the noise of a crop is drawn at once.

    Args: images (n, H, W, 3) uint8 on any device; indices (k,) int64 of those that may be drawn.
    Returns: x (B, 3, 4u, 4u) in [-1, 1], noise (B, C, 8, 8), start, step (B, 2): of these, its share.
    """
    B, side, cells = config.batch_size, 4 * config.u, 4 + 2 * BORDER
    index = indices[torch.randint(len(indices), (B,), generator=rng)]
    size = torch.tensor([config.height, config.width]).repeat(B, 1)
    if config.mixed:  # Deviation: proportions are random, and not those of the photographs
        size[:, 1] = torch.randint(config.height, config.width + 1, (B,), generator=rng)
    cut = (side * config.zoom ** (2 * torch.rand(2, generator=rng) - 1).clamp(min=0)).round().long()
    last = torch.where(torch.tensor(config.closed), size - 1, size - cut)  # crops wrap where borders meet
    corner = (torch.rand(B, 2, generator=rng) * (last // config.every_px + 1)).long() * config.every_px
    source = corner + (torch.tensor([config.height, config.width]) - size) // 2  # of `mixed`, the middle
    if config.texture:  # a crop from anywhere in it has any position in the period
        source = (torch.rand(B, 2, generator=rng) * (torch.tensor(images.shape[1:3]) - cut + 1)).long()
    master = torch.randn(B, config.master, 1, 1, generator=rng).expand(-1, -1, cells, cells)
    noise = torch.cat([master, torch.randn(B, config.local, cells, cells, generator=rng)], dim=1)
    batch = index, *source.unbind(1), noise, corner / size, cut / 4 / size
    *crop, noise, start, step = (t.chunk(coco_gan.WORLD)[coco_gan.RANK] for t in batch)
    x = crop_patches(images, *(to_device(t, images.device) for t in crop), *cut.tolist())
    x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)  # changes nothing without zoom
    return [to_device(t, device) for t in (x.contiguous(memory_format=LAYOUT), noise, start, step)]


# ---- Training step (section 2) -----------------------------------------------------------------------------


class LocoGAN(nn.Module):
    """All that training changes: networks, optimizers, random numbers and the count of steps."""

    Config, FORMAT = Config, "locogan checkpoint 1"
    LOSSES = ("L_D", "L_G", "D_real", "D_generated")
    LINE = "D {L_D:.2f}  G {L_G:.2f}  D(x) {D_real:.2f}  D(s) {D_generated:.2f}"  # of the log
    LEGEND = "D, G: the losses; D(x), D(s): how probable D finds it that they are real"
    COMMAND = "-m related.locogan"

    def __init__(self, config: Config, device: torch.device):
        super().__init__()
        torch.manual_seed(config.seed)
        self.config, self.device, self.step = config, device, 0
        self.rng = torch.Generator().manual_seed(2**63 + config.seed)  # another stream than the weights'
        self.G, self.D = Generator(config), discriminator(config)
        self.G_ema = copy.deepcopy(self.G).requires_grad_(False).eval()
        self.to(device)
        self.opt_G = coco_gan.make_adam([dict(params=[*self.G.parameters()])], config, device)
        self.opt_D = coco_gan.make_adam([dict(params=[*self.D.parameters()])], config, device)


def train_step(gan: LocoGAN, x, noise, start, step, ema_weight) -> torch.Tensor:
    """One step of D, then one of G, on the same generated crops.

    Args: a batch of `draw_batch`; ema_weight: how far the EMA of G's weights moves, a tensor in [0, 1].
    Returns: the LOSSES, (4,). D_real and D_generated are D's mean probabilities that x and s are real.
    """
    config, G, D, B, side = gan.config, gan.G, gan.D, len(x), x.shape[3]
    for optimizer, lr in ((gan.opt_G, config.lr_g), (gan.opt_D, config.lr_d)):
        optimizer.param_groups[0]["lr"] = lr / 4 if gan.step >= config.slow else lr
    s = functional_call(G, cast(gan, dict(G.named_parameters())), (noise, start, step))  # (B, 3, 4u, 4u)
    at = positions(config, start, step / config.u, side, side)  # (B, P, 4u, 4u), of x as of s

    # D: minimise ½ (E[-log σ(D(x))] + E[-log(1 - σ(D(s)))]). The ½ is the released code's.
    D_sn = cast(gan, spectral_norm(D, iterate=True))
    both = torch.cat([torch.cat([x, s.detach()]), torch.cat([at, at])], dim=1).to(D_sn["0.weight"].dtype)
    score = functional_call(D, D_sn, both).float()  # of (2B, 3 + P, 4u, 4u)
    L_D = (F.softplus(-score[:B]).mean() + F.softplus(score[B:]).mean()) / 2
    update(gan.opt_D, L_D)

    # EMA of G's weights and running statistics as they made s. Deviation: the paper samples from G itself.
    with torch.no_grad():
        for average, now in zip(gan.G_ema.state_dict().values(), G.state_dict().values()):
            if average.is_floating_point():
                average.lerp_(now, ema_weight)

    # G: minimise E[-log σ(D(s))] by way of the updated D, whose parameters are detached: they get no gradient
    # Deviation: section 2 prints E[log(1 - σ(D(s)))]. This is the released code's, with larger gradients.
    D_sn = cast(gan, {name: p.detach() for name, p in spectral_norm(D, iterate=False).items()})
    L_G = F.softplus(-functional_call(D, D_sn, torch.cat([s, at], dim=1).to(both.dtype)).float()).mean()
    update(gan.opt_G, L_G)
    real, generated = torch.sigmoid(score.detach()).split(B)
    return torch.stack([L_D.detach(), L_G.detach(), real.mean(), generated.mean()])


# ---- Sampling: pictures of any size (sections 4.1 and 4.2) -------------------------------------------------


def view(config: Config, size=None, extend=False, periodic=(False, False), turns: int = 1) -> tuple:
    """What to draw for a picture of size (height, width) in pixels, by default that of the image.

    Args: extend: go on beyond the image; else it is stretched, by more cells (figures 10, 12). turns: around
    closed axes. periodic: along which the local plan repeats, and so the picture, exactly (figure 2); along
    others each turn has its own (figure 7). Raises: UserError.
    Returns: pairs (y, x): numbers of the cells and of their border; start; step; which pixels to show.
    """
    axes, u = [], config.u
    for n, (full, closed) in enumerate(zip((config.height, config.width), config.closed)):
        side = size[n] if size else full
        period, shown = full if extend else side, side * turns if closed else side
        if periodic[n] and (not closed or period % u or period < 8 * u):
            why = f"that is no multiple of {u} from {8 * u} on" if closed else "these borders do not meet"
            raise UserError(f"--periodic {'yx'[n]} is impossible with {period} pixels in this model: {why}")
        drawn = period if periodic[n] else shown
        count = -(-drawn // u)
        first = (full // u - count) // 2 if extend and not closed else 0  # the image is in the middle
        cells = np.arange(first - BORDER, first + count + BORDER)
        cells = cells % count if periodic[n] else cells
        axes.append((cells, first * u / period, u / period, np.arange(shown) % drawn))
    return tuple(zip(*axes))


def noise_image(config: Config, seed: int, view: tuple) -> torch.Tensor:
    """The noise image of a seed, (1, C, h + 4, w + 4). Cells of the same number have the same noise."""
    (rows, columns), master = view[0], np.random.default_rng(seed).standard_normal(config.master)
    draws = (np.random.default_rng((seed, i % 2**32, j % 2**32)) for i in rows for j in columns)
    noise = np.stack([np.concatenate([master, draw.standard_normal(config.local)]) for draw in draws])
    return torch.from_numpy(noise).float().view(1, len(rows), len(columns), -1).permute(0, 3, 1, 2)


@torch.inference_mode()
def render(G: Generator, noise: torch.Tensor, view: tuple) -> torch.Tensor:
    """The picture of a noise image: (1, 3, height, width) in [-1, 1]. G makes about 2¹⁸ pixels at a time."""
    _, (top, left), (down, across), (y, x) = view
    rows, parts = max(1, 2**18 // (G.config.u**2 * noise.shape[3])), []
    for r in range(0, noise.shape[2] - 2 * BORDER, rows):
        some, start = noise[:, :, r : r + rows + 2 * BORDER], torch.tensor([[top + r * down, left]])
        parts.append(G(*(t.to(G.last.weight.device) for t in (some, start, torch.tensor([[down, across]])))))
    return torch.cat(parts, dim=2)[:, :, y][..., x]


# ---- Commands ----------------------------------------------------------------------------------------------


def load(where: str | None = None, device="cpu") -> tuple[Generator, Path]:
    """G of a checkpoint, see coco_gan.find_checkpoint, with the EMA of its weights. Raises: UserError."""
    path = coco_gan.find_checkpoint(where, root="runs/locogan")
    config, contents = coco_gan.read_checkpoint(path, LocoGAN)
    G = Generator(config)
    G.load_state_dict({name: contents["tensors"][f"G_ema.{name}"] for name in G.state_dict()})
    return G.to(device).requires_grad_(False).eval(), path


def show(gan: LocoGAN) -> np.ndarray:
    """Full images of the EMA of G, of 24 seeds that are always the same: one picture (h, w, 3)."""
    here = view(gan.config, periodic=gan.config.closed)
    noise = (noise_image(gan.config, seed, here) for seed in range(24))
    return coco_gan.grid(np.concatenate([to_uint8(render(gan.G_ema, one, here)) for one in noise]))


def choose_preset(args: argparse.Namespace, device: torch.device) -> str:
    """--preset, or the default for these images."""
    data, presets = getattr(args, "data", Config.data), {"toy:faces": "toy", "toy:landscapes": "panorama"}
    return args.preset or presets.get(data, "texture" if Config(data=data).texture else "faces64")


def train(args: argparse.Namespace) -> int:
    """`train`: from images to checkpoints, pictures and a log in a run folder; returns the exit status."""
    device, given = coco_gan.start(args), coco_gan.given_fields(args, Config)
    load_images_of = functools.partial(load_stored, cache=args.cache)
    if args.resume is None:
        preset = choose_preset(args, device)
        config = Config(**PRESETS[preset] | given).check()
        stored, gan = load_images_of(config), LocoGAN(config, device)
        run = coco_gan.new_run(args.run, f"locogan/{preset}")
    else:
        run = coco_gan.find_checkpoint(args.resume or None, root="runs/locogan").parent
    with coco_gan.lock_run(run):
        if args.resume is not None:
            gan, stored = coco_gan.resume(run, given, device, load_images_of, LocoGAN)
        if args.graph and gan.config.slow < gan.config.steps:
            raise UserError(f"--graph cannot change rates at --slow {gan.config.slow}; leave --graph out")
        return coco_gan.train_loop(gan, stored, run, args, draw_batch, train_step, show)


def sample(args: argparse.Namespace) -> None:
    """`sample`: from a checkpoint to a sheet of pictures, or to one file per picture in a folder."""
    G, path = load(args.checkpoint, coco_gan.choose_device(args.device, args.impl))
    periodic = G.config.closed if args.periodic is None else ("y" in args.periodic, "x" in args.periodic)
    look = functools.partial(view, G.config, extend=args.extend, periodic=periodic, turns=args.turns)
    here, pair = look(args.size), args.mix or args.transplant or args.interpolate
    seeds = range(args.seed[0], args.seed[0] + (args.count or 16)) if len(args.seed) == 1 else args.seed
    drawn = [(noise_image(G.config, seed, here), here) for seed in pair or seeds]
    if args.mix or args.transplant:
        (A, _), (B, _) = drawn
        y, x = (torch.from_numpy(numbers) for numbers in here[0])
        h, w = len(y) - 2 * BORDER, len(x) - 2 * BORDER
        top, left, height, width = args.at or (0, 0, h, w)
        if top + height > h or left + width > w:
            raise UserError(f"--at {args.at} is not TOP,LEFT,HEIGHT,WIDTH inside of {h} x {w} cells")
        masks = [((y >= top) & (y < top + height))[:, None] & (x >= left) & (x < left + width)]  # figure 14
        if args.mix:  # the right half, and the lower half (figure 11)
            masks = [x >= x[len(x) // 2], (y >= y[len(y) // 2])[:, None]]
        drawn[1:1] = [(torch.where(mask, B, A), here) for mask in masks]
    if args.interpolate:  # between two images, and between two sizes (figure 6)
        size, drawn = args.size or (G.config.height, G.config.width), []
        for t in np.linspace(0, 1, args.count or 7):
            here = look([round(p + t * (q - p)) for p, q in zip(size, args.to or size)])
            A, B = (noise_image(G.config, seed, here) for seed in pair)
            # Deviation: the paper's is linear. This keeps the variance of the noise, 1, all the way.
            drawn.append((((1 - t) * A + t * B) / np.hypot(1 - t, t), here))
    images = [to_uint8(render(G, *one))[0] for one in drawn]
    out = Path(args.out or path.parent / f"{path.stem}-sample.png")
    files = {out / f"{n:06d}.png": image for n, image in enumerate(images)}
    if not out.is_dir() and not str(args.out).endswith("/"):
        full = np.max([image.shape for image in images], axis=0)
        sheet = [np.pad(i, [(0, a - b) for a, b in zip(full, i.shape)], constant_values=255) for i in images]
        files = {out: coco_gan.grid(np.stack(sheet))}
    for name, picture in files.items():
        make_folder(name.parent)
        coco_gan.save_picture(picture, name)
    print(f"{out}: {len(images)} pictures, from {path}")


def numbers(form: str, text: str) -> list[int]:
    """Parse a text of a form such as HEIGHTxWIDTH, with digits for its words; sizes are above 0."""
    pattern = re.sub("[A-Z]+", r"\\d{1,9}", re.sub("HEIGHT|WIDTH", r"[1-9]\\d{0,5}", form))
    if not re.fullmatch(pattern, text):
        raise argparse.ArgumentTypeError(f"{text!r} is not {form}")
    return [int(number) for number in re.findall(r"\d+", text)]


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status, see coco_gan.run_command."""
    parser = coco_gan.Parser(prog="python -m related.locogan", description=__doc__.split("\n")[0])
    add = coco_gan.add_commands(parser, train, sample, choose_preset, Config, PRESETS)[1].add_argument
    for name, form, text in (
        ("--size", "HEIGHTxWIDTH", "any size in pixels, to which the image is stretched (default: its own)"),
        ("--mix", "A,B", "image A, A with the right half of B, A with the lower half of B, and B"),
        ("--transplant", "A,B", "image A, A with some cells of B, and B"),
        ("--at", "TOP,LEFT,HEIGHT,WIDTH", "the cells that --transplant takes from B (default: all)"),
        ("--interpolate", "A,B", "--count images from A to B (default: 7)"),
        ("--to", "HEIGHTxWIDTH", "the size of B in --interpolate, where A has --size"),
    ):
        add(name, type=functools.partial(numbers, form), metavar=form, help=text)
    add("--extend", action="store_true", help="do not stretch the image to --size, but go on beyond it")
    add("--turns", type=coco_gan.positive, default=1, metavar="N", help="periods to draw, where borders meet")
    add("--periodic", choices=("none", "y", "x", "yx"), help="axes of equal turns (default: all possible)")
    return coco_gan.run_command(parser, lambda args: args.act(args), argv)


if __name__ == "__main__":
    raise SystemExit(main())
