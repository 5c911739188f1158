"""COCO-GAN's hot operations as Triton kernels, each with its PyTorch reference implementation.

    python kernels.py                       # compare the kernels (without a GPU the references) with float64
    TRITON_INTERPRET=1 python kernels.py    # the kernels on a CPU, in Triton's interpreter

This file needs only PyTorch, uses Triton where it is installed, and can be copied into another project.

    impl="auto"      kernels for float32, bfloat16 and float16 on a GPU, if they work there; else PyTorch
    impl="torch"     the reference, on any device, also for float64
    impl="triton"    kernels or ValueError; on a CPU only if TRITON_INTERPRET=1 before Triton is imported

Inputs may be contiguous or channels last, and so is the result; other layouts are copied. Kernels compute in
float32 and have first derivatives only: to differentiate these raises RuntimeError. The same input gives the
same bits: there are no atomics, and block sizes follow from shapes, not from autotuning. Nothing waits for
the GPU. Source: Lin et al., "COCO-GAN: Generation by Parts via Conditional Coordinating", ICCV 2019.
"""

from __future__ import annotations

import functools
import os
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

DEFAULT = "auto"  # what impl="auto" means everywhere
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"  # the kernels run on a CPU
TYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 2048  # values that a program of four warps works on at a time: 16 a thread, which fit its registers
_jit = triton.jit if triton else lambda function: function


def _use_triton(impl: str, tensor: torch.Tensor, *types: torch.dtype) -> bool:
    """Whether the kernels do the work; ValueError where `impl` is unknown or cannot run."""
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl is {impl!r}; give 'auto', 'torch' or 'triton'")
    runs, fits = triton is not None and (tensor.is_cuda or INTERPRETED), {*types} <= {*TYPES}
    impl = DEFAULT if impl == "auto" and runs else impl
    if impl == "triton" and not (runs and fits):
        found = f"{' and '.join(map(str, types))} on {tensor.device}" if triton else "Triton is not installed"
        allowed = "float32, bfloat16 or float16 on a GPU, or on a CPU with TRITON_INTERPRET=1"
        raise ValueError(f"impl is 'triton': {found}; the kernels take {allowed}")
    return impl == "triton" or (impl == "auto" and runs and fits and tensor.is_cuda and not failure("cuda"))


