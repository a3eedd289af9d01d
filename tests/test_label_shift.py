"""Label shift: Bayes' rule, the moving average, and the direction of the correction."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import tta
from tta.source import shift


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 4)).eval()


def test_recomputed_plainly():
    net, images = model(), torch.rand(64, 3, 4, 4)
    adapter = tta.adapt(net, "label_shift", source=images, rate=0.25)
    with torch.no_grad():
        prior = torch.bincount(net(images).argmax(1), minlength=4) / 64
    prior = prior.clamp(min=0.025)
    prior, stream = prior / prior.sum(), torch.full((4,), 0.25)
    for x in torch.rand(3, 8, 3, 4, 4, generator=torch.Generator().manual_seed(1)):
        logits = adapter(x)
        with torch.no_grad():
            plain = net(x)
        stream = 0.75 * stream + 0.25 * plain.softmax(1).mean(0)
        bounded = stream.clamp(min=0.025) / stream.clamp(min=0.025).sum()
        posterior = plain.softmax(1) * bounded / prior
        torch.testing.assert_close(logits.softmax(1), posterior / posterior.sum(1, keepdim=True))


def test_a_stream_of_the_sources_classes_is_corrected_little_and_one_of_a_single_class_towards_it():
    net, images = model(), torch.rand(256, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        net[1].weight.mul_(6)
        net[1].bias.copy_(-(net[1].weight @ images.flatten(1).mean(0)))
        plain = net(images)
    (one,) = (images[plain.argmax(1) == c] for c in [int(plain.argmax(1).mode().values)])
    adapter = tta.adapt(net, "label_shift", source=images)
    for _ in range(30):
        mixed = adapter(images).softmax(1)
    assert (mixed - plain.softmax(1)).abs().max() < 0.1
    for _ in range(30):
        single = adapter(one).softmax(1).mean(0)
    with torch.no_grad():
        before = net(one).softmax(1).mean(0)
    assert single.max() > before.max()
    assert single.argmax() == before.argmax()


def labelled(net, count, seed):
    """Images whose classes are drawn from the network's own probabilities, so that these are right."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 4, 4, generator=generator)
    with torch.no_grad():
        return images, net(images).softmax(1).multinomial(1, generator=generator)[:, 0]


def test_learned_correction_recomputed_plainly():
    net = model()
    images, labels = labelled(net, 64, 0)
    adapter = tta.adapt(
        net, "label_shift", source=TensorDataset(images, labels), learned=True, rate=0.25, hidden=5, iterations=30
    )
    (weight, bias), network = (p.detach() for p in net[1].parameters()), adapter.network
    stream = torch.full((4,), 0.25)
    for x in torch.rand(3, 8, 3, 4, 4, generator=torch.Generator().manual_seed(1)):
        found = adapter(x)
        features = x.flatten(1)
        stream = 0.75 * stream + 0.25 * (features @ weight.T + bias).softmax(1).mean(0)
        bounded = stream.clamp(min=0.025) / stream.clamp(min=0.025).sum()
        log = (4 * bounded).log()
        inner = (network.inner.weight @ log + network.inner.bias).clamp(min=0)
        out = network.outer.weight @ inner + network.outer.bias
        scale, shift, class_scale, class_shift = out[:48], out[48:96], out[96:100], out[100:]
        logits = (features * (1 + scale) + shift) @ weight.T + bias
        torch.testing.assert_close(found, logits * (1 + class_scale) + class_shift + network.direct * log)
    assert network.outer.weight.abs().max() > 0
    torch.testing.assert_close(adapter.source_prior, torch.bincount(labels, minlength=4) / 64)


def test_learned_correction_of_a_calibrated_model_is_near_the_rule_where_the_classes_are_known():
    """Bayes' rule is best there, so that the network can only come near it; without any correction it is far."""
    net = model()
    net[1].weight.data.mul_(6)
    images, labels = labelled(net, 4000, 0)
    prior = torch.bincount(labels, minlength=4) / 4000
    network = shift.train(images.flatten(1), labels, prior, net[1].requires_grad_(False), hidden=32, iterations=1500)
    test, truth = labelled(net, 4000, 1)
    wanted = torch.tensor([0.6, 0.25, 0.1, 0.05])
    drawn = (wanted / prior)[truth].multinomial(4000, replacement=True, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = net(test[drawn])
        learned = F.cross_entropy(network(test[drawn].flatten(1), wanted, net[1]), truth[drawn])
        none = F.cross_entropy(plain, truth[drawn])
        rule = F.cross_entropy(plain + (wanted / prior).log(), truth[drawn])
    assert learned - rule < 0.2 * (none - rule)


def test_the_network_needs_labels_and_corrects_all_at_once():
    with pytest.raises(ValueError, match="shift_network needs labelled source images"):
        tta.adapt(model(), "label_shift", source=torch.rand(8, 3, 4, 4), learned=True)
    with pytest.raises(ValueError, match=r"strength=0\.5 with learned=true"):
        tta.adapt(model(), "label_shift", learned=True, strength=0.5)
    wrong = [(torch.rand(8, 3, 4, 4), torch.full((8,), 4))]
    with pytest.raises(ValueError, match="outside 0 to 3"):
        tta.adapt(model(), "label_shift", source=wrong, learned=True)
