"""GALA: which layers step, recomputed plainly, and that it wraps other methods."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tta
from tta import methods
from tta.cli.arguments import parse_request


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    ).eval()


@pytest.fixture
def batches():
    return torch.rand(9, 8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def student(model):
    copied = copy.deepcopy(model)
    copied[1].track_running_stats, copied[1].running_mean, copied[1].running_var = False, None, None
    return copied


@pytest.mark.parametrize("select", ["best", "all"])
def test_recomputed_plainly(model, batches, select):
    """Nine steps in windows of four: which layers step, by the cosine of step and displacement."""
    lr, window, threshold = 0.5, 4, 0.5
    adapter = tta.adapt(model, "gala", lr=lr, window=window, threshold=threshold, select=select)
    plain, counts = student(model), []
    layers = [plain[0], plain[1], plain[3], plain[6]]
    for number, x in enumerate(batches):
        logits = adapter(x)
        if number % window == 0:
            anchors = [torch.cat([p.detach().flatten() for p in layer.parameters()]) for layer in layers]
        plain.zero_grad()
        predicted = plain(x)
        F.cross_entropy(predicted, predicted.argmax(1)).backward()
        steps = [torch.cat([-lr * p.grad.flatten() for p in layer.parameters()]) for layer in layers]
        now = [torch.cat([p.detach().flatten() for p in layer.parameters()]) for layer in layers]
        cosines = [
            F.cosine_similarity(u, u + (w - a), dim=0).item() for u, w, a in zip(steps, now, anchors, strict=True)
        ]
        if number % window == 0:
            stepping = [True] * 4
        elif select == "all":
            stepping = [c > threshold for c in cosines]
        else:
            stepping = [c == max(cosines) and c > threshold for c in cosines]
        counts.append(sum(stepping))
        with torch.no_grad():
            for layer, steps_ in zip(layers, stepping, strict=True):
                for p in layer.parameters() if steps_ else ():
                    p.sub_(lr * p.grad)
            torch.testing.assert_close(logits, plain(x), rtol=1e-4, atol=1e-5)
    assert counts[0] == counts[4] == counts[8] == 4
    assert min(counts) < 4
    assert select == "all" or max(counts[1:4]) == 1


def test_around_tent_every_layer_steps_first_then_one(model, batches):
    """The first step is Tent's own; with Adam, a layer that does not step keeps its moments too."""
    wrapped, plain = (tta.adapt(model, name, lr=0.01) for name in ("gala:tent", "tent"))
    assert torch.equal(wrapped(batches[0]), plain(batches[0]))
    assert all(map(torch.equal, wrapped.model.parameters(), plain.model.parameters()))
    blocked = tta.adapt(model, "gala:tent", lr=0.01, threshold=1.0)
    blocked(batches[0])
    before = blocked.state_dict()
    blocked(batches[1])
    after = blocked.state_dict()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed == ["window_steps"]


def test_around_sar_no_reliable_sample_makes_no_step(model, batches):
    adapter = tta.adapt(model, "gala:sar", margin_e0=1e-9)
    before = adapter.state_dict()
    adapter(batches[0])
    assert all(torch.equal(before[key], value) for key, value in adapter.state_dict().items())


def test_names_and_settings():
    kind = methods.find("gala:tent")
    assert methods.name_of(kind) == "gala:tent"
    assert kind is methods.find("gala:tent")
    request = parse_request(["gala:tent", "tent", "window=5", "lr=0.1", "gala:tent.threshold=0.5"])
    assert request.hparams == {"gala:tent": {"window": 5, "lr": 0.1, "threshold": 0.5}, "tent": {"lr": 0.1}}


def test_presets_are_those_of_the_wrapped_method(model):
    adapter = tta.adapt(model, "gala:tent", preset="imagenet-c")
    assert (adapter.config.optimizer, adapter.config.lr, adapter.config.window) == ("sgd", 2.5e-4, 20)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gala:norm", "GALA chooses among the layers of an optimizer step; Norm makes none"),
        ("gala:gala", "GALA makes none"),
        ("tent:gala", "'tent' wraps no other method"),
        ("gala:tnet", "No method 'tnet'. Did you mean 'tent'"),
    ],
)
def test_what_cannot_be_wrapped_is_said(model, name, message):
    with pytest.raises(ValueError, match=message):
        tta.adapt(model, name)
