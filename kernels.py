"""The hot operations of COCO-GAN as Triton kernels, each beside the PyTorch code that it stands for.

    python kernels.py                       # verify; on a GPU, time everything too
    python kernels.py --json timings.json   # and write all figures down
    TRITON_INTERPRET=1 python kernels.py    # verify the kernels on a CPU, by Triton's interpreter

    conditional_batch_norm   normalise, then scale and shift each sample by its own γ and β; ReLU
    merge_patches            φ: micro patches side by side, with G's tanh and change of type
    crop_patches             ψ: uint8 images to macro patches in [-1, 1], wrapped round borders, mirrored

The file imports PyTorch and, where it is installed, Triton, and can be copied into another project. Each
function takes

    impl="auto"     the kernels, for float32, bfloat16 and float16 on a GPU, if they work there; else PyTorch
    impl="torch"    the PyTorch reference, on any device, for these types and float64
    impl="triton"   the kernels or ValueError; on a CPU only if TRITON_INTERPRET=1 before Triton is imported

Inputs may be contiguous or channels last and outputs are what the input is; what is neither is copied.
The kernels compute in float32 whatever the types. They have first-order gradients only and tell autograd so:
the gradient penalty differentiates twice, but through D, which uses none of them. There are no atomics, and
block sizes follow from shapes (autotuning may choose otherwise the next time, and sums change with their
order), so that the same input gives the same bits. Nothing waits for the GPU; CUDA graphs can hold it all.

Source: Lin et al., "COCO-GAN: Generation by Parts via Conditional Coordinating", ICCV 2019. N, M, S, φ, ψ are
named as in coco_gan.py; p numbers the HW = h·w positions of a sample.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import math
import statistics
import sys
import warnings

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

DEFAULT = "auto"  # what impl="auto" stands for everywhere, if it is not this
TYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 4096  # values that a program of four warps works on at a time: 32 a thread, which its registers hold
PROGRAMS = 1024  # to split a sum among: eight a multiprocessor of the largest GPUs, yet few partial sums


def _jit(function):
    # These bound loops only. Triton would compile anew for those that are 1 and those that 16 divides.
    counts = ["B", "n", "splits", "span", "parts", "tiles"]
    return triton.jit(function, do_not_specialize=counts) if triton is not None else function


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _interpreted() -> bool:
    """Whether Triton found TRITON_INTERPRET=1 when it made the kernels, which then run on a CPU."""
    return triton is not None and not isinstance(_normalise_kernel, triton.runtime.JITFunction)


def _use_triton(impl: str, tensor: torch.Tensor, *types: torch.dtype) -> bool:
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl is {impl!r}; give 'auto', 'torch' or 'triton'")
    if impl == "auto" and (DEFAULT != "triton" or tensor.is_cuda or _interpreted()):
        impl = DEFAULT
    if impl == "triton" and triton is None:
        raise ValueError("impl is 'triton', which is not installed; give 'auto' or 'torch'")
    if impl == "triton" and not tensor.is_cuda and not _interpreted():
        hint = "give 'auto' or 'torch', or set TRITON_INTERPRET=1 before Triton is imported"
        raise ValueError(f"impl is 'triton' and the tensors are on {tensor.device}; {hint}")
    # The interpreter has to be asked for: it is slower than PyTorch by orders of magnitude.
    kernels_do = triton is not None and tensor.is_cuda and {*types} <= {*TYPES}
    return impl == "triton" or (impl == "auto" and kernels_do and _work_on_the_gpu())


@functools.cache
def failure(device: str) -> str | None:
    """Why the kernels do not work here, or None. Triton may lack a C compiler, say. Found out once."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            verify(device, "triton", SMALL[:1])
    except Exception as error:  # of Triton, and of all that it calls
        return (str(error).strip() or type(error).__name__).splitlines()[0]


@functools.cache
def _work_on_the_gpu() -> bool:
    why = failure("cuda")
    if why:
        warnings.warn(f"the Triton kernels do not work here ({why}); PyTorch does their work")
    return why is None


def _check_type(name: str, dtype: torch.dtype, *allowed: torch.dtype) -> None:
    if dtype not in allowed:
        raise ValueError(f"{name} is {dtype}; give {' or '.join(map(str, dict.fromkeys(allowed)))}")


def _check(name: str, tensor: torch.Tensor, shape: tuple, device: torch.device, *types: torch.dtype) -> None:
    _check_type(name, tensor.dtype, *types)
    if tensor.shape != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}; give {shape}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; give it on {device}, where the first argument is")


# ----------------------------------------------------------------------------------------------------------
# Conditional batch normalisation (appendix C). In G a convolution follows its ReLU, so the ×2 upsampling and
# the residual addition, which come after other convolutions, cannot be fused into it.
# ----------------------------------------------------------------------------------------------------------


