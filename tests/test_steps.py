"""Small batches: the defaults of methods that compare moments make smaller steps on them, and keep what is right already."""

import pytest
import torch

import tta
from tta.datasets import digits
from tta.methods._steps import fit_steps

METHODS = ["actmad", "owttt", "ttac"]


@pytest.fixture(scope="module")
def clean():
    """Clean digits, in [0, 1], and their labels; the source model errs on 0.4 % of all 800."""
    images, labels, _ = digits.split("test")
    return images[:400] / 255, labels[:400]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("settings", [{}, {"lr": 1e-4}], ids=["defaults", "lr=1e-4"])
@pytest.mark.parametrize("size", [2, 16, 32])
@pytest.mark.parametrize("method", METHODS)
def test_small_clean_batches_stay_right(method, size, settings, clean):
    images, labels = clean
    adapter = tta.adapt(tta.load_model("digits-cnn"), method, source=images[:200], **settings)
    wrong = sum(
        int((adapter(x).argmax(1) != y).sum()) for x, y in zip(images.split(size), labels.split(size), strict=True)
    )
    assert wrong < 0.1 * len(images)  # 89 % without smaller steps, as in guessing
    assert adapter.skipped_updates == 0
    assert (
        max(float(parameter.detach().abs().max()) for parameter in adapter.parameters()) < 2
    )  # 1.2 in the source model


@pytest.mark.parametrize(("method", "batch"), [("actmad", 128), ("owttt", 256), ("ttac", 64)])
def test_a_batch_has_its_share_of_the_step(method, batch, cnn, golden_source, golden_images):
    """Weights move by the square of the batch's share of the published one; a rate of one's own is used as it is."""

    def moved(size=16, **settings):
        adapter = tta.adapt(cnn, method, source=golden_source[:64], nesterov=False, **settings)
        before = [parameter.detach().clone() for parameter in adapter.parameters_to_adapt()]
        adapter(golden_images[:size])
        return torch.cat([(p - b).flatten() for p, b in zip(adapter.parameters_to_adapt(), before, strict=True)])

    share = (16 / batch) ** 2
    torch.testing.assert_close(moved(), moved(lr=0.01 * share, lr_batch=1), rtol=1e-3, atol=1e-9)
    assert torch.equal(moved(lr=0.005), moved(lr=0.005, lr_batch=1))
    assert torch.equal(moved(batch), moved(batch, lr_batch=1))


def test_the_batch_of_a_rate_is_part_of_the_settings(cnn, golden_source):
    source = golden_source[:64]
    assert tta.adapt(cnn, "actmad", source=source).config.lr_batch == 128
    assert tta.adapt(cnn, "actmad", source=source, lr=1e-3).config.lr_batch == 1
    assert tta.adapt(cnn, "actmad", source=source, lr=1e-3, lr_batch=32).config.lr_batch == 32
    assert tta.adapt(cnn, "actmad", source=source, preset="cifar10-c").config.lr_batch == 1
    for method in METHODS:
        with pytest.raises(ValueError, match="lr_batch=0"):
            tta.adapt(cnn, method, source=source, lr_batch=0)


def test_a_large_batch_makes_no_larger_steps():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    for images, lr in ((32, 0.025), (64, 0.1), (640, 0.1)):
        fit_steps(optimizer, 0.1, images, 64)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)
