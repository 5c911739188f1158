"""Test experiments/ablations.py on images of 16 pixels: python -m pytest experiments/test_ablations.py"""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from coco_gan import (
    PRESETS,
    Config,
    Discriminator,
    Generator,
    GeneratorBlock,
    draw_batch,
    full_image,
    generate_macro,
    latents,
    micro_coordinates,
    normalised_for_good,
    spectral_norm,
    to_uint8,
    train_step,
)
from experiments import ablations
from experiments.ablations import (
    VARIANTS,
    BlindDiscriminator,
    MultipleGenerator,
    TwoCBNBlock,
    TwoCBNGenerator,
    WholeGenerator,
    configure,
    start,
)
from experiments.metrics import sliced_wasserstein

SMALL = dict(height=16, width=16, S=4, z_dim=4, width_g=2, width_d=2, batch_size=4, precision="fp32")
CONFIG = Config(**{**SMALL, "lambda_gp": 1.0, "alpha_s": 1.0, "lr_g": 1e-3, "lr_d": 2e-3})
CPU = torch.device("cpu")


def some_images(count=8, side=16):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def some_batch(config, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return draw_batch(config, some_images(side=config.height), torch.arange(8), rng, CPU)


# ----------------------------------------------------------------------------------------------------------
# What stands in the place of G or D


def test_a_whole_generator_gives_the_patches_of_its_image():
    """At asymmetric places, several of one latent and several latents in one call; rows are not columns."""
    torch.manual_seed(0)
    G = WholeGenerator(CONFIG).eval()
    z = latents([1, 1, 2, 1], 4)
    i, j = torch.tensor([0, 1, 3, 2]), torch.tensor([3, 0, 1, 1])
    images = G.image(z)
    assert images.shape == (4, 3, 16, 16)
    patches = G(z, micro_coordinates(CONFIG, i, j))
    for n in range(4):
        cut = images[n, :, 4 * i[n] : 4 * i[n] + 4, 4 * j[n] : 4 * j[n] + 4]
        torch.testing.assert_close(patches[n], cut, rtol=0, atol=1e-5)
    torch.testing.assert_close(full_image(G, z), images, rtol=0, atol=1e-5)
    assert G.net.config.S == 16 and len(G.net.blocks) == 3


@pytest.mark.parametrize("name", ["full-g", "m", "m-macro"])
def test_macro_patches_of_a_whole_generator_lie_where_the_batch_says(name):
    """s' is the image of its z, cut where c' is; one image for each z, normalised over all of them."""
    config = configure(name, CONFIG)
    state, batch = start(VARIANTS[name], config, CPU), some_batch(config)
    G_sn = spectral_norm(state.G, iterate=False)
    made = []
    state.G.net.register_forward_hook(lambda net, x, y: made.append(len(y)))
    s_macro = generate_macro(state, G_sn, batch)
    assert made == [4]
    inner = {key.removeprefix("net."): p for key, p in G_sn.items()}
    images = torch.func.functional_call(state.G.net, inner, (batch.z, torch.zeros(4, 2)))
    rows, columns = ((batch.c_macro.T + 1) / 2 * (torch.tensor(config.places) - 1)[:, None] * config.S).long()
    side = config.N * config.S
    for b in range(4):
        cut = images[b, :, rows[b] : rows[b] + side, columns[b] : columns[b] + side]
        torch.testing.assert_close(s_macro[b], cut, rtol=0, atol=1e-5)
    assert len(set(zip(rows.tolist(), columns.tolist()))) > 1


def test_a_whole_generator_on_a_cylinder_wraps_round():
    config = replace(CONFIG, topology="cylinder")
    G = WholeGenerator(config).eval()
    z, i, j = latents([3, 3], 4), torch.tensor([2, 2]), torch.tensor([3, 4])
    first, second = G(z, micro_coordinates(config, i, j))
    image = G.image(z)[0]
    torch.testing.assert_close(first, image[:, 8:12, 12:], rtol=0, atol=1e-5)
    torch.testing.assert_close(second, image[:, 8:12, :4], rtol=0, atol=1e-5)


def test_only_the_generators_whose_position_is_drawn_are_trained():
    state = start(VARIANTS["multiple-g"], CONFIG, CPU)
    batch = some_batch(replace(CONFIG, batch_size=2))
    seen = torch.cdist(batch.c_micro, state.G.places).argmin(1).unique().tolist()
    assert 0 < len(seen) < 16
    before = copy.deepcopy(state.G)
    train_step(state, batch)
    for number, (old, new) in enumerate(zip(before.parts, state.G.parts)):
        changed = [not torch.equal(p, q) for p, q in zip(old.parameters(), new.parameters())]
        assert any(changed) == (number in seen)


def test_multiple_generators_each_make_their_own_position():
    torch.manual_seed(0)
    G = MultipleGenerator(CONFIG).eval()
    z = latents(range(5), 4)
    i, j = torch.tensor([3, 0, 3, 1, 0]), torch.tensor([1, 2, 1, 3, 0])
    c = micro_coordinates(CONFIG, i, j)
    with torch.inference_mode():
        patches = G(z, c)
        for n in range(5):
            alone = G.parts[4 * i[n] + j[n]](z[n : n + 1], c[n : n + 1])[0]
            torch.testing.assert_close(patches[n], alone, rtol=0, atol=1e-5)
    assert not torch.equal(G.parts[0].linear.weight, G.parts[1].linear.weight)
    assert sum(p.numel() for p in G.parameters()) == 16 * sum(
        p.numel() for p in Generator(CONFIG).parameters()
    )


def test_two_cbns_are_one_where_the_first_does_nothing():
    torch.manual_seed(0)
    block, x, condition = TwoCBNBlock(3, 5, 6, True), torch.randn(2, 3, 4, 4), torch.randn(2, 6)
    block.eval()
    one = GeneratorBlock(3, 5, 6, True).eval()
    one.load_state_dict(block.state_dict(), strict=False)
    assert not torch.allclose(block(x, condition), one(x, condition), atol=1e-3)
    block.first_cbn.weight.data.zero_()  # γ = 1, β = 0, and statistics that change nothing
    block.first_cbn.norm.running_var.fill_(1 - block.first_cbn.norm.eps)
    torch.testing.assert_close(block(x, condition), one(x, condition), rtol=0, atol=1e-5)
    G = TwoCBNGenerator(CONFIG)
    sizes = [(b.first_cbn.norm.num_features, b.cbn.norm.num_features, b.upscale) for b in G.blocks]
    ordinary = [(b.conv1.in_channels, b.cbn.norm.num_features, b.upscale) for b in Generator(CONFIG).blocks]
    assert sizes == ordinary and all(hasattr(b.conv1, "v") for b in G.blocks)


def test_a_blind_discriminator_scores_without_coordinates():
    torch.manual_seed(0)
    D, x = BlindDiscriminator(CONFIG), torch.randn(2, 3, 8, 8)
    score, h = D(x, torch.randn(2, 2))
    assert torch.equal(score, D(x, torch.randn(2, 2))[0])
    torch.testing.assert_close(score, D.linear(h).squeeze(1))
    assert D.state_dict().keys() == {k for k in Discriminator(CONFIG).state_dict() if "projection" not in k}


# ----------------------------------------------------------------------------------------------------------
# The variants


def test_each_variant_changes_its_own_thing():
    """Fields other than the preset's, the classes of G and D, and the sides of what D sees."""
    tiny = Config(**PRESETS["tiny"])
    base = dict(G=Generator, D=Discriminator, macro=16)
    expected = {
        "coco-gan": {},
        "no-average": {},
        "continuous": dict(continuous=True),
        "full-d": dict(N=4, M=4, macro=32),
        "full-g": dict(G=WholeGenerator),
        "multiple-g": dict(G=MultipleGenerator),
        "with-q": dict(guided=True),
        "n4": dict(N=4, M=4, S=4),
        "n8": dict(N=8, M=8, S=2),
        "n16": dict(N=16, M=16, S=1),
        "m": dict(N=1, M=1, alpha_s=0.0, G=WholeGenerator, D=BlindDiscriminator, macro=8),
        "m-projection": dict(N=1, M=1, alpha_s=0.0, G=WholeGenerator, macro=8),
        "m-macro": dict(alpha_s=0.0, G=WholeGenerator),
        "small-macro": dict(S=2, macro=4),
        "two-cbn": dict(G=TwoCBNGenerator),
    }
    assert expected.keys() == VARIANTS.keys()
    for name, variant in VARIANTS.items():
        config, due = configure(name, tiny), {**base, **expected[name]}
        found = dict(G=variant.G, D=variant.D, macro=config.N * config.S)
        assert found == {key: due.pop(key) for key in found}, name
        assert config == replace(tiny, **due), name
        assert config.M * config.S == config.N * config.S


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("n16", "no-average")])
def test_a_step_trains_g_and_d_and_its_average(name):
    """And Adam has exactly the parameters of the networks that take part."""
    config = configure(name, CONFIG)
    state = start(VARIANTS[name], config, CPU)
    assert isinstance(state.G, VARIANTS[name].G) and isinstance(state.D, VARIANTS[name].D)
    for optimizer, nets in ((state.opt_G, [state.G]), (state.opt_D, [state.D, state.A])):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for net in nets for p in net.parameters()}
        rate = config.lr_g if optimizer is state.opt_G else config.lr_d
        assert all(group["lr"] == rate and group["betas"] == (0.0, 0.999) for group in optimizer.param_groups)
    expected = normalised_for_good(copy.deepcopy(state.G)).state_dict()
    assert all(torch.equal(p, expected[key]) for key, p in state.G_average.state_dict().items())
    before = {net: copy.deepcopy(getattr(state, net).state_dict()) for net in ("G", "D", "G_average")}
    losses = train_step(state, some_batch(config))
    assert losses.isfinite().all() and len(losses) == (7 if name == "with-q" else 6)
    for net, old in before.items():
        new = getattr(state, net).state_dict()
        weights = [key for key in new if "conv" in key and key.endswith("weight")]
        still = [key for key in weights if torch.equal(old[key], new[key])]
        assert len(still) < len(weights) if name == "multiple-g" else not still, (net, still)


