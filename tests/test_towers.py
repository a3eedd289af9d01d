"""Two towers: the classifier over class names, its cached text features, prompts, views, and who may adapt what."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tta
from tta import taps
from tta.datasets import digits
from tta.methods import _views
from tta.towers import ImageTower, Prompts, TextTower, TwoTowers, WordTokenizer, towers_of, two_towers

IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, 4)

    def forward(self, x):
        return self.linear(x.flatten(1))


class Text(nn.Module):
    """The mean vector of a text's tokens up to the largest id."""

    def __init__(self, name="token_embedding"):
        super().__init__()
        setattr(self, name, nn.Embedding(8, 4))
        self.name = name

    def forward(self, ids):
        return getattr(self, self.name)(ids).cumsum(1)[torch.arange(len(ids)), ids.argmax(1)]


def tokenize(texts):
    return WordTokenizer(["<pad>", "cat", "dog", "red", "old", "<unused>", "<start>", "<end>"], 5)(texts)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return TwoTowers(Image(), Text(), tokenize, ["cat", "red_dog"], ["old {}"], logit_scale=2.0, logit_bias=-1.0)


def test_logits_are_scaled_cosines_with_a_bias(pair):
    text = torch.stack([pair.text(tokenize([name]))[0] for name in ("old cat", "old red dog")])
    expected = torch.tensor(2.0).exp() * F.cosine_similarity(pair.image(IMAGES)[:, None], text[None], dim=2) - 1
    assert torch.allclose(pair(IMAGES), expected, atol=1e-5)


def test_mean_and_std_are_applied_once(pair):
    other = TwoTowers(pair.image, Text(), tokenize, ["cat", "dog"], ["{}"], mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.4))
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(-1, 1, 1), torch.tensor([0.2, 0.2, 0.4]).view(-1, 1, 1)
    assert torch.allclose(other.image_features(IMAGES), pair.image((IMAGES - mean) / std), atol=1e-6)


def test_text_features_are_computed_once_and_dropped_when_the_text_tower_changes(pair):
    calls = []
    pair.text.register_forward_hook(lambda *args: calls.append(1))
    before = pair(IMAGES)
    assert not calls
    pair.text.token_embedding.weight[1] += 1.0
    changed = pair(IMAGES)
    assert calls == [1]
    assert not torch.allclose(changed, before)
    assert torch.equal(pair(IMAGES), changed)
    assert calls == [1]


def test_a_copy_and_a_state_that_is_put_back_need_no_new_text_features(pair):
    twin = copy.deepcopy(pair)
    calls = []
    twin.text.register_forward_hook(lambda *args: calls.append(1))
    twin(IMAGES)
    twin.load_state_dict(pair.state_dict())
    twin(IMAGES)
    assert not calls


def test_a_copy_and_a_cast_of_a_changed_text_tower_are_seen(pair):
    """Their tensors count changes anew, from where the counters of the original stood."""
    twin = copy.deepcopy(pair)
    twin(IMAGES)
    twin.text.token_embedding.weight[1] += torch.tensor([1.0, -2.0, 3.0, 0.0])
    third, cast = copy.deepcopy(twin), copy.deepcopy(pair)
    cast.text.token_embedding.weight[1] += torch.tensor([1.0, -2.0, 3.0, 0.0])
    assert torch.equal(third(IMAGES), twin(IMAGES))
    assert torch.allclose(cast.double()(IMAGES.double()), twin(IMAGES).double(), atol=1e-5)


def test_weights_that_take_the_place_of_others_are_seen(pair):
    pair.text.load_state_dict({"token_embedding.weight": torch.randn(8, 4)}, assign=True)
    found = pair(IMAGES)
    pair.refresh()
    assert torch.equal(pair(IMAGES), found)


def test_a_text_tower_that_alternates_with_its_source_is_compared_once(towers, monkeypatch):
    """cotta predicts with the source weights at every batch; hashing those of a large text tower takes a tenth of a second."""
    adapter = tta.adapt(towers, "cotta", views=2)
    adapter(IMAGES)
    monkeypatch.setattr(two_towers.fingerprint, "of_tensors", None)
    adapter(IMAGES)


def test_a_changed_bias_is_seen(pair):
    before = pair(IMAGES)
    pair.logit_bias += 3
    assert torch.allclose(pair(IMAGES), before + 3, atol=1e-5)


