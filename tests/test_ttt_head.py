"""TTT of the head against a plain restatement: one image after the other, a copy of the head, torch's own Adam and gradients."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import tta
from tta.source import Need

BATCH = 8


@pytest.fixture
def source(golden_source, golden_source_labels):
    return TensorDataset(golden_source[:64], golden_source_labels[:64])


@torch.no_grad()
def features_of(model, images):
    return model.layer3(model.layer2(model.layer1(model.stem(images)))).mean((2, 3))


def plain(model, source, images, neighbours, parts, lr):
    """The method as the paper states it; ``parts`` are the neighbours of each step, counted from the nearest."""
    known, labels = features_of(model.eval(), source.tensors[0]), source.tensors[1]
    out = []
    for feature in features_of(model, images):
        order = (known - feature).square().sum(1).argsort()[:neighbours]
        head = copy.deepcopy(model.fc)
        optimizer = torch.optim.Adam(head.parameters(), lr=lr)
        for part in parts:
            optimizer.zero_grad()
            F.cross_entropy(head(known[order[part]]), labels[order[part]]).backward()
            optimizer.step()
        out.append(head(feature).detach())
    return torch.stack(out)


CASES = [
    ({"neighbours": 5, "steps": 7}, 5, [slice(None)] * 7, 1e-2),
    ({"neighbours": 3, "learn": "sequential", "lr": 0.1}, 3, [[0], [1], [2]], 0.1),
    ({"neighbours": 1000, "steps": 2, "heads_at_once": 3}, 64, [slice(None)] * 2, 1e-2),
]


@pytest.mark.parametrize(("settings", "neighbours", "parts", "lr"), CASES)
def test_logits_equal_the_plain_ones(cnn, golden_images, source, settings, neighbours, parts, lr):
    adapter = tta.adapt(cnn, "ttt_head", source=source, **settings)
    images = golden_images[: 2 * BATCH]
    found = torch.cat([adapter(batch) for batch in images.split(BATCH)])
    torch.testing.assert_close(found, plain(cnn, source, images, neighbours, parts, lr), atol=1e-4, rtol=1e-4)
    assert (found - cnn(images)).abs().max() > 0.1


def test_heads_without_a_bias_have_none_and_votes_are_counts(cnn, golden_images, source):
    cnn.fc = torch.nn.Linear(cnn.fc.in_features, 10, bias=False)
    images = golden_images[:BATCH]
    found = tta.adapt(cnn, "ttt_head", source=source, neighbours=5, steps=7)(images)
    torch.testing.assert_close(found, plain(cnn, source, images, 5, [slice(None)] * 7, 1e-2), atol=1e-4, rtol=1e-4)
    votes = tta.adapt(cnn, "ttt_head", source=source, neighbours=5, local="votes")(images)
    distances = torch.cdist(features_of(cnn, images), features_of(cnn, source.tensors[0]))
    labels = source.tensors[1][distances.argsort(1)[:, :5]]
    assert torch.equal(votes, torch.stack([torch.bincount(row, minlength=10) for row in labels]).float())


def test_without_a_step_it_is_the_source_model(cnn, golden_images, source):
    logits = tta.adapt(cnn, "ttt_head", source=source, steps=0)(golden_images[:BATCH])
    torch.testing.assert_close(logits, cnn.eval()(golden_images[:BATCH]).detach())


def test_what_follows_the_head_still_follows(cnn, golden_images, source):
    """A temperature behind the head, and a choice of classes, are applied to the heads' logits too."""

    class Behind(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = cnn

        def forward(self, x):
            return self.inner(x)[:, 2:6] / 2

    whole, part = (tta.adapt(m, "ttt_head", source=source, steps=3)(golden_images[:BATCH]) for m in (cnn, Behind()))
    torch.testing.assert_close(part, whole[:, 2:6] / 2)


def test_a_search_of_ones_own(cnn, golden_images, source):
    def farthest(features, known, number):
        return torch.cdist(features, known).topk(number).indices.numpy()

    images = golden_images[:BATCH]
    by_name, own = (
        tta.adapt(cnn, "ttt_head", source=source, neighbours=64, steps=3, **more)(images)
        for more in ({}, {"search": farthest})
    )
    torch.testing.assert_close(own, by_name)  # of all images either end is the same
    assert (tta.adapt(cnn, "ttt_head", source=source, neighbours=5, search=farthest)(images) - by_name).abs().max() > 1


def test_statistics_saved_are_those_of_the_images(cnn, golden_images, source, tmp_path):
    needs = tta.methods.source_needs(cnn, "ttt_head", capacity=20)
    tta.SourceStatistics.record(cnn, needs, source).save(tmp_path / "source.safetensors")
    by_file, by_images = (
        tta.adapt(cnn, "ttt_head", source=given, capacity=20) for given in (tmp_path / "source.safetensors", source)
    )
    assert by_file.features.shape == (20, 64)
    assert torch.equal(by_file(golden_images[:BATCH]), by_images(golden_images[:BATCH]))
    with pytest.raises(ValueError, match="labelled_features needs labelled source images"):
        tta.adapt(cnn, "ttt_head", source=source.tensors[0])


def test_what_is_kept_is_a_random_sample_however_the_images_come():
    """Each image as likely, whether it comes first or last; and labels stay with their features."""
    model, samples = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 1000)), 300
    images = torch.arange(1000.0)[:, None, None, None].expand(-1, 3, 1, 1)
    need, found = Need("labelled_features", ("1",), labels=True, settings={"samples": samples}), []
    for size in (7, 1000):
        batches = [(part, part[:, 0, 0, 0].long()) for part in images.split(size)]
        found.append(tta.SourceStatistics.record(model, [need], batches).get(need))
    assert torch.equal(found[0]["features"], found[1]["features"])
    labels = found[0]["labels"]
    assert torch.equal(found[0]["features"][:, 0].long(), labels)
    assert torch.equal(labels, labels.unique())  # none twice, in their order
    assert len(labels) == samples
    assert (labels < 500).float().mean() == pytest.approx(0.5, abs=0.1)  # standard deviation: 0.024


def test_a_label_that_is_no_class_is_refused(cnn, golden_source):
    with pytest.raises(ValueError, match="outside 0 to 9"):
        tta.adapt(cnn, "ttt_head", source=[(golden_source[:8], torch.full((8,), 10))])