@functools.cache
def failure(device: str) -> str | None:
    """Why the kernels do not work on the device, or None. Triton may lack a C compiler, for example."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            verify(device, "triton")
    except Exception as error:  # of Triton, and of everything that it calls
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"Triton's kernels do not work here ({why}); PyTorch does their work")
        return why


def _check(name: str, tensor: torch.Tensor, shape: tuple, device: torch.device, *types: torch.dtype) -> None:
    if (tensor.shape, tensor.device) != (shape, device) or tensor.dtype not in types:
        found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        allowed = " or ".join(map(str, dict.fromkeys(types)))
        raise ValueError(f"{name} is {found}; give {tuple(shape)} {allowed} on {device}")


def _format(x: torch.Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


class _FirstOrder(torch.autograd.Function):
    """Calls backward(ctx, dy, *saved), which autograd cannot look into; an error where it would have to."""

    @staticmethod
    def forward(_, backward, ctx, dy, *saved):
        return backward(ctx, dy, *saved)

    @staticmethod
    def backward(*_):
        raise RuntimeError("the kernels have no second derivative; impl='torch' can be differentiated again")


def _first_order(backward):
    return lambda ctx, dy: _FirstOrder.apply(backward, ctx, dy, *ctx.saved_tensors)


# ---- Conditional batch normalization (appendix C) --------------------------------------------------------
# A convolution follows its ReLU in G. The ×2 upsampling and the residual addition follow other convolutions
# and cannot be fused into it.
class ConditionalBatchNorm(nn.Module):
    """o = γ(z, c'') · (i - μ) / σ + β(z, c''), with γ and β linear in the condition (appendix C).

    Deviation: the paper says MLPs. One linear map each, not spectrally normalized, as its authors released.
    γ starts at 1 and β at 0 on average, not for every z and c'': from exactly 1 and 0, faces stayed blurred
    and seamed for longer.
    """

    def __init__(self, channels: int, condition: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(2 * channels, condition)))
        self.bias = nn.Parameter(torch.cat([torch.ones(channels), torch.zeros(channels)]))

    def forward(self, x: torch.Tensor, condition: torch.Tensor, relu: bool = False) -> torch.Tensor:
        """(B, C, h, w), (B, condition) -> (B, C, h, w)."""
        affine = F.linear(condition, self.weight, self.bias).to(x.dtype)
        gamma, beta = affine.chunk(2, dim=1)  # (B, C) each
        norm = self.norm
        if self.training:
            norm.num_batches_tracked.add_(1)
        how = dict(training=self.training, momentum=norm.momentum, eps=norm.eps, relu=relu)
        return conditional_batch_norm(x, gamma, beta, norm.running_mean, norm.running_var, **how)


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
    are updated in place as torch.nn.BatchNorm2d does it; else μ and σ² are the running statistics.

    Args:
        x: (B, C, h, w), float32, bfloat16 or float16 (float64: PyTorch only).
        gamma, beta: (B, C), both float32 or both of x's type, any strides.
        running_mean, running_var: (C,), float32 (float64 with x); the variance is the unbiased one.
        momentum: the weight of the new statistics, in [0, 1].
    Returns: (B, C, h, w), type and memory format of x. Raises: ValueError for other shapes, types or devices.
    Source: appendix C; Ioffe and Szegedy, "Batch Normalization", 2015.
    """
    if x.dim() != 4 or (training and x.numel() < 2 * x.shape[1]):
        raise ValueError(f"x is {tuple(x.shape)}; give (B, C, h, w), in training two values a channel")
    use_triton, work = _use_triton(impl, x, x.dtype), torch.promote_types(x.dtype, torch.float32)
    _check("gamma", gamma, x.shape[:2], x.device, work, x.dtype)
    _check("beta", beta, x.shape[:2], x.device, gamma.dtype)
    _check("running_mean", running_mean, x.shape[1:2], x.device, work)
    _check("running_var", running_var, x.shape[1:2], x.device, work)
    if use_triton and x.numel():
        return _CBN.apply(x, gamma, beta, running_mean, running_var, training, momentum, eps, relu)
    # In sizes of x, eager PyTorch moves 9: batch_norm reads x twice and writes; product, sum and ReLU each
    # read and write. The kernels move 3: they read x twice (once with given statistics; the second time from
    # the L2 cache if x fits) and write. Backward they move 5: they read x and dy twice and write dx.
    x_hat = F.batch_norm(x, running_mean, running_var, None, None, training, momentum, eps)
    y = gamma[:, :, None, None] * x_hat + beta[:, :, None, None]
    return (F.relu(y) if relu else y).to(x.dtype)


# Forward: each sample's statistics by a kernel, the batch's from these by PyTorch, then normalizing.
#
# A program sums d = x - k and d², where k is the mean of its first tile, and σ² = Σd²/n - (Σd/n)². This loses
# little: if the first tile is a fraction f of the n values, σ² is at least f/(1-f) · (mean - k)², so Σd²/n is
# at most σ²/f and the relative error about ε/f; 1/f is the number of tiles. With a mean of 1,000 and a
# variance of 1, sums of x and x² would have no correct digits left.
#
# A tile is positions x channels in both memory formats. Triton compiles for the stride that is 1 and arranges
# the threads by it. p counts the HW = h·w positions of a sample. Addresses have 64 bits.


