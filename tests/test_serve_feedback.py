"""Feedback to the server: what it asks, and answers that reach the adapter."""

import os
import re

import pytest
import torch

import tta
from served import (
    IMAGES,
    LABELS,
    ROOT,
    TOKEN,
    ask,
    counted,
    labels_of,
    metrics_of,
    same_state,
    serving_of,
    state_of,
    tell,
)

TEACHING = {"settings": {"token": "secret", "batch_size": 16}}


def test_feedback_wants_the_token(digits_cnn):
    for method, path, body in (("GET", "/queries", None), ("POST", "/feedback", {"ids": ["0" * 16], "labels": [1]})):
        with serving_of(digits_cnn, "tent", guard=True) as client:
            answer = client.request(method, path, json=body, headers=TOKEN)
            assert (answer.status_code, "no token" in answer.json()["detail"]) == (403, True)
        with serving_of(digits_cnn, "tent", guard=True, **TEACHING) as client:
            assert client.request(method, path, json=body).status_code == 401
            assert client.request(method, path, json=body, headers=TOKEN).status_code == 200


def test_answers_reach_the_adapter_and_are_counted(digits_cnn):
    oracle = tta.adapt(digits_cnn, "bitta", steps=1)
    with serving_of(digits_cnn, "bitta", steps=1, **TEACHING) as client:
        ids = [one["id"] for one in ask(client, IMAGES[:16])]
        assert all(re.fullmatch("[0-7][0-9a-f]{15}", one) for one in ids)
        wanted = client.get("/queries", params={"count": 3}, headers=TOKEN).json()["ids"]
        assert len(wanted) == 3
        assert set(wanted) <= set(ids)
        assert counted(tell(client, ids=[ids[4], ids[9]], correct=[True, False])) == {"taken": 2}
        assert counted(tell(client, ids=[ids[4], ids[9], "0" * 16], correct=[True, True, True])) == {
            "repeated": 1,
            "contradicting": 1,
            "unknown": 1,
        }
        found = labels_of(ask(client, IMAGES[16:32])), state_of(client)
        metrics = metrics_of(client)
        assert client.get("/state").json()["feedback"] == ["correct", "labels"]
    oracle.step(IMAGES[:16] / 255)
    oracle.queries(3)
    oracle.feedback([4, 9], correct=[True, False])
    logits = oracle(IMAGES[16:32] / 255)
    assert torch.equal(found[0], logits.argmax(1))
    expected = oracle.state_dict()
    assert all(torch.equal(found[1][name], expected[name]) for name in expected if name.startswith("model."))
    assert metrics['tta_feedback_total{result="taken"}'] == 2
    assert metrics['tta_feedback_total{result="unknown"}'] == 1
    assert metrics['tta_feedback_total{result="expired"}'] == 0


def test_labels_are_numbers_or_names():
    net = tta.load_model("digits-cnn")
    net.class_names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    with serving_of(net, "tent", guard=True, **TEACHING) as client:
        ids = [one["id"] for one in ask(client, IMAGES[:16])]
        assert counted(tell(client, ids=ids[:2], labels=[3, "seven"])) == {"taken": 2}
        assert counted(tell(client, ids=ids[:2], labels=["three", 7])) == {"repeated": 2}
        answer = tell(client, ids=ids[:1], labels=["sevn"])
        assert (answer.status_code, answer.json()["detail"]) == (
            422,
            "No class is called 'sevn'. Did you mean 'seven'?",
        )


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"ids": ["1f"], "labels": [1]}, "ids.0 is no id"),
        ({"ids": ["f" * 16], "labels": [1]}, "ids.0 is no id"),
        ({"ids": [], "labels": []}, "ids: List should have at least 1 item"),
        ({"ids": ["0" * 16], "correct": [1]}, "correct.0"),
        ({"ids": ["0" * 16], "label": [1]}, "label: Extra inputs"),
        ({"ids": ["0" * 16]}, "either correct= or labels="),
        ({"ids": ["0" * 16], "labels": [1], "correct": [True]}, "either correct= or labels="),
        ({"ids": ["0" * 16], "labels": [1, 2]}, "2 answers for 1 ids"),
        ({"ids": ["0" * 16], "labels": [10]}, "from 0 to 9"),
        ({"ids": ["0" * 16] * 1001, "labels": [1] * 1001}, "at most 1000"),
    ],
)
def test_answers_that_do_not_fit_are_refused_with_a_sentence(digits_cnn, body, text):
    with serving_of(digits_cnn, "tent", guard=True, **TEACHING) as client:
        ask(client, IMAGES[:8])
        before = state_of(client)
        answer = tell(client, **body)
        assert answer.status_code == 422
        assert text in answer.json()["detail"]
        assert same_state(before, state_of(client))


def test_who_cannot_use_answers_says_who_can(digits_cnn):
    with serving_of(digits_cnn, "tent", **TEACHING) as client:
        for answer in (tell(client, ids=["0" * 16], labels=[1]), client.get("/queries", headers=TOKEN)):
            assert answer.status_code == 409
            assert "Methods that can: bitta, simatta." in answer.json()["detail"]
            assert "guard=True" in answer.json()["detail"]


@pytest.mark.parametrize("method", ["bitta", "tent"])
def test_what_waits_for_an_answer_outlives_the_server(digits_cnn, tmp_path, method):
    settings = {"token": "secret", "state": str(tmp_path)}
    quick = {"guard": True} if method == "tent" else {"steps": 1}
    with serving_of(digits_cnn, method, settings=settings, **quick) as client:
        ids = [one["id"] for one in ask(client, IMAGES[:16])]
        wanted = client.get("/queries", params={"count": 2}, headers=TOKEN).json()["ids"]
    with serving_of(digits_cnn, method, settings=settings, **quick) as client:
        assert not set(client.get("/queries", params={"count": 16}, headers=TOKEN).json()["ids"]) & set(wanted)
        assert counted(tell(client, ids=wanted + ids[:1], correct=[True] * 3))["taken"] == len({*wanted, ids[0]})
        later = [one["id"] for one in ask(client, IMAGES[16:32])]
        assert not set(ids) & set(later)


def test_the_documented_feedback_works(digits_cnn):
    import httpx

    text = (ROOT / "docs/serving.md").read_text()
    _, lines = re.findall(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    with serving_of(digits_cnn, "tent", guard=True, settings={"token": "secret"}) as client:
        labels = {one["id"]: int(label) for one, label in zip(ask(client, IMAGES[:16]), LABELS, strict=False)}
        known = {"server": client, "ask_somebody": labels.get, "os": os, "httpx": httpx}
        os.environ["TTA_SERVE_TOKEN"] = "secret"
        try:
            exec(lines, known)
        finally:
            del os.environ["TTA_SERVE_TOKEN"]
        assert metrics_of(client)['tta_feedback_total{result="taken"}'] == 3


def test_alarms_by_answers_are_alarms(digits_cnn):
    with serving_of(digits_cnn, "tent", guard=True, **TEACHING) as client:
        ids = [one["id"] for one in ask(client, IMAGES[:64])]
        book = client.service.worker.adapter.guard.labelled
        book.predicted[0] = (book.predicted[1] + 1) % 10  # the adapter had been wrong about all of them
        labels = book.predicted[1, :64].tolist()
        tell(client, ids=ids, labels=labels)
        ask(client, IMAGES[:16])
        found = metrics_of(client)
        assert found["tta_alarms_total"] == found['tta_guard_events_total{kind="labelled"}'] == 1
