"""Tests of coco_gan.py, data.py and kernels.py, in their order: python -m pytest"""

import contextlib
import copy
import dataclasses
import errno
import functools
import gc
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import weakref
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

# Without a GPU the kernels run in Triton's interpreter, which has to be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import coco_gan
import data
import kernels
from coco_gan import Config, UserError

ROOT = Path(__file__).parent
# Nothing is square and nothing is equal: rows and columns that are mixed up anywhere show.
UNEVEN = Config(height=16, width=24, N=2, M=3, S=4, z_dim=8, width_g=2, width_d=2, batch_size=4, steps=4)
CYLINDER = dataclasses.replace(UNEVEN, topology="cylinder")
TORUS = dataclasses.replace(UNEVEN, topology="torus")
CPU = torch.device("cpu")


def flags(config):
    """The command line of a configuration, whatever the preset."""
    given = {name: value for name, value in dataclasses.asdict(config).items() if not isinstance(value, bool)}
    return [word for name, value in given.items() for word in (coco_gan.flag(name), str(value))]


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image)


def tensors(value, name=""):
    """All tensors in nested dictionaries, lists and tuples, by their path."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from tensors(inner, f"{name}/{key}")


@pytest.fixture(autouse=True, scope="session")
def on_the_cpu():
    """A GPU, where there is one, has a test of its own; equality to the bit is promised on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.backends.mps, "is_available", lambda: False)
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps, of which one checkpoint a step is kept."""
    folder = tmp_path_factory.mktemp("trained")
    command = ["train", "--run", str(folder / "run"), "--cache", str(folder / "cache"), "--save-every", "1"]
    assert (
        coco_gan.main([*command, "--keep", "9", "--log-every", "2", "--device", "cpu", *flags(UNEVEN)]) == 0
    )
    return folder / "run"


@pytest.fixture
def copied(trained, here):
    """The same, to change: a copy as run/ in the working folder, with the cache beside it."""
    shutil.copytree(trained.parent, here, dirs_exist_ok=True)
    return here / "run"


# ----------------------------------------------------------------------------------------------------------
# Configuration
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", coco_gan.PRESETS)
def test_presets_are_valid(name):
    coco_gan.check_config(Config(**coco_gan.PRESETS[name]))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(height=100), "--height 100 is not divisible by --S 16; try --height 96 or 112"),
        (dict(width=8), "--width 8 is not divisible by --S 16; try --width 16"),
        (dict(N=5), "--N 5 does not fit"),
        (dict(width=32, M=4), "--width and --S give 2 micro patches; try --M 2"),
        (dict(batch_size=1), "--batch-size 1 is out of range; give 2 to"),
        (dict(lr_g=float("nan")), "--lr-g nan is out of range"),
        (dict(alpha_s=-1.0), "--alpha-s -1.0 is out of range"),
        (dict(height=10**9), "--height 1000000000 is out of range"),
        (dict(S="16"), "--S is '16'; it must be of type int"),
        (dict(precision="float8"), "--precision float8 is unknown; give auto, fp32, tf32, bf16"),
        (dict(crop="centre"), "--crop centre is unknown; give center"),
        (dict(topology="sphere"), "--topology sphere is unknown; give plane, cylinder, torus"),
        (
            dict(extrapolate="one"),
            "--extrapolate one is no width of a ring; give micro patches, like 1 or 1,0",
        ),
        (dict(extrapolate="5"), "--extrapolate 5: the image has 4 micro patches there; give at most 4"),
        (
            dict(extrapolate="1", height=32, N=2),
            "--extrapolate 1: a macro patch is as long as the image there",
        ),
        (dict(extrapolate="0,1", width=16, M=1), "--extrapolate 0,1: the image has 1 micro patches there"),
        (dict(extrapolate="-1"), "--extrapolate -1 is no width"),
        (dict(topology="cylinder", extrapolate="1,1"), "--extrapolate 1,1: borders of a cylinder that meet"),
        (
            dict(topology="torus", extrapolate="1"),
            "--extrapolate 1: borders of a torus that meet have nothing",
        ),
        (dict(topology="cylinder", M=5, width=64), "--width and --S give 4 micro patches; try --M 4"),
    ],
)
def test_bad_configurations_are_named(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        coco_gan.check_config(dataclasses.replace(Config(), **change))


# ----------------------------------------------------------------------------------------------------------
# Coordinates, φ and ψ
# ----------------------------------------------------------------------------------------------------------


def test_coordinates_of_celeba128():
    config = Config(**coco_gan.PRESETS["celeba128"])
    i = torch.arange(4)
    third = 1 / 3
    expected = torch.tensor([[-1, -1], [-third, -third], [third, third], [1, 1]])
    torch.testing.assert_close(coco_gan.micro_coordinates(config, i, i), expected)
    assert coco_gan.macro_coordinates(config, i[:3], i[:3]).tolist() == [[-1, -1], [0, 0], [1, 1]]


def test_coordinates_of_an_uneven_grid():
    i, j = (
        torch.tensor([0, 1, 2]),
        torch.tensor([0, 3, 1]),
    )  # 4 rows and 6 columns, 3 and 4 places of macro patches
    micro = [[-1, -1], [-1 / 3, 0.2], [1 / 3, -0.6]]
    torch.testing.assert_close(coco_gan.micro_coordinates(UNEVEN, i, j), torch.tensor(micro))
    macro = [[-1, -1], [0, 1], [1, -1 / 3]]
    torch.testing.assert_close(coco_gan.macro_coordinates(UNEVEN, i, j), torch.tensor(macro))
    matrix = coco_gan.micro_matrix(UNEVEN, torch.tensor([2]), torch.tensor([1]))
    rows, columns = [1 / 3, 1], [-0.6, -0.2, 0.2]
    torch.testing.assert_close(matrix, torch.tensor(list(itertools.product(rows, columns))))


def test_coordinates_of_a_panorama():
    config = Config(**coco_gan.PRESETS["panorama"])  # 12 angles, 30° apart, of which -180° comes first
    assert config.places == (3, 12) and config.c_dim == 3
    j, zero = torch.arange(12), torch.zeros(12, dtype=torch.int64)
    half, root = 0.5, math.sqrt(3) / 2
    cos = [-1, -root, -half, 0, half, root, 1, root, half, 0, -half, -root]
    sin = [0, -half, -root, -1, -root, -half, 0, half, root, 1, root, half]
    for function in (coco_gan.micro_coordinates, coco_gan.macro_coordinates):
        y, *angle = function(config, zero, j).T
        assert y.tolist() == [-1] * 12
        torch.testing.assert_close(torch.stack(angle), torch.tensor([cos, sin]), atol=1e-6, rtol=0)
        assert torch.equal(function(config, zero, j + 12), function(config, zero, j))  # round the border
    i = torch.arange(4)
    y = coco_gan.micro_coordinates(config, i, i)[:, 0]
    torch.testing.assert_close(y, torch.tensor([-1, -1 / 3, 1 / 3, 1]))
    assert coco_gan.macro_coordinates(config, i[:3], i[:3])[:, 0].tolist() == [-1, 0, 1]
    between = coco_gan.micro_coordinates(config, zero[:1], torch.tensor([7.5]))[0]  # 45°
    torch.testing.assert_close(between, torch.tensor([-1, math.sqrt(half), math.sqrt(half)]))


def test_coordinates_of_a_torus_close_both_ways():
    assert TORUS.places == (4, 6) and TORUS.c_dim == 4
    i, j = torch.tensor([0, 1, 5]), torch.tensor([3, 9, 0])
    c = torch.tensor([[-1, 0, 1, 0], [0, -1, 1, 0], [0, -1, -1, 0]], dtype=torch.float32)
    for function in (coco_gan.micro_coordinates, coco_gan.macro_coordinates):
        torch.testing.assert_close(function(TORUS, i, j), c, atol=1e-6, rtol=0)


@pytest.mark.parametrize("config, rows", [(CYLINDER, (1, 2)), (TORUS, (3, 0))])
def test_the_last_macro_patch_goes_on_at_the_other_border(config, rows):
    matrix = coco_gan.micro_matrix(config, torch.tensor([rows[0]]), torch.tensor([5]))
    i, j = torch.tensor(rows).repeat_interleave(3), torch.tensor([5, 0, 1] * 2)
    assert torch.equal(matrix, coco_gan.micro_coordinates(config, i, j))


def test_coordinates_go_on_outside_and_vanish_where_there_is_no_choice():
    config = Config(height=256, width=256, S=64)  # appendix E: c'' reaches ±1.66 and c' reaches ±2
    beyond = torch.tensor([-1, 4])
    assert coco_gan.micro_coordinates(config, beyond, beyond)[:, 0].tolist() == pytest.approx([-5 / 3, 5 / 3])
    assert coco_gan.macro_coordinates(config, torch.tensor([-1, 3]), beyond)[:, 0].tolist() == [-2, 2]
    column = Config(height=64, width=16, N=4, M=1, S=16)
    i = torch.arange(1)
    assert coco_gan.macro_coordinates(column, i, i).tolist() == [[0, 0]]
    assert coco_gan.micro_coordinates(column, torch.tensor([3]), i).tolist() == [[1, 0]]


def test_merge_puts_rows_first():
    patches = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 2, 2)
    expected = [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    assert coco_gan.merge_patches(patches, 2, 3)[0, 0].tolist() == expected


def test_crop_and_merge_are_inverse():
    images = torch.randint(0, 256, (3, 8, 12, 3), dtype=torch.uint8)
    places = list(itertools.product([2, 0], range(0, 8, 4), range(0, 12, 4)))  # image, top, left
    index, top, left = (torch.tensor(t) for t in zip(*places))
    patches = coco_gan.crop_patches(images, index, top, left, 4, 4)
    assert patches.shape == (12, 3, 4, 4)
    merged = coco_gan.merge_patches(patches, 2, 3)
    assert np.array_equal(coco_gan.to_uint8(merged), images[[2, 0]].numpy())


def test_crop_goes_on_at_the_other_border():
    images = torch.randint(0, 256, (2, 8, 12, 3), dtype=torch.uint8)
    one, top, left = torch.tensor([1]), torch.tensor([6]), torch.tensor([-2])
    crop = coco_gan.to_uint8(coco_gan.crop_patches(images, one, top, left, 4, 5))[0]
    assert np.array_equal(crop, images[1].roll((-6, 2), (0, 1))[:4, :5].numpy())


def test_crop_scales_to_the_unit_range():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3)
    zero = torch.zeros(1, dtype=torch.int64)
    assert coco_gan.crop_patches(images, zero, zero, zero, 1, 1).flatten().tolist() == pytest.approx(
        [-1, 1, -0.6]
    )


@pytest.mark.parametrize("mirror", [False, True])
def test_batches_are_real_crops_at_their_coordinates(mirror):
    config = dataclasses.replace(UNEVEN, batch_size=200, mirror=mirror)
    stored = torch.randint(0, 256, (5, 16, 24, 3), dtype=torch.uint8)
    batch = coco_gan.draw_batch(config, stored, torch.tensor([1, 3]), torch.Generator().manual_seed(0), CPU)
    seen = set()
    for x, c in zip(batch.x_macro, batch.c_macro):
        i, j = round((c[0].item() + 1) * 1), round((c[1].item() + 1) * 1.5)
        for n, flip in itertools.product((1, 3), (False, True)):
            whole = stored[n].flip(1) if flip else stored[n]
            if np.array_equal(
                coco_gan.to_uint8(x[None])[0], whole[4 * i : 4 * i + 8, 4 * j : 4 * j + 12].numpy()
            ):
                seen.add((n, i, j, flip))
    flips = (False, True) if mirror else (False,)
    assert seen == set(itertools.product((1, 3), range(3), range(4), flips))
    assert batch.z.shape == (200, 8) and -1 <= batch.z.min() < -0.95 < 0.95 < batch.z.max() <= 1
    torch.testing.assert_close(batch.c_micro.view(200, 6, 2)[:, 0, 0], (batch.c_macro[:, 0] - 0.5) / 1.5)


def test_mirrored_batches_wrap_round_as_well():
    config = dataclasses.replace(CYLINDER, batch_size=200, mirror=True)
    stored = torch.randint(0, 256, (1, 16, 24, 3), dtype=torch.uint8)
    batch = coco_gan.draw_batch(config, stored, torch.tensor([0]), torch.Generator().manual_seed(0), CPU)
    j = torch.arange(6)
    angles = coco_gan.macro_coordinates(config, 0 * j, j)[:, 1:]
    seen = set()
    for x, c in zip(coco_gan.to_uint8(batch.x_macro), batch.c_macro):
        i, j = round(c[0].item() + 1), (angles - c[1:]).norm(dim=1).argmin().item()
        whole = [
            image.roll((-4 * i, -4 * j), (0, 1))[:8, :12].numpy() for image in (stored[0], stored[0].flip(1))
        ]
        (flipped,) = [n for n in range(2) if np.array_equal(x, whole[n])]
        seen.add((i, j, flipped))
    assert len(seen) == 3 * 6 * 2


@pytest.mark.parametrize("yaw", [False, True])
@pytest.mark.parametrize("config", [CYLINDER, TORUS])
def test_batches_wrap_round_and_are_turned(config, yaw):
    """Each macro patch is found in the one image, turned by no more than --yaw allows: its pixels differ."""
    config = dataclasses.replace(config, batch_size=2000, yaw=yaw)
    stored = torch.arange(16 * 24 * 3).view(1, 16, 24, 3).remainder(251).byte()
    batch = coco_gan.draw_batch(config, stored, torch.tensor([0]), torch.Generator().manual_seed(0), CPU)
    places = {
        bytes(stored[0].roll((-i, -j), (0, 1))[:8, :12].numpy()): (i, j) for i in range(16) for j in range(24)
    }
    assert len(places) == 16 * 24
    tops, lefts = zip(*(places[bytes(x)] for x in coco_gan.to_uint8(batch.x_macro)))
    down, across = config.closed
    assert set(tops) == set(range(16)) if yaw and down else set(tops) == set(range(0, 16 if down else 12, 4))
    assert set(lefts) == set(range(24)) if yaw else set(lefts) == set(range(0, 24, 4))
    i = torch.tensor(tops)[:, None] // 4, torch.tensor(lefts)[:, None] // 4
    told = coco_gan.macro_coordinates(config, *i)[:, 0]
    assert torch.equal(told, batch.c_macro) != yaw  # turned, an image no longer tells where its parts are
    micro = batch.c_micro.view(2000, 6, -1)[:, 0]
    if down:
        assert torch.equal(micro, batch.c_macro)
    else:
        assert torch.equal(micro[:, 1:], batch.c_macro[:, 1:])


# ----------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------


def shapes_of_blocks(net, *inputs):
    shapes = []
    for block in net.blocks:
        block.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    with torch.no_grad():
        net(*inputs)
    return shapes


@pytest.mark.parametrize(
    "S, expected",
    [
        (32, [(512, 4), (256, 8), (128, 16), (64, 32)]),  # figure 13
        (64, [(512, 4), (256, 8), (128, 16), (64, 32), (64, 64)]),  # the last block twice
        (16, [(512, 4), (256, 8), (128, 16)]),  # without the last block
        (8, [(512, 4), (256, 8), (128, 8)]),  # the depth of 16, one block without ×2
        (4, [(512, 4), (256, 4), (128, 4)]),  # and two
        (12, [(512, 6), (256, 12), (128, 12)]),  # no power of two: begins with 3 x 3
    ],
)
def test_shapes_of_the_generator(S, expected):
    G = coco_gan.Generator(Config(height=2 * S, width=2 * S, S=S, width_g=64))
    z, c = torch.zeros(1, 128), torch.zeros(1, 2)
    assert shapes_of_blocks(G.eval(), z, c) == [(1, channels, side, side) for channels, side in expected]
    assert G(z, c).shape == (1, 3, S, S)


@pytest.mark.parametrize(
    "N, M, S, expected",
    [
        (2, 2, 32, [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4)]),  # figure 14
        (4, 4, 32, [(64, 64, 64), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4)]),
        (2, 2, 16, [(128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4)]),  # without the first block
        (1, 2, 16, [(256, 8, 16), (512, 4, 8), (512, 4, 8)]),  # N != M
        (3, 1, 5, [(512, 15, 5)]),  # too small to pool
        (2, 3, 7, [(512, 7, 11), (512, 7, 11)]),  # an odd side
    ],
)
def test_shapes_of_the_discriminator(N, M, S, expected):
    D = coco_gan.Discriminator(Config(height=N * S, width=M * S, N=N, M=M, S=S))
    x = torch.zeros(1, 3, N * S, M * S)
    assert shapes_of_blocks(D, x, torch.zeros(1, 2)) == [(1, *shape) for shape in expected]
    score, h = D(x, torch.zeros(1, 2))
    assert score.shape == (1,) and h.shape == (1, 512)


def test_parameter_counts_of_celeba128():
    """Against figures 13 and 14 by hand: a 3 x 3 convolution has 9·in·out + out, a CBN 2·131·channels."""
    config = Config(**coco_gan.PRESETS["celeba128"])
    D = coco_gan.Discriminator(config)
    A = coco_gan.Head(D.linear.in_features, 2)
    counts = [sum(p.numel() for p in net.parameters()) for net in (coco_gan.Generator(config), D, A)]
    g_blocks = 7_737_856 + 1_968_384 + 509_056 + 135_744
    d_blocks = 38_976 + 229_760 + 918_272 + 3_671_552 + 4_982_272
    assert counts == [536_576 + g_blocks + 128 + 1_731, d_blocks + 513 + 1_536, 65_664 + 256 + 258]


def test_d_adds_the_projection():
    D = coco_gan.Discriminator(UNEVEN)
    x, c = torch.randn(3, 3, 8, 12), torch.randn(3, 2)
    score, h = D(x, c)
    torch.testing.assert_close(score, D.linear(h)[:, 0] + (D.projection(c) * h).sum(1))


def test_conditional_batch_norm():
    cbn = coco_gan.ConditionalBatchNorm(4, 6)
    x, condition = 1000 + 3 * torch.randn(5, 4, 3, 2), torch.randn(5, 6)
    normal = (x - x.mean((0, 2, 3), keepdim=True)) / x.var((0, 2, 3), correction=0, keepdim=True).sqrt()
    torch.testing.assert_close(cbn(x, 0 * condition), normal, atol=1e-3, rtol=1e-3)  # γ = 1 and β = 0
    torch.nn.init.normal_(cbn.weight)
    gamma, beta = (condition @ cbn.weight.T + cbn.bias)[:, :, None, None].split(4, 1)
    torch.testing.assert_close(cbn(x, condition), gamma * normal + beta, atol=1e-2, rtol=1e-3)


def test_spectral_norm_is_the_largest_singular_value():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3), torch.nn.Linear(7, 4), coco_gan.ConditionalBatchNorm(2, 3)
    )
    coco_gan.initialise(net)
    for _ in range(200):
        parameters = coco_gan.spectral_norm(net, iterate=True)
    for name in ("0.weight", "1.weight"):
        W = net.get_parameter(name).flatten(1)
        torch.testing.assert_close(parameters[name].flatten(1), W / torch.linalg.svdvals(W)[0])
    for name in ("0.bias", "1.bias", "2.weight", "2.bias"):  # no bias, not the maps of γ and β
        assert parameters[name] is net.get_parameter(name)
    before = [net[0].v.clone(), net[1].v.clone()]
    coco_gan.spectral_norm(net, iterate=False)
    assert torch.equal(net[0].v, before[0]) and torch.equal(net[1].v, before[1])


def test_spectral_norm_differentiates_through_sigma():
    layer = torch.nn.Linear(3, 2).double()
    coco_gan.initialise(layer)
    layer.v = layer.v.double()

    def normalised(W):
        layer._parameters["weight"] = W
        return coco_gan.spectral_norm(torch.nn.Sequential(layer), iterate=False)["0.weight"]

    assert torch.autograd.gradcheck(normalised, (layer.weight,))


# ----------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------


def test_wasserstein_is_real_minus_generated():
    assert coco_gan.wasserstein(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 2.0])) == 2.5


def test_spatial_consistency_sums_over_coordinates():
    c, estimate = torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([[3.0, 5.0], [1.0, 1.0]])
    assert coco_gan.spatial_consistency(c, estimate) == 12.5


def test_coordinates_outside_have_no_spatial_loss():
    c = torch.tensor([[0.0, 1.0], [1.01, 0.0], [0.0, -2.0], [-1.0, 1.0]])
    estimate = torch.zeros(4, 2, requires_grad=True)
    loss = coco_gan.spatial_consistency(c, estimate)
    assert loss == 0.75  # 1 + 2 of the first and the last, over all four
    (gradient,) = torch.autograd.grad(loss, estimate)
    assert gradient.tolist() == [[0, -0.5], [0, 0], [0, 0], [0.5, -0.5]]


def test_content_consistency_is_the_mean_over_the_values_of_z():
    z, estimate = torch.tensor([[1.0, -1.0, 0.5], [0.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.5]] * 2)
    torch.testing.assert_close(coco_gan.content_consistency(z, estimate), torch.tensor(4.5 / 6))


def test_gradient_penalty_of_a_linear_d():
    w = torch.randn(3, 4, 5, requires_grad=True)
    x, s = torch.randn(2, 6, 3, 4, 5)
    penalty, norm = coco_gan.gradient_penalty(lambda t: (t * w).sum((1, 2, 3)), x, s, torch.rand(6))
    torch.testing.assert_close(penalty, (w.norm() - 1) ** 2)
    torch.testing.assert_close(norm, w.norm())
    (gradient,) = torch.autograd.grad(penalty, w)
    torch.testing.assert_close(gradient, 2 * (w.norm() - 1) * w / w.norm())


def test_gradient_penalty_is_taken_between_the_pairs_of_samples():
    """D = |t|²/2 has the gradient ŝ' itself."""
    x, s, epsilon = torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2, requires_grad=True), torch.rand(5)
    penalty, norm = coco_gan.gradient_penalty(lambda t: t.square().sum((1, 2, 3)) / 2, x, s, epsilon)
    between = [e * b + (1 - e) * a for a, b, e in zip(x, s, epsilon)]
    expected = torch.stack([(t.norm() - 1) ** 2 for t in between]).mean()
    torch.testing.assert_close(penalty, expected.detach(), check_stride=False)
    torch.testing.assert_close(norm, torch.stack([t.norm() for t in between]).mean().detach())
    assert torch.autograd.grad(penalty, s, allow_unused=True) == (None,)  # no way back to G


@pytest.mark.parametrize("side", [8, 7])
def test_relu_and_pool_are_pytorchs(side):
    x = torch.randn(2, 3, side, side + 2, dtype=torch.float64, requires_grad=True)

    def ours(x):
        return coco_gan.Pool.apply(coco_gan.ReLU.apply(x))

    torch.testing.assert_close(ours(x), torch.nn.functional.avg_pool2d(torch.relu(x), 2, ceil_mode=True))
    assert torch.autograd.gradcheck(ours, x)
    assert torch.autograd.gradgradcheck(lambda x: ours(x).square(), x)


def test_gradient_penalty_does_not_go_back_through_the_layers():
    D, c = coco_gan.Discriminator(UNEVEN), torch.zeros(4, 2)
    x, s = torch.randn(2, 4, 3, 8, 12)
    L_GP, _ = coco_gan.gradient_penalty(lambda t: D(t, c)[0], x, s, torch.rand(4))
    biases = [p for name, p in D.blocks.named_parameters() if name.endswith("bias")]
    assert set(torch.autograd.grad(L_GP, biases, allow_unused=True)) == {None}


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


def new_state_and_batch(config=UNEVEN, ring=(0, 0)):
    state = coco_gan.new_state(config, CPU)
    images = torch.randint(0, 256, (6, config.height, config.width, 3), dtype=torch.uint8)
    return state, coco_gan.draw_batch(config, images, torch.arange(6), state.rng, CPU, ring)


