"""A server in this process, the client that asks it, and what the tests of its parts share."""

import base64
import io
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

import tta
from tta.datasets import digits

for library in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "httpx"):
    pytest.importorskip(library, reason="needs the extra `serve` (and httpx, of `test`)")

warnings.filterwarnings("ignore", message="Using `httpx` with")
from fastapi.testclient import TestClient  # noqa: E402

from tta.serve import ServeSettings, create_app  # noqa: E402

ROOT = Path(__file__).parent.parent
TOKEN = {"Authorization": "Bearer secret"}
CONTROL = [("POST", "/reset"), ("POST", "/snapshot"), ("POST", "/rollback"), ("POST", "/pause"), ("GET", "/export")]
IMAGES, LABELS, _ = digits.split("test")


@contextmanager
def serving_of(model, method="tent", *, adapter=None, settings=None, **hparams):
    """A client of a server in this process; without a method the guarded default."""
    adapter = adapter or tta.adapt(model, method, **hparams)
    app = create_app(adapter, ServeSettings(**{"batch_timeout": 0.0, **(settings or {})}))
    with TestClient(app) as client:
        client.service = app.state.service
        yield client


def file_of(image, kind="PNG", **options):
    """A picture as bytes: a uint8 tensor (3, height, width), or a PIL picture."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()) if isinstance(image, torch.Tensor) else image
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def ask(client, images, **params):
    """The predictions of a request with these images."""
    texts = [base64.b64encode(file_of(image)).decode() for image in images]
    answer = client.post("/predict", json={"images": texts}, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()["predictions"]


def labels_of(predictions):
    return torch.tensor([prediction["label"] for prediction in predictions])


def metrics_of(client):
    """Values by name, with labels as they stand."""
    lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def state_of(client):
    return client.service.worker.call(lambda adapter: adapter.state_dict()).result()


def same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def tell(client, **body):
    return client.post("/feedback", json=body, headers=TOKEN)


def counted(answer):
    assert answer.status_code == 200, answer.text
    return {name: count for name, count in answer.json().items() if count}
