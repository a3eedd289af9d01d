"""LAME beyond its golden logits: degenerate batches, the choice of neighbours, one energy step by hand."""

import pytest
import torch
from torch.nn import functional as F

import tta


@pytest.mark.parametrize("affinity", ["rbf", "knn", "linear"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_log_probabilities_of_any_batch(cnn, golden_images, affinity, symmetric):
    adapter = tta.adapt(cnn, "lame", affinity=affinity, symmetric=symmetric)
    for batch in (golden_images[:16], golden_images[:1], golden_images[:1].repeat(8, 1, 1, 1)):
        logits = adapter(batch)
        assert logits.isfinite().all()
        torch.testing.assert_close(logits.exp().sum(1), torch.ones(len(batch)))


def test_a_single_image_keeps_its_prediction_without_neighbours(cnn, golden_images):
    adapter = tta.adapt(cnn, "lame", affinity="knn")
    expected = cnn.eval()(golden_images[:1]).log_softmax(1)
    torch.testing.assert_close(adapter(golden_images[:1]).exp(), expected.exp())


def test_an_image_is_no_neighbour_of_its_own(cnn):
    """Also where an exact copy is as near."""
    adapter = tta.adapt(cnn, "lame", affinity="knn", knn=1)
    features = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), dim=1)
    affinity = adapter._affinity(features)
    assert affinity.diagonal().eq(0).all()
    assert affinity.sum(1).eq(1).all()


def test_assignment_is_a_fixed_point(cnn, golden_images):
    """The result solves Y = softmax(W Y + log p)."""
    adapter = tta.adapt(cnn, "lame", affinity="knn", symmetric=True)
    batch, seen = golden_images[:32], []
    handle = cnn.eval().fc.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    log_p = (cnn(batch).softmax(1) + 1e-10).log().detach()
    handle.remove()
    y = adapter(batch).exp()
    affinity = adapter._affinity(F.normalize(seen[0].detach(), dim=1))
    torch.testing.assert_close((affinity @ y + log_p).softmax(1), y, atol=1e-4, rtol=0)
