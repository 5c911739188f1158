"""Tests of coco_gan.py, data.py and kernels.py, in their order: python -m pytest"""

import ast
import contextlib
import copy
import dataclasses
import errno
import functools
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import types
import typing
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

# Without a GPU the kernels run in Triton's interpreter, which has to be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import coco_gan
import data
import kernels
from coco_gan import COCOGAN, Config, UserError

ROOT = Path(__file__).parent
CPU = torch.device("cpu")
# Nothing is square and nothing is equal, so that rows and columns that are mixed up show.
UNEVEN = Config(height=16, width=24, N=2, M=3, S=4, z_dim=8, width_g=2, width_d=2, batch_size=4, steps=4)
CYLINDER = dataclasses.replace(UNEVEN, topology="cylinder")
TORUS = dataclasses.replace(UNEVEN, topology="torus")


def flags(config):
    """The command line of a configuration, whatever the preset."""
    given = {name: value for name, value in vars(config).items() if not isinstance(value, bool)}
    return [word for name, value in given.items() for word in (coco_gan.flag(name), str(value))]


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image)


def random_images(config, count=6):
    rng = torch.Generator().manual_seed(3)
    return torch.randint(256, (count, config.height, config.width, 3), dtype=torch.uint8, generator=rng)


def draw(config, images, rng=None):
    rng = rng or torch.Generator().manual_seed(0)
    return coco_gan.draw_batch(config, images, torch.arange(len(images)), rng, CPU)


def step_of(gan, batch):
    losses = coco_gan.train_step(gan, *batch, coco_gan.ema_weight(gan.config, gan.step))
    gan.step += 1
    return losses


