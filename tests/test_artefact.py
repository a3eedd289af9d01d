"""`tta export`: a saved adapter leaves as one file, which is run and compared before it gets its name."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tta
from tta import artefact
from tta.cli import main
from tta.datasets import digits

FORMATS = [".onnx", ".pt2", ".safetensors"]
FOGGY = tta.datasets.corrupt(digits.split("test")[0][:40], "fog", severity=3, seed=0, recipe="cifar")


@pytest.fixture(scope="module")
def model():
    return tta.load_model("digits-cnn")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(FOGGY):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:02}.png")
    return folder


def saved(model, path, method="tent", **settings):
    """A saved adapter that has learned from two batches."""
    adapter = tta.adapt(model, method, **settings)
    for batch in (FOGGY / 255).split(20):
        adapter(batch)
    adapter.save(path)
    return adapter


@pytest.fixture(scope="module")
def state(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("state") / "adapter.safetensors"
    saved(model, path, lr=0.05)
    return path


def need(suffix):
    if suffix == ".onnx":
        pytest.importorskip("onnx", reason="needs the extra `export`")
        pytest.importorskip("onnxruntime", reason="needs the extra `export`")


def run(path, model, images):
    """Logits of an exported file, by the libraries that a deployment has."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    plain = tta.load_model("digits-cnn")
    plain.load_state_dict(load_file(path))
    return plain(images)


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_file_predicts_what_the_adapter_does_and_says_what_it_is(model, state, pictures, tmp_path, suffix, capsys):
    need(suffix)
    out = tmp_path / "new" / f"model{suffix}"
    assert main(["export", str(state), "digits-cnn", "-o", str(out), f"images={pictures}"]) == 0
    assert "Run on 40 images, 40 predictions are the adapter's" in capsys.readouterr().out
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    adapter, images = tta.load(state, model), FOGGY / 255
    with adapter.paused():
        expected = adapter(images)
    assert (expected - model(images)).abs().max() > 0.1  # it has learned something
    for part, wanted in ((images, expected), (images[7:8], expected[7:8]), (images[:3], expected[:3])):
        torch.testing.assert_close(run(out, model, part), wanted, rtol=1e-4, atol=1e-4)
    found = artefact.facts_of(out)
    assert (found["model"], found["method"], found["config"]["lr"]) == ("digits-cnn", "tent", 0.05)
    assert found["class_names"] == [str(digit) for digit in range(10)]
    assert found["preprocessing"] == model.preprocessing
    assert found["source_weights"] == adapter.source_fingerprint


def test_a_program_holds_no_picture(model, state, pictures, tmp_path):
    out = tmp_path / "model.pt2"
    assert main(["export", str(state), "digits-cnn", "-o", str(out), f"images={pictures}"]) == 0
    kept = torch.export.load(out).example_inputs
    assert kept is None or not any(image.any() for image in kept[0])


def test_weights_go_back_through_checkpoint(model, state, pictures, tmp_path):
    out = tmp_path / "model.safetensors"
    assert main(["export", str(state), "digits-cnn", "-o", str(out), f"images={pictures}"]) == 0
    again = tta.load_model("digits-cnn", checkpoint=out)
    images = FOGGY / 255
    assert torch.equal(again(images), run(out, model, images))


def test_without_statistics_to_take_no_folder_is_needed(model, tmp_path, capsys):
    saved(model, tmp_path / "state.safetensors", "source")
    out = tmp_path / "model.pt2"
    assert main(["export", str(tmp_path / "state.safetensors"), "digits-cnn", "-o", str(out)]) == 0
    assert artefact.facts_of(out)["checked_on"] == {"images": 8, "of": "noise"}
    torch.testing.assert_close(run(out, model, FOGGY / 255), model(FOGGY / 255), rtol=1e-4, atol=1e-4)