def test_images_are_assembled_or_of_one_pass():
    z = latents(range(3), 4)
    for name in ("coco-gan", "full-d", "multiple-g", "full-g"):
        G = start(VARIANTS[name], configure(name, CONFIG), CPU).G_average
        calls = []
        (G.net if name == "full-g" else G).register_forward_hook(lambda net, x, y: calls.append(len(y)))
        images = ablations.draw(G, z)
        assert calls == ([3] if name == "full-g" else [12] * 4), name
        np.testing.assert_allclose(images, to_uint8(full_image(G, z)), atol=1)


def test_the_average_changes_nothing_in_training():
    """So no-average needs no training of its own."""
    states = [
        start(VARIANTS["coco-gan"], replace(CONFIG, average=average, steps=5), CPU)
        for average in (0.0, 0.999)
    ]
    images = some_images()
    for state in states:
        ablations.train(state, images, images.numpy(), torch.arange(8))
    for net in ("G", "D", "A"):
        one, other = (getattr(state, net).state_dict() for state in states)
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert not torch.equal(states[0].G_average.conv.weight, states[1].G_average.conv.weight)


# ----------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def tiny(monkeypatch_module, tmp_path_factory):
    """A folder to work in, with --preset test of 16-pixel images, and 30 random photographs."""
    here = tmp_path_factory.mktemp("ablations")
    monkeypatch_module.setitem(PRESETS, "test", {**SMALL, "precision": "auto"})
    (here / "photos").mkdir()
    for number, image in enumerate(some_images(30).numpy()):
        Image.fromarray(image).save(here / "photos" / f"{number:02d}.png")
    return here


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def run(here, *more, file="out.json", variants="coco-gan,no-average,full-g", steps=2):
    command = ["--json", str(here / file), "--steps", str(steps), "--variants", variants, "--preset", "test"]
    command += ["--data", str(here / "photos"), "--cache", str(here / "cache"), "--device", "cpu"]
    return ablations.main([*command, "--count", "12", "--precision", "fp32", *more])


