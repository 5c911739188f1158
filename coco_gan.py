"""COCO-GAN: generation by parts via conditional coordinating, in one file that reads from top to bottom.

    python coco_gan.py train                      # toy faces that data.py draws, minutes on a CPU
    python coco_gan.py train --data ./celeba      # a folder or a zip of photographs
    python coco_gan.py train --panorama           # on a cylinder
    python coco_gan.py sample [--panorama]        # full images from the newest checkpoint under runs/
    torchrun --nproc-per-node=8 -- coco_gan.py train --data ./celeba --batch-size 512

G makes a micro patch from a latent vector z and the patch's coordinate c''. N x M neighbouring micro patches
form a macro patch s'. D sees macro patches only: generated ones, and crops x' of real images. Full images
exist only in sampling.

Source: Lin et al., "COCO-GAN: Generation by Parts via Conditional Coordinating", ICCV 2019. Sections,
equations, figures, tables and appendices named below are that paper's. Rows always come first: (y, x).

    z            latent vector, uniform on [-1, 1], one for all patches of an image
    c_micro      c'', coordinate of a micro patch: (y, x) on the plane; x becomes an angle, (cos θ, sin θ), on
                 a cylinder, and so do both on a torus
    c_macro      c', coordinate of a macro patch, likewise
    C_micro      C'', all c'' of the macro patches of a batch, B·N·M of them; S'' all s''
    s_micro      s'' = G(z, c''), a generated micro patch of S x S pixels
    s_macro      s' = φ(S''), a generated macro patch of N x M micro patches
    x_macro      x' = ψ(x, c'), a real macro patch, cut out of a real image x
    φ, ψ         merge_patches and crop_patches in kernels.py, where conditional batch norm (CBN) is, too
    R, K         rows and columns of micro patches in a full image
    A, Q         heads of D that predict c' and, with --guided, z
    B            macro patches in a batch, or in the share of one of several processes; micro patch
                 b·N·M + n·M + m is in row n and column m of sample b
    *_sn         the parameters of a network after spectral normalization, W/σ
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import difflib
import functools
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.func import functional_call

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if __package__:  # copied into a package
    from . import data, kernels
    from .data import CROPS, UserError, load_images, make_folder, release_pages, write_file
    from .kernels import ConditionalBatchNorm, avg_pool, capture, crop_patches, merge_patches, relu
else:
    import data
    import kernels
    from data import CROPS, UserError, load_images, make_folder, release_pages, write_file
    from kernels import ConditionalBatchNorm, avg_pool, capture, crop_patches, merge_patches, relu

# ---- Configuration (section 3.1, appendix C): each field is a flag of `train`, and is in every checkpoint --

__version__ = "1.0.0"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def option(default, allowed, text):
    """A field of a configuration. allowed: the lowest and highest number, the names, or None for any."""
    return dataclasses.field(default=default, metadata={"allowed": allowed, "help": text})


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_fields(config) -> None:
    """Raises: UserError, which names the flag, for a field of another type or with a value not allowed."""
    for field in dataclasses.fields(config):
        value, allowed = getattr(config, field.name), field.metadata["allowed"]
        if type(value).__name__ != field.type:  # a string, by the first import of this file
            raise UserError(f"{flag(field.name)} is {value!r}; it must be of type {field.type}")
        if field.type == "str" and allowed and value not in allowed:
            raise UserError(f"{flag(field.name)} {value} is unknown; give {', '.join(allowed)}")
        if field.type in ("int", "float") and not allowed[0] <= value <= allowed[1]:  # also refuses NaN
            raise UserError(f"{flag(field.name)} {value} is out of range; give {allowed[0]} to {allowed[1]}")
    if config.batch_size % WORLD or config.batch_size < 2 * WORLD:
        hint = f"give a multiple of {WORLD}, at least {2 * WORLD}"
        raise UserError(f"--batch-size {config.batch_size} does not divide among {WORLD} processes; {hint}")


# Whether the upper and lower, and the left and right border of an image meet. Where they do, coordinates are
# angles and patches wrap around.
TOPOLOGIES = {"plane": (False, False), "cylinder": (False, True), "torus": (True, True)}
PRECISIONS = ("auto", "fp32", "tf32", "bf16")


@dataclass(frozen=True)
class Config:
    height: int = option(64, (1, 16384), "height of a full image in pixels")
    width: int = option(64, (1, 65536), "width of a full image in pixels")
    N: int = option(2, (1, 256), "rows of micro patches in a macro patch")
    M: int = option(2, (1, 256), "columns of micro patches in a macro patch")
    S: int = option(16, (1, 4096), "side of a micro patch in pixels")
    topology: str = option("plane", TOPOLOGIES, "which borders of an image meet")
    z_dim: int = option(128, (1, 4096), "size of the latent vector")
    width_g: int = option(64, (1, 1024), "base channels of G; its layers have 16, 8, 4, 2, 1, … times")
    width_d: int = option(64, (1, 1024), "base channels of D; its last layers have 1, 2, 4, 8, 8 times")
    lambda_gp: float = option(10.0, (0, 1e6), "weight λ of the gradient penalty L_GP")
    alpha_s: float = option(100.0, (0, 1e6), "weight α of the spatial consistency loss L_S")
    guided: bool = option(False, None, "train the head Q too, to generate from a patch of a photograph")
    alpha_q: float = option(100.0, (0, 1e6), "weight of the content consistency loss L_Q, with --guided")
    weights: str = option(
        "plain", ("plain", "scaled"), "of the losses: as given, or as the authors' code scales them"
    )
    lr_g: float = option(1e-4, (0, 1), "learning rate of G and Q")
    lr_d: float = option(4e-4, (0, 1), "learning rate of D and A")
    beta1: float = option(0.0, (0, 0.9999), "Adam's β1")
    beta2: float = option(0.999, (0, 0.999999), "Adam's β2")
    batch_size: int = option(128, (2, 65536), "macro patches per step, of all processes together")
    steps: int = option(200_000, (1, 10**9), "training steps, each of D and of G")
    ema: float = option(0.999, (0, 0.999999), "decay of the moving average of G's weights; 0: none")
    precision: str = option("auto", PRECISIONS, "of the layers of G and D")
    seed: int = option(0, (0, 2**63 - 1), "seed of the weights, the batches, the latents and CelebA-syn")
    data: str = option("toy:faces", None, "folder or zip of images, toy:faces or toy:landscapes")
    crop: str = option("auto", CROPS, "what is cut out; squash: nothing, the image is resized")
    continuous: bool = option(False, None, "macro patches at any pixel (the paper's section 3.7)")
    mirror: bool = option(False, None, "mirror half of the real images")
    yaw: bool = option(False, None, "turn each real image by a random angle where its borders meet")
    holdout: int = option(0, (0, 10**9), "images kept out of training, for evaluation")

    @property
    def R(self) -> int:
        return self.height // self.S

    @property
    def K(self) -> int:
        return self.width // self.S

    @property
    def closed(self) -> tuple[bool, bool]:
        """Whether the image continues below its bottom at its top, and beyond its right at its left."""
        return TOPOLOGIES[self.topology]

    @property
    def positions(self) -> tuple[int, int]:
        """In how many rows and columns a macro patch can start: in all where it wraps around the border."""
        down, across = self.closed
        return self.R if down else self.R - self.N + 1, self.K if across else self.K - self.M + 1

    @property
    def c_dim(self) -> int:
        return 2 + sum(self.closed)  # an angle takes two values, cos θ and sin θ

    @property
    def loss_weights(self) -> tuple[float, float, float]:
        """λ, α and the weight of L_Q as they multiply the losses.

        The paper's results come from its authors' code, whose penalty asks for a slope of 1 in each column
        and channel by itself. ‖∇D‖ of such a D is k = √(columns · channels). Divided by k it has a slope of
        1, as in equation 3, with λ and α divided by k, too. L_S there is the mean over the values of c', not
        their sum. --weights scaled selects these weights (docs/paper.md).
        """
        if self.weights == "plain":
            return self.lambda_gp, self.alpha_s, self.alpha_q
        k = math.sqrt(3 * self.M * self.S)
        return self.lambda_gp / k, self.alpha_s / (k * self.c_dim), self.alpha_q / k

    def check(self) -> Config:
        """Return the configuration if it makes a model. Raises: UserError, which names the flag, if not."""
        check_fields(self)
        if self.height % self.S or self.width % self.S:
            sizes = f"--height {self.height} and --width {self.width} (--image-size)"
            raise UserError(f"{sizes} must be multiples of --S {self.S}, the side of a micro patch")
        if self.N > self.R or self.M > self.K:
            fits = f"an image has {self.R} x {self.K} micro patches"
            raise UserError(f"--N {self.N} and --M {self.M} do not fit: {fits}; try a smaller --S")
        if self.yaw and not any(self.closed):
            raise UserError("--yaw turns images whose borders meet; add --topology cylinder or torus")
        return self


# The presets for CPUs are ours. The others have sizes and batches of the paper or its authors' code; steps
# for 150 epochs of CelebA without 50,000 images (table 2), or a million steps of LSUN (appendix E). Panoramas
# are turned, as in that code: the photographs are not aligned.
CPU = dict(width_g=8, width_d=8, batch_size=16, lambda_gp=1.0, alpha_s=1.0, alpha_q=10.0)
CPU |= dict(lr_g=1e-3, lr_d=2e-3, beta2=0.9)
SCALED = dict(weights="scaled")
PANORAMA = dict(topology="cylinder", data="toy:landscapes")
PRESETS = {
    "tiny": dict(height=32, width=32, S=8, steps=4_000, **CPU),
    "small": dict(steps=7_500, **CPU),
    "panorama-tiny": dict(height=32, width=96, steps=8_000, **PANORAMA, **CPU),
    "celeba64": dict(batch_size=64, steps=350_000, **SCALED),
    "celeba128": dict(height=128, width=128, S=32, steps=180_000, **SCALED),
    "celeba128-n4": dict(height=128, width=128, N=4, M=4, S=16, steps=180_000, **SCALED),
    "celeba128-n8": dict(height=128, width=128, N=8, M=8, S=8, steps=180_000, **SCALED),
    "celeba128-n16": dict(height=128, width=128, N=16, M=16, S=4, batch_size=64, steps=350_000, **SCALED),
    "lsun64": dict(steps=1_000_000, **SCALED),
    "lsun256": dict(height=256, width=256, S=64, steps=1_000_000, **SCALED),
    "celebahq1024": dict(height=1024, width=1024, S=256, batch_size=20, steps=500_000, **SCALED),
    "panorama": dict(height=256, width=768, S=64, yaw=True, **SCALED, **PANORAMA),
}


# ---- Devices, and processes that torchrun starts: each has a share of a batch, and the first one writes ----


def choose_device(name: str, impl: str = "auto") -> torch.device:
    """The device of --device, with the kernels of --impl. Raises: UserError for one that is not available."""
    kernels.DEFAULT = impl
    torch.backends.cudnn.allow_tf32 = False  # its rounding depends on how many patches are made together
    auto = name == "auto"
    if auto:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "cpu" and torch.version.cuda:  # a PyTorch that was made for GPUs
            print("PyTorch finds no GPU that it can use; the CPU does the work")
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        one = torch.ones(1, device=name)
        one.item()  # fails on a GPU that this PyTorch does not support
    except (RuntimeError, AssertionError) as error:
        if auto:
            print(f"{name} cannot be used ({str(error).splitlines()[0]}); the CPU does the work")
            return torch.device("cpu")
        hint = "give auto, cpu, cuda, cuda:1 (the second GPU) or mps"
        raise UserError(f"--device {name} is not available; {hint}") from error
    if one.is_cuda:
        torch.cuda.set_device(one.device)
    return one.device


def choose_precision(config: Config, device: torch.device) -> str:
    """What --precision auto means here: bf16 where the hardware has it, else tf32 on a GPU, else fp32."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "tf32"
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return "bf16" if device.type == "cpu" and has_bf16 and has_bf16() else "fp32"