def changed(state, function):
    """Which parameters the function changes: the set of their names, like G.conv.bias."""
    nets = {name: getattr(state, name) for name in "GDAQ" if getattr(state, name) is not None}
    parameters = {f"{name}.{k}": p for name, net in nets.items() for k, p in net.named_parameters()}
    before = {name: p.clone() for name, p in parameters.items()}
    function()
    return {name for name, p in parameters.items() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("guided", [False, True])
def test_each_step_changes_its_own_networks(guided):
    state, batch = new_state_and_batch(dataclasses.replace(UNEVEN, guided=guided))
    s_macro = coco_gan.generate_macro(state, coco_gan.spectral_norm(state.G, iterate=True), batch)
    D_and_A = {f"D.{name}" for name, _ in state.D.named_parameters()}
    D_and_A |= {f"A.{name}" for name, _ in state.A.named_parameters()}
    moved = changed(state, lambda: coco_gan.discriminator_step(state, [batch], [s_macro], state.opt_D))
    # The first cancels in L_W, the second in a norm of the batch, but for rounding.
    assert moved <= D_and_A and {"D.linear.bias"} <= D_and_A - moved <= {"D.linear.bias", "A.linear1.bias"}
    moved = changed(state, lambda: coco_gan.generator_step(state, [batch], [s_macro], state.opt_G))
    assert {name[0] for name in moved} == {"G"} and len(moved) > 0.8 * len([*state.G.parameters()])
    if guided:
        s_macro = s_macro.detach()
        moved = changed(state, lambda: coco_gan.discriminator_step(state, [batch], [s_macro], state.opt_Q))
        assert {name[0] for name in moved} == {"Q"} and {"Q.linear1.weight", "Q.linear2.weight"} <= moved
    moved = changed(state, lambda: coco_gan.train_step(state, batch))
    assert {name[0] for name in moved} == set("GDAQ" if guided else "GDA")


@pytest.mark.parametrize("guided, ring", [(False, (0, 0)), (True, (0, 0)), (True, (1, 1))])
def test_gradients_are_those_of_the_objectives(guided, ring):
    """D, A descend -L_W + λ L_GP + α L_S(x'), G then L_W + α L_S(s'); with Q all of them L_Q(s') as well.

    Beyond the borders s' has a coordinate of its own, and ŝ' one between.
    """
    config = dataclasses.replace(UNEVEN, precision="fp32", lambda_gp=3.0, alpha_s=7.0, lr_g=0.01, lr_d=0.02)
    config = dataclasses.replace(config, guided=guided, alpha_q=30.0)
    state, batch = new_state_and_batch(config, ring)
    c, c_s, epsilon = batch.c_macro, batch.c_generated, batch.epsilon
    inside = (c_s.abs() <= 1).all(dim=1)
    assert torch.equal(c, c_s) == (ring == (0, 0)) and inside.all() == (ring == (0, 0)) and inside.any()
    assert state.opt_G.param_groups[0]["lr"] == 0.01 and state.opt_D.param_groups[0]["lr"] == 0.02
    assert not guided or state.opt_Q.param_groups[0]["lr"] == 0.01
    assert len(set(map(tuple, batch.c_macro.tolist()))) > 1
    state.opt_G.step = state.opt_D.step = lambda: None  # so that both steps see the same weights
    s_macro = coco_gan.generate_macro(state, coco_gan.spectral_norm(state.G, iterate=False), batch)
    torch.testing.assert_close(s_macro, G_alone(state, batch))
    coco_gan.discriminator_step(state, [batch], [s_macro], state.opt_D)

    heads = [state.A, state.Q] if guided else [state.A]
    D_sn, A_sn, *Q_sn = (coco_gan.spectral_norm(net, iterate=False) for net in (state.D, *heads))

    def apply(x, c):
        return functional_call(state.D, D_sn, (x, c))

    def content(h):
        return (batch.z - functional_call(state.Q, *Q_sn, (h,))).abs().sum() / 4 / 8 if guided else 0.0

    x, s = batch.x_macro, s_macro.detach()
    s_hat = torch.stack([e * b + (1 - e) * a for a, b, e in zip(x, s, batch.epsilon)]).requires_grad_()
    c_hat = torch.stack([e * b + (1 - e) * a for a, b, e in zip(c, c_s, epsilon)])
    slope = torch.autograd.grad(apply(s_hat, c_hat)[0].sum(), s_hat, create_graph=True)[0]
    L_GP = sum((slope[b].square().sum().sqrt() - 1) ** 2 for b in range(4)) / 4
    L_W = apply(x, c)[0].mean() - apply(s, c_s)[0].mean()
    L_S = ((c - functional_call(state.A, A_sn, (apply(x, c)[1],))) ** 2).sum(1).mean()
    parameters = [p for net in (state.D, *heads) for p in net.parameters()]
    loss = -L_W + 3 * L_GP + 7 * L_S + 30 * content(apply(s, c_s)[1])
    expected = torch.autograd.grad(loss, parameters, materialize_grads=True)
    for p, gradient in zip(parameters, expected):
        torch.testing.assert_close(p.grad, gradient, atol=1e-4, rtol=1e-3)

    state.opt_D.zero_grad()
    score, h = apply(s_macro, c_s)
    L_S = (((c_s - functional_call(state.A, A_sn, (h,))) ** 2).sum(1) * inside).mean()
    parameters, loss = list(state.G.parameters()), -score.mean() + 7 * L_S + 30 * content(h)
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    coco_gan.generator_step(state, [batch], [s_macro], state.opt_G)
    for p, gradient in zip(parameters, expected):
        torch.testing.assert_close(p.grad, gradient, atol=1e-4, rtol=1e-3)
    assert all(p.grad is None for p in state.D.parameters())  # no work for gradients that nobody wants


@pytest.mark.parametrize("config, guided", [(UNEVEN, False), (UNEVEN, True), (CYLINDER, False)])
def test_post_training_changes_d_and_the_first_two_blocks_of_g_alone(config, guided):
    config = dataclasses.replace(config, extrapolate="1", guided=guided)
    state, batch = new_state_and_batch(config, config.ring)
    moved = changed(state, lambda: coco_gan.step_beyond(state, batch))
    whole = {name.split(".")[0] for name in moved}
    assert whole == {"D", "G"} and state.step == 0
    G = {name for name in moved if name[0] == "G"}
    assert {name.split(".")[2] for name in G} == {"0", "1"} and len(G) > 10
    assert {f"D.{name}" for name, _ in state.D.named_parameters()} - moved <= {"D.linear.bias"}
    before = copy.deepcopy((state.opt_G.state_dict(), state.opt_D.state_dict()))
    coco_gan.step_beyond(state, batch)  # the first pair of Adams does not notice
    for was, now in zip(before, (state.opt_G.state_dict(), state.opt_D.state_dict())):
        assert was == now
    assert len(state.opt_G_beyond.state_dict()["state"]) == len([*state.G.blocks[:2].parameters()])
    for pair in ((state.opt_G, state.opt_G_beyond), (state.opt_D, state.opt_D_beyond)):
        assert len({(group["lr"], group["betas"]) for adam in pair for group in adam.param_groups}) == 1


def test_rings_go_beyond_the_borders_that_there_are():
    for topology, text, ring in [
        ("plane", "0", (0, 0)),
        ("plane", "2", (2, 2)),
        ("plane", "1,0", (1, 0)),
        ("cylinder", "2", (2, 0)),
        ("cylinder", "3,0", (3, 0)),
        ("torus", "0", (0, 0)),
    ]:
        assert dataclasses.replace(UNEVEN, topology=topology, extrapolate=text).ring == ring


@pytest.mark.parametrize("config", [UNEVEN, CYLINDER])
def test_continuous_batches_begin_at_every_pixel(config):
    """Each macro patch shows where it was cut; its coordinate says the same."""
    config = dataclasses.replace(config, continuous=True, batch_size=600)
    rows, columns = torch.arange(16).view(-1, 1), torch.arange(24)
    image = torch.stack([rows.expand(16, 24), columns.expand(16, 24), rows + columns], -1).byte()[None]
    rng = torch.Generator().manual_seed(0)
    batch = coco_gan.draw_batch(config, image, torch.tensor([0]), rng, CPU)
    corner = ((batch.x_macro[:, :2, 0, 0] + 1) * 127.5).round().long()  # top, left
    lasts = (16 - 8, 24 - 1 if config.closed[1] else 24 - 12)
    for k, last in enumerate(lasts):
        assert set(corner[:, k].tolist()) == set(range(last + 1))
    expected = coco_gan.macro_coordinates(config, corner[:, 0] / 4, corner[:, 1] / 4)
    torch.testing.assert_close(batch.c_macro, expected)
    assert torch.equal(batch.c_macro, batch.c_generated)
    first = coco_gan.micro_coordinates(config, corner[:, 0] / 4, corner[:, 1] / 4)
    torch.testing.assert_close(batch.c_micro[::6], first)


def test_batches_beyond_reach_one_ring_further_and_real_patches_do_not():
    config = dataclasses.replace(UNEVEN, batch_size=400)
    images = torch.zeros(2, 16, 24, 3, dtype=torch.uint8)
    rng = torch.Generator().manual_seed(0)
    batch = coco_gan.draw_batch(config, images, torch.arange(2), rng, CPU, ring=(1, 2))
    y, x = (sorted(set(batch.c_generated[:, k].tolist())) for k in (0, 1))
    assert y == pytest.approx([-2, -1, 0, 1, 2]) and x == pytest.approx(
        [-7 / 3 + 2 * k / 3 for k in range(8)]
    )
    assert batch.c_macro.abs().max() <= 1
    for b in range(400):  # C'' of the generated patch begins where c' says
        i, j = (batch.c_generated[b, 0] + 1) * 1, (batch.c_generated[b, 1] + 1) * 1.5
        first = coco_gan.micro_coordinates(config, i, j)
        torch.testing.assert_close(batch.c_micro[6 * b], first, atol=1e-5, rtol=0)


def test_images_with_a_ring_hold_the_images_without():
    """And beyond, the patches at the coordinates of appendix E: c'' reaches ±1.66 of R = 4 rows."""
    G = coco_gan.new_state(dataclasses.replace(UNEVEN, topology="plane"), CPU).G_average
    z = coco_gan.latents([1, 2], 8)
    image, larger = coco_gan.full_image(G, z), coco_gan.full_image(G, z, ring=(1, 2))
    assert larger.shape == (2, 3, 16 + 2 * 4, 24 + 4 * 4)
    torch.testing.assert_close(larger[:, :, 4:-4, 8:-8], image, atol=1e-4, rtol=0)
    corner = G(z, torch.tensor([[-5 / 3, 1 + 2 * 2 / 5]] * 2))
    torch.testing.assert_close(larger[:, :, :4, -4:], corner, atol=1e-4, rtol=0)


def test_ring_seams_tell_the_ring_from_the_inside():
    """Steps of 1 everywhere, of 3 at inner borders and of 5 at those of the ring."""
    steps = np.ones(15, int)
    steps[[7]] = 3
    steps[[3, 11]] = 5
    line = np.concatenate([[0], steps.cumsum()])
    images = np.zeros((2, 16, 16, 3), np.uint8) + (line[:, None] + line[None])[None, :, :, None].astype(
        np.uint8
    )
    assert coco_gan.ring_seams(images, 4, (1, 1)) == (5, 3)
    beyond, inside = coco_gan.ring_seams(images, 4, (1, 0))  # across, all three borders are inner ones
    assert beyond == 5 and inside == pytest.approx((3 + 3 + 5 + 5) / 4)
    for without in (coco_gan.ring_seams(images, 4, (0, 0)), coco_gan.ring_seams(images, 1, (1, 1))):
        assert math.isnan(without[0])  # no ring, or no inside
    assert all(map(math.isnan, coco_gan.ring_seams(0 * images, 4, (1, 1))))  # a black picture


def test_frames_lie_outside_of_what_they_frame():
    framed = coco_gan.framed(np.zeros((1, 7, 9, 3), np.uint8), 2, 3, 3, 4, (255, 0, 0))[0]
    expected = np.zeros((7, 9), bool)
    expected[1:6, 2:8] = True
    expected[2:5, 3:7] = False
    assert np.array_equal(framed[..., 0] == 255, expected) and not framed[..., 1:].any()
    whole = coco_gan.framed(np.zeros((1, 4, 4, 3), np.uint8), 0, 0, 4, 4, (0, 0, 255))[0, ..., 2]
    assert whole[1:3, 1:3].sum() == 0 and (whole > 0).sum() == 12  # nothing outside: on its edge


def G_alone(state, batch):
    """s' put together by hand, all patches of a sample from its one z."""
    z = torch.stack([batch.z[b] for b in range(4) for _ in range(6)])
    parameters = coco_gan.spectral_norm(state.G, iterate=False)
    s_micro = functional_call(state.G, parameters, (z, batch.c_micro))
    rows = [torch.cat(list(s_micro[k : k + 3]), dim=2) for k in range(0, 24, 3)]
    return torch.stack([torch.cat(rows[k : k + 2], dim=1) for k in range(0, 8, 2)])


def test_a_step_takes_one_power_iteration_of_each_network():
    state, batch = new_state_and_batch()
    layers = [m for net in (state.G, state.D, state.A) for m in net.modules() if hasattr(m, "v")]
    before = [(m.weight.detach().flatten(1).clone(), m.v.clone()) for m in layers]
    coco_gan.train_step(state, batch)
    for m, (W, v) in zip(layers, before):
        torch.testing.assert_close(m.v, torch.nn.functional.normalize(W.T @ (W @ v), dim=0))


def test_average_follows_the_weights_as_applied():
    state, batch = new_state_and_batch(dataclasses.replace(UNEVEN, average=0.0))
    for name, p in coco_gan.spectral_norm(state.G, iterate=False).items():
        assert torch.equal(state.G_average.get_parameter(name), p)  # from the first picture on
    parameters = coco_gan.spectral_norm(copy.deepcopy(state.G), iterate=True)
    coco_gan.train_step(state, batch)
    for name, p in parameters.items():
        torch.testing.assert_close(state.G_average.get_parameter(name), p)
    for name, buffer in state.G_average.named_buffers():
        assert torch.equal(buffer, state.G.get_buffer(name))
    state.config, state.step = dataclasses.replace(UNEVEN, average=0.999), 2
    old = copy.deepcopy(state.G_average.state_dict())
    parameters = coco_gan.spectral_norm(state.G, iterate=False)
    coco_gan.update_average(
        state, parameters, 1 - coco_gan.decay(state)
    )  # after two steps (1 + 2) / (10 + 2)
    for name, p in state.G_average.named_parameters():
        torch.testing.assert_close(p, 0.25 * old[name] + 0.75 * parameters[name].detach())


def test_patches_generated_together_equal_those_generated_alone(trained):
    G = coco_gan.load(trained)
    z = coco_gan.latents([3, 4], 8)
    whole = coco_gan.full_image(G, z)
    assert whole.shape == (2, 3, 16, 24)
    with torch.no_grad():
        for b, i, j in itertools.product(range(2), range(4), range(6)):
            c = coco_gan.micro_coordinates(UNEVEN, torch.tensor([i]), torch.tensor([j]))
            alone = G(z[b : b + 1], c)[0]
            torch.testing.assert_close(whole[b, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4], alone)


def test_one_seed_is_one_image_whatever_the_batch(trained):
    G = coco_gan.load(trained)
    z = coco_gan.latents(range(7), 8)
    together = coco_gan.to_uint8(coco_gan.full_image(G, z, batch_size=7))
    for batch_size in (1, 2, 3):
        assert np.array_equal(coco_gan.to_uint8(coco_gan.full_image(G, z, batch_size)), together)
    assert not np.array_equal(together[0], together[1])
    assert torch.equal(coco_gan.latents([6], 8)[0], z[6])


@pytest.mark.parametrize("name", ["toy_faces.pt", "toy_landscapes.pt"])
def test_checkpoints_of_earlier_versions_load(name):
    """These were written when there was no Q, no ring, no continuous sampling and no parts."""
    contents, config = coco_gan.read_checkpoint(coco_gan.ASSETS / name)
    added = {field.name for field in dataclasses.fields(Config)} - contents["config"].keys()
    assert added == {"guided", "alpha_q", "extrapolate", "continuous", "accumulate", "sync_stats"}
    assert all(getattr(config, field) == getattr(Config(), field) for field in added)
    coco_gan.load(coco_gan.ASSETS / name)


def test_load_gives_the_average_or_the_weights_themselves(trained):
    contents = torch.load(trained / "checkpoint-000000004.pt", weights_only=True)
    G = coco_gan.load(trained)
    assert G.config == UNEVEN and not G.training
    assert all(torch.equal(v, contents["G_average"][k]) for k, v in G.state_dict().items())
    raw = coco_gan.load(trained / "checkpoint-000000004.pt", raw=True)
    W = contents["G"]["conv.weight"].flatten(1)
    expected = W / (W @ contents["G"]["conv.v"]).norm()
    torch.testing.assert_close(raw.conv.weight.flatten(1), expected)


# ----------------------------------------------------------------------------------------------------------
# Runs: log, pictures, checkpoints, resuming
# ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "log.jsonl", "real.png", "real-macro.png", "sample-000000000.png"} <= names
    assert {f"checkpoint-00000000{n}.pt" for n in range(1, 5)} | {"sample-000000004.png"} <= names
    assert not any(name.endswith(".tmp") for name in names)
    entry = json.loads((trained / "log.jsonl").read_text().splitlines()[-1])
    assert entry["step"] == 4 and entry["images"] == 16 and entry["peak_memory_mb"] > 10
    assert {*coco_gan.LOSSES[:-1], "images_per_second", "seconds_left"} <= entry.keys()
    assert Config(**json.loads((trained / "config.json").read_text())) == UNEVEN
    first, last = picture(trained / "sample-000000000.png"), picture(trained / "sample-000000004.png")
    assert first.shape == last.shape and not np.array_equal(first, last)


def only_checkpoint(run, step):
    """Leave one checkpoint in a run, and return what the last one held."""
    last = torch.load(coco_gan.checkpoints(run)[-1], weights_only=True)
    for path in coco_gan.checkpoints(run):
        if path.name != f"checkpoint-{step:09d}.pt":
            path.unlink()
    return last


def assert_same(before, after):
    old, new = dict(tensors(before)), dict(tensors(after))
    assert old.keys() == new.keys() and len(old) > 100
    assert [name for name in old if not torch.equal(old[name], new[name])] == []


def test_resumed_equals_uninterrupted_bit_for_bit(copied):
    before = only_checkpoint(copied, step=2)
    assert before["step"] == 4
    assert coco_gan.main(["train", "--resume", "run", "--log-every", "1", "--workers", "1"]) == 0
    after = torch.load(copied / "checkpoint-000000004.pt", weights_only=True)
    assert_same(before, after)
    logged = [json.loads(line)["step"] for line in (copied / "log.jsonl").read_text().splitlines()]
    assert logged == [2, 3, 4]  # what came after the checkpoint is forgotten and comes again


def test_averages_of_adam_may_lie_otherwise_in_memory(copied):
    """As in a file of another version; or all at one address, where Adam in C would write beyond it."""
    before = only_checkpoint(copied, step=2)
    path = copied / "checkpoint-000000002.pt"
    contents = torch.load(path, weights_only=True)
    for averages in contents["opt_G"]["state"].values():
        averages["exp_avg_sq"] = averages["exp_avg_sq"].contiguous()
        averages["exp_avg"] = torch.zeros(1).expand(averages["exp_avg"].shape)  # not used, for β1 is 0
    torch.save(contents | {"more": torch.zeros(10**6)}, path)
    assert coco_gan.main(["train", "--resume", "run", "--log-every", "1", "--workers", "1"]) == 0
    assert_same(before, torch.load(copied / "checkpoint-000000004.pt", weights_only=True))


def test_guided_runs_resume_bit_for_bit_and_log_l_q(here):
    command = ["train", "--run", "run", "--device", "cpu", "--save-every", "1", "--keep", "9", "--guided"]
    assert coco_gan.main([*command, *flags(UNEVEN)]) == 0
    before = only_checkpoint(Path("run"), step=2)
    assert {"Q", "opt_Q"} <= before.keys() and "opt_G_beyond" not in before
    assert coco_gan.main(["train", "--resume", "run", "--log-every", "1"]) == 0
    assert_same(before, torch.load("run/checkpoint-000000004.pt", weights_only=True))
    entries = coco_gan.logged(Path("run"))
    assert all(0.3 < entry["L_Q"] < 1 for entry in entries) and len(entries) == 2


def test_post_training_begins_where_a_run_ended_and_leaves_it_alone(copied, monkeypatch, capsys):
    step_beyond, reached = coco_gan.step_beyond, []

    def noted(state, batch):
        reached.append(batch.c_generated.abs().max())
        step_beyond(state, batch)

    monkeypatch.setattr(coco_gan, "step_beyond", noted)
    before = {path: path.read_bytes() for path in copied.iterdir()}
    command = ["train", "--extrapolate", "1,2", "--from", "run", "--save-every", "1", "--keep", "9"]
    assert coco_gan.main([*command, "--steps", "7", "--log-every", "1", "--sample-every", "100"]) == 0
    assert "ring seam " in capsys.readouterr().out
    assert {path: path.read_bytes() for path in copied.iterdir()} == before
    assert len(reached) == 3 and max(reached) > 1
    run = Path("runs/extrapolate-001")
    assert [path.name[-4] for path in coco_gan.checkpoints(run)] == ["5", "6", "7"]
    assert picture(run / "sample-000000004.png").shape == (
        6 * (16 + 2 * 4 + 2) - 2,
        4 * (24 + 4 * 4 + 2) - 2,
        3,
    )
    entry = coco_gan.logged(run)[-1]
    assert entry["ring_seam"] > 0 and entry["inner_seam"] > 0
    last = only_checkpoint(run, step=5)
    assert {"opt_G_beyond", "opt_D_beyond"} <= last.keys()
    assert coco_gan.main(["train", "--resume", str(run), "--sample-every", "100"]) == 0
    assert_same(last, torch.load(run / "checkpoint-000000007.pt", weights_only=True))
    # From a post-trained run, with another ring: a new pair of Adams.
    again = ["train", "--from", str(run), "--extrapolate", "1", "--run", "again", "--steps", "8"]
    assert coco_gan.main(again) == 0 and coco_gan.read_checkpoint(coco_gan.checkpoints(Path("again"))[0])
    assert (Path("again") / "config.json").read_text().count('"extrapolate": "1"') == 1


@pytest.mark.parametrize("ring, last", [(1.1, 8), (0.9, 6)])
def test_post_training_ends_when_the_borders_of_the_ring_are_those_inside(ring, last, copied, monkeypatch):
    monkeypatch.setattr(coco_gan, "ring_seams", lambda *a: (ring, 1.0))
    command = ["train", "--extrapolate", "1", "--from", "run", "--steps", "8", "--sample-every", "2"]
    assert coco_gan.main(command) == 0
    assert coco_gan.checkpoints(Path("runs/extrapolate-001"))[-1].name == f"checkpoint-{last:09d}.pt"


def test_the_faintest_ring_is_one_that_was_drawn_and_is_not_forgotten(copied, monkeypatch):
    seams = iter([1.2, 4.0, 1.5, 3.0, 3.0])
    monkeypatch.setattr(coco_gan, "ring_seams", lambda *a: (next(seams), 1.0))
    command = ["--sample-every", "2", "--eval-every", "1", "--eval-count", "20", "--log-every", "5"]
    post = ["train", "--extrapolate", "1", "--from", "run", "--steps", "8", "--run", "post"]
    assert coco_gan.main([*post, *command]) == 0  # 1.2 before, 4.0 after step 6, 1.5 after step 8
    assert torch.load("post/best.pt", weights_only=True)["step"] == 8
    assert [entry["step"] for entry in coco_gan.logged(Path("post")) if "swd" in entry] == [5, 6, 7, 8]
    assert coco_gan.main(["train", "--resume", "post", "--steps", "10", *command]) == 0  # 3.0
    assert torch.load("post/best.pt", weights_only=True)["step"] == 8


def test_post_training_keeps_the_step_of_the_faintest_ring(copied, monkeypatch, capsys):
    seams = iter([9.0, 4.0, 2.0, 3.0])  # before, and after each of the steps
    monkeypatch.setattr(coco_gan, "ring_seams", lambda *a: (next(seams), 1.0))
    command = ["train", "--extrapolate", "1", "--from", "run", "--steps", "7", "--sample-every", "1"]
    assert coco_gan.main([*command, "--run", "post"]) == 0
    assert torch.load("post/best.pt", weights_only=True)["step"] == 6
    assert "sample --checkpoint post/best.pt --extrapolate 1" in capsys.readouterr().out


def test_evaluation_in_training_keeps_the_best_and_changes_nothing(here, monkeypatch, capsys):
    config = dataclasses.replace(UNEVEN, height=32, holdout=300, steps=6)
    run = ["train", "--device", "cpu", "--log-every", "4", "--save-every", "6"]
    assert coco_gan.main([*run, "--run", "plain", *flags(config)]) == 0
    from experiments import metrics

    figures, seen, whole = iter([5.0, 30.0, 10.0, 20.0]), [], metrics.in_training  # the first: the floor

    def in_training(generate, real, *rest):
        first = metrics.MOST_IMAGES + 5
        seen.append((generate(first, first + 2), real, whole(generate, real, *rest)))
        return {**seen[-1][2], "swd": next(figures)}

    monkeypatch.setattr(metrics, "in_training", in_training)
    measured = [*run, "--run", "measured", "--eval-every", "2", "--eval-count", "40", *flags(config)]
    assert coco_gan.main(measured) == 0
    first, second = (
        torch.load(f"{name}/checkpoint-000000006.pt", weights_only=True) for name in ("plain", "measured")
    )
    assert_same(first, second)  # to the bit as without
    entries = {entry["step"]: entry.get("swd") for entry in coco_gan.logged(Path("measured"))}
    assert entries == {2: 30, 4: 10, 6: 20} and "swd 10.00" in capsys.readouterr().out
    assert {entry["swd_floor"] for entry in coco_gan.logged(Path("measured"))} == {5}
    assert torch.load("measured/best.pt", weights_only=True)["step"] == 4
    G = coco_gan.load("measured/best.pt")
    seeds = [metrics.MOST_IMAGES + 5, metrics.MOST_IMAGES + 6]
    expected = coco_gan.to_uint8(coco_gan.full_image(G, coco_gan.latents(seeds, 8)))
    assert np.array_equal(seen[2][0], expected)
    stored = data.load_images("toy:faces", 32, 24, cache="cache")
    kept, held_out = coco_gan.split(len(stored), 300)
    assert seen[0][1].shape == (40, 32, 24, 3) and len(seen) == 4
    assert all(any(np.array_equal(x, stored[k]) for k in held_out) for x in seen[0][1][::13])
    assert all(any(np.array_equal(x, stored[k]) for k in kept) for x in seen[0][0])  # of the floor
    assert seen[0][2].keys() == {"swd", "seam_ratio"} and 10 < seen[0][2]["swd"] < seen[1][2]["swd"]
    # A run that goes on does not forget the best.
    monkeypatch.setattr(metrics, "in_training", lambda *a: {"swd": 15.0})
    assert coco_gan.main(["train", "--resume", "measured", "--steps", "8", "--eval-every", "8"]) == 0
    assert torch.load("measured/best.pt", weights_only=True)["step"] == 4


def test_evaluation_says_what_it_needs(here, monkeypatch, capsys):
    small = ["train", "--device", "cpu", *flags(dataclasses.replace(UNEVEN, height=8, steps=1))]
    assert coco_gan.main([*small, "--run", "one"]) == 0  # by default it is left out
    assert coco_gan.main([*small, "--run", "two", "--eval-every", "1"]) == 2
    assert "--eval-every 1 needs images of at least 16 pixels a side; leave it out" in capsys.readouterr().err
    assert not Path("two").exists()
    import_module = importlib.import_module

    def missing(name):
        if name == "experiments.metrics":
            raise ModuleNotFoundError(name)
        return import_module(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    large = ["train", "--device", "cpu", *flags(dataclasses.replace(UNEVEN, steps=1))]
    assert coco_gan.main([*large, "--run", "three", "--eval-every", "1"]) == 2
    assert "--eval-every 1 needs the folder experiments/ beside coco_gan.py" in capsys.readouterr().err
    assert coco_gan.main([*large, "--run", "four"]) == 0


@pytest.mark.parametrize("line", ["{", "[]", '{"images": 1}'])
def test_a_damaged_log_is_named(line, copied, capsys):
    (copied / "log.jsonl").write_text(f"{line}\n")
    assert coco_gan.main(["train", "--resume", "run", "--steps", "5"]) == 2
    assert "run/log.jsonl has a line that is no entry of a log" in capsys.readouterr().err


def test_the_best_goes_on_as_the_message_says(here, capsys):
    config = dataclasses.replace(UNEVEN, steps=2)
    command = ["train", "--device", "cpu", "--run", "run", "--eval-every", "1", "--eval-count", "20"]
    assert coco_gan.main([*command, *flags(config)]) == 0
    step = torch.load("run/best.pt", weights_only=True)["step"]
    assert coco_gan.main(["train", "--resume", "run/best.pt", "--steps", "3"]) == 2
    name = re.search(r"copy it to a new folder as (\S+)", capsys.readouterr().err)[1]
    Path("branch").mkdir()
    shutil.copy("run/best.pt", f"branch/{name}")
    assert coco_gan.main(["train", "--resume", "branch", "--steps", "3"]) == 0
    assert name == f"checkpoint-{step:09d}.pt" and Path("branch/checkpoint-000000003.pt").exists()


def test_resume_takes_more_steps_and_nothing_else(copied, capsys):
    assert coco_gan.main(["train", "--resume", "run"]) == 2
    assert (
        "run/checkpoint-000000004.pt has done 4 steps already; --steps counts them too: give more than that"
        in capsys.readouterr().err
    )
    assert coco_gan.main(["train", "--resume", "run", "--lr-g", "0.5"]) == 2
    assert "--lr-g was 0.0001 in run/checkpoint-000000004.pt and is now 0.5" in capsys.readouterr().err
    assert coco_gan.main(["train", "--resume", "run", "--preset", "tiny"]) == 2
    assert "--preset cannot be given with --resume" in capsys.readouterr().err
    assert coco_gan.main(["train", "--resume", "run/checkpoint-000000002.pt"]) == 2
    assert (
        "checkpoint-000000002.pt is not the newest checkpoint of a run; give run" in capsys.readouterr().err
    )
    Path("photos").mkdir()
    Image.new("RGB", (30, 30), "red").save("photos/red.png")
    assert coco_gan.main(["train", "--resume", "run", "--steps", "5", "--data", "photos"]) == 2
    assert "has other images than run/checkpoint-000000004.pt was trained on" in capsys.readouterr().err
    assert coco_gan.main(["train", "--resume", "run", "--steps", "5"]) == 0
    assert torch.load(copied / "checkpoint-000000005.pt", weights_only=True)["config"]["steps"] == 5


KILLED_WHILE_SAVING = """
import os, signal, sys, torch, coco_gan
real, saves = {place}, []
def dies(*args, **kwargs):
    saves.append(real(*args, **kwargs) if len(saves) < 2 else os.kill(os.getpid(), signal.SIGKILL))
{place} = dies
sys.exit(coco_gan.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
@pytest.mark.parametrize("place", ["os.fsync", "torch.save"])
def test_killed_while_saving_keeps_the_last_whole_checkpoint(place, copied):
    before = only_checkpoint(copied, step=1)
    code, resume = KILLED_WHILE_SAVING.format(place=place), ["train", "--resume", "run", "--save-every", "1"]
    resume += ["--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", code, *resume, "--keep", "9"], env=environment)
    assert killed.returncode == -signal.SIGKILL
    kept = coco_gan.checkpoints(copied)
    assert [path.name[-4:] for path in kept] == ["1.pt", "2.pt", "3.pt"] and (
        copied / "checkpoint.tmp"
    ).exists()
    assert coco_gan.load("run").config == UNEVEN
    assert coco_gan.main(resume) == 0  # the lock of the killed process is no hindrance
    assert_same(before, torch.load(copied / "checkpoint-000000004.pt", weights_only=True))
    assert len(coco_gan.checkpoints(copied)) == 2 and not (copied / "checkpoint.tmp").exists()


def heed(number, request):
    """Let the processes of a test heed a signal, also where nohup or a shell's & has them ignore it."""
    request.addfinalizer(functools.partial(signal.signal, number, signal.getsignal(number)))
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process, it does not signal it")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", 1)])
def test_signals_save_and_say_how_to_go_on(number, copied, request):
    heed(number, request)
    command = [sys.executable, str(ROOT / "coco_gan.py"), "train", "--resume", "run", "--steps", "1000000"]
    command += ["--device", "cpu"]
    with subprocess.Popen([*command, "--log-every", "1"], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 6 "):
                break
        process.send_signal(number)
        rest = process.stdout.read()
    assert process.returncode == 128 + number
    saved = coco_gan.checkpoints(copied)[-1]
    assert int(saved.stem[-9:]) >= 6 and f"saved {Path('run') / saved.name}" in rest
    assert "python coco_gan.py train --resume run" in rest
    assert coco_gan.load("run").config.steps == 1000000


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE")
def test_a_closed_pipe_saves_and_ends_quietly(copied):
    command = [sys.executable, str(ROOT / "coco_gan.py"), "train", "--resume", "run", "--steps", "1000000"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([*command, "--device", "cpu", "--log-every", "1"], **pipes) as process:
        for line in process.stdout:
            if line.startswith("step 6 "):
                break
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (128 + signal.SIGPIPE, "")
    assert int(coco_gan.checkpoints(copied)[-1].stem[-9:]) >= 6
    dry = [sys.executable, str(ROOT / "coco_gan.py"), "train", "--dry-run"]
    with subprocess.Popen(dry, **pipes) as process:
        process.stdout.close()  # before there is anything to read
        error = process.stderr.read()
    assert (process.returncode, error) == (128 + signal.SIGPIPE, "")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
def test_nohup_goes_on_without_a_terminal(copied):
    command = ["nohup", sys.executable, str(ROOT / "coco_gan.py"), "train", "--resume", "run", "--steps", "9"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with subprocess.Popen([*command, "--device", "cpu", "--log-every", "1"], **pipes) as process:
        for line in process.stdout:
            process.send_signal(signal.SIGHUP)
    assert process.returncode == 0 and coco_gan.checkpoints(copied)[-1].name.endswith("9.pt")


def test_a_loss_that_is_not_finite_stops_the_run(copied, monkeypatch, capsys):
    step, count = coco_gan.train_step, itertools.count(1)
    poison = torch.tensor([0, 0, 0, 0, 0, float("nan")])
    resume = ["train", "--resume", "run", "--steps", "20", "--log-every", "4", "--save-every", "4"]
    monkeypatch.setattr(
        coco_gan, "train_step", lambda *a: step(*a) + (poison if next(count) > 2 else 0 * poison[0])
    )
    assert coco_gan.main(resume) == 2
    error = capsys.readouterr().err
    assert "L_S_generated is nan at step 7; the last good checkpoint is run/checkpoint-000000004.pt" in error
    assert coco_gan.checkpoints(copied)[-1].name == "checkpoint-000000004.pt"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_names_the_batch_size_to_try(error, copied, monkeypatch, capsys):
    def full(*args):
        raise error

    monkeypatch.setattr(coco_gan, "train_step", full)
    assert coco_gan.main(["train", "--resume", "run", "--steps", "9"]) == 2
    assert "--batch-size 4 does not fit in the memory of cpu; try --accumulate 2\n" in capsys.readouterr().err
    assert coco_gan.main(["train", "--resume", "run", "--steps", "9", "--accumulate", "2"]) == 2
    text = "--accumulate 2 parts of --batch-size 4 does not fit in the memory of cpu; try --batch-size 2 in a"
    assert text in capsys.readouterr().err
    monkeypatch.setattr(coco_gan, "micro_patches", full)
    assert coco_gan.main(["sample", "--checkpoint", "run", "--batch-size", "8"]) == 2
    assert "memory of cpu is full; try --batch-size 4" in capsys.readouterr().err


def test_other_errors_of_pytorch_are_not_hidden(copied, monkeypatch):
    def broken(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(coco_gan, "train_step", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        coco_gan.main(["train", "--resume", "run", "--steps", "9"])


@pytest.mark.parametrize(
    "place, error",
    [("os.fsync", OSError(28, "No space left on device")), ("torch.save", RuntimeError("failed writing"))],
)
def test_a_full_disk_keeps_the_last_checkpoint(place, error, copied, monkeypatch, capsys):
    def full(*args):
        raise error

    monkeypatch.setattr(place, full)
    assert coco_gan.main(["train", "--resume", "run", "--steps", "5"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: --run run cannot be written: ") and message.count("\n") == 1
    assert coco_gan.checkpoints(copied)[-1].name == "checkpoint-000000004.pt" and coco_gan.load("run")


def test_a_weight_that_is_not_finite_is_not_saved(copied, monkeypatch, capsys):
    step = coco_gan.train_step

    def poisons(state, batch):
        losses = step(state, batch)
        with torch.no_grad():
            state.G.conv.bias[0] = float("inf")
        return losses

    monkeypatch.setattr(coco_gan, "train_step", poisons)
    assert coco_gan.main(["train", "--resume", "run", "--steps", "5"]) == 2
    assert "a weight is not finite after step 5; the last good checkpoint" in capsys.readouterr().err
    assert coco_gan.checkpoints(copied)[-1].name == "checkpoint-000000004.pt"


def test_tensorboard_gets_the_log_where_it_is_installed(copied, monkeypatch):
    calls = []

    class SummaryWriter(contextlib.nullcontext):
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def __enter__(self):
            return self

        def add_scalar(self, name, value, step):
            calls.append((name, step))

        def __exit__(self, *error):
            calls.append("closed")

    fake = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr(coco_gan.importlib.util, "find_spec", lambda name: name == "tensorboard")
    assert coco_gan.main(["train", "--resume", "run", "--steps", "5"]) == 0
    assert calls[0] == ("run", 5) and ("L_GP", 5) in calls and calls[-1] == "closed"


def six_steps(step_of, config=UNEVEN, device=CPU):
    """The losses of six steps of a new run, and its networks."""
    state = coco_gan.new_state(config, device)
    step = step_of(state)
    images = torch.randint(
        256,
        (6, config.height, config.width, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(3),
    ).to(device)
    draw = config, images, torch.arange(6), state.rng, device
    losses = torch.stack([step(coco_gan.draw_batch(*draw)) for _ in range(6)])
    nets = zip(("G_average", *"GDA"), [state.G_average, *coco_gan.networks(state)])
    return losses, {name: net.state_dict() for name, net in nets}, state.step


def plain(state):
    return lambda batch: coco_gan.train_step(state, batch)


def test_kernels_that_fail_are_not_used(monkeypatch, recwarn, capsys):
    def fails(*args):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    kernels.failure.cache_clear()
    kernels._work_on_the_gpu.cache_clear()
    monkeypatch.setattr(kernels, "verify", fails)
    monkeypatch.setattr(kernels, "triton", True)
    on_a_gpu = SimpleNamespace(is_cuda=True, device="cuda:0")
    for _ in range(2):
        assert not kernels._use_triton("auto", on_a_gpu, torch.float32)
    (warning,) = [w.message.args[0] for w in recwarn]  # said once
    assert warning.startswith(
        "the Triton kernels do not work here (Failed to find C compiler.); PyTorch does"
    )
    assert coco_gan.main(["train", "--device", "cpu", "--dry-run", "--impl", "triton"]) == 2
    text = (
        "error: --impl triton does not work here: Failed to find C compiler.; give torch, or leave it out\n"
    )
    assert capsys.readouterr().err == text
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    coco_gan.choose_impl("auto", torch.device("cuda"))
    text = (
        "warning: Triton's kernels do not work here (Failed to find C compiler.); PyTorch does their work\n"
    )
    assert capsys.readouterr().err == text and kernels.DEFAULT == "torch"
    monkeypatch.setattr(kernels, "_interpreted", lambda: False)
    monkeypatch.setattr(kernels, "DEFAULT", "triton")  # images that do not fit on the GPU stay where they are
    assert not kernels._use_triton("auto", SimpleNamespace(is_cuda=False, device="cpu"), torch.uint8)
    monkeypatch.setattr(kernels, "DEFAULT", "auto")
    monkeypatch.setattr(kernels, "verify", lambda *args: None)
    kernels.failure.cache_clear()
    kernels._work_on_the_gpu.cache_clear()
    assert kernels._use_triton("auto", on_a_gpu, torch.float32)
    monkeypatch.setattr(kernels, "DEFAULT", "torch")
    assert not kernels._use_triton("auto", on_a_gpu, torch.float32)
    kernels.failure.cache_clear()
    kernels._work_on_the_gpu.cache_clear()


@pytest.mark.parametrize("bf16", [False, True])
def test_precision_is_what_the_device_is_made_for(bf16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    auto = dataclasses.replace(UNEVEN, precision="auto")
    assert coco_gan.precision_of(auto, torch.device("cuda")) == ("bf16" if bf16 else "tf32")
    assert coco_gan.precision_of(auto, CPU) == ("bf16" if bf16 else "fp32")
    assert coco_gan.precision_of(dataclasses.replace(auto, precision="tf32"), CPU) == "tf32"


STEPS = [{}, dict(guided=True), dict(accumulate=2), dict(precision="fp32")]


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


class Replayed(TorchDispatchMode):
    """Stands for torch.cuda.CUDAGraph: notes operations on tensors, and does them again on the same memory.

    Whatever else a step does is done while it is recorded, and then never again. Recording is done without
    running: what tensors hold afterwards means nothing.
    """

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.done.append((function, args, kwargs or {}, result))
        return result

    @contextlib.contextmanager
    def record(self, held):
        before = [t.clone() for t in held]
        with self:
            yield
        for t, value in zip(held, before):
            t.copy_(value)
        kept = {memory(t) for t in held}
        for _, t in tensors([result for *_, result in self.done]):
            if t.is_floating_point() and memory(t) not in kept:
                t.detach().fill_(math.nan)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.done:
            for (_, new), (_, old) in zip(tensors([function(*args, **kwargs)]), tensors([result])):
                if memory(new) != memory(old):  # else it is a view, or was written in place
                    old.copy_(new)


@pytest.mark.parametrize("change", STEPS)
def test_a_step_can_be_replayed(change, monkeypatch):
    """A graph has all that changes from step to step in tensors: replayed, it trains as ordinary steps do."""
    state = coco_gan.new_state(dataclasses.replace(UNEVEN, **change), CPU)
    optimizers = [part for name, part in coco_gan.stateful(state).items() if name.startswith("opt")]
    graphs = []

    def graph_of():
        graphs.append(Replayed())
        return graphs[-1]

    def held(graph):
        nets = [state.G_average, *coco_gan.networks(state)]
        return [t for part in (*nets, *optimizers) for _, t in tensors(part.state_dict())]

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph_of)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph.record(held(graph)))
    expected = six_steps(plain, state.config)
    monkeypatch.setattr(coco_gan, "new_state", lambda *_: state)
    found = six_steps(coco_gan.graphed, state.config)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    (graph,) = graphs
    assert len(graph.done) > 500


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("change", STEPS)
def test_a_graph_changes_nothing(change, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    config, device = dataclasses.replace(UNEVEN, **change), torch.device("cuda")
    found, expected = (six_steps(step_of, config, device) for step_of in (coco_gan.graphed, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("full", [False, True])
def test_a_step_that_makes_no_graph_is_told(full, monkeypatch):
    @contextlib.contextmanager
    def capture(graph):
        full_or_not = torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not permitted\nhere")
        try:
            raise full_or_not[not full]
        finally:
            raise RuntimeError("capture was invalidated")
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    text = "--graph: a step makes no CUDA graph here (not permitted); leave it out"
    with pytest.raises(
        *[torch.OutOfMemoryError] if full else [UserError], match=None if full else re.escape(text)
    ):
        six_steps(coco_gan.graphed)  # the first three are ordinary ones


class Waiting(TorchDispatchMode):
    """Notes the operations for which a CPU would wait for a GPU, which no CUDA graph may hold."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "index", "unique_consecutive"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("change", [{}, dict(guided=True, accumulate=2), dict(extrapolate="1", M=2, N=1)])
def test_no_part_of_a_step_waits_and_nothing_of_it_stays(change):
    config = dataclasses.replace(UNEVEN, **change)
    state, batch = new_state_and_batch(config, config.ring)
    coco_gan.both_steps(state, batch, 0.5)
    with Waiting() as waiting:
        coco_gan.both_steps(state, batch, torch.tensor(0.5))
        assert waiting.seen == []
        batch.z.sum().item()
    assert waiting.seen == ["_local_scalar_dense"]
    # What led back to a parameter would hold the stream on which it was made.
    gc.collect()
    assert not [t for t in gc.get_objects() if type(t) is torch.Tensor and t.grad_fn is not None]


@pytest.mark.parametrize("change", [{}, dict(guided=True, accumulate=2), dict(extrapolate="1", M=2, N=1)])
def test_a_step_mixes_no_devices(change, monkeypatch):
    """PyTorch lets no operation have tensors of two devices: where numbers are drawn, where networks are."""
    monkeypatch.setattr(coco_gan, "mixed_precision", contextlib.nullcontext)
    config, meta = dataclasses.replace(UNEVEN, **change), torch.device("meta")  # of shapes alone
    with meta:
        state = coco_gan.new_state(config, meta)
    images, rng = torch.zeros(6, config.height, config.width, 3, dtype=torch.uint8), torch.Generator()
    batch = coco_gan.draw_batch(config, images, torch.arange(6), rng, meta, config.ring)
    assert coco_gan.train_step(state, batch).device == meta
    if any(config.ring):
        coco_gan.step_beyond(state, batch)
    assert coco_gan.full_image(state.G_average, torch.zeros(2, config.z_dim), ring=config.ring).device == meta
    for name in vars(batch):
        stray = dataclasses.replace(batch, **{name: torch.zeros(getattr(batch, name).shape)})
        with pytest.raises(RuntimeError, match="device"):
            coco_gan.train_step(state, stray)


def test_a_graph_is_for_one_process_on_a_gpu(monkeypatch, capsys):
    message = "--graph is for a single process on a GPU; leave it out"
    assert coco_gan.main(["train", "--device", "cpu", "--dry-run", "--graph"]) == 2
    assert message in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", (chosen := []).append)
    assert coco_gan.main(["train", "--device", "cuda:1", "--dry-run", "--graph", "--impl", "torch"]) == 0
    assert chosen[-1] == 1  # streams and graphs are those of the current device
    monkeypatch.setattr(coco_gan, "world", lambda: 2)
    monkeypatch.setattr(coco_gan, "joined", contextlib.nullcontext)
    assert coco_gan.main(["train", "--device", "cuda", "--dry-run", "--graph", "--impl", "torch"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_does_not_wait_for_the_gpu():
    device = torch.device("cuda")
    state = coco_gan.new_state(UNEVEN, device)
    images = torch.randint(0, 256, (6, 16, 24, 3), dtype=torch.uint8, device=device)
    for mode in ("default", "error"):  # the first step may wait: it sets up Adam and the libraries
        torch.cuda.set_sync_debug_mode(mode)
        try:
            losses = coco_gan.train_step(
                state, coco_gan.draw_batch(UNEVEN, images, torch.arange(6), state.rng, device)
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all()


def test_a_run_in_use_is_left_alone(copied, capsys):
    with coco_gan.lock_run(copied):
        assert coco_gan.main(["train", "--resume", "run", "--steps", "5"]) == 2
        assert "run is in use by another process" in capsys.readouterr().err
    assert coco_gan.main(["train", "--resume", "run", "--steps", "5"]) == 0


def test_new_runs_take_the_next_free_folder(here):
    assert [coco_gan.new_run(None, "tiny").name for _ in range(2)] == ["tiny-001", "tiny-002"]


def test_split_spreads_the_held_out_images():
    kept, held_out = coco_gan.split(10, 4)
    assert held_out.tolist() == [0, 3, 6, 9] and kept.tolist() == [1, 2, 4, 5, 7, 8]
    assert len(coco_gan.split(10, 0)[0]) == 10


# ----------------------------------------------------------------------------------------------------------
# Batches in parts, and several processes
# ----------------------------------------------------------------------------------------------------------

# Both sides of a comparison run this. In float64, where rounding flips no ReLU, and without learning rates:
# Adam would make whole steps of gradients that are nothing but rounding.
ONE_STEP = """
import dataclasses, sys, torch, coco_gan
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double

def one_step(config, neutral=False, ring=False):
    config = dataclasses.replace(config, lr_g=0.0, lr_d=0.0, precision="fp32")
    state = coco_gan.new_state(config, torch.device("cpu"))
    for net in coco_gan.networks(state):
        net.train(not neutral)
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (9, 16, 24, 3), dtype=torch.uint8, generator=rng)
    draw = config, images, torch.arange(9), state.rng, state.device
    losses = coco_gan.mean_of_all(coco_gan.train_step(state, coco_gan.draw_batch(*draw)))
    if any(config.ring):
        coco_gan.step_beyond(state, coco_gan.draw_batch(*draw, config.ring))
    coco_gan.share_statistics(state)
    nets = dict(G=state.G, D=state.D, A=state.A, average=state.G_average)
    nets |= {} if state.Q is None else {"Q": state.Q}
    found = {f"{n}.{k}": p.grad for n, net in nets.items() for k, p in net.named_parameters()}
    found |= {f"{n}.{k}": b.clone() for n, net in nets.items() for k, b in net.named_buffers()}
    return {k: t for k, t in found.items() if t is not None} | {"losses": losses}
"""
TWELVE = dataclasses.replace(UNEVEN, batch_size=12, guided=True, mirror=True, yaw=True, topology="torus")
COMPARED = {
    "whole": TWELVE,
    "beyond": dataclasses.replace(TWELVE, topology="plane", yaw=False, extrapolate="1,0", M=2),
    "parts": dataclasses.replace(TWELVE, accumulate=3),
}


@contextlib.contextmanager
def in_float64():
    names, saved = {}, torch.Tensor.float
    exec(ONE_STEP, names)
    try:
        yield names["one_step"]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.Tensor.float = saved


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max().clamp(min=1).item()
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10 * scale, msg=name)


def start_processes(count, *command, **options):
    """The processes that torchrun would start, without torchrun's own."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    group = dict(WORLD_SIZE=str(count), MASTER_ADDR="localhost", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    group |= {"PYTHONPATH": str(ROOT), **os.environ} | group
    ranks = ({**group, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(count))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return [subprocess.Popen([sys.executable, *command], env=env, **pipes, **options) for env in ranks]


@pytest.mark.parametrize("name", ["whole", "beyond"])
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_of_a_batch_give_its_gradients(name, parts):
    with in_float64() as one_step:  # batch statistics apart: they are those of each part
        whole = one_step(COMPARED[name], neutral=True)
        found = one_step(dataclasses.replace(COMPARED[name], accumulate=parts), neutral=True)
    assert_close(found, whole)
    assert whole["G.blocks.0.conv1.weight"].abs().max() > 1e-3


def test_parts_keep_their_memory_apart_and_update_running_statistics_once():
    config = dataclasses.replace(UNEVEN, batch_size=12, accumulate=3)
    state, batch = new_state_and_batch(config)
    alive, most = weakref.WeakSet(), []
    generate = coco_gan.generate_macro

    def counted(*args):
        s_macro = generate(*args)
        if s_macro.requires_grad:
            alive.add(s_macro)
            most.append(len(alive))
        assert len(s_macro) == 4
        return s_macro

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco_gan, "generate_macro", counted)
        coco_gan.train_step(state, batch)
    assert most == [1, 1, 1]
    assert state.G.norm.num_batches_tracked == 3 and state.G_average.norm.num_batches_tracked == 3


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """What two processes find, each as {name of COMPARED: tensors}, and images that they draw together."""
    folder = tmp_path_factory.mktemp("processes")
    code = f"""{ONE_STEP}
from test_coco_gan import COMPARED
with coco_gan.joined("cpu"):
    replace = dataclasses.replace
    found = {{name: one_step(replace(c, sync_stats=True)) for name, c in COMPARED.items()}}
    found["apart"] = one_step(replace(COMPARED["whole"], sync_stats=False))
    G = coco_gan.new_state(COMPARED["whole"], torch.device("cpu")).G_average
    found["image"] = coco_gan.full_image(G, coco_gan.latents([5], 8).double())  # 24 patches: 12 and 12
    found["patches"] = coco_gan.micro_patches(G, torch.zeros(5, 8), torch.arange(5), torch.zeros(5))
    found["patch"] = coco_gan.micro_patches(G, torch.zeros(1, 8), torch.tensor([4]), torch.zeros(1))
    torch.save(found, f"{{coco_gan.processes()[0]}}.pt")
coco_gan.leave(0)
"""
    (folder / "run.py").write_text(code)
    both = start_processes(2, "run.py", cwd=folder)
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["whole", "beyond"])
def test_two_processes_give_the_gradients_of_one(name, of_two_processes):
    with in_float64() as one_step:
        alone = one_step(COMPARED[name])
    for found in of_two_processes:
        assert_close(found[name], alone)


def test_processes_and_parts_are_the_same_to_the_gradients(of_two_processes):
    with in_float64() as one_step:
        in_two = one_step(dataclasses.replace(COMPARED["whole"], accumulate=2))
        whole = one_step(COMPARED["whole"])
    assert_close({**of_two_processes[0]["apart"], **buffers(in_two)}, in_two)  # each by its own statistics
    for name, tensor in of_two_processes[0]["apart"].items():
        assert torch.equal(tensor, of_two_processes[1]["apart"][name]), name
    assert not torch.allclose(of_two_processes[0]["apart"]["G.conv.weight"], whole["G.conv.weight"])
    assert of_two_processes[0]["parts"]["G.norm.num_batches_tracked"] == 3


def buffers(found):
    """What parts and processes count otherwise: parts update running statistics one after another."""
    return {k: t for k, t in found.items() if "running" in k or "tracked" in k}


def test_processes_draw_images_together(of_two_processes):
    with in_float64():
        G = coco_gan.new_state(COMPARED["whole"], CPU).G_average
        image = coco_gan.full_image(G, coco_gan.latents([5], 8).double())
        patches = coco_gan.micro_patches(G, torch.zeros(5, 8), torch.arange(5), torch.zeros(5))
    for found in of_two_processes:
        torch.testing.assert_close(found["image"], image)
        torch.testing.assert_close(found["patches"], patches)  # 5 patches: 3 and 2
        torch.testing.assert_close(found["patch"], patches[4:])


def torchrun(*command):
    """The real one, which is a process of its own and stops the others when one ends."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--", *command]


def test_runs_of_one_and_two_processes_go_on_as_each_other(copied, capfd):
    resume = [str(ROOT / "coco_gan.py"), "train", "--resume", "run", "--device", "cpu", "--save-every", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = torchrun(*resume, "--steps", "6", "--sync-stats", "--eval-every", "5", "--eval-count", "9")
    assert subprocess.run(command, env=environment).returncode == 0
    lines = capfd.readouterr().out.splitlines()
    assert sum(line.startswith("step 6  ") for line in lines) == 1  # one process speaks
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log][-2:] == [5, 6] and "swd" in log[-2]
    six = torch.load("run/checkpoint-000000006.pt", weights_only=True)
    assert six["config"]["sync_stats"] and six["step"] == 6
    assert coco_gan.main(["train", "--resume", "run", "--steps", "7", "--no-sync-stats"]) == 0


DRAW = [str(ROOT / "coco_gan.py"), "sample", "--count", "3", "--out"]
EVALUATE = ["-m", "experiments.evaluate", "--count", "20", "--json"]


@pytest.mark.parametrize("command, name", [(DRAW, "faces.png"), (EVALUATE, "figures.json")])
def test_two_processes_sample_and_evaluate_as_one(command, name, copied):
    found = []
    for count in (2, 1):
        started = start_processes(count, *command, name, "--checkpoint", "run", "--device", "cpu")
        outputs = [process.communicate(timeout=300) for process in started]
        assert not any(process.returncode for process in started), outputs
        assert outputs[0][0] and outputs[0][1] == "" and outputs[1:] == [("", "")] * (count - 1)
        found.append(
            picture(name).astype(int) if name.endswith("png") else json.loads(Path(name).read_text())
        )
        Path(name).unlink()
    two, one = found
    if name.endswith("png"):
        assert np.abs(one - two).max() <= 1 and np.ptp(one) > 20
    else:
        assert two["floor"] == one["floor"] and two["real"] == one["real"]
        assert two["generated"] == pytest.approx(one["generated"], rel=1e-2)


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process, it does not signal it")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_signal_to_one_process_ends_the_other(number, copied):
    resume = ["train", "--resume", "run", "--steps", "1000000", "--device", "cpu", "--log-every", "1"]
    started = start_processes(2, str(ROOT / "coco_gan.py"), *resume, "--save-every", "3")
    for line in started[0].stdout:
        if line.startswith("step 7 "):
            break
    started[1].send_signal(number)
    outputs = [process.communicate(timeout=60) for process in started]
    saved = coco_gan.checkpoints(copied)[-1]
    contents, _ = coco_gan.read_checkpoint(saved)
    assert contents["step"] >= 6 and not (copied / "checkpoint.tmp").exists()
    if number == signal.SIGTERM:
        assert [process.returncode for process in started] == [143, 143]
        assert f"stopped and saved {Path('run') / saved.name}" in outputs[0][0]
        assert outputs[0][1] == outputs[1][1] == outputs[1][0] == ""
    else:
        assert started[0].returncode == 2
        assert outputs[0][1].startswith("error: another process has ended, or cannot be reached; ")
        assert outputs[0][1].count("\n") == 1


def test_shares_of_a_batch_are_checked(here, monkeypatch, capsys):
    command = ["train", "--dry-run", "--preset", "tiny", "--device", "cpu"]
    assert coco_gan.main([*command, "--accumulate", "3"]) == 2
    assert "--accumulate 3 does not divide --batch-size 16 evenly; give 1, 2, 4, 8" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(coco_gan, "joined", contextlib.nullcontext)
    assert coco_gan.main(command) == 2
    text = "cannot be shared by 3 processes, at least two macro patches to each; try --batch-size 15"
    assert f"--batch-size 16 {text}" in capsys.readouterr().err
    assert coco_gan.main([*command, "--batch-size", "18", "--accumulate", "4"]) == 2
    text = "--accumulate 4 does not divide --batch-size 18 of 3 processes evenly; give 1, 2, 3"
    assert text in capsys.readouterr().err
    assert coco_gan.main([*command, "--batch-size", "18", "--accumulate", "3"]) == 0
    with pytest.raises(UserError, match="try another number of them"):  # a run keeps its batch size
        coco_gan.check_shares(dataclasses.replace(UNEVEN, batch_size=16), resuming=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert coco_gan.main([*command[:-1], "cuda:1"]) == 2
    text = "--device cuda:1 is one device for 3 processes; leave it out, or give cpu"
    assert text in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    assert coco_gan.choose_device("cuda") == torch.device("cuda:1")


# ----------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------


def test_sample_draws_what_is_asked(copied, capsys):
    assert coco_gan.main(["sample", "--checkpoint", "run", "--count", "4", "--out", "four.png"]) == 0
    assert capsys.readouterr().out == "four.png\n"
    G, gap = coco_gan.load("run"), np.full((16, 2, 3), 255, np.uint8)
    images = coco_gan.to_uint8(coco_gan.full_image(G, coco_gan.latents(range(4), 8)))
    row = np.concatenate([images[0], gap, images[1]], axis=1)
    assert np.array_equal(picture("four.png")[:16], row) and picture("four.png").shape == (34, 50, 3)
    assert coco_gan.main(["sample", "--checkpoint", "run", "--seed", "2,0-1", "--out", "each/"]) == 0
    assert np.array_equal(picture("each/seed-000002.png"), images[2])
    assert len(list(Path("each").iterdir())) == 3
    part = ["--viewport", "3,5,2,4", "--out", "parts/"]
    assert coco_gan.main(["sample", "--checkpoint", "run", "--seed", "2,0-1", *part]) == 0
    assert np.array_equal(picture("parts/seed-000000.png"), images[0][3:5, 5:9])
    assert coco_gan.main(["sample", "--checkpoint", "run", "--seed", "2", "--raw", "--out", "raw.webp"]) == 0
    assert picture("raw.webp").shape == (16, 24, 3)


def test_sample_draws_beyond_the_borders(copied, capsys):
    command = ["sample", "--checkpoint", "run", "--seed", "3", "--extrapolate"]
    assert coco_gan.main([*command, "1,2", "--out", "ring.png"]) == 0
    assert "was post-trained for no ring; the borders beyond may show" in capsys.readouterr().err
    drawn = picture("ring.png")
    z = coco_gan.latents([3], 8)
    G = coco_gan.load("run")
    image = coco_gan.to_uint8(coco_gan.full_image(G, z, ring=(1, 2)))
    assert np.array_equal(drawn, coco_gan.framed(image, 4, 8, 16, 24, (255, 0, 0))[0])
    assert np.array_equal(drawn[4:-4, 8:-8], image[0, 4:-4, 8:-8])
    assert drawn[3, 8].tolist() == drawn[20, 8].tolist() == drawn[5, 7].tolist() == [255, 0, 0]
    assert coco_gan.main([*command[:-3], "--count", "3", "--extrapolate", "1", "--out", "each/"]) == 0
    assert picture("each/seed-000002.png").shape == (24, 32, 3)
    post = ["train", "--extrapolate", "1", "--from", "run", "--steps", "5", "--run", "post"]
    assert coco_gan.main(post) == 0
    capsys.readouterr()
    for ring, warned in (("1", False), ("1,0", False), ("2", True), ("0,2", True)):
        more = ["--extrapolate", ring, "--out", f"{ring}.png"]
        assert coco_gan.main(["sample", "--checkpoint", "post", "--count", "1", *more]) == 0
        assert ("post-trained for a ring of 1;" in capsys.readouterr().err) == warned


def test_sample_names_its_picture_and_replaces_none(copied, capsys):
    for name in ("seeds-000000004.png", "seeds-000000004-2.png"):
        assert coco_gan.main(["sample", "--checkpoint", "run", "--count", "1"]) == 0
        assert capsys.readouterr().out == f"{Path('run') / name}\n"
    Path("taken.png").write_text("mine")
    assert coco_gan.main(["sample", "--checkpoint", "run", "--out", "taken.png"]) == 2
    assert (
        "--out taken.png exists already" in capsys.readouterr().err
        and Path("taken.png").read_text() == "mine"
    )
    assert coco_gan.main(["sample", "--checkpoint", "run", "--out", "taken.png", "--force"]) == 0
    assert picture("taken.png").shape[2] == 3


def test_patches_are_cut_from_their_images(trained):
    G = coco_gan.load(trained)
    z = coco_gan.latents([0, 1], 8)
    picture, images = coco_gan.figure_3(G, z), coco_gan.to_uint8(coco_gan.full_image(G, z))
    assert picture.shape == (16 + 8 + 8 + 8 + 4, 24 + 8 + 24, 3)
    assert np.array_equal(picture[:16, 32:], images[1])
    assert np.array_equal(picture[24:32, 32:44], images[1][4:12, 8:20])  # the macro patch in row 1, column 2
    c = coco_gan.micro_coordinates(UNEVEN, torch.tensor([1]), torch.tensor([2]))
    with torch.no_grad():
        micro = coco_gan.to_uint8(G(z[1:], c))[0]
    assert np.array_equal(picture[40:44, 32:36], micro)


def test_sample_takes_the_newest_checkpoint_under_runs(copied, capsys):
    for number, age in (("001", 50), ("002", 100)):
        shutil.copytree("run", f"runs/tiny-{number}")
        for path in Path(f"runs/tiny-{number}").iterdir():
            os.utime(path, (time.time() - age,) * 2)
    assert coco_gan.find_checkpoint(None) == Path("runs/tiny-001/checkpoint-000000004.pt")


def untrained(config, seed=0):
    torch.manual_seed(seed)
    return coco_gan.Generator(config).requires_grad_(False).eval()


@pytest.mark.parametrize("config", [UNEVEN, CYLINDER, TORUS], ids=lambda config: config.topology)
def test_a_viewport_is_that_part_of_the_full_image(config):
    G, z = untrained(config), coco_gan.latents([5], 8)
    (whole,) = coco_gan.to_uint8(coco_gan.full_image(G, z))
    down, across = config.closed
    windows = [(0, 0, 16, 24), (5, 7, 3, 2), (15, 23, 1, 1)]
    windows += [(2, -3, 9, 7), (0, 22, 16, 30), (3, 24 * 9 + 1, 4, 4)] if across else []
    windows += [(-1, 2, 3, 3), (14, 0, 40, 24)] if down else []
    for top, left, height, width in windows:
        view = coco_gan.Scene(G, z).viewport(top, left, height, width)
        expected = (
            np.roll(whole, (-top, -left), (0, 1))[:height, :width] if height <= 16 and width <= 24 else None
        )
        if expected is None:
            expected = np.tile(np.roll(whole, (-top, -left), (0, 1)), (3, 2, 1))[:height, :width]
        assert np.array_equal(view, expected)
    outside = [] if down else [(-1, 0, 2, 2), (14, 0, 3, 2)]
    outside += [] if across else [(0, -1, 2, 2), (0, 23, 2, 2)]
    for window in outside:
        with pytest.raises(ValueError, match="are not within 0 to (15|23)"):
            coco_gan.Scene(G, z).viewport(*window)


def test_parts_of_wide_networks_differ_by_rounding_only():
    config = Config(height=32, width=64, topology="cylinder")  # the paper's widths
    G, z = untrained(config), coco_gan.latents([1], 128)
    (whole,), scene = coco_gan.to_uint8(coco_gan.full_image(G, z)).astype(int), coco_gan.Scene(G, z)
    parts = [scene.viewport(16 * i, 16 * j, 16, 16) for i in range(2) for j in range(4)]
    together = np.concatenate([np.concatenate(parts[:4], 1), np.concatenate(parts[4:], 1)])
    assert np.abs(whole - together).max() <= 1 and (whole != together).mean() < 0.01


def test_a_scene_makes_only_what_is_new(monkeypatch):
    made, micro_patches = [], coco_gan.micro_patches

    def note(G, z, i, j, batch_size):
        made.extend(zip(i.tolist(), j.tolist()))
        return micro_patches(G, z, i, j, batch_size)

    scene = coco_gan.Scene(untrained(CYLINDER), coco_gan.latents([0], 8))
    monkeypatch.setattr(coco_gan, "micro_patches", note)
    scene.viewport(6, -2, 3, 4)  # rows 1 and 2, the last column and the first
    assert sorted(made) == [(1, 0), (1, 5), (2, 0), (2, 5)] and scene.made == 4
    scene.viewport(4, 20, 8, 8)  # the same patches, whole
    assert scene.made == len(made) == 4
    scene.viewport(4, 2, 1, 4)
    assert made[4:] == [(1, 1)] and scene.made == 5


def test_strips_are_the_grid_of_full_images():
    for config, turns, times in ((UNEVEN, 1, (1, 1)), (CYLINDER, 2, (1, 2)), (TORUS, 3, (3, 3))):
        G, z = untrained(config), coco_gan.latents(range(5), 8)
        images = np.tile(coco_gan.to_uint8(coco_gan.full_image(G, z)), (1, *times, 1))
        parts = list(coco_gan.strips(G, z, 2, turns))
        assert max(len(part) for part in parts) == config.S
        assert np.array_equal(np.concatenate(parts), coco_gan.grid(images, 2))


def test_no_more_patches_are_made_at_a_time_than_asked():
    G, counts = untrained(dataclasses.replace(CYLINDER, height=32, width=64)), []
    G.register_forward_hook(lambda module, inputs, output: counts.append(len(output)))
    shapes = [part.shape for part in coco_gan.strips(G, coco_gan.latents([0, 1], 8), 1, batch_size=5)]
    assert shapes == [(4, 64, 3)] * 8 + [(2, 64, 3)] + [(4, 64, 3)] * 8
    assert max(counts) == 5 and sum(counts) == 2 * 8 * 16


def test_without_a_batch_size_the_patches_have_so_many_pixels():
    G, counts = untrained(dataclasses.replace(CYLINDER, height=128, width=2048, S=64, z_dim=2)), []
    G.register_forward_hook(lambda module, inputs, output: counts.append(len(output)))
    next(coco_gan.strips(G, coco_gan.latents([0, 1, 2], 2), 3))
    assert counts == [64, 32] and 64 * 64**2 == 2**18  # the first row of three images


def test_png_is_written_as_its_parts_come(here):
    sizes = []

    def parts():
        for seed in range(4):
            sizes.append(Path(".long.png").stat().st_size)
            yield np.random.default_rng(seed).integers(0, 256, (64, 512, 3), dtype=np.uint8)

    coco_gan.save_png(parts(), Path("long.png"))
    assert np.all(np.diff(sizes[1:]) > 80_000) and picture("long.png").shape == (256, 512, 3)


def test_png_in_parts_is_the_picture(here):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 11, 3), dtype=np.uint8)
    for cuts in ([], [1, 2, 20]):
        coco_gan.save_png(np.split(pixels, cuts), Path("a.png"))
        with Image.open("a.png") as image:
            image.verify()  # the checksums
        assert np.array_equal(picture("a.png"), pixels)

    def full_disk():
        yield pixels
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        coco_gan.save_png(full_disk(), Path("b.png"))
    assert [path.name for path in here.iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", ["long.webp", "long.jpg"])
def test_a_picture_too_long_for_its_format_is_not_tried(name, here):
    with pytest.raises(OSError, match="it would be 70000 pixels long, which only .png is made for"):
        coco_gan.save_picture(np.zeros((1, 70000, 3), np.uint8), Path(name))
    assert list(here.iterdir()) == []


def test_azimuth_variety_is_the_difference_of_two_patches():
    images = np.zeros((1, 2, 6, 3), np.uint8)
    assert coco_gan.azimuth_variety(images, 2) == 0
    images[:, :, 2:4] = 30  # of three patches this one differs from the two others, in 4 of 6 ordered pairs
    assert coco_gan.azimuth_variety(images, 2) == 20
    assert coco_gan.azimuth_variety(np.tile(images[:, :, 1:3], (1, 1, 3, 1)), 2) == 0


def test_one_patch_round_the_cylinder_has_no_variety(here, capsys):
    sizes = "--height 16 --width 16 --S 16 --N 1 --M 1 --z-dim 2 --width-g 2 --width-d 2 --batch-size 2"
    command = f"train --topology cylinder {sizes} --steps 1 --log-every 1 --device cpu --run run"
    assert coco_gan.main(command.split()) == 0
    assert "variety" not in capsys.readouterr().out + Path("run/log.jsonl").read_text()


def test_a_branch_is_found_as_a_panorama_too(here):
    budget = "--steps 1 --batch-size 2 --width-g 2 --width-d 2 --device cpu".split()
    assert coco_gan.main(["train", "--panorama", *budget, "--run", "run"]) == 0
    Path("runs/branch").mkdir(parents=True)
    shutil.copy(coco_gan.checkpoints(Path("run"))[0], "runs/branch")
    assert coco_gan.main(["train", "--resume", "runs/branch", "--steps", "2", "--device", "cpu"]) == 0
    assert coco_gan.find_checkpoint(None, panorama=True).parent == Path("runs/branch")


def test_panoramas_from_training_to_a_viewport(here, capsys):
    budget = "--steps 2 --batch-size 2 --width-g 2 --width-d 2 --device cpu --log-every 1".split()
    assert coco_gan.main(["train", "--panorama", *budget]) == 0
    run = Path("runs/panorama-tiny-001")
    line = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    assert 0 < line["azimuth_variety"] < 9 and "  azimuth variety " in capsys.readouterr().out
    assert coco_gan.main(["train", "--topology", "torus", *budget]) == 0
    assert coco_gan.main(["train", *budget]) == 0
    assert "azimuth_variety" not in (Path("runs/tiny-002") / "log.jsonl").read_text()
    for number, path in enumerate(Path("runs").glob("*/*.pt")):
        os.utime(path, (time.time() - 9 * ("panorama" in str(path)),) * 2)  # the panorama is the oldest
    assert coco_gan.main(["sample", "--panorama", "--turns", "2", "--out", "turns.png"]) == 0
    (whole,) = coco_gan.to_uint8(coco_gan.full_image(coco_gan.load(run), coco_gan.latents([0])))
    assert np.array_equal(picture("turns.png"), np.tile(whole, (1, 2, 1)))
    assert capsys.readouterr().err.endswith(f"from {run / 'checkpoint-000000002.pt'}\n")
    assert coco_gan.main(["sample", "--panorama", "--viewport", "14,-2,4,3", "--out", "part.png"]) == 0
    assert capsys.readouterr().out == "4 of 12 micro patches generated\npart.png\n"
    assert np.array_equal(picture("part.png"), np.roll(whole, 2, axis=1)[14:18, :3])
    assert (
        coco_gan.main(
            ["sample", "--checkpoint", "runs/tiny-001", "--turns", "2", "--seed", "3", "--out", "t.webp"]
        )
        == 0
    )
    assert picture("t.webp").shape == (64, 64, 3)
    corner = ["--viewport=-1,-1,2,2", "--seed", "3", "--out", "corner.png"]
    assert coco_gan.main(["sample", "--checkpoint", "runs/tiny-001", *corner]) == 0
    (tile,) = coco_gan.to_uint8(coco_gan.full_image(coco_gan.load("runs/tiny-001"), coco_gan.latents([3])))
    assert np.array_equal(picture("corner.png"), tile[[-1, 0]][:, [-1, 0]])  # where its four corners meet
    many = ["--turns", "3", "--count", "2", "--out", "many/"]
    assert coco_gan.main(["sample", "--checkpoint", "runs/tiny-001", *many]) == 0
    assert picture("many/seed-000001.png").shape == (96, 96, 3)
    assert coco_gan.main(["train", "--panorama", "--resume", "--steps", "3", "--device", "cpu"]) == 0
    assert coco_gan.checkpoints(run)[-1].name == "checkpoint-000000003.pt"


@pytest.mark.parametrize("words, name", [([], "toy_faces"), (["--panorama"], "toy_landscapes")])
def test_without_a_run_sample_draws_from_the_weights_that_come_along(words, name, here, capsys):
    assert coco_gan.main(["sample", "--count", "1", "--device", "cpu", *words]) == 0
    out, err = capsys.readouterr()
    assert out == f"{Path('runs') / name}.png\n" and f"this is {name}.pt, which comes with the program" in err
    path = coco_gan.ASSETS / f"{name}.pt"
    contents, config = coco_gan.read_checkpoint(path)
    assert (
        path.stat().st_size < 2e6
        and "G" not in contents
        and contents["step"] > coco_gan.PRESETS["tiny"]["steps"]
    )
    assert config.topology == ("cylinder" if words else "plane")
    pixels = picture(f"runs/{name}.png").astype(int)
    real = data.load_images(config.data, config.height, config.width, toy_count=64)
    assert pixels.shape == real.shape[1:]
    assert (
        np.abs(pixels.mean((0, 1)) - real.mean((0, 1, 2))).max() < 80 and pixels.std() > 20
    )  # not noise, not grey


# ----------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------

# Two rows of three pixels: no flip, turn or exchange of height and width maps it to itself.
COLOURS = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [255, 255, 255], [200, 100, 50]]], np.uint8
)
GREYS = np.array([[0, 100, 200], [50, 150, 255]], np.uint8)
ALPHA = np.array([[255, 255, 0], [255, 255, 255]], np.uint8)  # the upper right pixel is transparent
ON_WHITE = np.where(ALPHA[..., None] == 0, 255, COLOURS).astype(np.uint8)


def encode(pixels, kind="PNG", **options):
    image, file = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels), io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def coordinates(height, width):
    """An image whose pixel at (y, x) is (y, x, 0)."""
    return np.stack([*np.indices((height, width)), np.zeros((height, width))], -1).astype(np.uint8)


def flat(value):
    return encode(np.full((4, 4, 3), value, np.uint8))


def fill(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


def make_zip(path, files, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return str(path)


@pytest.fixture
def load(tmp_path):
    def load(source, height=4, width=4, **options):
        return data.load_images(
            source, height, width, **{"cache": tmp_path / "cache", "workers": 1} | options
        )

    return load


def cached(tmp_path):
    return sorted(path.suffix for path in (tmp_path / "cache").glob("*"))


# One image: whatever its mode, it becomes upright RGB


def palette_image():
    image = Image.new("P", (3, 2))
    image.putpalette(COLOURS.ravel().tolist())
    image.putdata(range(6))
    return image


def with_alpha():
    return Image.fromarray(np.dstack([COLOURS, ALPHA]))


def grey_with_alpha():
    return Image.merge("LA", [Image.fromarray(GREYS), Image.fromarray(ALPHA)])


GREY = np.repeat(GREYS[..., None], 3, -1)
GREY_ON_WHITE = np.where(ALPHA[..., None] == 0, 255, GREY)
WIDE_GREY = GREYS.astype(np.uint16) * 257


def cmyk_image():
    return Image.merge("CMYK", [Image.fromarray(c) for c in (*np.moveaxis(255 - COLOURS, -1, 0), GREYS * 0)])


def big_endian():
    return Image.frombytes("I;16B", (3, 2), WIDE_GREY.astype(">u2").tobytes())


def gif_frames():
    return encode(palette_image(), "GIF", save_all=True, append_images=[Image.new("P", (3, 2), 3)])


@pytest.mark.parametrize(
    "content, expected",
    [
        pytest.param(encode(COLOURS), COLOURS, id="RGB PNG"),
        pytest.param(encode(COLOURS, "BMP"), COLOURS, id="RGB BMP"),
        pytest.param(encode(COLOURS, "TIFF"), COLOURS, id="RGB TIFF"),
        pytest.param(encode(COLOURS, "WEBP", lossless=True), COLOURS, id="RGB WebP"),
        pytest.param(encode(GREYS), GREY, id="8-bit grey"),
        pytest.param(encode(WIDE_GREY), GREY, id="16-bit grey PNG, which convert clips to white"),
        pytest.param(
            encode(GREYS // 2 * np.uint16(257)), GREY // 2, id="16-bit grey PNG that nowhere is white"
        ),
        pytest.param(encode(WIDE_GREY, "TIFF"), GREY, id="16-bit grey TIFF"),
        pytest.param(encode(big_endian(), "TIFF"), GREY, id="16-bit grey TIFF, big-endian"),
        pytest.param(encode(WIDE_GREY.astype(np.int32), "TIFF"), GREY, id="32-bit integers of 16-bit range"),
        pytest.param(encode(GREYS.astype(np.int32) << 23, "TIFF"), GREY, id="32-bit integers of full range"),
        pytest.param(encode((GREYS / 255).astype(np.float32), "TIFF"), GREY, id="floats from 0 to 1"),
        pytest.param(encode(GREYS.astype(np.float32), "TIFF"), GREY, id="floats from 0 to 255"),
        pytest.param(encode(Image.fromarray(GREYS > 120)), (GREY > 120) * 255, id="one bit"),
        pytest.param(encode(palette_image()), COLOURS, id="palette"),
        pytest.param(encode(palette_image(), transparency=2), ON_WHITE, id="palette, one colour transparent"),
        pytest.param(encode(COLOURS, transparency=(0, 0, 255)), ON_WHITE, id="RGB, one colour transparent"),
        pytest.param(encode(palette_image().convert("PA"), "TIFF"), COLOURS, id="palette with alpha"),
        pytest.param(encode(with_alpha()), ON_WHITE, id="RGBA"),
        pytest.param(encode(with_alpha(), "WEBP", lossless=True), ON_WHITE, id="RGBA WebP"),
        pytest.param(
            encode(Image.merge("LA", [Image.fromarray(GREYS), Image.fromarray(ALPHA)])),
            np.where(ALPHA[..., None] == 0, 255, GREY),
            id="grey with alpha",
        ),
        pytest.param(gif_frames(), COLOURS, id="animated GIF, first frame"),
        pytest.param(encode(cmyk_image(), "TIFF"), COLOURS, id="CMYK TIFF"),
    ],
)
def test_decode_makes_rgb(content, expected):
    np.testing.assert_array_equal(data.decode_image(content, 2, 3, "center"), expected)


UPRIGHT_TO_STORED = {
    1: lambda p: p,
    2: np.fliplr,
    3: lambda p: np.rot90(p, 2),
    4: np.flipud,
    5: lambda p: np.swapaxes(p, 0, 1),
    6: lambda p: np.rot90(p, 1),  # shown after a quarter turn clockwise
    7: lambda p: np.rot90(np.swapaxes(p, 0, 1), 2),
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
@pytest.mark.parametrize("orientation", UPRIGHT_TO_STORED)
def test_decode_obeys_the_orientation_in_exif(orientation, kind, options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(UPRIGHT_TO_STORED[orientation](COLOURS))
    content = encode(stored, kind, exif=exif.tobytes(), **options)
    np.testing.assert_array_equal(data.decode_image(content, 2, 3, "center"), COLOURS)


def test_decode_obeys_the_orientation_of_sixteen_bit_grey_and_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = encode(np.ascontiguousarray(np.rot90(WIDE_GREY)), exif=exif.tobytes())
    np.testing.assert_array_equal(data.decode_image(grey, 2, 3, "center"), GREY)
    blocks = np.ascontiguousarray(np.rot90(COLOURS).repeat(16, 0).repeat(16, 1))
    jpeg = encode(blocks, "JPEG", quality=100, subsampling=0, exif=exif.tobytes())
    result = data.decode_image(jpeg, 32, 48, "center")[8::16, 8::16]
    np.testing.assert_allclose(result.astype(int), COLOURS, atol=3)


def test_decode_ignores_broken_exif():
    content = encode(COLOURS, exif=b"Exif\0\0garbage!")
    np.testing.assert_array_equal(data.decode_image(content, 2, 3, "center"), COLOURS)


# One image: crop and resize


@pytest.mark.parametrize(
    "size, cut, rows, columns",
    [
        ((4, 10), (4, 4), (0, 4), (3, 7)),  # too wide
        ((10, 4), (4, 4), (3, 7), (0, 4)),  # too high
        ((5, 4), (4, 4), (0, 4), (0, 4)),  # one left over: whole pixels, no blur
        ((6, 9), (6, 4), (0, 6), (2, 6)),  # not square
        ((4, 6), (4, 6), (0, 4), (0, 6)),  # fits
    ],
)
def test_center_crop_takes_the_largest_centred_rectangle(size, cut, rows, columns):
    pixels = data.decode_image(encode(coordinates(*size)), *cut, "center")
    np.testing.assert_array_equal(pixels, coordinates(*size)[slice(*rows), slice(*columns)])


def test_center_crop_of_a_sliver_keeps_a_pixel():
    assert data.decode_image(encode(coordinates(1, 200)), 64, 1, "center").shape == (64, 1, 3)
    assert data.decode_image(encode(coordinates(200, 1)), 1, 64, "center").shape == (1, 64, 3)


def test_celeba_crop_takes_rows_50_to_177_and_columns_25_to_152():
    aligned = encode(coordinates(218, 178))
    pixels = data.decode_image(aligned, 128, 128, "celeba")
    assert pixels[0, 0].tolist() == [50, 25, 0] and pixels[127, 127].tolist() == [177, 152, 0]
    np.testing.assert_array_equal(pixels, coordinates(218, 178)[50:178, 25:153])
    halved = data.decode_image(aligned, 64, 64, "celeba")
    np.testing.assert_allclose(
        halved[[0, 31, 63], [0, 31, 63]], [[50, 25, 0], [112, 87, 0], [176, 151, 0]], atol=1
    )


def test_squash_takes_the_whole_image():
    halves = np.zeros((4, 16, 3), np.uint8)
    halves[:, 8:] = 255
    pixels = data.decode_image(encode(halves), 8, 8, "squash")
    assert pixels.shape == (8, 8, 3) and pixels[:, :3].max() < 10 and pixels[:, 5:].min() > 245


@pytest.mark.parametrize("factor", [2, 8, 24])  # 24: reduced before it is resampled
def test_resize_averages_instead_of_picking_pixels(factor):
    checks = np.indices((192, 192)).sum(0) % 2 * 255
    pixels = data.decode_image(encode(checks.astype(np.uint8)), 192 // factor, 192 // factor, "center")
    assert 120 < pixels.min() and pixels.max() < 135  # picked pixels would be 0 or 255


# CelebA-syn: the cut of each image is moved

WHERE = coordinates(218, 178)  # says of each pixel of a cut where it came from
NAMES = [*(f"{n:06}.png" for n in range(50)), "a/000000.png", "é 日.png"]  # more than one chunk


def corners(images):
    """Row and column of the upper left pixel of each, once the others are found to be those beside it."""
    for image in images:
        y, x, _ = image[0, 0].astype(int)
        np.testing.assert_array_equal(image, WHERE[y : y + 128, x : x + 128])
    return images[:, 0, 0, :2].astype(int)


def test_displacements_are_uniform_and_independent():
    d = np.array([data.displacement(0, f"{n:06}.jpg") for n in range(51 * 200)])
    for axis in d.T:
        values, counts = np.unique(axis, return_counts=True)
        assert values.tolist() == [*range(-25, 26)]
        assert ((counts - 200) ** 2 / 200).sum() < 86.7  # χ² of 50 degrees of freedom, 1 in 1,000 above
    assert len(np.unique(d, axis=0)) > 0.95 * 51**2  # 200 times 51 draws should miss one pair in 50
    assert np.abs(np.corrcoef(d.T, np.roll(d.T, 1, axis=1))[np.triu_indices(4, 1)]).max() < 0.04


def test_displacements_stay_as_they_are():
    """A training set must not change with the version of this program."""
    assert data.displacement(0, "000001.jpg") == (18, 10)
    assert data.displacement(0, "000002.jpg") == (10, 2)
    assert data.displacement(1, "000001.jpg") == (11, -20)
    assert data.displacement(2**63 - 1, "\udcff") == (9, 15)  # a name that is no text


def test_celeba_syn_moves_the_cut_of_celeba(load, tmp_path):
    files = {name: encode(WHERE) for name in NAMES}
    source = fill(tmp_path / "photos", files)
    images = load(source, 128, 128, crop="celeba-syn", seed=3)
    expected = [data.displacement(3, name) for name in sorted(NAMES)]
    assert corners(images).tolist() == [[50 + dy, 25 + dx] for dx, dy in expected]
    zipped = make_zip(tmp_path / "photos.zip", dict(reversed(files.items())))
    np.testing.assert_array_equal(load(zipped, 128, 128, crop="celeba-syn", seed=3, workers=2), images)
    np.testing.assert_array_equal(
        load(source, 128, 128, crop="celeba-syn", seed=3, workers=2, cache=tmp_path / "another"), images
    )
    assert (corners(load(source, 128, 128, crop="celeba-syn", seed=4)) != corners(images)).any(1).mean() > 0.9


@pytest.mark.parametrize("dx, dy", [(-25, -25), (25, 25), (-25, 25)])
def test_celeba_syn_fits_at_its_ends(dx, dy):
    image = data.decode_image(encode(WHERE), 128, 128, "celeba-syn", dx, dy)
    assert corners(image[None]).tolist() == [[50 + dy, 25 + dx]]


def test_celeba_syn_resizes_after_the_cut():
    half = data.decode_image(encode(WHERE), 64, 64, "celeba-syn", 10, -20).astype(int)
    np.testing.assert_allclose(half[[1, 31, 62], [1, 31, 62], :2], [[32, 37], [92, 97], [154, 159]], atol=1)


def test_other_images_change_no_displacement(load, tmp_path):
    files = {name: encode(WHERE) for name in ("b.png", "d.png")}
    few = load(fill(tmp_path / "few", files), 128, 128, crop="celeba-syn")
    files |= {name: encode(WHERE) for name in ("a.png", "c.png", "e.png")} | {"0.png": b""}
    many = load(fill(tmp_path / "many", files), 128, 128, crop="celeba-syn")
    np.testing.assert_array_equal(many[[1, 3]], few)


def test_celeba_syn_skips_other_sizes(load, tmp_path, capsys):
    files = {"aligned.png": encode(WHERE), "empty.png": b"", "wide.png": encode(coordinates(178, 218))}
    source = fill(tmp_path / "photos", files)
    (tmp_path / "photos" / "dead.png").symlink_to("nowhere")
    assert len(load(source, 128, 128, crop="celeba-syn")) == 1
    message = capsys.readouterr().err
    assert "skipped 3 of 4 images" in message and "'empty.png': is empty" in message
    assert "'wide.png': is 218 x 178, but --crop celeba-syn needs the aligned 178 x 218" in message
    assert "'dead.png': [Errno 2] No such file" in message


def test_the_seed_belongs_to_the_cache_of_celeba_syn_alone(load, tmp_path, monkeypatch):
    source = fill(tmp_path / "photos", {"a.png": encode(WHERE)})
    found = (tmp_path / "photos" / "a.png").stat()
    key = hashlib.sha256(f"1 a.png {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()[:16]
    for crop in ("center", "celeba", "squash"):
        names = {Path(load(source, crop=crop, seed=seed).filename).name for seed in (0, 1)}
        assert names == {f"photos-4x4-{crop}-{key}.npy"}
    names = {Path(load(source, crop="celeba-syn", seed=seed).filename).name for seed in (0, 1)}
    assert names == {f"photos-4x4-celeba-syn-{seed}-{key}.npy" for seed in (0, 1)}
    monkeypatch.setattr(data, "_store", None)
    assert len(load(source, crop="celeba-syn", seed=1)) == 1
    with pytest.raises(TypeError):
        load(source, crop="celeba-syn", seed=2)


@pytest.mark.parametrize("crop", sorted({*data.CROPS} - {"center"}))
def test_toys_take_no_crop(crop, load, tmp_path):
    with pytest.raises(data.UserError, match=f"^--crop {crop} is for photographs.*; leave out --crop"):
        load("toy:faces", crop=crop)
    assert not (tmp_path / "cache").exists()
    assert len(load("toy:faces", crop="center", toy_count=3)) == 3


# Finding


NAMES = ["b.JPG", "a/c.PNG", "a/B.jpeg", "deep/er/x.WebP", "z.bmp", "10.gif", "2.tif", "1.TIFF"]
JUNK = [
    "._b.JPG",
    ".hidden/c.png",
    "a/.d.png",
    "__MACOSX/b.jpg",
    "a/__MACOSX/b.jpg",
    "notes.txt",
    "jpg",
    "a.jpg.bak",
]


@pytest.mark.parametrize("kind", ["folder", "stored zip", "deflated zip"])
def test_finds_images_nested_in_any_case_in_sorted_order(kind, load, tmp_path):
    # Each content tells its place among the sorted names; the ending and the content need not agree.
    files = {name: flat(i) for i, name in enumerate(sorted(NAMES))} | {name: flat(99) for name in JUNK}
    files = dict(reversed(files.items()))
    method = zipfile.ZIP_DEFLATED if kind == "deflated zip" else zipfile.ZIP_STORED
    source = (
        fill(tmp_path / "photos", files) if kind == "folder" else make_zip(tmp_path / "p.zip", files, method)
    )
    images = load(source, workers=2)
    assert images[:, 0, 0, 0].tolist() == list(range(len(NAMES)))
    assert isinstance(images, np.memmap) and images.dtype == np.uint8 and not images.flags.writeable


def test_many_chunks_keep_their_order(load, tmp_path):
    images = load(make_zip(tmp_path / "p.zip", {f"{i:03}.png": flat(i) for i in range(250)}), workers=3)
    assert images[:, 1, 2, 1].tolist() == list(range(250))


def test_names_in_a_zip_are_no_paths(load, tmp_path):
    names = ["../../up.png", "/tmp/absolute.png", "C:\\drive.png", "./here.png"]
    (tmp_path / "inner").mkdir()
    source = make_zip(tmp_path / "inner" / "p.zip", {name: flat(7) for name in names})
    assert load(source).shape == (4, 4, 4, 3)
    assert {path.name for path in tmp_path.rglob("*")} - {"inner", "p.zip", "cache"} == {
        load(source).filename.name
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="links and named pipes as on POSIX")
def test_link_loops_and_pipes_do_not_hang(load, tmp_path, capsys):
    fill(tmp_path / "elsewhere", {"linked.png": flat(2)})
    folder = Path(fill(tmp_path / "photos", {"a.png": flat(0), "sub/b.png": flat(1)}))
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "to").symlink_to(tmp_path / "elsewhere")
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "dead.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    assert load(folder.as_posix())[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert "skipped 2 of 5 images" in capsys.readouterr().err


# Bad images are skipped and named; bad wishes are one line


def png_header(height, width):
    fields = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(fields))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + fields + checksum + struct.pack(">I", 99) + b"IDAT"


NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
BROKEN = {
    "1 empty.jpg": (b"", "is empty"),
    "2 text.png": (b"not an image", "no image that Pillow can read"),
    "3 cut.jpg": (encode(NOISE, "JPEG")[:-200], "truncated"),
    "4 cut.png": (encode(NOISE)[:-200], "truncated"),
    "5 bomb.png": (png_header(30000, 30000), "900000000 pixels"),
    "6 warned.png": (png_header(10000, 10000), "100000000 pixels"),  # for Pillow, only a warning
    "7 script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image that Pillow can read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_image_has_its_reason(name, load, tmp_path, capsys):
    images = load(fill(tmp_path / "photos", {name: BROKEN[name][0], "whole.png": flat(5)}))
    assert images.shape == (1, 4, 4, 3) and (images == 5).all()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2] == "skipped 1 of 2 images:" and name in lines[-1] and BROKEN[name][1] in lines[-1]


def test_skipped_images_are_counted_and_five_are_named_once(load, tmp_path, capsys):
    files = {name: content for name, (content, _) in BROKEN.items()} | {"0.png": flat(1), "8.png": flat(2)}
    source = fill(tmp_path / "photos", files)
    assert load(source)[:, 0, 0, 0].tolist() == [1, 2]
    message = capsys.readouterr().err
    assert "skipped 7 of 9 images" in message
    assert [name in message for name in BROKEN] == [True] * 5 + [False] * 2
    assert load(source)[:, 0, 0, 0].tolist() == [1, 2] and capsys.readouterr().err == ""


def test_celeba_crop_skips_other_sizes(load, tmp_path, capsys):
    files = {"aligned.png": encode(coordinates(218, 178)), "wide.png": encode(coordinates(178, 218))}
    assert len(load(fill(tmp_path / "photos", files), 128, 128, crop="celeba")) == 1
    assert (
        "'wide.png': is 218 x 178, but --crop celeba needs the aligned 178 x 218" in capsys.readouterr().err
    )


def test_broken_zip_members_have_their_reasons(load, tmp_path, capsys):
    path = Path(
        make_zip(tmp_path / "p.zip", {name: flat(3) for name in ("crc.png", "key.png", "new.png", "ok.png")})
    )
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 6] ^= 1  # the first member's pixels
    for name, shift, value in ((b"key.png", 0, 1), (b"new.png", 2, 97)):  # encrypted; an unknown method
        content[content.index(name) - 30 + 6 + shift] = value  # in the member's own header
        content[content.rindex(name) - 46 + 8 + shift] = value  # and in the directory
    path.write_bytes(content)
    assert len(load(str(path))) == 1
    message = capsys.readouterr().err
    assert "skipped 3 of 4 images" in message and "CRC" in message and "encrypted" in message
    assert "compression method is not supported" in message


def test_a_zip_member_that_unpacks_to_too_much_is_not_unpacked(load, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_FILE_BYTES", 10)
    with pytest.raises(data.UserError, match="none of the 1 images can be used.*'a.png': unpacks to"):
        load(make_zip(tmp_path / "p.zip", {"a.png": flat(3)}))


@pytest.mark.parametrize(
    "source, options, words",
    [
        ("celebba", {}, ["--data", "celebba does not exist", "celeba meant"]),
        ("", {}, ["--data", "does not exist", "toy:faces"]),
        ("quite/else", {}, ["--data", "quite/else does not exist; give a folder or a zip", "toy:faces"]),
        ("toy:cats", {}, ["--data toy:cats", "toy:faces"]),
        ("empty", {}, ["--data", "no image", ".jpeg", ".tiff"]),
        ("empty.zip", {}, ["--data", "no image", ".jpeg", ".tiff"]),
        ("text.zip", {}, ["--data", "text.zip is no zip"]),
        ("cut.zip", {}, ["--data", "cut.zip is no zip"]),
        ("celeba", {"crop": "middle"}, ["--crop middle", "center, celeba, squash"]),
        ("celeba", {"cache": "text.zip"}, ["--cache", "text.zip", "MB"]),  # a file, so no folder
        ("celeba", {"cache": "text.zip/below"}, ["--cache", "text.zip", "MB"]),
        ("broken", {}, ["--data", "none of the 7 images", "1 empty.jpg"]),
    ],
)
def test_mistakes_are_told_in_one_line(source, options, words, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "celeba", {"a.png": flat(1)})
    fill(tmp_path / "broken", {name: content for name, (content, _) in BROKEN.items()})
    fill(tmp_path / "empty", {"notes.txt": b"none"})
    make_zip("empty.zip", {"notes.txt": b"none", "folder.png/": b""})
    Path("text.zip").write_text("no zip")
    Path("cut.zip").write_bytes(Path(make_zip("whole.zip", {"a.png": flat(1)})).read_bytes()[:-9])
    with pytest.raises(data.UserError) as caught:
        load(source, **options)
    message = str(caught.value)
    assert "\n" not in message and [word for word in words if word not in message] == []
    assert cached(tmp_path) == []


@pytest.mark.parametrize("where", ["before", "while writing"])
def test_a_full_disk_is_told_with_the_size_needed(where, load, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=99))
    else:
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(data.UserError, match="--cache .*No space left.* 12.6 MB"):
        load("toy:faces", 32, 32)
    assert cached(tmp_path) == []


def test_a_dead_worker_is_told(load, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("true") or shutil.which("whoami"))
    with pytest.raises(data.UserError, match="--workers 1 died"):
        load(fill(tmp_path / "photos", {"a.png": flat(1)}))
    assert cached(tmp_path) == []


# The cache


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_second_start_decodes_nothing(kind, load, tmp_path, monkeypatch):
    files = {"a.png": flat(1), "b/c.png": flat(2)}
    source = fill(tmp_path / "photos", files) if kind == "folder" else make_zip(tmp_path / "p.zip", files)
    first = load(source)
    monkeypatch.setattr(data, "_store", None)
    monkeypatch.setattr(data, "_open_zip", None)
    np.testing.assert_array_equal(load(source), first)
    with pytest.raises(TypeError):
        load(source, crop="squash")
    with pytest.raises(TypeError):
        load(source, 8, 4)


@pytest.mark.parametrize("change", ["content", "time", "addition", "removal", "name"])
def test_a_changed_folder_is_decoded_anew(change, load, tmp_path):
    folder = Path(fill(tmp_path / "photos", {"a.png": flat(1), "b.png": flat(2), "c.png": flat(3)}))
    load(str(folder))
    if change == "content":
        (folder / "b.png").write_bytes(encode(NOISE))
    elif change == "time":
        found = (folder / "b.png").stat()
        os.utime(folder / "b.png", ns=(found.st_atime_ns, found.st_mtime_ns + 1000))
    elif change == "addition":
        (folder / "d.png").write_bytes(flat(4))
    elif change == "removal":
        (folder / "c.png").unlink()
    else:
        (folder / "a.png").rename(folder / "z.png")
    changed = load(str(folder))
    assert len(cached(tmp_path)) == 2
    assert len(changed) == {"addition": 4, "removal": 2}.get(change, 3)
    assert changed[0, 0, 0, 0] == (2 if change == "name" else 1)


def test_a_changed_zip_is_decoded_anew(load, tmp_path):
    assert load(make_zip(tmp_path / "p.zip", {"a.png": flat(1)}))[0, 0, 0, 0] == 1
    assert load(make_zip(tmp_path / "p.zip", {"a.png": flat(2), "b.png": flat(3)}))[:, 0, 0, 0].tolist() == [
        2,
        3,
    ]


def test_a_moved_cache_and_folder_still_match(load, tmp_path, monkeypatch):
    load(fill(tmp_path / "here" / "photos", {"a.png": flat(1)}))
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "cache").rename(tmp_path / "moved")
    monkeypatch.setattr(data, "_store", None)
    assert load(str(tmp_path / "there" / "photos"), cache=tmp_path / "moved").shape == (1, 4, 4, 3)


def test_a_cut_cache_file_is_decoded_anew(load, tmp_path):
    source = fill(tmp_path / "photos", {"a.png": flat(1)})
    path = Path(load(source).filename)
    for length in (0, 100, 150):
        path.write_bytes(path.read_bytes()[:length])
        assert (load(source) == 1).all()


def test_the_cache_file_describes_itself(load, tmp_path):
    images = load(fill(tmp_path / "photos", {"a.png": flat(1), "b.png": b""}))
    np.testing.assert_array_equal(np.load(images.filename), images)
    assert Path(images.filename).stat().st_size == 128 + images.nbytes


def start(code, tmp_path, cache, **options):
    """Run Python code beside data.py with the photographs of tmp_path decoded into a cache folder."""
    head = f"import data\nsource, cache = {str(tmp_path / 'photos')!r}, {str(tmp_path / cache)!r}\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code],
        cwd=Path(data.__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


LOAD = "images = data.load_images(source, 4, 4, cache=cache, workers=2)\n"
# Decodes two of four chunks of 64, says so and waits for its end.
STALL = """
whole = data._decode_all
def half(*args):
    blocks = whole(*args)
    yield next(blocks)
    yield next(blocks)
    print("half", flush=True)
    input()
data._decode_all = half
"""


@pytest.mark.parametrize("way", ["kill -9", "Ctrl-C", "exception"])
def test_an_interrupted_decode_leaves_nothing_to_be_taken_for_whole(way, load, tmp_path):
    if way == "Ctrl-C" and os.name != "posix":
        pytest.skip("sends Ctrl-C to a process group, as POSIX terminals do")
    source = fill(tmp_path / "photos", {f"{i:03}.png": flat(i) for i in range(200)})
    child = start(STALL + LOAD, tmp_path, "cache", start_new_session=True)
    assert child.stdout.readline() == "half\n"
    assert cached(tmp_path) == [".tmp"]
    if way == "kill -9":
        child.kill()
    elif way == "Ctrl-C":
        os.killpg(child.pid, signal.SIGINT)
    # The workers hold the same stderr: this ends only when they have ended too.
    errors = child.communicate("" if way == "exception" else None, timeout=20)[1]
    assert errors.count("Traceback") == (0 if way == "kill -9" else 1)  # the parent's, and none of a worker
    assert cached(tmp_path) == ([".tmp"] if way == "kill -9" else [])
    images = load(source)
    assert images[:, 0, 0, 0].tolist() == list(range(200))
    assert cached(tmp_path) == [".npy"]  # what the killed one left is gone
    undisturbed = load(source, cache=tmp_path / "other")
    assert Path(images.filename).read_bytes() == Path(undisturbed.filename).read_bytes()


def test_two_decode_the_same_at_once(tmp_path):
    fill(tmp_path / "photos", {f"{i:03}.png": flat(i) for i in range(200)})
    slow = STALL.replace("input()", "input(); yield from blocks")
    code = LOAD + "print(images[:, 0, 0, 0].tolist() == list(range(200)))"
    children = []
    for _ in range(2):
        children.append(start(slow + code, tmp_path, "cache"))
        assert children[-1].stdout.readline() == "half\n"
    assert cached(tmp_path) == [".tmp", ".tmp"]  # the second did not sweep the first away
    for child in children:
        output, errors = child.communicate("\n", timeout=20)
        assert output == "True\n", errors
    assert cached(tmp_path) == [".npy"]


def test_release_pages_frees_memory_and_loses_nothing(load):
    images = load("toy:faces", 32, 32)
    before = images.sum()

    def resident():
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssFile:")[1].split()[0])

    if Path("/proc/self/status").exists():
        held = resident()
        data.release_pages(images)
        assert held - resident() > 10_000  # kB of 12,288
    data.release_pages(images)
    assert images.sum() == before
    data.release_pages(np.zeros(3))  # no map: nothing to do


# Toys


@pytest.mark.parametrize("toy", data.TOYS.values())
def test_toys_are_the_same_every_time_and_in_any_number(toy):
    first = np.concatenate(list(toy(70, 32, 48)))
    assert first.shape == (70, 32, 48, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(np.concatenate(list(toy(40, 32, 48))), first[:40])
    assert len(np.unique(first.reshape(70, -1), axis=0)) == 70
    assert (np.concatenate(list(toy(40, 32, 48, seed=1))) != first[:40]).any((1, 2, 3)).all()


def test_landscapes_are_the_same_at_every_size_and_close():
    small, large = (np.concatenate(list(data.toy_landscapes(20, h, 3 * h))) for h in (32, 128))
    averaged = large.reshape(20, 32, 4, 96, 4, 3).mean((2, 4))
    assert np.abs(averaged - small).mean() < 3
    steps = np.abs(large.astype(int) - np.roll(large, 1, axis=2)).mean(
        (0, 1, 3)
    )  # of each column to the one left
    assert steps[0] < 1.5 * np.median(steps)


def test_landscapes_differ_on_every_side():
    images = np.concatenate(list(data.toy_landscapes(100, 32, 96))).astype(float)
    left, middle, right = (images[:, :, c : c + 24] for c in (12, 36, 60))
    assert (middle.max((1, 2, 3)) > 240).mean() > 0.95  # the sun
    assert np.mean(left.max((1, 2)) > middle.max((1, 2))) < 0.1
    rows = slice(8, 17)  # above the horizon: sky to the left, mountains to the right
    left, right = (side[:, rows].std(2).mean((1, 2)) for side in (left, right))  # along the horizon
    assert np.mean(left < right) > 0.9


def test_toys_are_the_same_at_every_size():
    small, large = (np.concatenate(list(data.toy_faces(8, side, side))) for side in (32, 128))
    averaged = large.reshape(8, 32, 4, 32, 4, 3).mean((2, 4))
    assert np.abs(averaged - small).mean() < 3
    for height, width, rows, columns in ((32, 64, (0, 32), (16, 48)), (50, 32, (9, 41), (0, 32))):
        image = np.concatenate(list(data.toy_faces(8, height, width)))
        np.testing.assert_array_equal(image[:, slice(*rows), slice(*columns)], small)


def test_toys_have_two_eyes_that_mirror_each_other():
    for face in np.concatenate(list(data.toy_faces(40, 256, 256))):
        ys, xs = (face > 235).all(-1).nonzero()  # nothing but eyes and teeth is so bright
        ys, xs = ys[ys < ys.min() + 24], xs[ys < ys.min() + 24]  # the eyes come first
        middle = (xs.min() + xs.max()) / 2
        left, right = xs < middle - 4, xs > middle + 4
        assert left.sum() > 50 and right.sum() > 50 and (left | right).all()
        assert abs(left.sum() - right.sum()) < 0.2 * left.sum()
        assert abs(ys[left].mean() - ys[right].mean()) < 1
        assert 100 < middle < 156


def test_toys_go_through_the_cache(load, monkeypatch):
    images = load("toy:faces", 16, 24, toy_count=30)
    np.testing.assert_array_equal(images, np.concatenate(list(data.toy_faces(30, 16, 24))))
    monkeypatch.setattr(data, "TOYS", {"toy:faces": None})
    assert len(load("toy:faces", 16, 24, toy_count=30)) == 30
    with pytest.raises(TypeError):
        load("toy:faces", 16, 24, toy_count=31)


# Panoramas


def cube(side):
    """Front, right, back, left, up and down, in the colours of the directions that they show."""
    a, b = np.meshgrid((2 * np.arange(side) + 1) / side - 1, 1 - (2 * np.arange(side) + 1) / side)
    one = np.ones_like(a)
    faces = [(a, b, one), (one, b, -a), (-a, b, -one), (-one, b, a), (a, one, -b), (a, -one, b)]
    return [in_colours(np.stack(face, -1)) for face in faces]


def cylinder(rows, columns, projection="equirectangular", latitude=60):
    """The directions, x right, y up, z front, that a panorama shows: (rows, columns, 3)."""
    height, top = 1 - (2 * np.arange(rows) + 1) / rows, np.radians(latitude)
    if projection == "mercator":
        v = 2 * np.arctan(np.exp(height * np.log(np.tan(np.pi / 4 + top / 2)))) - np.pi / 2
    else:
        v = height * top
    u, v = np.meshgrid(((np.arange(columns) + 0.5) / columns - 0.5) * 2 * np.pi, v)
    return np.stack([np.cos(v) * np.sin(u), np.sin(v), np.cos(v) * np.cos(u)], -1)


def in_colours(directions):
    unit = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
    return np.rint((unit + 1) / 2 * 255).astype(np.uint8)


def named(prefix, names, faces, **options):
    kinds = {"jpg": "JPEG", "png": "PNG", "ebp": "WEBP", "bmp": "BMP", "tif": "TIFF"}
    return {
        prefix + name: encode(face, kinds[name.lower()[-3:]], **options)
        for name, face in zip(names.split(), faces)
    }


def sphere(side):
    return in_colours(cylinder(side, 2 * side, latitude=90))


def checks(rows, columns):
    return np.repeat((np.indices((rows, columns)).sum(0) % 2 * 255)[..., None], 3, -1).astype(np.uint8)


def panoramas(folder):
    return {path.stem: picture(path) for path in sorted(Path(folder).glob("*.png"))}


TOUR = "f.png r.png b.png l.png u.png d.png"


@pytest.mark.parametrize("projection, latitude", [("equirectangular", 60), ("mercator", 51.326)])
def test_panoramas_show_the_directions_of_every_naming(projection, latitude, here, capsys):
    faces, skybox = cube(128), " ".join(f"skybox{i}_sami.png" for i in (1, 2, 3, 4, 0, 5))
    files = named("mp/ab_", skybox, faces) | named("mp/cd_", skybox, faces)
    files |= named("", "pz.png px.PNG NZ.png nx.bmp py.tif Ny.png", faces)
    files |= named("pos.", "posz.png posx.png negz.png negx.png posy.png negy.png", faces)
    files |= named("tour_", TOUR.upper(), faces) | named("tour/one/", TOUR, faces)
    files |= named("", "whole.png stereo_l.png", [sphere(256)] * 2)
    fill(here / "photos", files)
    command = ["panorama", "photos", "made", "--size", "128x384", "--projection", projection]
    assert data.main([*command, "--workers", "1"]) == 0
    out, err = capsys.readouterr()
    assert "8 panoramas made, 0 were there already, 0 skipped, in made\n" in out and "8 of 8" in err
    assert "python coco_gan.py train --panorama --data made\n" in out
    made = panoramas("made")
    assert list(made) == ["mp+ab", "mp+cd", "photos", "pos", "stereo_l", "tour+one", "tour", "whole"]
    unit = cylinder(128, 384, projection, latitude)
    for name, pixels in made.items():
        error = np.abs(pixels / 255 - (unit + 1) / 2)
        # Half a level of 255 is lost in the source and half in the panorama; a shift by a quarter of a pixel
        # makes 0.005.
        assert error.mean() < 0.0013 and error.max() < 1 / 255, name


@pytest.mark.parametrize("files", [cube(16), [sphere(16)]], ids=["cube", "sphere"])
@pytest.mark.parametrize("latitude", [60, 90])
def test_panoramas_have_no_seams(files, latitude):
    sources = {str(i): encode(face) for i, face in enumerate(files)}
    content = data.draw_panorama(sources, 256, 768, "equirectangular", latitude)
    pixels = picture(io.BytesIO(content)).astype(int)
    # A colour changes by one level from pixel to pixel, but by eight from one of the sources' to the next.
    assert np.abs(pixels - in_colours(cylinder(256, 768, latitude=latitude))).max() <= 3
    assert np.abs(np.diff(pixels, axis=0)).max() <= 3
    assert np.abs(np.diff(pixels, axis=1, append=pixels[:, :1])).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])  # a JPEG is shrunk as it is read
@pytest.mark.parametrize("sources", [[(512, 512)] * 6, [(200, 200)] * 6, [(512, 1024)]])
def test_panoramas_of_checkerboards_are_grey(sources, kind):
    files = {str(i): encode(checks(*source), kind) for i, source in enumerate(sources)}
    pixels = picture(io.BytesIO(data.draw_panorama(files, 24, 72, "equirectangular", 60)))
    assert np.abs(pixels - 127.5).max() < 3


@pytest.mark.parametrize("size", [(16, 48), (32, 32), (8, 96)])
@pytest.mark.parametrize("shape", [(6, 40, 40, 3), (1, 80, 160, 3)])
def test_panoramas_average_instead_of_picking_pixels(shape, size):
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    files = {str(i): encode(pixels) for i, pixels in enumerate(noise)}
    rows, columns = size
    small, large = (
        picture(io.BytesIO(data.draw_panorama(files, k * rows, k * columns, "equirectangular", 60)))
        for k in (1, 8)
    )
    error = large.reshape(rows, 8, columns, 8, 3).mean((1, 3)) - small
    assert np.sqrt((error**2).mean()) < 7  # one sample a pixel makes 10 to 60


@pytest.mark.parametrize("side", [512, 505])  # 505 pixels are no whole number of JPEG's blocks
def test_panoramas_of_large_jpegs_are_in_place(side):
    files = {str(i): encode(face, "JPEG", quality=95) for i, face in enumerate(cube(side))}
    pixels = picture(io.BytesIO(data.draw_panorama(files, 32, 96, "equirectangular", 60)))
    assert np.abs(pixels / 255 - (cylinder(32, 96) + 1) / 2).max() < 0.008


@pytest.mark.parametrize("source", ["folder", "zip"])
def test_incomplete_sets_and_other_images_are_skipped_and_named(source, here, capsys):
    faces, jpegs = cube(64), TOUR.replace("png", "jpg")
    files = named("good_", jpegs, faces) | named("lacks_", TOUR[:-6], faces) | named("cut_", TOUR, faces)
    files |= named("odd_", jpegs, faces[:4] + cube(128)[4:5] + faces[5:])
    files |= named("more_", TOUR + " f.jpg", faces + faces[:1])
    files |= {"cut_b.png": encode(NOISE)[:-200], "photo.png": encode(NOISE), "half_l.png": encode(NOISE)}
    make_zip("photos", files) if source == "zip" else fill(here / "photos", files)
    # So small that the odd JPEG, shrunk as it is read, is no larger than the others.
    assert data.main(["panorama", "photos", "made", "--size", "8x24", "--workers", "1"]) == 0
    out, err = capsys.readouterr()
    assert list(panoramas("made")) == ["good"] and "1 panoramas made, 0 were there already, 6 skipped" in out
    count, *named_ = err[err.index("skipped") :].splitlines()
    reasons = {"cut_": "'cut_b.png': image file is truncated", "odd_": "'odd_u.jpg' is 128 x 128"}
    reasons |= {"lacks_": "lacks d", "more_": "two of one face", "half_l.png": "is 32 x 32: neither 2:1 nor"}
    assert count == "skipped 6 of 7 panoramas:" and len(named_) == 5
    for name, reason in reasons.items():
        assert [reason in line for line in named_ if line.startswith(f"  '{name}")] == [True], name


def test_panoramas_that_are_there_are_not_made_again(here, capsys):
    for name in ("a", "b", "c"):
        fill(here / "photos", named(name, ".png", [sphere(8)]))
    command = ["panorama", "photos", "made", "--size", "4x12", "--workers", "1"]
    assert data.main(command) == 0 and "3 panoramas made, 0 were there" in capsys.readouterr().out
    assert data.main(command) == 0 and "0 panoramas made, 3 were there" in capsys.readouterr().out
    before = {path.name: path.stat().st_mtime_ns for path in Path("made").iterdir()}
    Path("made/b.png").unlink()
    Path("photos/z.png").write_bytes(encode(NOISE))
    assert data.main(command) == 0 and "1 panoramas made, 2 were there" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in Path("made").iterdir()}
    assert [name for name in before if before[name] != after[name]] == ["b.png"] and set(before) == set(after)
    for other in (["--size", "4x16"], ["--projection", "mercator"], ["--latitude", "50"]):
        assert data.main([*command, *other]) == 2
        error = capsys.readouterr().err
        assert (
            error.startswith("error: DST made has panoramas of other settings") and '"columns": 12' in error
        )
    assert {path.name: path.stat().st_mtime_ns for path in Path("made").iterdir()} == after


def test_names_of_panoramas_stay_in_their_folder_and_apart(here, capsys):
    image = encode(sphere(4))
    names = ["../../up.png", "/tmp/absolute.png", "C:\\drive.png", ".../x.png", "a/b.png", "a+b.png"]
    names += ["A/B.png", "a_b.png", "a/b.jpg", "new\nline.png", "x" * 300 + ".png", "é.png", "_.png"]
    files = dict.fromkeys(names, image) | named("a/b_", TOUR, cube(4)) | named("a/b/", TOUR, cube(4))
    (here / "inner").mkdir()
    make_zip("inner/p.zip", files)
    before = set(here.rglob("*"))
    assert data.main(["panorama", "inner/p.zip", "inner/made", "--size", "4x12", "--workers", "1"]) == 0
    assert "15 panoramas made" in capsys.readouterr().out
    made = [path.relative_to(here / "inner" / "made") for path in set(here.rglob("*")) - before]
    made = sorted(path.name for path in made if path.suffix == ".png" and path.name == str(path))
    assert len({name.lower() for name in made}) == 15 and len(set(here.rglob("*")) - before) == 17
    assert {"up.png", "a_b.png", "a%2Bb.png", "é.png", "p.png", "new%0Aline.png"} < set(made)
    assert len(data._list_folder("inner/made")) == 15  # hidden ones would be none for training


BAD_PANORAMAS = [
    ("", "the following arguments are required: panorama"),
    ("panoramas photos made", "invalid choice: 'panoramas'"),
    ("panorama photos", "the following arguments are required: DST"),
    ("panorama nowhere made", "SRC nowhere does not exist; give a folder or a zip"),
    ("panorama file.txt made", "file.txt is no zip that can be read"),
    ("panorama empty made", "SRC empty holds no panorama; looked for 2:1 images and faces: skybox1_sami"),
    ("panorama faces made", "(first of 1: 'f.png': is 8 x 8: neither 2:1 nor one of six faces); looked for"),
    ("panorama photos photos", "DST photos and SRC photos are one"),
    ("panorama photos photos/../photos/made", "are one, or one is in the other"),
    ("panorama photos .", "are one, or one is in the other"),
    ("panorama photos faces", "DST faces holds images from elsewhere"),
    ("panorama photos file.txt", "DST file.txt: File exists"),
    ("panorama photos file.txt/made", "DST file.txt/made: Not a directory"),
    ("panorama photos made --size 256", "--size 256 is no size; give rows x columns"),
    ("panorama photos made --size 0x768", "--size 0x768 is no size"),
    ("panorama photos made --size 256x99999", "--size 256x99999 is no size"),
    ("panorama photos made --latitude 0", "--latitude 0 is out of range"),
    ("panorama photos made --latitude 90.5", "--latitude 90.5 is out of range"),
    ("panorama photos made --latitude nan", "--latitude nan is out of range"),
    ("panorama photos made --latitude 90 --projection mercator", "--latitude 90 is out of range"),
    ("panorama photos made --latitude high", "argument --latitude: invalid float value: 'high'"),
    ("panorama photos made --projection flat", "argument --projection: invalid choice: 'flat'"),
    ("panorama photos made --workers -1", "--workers -1 is out of range"),
    ("panorama photos made --colour", "unrecognized arguments: --colour"),
]


@pytest.mark.parametrize("command, message", BAD_PANORAMAS, ids=[command for command, _ in BAD_PANORAMAS])
def test_bad_panorama_commands_end_in_one_line(command, message, here, capsys):
    fill(here / "photos", {"a.png": encode(sphere(4))})
    fill(here / "faces", {"f.png": encode(cube(8)[0])})
    fill(here / "empty", {"notes.txt": b"none"})
    Path("file.txt").write_text("text")
    before = sorted(here.rglob("*"))
    assert data.main(command.split()) == 2
    out, err = capsys.readouterr()
    error = "".join(line for line in err.splitlines(keepends=True) if "ready" not in line)
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error and not out
    assert sorted(here.rglob("*")) == before


def test_a_full_disk_and_a_dead_worker_are_told(here, monkeypatch, capsys):
    fill(here / "photos", {"a.png": encode(sphere(4)), "b.png": encode(sphere(4))})
    command = ["panorama", "photos", "made", "--size", "4x12", "--workers", "1"]

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert data.main(command) == 2 and "error: DST made: No space left" in capsys.readouterr().err
    assert [*Path("made").iterdir()] == []
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", shutil.which("true") or shutil.which("whoami"))
        assert data.main(command) == 2 and "error: one of --workers 1 died" in capsys.readouterr().err
    assert data.main(command) == 0 and list(panoramas("made")) == ["a", "b"]


@pytest.mark.skipif(os.name != "posix", reason="sends Ctrl-C to a process group, as POSIX terminals do")
def test_ctrl_c_ends_panoramas_quietly(here, request):
    heed(signal.SIGINT, request)
    fill(here / "photos", {f"{i:03}.png": encode(sphere(4)) for i in range(400)})
    command = [sys.executable, data.__file__, "panorama", "photos", "made", "--workers", "2"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, text=True)
    while not list(here.glob("made/*.png")):
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGINT)
    # The workers hold the same stderr: this ends only when they have ended too.
    assert child.communicate(timeout=20)[1] == "" and child.returncode == 128 + signal.SIGINT
    assert {path.suffix for path in Path("made").iterdir()} == {".png", ".json"}
    assert all(pixels.shape == (256, 768, 3) for pixels in panoramas("made").values())


def test_py360convert_agrees():
    second = pytest.importorskip("py360convert")
    files = {str(i): encode(face) for i, face in enumerate(cube(64))}
    made = picture(io.BytesIO(data.draw_panorama(files, 128, 256, "equirectangular", 90)))
    # Its pixels are not seen at their centres, but from border to border: half a pixel off at most.
    other = second.c2e(cube(64), 128, 256, cube_format="list")
    assert np.abs(made.astype(float) - other).max() < 6


# ----------------------------------------------------------------------------------------------------------
# Kernels
# ----------------------------------------------------------------------------------------------------------

GPU = "cuda" if torch.cuda.is_available() else "cpu"  # looked up before on_the_cpu hides it
LAST, FIRST = torch.channels_last, torch.contiguous_format
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ERROR = {FP32: 1e-5, FP16: 2**-9, BF16: 2**-6}  # the interpreter cuts digits off where a GPU rounds
triton_only = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")


def noise(*shape, dtype=FP32, form=None, scale=1.0):
    x = (scale * torch.randn(shape)).to(GPU, dtype)
    return x if form is None else x.contiguous(memory_format=form)


def norm_inputs(shape, dtype=FP32, dtype_gamma=FP32, form=FIRST):
    """x, γ, β, the running statistics, and a gradient of the output."""
    torch.manual_seed(sum(shape))
    B, C, h, w = shape
    x, dy = noise(*shape, dtype=dtype, form=form, scale=3), noise(*shape, dtype=dtype, form=form)
    gamma, beta = noise(B, C, dtype=dtype_gamma), noise(B, C, dtype=dtype_gamma)
    return x, gamma, beta, noise(C), noise(C).abs() + 0.5, dy


def norm_results(impl, x, gamma, beta, mean, var, dy, training=True, relu=True, wide=False):
    """Output, gradients and running statistics; `wide`: of the same numbers in float64."""
    *leaves, mean, var, dy = (t.double() if wide else t.detach() for t in (x, gamma, beta, mean, var, dy))
    leaves, mean, var = [t.requires_grad_() for t in leaves], mean.clone(), var.clone()
    y = kernels.conditional_batch_norm(*leaves, mean, var, training=training, relu=relu, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy), mean, var]


def assert_norm_is_right(inputs, **options):
    ours, true = (norm_results(i, *inputs, wide=i == "torch", **options) for i in ("triton", "torch"))
    for name, a, b in zip(("y", "dx", "dgamma", "dbeta", "running_mean", "running_var"), ours, true):
        error = (a - b).abs().max() / (1 + b.abs().max())  # sums of many values err by parts of the largest
        assert error < ERROR[a.dtype], f"{name} is wrong by {error}"
    return ours


@triton_only
@pytest.mark.parametrize("form", [LAST, FIRST])
@pytest.mark.parametrize(
    "shape",
    [
        (3, 4, 1, 1),  # one pixel
        (1, 5, 3, 2),  # one sample
        (5, 1, 9, 4),  # one channel, so that both formats are one
        (3, 65, 5, 7),  # a channel more than a tile has, nothing a power of two
        (2, 2, 37, 63),  # more positions than a tile has
    ],
)
def test_conditional_batch_norm_kernels(shape, form):
    ours = assert_norm_is_right(norm_inputs(shape, form=form))
    assert all(t.is_contiguous(memory_format=form) for t in ours[:2])


@triton_only
@pytest.mark.parametrize("training, relu", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    "dtype, dtype_gamma, form",
    [(FP32, FP32, LAST), (BF16, BF16, LAST), (BF16, FP32, FIRST), (FP16, FP16, FIRST), (FP16, FP32, LAST)],
)
def test_conditional_batch_norm_types(dtype, dtype_gamma, form, training, relu):
    inputs = norm_inputs((3, 5, 4, 3), dtype, dtype_gamma, form)
    ours = assert_norm_is_right(inputs, training=training, relu=relu)
    assert [t.dtype for t in ours] == [dtype, dtype, dtype_gamma, dtype_gamma, FP32, FP32]


@triton_only
@pytest.mark.parametrize("form", [LAST, FIRST])
def test_conditional_batch_norm_in_many_small_tiles(form, monkeypatch):
    """Every loop goes round more than once, and every sum is of several parts, the last ones smaller."""
    monkeypatch.setattr(kernels, "TILE", 32)
    monkeypatch.setattr(kernels, "PROGRAMS", 12)
    assert_norm_is_right(norm_inputs((11, 5, 7, 3), form=form))


@triton_only
@pytest.mark.parametrize("tile", [32, 4096])  # several tiles a part and several parts, or one
@pytest.mark.parametrize("first", [1000.0, 0.0, -1e4])  # a beginning unlike the rest says nothing of its mean
def test_statistics_far_from_zero(tile, first, monkeypatch):
    """Float32 holds a mean of 1,000 to 3e-5, and that decides; sums of squares would be out by 0.1."""
    monkeypatch.setattr(kernels, "TILE", tile)
    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    x, gamma, beta, mean, var, dy = norm_inputs((4, 2, 9, 5), form=LAST)
    x = 1000 + x / 3
    x[0, :, 0, :3] = first
    inputs = x, torch.ones_like(gamma), beta, 0 * mean, 0 * var, dy
    ours, true = (
        norm_results("triton", *inputs, relu=False),
        norm_results("torch", *inputs, relu=False, wide=True),
    )
    torch.testing.assert_close(ours[0].double(), true[0], atol=5e-5, rtol=0)
    torch.testing.assert_close(ours[-1].double(), true[-1], atol=0, rtol=2e-5)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=triton_only)])
def test_running_statistics_are_those_of_batch_norm(impl):
    norm = torch.nn.BatchNorm2d(5, affine=False, momentum=0.3).to(GPU)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    one, zero = (torch.full((4, 5), value, device=GPU) for value in (1.0, 0.0))
    for training in (True, True, False):
        norm.train(training)
        x = noise(4, 5, 3, 2) + 2
        y = kernels.conditional_batch_norm(
            x, one, zero, mean, var, training=training, momentum=0.3, impl=impl
        )
        torch.testing.assert_close(y, norm(x))
        torch.testing.assert_close(mean, norm.running_mean)
        torch.testing.assert_close(var, norm.running_var)


@triton_only
def test_conditional_batch_norm_takes_views():
    """Slices of a batch, of channels and of γ and β's common map, a transposed x, an expanded gradient."""
    torch.manual_seed(0)
    mean, var, dy = noise(3), noise(3).abs() + 0.5, noise(1, 3, 1, 1).expand(4, 3, 5, 2)
    gamma, beta = noise(4, 6).chunk(2, dim=1)
    expanded = noise(1, 3).expand(4, 3)
    for form in (LAST, FIRST):
        apart = noise(8, 3, 5, 2, form=form)[::2]
        assert kernels._as_positions(apart)[0] is apart  # no copy is made
        for x in (apart, noise(4, 7, 5, 2, form=form)[:, 2:5], noise(4, 3, 2, 5, form=form).mT):
            assert_norm_is_right((x, gamma, beta, mean, var, dy))
    assert_norm_is_right((x, expanded, expanded, mean, var, dy))
    assert_norm_is_right((x, expanded, beta, mean, var, dy))


@triton_only
def test_conditional_batch_norm_goes_beyond_31_bits():
    """Samples further apart than 2³¹ values; of the memory between them nothing is touched."""
    x, gamma, beta, mean, var, dy = norm_inputs((2, 3, 4, 2), BF16, form=LAST)
    far = torch.empty(2**31 + 64, dtype=BF16, device=GPU).as_strided(x.shape, (2**31 + 8, *x.stride()[1:]))
    far.copy_(x)
    ours, near = (norm_results("triton", t, gamma, beta, mean, var, dy) for t in (far, x))
    for a, b in zip(ours, near):
        torch.testing.assert_close(a, b)


@triton_only
def test_not_a_number_goes_through_the_relu():
    x, gamma, beta, mean, var, dy = norm_inputs((3, 2, 4, 2))
    x[1, 1, 2, 0] = float("nan")
    for training, count in ((True, 24), (False, 1)):
        y, dx, *_ = norm_results("triton", x, gamma, beta, mean, var, dy, training=training)
        assert y.isnan().sum() == count and y[:, 0].isfinite().all()
        assert training is bool(dx[:, 1].isnan().all())


def patches_of(count, C, S, dtype=FP32, form=FIRST):
    torch.manual_seed(count + C + S)
    return noise(count, C, S, S, dtype=dtype, form=form, scale=2)


def merge_results(impl, patches, wide=False, **options):
    """Output and gradient of the patches."""
    patches = (patches.double() if wide else patches.detach()).requires_grad_()
    images = kernels.merge_patches(patches, 2, 3, **options, impl=impl)
    slope = torch.arange(images.numel(), device=GPU).sin().view(images.shape).to(images.dtype)
    return images.detach(), torch.autograd.grad(images, patches, slope)[0]


@triton_only
@pytest.mark.parametrize("form", [LAST, FIRST])
@pytest.mark.parametrize("tile", [32, 4096])  # one row of a patch is more than a tile, or one tile holds all
@pytest.mark.parametrize(
    "C, S",
    [
        (3, 4),
        (1, 1),  # one value a patch
        (5, 7),  # nothing a power of two
    ],
)
def test_merge_patches_kernels(C, S, tile, form, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", tile)
    patches = patches_of(12, C, S, form=form)
    for ours, reference in zip(merge_results("triton", patches), merge_results("torch", patches)):
        assert torch.equal(ours, reference) and ours.stride() == reference.stride()
        assert ours.is_contiguous(memory_format=form)


@triton_only
@pytest.mark.parametrize("dtype, to", [(BF16, FP32), (FP32, BF16), (FP16, None), (FP32, FP32)])
@pytest.mark.parametrize("form", [LAST, FIRST])
@pytest.mark.parametrize("tanh", [True, False])
def test_merge_patches_types(dtype, to, form, tanh):
    patches = patches_of(6, 3, 4, dtype, form)
    ours = merge_results("triton", patches, tanh=tanh, dtype=to)
    true = merge_results("torch", patches, wide=True, tanh=tanh)
    assert [t.dtype for t in ours] == [to or dtype, dtype]
    for a, b in zip(ours, true):
        error = max(ERROR[dtype] if a.dtype == dtype else 0, ERROR[to or dtype])
        torch.testing.assert_close(a.double(), b, atol=error, rtol=error)


@triton_only
def test_tanh_has_all_its_digits():
    x = torch.tensor([-1e4, -12, -0.26, -0.24, -1e-6, 0, 1e-20, 1e-3, 0.249, 0.251, 3, 9.5], device=GPU)
    true = x.double().requires_grad_()
    patches = x.view(-1, 1, 1, 1).requires_grad_()
    y = kernels.merge_patches(patches, 1, 1, tanh=True, impl="triton")
    (dx,) = torch.autograd.grad(y.sum(), patches)
    torch.testing.assert_close(y.double().flatten(), true.tanh(), atol=0, rtol=1e-6)
    torch.testing.assert_close(dx.double().flatten(), true.cosh() ** -2, atol=0, rtol=1e-5)


@triton_only
def test_merge_patches_takes_views():
    patches = patches_of(12, 4, 3, form=LAST)
    for view in (patches[::2], patches[:6, 1:3], patches[:6].mT):
        for ours, reference in zip(merge_results("triton", view), merge_results("torch", view)):
            assert torch.equal(ours, reference)


@pytest.mark.parametrize("form", [LAST, FIRST])
def test_gradients_of_the_references(form):
    """The kernels are held against these."""
    torch.manual_seed(0)
    x, gamma, beta, mean, var, _ = (t.double() for t in norm_inputs((3, 2, 2, 2), form=form))
    inputs = [t.requires_grad_() for t in (x, gamma, beta)]
    for training, relu in itertools.product((True, False), (True, False)):
        options = dict(training=training, relu=relu, impl="torch")
        assert torch.autograd.gradcheck(
            lambda *t: kernels.conditional_batch_norm(*t, mean, var, **options), inputs
        )
    patches = patches_of(6, 2, 2, form=form).double().requires_grad_()
    for tanh in (True, False):
        assert torch.autograd.gradcheck(
            lambda t: kernels.merge_patches(t, 2, 3, tanh=tanh, impl="torch"), patches
        )


@triton_only
def test_two_runs_are_equal_to_the_bit():
    inputs = norm_inputs((5, 20, 4, 3) if GPU == "cpu" else (300, 70, 17, 9), BF16, form=LAST)
    for a, b in zip(norm_results("triton", *inputs), norm_results("triton", *inputs)):
        assert torch.equal(a, b)


@triton_only
def test_kernels_differentiate_once():
    x, gamma, beta, mean, var, _ = norm_inputs((3, 2, 4, 2))
    patches = patches_of(6, 3, 2).requires_grad_()
    norm = kernels.conditional_batch_norm
    y = norm(x.requires_grad_(), gamma, beta, mean, var, training=True, impl="triton")
    images = kernels.merge_patches(patches, 2, 3, tanh=True, impl="triton")
    for output, leaf in ((y, x), (images, patches)):
        (gradient,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


@triton_only
def test_the_gradient_penalty_differentiates_twice_beside_kernels():
    """L_GP goes through D alone: s' as made by kernels gives what s' as made by PyTorch gives."""
    torch.manual_seed(0)
    w = noise(3, 4, 4)
    gradients = []
    for impl in ("triton", "torch"):
        patches, weight = patches_of(8, 3, 2).requires_grad_(), w.clone().requires_grad_()
        s_macro = kernels.merge_patches(patches, 2, 2, tanh=True, impl=impl)
        x_macro, epsilon = torch.ones_like(s_macro), torch.full((2,), 0.5, device=GPU)
        D = lambda x: ((weight * x).square()).sum((1, 2, 3))  # noqa: E731
        L_GP, _ = coco_gan.gradient_penalty(D, x_macro, s_macro, epsilon)
        (L_GP - D(s_macro).mean()).backward()
        gradients.append((weight.grad, patches.grad))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def crop_inputs(n=3, H=9, W=13):
    """Images, and places inside, across each border, and far outside."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (n, H, W, 3), dtype=torch.uint8, device=GPU)
    top, left = torch.tensor([[2, 7, -3, 0, 900, -900], [3, 12, -1, -13, -777, 778]], device=GPU)
    return images, torch.arange(6, device=GPU) % n, top, left


@triton_only
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize(
    "height, width, tile",
    [
        (4, 5, 4096),
        (9, 13, 32),  # the whole image, in tiles of less than a row
        (1, 1, 4096),
    ],
)
def test_crop_patches_kernel(height, width, tile, mirror, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", tile)
    images, index, top, left = crop_inputs()
    turned = torch.arange(6, device=GPU) % 4 == 1 if mirror else None
    crops = [
        kernels.crop_patches(images, index, top, left, height, width, mirror=turned, impl=impl)
        for impl in ("triton", "torch")
    ]
    assert torch.equal(*crops) and crops[0].stride() == crops[1].stride()
    for b, (i, y, x) in enumerate(zip(index.tolist(), top.tolist(), left.tolist())):
        true = images[i].roll((-y, -x), (0, 1))[:height, :width]
        true = true.flip(1) if mirror and turned[b] else true
        assert torch.equal(true, ((crops[0][b] + 1) * 127.5).round().byte().permute(1, 2, 0))


@triton_only
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_crop_patches_types(dtype):
    values = torch.arange(256, dtype=torch.uint8, device=GPU).repeat(3).view(1, 16, 16, 3)
    zero = torch.zeros(1, dtype=torch.int64, device=GPU)
    ours, reference = (
        kernels.crop_patches(values, zero, zero, zero, 16, 16, dtype=dtype, impl=impl)
        for impl in ("triton", "torch")
    )
    error = 0 if dtype is FP32 else ERROR[dtype]
    torch.testing.assert_close(ours, reference, atol=error, rtol=0)


@triton_only
def test_crop_patches_from_a_store_beyond_31_bits():
    images = torch.empty(700, 1024, 1024, 3, dtype=torch.uint8, device=GPU)  # untouched, it takes no memory
    assert images.numel() > 2**31
    images[-1, :4, :4] = noise(4, 4, 3, scale=200).byte()
    last, zero = (torch.full((1,), value, device=GPU) for value in (699, 0))
    crop = kernels.crop_patches(images, last, zero, zero, 4, 4, impl="triton")
    assert torch.equal(crop[0].permute(1, 2, 0), images[-1, :4, :4] / 127.5 - 1)


@triton_only
def test_numbers_of_no_image_give_nothing_to_look_at():
    images, index, top, left = crop_inputs()
    index[1], index[2] = 3, -1
    crop = kernels.crop_patches(images, index, top, left, 4, 4, impl="triton")
    assert crop.isnan().flatten(1).all(1).tolist() == [False, True, True, False, False, False]
    assert crop[[0, 3, 4, 5]].isfinite().all()


def test_nothing_in_nothing_out():
    for impl in ("torch", *["triton"] * (kernels.triton is not None)):
        x, z, zero = noise(0, 3, 2, 2), noise(0, 3), torch.zeros(0, dtype=torch.int64, device=GPU)
        y = kernels.conditional_batch_norm(x, z, z, noise(3), noise(3), training=False, impl=impl)
        assert y.shape == (0, 3, 2, 2)
        assert kernels.merge_patches(x, 2, 3, impl=impl).shape == (0, 3, 4, 6)
        images = crop_inputs()[0]
        assert kernels.crop_patches(images, zero, zero, zero, 4, 4, impl=impl).shape == (0, 3, 4, 4)


def norm(
    x=(2, 3, 4, 4), gamma=(2, 3), mean=(3,), apart=1, dtype=FP32, dtype_gamma=FP32, device=GPU, **options
):
    gamma = torch.ones(gamma, dtype=dtype_gamma, device=device)
    stats = torch.ones(*mean, apart, device=GPU)[:, 0]
    options = dict(training=True, impl="torch") | options
    return kernels.conditional_batch_norm(
        torch.ones(x, dtype=dtype, device=GPU), gamma, gamma, stats, stats, **options
    )


def merge(shape=(12, 3, 4, 4), rows=2, columns=3, dtype=FP32, **options):
    return kernels.merge_patches(torch.ones(shape, dtype=dtype), rows, columns, **options)


def crop(
    images=(5, 8, 8, 3), index=(2,), top=(2,), height=4, width=4, kind=torch.uint8, mirror=None, **options
):
    index, top = (torch.zeros(shape, dtype=torch.int64) for shape in (index, top))
    images = torch.zeros(images, dtype=kind)
    return kernels.crop_patches(images, index, top, top, height, width, mirror=mirror, **options)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: norm(x=(2, 3, 4)), "x has the shape (2, 3, 4); give (B, C, h, w)"),
        (lambda: norm(gamma=(2, 4)), "gamma has the shape (2, 4); give (2, 3)"),
        (lambda: norm(gamma=(3,)), "gamma has the shape (3,); give (2, 3)"),
        (lambda: norm(mean=(2,)), "running_mean has the shape (2,); give (3,)"),
        (lambda: norm(apart=2), "running_mean and running_var are written to; give them contiguous"),
        (lambda: norm(dtype=torch.int32), "x is torch.int32; give torch.float32 or torch.bfloat16 or"),
        (lambda: norm(dtype_gamma=BF16), "gamma is torch.bfloat16; give torch.float32"),
        (lambda: norm(device="meta"), "gamma is on meta; give it on"),
        (lambda: norm(x=(1, 3, 1, 1), gamma=(1, 3)), "x has 1 values a channel"),
        (lambda: norm(impl="cuda"), "impl is 'cuda'; give 'auto', 'torch' or 'triton'"),
        (lambda: merge((12, 3, 4, 5)), "patches has the shape (12, 3, 4, 5); give (B·rows·columns, C, S, S)"),
        (lambda: merge(rows=5), "12 patches make no images of 5 rows and 3 columns"),
        (lambda: merge(rows=0), "12 patches make no images of 0 rows and 3 columns"),
        (lambda: merge(dtype=torch.int64), "patches is torch.int64; give torch.float32"),
        (lambda: merge(impl="cpu"), "impl is 'cpu'; give 'auto', 'torch' or 'triton'"),
        (lambda: crop((5, 8, 8, 4)), "images has the shape (5, 8, 8, 4); give (n, H, W, 3)"),
        (lambda: crop(kind=FP32), "images is torch.float32; give torch.uint8"),
        (lambda: crop(height=9), "a patch of 9 x 4 pixels is not inside an image of 8 x 8"),
        (lambda: crop(width=0), "a patch of 4 x 0 pixels is not inside an image of 8 x 8"),
        (lambda: crop(top=(3,)), "top has the shape (3,); give (2,)"),
        (lambda: crop(dtype=torch.uint8), "dtype is torch.uint8; give torch.float32"),
        (lambda: crop(mirror=torch.zeros(2)), "mirror is torch.float32; give torch.bool"),
        (
            lambda: crop(mirror=torch.zeros(2, dtype=torch.bool, device="meta")),
            "mirror is on meta; give it on cpu",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@triton_only
def test_float64_is_for_the_references():
    with pytest.raises(
        ValueError, match="x is torch.float64; give torch.float32 or torch.bfloat16 or torch.float16"
    ):
        norm(dtype=torch.float64, impl="triton")


def copy_of_kernels():
    """kernels.py imported once more, as it finds the machine now."""
    spec = importlib.util.spec_from_file_location("copy_of_kernels", ROOT / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "installed, message",
    [
        (False, "impl is 'triton', which is not installed"),
        pytest.param(True, "impl is 'triton' and the tensors are on cpu", marks=triton_only),
    ],
)
def test_without_triton_or_a_gpu_auto_is_pytorch(installed, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if not installed:
        monkeypatch.setitem(sys.modules, "triton", None)
    copy, patches = copy_of_kernels(), torch.randn(6, 3, 4, 4)
    assert torch.equal(copy.merge_patches(patches, 2, 3), kernels.merge_patches(patches, 2, 3, impl="torch"))
    with pytest.raises(ValueError, match=message):
        copy.merge_patches(patches, 2, 3, impl="triton")


@pytest.mark.skipif(GPU != "cpu" or kernels.triton is None, reason="for Triton's interpreter")
def test_training_by_the_kernels_is_training(monkeypatch):
    config = dataclasses.replace(
        UNEVEN, mirror=True, topology="cylinder", yaw=True, precision="fp32", lr_d=1e-5
    )
    monkeypatch.setattr(kernels, "DEFAULT", "torch")
    losses, nets, _ = six_steps(plain, config)
    coco_gan.choose_impl("triton", CPU)
    used = []
    for name in ("_normalise_kernel", "_merge_patches_kernel", "_crop_patches_kernel"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, Noted(name, kernel, used))
    found, found_nets, _ = six_steps(plain, config)
    assert len(used) == 6 * (3 + 1 + 1)  # three CBN in G, one φ, one ψ a step
    torch.testing.assert_close(found[0], losses[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, losses, rtol=0.05, atol=0.05)  # Adam enlarges what rounding differs in
    torch.testing.assert_close(found_nets["G"], nets["G"], rtol=0.05, atol=0.01)


class Noted:
    """A kernel whose launches are noted."""

    def __init__(self, name, kernel, used):
        self.name, self.kernel, self.used = name, kernel, used

    def __getitem__(self, grid):
        self.used.append(self.name)
        return self.kernel[grid]


@triton_only
@pytest.mark.parametrize("name", ["_normalise_kernel", "_input_gradient_kernel", "_merge_patches_kernel"])
def test_kernels_that_are_off_do_not_pass(name, monkeypatch):
    """By a fifth, in bfloat16 alone: what a GPU is trained with is what is verified there."""
    right = getattr(kernels, name)

    class Off:
        def __getitem__(self, grid):
            return functools.partial(self.launch, grid)

        def launch(self, grid, *args, **options):
            right[grid](*args, **options)
            if args[0].dtype is BF16:
                args[2 if name == "_input_gradient_kernel" else 1].mul_(0.8)

    kernels.verify(GPU, "triton", kernels.SMALL[:1])
    monkeypatch.setattr(kernels, name, Off())
    with pytest.raises(AssertionError, match="bfloat16.*wrong by"):
        kernels.verify(GPU, "triton", kernels.SMALL[:1])


def test_kernels_verify_themselves():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # with a GPU it would go on to time everything
    out = subprocess.check_output([sys.executable, ROOT / "kernels.py"], env=environment, text=True)
    assert "agree with float64" in out and "nothing is timed" in out


@pytest.mark.skipif(GPU == "cpu", reason="no CUDA device")
def test_kernels_go_into_a_cuda_graph():
    """Nothing in them waits for the GPU, or this fails. Replayed on other numbers, it does what they do."""
    inputs, patches = norm_inputs((4, 24, 6, 5), BF16, form=LAST), patches_of(6, 3, 8, BF16, LAST)
    images, index, top, left = crop_inputs()

    def run():
        crop = kernels.crop_patches(images, index, top, left, 4, 5, impl="triton")
        return [*norm_results("triton", *inputs), *merge_results("triton", patches, tanh=True), crop]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        run()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            replayed = run()
        for tensor in (inputs[0], inputs[1], patches):
            tensor.mul_(-0.5)
        graph.replay()
        for a, b in zip(replayed, run()):
            assert torch.equal(a, b)


def compile_kernels(architecture: int, everything: bool) -> None:
    """Compile what COCO-GAN launches, or `everything` there is, and print what it takes of a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    class Noted:
        """Stands for a kernel: notes the arguments it is launched with as Triton would compile for them."""

        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *args, num_warps=4):
            signature, constants, multiples = {}, {}, {}
            for i, (parameter, value) in enumerate(zip(self.kernel.params, args, strict=True)):
                if isinstance(value, torch.Tensor):
                    kind = {FP32: "*fp32", BF16: "*bf16", FP16: "*fp16"}.get(value.dtype, "*u8")
                    kind = "*i64" if value.dtype is torch.int64 else kind
                else:
                    kind = "fp32" if isinstance(value, float) else "i32"
                fixed = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
                if parameter.is_constexpr or fixed:
                    kind, constants[i,] = "constexpr", value
                elif kind[0] == "*" or (
                    kind == "i32" and value % 16 == 0 and not parameter.do_not_specialize
                ):
                    multiples[i,] = [["tt.divisibility", 16]]
                signature[parameter.name] = kind
            source = ASTSource(self.kernel, signature, constants, multiples)
            key = self.kernel.__name__, num_warps, *signature.values(), *map(str, (constants, multiples))
            sources.setdefault(key, source)

    sources = {}
    for name, kernel in vars(kernels).items():
        if isinstance(kernel, triton.runtime.JITFunction) and name.endswith("_kernel"):
            setattr(kernels, name, Noted(kernel))

    shapes = [(512, 512, 4, 4), (512, 64, 32, 32)]
    types, norm_types, forms = [FP32, BF16], [(FP32, FP32), (BF16, BF16)], [LAST]
    modes, tanhs, outs = [(True, True), (False, True)], [True], [FP32]
    if everything:
        shapes += [(3, 65, 5, 7), (2, 1, 1, 1)]
        types, forms, outs, tanhs = kernels.TYPES, [LAST, FIRST], kernels.TYPES, [True, False]
        norm_types = [*itertools.product(types, [FP32]), (BF16, BF16), (FP16, FP16)]
        modes = [*itertools.product([True, False], [True, False])]
    meta = torch.device("meta")  # shapes without memory
    for shape, kinds, form, (training, relu) in itertools.product(shapes, norm_types, forms, modes):
        x = torch.empty(shape, dtype=kinds[0], memory_format=form, device=meta)
        gamma, stats = torch.empty(shape[:2], dtype=kinds[1], device=meta), torch.empty(shape[1], device=meta)
        inputs = x.requires_grad_(training or everything), gamma, gamma, stats, stats
        y = kernels.conditional_batch_norm(*inputs, training=training, relu=relu, impl="triton")
        y.requires_grad and y.sum().backward()
    for dtype, form, tanh, out in itertools.product(types, forms, tanhs, outs):
        patches = torch.empty(512, 3, 32, 32, dtype=dtype, memory_format=form, device=meta).requires_grad_()
        kernels.merge_patches(patches, 2, 2, tanh=tanh, dtype=out, impl="triton").sum().backward()
    images = torch.empty(9, 128, 128, 3, dtype=torch.uint8, device=meta)
    place = torch.empty(3, 128, dtype=torch.int64, device=meta)
    for out, mirror in itertools.product(outs, [None, place[0].bool()]):
        kernels.crop_patches(images, *place, 64, 64, mirror=mirror, dtype=out, impl="triton")

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    print(f"Triton {triton.__version__}, sm_{architecture}: registers a thread, bytes spilled")
    for (name, num_warps, *_), source in sorted(sources.items()):
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source, target=target, options=dict(num_warps=num_warps))
        with tempfile.TemporaryDirectory() as folder:
            (path := Path(folder, "cubin")).write_bytes(compiled.asm["cubin"])
            report = subprocess.check_output([tool, "--dump-resource-usage", path], text=True)
        registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", report).groups())
        pointers = " ".join(kind[1:] for kind in source.signature.values() if kind[0] == "*")
        print(f"{registers:5} {spilled:3}  {name[1:-7]} {pointers} {[*source.constants.values()]}")
        assert spilled < 64, name
    print(f"{len(sources)} compiled")


@triton_only
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_without_a_gpu(architecture):
    """What the interpreter takes and the compiler does not is found here. COMPILE=all for all there is."""
    everything = os.environ.get("COMPILE") == "all"
    code = f"import {Path(__file__).stem} as t; t.compile_kernels({architecture}, {everything})"
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-2000:]


# ----------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch ran",)


def spoil(name):
    """Make a file that is no checkpoint of ours."""
    whole = Path("run/checkpoint-000000004.pt").read_bytes()
    contents = torch.load("run/checkpoint-000000004.pt", weights_only=True)
    if name == "short.pt":
        Path(name).write_bytes(whole[: len(whole) // 2])
    elif name == "alone.pt":
        Path(name).write_bytes(whole)
    elif name == "empty.pt":
        Path(name).write_bytes(b"")
    elif name == "photo.pt":
        Image.new("RGB", (9, 9)).save(name, format="PNG")
    elif name == "other.pt":
        torch.save({"state_dict": {"weight": torch.zeros(3)}}, name)
    elif name == "code.pt":
        torch.save({**contents, "extra": RunsCode()}, name)
    elif name == "pickle.pt":
        Path(name).write_bytes(pickle.dumps(RunsCode()))
    elif name == "huge.pt":
        torch.save({**contents, "config": {**contents["config"], "width_g": 10**9}}, name)
    elif name == "field.pt":
        torch.save({**contents, "config": {**contents["config"], "colour": 1}}, name)
    elif name == "swapped.pt":
        torch.save({**contents, "G_average": contents["D"]}, name)


BAD_COMMANDS = [
    ("", "the following arguments are required: command"),
    ("trian", "invalid choice: 'trian'"),
    ("train --widht 32", "--widht is unknown, did you mean --width?"),
    ("train --steps many", "argument --steps: invalid int value: 'many'"),
    ("train --log-every 0", "argument --log-every: '0' is no whole number from 1 on"),
    ("train --preset celeba46", "--preset celeba46 is unknown, did you mean celeba64?"),
    ("train --device tpu", "--device tpu is unknown; give auto, cpu"),
    ("train --device cpu:", "--device cpu: is unknown"),
    ("train --device cuda:99", "--device cuda:99 is not there"),
    ("train --data ./nothing", "--data ./nothing does not exist"),
    ("train --data toy:cats", "--data toy:cats is unknown"),
    ("train --data empty", "--data empty holds no image"),
    (
        "train --panorama --data faces",
        "--data faces holds faces of cube maps; make panoramas of them by: python data",
    ),
    ("train --data file.txt", "--data file.txt"),
    ("train --height 100", "--height 100 is not divisible by --S 8"),
    ("train --holdout 4096", "--holdout 4096 leaves none of 4096 images"),
    ("train --run run", "--run run is not empty; go on with it by --resume run"),
    ("train --run empty/..", "--run empty/.. is not empty; name a new or empty folder"),
    ("train --run file.txt/run", "--run file.txt/run cannot be written"),
    ("train --cache file.txt/cache", "--cache file.txt/cache"),
    ("train --resume nowhere", "--resume nowhere does not exist"),
    ("train --resume short.pt", "short.pt is no checkpoint that can be loaded"),
    ("train --resume alone.pt", "--resume alone.pt is not the newest checkpoint of a run"),
    ("train --resume empty", "--resume empty holds no checkpoint"),
    (
        f"train --resume {coco_gan.ASSETS / 'toy_faces.pt'}",
        "holds averaged weights only, which cannot be trained",
    ),
    ("train --extrapolate 1", "--extrapolate 1 needs a trained model; add --from RUN"),
    ("train --from run", "--from is for post-training; add --extrapolate 1, or go on with a"),
    ("train --from run --extrapolate 0", "--extrapolate 0 adds nothing to train; give 1 or more"),
    (
        "train --from run --extrapolate 1 --resume run",
        "--from begins a new run and --resume goes on with one",
    ),
    ("train --from run --extrapolate 1 --run run", "--run run is not empty"),
    ("train --from run --extrapolate 1 --steps 4", "has done 4 steps already; --steps counts them too"),
    ("train --from run --extrapolate 1 --preset tiny", "--preset cannot be given with --from"),
    (
        "train --from run --extrapolate 1 --lr-g 1",
        "--lr-g was 0.0001 in run/checkpoint-000000004.pt and is now 1",
    ),
    ("train --from nowhere --extrapolate 1", "--from nowhere does not exist"),
    (f"train --extrapolate 1 --from {coco_gan.ASSETS / 'toy_faces.pt'}", "holds averaged weights only"),
    ("sample --checkpoint run --extrapolate x", "--extrapolate x is no width of a ring"),
    ("sample --checkpoint run --extrapolate 1 --patches", "--extrapolate 1 cannot go with --patches"),
    (
        "sample --checkpoint run --extrapolate 1 --viewport 0,0,1,1",
        "--extrapolate 1 cannot go with --viewport",
    ),
    ("train --crop celeba", "--crop celeba is for photographs"),
    ("train --yaw", "--yaw turns images whose borders meet; give --topology cylinder or torus as well"),
    ("train --resume", "there is no checkpoint under runs/; train one with: python coco_gan.py train"),
    (
        "train --resume --panorama",
        "no panorama checkpoint under runs/; train one with: python coco_gan.py train --p",
    ),
    ("train --panorama --preset tiny", "--panorama needs a cylinder, and this run is on a plane"),
    ("train --panorama --topology torus", "--panorama needs a cylinder, and this run is on a torus"),
    ("train --panorama --resume run --steps 9", "--panorama needs a cylinder, and this run is on a plane"),
    (
        "sample --panorama --checkpoint run",
        "--panorama needs a cylinder, and run/checkpoint-000000004.pt is on a p",
    ),
    ("sample --checkpoint run --turns 2", "--turns 2 repeats images whose borders meet"),
    (
        "sample --checkpoint run --turns 2 --viewport 0,0,1,1",
        "--turns cannot go with --viewport",
    ),
    ("sample --checkpoint run --turns 101", "--turns 101 is out of range; give 1 to 100"),
    (
        "sample --checkpoint run --viewport 0,0,8",
        "--viewport 0,0,8 is no rectangle; give top,left,height,width",
    ),
    ("sample --checkpoint run --viewport 0,0,0,8", "is 8 x 0 pixels of 16 images; give 1 to 65536 a side"),
    (
        "sample --checkpoint run --viewport 0,0,1,65537",
        "is 65537 x 1 pixels of 16 images; give 1 to 65536 a side",
    ),
    (
        "sample --checkpoint run --viewport 0,0,4096,4096",
        "of 16 images; give 1 to 65536 a side and at most 67108864",
    ),
    (
        "sample --checkpoint run --viewport -1,0,2,2",
        "expected one argument (after = where it begins with a minus)",
    ),
    (
        "sample --checkpoint run --viewport 9,0,8,8",
        "reaches rows 9 to 16; the image has 0 to 15, and its borders",
    ),
    (
        "sample --checkpoint run --viewport 0,-1,8,8",
        "reaches columns -1 to 6; the image has 0 to 23, and its bord",
    ),
    ("sample --checkpoint run --viewport 0,0,9,9 --patches", "--patches draws one picture"),
    ("sample --checkpoint empty", "--checkpoint empty holds no checkpoint"),
    ("sample --checkpoint nowhere.pt", "--checkpoint nowhere.pt does not exist"),
    ("sample --checkpoint short.pt", "short.pt is no checkpoint that can be loaded"),
    ("sample --checkpoint empty.pt", "empty.pt is no checkpoint that can be loaded"),
    ("sample --checkpoint photo.pt", "photo.pt is no checkpoint that can be loaded"),
    ("sample --checkpoint code.pt", "code.pt is no checkpoint that can be loaded: it holds code"),
    ("sample --checkpoint pickle.pt", "pickle.pt is no checkpoint that can be loaded: it holds code"),
    ("sample --checkpoint other.pt", "other.pt is not a checkpoint of this program"),
    ("sample --checkpoint huge.pt", "--width-g 1000000000 is out of range"),
    ("sample --checkpoint field.pt", "field.pt is damaged, or of another version"),
    ("sample --checkpoint swapped.pt", "swapped.pt is damaged, or of another version"),
    ("sample --checkpoint run --out picture.txt", "--out picture.txt is no picture's name"),
    ("sample --checkpoint run --out file.txt/a.png", "--out file.txt/a.png cannot be written"),
    (f"sample --checkpoint run --out {'a' * 300}.png", "aaa.png cannot be written"),
    (f"sample --checkpoint {'a' * 300}", "aaa does not exist"),
    ("sample --checkpoint run --out run --patches", "--patches draws one picture"),
    ("sample --checkpoint run --seed 1,x", "--seed 1,x is no list of seeds"),
    ("sample --checkpoint run --seed 6-4", "--seed 6-4 has a range that is empty"),
    ("sample --checkpoint run --seed 1,2 --count 3", "--seed 1,2 lists 2 seeds and --count is 3"),
    ("sample --checkpoint run --count 1000001", "--count 1000001 is out of range; give 1 to 1000000"),
    ("sample --sead 1", "--sead is unknown, did you mean --seed?"),
]


@pytest.mark.parametrize(
    "command, message", BAD_COMMANDS, ids=[command or "nothing" for command, _ in BAD_COMMANDS]
)
def test_bad_input_ends_in_one_line(command, message, copied, capsys):
    Path("empty").mkdir()
    Path("file.txt").write_text("text")
    fill(Path("faces"), {f"{face}.png": encode(COLOURS) for face in "lfrbud"})
    for name in re.findall(r"\w+\.pt", command):
        spoil(name)
    before = {path: path.stat().st_mtime_ns for path in Path(".").rglob("*") if "cache" not in path.parts}
    device = (
        ["--device", "cpu"] if command.startswith(("train", "sample")) and "--device" not in command else []
    )
    assert coco_gan.main([*command.split(), *device]) == 2
    error = capsys.readouterr().err
    error = "".join(
        line for line in error.splitlines(keepends=True) if "images" not in line or "error" in line
    )
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    after = {path: path.stat().st_mtime_ns for path in Path(".").rglob("*") if "cache" not in path.parts}
    assert after == before  # nothing overwritten, nothing left, and no code run


def test_dry_run_prints_and_makes_nothing(here, capsys):
    assert coco_gan.main(["train", "--dry-run", "--preset", "celeba128", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"--height +128\n", out) and re.search(
        r"G\.blocks\.3 +GeneratorBlock +B x 64 x 32 x 32\n", out
    )
    assert re.search(r"D\.blocks\.0 +DiscriminatorBlock +B x 64 x 32 x 32\n", out)
    assert "G 10,889,475, D 9,842,881, A 66,178" in out and re.search(r"memory: about [\d,]+ MB", out)
    assert list(here.iterdir()) == []


def test_presets_go_by_device_and_data():
    def choice(device, data, preset=None):
        args = coco_gan.build_parser().parse_args(["train", *(["--preset", preset] if preset else [])])
        return coco_gan.choose_preset(args, torch.device(device), data)[0]

    assert choice("cpu", "toy:faces") == "tiny" and choice("cpu", "photos") == "small"
    assert choice("cuda", "toy:faces") == choice("cuda", "photos") == "celeba64"
    assert choice("cuda", "photos", "lsun256") == "lsun256"


def test_every_field_has_a_flag(here, capsys):
    changed = dict(z_dim=9, seed=3, precision="bf16", average=0.5, data="toy:landscapes", topology="torus")
    config = dataclasses.replace(UNEVEN, **changed)
    assert coco_gan.main(["train", "--dry-run", "--device", "cpu", *flags(config)]) == 0
    out = capsys.readouterr().out
    for name, value in dataclasses.asdict(config).items():
        if value != getattr(Config(), name):
            assert re.search(rf"{coco_gan.flag(name)} +{value}\n", out)


README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(
    r"^(?:pip .+ && )?python (coco_gan\.py|data\.py|-m experiments\.\w+) (.+?)(?: +#.*)?$",
    README,
    re.MULTILINE,
)


def test_the_readme_shows_its_first_command_early():
    assert any("python coco_gan.py train" in line for line in README.splitlines()[:25])


def test_commands_of_the_readme(here, capsys):
    """All of them, in their order, in one folder, on a tiny budget."""
    photos = Path("celeba")
    photos.mkdir()
    for n in range(5):
        pixels = np.random.default_rng(n).integers(0, 256, (218, 178, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{n}.jpg")
        for face in range(6):
            Path("matterport").mkdir(exist_ok=True)
            Image.fromarray(pixels[:64, :64]).save(f"matterport/{n}_skybox{face}_sami.jpg")
    budget = "--steps 2 --batch-size 2 --width-g 2 --width-d 2 --device cpu"
    assert len(COMMANDS) >= 5
    for number, (script, command) in enumerate(COMMANDS):
        words = shlex.split(command)
        main = {"coco_gan.py": coco_gan.main, "data.py": data.main}.get(script)
        if main is None:
            main = importlib.import_module(script.split()[1]).main
            if "ablations" in script:
                words += "--steps 1 --seeds 1 --count 32 --variants coco-gan".split()
        elif words[0] == "train" and "--from" in words:
            words += ["--steps", str(10 + number)]
        elif words[0] == "train" and "--resume" not in words:
            words += budget.split()
        elif "--resume" in words:
            words += ["--steps", str(10 + number)]
        assert main(words) == 0, command
    runs = [path.name for path in Path("runs").iterdir() if path.is_dir()]
    expected = ["extrapolate-001", "panorama-tiny-001", "panorama-tiny-002"]
    assert sorted(runs) == [*expected, "small-001", "small-002", "tiny-001"]


def test_python_examples_of_the_readme(copied, here):
    example, panorama = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    shutil.copytree("run", "runs/tiny-001")
    shutil.copytree(ROOT / "assets", "assets")
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["images"].shape[1:] == (3, 16, 24)
    exec(compile(panorama, "README.md", "exec"), names)
    assert names["part"].shape == (32, 40, 3)
