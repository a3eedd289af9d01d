"""The server: what it answers, what it refuses, what it counts, and that it restarts where it was."""

import asyncio
import base64
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import tta
from tta.datasets import digits

for library in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "httpx"):
    pytest.importorskip(library, reason="needs the extra `serve` (and httpx, of `test`)")

warnings.filterwarnings("ignore", message="Using `httpx` with")
from fastapi.testclient import TestClient  # noqa: E402

from tta.cli import main, serving  # noqa: E402
from tta.cli.arguments import UsageError  # noqa: E402
from tta.models import ImageClassifier  # noqa: E402
from tta.serve import ServeSettings, create_app, logs  # noqa: E402
from tta.serve.autosave import StateFolder  # noqa: E402
from tta.serve.pictures import decode  # noqa: E402
from tta.serve.refusals import Refusal  # noqa: E402
from tta.serve.service import saving  # noqa: E402
from tta.serve.worker import Worker  # noqa: E402

ROOT = Path(__file__).parent.parent
TOKEN = {"Authorization": "Bearer secret"}
CONTROL = [("POST", "/reset"), ("POST", "/snapshot"), ("POST", "/rollback"), ("POST", "/pause"), ("GET", "/export")]
IMAGES, LABELS, _ = digits.split("test")


@pytest.fixture(scope="module")
def model():
    return tta.load_model("digits-cnn")


@contextmanager
def serving_of(model, method="tent", *, adapter=None, settings=None, **hparams):
    """A client of a server in this process; without a method the guarded default."""
    adapter = adapter or tta.adapt(model, method, **hparams)
    app = create_app(adapter, ServeSettings(**{"batch_timeout": 0.0, **(settings or {})}))
    with TestClient(app) as client:
        client.service = app.state.service
        yield client


@pytest.fixture(scope="module")
def of_source(model):
    """A client of a server that several tests may ask: it learns nothing."""
    with serving_of(model, "source") as client:
        yield client


@pytest.fixture(scope="module")
def refusing(model):
    """A client of a server that would learn, for several tests of what it refuses."""
    with serving_of(model, "tent") as client:
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


def same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------- predict


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_picture_is_answered_with_its_class(of_source, kind):
    body = file_of(IMAGES[5], kind, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
    answer = of_source.post("/predict", content=body, headers={"Content-Type": f"image/{kind.lower()}"})
    (found,) = answer.json()["predictions"]
    assert found["label"] == int(LABELS[5])
    assert found["name"] == str(int(LABELS[5]))
    assert found["answered"] == "source"
    assert found["probability"] == max(one["probability"] for one in found["top"])


def test_forms_and_base64_hold_several_in_order(model, of_source):
    files = [file_of(image) for image in IMAGES[:6]]
    form = of_source.post("/predict", files=[("images", (f"{n}.png", body)) for n, body in enumerate(files)])
    url = of_source.post(
        "/predict", json={"images": [f"data:image/png;base64,{base64.b64encode(b).decode()}" for b in files]}
    )
    for answer in (form, url):
        assert torch.equal(labels_of(answer.json()["predictions"]), model(IMAGES[:6] / 255).argmax(1))
    ids = [one["id"] for answer in (form, url) for one in answer.json()["predictions"]]
    assert len(set(ids)) == 12


def test_probabilities_are_the_adapters(model):
    oracle = tta.adapt(model, "tent")
    with serving_of(model) as client:
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
def test_errors_on_a_stream_are_those_of_evaluate(model, method):
    stream = tta.stream("digits-c", batch_size=50, samples=150, corruptions=["fog", "contrast"])
    expected = tta.evaluate(tta.adapt(model, method), stream).errors
    wrong = dict.fromkeys(stream.names, 0) if hasattr(stream, "names") else dict.fromkeys(expected, 0)
    with serving_of(model, method, settings={"batch_size": 50}) as client:
        for batch in stream:
            found = labels_of(ask(client, (batch.images * 255).round().to(torch.uint8)))
            for domain, is_wrong in zip(batch.domain.tolist(), (found != batch.labels).tolist(), strict=True):
                wrong[list(expected)[domain]] += is_wrong
        assert metrics_of(client)["tta_images_total"] == 300
    assert {name: 100 * count / 150 for name, count in wrong.items()} == pytest.approx(expected)


def test_images_of_many_requests_form_a_batch(model):
    with serving_of(model, settings={"batch_size": 8, "batch_timeout": 20}) as client:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda image: ask(client, [image])[0]["answered"], IMAGES[:8]))
        assert found == ["learned"] * 8
        assert metrics_of(client)['tta_batches_total{answered="learned"}'] == 1


def test_a_request_of_several_batches_is_answered_whole(model):
    oracle = tta.adapt(model, "tent")
    expected = torch.cat([oracle(part / 255) for part in IMAGES[:50].split(16)]).argmax(1)
    with serving_of(model, settings={"batch_size": 16}) as client:
        assert torch.equal(labels_of(ask(client, IMAGES[:50])), expected)