def cast(gan: nn.Module, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters, those of convolutions in bfloat16 if that is the precision of gan.

    A network computes with what functional_call(net, parameters, inputs) gives it: its convolutions in their
    type, and its linear layers, which read latents and coordinates, in float32.
    """
    if choose_precision(gan.config, gan.device) != "bf16":
        return parameters
    layers = {name.rpartition(".")[0] for name, p in parameters.items() if p.dim() == 4}
    given = {name: p for name, p in parameters.items() if name.rpartition(".")[0] in layers}
    return parameters | dict(zip(given, kernels.cast_tensors(torch.bfloat16, *given.values())))


def make_adam(groups: list[dict], config: Config, device: torch.device) -> torch.optim.Adam:
    """Adam, for groups of parameters with a learning rate each. Its moments are made here and not in its
    first step, so that `resume` can copy into them."""
    betas, on_gpu = (config.beta1, config.beta2), device.type == "cuda"
    optimizer = torch.optim.Adam(groups, betas=betas, fused=True, capturable=on_gpu)
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        moments = dict(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        optimizer.state[p] = dict(step=torch.zeros((), device=device), **moments)
    return optimizer


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step down the loss, with the mean of the gradients of all processes."""
    optimizer.zero_grad()
    loss.backward()
    if WORLD > 1:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        means = (flat / WORLD).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [mean.view(g.shape) for mean, g in zip(means, gradients)])
    optimizer.step()


def highest(number: int) -> int:
    """The highest of the numbers that the processes give. Each waits for all."""
    if WORLD > 1:
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        number = int(tensor)
    return number


# ---- Coordinates (section 2, "Spatial coordinate system"; section 3.4; appendix C, "Coordinate Setup") -----


def coordinate(i: torch.Tensor, count: int, closed: bool) -> torch.Tensor:
    """One axis of a coordinate, of positions 0 … count-1: (…) -> (…, 1), or (…, 2) if the axis is closed.

    Open: evenly spaced on [-1, 1], both ends included; 0 if there is one position only. Positions may be
    fractions or lie outside, and then their coordinates do, too.
    Closed: cos θ and sin θ of angles evenly spaced on [-π, π), so that position `count` is position 0 again.
    """
    if closed:
        theta = math.pi * (2 * (i % count) / count - 1)
        return torch.stack([torch.cos(theta), torch.sin(theta)], -1)
    return (-1 + 2 * i / (count - 1) if count > 1 else 0.0 * i).unsqueeze(-1)


