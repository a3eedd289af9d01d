"""Requirements on every method whatever its task, stated once: the files that import a test here run it on their methods.

Such a file has the fixtures ``make``, a function that builds a fresh adapter, and ``batches``, at least three of its images.
"""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file, save_file

import tta


class CollectLogits(Callback):
    def __init__(self):
        self.logits = []

    def on_test_batch_end(self, trainer, pl_module, outputs, *_):
        self.logits.append(outputs["logits"])


def evaluate(adapter, stream, collected):
    accelerator = "gpu" if adapter.device.type == "cuda" else "cpu"
    return tta.evaluate(adapter, stream, progress=False, callbacks=[collected], accelerator=accelerator)


def run(adapter, batches):
    """Outputs of the adapter for the images of all batches: a tensor, or a list with the boxes of each."""
    outputs = [adapter(batch) for batch in batches]
    return torch.cat(outputs) if isinstance(outputs[0], torch.Tensor) else [one for found in outputs for one in found]


def equal(first, second):
    """Whether two outputs of :func:`run` are the same bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    return len(first) == len(second) and all(map(equal, first, second))


def finite(outputs):
    if isinstance(outputs, torch.Tensor):
        return bool(outputs.isfinite().all())
    return all(map(finite, outputs.values() if isinstance(outputs, dict) else outputs))


def equal_states(first, second, but=()):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in {*first} - {*but})


def trained_as_in_a_loop(make, batches, stream):
    """Hold the Trainer on a stream to a loop over its batches; returns the result, and what the loop gave."""
    plain, driven, collected = make(), make(), CollectLogits()
    expected = run(plain, batches)
    result = evaluate(driven, stream, collected)
    assert torch.equal(torch.cat(collected.logits), expected)
    assert equal_states(plain.state_dict(), driven.state_dict())
    return result, expected


def changed_and_declared(adapter, batches):
    """Names of the parameters that a run over the batches changes, and of those that the method declares."""
    declared = {id(parameter) for parameter in adapter.parameters_to_adapt()}
    before = {name: parameter.clone() for name, parameter in adapter.model.named_parameters()}
    run(adapter, batches)
    named = [*adapter.model.named_parameters()]
    return {n for n, p in named if not torch.equal(p, before[n])}, {n for n, p in named if id(p) in declared}


def predicts_and_learns_nothing(adapter, batch):
    before = adapter.state_dict()
    with torch.no_grad():
        predicted = adapter.predict(batch)
    with adapter.paused():
        paused = adapter(batch)
    return equal(predicted, paused) and equal_states(adapter.state_dict(), before)


def with_and_without_bf16(make, batches, device):
    """Outputs of fresh adapters under autocast to bfloat16, and in float32."""
    reference = run(make(), batches)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        outputs = run(make(), batches)
    assert outputs.dtype == torch.float32
    return outputs, reference


def test_reset_equals_fresh(make, batches):
    fresh, adapter = make(), make()
    run(adapter, batches)
    adapter.reset()
    assert equal_states(adapter.state_dict(), fresh.state_dict())
    assert equal(run(adapter, batches), run(fresh, batches))
    assert equal_states(adapter.state_dict(), fresh.state_dict())


def test_save_load_continue_equals_uninterrupted(make, batches, tmp_path):
    half = len(batches) // 2
    whole = run(make(), batches)
    first = make()
    begun = run(first, batches[:half])
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    second = make()
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert equal([*begun, *run(second, batches[half:])], [*whole])


def test_deepcopy_goes_on_independently(make, batches):
    original = make()
    run(original, batches[:2])
    state = original.state_dict()
    continued = run(copy.deepcopy(original), batches[2:])
    assert equal_states(original.state_dict(), state)
    assert equal(run(original, batches[2:]), continued)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_grad_modes_change_nothing(make, batches, context):
    expected = run(make(), batches)
    adapter = make()
    with context():
        outputs = run(adapter, [batch.clone() for batch in batches])
    assert equal(outputs, expected)


def test_predict_learns_nothing(make, batches):
    adapter = make()
    run(adapter, batches[:2])
    assert predicts_and_learns_nothing(adapter, batches[2])


@pytest.mark.filterwarnings("ignore:.*was skipped:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_bad_pixel_teaches_nothing(make, batches, value):
    adapter, bad = make(), batches[-2].clone()
    run(adapter, batches[:-2])
    before = adapter.state_dict()
    bad[1, 0, 0, 0] = value
    refused = pytest.raises(ValueError, match=f"1 of the {len(bad)} images hold NaN")
    with refused if math.isnan(value) else nullcontext():  # the huge value is predicted
        adapter(bad)
    assert equal_states(adapter.state_dict(), before, but=("_counters", "generator"))
    assert finite(run(adapter, batches[-1:]))
