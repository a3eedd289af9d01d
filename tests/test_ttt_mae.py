"""TTT-MAE: one update by hand, the window, masks, the layout of tokens, and what a reset at a cut leaves."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import tta
from tta import auxiliary_file
from tta.methods import ttt_mae

QUICK = {"copies": 3, "width": 4, "source_steps": 1}


@pytest.fixture
def decoder():
    """For the maps of layer2, (32, 8, 8): squares of 4 pixels in images of 32."""
    torch.manual_seed(0)
    return nn.Conv2d(32, 3 * 4**2, 1)


def test_an_update_by_hand(cnn, decoder, golden_images, monkeypatch):
    """Two frames; the mask is fixed, the frames drawn are both, and AdamW starts anew with two learning rates."""
    mask = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    mask[..., :16, 8:24] = True
    monkeypatch.setattr(ttt_mae, "masks", lambda images, *_: mask.expand(len(images), -1, -1, -1))
    adapter = tta.adapt(cnn, "ttt_mae", auxiliary=decoder, split="layer2", copies=1, lr=1e-3, window=1)
    found = adapter(golden_images[:2])

    model, tail = copy.deepcopy(cnn).eval(), copy.deepcopy(decoder)
    encoder = [*model.stem.parameters(), *model.layer1.parameters(), *model.layer2.parameters()]
    for frame, logits in zip(golden_images[:2].split(1), found.split(1), strict=True):
        groups = [{"params": tail.parameters(), "lr": 1e-3}, {"params": encoder, "lr": 1e-4}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
        filled = frame.clone()
        filled[..., :16, 8:24] = frame.mean()  # the digits are grey: one mean for all channels
        cells = tail(model.layer2(model.layer1(model.stem(filled))))
        made = torch.zeros(3, 32, 32)
        for channel in range(3):
            for row in range(4):
                for column in range(4):
                    made[channel, row::4, column::4] = cells[0, 16 * channel + 4 * row + column]
        (made - frame[0])[:, :16, 8:24].square().mean().backward()
        optimizer.step()
        model.zero_grad()
        torch.testing.assert_close(logits, model(frame).detach(), rtol=0, atol=2e-4)
        assert (logits - cnn.eval()(frame)).abs().max() > 5e-3
    assert not torch.equal(adapter.auxiliary.tail.weight, decoder.weight)
    assert torch.equal(adapter.model.layer3.conv2.weight, cnn.layer3.conv2.weight)  # behind the split


def drawn_frames(adapter, frames):
    """The number of every frame that the copies of each step were made of; frame n has the colour n / 10."""
    seen, loss = [], adapter.auxiliary_loss

    def listening(part, images, *rest):
        seen.append(images[:, 0, 0, 0].mul(10).round().int().tolist())
        return loss(part, images, *rest)

    adapter.auxiliary_loss = listening
    for number in frames:
        adapter(torch.full((1, 3, 32, 32), number / 10))
    return seen


def test_copies_are_of_the_last_frames_alone(cnn, decoder):
    settings = {"split": "layer2", "copies": 40}
    seen = drawn_frames(tta.adapt(cnn, "ttt_mae", auxiliary=decoder, window=3, **settings), range(6))
    assert [set(numbers) for numbers in seen] == [{0}, {0, 1}, {0, 1, 2}, {1, 2, 3}, {2, 3, 4}, {3, 4, 5}]
    assert all(len(numbers) == 40 for numbers in seen)


def test_a_reset_at_a_cut_empties_the_window(cnn, decoder):
    """A stream of two clips, reset at the cut, gives of the second what it gives alone; without the reset it does not."""
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    clips = {
        "a": TensorDataset(images[:3], torch.zeros(3).long()),
        "b": TensorDataset(images[3:], torch.zeros(3).long()),
    }
    stream = tta.stream(clips, batch_size=1, protocol="per-domain")
    adapter = tta.adapt(cnn, "ttt_mae", auxiliary=decoder, split="layer2", copies=2)
    found = {}
    for reset in (stream.reset, "never"):
        adapter.reset()
        tta.evaluate(adapter, stream, reset=reset, progress=False)
        found[reset] = adapter.state_dict()
    adapter.reset()
    for image in images[3:]:
        adapter(image[None])
    alone = adapter.state_dict()
    assert torch.equal(found["domain"]["frames.samples"], alone["frames.samples"])
    assert torch.equal(found["domain"]["model.stem.0.weight"], alone["model.stem.0.weight"])
    assert int(found["domain"]["frames.offered"]) == 3
    assert int(found["never"]["frames.offered"]) == 6
    assert not torch.equal(found["never"]["model.stem.0.weight"], alone["model.stem.0.weight"])


def test_standard_mode_looks_at_each_image_alone(cnn, decoder, golden_images):
    settings = {"auxiliary": decoder, "split": "layer2", "copies": 2, "lr": 1e-2}
    adapter = tta.adapt(cnn, "ttt_mae", mode="standard", **settings)
    fresh = adapter.state_dict()
    adapter(golden_images[:3])
    after = adapter.state_dict()
    assert all(torch.equal(after[name], fresh[name]) for name in fresh if name.startswith(("model.", "auxiliary.")))
    assert "frames.samples" not in after
    online = tta.adapt(cnn, "ttt_mae", **settings)
    online(golden_images[:3])
    assert not torch.equal(online.state_dict()["model.stem.0.weight"], fresh["model.stem.0.weight"])


@pytest.mark.parametrize(("size", "patch", "ratio", "count"), [((32, 32), 8, 0.75, 12), ((30, 44), 16, 0.8, 5)])
def test_masks_are_whole_patches_as_many_in_each_image_and_others(size, patch, ratio, count):
    images = torch.zeros(50, 3, *size)
    found = ttt_mae.masks(images, patch, ratio, torch.Generator().manual_seed(0))
    assert found.shape == (50, 1, *size)
    patches = found[..., ::patch, ::patch]
    assert (patches.flatten(1).sum(1) == count).all()
    whole = patches.repeat_interleave(patch, 2).repeat_interleave(patch, 3)[..., : size[0], : size[1]]
    assert torch.equal(found, whole)
    assert len(patches.flatten(1).unique(dim=0)) > 1
    share = patches.float().mean(0)
    assert share.min() > 0.4 * ratio  # none is left out always


@pytest.mark.parametrize("others", [0, 1, 5])
def test_tokens_are_laid_out_as_their_patches(others):
    images = torch.rand(2, 3, 16, 24)
    means = nn.functional.avg_pool2d(images, 8)  # (2, 3, 2, 3)
    tokens = torch.cat([torch.full((2, others, 3), 9.0), means.flatten(2).mT], dim=1)
    if others < 5:  # with five of eleven no patches, there is no telling
        assert torch.equal(ttt_mae.maps_of(tokens, images), means)
    assert torch.equal(ttt_mae.maps_of(means, images), means)
    with pytest.raises(ValueError, match="expected maps, or tokens"):
        ttt_mae.maps_of(tokens[:, 0], images)


def test_all_up_to_the_split_adapts_and_nothing_behind(vit, golden_source, golden_images):
    adapter = tta.adapt(vit, "ttt_mae", source=golden_source[:32], **QUICK)
    adapter(golden_images[:2])
    changed = {
        name for name, value in adapter.model.named_parameters() if not torch.equal(value, vit.get_parameter(name))
    }
    behind = {name for name, _ in vit.named_parameters() if name.startswith(("norm.", "head.", "fc_norm."))}
    assert changed == {name for name, _ in vit.named_parameters()} - behind


def test_its_decoder_learns_to_fill_in_behind_a_frozen_network(cnn, golden_source):
    def error(steps):
        adapter = tta.adapt(cnn, "ttt_mae", source=golden_source[:64], width=16, source_steps=steps, split="layer1")
        draws = torch.Generator().manual_seed(5)
        kind = type(adapter)
        with torch.no_grad():
            return float(kind.auxiliary_loss(adapter.auxiliary, golden_source[:64], adapter.config, draws))

    assert error(40) < 0.8 * error(1)


def test_its_part_comes_from_the_file_of_its_training(cnn, golden_images, tmp_path):
    made_by = {"split": "layer2", "width": 4, "patch": 4, "mask_ratio": 0.5}
    config = ttt_mae.TTTMAEConfig(**made_by)
    part = ttt_mae.TTTMAE.make_auxiliary(cnn, config, torch.Generator().manual_seed(3))
    file = tmp_path / "part.safetensors"
    auxiliary_file.write(file, cnn, part, "ttt_mae", made_by, {})
    adapter = tta.adapt(cnn, "ttt_mae", auxiliary=file, copies=2)
    assert all(
        torch.equal(a, b) for a, b in zip(adapter.auxiliary.tail.parameters(), part.tail.parameters(), strict=True)
    )
    assert {name: getattr(adapter.config, name) for name in made_by} == made_by
    assert adapter(golden_images[:2]).isfinite().all()
    with pytest.raises(ValueError, match="trained with width=4"):
        tta.adapt(cnn, "ttt_mae", auxiliary=file, width=5)


def test_maps_of_a_segmenter(segmenter):
    source = torch.rand(8, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    adapter = tta.adapt(segmenter(full=False), "ttt_mae", source=source, task="segmentation", **QUICK)
    frames = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    found = adapter(frames)
    assert found.shape == (3, 5, 16, 24)
    assert adapter.frames.samples.shape == (16, 3, 16, 24)
    assert adapter.progress().updates == 3
