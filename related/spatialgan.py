"""SpatialGAN: images that grow from the centre outwards, in one file that reads from top to bottom.

    python -m related.spatialgan train                      # toy faces that data.py draws, 16 -> 32 pixels
    python -m related.spatialgan train --data ./photos      # a folder or a zip, 16 -> 32 -> 64 pixels
    python -m related.spatialgan sample [--growth]          # from the newest run under runs/spatialgan/
    python -m related.spatialgan sample --expand photo.jpg  # the middle of a photograph, carried on

A GAN makes the centre of an image. Each expansion network gets what there is so far as the middle of a larger
canvas, and makes the frame around it. First each level is trained by itself, then all together.

Source: Zhao et al., "SpatialGAN: Progressive Image Generation Based on Spatial Recursive Adversarial
Expansion", ACM MM 2020. Sections, equations and figures named below are that paper's.

    G_a, G_i     the centre network (BAAN), and the expansion networks (SAEN): levels 0 and i = 1 … N
    s_i          side of level i in pixels; the frame of level i is p = (s_i - s_{i-1}) / 2 wide
    IP_i         patch of level i, (B, 3, s_i, s_i) in [-1, 1]; its middle is IP_{i-1}; IP_N is the full image
    IPR_i        what G_i adds: the frame, 0 in the middle
    z_i, h_i     latent vector of level i, uniform on [-1, 1], and the LSTM's output after z_0 … z_i
    D_j, B, k    critics of a level at full, 1/2 and 1/4 size; images in a batch; halvings in an expansion
    *_sn         the parameters of a network after spectral normalization, W/σ
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

import coco_gan
from coco_gan import LAYOUT, DiscriminatorBlock, GeneratorBlock, cast, option, spectral_norm
from data import CROPS, UserError, decode_image, make_folder, read_file, reason_of
from kernels import avg_pool, crop_patches, relu

# ---- Configuration (section 4): each field is a flag of `train`, and is in every checkpoint ----------------


@dataclasses.dataclass(frozen=True)
class Config:
    sides: str = option("32,64,128,256", None, "sides of the levels in pixels, from the centre to the image")
    halvings: int = option(4, (1, 8), "how often an expansion network halves its canvas")
    z_dim: int = option(128, (1, 4096), "size of the latent vector of each level")
    width_g: int = option(64, (1, 1024), "base channels of G; they double with each halving")
    most_g: int = option(1024, (1, 8192), "most channels of a layer of G")
    width_d: int = option(64, (1, 1024), "base channels of a critic; its layers have …, 1, 2, 4, 8, 8 times")
    unet: bool = option(True, None, "connect the halvings of an expansion network to its doublings")
    attention: bool = option(True, None, "self-attention in the last expansion network")
    lstm: bool = option(True, None, "the LSTM over the latent vectors of the levels")
    pack: int = option(2, (1, 64), "images that a critic sees at once")
    scales: int = option(3, (1, 3), "critics of each level, at full, 1/2 and 1/4 size")
    loss: str = option("hinge", ("hinge", "wgan"), "hinge loss, or Wasserstein with gradient penalty")
    lambda_gp: float = option(10.0, (0, 1e6), "weight λ of the gradient penalty, with --loss wgan")
    lr_g: float = option(5e-5, (0, 1), "learning rate of G, halved while all levels train")
    lr_d: float = option(2e-4, (0, 1), "learning rate of the critics, halved while all levels train")
    beta1: float = option(0.0, (0, 0.9999), "Adam's β1")
    beta2: float = option(0.9, (0, 0.999999), "Adam's β2")
    d_steps: int = option(2, (1, 100), "steps of the critics for one of G")
    batch_size: int = option(64, (2, 65536), "images per step")
    steps: int = option(500_000, (1, 10**9), "training steps of all phases together")
    stage_steps: int = option(-1, (-1, 10**9), "steps of each level by itself; -1: equal parts of 5/6 of all")
    ema: float = option(0.999, (0, 0.999999), "decay of the exponential moving average of G; 0: none")
    precision: str = option("auto", coco_gan.PRECISIONS, "of the layers of G and the critics")
    seed: int = option(0, (0, 2**63 - 1), "seed of the weights, the batches and the latents")
    data: str = option("toy:faces", None, "folder or zip of images, toy:faces or toy:landscapes")
    crop: str = option("auto", CROPS, "what is cut out; squash: nothing, the image is resized")
    mirror: bool = option(False, None, "mirror half of the real images")
    holdout: int = option(0, (0, 10**9), "images kept out of training, for evaluation")

    s = property(lambda self: [int(side) for side in self.sides.split(",")])
    N = property(lambda self: len(self.s) - 1)  # expansions
    height = width = property(lambda self: self.s[-1])
    C = property(lambda self: [min(self.width_g << b, self.most_g) for b in range(9)])  # G's, halved b times

    def phase(self, step: int) -> int:
        """The level that a step trains, or N + 1: all together. A single level has no such phase."""
        return min(step // self.stage_steps if self.stage_steps else self.N + 1, self.N + (self.N > 0))

    def check(self) -> Config:
        """The configuration, with a number for --stage-steps -1. Raises: UserError, which names the flag."""
        coco_gan.check_fields(self)
        unit, known = 2**self.halvings, re.fullmatch(r"[1-9]\d{0,4}(,[1-9]\d{0,4}){0,7}", self.sides)
        rising = known and all(a < b and b % unit == 0 for a, b in zip(self.s, self.s[1:]))
        if not rising or self.s[0] not in (4, 8, 16, 32, 64, 128, 256, 512, 1024):
            hint = f"give 4, 8, 16, 32, … first, then ever larger multiples of {unit}, 2 to the --halvings"
            raise UserError(f"--sides {self.sides} do not fit; {hint}")
        if self.batch_size % self.pack or self.batch_size < 2 * self.pack:
            raise UserError(f"--batch-size {self.batch_size} is not 2, 3, … times --pack {self.pack}")
        if self.stage_steps == -1:
            share = 5 * self.steps // (6 * (self.N + 1)) if self.N else self.steps
            return dataclasses.replace(self, stage_steps=share)
        if self.N and self.stage_steps * (self.N + 1) > self.steps:
            hint = f"for {self.N + 1} levels are more than --steps {self.steps}; change one of them"
            raise UserError(f"--stage-steps {self.stage_steps} {hint}")
        return self


# λ_i of equation 4 (section 4); 1 for the centre. Deviation: the paper ends at 3; we go on with 1.5 times.
LAMBDA = 1, 1.25, 2, 3, 4.5, 6.75, 10.1, 15.2
# The presets for CPUs are ours, and so are batch and steps of the paper's, which does not give them.
CPU = dict(halvings=3, z_dim=64, width_g=8, most_g=64, width_d=8, attention=False, loss="wgan")
CPU |= dict(lambda_gp=1.0, lr_g=1e-3, lr_d=2e-3, d_steps=1, batch_size=16)
PRESETS = {
    "toy": dict(sides="16,32", steps=4_800, **CPU),
    "faces": dict(sides="16,32,64", steps=9_000, **CPU),
    "spatial256": dict(stage_steps=100_000),
}


# ---- Networks (section 3.2, figure 4). The blocks are those of coco_gan.py. --------------------------------
# Deviation: the paper names instance norm and conditional batch norm, and no widths. These have the latter.


class Centre(nn.Module):
    """G_a(z_0): the centre patch (section 3.2.1), like the G of coco_gan.py, from 4 x 4 on."""

    def __init__(self, config: Config):
        super().__init__()
        C, doublings = config.C, (config.s[0] // 4).bit_length() - 1
        self.linear = nn.Linear(config.z_dim, 16 * C[doublings])
        pairs = [(C[b + 1], C[b]) for b in reversed(range(doublings))]
        self.blocks = nn.ModuleList(GeneratorBlock(*pair, config.z_dim, upscale=True) for pair in pairs)
        self.norm, self.conv = nn.BatchNorm2d(C[0]), nn.Conv2d(C[0], 3, 3, padding=1)
        coco_gan.init_weights(self)

    def forward(self, condition):  # (B, z_dim) -> (B, 3, s_0, s_0) in [-1, 1]
        x = self.linear(condition).unflatten(1, (-1, 4, 4)).to(self.conv.weight.dtype, memory_format=LAYOUT)
        for block in self.blocks:
            x = block(x, condition)
        return torch.tanh(self.conv(F.relu(self.norm(x))).float())


class Attention(nn.Module):
    """x + γ o(h softmax(fᵀ g)) over all positions; γ starts at 0 (section 3.2.2). Source: SAGAN."""

    def __init__(self, C: int):
        super().__init__()
        self.f, self.g, self.h = (nn.Conv2d(C, max(C // part, 1), 1) for part in (8, 8, 2))
        self.o, self.gamma = nn.Conv2d(max(C // 2, 1), C, 1), nn.Parameter(torch.zeros(()))

    def forward(self, x):  # (B, C, h, w) -> the same
        f, g, h = (layer(x).flatten(2) for layer in (self.f, self.g, self.h))  # (B, C/8 or C/2, h·w)
        weights = torch.softmax(f.transpose(1, 2) @ g, dim=1)  # (B, h·w read, h·w)
        return x + self.gamma * self.o((h @ weights).unflatten(2, x.shape[2:]))


class Expansion(nn.Module):
    """G_i(z_i, IP_{i-1}): IP_i = IP_{i-1} + IPR_i (section 3.2.2, figure 4). The middle stays as it is.

    Deviation: IP_{i-1} gets a margin of zeros, and IPR_i is 0 in the middle; the paper adds patches of two
    sizes. The canvas is halved k times, then doubled, so that features lie where their pixels do.
    """

    def __init__(self, config: Config, side: int, attention: bool):
        super().__init__()
        self.side, self.unet, C, k = side, config.unet, config.C, config.halvings
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for b in range(k):
            self.down.append(DiscriminatorBlock(C[b - 1] if b else 4, C[b], first=b == 0, pool=True))
            more = C[b] if config.unet and b < k - 1 else 0
            self.up.insert(0, GeneratorBlock(C[b + 1] + more, C[b], 2 * config.z_dim, upscale=True))
        self.conv1 = nn.Conv2d(C[k - 1], C[k], 3, padding=1)
        self.linear = nn.Linear(2 * config.z_dim, C[k])
        self.attention = Attention(C[k]) if attention else nn.Identity()
        self.norm = nn.BatchNorm2d(C[0])
        self.conv2 = nn.Conv2d(C[0] + 4 * config.unet, 3, 3, padding=1)
        for layer in (m for m in self.modules() if isinstance(m, nn.Conv2d) and m.padding != (0, 0)):
            layer.padding_mode = "replicate"  # zero padding leaves stripes at the edge of the image
        coco_gan.init_weights(self)

    def forward(self, condition, context):  # (B, 2 · z_dim), IP_{i-1} -> (B, 3, s, s) in [-1, 1]
        p = (self.side - context.shape[2]) // 2
        canvas, mask = (F.pad(t, [p] * 4) for t in (context, torch.ones_like(context[:, :1])))
        x = [torch.cat([canvas, mask], dim=1).to(self.conv1.weight.dtype, memory_format=LAYOUT)]
        for block in self.down:
            x.append(block(x[-1]))  # x[b]: (B, …, s/2^b, s/2^b)
        z = self.linear(condition).to(x[0].dtype)[:, :, None, None]
        y = self.attention(self.conv1(F.relu(x[-1])) + z)
        for b, block in enumerate(self.up):
            y = block(torch.cat([y, x[-1 - b]], dim=1) if self.unet and b else y, condition)
        y = F.relu(self.norm(y))  # (B, C_0, s, s)
        IPR = torch.tanh(self.conv2(torch.cat([y, x[0]], dim=1) if self.unet else y).float())
        return canvas + (1 - mask) * IPR


class Generator(nn.Module):
    """G_a, G_1 … G_N and the LSTM over z_0 … z_N, which tells a level what came before (section 3.2.3)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, N = config, config.N
        self.noise = nn.LSTMCell(config.z_dim, config.z_dim) if config.lstm and N else None
        levels = [Expansion(config, config.s[i], config.attention and i == N) for i in range(1, N + 1)]
        self.levels = nn.ModuleList([Centre(config), *levels])

    def conditions(self, z):  # (N + 1, B, z_dim) -> z_0 (B, z_dim), then each [z_i, h_i] (B, 2 · z_dim)
        found, state = [], None  # one cell for all levels, as in LR-GAN
        for z_i in z:
            state = self.noise(z_i, state) if self.noise else [torch.zeros_like(z_i)]
            found.append(torch.cat([z_i, state[0]], dim=1))  # deviation: z_i, too; h_i varies little
        return [z[0], *found[1:]]


