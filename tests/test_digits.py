"""The embedded digits: training and held-out images share none."""

from pathlib import Path

import pytest
import torch

import tta
from tta.cli import main
from tta.datasets import catalog, digits, digits_open


def test_held_out_images_are_disjoint_from_training():
    train, test = digits.split("train"), digits.split("test")
    assert len(train[0]) == 997
    assert len(test[0]) == 800
    assert not set(train[2].tolist()) & set(test[2].tolist())
    assert not {image.numpy().tobytes() for image in train[0]} & {image.numpy().tobytes() for image in test[0]}


def test_every_class_is_in_both_splits():
    for name in ("train", "test"):
        images, labels, _ = digits.split(name)
        assert labels.bincount(minlength=10).min() > 60
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 32, 32)


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="split is 'train' or 'test'; got 'val'"):
        digits.split("val")


def test_open_digits_arrive_as_unknown_to_a_model_that_never_saw_them():
    stream = tta.stream("digits-open", corruptions=["fog"], samples=200)
    labels = torch.cat([batch.labels for batch in stream])
    _, digit, _ = digits.split("test")
    assert torch.equal(labels, torch.where(digit[:200] < 8, digit[:200], -1))
    with pytest.raises(ValueError, match="8 classes; the model gives 10 logits"):
        tta.evaluate(tta.adapt(tta.load_model("digits-cnn"), "source"), stream, progress=False)
    _, trained_on, _ = digits.split("train")
    assert len(digits_open.source_images()) == int((trained_on < 8).sum())
    result = tta.evaluate(tta.adapt(tta.load_model("digits-cnn-8"), "source"), stream.clean(), progress=False)
    assert result.mean_error < 4
    assert result.metrics["auroc"] > 80


@pytest.mark.parametrize("stream", ["digits-c", "digits-open"])
def test_source_images_come_with_their_labels(stream):
    images, labels = catalog.source_images(stream).tensors
    train, of_train, _ = digits.split("train")
    kept = of_train < (8 if stream == "digits-open" else 10)
    assert torch.equal(images, train[kept])
    assert torch.equal(labels, of_train[kept])


def test_the_net_with_a_rotation_head_is_found_by_its_method(tmp_path, capsys):
    """On a fresh machine: nothing is named, nothing is trained; the head tells turns that chance would not."""
    model = tta.load_model("digits-gn")
    images, labels, _ = digits.split("test")
    assert tta.preflight(model, images, labels).problem is None
    adapter = tta.adapt(model, "ttt")
    x = images[:100].float() / 255
    with torch.no_grad():
        found = [(adapter.auxiliary(x.rot90(turn, (2, 3))).argmax(1) == turn).float().mean() for turn in range(4)]
    assert min(found) > 0.8  # 0.92 to 0.94 are found
    quick = ["samples=6", "corruptions=[contrast]", "--out", str(tmp_path)]
    assert main(["run", "digits-c", "source", "ttt", *quick]) == 0
    assert "ttt on digits-gn (preset digits-c)" in " ".join(capsys.readouterr().err.split())


def test_it_ships_small():
    weights = Path(tta.__file__).parent / "weights" / "digits_gn.safetensors"
    assert weights.stat().st_size < 400_000