@pytest.fixture
def count_training(monkeypatch):
    trained, train = [], ablations.train

    def counted(state, *more):
        trained.append((type(state.G).__name__, state.config.seed))
        return train(state, *more)

    monkeypatch.setattr(ablations, "train", counted)
    return trained


@pytest.fixture(scope="module")
def done(tiny):
    assert run(tiny, "--holdout", "12") == 0
    return json.loads((tiny / "out.json").read_text())


def test_the_file_has_each_pair_and_the_pictures(tiny, done):
    assert done["results"].keys() == {"coco-gan 0", "no-average 0", "full-g 0"}
    assert done["settings"]["count"] == 12 and done["settings"]["holdout"] == 12
    results = done["results"]
    assert results["coco-gan 0"]["swd"] != results["no-average 0"]["swd"]
    assert results["coco-gan 0"]["ms"] == results["no-average 0"]["ms"] > 0
    assert "seam_ratio" in results["coco-gan 0"] and "seam_ratio" not in results["full-g 0"]
    config = configure("full-g", Config(**SMALL))
    counts = [sum(p.numel() for p in net(config).parameters()) for net in (WholeGenerator, Discriminator)]
    assert [results["full-g 0"][f"parameters_{net}"] for net in "GD"] == counts
    for name in ("coco-gan", "no-average", "full-g"):
        with Image.open(tiny / f"out-{name}-0.png") as picture:
            assert picture.size == (6 * 18 - 2, 4 * 18 - 2)


