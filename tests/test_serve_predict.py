"""The server's answers: classes and probabilities are the adapter's, whatever form the pictures come in."""

import base64

import pytest
import torch
from torch import nn

import tta
from served import IMAGES, LABELS, ask, file_of, labels_of, metrics_of, serving_of


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_picture_is_answered_with_its_class(of_source, kind):
    body = file_of(IMAGES[5], kind, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
    answer = of_source.post("/predict", content=body, headers={"Content-Type": f"image/{kind.lower()}"})
    (found,) = answer.json()["predictions"]
    assert found["label"] == int(LABELS[5])
    assert found["name"] == str(int(LABELS[5]))
    assert found["answered"] == "source"
    assert found["probability"] == max(one["probability"] for one in found["top"])


def test_forms_and_base64_hold_several_in_order(digits_cnn, of_source):
    files = [file_of(image) for image in IMAGES[:6]]
    form = of_source.post("/predict", files=[("images", (f"{n}.png", body)) for n, body in enumerate(files)])
    url = of_source.post(
        "/predict", json={"images": [f"data:image/png;base64,{base64.b64encode(b).decode()}" for b in files]}
    )
    for answer in (form, url):
        assert torch.equal(labels_of(answer.json()["predictions"]), digits_cnn(IMAGES[:6] / 255).argmax(1))
    ids = [one["id"] for answer in (form, url) for one in answer.json()["predictions"]]
    assert len(set(ids)) == 12


def test_probabilities_are_the_adapters(digits_cnn):
    oracle = tta.adapt(digits_cnn, "tent")
    with serving_of(digits_cnn) as client:
        for start in (0, 16):
            batch = IMAGES[start : start + 16]
            found = ask(client, batch, top=10)
            expected = oracle(batch / 255).softmax(1)
            for one, row in zip(found, expected, strict=True):
                got = torch.zeros(10).index_put(
                    (torch.tensor([c["label"] for c in one["top"]]),),
                    torch.tensor([c["probability"] for c in one["top"]]),
                )
                assert torch.equal(got, row.detach())
                assert one["answered"] == "learned"


def test_top_is_cut_and_checked(of_source):
    (found,) = ask(of_source, IMAGES[:1], top=3)
    assert len(found["top"]) == 3
    assert of_source.post("/predict?top=0", content=file_of(IMAGES[0])).status_code == 422


@pytest.mark.parametrize("method", [None, "tent", "norm"])
def test_errors_on_a_stream_are_those_of_evaluate(digits_cnn, method):
    stream = tta.stream("digits-c", batch_size=50, samples=150, corruptions=["fog", "contrast"])
    expected = tta.evaluate(tta.adapt(digits_cnn, method), stream).errors
    wrong = dict.fromkeys(stream.names, 0) if hasattr(stream, "names") else dict.fromkeys(expected, 0)
    with serving_of(digits_cnn, method, settings={"batch_size": 50}) as client:
        for batch in stream:
            found = labels_of(ask(client, (batch.images * 255).round().to(torch.uint8)))
            for domain, is_wrong in zip(batch.domain.tolist(), (found != batch.labels).tolist(), strict=True):
                wrong[list(expected)[domain]] += is_wrong
        assert metrics_of(client)["tta_images_total"] == 300
    assert {name: 100 * count / 150 for name, count in wrong.items()} == pytest.approx(expected)


def test_a_request_of_several_batches_is_answered_whole(digits_cnn):
    oracle = tta.adapt(digits_cnn, "tent")
    expected = torch.cat([oracle(part / 255) for part in IMAGES[:50].split(16)]).argmax(1)
    with serving_of(digits_cnn, settings={"batch_size": 16}) as client:
        assert torch.equal(labels_of(ask(client, IMAGES[:50])), expected)


def test_an_error_of_the_model_is_a_sentence_and_the_next_request_is_served(digits_cnn):
    calls = []

    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = digits_cnn

        def forward(self, x):
            calls.append(len(x))
            if len(calls) == 1:
                raise RuntimeError("no memory")
            return self.inner(x)

    with serving_of(Failing(), "source") as client:
        answer = client.post("/predict", content=file_of(IMAGES[0]), headers={"Content-Type": "image/png"})
        assert answer.status_code == 503
        assert "no memory" in answer.json()["detail"]
        assert len(ask(client, IMAGES[:2])) == 2
