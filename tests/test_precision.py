"""mAP: recomputed plainly, beside torchmetrics, and in results, tables and refusals."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import tta
from tta import tasks
from tta.results import boxes
from tta.tasks import detection


def images(count):
    return torch.rand(count, 3, 48, 64, generator=torch.Generator().manual_seed(1))


class Scripted(nn.Module):
    """A detector whose boxes are those of a list, one after another."""

    def __init__(self, script):
        super().__init__()
        self.conv, self.script, self.at = nn.Conv2d(3, 1, 1), script, 0

    def forward(self, x):
        self.at += len(x)
        return [dict(one) for one in self.script[self.at - len(x) : self.at]]


def average_precision(found, truth):
    """Of one class at an overlap of half: greedy by score, each truth once, precision at 101 recalls."""
    rows = sorted(((float(s), n, b) for n, (boxes, scores) in enumerate(found) for b, s in zip(boxes, scores, strict=True)), reverse=True, key=lambda row: row[0])  # fmt: skip
    used, right = [set() for _ in truth], []
    for _, number, box in rows:
        overlap = [
            _overlap(box, other) if place not in used[number] else 0.0 for place, other in enumerate(truth[number])
        ]
        best = int(np.argmax(overlap)) if overlap else -1
        right.append(best >= 0 and overlap[best] >= 0.5)
        if right[-1]:
            used[number].add(best)
    hits, total = np.cumsum(right), sum(map(len, truth))
    recall, precision = hits / total, hits / np.arange(1, len(hits) + 1)
    return 100 * np.mean([precision[recall >= point].max(initial=0) for point in np.linspace(0, 1, 101)])


def _overlap(a, b):
    size = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod()
    return float(size / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - size))


@pytest.fixture
def scripted():
    """Twelve pictures of two domains with one to four true boxes of two classes, and boxes found near them or elsewhere."""
    pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")
    draws = torch.Generator().manual_seed(4)
    truth, found = [], []
    for number in range(12):
        count = (1, 2, 3, 1, 3, 4)[
            number % 6
        ]  # 7 boxes of each class: no recall is a hundredth, which rounding would move
        corner = 40 * torch.rand(count, 2, generator=draws)
        boxes = torch.cat([corner, corner + 10 + 10 * torch.rand(count, 2, generator=draws)], 1)
        labels = 1 + (torch.arange(count) + sum(len(one["labels"]) for one in truth)) % 2
        truth.append({"boxes": boxes, "labels": labels})
        moved = boxes + 2 * torch.randn(count, 4, generator=draws)
        other = torch.tensor([[0.0, 0.0, 9.0, 9.0]])
        found.append(
            {
                "boxes": torch.cat([moved, other]),
                "labels": torch.cat([labels, torch.tensor([1])]),
                "scores": torch.rand(count + 1, generator=draws),
            }
        )
    samples = list(zip(images(12), truth, strict=True))
    stream = tta.stream({"a": samples[:6], "b": samples[6:]}, task="detection", batch_size=4)
    return SimpleNamespace(model=Scripted(found), found=found, truth=truth, stream=stream)


def plainly(found, truth):
    """mAP at an overlap of half."""
    per_class = []
    for label in (1, 2):
        of = [(one["boxes"][one["labels"] == label], one["scores"][one["labels"] == label]) for one in found]
        per_class.append(average_precision(of, [one["boxes"][one["labels"] == label] for one in truth]))
    return float(np.mean(per_class))


def test_map_is_the_plain_recomputation_per_domain(scripted, tmp_path):
    result = tta.evaluate(tta.adapt(scripted.model, "source", task="detection"), scripted.stream, progress=False)
    expected = [plainly(scripted.found[part], scripted.truth[part]) for part in (slice(6), slice(6, 12))]
    assert 10 < min(expected) < max(expected) < 90
    assert list(result.scores.values()) == pytest.approx(expected, abs=0.01)
    assert result.score == ("mAP@50", pytest.approx(np.mean(expected), abs=0.01), "up")
    assert result.metrics["map_50_stream"] == pytest.approx(plainly(scripted.found, scripted.truth), abs=0.01)
    assert result.samples == 12
    assert np.isnan(result.mean_error)
    result.save(tmp_path)
    assert tta.Result.load(tmp_path) == result
    assert {"boxes", "score"} <= {*result.curves}


def test_map_is_computed_once_a_domain_and_once_for_the_stream(scripted, monkeypatch):
    asked = []
    for module in (detection, boxes):
        computed = module.precision
        monkeypatch.setattr(
            module, "precision", lambda *parts, of=computed: (asked.append(len(parts[0])), of(*parts))[1]
        )
    result = tta.evaluate(tta.adapt(scripted.model, "source", task="detection"), scripted.stream, progress=True)
    assert asked == [6, 6, 12]
    assert result.metrics["domains"]["a"]["map_50"] == result.scores["a"]
    assert {*result.metrics["domains"]["a"]["classes"]} == {"1", "2"}


def test_a_table_has_a_difference_without_an_interval(scripted):
    result = tta.evaluate(tta.adapt(scripted.model, "source", task="detection"), scripted.stream, progress=False)
    text = str(tta.compare([result, result], "source"))
    assert "Online mAP@50 in %" in text
    assert "error" not in text
    with pytest.raises(ValueError, match="There is no interval of mAP"):
        tta.results.error_interval(result)


def test_a_result_is_read_without_the_extra(scripted, tmp_path, monkeypatch):
    result = tta.evaluate(tta.adapt(scripted.model, "source", task="detection"), scripted.stream, progress=False)
    result.save(tmp_path)
    monkeypatch.setattr(detection, "find_spec", lambda name: None)
    assert tta.Result.load(tmp_path).score == result.score


def test_a_missing_extra_is_said_at_the_first_batch(scripted, monkeypatch):
    monkeypatch.setattr(detection, "find_spec", lambda name: None)
    adapter = tta.adapt(scripted.model, "source", task="detection")
    with pytest.raises(ValueError, match=r"pip install 'tta-toolkit\[detection\]'"):
        tta.evaluate(adapter, scripted.stream, progress=False)
    assert adapter.progress().batches == 1


def test_pictures_without_a_true_box_are_not_scored(scripted):
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)}
    stream = tta.stream({"a": [(image, none) for image in images(4)]}, task="detection", batch_size=2)
    assert np.isnan(tta.evaluate(tta.adapt(scripted.model, "source"), stream, progress=False).score.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"oracle_steps": 2}, "oracle_steps chooses"), ({"clean": True}, "error on clean images is of classes")],
)
def test_what_needs_classes_is_refused(settings, said, scripted):
    settings = {name: scripted.stream if value is True else value for name, value in settings.items()}
    adapter = tta.adapt(scripted.model, "source", task="detection")
    with pytest.raises(ValueError, match=said):
        tta.evaluate(adapter, scripted.stream, progress=False, **settings)


def test_labels_of_another_kind_are_refused(scripted):
    stream = tta.stream({"a": [(image, 1) for image in images(2)]}, batch_size=2)
    with pytest.raises(
        ValueError, match=r"Make the stream with task='detection'|make the stream\s+with task='detection'"
    ):
        tta.evaluate(tta.adapt(scripted.model, "source", task="detection"), stream, progress=False)


def test_precision_is_that_of_torchmetrics():
    """Sixty crowded pictures of three classes, some boxes crowds, scores that tie, recalls of exact hundredths."""
    pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")
    from torchmetrics.detection import MeanAveragePrecision

    draws = np.random.default_rng(0)
    truth = np.full((60, 12, 6), np.nan, np.float32)
    found = np.full((60, 130, 6), np.nan, np.float32)  # more than the 100 that count
    for number in range(60):
        count = draws.integers(1, 13)
        corner = draws.uniform(0, 200, (count, 2))
        truth[number, :count, :4] = np.concatenate([corner, corner + draws.uniform(5, 120, (count, 2))], 1)
        truth[number, :count, 4], truth[number, :count, 5] = draws.integers(1, 4, count), draws.random(count) < 0.1
        near = np.repeat(truth[number, :count], 130 // count, 0)
        near[:, :4] += draws.normal(0, 6, (len(near), 4))
        near[:, 5] = draws.random(len(near)).round(2)
        near = near[: draws.integers(0, len(near) + 1)] if number % 7 else near
        found[number, : len(near)] = near
    measured = MeanAveragePrecision(class_metrics=True, backend="faster_coco_eval")
    measured.warn_on_many_detections = False
    rows = [[torch.from_numpy(one[~np.isnan(one[:, 4])]) for one in part] for part in (found, truth)]
    measured.update(
        [{"boxes": one[:, :4], "labels": one[:, 4].long(), "scores": one[:, 5]} for one in rows[0]],
        [{"boxes": one[:, :4], "labels": one[:, 4].long(), "iscrowd": one[:, 5].long()} for one in rows[1]],
    )
    theirs, own = measured.compute(), tasks.precision(found, truth)
    assert [own[name] for name in ("map", "map_50", "map_75")] == pytest.approx(
        [100 * float(theirs[name]) for name in ("map", "map_50", "map_75")], abs=1e-5
    )
    assert list(own["classes"].values()) == pytest.approx((100 * theirs["map_per_class"]).tolist(), abs=1e-5)


def test_crowds_alone_have_no_precision():
    pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")
    found, crowd = np.float32([[[0, 0, 9, 9, 1, 0.9]]]), np.float32([[[0, 0, 9, 9, 1, 1]]])
    measured = tasks.precision(found, crowd)
    assert measured.pop("classes") == {}
    assert np.isnan(list(measured.values())).all()
