"""Tasks: what outputs are taken for, who refuses them, and pixels as samples."""

import copy
import math

import pytest
import torch

import tta
from tta import augment, methods, tasks
from tta.adapter import Adapter
from tta.functional import entropy, logits_of, rows

METHODS = sorted(tta.list_methods())
SERVED = [name for name in METHODS if "segmentation" in methods.find(name).tasks]
SOURCE = ["eata", "actmad", "psmt", "ttt_mae"]  # those that need source images
NO_VIEWS = {"cotta": {"augment": "none"}, "petal": {"augment": "none"}, "ttt_mae": {"copies": 2, "source_steps": 1}}


def images(count=4, height=16, width=24):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count))


def adapted(model, name, **hparams):
    return tta.adapt(model, name, source=images(8) if name in SOURCE else None, **{**NO_VIEWS.get(name, {}), **hparams})


def test_rows_are_images_then_positions():
    logits = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).float()
    taken = rows(logits)
    assert taken.shape == (2 * 4 * 5, 3)
    assert torch.equal(taken[1 * 20 + 2 * 5 + 3], logits[1, :, 2, 3])
    assert torch.equal(rows(logits[:, :, 0]), logits[:, :, 0].transpose(1, 2).reshape(-1, 3))


def test_rows_of_a_classifier_are_the_tensor_itself():
    logits = torch.rand(4, 3)
    assert rows(logits) is logits


def test_the_sentence_of_refusal_names_those_that_serve():
    assert sorted(tasks.segmentation.SERVED.split(", ")) == SERVED


@pytest.mark.parametrize("name", [name for name in METHODS if name not in SERVED])
def test_a_method_of_one_class_an_image_refuses_maps(name, segmenter):
    with pytest.raises(ValueError, match=r"needs .* an image.*; this model predicts a map.* Methods for maps: source"):
        tta.adapt(segmenter(), name, task="segmentation")


@pytest.mark.parametrize("name", SERVED)
def test_a_map_is_recognised_by_its_shape(name, segmenter):
    given, found = adapted(segmenter(), name, task="segmentation"), adapted(segmenter(), name)
    for number in range(2):
        assert torch.equal(given(images(4 + number)), found(images(4 + number)))
    assert found.task is tasks.SEGMENTATION


def test_a_map_is_recognised_while_paused_by_the_teacher(segmenter):
    adapter = adapted(segmenter(), "cotta")
    with adapter.paused():
        adapter(images())
    assert adapter.task is tasks.SEGMENTATION


def test_maps_are_refused_at_the_first_batch_by_a_method_that_cannot(segmenter):
    adapter = tta.adapt(segmenter(), "memo", views=2, augment="none")
    with pytest.raises(ValueError, match=r"needs one distribution .*; this model predicts a map"):
        adapter(images())


@pytest.mark.parametrize("form", ["out", "logits", "tensor"])
def test_maps_are_found_in_what_models_return_and_fit_the_picture(form, segmenter):
    plain = segmenter(form="tensor", full=False)
    adapter = tta.adapt(segmenter(form=form, full=False), "source", task="segmentation")
    with torch.no_grad():
        small = plain.eval()(images())
    assert small.shape[-2:] != (16, 24)
    large = torch.nn.functional.interpolate(small, size=(16, 24), mode="bilinear", align_corners=False)
    assert torch.equal(adapter(images()), large)


def test_a_teacher_is_read_like_the_model(segmenter):
    adapter = tta.adapt(segmenter(form="out", full=False), "cotta", task="segmentation", augment="none", rst_m=0.0)
    assert adapter(images()).shape == (4, 5, 16, 24)
    with adapter.paused():
        assert adapter(images()).shape == (4, 5, 16, 24)


@pytest.mark.parametrize(
    ("given", "output", "message"),
    [
        ("segmentation", lambda x: x.mean((2, 3)), r"expects maps of logits .* Leave task= out"),
        ("segmentation", lambda x: {"aux": x}, r"a dictionary with aux; expected maps .* outputs=lambda"),
        ("classification", lambda x: x, r"a map of shape \(4, 3, 16, 24\); .* Pass task='segmentation'"),
        (None, lambda x: x.mean((2, 3), keepdim=True), r"expected \(batch, classes\)"),
    ],
)
def test_other_outputs_than_those_of_the_task_are_refused(given, output, message):
    class Model(torch.nn.Conv2d):
        def forward(self, x):
            return output(super().forward(x))

    adapter = tta.adapt(Model(3, 3, 1), "source", task=given)
    with pytest.raises((ValueError, TypeError), match=message):
        adapter(images())


def test_an_unknown_task_is_answered_with_the_nearest(cnn):
    with pytest.raises(ValueError, match="Did you mean 'segmentation'"):
        tta.adapt(cnn, "tent", task="segmentations")


