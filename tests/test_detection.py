"""Detectors: the methods that serve them, on torchvision's, and the streams of boxes."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import detection as published
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.misc import FrozenBatchNorm2d

import tta
from conformance import (  # noqa: F401  # the tests are collected here
    changed_and_declared,
    equal,
    equal_states,
    predicts_and_learns_nothing,
    run,
    test_a_bad_pixel_teaches_nothing,
    test_reset_equals_fresh,
    test_save_load_continue_equals_uninterrupted,
)
from tta import norms, tasks
from tta.adapter import export

BATCH = 2
SERVED = tta.list_methods(task="detection")
STILL = {"source", "norm"}  # learn no weights
SETTINGS = {"score_thresh": 0.0, "detections_per_img": 20, "topk_candidates": 50}


def images(count, seed=1, size=(48, 64)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


class Backbone(nn.Sequential):
    """Images (batch, 3, height, width) -> one map of 32 channels at a quarter of the size."""

    out_channels = 32

    def __init__(self, norm_layer):
        super().__init__()
        for cin, cout, stride in ((3, 8, 2), (8, 16, 2), (16, 32, 1)):
            self.extend([nn.Conv2d(cin, cout, 3, stride, 1, bias=False), norm_layer(cout), nn.ReLU(inplace=True)])


def faster_rcnn(backbone, **settings):
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(((16,),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 4, 2),
        box_head=TwoMLPHead(32 * 16, 16),
        box_predictor=FastRCNNPredictor(16, 3),
        box_score_thresh=0.0,
        box_detections_per_img=20,
        rpn_pre_nms_top_n_test=50,
        **settings,
    )


KINDS = {
    "retinanet": lambda b, **s: RetinaNet(b, 3, anchor_generator=AnchorGenerator(((16,),), ((1.0,),)), **SETTINGS, **s),
    "fcos": lambda b, **s: FCOS(b, 3, anchor_generator=AnchorGenerator(((8,),), ((1.0,),)), **SETTINGS, **s),
    "fasterrcnn": faster_rcnn,
}


def detector(kind, norm_layer=nn.BatchNorm2d):
    """A small detector of one of torchvision's classes with random weights, whose BatchNorm layers know noise."""
    torch.manual_seed(0)
    return settled(KINDS[kind](Backbone(norm_layer), min_size=48, max_size=64))


def settled(model):
    """The model with the statistics of noise in its BatchNorm layers: at their defaults activations die out."""
    model.eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train().momentum = 1.0
    with torch.no_grad():
        model(images(4, 9))
    return model.eval()


@pytest.fixture(scope="module")
def built():
    """Each kind of detector, built once: adapters copy it."""
    made = {}
    return lambda kind: made.setdefault(kind, detector(kind))


def adapted(model, method, **hparams):
    return tta.adapt(model, method, source=images(4, 9), **hparams)


@pytest.fixture(params=SERVED)
def make(request, built):
    settings = {"lr": 1e-6, "source_batch_size": 2} if request.param == "actmad" else {}
    build = lambda: adapted(built("fasterrcnn"), request.param, task="detection", **settings)  # noqa: E731
    build.method = request.param
    return build


@pytest.fixture
def batches():
    return list(images(3 * BATCH).split(BATCH))


# ---------------------------------------------------------------------- outputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", SERVED)
def test_outputs_are_the_detectors_own(kind, method, built):
    settings = {"lr": 1e-9, "source_batch_size": 2} if method == "actmad" else {}
    adapter = adapted(built(kind), method, **settings)  # the task is recognised
    found = adapter(images(BATCH))
    with torch.no_grad():
        own = built(kind)(images(BATCH))
    assert [one.keys() for one in found] == [one.keys() for one in own]
    assert not any(value.requires_grad for one in found for value in one.values())
    assert sum(len(one["boxes"]) for one in found) > 0
    assert adapter.task is tasks.DETECTION
    if method != "norm":  # which normalises by the batch
        for one, other in zip(found, own, strict=True):
            assert torch.allclose(one["scores"], other["scores"], atol=1e-4)


