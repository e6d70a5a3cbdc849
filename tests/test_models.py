"""Tests of MyModels.py: python -m pytest tests/test_models.py"""

import pytest
import torch
from torch import nn

from MyModels import MODELS, Normalize, SkipCNN, count_parameters, layer_table, layer_texts


@pytest.mark.parametrize("size", [28, 64])
@pytest.mark.parametrize("name", MODELS)
def test_shapes_gradients_and_the_layer_for_gradcam(name, size):
    torch.manual_seed(0)
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # one that starts at zero passes no gradient on
    large = []  # the parts, in the order of execution, that have 7 x 7 positions or more

    def record(part, _inputs, output):
        if output.ndim == 4 and output.shape[-1] >= 7:
            large.append(part)

    for part in getattr(model, "net", model).children():
        part.register_forward_hook(record)
    logits = model(torch.rand(3, 3, size, size))
    assert logits.shape == (3, 9)
    assert model.gradcam_layer(size) is large[-1]
    nn.functional.cross_entropy(logits, torch.arange(3)).backward()
    for where, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), where
        assert parameter.grad.abs().max() > 0, where


def test_the_parts_that_the_homework_asks_for():
    model = SkipCNN()
    kinds = {}
    for name, part in model.named_children():
        kinds[name] = [type(module) for module in part.modules()]
    for name in ("stem", "stage1", "stage2", "stage3"):
        assert {nn.Conv2d, nn.BatchNorm2d} <= set(kinds[name]), name
    for name in ("stem", "pool1", "pool2"):
        assert nn.MaxPool2d in kinds[name], name
    assert kinds["head"].count(nn.Linear) >= 2
    assert count_parameters(model) <= 1_000_000


def test_a_stage_starts_as_its_skip_connection():
    stage = SkipCNN().stage2.eval()
    x = torch.rand(1, 48, 14, 14)
    out = stage(x)
    assert torch.equal(out, stage.skip(x).relu())
    assert out.abs().max() > 0


def test_normalize_subtracts_the_mean_and_divides_by_the_deviation():
    pixels = torch.tensor([[0.2, 0.5, 0.9], [0.4, 0.4, 0.4]])
    normalize = Normalize((0.2, 0.3, 0.4), (0.1, 0.2, 0.0))  # a constant channel counts as 1 / 255
    out = normalize(pixels[:, :, None, None])[:, :, 0, 0]
    assert torch.allclose(out, torch.tensor([[0.0, 1.0, 127.5], [2.0, 0.5, 0.0]]), atol=1e-4)


def test_normalisation_and_temperature_travel_with_the_weights():
    images = torch.rand(2, 3, 28, 28)
    trained = SkipCNN((0.7, 0.5, 0.6), (0.1, 0.2, 0.15)).eval()
    logits = trained(images)
    trained.temperature.fill_(2)
    assert torch.equal(trained(images), logits / 2)
    fresh = SkipCNN().eval()
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(images), logits / 2)


@pytest.mark.parametrize("name", MODELS)
def test_layer_table_is_that_of_the_live_model(name):
    model = MODELS[name]().train()
    rows = layer_table(model, 64)
    assert model.training
    modules = dict(model.named_modules())
    assert {row[0] for row in rows} == {n for n, m in modules.items() if not list(m.children())}
    for layer, kind, kernel, shape, parameters in rows:
        module = modules[layer]
        assert (kind, parameters) == (type(module).__name__, count_parameters(module))
        if isinstance(module, nn.Conv2d):
            assert kernel == "x".join(map(str, module.kernel_size))
            assert shape.startswith(f"{module.out_channels} x ")
    assert rows[1][3].endswith(" x 64 x 64")  # the first convolution works at full resolution
    texts = layer_texts(model, 64)
    assert len(texts) == len(rows) + 2  # the header and the total
    assert texts[-1][-1] == f"{count_parameters(model):,}"
