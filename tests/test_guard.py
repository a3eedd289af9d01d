"""The guard: its bounds, its monitor, its decisions, and that it works around every method."""

import logging

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import TensorDataset

import tta
from tta.guard import Guard, Monitor, harm
from tta.guard.stuck import StuckInput
from tta.methods import find

BATCH = 16
QUICK = {
    "adacontrast": {"queue_size": 64},
    "clust3": {"steps": 2, "projectors": 2, "source_steps": 1},
    "cotta": {"views": 3},
    "cta": {"steps": 2, "source_steps": 1, "augment": "crop"},
    "dpcore": {"steps_new": 2},
    "foa": {"population": 4},
    "memo": {"views": 2, "augment": "none", "lr": 1e-5},
    "owttt": {"lr": 1e-4},
    "petal": {"views": 3},
    "stamp": {"views": 2},
    "ttac": {"lr": 1e-3},
    "ttt": {"copies": 2, "augment": "none", "source_steps": 1, "lr": 3e-5},
    "ttt_mae": {"copies": 2, "source_steps": 1, "width": 4},
}
VIT = ("dpcore", "foa")
ALARM = {"tolerance": -2.0, "hold": 2}  # far below the smallest harm: every comparison is an alarm
CALM = {"tolerance": 1.0}


# ---------------------------------------------------------------------- monitor


def logits_for(probabilities):
    return torch.tensor(probabilities).log()


def test_harm_where_both_agree_is_minus_the_doubt_of_the_source():
    source = logits_for([[0.7, 0.2, 0.1]])
    assert harm(logits_for([[0.5, 0.3, 0.2]]), source).item() == pytest.approx(-0.3)


def test_harm_of_an_unsure_contradiction():
    source, adapted = logits_for([[0.7, 0.2, 0.1]]), logits_for([[0.3, 0.4, 0.3]])
    assert harm(adapted, source).item() == pytest.approx(0.5 - 0.3 - (0.1 - 0.5) / 2)


def test_harm_of_a_sure_correction_of_an_unsure_source_is_negative():
    source, adapted = logits_for([[0.4, 0.35, 0.25]]), logits_for([[0.01, 0.98, 0.01]])
    assert harm(adapted, source).item() == -0.5  # clipped


def spread_logits(classes, generator, sharpness=4.0):
    """A batch whose labels are these classes, predicted with some doubt."""
    logits = torch.randn(len(classes), 10, generator=generator)
    logits[torch.arange(len(classes)), classes] += sharpness
    return logits


def test_monitor_is_calm_where_the_adapter_equals_the_source():
    monitor, generator = Monitor(10, 0.05, 0.02), torch.Generator().manual_seed(0)
    for _ in range(60):
        source = spread_logits(torch.randint(10, (64,), generator=generator), generator)
        assert not monitor.update(source, source)


def test_monitor_finds_risk():
    monitor, generator = Monitor(10, 0.05, 0.02), torch.Generator().manual_seed(0)
    found = []
    for _ in range(4):
        labels = torch.randint(10, (64,), generator=generator)
        found.append(
            monitor.update(torch.randn(64, 10, generator=generator), spread_logits(labels, generator, sharpness=8.0))
        )
    assert any(reason.startswith("risk") for reason in found)


def test_monitor_finds_the_collapse_of_a_model_whose_source_is_unsure():
    monitor, generator = Monitor(10, 0.05, 0.02), torch.Generator().manual_seed(0)
    one = torch.zeros(64, 10)
    one[:, 3] = 9.0
    found = []
    for _ in range(6):
        source = 0.5 * torch.randn(64, 10, generator=generator)
        source[:, 3] -= 2  # it believes in that class least of all
        found.append(monitor.update(one, source))
    assert found[-1].startswith("collapse")


def test_a_collapsed_source_is_no_witness_under_a_shift():
    generator = torch.Generator().manual_seed(0)
    collapsed = torch.zeros(64, 10)
    collapsed[:, 8] = 9.0
    under_shift, without = Monitor(10, 0.05, 0.02), Monitor(10, 0.05, 0.02)
    found = []
    for _ in range(6):
        adapted = spread_logits(torch.randint(10, (64,), generator=generator), generator)
        assert not under_shift.update(adapted, collapsed, shift=0.6)
        found.append(without.update(adapted, collapsed, shift=0.05))
    assert any(reason.startswith("risk") for reason in found)