def test_figures_are_those_of_the_images_and_the_photographs(tiny, done):
    """The same training by hand; real images are those held out, latents those of `in_training`."""
    stored = ablations.load_images(str(tiny / "photos"), 16, 16, cache=tiny / "cache")
    train_on, held_out = ablations.split(30, 12)
    config = Config(**SMALL, data=str(tiny / "photos"), steps=2, holdout=12)
    state = ablations.new_state(config, CPU)
    for _ in range(2):
        train_step(state, draw_batch(config, torch.from_numpy(stored.copy()), train_on, state.rng, CPU))
    fake = to_uint8(full_image(state.G_average, latents(range(10**6, 10**6 + 12), 4)))
    swd = sliced_wasserstein(stored[held_out.numpy()], fake)["mean"]
    assert done["results"]["coco-gan 0"]["swd"] == pytest.approx(swd)
    others = train_on[ablations.split(18, 12)[1]]
    floor = sliced_wasserstein(stored[held_out.numpy()], stored[others.numpy()])["mean"]
    assert done["floor"]["swd"] == pytest.approx(floor)
    fake = to_uint8(full_image(normalised_for_good(state.G.eval()), latents(range(10**6, 10**6 + 12), 4)))
    swd = sliced_wasserstein(stored[held_out.numpy()], fake)["mean"]
    assert done["results"]["no-average 0"]["swd"] == pytest.approx(swd)


def test_a_second_start_does_only_what_is_missing(tiny, done, count_training, capsys):
    assert run(tiny, "--holdout", "12") == 0 and count_training == []
    assert run(tiny, "--holdout", "12", "--seeds", "2", variants="full-g,coco-gan,two-cbn") == 0
    later = [("TwoCBNGenerator", 0), ("WholeGenerator", 1), ("Generator", 1), ("TwoCBNGenerator", 1)]
    assert count_training == later
    now = json.loads((tiny / "out.json").read_text())
    assert all(now["results"][key] == result for key, result in done["results"].items())
    assert now["results"].keys() - done["results"].keys() == {
        "two-cbn 0",
        "two-cbn 1",
        "full-g 1",
        "coco-gan 1",
    }
    assert now["results"]["coco-gan 1"]["swd"] != now["results"]["coco-gan 0"]["swd"]
    assert not list(tiny.glob(".*"))  # no temporary files


def test_the_table_is_markdown(capsys):
    settings = dict(steps=5, preset="test", data="d", device="cpu", precision="fp32", count=7, holdout=0)
    about = dict(parameters_G=1234, parameters_D=56)
    results = {
        "coco-gan 0": dict(swd=10.0, seam_ratio=1.5, ms=4.0, **about),
        "coco-gan 1": dict(swd=12.0, seam_ratio=1.0, ms=8.0, **about),
        "full-g 0": dict(swd=9.0, ms=5.0, **about),
        "full-g 1": dict(failed="L_W is nan at step 3"),
        "m 0": dict(failed="L_G is inf at step 4"),
    }
    floor = dict(swd=3.0, seam_ratio=1.01)
    lines = ablations.table(dict(settings=settings, floor=floor, results=results)).splitlines()
    assert lines[2:6] == [
        "| floor | more real images | – | 3.00 | 1.01 | – | – | – | – |",
        "| coco-gan | COCO-GAN as the preset is | 2 | 11.00 (10.00 to 12.00) | 1.25 (1.00 to 1.50)"
        " | 1,234 | 56 | 6.0 | 4.87 |",
        "| full-g | G makes whole images; **1 failed: L_W is nan at step 3** | 2 | 9.00 | –"
        " | 1,234 | 56 | 5.0 | 6.12 |",
        "| m | M: whole images, D of a micro patch, no coordinates; **1 failed: L_G is inf at step 4** | 1"
        " | – | – | – | – | – | 72.82 |",
    ]
    assert len({line.count("|") for line in lines[:6]}) == 1 and "that training saw" in lines[-1]


def test_a_number_that_is_not_finite_is_a_result(tiny, monkeypatch, capsys):
    """And the next variants are trained all the same."""
    step = ablations.train_step

    def broken(state, batch):
        losses = step(state, batch)
        return losses * (float("nan") if state.config.guided and state.step == 2 else 1)

    monkeypatch.setattr(ablations, "train_step", broken)
    assert run(tiny, file="nan.json", variants="with-q,continuous", steps=3) == 0
    results = json.loads((tiny / "nan.json").read_text())["results"]
    assert results["with-q 0"] == {"failed": "L_W is nan at step 2"} and results["continuous 0"]["swd"] > 0
    assert "L_W is nan at step 2" in capsys.readouterr().out and not (tiny / "nan-with-q-0.png").exists()


