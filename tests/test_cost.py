"""Passes in images: for every method what its algorithm implies, and that counting changes nothing."""

import copy
import mmap
from pathlib import Path

import pytest
import torch

import tta
from tta.functional import entropy
from tta.results.cost import Passes, forget_peak_memory, peak_memory_mb

BATCH, BATCHES = 32, 3
IMAGES = BATCH * BATCHES


@pytest.fixture
def batches(golden_images):
    return list(golden_images[:IMAGES].split(BATCH))


def counted(adapter, batches):
    passes = Passes()
    passes.attach(adapter)
    for batch in batches:
        adapter(batch)
    passes.detach()
    return passes.forwards, passes.backwards


# Passes through the models for each image of the stream: what the algorithm implies.
CASES = [
    ("source", {}, 1, 0),
    ("norm", {}, 1, 0),
    ("norm", {"momentum": 0.1}, 1, 0),
    ("tent", {}, 1, 1),
    ("tent", {"steps": 3}, 3, 3),
    # A margin above ln(10) keeps every sample, in both passes.
    ("sar", {"margin_e0": 3.0}, 2, 2),
    ("eata", {"e_margin": 3.0, "d_margin": 1.0}, 1, 1),
    # The student and the anchor, then the teacher, or in its stead the views; only the student learns.
    ("cotta", {"ap": 0.0}, 1 + 1 + 1, 1),
    ("cotta", {"ap": 1.0, "views": 5}, 1 + 1 + 5, 1),
    ("cotta", {"ap": 1.0, "views": 5, "views_at_once": 2}, 1 + 1 + 5, 1),
    ("cotta", {"augment": "none"}, 2, 1),
    # The teacher on each image; on every 32 of them, teacher and student on a memory of 16.
    ("rotta", {"memory_size": 16, "update_frequency": 32}, 1 + 0.5 + 0.5, 0.5),
    ("actmad", {}, 1, 1),
    ("actmad", {"score": "after"}, 2, 1),
]


@pytest.mark.parametrize(("method", "hparams", "forwards", "backwards"), CASES)
def test_passes_are_those_of_the_algorithm(cnn, golden_source, batches, method, hparams, forwards, backwards):
    adapter = tta.adapt(cnn, method, source=golden_source[:64], **hparams)
    assert counted(adapter, batches) == (forwards * IMAGES, backwards * IMAGES)


def test_passes_of_dpcore(vit, golden_source, batches):
    """A look without prompts, then the steps of a new domain; from the second batch on a look with the known prompts."""
    settings = {"source": golden_source[:64], "steps_new": 4, "lr": 1e-3}
    always_new = tta.adapt(vit, "dpcore", rho=1e-6, **settings)
    assert counted(always_new, batches) == (IMAGES * (1 + 4) + (IMAGES - BATCH), IMAGES * 4)
    known = tta.adapt(vit, "dpcore", rho=1e6, **settings)  # its one step uses that look
    later = (IMAGES - BATCH) * 2
    assert counted(known, batches) == (BATCH * (1 + 4) + later, BATCH * 4 + (IMAGES - BATCH))


def test_samples_that_a_filter_leaves_out_go_forward_alone(cnn, batches):
    margin = 0.4
    adapter = tta.adapt(cnn, "eata", fisher_alpha=0, e_margin=margin, d_margin=1.0)
    forwards, backwards = counted(copy.deepcopy(adapter), batches[:1])
    with torch.no_grad():
        chosen = int((entropy(adapter.predict(batches[0])) < margin).sum())
    assert 0 < chosen < BATCH
    assert (forwards, backwards) == (BATCH, chosen)
    none = tta.adapt(cnn, "sar", margin_e0=1e-9)
    assert counted(none, batches) == (2 * IMAGES, 0)


def test_a_paused_adapter_only_goes_forward(cnn, batches):
    adapter = tta.adapt(cnn, "tent")
    with adapter.paused():
        assert counted(adapter, batches) == (IMAGES, 0)


@pytest.mark.parametrize("method", ["tent", "sar", "cotta", "rotta", "actmad"])
def test_counting_changes_no_bit_and_leaves_nothing_behind(cnn, golden_source, batches, method):
    hparams = {"views": 2} if method == "cotta" else {}
    plain, watched = (tta.adapt(cnn, method, source=golden_source[:64], **hparams) for _ in range(2))
    passes, hooks = Passes(), [list(module._forward_hooks.values()) for module in watched.modules()]
    passes.attach(watched)
    for batch in batches:
        assert torch.equal(plain(batch), watched(batch))
    passes.detach()
    before = passes.forwards, passes.backwards
    watched(batches[0])
    assert (passes.forwards, passes.backwards) == before
    assert [list(module._forward_hooks.values()) for module in watched.modules()][: len(hooks)] == hooks


def test_a_copy_of_the_adapter_does_not_count(cnn, batches):
    adapter, passes = tta.adapt(cnn, "tent"), Passes()
    passes.attach(adapter)
    copy.deepcopy(adapter)(batches[0])
    assert (passes.forwards, passes.backwards) == (0, 0)
    adapter(batches[0])
    assert (passes.forwards, passes.backwards) == (BATCH, BATCH)


def test_a_model_that_returns_an_object_counts_too(cnn, batches):
    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return type("Output", (), {"logits": self.inner(x)})()

    assert counted(tta.adapt(Wrapped(cnn), "tent"), batches) == (IMAGES, IMAGES)


def test_peak_memory_is_that_of_the_run():
    device = torch.device("cpu")
    # Not from malloc: it keeps freed memory once an earlier test has run a command of `tta` in this process.
    with mmap.mmap(-1, 200_000_000) as block:
        for _ in range(200):
            block.write(bytes(1_000_000))
        with_it = peak_memory_mb(device)
    forget_peak_memory(device)
    assert with_it > 200
    if Path("/proc/self/clear_refs").exists():
        assert peak_memory_mb(device) < with_it - 150
