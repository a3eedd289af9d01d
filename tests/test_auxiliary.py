"""Auxiliary parts: which modules a branch shares with the classifier, and the file that holds both."""

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import tta
from tta import auxiliary, auxiliary_file, taps
from tta.auxiliary import Branch


def timm_net(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5).eval()


@pytest.mark.parametrize(
    ("name", "split", "shared", "copied"),
    [
        ("resnet18", "layer3", ["conv1", "layer3.1.bn2"], ["layer4.0.conv1", "fc"]),
        (
            "vit_tiny_patch16_224",
            "blocks.5",
            ["patch_embed.proj", "blocks.5.mlp.fc2"],
            ["blocks.6.norm1", "norm", "head"],
        ),
    ],
)
def test_a_branch_shares_what_lies_before_the_split(name, split, shared, copied):
    model = timm_net(name)
    branch = Branch(model, split, 4, torch.Generator()).eval()
    for layer in shared:
        assert branch.network.get_submodule(layer) is model.get_submodule(layer)
    for layer in copied:
        assert branch.network.get_submodule(layer) is not model.get_submodule(layer)
    own = auxiliary.own_tensors(branch, model)
    assert not any(key.startswith(("network.conv1", "network.pos_embed", "network.cls_token")) for key in own)
    assert branch(torch.rand(2, 3, 224, 224)).shape == (2, 4)


def test_making_a_branch_leaves_the_model_as_it_was(cnn):
    cnn.train()
    before = {name: value.clone() for name, value in cnn.state_dict().items()}
    Branch(cnn, "layer2", 4, torch.Generator())
    assert all(torch.equal(before[name], value) for name, value in cnn.state_dict().items())
    assert all(
        module.training and not module._forward_hooks and not module._forward_pre_hooks for module in cnn.modules()
    )


def test_a_layers_output_ends_the_forward(cnn, golden_images):
    called = []
    cnn.eval().layer3.register_forward_hook(lambda *_: called.append(1))
    found = taps.output_at(cnn, "layer2", golden_images[:2])
    assert torch.equal(found, cnn.layer2(cnn.layer1(cnn.stem(golden_images[:2]))))
    assert not called
    cnn.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="never reaches layer 'unused'"):
        taps.output_at(cnn, "unused", golden_images[:2])


def test_one_file_holds_both_and_the_classifier_loads_in_plain_torch(cnn, tmp_path):
    file = tmp_path / "both.safetensors"
    branch = Branch(cnn, "layer2", 4, torch.Generator().manual_seed(1))
    auxiliary_file.write(file, cnn, branch, "ttt", {"split": "layer2"}, {"epochs": 3})
    plain = type(cnn)()
    missing, unexpected = plain.load_state_dict(load_file(file), strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing)
    assert all(name.startswith("auxiliary.") for name in unexpected)
    assert torch.equal(plain.layer3.conv2.weight, cnn.layer3.conv2.weight)
    saved = auxiliary_file.read(file)
    assert (saved.method, saved.settings, saved.facts) == ("ttt", {"split": "layer2"}, {"epochs": 3})
    other = Branch(cnn, "layer2", 4, torch.Generator().manual_seed(2))
    assert not torch.equal(other.network.fc.weight, branch.network.fc.weight)
    saved.check(cnn)
    saved.fill(other, cnn)
    assert torch.equal(other.network.fc.weight, branch.network.fc.weight)
    with pytest.raises(ValueError, match=r"is another than 'ttt' makes for GoldenCNN: network\.fc\.bias"):
        saved.fill(Branch(cnn, "layer2", 6, torch.Generator()), cnn)


def test_a_file_of_weights_alone_has_no_part(tmp_path, cnn):
    torch.save(cnn.state_dict(), tmp_path / "weights.pt")
    assert auxiliary_file.read(tmp_path / "weights.pt") is None
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="may be truncated or damaged"):
        auxiliary_file.read(tmp_path / "broken.safetensors")


def test_a_checkpoint_with_a_part_loads_as_a_model_that_carries_it(tmp_path):
    model = tta.load_model("digits-cnn")
    branch = Branch(model, "model.layer2", 4, torch.Generator())
    auxiliary_file.write(tmp_path / "both.safetensors", model, branch, "ttt", {}, {}, model.model)
    again = tta.load_model("digits-cnn", checkpoint=tmp_path / "both.safetensors")
    assert again.auxiliary.method == "ttt"
    again.auxiliary.check(again)
    assert tta.load_model("digits-cnn").auxiliary is None


def test_training_a_part_alone_leaves_the_classifier(cnn, golden_source):
    branch = Branch(cnn.eval(), "layer2", 4, torch.Generator()).eval()
    before = {name: value.clone() for name, value in cnn.state_dict().items()}
    own = auxiliary.own_parameters(branch, cnn)[0].clone()
    images = (golden_source[:16] * 255).byte()
    auxiliary.fit(cnn, branch, images, lambda x: branch(x).square().mean(), 2, torch.Generator())
    assert all(torch.equal(before[name], value) for name, value in cnn.state_dict().items())
    assert not torch.equal(auxiliary.own_parameters(branch, cnn)[0], own)


def test_seeded_layers_leave_the_generators_of_the_process_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU's generator was seeded"))
    before = torch.get_rng_state()
    weights = []
    for seed in (1, 1, 2):
        with auxiliary.seeded(torch.Generator().manual_seed(seed)):
            weights.append(nn.Linear(2, 2).weight)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.filterwarnings("ignore:.*round away")
@pytest.mark.parametrize("method", ["clust3", "cta", "itta", "ttt", "ttt_mae"])
def test_a_model_in_bfloat16_gets_a_part_that_fits(method, cnn, golden_images, golden_source):
    few = {"copies": 2} if method.startswith("ttt") else {"steps": 1}
    adapter = tta.adapt(cnn.bfloat16(), method, source=golden_source[:8].bfloat16(), source_steps=1, **few)
    assert adapter(golden_images[:2].bfloat16()).isfinite().all()
    assert adapter.progress().updates > 0


def test_a_name_that_no_module_has_is_told(cnn):
    with pytest.raises(ValueError, match=r"No layer matches 'layer9'\. There are: stem, "):
        taps.full_name(cnn, "layer9")