def test_half_precision_leaves_scale_and_logits_whole(pair):
    """The towers are cast; rounding a factor of 148 or a logit of it would cost more than rounding the features does."""
    pair.logit_scale.fill_(5.0)
    pair.half()
    features = pair.image_features(IMAGES.half()).float()
    logits = pair(IMAGES.half())
    assert pair.scale == torch.tensor(5.0).exp()
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, pair.logits(F.normalize(features, dim=-1), pair.class_features), atol=1e-4)
    assert pair.text.token_embedding.weight.dtype == torch.float16


def test_dropout_in_a_text_tower_is_off():
    class Dropping(Text):
        def forward(self, ids):
            return F.dropout(super().forward(ids), 0.5, self.training)

    pair = TwoTowers(Image(), Dropping(), tokenize, ["cat", "dog"], ["{}"])
    assert torch.equal(pair.class_features, F.normalize(pair.text(tokenize(["cat", "dog"])), dim=1))
    assert (pair.class_features != 0).all()


def test_other_braces_in_a_template_are_part_of_the_sentence():
    seen = []
    TwoTowers(
        Image(),
        Text(),
        lambda texts: (seen.extend(texts), tokenize(["cat"] * len(texts)))[1],
        ["cat", "dog"],
        ["{} {old}"],
    )
    assert seen == ["cat {old}", "dog {old}"]


def test_loaded_weights_of_the_text_tower_are_seen(pair):
    torch.manual_seed(1)
    other = TwoTowers(Image(), Text(), tokenize, pair.class_names, pair.templates)
    pair.text.load_state_dict(other.text.state_dict())
    pair(IMAGES)
    assert torch.equal(pair.class_features, other.class_features)


def test_the_text_tower_is_frozen_whatever_is_asked(pair):
    pair.requires_grad_(True)
    assert {name.partition(".")[0] for name, _ in pair.named_parameters()} == {"image"}
    pair.unfreeze_text()
    assert "text.token_embedding.weight" in dict(pair.named_parameters())


def test_tied_weights_of_a_text_tower_stay_tied():
    class Tied(Text):
        def __init__(self):
            super().__init__()
            self.second = nn.Linear(4, 8, bias=False)
            self.second.weight = self.token_embedding.weight

    pair = TwoTowers(Image(), Tied(), tokenize, ["cat", "dog"], ["{}"])
    assert pair.text.second.weight is pair.text.token_embedding.weight
    pair.unfreeze_text()
    assert pair.text.second.weight is pair.text.token_embedding.weight


def test_the_callers_text_tower_is_untouched():
    text = Text()
    TwoTowers(Image(), text, tokenize, ["cat", "dog"], ["{}"])
    assert [name for name, _ in text.named_parameters()] == ["token_embedding.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": "cat"}, "a list of two or more names"),
        ({"classes": ["cat"]}, "a list of two or more names"),
        ({"classes": ["cat", "cat"]}, "all different"),
        ({"templates": "a {}"}, "a list of sentences"),
        ({"templates": ["a cat"]}, "with {} in the place of the name"),
        ({"classes": ["cat", "dgo"]}, "knows no word 'dgo'. Did you mean 'dog'"),
        ({"token_embedding": "token_embeding"}, "Did you mean 'token_embedding'"),
        ({"text": nn.Sequential(nn.Embedding(8, 4), nn.Embedding(8, 4))}, "has 2 modules that may embed tokens"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    given = {"image": Image(), "text": Text(), "tokenize": tokenize, "classes": ["cat", "dog"], "templates": ["{}"]}
    with pytest.raises(ValueError, match=message):
        TwoTowers(**{**given, **change})


def test_an_embedding_of_another_name_is_found():
    assert TwoTowers(Image(), Text("words"), tokenize, ["cat", "dog"], ["{}"]).token_embedding == "words"


def test_prompts_begin_as_the_sentence_itself(towers):
    prompts = Prompts(towers)
    assert prompts.initial.shape == (4, 16)
    assert torch.allclose(prompts.features(towers, prompts.initial), towers.class_features, atol=1e-6)
    several = prompts.features(towers, torch.stack([prompts.initial, prompts.initial.flip(0)]))
    assert torch.allclose(several[1], prompts.features(towers, prompts.initial.flip(0)), atol=1e-6)
    assert not torch.allclose(several[0], several[1], atol=1e-3)


def test_a_context_that_no_sentence_begins_with_is_refused(towers):
    with pytest.raises(ValueError, match="words that begin the sentence of every class"):
        Prompts(towers, "")


def test_many_prompts_are_read_in_parts_where_no_gradient_is_needed(towers):
    prompts, texts = Prompts(towers), []
    contexts = prompts.initial + torch.randn(30, 4, 16, generator=torch.Generator().manual_seed(0))
    handle = towers.text.register_forward_hook(lambda module, args, output: texts.append(len(args[0])))
    with torch.no_grad():
        in_parts = prompts.features(towers, contexts)
    whole = prompts.features(towers, contexts)
    handle.remove()
    assert texts == [256, 44, 300]
    assert torch.allclose(in_parts, whole, atol=1e-6)


def test_the_gradient_of_a_prompt_reaches_its_context_alone(towers):
    prompts = Prompts(towers)
    context = prompts.initial.clone().requires_grad_()
    prompts.features(towers, context).sum().backward()
    assert context.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in towers.parameters())