def micro_coordinates(config: Config, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """c'' of the micro patches in rows i (0 … R-1) and columns j (0 … K-1): (…), (…) -> (…, c_dim)."""
    down, across = config.closed
    return torch.cat([coordinate(i, config.R, down), coordinate(j, config.K, across)], -1)


def macro_coordinates(config: Config, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """c' of the macro patches that start at micro patch (i, j): (…), (…) -> (…, c_dim)."""
    (rows, columns), (down, across) = config.positions, config.closed
    return torch.cat([coordinate(i, rows, down), coordinate(j, columns, across)], -1)


def micro_matrix(config: Config, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """C'', the coordinates of the micro patches in each macro patch (i, j): (B,), (B,) -> (B·N·M, c_dim)."""
    n, m = torch.meshgrid(torch.arange(config.N), torch.arange(config.M), indexing="ij")
    rows = i.view(-1, 1) + n.flatten()  # (B, N·M)
    columns = j.view(-1, 1) + m.flatten()
    return micro_coordinates(config, rows, columns).flatten(0, 1)


# ---- Networks (appendix C, figures 13 and 14). Convolutions are 3 x 3, those of the shortcuts 1 x 1. -------

LAYOUT = torch.channels_last  # memory format of images, features and weights: faster than contiguous


def init_weights(net: nn.Module) -> None:
    """Glorot-uniform weights and zero biases (the paper does not say), and a buffer v for `spectral_norm`."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            module.register_buffer("v", F.normalize(torch.randn(module.weight[0].numel()), dim=0))
    net.to(memory_format=LAYOUT)


def spectral_norm(net: nn.Module, iterate: bool) -> dict[str, torch.Tensor]:
    """The parameters of net, with each weight W of a convolution or linear layer divided by σ(W).

    σ(W), the largest singular value, is estimated as ‖W v‖. `iterate` first updates v, in place, by one power
    iteration. The network is applied by functional_call(net, parameters, inputs), as often as needed in a
    step, so that a step takes one iteration.
    Source: Miyato et al., "Spectral Normalization for GANs", ICLR 2018, algorithm 1; on G and D, appendix C.
    """
    layers = {f"{name}.weight": layer for name, layer in net.named_modules() if hasattr(layer, "v")}
    weights, v = [layer.weight for layer in layers.values()], [layer.v for layer in layers.values()]
    W = [weight.flatten(1) for weight in weights]  # (out, in), and v (in,)
    if iterate:
        with torch.no_grad():
            u = [W_ @ v_ for W_, v_ in zip(W, v)]
            new = [W_.T @ u_ for W_, u_ in zip(W, u)]
            torch._foreach_copy_(v, torch._foreach_div(new, torch._foreach_norm(new)))
    return dict(net.named_parameters()) | dict(zip(layers, kernels.normalize(v, *weights)))


@torch.no_grad()
def fold_spectral_norm(net: nn.Module) -> nn.Module:
    """Replace W by W/σ, so that the network can be called as it is."""
    for name, p in spectral_norm(net, iterate=False).items():
        net.get_parameter(name).copy_(p)
    return net


class GeneratorBlock(nn.Module):
    """ReLU, ×2, conv, CBN, ReLU, conv, plus the shortcut ×2, 1 x 1 conv (figure 13b)."""

    def __init__(self, c_in: int, c_out: int, condition: int, upscale: bool):
        super().__init__()
        self.upscale = upscale
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.cbn = ConditionalBatchNorm(c_out, condition)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1)

    def up(self, x):
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.upscale else x

    def forward(self, x, condition):  # (B, c_in, h, w) -> (B, c_out, 2h, 2w), or h, w without upscale
        h = self.conv1(self.up(F.relu(x)))
        h = self.conv2(self.cbn(h, condition, relu=True))
        return h + self.up(self.shortcut(x))  # a 1 x 1 conv commutes with ×2, and is cheaper before it


class Generator(nn.Module):
    """G(z, c''): one micro patch from a latent vector and the patch's coordinate (figure 13a).

    Larger patches repeat the last block, and smaller ones leave it out. Sides that halve fewer than three
    times keep three blocks, the last of which do not upscale (appendix C, for 8 and 4 pixels).
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
        init_weights(self)

    def forward(self, z, c_micro, tanh=True):  # (B, z_dim), (B, c_dim) -> (B, 3, S, S) in [-1, 1]
        condition = torch.cat([z, c_micro], dim=1)
        x = self.linear(condition).view(-1, *self.start)
        x = x.to(self.conv.weight.dtype, memory_format=LAYOUT)
        for block in self.blocks:
            x = block(x, condition)
        x = self.conv(F.relu(self.norm(x)))
        return torch.tanh(x.float()) if tanh else x  # in training merge_patches applies it


class DiscriminatorBlock(nn.Module):
    """ReLU (not in the first), conv, ReLU, conv, pool, plus the shortcut pool, 1 x 1 conv (figure 14b)."""

    def __init__(self, c_in: int, c_out: int, first: bool, pool: bool):
        super().__init__()
        self.first, self.pool = first, pool
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):  # (B, c_in, h, w) -> (B, c_out, h/2, w/2), odd sides rounded up
        h = self.conv2(relu(self.conv1(x if self.first else relu(x))))
        if self.pool:
            h, x = avg_pool(h), avg_pool(x)
        return h + self.shortcut(x)


class Discriminator(nn.Module):
    """D(x', c'): the score of a macro patch, and its last feature h, which the heads read (figure 14a).

    Larger macro patches repeat the first block, and smaller ones leave it out, so that the last feature map
    has 4 to 7 pixels on its shorter side.
    """

    def __init__(self, config: Config):
        super().__init__()
        side, pools = min(config.N, config.M) * config.S, 0
        while side >= 8:
            side, pools = (side + 1) // 2, pools + 1
        last = 8 * config.width_d  # the channels are 3 and the last ones of width_d times …, 1, 2, 4, 8, 8
        channels = [3, *(max(last >> b, config.width_d) for b in reversed(range(pools))), last]
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(channels[b], channels[b + 1], first=b == 0, pool=b < pools)
            for b in range(pools + 1)
        )
        self.linear = nn.Linear(last, 1)
        self.projection = nn.Linear(config.c_dim, last)
        init_weights(self)

    def forward(self, x, c_macro):  # (B, 3, N·S, M·S), (B, c_dim) -> (B,), (B, 8 · width_d)
        x = x.to(self.blocks[0].conv1.weight.dtype)
        for block in self.blocks:
            x = block(x)
        # Deviation: the paper says "global pooling"; this is the sum, as in the projection discriminator. The
        # score is ⟨linear, h⟩ + ⟨projection(c'), h⟩, in float32, for scores differ by little.
        h = relu(x).float().sum(dim=(2, 3))
        return (h * (self.linear.weight + self.projection(c_macro))).sum(dim=1) + self.linear.bias, h


class Head(nn.Module):
    """A predicts the coordinate and Q the latent vector, from D's last feature (figure 14c)."""

    def __init__(self, features: int, outputs: int):
        super().__init__()
        self.linear1 = nn.Linear(features, 128)
        self.norm = nn.BatchNorm1d(128)
        self.linear2 = nn.Linear(128, outputs)
        init_weights(self)

    def forward(self, h):  # (B, features) -> (B, outputs) in [-1, 1]
        return torch.tanh(self.linear2(F.leaky_relu(self.norm(self.linear1(h)), 0.2)))


# ---- Losses (section 2, equations 1 to 4) ------------------------------------------------------------------
# D and A minimise -L_W + λ L_GP + α L_S(x'), G minimises L_W + α L_S(s'). Equation 1 prints L_W with the
# opposite signs, with which D would learn to prefer s'. With --guided, D, Q and G add alpha_q L_Q(s').


def wasserstein(score_real: torch.Tensor, score_generated: torch.Tensor) -> torch.Tensor:
    """L_W = E[D(x')] - E[D(s')] (equation 2)."""
    return score_real.mean() - score_generated.mean()


def gradient_penalty(critic, x_macro, s_macro, epsilon) -> tuple[torch.Tensor, torch.Tensor]:
    """L_GP = E[(‖∇D(ŝ')‖₂ - 1)²], ŝ' = ε s' + (1-ε) x' (equation 3), the norm over all pixels of a sample.

    Args: critic maps (B, 3, h, w) to (B,); x_macro, s_macro (B, 3, h, w), detached; epsilon (B,) in [0, 1].
    Returns: L_GP and the mean of the norms.
    """
    epsilon = epsilon.view(-1, 1, 1, 1)
    s_hat = (epsilon * s_macro + (1 - epsilon) * x_macro).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(s_hat).sum(), s_hat, create_graph=True)
    norm = gradient.flatten(1).norm(dim=1)
    return (norm - 1).square().mean(), norm.mean()


