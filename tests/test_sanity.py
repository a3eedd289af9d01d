"""The check before a benchmark: a right model passes, and every usual mistake is named."""

import copy

import pytest
import torch
from torch import nn

import tta
from tta.cli import main
from tta.datasets import digits
from tta.models import HALF, NO_MEAN, NO_STD, ImageClassifier, PreflightWarning

IMAGES, LABELS, _ = digits.split("test")


class Normalise(nn.Module):
    def __init__(self, mean=HALF, std=HALF):
        super().__init__()
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))

    def forward(self, x):
        return (x - self.mean) / self.std


@pytest.fixture
def model():
    return tta.load_model("digits-cnn")


@pytest.mark.parametrize("name", ["digits-cnn", "digits-vit"])
@pytest.mark.parametrize("count", [800, 256, 50])
def test_a_right_model_passes(name, count, recwarn):
    found = tta.preflight(tta.load_model(name), IMAGES[:count], LABELS[:count])
    assert found.problem is None
    assert found.images == count
    assert "published" in str(found)
    assert not [warning for warning in recwarn if issubclass(warning.category, PreflightWarning)]


def test_it_leaves_the_model_as_it_was(model):
    model.train()
    model.model.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    tta.preflight(model, IMAGES[:64], LABELS[:64])
    assert model.training
    assert not model.model.bn1.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def never(model, mean, std):
    """A classifier whose weights expect normalised images, without the normalisation."""
    return ImageClassifier(model.model, mean, std, "mine", (32, 32), clean_error=1.0)


def test_normalised_twice_is_caught(model):
    wrong = nn.Sequential(Normalise(), model)
    with pytest.warns(PreflightWarning, match=r"normalised twice, by 0\.5 and 0\.5 mean and std"):
        found = tta.preflight(wrong, IMAGES, LABELS, model.clean_error)
    assert found.error > 10


def test_never_normalised_is_caught(model):
    with pytest.warns(PreflightWarning, match=r"never normalised: the weights expect 0\.5 and 0\.5"):
        tta.preflight(never(model, NO_MEAN, NO_STD), IMAGES, LABELS)


def test_images_that_are_not_in_0_1_are_named(model):
    with pytest.warns(PreflightWarning, match=r"The images lie in \[0, 255\]; expected \[0, 1\]"):
        tta.preflight(model, IMAGES.float(), LABELS)


def test_another_order_of_classes_is_named(model):
    with pytest.warns(PreflightWarning, match="classes are in another order"):
        tta.preflight(model, IMAGES, (LABELS + 3) % 10)


def test_labels_beyond_the_classes_are_named(model):
    with pytest.warns(PreflightWarning, match="The model has 10 classes, the labels go up to 109"):
        tta.preflight(model, IMAGES, LABELS + 100)


def test_another_input_size_is_named(model):
    small = nn.functional.interpolate(IMAGES / 255, size=(9, 9))
    with pytest.warns(PreflightWarning, match="have 9 x 9 pixels, the weights expect 32 x 32"):
        tta.preflight(model, small, LABELS)


def test_a_model_that_guesses_gets_the_list(model):
    """There is no published error, but one class for all images is no better than guessing."""
    with torch.no_grad():
        model.model.fc.bias[3] = 1000
    model.clean_error = None
    with pytest.warns(PreflightWarning, match=r"no better than guessing among 10 classes\. Usual causes"):
        tta.preflight(model, IMAGES, LABELS)


class Tinted(nn.Module):
    """Tells two classes apart by a threshold on what reaches it: a wrong normalisation errs on the images near to it."""

    def forward(self, x):
        level = x.mean((1, 2, 3))
        return torch.stack([-level, level], 1)


def tinted(mean, **settings):
    return ImageClassifier(Tinted(), mean, HALF, "mine", None, **settings)


def grey(levels):
    return levels.view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


@pytest.mark.parametrize("expected", [None, 10.0])
def test_few_images_show_a_mean_that_costs_few_points(expected, recwarn):
    """7.5 % more than promised on 200 images is within what chance allows, but a mean that repairs all of it is not."""
    levels = torch.linspace(0, 1, 200)
    labels = (levels > 0.5).long()
    labels[:20] = 1  # errs on 10 % in any case
    found = tta.preflight(tinted(HALF), grey(levels), labels, expected)
    assert found.error == pytest.approx(10)
    assert found.problem is None
    off = (0.425,) * 3
    with pytest.warns(
        PreflightWarning, match=r"on 17\.5 % of 200 clean.*on 10\.0 % of the same.*other values than.*0\.5 and"
    ):
        tta.preflight(tinted(off), grey(levels), labels, expected)
    recwarn.clear()
    few = torch.arange(0, 200, 4)
    assert tta.preflight(tinted(off), grey(levels[few]), labels[few], expected).problem is None  # 4 images are no proof
    assert not recwarn.list


def test_the_interval_of_the_error_is_shown_and_unknown_classes_are_left_out(model):
    model.clean_error = None
    labels = LABELS[:100].clone()
    labels[50:] = -1
    found = tta.preflight(model, IMAGES[:100], labels)
    assert (found.images, found.error) == (50, 0)
    assert str(found) == "clean error 0.0 % of 50 images (95 % interval 0.0 to 7.1)"


def test_without_images_there_is_nothing_to_check(model):
    with pytest.raises(ValueError, match="Expected images and as many labels, some of them 0 or more; got 0 and 800"):
        tta.preflight(model, IMAGES[:0], LABELS)


TWICE = """
import torch, tta
from tta.models import HALF, ImageClassifier

class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = tta.load_model("digits-cnn")
    def forward(self, x):
        return self.inner(x)

def model():
    return ImageClassifier(Twice(), HALF, HALF, "twice", (32, 32), clean_error=1.0)
"""


def test_run_warns_of_a_model_that_normalises_twice(tmp_path, capsys, monkeypatch):
    (tmp_path / "twice.py").write_text(TWICE)
    monkeypatch.syspath_prepend(tmp_path)
    quick = ["samples=50", "corruptions=[fog]", "--out", str(tmp_path / "out")]
    assert main(["run", "digits-c", "source", "model=twice:model", *quick]) == 0
    assert "normalised twice, by the model's own" in " ".join(capsys.readouterr().err.split())
    assert main(["run", "digits-c", "source", *quick]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "digits-cnn: clean error" in shown
    assert "twice" not in shown


def test_a_stream_without_clean_images_is_not_checked(tmp_path):
    data = [(torch.rand(3, 32, 32), 0) for _ in range(4)]
    assert tta.stream({"a": data}).clean_images(10) is None
    images, labels = tta.stream("digits-c", corruptions=["fog"]).clean_images(10)
    assert torch.equal(images, IMAGES[:10])
    assert torch.equal(labels, LABELS[:10])