def test_texts_of_clip_do_not_depend_on_what_follows_their_end():
    torch.manual_seed(0)
    tower = TextTower(8, 6, 16, 2, 2, 4)
    ids = tokenize(["cat"])
    longer = torch.cat([ids, torch.zeros(1, 2, dtype=torch.int64)], dim=1)
    assert torch.allclose(tower(ids), tower(longer), atol=1e-6)


def test_the_head_is_that_of_the_class_names(towers):
    assert taps.head(towers) == "head"
    features, logits = taps.look(towers, "head", IMAGES)
    assert torch.allclose(features.norm(dim=1), torch.ones(6))
    assert torch.allclose(logits, features @ towers.head.weight.T)


# ---------------------------------------------------------------------- the embedded model


def test_digits_clip_reads_digits():
    images, labels, _ = digits.split("test")
    model = tta.load_model("digits-clip")
    with torch.no_grad():
        wrong = (model(images[:200].float() / 255).argmax(1) != labels[:200]).float().mean()
    assert wrong < 0.05
    assert model.class_names[6] == "number six"


def test_the_embedded_model_may_stay_untrained_or_load_weights_of_its_size(tmp_path):
    own, untrained = tta.load_model("digits-clip"), tta.load_model("digits-clip", pretrained=False)
    assert [value.shape for value in untrained.parameters()] == [value.shape for value in own.parameters()]
    assert not torch.equal(untrained.model.image.proj, own.model.image.proj)

    def saved(image, text):
        weights = {f"visual.{name}": value for name, value in image.state_dict().items()} | text.state_dict()
        path = tmp_path / "weights.safetensors"
        save_file({**weights, "logit_scale": torch.tensor(4.0)}, path)
        return path

    again = tta.load_model("digits-clip", checkpoint=saved(untrained.model.image, untrained.model.text))
    assert torch.equal(again.model.image.proj, untrained.model.image.proj)
    assert again.model.logit_scale == 4
    wide = saved(ImageTower(32, 8, 128, 1, 2, 32), TextTower(48, 16, 64, 3, 4, 32))
    with pytest.raises(ValueError, match=r"holds a CLIP of another size than 'digits-clip'.*open_clip:ARCH"):
        tta.load_model("digits-clip", checkpoint=wide)


def test_other_names_make_another_classifier():
    model = tta.load_model("digits-clip", classes=["five", "number six"], templates=["a drawing of the {}."])
    with torch.no_grad():
        assert model(IMAGES).shape == (6, 2)
    with pytest.raises(ValueError, match="classes=, templates= and tokenize= are for vision-language models"):
        tta.load_model("digits-cnn", classes=["five", "six"])


def test_selected_logits_are_selected_names():
    whole, some = tta.load_model("digits-clip"), tta.load_model("digits-clip").select_logits([3, 7, 1], 10)
    with torch.no_grad():
        assert torch.allclose(some(IMAGES), whole(IMAGES)[:, [3, 7, 1]], atol=1e-5)
    assert some.class_names == ["three", "seven", "one"] == towers_of(some, "a test").class_names
    with pytest.raises(ValueError, match="Selected are classes of a model with 1000; 'digits-clip' has 10"):
        tta.load_model("digits-clip").select_logits([0, 1], 1000)


