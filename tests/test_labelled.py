"""Answers that the guard uses: its tests of the difference, what it keeps, what it asks, and what it decides."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import tta
from tta.adapter import Answers
from tta.guard import Guard, Labelled, guard, labelled
from tta.guard.bounds import Bet
from tta.guard.labelled import ADAPTED, BY_SOURCE, LABEL, RIGHT, SOURCE, difference

BATCH = 16


# ---------------------------------------------------------------------- the test


def bet_on(values, level=0.05, threshold=0.0):
    bet = Bet(level, threshold)
    for value in values:
        bet.add(value)
    return bet


def test_the_money_follows_the_rule_written_over_all_values():
    values = np.random.default_rng(0).choice([-1, 0, 1], 150, p=[0.2, 0.5, 0.3])
    money = 0.0
    for t, value in enumerate(values):
        if t % 64 == 0:
            money += 6 / (math.pi * (t // 64 + 1)) ** 2
        weights = 0.5 ** (np.arange(t)[::-1] / 64)
        above = values[:t] - 0.02
        doubt = weights.sum() + 16
        bet = (weights @ above / doubt) / ((weights @ above**2 + 16 * 0.25) / doubt)
        money *= 1 + min(max(bet, 0), 0.75 / 1.02) * (value - 0.02)
    found = bet_on(values, threshold=0.02)
    assert found.money == pytest.approx(money)
    weights = 0.5 ** (np.arange(150)[::-1] / 64)
    assert found.mean == pytest.approx(weights @ values / weights.sum())


@pytest.mark.parametrize(
    "kind", ["at the threshold", "good, then at the threshold", "answers follow the money", "scores"]
)
def test_what_is_not_there_is_seldom_found(kind):
    """At a level of 10 % in 300 streams, whatever the past does to values whose mean never is above the threshold."""
    draws, found = np.random.default_rng(1), 0
    for _ in range(300):
        bet = Bet(0.1, 0.02, low=-0.5 if kind == "scores" else -1.0)
        for t, u in enumerate(draws.random(300)):
            if kind == "scores":  # the two ends of the range are as far as values can spread
                bet.add(1 if u < 0.52 / 1.5 else -0.5)
                continue
            low = kind == "good, then at the threshold" and t < 150
            wide = 0.9 if kind == "answers follow the money" and bet.money > 1 else 0.3
            mean = -0.2 if low else 0.02
            bet.add(1 if u < (wide + mean) / 2 else -1 if u < wide else 0)
        found += bet.found
    assert found / 300 <= 0.1


def test_a_restart_spends_the_money_that_was_in():
    bet = bet_on([1] * 10)
    assert bet.money > 6 / math.pi**2
    bet.restart()
    bet.add(0)
    assert (bet.parts, bet.found) == (2, False)
    assert bet.money == pytest.approx(6 / (2 * math.pi) ** 2)


def test_a_difference_is_found_and_its_sign_survives_wrong_answers():
    draws = np.random.default_rng(2)
    clean = [draws.choice([-1, 0, 1], p=[0.05, 0.5, 0.45]) for _ in range(400)]
    noisy = [value if draws.random() > 0.1 else draws.choice([-1, 0, 1], p=[0.2, 0.6, 0.2]) for value in clean]
    needed = [next(n for n in range(1, 401) if bet_on(values[:n]).found) for values in (clean, noisy)]
    assert needed[0] <= 60  # about 25 are the rule
    assert needed[1] <= 100
    assert not bet_on([-value for value in clean]).found


# ---------------------------------------------------------------------- the difference


def row_of(adapted, source, *, by_source=False, right=-1, label=-1):
    row = torch.zeros(8, dtype=torch.int64)
    for column, value in ((ADAPTED, adapted), (SOURCE, source), (BY_SOURCE, by_source), (RIGHT, right), (LABEL, label)):
        row[column] = int(value)
    return row


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("by_source", [False, True])
def test_an_answer_allows_what_every_label_that_fits_it_gives(classes, by_source):
    for adapted in range(classes):
        for source in range(classes):
            exact = {y: (adapted != y) - (source != y) for y in range(classes)}
            for y, value in exact.items():
                assert difference(row_of(adapted, source, by_source=by_source, label=y), classes) == (value, value)
            shown = source if by_source else adapted
            for right in (False, True):
                fitting = [value for y, value in exact.items() if (y == shown) == right]
                assert difference(row_of(adapted, source, by_source=by_source, right=right), classes) == (
                    min(fitting),
                    max(fitting),
                )


# ---------------------------------------------------------------------- what is kept


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3), st.integers(-3, 50)), min_size=1, max_size=8))
def test_the_newest_predictions_and_questions_are_kept(steps):
    """Ring and questions against lists: which ids are known and asked about, and what becomes of an answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelled, "RECENT", 24)
        patch.setattr(labelled, "QUESTIONS", 5)
        book, kept, asked, offered, told = Labelled(0.05, 0.02, False), [], [], 0, set()
        for number, (count, ask, ago) in enumerate(steps):
            predicted = torch.stack([torch.arange(count) % 7, torch.arange(count) % 5]).int()
            ids = book.remember(None, predicted, torch.arange(0), classes=10, by_source=False)
            assert ids.tolist() == list(range(offered, offered + count))
            offered += count
            kept = [i for i in [*kept, *ids.tolist()] if i >= offered - 24]
            wanted = book.ask(ask, number) if ask else []
            assert len(wanted) == len(set(wanted)) <= ask
            assert set(wanted) <= set(kept) - told
            asked, kept = [*asked, *wanted][-5:], [i for i in kept if i not in wanted]
            i = offered - 1 - ago
            counted = book.tell(torch.tensor([i]), None, torch.tensor([3]))
            if i in kept + asked:
                assert counted == (Answers(repeated=1) if i in told else Answers(taken=1))
                told.add(i)
            else:
                assert counted == (Answers(expired=1) if 0 <= i < offered else Answers(unknown=1))
        assert book.rows.shape == (24, 6)
        assert len(book.questions) <= 5


