"""T3A against a plain restatement with one list per class."""

import pytest
import torch
from torch.nn import functional as F

import tta
from tta.functional import entropy


def plain_t3a(model, batches, filter_k):
    """The method as the paper states it, one support at a time."""
    model.eval()
    rows = model.fc.weight.detach()
    supports = [[(float(e), row)] for row, e in zip(rows, entropy(model.fc(rows)), strict=True)]
    out = []
    for batch in batches:
        features = model.layer3(model.layer2(model.layer1(model.stem(batch)))).mean((2, 3))
        logits = model.fc(features)
        for z, h, label in zip(features, entropy(logits), logits.argmax(1), strict=True):
            supports[label].append((float(h), z))
        supports = [sorted(kept, key=lambda one: one[0])[:filter_k] for kept in supports]
        templates = [F.normalize(sum(F.normalize(z, dim=0) for _, z in kept), dim=0) for kept in supports]
        out.append(features @ torch.stack(templates).T)
    return torch.cat(out)


@pytest.mark.parametrize("filter_k", [1, 3, 100])
@torch.no_grad()
def test_scores_equal_the_plain_ones(cnn, golden_images, filter_k):
    batches = golden_images[:192].split(48)
    adapter = tta.adapt(cnn, "t3a", filter_k=filter_k)
    ours = torch.cat([adapter(batch) for batch in batches])
    torch.testing.assert_close(ours, plain_t3a(cnn, batches, filter_k), atol=1e-4, rtol=1e-5)


def test_prediction_before_any_batch_is_by_the_rows_of_the_head(cnn, golden_images):
    adapter = tta.adapt(cnn, "t3a")
    with adapter.paused():
        scores = adapter(golden_images[:8])
    seen = []
    cnn.eval().fc.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    cnn(golden_images[:8])
    torch.testing.assert_close(scores, seen[0].detach() @ F.normalize(cnn.fc.weight.detach(), dim=1).T)


def test_a_batch_that_is_not_finite_leaves_no_support(cnn, golden_images):
    """As on a GPU, where it is reported a batch late."""
    adapter = tta.adapt(cnn, "t3a")
    adapter(golden_images[:16])
    before = adapter.state_dict()
    bad = golden_images[16:32].clone()
    bad[0, 0, 0, 0] = torch.nan
    adapter.adapt(bad)
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())