@pytest.fixture(autouse=True, scope="session")
def on_the_cpu():
    """A GPU, where there is one, has tests of its own; equal bits are promised on a CPU."""
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
    """A run of four steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("trained")
    command = ["train", "--run", str(folder / "run"), "--cache", str(folder / "cache"), "--device", "cpu"]
    often = ["--save-every", "1", "--keep", "9", "--log-every", "2"]
    assert coco_gan.main([*command, *often, *flags(UNEVEN)]) == 0
    return folder / "run"


@pytest.fixture
def copied(trained, here):
    """The same, to change: a copy as run/ in the working folder, with the cache beside it."""
    shutil.copytree(trained.parent, here, dirs_exist_ok=True)
    return here / "run"


# ---- Configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", coco_gan.PRESETS)
def test_presets_are_valid(name):
    Config(**coco_gan.PRESETS[name]).check()


def test_weights_are_the_papers_or_those_of_its_authors_code():
    assert Config().loss_weights == (10, 100, 100)
    assert Config(**coco_gan.PRESETS["tiny"]).loss_weights == (1, 1, 10)
    for preset, k, values in (("celeba64", 9.798, 2), ("celeba128-n16", 13.856, 2), ("panorama", 19.596, 3)):
        found = Config(**coco_gan.PRESETS[preset]).loss_weights
        assert found == pytest.approx((10 / k, 100 / k / values, 100 / k), rel=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(height=100), "--height 100 and --width 64 (--image-size) must be multiples of --S 16"),
        (dict(N=5), "--N 5 and --M 2 do not fit: an image has 4 x 4 micro patches"),
        (dict(width=32, M=3), "--N 2 and --M 3 do not fit: an image has 4 x 2 micro patches"),
        (dict(batch_size=1), "--batch-size 1 is out of range; give 2 to"),
        (dict(lr_g=float("nan")), "--lr-g nan is out of range"),
        (dict(S="16"), "--S is '16'; it must be of type int"),
        (dict(precision="float8"), "--precision float8 is unknown; give auto, fp32, tf32, bf16"),
        (dict(crop="centre"), "--crop centre is unknown; give auto, center"),
        (dict(topology="sphere"), "--topology sphere is unknown; give plane, cylinder, torus"),
        (dict(yaw=True), "--yaw turns images whose borders meet; add --topology cylinder or torus"),
    ],
)
def test_bad_configurations_are_named(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Config(**change).check()


# ---- Coordinates -------------------------------------------------------------------------------------------


def test_coordinates_of_celeba128():
    config, i = Config(**coco_gan.PRESETS["celeba128"]), torch.arange(4)
    expected = torch.tensor([[-1, -1], [-1 / 3, -1 / 3], [1 / 3, 1 / 3], [1, 1]])
    torch.testing.assert_close(coco_gan.micro_coordinates(config, i, i), expected)
    assert coco_gan.macro_coordinates(config, i[:3], i[:3]).tolist() == [[-1, -1], [0, 0], [1, 1]]


def test_coordinates_of_an_uneven_grid():
    i, j = torch.tensor([0, 1, 2]), torch.tensor([0, 3, 1])  # 4 x 6 micro patches, 3 x 4 positions
    micro = [[-1, -1], [-1 / 3, 0.2], [1 / 3, -0.6]]
    torch.testing.assert_close(coco_gan.micro_coordinates(UNEVEN, i, j), torch.tensor(micro))
    macro = [[-1, -1], [0, 1], [1, -1 / 3]]
    torch.testing.assert_close(coco_gan.macro_coordinates(UNEVEN, i, j), torch.tensor(macro))
    matrix = coco_gan.micro_matrix(UNEVEN, torch.tensor([2]), torch.tensor([1]))
    rows, columns = [1 / 3, 1], [-0.6, -0.2, 0.2]
    torch.testing.assert_close(matrix, torch.tensor(list(itertools.product(rows, columns))))


def test_coordinates_of_a_panorama():
    config = Config(**coco_gan.PRESETS["panorama"])  # 12 angles, 30° apart, the first of them -180°
    assert config.positions == (3, 12) and config.c_dim == 3
    j, zero = torch.arange(12), torch.zeros(12, dtype=torch.int64)
    theta = torch.tensor([math.radians(30 * k - 180) for k in range(12)])
    for function in (coco_gan.micro_coordinates, coco_gan.macro_coordinates):
        y, *angle = function(config, zero, j).T
        assert y.tolist() == [-1] * 12
        expected = torch.stack([theta.cos(), theta.sin()])
        torch.testing.assert_close(torch.stack(angle), expected, atol=1e-6, rtol=0)
        assert torch.equal(function(config, zero, j + 12), function(config, zero, j))  # around the border
    y = coco_gan.micro_coordinates(config, torch.arange(4), zero[:4])[:, 0]
    torch.testing.assert_close(y, torch.tensor([-1, -1 / 3, 1 / 3, 1]))


def test_coordinates_of_a_torus_close_both_ways():
    assert TORUS.positions == (4, 6) and TORUS.c_dim == 4
    c = torch.tensor([[-1, 0, 1, 0], [0, -1, 1, 0], [0, -1, -1, 0]], dtype=torch.float32)
    for function in (coco_gan.micro_coordinates, coco_gan.macro_coordinates):
        found = function(TORUS, torch.tensor([0, 1, 5]), torch.tensor([3, 9, 0]))
        torch.testing.assert_close(found, c, atol=1e-6, rtol=0)


@pytest.mark.parametrize("config, rows", [(CYLINDER, (1, 2)), (TORUS, (3, 0))])
def test_the_last_macro_patch_continues_at_the_other_border(config, rows):
    matrix = coco_gan.micro_matrix(config, torch.tensor([rows[0]]), torch.tensor([5]))
    i, j = torch.tensor(rows).repeat_interleave(3), torch.tensor([5, 0, 1] * 2)
    assert torch.equal(matrix, coco_gan.micro_coordinates(config, i, j))


def test_coordinates_extrapolate_and_are_0_where_there_is_one_position():
    config, outside = Config(height=256, width=256, S=64), torch.tensor([-1, 4])  # appendix E: ±1.66 and ±2
    c_micro = coco_gan.micro_coordinates(config, outside, outside)[:, 0]
    assert c_micro.tolist() == pytest.approx([-5 / 3, 5 / 3])
    assert coco_gan.macro_coordinates(config, torch.tensor([-1, 3]), outside)[:, 0].tolist() == [-2, 2]
    column, i = Config(height=64, width=16, N=4, M=1, S=16), torch.arange(1)
    assert coco_gan.macro_coordinates(column, i, i).tolist() == [[0, 0]]
    assert coco_gan.micro_coordinates(column, torch.tensor([3]), i).tolist() == [[1, 0]]


# ---- Networks ----------------------------------------------------------------------------------------------


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
        (12, [(512, 6), (256, 12), (128, 12)]),  # no power of two: starts from 3 x 3
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
    """Figures 13 and 14 by hand: a 3 x 3 convolution has 9·in·out + out, a CBN 2·131·channels."""
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


def test_spectral_norm_is_the_largest_singular_value():
    layers = torch.nn.Conv2d(3, 5, 3), torch.nn.Linear(7, 4), kernels.ConditionalBatchNorm(2, 3)
    net = torch.nn.Sequential(*layers)
    coco_gan.init_weights(net)
    for _ in range(200):
        parameters = coco_gan.spectral_norm(net, iterate=True)
    for name in ("0.weight", "1.weight"):
        W = net.get_parameter(name).flatten(1)
        torch.testing.assert_close(parameters[name].flatten(1), W / torch.linalg.svdvals(W)[0])
    for name in ("0.bias", "1.bias", "2.weight", "2.bias"):  # no bias, and not the maps to γ and β
        assert parameters[name] is net.get_parameter(name)


def test_spectral_norm_differentiates_through_sigma():
    layer = torch.nn.Linear(3, 2).double()
    coco_gan.init_weights(layer)
    layer.v = layer.v.double()

    def normalized(W):
        layer._parameters["weight"] = W
        return coco_gan.spectral_norm(torch.nn.Sequential(layer), iterate=False)["0.weight"]

    assert torch.autograd.gradcheck(normalized, (layer.weight,))


# ---- Losses ------------------------------------------------------------------------------------------------


def test_losses_have_their_known_answers():
    assert coco_gan.wasserstein(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 2.0])) == 2.5
    c, prediction = torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([[3.0, 5.0], [1.0, 1.0]])
    assert coco_gan.spatial_consistency(c, prediction) == 12.5  # the sum over the coordinate, the mean over B
    z, prediction = torch.tensor([[1.0, -1.0, 0.5], [0.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.5]] * 2)
    assert coco_gan.content_consistency(z, prediction) == 0.75


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
    (x, s), epsilon = torch.randn(2, 5, 3, 2, 2), torch.rand(5)
    penalty, norm = coco_gan.gradient_penalty(lambda t: t.square().sum((1, 2, 3)) / 2, x, s, epsilon)
    norms = torch.stack([(e * b + (1 - e) * a).norm() for a, b, e in zip(x, s, epsilon)])
    torch.testing.assert_close(penalty, ((norms - 1) ** 2).mean())
    torch.testing.assert_close(norm, norms.mean())


# ---- Batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirror", [False, True])
def test_batches_are_real_crops_at_their_coordinates(mirror):
    config = dataclasses.replace(UNEVEN, batch_size=200, mirror=mirror)
    images, rng = random_images(config, 5), torch.Generator().manual_seed(0)
    x_macro, c_macro, c_micro, z, _ = coco_gan.draw_batch(config, images, torch.tensor([1, 3]), rng, CPU)
    seen = set()
    for x, c in zip(coco_gan.to_uint8(x_macro), c_macro):
        i, j = round(c[0].item() + 1), round((c[1].item() + 1) * 1.5)
        for n, flip in itertools.product((1, 3), (False, True)):
            image = images[n].flip(1) if flip else images[n]
            if np.array_equal(x, image[4 * i : 4 * i + 8, 4 * j : 4 * j + 12].numpy()):
                seen.add((n, i, j, flip))
    flips = (False, True) if mirror else (False,)
    assert seen == set(itertools.product((1, 3), range(3), range(4), flips))
    assert z.shape == (200, 8) and -1 <= z.min() < -0.95 < 0.95 < z.max() <= 1
    torch.testing.assert_close(c_micro.view(200, 6, 2)[:, 0, 0], (c_macro[:, 0] - 0.5) / 1.5)


def test_images_too_many_for_a_gpu_are_cut_on_the_cpu(monkeypatch):
    """The patches that are copied, as bytes, make the batch that the images on the GPU would make."""
    config = dataclasses.replace(TORUS, batch_size=64, yaw=True, mirror=True)
    images, copied = random_images(config), []
    draw = functools.partial(coco_gan.draw_batch, config, images, torch.arange(len(images)))
    expected = draw(torch.Generator().manual_seed(0), CPU)
    monkeypatch.setattr(coco_gan, "to_device", lambda tensor, device: copied.append(tensor) or tensor)
    gpu = types.SimpleNamespace(type="cuda")
    assert all(map(torch.equal, draw(torch.Generator().manual_seed(0), gpu), expected))
    assert copied[0].shape == (64, config.N * config.S, config.M * config.S, 3)
    assert copied[0].dtype == torch.uint8


@pytest.mark.parametrize("yaw", [False, True])
@pytest.mark.parametrize("config", [CYLINDER, TORUS])
def test_batches_wrap_around_and_are_turned(config, yaw):
    """Each macro patch is found in the one image, whose pixels differ, at the position that its c' gives."""
    config = dataclasses.replace(config, batch_size=2000, yaw=yaw)
    images = torch.arange(16 * 24 * 3).view(1, 16, 24, 3).remainder(251).byte()
    x_macro, c_macro, c_micro, *_ = draw(config, images)
    crops = {
        bytes(images[0].roll((-i, -j), (0, 1))[:8, :12].numpy()): (i, j) for i in range(16) for j in range(24)
    }
    tops, lefts = map(torch.tensor, zip(*(crops[bytes(x)] for x in coco_gan.to_uint8(x_macro))))
    down, across = config.closed
    assert {*tops.tolist()} == set(range(16) if yaw and down else range(0, 16 if down else 12, 4))
    assert {*lefts.tolist()} == set(range(24) if yaw else range(0, 24, 4))
    c = coco_gan.macro_coordinates(config, tops // 4, lefts // 4)
    assert torch.equal(c, c_macro) != yaw  # turned, an image no longer shows where its parts are
    first = c_micro.view(2000, 6, -1)[:, 0]
    assert torch.equal(first[:, -2:], c_macro[:, -2:])  # on a closed axis c' is c'' of its first micro patch


@pytest.mark.parametrize("config", [UNEVEN, CYLINDER])
def test_continuous_batches_start_at_every_pixel(config):
    config = dataclasses.replace(config, continuous=True, batch_size=5000)
    top, left = coco_gan.sample_positions(config, torch.Generator().manual_seed(0))
    assert {*top.tolist()} == set(range(9))
    assert {*left.tolist()} == set(range(24 if config.closed[1] else 13))
    margin_top, _ = coco_gan.sample_positions(config, torch.Generator().manual_seed(0), margin=(1, 0))
    assert {*margin_top.tolist()} == set(range(-4, 13))


# ---- Training step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True])
def test_each_update_changes_its_own_parameters(guided, monkeypatch):
    gan = COCOGAN(dataclasses.replace(UNEVEN, guided=guided), CPU)
    changes, update = [], coco_gan.update

    def watched(optimizer, loss):
        before = {name: p.clone() for name, p in gan.named_parameters()}
        update(optimizer, loss)
        changes.append({name for name, p in gan.named_parameters() if not torch.equal(p, before[name])})

    monkeypatch.setattr(coco_gan, "update", watched)
    step_of(gan, draw(gan.config, random_images(gan.config)))
    for_d, for_g = changes
    nets = ("D", "A", "Q") if guided else ("D", "A")
    expected = {name for name, _ in gan.named_parameters() if name.startswith(nets)}
    assert for_d <= expected
    # These cancel, the first in L_W and the others in a norm over the batch, except for rounding.
    assert expected - for_d <= {"D.linear.bias", "A.linear1.bias", "Q.linear1.bias"}
    assert {name[:2] for name in for_g} == {"G."} and len(for_g) > 0.8 * len([*gan.G.parameters()])


@pytest.mark.parametrize("guided", [False, True])
def test_gradients_are_those_of_the_objectives(guided, monkeypatch):
    """D and A descend -L_W + λ L_GP + α L_S(x'), G then L_W + α L_S(s'); with Q all descend L_Q(s'), too."""
    config = dataclasses.replace(UNEVEN, precision="fp32", weights="scaled")  # with k = √(12 · 3) = 6
    config = dataclasses.replace(config, lambda_gp=18.0, alpha_s=84.0, alpha_q=180.0)  # 3, 7 and 30
    gan = COCOGAN(dataclasses.replace(config, guided=guided, lr_g=0.01, lr_d=0.02), CPU)
    batch = x, c, c_micro, z, epsilon = draw(config, random_images(config))
    assert len({*map(tuple, c.tolist())}) > 1
    rates = [group["lr"] for group in gan.opt_D.param_groups]
    assert rates == [0.02, 0.01][: 1 + guided] and gan.opt_G.param_groups[0]["lr"] == 0.01
    gradients = []

    def only_backward(optimizer, loss):  # so that both steps see the same weights
        optimizer.zero_grad()
        loss.backward()
        gradients.append({name: p.grad for name, p in gan.named_parameters() if p.grad is not None})
        optimizer.zero_grad()

    monkeypatch.setattr(coco_gan, "update", only_backward)
    step_of(gan, batch)

    # s' by hand, all patches of a sample from its one z, put together row by row
    z_micro = torch.stack([z[b] for b in range(4) for _ in range(6)])
    s_micro = functional_call(gan.G, coco_gan.spectral_norm(gan.G, iterate=False), (z_micro, c_micro))
    rows = [torch.cat(list(s_micro[k : k + 3]), dim=2) for k in range(0, 24, 3)]
    s = torch.stack([torch.cat(rows[k : k + 2], dim=1) for k in range(0, 8, 2)])

    def D(x):
        return functional_call(gan.D, coco_gan.spectral_norm(gan.D, iterate=False), (x, c))

    def L_S(h):
        A_sn = coco_gan.spectral_norm(gan.A, iterate=False)
        return ((c - functional_call(gan.A, A_sn, (h,))) ** 2).sum() / 4

    def L_Q(h):
        Q_sn = coco_gan.spectral_norm(gan.Q, iterate=False) if guided else None
        return (z - functional_call(gan.Q, Q_sn, (h,))).abs().sum() / 4 / 8 if guided else 0.0

    s_hat = torch.stack([e * b + (1 - e) * a for a, b, e in zip(x, s.detach(), epsilon)]).requires_grad_()
    (slope,) = torch.autograd.grad(D(s_hat)[0].sum(), s_hat, create_graph=True)
    L_GP = sum((slope[b].square().sum().sqrt() - 1) ** 2 for b in range(4)) / 4
    L_W = D(x)[0].mean() - D(s.detach())[0].mean()
    loss_D = -L_W + 3 * L_GP + 7 * L_S(D(x)[1]) + 30 * L_Q(D(s.detach())[1])
    loss_G = -D(s)[0].mean() + 7 * L_S(D(s)[1]) + 30 * L_Q(D(s)[1])
    nets = ("D", "A", "Q") if guided else ("D", "A")
    for loss, found, prefixes in zip((loss_D, loss_G), gradients, (nets, ("G.",))):
        parameters = {name: p for name, p in gan.named_parameters() if name.startswith(prefixes)}
        expected = torch.autograd.grad(loss, [*parameters.values()], materialize_grads=True)
        assert found.keys() == parameters.keys()  # no work for gradients that nobody wants
        for name, gradient in zip(parameters, expected):
            torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_a_step_takes_one_power_iteration_of_each_network():
    gan = COCOGAN(UNEVEN, CPU)
    layers = [m for net in (gan.G, gan.D, gan.A) for m in net.modules() if hasattr(m, "v")]
    before = [(m.weight.detach().flatten(1).clone(), m.v.clone()) for m in layers]
    step_of(gan, draw(UNEVEN, random_images(UNEVEN)))
    for m, (W, v) in zip(layers, before):
        torch.testing.assert_close(m.v, torch.nn.functional.normalize(W.T @ (W @ v), dim=0))


def test_the_ema_follows_the_normalized_weights():
    gan = COCOGAN(UNEVEN, CPU)
    for name, p in coco_gan.spectral_norm(gan.G, iterate=False).items():
        assert torch.equal(gan.G_ema.get_parameter(name), p)  # from the first picture on
    old, now = copy.deepcopy(gan.G_ema), coco_gan.spectral_norm(copy.deepcopy(gan.G), iterate=True)
    gan.step = 2
    step_of(gan, draw(UNEVEN, random_images(UNEVEN)))  # after two steps the decay is (1 + 2) / (10 + 2)
    for name, p in gan.G_ema.named_parameters():
        torch.testing.assert_close(p, 0.25 * old.get_parameter(name) + 0.75 * now[name].detach())
    for name, running in gan.G_ema.named_buffers():
        if "running" in name:
            expected = 0.25 * old.get_buffer(name) + 0.75 * gan.G.get_buffer(name)
            torch.testing.assert_close(running, expected)
    assert coco_gan.ema_weight(UNEVEN, 10**6).item() == pytest.approx(1 - UNEVEN.ema)


def test_two_processes_share_a_batch_and_average_their_gradients(monkeypatch, here):
    images = random_images(UNEVEN)
    whole = draw(UNEVEN, images)
    monkeypatch.setattr(coco_gan, "WORLD", 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(coco_gan, "RANK", rank)
        shares.append(draw(UNEVEN, images))
    for one, parts in zip(whole, zip(*shares)):
        assert torch.equal(one, torch.cat(parts))

    code = """
import os, torch, torch.distributed as dist, coco_gan
dist.init_process_group("gloo")
p = torch.nn.Parameter(torch.zeros(2, 3))
coco_gan.update(torch.optim.SGD([p], lr=1), (p * (1 + 2 * coco_gan.RANK)).sum())
assert p.tolist() == [[-2] * 3] * 2 and coco_gan.highest(coco_gan.RANK) == 1
os._exit(0)  # gloo's threads sometimes crash in an ordinary exit
"""
    Path("average.py").write_text(code)
    two_processes("average.py")


def two_processes(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    result = subprocess.run([*torchrun, *command], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_run_of_two_processes_continues_in_one(copied):
    resume = ["train", "--resume", "run", "--device", "cpu", "--log-every", "1"]
    out = two_processes(str(ROOT / "coco_gan.py"), *resume, "--steps", "6")
    assert sum(line.startswith("step 6/6 ") for line in out.splitlines()) == 1  # one process speaks
    assert coco_gan.checkpoints(copied)[-1].name == "checkpoint-000000006.pt"
    assert coco_gan.main([*resume, "--steps", "7"]) == 0
    assert coco_gan.read_checkpoint(coco_gan.checkpoints(copied)[-1])[1]["step"] == 7


@pytest.mark.parametrize("bf16", [False, True])
def test_precision_is_what_the_device_is_made_for(bf16, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    found = [coco_gan.choose_precision(UNEVEN, torch.device(kind)) for kind in ("cpu", "cuda", "mps")]
    assert found == (["bf16", "bf16", "fp32"] if bf16 else ["fp32", "tf32", "fp32"])
    gan = COCOGAN(dataclasses.replace(UNEVEN, precision="bf16"), CPU)
    x, c, *_ = draw(UNEVEN, random_images(UNEVEN))
    seen = []
    gan.D.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    score, h = functional_call(gan.D, coco_gan.cast(gan, dict(gan.D.named_parameters())), (x, c))
    assert (seen, score.dtype, h.dtype) == ([torch.bfloat16], torch.float32, torch.float32)


def test_coordinates_are_not_rounded_to_bfloat16():
    gan = COCOGAN(dataclasses.replace(UNEVEN, precision="bf16"), CPU)
    G, D = (coco_gan.cast(gan, dict(net.named_parameters())) for net in (gan.G, gan.D))
    c = torch.tensor([[0.5, 0.5], [0.5, 0.501]])
    assert c.bfloat16()[0].equal(c.bfloat16()[1])
    z, x = torch.ones(2, 8), torch.ones(2, 16, 3, 3, dtype=torch.bfloat16) + torch.arange(3).bfloat16()
    with torch.no_grad():
        by_cbn = gan.G.blocks[0].cbn(x, torch.cat([z, c], dim=1))
        s_micro = functional_call(gan.G, G, (z, c), dict(tanh=False))
        scores = functional_call(gan.D, D, (torch.ones(2, 3, 8, 12), c))[0]
    assert not any(one.equal(other) for one, other in (by_cbn, s_micro, scores))


# ---- Sampling ----------------------------------------------------------------------------------------------


def untrained(config, seed=0):
    torch.manual_seed(seed)
    return coco_gan.Generator(config).eval()


def test_full_images_are_the_patches_of_one_latent_side_by_side():
    G, z = untrained(UNEVEN), coco_gan.latents([3, 4], 8)
    images = coco_gan.full_image(G, z)
    assert images.shape == (2, 3, 16, 24)
    with torch.no_grad():
        for b, i, j in itertools.product(range(2), range(4), range(6)):
            c = coco_gan.micro_coordinates(UNEVEN, torch.tensor([i]), torch.tensor([j]))
            alone = G(z[b : b + 1], c)[0]
            torch.testing.assert_close(images[b, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4], alone)
    assert torch.equal(coco_gan.latents([4], 8)[0], z[1])  # one seed is one image, whatever else is drawn


@pytest.mark.parametrize("config", [UNEVEN, CYLINDER, TORUS])
def test_parts_wrap_around_borders_that_meet_and_extrapolate_others(config):
    G, z = untrained(config), coco_gan.latents([3], 8)
    full = coco_gan.full_image(G, z)
    part = coco_gan.full_image(G, z, range(-1, 3), range(5, 8))
    torch.testing.assert_close(part[:, :, 4:, :4], full[:, :, :12, 20:])
    down, across = config.closed
    around = torch.cat([full[:, :, :12, 20:], full[:, :, :12, :8]], dim=3)
    assert torch.allclose(part[:, :, 4:], around, atol=1e-4) == across
    assert torch.allclose(part[:, :, :4, :4], full[:, :, 12:, 20:], atol=1e-4) == down


def test_python_takes_names_and_seeds_and_says_what_is_wrong(here, capsys):
    G = coco_gan.load("toy_faces")
    a, b = coco_gan.pictures(G, [3, 4], rows=range(1, 3))
    assert a.size == (64, 32) and a.mode == "RGB" and capsys.readouterr().err == ""
    assert np.array_equal(b, coco_gan.to_uint8(coco_gan.full_image(G, coco_gan.latents([4])))[0, 16:48])
    assert coco_gan.load().config == G.config and "assets/toy_faces.pt" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"seeds is 3; give a list of numbers, as \[3\] or range\(3\)"):
        coco_gan.latents(3)
    with pytest.raises(UserError, match=r"z is \(2, 7\); give \(B, 128\), as of latents\(seeds, 128\)"):
        coco_gan.full_image(G, torch.zeros(2, 7))
    with pytest.raises(UserError, match="--device cuda:7 is not available"):
        coco_gan.load("toy_faces", device="cuda:7")


def test_pictures_are_laid_out_row_by_row_on_white(here):
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    sheet = coco_gan.grid(images, columns=3, gap=1)
    assert sheet.shape == (5, 11, 3)
    assert sheet[0, ::4, 0].tolist() == [0, 1, 2] and sheet[4, ::4, 0].tolist() == [3, 4, 5]
    assert (sheet[2] == 255).all() and (sheet[:, 3] == 255).all()
    assert coco_gan.grid(np.zeros((24, 8, 8, 3), np.uint8)).shape == (38, 58, 3)  # 4 full rows of 6
    coco_gan.save_picture(sheet, Path("a.png"))
    assert np.array_equal(picture("a.png"), sheet)
    with pytest.raises(UserError, match="a.txt is not the name of a picture; end it in .png"):
        coco_gan.save_picture(sheet, Path("a.txt"))


# ---- Checkpoints and runs ----------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(trained):
    names = {path.name for path in trained.iterdir()} - {".lock", data.MARK}
    pictures = {"real.png", "real-macro.png", "sample-000000000.png", "sample-000000004.png"}
    if importlib.util.find_spec("matplotlib") is not None:
        pictures.add("indicators.png")
    assert names == pictures | {
        "latest.png",
        "progress.gif",
        "config.json",
        "log.jsonl",
        *(f"checkpoint-{n:09d}.pt" for n in range(1, 5)),
    }
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2, 4] and log[-1]["images"] == 16
    assert {*coco_gan.COCOGAN.LOSSES[:-1], "images_per_second"} <= log[-1].keys()
    assert Config(**json.loads((trained / "config.json").read_text())) == UNEVEN
    first, last = picture(trained / "sample-000000000.png"), picture(trained / "sample-000000004.png")
    assert first.shape == last.shape and not np.array_equal(first, last)


def test_a_line_of_the_log_has_79_columns_at_most(here, capsys):
    config = dataclasses.replace(UNEVEN, steps=4_000, guided=True)
    gan, losses = COCOGAN(config, CPU), torch.tensor([[4.6, 1.35, 9.9, 0.47, 0.984, 1.2]])
    gan.step = 200
    coco_gan.log(gan, losses, 75.3, Path("."), None)
    line = "step 200/4,000  5%  301/s  0:50 left  W 4.60  GP 1.35  S .47/.98  Q 1.20\n"
    assert capsys.readouterr().out == line
    gan.config, gan.step = dataclasses.replace(config, steps=1_000_000, batch_size=128), 999_000
    coco_gan.log(gan, -3 * losses, 0.001, Path("."), None)
    assert len(capsys.readouterr().out) <= 80
    assert json.loads(Path("log.jsonl").read_text().splitlines()[0])["gradient_norm"] == pytest.approx(9.9)


def rerun_from(run, step, *command):
    """Delete the checkpoints after a step, resume, and return what the last one held before and holds now."""
    before = coco_gan.read_checkpoint(coco_gan.checkpoints(run)[-1])[1]
    for path in coco_gan.checkpoints(run)[step:]:
        path.unlink()
    assert coco_gan.main(["train", "--resume", str(run), "--device", "cpu", *command]) == 0
    return before, coco_gan.read_checkpoint(coco_gan.checkpoints(run)[-1])[1]


def assert_equal_bits(before, after):
    assert before["step"] == after["step"] and torch.equal(before["rng"], after["rng"])
    old, new = before["tensors"], after["tensors"]
    assert old.keys() == new.keys() and len(old) > 100
    assert [name for name in old if not torch.equal(old[name], new[name])] == []


def test_resumed_equals_undisturbed_bit_for_bit(copied):
    assert_equal_bits(*rerun_from(copied, 2))


def test_guided_panoramas_resume_bit_for_bit_and_log_l_q(here):
    config = flags(dataclasses.replace(CYLINDER, mirror=True))
    often = ["--guided", "--yaw", "--log-every", "1", "--save-every", "1", "--keep", "4", "--device", "cpu"]
    assert coco_gan.main(["train", "--run", "run", *config, *often]) == 0
    assert_equal_bits(*rerun_from(Path("run"), 2))
    assert "L_Q" in json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize(
    "command, message",
    [
        (["--seed", "1"], "--seed was 0 in run/checkpoint-000000004.pt and is now 1; leave it out"),
        (
            ["--steps", "9", "--data", "toy:landscapes"],
            "--data toy:landscapes has other images; put them back",
        ),
    ],
)
def test_resuming_takes_more_steps_and_nothing_else(command, message, copied, capsys):
    assert coco_gan.main(["train", "--resume", "run", "--device", "cpu", *command]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")


def test_a_run_that_has_done_its_steps_is_done(copied, capsys):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    assert coco_gan.main(["train", "--resume", "run", "--device", "cpu"]) == 0
    steps = json.loads(before["config.json"])["steps"]
    more = f"to go on: python coco_gan.py train --resume run --steps {2 * steps}"
    assert capsys.readouterr().out == f"run has done its {steps} steps; {more}\n"
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_indicators_of_a_broken_log_are_left_out(copied):
    (copied / "indicators.png").unlink(missing_ok=True)
    (copied / "log.jsonl").write_text("broken\n")
    coco_gan.save_indicators(COCOGAN, copied)
    assert not (copied / "indicators.png").exists()


def test_new_images_are_told_and_taken_by_a_run_from_the_old_one(here, capsys):
    source = fill(here / "photos", {f"{i}.png": flat(i) for i in range(3)})
    train = ["train", "--device", "cpu", "--log-every", "1"]
    assert (
        coco_gan.main([*train, "--run", "old", *flags(dataclasses.replace(UNEVEN, data=source, steps=2))])
        == 0
    )
    fill(here / "photos", {"new.png": flat(9)})
    assert coco_gan.main([*train, "--resume", "old", "--steps", "3"]) == 2
    hint = "had 3 images and has 4; put them back, or start anew with its weights: train --from old --data"
    assert f"{hint} {source}" in capsys.readouterr().err
    old = coco_gan.read_checkpoint(coco_gan.find_checkpoint("old"))[1]["tensors"]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco_gan, "train_loop", lambda gan, *_: seen.append(gan) or 0)
        assert coco_gan.main([*train, "--from", "old", "--steps", "1"]) == 0
    (gan,) = seen
    assert gan.step == 0 and gan.config.data == source and gan.config.N == UNEVEN.N
    for name, t in coco_gan.named_tensors(gan).items():
        assert torch.equal(t, torch.zeros_like(t) if name.startswith("opt_") else old[name]), name
    assert coco_gan.main([*train, "--from", "old", "--width-g", "4"]) == 2
    assert "leave out flags that change the networks" in capsys.readouterr().err


def test_load_gives_the_ema_or_the_weights_themselves(trained):
    found = coco_gan.read_checkpoint(coco_gan.checkpoints(trained)[-1])[1]["tensors"]
    G = coco_gan.load(trained)
    assert G.config == UNEVEN and not G.training
    assert all(torch.equal(t, found["G_ema." + name]) for name, t in G.state_dict().items())
    W = found["G.conv.weight"].flatten(1)
    raw = coco_gan.load(trained, raw=True).conv.weight.flatten(1)
    torch.testing.assert_close(raw, W / (W @ found["G.conv.v"]).norm())


def test_the_newest_checkpoint_is_found(copied, capsys):
    assert coco_gan.find_checkpoint().name == "toy_faces.pt"  # nothing is under runs/
    assert coco_gan.find_checkpoint(panorama=True).name == "toy_landscapes.pt"
    for k, name in enumerate(("one", "two", "three")):
        shutil.copytree(copied, f"runs/{name}")
        os.utime(f"runs/{name}/checkpoint-000000004.pt", (k, k))
    assert coco_gan.find_checkpoint() == Path("runs/three/checkpoint-000000004.pt")
    config = json.loads(Path("runs/two/config.json").read_text())
    Path("runs/two/config.json").write_text(json.dumps({**config, "topology": "cylinder"}))
    assert coco_gan.find_checkpoint(panorama=True).parent == Path("runs/two")
    assert coco_gan.find_checkpoint("run/checkpoint-000000002.pt").name == "checkpoint-000000002.pt"


def change_checkpoint(change):
    def act(path):
        contents = torch.load(path, weights_only=True)
        change(contents)
        torch.save(contents, path)

    return act


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda c: c.update(format="coco-gan checkpoint 1"),
            "its format is 'coco-gan checkpoint 1' and must be",
        ),
        (lambda c: c["config"].update(width_g=1024), "G.linear.weight should be torch.float32 (65536, 10)"),
        (
            lambda c: c["config"].update(S=3),
            "--height 16 and --width 24 (--image-size) must be multiples of --S 3",
        ),
        (lambda c: c["tensors"].pop("opt_D.3.exp_avg"), "opt_D.3.exp_avg"),
        (lambda c: c["tensors"].update({"A.norm.bias": torch.zeros(1).expand(128)}), None),
        (lambda c: c["tensors"].update({"x": torch.zeros(1).expand(10**9)}), "larger than the file"),
        (lambda c: c.pop("rng"), "rng"),
    ],
)
def test_checkpoints_that_do_not_fit_change_nothing(change, message, copied, capsys):
    change_checkpoint(change)(coco_gan.checkpoints(copied)[-1])
    before = {path.name: path.read_bytes() for path in copied.iterdir() if path.name != ".lock"}
    status = coco_gan.main(["train", "--resume", "run", "--steps", "5", "--device", "cpu"])
    error = capsys.readouterr().err
    if message is None:
        assert status == 0  # a tensor may lie otherwise in memory
    else:
        assert status == 2 and message in error and error.count("\n") == 1
        assert before == {path.name: path.read_bytes() for path in copied.iterdir() if path.name != ".lock"}


