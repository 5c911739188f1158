"""COCO-GAN's hot operations as Triton kernels, each below its PyTorch reference implementation.

    python kernels.py                       # compare the kernels (without a GPU the references) with float64
    TRITON_INTERPRET=1 python kernels.py    # the kernels on a CPU, in Triton's interpreter

The file needs only PyTorch, uses Triton where it is installed, and can be copied into another project. In
conditional_batch_norm, merge_patches (φ) and crop_patches (ψ),

    impl="auto"     takes the kernels for float32, bfloat16 and float16 on a GPU, if they work; else PyTorch,
    impl="torch"    takes the reference, on any device, also for float64,
    impl="triton"   takes the kernels, on a CPU only if TRITON_INTERPRET=1 before Triton is imported.

Tensors may be contiguous or channels last, and results are what the input is; other layouts are copied. The
kernels compute in float32. They have first derivatives only: differentiating a gradient raises RuntimeError.
Without atomics and with block sizes that follow from shapes, not from autotuning, the same input gives the
same bits. Nothing waits for the GPU.

Source: Lin et al., "COCO-GAN: Generation by Parts via Conditional Coordinating", ICCV 2019.
"""

from __future__ import annotations

import functools
import itertools
import os
import warnings

import torch
import torch.nn.functional as F
from torch import nn

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

DEFAULT = "auto"  # what impl="auto" means everywhere
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on a CPU
TYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 4096  # values that a program of four warps works on at a time: 32 a thread, which fit its registers
PROGRAMS = 1024  # that share a sum: eight a multiprocessor of the largest GPUs, yet few partial sums


def _jit(function):
    # These arguments bound loops only. Triton would compile again for those that are 1 or multiples of 16.
    counts = ["B", "n", "splits", "span", "part_splits", "part_span", "tiles"]
    return triton.jit(function, do_not_specialize=counts) if triton else function


def _use_triton(impl: str, tensor: torch.Tensor, *types: torch.dtype) -> bool:
    """Whether the kernels do the work; ValueError where `impl` is unknown or cannot run."""
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl is {impl!r}; give 'auto', 'torch' or 'triton'")
    runs, fits = triton is not None and (tensor.is_cuda or INTERPRETED), {*types} <= {*TYPES}
    if impl == "auto" and runs:
        impl = DEFAULT
    if impl == "triton" and not (runs and fits):
        found = f"{' and '.join(map(str, types))} on {tensor.device}" if triton else "Triton is not installed"
        allowed = "float32, bfloat16 or float16 on a GPU, or on a CPU with TRITON_INTERPRET=1"
        raise ValueError(f"impl is 'triton': {found}; the kernels take {allowed}")
    if impl != "auto" or not (runs and fits and tensor.is_cuda):
        return impl == "triton"
    if why := failure("cuda"):
        warnings.warn(f"Triton's kernels do not work here ({why}); PyTorch does their work")
    return not why


