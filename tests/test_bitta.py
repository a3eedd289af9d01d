"""BiTTA: updates recomputed for every mix of answers, its questions, its dropout, and its options."""

import copy

import pytest
import torch

import tta
from tta import norms

CLASSES, BATCH = 5, 12
# answers to the twelve samples of a batch: right, wrong, none
MIXES = {
    "none": "............",
    "right": "r...r.......",
    "wrong": ".w......ww..",
    "both": "rw..r...w...",
    "all right": "rrrrrrrrrrrr",
    "all wrong": "wwwwwwwwwwww",
    "all": "rwrwrrwwrwrw",
}


@pytest.fixture
def model(small_cnn):
    torch.manual_seed(0)
    network = small_cnn(8, CLASSES)
    network.norm.running_mean.normal_()
    network.norm.running_var.uniform_(0.5, 2)
    network.norm.weight.data.uniform_(0.5, 1.5)
    network.fc.weight.data *= 5  # so that the predictions are of several classes, and dropout changes some
    network.fc.bias.data.zero_()
    return network


@pytest.fixture
def images():
    return torch.rand(3, BATCH, 3, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def masks():
    return torch.rand(4, 8, generator=torch.Generator().manual_seed(2)) > 0.7


def by_batch(model, x, mask=None):
    """Logits by the statistics of the batch, with or without dropout of the features."""
    values = model.conv(x)
    var, mean = torch.var_mean(values, (0, 2, 3), correction=0, keepdim=True)
    values = (values - mean) / (var + model.norm.eps).sqrt()
    values = values * model.norm.weight.view(-1, 1, 1) + model.norm.bias.view(-1, 1, 1)
    features = values.relu().mean((2, 3))
    return model.fc(features if mask is None else features * mask / 0.7)


def mean_probabilities(model, x, masks):
    return sum(by_batch(model, x, mask).softmax(1) for mask in masks) / len(masks)


class Plain:
    """The paper's algorithm with lists."""

    def __init__(self, model, masks, form="softmax"):
        self.model, self.masks, self.form = copy.deepcopy(model).eval(), masks, form
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9, nesterov=True)
        self.right, self.wrong, self.disagreeing = [], [], 0

    def predict(self, x):
        with torch.no_grad():
            logits = self.model(x)
            values = self.model.conv(x)
            var, mean = torch.var_mean(values, (0, 2, 3))
            self.model.norm.running_mean.mul_(0.7).add_(0.3 * mean)
            self.model.norm.running_var.mul_(0.7).add_(0.3 * var)
        return logits

    def cross_entropy(self, probabilities, label):
        if self.form == "log":
            return -torch.log(torch.clamp(probabilities[label], min=0.1 / CLASSES))
        return -torch.log(probabilities.exp()[label] / probabilities.exp().sum())

    def learn(self, unlabelled):
        x = torch.stack([*(image for image, _ in self.right), *(image for image, _ in self.wrong), *unlabelled])
        for _ in range(3):
            probabilities = mean_probabilities(self.model, x, self.masks)
            plain = by_batch(self.model, x).argmax(1)
            loss, first = 0.0, 0
            for sign, answered in ((1, self.right), (-1, self.wrong)):
                for row, (_, label) in enumerate(answered, start=first):
                    loss = loss + sign * self.cross_entropy(probabilities[row], label) / len(answered)
                first += len(answered)
            agreeing = [row for row in range(first, len(x)) if probabilities[row].argmax() == plain[row]]
            self.disagreeing += len(unlabelled) - len(agreeing)
            for row in agreeing:
                loss = loss + self.cross_entropy(probabilities[row], plain[row]) / len(agreeing)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


@pytest.mark.parametrize("form", ["softmax", "log"])
@pytest.mark.parametrize("mix", MIXES)
def test_updates_recomputed(model, images, masks, mix, form):
    adapter = tta.adapt(model, "bitta", lr=0.05, loss=form, memory_size=64)
    adapter._mask = lambda number, place, x: masks[number]
    plain, waiting = Plain(model, masks, form), []
    for number, x in enumerate(images):
        if number:
            plain.learn([image for image, answer in waiting if answer == "."])
        expected = plain.predict(x)
        output = adapter.step(x)
        assert (output.logits - expected).abs().max() < 1e-4
        told = [(i, answer) for i, answer in enumerate(MIXES[mix]) if answer != "."]
        if told:
            adapter.feedback(output.ids[[i for i, _ in told]], correct=[answer == "r" for _, answer in told])
        for i, answer in told:
            (plain.right if answer == "r" else plain.wrong).append((x[i], expected[i].argmax()))
        new = list(zip(x, MIXES[mix], strict=True))
        waiting = (waiting + new)[-64:]  # the newest, whether answered or not
    moved = (adapter.model.fc.weight - model.fc.weight).abs().max()
    assert moved > 1e-3
    assert plain.disagreeing or mix.startswith("all")


