"""COCO-GAN: a generative adversarial network that makes images by parts.

    python coco_gan.py train                      # toy faces that the project draws, minutes on a CPU
    python coco_gan.py train --data ./celeba      # a folder or a zip of photographs
    python coco_gan.py sample                     # a picture from the newest checkpoint under runs/
    python coco_gan.py train --panorama           # on a cylinder; sample --panorama draws from it
    python coco_gan.py train --extrapolate 1 --from runs/tiny-001    # then sample --extrapolate 1

Source: Lin, Chang, Chen, Juan, Wei, Chen, "COCO-GAN: Generation by Parts via Conditional Coordinating",
ICCV 2019. Sections, equations, figures and appendices named below are that paper's.

Symbols (appendix B) and how they are spelled here. Order is always (y, x), (height, width), rows first.

    z      z            latent vector, uniform on [-1, 1], one for all the patches of an image
    c''    c_micro      where a micro patch is, in [-1, 1]², or [-1, 1]³ on a cylinder
    c'     c_macro      where a macro patch is, likewise
    s''    s_micro      G(z, c''), a generated micro patch of S x S pixels
    s'     s_macro      φ(S''), a generated macro patch: N x M micro patches side by side
    x'     x_macro      ψ(x, c'), a real macro patch: a crop of the real image x
    ŝ'     s_hat        a point on the line from x' to s'
    φ, ψ   merge_patches, crop_patches, both in kernels.py with CBN
    R, K   config.R, K  rows and columns of micro patches in a full image
    A, Q   D's heads that estimate the coordinate and, with --guided, the latent vector
    λ, α   lambda_gp, alpha_s; alpha_q is the weight of L_Q
    B                   macro patches in a batch; b·N·M + n·M + m numbers its micro patches
    W/σ    G_sn, D_sn, A_sn, Q_sn    the spectrally normalised parameters of G, D, A and Q

Deviations from the paper are listed in the README, each with where it happens.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # PyTorch takes seconds to load, and Ctrl-C is to end them without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import copy
import dataclasses
import datetime
import difflib
import errno
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import pickletools
import re
import struct
import sys
import time
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import kernels
from data import CROPS, UserError, load_images, print_all_names, release_pages
from kernels import conditional_batch_norm, crop_patches, merge_patches

try:
    import fcntl
    import resource
except ImportError:  # Windows
    import msvcrt

    fcntl = resource = None

# ----------------------------------------------------------------------------------------------------------
# Configuration (section 3.1, appendix C). All that decides what is learned, and nothing else, is a field:
# each field is a flag of `train` and part of every checkpoint.
# ----------------------------------------------------------------------------------------------------------


def _field(default, low, high, text):
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "help": text})


PRECISIONS = ("auto", "fp32", "tf32", "bf16")
# Whether the rows of an image, and its columns, go on at their other end.
TOPOLOGIES = {"plane": (False, False), "cylinder": (False, True), "torus": (True, True)}
MOST_PATCHES = 2**24  # of an image: a Scene has a number for each


@dataclass(frozen=True)
class Config:
    height: int = _field(64, 1, 16384, "height of a full image, pixels")
    width: int = _field(64, 1, 65536, "width of a full image, pixels")
    N: int = _field(2, 1, 256, "micro patches down a macro patch")
    M: int = _field(2, 1, 256, "micro patches across a macro patch")
    S: int = _field(16, 1, 4096, "side of a micro patch, pixels")
    topology: str = _field("plane", None, None, "plane, cylinder or torus: which borders of an image meet")
    z_dim: int = _field(128, 1, 4096, "values in a latent vector")
    width_g: int = _field(64, 1, 1024, "unit of G's channels: 16, 8, 4, 2, 1, 1, … of them")
    width_d: int = _field(64, 1, 1024, "unit of D's channels: …, 1, 1, 2, 4, 8, 8 of them")
    lambda_gp: float = _field(10.0, 0, 1e6, "weight λ of the gradient penalty L_GP")
    alpha_s: float = _field(100.0, 0, 1e6, "weight α of the spatial consistency loss L_S")
    guided: bool = _field(False, None, None, "train the head Q too, to generate from a patch of a photograph")
    alpha_q: float = _field(100.0, 0, 1e6, "weight of the content consistency loss L_Q, with --guided")
    lr_g: float = _field(1e-4, 0, 1, "learning rate of G, and of Q")
    lr_d: float = _field(4e-4, 0, 1, "learning rate of D and A")
    beta1: float = _field(0.0, 0, 0.9999, "Adam's β1")
    beta2: float = _field(0.999, 0, 0.999999, "Adam's β2")
    batch_size: int = _field(128, 2, 65536, "macro patches a step, of all processes together")
    accumulate: int = _field(1, 1, 32768, "parts that a process cuts its batch into, for less memory")
    sync_stats: bool = _field(False, None, None, "batch statistics of all processes together, not of each")
    steps: int = _field(200_000, 1, 10**9, "steps to train, of D and G together")
    extrapolate: str = _field("0", None, None, "post-train so many micro patches beyond the borders")
    average: float = _field(0.999, 0, 0.999999, "decay of the running average of G's weights; 0 turns it off")
    precision: str = _field("auto", None, None, "auto, fp32, tf32 (of GPUs) or bf16: of G's and D's layers")
    seed: int = _field(0, 0, 2**63 - 1, "seed of the weights, the batches, the latents and CelebA-syn")
    data: str = _field("toy:faces", None, None, "folder or zip of photographs, toy:faces or toy:landscapes")
    crop: str = _field("center", None, None, "how a photograph gets its size: " + ", ".join(CROPS))
    continuous: bool = _field(False, None, None, "macro patches from any pixel on, not only at micro patches")
    mirror: bool = _field(False, None, None, "mirror half of the real images")
    yaw: bool = _field(False, None, None, "turn each real image at random where its borders meet")
    holdout: int = _field(0, 0, 10**9, "images kept out of training, for evaluation")

    @property
    def R(self) -> int:
        return self.height // self.S

    @property
    def K(self) -> int:
        return self.width // self.S

    @property
    def closed(self) -> tuple[bool, bool]:
        """Whether the image goes on at its top below its bottom, and at its left beyond its right."""
        return TOPOLOGIES[self.topology]

    @property
    def places(self) -> tuple[int, int]:
        """In how many rows and columns a macro patch may begin: all of them where it can wrap round."""
        down, across = self.closed
        return self.R if down else self.R - self.N + 1, self.K if across else self.K - self.M + 1

    @property
    def ring(self) -> tuple[int, int]:
        """How many micro patches beyond the upper and lower, and beyond the left and right border."""
        return parse_ring(self.extrapolate, self)

    @property
    def c_dim(self) -> int:
        """Values in a coordinate: an angle takes two."""
        return 2 + sum(self.closed)


# Sizes and batches are the paper's and its code's. 150 epochs of CelebA less 50,000 images (table 2) and a
# million steps of LSUN (appendix E) give the steps; the others are ours, and all of the last three presets.
CPU = dict(width_g=8, width_d=8, batch_size=16, lambda_gp=1.0, alpha_s=1.0, alpha_q=10.0)
CPU |= dict(lr_g=1e-3, lr_d=2e-3, beta2=0.9)
PANORAMA = dict(topology="cylinder", data="toy:landscapes")
PRESETS = {
    "celeba64": dict(batch_size=64, steps=350_000),
    "celeba128": dict(height=128, width=128, S=32, steps=180_000),
    "celeba128-n4": dict(height=128, width=128, N=4, M=4, S=16, steps=180_000),
    "celeba128-n8": dict(height=128, width=128, N=8, M=8, S=8, steps=180_000),
    "celeba128-n16": dict(height=128, width=128, N=16, M=16, S=4, batch_size=64, steps=350_000),
    "lsun64": dict(steps=1_000_000),
    "lsun256": dict(height=256, width=256, S=64, steps=1_000_000),
    "celebahq1024": dict(height=1024, width=1024, S=256, batch_size=20, steps=500_000),
    "panorama": dict(height=256, width=768, S=64, **PANORAMA),
    "tiny": dict(height=32, width=32, S=8, steps=4_000, **CPU),
    "small": dict(steps=7_500, **CPU),
    "panorama-tiny": dict(height=32, width=96, steps=8_000, **PANORAMA, **CPU),
}


def check_config(config: Config) -> None:
    """Raise UserError for the first field, or pair of fields, that makes no model."""
    for field in dataclasses.fields(config):
        value, low, high = getattr(config, field.name), field.metadata["low"], field.metadata["high"]
        if type(value).__name__ != field.type:
            raise UserError(f"{flag(field.name)} is {value!r}; it must be of type {field.type}")
        if low is not None and not low <= value <= high:  # also refuses a NaN
            raise UserError(f"{flag(field.name)} {value} is out of range; give {low} to {high}")
    for side in ("height", "width"):
        pixels, S = getattr(config, side), config.S
        if pixels % S:
            near = " or ".join(str(n) for n in (pixels // S * S, (pixels // S + 1) * S) if n)
            raise UserError(f"--{side} {pixels} is not divisible by --S {S}; try --{side} {near}")
    for name, most, side in (("N", config.R, "height"), ("M", config.K, "width")):
        if getattr(config, name) > most:
            found = f"--{name} {getattr(config, name)} does not fit"
            why = f"--{side} and --S give {most} micro patches"
            raise UserError(f"{found}: {why}; try --{name} {most} or a smaller --S")
    if config.R * config.K > MOST_PATCHES:
        found = f"--S {config.S} cuts the image into {config.R * config.K} micro patches"
        raise UserError(f"{found}; give a larger --S, for at most {MOST_PATCHES}")
    for name, allowed in (("precision", PRECISIONS), ("crop", CROPS), ("topology", TOPOLOGIES)):
        if getattr(config, name) not in allowed:
            raise UserError(f"{flag(name)} {getattr(config, name)} is unknown; give {', '.join(allowed)}")
    if config.yaw and not any(config.closed):
        raise UserError("--yaw turns images whose borders meet; give --topology cylinder or torus as well")
    for extra, places in zip(parse_ring(config.extrapolate, config), config.places):
        if extra and places == 1:
            why = "a macro patch is as long as the image there, and has no coordinate that tells the ring"
            raise UserError(f"--extrapolate {config.extrapolate}: {why}; it takes smaller --N and --M")


def parse_ring(text: str, config: Config) -> tuple[int, int]:
    """ "1": one micro patch beyond each border there is; "1,0": as many down, and across."""
    if not re.fullmatch(r"\d{1,3}(,\d{1,3})?", text):
        raise UserError(f"--extrapolate {text} is no width of a ring; give micro patches, like 1 or 1,0")
    asked = tuple(map(int, text.split(",")))
    if len(asked) == 2:
        ring, good = asked, not any(extra and closed for extra, closed in zip(asked, config.closed))
    else:
        ring = tuple(0 if closed else asked[0] for closed in config.closed)
        good = any(ring) or not any(asked)
    if not good:
        why = f"borders of a {config.topology} that meet have nothing beyond them"
        raise UserError(f"--extrapolate {text}: {why}; give {'0' if all(config.closed) else '1,0'}")
    for extra, count in zip(ring, (config.R, config.K)):
        if extra and (count == 1 or extra > count):
            most = f"at most {count}" if count > 1 else "0"
            raise UserError(f"--extrapolate {text}: the image has {count} micro patches there; give {most}")
    return ring


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# ----------------------------------------------------------------------------------------------------------
# Coordinates (section 2, "Spatial coordinate system"; section 3.4; appendix C, "Coordinate Setup"). On the
# plane (y, x); on the cylinder (y, cos θ, sin θ), which meets itself; on the torus both axes are angles.
# ----------------------------------------------------------------------------------------------------------


def coordinate(i: torch.Tensor, count: int, closed: bool) -> torch.Tensor:
    """One axis of a coordinate: positions 0 … count-1 of any shape (…) -> (…, 1), or (…, 2) if it is closed.

    Open: evenly over [-1, 1], ends included, or 0 where there is one position only. Positions may be
    fractions or lie outside, and so do their coordinates.
    Closed: cos θ and sin θ of angles evenly over [-π, π), where position count is position 0 again.
    """
    if closed:
        theta = math.pi * (2 * (i % count) / count - 1)
        return torch.stack([torch.cos(theta), torch.sin(theta)], -1)
    return (-1 + 2 * i / (count - 1) if count > 1 else torch.zeros(i.shape, device=i.device)).unsqueeze(-1)


def micro_coordinates(config: Config, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """c'' of the micro patches in rows i (0 … R-1) and columns j (0 … K-1): (…), (…) -> (…, c_dim)."""
    down, across = config.closed
    return torch.cat([coordinate(i, config.R, down), coordinate(j, config.K, across)], -1)


def macro_coordinates(config: Config, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """c' of the macro patches that begin in row i (0 … R-N) and column j (0 … K-M): (…), (…) -> (…, c_dim).

    On a closed axis they may begin in each of the R rows or K columns, and wrap round.
    """
    (rows, columns), (down, across) = config.places, config.closed
    return torch.cat([coordinate(i, rows, down), coordinate(j, columns, across)], -1)


def micro_matrix(config: Config, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """C'', the micro coordinates inside each macro patch (i, j): (B,), (B,) -> (B·N·M, c_dim), row by row."""
    n, m = torch.meshgrid(torch.arange(config.N), torch.arange(config.M), indexing="ij")
    rows = i.view(-1, 1) + n.flatten()  # (B, N·M)
    columns = j.view(-1, 1) + m.flatten()
    return micro_coordinates(config, rows, columns).flatten(0, 1)


# ----------------------------------------------------------------------------------------------------------
# Networks (appendix C, figures 13 and 14). All convolutions are 3 x 3 but the shortcuts', which are 1 x 1.
# ----------------------------------------------------------------------------------------------------------


LAYOUT = torch.channels_last  # in memory, of images, features and weights: faster than the other one


def initialise(net: nn.Module) -> None:
    """Glorot's uniform weights and zero biases. Deviation: the paper says nothing of it.

    Each of these layers also gets a buffer v for `spectral_norm`, at first a random direction.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            module.register_buffer("v", F.normalize(torch.randn(module.weight[0].numel()), dim=0))
    net.to(memory_format=LAYOUT)


