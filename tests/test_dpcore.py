"""DPCore recomputed in the plainest way over a range of rho; any timm ViT; batches too small; a full coreset."""

import gc

import pytest
import timm
import torch

import tta
from tta import taps
from tta.models import ImageClassifier

QUICK = {"steps_new": 3, "num_prompts": 4}


def prompted(vit, x, prompts):
    """The model's own forward written out, with prompts behind the class token: logits and the class token's feature."""
    tokens = vit._pos_embed(vit.patch_embed(x))
    if prompts is not None:
        tokens = torch.cat([tokens[:, :1], prompts.expand(len(x), -1, -1), tokens[:, 1:]], 1)
    features = vit.norm(vit.blocks(tokens))[:, 0]
    return vit.head(features), features


def distance(features, mean, std):
    return (features.mean(0) - mean).norm() + (features.std(0) - std).norm()


def plain_dpcore(vit, source, batches, initial, *, rho, steps=1, steps_new=3, tau=3.0, alpha=0.999):
    """Logits of each batch, the decisions, and the coreset as a list of (mean, std, prompts)."""
    vit.eval()
    with torch.no_grad():
        features = prompted(vit, source, None)[1]
    mean, std = features.mean(0), features.std(0)
    coreset, decisions, collected = [], [], []

    def fit(x, start, steps):
        prompts = start.clone().requires_grad_()
        optimizer = torch.optim.AdamW([prompts], 0.1, weight_decay=0.01)
        for _ in range(steps):
            logits, features = prompted(vit, x, prompts)
            (prompts.grad,) = torch.autograd.grad(distance(features, mean, std), [prompts])
            optimizer.step()
        return logits.detach(), features.detach(), prompts.detach()

    for x in batches:
        with torch.no_grad():
            raw = prompted(vit, x, None)[1]
            known = False
            if coreset:
                far = torch.stack([distance(raw, m, s) for m, s, _ in coreset])
                weights = (-far / tau).softmax(0)
                mixed = sum(w * p for w, (_, _, p) in zip(weights, coreset, strict=True))
                known = distance(prompted(vit, x, mixed)[1], mean, std) < rho * distance(raw, mean, std)
        decisions.append("known" if known else "new")
        if known:
            logits, features, new = fit(x, mixed, steps)
            coreset = [
                (
                    m + alpha * w * (features.mean(0) - m),
                    s + alpha * w * torch.relu(features.std(0) - s),
                    p + alpha * w * (new - p),
                )
                for w, (m, s, p) in zip(weights, coreset, strict=True)
            ]
        else:
            logits, _, new = fit(x, initial, steps_new)
            coreset.append((raw.mean(0), raw.std(0), new))
        collected.append(logits)
    return torch.cat(collected), decisions, coreset


@pytest.fixture
def batches(golden_images):
    return [golden_images[start : start + 24] for start in (0, 24, 192, 216, 384, 408)]


@pytest.fixture
def initial():
    return torch.rand(1, 4, 64, generator=torch.Generator().manual_seed(0)) / 8