def test_it_asks_where_dropout_leaves_least_of_the_prediction(model, images, masks):
    adapter = tta.adapt(model, "bitta")
    adapter._mask = lambda number, place, x: masks[number]
    shown = adapter(images[0]).argmax(1)
    with torch.no_grad():
        likely = mean_probabilities(copy.deepcopy(adapter.model), images[0], masks)[range(BATCH), shown]
    assert adapter.queries(3) == likely.argsort()[:3].tolist()
    assert set(adapter.queries(3)) == set(likely.argsort()[3:6].tolist())  # by the same order, without those asked


def test_present_predictions_are_those_after_the_statistics_moved(model, images):
    adapter = tta.adapt(model, "bitta", judged="present", bn_momentum=1.0)
    shown = adapter(images[0]).argmax(1)
    with adapter.paused():
        present = adapter(images[0]).argmax(1)
    assert not torch.equal(shown, present)
    ids = adapter.queries(BATCH)
    assert torch.equal(adapter.waiting.labels[adapter.waiting.slots(torch.tensor(ids))], present[ids])


def hooks(adapter):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in adapter.model.modules()]


def test_dropout_is_behind_the_stages_and_leaves_nothing(cnn, golden_images):
    adapter = tta.adapt(cnn, "bitta")
    assert adapter.stages == ["layer1", "layer2", "layer3"]
    before = hooks(adapter)
    shapes, original = [], adapter._mask
    adapter._mask = lambda number, place, x: shapes.append((number, place, *x.shape[1:])) or original(number, place, x)
    adapter(golden_images[:8])
    adapter.queries(1)
    stages = [(16, 16, 16), (32, 8, 8), (64, 4, 4)]
    assert shapes == [(number, place, *shape) for number in range(4) for place, shape in enumerate(stages)]
    assert hooks(adapter) == before


def test_masks_keep_their_share_and_differ(cnn):
    adapter, x = tta.adapt(cnn, "bitta", dropout=0.2), torch.ones(50, 40, 5, 5)
    first, second = adapter._mask(0, 0, x), adapter._mask(0, 0, x)
    assert abs(first.float().mean() - 0.8) < 0.01  # 4.5 standard deviations
    assert not torch.equal(first, second)
    assert (adapter._dropped(0, 0, x).mean() - 1).abs() < 0.01


def test_stages_of_a_transformer_and_of_none(vit, cnn, small_cnn):
    assert norms.stages(vit) == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert norms.stages(vit, most=2) == ["blocks.1", "blocks.3"]
    assert norms.stages(small_cnn(4, 3)) == []
    assert tta.adapt(vit, "bitta")(torch.rand(4, 3, 32, 32)).shape == (4, 10)


def test_restored_weights_are_the_sources(cnn, golden_images):
    def share(restore):
        adapter = tta.adapt(cnn, "bitta", lr=0.01, restore=restore, steps=1)
        for batch in golden_images[:48].split(16):
            adapter(batch)
        pairs = list(zip(adapter.model.parameters(), cnn.parameters(), strict=True))
        return sum(int((p == q).sum()) for p, q in pairs) / sum(p.numel() for p, _ in pairs)

    assert share(0.5) - share(0.0) == pytest.approx(0.5, abs=0.05)
    assert share(1.0) == 1.0


def test_memories_hold_the_newest_answers(model, images):
    adapter = tta.adapt(model, "bitta", memory_size=5)
    ids = adapter.step(images[0]).ids
    adapter.feedback(ids[:8], correct=[True] * 8)
    held, labels = adapter.right.contents()
    assert torch.equal(held, images[0][3:8])
    assert torch.equal(labels, model.eval()(images[0][3:8]).argmax(1))
    assert not len(adapter.wrong)


@pytest.mark.parametrize(
    "change", [{"dropout": 1.0}, {"passes": 0}, {"memory_size": 0}, {"restore": 2}, {"judged": "x"}]
)
def test_settings_that_do_not_fit_are_refused(model, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        tta.adapt(model, "bitta", **change)


@pytest.mark.slow
def test_answers_help(golden_images, golden_labels, cnn):
    """On these 768 digits with every answer true: 38.8 % without questions, 36.5 % with three a batch."""

    def error(budget):
        adapter = tta.adapt(cnn, "bitta", lr=3e-4)
        wrong = 0
        for batch, labels in zip(golden_images.split(64), golden_labels.split(64), strict=True):
            output = adapter.step(batch)
            wrong += int((output.logits.argmax(1) != labels).sum())
            if budget:
                ids = torch.tensor(adapter.queries(budget))
                rows = ids - output.ids[0]
                adapter.feedback(ids, correct=output.logits.argmax(1)[rows] == labels[rows])
        return wrong / 768

    assert error(3) < error(0) - 0.01


def test_a_batch_that_dropout_changes_altogether_teaches_nothing(model, images, monkeypatch):
    adapter = tta.adapt(model, "bitta", steps=2, dropout=0.0)
    undropped = adapter._under_dropout
    monkeypatch.setattr(adapter, "_under_dropout", lambda x: undropped(x).roll(1, dims=1))  # no class stays
    before = copy.deepcopy(dict(adapter.model.named_parameters()))
    for x in images[:2]:
        adapter(x)
    assert (adapter.progress().updates, adapter.progress().filtered) == (0, 2)
    assert all(torch.equal(value, before[name]) for name, value in adapter.model.named_parameters())
