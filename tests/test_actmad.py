"""ActMAD recomputed in the plainest way; which weights move; models that are no classifiers."""

import copy
from functools import partial

import pytest
import torch
import torchvision
from torch import nn

import tta
from tta.methods.actmad import ActivationAlignment, moments_need
from tta.source import SourceStatistics

SETTINGS = {"optimizer": "sgd", "lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


class InPlaceNet(nn.Module):
    """Two BatchNorm layers, each with an in-place ReLU behind it, as in the published Wide ResNets."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, 2), nn.BatchNorm2d(8)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(self.relu(self.bn2(self.conv2(x))).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = InPlaceNet()
    for _ in range(20):  # running statistics near those of the images
        net(torch.rand(32, 3, 16, 16))
    return net.eval()


@pytest.fixture
def images():
    return torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def plain_moments(net, x, position):
    """Means and variances of both layers, written out without hooks or in-place operations."""
    first = net.bn1(net.conv1(x))
    second = net.bn2(net.conv2(first.relu()))
    logits = net.fc(second.relu().mean((2, 3)))
    values = [first.relu(), second.relu()] if position == "activation" else [first, second]
    return logits, [(v.mean(0), ((v - v.mean(0)) ** 2).sum(0) / (len(v) - 1)) for v in values]


def plain_actmad(net, source_batches, batches, position):
    model = copy.deepcopy(net)
    with torch.no_grad():
        each = [plain_moments(model, x, position)[1] for x in source_batches]
    source = [[torch.stack([b[layer][i] for b in each]).mean(0) for i in (0, 1)] for layer in (0, 1)]
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, 0.9, weight_decay=5e-4, nesterov=True)
    collected = []
    for x in batches:
        logits, found = plain_moments(model, x, position)
        collected.append(logits.detach())
        loss = sum((found[layer][i] - source[layer][i]).abs().mean() / 2 for layer in (0, 1) for i in (0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.cat(collected), model


@pytest.mark.parametrize("position", ["output", "activation"])
def test_updates_are_the_plain_recomputation(net, images, position):
    source, batches = [images[:16], images[16:24]], [2 * x for x in images.split(8)]
    adapter = tta.adapt(net, "actmad", source=images[:24], source_batch_size=16, position=position, **SETTINGS)
    expected, model = plain_actmad(net, source, batches, position)
    torch.testing.assert_close(torch.cat([adapter(x) for x in batches]), expected)
    for ours, plain in zip(adapter.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    other = {"output": "activation", "activation": "output"}[position]
    assert not torch.allclose(plain_actmad(net, source, batches, other)[0], expected, atol=1e-4)


def test_activation_is_what_the_released_hook_sees(net, images):
    """A hook that keeps a reference finds the tensor rectified by the in-place ReLU when the forward is over."""
    kept = []
    handles = [bn.register_forward_hook(lambda m, a, output: kept.append(output)) for bn in (net.bn1, net.bn2)]
    with torch.no_grad():
        net(images)
    for handle in handles:
        handle.remove()
    need = moments_need(net, position="activation")
    known = SourceStatistics.record(net, [need], [images]).get(need)
    for name, tensor in zip(("bn1", "bn2"), kept, strict=True):
        torch.testing.assert_close(known[f"{name}.mean"], tensor.mean(0))
        torch.testing.assert_close(known[f"{name}.var"], tensor.var(0))


@pytest.mark.parametrize(
    ("layers", "moves"),
    [
        (None, ("stem", "layer1", "layer2", "layer3.conv", "layer3.bn")),
        (["stem.*", "layer1.*"], ("stem", "layer1")),
        (["stem.1"], ("stem",)),
    ],
)
def test_weights_behind_the_last_layer_are_left_alone(cnn, golden_source, golden_images, layers, moves):
    adapter = tta.adapt(cnn, "actmad", source=golden_source[:64], layers=layers, weight_decay=0.1)
    before = copy.deepcopy(adapter.model.state_dict())
    adapter(golden_images[:32])
    for name, value in adapter.model.state_dict().items():
        moved = name.startswith(moves) and not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(value, before[name]) != moved, name
    assert not any(parameter.requires_grad for parameter in adapter.model.fc.parameters())


def test_frozen_weights_get_no_gradient(cnn, golden_source, golden_images, monkeypatch):
    adapter = tta.adapt(cnn, "actmad", source=golden_source[:64])
    seen = []
    step = adapter.optimizer.step
    monkeypatch.setattr(adapter.optimizer, "step", lambda: (seen.append(adapter.model.fc.weight.grad), step()))
    adapter(golden_images[:32])
    assert seen == [None]


def test_score_after_is_a_second_forward(cnn, golden_source, golden_images):
    before, after = (tta.adapt(cnn, "actmad", source=golden_source[:64], score=s) for s in ("before", "after"))
    first, second = golden_images[:32], golden_images[32:64]
    assert torch.equal(before(first), cnn.eval()(first).detach())
    logits = after(first)
    with torch.no_grad():
        assert torch.equal(logits, before.predict(first))
    assert not torch.equal(logits, cnn(first))
    assert torch.equal(after.predict(second), before(second))
    assert (before.scored_forward, after.scored_forward) == ("before", "after")


def test_one_image_is_predicted_and_teaches_nothing(cnn, golden_source, golden_images):
    adapter = tta.adapt(cnn, "actmad", source=golden_source[:64])
    adapter(golden_images[:8])
    state = adapter.state_dict()
    assert torch.equal(adapter(golden_images[8:9]), adapter.model(golden_images[8:9]).detach())
    assert all(torch.equal(value, state[key]) for key, value in adapter.state_dict().items())
    with pytest.raises(ValueError, match="source_batch_size=1; expected 2 or more, for a variance"):
        tta.adapt(cnn, "actmad", source=golden_source[:64], source_batch_size=1)


def test_a_trailing_source_image_has_no_variance_and_is_left_out(net, images):
    whole, trailing = (tta.adapt(net, "actmad", source=images[:n], source_batch_size=8) for n in (32, 33))
    assert torch.equal(whole.alignment.var0, trailing.alignment.var0)


def test_images_of_another_size_are_refused(cnn, golden_source):
    adapter = tta.adapt(cnn, "actmad", source=golden_source[:64])
    with pytest.raises(ValueError, match=r"images \(3, 32, 32\).*got a batch of shape \(4, 3, 64, 64\)"):
        adapter(torch.rand(4, 3, 64, 64))
    with pytest.raises(ValueError, match="expected images of one size"):
        tta.adapt(cnn, "actmad", source=[torch.rand(4, 3, 32, 32), torch.rand(4, 3, 64, 64)])


def test_layer_norm_and_group_norm_are_served(vit, golden_source, golden_images):
    torch.manual_seed(0)
    group = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 64, 4))
    for model in (vit, group):
        adapter = tta.adapt(model, "actmad", source=golden_source[:64], lr=1e-3)
        _, loss = adapter.alignment(adapter.model, golden_images[:64])
        for _ in range(3):
            adapter(golden_images[:64])
        assert adapter.alignment(adapter.model, golden_images[:64])[1] < loss


def test_what_cannot_be_aligned_is_refused(cnn, golden_source):
    with pytest.raises(ValueError, match="no normalisation layer of the kinds looked for"):
        tta.adapt(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), "actmad", source=golden_source[:8])
    with pytest.raises(ValueError, match=r"No layer matches 'layer9\.\*'. There are: stem\.1, layer1\.bn1"):
        tta.adapt(cnn, "actmad", source=golden_source[:8], layers=["layer9.*"])
    with pytest.raises(ValueError, match=r"ActMAD needs to know the source domain \(activation_moments\)"):
        tta.adapt(cnn, "actmad")
    cnn.unused = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="never reaches layer 'unused': leave it out"):
        tta.adapt(cnn, "actmad", source=golden_source[:8], layers=["unused", "layer1.*"])
    with pytest.raises(ValueError, match="reaches none of the 1 layers, as 'unused'"):
        tta.adapt(cnn, "actmad", source=golden_source[:8], layers=["unused"])


def test_layers_that_a_forward_does_not_reach_make_no_difference(cnn, golden_source, golden_images):
    """The auxiliary heads of a GoogLeNet run in training only: without ``layers`` they are left out, not refused."""
    expected = tta.adapt(cnn, "actmad", source=golden_source[:64])
    cnn.auxiliary = nn.Sequential(nn.Conv2d(16, 3, 1), nn.BatchNorm2d(3))
    adapter = tta.adapt(cnn, "actmad", source=golden_source[:64])
    for x in golden_images[:64].split(32):
        assert torch.equal(adapter(x), expected(x))


def test_statistics_of_other_layers_or_positions_are_refused(net, images):
    need = moments_need(net, ["bn1"], batch_size=64)
    statistics = SourceStatistics.record(net, [need], images)
    tta.adapt(net, "actmad", source=statistics, layers=["bn1"])
    with pytest.raises(ValueError, match=r"missing: \['bn2'\]"):
        tta.adapt(net, "actmad", source=statistics)
    with pytest.raises(ValueError, match=r"'output'} recorded, {'position': 'activation'} asked for"):
        tta.adapt(net, "actmad", source=statistics, layers=["bn1"], position="activation")


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (torchvision.models.segmentation.lraspp_mobilenet_v3_large, None),
        (
            partial(torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn, min_size=64, max_size=64),
            ["backbone.*"],
        ),
    ],
)
def test_detectors_and_segmenters_align(make, layers):
    torch.manual_seed(0)
    model = make(weights=None, weights_backbone=None).eval()
    images = torch.rand(3, 3, 64, 64)
    need = moments_need(model, layers)
    alignment = ActivationAlignment(need, SourceStatistics.record(model, [need], images).get(need))
    foggy = 0.3 * images + 0.6
    output, loss = alignment(model, foggy)
    assert not isinstance(output, torch.Tensor)
    assert alignment(model, images)[1] < 1e-4 < loss
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        _, loss = alignment(model, foggy)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.filterwarnings("ignore:.*round away")
def test_a_model_of_another_precision_is_served(dtype, net, images):
    adapter = tta.adapt(net.to(dtype), "actmad", source=images[:16].to(dtype), source_batch_size=16)
    assert adapter(images[16:].to(dtype)).shape == (24, 4)
    assert adapter.progress().updates == 1
