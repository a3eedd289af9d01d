"""The defences of the adapter, one by one."""

import copy
import warnings
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tta
from tta.adapter import Adapter, Config, OptimizerConfig, Output
from tta.functional import entropy


@dataclass
class BankConfig(Config):
    size: int = 8


class Bank(Adapter):
    """Keeps the last batch of features in a bank whose shape the first batch decides, and draws random numbers."""

    config: BankConfig

    def configure_model(self):
        super().configure_model()
        self.register_buffer("bank", None)

    def adapt(self, x):
        if self.bank is None:
            self.bank = torch.zeros(self.config.size, *x.shape[1:])
        keep = torch.randperm(len(x), generator=self.generator)[: self.config.size]
        self.bank[: len(keep)] = x[keep]
        return self.predict(x + 0.1 * self.bank.mean())


class Exploding(tta.Adapter):
    """Its loss is scaled by ``scale``: a batch may be made to give an infinite gradient."""

    config: OptimizerConfig
    scale = 1.0

    def adapt(self, x):
        logits = self.predict(x)
        self.update(entropy(logits).mean() * self.scale)
        return logits

    def configure_model(self):
        self.model.requires_grad_(False)
        self.model.fc.requires_grad_(True)


class Tied(nn.Module):
    """Two linear layers that share one weight, and a buffer that is not part of the state."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("offset", torch.ones(3), persistent=False)

    def forward(self, x):
        return self.second(self.first(self.norm(x).mean((2, 3)))) + self.offset


@pytest.fixture
def batch():
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_reset_and_state_cover_banks_and_random_numbers(cnn, batch, tmp_path):
    adapter = tta.adapt(cnn, Bank)
    first = [adapter(batch), adapter(batch.flip(0))]
    save_file(adapter.state_dict(), tmp_path / "state.safetensors")
    after = adapter(batch)

    fresh = tta.adapt(cnn, Bank)
    fresh.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(fresh(batch), after)

    adapter.reset()
    assert adapter.bank is None
    assert torch.equal(adapter(batch), first[0])
    assert torch.equal(adapter(batch.flip(0)), first[1])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adamw"])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e38])
def test_non_finite_update_is_skipped_counted_and_warned_once(cnn, batch, optimizer, fused, scale):
    adapter = tta.adapt(cnn, Exploding, optimizer=optimizer)
    if fused:  # the way of a GPU: the flag is read by the kernel, not by Python
        kind, groups = type(adapter.optimizer), adapter.optimizer.param_groups
        adapter.optimizer = kind([p for group in groups for p in group["params"]], lr=1e-3, fused=True)
    adapter(batch)
    before = adapter.state_dict()
    adapter.scale = scale
    adapter.model.fc.weight.register_hook(lambda gradient: gradient * 1e38 if scale == 1e38 else gradient)
    with pytest.warns(RuntimeWarning, match="skipped"):
        adapter(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter(batch)
    after = adapter.state_dict()
    assert adapter.skipped_updates == 2
    assert all(torch.equal(before[key], after[key]) for key in before if key != "_counters")
    adapter.reset()
    assert adapter.skipped_updates == 0


def test_flag_of_a_bad_batch_on_a_gpu_is_raised_a_batch_later(cnn, batch, monkeypatch):
    """The deferred path, on the CPU: the flag of the input says that it is not finite."""
    adapter = tta.adapt(cnn, Exploding)
    adapter(batch)
    before = adapter.state_dict()
    monkeypatch.setattr("tta.adapter.defence.usable", lambda images: torch.tensor(False))
    with pytest.warns(RuntimeWarning):
        adapter(batch)
    assert torch.equal(adapter.state_dict()["model.fc.weight"], before["model.fc.weight"])


def test_optimized_parameters_are_those_that_gradients_belong_to(cnn, batch):
    adapter = tta.adapt(cnn, "tent", lr=0.1)
    assert adapter.optimized_parameters() == adapter.parameters_to_adapt()
    gradients = [torch.full_like(parameter, 0.1) for parameter in adapter.optimized_parameters()]
    before = [parameter.detach().clone() for parameter in adapter.optimized_parameters()]
    adapter.update(torch.zeros(()), gradients=gradients)
    for parameter, value in zip(adapter.optimized_parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), value - 0.1)  # the first step of Adam is the learning rate
    assert tta.adapt(cnn, "norm").optimized_parameters() == []


def test_restarted_optimizer_has_no_moments_and_the_configured_rate(cnn, batch):
    adapter = tta.adapt(cnn, "tent", lr=0.1)
    adapter(batch)
    assert adapter.optimizer.state
    weights = [parameter.detach().clone() for parameter in adapter.optimized_parameters()]
    adapter.optimizer.param_groups[0]["lr"] = 7.0
    adapter.restart_optimizer()
    assert not adapter.optimizer.state
    assert adapter.optimizer.param_groups[0]["lr"] == 0.1
    assert all(map(torch.equal, adapter.optimized_parameters(), weights))


@pytest.mark.parametrize("flag", [True, False])
def test_input_finite_is_true_on_the_cpu_and_a_flag_elsewhere(cnn, batch, monkeypatch, flag):
    adapter = tta.adapt(cnn, "source")
    adapter(batch)
    assert bool(adapter.input_finite)
    monkeypatch.setattr(tta.Adapter, "_CHECKED_AT_ONCE", ())  # the way of a GPU
    adapter(batch if flag else batch / 0)
    assert bool(adapter.input_finite) == flag


def test_update_clears_the_autocast_cache(cnn, batch):
    class Twice(Exploding):
        def adapt(self, x):
            super().adapt(x)
            return self.predict(x)

    adapter = tta.adapt(cnn, Twice, lr=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = adapter(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = adapter.predict(batch)
    assert torch.equal(inside, expected)


def test_tied_weights_stay_tied_and_appear_once(batch, tmp_path):
    model = Tied()
    adapter = tta.adapt(model, "tent", lr=0.1)
    assert adapter.model.first.weight is adapter.model.second.weight
    assert adapter.model.first.weight is not model.first.weight
    adapter(batch)
    save_file(adapter.state_dict(), tmp_path / "state.safetensors")  # refuses tensors that share memory
    fresh = tta.adapt(model, "tent", lr=0.1)
    fresh.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert fresh.model.first.weight is fresh.model.second.weight
    assert torch.equal(fresh(batch), adapter(batch))


class Shared(nn.Module):
    """One layer in two places, as the position encodings of CoaT are, and a weight in two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        shared = nn.Conv2d(4, 4, 1)
        self.encode, self.block = shared, nn.Sequential(shared, nn.ReLU())
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        features = self.block(self.first(x) + self.encode(self.first(x))).mean((2, 3))
        return self.fc(self.other(self.one(features)))