PUBLISHED = {
    "ssdlite320_mobilenet_v3_large": {"score_thresh": 0.0, "topk_candidates": 20},
    "retinanet_resnet50_fpn": {"min_size": 64, "max_size": 64, "score_thresh": 0.0, "topk_candidates": 20},
    "fcos_resnet50_fpn": {"min_size": 64, "max_size": 64, "score_thresh": 0.0, "topk_candidates": 20},
    "fasterrcnn_resnet50_fpn_v2": {"min_size": 64, "max_size": 64, "box_score_thresh": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_torchvisions_own_detectors_are_served(name):
    torch.manual_seed(0)
    model = settled(getattr(published, name)(weights=None, weights_backbone=None, num_classes=3, **PUBLISHED[name]))
    for method, settings in (("source", {}), ("norm", {}), ("actmad", {"lr": 1e-9, "source_batch_size": 2})):
        found = adapted(model, method, **settings)(images(BATCH))
        assert [one.keys() for one in found] == [{"boxes", "labels", "scores"}] * BATCH
        assert all(one["scores"].isfinite().all() for one in found)


@pytest.mark.parametrize("name", [name for name in sorted(tta.list_methods()) if name not in SERVED])
def test_others_refuse_with_their_reason(name, built):
    with pytest.raises(ValueError, match=r"needs .*; this model returns boxes"):
        tta.adapt(built("fcos"), name, task="detection")


def test_others_refuse_at_the_first_batch(built):
    adapter = tta.adapt(built("fcos"), "tent")
    with pytest.raises(ValueError, match=r"'Tent' needs class probabilities; this model returns boxes"):
        adapter(images(BATCH))


def test_the_sentence_of_refusal_names_those_that_serve():
    assert tasks.DETECTION.lacking.endswith(f"Methods for detection: {', '.join(SERVED)}.")


@pytest.mark.parametrize("output", [torch.zeros(2, 3), [{"boxes": torch.zeros(0, 4)}] * 2, []])
def test_other_outputs_are_named(output):
    model = nn.Sequential(nn.Conv2d(3, 1, 1))
    model.register_forward_hook(lambda *_: output)
    with pytest.raises(TypeError, match="expects a list with a dictionary of boxes, labels and scores"):
        tta.adapt(model, "source", task="detection")(images(2))


def test_bad_pictures_have_no_boxes_where_they_are_skipped(built):
    adapter = tta.adapt(built("fcos"), "source", on_bad="skip")
    batch = images(3)
    batch[1, 0, 0, 0] = torch.nan
    found, good = adapter(batch), tta.adapt(built("fcos"), "source")(batch[[0, 2]])
    assert equal([found[0], found[2]], good)
    assert found[1]["boxes"].shape == (0, 4)
    assert [len(one["scores"]) for one in adapter(batch[1:2])] == [0]


# ---------------------------------------------------------------------- conformance


def boxes_of(count):
    return [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])} for _ in range(count)]


def test_plain_loop_equals_trainer(make, batches):
    pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")
    plain, driven = make(), make()
    expected = run(plain, batches)
    samples = list(zip(torch.cat(batches), boxes_of(6), strict=True))
    result = tta.evaluate(
        driven, tta.stream({"a": samples}, task="detection", batch_size=BATCH), progress=False, accelerator="cpu"
    )
    assert equal_states(plain.state_dict(), driven.state_dict())
    for row, one in zip(result.predictions.found, expected, strict=True):
        assert np.array_equal(row[: len(one["boxes"]), :4], one["boxes"].numpy())
        assert np.array_equal(row[: len(one["boxes"]), 5], one["scores"].numpy())
        assert np.isnan(row[len(one["boxes"]) :]).all()
    backward = 0 if make.method in STILL else 6
    assert (result.metrics["forwards"], result.metrics["backwards"]) == (6, backward)


def test_predict_learns_nothing_and_only_declared_parameters_change(make, batches):
    adapter = make()
    changed, declared = changed_and_declared(adapter, batches[:1])
    assert changed <= declared
    assert bool(changed) == (make.method not in STILL)
    assert predicts_and_learns_nothing(adapter, batches[2])


def test_an_exported_detector_is_the_users_own(built):
    adapter = tta.adapt(built("fcos"), "norm")
    adapter(images(4))
    plain = adapter.export()
    assert plain.state_dict().keys() == built("fcos").state_dict().keys()
    with torch.no_grad(), adapter.paused():
        for one, other in zip(plain(images(4)), adapter(images(4)), strict=True):
            assert torch.allclose(one["scores"], other["scores"], atol=1e-4)


# ---------------------------------------------------------------------- frozen layers, ActMAD's options


