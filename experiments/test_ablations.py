"""Test experiments/ablations.py, bench.py, plot.py and export.py."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import coco_gan
from coco_gan import ASSETS, PRESETS, Config, latents, to_uint8
from experiments import ablations, bench, export, plot

CPU = torch.device("cpu")
SMALL = Config(height=16, width=16, N=2, M=2, S=4, z_dim=4, width_g=2, width_d=2, batch_size=4, steps=2)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image)


# ---- Ablations ---------------------------------------------------------------------------------------------


def test_variants_differ_in_what_they_say():
    config = Config(**PRESETS["tiny"])
    changed = {name: ablations.configure(name, config) for name in ablations.VARIANTS}
    assert changed["coco-gan"] == config and changed["full-d"] == replace(config, N=4, M=4)
    assert changed["n4"] == replace(config, N=4, M=4, S=4) and changed["continuous"].continuous
    assert changed["m"] == replace(config, N=1, M=1, alpha_s=0.0) and changed["with-q"].guided
    assert changed["small-macro"].S == 2
    with pytest.raises(coco_gan.UserError, match="--variants full-g makes squares, not images of 32 x 96"):
        ablations.configure("full-g", Config(**PRESETS["panorama-tiny"]))


def test_a_full_generator_cuts_its_patches_out_of_one_image():
    torch.manual_seed(0)
    G, z = ablations.FullGenerator(SMALL).eval(), latents([0, 1], 4)
    i, j = torch.tensor([0, 3, 2]), torch.tensor([1, 0, 3])
    with torch.no_grad():
        images = G.image(z)
        patches = G(z[[0, 1, 1]], coco_gan.micro_coordinates(SMALL, i, j))
    for patch, b, top, left in zip(patches, (0, 1, 1), (0, 12, 8), (4, 0, 12)):
        torch.testing.assert_close(patch, images[b, :, top : top + 4, left : left + 4])


def test_multiple_generators_have_a_position_each():
    torch.manual_seed(0)
    G, z = ablations.MultipleGenerator(SMALL).eval(), latents([0, 1, 2], 4)
    i, j = torch.tensor([3, 0, 3]), torch.tensor([1, 2, 1])
    c_micro = coco_gan.micro_coordinates(SMALL, i, j)
    with torch.no_grad():
        patches = G(z, c_micro)
        for patch, part, b in zip(patches, (13, 2, 13), range(3)):
            torch.testing.assert_close(patch, G.parts[part](z[b : b + 1], c_micro[b : b + 1])[0])


def test_other_variants_have_their_networks():
    D = ablations.BlindDiscriminator(SMALL)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(D(x, torch.zeros(2, 2))[0], D(x, torch.ones(2, 2))[0])
    count = sum(
        isinstance(m, ablations.ConditionalBatchNorm) for m in ablations.TwoCBNGenerator(SMALL).modules()
    )
    assert count == 2 * len(coco_gan.Generator(SMALL).blocks)


def test_the_same_command_continues_and_a_variant_trains_as_train_does(here, capsys):
    words = "--json a.json --steps 2 --count 16 --device cpu --variants".split()
    assert ablations.main([*words, "coco-gan", "no-ema"]) == 0
    first = json.loads(Path("a.json").read_text())["results"]
    assert set(first) == {"coco-gan 0", "no-ema 0"} and first["no-ema 0"]["swd"] != first["coco-gan 0"]["swd"]
    assert picture("a-no-ema-0.png").shape == (3 * 34 + 32, 5 * 34 + 32, 3)
    assert ablations.main([*words, "coco-gan", "full-g"]) == 0
    second = json.loads(Path("a.json").read_text())["results"]
    assert second["coco-gan 0"] == first["coco-gan 0"] and "seam_ratio" not in second["full-g 0"]
    assert "| full-g | G makes full images | 1 | " in capsys.readouterr().out
    train = "train --preset tiny --steps 2 --run run --device cpu".split()
    assert coco_gan.main(train) == 0
    samples = to_uint8(coco_gan.full_image(coco_gan.load("run"), latents(range(24), 128)))
    assert np.array_equal(picture("a-coco-gan-0.png"), coco_gan.grid(samples))
    for change, message in (
        ("--steps 3", "--json a.json was made with steps 2, and this is 3"),
        ("--json run/config.json", "holds no results of this command"),
        ("--preset panorama-tiny", "--variants full-g makes squares"),
    ):
        assert ablations.main([*words, "full-g", *change.split()]) == 2
        assert message in capsys.readouterr().err


def test_the_table_of_the_shipped_results(capsys):
    assert ablations.main(["--json", str(ASSETS / "ablations.json"), "--table"]) == 0
    out = capsys.readouterr().out
    assert "| no-ema | " in out and out.count("\n| ") == 17


# ---- Benchmark ---------------------------------------------------------------------------------------------


def test_stages_on_a_cpu_and_what_is_written(here, capsys):
    words = "--batch-size 2 --steps 5 --device cpu --json b.json"
    assert bench.main(words.split()) == 0
    found = json.loads(Path("b.json").read_text())
    assert [row["stage"] for row in found["steps"]][0::2] == ["eager, float32", "the same, full images"]
    assert all(len(row["milliseconds"]) == 5 and min(row["milliseconds"]) > 0 for row in found["steps"])
    assert found["about"]["command"] == f"python -m experiments.bench {words}"
    assert found["sampling"][0]["images_per_second"] > 0
    assert bench.main(["--kernels", "--device", "cpu"]) == 2
    assert "--kernels needs a GPU" in capsys.readouterr().err
    assert bench.spread([*range(101)]) == (50, 10, 90)


def test_operations_are_counted_forward_and_backward():
    conv, x = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False), torch.randn(2, 3, 7, 4)
    with bench.Counter() as counter:
        conv(x).sum().backward()
    one = 2 * 2 * 5 * 7 * 4 * 27  # multiply and add, B, C, h, w, and 3 x 3 x 3 weights
    assert counter.total == 2 * one  # forward, and the gradient of the weights


def test_each_kernel_has_a_case():
    cases = [*bench.kernel_cases(torch.bfloat16, "meta")]
    assert {function.__name__ for function, *_ in cases} == {
        "conditional_batch_norm",
        "merge_patches",
        "crop_patches",
    }
    shape, moved = (512, 64, 32, 32), 512 * 64 * 32 * 32 * 2
    assert any(s == shape and m == (3 * moved, 5 * moved) for _, s, m, _, _ in cases)


# ---- Plots -------------------------------------------------------------------------------------------------


def write(run, name, *entries):
    Path(run).mkdir(exist_ok=True)
    Path(run, name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_logs_are_read_by_step(here):
    again = dict(step=1, L_W=5.0), dict(step=2, L_W=4.0), dict(step=1, L_W=3.0, images=9)
    write("run", "log.jsonl", *again)
    write("run", "evaluation.jsonl", dict(step=2, swd=20.0))
    with open("run/log.jsonl", "a") as file:
        file.write('{"step": 3, "L_')  # cut short by a kill
    assert plot.read_log("run") == [dict(step=1, L_W=3.0), dict(step=2, L_W=4.0, swd=20.0)]


def test_plots_and_their_mistakes(here, capsys):
    write("empty", "log.jsonl")
    write("broken", "log.jsonl", dict(step=1, L_W="much"))
    write("nan", "log.jsonl", dict(step=1, L_W=float("nan")))
    for words, message in (
        ("nowhere", "nowhere has no log of a run"),
        ("empty", "empty has no log of a run"),
        ("broken", "broken/log.jsonl, line 1 is broken"),
        ("nan", "nan/log.jsonl, line 1 is broken"),
    ):
        assert plot.main(words.split()) == 2 and message in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    write("a", "log.jsonl", *(dict(step=k, L_W=float(k), L_S_real=1.0, L_S_generated=2.0) for k in (1, 2)))
    write("b", "log.jsonl", *(dict(step=k, L_W=10.0**k, margin_seam=2.0) for k in (1, 2, 3)))
    figure = plot.draw({run: plot.read_log(run) for run in ("a", "b")})
    found = [ax.get_title() for ax in figure.axes]
    assert found[:2] == ["Wasserstein estimate $L_W$", "spatial loss $L_S$ (dashed: generated)"]
    assert found[2] == "seams of the margin"
    assert figure.axes[0].get_yscale() == "log" and len(figure.axes[1].lines) == 4
    assert plot.main(["a", "b"]) == 0 and picture("a/indicators.png").shape[1] > 1000


# ---- Export ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["pt", "pt2", "npz", "onnx"])
def test_exports_make_the_same_patches(ending, here):
    if ending == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)
    source, out = str(ASSETS / "toy_landscapes.pt"), f"a.{ending}"
    assert export.main(["--checkpoint", source, "--out", out]) == 0
    G = coco_gan.load(source)
    z, i = latents(range(5), G.config.z_dim), torch.arange(5)
    c_micro = coco_gan.micro_coordinates(G.config, i % 2, i)
    with torch.no_grad():
        expected = G(z, c_micro)
        if ending == "pt":
            found = coco_gan.load(out)(z, c_micro)
        elif ending == "pt2":
            found = torch.export.load(out).module()(z, c_micro)
        elif ending == "npz":
            arrays = dict(np.load(out))
            assert json.loads(str(arrays.pop("config")))["S"] == G.config.S
            other = coco_gan.Generator(G.config).eval()
            result = other.load_state_dict({k: torch.from_numpy(v) for k, v in arrays.items()}, strict=False)
            assert all(name.endswith(".v") for name in result.missing_keys)
            found = other(z, c_micro)
        else:
            import onnxruntime

            session = onnxruntime.InferenceSession(out)
            names = [argument.name for argument in session.get_inputs()]
            (array,) = session.run(None, dict(zip(names, (z.numpy(), c_micro.numpy()))))
            found = torch.from_numpy(array)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_export_names_its_mistakes(here, capsys, monkeypatch):
    assert export.main(["--out", "a.txt"]) == 2
    assert "--out a.txt has no known ending; give .pt, .pt2, .npz, .onnx" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert export.main(["--out", "a.onnx"]) == 2
    assert "takes two more packages; get them by: pip install onnx onnxscript" in capsys.readouterr().err