def spectral_norm(net: nn.Module, iterate: bool) -> dict[str, torch.Tensor]:
    """The parameters of net, the weight W of each convolution and linear layer divided by σ(W).

    σ(W), its largest singular value, is estimated as ‖W v‖, and v by one power iteration, in place, if
    `iterate`. The network is then applied by `functional_call(net, parameters, inputs)`: one iteration a
    step, however often the network is applied in it.
    Source: Miyato et al., "Spectral Normalization for GANs", ICLR 2018, algorithm 1; on G and D, appendix C.
    """
    layers = {f"{name}.weight": layer for name, layer in net.named_modules() if hasattr(layer, "v")}
    weights, v = [layer.weight for layer in layers.values()], [layer.v for layer in layers.values()]
    W = [weight.flatten(1) for weight in weights]  # (out, in), and v (in,)
    # Norms and copies are done for all layers at once: a GPU takes longer to begin than to finish them.
    if iterate:
        with torch.no_grad():
            new = [W_ @ v_ for W_, v_ in zip(W, v)]
            new = [W_.T @ u for W_, u in zip(W, new)]
            torch._foreach_copy_(v, torch._foreach_div(new, torch._foreach_norm(new)))
    sigma = torch._foreach_norm([W_ @ v_ for W_, v_ in zip(W, v)])
    return dict(net.named_parameters()) | dict(zip(layers, torch._foreach_div(weights, sigma)))


class ConditionalBatchNorm(nn.Module):
    """o = γ(z, c'') · (i - μ) / σ + β(z, c''), with γ and β linear in the condition (appendix C).

    Deviation: the paper says MLPs. One linear map each, not spectrally normalised, as its authors released.
    γ starts at 1 and β at 0 on average, not for every z and c'': from exactly 1 and 0, faces stayed blurred
    and seamed for longer.
    """

    synchronised = False  # see `synchronise`

    def __init__(self, channels: int, condition: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(2 * channels, condition)))
        self.bias = nn.Parameter(torch.cat([torch.ones(channels), torch.zeros(channels)]))

    def forward(self, x, condition, relu=False):  # (B, C, h, w), (B, condition) -> (B, C, h, w)
        gamma, beta = F.linear(condition, self.weight, self.bias).chunk(2, dim=1)  # (B, C) each
        norm = self.norm
        if self.synchronised:
            y = gamma[:, :, None, None] * norm(x) + beta[:, :, None, None]
            return F.relu(y) if relu else y
        if self.training:
            norm.num_batches_tracked.add_(1)
        how = dict(training=self.training, momentum=norm.momentum, eps=norm.eps, relu=relu)
        return conditional_batch_norm(x, gamma, beta, norm.running_mean, norm.running_var, **how)


class GeneratorBlock(nn.Module):
    """ReLU, ×2, conv, CBN, ReLU, conv, plus the shortcut ×2, 1 x 1 conv (figure 13b)."""

    def __init__(self, c_in: int, c_out: int, condition: int, upscale: bool):
        super().__init__()
        self.upscale = upscale
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.cbn = ConditionalBatchNorm(c_out, condition)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, condition):  # (B, c_in, h, w) -> (B, c_out, 2h, 2w), or h, w without upscale
        h = self.conv1(self.up(F.relu(x)))
        h = self.conv2(self.cbn(h, condition, relu=True))
        # The figure upscales first; a 1 x 1 convolution gives the same before it, for a quarter of the work.
        return h + self.up(self.shortcut(x))

    def up(self, x):
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.upscale else x


class Generator(nn.Module):
    """G(z, c''): one micro patch from a latent vector and the patch's place (figure 13a).

    Larger patches repeat the last block and smaller ones leave it out; those under 16 pixels keep the depth
    of 16 but their last one or two blocks do not upscale (appendix C). `config` says what it was built for.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        condition = config.z_dim + config.c_dim
        side, ups = config.S, 0
        while side % 2 == 0 and side >= 4:
            side, ups = side // 2, ups + 1
        depth = max(ups, 3)
        channels = [config.width_g * max(16 >> b, 1) for b in range(depth + 1)]  # 16, 8, 4, 2, 1, 1, …
        self.start = (channels[0], side, side)
        self.linear = nn.Linear(condition, math.prod(self.start))
        self.blocks = nn.ModuleList(
            GeneratorBlock(channels[b], channels[b + 1], condition, upscale=b < ups) for b in range(depth)
        )
        self.norm = nn.BatchNorm2d(channels[-1])
        self.conv = nn.Conv2d(channels[-1], 3, 3, padding=1)
        initialise(self)

    def forward(self, z, c_micro, raw=False):  # (B, z_dim), (B, c_dim) -> (B, 3, S, S) in [-1, 1]; raw: in ℝ
        condition = torch.cat([z, c_micro], dim=1)
        x = self.linear(condition).view(-1, *self.start).contiguous(memory_format=LAYOUT)
        for block in self.blocks:
            x = block(x, condition)
        x = self.conv(F.relu(self.norm(x)))
        return x if raw else torch.tanh(x.float())


class ReLU(torch.autograd.Function):
    """F.relu for D, whose gradient penalty is differentiated once more.

    The second derivative of F.relu is a tensor of zeros, which autograd takes all the way back through D: a
    tenth of the time of a step. Here it is None.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return None if grad is None else torch.ops.aten.threshold_backward(grad, y.detach(), 0)


class Pool(torch.autograd.Function):
    """F.avg_pool2d of 2 x 2 pixels, fewer at the end of an odd side; for D, likewise."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return F.avg_pool2d(x, 2, ceil_mode=True)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        options = ([2, 2], [2, 2], [0, 0], True, True, None)
        return None if grad is None else torch.ops.aten.avg_pool2d_backward(grad, x.detach(), *options)


class DiscriminatorBlock(nn.Module):
    """ReLU (not in the first), conv, ReLU, conv, pool, plus the shortcut pool, 1 x 1 conv (figure 14b)."""

    def __init__(self, c_in: int, c_out: int, first: bool, pool: bool):
        super().__init__()
        self.first, self.pool = first, pool
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):  # (B, c_in, h, w) -> (B, c_out, h/2, w/2), odd sides rounded up
        h = self.conv2(ReLU.apply(self.conv1(x if self.first else ReLU.apply(x))))
        if self.pool:
            h, x = Pool.apply(h), Pool.apply(x)
        return h + self.shortcut(x)


class Discriminator(nn.Module):
    """D(x', c'): how real a macro patch is, and its last feature h, which the heads read (figure 14a).

    Larger macro patches repeat the first block and smaller ones leave it out, so that the last map has 4 to 7
    pixels on its shorter side.
    """

    def __init__(self, config: Config):
        super().__init__()
        side, pools = min(config.N, config.M) * config.S, 0
        while side >= 8:
            side, pools = (side + 1) // 2, pools + 1
        last = 8 * config.width_d
        channels = [max(last >> b, config.width_d) for b in reversed(range(pools))]
        channels = [3, *channels, last]  # 3, …, 1, 2, 4, 8, 8
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(channels[b], channels[b + 1], first=b == 0, pool=b < pools)
            for b in range(pools + 1)
        )
        self.linear = nn.Linear(last, 1)
        self.projection = nn.Linear(config.c_dim, last)
        initialise(self)

    def forward(self, x, c_macro):  # (B, 3, N·S, M·S), (B, c_dim) -> (B,), (B, 8 · width_d)
        for block in self.blocks:
            x = block(x)
        # Deviation: the paper says "global pooling"; the sum, as in the projection discriminator. It and the
        # score ⟨linear, h⟩ + ⟨projection(c'), h⟩ are float32, for scores differ by little.
        h = ReLU.apply(x).float().sum(dim=(2, 3))
        return (h * (self.linear.weight + self.projection(c_macro))).sum(dim=1) + self.linear.bias, h


class Head(nn.Module):
    """A: the coordinate, or Q: the latent vector, that D's last feature tells of (figure 14c)."""

    def __init__(self, features: int, outputs: int):
        super().__init__()
        self.linear1 = nn.Linear(features, 128)
        self.norm = nn.BatchNorm1d(128)
        self.linear2 = nn.Linear(128, outputs)
        initialise(self)

    def forward(self, h):  # (B, features) -> (B, outputs) in [-1, 1]
        return torch.tanh(self.linear2(F.leaky_relu(self.norm(self.linear1(h)), 0.2)))


# ----------------------------------------------------------------------------------------------------------
# Losses (section 2, equations 1 to 4). D, A minimise -L_W + λ L_GP + α L_S(x'), G minimises L_W + α L_S(s').
# Equation 1 prints L_W with the opposite signs, with which D would learn to prefer s'. With --guided D, G and
# Q all minimise alpha_q L_Q(s') as well (section 3.5; section 2 of the paper's first version).
# ----------------------------------------------------------------------------------------------------------


def wasserstein(score_real: torch.Tensor, score_generated: torch.Tensor) -> torch.Tensor:
    """L_W = E[D(x')] - E[D(s')] (equation 2)."""
    return score_real.mean() - score_generated.mean()


def gradient_penalty(score, x_macro, s_macro, epsilon) -> tuple[torch.Tensor, torch.Tensor]:
    """L_GP = E[(‖∇D(ŝ')‖₂ - 1)²], ŝ' = ε s' + (1-ε) x' (equation 3), the norm over all pixels of a sample.

    Args: score maps (B, 3, h, w) to (B,); x_macro, s_macro (B, 3, h, w); epsilon (B,) in [0, 1].
    Returns: L_GP and the mean of the norms.
    """
    epsilon = epsilon.view(-1, 1, 1, 1)
    s_hat = (epsilon * s_macro.detach() + (1 - epsilon) * x_macro).requires_grad_()
    (gradient,) = torch.autograd.grad(score(s_hat).sum(), s_hat, create_graph=True)
    norm = gradient.flatten(1).norm(dim=1)
    return (norm - 1).square().mean(), norm.mean()


def spatial_consistency(c_macro: torch.Tensor, estimate: torch.Tensor) -> torch.Tensor:
    """L_S = E[‖c' - A(·)‖²] (equation 4), squared as its neighbour in the text, ACGAN's "L2-loss", is.

    A coordinate outside [-1, 1] counts as 0: A ends in a tanh and cannot reach it (appendix E).
    """
    inside = (c_macro.abs() <= 1 + 1e-4).all(dim=1)
    return ((c_macro - estimate).square().sum(dim=1) * inside).mean()


def content_consistency(z: torch.Tensor, estimate: torch.Tensor) -> torch.Tensor:
    """L_Q = E[‖z - Q(s')‖₁] / z_dim (appendix B, "Content consistency loss"); 0.5 if Q only says 0.

    Deviation: the paper sums over the values of z and gives no weight. The authors released this mean with a
    weight of 100, which so means the same for any z_dim.
    """
    return (z - estimate).abs().mean()


# ----------------------------------------------------------------------------------------------------------
# Training (section 2; appendix C, "Hyperparameters")
# ----------------------------------------------------------------------------------------------------------


@dataclass
class State:
    """All that training changes."""

    config: Config
    device: torch.device
    step: int
    G: Generator
    G_average: Generator  # averages of the weights as G applies them, W/σ
    D: Discriminator
    A: Head
    opt_G: torch.optim.Adam
    opt_D: torch.optim.Adam
    rng: torch.Generator  # on the CPU whatever the device, so that a seed means the same batches everywhere
    Q: Head | None = None  # with --guided
    opt_Q: torch.optim.Adam | None = None
    opt_G_beyond: torch.optim.Adam | None = None  # with --extrapolate (appendix E)
    opt_D_beyond: torch.optim.Adam | None = None
    average_G: DistributedDataParallel | None = None  # the gradients, over several processes
    average_D: DistributedDataParallel | None = None