def test_a_checkpoint_runs_no_code(copied, capsys):
    class Code:
        def __reduce__(self):
            return os.mkdir, ("ran",)

    path = coco_gan.checkpoints(copied)[-1]
    torch.save(dict(format=coco_gan.COCOGAN.FORMAT, config=Code()), path)
    assert coco_gan.main(["sample", "--checkpoint", str(path), "--device", "cpu"]) == 2
    assert "is no checkpoint that can be used" in capsys.readouterr().err and not Path("ran").exists()


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_what_is_not_finite_stops_the_run_and_is_not_saved(what, copied, monkeypatch, capsys):
    step = coco_gan.train_step

    def poisoned(gan, *batch):
        losses = step(gan, *batch)
        if gan.step == 6 and what == "weight":
            gan.G.conv.weight.data[0] = float("inf")
        return losses * float("nan") if gan.step == 6 and what == "loss" else losses

    monkeypatch.setattr(coco_gan, "train_step", poisoned)
    resume = ["train", "--resume", "run", "--steps", "20", "--device", "cpu"]
    assert coco_gan.main([*resume, "--log-every", "4", "--save-every", "1"]) == 2
    assert "is not finite at step 7; what run has saved is good" in capsys.readouterr().err
    assert coco_gan.checkpoints(copied)[-1].name == "checkpoint-000000006.pt"


@pytest.mark.parametrize(
    "error, status",
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2),
        (MemoryError(), 2),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_full_memory_is_one_line_and_other_errors_are_not_hidden(error, status, copied, monkeypatch, capsys):
    def fails(*args):
        raise error

    monkeypatch.setattr(coco_gan, "train_step", fails)
    command = ["train", "--resume", "run", "--steps", "9", "--device", "cpu"]
    if status is None:
        with pytest.raises(RuntimeError, match="mat1"):
            coco_gan.main(command)
    else:
        assert coco_gan.main(command) == status
        assert capsys.readouterr().err.startswith("error: out of memory; try a smaller --batch-size")


@pytest.mark.skipif(coco_gan.fcntl is None, reason="Windows has no such locks")
def test_two_processes_do_not_train_one_run(copied, capsys):
    with coco_gan.lock_run(copied):
        assert coco_gan.main(["train", "--resume", "run", "--steps", "9", "--device", "cpu"]) == 2
    assert "--run run is in use by another process" in capsys.readouterr().err
    assert coco_gan.main(["train", "--run", "run", "--device", "cpu"]) == 2
    assert "--run run exists; name a new folder, or continue it with --resume run" in capsys.readouterr().err
    Path("runs/tiny-001").mkdir(parents=True)
    assert coco_gan.main(["train", *flags(UNEVEN), "--preset", "tiny", "--device", "cpu"]) == 0
    assert Path("runs/tiny-002/checkpoint-000000004.pt").exists()  # the next free name


