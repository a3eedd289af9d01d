"""Requirements on every method that serves regression, by listing, and on the streams, results and refusals around it."""

import copy

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, r2_score
from torch import nn
from torch.utils.data import TensorDataset

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
from tta import methods, tasks
from tta.results import Predictions

BATCH = 16
SERVED = tta.list_methods(task="regression")
VARIANTS = [
    ("ssa", {"components": 3, "steps": 2, "optimizer": "sgd", "lr": 1e-3}),
    ("ssa", {"parameters": "features", "statistics": "source", "lr": 1e-4}),
    ("actmad", {"score": "after", "position": "activation"}),
    ("norm", {"alpha": 0.3}),
]
CASES = [*((name, {}) for name in SERVED), *(pytest.param(variant, marks=pytest.mark.slow) for variant in VARIANTS)]
STILL = {"source", "norm"}  # learn no weights


class Numbers(nn.Module):
    """The golden network with a head of numbers in place of its classes."""

    def __init__(self, cnn, values, flat=False):
        super().__init__()
        torch.manual_seed(0)
        self.cnn, self.flat = copy.deepcopy(cnn), flat
        self.cnn.fc = nn.Linear(64, values)

    def forward(self, x):
        numbers = self.cnn(x)
        return numbers[:, 0] if self.flat else numbers


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())]))
def case(request):
    return request.param


@pytest.fixture
def make(case, cnn, golden_source, device):
    method, hparams = case
    model = Numbers(cnn, 2).to(device)
    return lambda: tta.adapt(model, method, source=golden_source[: 4 * BATCH], task="regression", **hparams)


@pytest.fixture
def batches(golden_images, device):
    return list(golden_images[: 4 * BATCH].to(device).split(BATCH))


def test_plain_loop_equals_trainer(make, batches):
    images = torch.cat([batch.cpu() for batch in batches])
    targets = torch.rand(len(images), 2, generator=torch.Generator().manual_seed(2))
    stream = tta.stream({"a": TensorDataset(images, targets)}, task="regression", batch_size=BATCH)
    result, expected = trained_as_in_a_loop(make, batches, stream)
    assert expected.dtype == torch.float32
    assert torch.equal(torch.from_numpy(result.predictions.value), expected.cpu())


def test_declared_parameters_change_and_no_others(case, make, batches):
    changed, declared = changed_and_declared(make(), batches)
    assert changed == (set() if case[0] in STILL else declared)


def test_one_image_is_served(make, batches):
    values = run(make(), batches[0][:4].split(1))
    assert values.shape == (4, 2)
    assert values.isfinite().all()


@pytest.mark.slow
def test_bf16_autocast_stays_near_float32(make, batches, device):
    values, reference = with_and_without_bf16(make, batches, device)
    assert (values - reference).abs().median() < 0.05  # they span about 3


# ---------------------------------------------------------------------- who serves, what is taken


@pytest.mark.parametrize("name", [name for name in sorted(tta.list_methods()) if name not in SERVED])
def test_others_refuse_with_their_reason(name, cnn):
    with pytest.raises(ValueError, match=r"needs .*; a regression model gives numbers, no class probabilities"):
        tta.adapt(Numbers(cnn, 1), name, task="regression")


def test_the_sentence_of_refusal_names_those_that_serve():
    assert tasks.REGRESSION.lacking.endswith(f"Methods for regression: {', '.join(SERVED)}.")
    assert {name for name in tta.list_methods() if "regression" in methods.find(name).tasks} == set(SERVED)


def test_the_task_is_never_guessed(cnn, golden_source):
    with pytest.raises(ValueError, match=r"never guessed. Pass task='regression'"):
        tta.adapt(Numbers(cnn, 1), "ssa", source=golden_source[:32])
    adapter = tta.adapt(Numbers(cnn, 1), "norm")
    with pytest.raises(ValueError, match=r"single output.*task='regression' if it is a number"):
        adapter(golden_source[:16])


def test_one_number_an_image_in_either_shape(cnn, golden_images):
    column, flat = (tta.adapt(Numbers(cnn, 1, flat), "norm", task="regression")(golden_images[:16]) for flat in (0, 1))
    assert column.shape == (16, 1)
    assert torch.equal(column, flat)


def test_numbers_alike_in_all_images_are_no_collapse(golden_images, recwarn):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    adapter = tta.adapt(model, "source", task="regression")
    for _ in range(30):
        adapter(golden_images[:1])
    assert not recwarn.list


@pytest.mark.parametrize(("outputs", "said"), [("sigmoid", "not of task"), ("probabilities", "has none of")])
def test_outputs_of_classes_are_refused(cnn, outputs, said):
    with pytest.raises(ValueError, match=said):
        tta.adapt(Numbers(cnn, 1), "norm", task="regression", outputs=outputs)