def new_state(config: Config, device: torch.device) -> State:
    torch.manual_seed(config.seed)
    G, D = Generator(config), Discriminator(config)
    A = Head(D.linear.in_features, config.c_dim)
    G_average = normalised_for_good(copy.deepcopy(G)).requires_grad_(False).eval()
    for net in (G, G_average, D, A):
        net.to(device)
    betas, fused = (config.beta1, config.beta2), device.type in ("cpu", "cuda")
    adam = functools.partial(torch.optim.Adam, betas=betas, fused=fused, capturable=device.type == "cuda")
    opt_G = adam(G.parameters(), lr=config.lr_g)
    opt_D = adam([*D.parameters(), *A.parameters()], lr=config.lr_d)
    rng = torch.Generator().manual_seed(2**63 + config.seed)  # another stream than the weights'
    state = State(config, device, 0, G, G_average, D, A, opt_G, opt_D, rng)
    if config.guided:
        state.Q = Head(D.linear.in_features, config.z_dim).to(device)
        state.opt_Q = adam(state.Q.parameters(), lr=config.lr_g)
    if any(config.ring):
        state.opt_G_beyond = adam(G.blocks[:2].parameters(), lr=config.lr_g)
        state.opt_D_beyond = adam(D.parameters(), lr=config.lr_d)
    if processes()[1] > 1 and device.type != "meta":
        G, *others = networks(state)
        if config.sync_stats:
            synchronise(networks(state))
        state.average_G = DistributedDataParallel(Trained([G]))
        state.average_D = DistributedDataParallel(Trained(others))
    return state


def networks(state: State) -> list[nn.Module]:
    return [net for net in (state.G, state.D, state.A, state.Q) if net is not None]


def share_statistics(state: State) -> None:
    """Give each process the mean of all running statistics, the only part in which their networks differ.

    Running averages are linear in what they average: it is the same whether this is done now or later.
    """
    for net in (state.G_average, *networks(state)):
        for name, buffer in net.named_buffers():
            if "running" in name:
                mean_of_all(buffer)


@torch.no_grad()
def normalised_for_good(net: nn.Module) -> nn.Module:
    """Put W/σ in the place of W, so that the network can be called as it is."""
    for name, p in spectral_norm(net, iterate=False).items():
        net.get_parameter(name).copy_(p)
    return net


@dataclass
class Batch:
    x_macro: torch.Tensor  # (B, 3, N·S, M·S) float32
    c_macro: torch.Tensor  # (B, c_dim)
    c_generated: torch.Tensor  # (B, c_dim), that of s': the same, but in steps beyond the borders
    c_micro: torch.Tensor  # (B·N·M, c_dim)
    z: torch.Tensor  # (B, z_dim)
    epsilon: torch.Tensor  # (B,)


def parts_of(batch: Batch, count: int) -> list[Batch]:
    """Cut a batch into parts of equally many macro patches."""
    return [Batch(*part) for part in zip(*(t.chunk(count) for t in vars(batch).values()))]


def latent(count: int, z_dim: int, rng: torch.Generator) -> torch.Tensor:
    """z, uniform on [-1, 1]: (count, z_dim) (appendix C, "Coordinate Setup")."""
    return 2 * torch.rand(count, z_dim, generator=rng) - 1


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device without waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def draw_places(config: Config, rng, ring: tuple[int, int] = (0, 0)) -> list[torch.Tensor]:
    """Draw where B macro patches begin: top and left, (B,) int64, in pixels.

    Uniformly over the discrete positions (appendix C, "Coordinate Setup"), with `continuous` over all pixels.
    Deviation: section 3.7 has any real position, at which x' could not be cut. ring: how many micro patches
    beyond the borders they may reach, down and across.
    """
    S, unit, places = config.S, 1 if config.continuous else config.S, []
    for count, closed, extra in zip(config.places, config.closed, ring):
        last = count * S - unit if closed else (count - 1) * S
        choices = (-extra * S // unit, (last + extra * S) // unit + 1)
        places.append(unit * torch.randint(*choices, (config.batch_size,), generator=rng))
    return places


def draw_batch(config: Config, images, numbers, rng, device, ring: tuple[int, int] = (0, 0)) -> Batch:
    """Draw B images, positions and latents, all uniformly (appendix C, "Coordinate Setup").

    Of several processes with the same rng each draws all, and makes and returns a part of its own: together
    they see the batch that a single process would.

    Args: images (n, H, W, 3) uint8 on any device; numbers: of the images that may be drawn, int64; ring: see
    `draw_places`, of s' alone (appendix E).
    """
    B = config.batch_size
    index = numbers[torch.randint(len(numbers), (B,), generator=rng)]
    top, left = draw_places(config, rng)
    i, j = top / config.S, left / config.S  # in micro patches
    z = latent(B, config.z_dim, rng)
    epsilon = torch.rand(B, generator=rng)
    mirror = torch.rand(B, generator=rng) < 0.5 * config.mirror

    height, width = config.N * config.S, config.M * config.S
    left = torch.where(mirror, config.width - width - left, left)  # where it lies before it is mirrored
    if config.yaw:
        down, across = config.closed
        top = top + torch.randint(config.height, (B,), generator=rng) * down
        left = left + torch.randint(config.width, (B,), generator=rng) * across
    beyond = draw_places(config, rng, ring) if any(ring) else []
    places = [i, j, *(pixels / config.S for pixels in beyond)]

    rank, count = processes()
    mine = (t.chunk(count)[rank] for t in (index, top, left, mirror, z, epsilon, *places))
    index, top, left, mirror, z, epsilon, *places = mine
    *place, mirror = (move(t, images.device) for t in (index, top, left, mirror))
    x_macro = crop_patches(images, *place, height, width, mirror=mirror).contiguous(memory_format=LAYOUT)
    c_macro = macro_coordinates(config, *places[:2])
    c_generated, c_micro = macro_coordinates(config, *places[-2:]), micro_matrix(config, *places[-2:])
    return Batch(*(move(t, device) for t in (x_macro, c_macro, c_generated, c_micro, z, epsilon)))


def generate_macro(state: State, parameters, batch: Batch) -> torch.Tensor:
    """s' = φ(G(z, C'')): the macro patches of a batch, (B, 3, N·S, M·S) in [-1, 1]."""
    N, M = state.config.N, state.config.M
    with mixed_precision(state):
        z = batch.z.repeat_interleave(N * M, dim=0)  # (B·N·M, z_dim), one latent for all patches of a sample
        x = functional_call(state.G, parameters, (z, batch.c_micro), dict(raw=True))  # φ takes the tanh
    return merge_patches(x, N, M, tanh=True, dtype=z.dtype).contiguous(memory_format=LAYOUT)


def generate_parts(state: State, parameters, batch: Batch) -> tuple[list[Batch], list[torch.Tensor]]:
    """Cut a batch into `accumulate` parts, and generate s' of each.

    G's way back is kept of a single part only. For more there is no room, and they are generated again.
    """
    parts = parts_of(batch, state.config.accumulate)
    with torch.set_grad_enabled(len(parts) == 1):
        return parts, [generate_macro(state, parameters, part) for part in parts]


def discriminator_step(state: State, parts, generated, *optimizers) -> torch.Tensor:
    """One step of D and A, and of Q, with the Adams given; returns L_W, L_GP, ‖∇D(ŝ')‖₂ and L_S(x').

    Args: parts of a batch; generated: s' of each of them.
    """
    config = state.config
    D_sn, A_sn, *Q_sn = (spectral_norm(net, iterate=True) for net in networks(state)[1:])

    def D(x, c_macro):
        with mixed_precision(state):
            return functional_call(state.D, D_sn, (x, c_macro))

    def losses(k: int) -> tuple[torch.Tensor, ...]:
        batch, s_macro = parts[k], generated[k].detach()
        B = len(s_macro)
        score, h = D(torch.cat([batch.x_macro, s_macro]), torch.cat([batch.c_macro, batch.c_generated]))
        L_W = wasserstein(score[:B], score[B:])
        # ŝ' lies between the coordinates as it does between the images; they differ beyond the borders only.
        c_hat = batch.c_macro.lerp(batch.c_generated, batch.epsilon.unsqueeze(1))
        L_GP, norm = gradient_penalty(lambda s_hat: D(s_hat, c_hat)[0], batch.x_macro, s_macro, batch.epsilon)
        L_S = spatial_consistency(batch.c_macro, functional_call(state.A, A_sn, (h[:B],)))
        loss = -L_W + config.lambda_gp * L_GP + config.alpha_s * L_S
        if config.guided:
            L_Q = content_consistency(batch.z, functional_call(state.Q, *Q_sn, (h[B:],)))
            loss = loss + config.alpha_q * L_Q
        return loss, L_W, L_GP, norm, L_S

    return descend(losses, len(parts), optimizers, state.average_D)


def generator_step(state: State, parts, generated, optimizer) -> torch.Tensor:
    """One step of G through the updated D, which stays as it is; returns -E[D(s')], L_S(s') and any L_Q.

    Args: as of `discriminator_step`; s' that leads back to no parameters of G is generated again.
    """
    # Detached, or the way back would lead to the parameters of D and its heads as well.
    nets = networks(state)[1:]
    D_sn, A_sn, *Q_sn = ({k: p.detach() for k, p in spectral_norm(net, False).items()} for net in nets)
    G_sn = spectral_norm(state.G, iterate=False) if len(parts) > 1 else {}

    def losses(k: int) -> tuple[torch.Tensor, ...]:
        batch, s_macro = parts[k], generated[k]
        if not s_macro.requires_grad:
            statistics = {name: b.clone() for name, b in state.G.named_buffers()}  # once a step is enough
            s_macro = generate_macro(state, {**G_sn, **statistics}, batch)
        with mixed_precision(state):
            score, h = functional_call(state.D, D_sn, (s_macro, batch.c_generated))
        L_G = -score.mean()  # the part of L_W that G can change
        L_S = spatial_consistency(batch.c_generated, functional_call(state.A, A_sn, (h,)))
        loss = L_G + state.config.alpha_s * L_S
        if not state.config.guided:
            return loss, L_G, L_S
        L_Q = content_consistency(batch.z, functional_call(state.Q, *Q_sn, (h,)))
        return loss + state.config.alpha_q * L_Q, L_G, L_S, L_Q

    return descend(losses, len(parts), [optimizer], state.average_G)


def descend(losses, count: int, optimizers, average: DistributedDataParallel | None) -> torch.Tensor:
    """Let the optimizers step down a loss; returns the losses it is made of, each its mean over the parts.

    Args: losses(k): of part k of `count`, first that which is minimised; average: over the processes, if any.
    """
    for optimizer in optimizers:
        optimizer.zero_grad()
    seen = []
    for k in range(count):
        last = k == count - 1
        # Gradients add up part by part; processes exchange theirs during the way back from the last one.
        with contextlib.nullcontext() if average is None or last else average.no_sync():
            loss, *others = losses(k) if average is None else average(losses, k)
            (loss / count).backward(retain_graph=not last)  # W/σ is shared by all the parts
        seen.append(torch.stack(others).detach())
        del loss, others  # and with them the memory of this part
    for optimizer in optimizers:
        optimizer.step()
    return torch.stack(seen).mean(dim=0)


LOSSES = ("L_W", "L_GP", "gradient_norm", "L_S_real", "L_G", "L_S_generated", "L_Q")


def train_step(state: State, batch: Batch) -> torch.Tensor:
    """One step of D and one of G; returns the LOSSES, 6 or 7."""
    losses = both_steps(state, batch, 1 - decay(state))
    state.step += 1
    return losses


def both_steps(state: State, batch: Batch, weight: float | torch.Tensor) -> torch.Tensor:
    """The work of `train_step`, of which D's and G's share the generated macro patches.

    weight: of G's weights in their running average. Nothing else of it changes from step to step but tensors.
    """
    G_sn = spectral_norm(state.G, iterate=True)
    parts, generated = generate_parts(state, G_sn, batch)
    optimizers = [state.opt_D, state.opt_Q] if state.config.guided else [state.opt_D]
    losses = discriminator_step(state, parts, generated, *optimizers)
    update_average(state, G_sn, weight)  # before Adam changes those of them that are not normalised
    return torch.cat([losses, generator_step(state, parts, generated, state.opt_G)])


def graphed(state: State):
    """A `train_step` that becomes a CUDA graph: a GPU starts all of it at once, not some thousand parts.

    The first three steps are ordinary ones, in which the libraries choose their algorithms, on a stream of
    their own as graphs ask for. The fourth is recorded, without running it, and from there on replayed on
    each batch. The weights are those of ordinary steps, but for the order in which cuDNN adds.
    """
    stream, graph, recorded, ordinary = torch.cuda.Stream(), torch.cuda.CUDAGraph(), None, 3

    def step(batch: Batch) -> torch.Tensor:
        nonlocal recorded, ordinary
        inputs = [*vars(batch).values(), move(torch.tensor(1 - decay(state)), state.device)]
        if ordinary:
            ordinary -= 1
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                losses = both_steps(state, batch, inputs[-1])
            torch.cuda.current_stream().wait_stream(stream)
        else:
            if recorded is None:
                read_from = [t.clone() for t in inputs]
                try:
                    with torch.cuda.graph(graph):
                        recorded = read_from, both_steps(state, Batch(*read_from[:-1]), read_from[-1])
                except RuntimeError as error:  # after which nothing on the GPU can be relied on
                    cause = error.__context__ or error  # to end a recording that failed may fail as well
                    if isinstance(cause, torch.OutOfMemoryError):
                        raise cause
                    why = (str(cause).strip() or type(cause).__name__).splitlines()[0]
                    text = f"--graph: a step makes no CUDA graph here ({why}); leave it out"
                    raise UserError(text) from error
            torch._foreach_copy_(recorded[0], inputs)
            graph.replay()
            losses = recorded[1].clone()
        state.step += 1
        return losses

    return step


def step_beyond(state: State, batch: Batch) -> None:
    """One step of post-training, on macro patches that reach beyond the borders (appendix E).

    A second pair of Adams trains D and G's first two blocks only ("the first-two layers of the generator").
    No real image goes on beyond its borders: D compares with real macro patches from within. G's running
    statistics, of all blocks, are those of both kinds of steps.
    """
    parts, generated = generate_parts(state, spectral_norm(state.G, iterate=True), batch)
    discriminator_step(state, parts, generated, state.opt_D_beyond)
    generator_step(state, parts, generated, state.opt_G_beyond)


def decay(state: State) -> float:
    """Of the running average of G's weights: it grows to its full value over the first steps."""
    return min(state.config.average, (1 + state.step) / (10 + state.step))


@torch.no_grad()
def update_average(state: State, G_sn: dict[str, torch.Tensor], weight: float | torch.Tensor) -> None:
    """Move G_average towards the weights, as normalised, and the running statistics that this step's G had.

    Deviation: the paper samples from G itself.
    """
    now = state.G.state_dict() | G_sn
    for name, tensor in state.G_average.state_dict().items():  # of the same memory
        if tensor.is_floating_point():
            tensor.lerp_(now[name], weight)
        else:
            tensor.copy_(now[name])  # BatchNorm2d's count of batches


def precision_of(config: Config, device: torch.device) -> str:
    """What --precision auto stands for: bf16 where the device is made for it, else tf32 on a GPU."""
    if config.precision != "auto":
        return config.precision
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    fast |= device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "tf32" if device.type == "cuda" else "fp32"


def mixed_precision(state: State) -> torch.autocast:
    """bfloat16 in G's and D's layers, if it is that; weights, losses and Adam stay float32."""
    bf16 = precision_of(state.config, state.device) == "bf16"
    return torch.autocast(state.device.type, torch.bfloat16, enabled=bf16)


IMPLS = ("auto", "torch", "triton")


def choose_impl(name: str, device: torch.device) -> None:
    """Let the operations of kernels.py run by Triton or in PyTorch; UserError for triton where it fails."""
    if name not in IMPLS:
        raise UserError(f"--impl {name} is unknown; give {', '.join(IMPLS)}")
    kernels.DEFAULT = name
    tried = name == "triton" or (name == "auto" and device.type == "cuda" and kernels.triton is not None)
    why = kernels.failure(device.type) if tried else None
    if why and name == "triton":
        raise UserError(f"--impl triton does not work here: {why.split(';')[0]}; give torch, or leave it out")
    if why:
        print(f"warning: Triton's kernels do not work here ({why}); PyTorch does their work", file=sys.stderr)
        kernels.DEFAULT = "torch"


# ----------------------------------------------------------------------------------------------------------
# Checkpoints and the run folder
# ----------------------------------------------------------------------------------------------------------

FORMAT = "coco-gan checkpoint 1"
STATEFUL = ("G", "G_average", "D", "A", "Q", "opt_G", "opt_D", "opt_Q", "opt_G_beyond", "opt_D_beyond")
BEYOND = ("opt_G_beyond", "opt_D_beyond")
ASSETS = Path(__file__).parent / "assets"


@contextlib.contextmanager
def writing(flag_: str, path: Path):
    """Tell what could not be written: a full disk, a folder that is read-only or gone."""
    try:
        yield
    except BrokenPipeError:  # that is of standard output
        raise
    except OSError as error:
        raise UserError(f"{flag_} {path} cannot be written: {error.strerror or error}; name another place")


@contextlib.contextmanager
def memory(advice: str):
    """Tell what to do when the memory is full, in whichever words PyTorch and its libraries say that."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        full = re.search("out of memory|allocate memory|ALLOC_FAILED", str(error))
        if not full and not isinstance(error, MemoryError):
            raise
        raise UserError(advice) from error


@contextlib.contextmanager
def whole(path: Path, temporary: str | None = None):
    """A path to write to, which becomes the one given if the block ends well; else nothing is left of it.

    temporary: its name until then. What a kill leaves of it is overwritten by the next of that name.
    """
    part = path.with_name(temporary or f".{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, contents: bytes) -> None:
    """Write a small file, whole or not at all."""
    with whole(path) as part:
        part.write_bytes(contents)


def stateful(state: State) -> dict:
    """The networks and optimizers that there are, by name."""
    return {name: getattr(state, name) for name in STATEFUL if getattr(state, name) is not None}


def save_checkpoint(state: State, run: Path, fingerprint: str, keep: int) -> Path:
    """Save as the run's newest checkpoint, and delete all but the newest `keep` of them."""
    path = run / f"checkpoint-{state.step:09d}.pt"
    if writes():
        write_checkpoint(state, path, fingerprint)
        for old in checkpoints(run)[:-keep]:
            old.unlink()
    return path


def write_checkpoint(state: State, path: Path, fingerprint: str) -> None:
    """Write all of the state as one file, whole or not at all."""
    contents = {"format": FORMAT, "config": dataclasses.asdict(state.config), "step": state.step}
    contents |= {"images": fingerprint, "rng": state.rng.get_state()}
    contents |= {name: part.state_dict() for name, part in stateful(state).items()}
    with whole(path, "checkpoint.tmp") as part, open(part, "wb") as file:
        try:
            torch.save(contents, file)
        except RuntimeError as error:  # what a full disk becomes in PyTorch's own writer
            raise OSError(str(error).splitlines()[0])
        file.flush()
        os.fsync(file.fileno())


def checkpoints(run: Path) -> list[Path]:
    return sorted(path for path in run.glob("checkpoint-*.pt") if path.is_file())


def find_checkpoint(where: str | Path | None, command: str = "--checkpoint", panorama: bool = False) -> Path:
    """A checkpoint file as given, or the newest in a run folder, or (None) the newest under runs/.

    panorama: of a run on a cylinder. To sample from, there is always one that comes with this program.
    """
    if where is None:
        runs = [run for run in Path("runs").glob("*") if not panorama or on_a_cylinder(run)]
        newest = [paths[-1] for paths in map(checkpoints, runs) if paths]
        if newest:
            return max(newest, key=lambda path: path.stat().st_mtime)
        kind, option = ("panorama ", " --panorama") if panorama else ("", "")
        none = f"there is no {kind}checkpoint under runs/"
        shipped = ASSETS / ("toy_landscapes.pt" if panorama else "toy_faces.pt")
        if command == "--resume" or not shipped.exists():
            raise UserError(f"{none}; train one with: python coco_gan.py train{option}")
        print(f"{none}; this is {shipped.name}, which comes with the program", file=sys.stderr)
        return shipped
    path = Path(where)
    if os.path.isdir(path):  # unlike Path's, it does not raise at a name that is too long
        if not checkpoints(path):
            raise UserError(f"{command} {where} holds no checkpoint; give a run folder like runs/tiny-001")
        return checkpoints(path)[-1]
    if not os.path.isfile(path):
        raise UserError(f"{command} {where} does not exist; give a checkpoint file or a run folder")
    return path


def tell_newest(where: str | Path | None, path: Path) -> None:
    """Say which checkpoint `find_checkpoint` took, if nobody named one, and it has not said so itself."""
    if where is None and path.parent != ASSETS:
        print(f"from {path}", file=sys.stderr)


def on_a_cylinder(run: Path) -> bool:
    """As config.json says, which is shorter to read than a checkpoint; False where there is none to read."""
    try:
        path = run / "config.json"  # reading a named pipe would never end
        return path.is_file() and json.loads(path.read_text())["topology"] == "cylinder"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


@contextlib.contextmanager
def fitting(path: Path):
    """Tell which checkpoint has parts that are missing or do not fit one another."""
    try:
        yield
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged, or of another version ({text}); give another file") from error
    except OSError as error:  # another process trains this run, and has deleted it
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


# All that torch.save puts into our pickles by name.
PICKLED = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}
PICKLED |= {f"torch {kind}Storage" for kind in ("Float", "Long", "Byte")}


