"""Feedback: the bank of samples that wait against a plain re-statement, answers of every kind, state, and the oracle."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

import tta
from tta.adapter import Answers, Output
from tta.adapter.feedback import USERS
from tta.adapter.waiting import Waiting
from tta.cli import main
from tta.methods import find

LISTENING = [name for name in tta.list_methods() if find(name).uses_feedback]
ANSWERS = {"bitta": "correct", "simatta": "labels"}
QUICK = {"bitta": {"steps": 1}, "simatta": {"steps": 2, "e_high": 0.0}}
BATCH = 16


@pytest.fixture(params=LISTENING)
def method(request):
    return request.param


@pytest.fixture
def make(method, cnn):
    return lambda **more: tta.adapt(cnn, method, **{**QUICK[method], **more})


@pytest.fixture
def batches(golden_images):
    return golden_images[: 6 * BATCH].split(BATCH)


def tell(adapter, ids, value):
    return adapter.feedback(ids, **{adapter.uses_feedback[0]: value})


# ---------------------------------------------------------------------- the bank


class PlainWaiting:
    """The rules, one sample at a time."""

    def __init__(self, capacity, expiry):
        self.capacity, self.expiry = capacity, expiry
        self.samples, self.offered, self.batches = [], 0, 0

    def add(self, count):
        self.samples = [s for s in self.samples if self.batches - s["batch"] <= self.expiry]
        new = [{"id": self.offered + n, "batch": self.batches, "asked": False, "right": None} for n in range(count)]
        new = new[-self.capacity :]
        while len(self.samples) + len(new) > self.capacity:
            self.samples.remove(min(self.samples, key=lambda s: (s["asked"] and s["right"] is None, s["id"])))
        self.samples += new
        self.offered += count
        self.batches += 1

    def answer(self, number, right):
        found = [s for s in self.samples if s["id"] == number]
        if not found:
            return "expired" if 0 <= number < self.offered else "unknown"
        if found[0]["right"] is None:
            found[0]["right"] = right
            return "taken"
        return "repeated" if found[0]["right"] == right else "contradicting"


AGO = st.integers(-2, 14)  # samples since, so that most are of the bank or were lately
STEPS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 9)),
    st.tuples(st.just("ask"), AGO),
    st.tuples(st.just("answer"), st.lists(st.tuples(AGO, st.booleans()), max_size=4)),
)


@settings(max_examples=150, deadline=None)
@given(capacity=st.integers(1, 12), expiry=st.integers(0, 6), steps=st.lists(STEPS, max_size=25))
def test_bank_follows_its_rules(capacity, expiry, steps):
    """Bound, expiry and order, and what becomes of each answer: late, unknown, repeated, contradictory."""
    bank, plain = Waiting(capacity, expiry), PlainWaiting(capacity, expiry)
    for kind, given_ in steps:
        if kind == "add":
            numbers = torch.arange(plain.offered, plain.offered + given_).float()
            ids = bank.add(numbers.view(-1, 1, 1, 1), torch.zeros(given_, 3))
            assert ids.tolist() == numbers.tolist()
            plain.add(given_)
        elif kind == "ask":
            number = plain.offered - 1 - given_
            slots = bank.slots(torch.tensor([number]))
            bank.asked[slots[slots >= 0]] = True
            for sample in plain.samples:
                sample["asked"] |= sample["id"] == number
        else:
            given_ = [(plain.offered - 1 - ago, says) for ago, says in given_]
            ids, right = torch.tensor([i for i, _ in given_]).long(), torch.tensor([r for _, r in given_]).bool()
            counted, taken = bank.answer(ids, right, None)
            outcomes = [plain.answer(number, says) for number, says in given_]
            assert counted._asdict() == {name: outcomes.count(name) for name in Answers._fields}
            assert bank.ids[taken].tolist() == [
                i for (i, _), became in zip(given_, outcomes, strict=True) if became == "taken"
            ]
        held = bank.labels >= 0
        assert held.sum() <= capacity
        assert sorted(bank.ids[held].tolist()) == sorted(sample["id"] for sample in plain.samples)
        if bank.samples is not None:  # each image is still that of its id
            assert bank.samples[held].flatten().tolist() == bank.ids[held].tolist()
        assert bank.pending().numel() == sum(s["asked"] and s["right"] is None for s in plain.samples)


def test_open_samples_are_the_newest_that_nobody_asked_about():
    bank = Waiting(20)
    bank.add(torch.zeros(6, 1, 1, 1), torch.zeros(6, 2))
    bank.add(torch.zeros(4, 1, 1, 1), torch.zeros(4, 2))
    bank.asked[bank.slots(torch.tensor([5, 8]))] = True
    bank.answer(torch.tensor([7]), torch.tensor([True]), None)
    assert bank.ids[bank.open(1)].tolist() == [6, 9]  # the whole last batch
    assert bank.ids[bank.open(7)].tolist() == [3, 4, 6, 9]


def test_an_id_given_again_is_the_newer_samples():
    bank = Waiting(8)
    bank.add(torch.zeros(2, 1, 1, 1), torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([7, 9]))
    bank.add(torch.ones(2, 1, 1, 1), torch.tensor([[0, 1.0], [0, 1]]), torch.tensor([9, 11]))
    assert sorted(bank.ids[bank.labels >= 0].tolist()) == [7, 9, 11]
    (slot,) = bank.slots(torch.tensor([9]))
    assert (bank.samples[slot].item(), bank.labels[slot].item()) == (1.0, 1)
    counted, _ = bank.answer(torch.tensor([3]), torch.tensor([True]), None)
    assert counted.unknown == 1  # of ids that are not counted none is known to have been there


# ---------------------------------------------------------------------- ids


def test_ids_are_counted_or_given(make, batches):
    adapter = make()
    assert adapter.step(batches[0]).ids.tolist() == list(range(BATCH))
    assert adapter.step(batches[1]).ids.tolist() == list(range(BATCH, 2 * BATCH))
    given_ = [1000 + 7 * n for n in range(BATCH)]
    assert adapter.step(batches[2], ids=given_).ids.tolist() == given_
    assert tell(adapter, [1000, 3], [True, False] if "correct" in adapter.uses_feedback else [1, 2]).taken == 2


def test_predictions_that_are_not_learned_from_have_no_id(make, batches):
    adapter = make(on_bad="skip")
    adapter(batches[0])
    with adapter.paused():
        assert adapter.step(batches[1]).ids.tolist() == [-1] * BATCH
    bad = batches[1].clone()
    bad[3, 0, 0, 0] = torch.nan
    ids = adapter.step(bad).ids.tolist()
    assert ids == [*range(BATCH, BATCH + 3), -1, *range(BATCH + 3, 2 * BATCH - 1)]
    huge = batches[2].clone()
    huge[0] = 1e30
    assert adapter.step(huge).ids.tolist() == [-1] * BATCH


@pytest.mark.parametrize(
    ("ids", "text"),
    [([1], "1 ids for 16 images"), ([0] * BATCH, "two images share"), ([0.5] * BATCH, "whole numbers in a row")],
)
def test_ids_that_do_not_fit_teach_nothing(make, batches, ids, text):
    adapter = make()
    adapter(batches[0])
    before = adapter.state_dict()
    with pytest.raises(ValueError, match=text):
        adapter.step(batches[1], ids=ids)
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())


def test_images_of_another_size_are_refused_before_they_teach(make, batches):
    adapter = make()
    adapter(batches[0])
    before = adapter.state_dict()
    with pytest.raises(ValueError, match="holds images of shape"):
        adapter(batches[1][..., :24, :24])
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())


def test_other_methods_keep_no_images_and_say_who_can(cnn, batches):
    adapter = tta.adapt(cnn, "tent")
    output = adapter.step(batches[0])
    assert isinstance(output, Output)
    assert output.ids is None
    assert adapter.step(batches[0], ids=range(BATCH)).ids.tolist() == list(range(BATCH))
    assert not [key for key in adapter.state_dict() if "waiting" in key]
    for call in (lambda: adapter.queries(1), lambda: adapter.feedback([0], correct=[True]), lambda: adapter.answers()):
        with pytest.raises(ValueError, match=r"tent cannot use feedback\. Methods that can: bitta, simatta\."):
            call()
    assert ", ".join(LISTENING) == USERS


# ---------------------------------------------------------------------- answers


def test_answers_of_every_kind_are_counted_and_told(make, batches):
    adapter = make(waiting=BATCH, expiry=50)
    for batch in batches[:2]:
        adapter(batch)
    first, second = (True, False) if "correct" in adapter.uses_feedback else (1, 2)
    assert tell(adapter, [20], [first]) == Answers(taken=1)
    assert tell(adapter, [20, 20], [first, second]) == Answers(repeated=1, contradicting=1)
    with pytest.warns(RuntimeWarning, match="2 answers: 0 taken, 1 expired, 1 unknown"):
        counted = tell(adapter, [3, 99], [first, first])
    assert counted == Answers(expired=1, unknown=1)
    assert adapter.answers() == Answers(1, 1, 1, 1, 1)


def test_a_contradicted_answer_changes_nothing(make, batches):
    def run(again):
        adapter = make()
        adapter(batches[0])
        first, second = (True, False) if "correct" in adapter.uses_feedback else (1, 2)
        tell(adapter, [4], [first])
        if again:
            tell(adapter, [4, 4], [second, first])
        return adapter(batches[1])

    assert torch.equal(run(True), run(False))


def test_answers_change_what_is_learned(make, batches):
    def run(values):
        adapter = make()
        adapter(batches[0])
        if values is not None:
            tell(adapter, [0, 1, 2], values)
        return adapter(batches[1])

    values = ([True] * 3, [False] * 3) if make().uses_feedback[0] == "correct" else ([1] * 3, [2] * 3)
    found = [run(None), *map(run, values)]
    assert not any(torch.equal(found[a], found[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        ({}, "either correct= or labels="),
        ({"correct": [True], "labels": [1]}, "either correct= or labels="),
        ({"labels": [1, 2]}, "2 answers for 1 ids"),
        ({"labels": [10]}, "from 0 to 9"),
        ({"labels": [-1]}, "from 0 to 9"),
        ({"labels": [0.5]}, "from 0 to 9"),
    ],
)
def test_answers_that_do_not_fit_are_refused_whole(make, batches, given_, text):
    adapter = make()
    adapter(batches[0])
    before = adapter.state_dict()
    with pytest.raises(ValueError, match=text):
        adapter.feedback([0], **given_)
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())


def test_a_label_tells_whether_the_prediction_was_right(cnn, batches):
    def run(kind):
        adapter = tta.adapt(cnn, "bitta", steps=1)
        predicted = adapter(batches[0]).argmax(1)
        labels = predicted.clone()
        labels[1::2] = (labels[1::2] + 1) % 10
        adapter.feedback(range(BATCH), **({"labels": labels} if kind == "labels" else {"correct": labels == predicted}))
        return adapter(batches[1])

    assert torch.equal(run("labels"), run("correct"))


def test_right_and_wrong_tell_simatta_nothing(cnn, batches):
    adapter = tta.adapt(cnn, "simatta")
    adapter(batches[0])
    with pytest.raises(ValueError, match="simatta learns from labels=; correct= tells it nothing"):
        adapter.feedback([0], correct=[True])


def test_each_sample_is_asked_about_once(make, batches):
    adapter = make()
    assert adapter.queries(3) == []
    asked = []
    for batch in batches:
        ids = adapter.step(batch).ids.tolist()
        for _ in range(2):
            wanted = adapter.queries(3)
            assert len(wanted) <= 3
            assert set(wanted) <= set(range(ids[-1] + 1))
            asked += wanted
    assert len(asked) == len(set(asked)) > 6
    with pytest.raises(ValueError, match="count=0"):
        adapter.queries(0)


# ---------------------------------------------------------------------- state


def waiting_answers(adapter, batches, oracle):
    """Logits of a stream in which each question is answered two batches later."""
    due, logits = [], []
    for number, batch in batches:
        logits.append(adapter(batch))
        due.append((number + 2, adapter.queries(2)))
        for _, ids in [entry for entry in due if entry[0] == number]:
            tell(adapter, ids, [oracle(i) for i in ids])
        due = [entry for entry in due if entry[0] > number]
        yield logits[-1], due


@pytest.mark.parametrize("how", ["state", "file", "deepcopy"])
def test_save_load_continue_while_answers_are_awaited(make, cnn, batches, tmp_path, how):
    oracle = (lambda i: i % 3 > 0) if make().uses_feedback[0] == "correct" else (lambda i: i % 10)
    numbered = list(enumerate(batches))
    whole = [logits for logits, _ in waiting_answers(make(), numbered, oracle)]

    first = make()
    *_, (_, due) = waiting_answers(first, numbered[:3], oracle)
    assert sum(len(ids) for _, ids in due)  # questions are open
    if how == "file":
        first.save(tmp_path / "adapter.safetensors")
        second = tta.load(tmp_path / "adapter.safetensors", cnn)
    elif how == "deepcopy":
        second = copy.deepcopy(first)
    else:
        second = make()
        second.load_state_dict(first.state_dict())
    for number, batch in numbered[3:]:
        assert torch.equal(second(batch), whole[number])
        due.append((number + 2, second.queries(2)))
        for when, ids in due:
            if when == number:
                tell(second, ids, [oracle(i) for i in ids])


def test_reset_forgets_answers_and_questions_bit_for_bit(make, batches):
    fresh, adapter = make(), make()
    for logits, _ in waiting_answers(adapter, list(enumerate(batches)), lambda i: i % 2):
        assert logits.isfinite().all()
    adapter.reset()
    state, expected = adapter.state_dict(), fresh.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())
    assert torch.equal(adapter(batches[0]), fresh(batches[0]))


def test_going_back_keeps_what_waits(make, batches):
    """An id is never given twice: an answer that was awaited before a rollback is about the same image after it."""
    adapter = make()
    adapter(batches[0])
    snapshot = adapter.changed_state()
    assert not [key for key in snapshot if key.startswith("waiting.")]
    adapter(batches[1])
    wanted = adapter.queries(2)
    adapter.return_to(snapshot)
    assert adapter.step(batches[2]).ids.tolist() == list(range(2 * BATCH, 3 * BATCH))
    assert adapter.waiting.ids[adapter.waiting.pending()].tolist() == sorted(wanted)
    adapter.return_to(None)
    assert tell(adapter, wanted, [1] * len(wanted)).taken == len(wanted)


def test_a_guarded_adapter_takes_answers(make, batches):
    adapter = make(guard=True)
    for batch in batches:
        output = adapter.step(batch)
    assert output.ids.tolist() == list(range(5 * BATCH, 6 * BATCH))
    ids = adapter.queries(2)
    assert tell(adapter, ids, [1] * len(ids)).taken == len(ids)


# ---------------------------------------------------------------------- the oracle


class Heard:
    """Every question and answer of a run, and the batch in which it was."""

    def __init__(self, adapter, monkeypatch):
        self.questions, self.answers, self.batch = {}, [], -1
        step, queries, feedback = adapter.step, adapter.queries, adapter.feedback

        def stepped(*args, **kwargs):
            self.batch += 1
            return step(*args, **kwargs)

        def asked(count):
            ids = queries(count)
            self.questions |= dict.fromkeys(ids, self.batch)
            return ids

        def told(ids, **kinds):
            ((kind, values),) = kinds.items()
            shown = adapter.waiting.labels[adapter.waiting.slots(torch.tensor(ids))]
            rows = zip(ids, torch.as_tensor(values).tolist(), shown.tolist(), strict=True)
            self.answers += [(self.batch, kind, *row) for row in rows]
            return feedback(ids, **kinds)

        for name, wrapped in (("step", stepped), ("queries", asked), ("feedback", told)):
            monkeypatch.setattr(adapter, name, wrapped)


def stream_of(images, labels, **asked):
    return tta.stream({"a": TensorDataset(images, labels)}, batch_size=BATCH, protocol="feedback", **asked)


@pytest.mark.parametrize(("delay", "noise", "budget"), [(0, 0.0, 1), (2, 0.25, 3), (3, 1.0, 2), (40, 0.1, 3)])
def test_delay_noise_and_budget_are_exact(make, golden_images, golden_labels, monkeypatch, delay, noise, budget):
    images, labels = golden_images[:160], golden_labels[:160]
    adapter = make()
    heard = Heard(adapter, monkeypatch)
    result = tta.evaluate(adapter, stream_of(images, labels, delay=delay, noise=noise, budget=budget), progress=False)
    per_batch = [sum(batch == n for batch in heard.questions.values()) for n in range(10)]
    assert all(0 < count <= budget for count in per_batch)
    if adapter.method == "bitta":
        assert per_batch == [budget] * 10  # simatta asks about no more than it has clusters without an anchor
    assert {batch - heard.questions[number] for batch, _, number, *_ in heard.answers} <= {delay}
    assert len(heard.answers) == sum(per_batch[: max(0, 10 - delay)])
    wrong = 0
    for _, kind, number, said, shown in heard.answers:
        truth = int(labels[number])
        wrong += said != (truth == shown) if kind == "correct" else said != truth
    assert wrong == math.floor(noise * len(heard.answers) + 1e-9)
    counted = result.metrics["feedback"]
    assert counted["wrong"] == math.floor(noise * len(heard.questions) + 1e-9) >= wrong
    assert counted["labels"] == adapter.answers().taken == len(heard.answers)
    assert counted["open"] == counted["questions"] - counted["labels"]
    assert json.loads(result.to_json())["manifest"]["data"]["settings"] == {
        "delay": delay,
        "noise": noise,
        "budget": budget,
    }


def test_the_seed_draws_the_wrong_answers(make, golden_images, golden_labels, monkeypatch):
    def heard(seed):
        with monkeypatch.context() as patch:
            adapter = make()
            found = Heard(adapter, patch)
            stream = stream_of(golden_images[:96], golden_labels[:96], noise=0.5, budget=3, seed=seed)
            tta.evaluate(adapter, stream, progress=False)
        return found.answers

    assert heard(1) == heard(1)
    assert heard(1) != heard(2)


def test_under_a_reset_no_answer_is_about_another_sample(make, golden_images, golden_labels, monkeypatch):
    data = TensorDataset(golden_images[:64], golden_labels[:64])
    stream = tta.stream({"a": data, "b": data}, batch_size=BATCH, protocol="feedback", delay=1, budget=2)
    adapter = make()
    heard = Heard(adapter, monkeypatch)
    result = tta.evaluate(adapter, stream, reset="domain", progress=False)
    counted = result.metrics["feedback"]
    assert counted["labels"] < counted["questions"] - counted["open"]  # those of the last batch of the first domain
    for _, kind, number, said, shown in heard.answers:
        truth = int(golden_labels[number])
        assert said == ((truth == shown) if kind == "correct" else truth)


def test_methods_that_cannot_use_feedback_run_unchanged(cnn, golden_images, golden_labels):
    data = golden_images[:96], golden_labels[:96]
    plain = tta.stream({"a": TensorDataset(*data)}, batch_size=BATCH)
    expected = tta.evaluate(tta.adapt(cnn, "tent"), plain, progress=False)
    result = tta.evaluate(tta.adapt(cnn, "tent"), stream_of(*data, budget=3), progress=False)
    assert result.metrics["feedback"] == {"questions": 0, "labels": 0, "wrong": 0, "open": 0}
    assert (result.predictions.prediction == expected.predictions.prediction).all()
    assert "feedback" not in expected.metrics


def test_labels_reach_the_adapter_through_feedback_alone(make, golden_images, golden_labels):
    """Before the first answer, and without any, permuted labels change nothing; after it they do."""

    def logits(permuted, protocol, **asked):
        labels = golden_labels[:96].flip(0) if permuted else golden_labels[:96]
        data = TensorDataset(golden_images[:96], labels)
        stream = tta.stream({"a": data}, batch_size=BATCH, protocol=protocol, **asked)
        adapter, found = make(), []
        step = adapter.step
        adapter.step = lambda *args: found.append(step(*args)) or found[-1]
        tta.evaluate(adapter, stream, progress=False)
        return torch.cat([output.logits for output in found])

    assert torch.equal(logits(False, "continual"), logits(True, "continual"))
    true, false = (logits(permuted, "feedback", delay=2, budget=3) for permuted in (False, True))
    assert torch.equal(true[: 3 * BATCH], false[: 3 * BATCH])
    assert not torch.equal(true[3 * BATCH :], false[3 * BATCH :])


def test_samples_of_an_unknown_class_are_not_answered(make, golden_images):
    labels = torch.full((64,), -1)
    result = tta.evaluate(make(), stream_of(golden_images[:64], labels, budget=3), progress=False)
    assert result.metrics["feedback"]["questions"] > 0 == result.metrics["feedback"]["labels"]


def test_leftover_batches_are_asked_about_too(make, golden_images, golden_labels):
    stream = stream_of(golden_images[:33], golden_labels[:33], budget=2)
    result = tta.evaluate(make(), stream, progress=False)
    assert result.metrics["feedback"]["labels"] >= 2
    assert result.samples == 33


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"delay": -1}, "delay is 0 or more"),
        ({"noise": 1.5}, "noise is a share"),
        ({"budget": 0}, "budget is 1 or more"),
    ],
)
def test_settings_that_do_not_exist_are_refused(golden_images, golden_labels, change, text):
    with pytest.raises(ValueError, match=text):
        stream_of(golden_images[:8], golden_labels[:8], **change)


def test_oracle_steps_and_answers_exclude_one_another(make, golden_images, golden_labels):
    with pytest.raises(ValueError, match="leave it out under protocol 'feedback'"):
        tta.evaluate(make(), stream_of(golden_images[:16], golden_labels[:16]), oracle_steps=2, progress=False)


def test_the_command_line_shows_the_labels_used(tmp_path, capsys):
    words = (
        "digits-c source bitta samples=32 corruptions=[fog] batch_size=16 protocol=feedback delay=0 noise=0.1 budget=3"
    )
    assert main(["run", *words.split(), "bitta.steps=1", "--out", str(tmp_path)]) in (0, None)
    capsys.readouterr()
    main(["table", str(tmp_path), "--metrics", "feedback.labels", "--format", "csv"])
    lines = capsys.readouterr().out.splitlines()
    column = lines[0].split(",").index("feedback.labels")
    assert {
        line.split(",")[lines[0].split(",").index("method")]: float(line.split(",")[column]) for line in lines[1:]
    } == {
        "source": 0.0,
        "bitta": 6.0,
    }
