"""Requirements on every method that serves segmentation, by listing: those of test_conformance.py that a map may break."""

import pytest
import torch
from torch.utils.data import TensorDataset

import conformance
import tta
from conformance import (  # noqa: F401  # the tests are collected here
    changed_and_declared,
    run,
    test_a_bad_pixel_teaches_nothing,
    test_predict_learns_nothing,
    test_reset_equals_fresh,
    test_save_load_continue_equals_uninterrupted,
    trained_as_in_a_loop,
    with_and_without_bf16,
)
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


def test_maps_are_detached_float32_of_the_size_of_the_pictures(make, batches):
    logits = make()(batches[0])
    assert logits.shape == (BATCH, 5, 16, 24)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad


def test_plain_loop_equals_trainer(make, batches):
    images = torch.cat([batch.cpu() for batch in batches])
    masks = torch.randint(5, (len(images), 16, 24), generator=torch.Generator().manual_seed(2))
    stream = tta.stream({"a": TensorDataset(images, masks)}, task="segmentation", batch_size=BATCH)
    trained_as_in_a_loop(make, batches, stream)


@pytest.mark.slow
def test_deepcopy_goes_on_independently(make, batches):
    conformance.test_deepcopy_goes_on_independently(make, batches)


@pytest.mark.slow
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_grad_modes_change_nothing(make, batches, context):
    conformance.test_grad_modes_change_nothing(lambda: make().train(), batches, context)


def test_declared_parameters_change_and_no_others(case, make, batches):
    changed, declared = changed_and_declared(make(), batches[:2] if case[0] == "rdumb" else batches)
    assert changed <= declared
    assert bool(changed) == (case[0] not in STILL)


def test_one_picture_is_served(make, batches):
    adapter = make()
    logits = torch.cat([adapter(image[None]) for image in batches[0]])
    assert logits.shape == (BATCH, 5, 16, 24)
    assert logits.isfinite().all()


@pytest.mark.slow
def test_bf16_autocast_stays_near_float32(make, batches, device):
    logits, reference = with_and_without_bf16(make, batches, device)
    assert (logits - reference).abs().median() < 0.02  # maps of random weights span about 1


@pytest.mark.slow
def test_channels_last_pictures_make_no_difference(make, batches):
    expected = run(make(), batches)
    found = run(make(), [batch.contiguous(memory_format=torch.channels_last) for batch in batches])
    assert torch.allclose(found, expected, atol=1e-3)