def check_archive(file) -> None:
    """Raise unless an open file is what torch.save writes, whole: torch.load would take much more.

    It looks at no checksum, unpacks what is packed, and a pickle of 30 bytes has it fill the memory with a
    bytearray.
    """
    if (head := file.read(4)) != b"PK\3\4":
        raise pickle.UnpicklingError if head else EOFError
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
            raise ValueError  # torch.save packs nothing, and no two members are the same bytes
        if archive.testzip() is not None:
            raise ValueError
        for member in members:
            if member.filename.lower().endswith("data.pkl"):
                codes = list(pickletools.genops(archive.read(member)))
                if not {name for code, name, _ in codes if "GLOBAL" in code.name} <= PICKLED:
                    raise pickle.UnpicklingError
    file.seek(0)


def check_fit(parts: dict, contents: dict, path: Path) -> None:
    """Raise UserError unless a checkpoint has these parts, in the types and shapes that they have.

    Args: parts: networks and optimizers on the device "meta". So nothing is made yet: from a small file with
    the configuration of a large model, or with one number that is spread over a large shape, it would take
    all the memory; and Adam, in C, believes that its averages have the shapes of the weights.
    """
    expected, found = {}, {}
    with fitting(path):
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                weights = contents[name]
                expected |= {f"{name}.{key}": t for key, t in part.state_dict().items()}
            else:
                (group,), weights = part.param_groups, {}
                for i, averages in contents[name]["state"].items():  # none before the first step
                    p = group["params"][i]
                    like = {"step": p.new_empty(()), "exp_avg": p, "exp_avg_sq": p}
                    expected |= {f"{name}.{i}.{key}": t for key, t in like.items()}
                    weights |= {f"{i}.{key}": t for key, t in averages.items()}
            found |= {f"{name}.{key}": t for key, t in weights.items()}
        if odd := expected.keys() ^ found.keys():
            raise ValueError(f"{min(odd)} is missing, or too much")
        for key, t in expected.items():
            about = [(one.dtype, one.shape, one.layout) for one in (found[key], t)]
            if about[0] != about[1] or found[key].is_meta:
                raise ValueError(f"{key} is {about[0][0]} {tuple(about[0][1])}")
        if sum(t.nbytes for t in found.values()) > path.stat().st_size:
            raise ValueError("two of its tensors are one")
        for key, t in found.items():
            if ".exp_avg" not in key and not t.isfinite().all():
                raise ValueError(f"{key} is not finite")


def read_checkpoint(path: Path) -> tuple[dict, Config]:
    """Load a checkpoint without running code in it: its contents, in main memory, and its configuration.

    Raises: UserError unless it is a whole one of this program with a configuration that could be typed in.
    """
    try:
        with open(path, "rb") as file:
            check_archive(file)
            contents = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}")
    except Exception as error:  # torch.load answers a damaged file with whatever its parsers meet first
        strange = isinstance(error, pickle.UnpicklingError)
        why = "it holds code, or PyTorch did not write it" if strange else "it is damaged or cut short"
        raise UserError(f"{path} is no checkpoint that can be loaded: {why}; give another file") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this program; give another file")
    with fitting(path):
        config = Config(**contents["config"])
        check_config(config)
        step, images = contents["step"], contents["images"]
        if type(step) is not int or not 0 <= step <= 10**9 or type(images) is not str:
            raise ValueError(f"it is of step {step!r:.40}, of the images {images!r:.40}")
    return contents, config


def load(checkpoint: str | Path | None = None, device: str = "cpu", raw: bool = False) -> Generator:
    """The generator of a checkpoint file, of a run folder or (None) as `find_checkpoint` says, to sample.

    Args: raw: its weights themselves, instead of their running average.
    Returns: G, in evaluation mode and float32; G.config has its sizes. See `full_image`.
    Raises: UserError (a ValueError).
    """
    path = find_checkpoint(checkpoint)
    contents, config = read_checkpoint(path)
    if raw and "G" not in contents:
        raise UserError(f"{path} holds averaged weights only; leave out --raw")
    name = "G" if raw else "G_average"
    with torch.device("meta"):
        check_fit({name: Generator(config)}, contents, path)
    G = Generator(config)
    with fitting(path):
        G.load_state_dict(contents[name])
    if raw:
        normalised_for_good(G)
    return G.to(device).requires_grad_(False).eval()


def restore(state: State, contents: dict, path: Path, anew: tuple[str, ...] = ()) -> None:
    """Put everything back to where it was when the checkpoint was written, but for what begins `anew`."""
    with fitting(path):
        for name, part in stateful(state).items():
            if name in anew:
                continue
            saved = contents[name]
            if isinstance(part, torch.optim.Adam):  # its settings are the configuration's and the device's
                saved = {"state": saved["state"], "param_groups": part.state_dict()["param_groups"]}
            part.load_state_dict(saved)
            if isinstance(part, torch.optim.Adam):
                for p, kept in part.state.items():  # to lie as the weights do: Adam, in C, believes it
                    kept |= {k: torch.empty_like(p).copy_(kept[k]) for k in ("exp_avg", "exp_avg_sq")}
        state.rng.set_state(contents["rng"])
        state.step = contents["step"]