def test_the_source_is_predicted_without_a_trace_in_shared_layers(batch):
    torch.manual_seed(0)
    model = Shared().eval()
    adapter = tta.adapt(model, "cotta", views=2, lr=0.1, augment="none")
    before = dict(adapter.model.named_parameters())
    with torch.no_grad():
        source = adapter.predict_as_source(batch)
    assert all(value is before[name] for name, value in adapter.model.named_parameters())
    for _ in range(2):
        adapter(batch)
    assert not torch.equal(adapter.model.encode.weight, model.encode.weight)
    assert not torch.equal(adapter.model.one.weight, model.one.weight)
    with torch.no_grad():
        assert torch.allclose(adapter.predict_as_source(batch), source, atol=1e-6)
        assert not torch.allclose(adapter.predict(batch), source, atol=1e-4)


def test_reset_restores_buffers_outside_the_state(batch):
    adapter = tta.adapt(Tied(), "tent")
    adapter.model.offset.zero_()
    adapter.reset()
    assert torch.equal(adapter.model.offset, torch.ones(3))


def test_deepcopy_of_an_adapter_has_its_own_optimizer(cnn, batch):
    adapter = tta.adapt(cnn, "tent")
    adapter(batch)
    duplicate = copy.deepcopy(adapter)
    mine = {id(p) for p in duplicate.parameters()}
    assert all(id(p) in mine for group in duplicate.optimizer.param_groups for p in group["params"])
    assert duplicate.optimizer.state.keys() <= set(duplicate.parameters())


@pytest.mark.parametrize("method", ["tent", "cotta"])  # cotta: moments of weights that are channels-last themselves
def test_channels_last_model_round_trips(cnn, batch, tmp_path, method):
    adapter = tta.adapt(cnn.to(memory_format=torch.channels_last), method)
    expected = [adapter(batch)]
    save_file(adapter.state_dict(), tmp_path / "state.safetensors")
    expected.append(adapter(batch))
    fresh = tta.adapt(cnn, method)
    fresh.load_state_dict(load_file(tmp_path / "state.safetensors"))
    torch.testing.assert_close(fresh(batch), expected[1])


