"""Export: a plain copy of the source model, with its own keys, that predicts what the paused adapter predicts."""

import io

import pytest
import timm
import torch
from torch import nn

import tta

BATCH = 32


@pytest.fixture
def images():
    return torch.rand(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def adapted(model, method, images, **settings):
    adapter = tta.adapt(model, method, source=images, **settings)
    for batch in (images.flip(0), images):
        adapter(batch)
    return adapter


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("source", {}),
        ("norm", {}),
        ("norm", {"alpha": 0.3}),
        ("norm", {"momentum": 0.1}),
        ("tent", {}),
        ("eata", {}),
        ("sar", {}),
        ("actmad", {"lr": 1e-4}),
        ("cotta", {"views": 2}),
        ("rotta", {"update_frequency": 16}),
        ("petal", {"views": 2}),
        ("note", {"iabn": False}),
        ("delta", {}),
        ("sotta", {"update_frequency": 16, "high_threshold": 0.1}),
        ("shot", {}),
        ("pl", {"statistics": "source"}),
        ("memo", {"views": 2, "augment": "none"}),
    ],
)
def test_the_copy_predicts_what_the_paused_adapter_predicts(cnn, images, method, settings):
    adapter = adapted(cnn, method, images, **settings)
    with adapter.paused():
        expected = adapter(images)
    plain = adapter.export(exact=True)
    assert type(plain) is type(cnn)
    assert {name: value.shape for name, value in plain.state_dict().items()} == {
        name: value.shape for name, value in cnn.state_dict().items()
    }
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert not any(type(module).__module__.startswith("tta.") for module in plain.modules())
    torch.testing.assert_close(plain(images), expected, rtol=1e-5, atol=1e-5)
    cnn.load_state_dict(plain.state_dict())  # back into the user's own model
    torch.testing.assert_close(cnn.eval()(images), expected, rtol=1e-5, atol=1e-5)


def test_the_copy_is_apart_from_the_adapter(cnn, images):
    adapter = adapted(cnn, "tent", images, lr=0.1)
    plain = adapter.export()
    before = plain(images)
    adapter(images)
    assert torch.equal(plain(images), before)


def test_a_channels_last_network_and_one_of_timm(images):
    network = tta.load_model("cifar-resnet20", pretrained=False)
    activated = timm.create_model("resnetv2_50t", num_classes=10).eval()  # BatchNormAct2d: norm and ReLU in one
    for model in (network, activated):
        adapter = adapted(model, "tent", images)
        with adapter.paused():
            expected = adapter(images)
        plain = adapter.export(exact=True)
        assert list(plain.state_dict()) == list(model.state_dict())
        torch.testing.assert_close(plain(images), expected, rtol=1e-4, atol=1e-4)


def test_statistics_of_calibration_images(cnn, images):
    adapter = adapted(cnn, "norm", images)
    other = images.flip(3) * 0.5
    plain = adapter.export(calibration=other)
    with adapter.paused():
        torch.testing.assert_close(plain(other), adapter(other), rtol=1e-5, atol=1e-5)


def test_without_a_batch_calibration_is_asked_for(cnn):
    with pytest.raises(ValueError, match=r"Norm normalises 7 layers by the present batch.*calibration=images"):
        tta.adapt(cnn, "norm").export()


@pytest.mark.parametrize("method", ["t3a", "lame", "rmt", "psmt"])
def test_more_than_one_forward_is_refused(cnn, images, method):
    labels = torch.arange(BATCH) % 10
    adapter = tta.adapt(cnn, method, source=[(images, labels)])
    with pytest.raises(ValueError, match="predicts by more than one forward"):
        adapter.export()


def test_layers_that_do_more_are_approximated_with_a_warning_or_refused(cnn, images):
    adapter = adapted(cnn, "note", images, update_frequency=16)
    with pytest.warns(RuntimeWarning, match="only comes near to NOTE"):
        adapter.export()
    with pytest.raises(ValueError, match="only comes near to NOTE"):
        adapter.export(exact=True)


@pytest.mark.parametrize("method", ["tent", "rotta"])
def test_the_copy_can_be_traced_and_exported(images, method):
    model = tta.load_model("cifar-resnet20", pretrained=False)
    plain = adapted(model, method, images).export()
    expected = plain(images)
    torch.testing.assert_close(torch.jit.trace(plain, images)(images), expected)
    torch.testing.assert_close(torch.export.export(plain, (images,)).module()(images), expected)


def test_onnxruntime_computes_the_same(cnn, images):
    pytest.importorskip("onnx", reason="the extra test has it")
    runtime = pytest.importorskip("onnxruntime", reason="the extra test has it")
    plain = adapted(cnn, "tent", images).export()
    file = io.BytesIO()
    torch.onnx.export(plain, (images,), file, dynamo=False, input_names=["images"])
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), plain(images), rtol=1e-4, atol=1e-4)


def test_the_channels_last_kernel_is_in_no_trace_of_the_adapted_model(images):
    model = tta.load_model("cifar-resnet20", pretrained=False)
    adapter = adapted(model, "tent", images)
    assert "PythonOp" not in str(torch.jit.trace(adapter.model, images, check_trace=False).inlined_graph)


class Answering(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return type("Answer", (), {"logits": self.net(x)})()


def test_a_model_that_answers_with_an_object(cnn, images):
    adapter = adapted(Answering(cnn), "tent", images)
    with adapter.paused():
        torch.testing.assert_close(adapter.export(exact=True)(images).logits, adapter(images), rtol=1e-5, atol=1e-5)


def test_numbers_are_compared_by_their_distance_alone(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)).eval()
    adapter = tta.adapt(model, "source", task="regression")
    with torch.no_grad():
        model[-1].bias += 1
    with pytest.raises(ValueError, match=r"on \d+ images outputs differ by up to 1\.") as refused:
        adapter._compare(model, images, exact=True)
    assert "agree" not in str(refused.value)