def fingerprint_of(images: np.ndarray) -> str:
    """Tells one set of decoded images from another wherever they lie: their shape and 64 of them."""
    some = images[np.linspace(0, len(images) - 1, 64).astype(int)]
    return f"{'x'.join(map(str, images.shape))}-{zlib.crc32(some.tobytes()):08x}"


def split(count: int, holdout: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the images to train on and of those held out, which are spread evenly over all."""
    held_out = torch.linspace(0, count - 1, holdout, dtype=torch.float64).long()
    kept = torch.ones(count, dtype=torch.bool)
    kept[held_out] = False
    return kept.nonzero().squeeze(1), held_out


def new_run(wanted: str | None, preset: str) -> Path:
    """Make the folder of a new run: the one asked for, or the next free runs/<preset>-NNN."""
    if wanted is not None:
        run = Path(wanted)
        with writing("--run", run):
            run.mkdir(parents=True, exist_ok=True)
            names = [path.name for path in run.iterdir() if not path.name.startswith(".")]
            # A run that ended before its first checkpoint has nothing to lose, and begins again.
            if names and ("config.json" not in names or any(run.glob("*.pt"))):
                again = f"go on with it by --resume {run}"
                hint = again if checkpoints(run) else "name a new or empty folder"
                raise UserError(f"--run {run} is not empty; {hint}")
        return run
    for number in itertools.count(1):
        run = Path("runs") / f"{preset}-{number:03d}"
        with writing("--run", run), contextlib.suppress(FileExistsError):
            run.mkdir(parents=True)
            return run


def lock_run(run: Path):
    """Keep other processes out of a run folder for as long as the returned file is open and we are alive."""
    with writing("--run", run):
        file = open(run / ".lock", "w")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(f"--run {run} is in use by another process; wait for it or name another folder")
    except OSError:
        pass  # a file system without locks; better to train without one than not at all
    return file


def check_finite(losses: torch.Tensor, state: State, run: Path) -> torch.Tensor:
    """The means of the LOSSES (steps, 6 or 7) up to this step; UserError names one that is not finite."""
    bad = (~losses.isfinite()).nonzero()
    where = ""
    if len(bad):
        row, column = bad[0].tolist()
        step = state.step - len(losses) + 1 + row
        where = f"{LOSSES[column]} is {losses[row, column].item()} at step {step:,}"
    elif not all(p.isfinite().all() for net in networks(state) for p in net.parameters()):
        where = f"a weight is not finite after step {state.step:,}"  # by a gradient, behind finite losses
    if where:
        good = checkpoints(run)
        kept = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint was written yet"
        raise UserError(f"{where}; {kept}; try lower --lr-g and --lr-d, or --precision fp32")
    return losses.mean(dim=0)


def log(state: State, means: torch.Tensor, seen: dict, seconds: float, steps: int, run: Path, board) -> None:
    """One line for the reader, the same as JSON in log.jsonl, and to TensorBoard."""
    if not writes():
        return
    rate = steps / seconds
    left = (state.config.steps - state.step) / rate
    entry = dict(step=state.step, images=state.step * state.config.batch_size, seconds=round(seconds, 3))
    entry |= dict(images_per_second=round(rate * state.config.batch_size, 2), seconds_left=round(left, 1))
    entry |= {name: float(mean) for name, mean in zip(LOSSES, means)}
    entry |= {**seen, "peak_memory_mb": peak_memory(state.device)}
    minutes = f"{left // 3600:.0f}h {left // 60 % 60:02.0f}m" if left >= 3600 else f"{left / 60:.1f} min"
    done = f"step {state.step:,}  {entry['images']:,} images  {entry['images_per_second']:,.0f}/s"
    losses = f"L_W {entry['L_W']:.3f}  L_GP {entry['L_GP']:.3f}  L_S real {entry['L_S_real']:.3f}"
    losses += f" generated {entry['L_S_generated']:.3f}"
    losses += f"  L_Q {entry['L_Q']:.3f}" if "L_Q" in entry else ""
    losses += "".join(f"  {name.replace('_', ' ')} {value:.2f}" for name, value in seen.items())
    try:
        print(f"{done}  {minutes} left  {losses}  {entry['peak_memory_mb']:,} MB", flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):  # a full disk, behind `train > log.txt`
            raise
        speak_to_nobody()  # a closed pipe or a terminal that is gone, of which a signal tells as well
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")
    if board is not None:
        for name in entry.keys() - {"step", "images", "seconds", "seconds_left"}:
            board.add_scalar(name, entry[name], state.step)


def peak_memory(device: torch.device) -> int:
    """MB that this process held at most: of the GPU if there is one, else of the machine; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    if resource is None:
        return 0
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def tensorboard(run: Path, step: int):
    """A context with a TensorBoard writer where TensorBoard is installed, else with None."""
    if importlib.util.find_spec("tensorboard") is None or not writes():
        return contextlib.nullcontext()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run), purge_step=step + 1)