@pytest.mark.parametrize("size", [1, 8, 16, 31])
def test_a_source_that_collapses_in_a_new_domain_is_no_witness_in_small_batches_either(size):
    generator = torch.Generator().manual_seed(0)
    monitor = Monitor(10, 0.05, 0.02)

    def adapted(images):
        return spread_logits(torch.randint(10, (images,), generator=generator), generator)

    for _ in range(1024 // size):  # a domain in which the source is right
        source = adapted(size)
        assert not monitor.update(source, source, shift=0.5)
    collapsed = torch.zeros(size, 10)
    collapsed[:, 8] = 4.0  # it gives that class 0.86
    for _ in range(512 // size):
        assert not monitor.update(adapted(size), collapsed, shift=0.6)


def test_monitor_allows_one_class_where_the_source_sees_it_too():
    monitor, generator = Monitor(10, 0.05, 0.02), torch.Generator().manual_seed(0)
    one = torch.zeros(64, 10)
    one[:, 3] = 9.0
    for _ in range(20):
        source = spread_logits(torch.full((64,), 3), generator, sharpness=1.0)
        assert not monitor.update(one, source)


# ---------------------------------------------------------------------- stuck inputs


@pytest.mark.parametrize("size", [1, 3, 8, 64])
def test_repeated_picture_is_found_at_any_batch_size(size):
    stuck, picture = StuckInput(), torch.rand(1, 3, 32, 32)
    found = [stuck.look(picture + 1e-3 * torch.randn(size, 3, 32, 32)) for _ in range(12)]
    seen = (torch.arange(12) + 1) * size
    assert found == (seen >= 8).tolist()
    assert not stuck.look(torch.rand(size, 3, 32, 32)) or size >= 8


def test_different_pictures_are_not_stuck():
    stuck = StuckInput()
    assert not any(stuck.look(torch.rand(16, 3, 224, 224)) for _ in range(4))


# ---------------------------------------------------------------------- around every method


@pytest.fixture(params=tta.list_methods(task="classification"))
def method(request):
    return request.param


@pytest.fixture
def make(method, request, golden_source, golden_source_labels, device):
    source = TensorDataset(golden_source[:32], golden_source_labels[:32])
    fixture = "towers" if find(method).two_towers else "vit" if method in VIT else "cnn"
    model = request.getfixturevalue(fixture).to(device)

    def build(**guard):
        settings = {"guard": guard} if guard else {}
        return tta.adapt(model, method, source=source, **QUICK.get(method, {}), **settings)

    build.model = model
    return build


@pytest.fixture
def batches(golden_images, device):
    return list(golden_images[: 8 * BATCH].to(device).split(BATCH))


def source_logits(make, x):
    with torch.no_grad():
        return make.model.eval()(x)


def test_a_calm_guard_changes_nothing(make, batches):
    plain, guarded = make(), make(**CALM)
    for batch in batches[:4]:
        assert torch.equal(plain(batch), guarded(batch))
    assert guarded.guard.counts["checks"] == 4


def test_after_an_alarm_the_adapter_is_the_source_again_and_learns_nothing(make, batches):
    adapter, fresh = make(**ALARM), make()
    logits = adapter(batches[0])
    assert adapter.guard.counts["alarms"] == 1
    assert torch.allclose(logits, source_logits(make, batches[0]), atol=1e-5)
    with adapter._unguarded():  # the adapter alone, as it was made
        state = adapter.state_dict()
    expected = fresh.state_dict()
    for key in expected:  # counts go on, and so does what waits for answers
        assert key == "_counters" or key.startswith("waiting.") or torch.equal(state[key], expected[key]), key
    with adapter.paused():
        assert torch.allclose(adapter(batches[0]), source_logits(make, batches[0]), atol=1e-5)
    assert torch.allclose(adapter(batches[1]), source_logits(make, batches[1]), atol=1e-5)
    assert adapter.guard.action == "source"


def test_guard_is_saved_and_goes_on_exactly(make, batches):
    whole, first, again = make(**ALARM), make(**ALARM), make(**ALARM)
    expected = [whole(batch) for batch in batches]
    for batch in batches[:5]:
        first(batch)
    again.load_state_dict(first.state_dict())
    for batch, logits in zip(batches[5:], expected[5:], strict=True):
        assert torch.equal(again(batch), logits)
    assert again.guard.counts == whole.guard.counts
    assert whole.guard.counts["alarms"] > 1


def test_reset_starts_the_guard_anew(make, batches):
    adapter, fresh = make(**ALARM), make(**ALARM)
    for batch in batches[:4]:
        adapter(batch)
    adapter.reset()
    for batch in batches[:4]:
        assert torch.equal(adapter(batch), fresh(batch))
    assert adapter.guard.counts == fresh.guard.counts


# ---------------------------------------------------------------------- decisions, on digits


@pytest.fixture
def digits_cnn():
    return tta.load_model("digits-cnn")


def streamed(adapter, stream):
    wrong = total = 0
    for batch in stream:
        wrong += int((adapter(batch.images).argmax(1) != batch.labels).sum())
        total += len(batch.labels)
    return 100 * wrong / total


def test_sorted_labels_do_no_harm(digits_cnn):
    stream = tta.stream("digits-c", protocol="correlated", delta=0.0, batch_size=64)
    source = streamed(tta.adapt(digits_cnn, "source"), stream)
    guarded = tta.adapt(digits_cnn, "norm", guard=True)
    assert streamed(tta.adapt(digits_cnn, "norm"), stream) > source + 10
    assert streamed(guarded, stream) < source + 3  # +2.5: ten batches until the alarm
    assert guarded.guard.counts["alarms"] > 0


def test_a_rate_a_hundred_times_too_high_does_no_lasting_harm(digits_cnn):
    stream = tta.stream("digits-c", protocol="correlated", delta=0.0, batch_size=32, samples=300)
    source = streamed(tta.adapt(digits_cnn, "source"), stream)
    assert streamed(tta.adapt(digits_cnn, "tent", lr=0.3), stream) > source + 50
    assert streamed(tta.adapt(digits_cnn, "tent", lr=0.3, guard=True), stream) < source + 2  # +1.0


def test_a_healthy_stream_is_left_alone(digits_cnn):
    stream = tta.stream("digits-c", batch_size=50, samples=200)
    adapter = tta.adapt(digits_cnn, "tent", guard=True)
    assert streamed(adapter, stream) == streamed(tta.adapt(digits_cnn, "tent"), stream)
    assert adapter.guard.counts["alarms"] == 0


@pytest.mark.parametrize(("batch_size", "seed"), [(50, 0), (32, 1)])
def test_gains_under_a_collapsed_source_are_kept(digits_cnn, batch_size, seed):
    """In one batch of 32 with seed 1 the source names three digits of another class; alarms then cost 45 points."""
    stream = tta.stream("digits-c", batch_size=batch_size, corruptions=["fog", "contrast"], seed=seed)
    guarded = tta.adapt(digits_cnn, "norm", guard=True)
    assert streamed(guarded, stream) == streamed(tta.adapt(digits_cnn, "norm"), stream) < 30
    assert streamed(tta.adapt(digits_cnn, "source"), stream) > 80


def test_a_stuck_input_teaches_nothing_and_is_answered_by_the_source(digits_cnn, caplog):
    adapter = tta.adapt(digits_cnn, "tent", guard=True)
    picture = torch.rand(1, 3, 32, 32).repeat(8, 1, 1, 1)
    with caplog.at_level(logging.WARNING, "tta.guard"):
        for _ in range(5):
            logits = adapter(picture)
    assert adapter.progress().updates == 0
    assert torch.allclose(logits, digits_cnn.eval()(picture), atol=1e-5)
    assert [event.kind for event in adapter.guard.history] == ["stuck"]
    assert "repeats one picture" in caplog.text
    adapter(torch.rand(8, 3, 32, 32))
    assert adapter.progress().updates == 1
    assert adapter.guard.history[-1].kind == "moving"


def test_time_budget_leaves_out_learning(digits_cnn):
    adapter = tta.adapt(digits_cnn, "tent", guard=Guard(seconds=1e-9))
    for _ in range(4):
        adapter(torch.rand(16, 3, 32, 32))
    assert adapter.progress().updates == 1
    assert adapter.guard.counts["held"] == 3
    generous = tta.adapt(digits_cnn, "tent", guard=Guard(seconds=100.0))
    for _ in range(4):
        generous(torch.rand(16, 3, 32, 32))
    assert generous.progress().updates == 4


def test_events_reach_a_callable(digits_cnn, golden_images):
    told = []
    adapter = tta.adapt(digits_cnn, "tent", guard=Guard(**ALARM, on_event=told.append))
    for batch in golden_images.split(64):
        adapter(batch)
    assert [event.kind for event in told[:3]] == ["alarm", "rollback", "hold"]
    assert told == list(adapter.guard.history)


def test_holds_double_and_trials_follow(digits_cnn, golden_images):
    adapter = tta.adapt(digits_cnn, "tent", guard=Guard(**ALARM))
    for batch in 5 * golden_images.split(64):
        adapter(batch)
    holds = [int(event.reason.split()[0]) for event in adapter.guard.history if event.kind == "hold"]
    assert holds[:3] == [2, 4, 8]


def test_a_refused_batch_leaves_the_guard_as_it_was(digits_cnn):
    adapter = tta.adapt(digits_cnn, "tent", guard=True)
    adapter(torch.rand(16, 3, 32, 32))
    before = adapter.state_dict()
    with pytest.raises(ValueError, match="NaN"):
        adapter(torch.full((16, 3, 32, 32), torch.nan))
    with pytest.raises(ValueError, match="channels"):
        adapter(torch.rand(16, 5, 32, 32))
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())


def test_summary_names_the_guard(digits_cnn):
    assert "guard: level=0.05, tolerance=0.02, share=0.125, hold=9" in str(
        tta.adapt(digits_cnn, "norm", guard={"hold": 9}).summary()
    )
    assert "guard" not in str(tta.adapt(digits_cnn, "norm").summary())


def test_source_model_is_a_copy(digits_cnn):
    adapter = tta.adapt(digits_cnn, "tent", guard=True, copy=False)
    for _ in range(3):
        adapter(torch.rand(16, 3, 32, 32))
    with torch.no_grad():
        expected = tta.load_model("digits-cnn").eval()(torch.ones(2, 3, 32, 32))
        assert torch.allclose(adapter.guard.source(torch.ones(2, 3, 32, 32)), expected, atol=1e-5)


def test_sigmoid_outputs_are_guarded():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    adapter = tta.adapt(net, "tent", outputs="sigmoid", guard=True)
    for _ in range(4):
        assert adapter(torch.rand(32, 3, 16, 16)).shape == (32, 4)
    assert adapter.guard.counts["checks"] > 0


def test_saved_adapter_is_loaded_with_its_guard(digits_cnn, tmp_path):
    adapter = tta.adapt(digits_cnn, "tent", guard={"hold": 5})
    images = torch.rand(16, 3, 32, 32)
    adapter(images)
    adapter.save(tmp_path / "a.safetensors")
    again = tta.load(tmp_path / "a.safetensors", digits_cnn)
    assert again.guard.settings.hold == 5
    assert torch.equal(again(images), adapter(images))
    with pytest.raises(ValueError, match="guard="):
        tta.adapt(digits_cnn, "tent").load_state_dict(adapter.state_dict())


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ("yes", TypeError, r"guard is True, False, or tta.Guard"),
        ({"level": 2}, ValueError, r"level=2; expected a probability"),
        ({"levle": 0.1}, ValueError, r"guard setting 'levle'; expected one of level"),
        ({"hold": 0}, ValueError, r"hold=0"),
        ({"share": 0}, ValueError, r"share=0"),
        ({"seconds": -1}, ValueError, r"seconds=-1"),
    ],
)
def test_wrong_settings_are_refused(digits_cnn, given, error, text):
    with pytest.raises(error, match=text):
        tta.adapt(digits_cnn, "tent", guard=given)