def book_of(adapted, source, **more):
    book = Labelled(0.05, 0.02, more.pop("asked_only", False))
    book.remember(
        more.pop("ids", None),
        torch.tensor([adapted, source]).int(),
        torch.tensor(more.pop("picked", []), dtype=torch.int64),
        classes=10,
        by_source=more.pop("by_source", False),
    )
    return book


def labels_of(book, ids, labels):
    return book.tell(torch.tensor(ids), None, torch.tensor(labels))


def test_answers_that_cannot_be_compared_count_for_nothing():
    book = book_of([1, 1, -1, 1], [2, -1, 2, 2])
    assert labels_of(book, [0, 1, 2], [1, 1, 1]).taken == 3
    assert (book.pairs, book.harmful.count) == (1, 1)
    book.restart()  # the adapter is another one
    assert labels_of(book, [3], [1]).taken == 1
    assert book.pairs == 1


def test_what_a_method_asked_about_counts_for_nothing():
    book = book_of([1, 1], [2, 2])
    book.leave_out(torch.tensor([0]))
    labels_of(book, [0, 1], [2, 2])
    assert book.pairs == 1


def test_only_answers_to_its_questions_count_where_it_is_told_so():
    book = book_of([1] * 4, [2] * 4, asked_only=True)
    wanted = book.ask(2, 0)
    others = sorted(set(range(4)) - set(wanted))
    assert labels_of(book, others, [2, 2]).taken == 2
    assert book.pairs == 0
    labels_of(book, wanted, [2, 2])
    assert book.pairs == 2


def test_answers_of_one_call_count_in_the_order_of_the_predictions():
    adapted, source, labels = [1] * 40, [2] * 40, [1] * 20 + [2] * 20
    there, back = book_of(adapted, source), book_of(adapted, source)
    labels_of(there, list(range(40)), labels)
    labels_of(back, list(range(40))[::-1], labels[::-1])
    assert there.harmful == back.harmful
    assert there.harmful.mean > 0


def test_picked_predictions_of_the_latest_batch_are_asked_about_first():
    book = book_of([1] * 20, [2] * 20, picked=[4, 7])
    book.remember(None, torch.ones(2, 20).int(), torch.tensor([3, 9]), classes=10, by_source=False)
    assert sorted(book.ask(2, 0)) == [23, 29]
    assert sorted(book.ask(2, 1)) == [4, 7]
    assert len(book.ask(100, 2)) == 36