def logged(run: Path) -> list[dict]:
    """The entries of log.jsonl; a last line that was cut short is none."""
    path = run / "log.jsonl"
    try:
        *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        entries = [json.loads(line) for line in lines]
        numbers = [entry.get(key, 0) for entry in entries for key in ("swd", "ring_seam")]
        if not all(type(number) in (int, float) for number in [entry["step"] for entry in entries] + numbers):
            raise ValueError
        return sorted(entries, key=lambda entry: entry["step"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} has a line that is no entry of a log; mend or remove it") from error


def forget_log_after(run: Path, step: int) -> None:
    """Drop what was logged after the checkpoint that a run goes on from: those steps come again."""
    path = run / "log.jsonl"
    kept = [json.dumps(entry) + "\n" for entry in logged(run) if entry["step"] <= step]
    write_whole(path, "".join(kept).encode())


@contextlib.contextmanager
def stop_signals():
    """Collect the signals that end a program in a list, so that it can save first; a second one kills.

    SIGHUP is that of a terminal that goes away, unless nohup has it ignored; SIGPIPE that of `train | head`.
    """
    caught, numbers = [], [signal.SIGINT, signal.SIGTERM]
    if os.name == "posix":
        numbers.append(signal.SIGPIPE)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------------
# Sampling (section 2, "testing phase"): full images exist only here
# ----------------------------------------------------------------------------------------------------------


def latents(seeds, z_dim: int = 128) -> torch.Tensor:
    """One latent vector for each seed, uniform on [-1, 1]: (len(seeds), z_dim), the same on every machine."""
    return torch.cat([latent(1, z_dim, torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.inference_mode()
def micro_patches(G: Generator, z: torch.Tensor, i, j, batch_size: int | None = None) -> torch.Tensor:
    """s'' = G(z, c''): n micro patches in rows i and columns j, each with its own latent vector.

    Args: z (n, z_dim) in [-1, 1]; i, j (n,); batch_size: patches at a time (default: 2¹⁸ pixels of them).
    Returns: (n, 3, S, S) float32 in [-1, 1], on the device of G.
    """
    config, device = G.config, next(G.parameters()).device
    c_micro = micro_coordinates(config, i.cpu(), j.cpu())  # the same on every device
    at_once = batch_size or max(1, 2**18 // config.S**2)

    def make(mine: slice) -> torch.Tensor:
        parts = zip(z[mine].split(at_once), c_micro[mine].split(at_once))
        return torch.cat([G(z.to(device), c.to(device)) for z, c in parts])

    return gather(make, len(z))


def image_row(G: Generator, z: torch.Tensor, i: int, batch_size=None, across: int = 0) -> torch.Tensor:
    """Row i of the micro patches of full images: (B, z_dim) -> (B, 3, S, width + 2·across·S)."""
    columns = torch.arange(-across, G.config.K + across)
    K, j = len(columns), columns.repeat(len(z))
    patches = micro_patches(G, z.repeat_interleave(K, dim=0), torch.full_like(j, i), j, batch_size)
    return merge_patches(patches, 1, K)


def full_image(G: Generator, z, batch_size: int | None = None, ring: tuple[int, int] = (0, 0)):
    """s = φ(G(z, C''_full)): full images, each from the R·K patches of its own latent vector.

    Args: z (B, z_dim) in [-1, 1], any device; batch_size: micro patches at a time; ring: how many more of
    them beyond the upper and lower, and beyond the left and right border (section 3.3).
    Returns: (B, 3, height + 2·ring[0]·S, width + 2·ring[1]·S) float32 in [-1, 1], on the device of G.
    Source: section 2, "testing phase"; appendix B, "Testing Only".
    """
    down, across = ring
    rows = range(-down, G.config.R + down)
    return torch.cat([image_row(G, z, i, batch_size, across) for i in rows], dim=2)


RED, BLUE = (255, 0, 0), (0, 0, 255)


def framed(images: np.ndarray, top: int, left: int, height: int, width: int, colour) -> np.ndarray:
    """A copy of images (n, H, W, 3) uint8 with a rectangle outlined, a pixel outside it if there is one."""
    images, (H, W) = images.copy(), images.shape[1:3]
    first, last = max(top - 1, 0), min(top + height, H - 1)
    start, end = max(left - 1, 0), min(left + width, W - 1)
    images[:, [first, last], start : end + 1] = colour
    images[:, first : last + 1, [start, end]] = colour
    return images


def ring_framed(images: np.ndarray, config: Config, ring: tuple[int, int]) -> np.ndarray:
    """Full images with a ring, n of them, uint8, the region that was trained framed in red (figure 7)."""
    return framed(images, ring[0] * config.S, ring[1] * config.S, config.height, config.width, RED)


def ring_seams(images: np.ndarray, S: int, ring: tuple[int, int]) -> tuple[float, float]:
    """How visible the borders of micro patches are, those of the ring and those inside (appendix E).

    Each border: the mean absolute difference across it over that of neighbours within the patches on either
    side; their means. Post-training has done its work when the ring's is no larger than that inside.

    Args: images (n, H, W, 3) uint8, with the ring. Returns: ring, inside; NaN where no border has a figure.
    """
    beyond, within = [], []
    for axis, extra in zip((1, 2), ring):
        steps = np.abs(np.diff(images.astype(np.int16), axis=axis)).mean((0, 3 - axis, 3))  # (lines - 1,)
        last = len(steps) // S
        for border in range(1, last + 1):
            around = steps[(border - 1) * S : (border + 1) * S - 1]
            inside = np.delete(around, S - 1)
            if inside.any():
                seams = beyond if min(border, last + 1 - border) <= extra else within
                seams.append(around[S - 1] / inside.mean())
    return tuple(float(np.mean(seams)) if seams else math.nan for seams in (beyond, within))


class Scene:
    """A full image of which no part exists before somebody looks at it (section 3.4, "Partial Generation").

    Args: z (1, z_dim) in [-1, 1]. `made` counts the micro patches made so far, each of them once.
    """

    def __init__(self, G: Generator, z: torch.Tensor, batch_size: int | None = None):
        self.G, self.z, self.batch_size = G, z, batch_size
        device, S = next(G.parameters()).device, G.config.S
        # The patches in the order they were made, and which of them is in row i, column j; -1: none yet.
        self.patches = torch.empty(0, S, S, 3, dtype=torch.uint8, device=device)
        self.number = torch.full((G.config.R, G.config.K), -1, device=device)

    @property
    def made(self) -> int:
        return len(self.patches)

    def pixels(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The pixels in rows y and columns x of the full image, those of `full_image` but for its rounding.

        float32 rounds otherwise in batches of another size: some of 10,000 values differ, by one of 255.

        Args: int64 of any shapes that broadcast to one, (…); on a closed axis any whole numbers.
        Returns: (…, 3) uint8 on the device of G. Raises: ValueError for a pixel outside an open border.
        """
        config, device, inside = self.G.config, self.patches.device, []
        for name, p, size, closed in (
            ("rows", y, config.height, config.closed[0]),
            ("columns", x, config.width, config.closed[1]),
        ):
            if not closed and not (0 <= p.min() and p.max() < size):
                raise ValueError(f"{name} {int(p.min())} to {int(p.max())} are not within 0 to {size - 1}")
            inside.append(p.to(device) % size)
        y, x = inside
        i, j = y // config.S, x // config.S
        touched = torch.zeros_like(self.number, dtype=torch.bool)
        touched[i, j] = True
        rows, columns = (touched & (self.number < 0)).nonzero(as_tuple=True)
        if len(rows):
            z = self.z.expand(len(rows), -1)
            new = micro_patches(self.G, z, rows, columns, self.batch_size)
            self.number[rows, columns] = torch.arange(self.made, self.made + len(rows), device=device)
            self.patches = torch.cat([self.patches, quantised(new)])
        return self.patches[self.number[i, j], y % config.S, x % config.S]

    def viewport(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """The rectangle of pixels from (top, left): (height, width, 3) uint8. Raises: as `pixels`."""
        rows, x = torch.arange(top, top + height)[:, None], torch.arange(left, left + width)
        # In bands, or the numbers of the patches would take far more memory than the pixels.
        bands = rows.split(max(1, 2**20 // width))
        return np.concatenate([self.pixels(y, x).cpu().numpy() for y in bands])


def quantised(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, rounded."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, rounded, as NumPy's."""
    return quantised(images).cpu().numpy()


def grid_columns(count: int, height: int, width: int) -> int:
    """Into how many columns to lay out a picture of so many images, so that it is about a square."""
    columns = min(count, max(1, round(math.sqrt(count * height / width))))
    return columns if count % columns == 0 or count % (columns + 1) else columns + 1  # if that leaves no gap


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Lay images (B, H, W, 3) uint8 out row by row on white, as square as can be: one picture (h, w, 3)."""
    B, H, W, _ = images.shape
    columns = columns or grid_columns(B, H, W)
    rows = -(-B // columns)
    picture = np.full((rows * (H + gap) - gap, columns * (W + gap) - gap, 3), 255, np.uint8)
    for b, image in enumerate(images):
        top, left = b // columns * (H + gap), b % columns * (W + gap)
        picture[top : top + H, left : left + W] = image
    return picture


def strips(G: Generator, z: torch.Tensor, columns: int, turns: int = 1, batch_size: int | None = None):
    """The `grid` of full images, from top to bottom in strips (h, w, 3) uint8, a row of micro patches each.

    However large an image is, no more of it is in memory. turns: how often an image is repeated along its
    closed axes.
    """
    down, across = (turns if closed else 1 for closed in G.config.closed)
    for first in range(0, len(z), columns):
        for i in [*range(G.config.R)] * down:
            row = to_uint8(image_row(G, z[first : first + columns], i, batch_size))
            strip = grid(np.tile(row, (1, 1, across, 1)), columns)  # (S, w, 3)
            yield strip
        if first + columns < len(z):
            yield np.full_like(strip[:2], 255)


def azimuth_variety(images: np.ndarray, S: int) -> float:
    """How much the micro patches of one row of an image differ: the mean absolute difference of two of them.

    Args: images (n, H, W, 3) uint8. It is 0 if G ignores the azimuth; compare with that of real images.
    """
    pairs = itertools.product(images, range(S, images.shape[2], S))
    return float(np.mean([np.abs(x - np.int16(np.roll(x, turn, axis=1))).mean() for x, turn in pairs]))


def figure_3(G: Generator, z: torch.Tensor, batch_size: int | None = None) -> np.ndarray:
    """Three rows as in figure 3: full images, a macro patch of each, and the first micro patch in that."""
    config, S, gap = G.config, G.config.S, 8
    images = to_uint8(full_image(G, z, batch_size))
    B, H, W, _ = images.shape
    height, width = config.N * S, config.M * S
    picture = np.full((H + height + S + 2 * gap, B * (W + gap) - gap, 3), 255, np.uint8)
    places = [(i, j) for i in range(config.R - config.N + 1) for j in range(config.K - config.M + 1)]
    for b, image in enumerate(images):
        i, j = places[b * len(places) // B]  # from the top left to the bottom right
        s_macro, left = image[i * S :, j * S :][:height, :width], b * (W + gap)
        picture[:H, left : left + W] = image
        picture[H + gap :, left : left + width][:height] = s_macro
        picture[H + height + 2 * gap :, left : left + S] = s_macro[:S, :S]
    return picture


PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LONGEST_SIDES = {".webp": 16_383, ".jpg": 65_500, ".jpeg": 65_500, ".gif": 65_535}  # pixels that they hold


def save_picture(picture: np.ndarray, path: Path) -> None:
    """Write a picture (h, w, 3) uint8, whole or not at all; of several processes the first one does."""
    if not writes():
        return
    side, file = max(picture.shape), io.BytesIO()
    if side > LONGEST_SIDES.get(path.suffix.lower(), side):
        raise OSError(f"it would be {side} pixels long, which only .png is made for")
    # Not into the file itself: where a full disk cuts a JPEG short, Pillow does not notice.
    Image.fromarray(picture).save(file, format=Image.registered_extensions()[path.suffix.lower()])
    write_whole(path, file.getvalue())


def save_png(parts, path: Path) -> None:
    """Write a picture that comes from top to bottom in parts (h, w, 3) uint8, whole or not at all.

    Pillow would hold all of it in memory. Of several processes, which make the parts together, the first one
    writes. Source: the PNG specification, sections 5, 9 and 11.
    """
    if not writes():
        for _ in parts:
            pass
        return
    height, above, packer = 0, None, zlib.compressobj()

    def chunk(kind: bytes, data: bytes) -> None:
        file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))

    def header(width: int) -> None:
        file.seek(0)
        file.write(b"\x89PNG\r\n\x1a\n")
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))  # 8 bits, RGB, not interlaced

    with whole(path) as temporary, open(temporary, "wb") as file:
        for part in parts:
            h, w, _ = part.shape
            if above is None:
                above = np.zeros((1, 3 * w), np.uint8)
                header(w)
            lines = np.concatenate([above, part.reshape(h, 3 * w)])
            filtered = np.full((h, 1 + 3 * w), 2, np.uint8)  # 2: what follows is what the line above lacks
            np.subtract(lines[1:], lines[:-1], out=filtered[:, 1:])
            chunk(b"IDAT", packer.compress(filtered.data))
            height, above = height + h, lines[-1:]
        chunk(b"IDAT", packer.flush())
        chunk(b"IEND", b"")
        header(w)  # again, now that the height is known


# ----------------------------------------------------------------------------------------------------------
# Several processes, as torchrun starts them: each has a part of every batch, and the first one writes
# ----------------------------------------------------------------------------------------------------------


def world() -> int:
    """How many processes were started."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def processes() -> tuple[int, int]:
    """The number of this process, and of how many that work together: 0 and 1 outside of `joined`."""
    up = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if up else (0, 1)


def writes() -> bool:
    """Whether this is the process that writes files: the first."""
    return processes()[0] == 0


def speak_to_nobody() -> None:
    """Let what is printed from here on vanish: Python would fail at the end over what it could not flush."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if world() > 1 and name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    elif world() > 1 and name != "cpu":
        raise UserError(f"--device {name} is one device for {world()} processes; leave it out, or give cpu")
    kind, colon, number = name.partition(":")
    have = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in have or (colon and not (kind == "cuda" and re.fullmatch(r"\d{1,9}", number))):
        raise UserError(f"--device {name} is unknown; give auto, cpu, cuda, cuda:1 (the second GPU) or mps")
    if int(number or 0) >= have[kind]:
        raise UserError(f"--device {name} is not there: PyTorch finds {have[kind]} of {kind}; try auto")
    if kind == "cuda":
        torch.cuda.set_device(int(number or 0))  # streams, graphs and Triton go by the current one
    torch.backends.cudnn.allow_tf32 = False  # its rounding would depend on how many patches go together
    return torch.device(name)


@contextlib.contextmanager
def joined(device: str):
    """Work with the other processes that torchrun started, if it did; all print errors, one the rest."""
    if world() == 1:
        yield
        return
    device = choose_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # A day: the others wait while the first one decodes the images. That a process ended, gloo sees at once;
    # and torchrun, which then ends the others, within seconds.
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    if not writes():
        speak_to_nobody()
    try:
        yield
    except RuntimeError as error:
        if not re.search("gloo|nccl|peer|connection", str(error), re.IGNORECASE):
            raise
        ended = "another process has ended, or cannot be reached"
        raise UserError(f"{ended}; what was saved is whole, and --resume goes on with it") from error
    else:  # only then, for it waits for what the others have begun
        dist.destroy_process_group()


def leave(status: int) -> None:
    """sys.exit; of several processes at once, for gloo crashes now and then while its threads end."""
    if world() > 1:
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def highest(number: int) -> int:
    """The highest of the numbers that the processes give; each waits for all."""
    if processes()[1] == 1:
        return number
    dist.all_reduce(highest := torch.tensor(number), dist.ReduceOp.MAX)
    return int(highest)


def load_once(*args, **kwargs) -> np.ndarray:
    """`load_images`, which decodes, by the first process, and then by the others, which find that done."""
    if not writes():
        highest(0)
    images = load_images(*args, **kwargs)
    if writes():
        highest(0)
    return images


def mean_of_all(tensor: torch.Tensor) -> torch.Tensor:
    """Put the mean over the processes in the place of the tensor."""
    if processes()[1] > 1:
        dist.all_reduce(tensor)
        tensor /= processes()[1]
    return tensor


def gather(make, count: int) -> torch.Tensor:
    """make(slice(0, count)), (count, …), of which each process makes a part and gets all."""
    rank, processes_ = processes()
    share = -(-count // processes_)
    start = min(rank * share, count - 1)  # who would have none makes the last one, too
    mine = make(slice(start, start + share))
    if processes_ == 1:
        return mine
    padded = mine.new_zeros(share, *mine.shape[1:])
    padded[: len(mine)] = mine
    dist.all_gather(parts := [torch.empty_like(padded) for _ in range(processes_)], padded)
    return torch.cat(parts)[:count]


class Trained(nn.Module):
    """The parameters of networks, with their losses as forward pass: what DistributedDataParallel wants.

    Without the buffers, which it would copy from the first process to the others.
    """

    def __init__(self, nets: list[nn.Module]):
        super().__init__()
        self.trained = nn.ParameterList(p for net in nets for p in net.parameters())

    def forward(self, losses, k: int):
        return losses(k)


class SumOfAll(torch.autograd.Function):
    """The sum over the processes. Each has losses that depend on it: so its gradient is a sum too."""

    @staticmethod
    def forward(ctx, tensor):
        dist.all_reduce(tensor := tensor.clone())
        return tensor

    @staticmethod
    def backward(ctx, gradient):
        dist.all_reduce(gradient := gradient.clone())
        return gradient


def synchronise(nets: list[nn.Module]) -> None:
    """Let all batch normalisations of networks in training take the statistics of all processes."""
    for net in nets:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.forward = functools.partial(synchronised_norm, module)
            elif isinstance(module, ConditionalBatchNorm):
                module.synchronised = True


def synchronised_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """What norm does to x, (B, C) or (B, C, h, w), but with mean and variance over all processes.

    PyTorch's own SyncBatchNorm works on GPUs only.
    """
    count, over, like = processes()[1], [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
    mean = SumOfAll.apply(x.float().mean(over)) / count  # (C,)
    difference = x.float() - mean.view(like)
    var = SumOfAll.apply(difference.square().mean(over)) / count
    y = difference * (var + norm.eps).rsqrt().view(like)
    with torch.no_grad():
        n = count * x.numel() // x.shape[1]
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * n / (n - 1), norm.momentum)
        norm.num_batches_tracked += 1
    if norm.affine:
        y = y * norm.weight.view(like) + norm.bias.view(like)
    return y.to(x.dtype)


# ----------------------------------------------------------------------------------------------------------
# The two commands
# ----------------------------------------------------------------------------------------------------------

STEPS_BEYOND = 2_000  # of post-training at most, unless --steps says otherwise
EVAL_EVERY = 10_000
MEASURED_PIXELS = 2**27  # of each set of images, 400 MB


def train(args: argparse.Namespace) -> int:
    """`train`: from images to checkpoints, pictures and a log in a run folder; returns the exit status."""
    device = choose_device(args.device)
    if args.graph and (device.type != "cuda" or world() > 1):
        raise UserError("--graph is for a single process on a GPU; leave it out")
    choose_impl(args.impl, device)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if f.name in args}
    if args.resume is None and args.source is None:
        preset, why = choose_preset(args, device, given.get("data", Config.data))
        config, contents = Config(**{**PRESETS[preset], **given}), None
        check_config(config)
        if any(config.ring):
            raise UserError(f"--extrapolate {config.extrapolate} needs a trained model; add --from RUN")
        print(f"preset {preset} ({why}), on {device}")
    else:
        path, contents, config = trained_before(args, given)
    check_panorama(args, config, "this run")
    if args.eval_every is not None and (why := evaluation_needs(config)):
        raise UserError(f"--eval-every {args.eval_every} needs {why}; leave it out")
    if args.eval_count < 2:
        raise UserError(f"--eval-count {args.eval_count} leaves nothing to compare; give 2 or more")
    check_shares(config, contents is not None)
    if args.dry_run:
        return dry_run(config)

    how = dict(crop=config.crop, cache=args.cache, workers=args.workers or 0, panorama=config.closed[1])
    stored = load_once(config.data, config.height, config.width, seed=config.seed, **how)
    if config.holdout >= len(stored):
        raise UserError(f"--holdout {config.holdout} leaves none of {len(stored)} images; try fewer")
    fingerprint = fingerprint_of(stored)
    if contents is not None and contents["images"] != fingerprint:
        raise UserError(f"--data {config.data} has other images than {path} was trained on")
    if args.resume is None:
        runs = [new_run(args.run, preset if args.source is None else "extrapolate") if writes() else None]
        if world() > 1:
            dist.broadcast_object_list(runs)
        (run,) = runs
    else:
        run = path.parent
    lock = lock_run(run) if writes() else contextlib.nullcontext()
    with lock, writing("--run", run), memory(memory_advice(config, device, contents is not None)):
        if args.resume is not None and checkpoints(run)[-1] != path:
            raise UserError(f"--run {run} was trained further just now; start this command again")
        state = new_state(config, device)
        if writes():  # when resuming too: --steps may be new, and a copied checkpoint have come without it
            write_whole(run / "config.json", (json.dumps(vars(config), indent=1) + "\n").encode())
        if contents is not None:
            restore(state, contents, path, anew=() if args.source is None else BEYOND)
            if highest(state.step) != -highest(-state.step):
                why = "the processes found checkpoints of different steps"
                raise UserError(f"{why}; start this command again")
        if writes():
            forget_log_after(run, state.step)
        del contents
        return train_loop(state, stored, fingerprint, run, args)


def parts_allowed(config: Config) -> list[int]:
    """What --accumulate may be: a part has at least two macro patches, or it had no batch statistics."""
    share, rest = divmod(config.batch_size, world())
    return [k for k in range(1, share // 2 + 1) if share % k == 0 and not rest]


def check_shares(config: Config, resuming: bool) -> None:
    allowed, found = parts_allowed(config), f"--batch-size {config.batch_size}"
    if not allowed:
        why = f"cannot be shared by {world()} processes, at least two macro patches to each"
        other = f"--batch-size {max(config.batch_size // world(), 2) * world()}"
        raise UserError(f"{found} {why}; try {'another number of them' if resuming else other}")
    if config.accumulate not in allowed:
        found += f" of {world()} processes" if world() > 1 else ""
        may = ", ".join(map(str, allowed))
        raise UserError(f"--accumulate {config.accumulate} does not divide {found} evenly; give {may}")


def memory_advice(config: Config, device: torch.device, resuming: bool) -> str:
    """What to do when the memory is full."""
    more = [k for k in parts_allowed(config) if k > config.accumulate]
    half = f"--batch-size {max(config.batch_size // 2, 2)}" + (" in a new run" if resuming else "")
    what = f"--accumulate {config.accumulate} parts of " if config.accumulate > 1 else ""
    what += f"--batch-size {config.batch_size}"
    return f"{what} does not fit in the memory of {device}; try {f'--accumulate {more[0]}' if more else half}"


def trained_before(args: argparse.Namespace, given: dict) -> tuple[Path, dict, Config]:
    """The checkpoint that --resume goes on with or --from branches off: its path, contents, configuration."""
    if args.resume is not None and args.source is not None:
        raise UserError("--from begins a new run and --resume goes on with one; give one of them")
    if args.source is not None and "extrapolate" not in given:
        raise UserError("--from is for post-training; add --extrapolate 1, or go on with a run by --resume")
    resuming = args.resume is not None
    option, where = ("--resume", args.resume or None) if resuming else ("--from", args.source)
    path = find_checkpoint(where, option, args.panorama)
    contents, config = read_checkpoint(path)
    if "G" not in contents:
        raise UserError(f"{option} {path} holds averaged weights only, which cannot be trained further")
    with torch.device("meta"):
        check_fit(stateful(new_state(config, torch.device("meta"))), contents, path)
    with fitting(path):
        torch.Generator().set_state(contents["rng"])  # now, before a new run has a folder
    if resuming and checkpoints(path.parent)[-1:] != [path]:
        if where is None or os.path.isdir(where):  # a moment ago it was the newest
            raise UserError(f"--run {path.parent} is in use by another process; wait for it")
        hint = f"give {path.parent}, or to branch off copy it to a new folder as "
        hint += f"checkpoint-{contents['step']:09d}.pt"
        raise UserError(f"--resume {path} is not the newest checkpoint of a run; {hint}")
    again = ["steps", "data", "accumulate", "sync_stats", *([] if resuming else ["extrapolate"])]
    if args.preset is not None or (args.run is not None and resuming):
        what = "preset" if args.preset is not None else "run"
        raise UserError(f"--{what} cannot be given with {option}, which keeps the run's; leave it out")
    for field, value in given.items():
        if field not in again and value != getattr(config, field):
            was = f"{flag(field)} was {getattr(config, field)} in {path} and is now {value}"
            raise UserError(f"{was}; leave it out, or start a new run without {option}")
    if not resuming:
        given = {"steps": contents["step"] + STEPS_BEYOND, **given}
    config = dataclasses.replace(config, **{field: given[field] for field in again if field in given})
    check_config(config)
    if not resuming and not any(config.ring):
        raise UserError(f"--extrapolate {config.extrapolate} adds nothing to train; give 1 or more")
    if contents["step"] >= config.steps:
        done = f"has done {contents['step']} steps already"
        raise UserError(f"{path} {done}; --steps counts them too: give more than that")
    return path, contents, config


def check_panorama(args: argparse.Namespace, config: Config, what: str) -> None:
    if args.panorama and config.topology != "cylinder":
        text = f"--panorama needs a cylinder, and {what} is on a {config.topology}"
        raise UserError(f"{text}; leave out --panorama, or what chooses the {config.topology}")


def train_loop(state: State, stored: np.ndarray, fingerprint: str, run: Path, args) -> int:
    config, device = state.config, state.device
    numbers, _ = split(len(stored), config.holdout)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written to
        images = torch.from_numpy(stored)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # the shapes never change
        tf32 = precision_of(config, device) == "tf32"
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        if stored.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            images = images.to(device)
    z_shown = latents(range(24), config.z_dim)
    measure, eval_every = evaluation(state.G_average, stored, args.eval_count), args.eval_every or EVAL_EVERY
    # What the best checkpoint is chosen by: post-training may get worse again (appendix E).
    figure, sample_every = ("ring_seam", 100) if any(config.ring) else ("swd", 1000)
    intervals = args.sample_every or sample_every, args.log_every, args.save_every
    best = min((entry[figure] for entry in logged(run) if figure in entry), default=math.inf)

    some = stored[numbers[:: len(numbers) // 64 + 1].numpy()]
    real_variety = azimuth_variety(some, config.S) if config.closed[1] and config.K > 1 else 0

    def show() -> dict[str, float]:
        """Draw the picture of this step; returns what is seen in it, for the log.

        azimuth_variety: 1 if as that of real images. ring_seam, inner_seam: see `ring_seams`.
        """
        images, seen = to_uint8(full_image(state.G_average, z_shown, ring=config.ring)), {}
        if real_variety:
            within = images[:, config.ring[0] * config.S :][:, : config.height]
            seen["azimuth_variety"] = azimuth_variety(within, config.S) / real_variety
        if any(config.ring):
            seams = zip(("ring_seam", "inner_seam"), ring_seams(images, config.S, config.ring))
            seen |= {name: seam for name, seam in seams if not math.isnan(seam)}
            images = ring_framed(images, config, config.ring)
        save_picture(grid(images), run / f"sample-{state.step:09d}.png")
        return seen

    if writes() and not checkpoints(run):
        batch = draw_batch(config, images, numbers, torch.Generator().manual_seed(config.seed), device)
        save_picture(grid(to_uint8(batch.x_macro[:64])), run / "real-macro.png")
        save_picture(grid(stored[numbers[:24].numpy()]), run / "real.png")
    seen, seamless, last = show(), False, False
    parameters = sum(p.numel() for net in networks(state) for p in net.parameters())
    todo = f"{config.steps - state.step:,} steps to go"
    print(f"{len(numbers):,} images, {parameters:,} parameters, {todo}, in {run}", flush=True)

    step = graphed(state) if args.graph else lambda batch: train_step(state, batch)
    losses, started, began = [], time.monotonic(), state.step  # losses: of each step since the last line
    with stop_signals() as signals, tensorboard(run, state.step) as board:
        while not last:
            losses.append(step(draw_batch(config, images, numbers, state.rng, device)))
            if any(config.ring):
                step_beyond(state, draw_batch(config, images, numbers, state.rng, device, config.ring))
            release_pages(stored)  # or a training set as large as the disk would seem to fill the memory
            stopped = highest(max(signals, default=0))  # one for all
            last = state.step == config.steps or stopped > 0
            drawing, logging, saving = (last or state.step % every == 0 for every in intervals)
            measuring = measure is not None and not stopped and state.step % eval_every == 0
            if not (drawing or logging or saving or measuring):
                continue
            # Only from here on a GPU is waited for.
            means, new = check_finite(mean_of_all(torch.stack(losses)).cpu().double(), state, run), {}
            share_statistics(state)
            if drawing:
                new = seen = show()
                # Post-training has done its work when the borders of the ring show no more than those inside.
                seamless = seen.get("ring_seam", math.inf) <= seen.get("inner_seam", 0)
                last = last or seamless
            if measuring:
                new = {**new, **measure()}
            if new.get(figure, math.inf) < best and writes():
                best = new[figure]
                write_checkpoint(state, run / "best.pt", fingerprint)
            if last or logging or new:
                seconds, steps = time.monotonic() - started, state.step - began
                log(state, means, {**seen, **new}, seconds, steps, run, board)
                losses.clear()
            if last or saving:  # at the end: who is killed before comes back to this step, and its log line
                path = save_checkpoint(state, run, fingerprint, args.keep)
    if stopped and state.step < config.steps:
        print(f"stopped and saved {path}; go on with: python coco_gan.py train --resume {run}")
        return 128 + stopped
    if seamless:
        print(f"step {state.step:,}: the borders of the ring show no more than those inside")
    more = run / "best.pt" if any(config.ring) and (run / "best.pt").exists() else run
    more = f"{more} --extrapolate {config.extrapolate}" if any(config.ring) else more
    print(f"done: {run}/sample-{state.step:09d}.png; for more: python coco_gan.py sample --checkpoint {more}")
    return 0


def evaluation_needs(config: Config) -> str:
    """What is missing to measure distances to real images, if anything."""
    try:
        importlib.import_module("experiments.metrics")
    except ImportError:
        return "the folder experiments/ beside coco_gan.py"
    return "images of at least 16 pixels a side" if min(config.height, config.width) < 16 else ""


def evaluation(G: Generator, stored: np.ndarray, count: int):
    """A function that compares images of G with real ones; None if there is nothing to compare with.

    It returns swd and swd_floor, the sliced Wasserstein distances x 1,000 of generated and of more real
    images from those held out (or from half of all, if none are), and seam_ratio. The latents are the same
    every time, and all that training uses stays as it is.
    """
    config, device = G.config, next(G.parameters()).device
    pools = split(len(stored), config.holdout or len(stored) // 2)
    count = min(count, *map(len, pools), MEASURED_PIXELS // (config.height * config.width))
    if evaluation_needs(config) or count < 2:
        return None
    from experiments import metrics

    more, some = (numbers[split(len(numbers), count)[1]].numpy() for numbers in pools)
    floor = {}

    def generate(first: int, last: int) -> np.ndarray:
        return to_uint8(full_image(G, latents(range(first, last), config.z_dim)))

    def others(first: int, last: int) -> np.ndarray:
        return stored[more[first - metrics.MOST_IMAGES : last - metrics.MOST_IMAGES]]

    def measure() -> dict[str, float]:
        how = stored[some], config.S, config.closed, device
        with memory(f"memory is full of the images to measure; try --eval-count {max(count // 2, 2)}"):
            if not floor:
                floor.update(metrics.in_training(others, *how))
            figures = metrics.in_training(generate, *how)
        return {**figures, "swd_floor": floor["swd"]} if "swd" in figures and "swd" in floor else figures

    return measure


def choose_preset(args: argparse.Namespace, device: torch.device, data: str) -> tuple[str, str]:
    """The preset's name, and why it is that one."""
    if args.preset is not None:
        if args.preset not in PRESETS:
            hint = nearest(args.preset, PRESETS)
            raise UserError(f"--preset {args.preset} is unknown{hint}; give {', '.join(PRESETS)}")
        return args.preset, "as asked"
    if args.panorama:
        name, where = ("panorama-tiny", "a CPU") if device.type == "cpu" else ("panorama", "a GPU")
        return name, f"that of --panorama on {where}; --preset names another"
    if device.type != "cpu":
        return "celeba64", "the default on a GPU; --preset names another"
    if data.startswith("toy:"):
        return "tiny", "the default for toy images on a CPU; --preset names another"
    return "small", "the default for photographs on a CPU; --preset names another"


def dry_run(config: Config) -> int:
    """Print the configuration, every layer's shape, the parameters and the memory, about; make nothing."""
    for name, value in dataclasses.asdict(config).items():
        print(f"  {flag(name):14} {value}")
    rows = []

    def note(name):
        return lambda module, inputs, output: rows.append((name, type(module).__name__, output))

    with torch.device("meta"):  # shapes without memory
        nets = dict(zip("GDAQ", networks(new_state(config, torch.device("meta")))))
        for net_name, net in nets.items():
            for name, module in net.named_modules():
                module.register_forward_hook(note(f"{net_name}.{name}".rstrip(".")))
        c = torch.empty(2, config.c_dim)
        nets["G"](torch.empty(2, config.z_dim), c)
        _, h = nets["D"](torch.empty(2, 3, config.N * config.S, config.M * config.S), c)
        for head in [*nets.values()][2:]:
            head(h)
    values = dict.fromkeys(nets, 0)
    for name, kind, output in rows:
        output = output[0] if isinstance(output, tuple) else output
        print(f"  {name:26} {kind:22} {' x '.join(map(str, ('B', *output.shape[1:])))}")
        values[name[0]] += output[0].numel() if name not in nets else 0
    parameters = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    print("  parameters: " + ", ".join(f"{name} {n:,}" for name, n in parameters.items()))
    # Weights, gradients, Adam's two averages and G's average; and what the layers give, G's once, D's for x',
    # s', ŝ' and, twice more, for the gradient at ŝ': within a fifth of what a step was measured to hold.
    fixed = 4 * (4 * sum(parameters.values()) + parameters["G"])
    part = config.batch_size / (world() * config.accumulate)
    passes = part * (config.N * config.M * values["G"] + 5 * values["D"])
    megabytes = (fixed + 4 * passes) / 2**20
    print(f"  memory: about {megabytes:,.0f} MB in float32, and the images and PyTorch itself")
    return 0


def sample(args: argparse.Namespace) -> int:
    """`sample`: from a checkpoint to a picture, or to one picture a seed in a folder."""
    device = choose_device(args.device)
    choose_impl(args.impl, device)
    path = find_checkpoint(args.checkpoint, panorama=args.panorama)
    seeds = parse_seeds(args.seed, args.count or (1 if args.panorama and not args.seed else None))
    out = Path(args.out or free_name(picture_folder(path) / path.stem.replace("checkpoint", "seeds")))
    folder = os.path.isdir(out) or (args.out or "").endswith(("/", os.sep))
    if args.patches and (folder or args.viewport or args.turns > 1):
        other = "--viewport or --turns" if not folder else f"a folder; give --out a file, not {out}"
        raise UserError(f"--patches draws one picture of its own, and cannot go with {other}")
    if not folder and out.suffix.lower() not in PICTURES:
        hint = "end it in .png, .jpg or .webp, or that of a folder in /"
        raise UserError(f"--out {out} is no picture's name; {hint}")
    names = [out / f"seed-{seed:06d}.png" for seed in seeds] if folder else [out]
    taken = [name for name in names if os.path.exists(name)]
    if taken and not args.force:
        raise UserError(f"--out {taken[0]} exists already; name another, or add --force to replace it")
    G = load(path, device, raw=args.raw)
    config, z, B = G.config, latents(seeds, G.config.z_dim), args.batch_size
    check_panorama(args, config, path)
    if args.turns > 1 and args.viewport:
        raise UserError("--turns cannot go with --viewport, which wraps round anyway; leave it out")
    if args.turns > 100:
        raise UserError(f"--turns {args.turns} is out of range; give 1 to 100")
    if args.turns > 1 and not any(config.closed):
        raise UserError(f"--turns {args.turns} repeats images whose borders meet, and {path} is on a plane")
    window = parse_viewport(args.viewport, config, 1 if folder else len(seeds))
    ring = parse_ring(args.extrapolate, config)
    if any(ring) and (args.patches or window or args.turns > 1):
        other = "--patches" if args.patches else "--viewport" if window else "--turns"
        raise UserError(f"--extrapolate {args.extrapolate} cannot go with {other}; leave one of them out")
    if any(extra > trained for extra, trained in zip(ring, config.ring)):
        trained = "no ring" if not any(config.ring) else f"a ring of {config.extrapolate}"
        print(f"warning: {path} was post-trained for {trained}; the borders beyond may show", file=sys.stderr)

    down, across = (args.turns if closed else 1 for closed in config.closed)
    height, width = window[2:] if window else (config.height * down, config.width * across)
    height, width = height + 2 * ring[0] * config.S, width + 2 * ring[1] * config.S

    def draw(z: torch.Tensor, names: list[Path]) -> None:
        """One picture of all, or one of each."""
        columns, png = grid_columns(len(z), height, width), names[0].suffix.lower() == ".png"
        if args.patches:
            return save_picture(figure_3(G, z, B), names[0])
        if any(ring):
            images = ring_framed(to_uint8(full_image(G, z, B, ring)), config, ring)
        elif window:
            scenes = [Scene(G, one, B) for one in z.split(1)]
            images = np.stack([scene.viewport(*window) for scene in scenes])
            print(f"{scenes[0].made} of {config.R * config.K} micro patches generated")
        elif len(names) > 1:
            images = np.tile(to_uint8(full_image(G, z, B)), (1, down, across, 1))
        else:
            parts = strips(G, z, columns, args.turns, B)
            return save_png(parts, names[0]) if png else save_picture(np.concatenate([*parts]), names[0])
        for picture, name in zip(images if folder else [grid(images, columns)], names):
            save_picture(picture, name)

    together = max(1, 2**20 // (height * width)) if folder else len(z)
    advice = f"try --batch-size {(B or 2) // 2 or 1}, or fewer or smaller pictures"
    tell_newest(args.checkpoint, path)
    with writing("--out", out), memory(f"memory of {device} is full; {advice}"):
        names[0].parent.mkdir(parents=True, exist_ok=True)
        for first in range(0, len(z), together):
            draw(z[first : first + together], names[first : first + together])
    print(out)
    return 0


def parse_viewport(text: str | None, config: Config, count: int) -> tuple[int, ...] | None:
    """ "top,left,height,width" in pixels of the full image, for so many images in one picture."""
    if text is None:
        return None
    if not re.fullmatch(r"-?\d{1,9},-?\d{1,9},\d{1,9},\d{1,9}", text):
        hint = "give top,left,height,width in pixels, like 0,0,64,64"
        raise UserError(f"--viewport {text} is no rectangle; {hint}")
    top, left, height, width = window = tuple(map(int, text.split(",")))
    if not (0 < height <= 65536 and 0 < width <= 65536 and count * height * width <= 2**26):
        found = f"--viewport {text} is {width} x {height} pixels of {count} images"
        raise UserError(f"{found}; give 1 to 65536 a side and at most {2**26} in all")
    for first, size, whole, closed, side in (
        (top, height, config.height, config.closed[0], "rows"),
        (left, width, config.width, config.closed[1], "columns"),
    ):
        if not closed and not 0 <= first <= first + size <= whole:
            found = f"--viewport {text} reaches {side} {first} to {first + size - 1}"
            raise UserError(f"{found}; the image has 0 to {whole - 1}, and its borders do not meet there")
    return window


def parse_seeds(text: str | None, count: int | None) -> list[int]:
    """ "0,1,4-6" -> [0, 1, 4, 5, 6]; a single seed goes on for `count` images; without a text 0 … count-1."""
    if (count or 0) > 10**6:
        raise UserError(f"--count {count} is out of range; give 1 to {10**6}")
    if text is None:
        return list(range(count or 16))
    if not re.fullmatch(r"\d{1,18}(-\d{1,18})?(,\d{1,18}(-\d{1,18})?)*", text):
        raise UserError(f"--seed {text} is no list of seeds; give one like 0,1,4-6")
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    lengths = [end[-1] - end[0] + 1 for end in ends]
    if min(lengths) < 1 or sum(lengths) > 10**6:
        why = "has a range that is empty, or over a million seeds"
        raise UserError(f"--seed {text} {why}; give ranges like 4-6")
    seeds = [seed for end in ends for seed in range(end[0], end[-1] + 1)]
    if count is not None and len(seeds) == 1:
        return list(range(seeds[0], seeds[0] + count))
    if count is not None and len(seeds) != count:
        raise UserError(f"--seed {text} lists {len(seeds)} seeds and --count is {count}; give one of them")
    return seeds


def picture_folder(path: Path) -> Path:
    """Where pictures of a checkpoint go by default: beside it, or to runs/ if it came with the program."""
    return Path("runs") if path.resolve().parent == ASSETS.resolve() else path.parent


def free_name(stem: Path) -> Path:
    """stem.png, or the first of stem-2.png, stem-3.png … that does not exist."""
    ends = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    names = (stem.with_name(f"{stem.name}{end}.png") for end in ends)
    return next(name for name in names if not name.exists())


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as UserError, so that they are one line like all others."""

    def error(self, message):
        if "expected one argument" in message:
            message += " (after = where it begins with a minus)"
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args=None, namespace=None):  # by which each command parses its own
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            raise UserError(f"{unknown[0]} is unknown{nearest(unknown[0], self._option_string_actions)}")
        return namespace, unknown


def nearest(word: str, words) -> str:
    close = difflib.get_close_matches(word, words, 1)
    return f", did you mean {close[0]}?" if close else ""


def run_command(parser: Parser, act, argv: list[str] | None, mistakes=UserError) -> int:
    """act(arguments); returns the exit status: what that does or 0, 2 for a mistake, or 128 + signal."""
    print_all_names()
    try:
        status = act(parser.parse_args(argv)) or 0
        sys.stdout.flush()
        return status
    except mistakes as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # in training, only outside of the steps, where there is nothing to save
        return 128 + signal.SIGINT
    except BrokenPipeError:  # nobody reads what is printed
        speak_to_nobody()
        return 128 + 13  # SIGPIPE, which Windows does not have


def positive(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on, of up to 18 digits")
    return int(text)


def build_parser() -> Parser:
    parser = Parser(prog="coco_gan.py", description="COCO-GAN: train on photographs and sample full images.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    train_parser = commands.add_parser("train", help="train a model", allow_abbrev=False)
    add = train_parser.add_argument
    add("--preset", metavar="NAME", help=f"{', '.join(PRESETS)} (default: by device and data)")
    text = "train on a cylinder: preset panorama, panorama-tiny on a CPU"
    add("--panorama", action="store_true", help=text)
    add("--run", metavar="DIR", help="folder of the run (default: the next free runs/<preset>-NNN)")
    add("--resume", nargs="?", const="", metavar="RUN", help="go on with a run (default: the newest)")
    add("--from", dest="source", metavar="RUN", help="post-train what a run has learned, with --extrapolate")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    text = "kernels of CBN, φ and ψ: auto, torch or triton (default: auto, triton on a GPU)"
    add("--impl", default="auto", help=text)
    add("--cache", default="cache", metavar="DIR", help="folder of the decoded images (default: cache)")
    add("--workers", type=positive, metavar="N", help="processes that decode (default: one per core)")
    add("--log-every", type=positive, default=100, metavar="N", help="steps between lines (default: 100)")
    text = "steps between pictures (default: 1000, of post-training 100)"
    add("--sample-every", type=positive, metavar="N", help=text)
    text = "steps between checkpoints (default: 1000)"
    add("--save-every", type=positive, default=1000, metavar="N", help=text)
    add("--keep", type=positive, default=2, metavar="K", help="newest checkpoints to keep (default: 2)")
    text = f"steps between measurements of the distance to real images (default: {EVAL_EVERY})"
    add("--eval-every", type=positive, metavar="N", help=text)
    text = "images that are compared then (default: 2048, of large ones fewer)"
    add("--eval-count", type=positive, default=2048, metavar="M", help=text)
    text = "on a GPU, run a step as one CUDA graph (default: --no-graph)"
    add("--graph", action=argparse.BooleanOptionalAction, default=False, help=text)
    add("--dry-run", action="store_true", help="print the configuration, layers and memory, and end")
    text = "configuration: the defaults are the paper's where it gives one; presets change some"
    add = train_parser.add_argument_group(text).add_argument
    for field in dataclasses.fields(Config):
        options = dict(action=argparse.BooleanOptionalAction)
        if field.type != "bool":
            options = dict(type={"int": int, "float": float, "str": str}[field.type], metavar=field.type)
        text = f"{field.metadata['help']} (default: {field.default})"
        add(flag(field.name), dest=field.name, default=argparse.SUPPRESS, help=text, **options)

    sample_parser = commands.add_parser("sample", help="draw from a trained model", allow_abbrev=False)
    add = sample_parser.add_argument
    add("--checkpoint", metavar="FILE|RUN", help="what to sample from (default: the newest under runs/)")
    text = "take the newest checkpoint of a cylinder, and draw one image"
    add("--panorama", action="store_true", help=text)
    add("--count", type=positive, metavar="N", help="how many images, from the one --seed on (default: 16)")
    add("--seed", metavar="LIST", help="which images, like 0,1,4-6 (default: from 0 on)")
    text = "a picture, or a folder for one picture a seed (default: in the run)"
    add("--out", metavar="FILE|DIR", help=text)
    add("--patches", action="store_true", help="also draw macro and micro patches, as figure 3 does")
    text = "repeat images whose borders meet (default: 1)"
    add("--turns", type=positive, default=1, metavar="N", help=text)
    text = "also draw so many micro patches beyond the borders, of the image framed in red; 1,0: only down"
    add("--extrapolate", default="0", metavar="N", help=text)
    text = "generate only this part of the images, in pixels"
    add("--viewport", metavar="TOP,LEFT,HEIGHT,WIDTH", help=text)
    add("--raw", action="store_true", help="use G's weights themselves, not their running average")
    add("--force", action="store_true", help="replace what --out names if it exists")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps (default: auto)")
    text = "kernels of CBN, φ and ψ: auto, torch or triton (default: auto, triton on a GPU)"
    add("--impl", default="auto", help=text)
    add("--batch-size", type=positive, metavar="B", help="micro patches at a time (default: by their size)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status, see `run_command`."""

    def act(args: argparse.Namespace) -> int:
        with joined(args.device):
            return train(args) if args.command == "train" else sample(args)

    return run_command(build_parser(), act, argv)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    leave(status)
