"""ITTA beyond its golden logits: styles by hand, maps that change nothing at first, and the two gradients of the source stage."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tta
from tta.methods.itta import ITTA, ITTAConfig, Maps, Styles, added, drawn, mixed, standardised


def test_styles_image_by_image():
    x, styles = torch.rand(3, 2, 4, 5), Styles(0, torch.tensor([0.2, 1.0, 0.5]), torch.tensor([1, 2, 0]))
    found = mixed(x, styles)
    for image, (share, partner) in enumerate(zip(styles.share, styles.partner, strict=True)):
        for channel in range(2):
            own, other = x[image, channel], x[partner, channel]
            deviations = [(map.var() + 1e-6).sqrt() for map in (own, other)]
            expected = (own - own.mean()) / deviations[0] * (share * deviations[0] + (1 - share) * deviations[1])
            torch.testing.assert_close(
                found[image, channel], expected + share * own.mean() + (1 - share) * other.mean()
            )
    tokens = x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(mixed(tokens, styles).transpose(1, 2).view_as(x), found)


def test_shares_are_of_a_beta_distribution():
    shares = drawn(20_000, 0.1, torch.Generator().manual_seed(0)).share
    assert shares.mean().item() == pytest.approx(0.5, abs=0.01)
    assert shares.var().item() == pytest.approx(1 / (4 * 1.2), abs=0.01)  # a b / ((a + b)^2 (a + b + 1))


@pytest.mark.parametrize("name", ["cnn", "vit"])
@pytest.mark.parametrize("size", [None, 32])
def test_new_maps_change_nothing(name, size, request, golden_images):
    model = request.getfixturevalue(name).eval()
    adapter = tta.adapt(model, "itta", image_size=size)
    with torch.no_grad():
        torch.testing.assert_close(adapter.predict(golden_images[:4]), model(golden_images[:4]), rtol=0, atol=1e-5)
    adapter(golden_images[:8])


def test_images_of_another_size_than_the_maps_are_told(cnn, golden_images):
    adapter = tta.adapt(cnn, "itta", image_size=64)
    with pytest.raises(ValueError, match=r"images of 32 x 32 pixels with image_size=64; expected the side .* or null"):
        adapter(golden_images[:4])
    with adapter.paused(), pytest.raises(ValueError, match="image_size=64"):
        adapter(golden_images[:4])


def test_an_update_by_hand(cnn, golden_images):
    x = golden_images[:6]
    adapter = tta.adapt(
        cnn, "itta", layers=("layer1",), map_depth=2, optimizer="sgd", momentum=0.0, lr=1.0, loss_scale=50.0
    )
    styles = drawn(6, 0.1, torch.Generator().manual_seed(3))._replace(site=0)
    adapter._styles = lambda images: styles
    logits = adapter(x)

    model = copy.deepcopy(cnn).eval()
    scales = [torch.ones(16, 1, 1, requires_grad=True) for _ in range(2)]
    shifts = [torch.zeros(16, 1, 1, requires_grad=True) for _ in range(2)]

    def through(maps):
        return (maps * scales[0] + shifts[0]).relu() * scales[1] + shifts[1]

    def features(maps):
        return model.layer3(model.layer2(through(maps))).mean((2, 3))

    maps = model.layer1(model.stem(x)).detach()
    difference = features(mixed(maps, styles)) - features(maps)
    (
        50 * difference.relu().square().mean()
    ).backward()  # the network of ones and zeros is a ReLU, but for its last layer
    with torch.no_grad():
        for parameter in [*scales, *shifts]:
            parameter -= parameter.grad
        expected = model.fc(features(maps))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert (logits - cnn.eval()(x)).abs().max() > 1e-2


def test_one_image_teaches_nothing(cnn, golden_images):
    adapter = tta.adapt(cnn, "itta", lr=0.1, loss_scale=1.0)
    for image in golden_images[:3].split(1):
        torch.testing.assert_close(adapter(image), cnn.eval()(image), rtol=0, atol=1e-5)
    assert adapter.progress().updates == 0


def test_the_source_stage_sends_each_gradient_where_it_belongs(cnn, golden_source, golden_labels):
    """Classifier: classification and consistency. Network: how far the two gradients are apart."""
    config, draws = ITTAConfig(loss_depth=2), torch.Generator().manual_seed(1)
    x, y = golden_source[:8], golden_labels[:8]
    part = ITTA.make_auxiliary(cnn.eval(), config, draws)
    with torch.no_grad():
        part.scales += 0.3 * torch.rand(part.scales.shape)
        part.shifts += 0.1
    losses = ITTA.source_losses(cnn, part, x, y, config, torch.Generator().manual_seed(5))
    torch.stack([*losses.values()]).sum().backward()

    styles = drawn(8, config.mix, torch.Generator().manual_seed(5))
    model, network = copy.deepcopy(cnn), copy.deepcopy(part)
    model.zero_grad()
    network.zero_grad()
    below = [p for name, p in model.named_parameters() if not name.startswith("fc")]

    def features():
        kept = []
        handle = model.fc.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        logits = model(x)
        with added(model, ["layer1", "layer2", "layer3"], [], styles):
            other = model(x)
        handle.remove()
        return kept[1] - kept[0], F.cross_entropy(logits, y) + F.cross_entropy(other, y)

    difference, classification = features()
    (classification + network(difference).square().mean()).backward()
    for (name, own), by_hand in zip(cnn.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, by_hand.grad, msg=name)

    network.zero_grad()
    difference, classification = features()
    sides = [
        torch.autograd.grad(loss, below, create_graph=True)
        for loss in (network(difference).square().mean(), classification)
    ]
    ours, theirs = (standardised(torch.cat([g.flatten() for g in side])) for side in sides)
    apart = 0.1 * (ours - theirs.detach()).square().mean()
    by_hand = torch.autograd.grad(apart, list(network.parameters()))
    torch.testing.assert_close(losses["gradients"], apart)
    for own, gradient in zip(part.parameters(), by_hand, strict=True):
        torch.testing.assert_close(own.grad, gradient)


def test_maps_of_negative_inputs_have_no_relu():
    x = torch.randn(2, 3)
    assert torch.equal(Maps((3,), 3, rectified=False)(x), x)
    assert torch.equal(Maps((3,), 3)(x), x.relu())


def test_a_module_of_ones_own_is_the_network(cnn, golden_images):
    adapter = tta.adapt(cnn, "itta", auxiliary=nn.Linear(64, 64), lr=1e-2, loss_scale=1.0)
    assert not torch.equal(
        adapter(golden_images[:8]), tta.adapt(cnn, "itta", lr=1e-2, loss_scale=1.0)(golden_images[:8])
    )
