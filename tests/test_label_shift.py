"""Label shift: Bayes' rule, the moving average, and the direction of the correction."""

import torch
from torch import nn

import tta


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
