"""CTA, which is reconstructed: its losses in the plainest way, what adapts, and what stays."""

import math

import pytest
import torch
from torch import nn

import tta
from tta.methods.cta import CTA, CTAConfig, agreement, alignment

QUICK = {"source_steps": 1, "steps": 2, "augment": "crop", "width": 8}


def test_alignment_pair_by_pair():
    ours, theirs = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)

    def cosine(a, b):
        return (a @ b / (a.norm() * b.norm())).item() / 0.2

    rows = [[cosine(a, b) for b in theirs] for a in ours]
    columns = [list(column) for column in zip(*rows, strict=True)]
    losses = [math.log(sum(map(math.exp, row))) - row[i] for side in (rows, columns) for i, row in enumerate(side)]
    lengths = [(a.norm() / b.norm() - 1).item() ** 2 for a, b in zip(ours, theirs, strict=True)]
    assert alignment(ours, theirs, 0.2).item() == pytest.approx(sum(losses) / 8 + sum(lengths) / 4)


def test_agreement_view_by_view(cnn, golden_images):
    config = CTAConfig(augment=lambda x: x + next(shifts), temperature=0.3, width=8)
    part = CTA.make_auxiliary(cnn.eval(), config, torch.Generator().manual_seed(0))
    x = golden_images[:3]
    shifts = iter([0.0, 0.1])
    found = agreement(part, x, config, torch.Generator())
    z = [part.projector(part.features(view)) for view in (x, x + 0.1)]
    z = [row / row.norm() for row in torch.cat(z)]
    losses = []
    for i in range(6):
        others = {j: (z[i] @ z[j]).item() / 0.3 for j in range(6) if j != i}
        losses.append(math.log(sum(map(math.exp, others.values()))) - others[(i + 3) % 6])
    assert found.item() == pytest.approx(sum(losses) / 6, abs=1e-5)


def test_the_second_encoder_adapts_and_nothing_else(cnn, golden_images, golden_source):
    adapter = tta.adapt(cnn, "cta", source=golden_source[:16], mode="online", **QUICK)
    before = {name: value.clone() for name, value in adapter.named_parameters()}
    adapter(golden_images[:8])
    changed = {name for name, value in adapter.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {f"auxiliary.network.{name}" for name, _ in cnn.named_parameters() if not name.startswith("fc.")}
    assert torch.equal(adapter.auxiliary.network.fc.weight, cnn.fc.weight)


def test_batches_start_from_the_source_unless_told_otherwise(cnn, golden_images, golden_source):
    for mode, same in (("episodic", True), ("online", False)):
        adapter = tta.adapt(
            cnn, "cta", source=golden_source[:16], mode=mode, **{**QUICK, "augment": lambda x: x.roll(1, 3)}
        )
        alone = adapter(golden_images[8:16])
        adapter(golden_images[:8])
        assert torch.equal(adapter(golden_images[8:16]), alone) == same


def test_an_encoder_from_a_random_start_shares_the_head(cnn):
    part = CTA.make_auxiliary(cnn, CTAConfig(start="random"), torch.Generator().manual_seed(0))
    assert part.network.fc is cnn.fc
    assert not torch.equal(part.network.layer1.conv1.weight, cnn.layer1.conv1.weight)


def test_a_network_of_ones_own_and_one_image(cnn, golden_images):
    adapter = tta.adapt(cnn, "cta", auxiliary=cnn, augment="crop")
    torch.testing.assert_close(adapter(golden_images[:1]), cnn.eval()(golden_images[:1]), rtol=0, atol=1e-5)
    assert adapter.progress().updates == 0
    assert isinstance(adapter.auxiliary.projector, nn.Identity)


def test_it_says_that_it_is_reconstructed():
    assert CTA.__doc__.startswith("Reconstructed")
    assert CTAConfig.__doc__.startswith("Reconstructed")