def conditional_batch_norm(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """o = γ · (x - μ) / √(σ² + eps) + β, γ and β of each sample its own; then max(o, 0) if `relu`.

    In training μ and σ² are each channel's mean and variance over batch and space, and the running statistics
    are updated in place, as torch.nn.BatchNorm2d does it; else μ and σ² are the running statistics.

    Args:
        x: (B, C, h, w), float32, bfloat16 or float16 (float64: PyTorch only). In training at least two values
            a channel.
        gamma, beta: (B, C), both float32 or both of x's type. With `expand`ed ones, of stride 0 along B, this
            is an ordinary batch normalisation.
        running_mean, running_var: (C,) float32 (float64 with x). The variance is the unbiased one.
        momentum: in [0, 1], the weight of the new statistics; eps: from 0 on.
    Returns: (B, C, h, w), type and memory format of x.
    Raises: ValueError for other shapes, types or devices.
    Gradients: of x, gamma and beta; the kernels' of first order, PyTorch's of any.
    Source: appendix C, "Conditional Batch Normalization"; Ioffe and Szegedy, "Batch Normalization", 2015.
    """
    if x.dim() != 4:
        raise ValueError(f"x has the shape {tuple(x.shape)}; give (B, C, h, w)")
    (B, C, h, w), work = x.shape, torch.promote_types(x.dtype, torch.float32)
    use_triton = _use_triton(impl, x, x.dtype)
    _check_type("x", x.dtype, *TYPES, *(() if use_triton else (torch.float64,)))
    _check("gamma", gamma, (B, C), x.device, work, x.dtype)
    _check("beta", beta, (B, C), x.device, gamma.dtype)
    _check("running_mean", running_mean, (C,), x.device, work)
    _check("running_var", running_var, (C,), x.device, work)
    if not (running_mean.is_contiguous() and running_var.is_contiguous()):
        raise ValueError("running_mean and running_var are written to; give them contiguous")
    if training and B * h * w < 2:
        raise ValueError(f"x has {B * h * w} values a channel; a variance, in training, needs two")
    function = _ConditionalBatchNorm.apply if use_triton and x.numel() else _conditional_batch_norm_torch
    return function(x, gamma, beta, running_mean, running_var, training, momentum, eps, relu)


def _conditional_batch_norm_torch(x, gamma, beta, running_mean, running_var, training, momentum, eps, relu):
    # In sizes of x, eager PyTorch moves 9: batch_norm reads x twice and writes, product, sum and ReLU each
    # read and write. The kernels move 3: they read x twice, unless the statistics are given, and write. The
    # second time x is in the L2 cache if it fits. Backward they move 5: they read x and dy twice, write dx.
    x_hat = F.batch_norm(x, running_mean, running_var, None, None, training, momentum, eps)
    y = gamma[:, :, None, None] * x_hat + beta[:, :, None, None]
    return (F.relu(y) if relu else y).to(x.dtype)


# Forward, three launches: partial statistics, their merging, normalising. The second is small; done again by
# every program of the third, it would read more than x.
#
# A program sums d = x - k and d², k being the mean of its first tile. M₂ = Σ(x - mean)² = Σd² - (Σd)²/n then
# loses little: if the first tile is a fraction f of the program's values, their variance is at least
# f/(1-f) · (mean - k)², so that Σd² is at most M₂/f and the relative error about ε/f, 1/f being the number of
# tiles. Merging treats the means of the parts alike. With a mean of 1,000 and a variance of 1, sums of x and
# x² would have no digits left.
#
# Tiles are positions x channels in both memory formats. The strides tell Triton how to arrange the threads:
# it knows when it compiles which of them is 1. Addresses have 64 bits.


@_jit
def _statistics_kernel(x_ptr, part_mean_ptr, part_m2_ptr, HW, C, splits, span, stride_b, stride_p, stride_c,
                       BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Mean and M₂ of `span` positions of one sample, for BLOCK_C channels."""
    part = tl.program_id(0)  # b·splits + split
    first = (part % splits).to(tl.int64) * span
    end = tl.minimum(first + span, HW)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    x_ptr += (part // splits).to(tl.int64) * stride_b + c.to(tl.int64) * stride_c
    k = tl.zeros([1, BLOCK_C], tl.float32)
    sum_d = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_dd = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(first, end, BLOCK_P, num_stages=3):
        p = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (p < end) & (c < C)
        x = tl.load(x_ptr + p * stride_p, mask, other=0).to(tl.float32)
        if start == first:
            k = tl.sum(x, 0, keep_dims=True) / tl.minimum(end - first, BLOCK_P).to(tl.float32)
        d = tl.where(mask, x - k, 0)
        sum_d += d
        sum_dd += d * d
    sum_d = tl.sum(sum_d, 0, keep_dims=True)
    mean_d = sum_d / (end - first).to(tl.float32)
    m2 = tl.sum(sum_dd, 0, keep_dims=True) - sum_d * mean_d
    tl.store(part_mean_ptr + part.to(tl.int64) * C + c, k + mean_d, c < C)
    tl.store(part_m2_ptr + part.to(tl.int64) * C + c, tl.where(m2 < 0, 0, m2), c < C)  # a NaN stays one


@_jit
def _merge_statistics_kernel(part_mean_ptr, part_m2_ptr, mean_ptr, var_ptr, running_mean_ptr, running_var_ptr,
                             HW, C, splits, span, parts, values, momentum,
                             BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Mean and variance of BLOCK_C channels from all parts, in a fixed order; update the running ones."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    k = tl.zeros([1, BLOCK_C], tl.float32)
    sum_d = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sum_m2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_R):
        part = start + tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
        mask = (part < parts) & (c < C)
        n = tl.where(part < parts, tl.minimum(span, HW - part % splits * span), 0).to(tl.float32)
        mean = tl.load(part_mean_ptr + part * C + c, mask, other=0)
        if start == 0:
            k = tl.sum(n * mean, 0, keep_dims=True) / tl.sum(n, 0, keep_dims=True)
        d = tl.where(mask, mean - k, 0)
        sum_d += n * d
        sum_m2 += tl.load(part_m2_ptr + part * C + c, mask, other=0) + n * d * d
    sum_d = tl.sum(sum_d, 0, keep_dims=True)
    m2 = tl.sum(sum_m2, 0, keep_dims=True) - sum_d * (sum_d / values)
    mean, m2 = k + sum_d / values, tl.where(m2 < 0, 0, m2)
    tl.store(mean_ptr + c, mean, c < C)
    tl.store(var_ptr + c, m2 / values, c < C)
    old_mean = tl.load(running_mean_ptr + c, c < C)
    old_var = tl.load(running_var_ptr + c, c < C)
    tl.store(running_mean_ptr + c, (1 - momentum) * old_mean + momentum * mean, c < C)
    tl.store(running_var_ptr + c, (1 - momentum) * old_var + momentum * (m2 / (values - 1)), c < C)


@_jit
def _channels(gamma_ptr, beta_ptr, mean_ptr, var_ptr, at_b, c, C, eps):
    """γ and β of a sample, whose rows begin at at_b, and μ and rstd: (1, BLOCK_C) each."""
    gamma = tl.load(gamma_ptr + at_b + c, c < C, other=0).to(tl.float32)
    beta = tl.load(beta_ptr + at_b + c, c < C, other=0).to(tl.float32)
    mean = tl.load(mean_ptr + c, c < C, other=0)
    return gamma, beta, mean, tl.rsqrt(tl.load(var_ptr + c, c < C, other=1) + eps)


@_jit
def _normalise_kernel(x_ptr, y_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, HW, C, tiles,
                      x_stride_b, y_stride_b, stride_p, stride_c, gamma_stride_b, eps,
                      RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """One tile of one sample: y = γ (x - μ) rstd + β."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    p = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (p < HW) & (c < C)
    at = p * stride_p + c.to(tl.int64) * stride_c
    x = tl.load(x_ptr + b * x_stride_b + at, mask, other=0).to(tl.float32)
    gamma, beta, mean, rstd = _channels(gamma_ptr, beta_ptr, mean_ptr, var_ptr, b * gamma_stride_b, c, C, eps)
    y = (x - mean) * rstd * gamma + beta
    if RELU:
        y = tl.where(y < 0, 0, y)  # a NaN stays one
    tl.store(y_ptr + b * y_stride_b + at, y.to(y_ptr.dtype.element_ty), mask)


# Backward. With rstd = 1/√(σ² + eps), n = B·h·w and g = dL/dy, made 0 where the ReLU held y back (found out
# anew from x, not stored),
#
#     y = γ x̂ + β         gives  dβ[b, c] = Σ_p g,  dγ[b, c] = Σ_p g x̂,  a = dL/dx̂ = γ g
#     x̂ = (x - μ) rstd    gives  ∂x̂_j/∂x_i = rstd (δ_ij - 1/n - x̂_i x̂_j / n),
#
# the second term by way of μ, the third by way of σ². So dx = rstd (a - mean_a - x̂ mean_ax), and for the
# means of a and a x̂ over a channel dβ and dγ, needed anyway, are enough:
#
#     mean_a = Σ a / n = Σ_b γ dβ / n,  mean_ax = Σ a x̂ / n = Σ_b γ dγ / n.
#
# Three launches: sums over positions, sums over samples, dx. With given statistics both means are 0.


@_jit
def _through_relu(dy, x_hat, gamma, beta, RELU: tl.constexpr):
    """g. Where y is NaN the gradient passes, as it does in PyTorch."""
    return tl.where(x_hat * gamma + beta <= 0, 0, dy) if RELU else dy


@_jit
def _gradient_sums_kernel(x_ptr, dy_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, part_dgamma_ptr,
                          part_dbeta_ptr, HW, C, splits, span, x_stride_b, dy_stride_b, stride_p, stride_c,
                          gamma_stride_b, eps,
                          RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Σ g x̂ and Σ g of `span` positions of one sample, for BLOCK_C channels."""
    part = tl.program_id(0)  # b·splits + split
    b = (part // splits).to(tl.int64)
    first = (part % splits).to(tl.int64) * span
    end = tl.minimum(first + span, HW)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    gamma, beta, mean, rstd = _channels(gamma_ptr, beta_ptr, mean_ptr, var_ptr, b * gamma_stride_b, c, C, eps)
    x_ptr += b * x_stride_b + c.to(tl.int64) * stride_c
    dy_ptr += b * dy_stride_b + c.to(tl.int64) * stride_c
    sum_gx = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_g = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(first, end, BLOCK_P, num_stages=3):
        p = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (p < end) & (c < C)
        x_hat = (tl.load(x_ptr + p * stride_p, mask, other=0).to(tl.float32) - mean) * rstd
        dy = tl.load(dy_ptr + p * stride_p, mask, other=0).to(tl.float32)
        g = _through_relu(dy, x_hat, gamma, beta, RELU)
        sum_gx += g * x_hat
        sum_g += g
    tl.store(part_dgamma_ptr + part.to(tl.int64) * C + c, tl.sum(sum_gx, 0, keep_dims=True), c < C)
    tl.store(part_dbeta_ptr + part.to(tl.int64) * C + c, tl.sum(sum_g, 0, keep_dims=True), c < C)


@_jit
def _merge_gradients_kernel(part_dgamma_ptr, part_dbeta_ptr, gamma_ptr, dgamma_ptr, dbeta_ptr, mean_a_ptr,
                            mean_ax_ptr, B, C, splits, gamma_stride_b, scale,
                            BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """dγ and dβ, and scale · Σ_b γ dβ and scale · Σ_b γ dγ, of BLOCK_C channels, in a fixed order."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    sum_ax = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sum_a = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, B, BLOCK_R):
        b = start + tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
        mask = (b < B) & (c < C)
        dgamma = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        dbeta = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for split in range(0, splits):
            at = (b * splits + split) * C + c
            dgamma += tl.load(part_dgamma_ptr + at, mask, other=0)
            dbeta += tl.load(part_dbeta_ptr + at, mask, other=0)
        tl.store(dgamma_ptr + b * C + c, dgamma.to(dgamma_ptr.dtype.element_ty), mask)
        tl.store(dbeta_ptr + b * C + c, dbeta.to(dbeta_ptr.dtype.element_ty), mask)
        gamma = tl.load(gamma_ptr + b * gamma_stride_b + c, mask, other=0).to(tl.float32)
        sum_ax += gamma * dgamma
        sum_a += gamma * dbeta
    mean_a, mean_ax = tl.sum(sum_a, 0, keep_dims=True) * scale, tl.sum(sum_ax, 0, keep_dims=True) * scale
    tl.store(mean_a_ptr + c, tl.where(scale == 0, 0, mean_a), c < C)  # 0 times a NaN is none
    tl.store(mean_ax_ptr + c, tl.where(scale == 0, 0, mean_ax), c < C)


@_jit
def _input_gradient_kernel(x_ptr, dy_ptr, dx_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, mean_a_ptr,
                           mean_ax_ptr, HW, C, tiles, x_stride_b, dy_stride_b, stride_p, stride_c,
                           gamma_stride_b, eps,
                           RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """One tile of one sample: dx = rstd (a - mean_a - x̂ mean_ax)."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    p = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (p < HW) & (c < C)
    at = p * stride_p + c.to(tl.int64) * stride_c
    x = tl.load(x_ptr + b * x_stride_b + at, mask, other=0).to(tl.float32)
    dy = tl.load(dy_ptr + b * dy_stride_b + at, mask, other=0).to(tl.float32)
    gamma, beta, mean, rstd = _channels(gamma_ptr, beta_ptr, mean_ptr, var_ptr, b * gamma_stride_b, c, C, eps)
    x_hat = (x - mean) * rstd
    a = gamma * _through_relu(dy, x_hat, gamma, beta, RELU)
    mean_a = tl.load(mean_a_ptr + c, c < C, other=0)
    mean_ax = tl.load(mean_ax_ptr + c, c < C, other=0)
    dx = rstd * (a - mean_a - x_hat * mean_ax)
    tl.store(dx_ptr + b * dy_stride_b + at, dx.to(dx_ptr.dtype.element_ty), mask)


def _tile(HW: int, C: int, channels_last: bool, values: int) -> tuple[int, int]:
    """Positions and channels of a tile of at most so many values, longer where memory runs along."""
    along, across, least = (C, HW, 64) if channels_last else (HW, C, 1024)
    if along % 8:
        values //= 2  # loads are of single values then, and registers have to hold all their addresses
    block = min(_power_of_2(across), values // min(_power_of_2(along), least, values))
    return (block, min(_power_of_2(along), values // block))[:: 1 if channels_last else -1]


def _split(samples: int, HW: int, C: int, channels_last: bool) -> tuple[int, int, int, int]:
    """A tile of sums, into how many parts to split each sample's positions, and how many a part has."""
    BLOCK_P, BLOCK_C = _tile(HW, C, channels_last, TILE // 2)  # half, for sums take twice the registers
    splits = min(_cdiv(PROGRAMS, samples * _cdiv(C, BLOCK_C)), _cdiv(HW, BLOCK_P))
    span = _cdiv(_cdiv(HW, splits), BLOCK_P) * BLOCK_P
    return BLOCK_P, BLOCK_C, _cdiv(HW, span), span


def _as_positions(x: torch.Tensor) -> tuple[torch.Tensor, bool, int, int]:
    """x or a contiguous copy, whether it is channels last, and the strides of its positions and channels."""
    channels_last = x[:1].is_contiguous(memory_format=torch.channels_last)  # samples may lie apart
    x = x if channels_last or x[:1].is_contiguous() else x.contiguous()
    _, C, h, w = x.shape
    return (x, True, C, 1) if channels_last else (x, False, 1, h * w)


class _ConditionalBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, running_mean, running_var, training, momentum, eps, relu):
        x, channels_last, stride_p, stride_c = _as_positions(x)
        if gamma.stride() != beta.stride() or gamma.stride(1) != 1:
            gamma, beta = gamma.contiguous(), beta.contiguous()
        (B, C), HW = gamma.shape, x.shape[2] * x.shape[3]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=_format(channels_last))
        mean, var = running_mean, running_var
        with torch.cuda.device_of(x):
            if training:
                # Samples that follow on one another in memory are one long one, which makes for fewer parts.
                joined = channels_last and x.stride(0) == HW * C
                samples, positions = (1, B * HW) if joined else (B, HW)
                BLOCK_P, BLOCK_C, splits, span = _split(samples, positions, C, channels_last)
                parts = samples * splits
                mean, var = torch.empty(2, C, dtype=torch.float32, device=x.device)
                part_mean, part_m2 = torch.empty(2, parts, C, dtype=torch.float32, device=x.device)
                _statistics_kernel[parts, _cdiv(C, BLOCK_C)](
                    x, part_mean, part_m2, positions, C, splits, span, x.stride(0), stride_p, stride_c,
                    BLOCK_P, BLOCK_C
                )  # fmt: skip
                _merge_statistics_kernel[(_cdiv(C, 8),)](
                    part_mean, part_m2, mean, var, running_mean, running_var, positions, C, splits, span,
                    parts, float(B * HW), momentum, min(_power_of_2(parts), TILE // 8), 8, num_warps=8
                )  # fmt: skip
            BLOCK_P, BLOCK_C = _tile(HW, C, channels_last, TILE)
            tiles = _cdiv(HW, BLOCK_P)
            _normalise_kernel[B * tiles, _cdiv(C, BLOCK_C)](
                x, y, gamma, beta, mean, var, HW, C, tiles, x.stride(0), y.stride(0), stride_p, stride_c,
                gamma.stride(0), eps, relu, BLOCK_P, BLOCK_C
            )  # fmt: skip
        ctx.save_for_backward(x, gamma, beta, mean, var)
        ctx.options = training, eps, relu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, gamma, beta, mean, var), (training, eps, relu) = ctx.saved_tensors, ctx.options
        x, channels_last, stride_p, stride_c = _as_positions(x)
        dy = dy.contiguous(memory_format=_format(channels_last))
        (B, C), HW = gamma.shape, x.shape[2] * x.shape[3]
        dx = torch.empty_like(dy)
        dgamma, dbeta = (torch.empty(B, C, dtype=gamma.dtype, device=x.device) for _ in range(2))
        mean_a, mean_ax = torch.empty(2, C, dtype=torch.float32, device=x.device)
        BLOCK_P, BLOCK_C, splits, span = _split(B, HW, C, channels_last)
        part_dgamma, part_dbeta = torch.empty(2, B * splits, C, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            _gradient_sums_kernel[B * splits, _cdiv(C, BLOCK_C)](
                x, dy, gamma, beta, mean, var, part_dgamma, part_dbeta, HW, C, splits, span,
                x.stride(0), dy.stride(0), stride_p, stride_c, gamma.stride(0), eps, relu, BLOCK_P, BLOCK_C
            )  # fmt: skip
            _merge_gradients_kernel[(_cdiv(C, 8),)](
                part_dgamma, part_dbeta, gamma, dgamma, dbeta, mean_a, mean_ax, B, C, splits, gamma.stride(0),
                1 / (B * HW) if training else 0.0, min(_power_of_2(B), TILE // 8), 8, num_warps=8
            )  # fmt: skip
            if ctx.needs_input_grad[0]:
                BLOCK_P, BLOCK_C = _tile(HW, C, channels_last, TILE)
                tiles = _cdiv(HW, BLOCK_P)
                _input_gradient_kernel[B * tiles, _cdiv(C, BLOCK_C)](
                    x, dy, dx, gamma, beta, mean, var, mean_a, mean_ax, HW, C, tiles, x.stride(0),
                    dy.stride(0), stride_p, stride_c, gamma.stride(0), eps, relu, BLOCK_P, BLOCK_C
                )  # fmt: skip
        return dx if ctx.needs_input_grad[0] else None, dgamma, dbeta, *6 * (None,)


# ----------------------------------------------------------------------------------------------------------
# φ (section 2, "a concatenation function")
# ----------------------------------------------------------------------------------------------------------


def merge_patches(
    patches: torch.Tensor,
    rows: int,
    columns: int,
    *,
    tanh: bool = False,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """φ: put micro patches side by side, without overlap; before that, take their tanh if asked to.

    Args:
        patches: (B·rows·columns, C, S, S), float32, bfloat16 or float16 (float64: PyTorch only). Number
            b·rows·columns + n·columns + m is in row n and column m of image b.
        dtype: of the result, one of the same, that of the patches by default.
    Returns: (B, C, rows·S, columns·S), in the memory format of the patches.
    Raises: ValueError for other shapes or types.
    Gradients: of the patches; the kernel's of first order, PyTorch's of any.
    Source: section 2; figure 13a for the tanh.
    """
    if patches.dim() != 4 or patches.shape[2] != patches.shape[3]:
        raise ValueError(f"patches has the shape {tuple(patches.shape)}; give (B·rows·columns, C, S, S)")
    if min(rows, columns) < 1 or len(patches) % (rows * columns):
        found = f"{len(patches)} patches make no images of {rows} rows and {columns} columns"
        raise ValueError(f"{found}; give both from 1 on, and a multiple of rows·columns patches")
    dtype = patches.dtype if dtype is None else dtype
    use_triton = _use_triton(impl, patches, patches.dtype, dtype)
    for name, type_ in (("patches", patches.dtype), ("dtype", dtype)):
        _check_type(name, type_, *TYPES, *(() if use_triton else (torch.float64,)))
    function = _MergePatches.apply if use_triton and patches.numel() else _merge_patches_torch
    return function(patches, rows, columns, tanh, dtype)


def _merge_patches_torch(patches, rows, columns, tanh, dtype):
    # From bfloat16 by tanh to float32, PyTorch moves 22 bytes a value: it reads 2 and writes 4, then reads
    # and writes 4 twice. The kernel moves 6, and backward 8: it reads 4 and 2 and writes 2.
    C, S = patches.shape[1:3]
    if tanh:
        patches = torch.tanh(patches.to(torch.promote_types(patches.dtype, torch.float32)))
    patches = patches.to(dtype)
    if _is_channels_last(patches):
        patches = patches.permute(0, 2, 3, 1).reshape(-1, rows, columns, S, S, C)
        images = patches.permute(0, 1, 3, 2, 4, 5)  # (B, rows, S, columns, S, C)
        return images.reshape(-1, rows * S, columns * S, C).permute(0, 3, 1, 2)
    patches = patches.reshape(-1, rows, columns, C, S, S)
    images = patches.permute(0, 3, 1, 4, 2, 5)  # (B, C, rows, S, columns, S)
    return images.reshape(-1, C, rows * S, columns * S)


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


# In both formats runs of values stay together: patches are (B, N, M, planes, S, run) and images (B, planes,
# N, S, M, run), with one plane and runs of S·C if channels last, else C planes and runs of S. The S·M runs of
# one row of patches, in one plane, lie side by side in the image; a program moves some of them.
#
# |tanh x| is (1 - e) / (1 + e) with e = exp(-2|x|), or its series where that difference would cancel. The
# derivative is 4 e / (1 + e)², exact where 1 - tanh² x has no digits left; so x is kept for it, not tanh x.


@_jit
def _runs(planes, N, M, S, run, tiles, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr):
    """Where a program's values are in the patches and in the images, and which of the tile there are."""
    row = tl.program_id(0) // tiles  # (b·planes + plane)·N + n
    t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]  # y·M + m
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    patch = (row // N // planes * N + row % N).to(tl.int64) * M + t % M
    in_patches = ((patch * planes + row // N % planes) * S + t // M) * run + r
    in_images = (row.to(tl.int64) * S * M + t) * run + r
    return in_patches, in_images, (t < S * M) & (r < run)


@_jit
def _merge_patches_kernel(patches_ptr, images_ptr, planes, N, M, S, run, tiles,
                          TANH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    in_patches, in_images, mask = _runs(planes, N, M, S, run, tiles, BLOCK_T, BLOCK_R)
    x = tl.load(patches_ptr + in_patches, mask, other=0).to(tl.float32)
    if TANH:
        e, xx = tl.exp(-2 * tl.abs(x)), x * x
        far = (1 - e) / (1 + e)
        series = x * (1 + xx * (-1 / 3 + xx * (2 / 15 + xx * (-17 / 315 + xx * (62 / 2835)))))
        x = tl.where(xx < 1 / 16, series, tl.where(x < 0, -far, far))
    tl.store(images_ptr + in_images, x.to(images_ptr.dtype.element_ty), mask)


@_jit
def _split_patches_kernel(d_images_ptr, patches_ptr, d_patches_ptr, planes, N, M, S, run, tiles,
                          TANH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    in_patches, in_images, mask = _runs(planes, N, M, S, run, tiles, BLOCK_T, BLOCK_R)
    d = tl.load(d_images_ptr + in_images, mask, other=0).to(tl.float32)
    if TANH:
        e = tl.exp(-2 * tl.abs(tl.load(patches_ptr + in_patches, mask, other=0).to(tl.float32)))
        d *= 4 * e / ((1 + e) * (1 + e))
    tl.store(d_patches_ptr + in_patches, d.to(d_patches_ptr.dtype.element_ty), mask)


class _MergePatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, patches, rows, columns, tanh, dtype):
        channels_last = _is_channels_last(patches)
        ctx.form = dict(device=patches.device, memory_format=_format(channels_last))
        patches = patches.contiguous(memory_format=_format(channels_last))
        count, C, S, _ = patches.shape
        shape = count // (rows * columns), C, rows * S, columns * S
        images = torch.empty(shape, dtype=dtype, **ctx.form)
        planes, run = (1, S * C) if channels_last else (C, S)
        BLOCK_R = min(_power_of_2(run), TILE)
        BLOCK_T = min(_power_of_2(S * columns), TILE // BLOCK_R)
        tiles = _cdiv(S * columns, BLOCK_T)
        ctx.grid = count // columns * planes * tiles, _cdiv(run, BLOCK_R)
        ctx.sizes = planes, rows, columns, S, run, tiles, tanh, BLOCK_T, BLOCK_R
        with torch.cuda.device_of(patches):
            _merge_patches_kernel[ctx.grid](patches, images, *ctx.sizes)
        ctx.shape, ctx.dtype = patches.shape, patches.dtype
        ctx.save_for_backward(*[patches] * tanh)
        return images

    @staticmethod
    @once_differentiable
    def backward(ctx, d_images):
        d_images = d_images.contiguous(memory_format=ctx.form["memory_format"])
        d_patches = torch.empty(ctx.shape, dtype=ctx.dtype, **ctx.form)
        (patches,) = ctx.saved_tensors or (d_patches,)  # without tanh it is not read
        with torch.cuda.device_of(d_patches):
            _split_patches_kernel[ctx.grid](d_images, patches, d_patches, *ctx.sizes)
        return d_patches, *4 * (None,)


# ----------------------------------------------------------------------------------------------------------
# ψ (section 2, "a cropping transformation"), from the images as they are stored
# ----------------------------------------------------------------------------------------------------------


def crop_patches(
    images: torch.Tensor,
    index: torch.Tensor,
    top: torch.Tensor,
    left: torch.Tensor,
    height: int,
    width: int,
    *,
    mirror: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> torch.Tensor:
    """ψ: cut a macro patch out of each of B stored images, round the border where it reaches beyond.

    Args:
        images: (n, H, W, 3) uint8, contiguous. Only the pixels cut out are read.
        index: (B,) int64, numbers of images, 0 … n-1. Others PyTorch reports as it does on the device; the
            kernel, which cannot wait to tell, makes NaN of their patches.
        top, left: (B,) int64, pixels, modulo H and W.
        height, width: of a macro patch, pixels, in 1 … H and 1 … W.
        mirror: (B,) bool, which patches to turn left to right, once cut out; none by default.
        dtype: of the result, float32, bfloat16 or float16.
    Returns: (B, 3, height, width) in [-1, 1], channels last in memory.
    Raises: ValueError for other shapes, types or devices.
    Gradients: none.
    Source: section 2.
    """
    if images.dim() != 4 or images.shape[3] != 3 or not images.is_contiguous():
        raise ValueError(f"images has the shape {tuple(images.shape)}; give (n, H, W, 3), contiguous")
    n, H, W, _ = images.shape
    if not (1 <= height <= H and 1 <= width <= W):
        raise ValueError(f"a patch of {height} x {width} pixels is not inside an image of {H} x {W}")
    _check_type("images", images.dtype, torch.uint8)
    _check_type("dtype", dtype, *TYPES)
    for name, tensor in (("index", index), ("top", top), ("left", left)):
        _check(name, tensor, (index.numel(),), images.device, torch.int64)
    if mirror is not None:
        _check("mirror", mirror, (index.numel(),), images.device, torch.bool)
    if not (_use_triton(impl, images) and n and index.numel()):
        return _crop_patches_torch(images, index, top, left, height, width, mirror, dtype)
    shape, form = (len(index), 3, height, width), torch.channels_last
    patches = torch.empty(shape, dtype=dtype, device=images.device, memory_format=form)
    BLOCK_J = min(_power_of_2(3 * width), TILE)
    BLOCK_Y = min(_power_of_2(height), TILE // BLOCK_J)
    tiles = _cdiv(height, BLOCK_Y)
    place = [t.contiguous() for t in (index, top, left, index if mirror is None else mirror.byte())]
    with torch.cuda.device_of(images):
        _crop_patches_kernel[len(index) * tiles, _cdiv(3 * width, BLOCK_J)](
            images, patches, *place, n, H, W, height, width, tiles, mirror is not None, BLOCK_Y, BLOCK_J
        )
    return patches


def _crop_patches_torch(images, index, top, left, height, width, mirror, dtype):
    # The kernel moves 5 bytes a value: it reads 1 and writes 4. PyTorch reads and writes 1, reads 1 and
    # writes 4, reads and writes 4, and works out three indices of 8 bytes for each pixel.
    _, H, W, _ = images.shape
    x = torch.arange(width, device=images.device)
    if mirror is not None:
        x = torch.where(mirror.view(-1, 1, 1), width - 1 - x, x)
    columns = (left.view(-1, 1, 1) + x) % W
    rows = (top.view(-1, 1, 1) + torch.arange(height, device=images.device).view(-1, 1)) % H
    crop = images[index.view(-1, 1, 1), rows, columns]  # (B, height, width, 3)
    return (crop.permute(0, 3, 1, 2) / 127.5 - 1).to(dtype)


@_jit
def _crop_patches_kernel(images_ptr, patches_ptr, index_ptr, top_ptr, left_ptr, mirror_ptr, n, H, W, height,
                         width, tiles, MIRROR: tl.constexpr, BLOCK_Y: tl.constexpr,
                         BLOCK_J: tl.constexpr):  # fmt: skip
    """BLOCK_Y rows of BLOCK_J values, three a pixel, of one macro patch."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    y = tl.program_id(0) % tiles * BLOCK_Y + tl.arange(0, BLOCK_Y)[:, None]
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
    mask = (y < height) & (j < 3 * width)
    x = j // 3
    if MIRROR:
        x = tl.where(tl.load(mirror_ptr + b) != 0, width - 1 - x, x)
    # % of a negative number is negative here. Both terms of a sum are below H or W, so once less is enough.
    row = y + ((tl.load(top_ptr + b) % H + H) % H).to(tl.int32)
    column = x + ((tl.load(left_ptr + b) % W + W) % W).to(tl.int32)
    row = tl.where(row < H, row, row - H)
    column = tl.where(column < W, column, column - W)
    image = tl.load(index_ptr + b)
    known = (image >= 0) & (image < n)
    pixel = (tl.where(known, image, 0) * H + row) * W + column  # of 64 bits, like image
    value = tl.div_rn(tl.load(images_ptr + pixel * 3 + j % 3, mask, other=0).to(tl.float32), 127.5) - 1
    value = tl.where(known, value, float("nan"))
    tl.store(patches_ptr + (b * height + y) * 3 * width + j, value.to(patches_ptr.dtype.element_ty), mask)


# ----------------------------------------------------------------------------------------------------------
# Verification and timing: python kernels.py
# ----------------------------------------------------------------------------------------------------------


# G of celeba128: what its four CBN get for 128 samples of 4 micro patches.
LAYERS = (512, 512, 4, 4), (512, 256, 8, 8), (512, 128, 16, 16), (512, 64, 32, 32)


SMALL = (3, 65, 5, 7), (7, 5, 1, 1)


def verify(device: str, impl: str, shapes: tuple = SMALL) -> None:
    """Compare outputs, gradients and running statistics with float64; AssertionError if any is off."""

    def compare(function, tensors, dtype, /, **options):
        results = []
        for how, convert in ((impl, torch.Tensor.clone), ("torch", torch.Tensor.double)):
            inputs = [convert(t) for t in tensors]
            leaves = [t.requires_grad_() for t in inputs if t.dim() > 1]
            y = function(*inputs, **options, impl=how)
            weights = torch.arange(y.numel(), device=device).sin().view(y.shape)
            gradients = torch.autograd.grad((y * weights).sum(), leaves)
            results.append([y, *gradients, *(t for t in inputs if t.dim() == 1)])
        for ours, true in zip(*results):
            error = (ours - true).abs().max() / (1 + true.abs().max()) / torch.finfo(dtype).eps
            name = f"{function.__name__}, {dtype}, {tuple(tensors[0].shape)}"
            limit = 4 + tensors[0][0, 0].numel() / 16  # more for sums over more positions
            assert error < limit, f"{name}: wrong by {error:.1f} roundings of the largest value"

    types = TYPES if impl == "triton" else TYPES[:1]  # PyTorch rounds on the way too
    rng = torch.Generator(device).manual_seed(0)  # the caller's stays as it is
    noise = functools.partial(torch.randn, generator=rng, device=device)
    for dtype in types:
        for (B, C, h, w), channels_last in itertools.product(shapes, (True, False)):
            form = dict(dtype=dtype, memory_format=_format(channels_last))
            kind = dtype if channels_last else torch.float32  # that of γ and β, with autocast and without
            channels = noise(2, B, C).to(kind)
            running = torch.zeros(C, device=device), torch.ones(C, device=device)
            tensors = noise(B, C, h, w).to(**form), *channels, *running
            # Of millions of values some are so near 0 that rounding decides whether the ReLU lets them pass.
            compare(conditional_batch_norm, tensors, dtype, training=True, relu=B < 8)
            patches = noise(2 * 3 * B, 3, w, w).to(**form)
            compare(merge_patches, (patches,), dtype, rows=2, columns=3, tanh=True, dtype=torch.float32)
    images = torch.randint(256, (3, 17, 23, 3), dtype=torch.uint8, generator=rng, device=device)
    place = torch.tensor([[2, 0, 1], [-5, 3, 16], [22, -1, 7]], device=device)
    turn = torch.tensor([True, False, True], device=device)
    ours, true = (crop_patches(images, *place, 9, 13, mirror=turn, impl=how) for how in (impl, "torch"))
    assert torch.equal(ours, true), "crop_patches"


def timed(calls, repeats: int = 50) -> list[float]:
    """Microseconds a call, `repeats` times: calls on tensors of their own, replayed as one CUDA graph."""
    for _ in range(3):
        for call in calls:
            call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        _kept = [call() for call in calls]  # let go, they would all lie at one address
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats + 5)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [1000 * start.elapsed_time(end) / len(calls) for start, end in events[5:]]


def cases(dtype: torch.dtype, device: str = "cuda"):
    """What to time: function, reference, shape, bytes to move forward and backward, options, inputs."""

    def noise(*shape):
        x = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
        return x.requires_grad_()

    def cbn_inputs(B, C, h, w):
        channels = [torch.randn(B, C, dtype=dtype, device=device).requires_grad_() for _ in range(2)]
        return noise(B, C, h, w), *channels, torch.zeros(C, device=device), torch.ones(C, device=device)

    # The last shape of each function makes tensors larger than any cache.
    pair = conditional_batch_norm, _conditional_batch_norm_torch
    for shape in (*LAYERS, (4096, 64, 32, 32)):
        x = math.prod(shape) * dtype.itemsize
        yield *pair, shape, (3 * x, 5 * x), dict(training=True, momentum=0.1, eps=1e-5, relu=True), cbn_inputs
    for shape in ((512, 3, 32, 32), (65_536, 3, 32, 32)):
        x, y = math.prod(shape) * dtype.itemsize, math.prod(shape) * 4
        options = dict(rows=2, columns=2, tanh=True, dtype=torch.float32)
        yield merge_patches, _merge_patches_torch, shape, (x + y, 2 * x + y), options, lambda *s: (noise(*s),)

    n = 20_000
    images = torch.randint(256, (n, 128, 128, 3), dtype=torch.uint8, device=device)

    def crop_inputs(B, *_):
        return images, *(torch.randint(end, (B,), device=device) for end in (n, 128, 128))

    for shape in ((128, 3, 64, 64), (16_384, 3, 64, 64)):
        options = dict(height=64, width=64, mirror=None, dtype=torch.float32)
        yield crop_patches, _crop_patches_torch, shape, (5 * math.prod(shape),), options, crop_inputs


def benchmark(dtype: torch.dtype) -> list[dict]:
    """Time all cases in eager and compiled PyTorch and by the kernels; print a table, return all figures."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    source = torch.randint(256, (2**30,), dtype=torch.uint8, device="cuda")
    times = timed([source.clone])
    copied = 2 * source.numel() / statistics.median(times)  # bytes a microsecond
    rows = [dict(name="copy", bytes=2 * source.numel(), microseconds=times)]
    print(f"copying moves {copied / 1e6:.2f} TB/s, reading and writing; L2 cache {cache / 2**20:.0f} MiB")
    print(f"{dtype}; microseconds: median (10th to 90th percentile), share of that; * fits into the cache")
    for function, reference, shape, moved, options, inputs in cases(dtype):
        torch._dynamo.reset()
        impls = dict(eager=reference, compile=torch.compile(reference, dynamic=False))
        impls["triton"] = functools.partial(function, impl="triton")
        # So many that no call finds its tensors in the cache.
        sets = [inputs(*shape) for _ in range(max(2, min(64, 4 * cache // moved[0])))]
        leaves = [[t for t in one if t.requires_grad] for one in sets]
        for direction, count in zip(("forward", "backward"), moved):
            line = f"{function.__name__} {'x'.join(map(str, shape))} {direction}{' *' * (count < cache)}"
            for impl, run in impls.items():
                calls = [functools.partial(run, *one, **options) for one in sets]
                if direction == "backward":
                    results = [(y := call(), torch.randn_like(y)) for call in calls]
                    back = functools.partial(torch.autograd.grad, retain_graph=True)
                    calls = [functools.partial(back, y, x, dy) for (y, dy), x in zip(results, leaves)]
                times = timed(calls)
                low, *_, high = statistics.quantiles(times, n=10)
                middle = statistics.median(times)
                line += f"  {impl} {middle:.1f} ({low:.1f} to {high:.1f}) {count / middle / copied:.0%}"
                row = dict(name=function.__name__, shape=shape, direction=direction, impl=impl, bytes=count)
                rows.append(row | dict(microseconds=times, median=middle, share=count / middle / copied))
            print(line, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Verify the kernels and, on a GPU, time them.")
    parser.add_argument("--json", metavar="FILE", help="write all figures down")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    args = parser.parse_args()
    gpu = triton is not None and torch.cuda.is_available()
    impl = "triton" if gpu or _interpreted() else "torch"
    verify("cuda" if gpu else "cpu", impl, SMALL + (LAYERS if gpu else ()))
    print({"triton": "the kernels agree", "torch": "the PyTorch references agree"}[impl] + " with float64")
    if not gpu:
        nothing = "nothing is timed" + (f", and {args.json} is not written" if args.json else "")
        print(f"there is no GPU{'' if triton else ', and no Triton'} here, so {nothing}")
        return
    about = dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__)
    about |= dict(cuda=torch.version.cuda, date=datetime.date.today().isoformat(), command=" ".join(sys.argv))
    print(about)
    from torch._functorch import config

    # Graphs are not captured on the default stream; and compiled code is to go backward more than once.
    with torch.cuda.stream(torch.cuda.Stream()), config.patch(donated_buffer=False):
        rows = benchmark(getattr(torch, args.dtype))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(about | dict(rows=rows), file, indent=1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