def test_training_works_in_a_thread(copied):
    found, before = [], signal.getsignal(signal.SIGTERM)
    command = ["train", "--resume", "run", "--steps", "5", "--device", "cpu"]
    thread = threading.Thread(target=lambda: found.append(coco_gan.main(command)))
    thread.start()
    thread.join()
    assert found == [0] and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("stream", [None, "closed"])
def test_training_works_without_a_console(stream, copied, monkeypatch):
    for name in ("stdout", "stderr"):
        file = open(os.devnull, "w")
        file.close()
        monkeypatch.setattr(sys, name, stream and file)
    assert coco_gan.main(["train", "--resume", "run", "--steps", "5", "--device", "cpu"]) == 0
    assert coco_gan.main(["train", "--resume", "nowhere"]) == 2


def test_a_gpu_that_cannot_be_used_is_passed_over(monkeypatch, capsys):
    ones = torch.ones

    def fails(*shape, device="cpu"):
        if device == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available\nmore")
        return ones(*shape, device=device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", fails)
    assert coco_gan.choose_device("auto") == CPU
    assert capsys.readouterr().out.startswith(
        "cuda cannot be used (CUDA error: no kernel image is available);"
    )
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert coco_gan.choose_device("auto") == CPU
    assert capsys.readouterr().out.startswith("PyTorch finds no GPU that it can use")


def test_the_progress_of_a_long_run_has_50_small_frames_at_most(here):
    for n in range(120):
        Image.new("RGB", (1500, 30), (2 * n, 0, 0)).save(f"sample-{n:09d}.png")
    coco_gan.save_progress(here)
    with Image.open("progress.gif") as movie:
        assert 30 < movie.n_frames <= 50 and movie.size == (1024, 20)


def test_holdout_is_spread_evenly():
    kept, held_out = coco_gan.split(10, 4)
    assert held_out.tolist() == [0, 3, 6, 9] and kept.tolist() == [1, 2, 4, 5, 7, 8]
    assert coco_gan.split(5, 0)[0].tolist() == [0, 1, 2, 3, 4]


# ---- Data --------------------------------------------------------------------------------------------------

# Two rows of three pixels. No flip, turn or exchange of height and width maps them to themselves.
COLOURS = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [255, 255, 255], [200, 100, 50]]], np.uint8
)
GREYS = np.array([[0, 100, 200], [50, 150, 255]], np.uint8)
ALPHA = np.array([[255, 255, 0], [255, 255, 255]], np.uint8)  # the upper right pixel is transparent
GREY = np.repeat(GREYS[..., None], 3, -1)
WIDE_GREY = GREYS.astype(np.uint16) * 257


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


def make_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return str(path)


def load(source, height=4, width=4, **options):
    return data.load_images(source, height, width, **options)


def on_white(pixels):
    return np.where(ALPHA[..., None] == 0, 255, pixels)


def palette():
    image = Image.new("P", (3, 2))
    image.putpalette(COLOURS.ravel().tolist())
    image.putdata(range(6))
    return image


def cmyk():
    return Image.merge("CMYK", [Image.fromarray(c) for c in (*np.moveaxis(255 - COLOURS, -1, 0), GREYS * 0)])


def grey_with_alpha():
    return Image.merge("LA", [Image.fromarray(GREYS), Image.fromarray(ALPHA)])


def gif_frames():
    return encode(palette(), "GIF", save_all=True, append_images=[Image.new("P", (3, 2), 3)])


@pytest.mark.parametrize(
    "content, expected",
    [
        pytest.param(encode(COLOURS), COLOURS, id="RGB PNG"),
        pytest.param(encode(COLOURS, "WEBP", lossless=True), COLOURS, id="RGB WebP"),
        pytest.param(encode(GREYS, "BMP"), GREY, id="8-bit grey"),
        pytest.param(encode(WIDE_GREY), GREY, id="16-bit grey PNG, which convert clips to white"),
        pytest.param(encode(GREYS // 2 * np.uint16(257)), GREY // 2, id="16-bit grey PNG without white"),
        pytest.param(encode(GREYS.astype(np.int32) << 23, "TIFF"), GREY, id="32-bit integers"),
        pytest.param(encode((GREYS / 255).astype(np.float32), "TIFF"), GREY, id="floats from 0 to 1"),
        pytest.param(encode(GREYS.astype(np.float32), "TIFF"), GREY, id="floats from 0 to 255"),
        pytest.param(encode(Image.fromarray(GREYS > 120)), (GREY > 120) * 255, id="one bit"),
        pytest.param(encode(palette()), COLOURS, id="palette"),
        pytest.param(encode(palette(), transparency=2), on_white(COLOURS), id="palette, one transparent"),
        pytest.param(encode(Image.fromarray(np.dstack([COLOURS, ALPHA]))), on_white(COLOURS), id="RGBA"),
        pytest.param(encode(grey_with_alpha()), on_white(GREY), id="grey with alpha"),
        pytest.param(gif_frames(), COLOURS, id="animated GIF, first frame"),
        pytest.param(encode(cmyk(), "TIFF"), COLOURS, id="CMYK TIFF"),
        pytest.param(encode(COLOURS, exif=b"Exif\0\0garbage!"), COLOURS, id="broken EXIF"),
    ],
)
def test_decode_makes_rgb(content, expected):
    np.testing.assert_array_equal(data.decode_image(content, 2, 3, "center"), expected)


UPRIGHT_TO_STORED = {
    2: np.fliplr,
    3: lambda p: np.rot90(p, 2),
    4: np.flipud,
    5: lambda p: np.swapaxes(p, 0, 1),
    6: lambda p: np.rot90(p, 1),  # shown after a quarter turn clockwise
    7: lambda p: np.rot90(np.swapaxes(p, 0, 1), 2),
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("orientation", UPRIGHT_TO_STORED)
def test_decode_obeys_the_orientation_in_exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(UPRIGHT_TO_STORED[orientation](COLOURS))
    content = encode(stored, exif=exif.tobytes())
    np.testing.assert_array_equal(data.decode_image(content, 2, 3, "center"), COLOURS)


@pytest.mark.parametrize(
    "size, cut, rows, columns",
    [
        ((4, 10), (4, 4), (0, 4), (3, 7)),  # too wide
        ((10, 4), (4, 4), (3, 7), (0, 4)),  # too high
        ((5, 4), (4, 4), (0, 4), (0, 4)),  # one left over: whole pixels, no blur
        ((6, 9), (6, 4), (0, 6), (2, 6)),  # not square
    ],
)
def test_center_crop_takes_the_largest_centred_rectangle(size, cut, rows, columns):
    pixels = data.decode_image(encode(coordinates(*size)), *cut, "center")
    np.testing.assert_array_equal(pixels, coordinates(*size)[slice(*rows), slice(*columns)])
    assert data.decode_image(encode(coordinates(1, 200)), 64, 1, "center").shape == (64, 1, 3)


def test_celeba_crop_takes_rows_50_to_177_and_columns_25_to_152():
    aligned = encode(coordinates(218, 178))
    pixels = data.decode_image(aligned, 128, 128, "celeba")
    np.testing.assert_array_equal(pixels, coordinates(218, 178)[50:178, 25:153])
    moved = data.decode_image(aligned, 128, 128, "celeba-syn", -25, 25)  # its ends fit
    np.testing.assert_array_equal(moved, coordinates(218, 178)[75:203, 0:128])
    halved = data.decode_image(aligned, 64, 64, "celeba")[[0, 31, 63], [0, 31, 63]]
    np.testing.assert_allclose(halved, [[50, 25, 0], [112, 87, 0], [176, 151, 0]], atol=1)


def test_auto_crops_as_the_paper_where_all_images_are_aligned_celeba(here, capsys):
    faces, other = encode(coordinates(218, 178)), encode(coordinates(218, 180))
    source = fill(here / "photos", {"a.png": faces, "b.png": faces, "c.png": b"damaged"})
    cut = coordinates(218, 178)[50:178, 25:153]
    np.testing.assert_array_equal(load(source, 128, 128), [cut, cut])
    assert "get the paper's crop:\nrows 50 to 177, columns 25 to 152" in capsys.readouterr().out
    assert load(source, 218, 178).shape == (2, 218, 178, 3)  # not of square images
    junk = fill(here / "junk", {"a.png": b"junk"})
    with pytest.raises(coco_gan.UserError, match="none of the 1 images can be used"):
        load(junk, 128, 128)
    fill(here / "photos", {"d.png": other})
    np.testing.assert_array_equal(load(source, 128, 128)[0], data.decode_image(faces, 128, 128, "center"))
    assert "crop" not in capsys.readouterr().out


def test_squash_takes_all_of_the_image():
    halves = np.zeros((4, 16, 3), np.uint8)
    halves[:, 8:] = 255
    pixels = data.decode_image(encode(halves), 8, 8, "squash")
    assert pixels.shape == (8, 8, 3) and pixels[:, :3].max() < 10 and pixels[:, 5:].min() > 245


@pytest.mark.parametrize("factor", [2, 24])  # 24: reduced before it is resampled
def test_resize_averages_instead_of_picking_pixels(factor):
    checks = np.indices((192, 192)).sum(0) % 2 * 255
    pixels = data.decode_image(encode(checks.astype(np.uint8)), 192 // factor, 192 // factor, "center")
    assert 120 < pixels.min() and pixels.max() < 135  # picked pixels would be 0 or 255


def test_celeba_syn_moves_each_crop_by_seed_and_name(here):
    assert data.displacement(0, "000001.jpg") == (18, 10)  # a training set stays as it is
    assert data.displacement(1, "000001.jpg") == (11, -20)
    assert data.displacement(2**63 - 1, "\udcff") == (9, 15)  # a name that is no text
    d = np.array([data.displacement(0, f"{n:06}.jpg") for n in range(51 * 200)])
    for axis in d.T:
        values, counts = np.unique(axis, return_counts=True)
        assert values.tolist() == [*range(-25, 26)]
        assert ((counts - 200) ** 2 / 200).sum() < 86.7  # χ² of 50 degrees of freedom, 1 in 1,000 above
    assert abs(np.corrcoef(d.T)[0, 1]) < 0.04
    source = fill(here / "photos", {name: encode(coordinates(218, 178)) for name in ("b.png", "a/c.png")})
    images = load(source, 128, 128, crop="celeba-syn", seed=3)
    moved = [data.displacement(3, name) for name in ("a/c.png", "b.png")]
    assert images[:, 0, 0, :2].tolist() == [[50 + dy, 25 + dx] for dx, dy in moved]


NAMES = ["b.JPG", "a/c.PNG", "a/B.jpeg", "deep/er/x.WebP", "z.bmp", "10.gif", "2.tif", "1.TIFF"]
JUNK = ["._b.JPG", ".hidden/c.png", "a/.d.png", "__MACOSX/b.jpg", "notes.txt", "jpg", "a.jpg.bak"]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_finds_images_nested_in_any_case_in_sorted_order(kind, here):
    # Each content tells its index among the sorted names. Ending and content need not agree.
    files = {name: flat(i) for i, name in enumerate(sorted(NAMES))} | {name: flat(99) for name in JUNK}
    files = dict(reversed(files.items()))
    images = load(fill(here / "photos", files) if kind == "folder" else make_zip("p.zip", files))
    assert images[:, 0, 0, 0].tolist() == list(range(len(NAMES)))
    assert isinstance(images, np.memmap) and images.dtype == np.uint8


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="links and named pipes as on POSIX")
def test_link_loops_and_pipes_do_not_hang(here, capsys):
    fill(here / "elsewhere", {"linked.png": flat(2)})
    folder = Path(fill(here / "photos", {"a.png": flat(0), "sub/b.png": flat(1)}))
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "to").symlink_to(here / "elsewhere")
    (folder / "dead.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    assert load(str(folder))[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert "skipped 1 of 4 images" in capsys.readouterr().err


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
    "6 script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image that Pillow can read"),
}


def test_broken_images_are_skipped_counted_and_named(here, capsys):
    for name, (content, reason) in BROKEN.items():
        images = load(fill(here / name[0], {name: content, "ok.png": flat(5)}))
        assert images.shape == (1, 4, 4, 3) and (images == 5).all()
        *_, count, line = capsys.readouterr().err.splitlines()
        assert count == "skipped 1 of 2 images:" and name in line and reason in line
    source = fill(here / "all", {name: content for name, (content, _) in BROKEN.items()} | {"0.png": flat(1)})
    assert load(source)[:, 0, 0, 0].tolist() == [1]
    message = capsys.readouterr().err
    assert "skipped 6 of 7 images" in message
    assert [name in message for name in BROKEN] == [True] * 5 + [False]  # five are named


def test_broken_zip_members_have_their_reasons(here, capsys, monkeypatch):
    names = ("crc.png", "key.png", "new.png", "ok.png")
    path = Path("p.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, flat(3))
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 6] ^= 1  # the first member's pixels
    for name, shift, value in ((b"key.png", 0, 1), (b"new.png", 2, 97)):  # encrypted; an unknown method
        content[content.index(name) - 30 + 6 + shift] = value  # in the member's own header
        content[content.rindex(name) - 46 + 8 + shift] = value  # and in the directory
    path.write_bytes(content)
    assert len(load("p.zip")) == 1
    message = capsys.readouterr().err
    assert "skipped 3 of 4 images" in message and "CRC" in message and "encrypted" in message
    assert "compression method is not supported" in message
    monkeypatch.setattr(data, "MAX_FILE_BYTES", 10)
    with pytest.raises(UserError, match="none of the 1 images can be used.*'a.png': unpacks to"):
        load(make_zip("bomb.zip", {"a.png": flat(3)}))


@pytest.mark.parametrize(
    "source, options, words",
    [
        ("celebba", {}, "--data celebba does not exist; did you mean .*celeba. Give"),
        ("quite/else", {}, "--data quite/else does not exist; give a folder or a zip, or toy:faces or"),
        ("toy:cats", {}, "--data toy:cats does not exist.*toy:faces or toy:landscapes"),
        ("empty", {}, "--data empty holds no image; looked for .jpg"),
        ("text.zip", {}, "--data text.zip is no zip"),
        ("cut.zip", {}, "--data cut.zip is no zip"),
        ("broken", {}, "none of the 6 images can be used; the first: '1 empty.jpg': is empty"),
        ("toy:faces", {"crop": "celeba"}, "--crop celeba is for photographs; leave it out"),
    ],
)
def test_mistakes_are_one_line(source, options, words, here):
    fill(here / "celeba", {"a.png": flat(1)})
    fill(here / "broken", {name: content for name, (content, _) in BROKEN.items()})
    fill(here / "empty", {"notes.txt": b"none"})
    Path("text.zip").write_text("no zip")
    Path("cut.zip").write_bytes(Path(make_zip("ok.zip", {"a.png": flat(1)})).read_bytes()[:-9])
    with pytest.raises(UserError, match=words) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value) and not list(here.glob("cache/*.npy"))