def test_sigmoid_outputs_are_of_images(segmenter):
    with pytest.raises(ValueError, match="labels of an image"):
        tta.adapt(segmenter(), "tent", task="segmentation", outputs="sigmoid")


def test_a_guard_serves_maps_that_it_recognises(segmenter):
    guarded, plain = (tta.adapt(segmenter(), "tent", guard=guard) for guard in (True, False))
    assert torch.equal(guarded(images()), plain(images()))
    assert guarded.guard.counts["checks"] == 1


def test_a_wrapping_method_serves_what_it_wraps(segmenter):
    assert tta.adapt(segmenter(), "gala:tent", task="segmentation")(images()).shape == (4, 5, 16, 24)
    for name in ("gala:rotta", "chain:tent"):
        with pytest.raises(ValueError, match="; this model predicts a map"):
            tta.adapt(segmenter(), name, task="segmentation")


class PixelsAsImages(torch.nn.Module):
    """A segmenter whose pixels are rows of logits: what a classifier's method makes of them is what a map must give."""

    def __init__(self, segmenter):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, x):
        return self.segmenter(x).permute(0, 2, 3, 1).reshape(-1, 5)


@pytest.mark.parametrize("name", [name for name in SERVED if name not in ("gala",)])
def test_a_map_is_its_pixels_as_samples(name, segmenter):
    """The methods of the last commit, fed rows, agree: whole-tensor sums round differently, by 1e-6 a step."""
    sgd = {"optimizer": "sgd", "lr": 1e-3} if name not in ("source", "norm") else {}
    whole = adapted(segmenter(), name, task="segmentation", **sgd)
    parts = adapted(PixelsAsImages(segmenter()), name, task="classification", small_batches=None, **sgd)
    for number in range(3):
        x = images(4 + number)
        assert torch.allclose(rows(whole(x)), parts(x), atol=2e-4), number


def test_a_saved_adapter_knows_its_task(segmenter, tmp_path):
    adapter = tta.adapt(segmenter(form="out"), "tent", task="segmentation")
    adapter(images())
    adapter.save(tmp_path / "state.safetensors")
    loaded = tta.load(tmp_path / "state.safetensors", segmenter(form="out"))
    assert loaded.task is tasks.SEGMENTATION
    assert torch.equal(loaded(images()), copy.deepcopy(adapter)(images()))


def test_bad_pictures_are_skipped_in_maps_too(segmenter):
    adapter = tta.adapt(segmenter(), "tent", task="segmentation", on_bad="skip")
    x = images()
    x[1, 0, 0, 0] = float("nan")
    logits = adapter(x)
    assert logits.shape == (4, 5, 16, 24)
    assert logits[1].isnan().all()
    assert logits[[0, 2, 3]].isfinite().all()


def test_an_adapted_segmenter_is_exported(segmenter):
    adapter = tta.adapt(segmenter(form="out", full=False), "tent", task="segmentation")
    adapter(images())
    plain = adapter.export(images(), exact=True)
    assert set(plain(images())) == {"out"}  # as the user's own module answers


def test_logits_of_takes_no_other_shapes():
    with pytest.raises(ValueError, match=r"expected \(batch, classes\)"):
        logits_of(torch.rand(2, 3, 4))


def test_every_task_of_a_method_is_one():
    for name in METHODS:
        assert set(methods.find(name).tasks) <= set(tasks.NAMES)
    assert Adapter.tasks == ("classification",)  # of a method from elsewhere


def test_the_papers_views_are_refused_for_maps(segmenter):
    for name in ("cotta", "petal"):
        with pytest.raises(ValueError, match=r"moves pixels.*augment='scales'"):
            tta.adapt(segmenter(), name, task="segmentation")
        with pytest.raises(ValueError, match="moves pixels"):
            tta.adapt(segmenter(), name, views=1, ap=1.0)(images())


def test_scales_are_of_maps(cnn, golden_images):
    with pytest.raises(ValueError, match="views of other sizes; expected maps"):
        tta.adapt(cnn, "cotta", augment="scales", ap=1.0)(golden_images[:8])


def test_scales_are_mirrored_views_that_come_back():
    """Linear maps are resized without an error, so that a model that copies its input gives it back."""
    ramp = torch.linspace(0, 1, 32).expand(6, 3, 24, 32)
    view, undo = augment.rescaled(ramp, (6, 16), torch.tensor([True, False] * 3), align_corners=True)
    assert view.shape == (6, 3, 6, 16)
    assert torch.allclose(view[0].flip(2), view[1], atol=1e-6)
    assert torch.allclose(undo(view), ramp, atol=1e-6)


