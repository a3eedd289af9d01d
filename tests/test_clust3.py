"""ClusT3 beyond its golden logits: the loss in the plainest way, one update by hand, layouts, and its part from a file."""

import copy
import math

import pytest
import torch
from torch import nn

import tta
from tta import auxiliary_file
from tta.methods.clust3 import ClusT3, ClusT3Config, arranged, as_maps, information, layers_of


def test_the_loss_place_by_place():
    z = torch.randn(7, 4, dtype=torch.float64)
    entropies = [-sum(p * math.log(p) for p in row) for row in z.softmax(1).tolist()]
    marginal = z.mean(0).softmax(0).tolist()
    balance = sum(1 / 4 * (math.log(1 / 4) - math.log(p)) for p in marginal)
    assert information(z).item() == pytest.approx(sum(entropies) / 7 + balance / 4)


def test_layouts():
    z = torch.arange(2 * 3 * 4.0).view(2, 3, 2, 2)
    assert arranged(z, "channels")[0].tolist() == z[0, :, 0, 0].tolist()
    assert arranged(z, "channels")[7].tolist() == z[1, :, 1, 1].tolist()
    assert arranged(z, "released")[0].tolist() == z.flatten()[[0, 8, 16]].tolist()
    tokens = torch.rand(2, 5, 3)
    assert torch.equal(as_maps(tokens)[1, :, 4, 0], tokens[1, 4])


def test_an_update_by_hand(cnn, golden_images):
    torch.manual_seed(0)
    projector, images = nn.Conv2d(16, 4, 1), golden_images[:8]
    part = nn.ModuleList([nn.ModuleList([projector])])
    settings = {"layers": ("layer1",), "optimizer": "sgd", "lr": 0.1, "momentum": 0.0, "steps": 1}
    adapter = tta.adapt(cnn, "clust3", auxiliary=part, **settings)
    logits = adapter(images)

    model = copy.deepcopy(cnn).train()
    maps = model.layer1(model.stem(images))
    information(projector(maps).permute(0, 2, 3, 1).reshape(-1, 4)).backward()
    with torch.no_grad():
        model.layer3(model.layer2(maps))  # whose stored statistics move too
        for parameter in model.parameters():
            parameter -= 0 if parameter.grad is None else 0.1 * parameter.grad
    torch.testing.assert_close(logits, model.eval()(images).detach(), rtol=0, atol=1e-4)
    assert (logits - cnn.eval()(images)).abs().max() > 1e-2


def test_layers_after_the_last_projector_and_projectors_stay(cnn, golden_source):
    adapter = tta.adapt(cnn, "clust3", source=golden_source[:32], source_steps=1, projectors=2)
    adapts = {name.partition(".")[0] for name, p in adapter.model.named_parameters() if p.requires_grad}
    assert adapts == {"stem", "layer1", "layer2"}
    assert not any(p.requires_grad for p in adapter.auxiliary.maps.parameters())


def test_batches_do_not_know_of_one_another(cnn, golden_images, golden_source):
    adapter = tta.adapt(cnn, "clust3", source=golden_source[:32], source_steps=1, projectors=2, steps=2)
    alone = adapter(golden_images[8:16])
    adapter(golden_images[:8])
    assert torch.equal(adapter(golden_images[8:16]), alone)


def test_tokens_and_networks_without_stages_are_served(vit, small_cnn, golden_source, golden_images):
    assert layers_of(vit, None) == ["blocks.0", "blocks.1"]
    for model in (vit, small_cnn(4, 3)):
        adapter = tta.adapt(model, "clust3", source=golden_source[:16], source_steps=1, projectors=1, steps=1)
        assert adapter(golden_images[:4]).isfinite().all()


def test_a_part_in_a_file(cnn, golden_images, golden_source, tmp_path):
    trained = tta.adapt(
        cnn, "clust3", source=golden_source[:32], source_steps=1, projectors=2, steps=2, layers=("layer1",)
    )
    settings = {"clusters": 10, "projectors": 2, "layers": ["layer1"], "layout": "channels", "weight": 1.0}
    auxiliary_file.write(tmp_path / "part.safetensors", trained.model, trained.auxiliary, "clust3", settings, {})
    taken = tta.adapt(cnn, "clust3", auxiliary=tmp_path / "part.safetensors", steps=2)
    assert torch.equal(taken(golden_images[:8]), trained(golden_images[:8]))
    with pytest.raises(ValueError, match=r"auxiliary=Linear; expected a ModuleList of 2"):
        tta.adapt(cnn, "clust3", auxiliary=nn.Linear(2, 2))


def test_the_source_loss_sums_over_projectors(cnn, golden_source):
    config = ClusT3Config(projectors=2, weight=0.5)
    part = ClusT3.make_auxiliary(cnn.eval(), config, torch.Generator().manual_seed(0))
    found = ClusT3.auxiliary_loss(part, golden_source[:4], config, torch.Generator())
    each = [information(arranged(z, "channels")) for z in part(golden_source[:4])]
    assert len(each) == 4
    torch.testing.assert_close(found, 0.5 * sum(each))