@pytest.mark.parametrize(
    ("settings", "decided"),
    [
        ({"rho": 0.6}, "new new new known new new"),
        ({"rho": 0.7}, "new new new known new known"),
        ({"rho": 0.8}, "new new new known known known"),
        ({"rho": 0.9, "steps": 3, "tau": 0.5, "alpha": 0.3}, "new known new known known known"),
    ],
)
def test_the_plain_recomputation(vit, golden_source, batches, initial, settings, decided):
    source = golden_source[:100]
    expected, decisions, coreset = plain_dpcore(vit, source, batches, initial, steps_new=12, **settings)
    assert decisions == decided.split()
    adapter = tta.adapt(vit, "dpcore", source=source, initial_prompts=initial, num_prompts=4, steps_new=12, **settings)
    torch.testing.assert_close(torch.cat([adapter(x) for x in batches]), expected, rtol=1e-3, atol=1e-3)
    assert adapter.coreset_size == len(coreset) == decisions.count("new")
    for j, (mean, std, prompts) in enumerate(coreset):
        torch.testing.assert_close(adapter.means[j], mean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(adapter.stds[j], std, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(adapter.prompt_sets[j], prompts[0], rtol=1e-2, atol=1e-2)
    assert not adapter.means[len(coreset) :].any()


def test_source_samples_and_filter(vit, golden_source):
    with torch.no_grad():
        logits, features = prompted(vit.eval(), golden_source, None)
    entropies = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
    threshold = entropies.median().item()
    chosen = features[entropies < threshold][:30]
    adapter = tta.adapt(vit, "dpcore", source=golden_source, source_samples=30, source_filter=threshold)
    torch.testing.assert_close(adapter.source_mean, chosen.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter.source_std, chosen.std(0), rtol=1e-4, atol=1e-5)
    everything = tta.adapt(vit, "dpcore", source=golden_source)
    torch.testing.assert_close(everything.source_mean, features.mean(0), rtol=1e-4, atol=1e-5)


def test_only_prompts_get_gradients(vit, golden_source, batches, monkeypatch):
    adapter = tta.adapt(vit, "dpcore", source=golden_source[:64], **QUICK)
    leaves = []
    backward = torch.Tensor.backward

    def watch(loss, *args, **kwargs):
        backward(loss, *args, **kwargs)
        leaves.extend(name for name, p in adapter.named_parameters() if p.grad is not None)

    monkeypatch.setattr(torch.Tensor, "backward", watch)
    adapter(batches[0])
    assert set(leaves) == {"prompts"}


def test_a_small_batch_never_spoils_the_coreset(vit, golden_source, batches):
    adapter = tta.adapt(vit, "dpcore", source=golden_source[:64], **QUICK)
    single = batches[0][:1]
    with torch.no_grad():
        assert torch.equal(adapter(single), vit.eval()(single))  # nothing is known yet
    adapter(batches[0])
    state = adapter.state_dict()
    logits = adapter(single)
    assert all(torch.equal(value, state[key]) for key, value in adapter.state_dict().items())
    torch.testing.assert_close(logits, prompted(vit, single, adapter.prompt_sets[:1])[0].detach())
    for n in (2, 3, 2, 1):
        assert adapter(batches[1][:n]).isfinite().all()
    assert all(value.isfinite().all() for value in adapter.state_dict().values())


def test_features_that_overflow_are_not_kept(vit, golden_source, batches):
    adapter = tta.adapt(vit, "dpcore", source=golden_source[:64], **QUICK)
    adapter(batches[0])
    state = adapter.state_dict()
    adapter(torch.full_like(batches[1], 1e38))
    assert all(torch.equal(value, state[key]) for key, value in adapter.state_dict().items())


def test_a_full_coreset_gives_the_place_of_the_nearest_element(vit, golden_source, batches):
    adapter = tta.adapt(vit, "dpcore", source=golden_source[:64], rho=1e-9, capacity=2, **QUICK)
    far, near, x = batches[0], batches[2], batches[3]  # near and x are of one domain
    for batch in (far, near):
        adapter(batch)
    kept = adapter.means[0].clone()
    adapter(x)
    assert adapter.coreset_size == 2
    assert torch.equal(adapter.means[0], kept)
    torch.testing.assert_close(
        adapter.means[1], prompted(vit.eval(), x, None)[1].mean(0).detach(), rtol=1e-4, atol=1e-4
    )


def test_predict_uses_the_coreset_where_it_helps(vit, golden_source, batches):
    adapter = tta.adapt(vit, "dpcore", source=golden_source[:64], num_prompts=4, steps_new=20, rho=0.9)
    x = batches[2]
    with adapter.paused():
        assert torch.equal(adapter(x), vit.eval()(x).detach())
    adapter(x)
    with adapter.paused():
        helped = adapter(x)
    torch.testing.assert_close(helped, prompted(vit, x, adapter.prompt_sets[:1])[0].detach(), rtol=1e-4, atol=1e-4)
    adapter.config.rho = 1e-9
    with adapter.paused():
        torch.testing.assert_close(adapter(x), vit(x).detach())


def test_drawn_prompts_are_uniform_and_the_same_every_time(vit, golden_source):
    first, second = (tta.adapt(vit, "dpcore", source=golden_source[:64], num_prompts=50) for _ in range(2))
    bound = (6 / (3 * 8 * 8 + 64)) ** 0.5
    assert torch.equal(first.prompts, second.prompts)
    assert 0.95 * bound < first.prompts.abs().max() <= bound
    with pytest.raises(ValueError, match=r"initial_prompts of shape \(1, 8, 32\); expected \(1, 8, 64\)"):
        tta.adapt(vit, "dpcore", source=golden_source[:64], initial_prompts=torch.zeros(1, 8, 32))


@pytest.mark.parametrize(
    "settings",
    [
        {"global_pool": "avg", "class_token": False},
        {"global_pool": "avg"},
        {"global_pool": "map", "class_token": False},
        {"reg_tokens": 4, "no_embed_class": True},
        {"pre_norm": True, "fc_norm": True, "global_pool": "avg"},
    ],
    ids=str,
)
def test_any_timm_vit_is_served(settings):
    torch.manual_seed(0)
    kind = timm.models.vision_transformer.VisionTransformer
    vit = kind(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5, **settings)
    with torch.no_grad():
        vit.head.weight.normal_()
    model = ImageClassifier(vit, (0.5,) * 3, (0.5,) * 3, "mine", (32, 32))
    images = torch.rand(16, 3, 32, 32)
    adapter = tta.adapt(model, "dpcore", source=images, **QUICK)
    assert adapter.source_mean.shape == (48,)
    logits = adapter(0.3 * images)
    assert not torch.allclose(logits, model.eval()(0.3 * images), atol=1e-3)
    shapes = []
    vit_inside = taps.vision_transformer(adapter.model)
    vit_inside.norm.register_forward_hook(lambda m, args, output: shapes.append(output.shape[1]))
    adapter(0.3 * images)
    assert set(shapes) == {16 + vit.num_prefix_tokens}  # prompts are gone where the tokens are pooled


def test_other_models_are_refused_by_name(cnn, golden_source):
    wrapped = ImageClassifier(timm.create_model("resnet10t"), (0.5,) * 3, (0.5,) * 3, "mine", None)
    for model, found in ((cnn, "GoldenCNN"), (wrapped, "ImageClassifier > ResNet")):
        with pytest.raises(ValueError, match=rf"Looked for a timm VisionTransformer .*; found {found}\."):
            tta.adapt(model, "dpcore", source=golden_source[:8])


@pytest.mark.slow
def test_memory_is_bounded_over_a_thousand_batches():
    torch.manual_seed(0)
    kind = timm.models.vision_transformer.VisionTransformer
    vit = kind(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1, num_classes=3)
    images = torch.rand(12, 3, 8, 8)
    adapter = tta.adapt(vit, "dpcore", source=images, steps_new=1, num_prompts=1, rho=0.5, capacity=3)
    sizes = []
    for count in (10, 990):
        for n in range(count):
            adapter(images[: 2 + n % 3] * (n % 5))
        gc.collect()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        sizes.append((tensors, sum(value.nbytes for value in adapter.state_dict().values())))
    assert sizes[0] == sizes[1]
    assert adapter.coreset_size == 3


@pytest.mark.parametrize(
    "setting", [{"rho": 0.0}, {"tau": 0.0}, {"alpha": 1.5}, {"capacity": 0}, {"source_samples": 1}]
)
def test_settings_out_of_range_are_refused(vit, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        tta.adapt(vit, "dpcore", **setting)
