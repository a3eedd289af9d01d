"""Requirements on every method that serves segmentation, by listing: those of test_conformance.py that a map may break."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file, save_file
from torch.utils.data import TensorDataset

import tta
from tta import methods

BATCH = 4
SERVED = [name for name in tta.list_methods() if "segmentation" in methods.find(name).tasks]
# Settings in place of defaults that maps refuse or that would not show a step.
QUICK = {
    "eata": {"e_margin": 1.6, "source_batch_size": 4},
    "rdumb": {"e_margin": 1.6},
    "sar": {"margin_e0": 1.6},
    "cotta": {"augment": "none"},
    "petal": {"augment": "none", "prior_weight": 1e-3},
    "actmad": {"source_batch_size": 4},
    "ttt_mae": {"copies": 2, "window": 3, "source_steps": 1, "width": 4},
}
VARIANTS = [
    ("norm", {"alpha": 0.3}),
    ("norm", {"momentum": 0.1}),
    ("tent", {"loss": "come", "steps": 2}),
    ("eata", {"fisher_alpha": 0.0, "e_margin": 1.6, "d_margin": 1.0}),
    ("sar", {"margin_e0": 1.6, "steps": 2}),
    ("rdumb", {"e_margin": 1.6, "reset_every": 3}),
    ("pl", {"statistics": "mixed", "threshold": 0.2, "score": "after"}),
    ("cotta", {"augment": "scales", "ap": 1.0, "score": "after"}),
    ("cotta", {"augment": "scales", "gate": "pixel", "ap": 0.25, "statistics": "source", "target": "hard"}),
    ("petal", {"augment": "scales", "ap": 1.0, "prior_weight": 1e-3}),
    ("psmt", {"augment": "scales", "ap": 1.0}),
    ("gala:tent", {"window": 2}),
    ("actmad", {"score": "after", "position": "activation", "source_batch_size": 4}),
    ("ttt_mae", {"copies": 3, "steps": 2, "restart": False, "patch": 4, "source_steps": 1, "mask_ratio": 0.5}),
]
CASES = [
    *((name, QUICK.get(name, {})) for name in SERVED),
    *(pytest.param(variant, marks=pytest.mark.slow) for variant in VARIANTS),
]
STILL = {"source", "norm"}  # learn no weights


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())]))
def case(request):
    return request.param


@pytest.fixture
def make(case, segmenter, device):
    """Build a fresh adapter of the case, around a model that returns a dictionary of small maps, as torchvision's do."""
    method, hparams = case
    source = torch.rand(8, 3, 16, 24, generator=torch.Generator().manual_seed(9))
    model = segmenter(form="out", full=False).to(device)
    return lambda: tta.adapt(model, method, source=source, task="segmentation", **hparams)


@pytest.fixture
def batches(device):
    return list(torch.rand(4 * BATCH, 3, 16, 24, generator=torch.Generator().manual_seed(1)).to(device).split(BATCH))


def run(adapter, batches):
    return torch.cat([adapter(batch) for batch in batches])


def equal_states(first, second, but=()):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in {*first} - {*but})


class CollectLogits(Callback):
    def __init__(self):
        self.logits = []

    def on_test_batch_end(self, trainer, pl_module, outputs, *_):
        self.logits.append(outputs["logits"])


def test_maps_are_detached_float32_of_the_size_of_the_pictures(make, batches):
    logits = make()(batches[0])
    assert logits.shape == (BATCH, 5, 16, 24)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad


def test_plain_loop_equals_trainer(make, batches):
    images = torch.cat([batch.cpu() for batch in batches])
    masks = torch.randint(5, (len(images), 16, 24), generator=torch.Generator().manual_seed(2))
    plain = make()
    expected = run(plain, batches)
    accelerator = "gpu" if plain.device.type == "cuda" else "cpu"
    stream = tta.stream({"a": TensorDataset(images, masks)}, task="segmentation", batch_size=BATCH)
    driven, collected = make(), CollectLogits()
    tta.evaluate(driven, stream, progress=False, callbacks=[collected], accelerator=accelerator)
    assert torch.equal(torch.cat(collected.logits), expected)
    assert equal_states(plain.state_dict(), driven.state_dict())


def test_reset_equals_fresh(make, batches):
    fresh, adapter = make(), make()
    run(adapter, batches)
    adapter.reset()
    assert equal_states(adapter.state_dict(), fresh.state_dict())
    assert torch.equal(run(adapter, batches), run(fresh, batches))


def test_save_load_continue_equals_uninterrupted(make, batches, tmp_path):
    whole = run(make(), batches)
    first = make()
    begun = run(first, batches[:2])
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    second = make()
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(torch.cat([begun, run(second, batches[2:])]), whole)


@pytest.mark.slow
def test_deepcopy_goes_on_independently(make, batches):
    original = make()
    run(original, batches[:2])
    state = original.state_dict()
    continued = run(copy.deepcopy(original), batches[2:])
    assert equal_states(original.state_dict(), state)
    assert torch.equal(run(original, batches[2:]), continued)


@pytest.mark.slow
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_grad_modes_change_nothing(make, batches, context):
    expected = run(make(), batches)
    adapter = make()
    with context():
        logits = run(adapter.train(), [batch.clone() for batch in batches])
    assert torch.equal(logits, expected)


def test_declared_parameters_change_and_no_others(case, make, batches):
    adapter = make()
    declared = {id(parameter) for parameter in adapter.parameters_to_adapt()} if case[0] not in STILL else set()
    before = {name: parameter.clone() for name, parameter in adapter.model.named_parameters()}
    run(adapter, batches[:2] if case[0] == "rdumb" else batches)
    changed = {n for n, p in adapter.model.named_parameters() if not torch.equal(p, before[n])}
    allowed = {n for n, p in adapter.model.named_parameters() if id(p) in declared}
    assert changed <= allowed
    assert bool(changed) == bool(allowed)


def test_predict_learns_nothing(make, batches):
    adapter = make()
    run(adapter, batches[:2])
    before = adapter.state_dict()
    with torch.no_grad():
        predicted = adapter.predict(batches[2])
    with adapter.paused():
        assert torch.equal(predicted, adapter(batches[2]))
    assert equal_states(adapter.state_dict(), before)


def test_one_picture_is_served(make, batches):
    adapter = make()
    logits = torch.cat([adapter(image[None]) for image in batches[0]])
    assert logits.shape == (BATCH, 5, 16, 24)
    assert logits.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*was skipped:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_bad_pixel_teaches_nothing(make, batches, value):
    adapter = make()
    run(adapter, batches[:2])
    before, bad = adapter.state_dict(), batches[2].clone()
    bad[3, 0, 0, 0] = value
    refused = pytest.raises(ValueError, match="1 of the 4 images hold NaN")
    with refused if math.isnan(value) else nullcontext():  # the huge value is predicted
        adapter(bad)
    assert equal_states(adapter.state_dict(), before, but=("_counters", "generator"))
    assert run(adapter, batches[3:]).isfinite().all()


@pytest.mark.slow
def test_bf16_autocast_stays_near_float32(make, batches, device):
    reference = run(make(), batches)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logits = run(make(), batches)
    assert logits.dtype == torch.float32
    assert (logits - reference).abs().median() < 0.02  # maps of random weights span about 1


@pytest.mark.slow
def test_channels_last_pictures_make_no_difference(make, batches):
    expected = run(make(), batches)
    found = run(make(), [batch.contiguous(memory_format=torch.channels_last) for batch in batches])
    assert torch.allclose(found, expected, atol=1e-3)