def test_images_without_contrast_are_a_result(tiny, monkeypatch):
    monkeypatch.setattr(ablations, "draw", lambda G, z: np.zeros((len(z), 16, 16, 3), np.uint8))
    assert run(tiny, file="grey.json", variants="coco-gan") == 0
    failed = json.loads((tiny / "grey.json").read_text())["results"]["coco-gan 0"]["failed"]
    assert "one value" in failed


def test_ctrl_c_loses_the_pair_under_way_only(tiny, monkeypatch, count_training, capsys):
    counted = ablations.train

    def stopped(state, *more):
        if state.config.continuous:
            raise KeyboardInterrupt
        return counted(state, *more)

    with monkeypatch.context() as patch:
        patch.setattr(ablations, "train", stopped)
        assert run(tiny, file="stop.json", variants="coco-gan,continuous") == 130
    assert "the same command" in capsys.readouterr().out
    assert json.loads((tiny / "stop.json").read_text())["results"].keys() == {"coco-gan 0"}
    assert run(tiny, file="stop.json", variants="coco-gan,continuous") == 0
    assert count_training == [("Generator", 0)] * 2


def refusal(capsys, code):
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


@pytest.mark.parametrize(
    "more, named",
    [
        (["--steps", "3"], "steps 2, and this is steps 3"),
        (["--count", "11"], "count 12, and this is count 11"),
        (["--holdout", "11", "--count", "11"], "count 12"),
        (["--precision", "bf16"], "precision fp32, and this is precision bf16"),
        (["--preset", "other"], "preset test, and this is preset other"),
    ],
)
def test_results_of_other_settings_are_refused(tiny, done, capsys, monkeypatch, more, named):
    monkeypatch.setitem(PRESETS, "other", PRESETS["test"])
    assert named in refusal(capsys, run(tiny, "--holdout", "12", *more))


def test_results_of_other_photographs_are_refused(tiny, done, capsys, monkeypatch):
    assert "data " in refusal(capsys, run(tiny, "--holdout", "12", "--data", f"{tiny}/photos/"))
    monkeypatch.setattr(ablations, "fingerprint_of", lambda images: "others")
    assert "images " in refusal(capsys, run(tiny, "--holdout", "12"))


def test_mistakes_are_one_line(tiny, done, capsys, monkeypatch):
    assert "did you mean full-g?" in refusal(capsys, run(tiny, variants="coco-gan,ful-g"))
    assert "--S 0" in refusal(capsys, run(tiny, variants="n16"))
    assert "did you mean test?" in refusal(capsys, run(tiny, "--preset", "tst"))
    assert "--count 1 " in refusal(capsys, run(tiny, "--count", "1"))
    assert "folder is missing" in refusal(capsys, run(tiny, file="none/out.json"))
    (tiny / "folder.json").mkdir()
    assert "it is a folder" in refusal(capsys, run(tiny, file="folder.json"))
    for text in ("{", "[]", '{"settings": {}, "results": {}}', '{"settings": 1, "floor": {}, "results": {}}'):
        (tiny / "broken.json").write_text(text)
        assert "no results of this command" in refusal(capsys, run(tiny, file="broken.json"))
        assert (tiny / "broken.json").read_text() == text
    assert "too few" in refusal(capsys, run(tiny, "--holdout", "29", file="few.json"))
    assert "does not exist" in refusal(capsys, ablations.main(["--json", "none.json", "--table"]))
    assert "--steps" in refusal(capsys, ablations.main(["--json", "none.json", "--steps", "0"]))
    assert "--json" in refusal(capsys, ablations.main([]))
    monkeypatch.setitem(PRESETS, "wide", {**SMALL, "width": 32})
    assert "16 x 32" in refusal(capsys, run(tiny, "--preset", "wide", file="wide.json"))


def test_the_table_alone_asks_for_nothing_else(tiny, done, capsys, count_training):
    assert ablations.main(["--json", str(tiny / "out.json"), "--table"]) == 0
    assert "| full-g |" in capsys.readouterr().out and count_training == []


def test_variants_that_a_preset_allows_not_are_left_out_of_all(tiny, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "VARIANTS", {name: VARIANTS[name] for name in ("coco-gan", "n16")})
    assert run(tiny, file="all.json", variants="", steps=1) == 0
    assert json.loads((tiny / "all.json").read_text())["results"].keys() == {"coco-gan 0"}
    assert "left out: --variants n16" in capsys.readouterr().out