@_jit
def _statistics_kernel(x_ptr, mean_ptr, var_ptr, HW, C, stride_p, stride_c,
                       BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Mean and variance of BLOCK_C channels of one sample."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    k = tl.zeros([1, BLOCK_C], tl.float32)
    sum_d = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_dd = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(0, HW, BLOCK_P, num_stages=3):
        p = start + tl.arange(0, BLOCK_P)[:, None].to(tl.int64)
        mask = (p < HW) & (c < C)
        at = b * HW * C + p * stride_p + c.to(tl.int64) * stride_c
        x = tl.load(x_ptr + at, mask, other=0).to(tl.float32)
        if start == 0:
            k = tl.sum(x, 0, keep_dims=True) / tl.minimum(HW, BLOCK_P)
        d = tl.where(mask, x - k, 0)
        sum_d += d
        sum_dd += d * d
    mean_d = tl.sum(sum_d, 0, keep_dims=True) / HW
    var = tl.sum(sum_dd, 0, keep_dims=True) / HW - mean_d * mean_d
    tl.store(mean_ptr + b * C + c, k + mean_d, c < C)
    tl.store(var_ptr + b * C + c, tl.where(var < 0, 0, var), c < C)  # NaN stays NaN


# Backward. With rstd = 1/√(σ² + eps), n = B·h·w and g = dL/dy, made 0 where the ReLU gave 0 (found from x),
#
#     y = γ x̂ + β         gives  dβ[b, c] = Σ_p g,  dγ[b, c] = Σ_p g x̂,  a = dL/dx̂ = γ g
#     x̂ = (x - μ) rstd    gives  ∂x̂_j/∂x_i = rstd (δ_ij - 1/n - x̂_i x̂_j / n),
#
# the second term through μ, the third through σ². So dx = rstd (a - mean_a - x̂ mean_ax), and the means of a
# and a x̂ over a channel follow from dβ and dγ, which are needed anyway:
#
#     mean_a = Σ a / n = Σ_b γ dβ / n,  mean_ax = Σ a x̂ / n = Σ_b γ dγ / n.
#
# A kernel sums over positions, PyTorch over samples, a kernel makes dx. Means are 0 if statistics are given.


@_jit
def _gradient_sums_kernel(x_ptr, dy_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, dgamma_ptr, dbeta_ptr,
                          HW, C, stride_p, stride_c, gamma_stride_b, eps,
                          RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """dγ and dβ of BLOCK_C channels of one sample."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    gamma = tl.load(gamma_ptr + b * gamma_stride_b + c, c < C).to(tl.float32)
    beta = tl.load(beta_ptr + b * gamma_stride_b + c, c < C).to(tl.float32)
    mean, rstd = tl.load(mean_ptr + c, c < C), tl.rsqrt(tl.load(var_ptr + c, c < C) + eps)
    sum_gx = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_g = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(0, HW, BLOCK_P, num_stages=3):
        p = start + tl.arange(0, BLOCK_P)[:, None].to(tl.int64)
        mask = (p < HW) & (c < C)
        at = b * HW * C + p * stride_p + c.to(tl.int64) * stride_c
        x_hat = (tl.load(x_ptr + at, mask, other=0).to(tl.float32) - mean) * rstd
        g = tl.load(dy_ptr + at, mask, other=0).to(tl.float32)
        if RELU:
            g = tl.where(x_hat * gamma + beta <= 0, 0, g)  # where y is NaN the gradient passes, as in PyTorch
        sum_gx += g * x_hat
        sum_g += g
    tl.store(dgamma_ptr + b * C + c, tl.sum(sum_gx, 0, keep_dims=True), c < C)
    tl.store(dbeta_ptr + b * C + c, tl.sum(sum_g, 0, keep_dims=True), c < C)


@_jit
def _normalise_kernel(x_ptr, dy_ptr, out_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, mean_ax_ptr, mean_a_ptr,
                      HW, C, stride_p, stride_c, gamma_stride_b, eps, BACKWARD: tl.constexpr,
                      RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """One tile of one sample: y = γ x̂ + β, or BACKWARD dx = rstd (a - mean_a - x̂ mean_ax)."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None].to(tl.int64)
    mask = (p < HW) & (c < C)
    at = b * HW * C + p * stride_p + c.to(tl.int64) * stride_c
    gamma = tl.load(gamma_ptr + b * gamma_stride_b + c, c < C).to(tl.float32)
    beta = tl.load(beta_ptr + b * gamma_stride_b + c, c < C).to(tl.float32)
    mean, rstd = tl.load(mean_ptr + c, c < C), tl.rsqrt(tl.load(var_ptr + c, c < C) + eps)
    x_hat = (tl.load(x_ptr + at, mask, other=0).to(tl.float32) - mean) * rstd
    out = x_hat * gamma + beta
    if BACKWARD:
        g = tl.load(dy_ptr + at, mask, other=0).to(tl.float32)
        if RELU:
            g = tl.where(out <= 0, 0, g)
        mean_a, mean_ax = tl.load(mean_a_ptr + c, c < C), tl.load(mean_ax_ptr + c, c < C)
        out = rstd * (gamma * g - mean_a - x_hat * mean_ax)
    elif RELU:
        out = tl.where(out < 0, 0, out)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask)


def _arrange(x, gamma, beta):
    """The tensors as the kernels read them, x's format, the grid, sizes and strides, and a tile."""
    form = _format(x[:1])  # samples may lie apart in memory
    x = x.contiguous(memory_format=form)
    if gamma.stride() != beta.stride() or gamma.stride(1) != 1:
        gamma, beta = gamma.contiguous(), beta.contiguous()
    (B, C), HW = gamma.shape, x[0, 0].numel()
    BLOCK_C = min(triton.next_power_of_2(C), 64)  # 64 values of bfloat16 are a cache line
    BLOCK_P = min(triton.next_power_of_2(HW), TILE // BLOCK_C)
    grid = B, triton.cdiv(C, BLOCK_C), triton.cdiv(HW, BLOCK_P)
    strides = (C, 1) if form == torch.channels_last else (1, HW)  # of positions and channels
    return x, (gamma, beta), form, grid, (HW, C, *strides, gamma.stride(0)), (BLOCK_P, BLOCK_C)


class _CBN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *given, running_mean, running_var, training, momentum, eps, relu = args
        x, channels, form, grid, sizes, tile = _arrange(*given)
        y, n = torch.empty_like(x, memory_format=form), x[:, 0].numel()
        mean, var = running_mean.contiguous(), running_var.contiguous()
        with torch.cuda.device_of(x):
            if training:
                means, variances = mean.new_empty(2, *channels[0].shape)  # (B, C) each
                _statistics_kernel[grid[:2]](x, means, variances, *sizes[:4], *tile)
                var, mean = torch.var_mean(means, 0, correction=0)
                var += variances.mean(0)
                running_mean.lerp_(mean, momentum)
                running_var.lerp_(var * (n / (n - 1)), momentum)
            statistics = mean, var, mean, var  # the last two are read backward only
            _normalise_kernel[grid](x, x, y, *channels, *statistics, *sizes, eps, False, relu, *tile)
        ctx.save_for_backward(*given, mean, var)
        ctx.options = training, eps, relu
        return y

    @staticmethod
    @_first_order
    def backward(ctx, dy, x, gamma, beta, mean, var):  # autograd has chosen the device
        training, eps, relu = ctx.options
        x, (gamma, beta), form, grid, sizes, tile = _arrange(x, gamma, beta)
        dy, known = dy.contiguous(memory_format=form), (gamma, beta, mean, var)
        dx, sums = torch.empty_like(dy), mean.new_empty(2, *gamma.shape)  # dγ and dβ
        _gradient_sums_kernel[grid[:2]](x, dy, *known, *sums, *sizes, eps, relu, *tile)
        means = (gamma * sums).sum(1) / x[:, 0].numel() if training else mean.new_zeros(2, len(mean))
        _normalise_kernel[grid](x, dy, dx, *known, *means, *sizes, eps, True, relu, *tile)
        return dx, *sums.to(gamma.dtype), *6 * (None,)


# ---- φ (section 2, "a concatenation function") -----------------------------------------------------------
def merge_patches(
    patches: torch.Tensor,
    rows: int,
    columns: int,
    *,
    tanh: bool = False,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """φ: put micro patches side by side, without overlap, after taking their tanh if asked to.

    Args:
        patches: (B·rows·columns, C, S, S), float32, bfloat16 or float16 (float64: PyTorch only). Patch
            b·rows·columns + n·columns + m is in row n and column m of image b.
        dtype: of the result; that of the patches by default.
    Returns: (B, C, rows·S, columns·S), in the memory format of the patches.
    Raises: ValueError for other shapes or types. Source: section 2; figure 13a for the tanh.
    """
    if patches.dim() != 4 or patches.shape[2] != patches.shape[3]:
        raise ValueError(f"patches is {tuple(patches.shape)}; give (B·rows·columns, C, S, S)")
    if min(rows, columns) < 1 or len(patches) % (rows * columns):
        raise ValueError(f"{len(patches)} patches make no images of {rows} rows and {columns} columns")
    dtype = dtype or patches.dtype
    if _use_triton(impl, patches, patches.dtype, dtype) and patches.numel():
        return _MergePatches.apply(patches, rows, columns, tanh, dtype)
    # From bfloat16 by tanh to float32, PyTorch moves 22 bytes a value: it reads 2 and writes 4, then reads
    # and writes 4 twice. The kernel moves 6, and backward 8: it reads 4 and 2 and writes 2.
    C, S = patches.shape[1:3]
    if tanh:
        patches = torch.tanh(patches.to(torch.promote_types(patches.dtype, torch.float32)))
    patches = patches.to(dtype)
    if _format(patches) == torch.channels_last:
        images = patches.permute(0, 2, 3, 1).reshape(-1, rows, columns, S, S, C)
        images = images.permute(0, 1, 3, 2, 4, 5)  # (B, rows, S, columns, S, C)
        return images.reshape(-1, rows * S, columns * S, C).permute(0, 3, 1, 2)
    patches = patches.reshape(-1, rows, columns, C, S, S)
    images = patches.permute(0, 3, 1, 4, 2, 5)  # (B, C, rows, S, columns, S)
    return images.reshape(-1, C, rows * S, columns * S)


# In both formats runs of values stay together: patches are (B, N, M, planes, S, run) and images (B, planes,
# N, S, M, run), with one plane and runs of S·C if channels last, else C planes and runs of S. The S·M runs of
# one row of patches, in one plane, lie side by side in the image; a program moves some of them.
# |tanh x| is (1 - e) / (1 + e) with e = exp(-2|x|), or its series where that difference would cancel. The
# derivative is 4 e / (1 + e)², exact where 1 - tanh² x has no digits left; so x is saved for it, not tanh x.


@_jit
def _merge_patches_kernel(patches_ptr, images_ptr, d_patches_ptr, planes, N, M, S, run, TANH: tl.constexpr,
                          BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BACKWARD: tl.constexpr):  # fmt: skip
    """Images from patches, or BACKWARD the gradient of patches from that of images."""
    row = tl.program_id(0)  # (b·planes + plane)·N + n
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]  # y·M + m
    mask = (t < S * M) & (r < run)
    patch = (row // N // planes * N + row % N).to(tl.int64) * M + t % M
    in_patches = ((patch * planes + row // N % planes) * S + t // M) * run + r
    in_images = (row.to(tl.int64) * S * M + t) * run + r
    x = tl.load(patches_ptr + in_patches, mask, other=0).to(tl.float32)
    e, xx = tl.exp(-2 * tl.abs(x)), x * x
    if BACKWARD:
        d = tl.load(images_ptr + in_images, mask, other=0).to(tl.float32)
        if TANH:
            d *= 4 * e / ((1 + e) * (1 + e))
        tl.store(d_patches_ptr + in_patches, d.to(d_patches_ptr.dtype.element_ty), mask)
    else:
        if TANH:
            far = (1 - e) / (1 + e)
            series = x * (1 + xx * (-1 / 3 + xx * (2 / 15 + xx * (-17 / 315 + xx * (62 / 2835)))))
            x = tl.where(xx < 1 / 16, series, tl.where(x < 0, -far, far))
        tl.store(images_ptr + in_images, x.to(images_ptr.dtype.element_ty), mask)


class _MergePatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, patches, rows, columns, tanh, dtype):
        ctx.save_for_backward(patches)
        ctx.form, (count, C, S, _) = _format(patches), patches.shape
        patches = patches.contiguous(memory_format=ctx.form)
        shape = count // (rows * columns), C, rows * S, columns * S
        images = torch.empty(shape, dtype=dtype, device=patches.device, memory_format=ctx.form)
        planes, run = (1, S * C) if ctx.form == torch.channels_last else (C, S)
        BLOCK_R = min(triton.next_power_of_2(run), TILE)
        BLOCK_T = min(triton.next_power_of_2(S * columns), TILE // BLOCK_R)
        ctx.grid = count // columns * planes, triton.cdiv(run, BLOCK_R), triton.cdiv(S * columns, BLOCK_T)
        ctx.sizes = planes, rows, columns, S, run, tanh, BLOCK_T, BLOCK_R
        with torch.cuda.device_of(patches):
            _merge_patches_kernel[ctx.grid](patches, images, patches, *ctx.sizes, False)
        return images

    @staticmethod
    @_first_order
    def backward(ctx, d_images, patches):
        patches, d_images = (t.contiguous(memory_format=ctx.form) for t in (patches, d_images))
        d_patches = torch.empty_like(patches, memory_format=ctx.form)
        _merge_patches_kernel[ctx.grid](patches, d_images, d_patches, *ctx.sizes, True)
        return d_patches, *4 * (None,)


# ---- ψ (section 2, "a cropping transformation"), from the images as they are stored ----------------------
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
    """ψ: cut a macro patch out of each of B stored images, wrapped where it crosses the border.

    Args:
        images: (n, H, W, 3) uint8, contiguous. Only the pixels of the patches are read.
        index: (B,) int64, in 0 … n-1. Others raise in PyTorch; the kernel returns NaN without waiting.
        top, left: (B,) int64, pixels, modulo H and W.
        height, width: of a macro patch, pixels, in 1 … H and 1 … W.
        mirror: (B,) bool, which patches to flip left to right after cutting; none by default.
    Returns: (B, 3, height, width) in [-1, 1], float32, bfloat16 or float16, channels last, without gradients.
    Raises: ValueError for other shapes, types or devices. Source: section 2.
    """
    if images.dim() != 4 or not images.is_contiguous():
        raise ValueError(f"images is {tuple(images.shape)}; give (n, H, W, 3), contiguous")
    (n, H, W, _), B = images.shape, len(index)
    mirror = torch.zeros_like(index, dtype=torch.bool) if mirror is None else mirror
    _check("images", images, (n, H, W, 3), images.device, torch.uint8)
    for name, tensor in (("index", index), ("top", top), ("left", left)):
        _check(name, tensor, (B,), images.device, torch.int64)
    _check("mirror", mirror, (B,), images.device, torch.bool)
    if not (1 <= height <= H and 1 <= width <= W):
        raise ValueError(f"a patch of {height} x {width} pixels is not inside an image of {H} x {W}")
    if _use_triton(impl, images, dtype) and n and B:
        patches = torch.empty(B, height, width, 3, dtype=dtype, device=images.device)
        BLOCK_J = min(triton.next_power_of_2(3 * width), TILE)
        BLOCK_Y = min(triton.next_power_of_2(height), TILE // BLOCK_J)
        grid = B, triton.cdiv(3 * width, BLOCK_J), triton.cdiv(height, BLOCK_Y)
        places = [t.contiguous() for t in (index, top, left, mirror.byte())]
        with torch.cuda.device_of(images):
            _crop_patches_kernel[grid](images, patches, *places, n, H, W, height, width, BLOCK_Y, BLOCK_J)
        return patches.permute(0, 3, 1, 2)
    # The kernel moves 5 bytes a value: it reads 1 and writes 4. PyTorch reads and writes 1, reads 1 and
    # writes 4, reads and writes 4, and computes three indices of 8 bytes for each pixel.
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    index, top, left, mirror = (t.view(-1, 1, 1) for t in (index, top, left, mirror))
    columns = (left + torch.where(mirror, width - 1 - x, x)) % W  # (B, 1, width)
    crop = images[index, (top + y[:, None]) % H, columns]  # (B, height, width, 3)
    return (crop.permute(0, 3, 1, 2) / 127.5 - 1).to(dtype)


@_jit
def _crop_patches_kernel(images_ptr, patches_ptr, index_ptr, top_ptr, left_ptr, mirror_ptr, n, H, W, height,
                         width, BLOCK_Y: tl.constexpr, BLOCK_J: tl.constexpr):  # fmt: skip
    """BLOCK_Y rows of BLOCK_J values, three a pixel, of one macro patch."""
    b = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
    y = tl.program_id(2) * BLOCK_Y + tl.arange(0, BLOCK_Y)[:, None]
    mask = (y < height) & (j < 3 * width)
    x = tl.where(tl.load(mirror_ptr + b) != 0, width - 1 - j // 3, j // 3)
    row = (((tl.load(top_ptr + b) % H + H) % H).to(tl.int32) + y) % H  # % of a negative number is negative
    column = (((tl.load(left_ptr + b) % W + W) % W).to(tl.int32) + x) % W
    image = tl.load(index_ptr + b)
    known = (image >= 0) & (image < n)
    pixel = (tl.where(known, image, 0) * H + row) * W + column  # of 64 bits, like image
    value = tl.div_rn(tl.load(images_ptr + pixel * 3 + j % 3, mask, other=0).to(tl.float32), 127.5) - 1
    value = tl.where(known, value, float("nan"))
    tl.store(patches_ptr + (b * height + y) * 3 * width + j, value.to(patches_ptr.dtype.element_ty), mask)


def cut_bytes(images, index, top, left, height, width) -> torch.Tensor:
    """Patches of images (n, H, W, 3), as `crop_patches` cuts them, but uint8: (B, height, width, 3)."""
    H, W, patches = *images.shape[1:3], torch.empty(len(index), height, width, 3, dtype=torch.uint8)
    for patch, i, y, x in zip(patches, index.tolist(), (top % H).tolist(), (left % W).tolist()):
        h, w = min(height, H - y), min(width, W - x)  # what is left of the border; the rest is beyond it
        for part, rows in ((patch[:h], images[i, y : y + h]), (patch[h:], images[i, : height - h])):
            part[:, :w], part[:, w:] = rows[:, x : x + w], rows[:, : width - w]
    return patches


# ---- Many tensors at once: casts, and spectral normalization ---------------------------------------------
class _Cast(torch.autograd.Function):
    """cast_tensors(dtype, *tensors): in another type, by one kernel instead of one for each."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        results = [torch.empty_like(t, dtype=dtype) for t in tensors]
        torch._foreach_copy_(results, tensors)
        return tuple(results)

    @staticmethod
    def backward(ctx, *gradients):
        return None, *_Cast.apply(torch.float32, *gradients)


class _Normalize(torch.autograd.Function):
    """normalize(v, *weights): each W/σ, σ = ‖W v‖. For v constant, ∂σ/∂W = u vᵀ with u = W v / σ.

    Autograd's formulas have half as many operations again, most of them on a few numbers.
    """

    @staticmethod
    def forward(ctx, v, *weights):
        Wv = [W.flatten(1) @ v_ for W, v_ in zip(weights, v)]
        sigma = torch._foreach_norm(Wv)
        ctx.save_for_backward(*weights, *v, *torch._foreach_div(Wv, sigma), *sigma)
        return tuple(torch._foreach_div(weights, sigma))

    @staticmethod
    @once_differentiable
    def backward(ctx, *dW_sn):  # dW = (dW_sn - ⟨dW_sn, W/σ⟩ u vᵀ) / σ
        n, saved = len(dW_sn), ctx.saved_tensors
        weights, v, u, sigma = (saved[k * n : (k + 1) * n] for k in range(4))
        along = torch._foreach_div([product.sum() for product in torch._foreach_mul(dW_sn, weights)], sigma)
        uv = [torch.outer(u_, v_).view_as(d) for u_, v_, d in zip(torch._foreach_mul(u, along), v, dW_sn)]
        return None, *torch._foreach_div(torch._foreach_sub(dW_sn, uv), sigma)


cast_tensors, normalize = _Cast.apply, _Normalize.apply


# ---- ReLU and pooling for D, whose gradient penalty differentiates a gradient ----------------------------
# Their second derivative is 0. PyTorch's own functions return it as zeros, which autograd carries through all
# of D: a tenth of the time of a step. Here it is None.
class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return None if dy is None else torch.ops.aten.threshold_backward(dy, y.detach(), 0)


class _AvgPool(torch.autograd.Function):
    """Means of 2 x 2 pixels, fewer at the end of an odd side."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.layout = x.shape, x.stride()
        return F.avg_pool2d(x, 2, ceil_mode=True)

    @staticmethod
    def backward(ctx, dy):
        if dy is not None:
            x = dy.new_empty_strided(*ctx.layout)  # its values are not read
            return torch.ops.aten.avg_pool2d_backward(dy, x, [2, 2], [2, 2], [0, 0], True, True, None)


relu, avg_pool = _ReLU.apply, _AvgPool.apply


# ---- CUDA graphs -----------------------------------------------------------------------------------------
def capture(step, warmup: int = 3):
    """Return a function like step(*tensors) -> tensor that becomes a CUDA graph, started as a whole.

    The first `warmup` calls are ordinary ones, in which libraries choose their algorithms, on a stream of
    their own, as graphs require. The next is captured, and from there on the graph is replayed on copies of
    the inputs: whatever changes must be in these, or in tensors that `step` updates in place.
    Raises: the function, RuntimeError where `step` cannot be captured; running out of memory as it is.
    """
    stream, graph, captured, calls = torch.cuda.Stream(), torch.cuda.CUDAGraph(), None, 0

    def run(*inputs):
        nonlocal captured, calls
        calls += 1
        if calls <= warmup:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                output = step(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return output
        if captured is None:
            copies = [t.clone() for t in inputs]
            try:
                with torch.cuda.graph(graph):
                    captured = copies, step(*copies)
            except RuntimeError as error:
                cause = error.__context__ or error  # to end a capture that failed may fail as well
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause
                why = (str(cause).strip() or type(cause).__name__).splitlines()[0]
                raise RuntimeError(f"the step cannot be captured as a CUDA graph: {why}") from error
        torch._foreach_copy_(captured[0], inputs)
        graph.replay()
        return captured[1].clone()

    return run


# ---- Verification: python kernels.py ---------------------------------------------------------------------
def verify(device: str, impl: str) -> None:
    """Compare outputs, gradients and running statistics with float64; AssertionError if any is off."""
    rng = torch.Generator(device).manual_seed(0)  # the caller's stays as it is
    noise = functools.partial(torch.randn, generator=rng, device=device)

    def results(impl, x, gamma, beta, mean, var, patches):
        leaves = [t.requires_grad_() for t in (x, gamma, beta, patches)]
        y = conditional_batch_norm(*leaves[:3], mean, var, training=True, relu=True, impl=impl)
        images = merge_patches(patches, 2, 3, tanh=True, impl=impl)
        loss = y.double().sin().sum() + images.double().sin().sum()
        return y, images, mean, var, *torch.autograd.grad(loss, leaves)

    for dtype in TYPES if impl == "triton" else TYPES[:1]:  # PyTorch rounds on the way too
        for form, kind in ((torch.channels_last, dtype), (torch.contiguous_format, torch.float32)):  # of γ, β
            x, patches = (noise(s).to(dtype, memory_format=form) for s in ((3, 65, 5, 7), (6, 3, 9, 9)))
            inputs = x, *noise(2, 3, 65).to(kind), *noise(2, 65).abs(), patches
            true, ours = results("torch", *(t.double() for t in inputs)), results(impl, *inputs)
            for name, a, b in zip(("y", "φ", "μ", "σ²", "dx", "dγ", "dβ", "dφ"), ours, true):
                error = (a - b).abs().max() / (1 + b.abs().max()) / torch.finfo(dtype).eps
                assert error < 6, f"{name} in {dtype} is wrong by {error:.1f} roundings of the largest value"
    images = torch.randint(256, (3, 17, 23, 3), dtype=torch.uint8, generator=rng, device=device)
    places = torch.tensor([[2, 0, 1], [-5, 3, 16], [22, -1, 7]], device=device)
    ours, true = (crop_patches(images, *places, 9, 13, mirror=places[0] > 0, impl=i) for i in (impl, "torch"))
    assert torch.equal(ours, true), "crop_patches is wrong"


if __name__ == "__main__":
    impl = "triton" if INTERPRETED or (triton and torch.cuda.is_available()) else "torch"
    verify("cuda" if torch.cuda.is_available() else "cpu", impl)
    print(f"the {'kernels' if impl == 'triton' else 'PyTorch references'} agree with float64")
