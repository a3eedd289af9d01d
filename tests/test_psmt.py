"""PSMT: what the golden stream does not see."""

import pytest
import torch

import tta


def roll(x):
    return x.roll(1, 3)


@pytest.mark.parametrize("augment", [roll, "none"])
def test_an_unsure_batch_is_seen_in_views(cnn, golden_images, golden_source, augment):
    """The sum of both models' logits, which are equal at first: the teacher's on the views, the student's without."""
    x = golden_images[:64]
    adapter = tta.adapt(cnn, "psmt", source=golden_source, augment=augment, ap=1.0, views=3)
    own, view = adapter.model(x).detach(), adapter.model(roll(x)).detach()
    expected = own + (own if augment == "none" else view)
    torch.testing.assert_close(adapter(x), expected, rtol=1e-4, atol=1e-4)


def test_the_teacher_takes_over_what_was_restored_and_follows_the_rest(cnn, golden_images, golden_source):
    """From a student a step away: two moves of a tenth of the way, but for the restored weights."""
    adapter = tta.adapt(cnn, "psmt", source=golden_source, mt_alpha=0.9, lr=1e-3, quantile=0.2)
    for batch in golden_images[:128].split(64):
        adapter(batch)
    teacher = torch.cat([p.detach().flatten() for p in adapter.teacher.parameters()])
    adapter(golden_images[128:192])
    now = torch.cat([p.detach().flatten() for p in adapter.teacher.parameters()])
    student = torch.cat([p.detach().flatten() for p in adapter.model.parameters()])
    source = torch.cat([p.detach().flatten() for p in cnn.parameters()])
    restored = student == source
    assert restored.float().mean() == pytest.approx(0.2, abs=0.01)
    assert torch.equal(now[restored], source[restored])
    followed = 0.81 * teacher + 0.19 * student
    torch.testing.assert_close(now[~restored], followed[~restored], rtol=1e-5, atol=1e-6)


def test_without_the_penalty_no_source_is_needed(cnn, golden_images):
    with pytest.raises(ValueError, match="fisher"):
        tta.adapt(cnn, "psmt")
    assert tta.adapt(cnn, "psmt", fisher_alpha=0.0)(golden_images[:8]).isfinite().all()