@pytest.fixture(scope="module")
def frozen():
    model = detector("retinanet", FrozenBatchNorm2d)
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, FrozenBatchNorm2d):  # values of their own, as pretrained ones have
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.normal_(0, 0.1)
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("method", ["norm", "actmad"])
def test_frozen_layers_are_refused(method, frozen):
    with pytest.raises(ValueError, match=r"has 3 FrozenBatchNorm2d layers, .* constants .*frozen='thaw'"):
        adapted(frozen, method)


def test_thawed_layers_have_the_values_of_the_frozen(frozen):
    model = copy.deepcopy(frozen)
    norms.thaw(model)
    assert norms.frozen(model) == []
    with torch.no_grad():
        assert torch.allclose(model.backbone(images(2)), frozen.backbone(images(2)), atol=1e-5)


def test_thawed_layers_predict_the_same_and_adapt(frozen):
    adapter = adapted(frozen, "actmad", frozen="thaw", source_batch_size=2, lr=1e-3)
    with torch.no_grad(), adapter.paused():
        for one, own in zip(adapter(images(BATCH)), frozen(images(BATCH)), strict=True):
            assert torch.allclose(one["scores"], own["scores"], atol=1e-5)
    assert len(adapter.alignment.layers) == 3
    before = adapter.model.backbone[1].weight.clone()
    adapter(images(BATCH))
    assert not torch.equal(adapter.model.backbone[1].weight, before)
    assert sum(isinstance(layer, FrozenBatchNorm2d) for layer in frozen.modules()) == 3  # the caller's own


def test_thawed_layers_normalise_by_the_batch_and_are_exported(frozen):
    adapter = adapted(frozen, "norm", frozen="thaw")
    seen = {}
    adapter.model.backbone[1].register_forward_hook(lambda layer, args, out: seen.update(x=args[0], y=out.clone()))
    adapter(images(BATCH))
    var, mean = torch.var_mean(seen["x"], (0, 2, 3), correction=0)
    layer = frozen.backbone[1]
    expected = (seen["x"] - mean[:, None, None]) / (var + layer.eps).sqrt()[:, None, None]
    expected = expected * layer.weight[:, None, None] + layer.bias[:, None, None]
    assert torch.allclose(seen["y"], expected, atol=1e-4)
    plain = adapter.export()
    assert torch.allclose(plain.backbone[1].running_mean, mean, atol=1e-5)
    frozen_again = detector("retinanet", FrozenBatchNorm2d)
    frozen_again.load_state_dict(plain.state_dict())  # under the user's own keys


def test_named_layers_need_no_thawing(frozen):
    model = copy.deepcopy(frozen)
    model.backbone.append(nn.BatchNorm2d(32))
    assert adapted(model, "actmad", layers=["backbone.9"], source_batch_size=2).alignment.layers == ("backbone.9",)


@pytest.mark.parametrize("skip", [0, 2])
def test_actmad_skips_layers_and_scales_its_loss(skip, built):
    model = built("retinanet")
    adapter = adapted(model, "actmad", skip_layers=skip, loss_scale=2.0, source_batch_size=2)
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)][skip:]
    assert list(adapter.alignment.layers) == names
    seen = {name: [] for name in names}
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda *a, n=n: seen[n].append(a[2].detach().clone()))
        for n in names
    ]
    with torch.no_grad():
        for batch in (*images(4, 9).split(2), images(BATCH)):
            model(batch)
    for hook in hooks:
        hook.remove()
    expected = 0.0
    for first, second, test in seen.values():
        for moment in (lambda x: x.mean(0), lambda x: x.var(0)):
            expected += 2 * (moment(test) - (moment(first) + moment(second)) / 2).abs().mean()
    _, loss = adapter.alignment(adapter.model, images(BATCH))
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"skip_layers": -1}, "0 or more"),
        ({"loss_scale": 0.0}, "above 0"),
        ({"frozen": "melt"}, "melt"),
        ({"skip_layers": 99}, "Skip fewer"),
    ],
)
def test_settings_are_checked(setting, said, built):
    with pytest.raises((ValueError, tta.config.ConfigError), match=said):
        adapted(built("fcos"), "actmad", **setting)


def test_no_frozen_layer_is_no_reason_to_refuse(built):
    assert norms.frozen(built("fcos")) == []
    norms.refuse_frozen(built("fcos"))


# ---------------------------------------------------------------------- streams


