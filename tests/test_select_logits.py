"""Models that answer with some of their classes: what adaptation and scoring see."""

import pytest
import torch

import tta
from tta.fingerprint import of_model


@pytest.fixture
def model():
    return tta.load_model("cifar-resnet20", pretrained=False, num_classes=6)


def test_only_the_selected_logits_come_out_in_order(model):
    images = torch.rand(4, 3, 32, 32)
    everything = model(images)
    plain = of_model(model)
    assert model.select_logits([5, 0, 2]) is model
    assert torch.equal(model(images), everything[:, [5, 0, 2]])
    selected = of_model(model)
    assert selected != plain != of_model(model.select_logits([0, 2, 5])) != selected


def test_adaptation_sees_the_selected_logits_alone(model):
    images = torch.rand(8, 3, 32, 32)

    class Bare(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)[:, [1, 4]]

    expected = tta.adapt(Bare(model), "tent")
    adapter = tta.adapt(model.select_logits([1, 4]), "tent")
    for _ in range(2):
        assert torch.equal(adapter(images), expected(images))
    adapter.reset()
    assert adapter(images).shape == (8, 2)


@pytest.mark.parametrize("wrong", [[1], [1, 1], [-1, 2]])
def test_a_selection_that_is_none_is_refused(model, wrong):
    with pytest.raises(ValueError, match="two or more different outputs"):
        model.select_logits(wrong)


@pytest.mark.parametrize(
    ("of", "message"), [(None, "with 8 or more; 'cifar-resnet20' has 6"), (1000, "with 1000; .* has 6")]
)
def test_a_network_of_other_outputs_is_named(model, of, message):
    with pytest.raises(ValueError, match=message):
        model.select_logits([1, 7], of)(torch.rand(1, 3, 32, 32))
