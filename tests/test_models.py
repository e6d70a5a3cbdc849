"""Tests of MyModels.py: python -m pytest tests/test_models.py"""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, only_line
from torch import nn

from MyModels import MODELS, Normalize, SkipCNN, count_parameters, layer_table


@pytest.mark.parametrize("size", [28, 64])
@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_gradients(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # those that start at zero pass no gradient on
            nn.init.ones_(module.weight)
    images = torch.rand(4, 3, size, size, requires_grad=True)
    logits = model(images)
    assert logits.shape == (4, 9) and logits.dtype == torch.float32
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    for where, gradient in [("images", images.grad)] + [
        (where, p.grad) for where, p in model.named_parameters()
    ]:
        assert gradient is not None and gradient.isfinite().all(), where
        assert gradient.abs().max() > 0, where


@pytest.mark.parametrize("size", [128, 224])
@pytest.mark.parametrize("name", MODELS)
def test_larger_images(name: str, size: int) -> None:
    with torch.inference_mode():
        logits = MODELS[name]().eval()(torch.rand(1, 3, size, size))
    assert logits.shape == (1, 9) and logits.isfinite().all()


def test_the_default_is_small_and_the_baseline_is_resnet18() -> None:
    assert count_parameters(SkipCNN()) <= 1_000_000
    # torchvision's 11,689,512, less 1000 classes' head and 7x7 stem, plus 9 classes' and 3x3.
    expected = 11_689_512 - 513_000 + 9 * 513 - 3 * 64 * (49 - 9)
    assert count_parameters(MODELS["resnet18"]()) == expected


def test_the_parts_that_the_homework_asks_for() -> None:
    model = SkipCNN()
    children = dict(model.named_children())
    stages = ["stage1", "stage2", "stage3"]
    assert [n for n in children if n in ("stem", *stages, "head")] == ["stem", *stages, "head"]
    pooled = [
        n for n, m in children.items() if any(isinstance(x, nn.MaxPool2d) for x in m.modules())
    ]
    assert pooled == ["stem", "pool1", "pool2"]
    for name in ("stem", *stages):
        kinds = [type(m) for m in children[name].modules()]
        assert nn.Conv2d in kinds and nn.BatchNorm2d in kinds, name
    head = list(children["head"].modules())
    assert sum(isinstance(m, nn.Linear) for m in head) >= 2
    assert any(isinstance(m, nn.Dropout) for m in head)


def test_each_stage_has_a_skip_path_around_its_3x3_convolutions() -> None:
    torch.manual_seed(0)
    stage = SkipCNN().stage2.eval()
    convolutions = [m for m in stage.modules() if isinstance(m, nn.Conv2d)]
    x = torch.rand(1, convolutions[0].in_channels, 14, 14)
    with torch.no_grad():
        for convolution in convolutions:
            if convolution.kernel_size == (3, 3):
                convolution.weight.zero_()
        out = stage(x)
    assert out.shape[2:] == (14, 14)
    assert out.abs().max() > 0  # what is left came along the skip path


def test_overfits_one_batch() -> None:
    torch.manual_seed(0)
    model = SkipCNN()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images, labels = torch.rand(18, 3, 28, 28), torch.arange(18) % 9
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.5 and losses[-1] < 0.05, losses


def test_normalisation_is_right_and_travels_with_the_weights() -> None:
    x = torch.tensor([[0.2, 0.5, 0.9], [0.4, 0.4, 0.4]])[:, :, None, None]
    out = Normalize((0.2, 0.3, 0.4), (0.1, 0.2, 0.5))(x)[:, :, 0, 0]
    assert torch.allclose(out, torch.tensor([[0.0, 1.0, 1.0], [2.0, 0.5, 0.0]]), atol=1e-6)

    torch.manual_seed(0)
    trained = SkipCNN(mean=(0.7, 0.5, 0.6), std=(0.1, 0.2, 0.15)).eval()
    fresh = SkipCNN().eval()
    images = torch.rand(2, 3, 28, 28)
    fresh.load_state_dict(trained.state_dict())
    assert fresh.normalize.mean.flatten().tolist() == pytest.approx([0.7, 0.5, 0.6])
    assert torch.equal(fresh(images), trained(images))
    assert not {"mean", "std"} & {n.split(".")[-1] for n, _ in trained.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_layer_table_is_that_of_the_live_model(name: str) -> None:
    model = MODELS[name]().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = layer_table(model, 64)
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    assert sum(row[4] for row in rows) == sum(p.numel() for p in model.parameters())
    modules = dict(model.named_modules())
    assert {row[0] for row in rows} == {n for n, m in modules.items() if not list(m.children())}
    for layer, kind, kernel, shape, parameters in rows:
        module = modules[layer]
        assert kind == type(module).__name__
        assert parameters == sum(p.numel() for p in module.parameters())
        if isinstance(module, nn.Conv2d):
            assert kernel == "x".join(map(str, module.kernel_size))
            assert shape.split(" x ")[0] == str(module.out_channels)
    assert rows[-1][3] == "9"
    first = next(row for row in rows if row[1] == "Conv2d")
    assert first[2] == "3x3" and first[3].endswith("64 x 64")  # full resolution in the stem


def test_the_resolution_is_halved_before_each_stage() -> None:
    sides = {row[0].split(".")[0]: row[3].split(" x ")[-1] for row in layer_table(SkipCNN(), 64)}
    assert [sides[f"stage{i}"] for i in (1, 2, 3)] == ["32", "16", "8"]


@pytest.mark.parametrize("size", ["7", "1000000", "many"])
def test_a_size_that_is_none_is_refused_in_one_line(size: str) -> None:
    command = [sys.executable, "MyModels.py", "--size", size]
    process = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and "--size" in only_line(process.stderr)


def test_nobody_reads_the_table() -> None:
    command = [sys.executable, "MyModels.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 141)


def test_a_constant_colour_channel_gives_finite_values() -> None:
    model = SkipCNN(mean=(0.5, 0.5, 0.5), std=(0.2, 0.0, 0.2)).eval()
    assert model(torch.full((1, 3, 28, 28), 0.5)).isfinite().all()