@pytest.fixture
def wide():
    """A network large enough to be run with channels last."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, 2), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 192, 3, 2), nn.BatchNorm2d(192), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 10)),
    ).eval()


def is_channels_last(weight):
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_a_convolutional_model_of_size_runs_channels_last(wide, cnn, vit):
    assert is_channels_last(tta.adapt(wide, "tent").model[3].weight)
    assert not is_channels_last(wide[3].weight)
    assert not is_channels_last(tta.adapt(wide, "tent", copy=False).model[3].weight)
    assert not is_channels_last(tta.adapt(cnn, "tent").model.layer3.conv1.weight)
    assert not is_channels_last(tta.adapt(vit, "tent").model.patch_embed.proj.weight)


@pytest.mark.parametrize("method", ["source", "norm", "tent", "sar", "cotta", "rotta"])
def test_channels_last_changes_neither_results_nor_states(wide, batch, tmp_path, method):
    settings = {"cotta": {"views": 2, "rst_m": 0.0, "optimizer": "sgd"}, "rotta": {"update_frequency": 8}}
    make = partial(tta.adapt, wide, method, **settings.get(method, {}))
    last, again = make(), make()
    first = tta.adapt(copy.deepcopy(wide), method, **settings.get(method, {}), copy=False)
    for x in (batch, batch.flip(0), batch.flip(2)):
        torch.testing.assert_close(last(x), first(x), atol=1e-3, rtol=1e-3)
    save_file(last.state_dict(), tmp_path / "state.safetensors")
    again.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(again(batch), last(batch))
    last.reset()
    assert torch.equal(last(batch), make()(batch))


def test_moving_keeps_what_was_learned(cnn, batch):
    adapter, still = tta.adapt(cnn, "tent"), tta.adapt(cnn, "tent")
    adapter(batch), still(batch)
    adapter.double().float()
    assert torch.equal(adapter(batch), still(batch))


def test_paused_is_left_after_an_error(cnn, batch):
    adapter = tta.adapt(cnn, "tent")
    with pytest.raises(RuntimeError), adapter.paused():
        raise RuntimeError
    before = adapter.model.stem[1].weight.clone()
    adapter(batch)
    assert not torch.equal(adapter.model.stem[1].weight, before)


def test_step_returns_an_output(cnn, batch):
    class Scored(Bank):
        def adapt(self, x):
            return Output(self.predict(x), outlier_score=entropy(self.predict(x)))

    output = tta.adapt(cnn, Scored).step(batch)
    assert isinstance(output, Output)
    assert output.outlier_score.shape == (8,)
    assert tta.adapt(cnn, "source").step(batch).outlier_score is None


def test_model_with_logits_attribute_works(cnn, batch):
    class HuggingFaceLike(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = cnn

        def forward(self, pixel_values):
            return SimpleNamespace(logits=self.inner(pixel_values))

    assert torch.equal(tta.adapt(HuggingFaceLike(), "tent")(batch), tta.adapt(cnn, "tent")(batch))


def test_compiled_model_is_unwrapped(cnn, batch):
    compiled = torch.compile(cnn, backend="eager")
    assert torch.equal(tta.adapt(compiled, "tent")(batch), tta.adapt(cnn, "tent")(batch))


def test_copy_false_adapts_the_callers_model(cnn):
    assert tta.adapt(cnn, "tent", copy=False).model is cnn


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("resnet50", TypeError, "Expected a torch.nn.Module as the model; got str"),
        (nn.DataParallel(nn.Linear(1, 1)), TypeError, "model.module"),
        (torch.jit.script(nn.Linear(1, 1)), TypeError, "TorchScript"),
        (nn.Sequential(torch.compile(nn.Linear(1, 1), backend="eager")), TypeError, "torch.compile"),
        (Uncopyable(1, 1), TypeError, "copy=False"),
        (nn.Conv2d(3, 3, 1), ValueError, "BatchNorm, GroupNorm, LayerNorm"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__)[:20],
)
def test_model_that_cannot_be_adapted_is_refused(model, error, message):
    with pytest.raises(error, match=message):
        tta.adapt(model, "tent")


def test_adapter_of_an_adapter_is_refused(cnn):
    with pytest.raises(TypeError, match="adapter already"):
        tta.adapt(tta.adapt(cnn, "tent"), "tent")


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 32, 32),
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(0, 3, 32, 32),
        "image",
    ],
    ids=["rank", "dtype", "empty", "type"],
)
def test_bad_batch_is_refused(cnn, x):
    with pytest.raises(ValueError, match="Expected a floating-point batch of images"):
        tta.adapt(cnn, "source")(x)


@pytest.mark.parametrize("returned", [(torch.zeros(1, 10),), torch.zeros(1, 10, 1, 1)], ids=["tuple", "map"])
def test_model_that_returns_no_logits_is_refused(returned):
    class Odd(nn.Module):
        def forward(self, x) -> Tensor:
            return returned

    with pytest.raises((TypeError, ValueError), match=r"expected .*\(batch, classes\)"):
        tta.adapt(Odd(), "source")(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"lrr": 1}, "Key 'lrr' not in 'TentConfig'. Did you mean 'lr'"),
        ({"lr": -1.0}, "lr=-1.0; expected a learning rate above 0"),
        ({"lr": "fast"}, "could not be converted to Float"),
        ({"optimizer": "lion"}, "lion"),
        ({"steps": 0}, "steps=0"),
        ({"preset": "cifar"}, "Method 'tent' has no preset 'cifar'.*There are: cifar10-c"),
    ],
)
def test_wrong_hyper_parameters_are_named(cnn, hparams, message):
    with pytest.raises(ValueError, match=message):
        tta.adapt(cnn, "tent", **hparams)


def test_method_authors_import_from_the_adapter():
    from tta.adapter import Adapter, Config, OptimizerConfig, Output, config_class, require

    assert config_class(Bank) is BankConfig
    assert issubclass(OptimizerConfig, Config)
    with pytest.raises(ValueError, match=r"Got size=0; expected 1 or more\."):
        require(False, "size=0", "1 or more")
    assert (Adapter, Output) == (tta.Adapter, tta.Output)


def test_unknown_method_is_answered_with_the_nearest(cnn):
    with pytest.raises(ValueError, match=r"No method 'tnet'. Did you mean 'tent'"):
        tta.adapt(cnn, "tnet")


def test_state_of_another_method_is_refused(cnn):
    with pytest.raises(ValueError, match="state is of a 'Norm' adapter; this one is a 'Tent'"):
        tta.adapt(cnn, "tent").load_state_dict(tta.adapt(cnn, "norm").state_dict())
    with pytest.raises(ValueError, match="not the state of an adapter"):
        tta.adapt(cnn, "tent").load_state_dict(cnn.state_dict())


def test_state_nests_in_a_larger_module(cnn, batch):
    outer = nn.ModuleDict({"a": tta.adapt(cnn, "tent"), "b": tta.adapt(cnn, "norm")})
    outer["a"](batch)
    fresh = nn.ModuleDict({"a": tta.adapt(cnn, "tent"), "b": tta.adapt(cnn, "norm")})
    fresh.load_state_dict(outer.state_dict())
    assert torch.equal(fresh["a"](batch), outer["a"](batch))


def test_gradients_of_another_layout_than_the_weights_go_through_fused_kernels(wide, batch, monkeypatch):
    class Contiguous(tta.Adapter):
        config: tta.OptimizerConfig

        def adapt(self, x):
            logits = self.predict(x)
            gradients = torch.autograd.grad(logits.square().mean(), self.parameters_to_adapt())
            self.update(logits.sum(), gradients=[gradient.contiguous() for gradient in gradients])
            return logits

        def configure_model(self):
            pass

    expected = tta.adapt(wide, Contiguous)
    monkeypatch.setattr(tta.Adapter, "_FUSED_ON", ("cpu",))  # the way of a GPU
    fused = tta.adapt(wide, Contiguous)
    for _ in range(3):
        torch.testing.assert_close(fused(batch), expected(batch))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_defers_flags_and_agrees_with_the_cpu(cnn, batch):
    here, there = tta.adapt(cnn, "tent"), tta.adapt(cnn, "tent").cuda()
    for _ in range(3):
        torch.testing.assert_close(there(batch.cuda()).cpu(), here(batch), atol=1e-3, rtol=1e-3)
    bad = batch.clone()
    bad[0] = float("nan")
    before = there.state_dict()
    there(bad.cuda())
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="earlier batch"):
        there(batch.cuda())
    after = there.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k != "_counters")
