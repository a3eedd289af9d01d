"""Outputs that are no logits, bad images within a batch, batches too small for their statistics, and the summary."""

import warnings

import pytest
import torch
from torch import nn

import tta


class Ends(nn.Module):
    """A classifier with a last function."""

    def __init__(self, net, last):
        super().__init__()
        self.net, self.last = net, last

    def forward(self, x):
        return self.last(self.net(x))


class Binary(nn.Module):
    """The logit of one class of two."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        logits = self.net(x)
        return logits[:, 1:2] - logits[:, :1]


@pytest.fixture
def images():
    return torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------- outputs


@pytest.mark.parametrize("method", ["norm", "tent", "sar", "cotta", "t3a"])
def test_probabilities_give_what_their_logits_give(cnn, images, method):
    settings = {"views": 2} if method == "cotta" else {}
    plain = tta.adapt(cnn, method, **settings)
    probable = tta.adapt(Ends(cnn, nn.Softmax(1)), method, outputs="probabilities", **settings)
    for batch in (images, images.flip(0)):
        expected = plain(batch)
        found = probable(batch)
        if method != "t3a":  # its logits are its own
            expected, found = expected.log_softmax(1), found.log_softmax(1)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_function_makes_logits(cnn, images):
    answering = Ends(cnn, lambda logits: {"scores": logits})
    adapter = tta.adapt(answering, "tent", outputs=lambda answer: answer["scores"])
    assert torch.equal(adapter(images), tta.adapt(cnn, "tent")(images))


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.Sigmoid()])
def test_values_that_look_like_probabilities_are_warned_of_once(cnn, images, last):
    adapter = tta.adapt(Ends(cnn, last), "eata", fisher_alpha=0.0)
    with pytest.warns(RuntimeWarning, match=r"lie in \[0, 1\].*outputs='probabilities'"):
        adapter(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter(images)


def test_a_single_logit_is_refused_without_sigmoid_and_served_with_it(cnn, images):
    binary = Binary(cnn)
    for method in ("source", "norm", "tent", "sar", "rotta"):
        with pytest.raises(ValueError, match="single"):
            tta.adapt(binary, method)(images)
    adapter = tta.adapt(binary, "tent", outputs="sigmoid", optimizer="sgd", momentum=0.0, lr=0.1)
    logits = adapter(images)
    assert logits.shape == (16, 1)
    model = tta.adapt(binary, "norm", outputs="sigmoid").model.requires_grad_(True)
    p = (rows := model(images)).softmax(1)[:, 1]
    torch.testing.assert_close(logits[:, 0], (rows[:, 1] - rows[:, 0]).detach())
    (-(p * p.log() + (1 - p) * (1 - p).log())).mean().backward()  # the binary entropy
    weight = model.net.layer1.bn1.weight
    torch.testing.assert_close(adapter.model.net.layer1.bn1.weight, weight - 0.1 * weight.grad, rtol=1e-4, atol=1e-6)


def test_several_labels_an_image_are_served_where_the_rule_has_a_meaning(cnn, images):
    for method in ("source", "norm", "tent"):
        assert tta.adapt(cnn, method, outputs="sigmoid")(images).shape == (16, 10)
    with pytest.raises(ValueError, match="an image has 10 labels of its own"):
        tta.adapt(cnn, "sar", outputs="sigmoid")(images)
    with pytest.raises(ValueError, match="no meaning for it with outputs='sigmoid'"):
        tta.adapt(cnn, "t3a", outputs="sigmoid")


def test_another_kind_of_outputs_is_named(cnn):
    with pytest.raises(ValueError, match=r"got 'probability'\. Did you mean 'probabilities'\?"):
        tta.adapt(cnn, "tent", outputs="probability")


def test_the_exported_model_gives_the_users_own_outputs(cnn, images):
    adapter = tta.adapt(Ends(cnn, nn.Softmax(1)), "tent", outputs="probabilities")
    adapter(images)
    with adapter.paused():
        torch.testing.assert_close(adapter.export(exact=True)(images).log(), adapter(images), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- bad images


def test_bad_images_are_skipped_where_that_is_asked(cnn, images):
    mixed, good = images.clone(), torch.arange(16) != 3
    mixed[3, 0, 0, 0] = torch.nan
    adapter, other = tta.adapt(cnn, "tent", on_bad="skip"), tta.adapt(cnn, "tent")
    logits = adapter(mixed)
    assert logits[3].isnan().all()
    assert torch.equal(logits[good], other(images[good]))
    assert adapter(torch.full_like(images, torch.inf)).isnan().all()
    assert torch.equal(adapter(images), other(images))
    with pytest.raises(ValueError, match="1 of the 16 images hold NaN"):
        other(mixed)


# ---------------------------------------------------------------------- small batches


@pytest.mark.filterwarnings("error")
def test_small_batches_are_warned_of_blended_left_to_the_source_or_refused(cnn, images):
    source = tta.adapt(cnn, "source")(images[:1])
    with pytest.warns(RuntimeWarning, match=r"a batch of 1 gives BatchNorm layers.*small_batches='blend'"):
        tta.adapt(cnn, "norm")(images[:1])
    with pytest.raises(ValueError, match="A batch of 1 images"):
        tta.adapt(cnn, "norm", small_batches="raise")(images[:1])
    torch.testing.assert_close(tta.adapt(cnn, "norm", small_batches="source")(images[:1]), source)
    blended = tta.adapt(cnn, "norm", small_batches="blend")(images[:1])
    torch.testing.assert_close(blended, tta.adapt(cnn, "norm", alpha=1 / 17)(images[:1]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="small_batches='mix'"):
        tta.adapt(cnn, "norm", small_batches="mix")


def test_small_batches_of_a_method_that_learns(cnn, images, tmp_path):
    adapter = tta.adapt(cnn, "tent", small_batches="blend", lr=1e-2)
    first = adapter(images[:2])
    adapter(images)
    adapter.save(tmp_path / "adapter.safetensors")
    again = tta.load(tmp_path / "adapter.safetensors", cnn)
    assert torch.equal(again(images[:3]), adapter(images[:3]))
    adapter.reset()
    assert torch.equal(adapter(images[:2]), first)


# ---------------------------------------------------------------------- summary


class LayerNorm2d(nn.Module):
    """A normalisation layer of a kind that nobody knows."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return self.weight[:, None, None] * (x - x.mean(1, True))