def test_boxes_are_padded_and_flat_ones_left_out():
    boxes = [
        {"boxes": [[0, 0, 5, 5], [1, 1, 1, 9]], "labels": [1, 2]},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0)},
        {
            "boxes": torch.tensor([[0, 0, 2, 2.0], [3, 3, 6, 6]]),
            "labels": torch.tensor([2, 1]),
            "iscrowd": torch.tensor([0, 1]),
        },
    ]
    stream = tta.stream({"a": list(zip(images(3), boxes, strict=True))}, task="detection", batch_size=3)
    assert stream.task == "detection"
    with pytest.warns(UserWarning, match=r"Domain 'a', sample 0: 1 of the 2 boxes have no width or no height"):
        (batch,) = stream
    nan = [float("nan")] * 6
    expected = [
        [[0, 0, 5, 5, 1, 0], nan],
        [nan, nan],
        [[0, 0, 2, 2, 2, 0], [3, 3, 6, 6, 1, 1]],
    ]
    assert torch.equal(batch.labels.nan_to_num(-7), torch.tensor(expected).nan_to_num(-7))


def test_domains_with_other_numbers_of_boxes_share_a_batch():
    one, two = [(images(1)[0], boxes_of(1)[0])], [(images(1)[0], {"boxes": [[0, 0, 5, 5]] * 3, "labels": [1, 2, 1]})]
    stream = tta.stream({"a": one, "b": two}, task="detection", batch_size=2, protocol="mixed")
    (batch,) = stream
    assert sorted((~batch.labels[:, :, 4].isnan()).sum(1).tolist()) == [1, 3]
    assert batch.labels.shape == (2, 3, 6)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (3, r"sample 0: expected a dictionary with 'boxes' \(n, 4\) and 'labels' \(n,\); got int"),
        ({"boxes": [[0, 0, 1, 1]]}, "got a dictionary of boxes"),
        ({"boxes": [[0, 0, 1, 1]], "labels": [1, 2]}, "1 boxes, 2 labels"),
    ],
)
def test_other_labels_are_named(label, said):
    with pytest.raises(ValueError, match=said):
        next(iter(tta.stream({"a": [(images(1)[0], label)]}, task="detection")))


def test_images_of_one_batch_have_one_size():
    samples = [(images(1)[0], boxes_of(1)[0]), (images(1, size=(40, 40))[0], boxes_of(1)[0])]
    with pytest.raises(ValueError, match=r"one size; got \[\(40, 40\), \(48, 64\)\]. Use batch_size=1"):
        next(iter(tta.stream({"a": samples}, task="detection", batch_size=2)))


def test_protocols_by_class_are_refused():
    with pytest.raises(ValueError, match="has boxes of several classes"):
        tta.stream({"a": [(images(1)[0], boxes_of(1)[0])]}, task="detection", protocol="correlated", delta=0.1)


def test_classes_of_a_detector_of_16_bits_keep_their_numbers():
    one = {"boxes": torch.ones(1, 4).bfloat16(), "labels": torch.tensor([1001]), "scores": torch.ones(1).bfloat16()}
    assert tasks.DETECTION.columns([one], torch.zeros(1, 1, 6))["found"][0, 0].tolist() == [1, 1, 1, 1, 1001, 1]


def test_a_guard_refuses_boxes_that_the_source_model_gives_first(built):
    """A picture that repeats is answered by the source model, so that it recognises the task."""
    with pytest.raises(ValueError, match=r"The guard compares probabilities .* does not serve detection"):
        adapted(built("fcos"), "norm", guard=True)(images(1, 3).expand(16, -1, -1, -1))


def test_workers_refuse_boxes_that_they_recognise_too(built):
    adapter, x = adapted(built("fcos"), "norm"), images(2)
    adapter.workers = SimpleNamespace(size=2, total=len)
    adapter.outputs(None, (x,), [{"boxes": torch.ones(1, 4), "labels": torch.ones(1), "scores": torch.ones(1)}] * 2)
    with pytest.raises(ValueError, match="A stream of task='detection' is not shared by several workers"):
        adapter._check_first(tta.adapter.Output([]), x)


def test_a_frozen_layer_in_two_places_is_thawed_in_both():
    layer = FrozenBatchNorm2d(3)
    model = nn.ModuleDict({"first": layer, "again": nn.Sequential(layer)})
    norms.thaw(model)
    assert type(model["first"]) is nn.BatchNorm2d
    assert model["again"][0] is model["first"]


def test_statistics_of_a_frozen_layer_are_where_it_is():
    stored = export.stored_statistics(nn.Sequential(FrozenBatchNorm2d(3)).to("meta"))
    assert {value.device.type for value in stored["0"].values()} == {"meta"}
