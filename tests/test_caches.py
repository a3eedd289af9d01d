"""Models that keep tensors computed from their weights between forwards, as the LeViT family does, adapt as those that do not."""

import pytest
import torch
from torch import nn

import tta


class Biased(nn.Module):
    """Features with a bias that is read from a table; in ``eval()`` mode it is kept, if ``keeps``."""

    def __init__(self, keeps):
        super().__init__()
        self.table, self.keeps = nn.Parameter(torch.linspace(-1, 1, 4)), keeps
        self.register_buffer("places", torch.arange(8) % 4)
        self.bias_cache = {}

    def forward(self, x):
        if self.training or not self.keeps:
            return x + self.table[self.places]
        if str(x.device) not in self.bias_cache:
            self.bias_cache[str(x.device)] = self.table[self.places]
        return x + self.bias_cache[str(x.device)]


def network(keeps):
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, Biased(keeps), nn.LayerNorm(8), nn.Linear(8, 5)).eval()


@pytest.fixture
def images():
    return torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["shot", "cotta", "psmt", "actmad", "tent", "memo"])
@pytest.mark.parametrize("copy", [True, False])
def test_a_kept_tensor_is_neither_out_of_date_nor_of_a_graph_that_is_gone(images, method, copy):
    settings = {"views": 2} if method in ("cotta", "memo") else {}
    keeping, plain = (
        tta.adapt(network(keeps), method, source=images, copy=copy, **settings) for keeps in (True, False)
    )
    for x in images.split(8):
        assert torch.equal(keeping(x), plain(x))
        with keeping.paused(), plain.paused():
            assert torch.equal(keeping(x), plain(x))


def test_a_model_that_keeps_a_graph_is_copied_and_not_changed(images):
    model = network(keeps=True)
    model(images)  # outside no_grad
    kept = dict(model[5].bias_cache)
    adapter = tta.adapt(model, "shot")
    adapter(images)
    assert model[5].bias_cache.keys() == kept.keys()
    assert all(model[5].bias_cache[key] is value for key, value in kept.items())


def test_an_exported_model_keeps_again(images):
    adapter = tta.adapt(network(keeps=True), "shot", statistics="source")
    adapter(images)
    exported = adapter.export()
    with torch.no_grad():
        exported(images)
    assert exported[5].bias_cache
    assert not exported[5]._forward_hooks