def test_scales_are_seven_views_the_batch_among_them():
    make = augment.augmentation("scales", torch.Generator().manual_seed(0))
    made = [make(images(64)) for _ in range(augment.number("scales", 32))]
    assert torch.equal(made[0], images(64))
    assert [v[0].shape[2:] for v in made[1:]] == [(4, 6), (6, 9), (8, 12), (10, 15), (12, 18), (14, 21)]
    plain = [augment.rescaled(images(64), v[0].shape[2:], align_corners=True)[0] for v in made[1:]]
    alike = torch.stack([(v[0] == p).flatten(1).all(1) for v, p in zip(made[1:], plain, strict=True)])
    assert 0.3 < alike.float().mean() < 0.7  # half of the images are mirrored, each for itself
    assert len({tuple(row.tolist()) for row in alike}) == 6


@pytest.mark.parametrize("name", ["cotta", "petal", "psmt"])
def test_scales_average_over_the_moved_back_maps(name, segmenter):
    """One step in the plainest way: the teacher is still the source model."""
    mean = {"ap": 1.0, "augment": "scales", "lr": 0.0001} | ({"fisher_alpha": 0.0} if name == "psmt" else {})
    adapter = tta.adapt(segmenter(), name, task="segmentation", **mean)
    found = adapter(images())
    model = tta.adapt(segmenter(), "norm", task="segmentation")
    draws, sums = torch.Generator().manual_seed(0), model(images())
    for scale in augment.SCALES:
        flip = torch.rand(4, 1, 1, 1, generator=draws) < 0.5
        small = torch.nn.functional.interpolate(
            torch.where(flip, images().flip(3), images()),
            (int(scale * 16), int(scale * 24)),
            mode="bilinear",
            align_corners=True,
        )
        maps = model(small)
        back = torch.where(flip, maps.flip(3), maps)
        sums = sums + torch.nn.functional.interpolate(back, (16, 24), mode="bilinear", align_corners=True)
    expected = sums / 7 + (model(images()) if name == "psmt" else 0)  # psmt is scored by the sum of both models
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_gate_of_a_pixel_averages_where_the_anchor_is_unsure(segmenter):
    def other(x):
        return 0.5 * x

    def found(**gate):
        return tta.adapt(segmenter(), "cotta", task="segmentation", augment=other, views=1, rst_m=0.0, **gate)(images())

    plain, viewed = found(ap=0.0), found(ap=1.0)
    sure = tta.functional.confidence(plain)
    ap = float(sure.median())
    assert torch.equal(found(gate="pixel", ap=ap), torch.where((sure > ap)[:, None], plain, viewed))


def test_a_hard_target_is_the_teachers_class(segmenter):
    """The step of the cross-entropy with the arg-max of the mean probabilities, recomputed."""
    step = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.0, "rst_m": 0.0, "mt_alpha": 0.0, "ap": 1.0, "views": 2}
    halves = iter([0.5, 1.0] * 2)
    adapter = tta.adapt(
        segmenter(),
        "cotta",
        task="segmentation",
        statistics="source",
        target="hard",
        augment=lambda x: next(halves) * x,
        **step,
    )
    found = adapter(images())
    model = segmenter()
    mean = (model(0.5 * images()).softmax(1) + model(images()).softmax(1)) / 2
    assert torch.allclose(found, mean.detach().log(), atol=1e-5)
    torch.nn.functional.cross_entropy(model(images()), mean.argmax(1)).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
        with adapter.paused():
            assert torch.allclose(adapter(images()), model(images()), atol=1e-5)


def test_the_teacher_is_scored_after_its_step_where_asked(segmenter):
    step = {
        "optimizer": "sgd",
        "lr": 0.5,
        "rst_m": 0.0,
        "mt_alpha": 0.0,
        "augment": lambda x: 0.5 * x,
        "views": 1,
        "ap": 1.0,
    }
    before, after = (
        tta.adapt(segmenter(), "cotta", task="segmentation", score=score, **step) for score in ("before", "after")
    )
    assert not torch.equal(before(images()), found := after(images()))
    with before.paused():
        assert torch.equal(before(images()), found)
    assert (before.scored_forward, after.scored_forward) == ("before", "after")


def test_source_statistics_of_a_plain_segmenter_are_those_of_the_adapter(segmenter):
    """As `tta source` records them: the model returns a dictionary of small maps."""
    model = segmenter(form="out", full=False)
    needs = methods.source_needs(model, "eata", source_batch_size=4)
    recorded = tta.SourceStatistics.record(model, needs, images(8))
    adapter = tta.adapt(model, "eata", source=images(8), source_batch_size=4)
    assert recorded.describe() == adapter.source_statistics
    assert tta.adapt(model, "eata", source=recorded, source_batch_size=4)(images()).shape == (4, 5, 16, 24)


