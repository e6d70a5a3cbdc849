"""Tests of MyModels.py: python -m pytest tests/test_models.py"""

import pytest
import torch
from conftest import differences, only_line
from torch import nn

from MyModels import MODELS, Normalize, SkipCNN, count_parameters, layer_table, main


@pytest.mark.parametrize("size", [28, 64, 128])
@pytest.mark.parametrize("name", MODELS)
def test_shapes_gradients_and_the_layer_for_gradcam(name: str, size: int) -> None:
    torch.manual_seed(0)
    model, shapes = MODELS[name](), {}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # those that start at zero pass no gradient on
            nn.init.ones_(module.weight)
    for part in getattr(model, "net", model).children():
        part.register_forward_hook(lambda m, _inputs, output: shapes.update({m: output.shape[2:]}))
    images = torch.rand(3, 3, size, size, requires_grad=True)
    logits = model(images)
    assert logits.shape == (3, 9)
    layers = [layer for layer, shape in shapes.items() if min(shape, default=0) >= 7]
    assert model.gradcam_layer(size) is layers[-1]
    nn.functional.cross_entropy(logits, torch.arange(3)).backward()
    for where, tensor in [("images", images), *model.named_parameters()]:
        assert tensor.grad.isfinite().all() and tensor.grad.abs().max() > 0, where


def test_the_parts_that_the_homework_asks_for() -> None:
    kinds = {n: [type(m) for m in c.modules()] for n, c in SkipCNN().named_children()}
    assert [name for name in kinds if nn.MaxPool2d in kinds[name]] == ["stem", "pool1", "pool2"]
    for name in ("stem", "stage1", "stage2", "stage3"):
        assert {nn.Conv2d, nn.BatchNorm2d} <= set(kinds[name]), name
    assert kinds["head"].count(nn.Linear) >= 2
    assert count_parameters(SkipCNN()) <= 1_000_000
    # torchvision's 11,689,512, less 1000 classes' head and 7x7 stem, plus 9 classes' and 3x3.
    expected = 11_689_512 - 513_000 + 9 * 513 - 3 * 64 * (49 - 9)
    assert count_parameters(MODELS["resnet18"]()) == expected
    stage, x = SkipCNN().stage2.eval(), torch.rand(1, 48, 14, 14)  # starts as its skip connection
    out = stage(x)
    assert torch.equal(out, stage.skip(x).relu()) and out.abs().max() > 0


def test_overfits_one_batch() -> None:
    torch.manual_seed(0)
    model = SkipCNN()
    images, labels = torch.rand(18, 3, 28, 28), torch.arange(18) % 9
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_normalisation_is_right_and_travels_with_the_weights() -> None:
    x = torch.tensor([[0.2, 0.5, 0.9], [0.4, 0.4, 0.4]])[:, :, None, None]
    out = Normalize((0.2, 0.3, 0.4), (0.1, 0.2, 0.0))(x)[:, :, 0, 0]  # a constant channel: 1 / 255
    assert torch.allclose(out, torch.tensor([[0.0, 1.0, 127.5], [2.0, 0.5, 0.0]]), atol=1e-4)
    trained, fresh = SkipCNN((0.7, 0.5, 0.6), (0.1, 0.2, 0.15)).eval(), SkipCNN().eval()
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(images := torch.rand(2, 3, 28, 28)), trained(images))


@pytest.mark.parametrize("name", MODELS)
def test_layer_table_is_that_of_the_live_model(name: str) -> None:
    model = MODELS[name]().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows, modules = layer_table(model, 64), dict(model.named_modules())
    assert model.training and not any(m._forward_hooks for m in modules.values())
    assert differences(before, dict(model.state_dict())) == []
    assert {row[0] for row in rows} == {n for n, m in modules.items() if not list(m.children())}
    for layer, kind, kernel, shape, parameters in rows:
        module = modules[layer]
        assert (kind, parameters) == (type(module).__name__, count_parameters(module))
        if isinstance(module, nn.Conv2d):
            assert kernel == "x".join(map(str, module.kernel_size))
            assert shape.startswith(f"{module.out_channels} x ")
    assert rows[1][3].endswith(" x 64 x 64")  # full resolution in the stem


@pytest.mark.parametrize("size", ["7", "1000000", "many"])
def test_a_size_that_is_none(size: str, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    monkeypatch.setattr("sys.argv", ["MyModels.py", "--size", size])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--size" in only_line(capsys.readouterr().err)