@functools.cache
def failure(device: str) -> str | None:
    """Why the kernels do not work on the device, or None. Triton may lack a C compiler, for example."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
            verify(device, "triton", shapes=[(3, 65, 5, 7)])
    except Exception as error:  # of Triton, and of everything that it calls
        return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check(name: str, tensor: torch.Tensor, shape: tuple, device: torch.device, *types: torch.dtype) -> None:
    if (tensor.shape, tensor.device) != (shape, device) or tensor.dtype not in types:
        found = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        allowed = " or ".join(map(str, dict.fromkeys(types)))
        raise ValueError(f"{name} is {found}; give {tuple(shape)} {allowed} on {device}")


class _FirstOrder(torch.autograd.Function):
    """backward(ctx, dy, *saved), of which autograd sees that all of them matter, but not how."""

    @staticmethod
    def forward(_, backward, ctx, dy, *saved):
        return backward(ctx, dy, *saved)

    @staticmethod
    def backward(*_):
        raise RuntimeError("the kernels have no second derivative; impl='torch' can be differentiated again")


def _first_order(backward):
    return lambda ctx, dy: _FirstOrder.apply(backward, ctx, dy, *ctx.saved_tensors)


# ---- Conditional batch normalization (appendix C) --------------------------------------------------------
# In G a convolution follows its ReLU. The ×2 upsampling and the residual addition follow other convolutions
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

    def forward(self, x, condition, relu=False):  # (B, C, h, w), (B, condition) -> (B, C, h, w)
        gamma, beta = F.linear(condition, self.weight, self.bias).chunk(2, dim=1)  # (B, C) each
        norm = self.norm
        if self.training:
            norm.num_batches_tracked.add_(1)
        how = dict(training=self.training, momentum=norm.momentum, eps=norm.eps, relu=relu)
        return conditional_batch_norm(x, gamma, beta, norm.running_mean, norm.running_var, **how)


def conditional_batch_norm(
    x, gamma, beta, running_mean, running_var, *, training, momentum=0.1, eps=1e-5, relu=False, impl="auto"
) -> torch.Tensor:
    """o = γ · (x - μ) / √(σ² + eps) + β, γ and β of each sample its own; then max(o, 0) if `relu`.

    In training μ and σ² are each channel's mean and variance over batch and space, and the running statistics
    are updated in place as torch.nn.BatchNorm2d does it; else μ and σ² are the running statistics.

    Args:
        x: (B, C, h, w), float32, bfloat16 or float16 (float64: PyTorch only).
        gamma, beta: (B, C), both float32 or both of x's type; any strides.
        running_mean, running_var: (C,), contiguous, float32 (float64 with x). The variance is unbiased.
        momentum: weight of the new statistics, in [0, 1].
    Returns: (B, C, h, w), type and memory format of x.
    Raises: ValueError for other shapes, types or devices.
    Source: appendix C; Ioffe and Szegedy, "Batch Normalization", 2015.
    """
    if x.dim() != 4 or (training and x.numel() < 2 * x.shape[1]):
        raise ValueError(
            f"x is {tuple(x.shape)}; give (B, C, h, w), in training two values a channel or more"
        )
    use_triton, work = _use_triton(impl, x, x.dtype), torch.promote_types(x.dtype, torch.float32)
    _check("gamma", gamma, x.shape[:2], x.device, work, x.dtype)
    _check("beta", beta, x.shape[:2], x.device, gamma.dtype)
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        _check(name, running, x.shape[1:2], x.device, work)
        if not running.is_contiguous():
            raise ValueError(f"{name} is written to; give it contiguous")
    if use_triton and x.numel():
        how = training, momentum, eps, relu
        return _ConditionalBatchNorm.apply(x, gamma, beta, running_mean, running_var, *how)
    # In sizes of x, eager PyTorch moves 9: batch_norm reads x twice and writes; product, sum and ReLU each
    # read and write. The kernels move 3: they read x twice (once with given statistics; the second time from
    # the L2 cache if x fits) and write. Backward they move 5: they read x and dy twice and write dx.
    x_hat = F.batch_norm(x, running_mean, running_var, None, None, training, momentum, eps)
    y = gamma[:, :, None, None] * x_hat + beta[:, :, None, None]
    return (F.relu(y) if relu else y).to(x.dtype)


# Forward, three launches: mean and M₂ of parts, those of all parts, normalizing.
#
# Values are merged like parts: n values have a mean and an M₂ = Σ(x - mean)²; one value has M₂ = 0. With k,
# the mean of the first tile, and d = mean - k of each part, M₂ of all is Σ(M₂ + n d²) - (Σ n d)² / Σ n. This
# loses little: if the first tile is a fraction f of all values, their variance is at least f/(1-f) ·
# (mean - k)², so Σ n d² is at most M₂/f and the relative error about ε/f; 1/f is the number of tiles. With a
# mean of 1,000 and a variance of 1, sums of x and x² would have no correct digits left.
#
# Tiles are positions x channels in both memory formats; p counts the HW = h·w positions of a sample. Triton
# compiles for the stride that is 1 and arranges the threads by it. Addresses have 64 bits.


@_jit
def _statistics_kernel(x_ptr, m2_ptr, mean_ptr, var_ptr, running_mean_ptr, running_var_ptr, HW, C, splits,
                       span, stride_p, stride_c, part_HW, part_splits, part_span, values, momentum,
                       MERGE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Mean and M₂ of `span` positions of one sample, for BLOCK_C channels.

    MERGE: positions are parts, x their means; store the variance, update the running statistics.
    """
    part = tl.program_id(0)  # b·splits + split
    first = (part % splits).to(tl.int64) * span
    end = tl.minimum(first + span, HW)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    at_c = (part // splits).to(tl.int64) * HW * C + c.to(tl.int64) * stride_c
    k = tl.zeros([1, BLOCK_C], tl.float32)
    sum_d = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(first, end, BLOCK_P, num_stages=3):
        p = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (p < end) & (c < C)
        x = tl.load(x_ptr + at_c + p * stride_p, mask, other=0).to(tl.float32)
        n, m2 = tl.where(mask, 1.0, 0.0), 0.0
        if MERGE:
            n *= tl.minimum(part_span, part_HW - p % part_splits * part_span).to(tl.float32)
            m2 = tl.load(m2_ptr + at_c + p * stride_p, mask, other=0)
        if start == first:
            k = tl.sum(n * x, 0, keep_dims=True) / tl.sum(n, 0, keep_dims=True)
        d = x - k
        sum_d += n * d
        sum_m2 += m2 + n * d * d
    if not MERGE:
        values = (end - first).to(tl.float32)
    sum_d = tl.sum(sum_d, 0, keep_dims=True)
    mean = k + sum_d / values
    m2 = tl.sum(sum_m2, 0, keep_dims=True) - sum_d * (sum_d / values)
    m2 = tl.where(m2 < 0, 0, m2)  # NaN stays NaN
    tl.store(mean_ptr + part.to(tl.int64) * C + c, mean, c < C)
    tl.store(var_ptr + part.to(tl.int64) * C + c, m2 / values if MERGE else m2, c < C)
    if MERGE:
        old_mean, old_var = tl.load(running_mean_ptr + c, c < C), tl.load(running_var_ptr + c, c < C)
        tl.store(running_mean_ptr + c, (1 - momentum) * old_mean + momentum * mean, c < C)
        tl.store(running_var_ptr + c, (1 - momentum) * old_var + momentum * (m2 / (values - 1)), c < C)


# Backward. With rstd = 1/√(σ² + eps), n = B·h·w and g = dL/dy, 0 where the ReLU gave 0 (computed again from
# x, not stored),
#
#     y = γ x̂ + β         gives  dβ[b, c] = Σ_p g,  dγ[b, c] = Σ_p g x̂,  a = dL/dx̂ = γ g
#     x̂ = (x - μ) rstd    gives  ∂x̂_j/∂x_i = rstd (δ_ij - 1/n - x̂_i x̂_j / n),
#
# the second term through μ, the third through σ². So dx = rstd (a - mean_a - x̂ mean_ax), and the means of a
# and a x̂ over a channel follow from dβ and dγ, which are needed anyway:
#
#     mean_a = Σ a / n = Σ_b γ dβ / n,  mean_ax = Σ a x̂ / n = Σ_b γ dγ / n.
#
# Three launches: sums over positions, sums over samples, dx. With given statistics both means are 0.


@_jit
def _channels(gamma_ptr, beta_ptr, mean_ptr, var_ptr, at_b, c, C, eps):
    """γ and β of a sample, whose rows begin at at_b, and μ and rstd: (1, BLOCK_C) each."""
    gamma = tl.load(gamma_ptr + at_b + c, c < C, other=0).to(tl.float32)
    beta = tl.load(beta_ptr + at_b + c, c < C, other=0).to(tl.float32)
    mean = tl.load(mean_ptr + c, c < C, other=0)
    return gamma, beta, mean, tl.rsqrt(tl.load(var_ptr + c, c < C, other=1) + eps)


@_jit
def _gradient_sums_kernel(x_ptr, dy_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, part_dgamma_ptr,
                          part_dbeta_ptr, HW, C, splits, span, stride_p, stride_c, gamma_stride_b, eps,
                          RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Σ g x̂ and Σ g of `span` positions of one sample, for BLOCK_C channels."""
    part = tl.program_id(0)  # b·splits + split
    b = (part // splits).to(tl.int64)
    first = (part % splits).to(tl.int64) * span
    end = tl.minimum(first + span, HW)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    gamma, beta, mean, rstd = _channels(gamma_ptr, beta_ptr, mean_ptr, var_ptr, b * gamma_stride_b, c, C, eps)
    sum_gx = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_g = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(first, end, BLOCK_P, num_stages=3):
        p = start + tl.arange(0, BLOCK_P)[:, None]
        mask = (p < end) & (c < C)
        at = b * HW * C + c.to(tl.int64) * stride_c + p * stride_p
        x_hat = (tl.load(x_ptr + at, mask, other=0).to(tl.float32) - mean) * rstd
        g = tl.load(dy_ptr + at, mask, other=0).to(tl.float32)
        if RELU:
            g = tl.where(x_hat * gamma + beta <= 0, 0, g)  # where y is NaN the gradient passes, as in PyTorch
        sum_gx += g * x_hat
        sum_g += g
    tl.store(part_dgamma_ptr + part.to(tl.int64) * C + c, tl.sum(sum_gx, 0, keep_dims=True), c < C)
    tl.store(part_dbeta_ptr + part.to(tl.int64) * C + c, tl.sum(sum_g, 0, keep_dims=True), c < C)


@_jit
def _merge_gradients_kernel(part_dgamma_ptr, part_dbeta_ptr, gamma_ptr, dgamma_ptr, dbeta_ptr, mean_a_ptr,
                            mean_ax_ptr, B, C, splits, gamma_stride_b, scale,
                            BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """dγ and dβ, and scale · Σ_b γ dβ and scale · Σ_b γ dγ, of BLOCK_C channels."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    sum_ax = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    sum_a = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)[:, None].to(tl.int64)
        mask = (b < B) & (c < C)
        dgamma = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
        dbeta = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
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
    tl.store(mean_a_ptr + c, tl.where(scale == 0, 0, mean_a), c < C)  # 0 · NaN would be NaN
    tl.store(mean_ax_ptr + c, tl.where(scale == 0, 0, mean_ax), c < C)


@_jit
def _normalise_kernel(x_ptr, dy_ptr, out_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, mean_a_ptr, mean_ax_ptr,
                      HW, C, tiles, stride_p, stride_c, gamma_stride_b, eps, BACKWARD: tl.constexpr,
                      RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """One tile of one sample: y = γ x̂ + β, or BACKWARD dx = rstd (a - mean_a - x̂ mean_ax)."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    p = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (p < HW) & (c < C)
    at = b * HW * C + p * stride_p + c.to(tl.int64) * stride_c
    gamma, beta, mean, rstd = _channels(gamma_ptr, beta_ptr, mean_ptr, var_ptr, b * gamma_stride_b, c, C, eps)
    x_hat = (tl.load(x_ptr + at, mask, other=0).to(tl.float32) - mean) * rstd
    out = x_hat * gamma + beta
    if BACKWARD:
        g = tl.load(dy_ptr + at, mask, other=0).to(tl.float32)
        if RELU:
            g = tl.where(out <= 0, 0, g)
        mean_a, mean_ax = tl.load(mean_a_ptr + c, c < C, other=0), tl.load(mean_ax_ptr + c, c < C, other=0)
        out = rstd * (gamma * g - mean_a - x_hat * mean_ax)
    elif RELU:
        out = tl.where(out < 0, 0, out)  # NaN stays NaN
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask)


def _tile(HW: int, C: int, channels_last: bool, values: int) -> tuple[int, int]:
    """Positions and channels of a tile of at most so many values, longer along the contiguous dimension."""
    along, across, least = (C, HW, 64) if channels_last else (HW, C, 1024)
    if along % 8:
        values //= 2  # loads are of single values then, and registers have to hold all their addresses
    block = min(triton.next_power_of_2(across), values // min(triton.next_power_of_2(along), least, values))
    return (block, min(triton.next_power_of_2(along), values // block))[:: 1 if channels_last else -1]


def _split(samples: int, HW: int, C: int, channels_last: bool) -> tuple[int, int, int, int]:
    """A tile of sums, the number of parts of each sample's positions, and the positions of a part."""
    BLOCK_P, BLOCK_C = _tile(HW, C, channels_last, TILE // 2)  # half, for sums take twice the registers
    splits = min(triton.cdiv(PROGRAMS, samples * triton.cdiv(C, BLOCK_C)), triton.cdiv(HW, BLOCK_P))
    span = triton.cdiv(triton.cdiv(HW, splits), BLOCK_P) * BLOCK_P
    return BLOCK_P, BLOCK_C, triton.cdiv(HW, span), span


def _layout(x, gamma, beta):
    """The tensors as kernels read them, x's memory format, and the strides of its positions and channels."""
    channels_last = x[:1].is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if channels_last else torch.contiguous_format
    if gamma.stride() != beta.stride() or gamma.stride(1) != 1:
        gamma, beta = gamma.contiguous(), beta.contiguous()
    strides = (x.shape[1], 1) if channels_last else (1, x.shape[2] * x.shape[3])
    return x.contiguous(memory_format=form), gamma, beta, form, strides


class _ConditionalBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *given, running_mean, running_var, training, momentum, eps, relu = inputs
        x, gamma, beta, form, strides = _layout(*given)
        (B, C), HW, channels_last = gamma.shape, x[0, 0].numel(), form == torch.channels_last
        y, mean, var = torch.empty_like(x, memory_format=form), running_mean, running_var
        with torch.cuda.device_of(x):
            if training:
                # Channels last, all samples are one long one in memory, which makes fewer parts.
                samples, positions = (1, B * HW) if channels_last else (B, HW)
                BLOCK_P, BLOCK_C, splits, span = _split(samples, positions, C, channels_last)
                parts, running = samples * splits, (running_mean, running_var)
                mean, var = running_mean.new_empty(2, C)
                part_mean, part_m2 = running_mean.new_empty(2, parts, C)
                _statistics_kernel[parts, triton.cdiv(C, BLOCK_C)](
                    x, x, part_mean, part_m2, *running, positions, C, splits, span, *strides,
                    positions, splits, span, 0.0, momentum, False, BLOCK_P, BLOCK_C
                )  # fmt: skip
                _statistics_kernel[1, triton.cdiv(C, 8)](
                    part_mean, part_m2, mean, var, *running, parts, C, 1, parts, C, 1, positions, splits,
                    span, float(B * HW), momentum, True, min(triton.next_power_of_2(parts), TILE // 8), 8,
                    num_warps=8
                )  # fmt: skip
            BLOCK_P, BLOCK_C = _tile(HW, C, channels_last, TILE)
            tiles = triton.cdiv(HW, BLOCK_P)
            _normalise_kernel[B * tiles, triton.cdiv(C, BLOCK_C)](
                x, x, y, gamma, beta, mean, var, mean, var, HW, C, tiles, *strides, gamma.stride(0), eps,
                False, relu, BLOCK_P, BLOCK_C
            )  # fmt: skip
        ctx.save_for_backward(*given, mean, var)
        ctx.options = training, eps, relu
        return y

    @staticmethod
    @_first_order
    def backward(ctx, dy, *saved):
        (*given, mean, var), (training, eps, relu) = saved, ctx.options
        x, gamma, beta, form, strides = _layout(*given)
        (B, C), HW, channels_last = gamma.shape, x[0, 0].numel(), form == torch.channels_last
        dy = dy.contiguous(memory_format=form)
        dx = torch.empty_like(dy) if ctx.needs_input_grad[0] else None
        dgamma, dbeta = (torch.empty(B, C, dtype=gamma.dtype, device=x.device) for _ in range(2))
        BLOCK_P, BLOCK_C, splits, span = _split(B, HW, C, channels_last)
        mean_a, mean_ax = mean.new_empty(2, C)
        part_dgamma, part_dbeta = mean.new_empty(2, B * splits, C)
        with torch.cuda.device_of(x):
            _gradient_sums_kernel[B * splits, triton.cdiv(C, BLOCK_C)](
                x, dy, gamma, beta, mean, var, part_dgamma, part_dbeta, HW, C, splits, span, *strides,
                gamma.stride(0), eps, relu, BLOCK_P, BLOCK_C
            )  # fmt: skip
            _merge_gradients_kernel[(triton.cdiv(C, 8),)](
                part_dgamma, part_dbeta, gamma, dgamma, dbeta, mean_a, mean_ax, B, C, splits, gamma.stride(0),
                1 / (B * HW) if training else 0.0, min(triton.next_power_of_2(B), TILE // 8), 8, num_warps=8
            )  # fmt: skip
            if dx is not None:
                BLOCK_P, BLOCK_C = _tile(HW, C, channels_last, TILE)
                tiles = triton.cdiv(HW, BLOCK_P)
                _normalise_kernel[B * tiles, triton.cdiv(C, BLOCK_C)](
                    x, dy, dx, gamma, beta, mean, var, mean_a, mean_ax, HW, C, tiles, *strides,
                    gamma.stride(0), eps, True, relu, BLOCK_P, BLOCK_C
                )  # fmt: skip
        return dx, dgamma, dbeta, *6 * (None,)


# ---- φ (section 2, "a concatenation function") -----------------------------------------------------------


def merge_patches(patches, rows, columns, *, tanh=False, dtype=None, impl="auto") -> torch.Tensor:
    """φ: put micro patches side by side, without overlap, after taking their tanh if asked to.

    Args:
        patches: (B·rows·columns, C, S, S), float32, bfloat16 or float16 (float64: PyTorch only). Patch
            b·rows·columns + n·columns + m is in row n and column m of image b.
        dtype: of the result; that of the patches by default.
    Returns: (B, C, rows·S, columns·S), in the memory format of the patches.
    Raises: ValueError for other shapes or types.
    Source: section 2; figure 13a for the tanh.
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
# derivative is 4 e / (1 + e)², exact where 1 - tanh² x has no digits left; so x is saved for it, not tanh x.


@_jit
def _merge_patches_kernel(patches_ptr, images_ptr, d_patches_ptr, planes, N, M, S, run, tiles,
                          TANH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
                          BACKWARD: tl.constexpr):  # fmt: skip
    """Images from patches, or BACKWARD the gradient of patches from that of images."""
    row = tl.program_id(0) // tiles  # (b·planes + plane)·N + n
    t = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]  # y·M + m
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    mask = (t < S * M) & (r < run)
    patch = (row // N // planes * N + row % N).to(tl.int64) * M + t % M
    in_patches = ((patch * planes + row // N % planes) * S + t // M) * run + r
    in_images = (row.to(tl.int64) * S * M + t) * run + r
    if BACKWARD:
        d = tl.load(images_ptr + in_images, mask, other=0).to(tl.float32)
        if TANH:
            e = tl.exp(-2 * tl.abs(tl.load(patches_ptr + in_patches, mask, other=0).to(tl.float32)))
            d *= 4 * e / ((1 + e) * (1 + e))
        tl.store(d_patches_ptr + in_patches, d.to(d_patches_ptr.dtype.element_ty), mask)
    else:
        x = tl.load(patches_ptr + in_patches, mask, other=0).to(tl.float32)
        if TANH:
            e, xx = tl.exp(-2 * tl.abs(x)), x * x
            far = (1 - e) / (1 + e)
            series = x * (1 + xx * (-1 / 3 + xx * (2 / 15 + xx * (-17 / 315 + xx * (62 / 2835)))))
            x = tl.where(xx < 1 / 16, series, tl.where(x < 0, -far, far))
        tl.store(images_ptr + in_images, x.to(images_ptr.dtype.element_ty), mask)


class _MergePatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, patches, rows, columns, tanh, dtype):
        ctx.save_for_backward(*[patches] * tanh)
        channels_last, (count, C, S, _) = _is_channels_last(patches), patches.shape
        ctx.form = torch.channels_last if channels_last else torch.contiguous_format
        ctx.shape, ctx.dtype, patches = (
            patches.shape,
            patches.dtype,
            patches.contiguous(memory_format=ctx.form),
        )
        shape = count // (rows * columns), C, rows * S, columns * S
        images = torch.empty(shape, dtype=dtype, device=patches.device, memory_format=ctx.form)
        planes, run = (1, S * C) if channels_last else (C, S)
        BLOCK_R = min(triton.next_power_of_2(run), TILE)
        BLOCK_T = min(triton.next_power_of_2(S * columns), TILE // BLOCK_R)
        tiles = triton.cdiv(S * columns, BLOCK_T)
        ctx.grid = count // columns * planes * tiles, triton.cdiv(run, BLOCK_R)
        ctx.sizes = planes, rows, columns, S, run, tiles, tanh, BLOCK_T, BLOCK_R
        with torch.cuda.device_of(patches):
            _merge_patches_kernel[ctx.grid](patches, images, patches, *ctx.sizes, False)
        return images

    @staticmethod
    @_first_order
    def backward(ctx, d_images, *saved):
        d_images = d_images.contiguous(memory_format=ctx.form)
        d_patches = d_images.new_empty(ctx.shape, dtype=ctx.dtype).contiguous(memory_format=ctx.form)
        patches = saved[0].contiguous(memory_format=ctx.form) if saved else d_patches  # read for tanh only
        with torch.cuda.device_of(d_patches):
            _merge_patches_kernel[ctx.grid](patches, d_images, d_patches, *ctx.sizes, True)
        return d_patches, *4 * (None,)


# ---- ψ (section 2, "a cropping transformation"), from the images as they are stored ----------------------


def crop_patches(
    images, index, top, left, height, width, *, mirror=None, dtype=torch.float32, impl="auto"
) -> torch.Tensor:
    """ψ: cut a macro patch out of each of B stored images, wrapped where it crosses the border.

    Args:
        images: (n, H, W, 3) uint8, contiguous. Only the pixels of the patches are read.
        index: (B,) int64, of images, 0 … n-1. For others PyTorch raises; the kernel, which does not wait for
            the GPU, returns NaN.
        top, left: (B,) int64, pixels, modulo H and W.
        height, width: of a macro patch, pixels, in 1 … H and 1 … W.
        mirror: (B,) bool, which patches to flip left to right after cutting; none by default.
        dtype: of the result, float32, bfloat16 or float16.
    Returns: (B, 3, height, width) in [-1, 1], channels last in memory; no gradients.
    Raises: ValueError for other shapes, types or devices.
    Source: section 2.
    """
    if images.dim() != 4 or not images.is_contiguous():
        raise ValueError(f"images is {tuple(images.shape)}; give (n, H, W, 3), contiguous")
    n, H, W, _ = images.shape
    B = len(index)
    _check("images", images, (n, H, W, 3), images.device, torch.uint8)
    for name, tensor in (("index", index), ("top", top), ("left", left)):
        _check(name, tensor, (B,), images.device, torch.int64)
    if mirror is not None:
        _check("mirror", mirror, (B,), images.device, torch.bool)
    if not (1 <= height <= H and 1 <= width <= W):
        raise ValueError(f"a patch of {height} x {width} pixels is not inside an image of {H} x {W}")
    if not (_use_triton(impl, images, dtype) and n and B):
        # The kernel moves 5 bytes a value: it reads 1 and writes 4. PyTorch reads and writes 1, reads 1 and
        # writes 4, reads and writes 4, and computes three indices of 8 bytes for each pixel.
        x = torch.arange(width, device=images.device)
        if mirror is not None:
            x = torch.where(mirror.view(-1, 1, 1), width - 1 - x, x)
        columns = (left.view(-1, 1, 1) + x) % W
        rows = (top.view(-1, 1, 1) + torch.arange(height, device=images.device).view(-1, 1)) % H
        crop = images[index.view(-1, 1, 1), rows, columns]  # (B, height, width, 3)
        return (crop.permute(0, 3, 1, 2) / 127.5 - 1).to(dtype)
    patches = torch.empty(
        B, 3, height, width, dtype=dtype, device=images.device, memory_format=torch.channels_last
    )
    BLOCK_J = min(triton.next_power_of_2(3 * width), TILE)
    BLOCK_Y = min(triton.next_power_of_2(height), TILE // BLOCK_J)
    tiles = triton.cdiv(height, BLOCK_Y)
    places = [t.contiguous() for t in (index, top, left, index if mirror is None else mirror.byte())]
    with torch.cuda.device_of(images):
        _crop_patches_kernel[B * tiles, triton.cdiv(3 * width, BLOCK_J)](
            images, patches, *places, n, H, W, height, width, tiles, mirror is not None, BLOCK_Y, BLOCK_J
        )
    return patches


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
    row, column = tl.where(row < H, row, row - H), tl.where(column < W, column, column - W)
    image = tl.load(index_ptr + b)
    known = (image >= 0) & (image < n)
    pixel = (tl.where(known, image, 0) * H + row) * W + column  # of 64 bits, like image
    value = tl.div_rn(tl.load(images_ptr + pixel * 3 + j % 3, mask, other=0).to(tl.float32), 127.5) - 1
    value = tl.where(known, value, float("nan"))
    tl.store(patches_ptr + (b * height + y) * 3 * width + j, value.to(patches_ptr.dtype.element_ty), mask)


# ---- ReLU and pooling for D, whose gradient penalty differentiates a gradient ----------------------------
# Their second derivative is 0. PyTorch's own functions return it as a tensor of zeros, which autograd carries
# through all of D: a tenth of the time of a step. Here it is None.


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
    """Average of 2 x 2 pixels, fewer at the end of an odd side."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.layout = x.shape, x.stride()
        return F.avg_pool2d(x, 2, ceil_mode=True)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return None
        x = dy.new_empty_strided(*ctx.layout)  # only its shape and layout matter, so no values are saved
        return torch.ops.aten.avg_pool2d_backward(dy, x, [2, 2], [2, 2], [0, 0], True, True, None)


relu, avg_pool = _ReLU.apply, _AvgPool.apply


# ---- CUDA graphs -----------------------------------------------------------------------------------------


def capture(step, warmup: int = 3):
    """Make a CUDA graph of step(*tensors) -> tensor: the GPU starts all of its kernels at once.

    The first `warmup` calls are ordinary ones, in which libraries choose their algorithms, on a stream of
    their own, as graphs require. The next call is captured. From there on the graph is replayed on copies of
    the inputs, so what changes from call to call has to be in the inputs, or in tensors that `step` updates.

    Returns: a function that is called like `step`.
    Raises: the returned function, RuntimeError if `step` cannot be captured; running out of memory as it is.
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


def verify(device: str, impl: str, shapes=((3, 65, 5, 7), (7, 5, 1, 1))) -> None:
    """Compare outputs, gradients and running statistics with float64; AssertionError if any is off."""
    rng = torch.Generator(device).manual_seed(0)  # the caller's stays as it is
    noise = functools.partial(torch.randn, generator=rng, device=device)

    def compare(function, *tensors, **options):
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
    for dtype, (B, C, h, w), form in itertools.product(
        types, shapes, (torch.channels_last, torch.contiguous_format)
    ):
        kind = (
            dtype if form == torch.channels_last else torch.float32
        )  # of γ and β, with autocast and without
        running = torch.zeros(C, device=device), torch.ones(C, device=device)
        x = noise(B, C, h, w).to(dtype, memory_format=form)
        # Of millions of values some are so near 0 that rounding decides whether the ReLU lets them pass.
        compare(conditional_batch_norm, x, *noise(2, B, C).to(kind), *running, training=True, relu=B < 8)
        patches = noise(2 * 3 * B, 3, w, w).to(dtype, memory_format=form)
        compare(merge_patches, patches, rows=2, columns=3, tanh=True, dtype=torch.float32)
    images = torch.randint(256, (3, 17, 23, 3), dtype=torch.uint8, generator=rng, device=device)
    places = torch.tensor([[2, 0, 1], [-5, 3, 16], [22, -1, 7]], device=device)
    mirror = torch.tensor([True, False, True], device=device)
    ours, true = (crop_patches(images, *places, 9, 13, mirror=mirror, impl=how) for how in (impl, "torch"))
    assert torch.equal(ours, true), "crop_patches"


if __name__ == "__main__":
    gpu = triton is not None and torch.cuda.is_available()
    impl = "triton" if gpu or INTERPRETED else "torch"
    verify("cuda" if gpu else "cpu", impl)
    print(f"the {'kernels' if impl == 'triton' else 'PyTorch references'} agree with float64")