def test_only_the_worker_touches_the_adapter(model):
    seen = set()

    class Watched(type(tta.adapt(model, "tent"))):
        def adapt(self, x):
            seen.add(threading.current_thread().name)
            return super().adapt(x)

        def state_dict(self, *args, **kwargs):
            seen.add(threading.current_thread().name)
            return super().state_dict(*args, **kwargs)

    adapter = tta.adapt(model, Watched)
    with serving_of(model, adapter=adapter, settings={"token": "secret"}) as client:
        seen.clear()
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(ask, client, IMAGES[n : n + 4]) for n in range(0, 32, 4)]
            jobs += [pool.submit(client.post, "/snapshot", headers=TOKEN) for _ in range(3)]
            assert all(job.result() for job in jobs)
        assert seen == {"tta-adapter"}


def test_an_error_of_the_model_is_a_sentence_and_the_next_request_is_served(model):
    calls = []

    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

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


# ---------------------------------------------------------------------- preprocessing


def test_pictures_are_resized_and_cropped_as_the_weights_say():
    import torchvision

    transforms = torchvision.models.get_model_weights("mobilenet_v2").DEFAULT.transforms()
    model = ImageClassifier(
        nn.Flatten(), transforms.mean, transforms.std, "x", (224, 224), interpolation="bilinear",
        resize=transforms.resize_size[0], crop="center",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 250, 330), dtype=torch.uint8, generator=generator)
    (image,) = decode([file_of(pixels)], model.preprocessing, 10**6)
    expected = transforms(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    torch.testing.assert_close((image[None] / 255 - model.mean)[0] / model.std[0], expected)


def test_pictures_are_turned_upright_and_made_rgb():
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = Image.new("RGB", (40, 20), "red")
    (image,) = decode([file_of(wide, "JPEG", exif=exif)], {}, 10**6)
    assert image.shape == (3, 40, 20)
    for mode in ("L", "LA", "RGBA", "P", "1"):
        (image,) = decode([file_of(Image.new(mode, (8, 8)))], {}, 10**6)
        assert image.shape == (3, 8, 8)


def test_a_phones_jpeg_with_a_second_picture_is_read():
    body = file_of(Image.new("RGB", (16, 16), "blue"), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    (image,) = decode([body], {}, 10**6)
    assert image.shape == (3, 16, 16)
    assert image[2].float().mean() > 200


# ---------------------------------------------------------------------- refusals


def png_of_size(width, height):
    """The head of a PNG that announces this size, and little else."""
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def deep_png():
    """A PNG with 16 bits a channel of RGB, which Pillow would read as 8."""
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + bytes(6 * 4) for _ in range(4))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def moving(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return file_of(frames[0], kind, save_all=True, append_images=frames[1:])


BAD_PICTURES = {
    "text": (b"hello", 415, "none that can be read"),
    "page": (b"<html><img src=x></html>", 415, "none that can be read"),
    "gif": (moving("GIF"), 415, "none that can be read"),
    "tiff": (file_of(Image.new("RGB", (8, 8)), "TIFF"), 415, "none that can be read"),
    "pdf": (file_of(Image.new("RGB", (8, 8)), "PDF"), 415, "none that can be read"),
    "moving png": (moving("PNG"), 415, "animated"),
    "moving webp": (moving("WEBP"), 415, "animated"),
    "cmyk": (file_of(Image.new("CMYK", (8, 8)), "JPEG"), 415, "mode CMYK"),
    "16-bit grey": (file_of(Image.new("I;16", (8, 8))), 415, "16 bits"),
    "16-bit rgb": (deep_png(), 415, "16 bits"),
    "cut png": (file_of(IMAGES[0])[:-60], 422, "cannot be decoded"),
    "cut jpeg": (file_of(IMAGES[0], "JPEG")[:300], 422, "cannot be decoded"),
    "bomb": (png_of_size(50_000, 50_000), 413, "pixels"),
    "large": (png_of_size(8_000, 8_000), 413, "8000 x 8000 pixels"),
    "thread": (file_of(Image.new("RGB", (3_000, 1))), 422, "3000 x 1 pixels"),
    "nothing in it": (png_of_size(64, 64), 422, "cannot be decoded"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_is_refused_and_never_reaches_the_model(refusing, name):
    body, code, sentence = BAD_PICTURES[name]
    alone = refusing.post("/predict", content=body, headers={"Content-Type": "image/png"})
    assert (alone.status_code, sentence in alone.json()["detail"]) == (code, True), alone.text
    files = [("images", ("good.png", file_of(IMAGES[0]))), ("images", ("bad.png", body))]
    among = refusing.post("/predict", files=files)
    assert among.status_code == code
    assert among.json()["detail"].startswith("Picture 2 of 2 ")
    assert metrics_of(refusing)["tta_images_total"] == 0


GOOD = base64.b64encode(file_of(IMAGES[0])).decode()
BAD_BODIES = {
    "empty": (b"", "image/png", 400, "empty"),
    "no type": (file_of(IMAGES[0]), "", 415, "content type"),
    "another type": (b"a=1", "application/x-www-form-urlencoded", 415, "content type"),
    "broken json": (b'{"images": [', "application/json", 400, "EOF"),
    "json of another kind": (b"[1, 2]", "application/json", 400, "base64"),
    "deep json": (b"[" * 100_000, "application/json", 400, "base64"),
    "no images": (b'{"images": []}', "application/json", 400, "at least 1"),
    "number": (b'{"images": [3]}', "application/json", 400, "images.0"),
    "no base64": (b'{"images": ["%%%"]}', "application/json", 400, "images.0 is not base64"),
    "not ascii": ('{"images": ["ä"]}'.encode(), "application/json", 400, "images.0 is not base64"),
    "too many": (json.dumps({"images": [GOOD] * 65}).encode(), "application/json", 413, "65 pictures; 64 are allowed"),
    "form without boundary": (b"--x\r\n", "multipart/form-data", 400, "form"),
    "form of another boundary": (b"--y\r\n\r\n", "multipart/form-data; boundary=x", 400, "form"),
    "field": (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n', "multipart/form-data; boundary=x", 400, "no file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_refused(refusing, name):
    body, kind, code, sentence = BAD_BODIES[name]
    answer = refusing.post("/predict", content=body, headers={"Content-Type": kind})
    assert (answer.status_code, sentence in answer.json()["detail"]) == (code, True), answer.text
    assert metrics_of(refusing)["tta_images_total"] == 0


def test_too_many_files_of_a_form_are_refused(model):
    with serving_of(model, settings={"max_images": 2}) as client:
        answer = client.post("/predict", files=[("images", (f"{n}.png", file_of(IMAGES[n]))) for n in range(3)])
        assert answer.status_code == 400
        assert "2" in answer.json()["detail"]


def test_pixels_are_counted_over_all_pictures_of_a_request(model):
    with serving_of(model, settings={"max_pixels": 3 * 32 * 32}) as client:
        assert len(ask(client, IMAGES[:3])) == 3
        texts = [base64.b64encode(file_of(image)).decode() for image in IMAGES[:4]]
        answer = client.post("/predict", json={"images": texts})
        assert answer.status_code == 413
        assert answer.json()["detail"].startswith("Picture 4 of 4 has 32 x 32 pixels; a request may have 3072")


@pytest.mark.parametrize("announced", [True, False])
def test_a_long_body_is_refused(model, announced):
    with serving_of(model, settings={"max_body": 1000}) as client:
        content = b"x" * 1001 if announced else iter([b"x" * 600, b"x" * 600])
        answer = client.post("/predict", content=content, headers={"Content-Type": "image/png"})
        assert answer.status_code == 413
        assert "1000 bytes" in answer.json()["detail"]


async def asked(app, receive, *headers):
    """Status and body of a request to predict whose messages ``receive`` gives, as of ASGI."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/predict", "raw_path": b"/predict", "query_string": b"", "scheme": "http",
        "headers": [(b"content-type", b"image/png"), *headers], "http_version": "1.1", "server": ("x", 1), "client": ("x", 1),
        "root_path": "",
    }  # fmt: skip
    await app(scope, receive, send)
    return sent[0]["status"], sent[1]["body"].decode()


def called(app, receive, *headers):
    return asyncio.run(asked(app, receive, *headers))


def arriving(body, *, until=None):
    """The messages of a body; its last 20 bytes arrive when ``until`` is set."""
    parts = [(body[:-20], True), (body[-20:], False)]

    async def receive():
        if len(parts) == 1 and until is not None:
            await until.wait()
        part, more = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": more}

    return receive


@pytest.mark.parametrize("limit", [10_000, 2_000])
def test_bodies_that_arrive_slowly_take_memory_and_no_place(model, limit):
    body = file_of(IMAGES[0])
    assert len(body) < 2_000 < 2 * (len(body) - 20) < 10_000
    app = create_app(tta.adapt(model), ServeSettings(max_requests=1, max_body=limit, batch_timeout=0.0))

    async def both():
        until = asyncio.Event()
        slow = asyncio.ensure_future(asked(app, arriving(body, until=until)))
        await asyncio.sleep(0.05)
        found = await asked(app, arriving(body))
        until.set()
        return found[0], (await slow)[0]

    app.state.service.start()
    try:
        assert asyncio.run(both()) == (200 if limit == 10_000 else 429, 200)
    finally:
        app.state.service.stop()


def test_a_body_that_is_announced_too_long_is_not_read(model):
    async def receive():
        raise AssertionError("it was read")

    app = create_app(tta.adapt(model, "tent"))
    status, body = called(app, receive, (b"content-length", b"999999999"))
    assert (status, "longer than" in body) == (413, True)


def test_a_body_that_does_not_arrive_is_given_up(model):
    async def receive():
        await asyncio.sleep(60)

    app = create_app(tta.adapt(model, "tent"), ServeSettings(timeout=0.2))
    status, body = called(app, receive)
    assert (status, "did not arrive within 0.2 s" in body) == (408, True)


def test_a_busy_server_says_so(model):
    go_on = threading.Event()
    with serving_of(model, settings={"max_requests": 1, "timeout": 60}) as client:
        client.service.worker.call(lambda adapter: go_on.wait(60))
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(ask, client, IMAGES[:1])
            while not client.service.worker.waiting:
                pass
            second = client.post("/predict", content=file_of(IMAGES[0]), headers={"Content-Type": "image/png"})
            go_on.set()
            assert first.result()
        assert (second.status_code, second.headers["Retry-After"]) == (429, "1")
        assert len(ask(client, IMAGES[:1])) == 1


def test_an_answer_that_takes_too_long_is_given_up_and_not_learned_from(model):
    go_on = threading.Event()
    with serving_of(model, settings={"timeout": 0.3}) as client:
        client.service.worker.call(lambda adapter: go_on.wait(60))
        answer = client.post("/predict", content=file_of(IMAGES[0]), headers={"Content-Type": "image/png"})
        go_on.set()
        assert answer.status_code == 504
        assert client.service.worker.call(lambda adapter: adapter.progress().batches).result() == 0


def mutated(body, generator):
    """A body with some of it changed, cut, doubled or put in."""
    damaged = bytearray(body)
    for _ in range(generator.randint(1, 8)):
        place = generator.randrange(len(damaged) or 1)
        kind = generator.randrange(4)
        if kind == 0 and damaged:
            damaged[place] = generator.randrange(256)
        elif kind == 1:
            del damaged[place : place + generator.randint(1, 64)]
        elif kind == 2:
            damaged[place:place] = generator.randbytes(generator.randint(1, 16))
        else:
            damaged[place:place] = damaged[place : place + 32]
    return bytes(damaged)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_fuzzed_bodies_are_answered_and_harm_nothing(model, count):
    generator = random.Random(count)
    form = (
        b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
        + file_of(IMAGES[0])
        + b"\r\n--x--\r\n"
    )
    bodies = [
        *[(file_of(IMAGES[1], kind), "image/x") for kind in ("PNG", "JPEG", "WEBP", "BMP")],
        (json.dumps({"images": [GOOD]}).encode(), "application/json"),
        (form, "multipart/form-data; boundary=x"),
    ]
    codes = set()
    with serving_of(model, None) as client:
        for number in range(count):
            body, kind = bodies[number % len(bodies)]
            answer = client.post("/predict", content=mutated(body, generator), headers={"Content-Type": kind})
            assert answer.status_code in (200, 400, 413, 415, 422), (number, answer.text)
            codes.add(answer.status_code)
            assert answer.status_code == 200 or isinstance(answer.json()["detail"], str)
        assert {400, 415, 422} <= codes
        state = client.service.worker.call(lambda adapter: adapter.state_dict()).result()
        assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())
        assert len(ask(client, IMAGES[:4])) == 4


# ---------------------------------------------------------------------- control


@pytest.mark.parametrize(("method", "path"), CONTROL)
def test_control_is_off_without_a_token_and_wants_the_right_one(model, refusing, method, path):
    answer = refusing.request(method, path, headers=TOKEN)
    assert (answer.status_code, "no token" in answer.json()["detail"]) == (403, True)
    with serving_of(model, settings={"token": "secret"}) as client:
        wrong = (
            {},
            {"Authorization": "Bearer Secret"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer s\xe9".encode("latin-1")},
        )
        assert [client.request(method, path, headers=headers).status_code for headers in wrong] == [401] * 4
        if path != "/rollback":
            ask(client, IMAGES[:8])
            assert client.request(method, path, headers=TOKEN).status_code == 200


def state_of(client):
    return client.service.worker.call(lambda adapter: adapter.state_dict()).result()


def test_reset_snapshot_and_rollback_are_exact(model):
    with serving_of(model, settings={"token": "secret"}) as client:
        source = state_of(client)
        assert client.post("/rollback", headers=TOKEN).status_code == 409
        ask(client, IMAGES[:32])
        kept = state_of(client)
        assert not same_state(source, kept)
        client.post("/snapshot", headers=TOKEN)
        ask(client, IMAGES[32:64])
        assert not same_state(kept, state_of(client))
        client.post("/rollback", headers=TOKEN)
        assert same_state(kept, state_of(client))
        client.post("/reset", headers=TOKEN)
        assert same_state(source, state_of(client))


def test_a_snapshot_outlives_the_server(model, tmp_path):
    settings = {"token": "secret", "state": str(tmp_path)}
    with serving_of(model, settings=settings) as client:
        ask(client, IMAGES[:32])
        kept = state_of(client)
        client.post("/snapshot", headers=TOKEN)
    with serving_of(model, settings=settings) as client:
        ask(client, IMAGES[32:64])
        assert client.post("/rollback", headers=TOKEN).status_code == 200
        assert same_state(kept, state_of(client))
        (tmp_path / "snapshot.safetensors").write_bytes(b"no")
    with serving_of(model, settings=settings) as client:
        answer = client.post("/rollback", headers=TOKEN)
        assert (answer.status_code, "damaged" in answer.json()["detail"]) == (409, True)


def test_paused_it_predicts_and_changes_nothing(model):
    for method in (None, "tent"):
        with serving_of(model, method, settings={"token": "secret", "paused": True}) as client:
            before = state_of(client)
            assert {one["answered"] for one in ask(client, IMAGES[:16])} == {"held"}
            assert same_state(before, state_of(client))
            assert metrics_of(client)["tta_paused"] == 1
            client.post("/pause", params={"on": "false"}, headers=TOKEN)
            assert {one["answered"] for one in ask(client, IMAGES[:16])} == {"learned"}
            client.post("/pause", headers=TOKEN)
            assert client.get("/state").json()["paused"] is True


def test_export_is_a_plain_model_that_predicts_the_same(model, tmp_path):
    with serving_of(model, settings={"token": "secret", "batch_size": 64}) as client:
        ask(client, IMAGES[:64])
        body = client.get("/export", headers=TOKEN).content
        client.post("/pause", headers=TOKEN)
        expected = labels_of(ask(client, IMAGES[:64]))
    from safetensors.torch import load

    plain = tta.load_model("digits-cnn")
    plain.load_state_dict(load(body))
    assert torch.equal(plain(IMAGES[:64] / 255).argmax(1), expected)
    with serving_of(model, "lame", settings={"token": "secret"}) as client:
        answer = client.get("/export", headers=TOKEN)
        assert (answer.status_code, "more than one forward" in answer.json()["detail"]) == (409, True)


# ---------------------------------------------------------------------- watch


def test_state_says_what_runs_and_keeps_the_secret(model, tmp_path):
    with serving_of(model, "tent", lr=2e-3, settings={"token": "very secret", "state": str(tmp_path)}) as client:
        ask(client, IMAGES[:8])
        answer = client.get("/state")
        found = answer.json()
        assert (found["method"], found["model"], found["configuration"]["lr"]) == ("tent", "digits-cnn", 2e-3)
        assert found["fingerprint"] == tta.adapt(model, "source").source_fingerprint
        assert found["class_names"] == [str(digit) for digit in range(10)]
        assert found["progress"]["updates"] == 1
        assert "BatchNorm" in found["summary"]
        assert "very secret" not in answer.text
        assert str(tmp_path) not in answer.text


def test_health_follows_the_life_of_the_worker(model):
    with serving_of(model) as client:
        assert (client.get("/healthz").status_code, client.get("/readyz").status_code) == (200, 200)
        client.service.worker.stop()
        assert (client.get("/healthz").status_code, client.get("/readyz").status_code) == (503, 503)
        answer = client.post("/predict", content=file_of(IMAGES[0]), headers={"Content-Type": "image/png"})
        assert answer.status_code == 503


def test_metrics_count_what_was_answered(model):
    with serving_of(model, settings={"batch_size": 16}) as client:
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


def test_entropy_and_drift_follow_the_predictions(model):
    with serving_of(model, "source", settings={"max_images": 800, "batch_size": 100}) as client:
        for _ in range(2):
            ask(client, IMAGES)
        calm = metrics_of(client)
        ones = IMAGES[LABELS == 1]
        for _ in range(6):
            ask(client, ones)
        moved = metrics_of(client)
    with torch.no_grad():
        entropies = torch.special.entr(model(IMAGES / 255).softmax(1)).sum(1).view(8, 100).sum(1).double().repeat(2)
    kept = 0.5 ** (100 / 256 * torch.arange(15, -1, -1))  # a batch weighs half after 256 images
    assert calm["tta_entropy_mean"] == pytest.approx(float((kept * entropies).sum() / (100 * kept.sum())), rel=1e-4)
    assert calm["tta_class_drift"] < 0.1 < 0.4 < moved["tta_class_drift"]


def test_alarms_and_rollbacks_of_the_guard_are_counted(model):
    rates = {"lr": 1.0, "guard": True}
    with serving_of(model, "tent", **rates, settings={"batch_size": 64}) as client:
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


def test_the_page_has_examples_that_work(model):
    with serving_of(model, "source") as client:
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
    with serving_of(model, "tent", guard=True, settings={"token": "secret"}) as client:
        assert counted(tell(client, **schema["example"])) == {"unknown": 2}


# ---------------------------------------------------------------------- feedback

TEACHING = {"settings": {"token": "secret", "batch_size": 16}}


def tell(client, **body):
    return client.post("/feedback", json=body, headers=TOKEN)


def counted(answer):
    assert answer.status_code == 200, answer.text
    return {name: count for name, count in answer.json().items() if count}


def test_feedback_wants_the_token(model):
    for method, path, body in (("GET", "/queries", None), ("POST", "/feedback", {"ids": ["0" * 16], "labels": [1]})):
        with serving_of(model, "tent", guard=True) as client:
            answer = client.request(method, path, json=body, headers=TOKEN)
            assert (answer.status_code, "no token" in answer.json()["detail"]) == (403, True)
        with serving_of(model, "tent", guard=True, **TEACHING) as client:
            assert client.request(method, path, json=body).status_code == 401
            assert client.request(method, path, json=body, headers=TOKEN).status_code == 200


def test_answers_reach_the_adapter_and_are_counted(model):
    oracle = tta.adapt(model, "bitta", steps=1)
    with serving_of(model, "bitta", steps=1, **TEACHING) as client:
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
def test_answers_that_do_not_fit_are_refused_with_a_sentence(model, body, text):
    with serving_of(model, "tent", guard=True, **TEACHING) as client:
        ask(client, IMAGES[:8])
        before = state_of(client)
        answer = tell(client, **body)
        assert answer.status_code == 422
        assert text in answer.json()["detail"]
        assert same_state(before, state_of(client))


def test_who_cannot_use_answers_says_who_can(model):
    with serving_of(model, "tent", **TEACHING) as client:
        for answer in (tell(client, ids=["0" * 16], labels=[1]), client.get("/queries", headers=TOKEN)):
            assert answer.status_code == 409
            assert "Methods that can: bitta, simatta." in answer.json()["detail"]
            assert "guard=True" in answer.json()["detail"]


@pytest.mark.parametrize("method", ["bitta", "tent"])
def test_what_waits_for_an_answer_outlives_the_server(model, tmp_path, method):
    settings = {"token": "secret", "state": str(tmp_path)}
    quick = {"guard": True} if method == "tent" else {"steps": 1}
    with serving_of(model, method, settings=settings, **quick) as client:
        ids = [one["id"] for one in ask(client, IMAGES[:16])]
        wanted = client.get("/queries", params={"count": 2}, headers=TOKEN).json()["ids"]
    with serving_of(model, method, settings=settings, **quick) as client:
        assert not set(client.get("/queries", params={"count": 16}, headers=TOKEN).json()["ids"]) & set(wanted)
        assert counted(tell(client, ids=wanted + ids[:1], correct=[True] * 3))["taken"] == len({*wanted, ids[0]})
        later = [one["id"] for one in ask(client, IMAGES[16:32])]
        assert not set(ids) & set(later)


def test_the_documented_feedback_works(model):
    import httpx

    text = (ROOT / "docs/serving.md").read_text()
    _, lines = re.findall(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    with serving_of(model, "tent", guard=True, settings={"token": "secret"}) as client:
        labels = {one["id"]: int(label) for one, label in zip(ask(client, IMAGES[:16]), LABELS, strict=False)}
        known = {"server": client, "ask_somebody": labels.get, "os": os, "httpx": httpx}
        os.environ["TTA_SERVE_TOKEN"] = "secret"
        try:
            exec(lines, known)
        finally:
            del os.environ["TTA_SERVE_TOKEN"]
        assert metrics_of(client)['tta_feedback_total{result="taken"}'] == 3


def test_alarms_by_answers_are_alarms(model):
    with serving_of(model, "tent", guard=True, **TEACHING) as client:
        ids = [one["id"] for one in ask(client, IMAGES[:64])]
        book = client.service.worker.adapter.guard.labelled
        book.predicted[0] = (book.predicted[1] + 1) % 10  # the adapter had been wrong about all of them
        labels = book.predicted[1, :64].tolist()
        tell(client, ids=ids, labels=labels)
        ask(client, IMAGES[:16])
        found = metrics_of(client)
        assert found["tta_alarms_total"] == found['tta_guard_events_total{kind="labelled"}'] == 1


def test_metrics_of_the_dashboard_exist(model):
    with serving_of(model, None, settings={"token": "secret"}) as client:
        ask(client, IMAGES[:8])
        names = {name.partition("{")[0] for name in metrics_of(client)}
    described = json.loads((ROOT / "docs/deploy/grafana/dashboard.json").read_text())
    expressions = [target["expr"] for panel in described["panels"] for target in panel["targets"]]
    used = {name for text in expressions for name in re.findall(r"\b(?:tta|process)_\w+", text)}
    late = {"tta_autosaves_total", "tta_guard_events_total"}  # they appear with the first state saved, the first event
    assert len(used) > 8
    assert used - names <= late


# ---------------------------------------------------------------------- saved states


def test_it_goes_on_as_if_it_had_never_stopped(model, tmp_path):
    with serving_of(model) as client:
        ask(client, IMAGES[:32])
        expected = ask(client, IMAGES[32:64])
    with serving_of(model, settings={"state": str(tmp_path)}) as client:
        ask(client, IMAGES[:32])
    with serving_of(model, settings={"state": str(tmp_path)}) as client:
        found = ask(client, IMAGES[32:64])
    assert [one["top"] for one in found] == [one["top"] for one in expected]


def test_every_n_batches_are_saved_and_two_are_kept(model, tmp_path):
    with serving_of(model, settings={"state": str(tmp_path), "autosave": 2}) as client:
        for number in range(8):
            ask(client, IMAGES[8 * number : 8 * number + 8])
            pending = client.service.folder._pending
            if pending is not None:
                pending.result()
        files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
        assert [name.split("-")[1] for name in files] == ["000000003", "000000004"]
        assert metrics_of(client)['tta_autosaves_total{result="saved"}'] == 4


def damage_by_cutting(file):
    file.write_bytes(file.read_bytes()[:-100])


def damage_by_a_bit(file):
    body = bytearray(file.read_bytes())
    body[len(body) // 2] ^= 1
    file.write_bytes(body)


def damage_by_emptying(file):
    file.write_bytes(b"")


@pytest.fixture(scope="module")
def two_states(model, tmp_path_factory):
    """A folder with two saved states, and the first of them."""
    folder = tmp_path_factory.mktemp("states")
    with serving_of(model, settings={"state": str(folder)}) as client:
        ask(client, IMAGES[:32])
        good = state_of(client)
    with serving_of(model, settings={"state": str(folder)}) as client:
        ask(client, IMAGES[32:64])
    return folder, good


@pytest.mark.parametrize("damage", [damage_by_cutting, damage_by_a_bit, damage_by_emptying])
def test_a_damaged_state_is_passed_over_with_a_sentence(model, two_states, tmp_path, damage, caplog):
    settings = {"state": str(tmp_path)}
    folder, good = two_states
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    _, last = sorted(tmp_path.glob("autosave-*"))
    damage(last)
    with caplog.at_level(logging.WARNING, "tta.serve"), serving_of(model, settings=settings) as client:
        assert same_state(good, state_of(client))
    assert f"'{last.name}' is damaged" in caplog.text
    for file in tmp_path.glob("autosave-*"):
        damage_by_emptying(file)
    with serving_of(model, settings=settings) as client:
        assert same_state(tta.adapt(model, "tent").state_dict(), state_of(client))


def test_a_state_of_other_settings_or_weights_is_refused_and_kept(model, tmp_path):
    with serving_of(model, settings={"state": str(tmp_path)}) as client:
        ask(client, IMAGES[:32])
    before = sorted(tmp_path.glob("autosave-*"))
    other = tta.load_model("digits-cnn")
    other.model.load_state_dict(
        {name: value + (1e-3 if value.is_floating_point() else 0) for name, value in other.model.state_dict().items()}
    )
    for adapter in (tta.adapt(model, "tent", lr=0.5), tta.adapt(model, "norm"), tta.adapt(other, "tent")):
        with pytest.raises(ValueError, match=r"does not fit: .* another folder, state=DIR"):
            create_app(adapter, ServeSettings(state=str(tmp_path)))
    assert sorted(tmp_path.glob("autosave-*")) == before
    create_app(tta.adapt(model, "tent"), ServeSettings(state=str(tmp_path))).state.service.folder.close()


def test_a_folder_has_one_server(model, tmp_path):
    with serving_of(model, settings={"state": str(tmp_path)}) as client:
        with pytest.raises(ValueError, match="Another server uses the folder"):
            create_app(tta.adapt(model, "tent"), ServeSettings(state=str(tmp_path)))
        assert len(ask(client, IMAGES[:8])) == 8


def test_what_a_killed_server_left_is_removed(tmp_path):
    for name in (".autosave", "..autosave.1234", ".snapshot.safetensors.12"):
        (tmp_path / name).write_bytes(b"half")
    StateFolder(tmp_path).close()
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


@contextmanager
def room_for(size):
    """Within this context no file of this process grows beyond ``size`` bytes: a write fails in the middle."""
    resource = pytest.importorskip("resource", reason="limits of POSIX")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_state_that_the_disk_cuts_off_leaves_nothing(model, tmp_path):
    with serving_of(model, settings={"state": str(tmp_path), "autosave": 1}) as client:
        with room_for(100_000):
            assert len(ask(client, IMAGES[:8])) == 8
            client.service.folder._pending.result()
        assert metrics_of(client)['tta_autosaves_total{result="failed"}'] == 1
        assert [file.name for file in tmp_path.iterdir()] == [".lock"]
    (kept,) = tmp_path.glob("autosave-*")  # of the end, when there was room again
    assert kept.stat().st_size > 100_000


def test_a_full_disk_stops_no_answer(model, tmp_path, monkeypatch):
    with serving_of(model, settings={"state": str(tmp_path), "autosave": 1}) as client:
        ask(client, IMAGES[:8])
        client.service.folder._pending.result()
        (kept,) = tmp_path.glob("autosave-*")

        def full(*args):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(saving, "write", full)
            assert len(ask(client, IMAGES[8:16])) == 8
            client.service.folder._pending.result()
            assert metrics_of(client)['tta_autosaves_total{result="failed"}'] == 1
            assert list(tmp_path.glob("autosave-*")) == [kept]


# ---------------------------------------------------------------------- the command


def test_words_are_sorted_by_owner(monkeypatch):
    monkeypatch.setenv("TTA_SERVE_TOKEN", "4711")
    found = serving.parse(
        ["tent", "lr=1e-2", "port=9000", "checkpoint=a.pt", "guard=true", "device=cpu", "tent.steps=2"]
    )
    assert found.method == "tent"
    assert found.server == {"port": 9000, "token": "4711"}
    assert found.adapter == {"lr": 0.01, "guard": True, "steps": 2}
    assert (found.model, found.command) == ({"checkpoint": "a.pt"}, {"device": "cpu"})


@pytest.mark.parametrize(
    ("words", "message"),
    [(["tent", "norm"], "one method"), (["prot=1"], "'prot'. Did you mean 'port'"), (["cotta.lr=1"], "key 'cotta.lr'")],
)
def test_wrong_words_are_named(words, message):
    with pytest.raises(UsageError, match=message):
        serving.parse(words)


@pytest.mark.parametrize("words", [["batch_size=0"], ["port=x"], ["tnet"], ["timeout=0"], ["guard={sped: 1}"]])
def test_wrong_settings_are_usage_errors(words, capsys):
    assert main(["serve", "digits-cnn", *words]) == 2
    assert "tta: " in capsys.readouterr().err


def test_without_the_extra_the_command_is_named(monkeypatch, capsys):
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    assert main(["serve", "digits-cnn"]) == 2
    assert "pip install 'tta-toolkit[serve]'" in capsys.readouterr().err


def test_a_log_line_is_one_json_object():
    record = logging.LogRecord("tta", logging.WARNING, "", 0, "a %s", ("b\n\x1b[2J",), None)
    record.facts = {"status": 200}
    line = logs.JsonLines().format(record)
    assert "\n" not in line
    assert "\x1b" not in line
    assert json.loads(line)["message"] == "a b\n\x1b[2J"
    assert json.loads(line)["status"] == 200


def test_the_worker_drops_what_nobody_waits_for(model):
    adapter = tta.adapt(model, "tent")
    worker = Worker(adapter, 4, 0.0, False, lambda adapter, batch: None)
    futures = [worker.submit(list(IMAGES[n : n + 2])) for n in range(0, 8, 2)]
    assert futures[0].cancel()
    assert futures[2].cancel()
    worker.start()
    worker.stop()
    assert [len(future.result()) for future in (futures[1], futures[3])] == [2, 2]
    assert adapter.progress().batches == 1


def test_a_full_batch_does_not_wait(model):
    worker = Worker(tta.adapt(model, "tent"), 8, 3600.0, False, lambda adapter, batch: None)
    worker.start()
    futures = [worker.submit([image]) for image in IMAGES[:8]]
    try:
        assert [len(future.result(60)) for future in futures] == [1] * 8  # an hour, if it waited
    finally:
        worker.stop()


def test_refusals_have_a_status():
    with pytest.raises(Refusal, match="none that can be read"):
        decode([b"x"], {}, 10)


@contextmanager
def process(tmp_path, *words, **environment):
    """A server as a process of its own; gives the process and its address."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "tta", "serve", "digits-cnn", "port=0", f"state={tmp_path}", *words]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        lines = []
        for line in started.stderr:
            lines.append(line)
            if '"listening"' in line:
                port = json.loads(line)["port"]
            if "startup complete" in line:
                break
        else:
            raise AssertionError("".join(lines))
        yield started, f"http://127.0.0.1:{port}"
    finally:
        started.kill()
        started.wait()
        started.stderr.close()


@pytest.mark.slow
def test_sigterm_saves_and_ends_well_and_the_documented_client_works(model, tmp_path):
    import httpx

    text = (ROOT / "docs/serving.md").read_text()
    client = re.search(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]
    assert len(client.splitlines()) <= 25
    pictures = [tmp_path / f"{n}.png" for n in range(3)]
    for picture, image in zip(pictures, IMAGES, strict=False):
        picture.write_bytes(file_of(image))
    state = tmp_path / "state"
    with process(state, "tent") as (server, address):
        program = tmp_path / "client.py"
        program.write_text(client.replace("http://localhost:8000", address))
        done = subprocess.run([sys.executable, program, *pictures], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert [line.split()[1] for line in done.stdout.splitlines()] == [str(int(label)) for label in LABELS[:3]]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert len(list(state.glob("autosave-*"))) == 1
    with process(state, "tent") as (_, address):
        assert httpx.get(f"{address}/state").json()["method"] == "tent"
