"""The server's account of itself: state, health, metrics, dashboard, log lines and the page of its routes."""

import json
import logging
import re

import pytest
import torch

import tta
from served import CONTROL, IMAGES, LABELS, ROOT, ask, counted, file_of, labels_of, metrics_of, serving_of, tell
from tta.serve import logs


def test_state_says_what_runs_and_keeps_the_secret(digits_cnn, tmp_path):
    with serving_of(digits_cnn, "tent", lr=2e-3, settings={"token": "very secret", "state": str(tmp_path)}) as client:
        ask(client, IMAGES[:8])
        answer = client.get("/state")
        found = answer.json()
        assert (found["method"], found["model"], found["configuration"]["lr"]) == ("tent", "digits-cnn", 2e-3)
        assert found["fingerprint"] == tta.adapt(digits_cnn, "source").source_fingerprint
        assert found["class_names"] == [str(digit) for digit in range(10)]
        assert found["progress"]["updates"] == 1
        assert "BatchNorm" in found["summary"]
        assert "very secret" not in answer.text
        assert str(tmp_path) not in answer.text


def test_health_follows_the_life_of_the_worker(digits_cnn):
    with serving_of(digits_cnn) as client:
        assert (client.get("/healthz").status_code, client.get("/readyz").status_code) == (200, 200)
        client.service.worker.stop()
        assert (client.get("/healthz").status_code, client.get("/readyz").status_code) == (503, 503)
        answer = client.post("/predict", content=file_of(IMAGES[0]), headers={"Content-Type": "image/png"})
        assert answer.status_code == 503


def test_metrics_count_what_was_answered(digits_cnn):
    with serving_of(digits_cnn, settings={"batch_size": 16}) as client:
        expected = labels_of(ask(client, IMAGES[:32]))
        client.get("/nowhere")
        client.get("/elsewhere")
        client.post("/predict", content=b"", headers={"Content-Type": "image/png"})
        found = metrics_of(client)
        assert found['tta_requests_total{code="200",endpoint="/predict"}'] == 1
        assert found['tta_requests_total{code="400",endpoint="/predict"}'] == 1
        assert found['tta_requests_total{code="404",endpoint="other"}'] == 2
        assert found["tta_request_seconds_count"] == 2
        assert found['tta_batches_total{answered="learned"}'] == 2
        assert found["tta_images_total"] == 32
        assert found["tta_weight_drift"] > 0
        shares = torch.tensor([found[f'tta_class_share{{class="{digit}"}}'] for digit in range(10)])
        kept = torch.tensor([0.5 ** (16 / 256)] * 16 + [1.0] * 16)
        plain = torch.zeros(10).index_add(0, expected, kept) / kept.sum()
        torch.testing.assert_close(shares, plain)


def test_entropy_and_drift_follow_the_predictions(digits_cnn):
    with serving_of(digits_cnn, "source", settings={"max_images": 800, "batch_size": 100}) as client:
        for _ in range(2):
            ask(client, IMAGES)
        calm = metrics_of(client)
        ones = IMAGES[LABELS == 1]
        for _ in range(6):
            ask(client, ones)
        moved = metrics_of(client)
    with torch.no_grad():
        entropies = (
            torch.special.entr(digits_cnn(IMAGES / 255).softmax(1)).sum(1).view(8, 100).sum(1).double().repeat(2)
        )
    kept = 0.5 ** (100 / 256 * torch.arange(15, -1, -1))  # a batch weighs half after 256 images
    assert calm["tta_entropy_mean"] == pytest.approx(float((kept * entropies).sum() / (100 * kept.sum())), rel=1e-4)
    assert calm["tta_class_drift"] < 0.1 < 0.4 < moved["tta_class_drift"]


def test_alarms_and_rollbacks_of_the_guard_are_counted(digits_cnn):
    rates = {"lr": 1.0, "guard": True}
    with serving_of(digits_cnn, "tent", **rates, settings={"batch_size": 64}) as client:
        for start in range(0, 768, 64):
            answered = [one["answered"] for one in ask(client, IMAGES[start : start + 64])]
        counts = client.get("/state").json()["guard_counts"]
        found = metrics_of(client)
        assert counts["alarms"] >= 1
        assert found["tta_alarms_total"] == counts["alarms"]
        assert found["tta_rollbacks_total"] == counts["rollbacks"]
        assert found['tta_batches_total{answered="held"}'] + found['tta_batches_total{answered="source"}'] > 0
        assert set(answered) <= {"held", "source"}
        client.service.worker.call(client.service.pausing(True)).result()
        by_source = client.service.worker.adapter.guard.answers_by_source
        assert {one["answered"] for one in ask(client, IMAGES[:16])} == {"source" if by_source else "held"}


def test_the_page_has_examples_that_work(digits_cnn):
    with serving_of(digits_cnn, "source") as client:
        page = client.get("/openapi.json").json()
        assert set(page["paths"]) == {
            "/predict",
            "/metrics",
            "/healthz",
            "/readyz",
            "/state",
            "/queries",
            "/feedback",
            *(path for _, path in CONTROL),
        }
        content = page["paths"]["/predict"]["post"]["requestBody"]["content"]
        answer = client.post("/predict", json=content["application/json"]["example"])
        assert answer.status_code == 200
        assert answer.json()["predictions"][0]["name"] == "1"
        assert client.get("/docs").status_code == 200
        schema = page["paths"]["/feedback"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    with serving_of(digits_cnn, "tent", guard=True, settings={"token": "secret"}) as client:
        assert counted(tell(client, **schema["example"])) == {"unknown": 2}


def test_metrics_of_the_dashboard_exist(digits_cnn):
    with serving_of(digits_cnn, None, settings={"token": "secret"}) as client:
        ask(client, IMAGES[:8])
        names = {name.partition("{")[0] for name in metrics_of(client)}
    described = json.loads((ROOT / "docs/deploy/grafana/dashboard.json").read_text())
    expressions = [target["expr"] for panel in described["panels"] for target in panel["targets"]]
    used = {name for text in expressions for name in re.findall(r"\b(?:tta|process)_\w+", text)}
    late = {"tta_autosaves_total", "tta_guard_events_total"}  # they appear with the first state saved, the first event
    assert len(used) > 8
    assert used - names <= late


def test_a_log_line_is_one_json_object():
    record = logging.LogRecord("tta", logging.WARNING, "", 0, "a %s", ("b\n\x1b[2J",), None)
    record.facts = {"status": 200}
    line = logs.JsonLines().format(record)
    assert "\n" not in line
    assert "\x1b" not in line
    assert json.loads(line)["message"] == "a b\n\x1b[2J"
    assert json.loads(line)["status"] == 200