@pytest.mark.parametrize("method", ["tent", "sar", "cotta", "t3a", "lame", "shot"])
def test_other_methods_adapt_the_image_tower_alone(method, towers):
    adapter = tta.adapt(towers, method)
    before = towers.state_dict()
    adapter(IMAGES)
    state = adapter.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items() if not name.startswith("image."))
    assert "the text tower is frozen" in str(adapter.summary())
    assert not any("text" in name for name in adapter.summary().adapted)


def test_a_plain_classifier_is_refused_with_what_to_pass(cnn):
    with pytest.raises(
        ValueError, match=r"ZERO needs a vision-language model.*GoldenCNN has none.*load_model\('digits-clip'\)"
    ):
        tta.adapt(cnn, "zero")


def test_the_manifest_names_classes_and_templates(towers):
    data = torch.utils.data.TensorDataset(IMAGES, torch.arange(6))
    result = tta.evaluate(tta.adapt(towers, "source"), tta.stream({"a": data}, batch_size=6), progress=False)
    assert result.manifest["model"]["classes"] == towers.class_names
    assert result.manifest["model"]["templates"] == ["a photo of a {}."]


# ---------------------------------------------------------------------- views


def test_a_crop_of_the_whole_image_is_the_image():
    views = _views.crops(IMAGES, 3, 1.0, False, torch.Generator().manual_seed(0))
    assert views.shape == (6, 3, 3, 32, 32)
    assert torch.allclose(views, IMAGES[:, None].expand_as(views), atol=1e-5)


def test_crops_of_half_precision_are_those_of_float32():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    half, whole = (_views.crops(x, 4, 0.3, True, torch.Generator().manual_seed(0)) for x in (images, images.float()))
    assert torch.equal(half, whole.bfloat16())


def test_crops_are_of_the_asked_area_and_differ():
    # of a ramp from 0 to 1 the spread of a crop is its width
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    views = _views.crops(ramp, 200, 0.25, True, torch.Generator().manual_seed(0))[0]
    width = views.amax((1, 2, 3)) - views.amin((1, 2, 3))
    assert 0.4 < width.min() < 0.5
    assert width.max() > 0.95
    mirrored = (views[:, 0, 0, 0] > views[:, 0, 0, -1]).float().mean()
    assert 0.4 < mirrored < 0.6