# ---------------------------------------------------------------------- an adapter of which the monitor is blind


class Unsure(nn.Module):
    """Images whose brightness tells their class of ten -> logits that are right, and nearly equal."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.02))

    def forward(self, x):
        return -self.scale * (10 * x.mean((1, 2, 3))[:, None] - torch.arange(10) - 0.5).square()


class Rolled(tta.Adapter):
    """Sure, and wrong about every class from a batch on: as many of each class as the source model predicts."""

    turns_at = 0
    config: tta.adapter.Config

    def configure_model(self):
        super().configure_model()
        self.register_buffer("seen", torch.tensor(0))

    def adapt(self, x):
        self.seen += 1
        return self.predict(x)

    def predict(self, x):
        shift = int(self.seen > self.turns_at) if self.turns_at >= 0 else 0
        return 500 * self.model(x).roll(shift, 1)


class Sound(Rolled):
    turns_at = -1


class Turning(Rolled):
    turns_at = 40


def pictures(labels, seed=0):
    noise = torch.rand(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (labels[:, None, None, None] + 0.5 + 0.8 * (noise - 0.5)) / 10


def run(method, batches, budget, *, delay=0, noise=0.0, seed=0, settings=True):
    """An adapter, the number of answers it had been given at each event, and its predictions."""
    draws = torch.Generator().manual_seed(seed)
    adapter = tta.adapt(Unsure(), method, guard=settings)
    truth, due, events, given_, right = {}, [], [], 0, []
    for number in range(batches):
        labels = torch.randint(10, (BATCH,), generator=draws)
        output = adapter.step(pictures(labels, 1000 * seed + number))
        events += [(event.kind, given_) for event in adapter.guard.events]
        right.append((output.logits.argmax(1) == labels).float().mean().item())
        if not budget:
            continue
        truth |= dict(zip(output.ids.tolist(), labels.tolist(), strict=True))
        due.append(adapter.queries(budget))
        if len(due) > delay and due[-1 - delay]:
            ids = due[-1 - delay]
            said = torch.tensor([truth[i] for i in ids])
            wrong = torch.rand(len(ids), generator=draws) < noise
            said = torch.where(wrong, (said + torch.randint(1, 10, (len(ids),), generator=draws)) % 10, said)
            given_ += adapter.feedback(ids, labels=said).taken
    return adapter, events, right


def kinds(events):
    return [kind for kind, _ in events]


@pytest.mark.parametrize(("delay", "noise", "most"), [(0, 0.0, 30), (0, 0.1, 45), (5, 0.0, 30), (5, 0.1, 45)])
def test_harm_that_the_monitor_is_blind_to_is_found_by_few_answers(delay, noise, most):
    _, events, right = run(Rolled, 60, 0)
    assert (events, sum(right)) == ([], 0)
    adapter, events, right = run(Rolled, 60, 3, delay=delay, noise=noise)
    assert kinds(events)[:3] == ["labelled", "rollback", "hold"]
    assert events[0][1] <= most
    assert adapter.guard.counts["labelled"] == kinds(events).count("labelled")  # again in the trial
    assert right[-1] == 1  # the source model answers


def test_harm_that_comes_later_is_found_though_the_past_was_good():
    _, events, _ = run(Turning, 80, 3)
    assert kinds(events)[0] == "labelled"
    assert 120 < events[0][1] <= 120 + 60


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_sound_adapter_is_left_alone(noise):
    adapter, events, _ = run(Sound, 100, 3, noise=noise)
    assert events == []
    assert adapter.guard.counts["pairs"] == 300


def test_rollback_after_answers_is_to_the_source_model_and_not_to_a_snapshot():
    adapter, _, _ = run(Rolled, 5, 0)
    adapter.guard.snapshots = [adapter.changed_state()]
    ids = list(range(5 * BATCH))
    labels = (adapter.guard.labelled.predicted[1, : len(ids)]).long()
    adapter.feedback(ids, labels=labels)
    adapter(pictures(torch.arange(10)))
    assert adapter.guard.history[1].reason == "to the source model"
    assert adapter.seen == 0


class Better(Rolled):
    """Right, around a source model that is wrong about every class."""

    def predict(self, x):
        return 500 * self.model(x).roll(-1, 1)


class Wrong(Unsure):
    def forward(self, x):
        return super().forward(x).roll(1, 1)


def better_adapter(**settings):
    return tta.adapt(Wrong(), Better, guard=Guard(**settings))


def step_and_tell(adapter, number, budget=8):
    labels = torch.randint(10, (BATCH,), generator=torch.Generator().manual_seed(number))
    output = adapter.step(pictures(labels, number))
    if budget:
        ids = adapter.queries(budget)
        adapter.feedback(ids, labels=[int(labels[i - int(output.ids[0])]) for i in ids if i in output.ids])
    return output


def alarm_always(monkeypatch):
    monkeypatch.setattr(guard.Monitor, "update", lambda *args: "risk: said the test")


def test_an_alarm_of_the_monitor_is_overruled_once_by_the_same_answers(monkeypatch):
    adapter = better_adapter()
    for number in range(8):
        step_and_tell(adapter, number)
    assert adapter.guard.labelled.better
    adapter.guard.numbers.next_check = 0
    alarm_always(monkeypatch)
    step_and_tell(adapter, 8, budget=0)
    assert [event.kind for event in adapter.guard.events] == ["overruled"]
    assert adapter.guard.action == "learned"
    step_and_tell(adapter, 9, budget=0)
    assert [event.kind for event in adapter.guard.events] == ["alarm", "rollback", "hold"]


def test_in_a_hold_answers_let_the_adapter_answer_and_in_a_trial_they_pass_it(monkeypatch):
    adapter = better_adapter(hold=30)
    with monkeypatch.context() as patch:
        alarm_always(patch)
        step_and_tell(adapter, 0, budget=0)
    assert adapter.guard.numbers.phase == "source"
    adapter.queries(8)
    found = []
    for number in range(1, 60):
        step_and_tell(adapter, number)
        found += [(event.batch, event.kind) for event in adapter.guard.events]
    assert found[0][1] == "overruled"
    assert found[0][0] < 12
    assert [kind for _, kind in found].count("overruled") == 1
    assert adapter.guard.counts["held"] > 15
    assert adapter.guard.action == "learned"

    adapter = better_adapter()
    with monkeypatch.context() as patch:
        alarm_always(patch)
        step_and_tell(adapter, 0, budget=0)
    adapter.guard.numbers.phase, adapter.guard.numbers.left = "trial", 0
    monkeypatch.setattr(guard, "ENOUGH", 10**6)  # the monitor does not pass it
    adapter.queries(8)
    for number in range(1, 8):
        step_and_tell(adapter, number)
    assert adapter.guard.numbers.phase == "learning"
    assert adapter.guard.history[-1].reason.startswith("the trial was passed: labels")


# ---------------------------------------------------------------------- cost, questions, state


@pytest.fixture
def batches(golden_images):
    return list(golden_images[: 10 * BATCH].split(BATCH))


def tent(cnn, **more):
    return tta.adapt(cnn, "tent", guard=True, **more)


def test_it_costs_nothing_before_somebody_asks_and_as_many_images_as_questions_then(cnn, batches):
    adapter, images = tent(cnn), []
    adapter.guard.source.register_forward_pre_hook(lambda _, args: images.append(len(args[0])))
    plain = tta.adapt(cnn, "tent")
    for batch in batches:
        assert torch.equal(adapter(batch), plain(batch))
    assert sum(images) == adapter.guard.numbers.compared
    images.clear()
    adapter.queries(2)
    adapter.guard.numbers.next_check = 10**6  # no check
    for batch in batches[:4]:
        adapter(batch)
    assert images == [2] * 4
    held = [value.shape for value in vars(adapter.guard.labelled).values() if isinstance(value, torch.Tensor)]
    assert max(math.prod(shape) for shape in held) == 8192 * 6


def test_questions_are_random_and_each_is_asked_once(cnn, batches):
    adapter, places, asked = tent(cnn), [], []
    assert adapter.queries(3) == []
    for batch in batches:
        ids = adapter.step(batch).ids.tolist()
        wanted = adapter.queries(3)
        assert len(wanted) == 3
        assert set(wanted) <= set(ids)
        places += [ids.index(i) for i in wanted]
        asked += wanted
    assert len(set(places)) > 8
    others = adapter.queries(500)
    assert len(others) > 100  # of the batches that were compared
    assert not set(others) & set(asked)


def test_a_paused_prediction_has_no_id_and_ids_may_be_given(cnn, batches):
    adapter = tent(cnn)
    given_ = list(range(900, 900 + BATCH))
    assert adapter.step(batches[0], ids=given_).ids.tolist() == given_
    with adapter.paused():
        assert adapter.step(batches[1]).ids.tolist() == [-1] * BATCH
    with pytest.warns(
        RuntimeWarning, match=r"2 answers: 1 taken, 1 unknown. An answer counts while its prediction is kept"
    ):
        assert adapter.feedback([901, 3], labels=[1, 1]) == Answers(taken=1, unknown=1)
    with pytest.raises(ValueError, match="from 0 to 9"):
        adapter.feedback([901], labels=[10])
    assert adapter.answers() == Answers(taken=1, unknown=1)


def test_right_and_wrong_are_told_too(cnn, batches):
    adapter = tent(cnn)
    ids = adapter.step(batches[0]).ids
    assert adapter.feedback(ids[:4], correct=[True, False, True, True]).taken == 4
    assert adapter.feedback(ids[:2], correct=[True, True]) == Answers(repeated=1, contradicting=1)


def told_stream(adapter, numbered):
    for number, batch in numbered:
        yield adapter(batch), [i for i in adapter.queries(2) if adapter.feedback([i], labels=[(i + number) % 10])]


@pytest.mark.parametrize("how", ["state", "file", "deepcopy"])
def test_save_load_continue_with_answers(cnn, batches, tmp_path, how):
    numbered = list(enumerate(batches))
    whole, first = tent(cnn), tent(cnn)
    expected = list(told_stream(whole, numbered))
    list(told_stream(first, numbered[:6]))
    if how == "file":
        first.save(tmp_path / "adapter.safetensors")
        second = tta.load(tmp_path / "adapter.safetensors", cnn)
    elif how == "deepcopy":
        second = copy.deepcopy(first)
    else:
        second = tent(cnn)
        second.load_state_dict(first.state_dict())
    for (logits, asked), (theirs, theirs_asked) in zip(told_stream(second, numbered[6:]), expected[6:], strict=True):
        assert torch.equal(logits, theirs)
        assert asked == theirs_asked
    ours, theirs = second.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert "guard.answers.rows" in ours


def test_reset_forgets_answers(cnn, batches):
    adapter, fresh = tent(cnn), tent(cnn)
    list(told_stream(adapter, enumerate(batches)))
    adapter.reset()
    expected = fresh.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in adapter.state_dict().items())
    assert adapter.step(batches[0]).ids.tolist() == list(range(BATCH))


def test_a_method_with_questions_of_its_own_keeps_them(cnn, batches):
    adapter = tta.adapt(cnn, "bitta", steps=1, guard=True)
    ids = adapter.step(batches[0]).ids
    wanted = adapter.queries(3)
    others = [i for i in ids.tolist() if i not in wanted][:2]
    adapter.feedback(wanted + others, labels=[1] * 5)
    assert adapter.answers().taken == 5  # of the method
    assert adapter.guard.counts["pairs"] == 2


def test_several_labels_an_image_are_not_asked_about():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    adapter = tta.adapt(net, "norm", outputs="sigmoid", guard=True)
    for _ in range(2):
        assert adapter.step(torch.rand(8, 3, 16, 16)).ids is None
        assert adapter.queries(2) == []


def test_protocol_feedback_lets_the_guard_ask(cnn, golden_images, golden_labels):
    data = TensorDataset(golden_images[:160], golden_labels[:160])
    stream = tta.stream({"a": data}, batch_size=BATCH, protocol="feedback", delay=2, noise=0.1, budget=3)
    result = tta.evaluate(tent(cnn), stream, progress=False)
    assert result.metrics["feedback"] == {"questions": 30, "labels": 24, "wrong": 3, "open": 6}
    assert {"labelled", "overruled", "alarms"} <= result.metrics["guard"].keys()