@pytest.mark.parametrize("size", [1, 16])
def test_without_a_guard_a_single_class_is_at_least_warned_of(digits_cnn, size):
    adapter = tta.adapt(digits_cnn, "source")
    for _ in range(23):
        adapter(torch.zeros(size, 3, 32, 32))
    with pytest.warns(RuntimeWarning, match="predicted as the same class, 24 batches in a row"):
        adapter(torch.zeros(size, 3, 32, 32))


def test_changing_classes_are_not_warned_of(digits_cnn, recwarn):
    adapter = tta.adapt(digits_cnn, "source")
    for batch in tta.stream("digits-c", samples=100, batch_size=10, corruptions=["fog", "contrast", "pixelate"]):
        adapter(batch.images)
    assert not [warning for warning in recwarn if "same class" in str(warning.message)]


# ---------------------------------------------------------------------- results


class Heard(Callback):
    def __init__(self):
        self.events = []

    def on_guard_event(self, trainer, module, event):
        self.events.append(event)


def test_decisions_are_in_the_result(digits_cnn, tmp_path):
    stream = tta.stream("digits-c", protocol="correlated", delta=0.0, batch_size=64)
    heard = Heard()
    result = tta.evaluate(tta.adapt(digits_cnn, "norm", guard=True), stream, progress=False, callbacks=[heard])
    found = result.metrics["guard"]
    assert [event.kind for event in heard.events] == [event["kind"] for event in found["events"]]
    assert found["alarms"] == sum(event["kind"] == "alarm" for event in found["events"]) > 0
    curves = result.curves
    assert set(curves["guard"]) <= {"learned", "held", "source"}
    assert (curves["guard"] == "source").sum() == found["batches_source"] > 0
    result.save(tmp_path / "r")
    again = tta.Result.load(tmp_path / "r")
    assert again.metrics["guard"] == found
    assert list(again.curves["guard"]) == list(curves["guard"])
    assert result.manifest["guard"]["hold"] == 32
    pandas = pytest.importorskip("pandas")
    assert "guard" in pandas.read_parquet(tmp_path / "r" / "curves.parquet").columns


def test_result_without_a_guard_has_no_such_column(digits_cnn):
    stream = tta.stream("digits-c", samples=20, corruptions=["fog"])
    result = tta.evaluate(tta.adapt(digits_cnn, "norm"), stream, progress=False)
    for place in (result.curves, result.metrics, result.manifest):
        assert "guard" not in place