def refused(capsys, *words):
    """The sentence of an export that is a usage error."""
    assert main(["export", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_exported_is_a_sentence(model, state, pictures, tmp_path, capsys):
    out = tmp_path / "model.pt2"
    end = ("digits-cnn", "-o", out)
    assert "expected a name that ends in .onnx, .pt2, .safetensors" in refused(
        capsys, state, "digits-cnn", "-o", "model.tflite"
    )
    assert "There is no saved adapter at" in refused(capsys, tmp_path / "none.safetensors", *end)
    assert f"name one of its files, such as '{state}'" in refused(capsys, state.parent, *end)
    assert "No setting 'image'. Did you mean 'images'?" in refused(capsys, state, *end, "image=x")
    assert "2 or more" in refused(capsys, state, *end, "samples=1")
    assert "There is no folder 'nowhere'" in refused(capsys, state, *end, "images=nowhere")
    assert "tent normalises by the present batch" in refused(capsys, state, *end)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(state.read_bytes()[:-50])
    assert "or is damaged" in refused(capsys, damaged, *end)
    saved(model, tmp_path / "lame.safetensors", "lame")
    assert "predicts by more than one forward" in refused(capsys, tmp_path / "lame.safetensors", *end)
    assert not out.exists()


def test_other_source_weights_are_refused(model, state, tmp_path, capsys):
    other = {
        name: value + 0.01 if name.endswith("weight") else value for name, value in model.model.state_dict().items()
    }
    save_file({name: value.contiguous() for name, value in other.items()}, tmp_path / "other.safetensors")
    words = (state, "digits-cnn", "-o", tmp_path / "model.pt2", f"checkpoint={tmp_path / 'other.safetensors'}")
    assert "was saved with other source weights" in refused(capsys, *words)


def test_a_file_is_replaced_only_by_force(model, state, pictures, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    out.write_bytes(b"mine")
    words = (state, "digits-cnn", "-o", out, f"images={pictures}")
    assert "exists: name another file, or replace it with --force" in refused(capsys, *words)
    assert out.read_bytes() == b"mine"
    assert main(["export", *map(str, words), "--force"]) == 0
    assert artefact.facts_of(out)["method"] == "tent"


def test_a_guard_that_lets_the_source_model_answer_is_heeded(model, tmp_path, capsys):
    path, out = tmp_path / "state.safetensors", tmp_path / "model.safetensors"
    adapter = tta.adapt(model, "source", guard=True)
    adapter(FOGGY / 255)
    adapter.guard.numbers.phase, adapter.guard.numbers.left = "source", 5  # as an alarm sets them
    adapter.save(path)
    words = (path, "digits-cnn", "-o", out)
    assert "lets the source model answer" in refused(capsys, *words)
    assert main(["export", *map(str, words), "guard=false"]) == 0


def test_without_the_extra_the_command_is_named(state, monkeypatch, capsys):
    monkeypatch.setattr(artefact, "find_spec", lambda name: None)
    assert "pip install 'tta-toolkit[export]'" in refused(capsys, state, "digits-cnn", "-o", "model.onnx")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_that_computes_something_else_is_not_written(model, tmp_path, suffix):
    need(suffix)
    images = FOGGY[:6] / 255
    out = tmp_path / f"model{suffix}"
    out.write_bytes(b"before")
    with pytest.raises(artefact.Disagreement, match="does not compute what the adapter predicts: on 6 images"):
        artefact.write(out, model, images, model(images).detach() + 0.5, {}, source=model)
    assert (out.read_bytes(), list(tmp_path.iterdir())) == (b"before", [out])
    assert not any(module.training for module in model.modules())


def test_a_graph_that_fixes_the_number_of_images_is_not_written(model, tmp_path):
    class Counting(torch.nn.Sequential):
        def forward(self, images):
            return super().forward(images) * len(images)  # what traces keeps the number that it saw

    need(".onnx")
    images = FOGGY[:6] / 255
    expected = model(images).detach() * torch.tensor([1.0, 5, 5, 5, 5, 5])[:, None]
    with pytest.raises(artefact.Disagreement):
        artefact.write(tmp_path / "a.onnx", Counting(model), images, expected, {}, source=model)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(model, tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tta.places.os.fsync", full)
    images = FOGGY[:4] / 255
    with pytest.raises(OSError, match="No space left"):
        artefact.write(tmp_path / "a.safetensors", model, images, model(images).detach(), {}, source=model)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_origin_says_nothing(model, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="says nothing of itself"):
        artefact.facts_of(tmp_path / "a.safetensors")