@pytest.mark.parametrize("output", [torch.zeros(4, 2, 3), torch.zeros(3, 1), "text"])
def test_other_outputs_are_named(output):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    model.register_forward_hook(lambda *_: output)
    with pytest.raises((ValueError, TypeError), match="expects numbers"):
        tta.adapt(model, "source", task="regression")(torch.zeros(4, 3, 2, 2))


# ---------------------------------------------------------------------- streams and scores


def stream_of(golden_images, targets, **settings):
    domains = {
        name: TensorDataset(golden_images[part], targets[part])
        for name, part in (("a", slice(0, 24)), ("b", slice(24, 64)))
    }
    return tta.stream(domains, task="regression", batch_size=16, **settings)


@pytest.fixture
def targets():
    found = 3 + torch.randn(64, 2, generator=torch.Generator().manual_seed(3))
    found[5] = torch.nan
    return found


def test_scores_are_those_of_scikit_learn(cnn, golden_images, targets, tmp_path):
    result = tta.evaluate(
        tta.adapt(Numbers(cnn, 2), "norm", task="regression"), stream_of(golden_images, targets), progress=False
    )
    value, known = result.predictions.value, ~np.isnan(targets[:, 0].numpy())
    expected = []
    for domain, part in (("a", slice(0, 24)), ("b", slice(24, 64))):
        here = targets[part].numpy()[known[part]], value[part][known[part]]
        expected.append(mean_absolute_error(*here))
        assert result.scores[domain] == pytest.approx(expected[-1])
        assert result.metrics["domains"][domain]["r2"] == pytest.approx(r2_score(*here))
    assert result.score == ("MAE", pytest.approx(np.mean(expected)), "down")
    assert result.metrics["r2_stream"] == pytest.approx(r2_score(targets.numpy()[known], value[known]))
    assert result.samples == 63
    assert np.isnan(result.mean_error)
    assert np.isnan(list(result.errors.values())).all()
    result.save(tmp_path)
    assert tta.Result.load(tmp_path) == result
    assert (tmp_path / "curves.parquet").is_file()


def test_tables_say_mae_and_no_percent(cnn, golden_images, targets):
    stream = stream_of(golden_images, targets)
    results = [
        tta.evaluate(tta.adapt(Numbers(cnn, 2), name, task="regression"), stream, progress=False)
        for name in ("source", "norm")
    ]
    text = str(tta.compare(results, "source"))
    difference = results[1].score.value - results[0].score.value
    assert "Online MAE" in text
    assert not {"%:", "error"} & {*text.replace("95 %", "").split()}
    assert f"{difference:+.4g} [" in text  # the estimate of the paired bootstrap
    assert "%" not in str(results[0])


def test_the_interval_covers_the_difference(cnn, golden_images, targets):
    stream = stream_of(golden_images, targets)
    a, b = (
        tta.evaluate(tta.adapt(Numbers(cnn, 2), name, task="regression"), stream, progress=False)
        for name in ("source", "norm")
    )
    interval = tta.results.compare_errors(a, b, resamples=200)
    assert interval.estimate == pytest.approx(b.score.value - a.score.value)
    assert interval.low < interval.estimate < interval.high
    assert tta.results.error_interval(a, resamples=50).estimate == pytest.approx(a.score.value)


def test_protocols_by_class_are_refused(golden_images, targets):
    with pytest.raises(ValueError, match="has numbers and no class"):
        stream_of(golden_images, targets, protocol="correlated", delta=0.1)


def test_labels_of_another_kind_are_refused(cnn, golden_images):
    adapter = tta.adapt(Numbers(cnn, 1), "norm", task="regression")
    classes = tta.stream({"a": TensorDataset(golden_images[:16], torch.arange(16))}, batch_size=16)
    with pytest.raises(ValueError, match=r"Make the stream with task='regression'"):
        tta.evaluate(adapter, classes, progress=False)
    two = tta.stream({"a": TensorDataset(golden_images[:16], torch.rand(16, 2))}, task="regression", batch_size=16)
    with pytest.raises(ValueError, match=r"shape \(16, 2\); the model gives 1 numbers an image"):
        tta.evaluate(adapter, two, progress=False)


def test_numbers_of_a_dataset_of_samples():
    samples = [(torch.rand(3, 4, 4), float(number)) for number in range(5)]
    stream = tta.stream({"a": samples}, task="regression", batch_size=2)
    assert torch.cat([batch.labels for batch in stream]).tolist() == [[0.0], [1.0], [2.0], [3.0], [4.0]]
    uneven = tta.stream({"a": [(torch.rand(3, 4, 4), [1.0]), (torch.rand(3, 4, 4), [1.0, 2.0])]}, task="regression")
    with pytest.raises(ValueError, match=r"Domain 'a': expected as many numbers for each image"):
        next(iter(uneven))


def test_predictions_of_numbers_are_checked():
    none = np.full(3, -1)
    with pytest.raises(ValueError, match=r"value: expected floating-point numbers of shape \(samples, values\)"):
        Predictions(domain=none, index=none, label=none, prediction=none, value=none)