def test_a_full_disk_names_the_file_and_leaves_nothing(here, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Path("a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: 'a'"):
        data.write_file(Path("a"), b"new")
    assert Path("a").read_bytes() == b"old" and os.listdir() == ["a"]
    with pytest.raises(OSError, match="No space left on device: 'cache/toy_faces"):
        load("toy:faces", toy_count=3)
    assert os.listdir("cache") == [data.MARK]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_second_start_decodes_nothing_unless_something_changed(kind, here, monkeypatch):
    files = {"a.png": flat(1), "b/c.png": flat(2)}

    def make():
        return fill(here / "photos", files) if kind == "folder" else make_zip("p.zip", files)

    source, decode = make(), data.decode_all
    first = load(source)
    monkeypatch.setattr(data, "decode_all", None)
    np.testing.assert_array_equal(load(source), first)
    for change in (dict(crop="squash"), dict(height=8)):
        with pytest.raises(TypeError):
            load(source, **change)
    monkeypatch.setattr(data, "decode_all", decode)
    files["b/c.png"] = encode(NOISE)
    assert (load(make())[1] != 2).any()
    path = Path(load(source).filename)
    for length in (0, 100, 150):  # a damaged cache
        path.write_bytes(path.read_bytes()[:length])
        assert len(load(source)) == 2
    np.testing.assert_array_equal(np.load(path), load(source))  # the file describes itself


def test_decoding_reads_ahead_only_so_far_and_keeps_the_order():
    started, results = [], []

    def decode(i):
        started.append(i)
        if i == 3:
            raise ValueError("is\nbroken")
        return i

    for result in data.in_threads(decode, range(500)):
        results.append(result)
        assert len(started) <= len(results) + 8 * os.cpu_count()
    assert results == [*range(3), "is broken", *range(4, 500)]


STALL = """
import data, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
def stall(*args):
    for image in decode_all(*args):
        yield image
        print("one", flush=True)
        input()
decode_all, data.decode_all = data.decode_all, stall
print(len(data.load_images("photos", 4, 4)))
"""


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_decode_leaves_no_cache(number, here):
    source = fill(here / "photos", {f"{i:03}.png": flat(i) for i in range(200)})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", STALL], env=environment, **pipes) as child:
        assert child.stdout.readline() == b"one\n"
        child.send_signal(number)
        child.wait(timeout=20)
    left = [name for name in os.listdir("cache") if name != data.MARK]
    assert [Path(name).suffix for name in left] == [".tmp"] * (number == signal.SIGKILL)
    assert load(source)[:, 0, 0, 0].tolist() == list(range(200))


def test_what_this_program_wrote_is_no_input(here, capsys):
    """With --data . runs, caches, samples and converted panoramas are passed over, and --resume works."""
    fill(here, {f"{i}.png": flat(i) for i in range(3)})
    train = ["train", "--device", "cpu", "--data", ".", *flags(dataclasses.replace(UNEVEN, data="."))]
    assert coco_gan.main([*train, "--run", "runs/a", "--steps", "1"]) == 0
    assert coco_gan.main(["sample", "--checkpoint", "runs/a", "--device", "cpu", "--out", "new/"]) == 0
    assert list(here.glob("**/*.png")) and len(load(".")) == 3
    assert coco_gan.main(["train", "--device", "cpu", "--resume", "runs/a", "--steps", "2"]) == 0
    assert len(load("new")) == 16  # named by the user, it counts


OTHERS = [
    "@eaDir/b.JPG/THUMB.jpg",
    "$RECYCLE.BIN/S-1/a.jpg",
    "System Volume Information/a.png",
    ".Trashes/a.png",
]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_folders_of_other_systems_are_not_entered(kind, here):
    files = {name: flat(9) for name in (*OTHERS, "lost+found/a.png")} | {
        "a.png": flat(1),
        "a.png.d/b.png": flat(2),
    }
    images = load(fill(here / "photos", files) if kind == "folder" else make_zip("p.zip", files))
    assert images[:, 0, 0, 0].tolist() == [1, 2]


def test_a_folder_that_cannot_be_listed_is_skipped_and_named(here, monkeypatch, capsys):
    source, listing = fill(here / "photos", {"a.png": flat(1), "b/c.png": flat(2)}), os.scandir

    def scandir(path):
        if Path(path).name == forbidden:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    forbidden = "b"
    assert len(load(source)) == 1
    message = capsys.readouterr().err
    assert "skipped 1 of 2 folders" in message and "photos/b/: Permission denied" in message
    forbidden = "photos"
    with pytest.raises(UserError, match="photos cannot be listed: Permission denied"):
        load(source)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_endings_that_pillow_reads_are_taken_and_others_counted(kind, here, capsys):
    files = {"a.jfif": encode(NOISE, "JPEG"), "b.JPE": encode(NOISE, "JPEG"), "c.ppm": encode(NOISE, "PPM")}
    files |= {"d.jp2": encode(NOISE, "JPEG2000")} if "JPEG2000" in Image.SAVE else {}
    files |= {"e.avif": encode(NOISE, "AVIF")} if "AVIF" in Image.SAVE else {}
    others = {f"{i}.HEIC": b"ftypheic" for i in range(5)} | {"list.txt": b"", "README": b"", ".DS_Store": b""}
    source = fill(here / "p", files | others) if kind == "folder" else make_zip("p.zip", files | others)
    assert len(load(source)) == len(files)
    assert "not read as images: 5 .heic, 1 .txt, 1 no ending\n" in capsys.readouterr().err


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.mark.parametrize(
    "source, words",
    [
        ("lsun", "holds no image, but an LMDB; give --data lsun/bedroom_train_lmdb"),
        ("celeba", "holds no image, but img_align.zip; give it"),
        ("quota.zip", "is a page of HTML"),
        ("faces.tar", "is an archive but no zip; unpack it"),
        ("hf.parquet", "is a Parquet file"),
        ("one.jpg", "is one image; give its folder"),
        ("lfs", "'a.jpg': is a Git LFS pointer and not the image; run git lfs pull"),
        ("pointer.zip", "is a Git LFS pointer; run git lfs pull"),
    ],
)
def test_what_is_no_folder_of_images_is_named(source, words, here):
    fill(here, {"lsun/bedroom_train_lmdb/data.mdb": b"", "celeba/img_align.zip": b"", "lfs/a.jpg": POINTER})
    fill(
        here,
        {
            "quota.zip": b"\n<!DOCTYPE html><title>Quota</title>",
            "hf.parquet": b"PAR1",
            "pointer.zip": POINTER,
        },
    )
    fill(here, {"one.jpg": encode(NOISE, "JPEG")})
    with tarfile.open("faces.tar", "w") as archive:
        archive.add("one.jpg")
    with pytest.raises(UserError, match=f"^--data.* {re.escape(words)}"):
        load(source)


def test_an_lmdb_is_read_where_lmdb_is_installed(here, monkeypatch):
    fill(here / "broken_lmdb", {"data.mdb": b"none"})
    with monkeypatch.context() as patch, pytest.raises(UserError, match="is an LMDB; pip install lmdb"):
        patch.setitem(sys.modules, "lmdb", None)
        load("broken_lmdb")
    lmdb = pytest.importorskip("lmdb")
    with pytest.raises(UserError, match="is an LMDB that cannot be read"):
        load("broken_lmdb")
    with lmdb.open("images_lmdb") as database, database.begin(write=True) as transaction:
        for i in range(3):
            transaction.put(b"\xff%d" % i, flat(i))
    assert load("images_lmdb")[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_large_photographs_are_read_reduced_and_larger_ones_refused(here, capsys):
    phone = Image.new("RGB", (12000, 9000), (200, 100, 50))  # 108 megapixels
    phone.paste((0, 0, 255), (0, 0, 6000, 9000))
    files = {
        "a.jpg": encode(phone, "JPEG"),
        "b.png": png_header(2**14, 2**14),
        "c.png": png_header(2**14, 2**14 + 1),
    }
    images = load(fill(here / "photos", files), 32, 32).astype(int)
    assert len(images) == 1
    np.testing.assert_allclose(images[0, :, [8, 24]], [[[0, 0, 255]] * 32, [[200, 100, 50]] * 32], atol=3)
    message = capsys.readouterr().err
    assert "'b.png': image file is truncated" in message  # within the limit: it was tried
    assert "'c.png': has 16384 x 16385 pixels" in message
    faces = encode(Image.new("RGB", (178 * 8, 218 * 8)), "JPEG")
    with pytest.raises(ValueError, match="is 1744 x 1424, but --crop celeba needs"):
        data.decode_image(faces, 64, 64, "celeba")  # not reduced to the size that it should have
    with Image.open(io.BytesIO(files["a.jpg"])) as image:
        assert data.read_rgb(files["a.jpg"], (64, 64)).size == (image.width // 8, image.height // 8)


def profile_of(grey=False, **primaries):
    """The sRGB profile with other primaries in XYZ; or that of a grey image with a linear curve."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    if grey:
        content[16:20] = b"GRAY"
    for i in range(132, 132 + 12 * struct.unpack(">I", content[128:132])[0], 12):
        name, at = content[i : i + 4].decode(), struct.unpack(">I", content[i + 4 : i + 8])[0]
        if name in primaries:
            content[at + 8 : at + 20] = struct.pack(">3i", *(round(x * 65536) for x in primaries[name]))
        if name == "rTRC" and grey:
            content[i : i + 4], content[at + 8 : at + 16] = b"kTRC", struct.pack(">hhi", 0, 0, 65536)  # γ = 1
    return bytes(content)


P3 = dict(
    rXYZ=(0.51512, 0.24120, -0.00105), gXYZ=(0.29198, 0.69225, 0.04189), bXYZ=(0.15710, 0.06657, 0.78407)
)


def test_embedded_colour_profiles_become_srgb():
    """The expected values are by the matrices of both spaces, which have one curve."""
    to_xyz = np.array([P3[name] for name in ("rXYZ", "gXYZ", "bXYZ")]).T
    srgb = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
    colours = np.array([[224, 160, 130], [90, 120, 140], [128, 128, 128]]) / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    linear = linear @ (np.linalg.inv(srgb) @ to_xyz).T
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    pixels = np.round(255 * colours).astype(np.uint8)[None].repeat(2, 0)  # (2, 3, 3)
    decode = functools.partial(data.decode_image, height=2, width=3, crop="center")
    for form, options in (("PNG", {}), ("TIFF", {}), ("WEBP", dict(lossless=True))):
        found = decode(encode(pixels, form, icc_profile=profile_of(**P3), **options))
        np.testing.assert_allclose(found[0], expected, atol=2)
    seen = decode(encode(np.dstack([pixels, ALPHA]), icc_profile=profile_of(**P3)))
    np.testing.assert_allclose(seen[0, :2], expected[:2], atol=2)
    assert (seen[0, 2] == 255).all()  # transparent: white
    for useless in (b"garbage", profile_of(**P3)[:200]):
        np.testing.assert_array_equal(decode(encode(pixels, icc_profile=useless)), pixels)
    grey = decode(encode(np.full((2, 3), 128, np.uint8), icc_profile=profile_of(grey=True)))
    np.testing.assert_allclose(grey, 188, atol=1)  # linear 0.5 in sRGB
    other = encode(cmyk(), "TIFF", icc_profile=profile_of(**P3))  # of other colours than the image has
    np.testing.assert_array_equal(decode(other), COLOURS)


def test_an_old_cache_of_a_source_is_replaced_and_one_that_was_moved_is_found(here, monkeypatch):
    load(fill(here / "a/photos", {"a.png": flat(1)}))
    load(fill(here / "b/photos", {"a.png": flat(2)}))
    load(fill(here / "a/photos", {"b.png": flat(3)}))
    assert len(list(Path("cache").glob("*.npy"))) == 2  # one for each folder
    crops = dict(crop="celeba-syn", seed=1), dict(crop="celeba")
    source = fill(here / "faces", {"a.png": encode(coordinates(218, 178))})
    moved, cut = (load(source, 64, 64, **crop) for crop in crops)
    assert not np.array_equal(moved, cut)  # each crop has its own cache
    Path("a").rename("moved")
    monkeypatch.setattr(data, "decode_all", None)
    assert load("moved/photos")[:, 0, 0, 0].tolist() == [1, 3]


def test_with_64_cores_there_are_at_most_16_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    before = threading.active_count()

    def work(i):
        time.sleep(0.001)
        return threading.active_count()

    assert max(data.in_threads(work, range(300))) - before <= 16


def test_originals_are_reported_from_the_cache_too(here, capsys):
    def jpeg(height, width, orientation=1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        return encode(np.zeros((height, width, 3), np.uint8), "JPEG", exif=exif)

    phone = {"a.jpg": jpeg(1600, 1200), "b.jpg": jpeg(1600, 1200), "c.jpg": jpeg(800, 1600, orientation=6)}
    upright = fill(here / "upright", phone)
    wide = fill(here / "wide", {"a.jpg": jpeg(20, 40), "b.jpg": jpeg(20, 60), "c.jpg": jpeg(20, 39)})
    for source, crop, line, panoramas in (
        (upright, "center", "photographs of 1,600 x 800-1,200 pixels; the crop keeps 67 %", False),
        (wide, "squash", "photographs of 20 x 39-60 pixels; the crop keeps 100 %", True),
    ):
        for _ in range(2):  # decoded, and from the cache
            images = load(source, 16, 16, crop=crop)
            capsys.readouterr()
            assert data.report_originals(images) == panoramas
            assert capsys.readouterr().out == f"{line}\n"
    assert not data.report_originals(load("toy:faces", toy_count=3)) and capsys.readouterr().out == ""


def test_few_images_and_panoramas_on_a_plane_are_told(here, capsys):
    pixels = np.zeros((20, 60, 3), np.uint8)
    source, heard = fill(here / "wide", {f"{i}.png": encode(pixels) for i in range(3)}), []
    for config in (UNEVEN, CYLINDER):
        config = flags(dataclasses.replace(config, data=source, steps=1, holdout=1))
        assert coco_gan.main(["train", "--device", "cpu", *config]) == 0
        out = capsys.readouterr().out
        assert "2 images of 16 x 24, 1 held out" in out
        assert max(map(len, out.splitlines())) <= 79
        heard.append(["fewer than 1,000 images" in out, "add --panorama" in out])
    assert heard == [[True, True], [True, False]]


def test_release_pages_frees_memory_and_loses_nothing(here):
    images = load("toy:faces", 32, 32)
    before = images.sum()

    def resident():
        return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    if Path("/proc/self/status").exists():
        used = resident()
        data.release_pages(images)
        assert used - resident() > 10_000  # kB of 12,288
    assert images.sum() == before
    data.release_pages(np.zeros(3))  # no map: nothing to do


@pytest.mark.parametrize("toy", data.TOYS.values())
def test_toys_are_the_same_every_time_in_any_number_and_at_every_size(toy):
    first = np.concatenate(list(toy(20, 32, 96)))
    assert first.shape == (20, 32, 96, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(np.concatenate(list(toy(9, 32, 96))), first[:9])
    assert (np.concatenate(list(toy(20, 32, 96, seed=1))) != first).any((1, 2, 3)).all()
    large = np.concatenate(list(toy(20, 128, 384)))
    averaged = large.reshape(20, 32, 4, 96, 4, 3).mean((2, 4))
    assert np.abs(averaged - first).mean() < 3


def test_landscapes_close_and_differ_on_every_side():
    large = np.concatenate(list(data.toy_landscapes(20, 128, 384))).astype(float)
    steps = np.abs(large - np.roll(large, 1, axis=2)).mean((0, 1, 3))  # of each column to the one before
    assert steps[0] < 1.5 * np.median(steps)
    images = np.concatenate(list(data.toy_landscapes(100, 32, 96))).astype(float)
    left, middle, right = (images[:, :, c : c + 24] for c in (12, 36, 60))
    assert (middle.max((1, 2, 3)) > 240).mean() > 0.95  # the sun
    assert np.mean(left.max((1, 2)) > middle.max((1, 2))) < 0.1
    left, right = (side[:, 8:17].std(2).mean((1, 2)) for side in (left, right))  # sky left, mountains right
    assert np.mean(left < right) > 0.9


def test_faces_have_two_eyes_that_mirror_each_other():
    for face in np.concatenate(list(data.toy_faces(20, 256, 256))):
        ys, xs = (face > 235).all(-1).nonzero()  # only eyes and teeth are so bright
        ys, xs = ys[ys < ys.min() + 24], xs[ys < ys.min() + 24]  # the eyes come first
        middle = (xs.min() + xs.max()) / 2
        left, right = xs < middle - 4, xs > middle + 4
        assert left.sum() > 50 and right.sum() > 50 and (left | right).all()
        assert abs(left.sum() - right.sum()) < 0.2 * left.sum() and 100 < middle < 156


# ---- Kernels -----------------------------------------------------------------------------------------------

GPU = "cuda" if torch.cuda.is_available() else "cpu"  # before on_the_cpu hides it
LAST, FIRST = torch.channels_last, torch.contiguous_format
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ERROR = {FP32: 1e-5, FP16: 2**-9, BF16: 2**-6}  # the interpreter cuts digits off where a GPU rounds
triton_only = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")


def noise(*shape, dtype=FP32, form=FIRST, scale=1.0):
    x = (scale * torch.randn(shape)).to(GPU, dtype)
    return x.contiguous(memory_format=form) if x.dim() == 4 else x


def norm_inputs(shape, dtype=FP32, dtype_gamma=FP32, form=FIRST):
    """x, γ, β, the running statistics, and a gradient of the output."""
    torch.manual_seed(sum(shape))
    B, C, h, w = shape
    x, dy = noise(*shape, dtype=dtype, form=form, scale=3), noise(*shape, dtype=dtype, form=form)
    gamma, beta = noise(B, C, dtype=dtype_gamma), noise(B, C, dtype=dtype_gamma)
    return x, gamma, beta, noise(C), noise(C).abs() + 0.5, dy


def norm_results(impl, x, gamma, beta, mean, var, dy, training=True, relu=True):
    """Output, gradients and running statistics; those of PyTorch in float64."""
    convert = torch.Tensor.double if impl == "torch" else torch.Tensor.detach
    *leaves, mean, var, dy = (convert(t) for t in (x, gamma, beta, mean, var, dy))
    leaves, mean, var = [t.requires_grad_() for t in leaves], mean.clone(), var.clone()
    y = kernels.conditional_batch_norm(*leaves, mean, var, training=training, relu=relu, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy), mean, var]


def assert_norm_is_right(inputs, **options):
    ours, true = (norm_results(impl, *inputs, **options) for impl in ("triton", "torch"))
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
@pytest.mark.parametrize("training, relu", [(True, False), (False, True)])
@pytest.mark.parametrize(
    "dtype, dtype_gamma, form", [(BF16, BF16, LAST), (BF16, FP32, FIRST), (FP16, FP32, LAST)]
)
def test_conditional_batch_norm_types(dtype, dtype_gamma, form, training, relu):
    inputs = norm_inputs((3, 5, 4, 3), dtype, dtype_gamma, form)
    ours = assert_norm_is_right(inputs, training=training, relu=relu)
    assert [t.dtype for t in ours] == [dtype, dtype, dtype_gamma, dtype_gamma, FP32, FP32]


@triton_only
@pytest.mark.parametrize("first", [1000.0, 0.0, -1e4])  # a start unlike the rest says nothing of its mean
def test_statistics_far_from_zero_and_in_many_small_tiles(first, monkeypatch):
    """Float32 holds a mean of 1,000 to 3e-5, and that decides; sums of squares would be wrong by 0.1."""
    monkeypatch.setattr(kernels, "TILE", 32)
    for form in (LAST, FIRST):
        assert_norm_is_right(norm_inputs((11, 5, 7, 3), form=form))
    x, gamma, beta, mean, var, dy = norm_inputs((4, 2, 9, 5), form=LAST)
    x = 1000 + x / 3
    x[0, :, 0, :3] = first
    inputs = x, torch.ones_like(gamma), beta, 0 * mean, 0 * var, dy
    ours, true = (norm_results(impl, *inputs, relu=False) for impl in ("triton", "torch"))
    torch.testing.assert_close(ours[0].double(), true[0], atol=5e-5, rtol=0)
    torch.testing.assert_close(ours[-1].double(), true[-1], atol=0, rtol=2e-5)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=triton_only)])
def test_running_statistics_are_those_of_batch_norm(impl):
    norm = torch.nn.BatchNorm2d(5, affine=False, momentum=0.3).to(GPU)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    one, zero = (torch.full((4, 5), value, device=GPU) for value in (1.0, 0.0))
    for training in (True, True, False):
        norm.train(training)
        x, options = noise(4, 5, 3, 2) + 2, dict(training=training, momentum=0.3, impl=impl)
        y = kernels.conditional_batch_norm(x, one, zero, mean, var, **options)
        torch.testing.assert_close([y, mean, var], [norm(x), norm.running_mean, norm.running_var])


def test_the_module_scales_and_shifts_by_linear_maps_of_the_condition():
    norm = kernels.ConditionalBatchNorm(4, 6)
    x, condition = 1000 + 3 * torch.randn(5, 4, 3, 2), torch.randn(5, 6)
    normal = (x - x.mean((0, 2, 3), keepdim=True)) / x.var((0, 2, 3), correction=0, keepdim=True).sqrt()
    torch.testing.assert_close(norm(x, 0 * condition), normal, atol=1e-3, rtol=1e-3)  # γ = 1 and β = 0
    torch.nn.init.normal_(norm.weight)
    gamma, beta = (condition @ norm.weight.T + norm.bias)[:, :, None, None].split(4, 1)
    torch.testing.assert_close(norm(x, condition), gamma * normal + beta, atol=1e-2, rtol=1e-3)


@triton_only
def test_conditional_batch_norm_takes_views_nan_and_strides_beyond_31_bits():
    mean, var, dy = noise(3), noise(3).abs() + 0.5, noise(1, 3, 1, 1).expand(4, 3, 5, 2)
    gamma, beta = noise(4, 6).chunk(2, dim=1)
    for form in (LAST, FIRST):
        views = noise(8, 3, 5, 2, form=form)[::2], noise(4, 7, 5, 2, form=form)[:, 2:5]
        for x in (*views, noise(4, 3, 2, 5, form=form).mT):
            assert_norm_is_right((x, gamma, beta, mean, var, dy))
    assert_norm_is_right((x, noise(1, 3).expand(4, 3), beta, mean, var, dy))

    x, *rest = norm_inputs((2, 3, 4, 2), BF16, form=LAST)
    far = torch.empty(2**31 + 64, dtype=BF16, device=GPU).as_strided(x.shape, (2**31 + 8, *x.stride()[1:]))
    far.copy_(x)
    torch.testing.assert_close(norm_results("triton", far, *rest), norm_results("triton", x, *rest))
    x[1, 1, 2, 0] = float("nan")  # goes through the ReLU
    for training, count in ((True, 16), (False, 1)):
        y, dx, *_ = norm_results("triton", x, *rest, training=training)
        assert y.isnan().sum() == count and training is bool(dx[:, 1].isnan().all())


def patches_of(count, C, S, dtype=FP32, form=FIRST):
    torch.manual_seed(count + C + S)
    return noise(count, C, S, S, dtype=dtype, form=form, scale=2)


def merge_results(impl, patches, **options):
    """Output and gradient of the patches."""
    patches = patches.detach().requires_grad_()
    images = kernels.merge_patches(patches, 2, 3, **options, impl=impl)
    slope = torch.arange(images.numel(), device=GPU).sin().view(images.shape).to(images.dtype)
    return images.detach(), torch.autograd.grad(images, patches, slope)[0]


def test_merge_puts_rows_first_and_crop_undoes_it():
    patches = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 2, 2)
    expected = [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    assert kernels.merge_patches(patches, 2, 3)[0, 0].tolist() == expected
    images = torch.randint(0, 256, (3, 8, 12, 3), dtype=torch.uint8)
    starts = list(itertools.product([2, 0], range(0, 8, 4), range(0, 12, 4)))  # image, top, left
    crops = kernels.crop_patches(images, *(torch.tensor(t) for t in zip(*starts)), 4, 4)
    assert np.array_equal(coco_gan.to_uint8(kernels.merge_patches(crops, 2, 3)), images[[2, 0]].numpy())


@triton_only
@pytest.mark.parametrize("form", [LAST, FIRST])
@pytest.mark.parametrize("tile", [32, 4096])  # a row of a patch is more than a tile, or one tile holds all
@pytest.mark.parametrize("C, S", [(3, 4), (1, 1), (5, 7)])
def test_merge_patches_kernels(C, S, tile, form, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", tile)
    patches = patches_of(12, C, S, form=form)
    for ours, reference in zip(merge_results("triton", patches), merge_results("torch", patches)):
        assert torch.equal(ours, reference) and ours.stride() == reference.stride()


@triton_only
@pytest.mark.parametrize("dtype, to", [(BF16, FP32), (FP32, BF16), (FP16, None)])
@pytest.mark.parametrize("form", [LAST, FIRST])
def test_merge_patches_types_and_tanh(dtype, to, form):
    patches = patches_of(6, 3, 4, dtype, form)
    ours = merge_results("triton", patches, tanh=True, dtype=to)
    true = merge_results("torch", patches.double(), tanh=True)
    assert [t.dtype for t in ours] == [to or dtype, dtype]
    for a, b in zip(ours, true):
        torch.testing.assert_close(a.double(), b, atol=ERROR[BF16], rtol=ERROR[BF16])
    x = torch.tensor([-1e4, -12, -0.26, -0.24, -1e-6, 0, 1e-20, 1e-3, 0.249, 0.251, 3, 9.5], device=GPU)
    single = x.view(-1, 1, 1, 1).requires_grad_()  # tanh has all its digits
    y = kernels.merge_patches(single, 1, 1, tanh=True, impl="triton")
    (dx,) = torch.autograd.grad(y.sum(), single)
    torch.testing.assert_close(y.double().flatten(), x.double().tanh(), atol=0, rtol=1e-6)
    torch.testing.assert_close(dx.double().flatten(), x.double().cosh() ** -2, atol=0, rtol=1e-5)


@triton_only
@pytest.mark.parametrize("height, width, tile", [(4, 5, 4096), (9, 13, 32)])  # 9 x 13: all of the image
def test_crop_patches_kernel(height, width, tile, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", tile)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 9, 13, 3), dtype=torch.uint8, device=GPU)
    top, left = torch.tensor([[2, 7, -3, 0, 900, -900], [3, 12, -1, -13, -777, 778]], device=GPU)
    index, mirror = torch.arange(6, device=GPU) % 3, torch.arange(6, device=GPU) % 4 == 1
    at = images, index, top, left, height, width
    ours, reference = (kernels.crop_patches(*at, mirror=mirror, impl=impl) for impl in ("triton", "torch"))
    assert torch.equal(ours, reference) and ours.stride() == reference.stride()
    for b, (i, y, x) in enumerate(zip(index.tolist(), top.tolist(), left.tolist())):
        true = images[i].roll((-y, -x), (0, 1))[:height, :width]
        true = true.flip(1) if mirror[b] else true
        torch.testing.assert_close(ours[b].permute(1, 2, 0), true / 127.5 - 1, atol=1e-6, rtol=0)
    index[1] = 3  # no image: NaN, for the kernel cannot wait to tell
    assert kernels.crop_patches(*at, impl="triton").isnan().flatten(1).any(1).tolist() == [
        False,
        True,
        *[False] * 4,
    ]


@pytest.mark.parametrize("form", [LAST, FIRST])
def test_gradients_of_the_references(form):
    """The kernels are compared with these."""
    x, gamma, beta, mean, var, _ = (t.double() for t in norm_inputs((3, 2, 2, 2), form=form))
    inputs = [t.requires_grad_() for t in (x, gamma, beta)]
    for training in (True, False):
        options = dict(training=training, relu=True, impl="torch")
        norm = functools.partial(
            kernels.conditional_batch_norm, running_mean=mean, running_var=var, **options
        )
        assert torch.autograd.gradcheck(norm, inputs)
    patches = patches_of(6, 2, 2, form=form).double().requires_grad_()
    merge = functools.partial(kernels.merge_patches, rows=2, columns=3, tanh=True, impl="torch")
    assert torch.autograd.gradcheck(merge, patches)


@triton_only
def test_equal_input_gives_equal_bits():
    inputs = norm_inputs((5, 20, 4, 3) if GPU == "cpu" else (300, 70, 17, 9), BF16, form=LAST)
    for a, b in zip(norm_results("triton", *inputs), norm_results("triton", *inputs)):
        assert torch.equal(a, b)


@triton_only
@pytest.mark.parametrize("wants", [True, False])  # whether the incoming gradient requires a gradient itself
def test_a_gradient_of_a_gradient_through_a_kernel_raises(wants):
    x, gamma, beta, mean, var, dy = norm_inputs((3, 2, 4, 2))
    patches = patches_of(6, 3, 2).requires_grad_()
    y = kernels.conditional_batch_norm(
        x.requires_grad_(), gamma, beta, mean, var, training=True, impl="triton"
    )
    images = kernels.merge_patches(patches, 2, 3, tanh=True, impl="triton")
    for output, leaf in ((y, x), (images, patches)):
        slope = torch.ones_like(output).requires_grad_(wants)
        (gradient,) = torch.autograd.grad(output, leaf, slope, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative; impl='torch' can be differentiated"):
            gradient.sum().backward()


@pytest.mark.parametrize("side", [8, 7])
def test_relu_and_pool_are_pytorchs(side):
    x = torch.randn(2, 3, side, side + 2, dtype=torch.float64, requires_grad=True)

    def ours(x):
        return kernels.avg_pool(kernels.relu(x))

    torch.testing.assert_close(ours(x), torch.nn.functional.avg_pool2d(torch.relu(x), 2, ceil_mode=True))
    assert torch.autograd.gradcheck(ours, x)
    assert torch.autograd.gradgradcheck(lambda x: ours(x).square(), x)
    D, c = coco_gan.Discriminator(UNEVEN), torch.zeros(4, 2)
    L_GP, _ = coco_gan.gradient_penalty(lambda t: D(t, c)[0], *torch.randn(2, 4, 3, 8, 12), torch.rand(4))
    biases = [p for name, p in D.blocks.named_parameters() if name.endswith("bias")]
    assert {*torch.autograd.grad(L_GP, biases, allow_unused=True)} == {None}  # no zeros are carried along


def ones(*shape, dtype=FP32):
    return torch.ones(shape, dtype=dtype)


def norm(x=(2, 3, 4, 4), gamma=(2, 3), mean=(3,), dtype=FP32, **options):
    stats, options = ones(*mean), dict(training=True) | options
    return kernels.conditional_batch_norm(
        ones(*x, dtype=dtype), ones(*gamma), ones(*gamma), stats, stats, **options
    )


def crop(images=(5, 8, 8, 3), top=(2,), height=4, dtype=torch.uint8):
    index, top = (torch.zeros(shape, dtype=torch.int64) for shape in ((2,), top))
    return kernels.crop_patches(ones(*images, dtype=dtype), index, top, top, height, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: norm(x=(2, 3, 4)), "x is (2, 3, 4); give (B, C, h, w)"),
        (lambda: norm(x=(1, 3, 1, 1), gamma=(1, 3)), "x is (1, 3, 1, 1); give (B, C, h, w), in training two"),
        (lambda: norm(gamma=(2, 4)), "gamma is (2, 4) torch.float32 on cpu; give (2, 3) torch.float32"),
        (lambda: norm(mean=(2,)), "running_mean is (2,) torch.float32 on cpu; give (3,) torch.float32"),
        (lambda: norm(impl="cuda"), "impl is 'cuda'; give 'auto', 'torch' or 'triton'"),
        (lambda: kernels.merge_patches(ones(12, 3, 4, 5), 2, 3), "(12, 3, 4, 5)"),
        (lambda: kernels.merge_patches(ones(12, 3, 4, 4), 5, 3), "12 patches make no images of 5 rows and 3"),
        (lambda: crop((5, 8, 8, 4)), "images is (5, 8, 8, 4) torch.uint8 on cpu; give (5, 8, 8, 3)"),
        (
            lambda: crop(dtype=FP32),
            "images is (5, 8, 8, 3) torch.float32 on cpu; give (5, 8, 8, 3) torch.uint8",
        ),
        (lambda: crop(height=9), "a patch of 9 x 4 pixels is not inside an image of 8 x 8"),
        (lambda: crop(top=(3,)), "top is (3,) torch.int64 on cpu; give (2,) torch.int64"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("installed", [False, pytest.param(True, marks=triton_only)])
def test_without_triton_or_a_gpu_auto_is_pytorch(installed):
    code = "import sys\n" if installed else "import sys; sys.modules['triton'] = None\n"
    code += "import torch, kernels; x = torch.randn(6, 3, 4, 4); y = kernels.merge_patches(x, 2, 3)\n"
    code += "assert torch.equal(y, kernels.merge_patches(x, 2, 3, impl='torch'))\n"
    code += "kernels.merge_patches(x, 2, 3, impl='triton')"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    why = "torch.float32 and torch.float32 on cpu" if installed else "Triton is not installed"
    assert f"ValueError: impl is 'triton': {why}" in result.stderr


def test_kernels_check_themselves():
    out = subprocess.check_output([sys.executable, ROOT / "kernels.py"], text=True)
    assert out == f"the {'PyTorch references' if kernels.triton is None else 'kernels'} agree with float64\n"


@triton_only
@pytest.mark.parametrize("name", ["_normalise_kernel", "_merge_patches_kernel"])
def test_kernels_that_are_wrong_are_not_used(name, monkeypatch):
    """By a fifth, in bfloat16 alone."""
    right = getattr(kernels, name)

    class Wrong:
        def __getitem__(self, grid):
            def launch(*args, **options):
                right[grid](*args, **options)
                outputs = [t for t in args[:3] if isinstance(t, torch.Tensor) and t.dtype is BF16]
                for t in outputs:
                    t.mul_(0.8)

            return launch

    assert kernels.failure.__wrapped__(GPU) is None
    monkeypatch.setattr(kernels, name, Wrong())
    assert "bfloat16" in kernels.failure.__wrapped__(GPU)


@pytest.mark.skipif(GPU != "cpu" or kernels.triton is None, reason="for Triton's interpreter")
def test_training_with_the_kernels_is_training(monkeypatch):
    config = dataclasses.replace(CYLINDER, mirror=True, yaw=True, precision="fp32", lr_d=1e-5)
    images, found = random_images(config), []
    for impl in ("torch", "triton"):
        monkeypatch.setattr(kernels, "DEFAULT", impl)
        gan = COCOGAN(config, CPU)
        losses = [step_of(gan, draw(config, images, gan.rng)) for _ in range(4)]
        found.append((losses[0], torch.stack(losses), gan.G.state_dict()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0][1:], found[1][1:], rtol=0.05, atol=0.05)  # Adam enlarges rounding


class Replayed(TorchDispatchMode):
    """In place of torch.cuda.CUDAGraph: notes the operations, and repeats them on the same memory."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.done.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.done:
            new = function(*args, **kwargs)
            for a, b in zip(*(t if isinstance(t, tuple | list) else [t] for t in (result, new))):
                if isinstance(a, torch.Tensor) and a.data_ptr() != b.data_ptr():  # else written in place
                    a.copy_(b)


@pytest.mark.parametrize("guided", [False, True])
def test_a_step_can_be_captured_and_replayed(guided, monkeypatch):
    """All that changes from step to step is in tensors: replayed, a step trains as ordinary steps do."""
    config = dataclasses.replace(UNEVEN, guided=guided)
    images = random_images(config)
    gan, graph = COCOGAN(config, CPU), Replayed()
    graph.done = []

    @contextlib.contextmanager
    def record(graph):
        before = {name: t.clone() for name, t in coco_gan.named_tensors(gan).items()}
        with graph:
            yield
        for name, t in coco_gan.named_tensors(gan).items():  # a graph is captured without running
            t.data.copy_(before[name])

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    found = []
    for other, wrap in ((gan, kernels.capture), (COCOGAN(config, CPU), lambda step: step)):
        step, losses = wrap(functools.partial(coco_gan.train_step, other)), []
        for k in range(6):
            losses.append(step(*draw(config, images, other.rng), coco_gan.ema_weight(config, k)))
        found.append((torch.stack(losses), coco_gan.named_tensors(other)))
    assert len(graph.done) > 400
    torch.testing.assert_close(*found, rtol=0, atol=0)


def compile_kernels(architecture):
    """Compile for a GPU what COCO-GAN launches, on the device "meta", and print how many."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    class Noted:
        """In place of a kernel: notes the arguments of a launch as Triton would compile for them."""

        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *args, num_warps=4):
            signature, constants = {}, {}
            for i, (parameter, value) in enumerate(zip(self.kernel.params, args, strict=True)):
                if isinstance(value, torch.Tensor):
                    kinds = {FP32: "*fp32", BF16: "*bf16", torch.int64: "*i64"}
                    signature[parameter.name] = kinds.get(value.dtype, "*u8")
                elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
                    signature[parameter.name], constants[i,] = "constexpr", value
                else:
                    signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            source = ASTSource(self.kernel, signature, constants, {})
            key = self.kernel.__name__, num_warps, *signature.values(), str(constants)
            sources.setdefault(key, source)

    sources = {}
    for name, kernel in vars(kernels).items():
        if isinstance(kernel, triton.runtime.JITFunction) and name.endswith("_kernel"):
            setattr(kernels, name, Noted(kernel))
    meta = torch.device("meta")
    for dtype, training in itertools.product((FP32, BF16), (True, False)):
        x = torch.empty(512, 64, 32, 32, dtype=dtype, memory_format=LAST, device=meta, requires_grad=True)
        gamma, stats = torch.empty(512, 64, dtype=dtype, device=meta), torch.empty(64, device=meta)
        inputs = x, gamma, gamma, stats, stats
        kernels.conditional_batch_norm(*inputs, training=training, relu=True, impl="triton").sum().backward()
        patches = torch.empty(
            512, 3, 32, 32, dtype=dtype, memory_format=LAST, device=meta, requires_grad=True
        )
        kernels.merge_patches(patches, 2, 2, tanh=True, dtype=FP32, impl="triton").sum().backward()
    images, at = (
        torch.empty(9, 128, 128, 3, dtype=torch.uint8, device=meta),
        torch.empty(3, 128, dtype=torch.int64, device=meta),
    )
    kernels.crop_patches(images, *at, 64, 64, mirror=at[0].bool(), impl="triton")
    for (_, num_warps, *_), source in sources.items():
        target = GPUTarget("cuda", architecture, 32)
        triton.compile(source, target=target, options=dict(num_warps=num_warps))
    print(f"{len(sources)} compiled")


@triton_only
def test_kernels_compile_without_a_gpu():
    """What the interpreter accepts and the compiler does not is found here."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    code = (
        f"import {Path(__file__).stem} as t; t.kernels._use_triton = lambda *_: True; t.compile_kernels(90)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout.split()[0]) >= 10


# ---- Command line ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, shape",
    [
        ("--zoom 1", (70, 102)),  # 16 images of 16 x 24 in 4 columns
        ("--count 2 --zoom 3", (3 * 32 + 2, 3 * 24)),
        ("--seed 5 7 8 --extrapolate 1 --zoom 1", (24, 100)),
        ("--count 1 --raw", (128, 192)),  # enlarged by a whole factor
    ],
)
def test_sample_draws_what_is_asked(words, shape, copied, capsys):
    command = ["sample", "--checkpoint", "run", "--device", "cpu", *words.split()]
    assert coco_gan.main(command) == 0
    out = capsys.readouterr().out.split(":")[0]
    assert out == f"run/checkpoint-000000004-seed-{5 if '5' in words else 0}.png"
    assert picture(out).shape == (*shape, 3)


def test_sample_draws_one_picture_per_seed_into_a_folder(copied):
    command = ["sample", "--checkpoint", "run", "--device", "cpu"]
    assert coco_gan.main([*command, "--seed", "3", "--count", "2", "--out", "a/b/"]) == 0
    assert sorted(os.listdir("a/b")) == [data.MARK, "seed-000003.png", "seed-000004.png"]
    assert coco_gan.main([*command, "--count", "1", "--zoom", "2", "--out", "c/"]) == 0
    assert picture("c/seed-000000.png").shape == (32, 48, 3)
    image = coco_gan.to_uint8(coco_gan.full_image(coco_gan.load("run"), coco_gan.latents([4], 8)))[0]
    assert np.array_equal(picture("a/b/seed-000004.png"), image)


def test_work_is_counted_on_a_terminal_only(copied, monkeypatch, capsys):
    clock = itertools.count(0, 3)
    monkeypatch.setattr(data, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    command = ["sample", "--checkpoint", "run", "--device", "cpu", "--count", "3"]
    assert coco_gan.main(command) == 0 and capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert coco_gan.main(command) == 0
    lines = ["1 of 3 images", "2 of 3 images", ""]  # the last one clears them
    assert capsys.readouterr().err == "".join(f"\r{line:40}" for line in lines) + "\r"
    assert [*data.counted("abc", 3, "letters")] == ["a", "b", "c"]


def test_panoramas_are_sampled_with_turns(here):
    assert (
        coco_gan.main(
            ["sample", "--panorama", "--turns", "2", "--device", "cpu", "--zoom", "1", "--out", "a.png"]
        )
        == 0
    )
    image = picture("a.png").astype(int)
    assert image.shape == (32, 192, 3) and np.abs(image[:, :96] - image[:, 96:]).max() <= 1


@pytest.mark.parametrize(
    "words, preset",
    [
        ("", "tiny"),
        ("--data photos", "small"),
        ("--panorama", "panorama-tiny"),
        ("--preset celeba64", "celeba64"),
    ],
)
def test_presets_go_by_device_and_data(words, preset, here, monkeypatch):
    seen = []
    monkeypatch.setattr(coco_gan, "load_stored", lambda config, cache: seen.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        coco_gan.main(["train", "--device", "cpu", *words.split()])
    expected = Config(**coco_gan.PRESETS[preset])
    assert seen == [dataclasses.replace(expected, data="photos") if "photos" in words else expected]
    for panorama, on_gpu in ((True, "panorama"), (False, "celeba64")):
        args = SimpleNamespace(preset=None, panorama=panorama)
        assert coco_gan.choose_preset(args, torch.device("cuda")) == on_gpu


@pytest.mark.parametrize("words, size", [("64x96", (64, 96)), ("48", (48, 48))])
def test_image_size_is_height_x_width(words, size, here, monkeypatch):
    seen = []
    monkeypatch.setattr(coco_gan, "load_stored", lambda config, cache: seen.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        coco_gan.main(["train", "--device", "cpu", "--image-size", words])
    assert (seen[0].height, seen[0].width) == size


BAD = [
    ("train --preset tinny", "argument --preset: invalid choice: 'tinny'"),
    ("train --steps many", "argument --steps: invalid int value: 'many'"),
    ("train --log-every 0", "argument --log-every: '0' is no whole number from 1 on"),
    ("train --hight 64", "--hight 64 (did you mean --height?); see python coco_gan.py train --help"),
    ("sample --lambda-gp=3", "unrecognized arguments: --lambda-gp=3; see python coco_gan.py sample --help"),
    ("train --image-size 64 --width 96", "--image-size gives --height and --width; leave out one"),
    ("train --image-size 64x", "argument --image-size: '64x' is no HEIGHTxWIDTH"),
    ("train --gpu", "--device cuda is not available; give auto, cpu, cuda"),
    ("train --data nowhere", "--data nowhere does not exist"),
    ("train --holdout 5000", "--holdout 5000 leaves none of 4096 images"),
    ("train --graph", "--graph is for a single process on a GPU; leave it out"),
    (
        "train --panorama --preset tiny",
        "--panorama needs a cylinder, and tiny or --topology plane is none; leave one",
    ),
    (
        "train --panorama --preset panorama --topology plane",
        "--panorama needs a cylinder, and panorama or --topology plane is none; leave one",
    ),
    ("train --resume --preset tiny", "--resume keeps the run's preset and folder; leave out --preset"),
    ("train --resume nowhere", "nowhere is no checkpoint and no run folder with one"),
    ("train --resume", "--resume finds no run under runs/; name one, or leave it out"),
    ("train --device cuda:7", "--device cuda:7 is not available; give auto, cpu, cuda"),
    ("sample --checkpoint nowhere", "nowhere is no checkpoint and no run folder with one"),
    ("sample --checkpoint photo.jpg", "photo.jpg is no checkpoint that can be used"),
    ("sample --raw", "toy_faces.pt has the moving average only; leave out --raw"),
    ("sample --out a.txt", "a.txt is not the name of a picture; end it in .png"),
    ("sample --out photo.jpg/a.png", "File exists: 'photo.jpg'"),
]


@pytest.mark.parametrize("command, message", BAD)
def test_bad_input_ends_in_one_line(command, message, here, capsys):
    Path("photo.jpg").write_bytes(b"no photograph")
    device = [] if "--device" in command or "--gpu" in command else ["--device", "cpu"]
    assert coco_gan.main([*command.split(), *device]) == 2
    *progress, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error
    assert progress == [] or "--holdout" in command  # which draws the toys first
    assert not Path("runs").exists()


def test_no_arguments_print_the_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["coco_gan.py"])
    with pytest.raises(SystemExit, match="^0$"):
        coco_gan.main()
    assert "sample from a trained model" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, preset",
    [("", "tiny"), ("--help --data photos", "small"), ("--preset celeba128-n16", "celeba128-n16")],
)
def test_help_has_every_field_with_the_default_that_train_would_take(
    words, preset, here, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "80")
    assert coco_gan.main(["train", "--device", "cpu", "--help", *words.split()]) == 0 and not os.listdir()
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 79 and "example: python coco_gan.py train --" in text
    for name, value in vars(Config(**coco_gan.PRESETS[preset])).items():
        entry = re.search(rf"\n  {coco_gan.flag(name)}\b.*?\(default:\s+(\S+)\)", text, re.DOTALL)
        assert entry[1] == str(value), name


def test_the_three_files_import_flat_and_from_a_package(here):
    code = "from {}coco_gan import *; print(full_image(load(), latents([0])).shape); "
    small = ["train", "--run", "run", "--device", "cpu", *flags(dataclasses.replace(UNEVEN, steps=1))]
    code += f"print(main({small}))"  # without experiments/
    for folder, package in (("flat", ""), ("cocogan", "cocogan.")):
        os.mkdir(folder)
        for name in ("coco_gan.py", "kernels.py", "data.py"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(ROOT / "assets", f"{folder}/assets")
        cwd = "." if package else folder
        result = subprocess.run(
            [sys.executable, "-c", code.format(package)], cwd=cwd, capture_output=True, text=True
        )
        *lines, status = result.stdout.splitlines()
        assert lines[0] == "torch.Size([1, 3, 64, 64])" and status == "0", result.stderr
        drawn = importlib.util.find_spec("matplotlib") is not None
        assert (here / cwd / "run/indicators.png").exists() == drawn


def test_each_section_uses_only_what_stands_above_it():
    tree = ast.parse((ROOT / "coco_gan.py").read_text())
    names = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for name, node in names.items():
        used = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)} & names.keys()
        assert name == "main" or [other for other in used if names[other].lineno > node.lineno] == []
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("experiments" in ast.unparse(node) for node in imports)


# ---- Documentation -----------------------------------------------------------------------------------------

PAGES = ["README.md", "docs/training.md", "docs/panoramas.md", "docs/kernels.md", "experiments/README.md"]
PAGES += ["related/README.md"]
COMMAND = re.compile(
    r"^(?:pip .+ && )?python (coco_gan\.py|-m (?:experiments|related)\.\w+)(.*?)(?: +#.*)?$", re.MULTILINE
)
BUDGET = {  # what is added to a command, so that it takes a second
    "train": "--steps {} --batch-size 2 --width-g 2 --width-d 2 --device cpu",
    "resume": "--steps {} --device cpu",
    "sample": "--device cpu",
    "related train": "--steps {} --batch-size 4 --width-g 2 --width-d 2 --device cpu",
    "related sample": "--device cpu --count 2",
    "experiments.evaluate": "--count 16",
    "experiments.ablations": "--steps 1 --seeds 1 --count 32 --variants coco-gan",
    "experiments.extrapolate": "--steps 2",
    "experiments.bench": "--steps 5 --batch-size 2",
}


def test_the_readme_shows_its_first_command_early_and_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any("python coco_gan.py train" in line for line in lines[:60]) and len(lines) <= 180


def test_commands_of_all_pages(here):
    """All of them, page by page, in one folder."""
    for n in range(6):
        pixels = np.random.default_rng(n).integers(0, 256, (218, 178, 3), dtype=np.uint8)
        fill(here / "celeba", {f"{n}.jpg": encode(pixels, "JPEG")})
        fill(
            here / "matterport",
            {f"{k}_skybox{n}_sami.jpg": encode(pixels[:64, :64], "JPEG") for k in range(4)},
        )
    fill(here, {"brick.jpg": encode(pixels, "JPEG"), "photo.jpg": encode(pixels, "JPEG")})
    found = [match for page in PAGES for match in COMMAND.findall((ROOT / page).read_text())]
    assert len(found) > 25
    for number, (script, words) in enumerate(found):
        name, words = script.removeprefix("-m "), shlex.split(words)
        if "plot" in name and importlib.util.find_spec("matplotlib") is None:
            continue
        module = coco_gan if name == "coco_gan.py" else importlib.import_module(name)
        kind = name if name in BUDGET else "resume" if "--resume" in words else words[0] if words else ""
        kind = f"related {kind}" if name.startswith("related") else kind
        words += BUDGET.get(kind, "").format(2 + number).split()
        assert module.main(words) == 0, (script, words)


def test_the_notebook_runs_from_top_to_bottom(here, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "demo.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells)  # none are stored
    for cell in cells:
        cell.source = cell.source.replace("< 300", "< 50")
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in cells]
    assert shown == [False] + [True] * (len(cells) - 1)


NAMED = [coco_gan.load, coco_gan.latents, coco_gan.full_image, coco_gan.pictures, kernels.merge_patches]
NAMED += [kernels.crop_patches, kernels.conditional_batch_norm]
NAMED += [kernels.ConditionalBatchNorm.__init__, kernels.ConditionalBatchNorm.forward]


@pytest.mark.parametrize("function", NAMED, ids=lambda function: function.__qualname__)
def test_what_the_readme_names_has_type_hints(function):
    names = {*inspect.signature(function).parameters, "return"} - {"self"}
    hints = typing.get_type_hints(function)
    assert hints.keys() | {"return"} == names and (function.__name__ == "__init__" or "return" in hints)


def test_python_examples_of_the_readme(here):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
    assert names["images"].shape == (3, 3, 64, 64) and names["part"].shape == (1, 3, 16, 32)
    assert picture("face.png").shape == (64, 64, 3)
    assert names["y"].shape == (8, 64, 16, 16) and names["y"].min() == 0
