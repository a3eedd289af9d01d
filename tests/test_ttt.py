"""TTT beyond its golden logits: one update by hand, the gate, crops and turns, and its part from a file."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tta
from tta import augment, auxiliary_file
from tta.methods.ttt import TTT, TTTConfig, split_of, turned

QUICK = {"copies": 4, "augment": "none", "lr": 1e-3}


@pytest.fixture
def part(cnn):
    """A rotation head with random weights, as a module on the maps of layer2."""
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32 * 4, 4))


def test_an_update_by_hand(cnn, part, golden_images):
    adapter = tta.adapt(cnn, "ttt", auxiliary=part, **QUICK)
    turns = torch.tensor([1, 3, 0, 2])
    adapter._turns = lambda copies: turns
    logits = adapter(golden_images[:1])

    model, head = copy.deepcopy(cnn).eval(), copy.deepcopy(part)
    copies = torch.cat([golden_images[:1].rot90(int(turn), (2, 3)) for turn in turns])
    found = head(model.layer2(model.layer1(model.stem(copies))))
    F.cross_entropy(found, turns).backward()
    with torch.no_grad():
        for parameter in [*model.parameters(), *head.parameters()]:
            parameter -= 0 if parameter.grad is None else 1e-3 * parameter.grad
    torch.testing.assert_close(logits, model(golden_images[:1]).detach(), rtol=0, atol=1e-5)
    assert (logits - cnn.eval()(golden_images[:1])).abs().max() > 1e-3
    for own, by_hand, before in zip(
        adapter.auxiliary.tail.parameters(), head.parameters(), part.parameters(), strict=True
    ):
        torch.testing.assert_close(own, by_hand, rtol=0, atol=1e-6)
        assert not torch.equal(own, before)


def test_online_remembers_and_standard_does_not(cnn, part, golden_images):
    online, standard = (tta.adapt(cnn, "ttt", auxiliary=part, mode=mode, **QUICK) for mode in ("online", "standard"))
    fresh = standard.state_dict()
    for adapter in (online, standard):
        adapter._turns = lambda copies: torch.arange(copies) % 4
    first, second = online(golden_images[:1]), online(golden_images[1:2])
    assert torch.equal(standard(golden_images[:2])[:1], first)
    assert not torch.equal(standard(golden_images[1:2]), second)
    assert all(torch.equal(value, fresh[name]) for name, value in standard.state_dict().items())


def test_the_gate_leaves_out_what_looks_upright(cnn, part, golden_images):
    with torch.no_grad():
        maps = cnn.eval().layer2(cnn.layer1(cnn.stem(golden_images[:16])))
        upright = part.eval()(maps).softmax(1)[:, 0]
    gate = {"threshold": float(upright.median()), "mode": "standard"}
    adapter = tta.adapt(cnn, "ttt", auxiliary=part, **{**QUICK, **gate, "lr": 0.1})
    changed = (adapter(golden_images[:16]) - cnn(golden_images[:16])).abs().amax(1) > 1e-3
    assert torch.equal(changed, upright < upright.median())


def test_training_statistics_move_only_those_of_the_shared_layers_and_the_head(cnn, golden_images, golden_source):
    adapter = tta.adapt(cnn, "ttt", source=golden_source[:32], source_steps=1, statistics="train", **QUICK)
    before = copy.deepcopy(adapter.model.state_dict())
    adapter(golden_images[:1])
    moved = {
        name
        for name, value in adapter.model.state_dict().items()
        if "running" in name and not torch.equal(value, before[name])
    }
    assert moved == {name for name in before if "running" in name and not name.startswith("layer3")}


def test_quarter_turns_and_crops():
    images = torch.rand(4, 3, 8, 8)
    assert all(torch.equal(turned(images, torch.arange(4))[k], images[k].rot90(k, (1, 2))) for k in range(4))
    with pytest.raises(ValueError, match="images of 8 x 6 pixels; expected square ones"):
        turned(images[..., :6], torch.arange(4))
    crops = augment.cropped(images, torch.Generator().manual_seed(0))
    places = [
        [
            (y, x)
            for y in range(3)
            for x in range(3)
            if torch.equal(crop, F.pad(image, (1, 1, 1, 1))[:, y : y + 8, x : x + 8])
        ]
        for image, crop in zip(images, crops, strict=True)
    ]
    assert all(len(found) == 1 for found in places)
    assert len({found[0] for found in places}) > 1


def test_the_split_is_the_last_but_one_stage(cnn, vit, small_cnn):
    assert split_of(cnn, None) == "layer2"
    assert split_of(vit, None) == "blocks.2"
    assert split_of(small_cnn(4, 3), None) == "conv"
    assert split_of(nn.Sequential(cnn), "layer1") == "0.layer1"


def test_a_part_in_a_file_is_taken_with_the_settings_that_made_it(cnn, golden_images, golden_source, tmp_path):
    """By auxiliary=FILE, and without a word by a model that was loaded from the file; refused where the weights differ."""
    trained = tta.adapt(cnn, "ttt", source=golden_source[:64], source_steps=2, split="layer1", **QUICK)
    file, settings = tmp_path / "part.safetensors", {"split": "layer1", "augment": "none", "rotations": "all"}
    auxiliary_file.write(file, trained.model, trained.auxiliary, "ttt", settings, {})
    taken = tta.adapt(cnn, "ttt", auxiliary=file, **QUICK)
    cnn.auxiliary = auxiliary_file.read(file)
    carried = tta.adapt(cnn, "ttt", **{**QUICK, "augment": "paper"})
    assert (taken.config.split, carried.config.augment) == ("layer1", "none")
    expected = trained(golden_images[:4])
    assert torch.equal(taken(golden_images[:4]), expected)
    assert torch.equal(carried(golden_images[:4]), expected)
    older = {"split": "layer1", "augment": "none"}
    assert TTT.settings(TTTConfig(), older) == settings
    with pytest.raises(ValueError, match="trained with later=1, which is not known"):
        TTT.settings(TTTConfig(), {**settings, "later": 1})
    with pytest.raises(ValueError, match="split=layer2; the auxiliary part was trained with split=layer1"):
        tta.adapt(cnn, "ttt", split="layer2")
    with torch.no_grad():
        cnn.fc.bias[0] += 1
    with pytest.raises(ValueError, match=r"trained for 'ttt' with other weights"):
        tta.adapt(cnn, "ttt", auxiliary=file)


def test_all_before_the_split_adapts_and_nothing_behind(vit, cnn, part, golden_images, golden_source):
    """Parameters that belong to no layer, such as a ViT's class token and position embedding, are among them."""
    for model, given, behind in (
        (vit, {"source": golden_source[:16], "source_steps": 1}, ("blocks.3.", "norm.", "fc_norm.", "head.")),
        (cnn, {"auxiliary": part}, ("layer3.", "fc.")),
    ):
        adapter = tta.adapt(model, "ttt", **given, **QUICK)
        expected = {name for name, _ in model.named_parameters() if not name.startswith(behind)}
        assert {name for name, p in adapter.model.named_parameters() if p.requires_grad} == expected
        adapter(golden_images[:1])
        changed = {n for n, p in adapter.model.named_parameters() if not torch.equal(p, model.get_parameter(n))}
        assert changed == expected