def test_torchvisions_segmenters_are_adapted():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4
    )
    adapter = tta.adapt(model, "tent", task="segmentation")
    assert adapter(images(2, 64, 64)).shape == (2, 4, 64, 64)
    assert adapter.progress().updates == 1


def test_a_segformer_of_transformers_is_adapted():
    """Its output is an object with ``.logits`` at a quarter of the picture's side."""
    transformers = pytest.importorskip("transformers")
    sizes = {"depths": [1] * 4, "hidden_sizes": [16, 32, 32, 64], "num_attention_heads": [1, 2, 2, 4]}
    config = transformers.SegformerConfig(num_labels=5, decoder_hidden_size=32, **sizes)
    model, pictures = transformers.SegformerForSemanticSegmentation(config), torch.rand(2, 3, 64, 64)
    adapter = tta.adapt(model, "tent", task="segmentation", lr=0.1)
    first, second = adapter(pictures), adapter(pictures)
    assert first.shape == (2, 5, 64, 64)
    assert not torch.equal(first, second)


def test_a_view_that_is_too_small_for_the_model_is_named():
    """A kernel of 24 fits pictures of 32 pixels and not their quarters."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 24, stride=8), torch.nn.BatchNorm2d(4))
    adapter = tta.adapt(model, "cotta", task="segmentation", augment="scales", ap=1.0)
    with pytest.raises(
        ValueError, match=r"predicts pictures of 32 x 32 pixels, but not their view of 8 x 8: .*augment="
    ):
        adapter(images(2, 32, 32))
    assert adapter.progress().updates == 0


def test_a_pooled_branch_refuses_one_picture_in_a_sentence():
    """DeepLab's: behind an average over the picture a BatchNorm has one value a channel and picture."""

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pooled = (
                torch.nn.Conv2d(3, 4, 1),
                torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)),
            )

        def forward(self, x):
            return self.conv(x) + self.pooled(x)

    adapter = tta.adapt(Pooled(), "norm", task="segmentation")
    assert adapter(images(4)).shape == (4, 4, 16, 24)
    with pytest.raises(ValueError, match="a single value per channel, which has no variance"):
        adapter(images(1))


def test_few_pictures_of_a_map_are_many_values(segmenter, recwarn):
    tta.adapt(segmenter(), "norm", task="segmentation")(images(2))
    assert not [warning for warning in recwarn if "unreliable" in str(warning.message)]


def test_a_state_is_of_its_task_where_both_say_one(segmenter, cnn):
    said, unsaid = (tta.adapt(segmenter(), "tent", task=task) for task in ("segmentation", None))
    said(images())
    unsaid.load_state_dict(said.state_dict())
    other = tta.adapt(cnn, "tent", task="classification")
    with pytest.raises(ValueError, match="task=classification there, task=segmentation here"):
        said.load_state_dict(other.state_dict())


def test_a_view_of_another_size_brings_its_undo(segmenter):
    adapter = tta.adapt(segmenter(), "cotta", task="segmentation", ap=1.0, views=1, augment=lambda x: x[:, :, ::2, ::2])
    with pytest.raises(ValueError, match=r"a view of size \(8, 12\) without its undo"):
        adapter(images())


def test_entropy_of_pixels_stored_class_by_class_is_that_of_rows():
    maps = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    pixels = rows(maps)
    assert torch.equal(pixels, maps.permute(0, 2, 3, 1).reshape(-1, 5))
    found, expected = entropy(pixels), entropy(pixels.contiguous())
    torch.testing.assert_close(found, expected)
    (of_found,) = torch.autograd.grad(found.square().sum(), maps, retain_graph=True)
    (of_expected,) = torch.autograd.grad(expected.square().sum(), maps)
    torch.testing.assert_close(of_found, of_expected)


def test_the_part_of_a_worker_may_hold_no_map():
    logits, masks = torch.rand(0, 3, 4, 4), torch.zeros(0, 4, 4, dtype=torch.int64)
    tasks.SEGMENTATION.check_labels(masks, logits)
    assert tasks.SEGMENTATION.columns(logits, masks)["confusion"].shape == (0, 3, 3)


def test_minus_infinity_is_a_logit_and_no_number():
    output = torch.tensor([[1.0, -torch.inf]])
    assert tasks.CLASSIFICATION.finite(output).all()
    assert tasks.REGRESSION.finite(output).tolist() == [[True, False]]


def test_unknown_numbers_do_not_count():
    assert tasks.mean_of_known([math.nan, 2.0, None, 4.0]) == 3.0
    assert math.isnan(tasks.mean_of_known([math.nan, None]))