class Critic(nn.Module):
    """D_j: the score of a group of images (section 3.3.2), like the D of coco_gan.py."""

    def __init__(self, config: Config, side: int):
        super().__init__()
        pools, last = max(side.bit_length() - 3, 0), 8 * config.width_d
        C = [3 * config.pack, *(max(last >> b, config.width_d) for b in reversed(range(pools))), last]
        blocks = [DiscriminatorBlock(C[b], C[b + 1], b == 0, pool=b < pools) for b in range(pools + 1)]
        self.blocks, self.linear = nn.Sequential(*blocks), nn.Linear(last, 1)
        coco_gan.init_weights(self)

    def forward(self, x):  # (B/pack, 3 · pack, h, w) -> (B/pack,) float32
        h = relu(self.blocks(x.to(self.blocks[0].conv1.weight.dtype))).float().sum(dim=(2, 3))
        return (h * self.linear.weight).sum(dim=1) + self.linear.bias


def middle(x: torch.Tensor, side: int, pack: int = 1) -> torch.Tensor:
    """The middle of images, `pack` neighbours as one: (B, 3, H, H) -> (B/pack, 3 · pack, side, side).

    Real images are cropped, not reduced. A pack is all real or all generated (sections 3.2.1 and 3.3.2).
    """
    p = (x.shape[2] - side) // 2
    x = x[:, :, p : p + side, p : p + side]
    return x.reshape(len(x) // pack, -1, side, side).contiguous(memory_format=LAYOUT)


# ---- Training (sections 3.1 and 3.3): one level after the other, then all together -------------------------


def draw_batch(config: Config, images, indices, rng, device) -> list[torch.Tensor]:
    """Draw images and latents, uniformly. On the CPU: a seed means the same batches on any device.

    Args: images (n, H, H, 3) uint8 on any device; indices (k,) int64 of those that may be drawn.
    Returns: x (n, 3, H, H) in [-1, 1], z (N + 1, n, z_dim), ε (N + 1, scales, n/pack), n = d_steps · B.
    """
    n, H, levels = config.d_steps * config.batch_size, config.height, config.N + 1
    index = indices[torch.randint(len(indices), (n,), generator=rng)]
    mirror = torch.rand(n, generator=rng) < 0.5 * config.mirror
    z = coco_gan.sample_latents(levels * n, config.z_dim, rng).view(levels, n, config.z_dim)
    epsilon = torch.rand(levels, config.scales, n // config.pack, generator=rng)
    index, mirror = (coco_gan.to_device(t, images.device) for t in (index, mirror))
    x = crop_patches(images, index, 0 * index, 0 * index, H, H, mirror=mirror)
    return [coco_gan.to_device(t, device) for t in (x, z, epsilon)]


class SpatialGAN(nn.Module):
    """All that training changes: networks, optimizers, random numbers and the count of steps."""

    Config, FORMAT = Config, "spatialgan checkpoint 2"
    LEGEND = "P: the phase; W: the critics' losses by level; GP: L_GP"
    COMMAND = "-m related.spatialgan"

    def __init__(self, config: Config, device: torch.device):
        super().__init__()
        torch.manual_seed(config.seed)
        self.config, self.device, self.step = config, device, 0
        self.rng = torch.Generator().manual_seed(2**63 + config.seed)  # another stream than the weights'
        self.LOSSES = ("phase", *(f"L_{config.loss}_{side}" for side in config.s), "L_GP")
        levels = "/".join(f"{{{name}:.2f}}" for name in self.LOSSES[1:-1])
        self.LINE = "P {phase:.0f}  W " + levels + "  GP {L_GP:.2f}"  # of the log
        D = [nn.ModuleList(Critic(config, s) for _ in range(config.scales)) for s in config.s]
        self.G, self.D = Generator(config), nn.ModuleList(D)
        self.G_ema = coco_gan.fold_spectral_norm(copy.deepcopy(self.G)).requires_grad_(False).eval()
        self.to(device)
        self.opt_G = coco_gan.make_adam([dict(params=[*self.G.parameters()])], config, device)
        self.opt_D = coco_gan.make_adam([dict(params=[*self.D.parameters()])], config, device)


def train_step(gan: SpatialGAN, x, z, epsilon, _) -> torch.Tensor:
    """d_steps steps of D, each on its part of a batch, and one of G, of the levels that learn: LOSSES."""
    config, G, G_ema, N = gan.config, gan.G, gan.G_ema, gan.config.N
    phase, before = config.phase(gan.step), config.phase(gan.step - 1)
    learning = [phase] if phase <= N else list(range(N + 1))
    for optimizer, lr in ((gan.opt_G, config.lr_g), (gan.opt_D, config.lr_d)):
        optimizer.param_groups[0]["lr"] = lr / 2 if phase > N else lr
        for state in optimizer.state.values() if phase != before else ():  # a new Adam
            torch._foreach_zero_(list(state.values()))

    # The LSTM learns with G_1 and with all. Between them it is the EMA's, so that the input of G_1 stays.
    nets = [(G if i in learning else G_ema).levels[i] for i in range(learning[-1] + 1)]
    G_sn = [spectral_norm(net, True) if net.training else net.state_dict() for net in nets]
    parts = (t.chunk(config.d_steps, dim) for t, dim in ((x, 0), (z, 1), (epsilon, 2)))
    for x_d, z_d, epsilon_d in zip(*parts):
        IP, conditions = [], (G if 1 in learning else G_ema).conditions(z_d)
        for net, parameters, condition in zip(nets, G_sn, conditions):
            IP.append(functional_call(net, cast(gan, parameters), (condition, *IP[-1:])))
        losses, loss = torch.zeros(N + 3, device=gan.device), 0
        for i in learning:
            x_j, s_j = (middle(t, config.s[i], config.pack) for t in (x_d, IP[i].detach()))
            for j, D_j in enumerate(gan.D[i]):  # equation 5
                score = functools.partial(functional_call, D_j, cast(gan, spectral_norm(D_j, iterate=True)))
                of_x, of_s = score(torch.cat([x_j, s_j])).chunk(2)
                if config.loss == "hinge":
                    L = F.relu(1 - of_x).mean() + F.relu(1 + of_s).mean()
                    loss = loss + L
                else:
                    L = coco_gan.wasserstein(of_x, of_s)
                    L_GP, _ = coco_gan.gradient_penalty(score, x_j, s_j, epsilon_d[i, j])
                    loss, losses[-1] = loss - L + config.lambda_gp * L_GP, losses[-1] + L_GP.detach()
                losses[1 + i] += L.detach()
                x_j, s_j = avg_pool(x_j), avg_pool(s_j)
        coco_gan.update(gan.opt_D, loss)

    # EMA as in coco_gan.py, before G's update. Its decay grows anew for each level.
    weight = coco_gan.ema_weight(config, gan.step - min(phase, N) * config.stage_steps).to(gan.device)
    now = G.state_dict() | {f"levels.{i}.{name}": p for i in learning for name, p in G_sn[i].items()}
    moving = tuple([f"levels.{i}." for i in learning] + ["noise."] * (1 in learning))
    with torch.no_grad():
        for name, average in G_ema.state_dict().items():
            if name.startswith(moving) and average.is_floating_point():
                average.lerp_(now[name], weight)

    # G: L_{G_i} (equation 5) or L_{G_a} + Σ λ_i L_{G_i} (equation 4), by way of critics that get no gradient.
    loss, losses[0] = 0, phase
    for i in learning:
        s_j = middle(IP[i], config.s[i], config.pack)
        for D_j in gan.D[i]:
            D_sn = cast(gan, {name: p.detach() for name, p in spectral_norm(D_j, iterate=False).items()})
            loss = loss - (LAMBDA[i] if phase > N else 1) * functional_call(D_j, D_sn, s_j).mean()
            s_j = avg_pool(s_j)
    coco_gan.update(gan.opt_G, loss)
    return losses


# ---- Sampling (section 3.1, "test time") -------------------------------------------------------------------


def latents(seeds, config: Config) -> torch.Tensor:
    """z_0 … z_N of each seed, the same on every machine: (N + 1, len(seeds), z_dim)."""
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([coco_gan.sample_latents(config.N + 1, config.z_dim, rng) for rng in rngs], dim=1)


@torch.inference_mode()
def make_images(G: Generator, z, context=None, first: int = 0) -> list[torch.Tensor]:
    """IP_first … IP_N, float32 in [-1, 1], on the CPU; context: IP_{first-1}, unless first is 0."""
    device, at_once, parts = next(G.parameters()).device, max(1, 2**20 // G.config.height**2), []
    for b in range(0, z.shape[1], at_once):
        IP = [context[b : b + at_once].to(device)] if first else []
        for G_i, condition in zip(G.levels[first:], G.conditions(z[:, b : b + at_once].to(device))[first:]):
            IP.append(G_i(condition, *IP[-1:]))
        parts.append([patch.cpu() for patch in IP[first > 0 :]])
    return [torch.cat(patches) for patches in zip(*parts)]


def draw(G: Generator, seeds, args=None) -> np.ndarray:
    """A picture (h, w, 3) uint8 of images of these seeds, as the flags of `sample` say, or --growth."""
    config, z, columns = G.config, latents(seeds, G.config), None
    if args is None or args.growth:  # a column per seed, a row per level
        rows, columns = make_images(G, z), len(seeds)
    elif args.variants:  # a row per seed: its centre, and frames of z_1 … z_N of the seeds 0, 1, …
        rows, columns, z_all = [], 1 + args.variants, latents(range(args.variants), config)
        for z_all[0] in z[0]:
            centre, *_, images = make_images(G, z_all)
            rows += [centre[:1], images]
    elif args.expand:  # a row per level: the middle of a photograph, carried on by G_i … G_N
        rows, columns, x = [], 1 + len(seeds), read_photograph(args.expand, config)
        for i in range(1, config.N + 1):
            context = middle(x, config.s[i - 1])
            rows += [context, make_images(G, z, context.expand(len(seeds), -1, -1, -1), i)[-1]]
    else:
        rows = make_images(G, z)[-1:]
    rows = [F.pad(x, [(config.height - x.shape[2]) // 2] * 4) for x in rows]  # in the middle of grey
    return coco_gan.grid(coco_gan.to_uint8(torch.cat(rows)), columns)


def read_photograph(path: str, config: Config) -> torch.Tensor:
    """(1, 3, H, H) in [-1, 1], cropped as in training. Raises: UserError."""
    try:
        pixels = decode_image(read_file(path), config.height, config.height, config.crop)
    except Exception as error:  # Pillow answers a damaged file with whatever its parsers meet first
        raise UserError(f"--expand {path}: {reason_of(error)}; give a photograph") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1


def load(path: Path, device: str | torch.device = "cpu") -> Generator:
    """The EMA of G in a checkpoint, in evaluation mode and float32. Raises: UserError."""
    config, contents = coco_gan.read_checkpoint(path, SpatialGAN)
    G = Generator(config)
    G.load_state_dict({name: contents["tensors"]["G_ema." + name] for name in G.state_dict()})
    return G.to(device).requires_grad_(False).eval()


# ---- Command line ------------------------------------------------------------------------------------------


def choose_preset(args, device: torch.device) -> str:
    on_cpu = "toy" if getattr(args, "data", Config.data).startswith("toy:") else "faces"
    return args.preset or ("spatial256" if device.type == "cuda" else on_cpu)


def train(args) -> int:
    """`train`: from images to checkpoints, pictures and a log in a run folder; returns the exit status."""
    if args.graph or coco_gan.WORLD > 1:
        raise UserError("--graph and torchrun are not for SpatialGAN, whose phases differ; leave them out")
    device, given = coco_gan.start(args), coco_gan.given_fields(args, Config)
    load_images_of = functools.partial(coco_gan.load_stored, cache=args.cache)
    functions = draw_batch, train_step, lambda gan: draw(gan.G_ema, range(12))
    if args.resume is not None:
        run = coco_gan.find_checkpoint(args.resume or None, root="runs/spatialgan").parent
        with coco_gan.lock_run(run):
            resumed = coco_gan.resume(run, given, device, load_images_of, SpatialGAN)
            return coco_gan.train_loop(*resumed, run, args, *functions)
    config = Config(**PRESETS[preset := choose_preset(args, device)] | given).check()
    stored, run = load_images_of(config), coco_gan.new_run(args.run, f"spatialgan/{preset}")
    with coco_gan.lock_run(run):
        return coco_gan.train_loop(SpatialGAN(config, device), stored, run, args, *functions)


def sample(args) -> None:
    """`sample`: from a checkpoint to a picture, or to one picture per seed in a folder."""
    device = coco_gan.choose_device(args.device, args.impl)
    path = coco_gan.find_checkpoint(args.checkpoint, root="runs/spatialgan")
    G, kind = load(path, device), [kind for kind in ("growth", "variants", "expand") if getattr(args, kind)]
    if kind and G.config.N == 0:
        raise UserError(f"--{kind[0]} needs levels, and {path} has one only; give another --checkpoint")
    count = args.count or (8 if kind else 16)
    seeds = range(args.seed[0], args.seed[0] + count) if len(args.seed) == 1 else args.seed
    out = Path(args.out or path.parent / f"{'-'.join([path.stem, *kind])}-seed-{seeds[0]}.png")
    folder = out.is_dir() or str(args.out).endswith("/")
    for some in [[seed] for seed in seeds] if folder else [seeds]:
        name = out / f"seed-{some[0]:06d}.png" if folder else out
        make_folder(name.parent)
        coco_gan.save_picture(draw(G, some, args), name)
    print(f"{out}: {len(seeds)} images, from {path}")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status, see `coco_gan.run_command`."""
    parser = coco_gan.Parser(prog="python -m related.spatialgan", description=__doc__.splitlines()[0])
    _, sample_parser = coco_gan.add_commands(parser, train, sample, choose_preset, Config, PRESETS)
    add = sample_parser.add_mutually_exclusive_group().add_argument
    add("--growth", action="store_true", help="each image from its centre to the whole")
    add("--variants", type=coco_gan.positive, metavar="N", help="N frames around the centre of each image")
    add("--expand", metavar="FILE", help="carry on the middle of a photograph, in --count ways")
    return coco_gan.run_command(parser, lambda args: args.act(args), argv)


if __name__ == "__main__":
    sys.exit(main())