def test_a_saved_state_is_of_a_part_and_not_of_the_place_of_its_file(cnn, part, golden_images, golden_source, tmp_path):
    trained = tta.adapt(cnn, "ttt", source=golden_source[:8], source_steps=1, split="layer1", **QUICK)
    settings = {"split": "layer1", "augment": "none", "rotations": "all"}
    auxiliary_file.write(tmp_path / "here.safetensors", trained.model, trained.auxiliary, "ttt", settings, {})
    adapter = tta.adapt(cnn, "ttt", auxiliary=tmp_path / "here.safetensors", **QUICK)
    adapter(golden_images[:1])
    adapter.save(tmp_path / "state.safetensors")
    moved = (tmp_path / "here.safetensors").rename(tmp_path / "there.safetensors")
    again = tta.load(tmp_path / "state.safetensors", cnn, auxiliary=moved)
    cnn.auxiliary = auxiliary_file.read(moved)
    carried = tta.adapt(cnn, "ttt", **QUICK)
    carried.load_state_dict(adapter.state_dict())
    expected = adapter(golden_images[1:2])
    assert torch.equal(again(golden_images[1:2]), expected)
    assert torch.equal(carried(golden_images[1:2]), expected)

    by_module = tta.adapt(cnn, "ttt", auxiliary=part, **QUICK)
    by_module.save(tmp_path / "state.safetensors")
    assert tta.load(tmp_path / "state.safetensors", cnn, auxiliary=copy.deepcopy(part)).config.split is None
    other = copy.deepcopy(part)
    torch.nn.init.zeros_(other[2].bias)
    with pytest.raises(ValueError, match="another auxiliary there than here"):
        tta.load(tmp_path / "state.safetensors", cnn, auxiliary=other)


def test_it_says_what_is_missing(cnn, tmp_path):
    with pytest.raises(ValueError, match="needs to know the source domain"):
        tta.adapt(cnn, "ttt")
    with pytest.raises(FileNotFoundError, match="`tta train METHOD MODEL DATA -o FILE` writes one"):
        tta.adapt(cnn, "ttt", auxiliary=tmp_path / "none.safetensors")
    auxiliary_file.write(tmp_path / "other.safetensors", cnn, None, "source", {}, {})
    with pytest.raises(ValueError, match="holds the part of 'source'; 'ttt' needs its own"):
        tta.adapt(cnn, "ttt", auxiliary=tmp_path / "other.safetensors")


def test_the_source_loss_is_that_of_all_four_turns(cnn, golden_source):
    x, draws = golden_source[:8], torch.Generator()
    part = TTT.make_auxiliary(cnn.eval(), TTTConfig(), draws)
    found = TTT.auxiliary_loss(part, x, TTTConfig(augment="none"), draws)
    each = [F.cross_entropy(part(x.rot90(k, (2, 3))), torch.full((8,), k)) for k in range(4)]
    torch.testing.assert_close(found, torch.stack(each).mean())
