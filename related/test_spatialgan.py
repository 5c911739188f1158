"""Tests of spatialgan.py, in its order: python -m pytest related/test_spatialgan.py"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.func import functional_call

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import coco_gan
from related import spatialgan
from related.spatialgan import PRESETS, Config, Critic, Generator, SpatialGAN, make_images, middle

CPU = torch.device("cpu")
SMALL = Config(sides="8,16,32", halvings=2, z_dim=4, width_g=4, most_g=8, width_d=2, loss="wgan", d_steps=1)
SMALL = dataclasses.replace(SMALL, batch_size=4, stage_steps=2, precision="fp32", lr_g=0.01, lr_d=0.01)
JOINT = SMALL.stage_steps * (SMALL.N + 1)


@pytest.fixture(autouse=True)
def one_thread_and_five_photographs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for k, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)):
        Image.fromarray(pixels).save(f"photos/{k}.png")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def train(*words, **fields):
    config = dict(sides="4,8", halvings=1, z_dim=4, width_g=2, most_g=4, width_d=2, data="photos") | fields
    given = [word for name, value in config.items() for word in (coco_gan.flag(name), str(value))]
    return spatialgan.main(["train", "--preset", "toy", "--device", "cpu", *given, *words])


def one_step(gan, step, x=None):
    gan.step, H = step, gan.config.height
    images = torch.randint(0, 256, (9, H, H, 3), dtype=torch.uint8)
    batch = spatialgan.draw_batch(gan.config, images, torch.arange(9), gan.rng, CPU)
    return spatialgan.train_step(gan, batch[0] if x is None else x, *batch[1:], None)


def spy(monkeypatch):
    """A list that gets the network, its first input and its output for each call of a network in training."""
    calls, original = [], spatialgan.functional_call

    def apply(net, parameters, inputs):
        calls.append((net, inputs[0] if type(inputs) is tuple else inputs, original(net, parameters, inputs)))
        return calls[-1][-1]

    monkeypatch.setattr(spatialgan, "functional_call", apply)
    return calls


@pytest.mark.parametrize("name", PRESETS)
def test_presets_train_one_level_after_the_other_and_then_all(name):
    config = Config(**PRESETS[name]).check()
    assert [config.phase(k) for k in (0, config.stage_steps, config.steps - 1)] == [0, 1, config.N + 1]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(sides="16;32"), "--sides 16;32 do not fit"),
        (dict(sides="12,32"), "--sides 12,32 do not fit"),
        (dict(sides="16,34"), "--sides 16,34 do not fit; give 4, 8, 16, .* larger multiples of 4, 2 to"),
        (dict(batch_size=10, pack=4), "--batch-size 10 is not 2, 3, … times --pack 4"),
        (dict(stage_steps=3, steps=8), "--stage-steps 3 for 3 levels are more than --steps 8"),
        (dict(sides="16,8"), "--sides 16,8 do not fit"),
        (dict(pack=4), "--batch-size 4 is not 2"),
    ],
)
def test_bad_configurations_are_named(change, message):
    with pytest.raises(coco_gan.UserError, match=message):
        dataclasses.replace(SMALL, **change).check()


def test_parameter_counts_of_the_paper():
    with torch.device("meta"):
        models = [Generator(config) for config in (Config(), Config(unet=False, attention=False), SMALL)]
    found = [sum(p.numel() for p in net.parameters()) for G in models for net in G.levels]
    assert found[:4] == [3_670_019, 21_297_071, 21_297_071, 22_609_584]  # the paper has 24.21 M an expansion
    assert found[4:] == [3_670_019, 20_436_803, 20_436_803, 20_436_803, 1_275, 4_211, 4_306]


@pytest.mark.parametrize("sides", ["8,16,32", "4,8", "16,32,48"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("training", [False, True])
def test_the_context_stays_to_the_bit_and_nothing_marks_the_edges(sides, precision, training):
    config, IP = dataclasses.replace(SMALL, precision=precision, sides=sides, width_g=8), []
    gan = SpatialGAN(config, CPU).train(training)
    for net, condition in zip(gan.G.levels, gan.G.conditions(spatialgan.latents(range(4), config))):
        parameters = coco_gan.cast(gan, dict(net.named_parameters()))
        IP.append(functional_call(net, parameters, (condition, *IP[-1:])))
    assert [tuple(patch.shape) for patch in IP] == [(4, 3, s, s) for s in config.s]
    for before, after in zip(IP, IP[1:]):
        assert torch.equal(middle(after, before.shape[2]), before) and after.abs().max() <= 1
        assert after[:, :, 0].any() and after[:, :, :, -1].any()  # the frame is not empty
    frame = functional_call(net, parameters, (condition, before[:, :, :0, :0]))
    assert (frame - frame[:, :, :1, :1]).abs().max() < 0.01  # without a context nothing marks the edges


@pytest.mark.parametrize("j", [0, 1, 2])
def test_a_latent_changes_its_level_and_later_ones_only(j):
    G, z = Generator(SMALL).eval(), spatialgan.latents(range(2), SMALL)
    other = z.clone()
    other[j] = -z[j]
    for i, (a, b) in enumerate(zip(make_images(G, z), make_images(G, other))):
        assert torch.equal(a, b) == (i < j)
    assert torch.equal(G.conditions(z)[0], z[0])
    for i, (a, b) in enumerate(zip(G.conditions(z), G.conditions(other))):
        assert torch.equal(a, b) == (i < j) and torch.equal(a[:, :4], z[i])
        assert i == 0 or torch.equal(a[:, 4:], b[:, 4:]) == (i < j)  # the LSTM's


def test_packs_are_neighbours_and_a_critic_sees_both():
    x, D = torch.rand(4, 3, 8, 8), Critic(SMALL, 8)
    score = D(middle(x, 8, pack=2))
    for k in (2, 3):
        other = x + 0.1 * (torch.arange(4) == k).view(-1, 1, 1, 1)
        assert (D(middle(other, 8, pack=2)) != score).tolist() == [False, True]


def test_real_images_of_a_level_are_the_middle():
    column = torch.arange(32).byte().expand(32, 32)
    images = torch.stack([column.mT, column, column], dim=2)[None]  # a pixel holds its row and its column
    x, *_ = spatialgan.draw_batch(SMALL, images, torch.arange(1), torch.Generator(), CPU)
    crop = ((middle(x, 16) + 1) * 127.5).round()[0]
    assert crop[0, :, 3].tolist() == crop[1, 5].tolist() == list(range(8, 24))


@pytest.mark.parametrize("step", [0, 2, JOINT])
def test_critics_see_each_scale_of_packs_that_are_real_or_generated(step, monkeypatch):
    gan, calls = SpatialGAN(SMALL, CPU), spy(monkeypatch)
    one_step(gan, step, x=torch.full((4, 3, 32, 32), 0.5))
    for i, side in enumerate(SMALL.s):
        made = [output for net, _, output in calls if net is gan.G.levels[i]]
        for j, D_j in enumerate(gan.D[i]):
            seen = [x for net, x, _ in calls if net is D_j]
            assert len(seen) == (3 if SMALL.phase(step) in (i, SMALL.N + 1) else 0)
            if seen:
                assert [len(x) for x in seen] == [4, 2, 2]  # both kinds, what lies between them, and G's step
                assert (seen[0][:2] == 0.5).all() and torch.equal(seen[0][2:], middle(made[0], side >> j, 2))
                assert torch.equal(seen[2], seen[0][2:]) and seen[1].shape == seen[2].shape
            made = [coco_gan.avg_pool(s) for s in made]


@pytest.mark.parametrize("step, learning", [(0, {0}), (2, {1}), (4, {2}), (JOINT, {0, 1, 2})])
def test_a_phase_changes_its_own_networks(step, learning):
    gan = SpatialGAN(SMALL, CPU)
    before = {name: t.clone() for name, t in gan.state_dict().items()}
    for k in range(2):  # the EMA of the LSTM follows one step later
        losses = one_step(gan, step + k)
    assert {i for i in range(3) if losses[1 + i]} == learning
    changed = [name for name, t in gan.state_dict().items() if not torch.equal(t, before[name])]
    own = tuple(f"{net}.{i}." for net in ("G.levels", "G_ema.levels", "D") for i in learning)
    own += ("G.noise.", "G_ema.noise.") * (1 in learning)
    assert all(name.startswith(own) for name in changed)
    weights = {name for name in before if name.startswith(own) and "weight" in name}
    assert all(name in changed or "attention" in name for name in weights)


def test_joint_gradients_of_the_last_level_reach_the_centre(monkeypatch):
    monkeypatch.setattr(spatialgan, "LAMBDA", (0, 0, 1))
    gan = SpatialGAN(SMALL, CPU)
    one_step(gan, JOINT)
    for part in (*gan.G.levels, gan.G.noise):
        assert max(p.grad.abs().max() for p in part.parameters()) > 0


@pytest.mark.parametrize("loss, step", [("wgan", 2), ("hinge", 2), ("hinge", JOINT)])
def test_losses_are_those_of_equations_4_and_5(loss, step, monkeypatch):
    gan, calls, found = SpatialGAN(dataclasses.replace(SMALL, loss=loss), CPU), spy(monkeypatch), []
    monkeypatch.setattr(coco_gan, "update", lambda optimizer, loss: found.append(loss.item()))
    monkeypatch.setattr(Critic, "forward", lambda D, x: 3 * x.flatten(1).mean(dim=1))
    x = torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)
    one_step(gan, step, x)
    of_d = of_g = 0
    for net, _, s in calls:
        for i in (i for i in range(3) if net is gan.G.levels[i]):
            a, b = (3 * middle(t, SMALL.s[i], 2).mean(dim=(1, 2, 3)) for t in (x, s))
            hinge = (1 - a).relu().mean() + (1 + b).relu().mean()
            of_d += 3 * (hinge if loss == "hinge" else b.mean() - a.mean())  # of three critics
            of_g -= 3 * ((1, 1.25, 2)[i] if step == JOINT else 1) * b.mean()
    if loss == "wgan":  # the gradient of three times the mean of n values has a norm of 3 / √n
        of_d += 10 * sum((3 / (6 * (16 >> j) ** 2) ** 0.5 - 1) ** 2 for j in range(3))
    assert found == [pytest.approx(of_d.item(), rel=1e-4), pytest.approx(of_g.item(), rel=1e-4)]


def test_a_phase_begins_with_new_adams_and_the_joint_one_halves_the_rates():
    gan = SpatialGAN(SMALL, CPU)
    for step, updates in ((0, 1), (1, 2), (2, 1), (JOINT, 1), (JOINT + 1, 2)):
        one_step(gan, step)
        for optimizer in (gan.opt_D, gan.opt_G):
            assert optimizer.param_groups[0]["lr"] == (0.005 if step >= JOINT else 0.01)
            assert max(state["step"].item() for state in optimizer.state.values()) == updates


def test_two_critic_steps_have_images_and_latents_of_their_own(monkeypatch):
    gan, calls = SpatialGAN(dataclasses.replace(SMALL, loss="hinge", d_steps=2), CPU), spy(monkeypatch)
    one_step(gan, 0)
    first, second, of_g = [x for net, x, _ in calls if net is gan.D[0][0]]
    assert not any(torch.equal(a, b) for a, b in zip(first, second)) and torch.equal(of_g, second[2:])


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])  # the phases of the steps are 0 0 1 1 2 2
def test_resumed_equals_undisturbed_bit_for_bit(stop):
    assert train("--run", "run", "--mirror", "--save-every", "1", "--keep", "9", steps=6, stage_steps=2) == 0
    last = torch.load(path := "run/checkpoint-000000006.pt")
    for old in coco_gan.checkpoints(Path("run"))[stop:]:
        old.unlink()
    assert spatialgan.main(["train", "--resume", "run", "--device", "cpu"]) == 0
    again = torch.load(path)
    assert torch.equal(last["rng"], again["rng"]) and last["tensors"].keys() == again["tensors"].keys()
    assert all(torch.equal(t, again["tensors"][name]) for name, t in last["tensors"].items())


def test_samples_are_what_their_flags_say():
    assert train(steps=2) == 0
    photograph, pictures = np.asarray(Image.open("photos/0.png")), []
    for words in ([], ["--growth"], ["--variants", "3"], ["--expand", "photos/0.png"]):
        assert spatialgan.main(["sample", "--seed", "5", "--count", "2", "--out", "x.png", *words]) == 0
        pictures.append(np.asarray(Image.open("x.png")))
    assert spatialgan.main(["sample", "--expand", "missing.png"]) == 2
    sheet, growth, variants, expand = pictures
    assert (growth[10:, :8] == sheet[:8]).all() and (growth[10:, 10:] == sheet[10:]).all()
    assert (growth[:2, :8] == 128).all()  # grey around the centre
    for left in (2, 12, 22):
        assert (variants[2:6, left : left + 4] == sheet[2:6, 2:6]).all()
        assert (expand[2:6, left : left + 4] == photograph[2:6, 2:6]).all()
    assert (variants[:, 10:18] != variants[:, 20:28]).any() and (expand[:, 10:18] != expand[:, 20:28]).any()


def test_one_side_trains_without_a_cascade_and_mistakes_are_one_line(capsys):
    assert train("--run", "run", sides="8", steps=2) == 0
    G = spatialgan.load(Path("run/checkpoint-000000002.pt"))
    assert len(G.levels) == 1 and G.noise is None
    for words, message in (
        ("train --graph", "error: --graph and torchrun are not for SpatialGAN"),
        ("train --resume", "error: runs/spatialgan is no checkpoint and no run folder"),
        ("sample --checkpoint run --variants 2", "error: --variants needs levels, and run/checkpoint"),
    ):
        assert spatialgan.main(words.split()) == 2 and message in capsys.readouterr().err