def spatial_consistency(c_macro: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """L_S = E[‖c' - A(·)‖²] (equation 4). Deviation: squared, for the text calls it an L2 loss."""
    return (c_macro - prediction).square().sum(dim=1).mean()


def content_consistency(z: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """L_Q = E[‖z - Q(s')‖₁] / z_dim (appendix B, "Content consistency loss").

    Deviation: the paper sums over z and gives no weight; its authors' code has this mean and a weight of 100.
    """
    return (z - prediction).abs().mean()


# ---- Batches (appendix C, "Coordinate Setup") --------------------------------------------------------------


def sample_latents(count: int, z_dim: int, rng: torch.Generator) -> torch.Tensor:
    """z, uniform on [-1, 1]: (count, z_dim)."""
    return 2 * torch.rand(count, z_dim, generator=rng) - 1


def sample_positions(config: Config, rng: torch.Generator, margin: tuple[int, int] = (0, 0)):
    """Where the B macro patches of a batch start: top and left, (B,) int64, in pixels.

    Uniform over the discrete positions, or with `continuous` over all pixels. Deviation: section 3.7 has real
    numbers, at which x' could not be cut. margin: how many micro patches beyond the borders they may reach,
    in post-training (experiments/extrapolate.py).
    """
    S, unit, starts = config.S, 1 if config.continuous else config.S, []
    for count, closed, extra in zip(config.positions, config.closed, margin):
        last = count * S - unit if closed else (count - 1) * S
        low, high = -extra * S // unit, (last + extra * S) // unit
        starts.append(unit * torch.randint(low, high + 1, (config.batch_size,), generator=rng))
    return starts


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to a GPU without waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def draw_batch(config: Config, images, indices, rng, device) -> list[torch.Tensor]:
    """Draw images, positions and latents, uniformly. On the CPU: a seed means the same batches on any device.

    Args: images (n, height, width, 3) uint8 on any device; indices (k,) int64 of those that may be drawn.
    Returns: x' (B, 3, N·S, M·S) in [-1, 1], c' (B, c_dim), C'' (B·N·M, c_dim), z (B, z_dim), ε (B,), on the
    device; with several processes, the share of this one.
    """
    B, S, h, w = config.batch_size, config.S, config.N * config.S, config.M * config.S
    index = indices[torch.randint(len(indices), (B,), generator=rng)]
    top, left = sample_positions(config, rng)
    i, j = top / S, left / S  # in micro patches
    z = sample_latents(B, config.z_dim, rng)
    epsilon = torch.rand(B, generator=rng)
    mirror = torch.rand(B, generator=rng) < 0.5 * config.mirror
    left = torch.where(mirror, config.width - w - left, left)  # cut where its mirror image is, for (i, j)
    if config.yaw:
        down, across = config.closed
        top = top + torch.randint(config.height, (B,), generator=rng) * down
        left = left + torch.randint(config.width, (B,), generator=rng) * across

    # Every process draws the whole batch, from the same random numbers, and keeps its own share.
    index, top, left, mirror, i, j, z, epsilon = (
        t.chunk(WORLD)[RANK] for t in (index, top, left, mirror, i, j, z, epsilon)
    )
    if images.device != device:  # where they are too many for a GPU: copied as bytes, converted there
        images = to_device(kernels.cut_bytes(images, index, top, left, h, w), device)
        index, top, left = torch.arange(len(index)), 0 * top, 0 * left
    crop = (to_device(t, images.device) for t in (index, top, left))
    x_macro = crop_patches(images, *crop, h, w, mirror=to_device(mirror, images.device))
    x_macro = x_macro.contiguous(memory_format=LAYOUT)
    batch = x_macro, macro_coordinates(config, i, j), micro_matrix(config, i, j), z, epsilon
    return [to_device(t, device) for t in batch]


# ---- Training step (section 2; appendix C, "Hyperparameters") ----------------------------------------------


class COCOGAN(nn.Module):
    """All that training changes: networks, optimizers, random numbers and the count of steps.

    Checkpoints and the training loop below serve other systems, too: classes with all that this one has.
    """

    Config = Config
    FORMAT = "coco-gan checkpoint 2"
    LOSSES = "L_W", "L_GP", "gradient_norm", "L_S_real", "L_S_generated", "L_Q"  # the last with --guided
    LINE = "W {L_W:.2f}  GP {L_GP:.2f}  S {L_S_real:.2f}/{L_S_generated:.2f}"  # of the log
    LEGEND = "W, GP and S: the losses L_W, L_GP, and L_S of real/generated macro patches"
    COMMAND = "coco_gan.py"

    def __init__(self, config: Config, device: torch.device):
        super().__init__()
        torch.manual_seed(config.seed)
        self.config, self.device, self.step = config, device, 0
        self.rng = torch.Generator().manual_seed(2**63 + config.seed)  # another stream than the weights'
        self.LINE += "  Q {L_Q:.2f}" * config.guided
        self.G, self.D = Generator(config), Discriminator(config)
        self.A = Head(self.D.linear.in_features, config.c_dim)
        self.Q = Head(self.D.linear.in_features, config.z_dim) if config.guided else None
        self.G_ema = fold_spectral_norm(copy.deepcopy(self.G)).requires_grad_(False).eval()
        self.to(device)
        # opt_D trains D and A at lr_d and Q at lr_g, all from D's loss; opt_G trains G alone.
        groups = [dict(params=[*self.D.parameters(), *self.A.parameters()], lr=config.lr_d)]
        if config.guided:
            groups.append(dict(params=[*self.Q.parameters()], lr=config.lr_g))
        self.opt_D = make_adam(groups, config, device)
        self.opt_G = make_adam([dict(params=[*self.G.parameters()], lr=config.lr_g)], config, device)


def ema_weight(config: Config, step: int) -> torch.Tensor:
    """How far the EMA moves in a step: 1 - decay. The decay grows to its full value over the first steps."""
    return torch.tensor(1 - min(config.ema, (1 + step) / (10 + step)))


def train_step(gan: COCOGAN, x_macro, c_macro, C_micro, z, epsilon, weight) -> torch.Tensor:
    """One step of D, then one of G, on the same generated macro patches.

    Args: a batch of `draw_batch`; weight: how far the EMA of G's weights moves, `ema_weight`.
    Returns: the LOSSES, (5,) or with --guided (6,), which on a GPU nobody has waited for.
    """
    config, G, D, A, Q, B = gan.config, gan.G, gan.D, gan.A, gan.Q, len(z)
    lambda_gp, alpha_s, alpha_q = config.loss_weights

    # s' = φ(G(z, C'')), all patches of a sample from one z. D learns from it detached, G through it.
    G_sn = spectral_norm(G, iterate=True)
    z_micro = z.repeat_interleave(config.N * config.M, dim=0)  # (B·N·M, z_dim)
    s_micro = functional_call(G, cast(gan, G_sn), (z_micro, C_micro), dict(tanh=False))
    s_macro = merge_patches(s_micro, config.N, config.M, tanh=True, dtype=torch.float32)
    s_macro = s_macro.contiguous(memory_format=LAYOUT)  # (B, 3, N·S, M·S)

    # D and A: minimise -L_W + λ L_GP + α L_S(x')
    D_sn, A_sn, Q_sn = (spectral_norm(net, iterate=True) if net else None for net in (D, A, Q))
    D_sn = cast(gan, D_sn)
    s_detached = s_macro.detach()
    both = torch.cat([x_macro, s_detached]), torch.cat([c_macro, c_macro])
    score, h = functional_call(D, D_sn, both)
    L_W = wasserstein(score[:B], score[B:])
    L_GP, norm = gradient_penalty(
        lambda x: functional_call(D, D_sn, (x, c_macro))[0], x_macro, s_detached, epsilon
    )
    L_S_real = spatial_consistency(c_macro, functional_call(A, A_sn, (h[:B],)))
    loss = -L_W + lambda_gp * L_GP + alpha_s * L_S_real
    if config.guided:
        loss = loss + alpha_q * content_consistency(z, functional_call(Q, Q_sn, (h[B:],)))
    update(gan.opt_D, loss)

    # EMA of the weights and running statistics that made s'. It comes before G's update, which changes what
    # G_sn shares with G: all but the normalized weights. Deviation: the paper samples from G itself.
    with torch.no_grad():
        now = G.state_dict() | G_sn
        averages = {name: t for name, t in gan.G_ema.state_dict().items() if t.is_floating_point()}
        ways = torch._foreach_sub([now[name] for name in averages], [*averages.values()])
        torch._foreach_add_(
            [*averages.values()], torch._foreach_mul(ways, weight)
        )  # weight · (now - average)

    # G: minimise L_W + α L_S(s') by way of the updated D, whose parameters are detached: they get no gradient
    nets = [spectral_norm(net, iterate=False) if net else {} for net in (D, A, Q)]
    D_sn, A_sn, Q_sn = ({name: p.detach() for name, p in parameters.items()} for parameters in nets)
    D_sn = cast(gan, D_sn)
    score, h = functional_call(D, D_sn, (s_macro, c_macro))
    L_S_generated = spatial_consistency(c_macro, functional_call(A, A_sn, (h,)))
    loss = -score.mean() + alpha_s * L_S_generated  # -E[D(s')] is the part of L_W that G can change
    losses = [L_W, L_GP, norm, L_S_real, L_S_generated]
    if config.guided:
        losses.append(content_consistency(z, functional_call(Q, Q_sn, (h,))))
        loss = loss + alpha_q * losses[-1]
    update(gan.opt_G, loss)
    return torch.stack([term.detach() for term in losses])


# ---- Sampling (section 2, "testing phase"; sections 3.3 and 3.4): full images exist only here --------------


def latents(seeds: Iterable[int], z_dim: int = 128) -> torch.Tensor:
    """One latent vector per seed, uniform on [-1, 1]: (len(seeds), z_dim), the same on every machine.

    Raises: UserError for a single number.
    """
    if isinstance(seeds, int):
        raise UserError(f"seeds is {seeds}; give a list of numbers, as [{seeds}] or range({seeds})")
    return torch.cat([sample_latents(1, z_dim, torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.inference_mode()
def micro_patches(G: Generator, z: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """s'' = G(z, c''): n micro patches in rows i and columns j, each with its own latent vector.

    Args: z (n, z_dim) in [-1, 1]; i, j (n,). G gets 2¹⁸ pixels at a time.
    Returns: (n, 3, S, S) float32 in [-1, 1], on the device of G.
    """
    device, at_once = next(G.parameters()).device, max(1, 2**18 // G.config.S**2)
    c_micro = micro_coordinates(G.config, i.cpu(), j.cpu())  # the same on every device
    parts = zip(z.split(at_once), c_micro.split(at_once))
    return torch.cat([G(some.to(device), c.to(device)) for some, c in parts])


def full_image(
    G: Generator, z: torch.Tensor, rows: range | None = None, columns: range | None = None
) -> torch.Tensor:
    """s = φ(G(z, C''_full)): full images, each from the R·K micro patches of its own latent vector.

    Args: z (B, z_dim) in [-1, 1], on any device; rows, columns: of the micro patches to make (default: 0 …
    R-1 and 0 … K-1). Those outside extrapolate; where borders meet, they wrap around.
    Returns: (B, 3, len(rows)·S, len(columns)·S) float32 in [-1, 1], on the device of G.
    Raises: UserError for another size of z.
    Source: section 2, "testing phase"; section 3.3 for extrapolation; section 3.4 for partial generation.
    """
    if z.dim() != 2 or z.shape[1] != G.config.z_dim:
        size = G.config.z_dim
        raise UserError(f"z is {tuple(z.shape)}; give (B, {size}), as of latents(seeds, {size})")
    rows, columns = rows or range(G.config.R), columns or range(G.config.K)
    i, j = torch.meshgrid(torch.tensor(rows), torch.tensor(columns), indexing="ij")
    i, j = i.flatten().repeat(len(z)), j.flatten().repeat(len(z))
    s_micro = micro_patches(G, z.repeat_interleave(len(rows) * len(columns), dim=0), i, j)
    return merge_patches(s_micro, len(rows), len(columns))


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, rounded."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def draw_images(G: Generator, z: torch.Tensor, *part: range) -> Iterator[np.ndarray]:
    """The `full_image` of each latent vector in z (B, z_dim), one by one and counted: (1, H, W, 3) uint8."""
    return data.counted((to_uint8(full_image(G, one, *part)) for one in z.split(1)), len(z), "images")


def pictures(G: Generator, seeds: Iterable[int], **part: range) -> list[Image.Image]:
    """The full images of seeds as Pillow's. part: rows and columns of `full_image`."""
    images = full_image(G, latents(seeds, G.config.z_dim), **part)
    return [Image.fromarray(image) for image in to_uint8(images)]


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Lay out images (B, H, W, 3) uint8 row by row on white, about as a square: one picture (h, w, 3)."""
    B, H, W, _ = images.shape
    if columns is None:
        columns = min(B, max(1, round(math.sqrt(B * H / W))))
        columns += B % columns > 0 and B % (columns + 1) == 0  # one more, if the last row is full then
    picture = np.full((-(-B // columns) * (H + gap) - gap, columns * (W + gap) - gap, 3), 255, np.uint8)
    for b, image in enumerate(images):
        top, left = b // columns * (H + gap), b % columns * (W + gap)
        picture[top : top + H, left : left + W] = image
    return picture


def enlarge(images: np.ndarray, zoom: int | None = None) -> np.ndarray:
    """Repeat the pixels of images (B, H, W, 3), by default until the shorter side has 128 at most."""
    zoom = zoom or max(1, 128 // min(images.shape[1:3]))
    return images.repeat(zoom, axis=1).repeat(zoom, axis=2)


def save_picture(picture: np.ndarray, path: Path) -> None:
    """Write a picture (h, w, 3) uint8 in the format that its name ends in. Raises: UserError for another."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(f"{path} is not the name of a picture; end it in .png, .jpg or .webp")
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format=kind)
    write_file(path, file.getvalue())


# ---- Checkpoints. A file appears under its name only when it is complete, so that a kill loses nothing. ----

ASSETS = Path(__file__).parent / "assets"


def named_tensors(gan: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of the networks and of Adam (attributes named opt_*) itself, not a copy, by its name."""
    found = dict(gan.state_dict())
    for name in (name for name in vars(gan) if name.startswith("opt_")):
        for i, moments in getattr(gan, name).state_dict()["state"].items():
            found |= {f"{name}.{i}.{key}": t for key, t in moments.items()}
    return found


def is_ema_only(tensors: dict[str, torch.Tensor]) -> bool:
    return all(name.startswith("G_ema.") for name in tensors)


def save_checkpoint(gan: nn.Module, path: Path, fingerprint: str) -> None:
    """Write a file with all that training changes, as named tensors, and the fingerprint of the images."""
    contents = dict(format=gan.FORMAT, config=dataclasses.asdict(gan.config), images=fingerprint)
    contents |= dict(step=gan.step, rng=gan.rng.get_state(), tensors=named_tensors(gan))
    file = io.BytesIO()
    torch.save(contents, file)
    write_file(path, file.getvalue())


def checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoint-*.pt"))


def is_panorama(run: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((run / "config.json").read_text())["topology"] == "cylinder"
    return False


def find_checkpoint(where: str | Path | None = None, panorama: bool = False, root: str = "runs") -> Path:
    """A checkpoint as given, the newest of a run folder, that of a name in assets/, such as toy_faces, or
    (None) the newest under root, else toy_faces.

    Args: panorama: whether only runs on a cylinder count. Raises: UserError.
    """
    if where is not None and not os.path.exists(where) and (ASSETS / f"{where}.pt").is_file():
        return ASSETS / f"{where}.pt"
    if where is None:
        runs = [run for run in Path(root).glob("*") if not panorama or is_panorama(run)]
        newest = [checkpoints(run)[-1] for run in runs if checkpoints(run)]
        shipped = ASSETS / ("toy_landscapes.pt" if panorama else "toy_faces.pt")
        shipped = shipped if root == "runs" else root
        where = max(newest, key=lambda path: path.stat().st_mtime, default=shipped)
    found = [Path(where)] if os.path.isfile(where) else checkpoints(Path(where))
    if not found:
        raise UserError(f"{where} is no checkpoint and no run folder with one; try one like {root}/tiny-001")
    return found[-1]


def read_checkpoint(path: Path, System: type = COCOGAN) -> tuple[Config, dict]:
    """The configuration and the contents of a checkpoint, on the CPU. It is data: no code in it runs.

    Args: System: COCOGAN, or a class like it. Raises: UserError unless all its tensors, or at least those of
    G_ema, are there in their shapes.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
        if contents["format"] != System.FORMAT:
            raise ValueError(f"its format is {contents['format']!r:.40} and must be {System.FORMAT!r}")
        config, found = System.Config(**contents["config"]).check(), contents["tensors"]
        with torch.device("meta"):  # without memory: a small file may have a large configuration
            expected = named_tensors(System(config, torch.device("meta")))
        for name, t in expected.items():
            needed = name.startswith("G_ema.") or not is_ema_only(found)
            if needed and (found[name].shape, found[name].dtype) != (t.shape, t.dtype):
                raise ValueError(f"{name} should be {t.dtype} {tuple(t.shape)}")
        if sum(t.nbytes for t in found.values()) > path.stat().st_size:
            raise ValueError("its tensors are larger than the file")
        torch.Generator().set_state(contents["rng"])
        if type(contents["step"]) is not int or type(contents["images"]) is not str:
            raise ValueError("its step or its images are of a wrong type")
    except OSError:
        raise
    except Exception as error:  # torch.load answers a damaged file with whatever its parsers meet first
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is no checkpoint that can be used: {why}; give another") from error
    return config, contents


def load(checkpoint: str | Path | None = None, device: str = "cpu", raw: bool = False) -> Generator:
    """The generator of a checkpoint, to sample from: see `find_checkpoint` and `full_image`.

    Args: device: as of --device; raw: G's weights themselves instead of their EMA.
    Returns: G in evaluation mode and float32; G.config has its sizes. Raises: UserError (a ValueError).
    """
    path = find_checkpoint(checkpoint)
    if checkpoint is None:
        print(f"loaded {path}", file=sys.stderr)
    if isinstance(device, str):
        device = choose_device(device)
    config, contents = read_checkpoint(path)
    G, prefix = Generator(config), "G." if raw else "G_ema."
    if raw and is_ema_only(contents["tensors"]):
        raise UserError(f"{path} has the moving average only; leave out --raw")
    G.load_state_dict({name: contents["tensors"][prefix + name] for name in G.state_dict()})
    if raw:
        fold_spectral_norm(G)
    return G.to(device).requires_grad_(False).eval()


# ---- The training loop -------------------------------------------------------------------------------------


def choose_preset(args: argparse.Namespace, device: torch.device) -> str:
    """--preset, or the default for these images on this device."""
    toys = getattr(args, "data", Config.data).startswith("toy:")
    on_gpu = "panorama" if args.panorama else "celeba64"
    on_cpu = "panorama-tiny" if args.panorama else "tiny" if toys else "small"
    return args.preset or (on_cpu if device.type == "cpu" else on_gpu)


def given_fields(args: argparse.Namespace, config_type: type) -> dict:
    """The fields of a configuration that are on the command line."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(config_type) if f.name in args}
    size = getattr(args, "image_size", None) or ()
    if size and {"height", "width"} & {*given}:
        raise UserError("--image-size gives --height and --width; leave out one or the others")
    return given | dict(zip(("height", "width"), size))


def load_stored(config: Config, cache: str) -> np.ndarray:
    """The images, (n, height, width, 3) uint8. The first process decodes them, and the others wait for it."""
    if RANK > 0:
        highest(0)  # wait until the first process has decoded them
    options = dict(crop=config.crop, seed=config.seed, cache=cache)
    stored = load_images(config.data, config.height, config.width, **options)
    if RANK == 0:
        highest(0)  # the others may go on
    if config.holdout >= len(stored):
        raise UserError(f"--holdout {config.holdout} leaves none of {len(stored)} images; give fewer")
    return stored


def fingerprint_of(stored: np.ndarray) -> str:
    """Tells one set of images from another: their shape and a checksum of 64 of them."""
    some = stored[np.linspace(0, len(stored) - 1, 64).astype(int)]
    return f"{'x'.join(map(str, stored.shape))}-{zlib.crc32(some.tobytes()):08x}"


def split(count: int, holdout: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the images to train on, and of those held out, which are spread evenly over all."""
    held_out = torch.linspace(0, count - 1, holdout, dtype=torch.float64).long()
    kept = torch.ones(count, dtype=torch.bool)
    kept[held_out] = False
    return kept.nonzero().squeeze(1), held_out


def lock_run(run: Path):
    """Keep other processes out of a run folder for as long as the returned file is open."""
    file = open(run / ".lock" if RANK == 0 else os.devnull, "w")
    if fcntl is not None and RANK == 0:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(f"--run {run} is in use by another process; wait for it, or name another folder")
        except OSError:
            pass  # a file system without locks
    return file


def resume(run: Path, given: dict, device: torch.device, load_images_of, System: type = COCOGAN):
    """The COCOGAN, or other System, of a run's newest checkpoint, and its images, load_images_of(config).

    Args: given: the fields on the command line, of which only steps and data may differ. Raises: UserError.
    """
    path = find_checkpoint(run)
    config, contents = read_checkpoint(path, System)
    for name, value in given.items():
        if name not in ("steps", "data") and value != getattr(config, name):
            was = f"{flag(name)} was {getattr(config, name)} in {path} and is now {value}"
            raise UserError(f"{was}; leave it out, or start a new run without --resume")
    config = dataclasses.replace(config, **given).check()
    if is_ema_only(contents["tensors"]):
        raise UserError(f"{path} has the moving average only, which cannot be trained; name another run")
    stored = load_images_of(config)
    if contents["images"] != (found := fingerprint_of(stored)):
        had, has = (fingerprint.split("x")[0] for fingerprint in (contents["images"], found))
        changed = f"had {had} images and has {has}" if had != has else "has other images"
        anew = f", or start anew with its weights: train --from {run} --data {config.data}"
        raise UserError(f"--data {config.data} {changed}; put them back{anew * (System is COCOGAN)}")
    gan = System(config, device)
    with torch.no_grad():
        for name, t in named_tensors(gan).items():
            t.copy_(contents["tensors"][name])
    gan.rng.set_state(contents["rng"])
    gan.step = contents["step"]
    return gan, stored


def copy_weights(gan: COCOGAN, tensors: dict[str, torch.Tensor]) -> None:
    """Copy the networks of a checkpoint, for --from. Raises: UserError if they are other networks."""
    for name, t in gan.state_dict().items():
        if name not in tensors or tensors[name].shape != t.shape:
            raise UserError(
                f"--from has no {name} of {tuple(t.shape)}; leave out flags that change the networks"
            )
        with torch.no_grad():
            t.copy_(tensors[name])


@contextlib.contextmanager
def stop_signals():
    """Collect the signals that end a program, so that it can save first. A second one ends it at once."""
    caught, numbers = [], {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    if threading.current_thread() is not threading.main_thread():
        numbers = ()  # Python allows handlers in the main thread only

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    heard = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def log(gan: nn.Module, losses: torch.Tensor, rate: float, run: Path, board) -> None:
    """One line on the screen, the same as JSON in log.jsonl, and in TensorBoard where it is installed."""
    config, means = gan.config, dict(zip(gan.LOSSES, losses.double().mean(dim=0).tolist()))
    entry = dict(step=gan.step, images=gan.step * config.batch_size)
    entry |= dict(images_per_second=rate * config.batch_size) | means
    if gan.device.type == "cuda":
        entry["peak_memory_mb"] = torch.cuda.max_memory_allocated(gan.device) // 2**20
    seconds = round((config.steps - gan.step) / rate)
    left = f"{seconds // 60}:{seconds % 60:02}" if seconds < 3600 else f"{seconds / 3600:.0f} h"
    line = f"step {gan.step:,}/{config.steps:,}  {100 * gan.step // config.steps}%"
    line += f"  {entry['images_per_second']:,.0f}/s  {left} left  " + gan.LINE.format_map(means)
    line = re.sub(r"\b0\.", ".", line)
    if len(line) > 79:
        line = line.replace(f"/{config.steps:,}", "")
    data.progress()
    print(line, flush=True)
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")
    if board is not None:
        for name, value in entry.items():
            board.add_scalar(name, value, gan.step)
        board.flush()


def show(gan: COCOGAN) -> np.ndarray:
    """Full images of the EMA of G, from 24 latent vectors that are always the same: one picture (h, w, 3)."""
    return grid(enlarge(to_uint8(full_image(gan.G_ema, latents(range(24), gan.config.z_dim)))))


def save_progress(run: Path) -> None:
    """progress.gif: at most 50 samples of a run, one after the other, with sides of 1,024 pixels at most."""
    paths, frames, file = sorted(run.glob("sample-*.png")), [], io.BytesIO()
    for path in paths[:: -(-len(paths) // 50)]:
        with Image.open(path) as frame:
            frame.thumbnail((1024, 1024))
            frames.append(frame.copy())
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=300)
    write_file(run / "progress.gif", file.getvalue())


def save_indicators(gan: nn.Module, run: Path) -> None:
    """indicators.png: the losses over the steps (figure 29), where matplotlib is installed."""
    with contextlib.suppress(ImportError, ValueError):  # or of a log with a line that a kill cut short
        from matplotlib.figure import Figure

        entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        names = [name for name in gan.LOSSES if name in entries[0]]
        figure, file = Figure(figsize=(3 * len(names), 3), dpi=150, layout="constrained"), io.BytesIO()
        for axes, name in zip(figure.subplots(1, len(names)), names):
            axes.plot([entry["step"] for entry in entries], [entry[name] for entry in entries], ".-")
            axes.set(title=name, xlabel="step")
        figure.savefig(file)
        write_file(run / "indicators.png", file.getvalue())


def train_loop(gan, stored, run, args, draw_batch, train_step, show) -> int:
    """Train until the steps are done or a signal comes; returns the exit status.

    Args: gan: what is trained, a COCOGAN, with its functions draw_batch, train_step and show; stored (n,
    height, width, 3) uint8; run: the folder of the run; args: the flags of `add_commands`.
    """
    config, device, fingerprint = gan.config, gan.device, fingerprint_of(stored)
    if gan.step >= config.steps:
        more = f"to go on: python {gan.COMMAND} train --resume {run} --steps {2 * gan.step}"
        print(f"{run} has done its {gan.step:,} steps; {more}")
        return 0
    indices, _ = split(len(stored), config.holdout)
    images, board = torch.from_numpy(stored), None
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # the shapes never change
        tf32 = choose_precision(config, device) == "tf32"
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        if stored.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            images = images.to(device)

    if RANK == 0:
        write_file(run / "config.json", (json.dumps(dataclasses.asdict(config), indent=1) + "\n").encode())
        if gan.step == 0:
            rng = torch.Generator().manual_seed(config.seed)  # the run's own stays as it is
            x_macro, *_ = draw_batch(config, images, indices, rng, device)
            save_picture(grid(enlarge(to_uint8(x_macro[:64]))), run / "real-macro.png")
            save_picture(grid(enlarge(stored[indices[:24].numpy()])), run / "real.png")
            save_picture(show(gan), run / "sample-000000000.png")
        with contextlib.suppress(ImportError):  # TensorBoard is optional
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(run), purge_step=gan.step + 1)
    parameters = sum(p.numel() for p in gan.parameters() if p.requires_grad)
    held_out = f", {config.holdout:,} held out" * (config.holdout > 0)
    print(f"{len(indices):,} images of {config.height} x {config.width}{held_out}, {parameters:,} parameters")
    todo = f"{config.steps - gan.step:,} steps to go, in {run}"
    print(f"{todo}; the log has images per second\n{gan.LEGEND}", flush=True)

    one_step = functools.partial(train_step, gan)
    one_step = capture(one_step) if args.graph else one_step
    intervals = args.log_every, args.sample_every, args.save_every
    losses, start_time, first_step, progress_time = [], time.monotonic(), gan.step, 0.0
    stopped, last = 0, False
    with stop_signals() as signals:
        while not last:
            batch = draw_batch(config, images, indices, gan.rng, device)
            losses.append(one_step(*batch, to_device(ema_weight(config, gan.step), device)))
            gan.step += 1
            release_pages(stored)
            stopped = highest(max(signals, default=0))  # the same for all processes
            last = stopped > 0 or gan.step == config.steps
            logging, drawing, saving = (last or gan.step % every == 0 for every in intervals)
            if RANK == 0 and (logging or drawing or saving):  # only here a GPU is waited for
                seen = torch.stack(losses).cpu()  # (steps since the last line, 5 or 6)
                if not all(t.isfinite().all() for t in (seen, *named_tensors(gan).values())):
                    hint = f"what {run} has saved is good; try lower --lr-g and --lr-d"
                    raise UserError(f"a loss or a weight is not finite at step {gan.step:,}; {hint}")
                if drawing:
                    picture = show(gan)
                    save_picture(picture, run / f"sample-{gan.step:09d}.png")
                    save_picture(picture, run / "latest.png")
                if saving:
                    save_checkpoint(gan, run / f"checkpoint-{gan.step:09d}.pt", fingerprint)
                    for old in checkpoints(run)[: -args.keep]:
                        old.unlink()
                if logging:
                    rate = (gan.step - first_step) / (time.monotonic() - start_time)
                    log(gan, seen, rate, run, board)
            if logging:
                losses.clear()
            elif RANK == 0 and time.monotonic() > progress_time + 0.2:
                progress_time = time.monotonic()
                data.progress(f"step {gan.step:,}/{config.steps:,}")
    if stopped and gan.step < config.steps:
        print(f"stopped and saved step {gan.step:,}\ngo on with: python {gan.COMMAND} train --resume {run}")
        return 128 + stopped
    if RANK == 0:
        save_progress(run)
        save_indicators(gan, run)
    print(f"done: {run}/latest.png\nfor more: python {gan.COMMAND} sample --checkpoint {run}")
    return 0


def start(args: argparse.Namespace) -> torch.device:
    """The device to train on; joins the processes that torchrun started."""
    device = choose_device(args.device, args.impl)
    if WORLD > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))  # decoding may take hours
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    if args.graph and (device.type != "cuda" or WORLD > 1):
        raise UserError("--graph is for a single process on a GPU; leave it out")
    if args.resume is not None and (args.preset or args.run):
        raise UserError("--resume keeps the run's preset and folder; leave out --preset and --run")
    return device


def new_run(name: str | None, default: str) -> Path:
    """Make the folder of a run: name, or the next free runs/<default>-NNN. Raises: UserError if it exists."""
    names = (f"runs/{default}-{number:03d}" for number in itertools.count(1))
    run = Path(name or next(name for name in names if not os.path.exists(name)))
    if RANK == 0:
        if run.exists():
            raise UserError(f"--run {run} exists; name a new folder, or continue it with --resume {run}")
        make_folder(run)
    return run


def train(args: argparse.Namespace) -> int:
    """`train`: from images to checkpoints, pictures and a log in a run folder; returns the exit status."""
    device, given = start(args), given_fields(args, Config)
    if args.source is not None and (args.preset or args.resume is not None):
        raise UserError("--from starts a new run like the one it names; leave out --preset and --resume")
    if args.resume is None:
        if args.source is None:
            name, tensors = choose_preset(args, device), {}
            print(f"preset {name}" + f", the default for these images on {device}" * (not args.preset))
            config = Config(**PRESETS[name] | given)
        else:
            path = find_checkpoint(args.source, args.panorama)
            config, contents = read_checkpoint(path)
            config = dataclasses.replace(config, **given)
            name, tensors = path.resolve().parent.name, contents["tensors"]
        if args.panorama and config.topology != "cylinder":
            is_not = f"{name} or --topology {config.topology} is none"
            raise UserError(f"--panorama needs a cylinder, and {is_not}; leave one of them out")
        stored, gan = load_stored(config.check(), args.cache), COCOGAN(config, device)
        if data.report_originals(stored) and config.topology == "plane":
            print("most are at least twice as wide as high, like panoramas: add --panorama")
        if len(stored) - config.holdout < 1000:
            print("fewer than 1,000 images, which G may learn by heart: add some, or --mirror")
        if tensors:
            copy_weights(gan, tensors)
        run = new_run(args.run, name)
        with lock_run(run):
            return train_loop(gan, stored, run, args, draw_batch, train_step, show)
    run = find_checkpoint(args.resume or None, args.panorama).parent
    if run == ASSETS:
        raise UserError("--resume finds no run under runs/; name one, or leave it out to start a new one")
    with lock_run(run):
        gan, stored = resume(run, given, device, lambda config: load_stored(config, args.cache))
        return train_loop(gan, stored, run, args, draw_batch, train_step, show)


# ---- Command line ------------------------------------------------------------------------------------------


def sample(args: argparse.Namespace) -> int:
    """`sample`: from a checkpoint to a picture, or to one picture per seed in a folder."""
    device, path = choose_device(args.device, args.impl), find_checkpoint(args.checkpoint, args.panorama)
    G = load(path, device, raw=args.raw)
    count = args.count or (1 if args.panorama else 16)
    seeds = range(args.seed[0], args.seed[0] + count) if len(args.seed) == 1 else args.seed
    if args.turns > 1 and not any(G.config.closed):
        raise UserError(f"--turns {args.turns} is for borders that meet; {path} has none, try --panorama")
    spans = []
    for size, closed in zip((G.config.R, G.config.K), G.config.closed):
        margin, turns = (0, args.turns) if closed else (args.extrapolate, 1)
        spans.append(range(-margin, size * turns + margin))
    default = Path("runs") if path.parent == ASSETS else path.parent
    out = Path(args.out or default / f"{path.stem}-seed-{seeds[0]}.png")
    files = {out: seeds}
    if out.is_dir() or str(args.out).endswith("/"):
        files = {out / f"seed-{seed:06d}.png": [seed] for seed in seeds}
    drawn = draw_images(G, latents(seeds, G.config.z_dim), *spans)
    for name, some in files.items():
        images = np.concatenate([*itertools.islice(drawn, len(some))])
        make_folder(name.parent)
        save_picture(grid(enlarge(images, args.zoom or (None if name == out else 1))), name)
    print(f"{out}: {len(seeds)} images, from {path}")
    return 0


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as UserError: one line, as all others."""

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = re.findall(r"--[\w-]+", self.format_help())
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1, cutoff=0.8)
            self.error(
                " ".join(["unrecognized arguments:", *unknown, *(f"(did you mean {n}?)" for n in near)])
            )
        return namespace, unknown

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def natural(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d{0,17}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def image_size(text: str) -> tuple[int, int]:
    """Height and width of a text HEIGHTxWIDTH, or one number for both."""
    if not re.fullmatch(r"\d{1,5}(x\d{1,5})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no HEIGHTxWIDTH in pixels, like 64x96, and no number")
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def run_command(parser: Parser, act, argv: list[str] | None) -> int:
    """act(arguments); returns the exit status: its own or 0, 2 for an error in one line, or 128 + signal."""
    for name in ("stdout", "stderr"):  # a program without a console has none
        if getattr(sys, name) is None or getattr(sys, name).closed:
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may not be UTF-8
    try:
        return act(parser.parse_args(argv)) or 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # nobody reads the output, as in train | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE
    except (UserError, OSError) as error:
        data.progress()
        print(f"error: {error}", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:
        if not re.search("out of memory|allocate memory|ALLOC_FAILED|MemoryError", f"{error!r}"):
            raise
        print("error: out of memory; try a smaller --batch-size, or fewer images", file=sys.stderr)
    return 2


GROUPS = dict(height="model", lambda_gp="losses and optimisation", data="images")  # by their first fields


def add_commands(parser, train, sample, choose_preset=choose_preset, Config=Config, PRESETS=PRESETS):
    """Add the commands train and sample, with the flags that each system has; returns their parsers."""

    def help_or_train(args: argparse.Namespace) -> int | None:
        if not args.help:
            return train(args)
        name = choose_preset(args, choose_device(args.device, args.impl))
        for field, value in (dataclasses.asdict(Config()) | PRESETS[name]).items():
            by_field[field].help += f" (default: {value})"
        train_parser.description = f"Train a model. The defaults below are those of the preset {name}."
        return train_parser.print_help()

    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser("train", help="train a model", allow_abbrev=False, add_help=False)
    train_parser.usage = f"{train_parser.prog} [options]"
    train_parser.epilog = f"example: {train_parser.prog} --data ./photographs --steps 20000"
    add, by_field = train_parser.add_argument, {}
    add("-h", "--help", action="store_true", help="show this help, with the defaults for the flags given")
    text = f"{', '.join(PRESETS)} (default: by device and data)"
    add("--preset", choices=PRESETS, metavar="NAME", help=text)
    add("--run", metavar="DIR", help="folder of the run (default: the next free runs/<preset>-NNN)")
    add("--resume", nargs="?", const="", metavar="RUN", help="continue a run (default: the newest)")
    add("--cache", default="cache", metavar="DIR", help="folder of the decoded images (default: cache)")
    add("--log-every", type=positive, default=100, metavar="N", help="steps between lines (default: 100)")
    add("--sample-every", type=positive, default=1000, metavar="N", help="between pictures (default: 1000)")
    add("--save-every", type=positive, default=1000, metavar="N", help="between checkpoints (default: 1000)")
    add("--keep", type=positive, default=2, metavar="N", help="newest checkpoints to keep (default: 2)")
    add("--graph", action="store_true", help="run a step as one CUDA graph")
    for field in dataclasses.fields(Config):
        if field.name in GROUPS:
            add = train_parser.add_argument_group(GROUPS[field.name]).add_argument
        if field.name == "height":
            add("--image-size", type=image_size, metavar="HEIGHTxWIDTH", help="both, or one number for both")
        allowed, options = field.metadata["allowed"], dict(action=argparse.BooleanOptionalAction)
        if field.type != "bool":
            values = "|".join(allowed) if field.type == "str" and allowed else None
            kind, letter = {"int": (int, "N"), "float": (float, "X"), "str": (str, "TEXT")}[field.type]
            options = dict(type=kind, metavar=values or letter)
        options |= dict(dest=field.name, default=argparse.SUPPRESS, help=field.metadata["help"])
        by_field[field.name] = add(flag(field.name), **options)

    sample_parser = commands.add_parser("sample", help="sample from a trained model", allow_abbrev=False)
    sample_parser.usage = f"{sample_parser.prog} [options]"
    sample_parser.epilog = f"example: {sample_parser.prog} --seed 0 1 4 --out runs/three.png"
    add = sample_parser.add_argument
    add("--checkpoint", metavar="FILE|RUN", help="default: the newest")
    add("--seed", type=natural, nargs="+", default=[0], metavar="N", help="which images, or the first one")
    add("--count", type=positive, metavar="N", help="images from one --seed on (default: 16)")
    add("--out", metavar="FILE|DIR/", help="a picture, or a folder for one per seed (default: in the run)")
    for command, act in ((train_parser, help_or_train), (sample_parser, sample)):
        command.set_defaults(act=act)
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
        command.add_argument("--gpu", dest="device", action="store_const", const="cuda", help="--device cuda")
        text = "auto: Triton's kernels on a GPU; torch: PyTorch alone"
        command.add_argument("--impl", default="auto", choices=("auto", "torch"), help=text)
    return [train_parser, sample_parser]


def build_parser() -> Parser:
    text, begin = "COCO-GAN: train on images, and sample full images.", "to begin: python coco_gan.py train"
    parser = Parser(prog="python coco_gan.py", description=text, epilog=begin)
    parser.add_argument("--version", action="version", version=f"COCO-GAN {__version__}")
    train_parser, sample_parser = add_commands(parser, train, sample)
    add = train_parser.add_argument
    add("--panorama", action="store_true", help="preset panorama, or panorama-tiny on a CPU")
    add("--from", dest="source", metavar="RUN", help="start a new run with the networks of this one")
    add = sample_parser.add_argument
    add("--panorama", action="store_true", help="one image of the newest checkpoint of a cylinder")
    add("--turns", type=positive, default=1, metavar="N", help="repeat images whose borders meet")
    add("--extrapolate", type=positive, default=0, metavar="N", help="add N micro patches beyond each border")
    add("--zoom", type=positive, metavar="N", help="enlarge pixels (default: images to 128, in folders 1)")
    add("--raw", action="store_true", help="use G's weights themselves, not their moving average")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command, by default that of the command line; returns the exit status, see `run_command`."""
    argv = sys.argv[1:] if argv is None else argv
    return run_command(build_parser(), lambda args: args.act(args), argv or ["--help"])


if __name__ == "__main__":
    status = main()
    if WORLD > 1:
        sys.stdout.flush()
        os._exit(status)  # gloo's threads sometimes crash in an ordinary exit
    sys.exit(status)