def test_the_summary_says_what_adapts_and_what_does_not():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), LayerNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    with pytest.warns(RuntimeWarning, match="1 LayerNorm2d"):
        adapter = tta.adapt(net, "tent")
    found = adapter.summary()
    assert found.adapted == ("1.weight", "1.bias")
    assert found.parameters == 16
    assert found.unknown == {"LayerNorm2d": 1}
    assert found.statistics == {"the batch's": 1}
    text = repr(adapter)
    assert text == str(found)
    assert "adapts 16 values (5.6 %) of 2 parameters: 1.weight, 1.bias" in text
    assert "layers of unknown kinds, never adapted: 1 LayerNorm2d" in text


def test_the_summary_names_layers_left_out_by_a_rule_and_memories(vit, cnn):
    assert tta.adapt(vit, "sar").summary().left_out
    assert "memory: up to 64 images" in repr(tta.adapt(cnn, "rotta"))
    assert "adapts no parameter" in repr(tta.adapt(cnn, "norm"))


def test_a_model_exported_with_small_batches_predicts_as_the_paused_adapter(cnn, images):
    adapter = tta.adapt(cnn, "tent", small_batches="blend")
    for batch in (images, images[:3]):  # the weight of the statistics is that of the batch at hand, not of the last one
        adapter(batch)
    for batch in (images, images[:3]):
        with adapter.paused():
            expected = adapter(batch)
        torch.testing.assert_close(adapter.export(batch, exact=True)(batch), expected, rtol=1e-4, atol=1e-4)