def test_views_that_the_stream_brings_are_taken(towers):
    views = torch.rand(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    both = tta.adapt(towers, "zero")(views)
    assert torch.equal(both.sum(1).long(), torch.ones(2).long())  # one of five votes
    alone = torch.cat([tta.adapt(towers, "zero")(image[None]) for image in views])
    assert torch.equal(both, alone)
    with pytest.raises(ValueError, match=r"shape \(2, 5, 3, 32, 32\)"):
        tta.adapt(towers, "tent")(views)


def test_an_image_gets_the_same_crops_in_every_batch(towers):
    together, alone = (tta.adapt(towers, "zero", views=20) for _ in range(2))
    assert torch.equal(together(IMAGES), torch.cat([alone(image) for image in IMAGES.split(1)]))


@pytest.mark.parametrize("guard", [False, True])
def test_a_stream_brings_views_with_its_images(towers, guard):
    views = torch.rand(4, 5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(views, torch.arange(4))
    result = tta.evaluate(tta.adapt(towers, "zero", guard=guard), tta.stream({"a": data}, batch_size=2), progress=False)
    expected = tta.adapt(towers, "zero")(views).argmax(1)
    assert result.predictions.prediction.tolist() == expected.tolist()


def test_a_method_of_whole_batches_takes_the_images_themselves_of_views(towers):
    brought = torch.stack([IMAGES, IMAGES.flip(2)], dim=1)
    for method in ("batclip", "onzeta"):
        assert torch.equal(tta.adapt(towers, method)(brought), tta.adapt(towers, method)(IMAGES))


def test_what_batclip_learned_is_exported(towers):
    adapter = tta.adapt(towers, "batclip", lr=0.05)
    adapter(torch.stack([IMAGES, IMAGES.flip(2)], dim=1))
    plain = adapter.export(exact=True)
    with adapter.paused():
        expected = adapter(IMAGES)
    assert torch.allclose(plain(IMAGES), expected, atol=1e-5)
    assert not torch.allclose(expected, towers(IMAGES), atol=1e-2)
    towers.load_state_dict(plain.state_dict())
    assert torch.allclose(towers(IMAGES), expected, atol=1e-5)
    program = torch.export.export(plain, (IMAGES,)).module()
    assert torch.allclose(program(IMAGES), expected, atol=1e-5)


def test_views_of_a_callable_are_taken(towers):
    given = tta.adapt(towers, "zero", views=3, augment=lambda image: torch.cat([image, image.flip(2), image.flip(3)]))
    brought = torch.stack([IMAGES, IMAGES.flip(2), IMAGES.flip(3)], dim=1)
    assert torch.equal(given(IMAGES), tta.adapt(towers, "zero")(brought))


def test_the_text_tower_runs_once_a_step_for_all_classes(towers):
    adapter = tta.adapt(towers, "tpt", views=8, steps=3)
    texts = []
    adapter.towers.text.register_forward_hook(lambda module, args, output: texts.append(len(args[0])))
    adapter(IMAGES[:1])
    assert texts == [10] * 4  # three steps and the prediction


def test_a_tie_is_decided_by_the_surest_other_view(towers):
    adapter = tta.adapt(towers, "zero", selection=0.5)
    logits = torch.full((4, 10), -5.0)
    for view, (label, height) in enumerate([(3, 9.0), (7, 8.0), (2, 7.0), (7, 6.0)]):
        logits[view, label] = height
    votes = adapter._votes(_views.Seen(torch.zeros(4, 8), logits))
    assert votes.argmax() == 7
    assert votes[[3, 7, 2]].tolist() == [1, 2, 0]
    logits[3] = logits[2]  # no other view votes for a tied class: the surest view decides
    assert adapter._votes(_views.Seen(torch.zeros(4, 8), logits)).argmax() == 3


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize("method", tta.list_methods(two_towers=True))
@pytest.mark.filterwarnings("ignore:.*whose steps near 1")
def test_every_method_takes_half_precision(method, towers):
    adapter = tta.adapt(towers.bfloat16(), method, **({} if method in ("batclip", "onzeta") else {"views": 3}))
    for batch in IMAGES.bfloat16().split(3):
        assert adapter(batch).isfinite().all()


@pytest.mark.parametrize(
    ("method", "scale", "settings"), [("dmn", 9.0, {"views": 2}), ("onzeta", 2.3, {"dual_rate": 1e4})]
)
def test_logarithms_of_probabilities_are_finite(method, scale, settings, towers):
    """Also where a probability is too small for float32, or the exponential of a dual variable too large."""
    towers.logit_scale.fill_(scale)
    adapter = tta.adapt(towers, method, **settings)
    logits = torch.cat([adapter(IMAGES), adapter(IMAGES)])
    assert logits.isfinite().all()
    assert adapter.progress().recoveries == 0


def test_a_memory_and_names_without_any_weight_are_refused(towers):
    with pytest.raises(ValueError, match="one of them above 0"):
        tta.adapt(towers, "dmn", text_weight=0.0, memory_weight=0.0)


# ---------------------------------------------------------------------- what a GPU waits for


class Reads(TorchDispatchMode):
    """Counts the values that the host reads; on a GPU it would wait for each."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


# A step of an optimizer reads its counters on a CPU, and not on a GPU, so that methods with a gradient cannot be counted here.
@pytest.mark.parametrize("method", ["boostadapter", "dmn", "mta", "onzeta", "tda", "zero"])
def test_nothing_is_read_on_the_host(method, towers, monkeypatch):
    # one_hot looks for negative classes, on a CPU only
    monkeypatch.setattr(F, "one_hot", lambda labels, classes: (labels[..., None] == torch.arange(classes)).long())
    adapter = tta.adapt(towers, method, **({} if method == "onzeta" else {"views": 5}))
    adapter(IMAGES)  # the first forward of a copy compares its text tower with the original's
    with Reads() as reads:
        adapter.adapt(IMAGES[:2])
    assert reads.number == 0
