"""Bodies of requests to the server: what does not fit, is too long, too slow or damaged is refused with a sentence."""

import asyncio
import base64
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import tta
from served import IMAGES, ask, file_of, metrics_of, serving_of
from tta.serve import ServeSettings, create_app

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


def test_too_many_files_of_a_form_are_refused(digits_cnn):
    with serving_of(digits_cnn, settings={"max_images": 2}) as client:
        answer = client.post("/predict", files=[("images", (f"{n}.png", file_of(IMAGES[n]))) for n in range(3)])
        assert answer.status_code == 400
        assert "2" in answer.json()["detail"]


@pytest.mark.parametrize("announced", [True, False])
def test_a_long_body_is_refused(digits_cnn, announced):
    with serving_of(digits_cnn, settings={"max_body": 1000}) as client:
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
def test_bodies_that_arrive_slowly_take_memory_and_no_place(digits_cnn, limit):
    body = file_of(IMAGES[0])
    assert len(body) < 2_000 < 2 * (len(body) - 20) < 10_000
    app = create_app(tta.adapt(digits_cnn), ServeSettings(max_requests=1, max_body=limit, batch_timeout=0.0))

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


def test_a_body_that_is_announced_too_long_is_not_read(digits_cnn):
    async def receive():
        raise AssertionError("it was read")

    app = create_app(tta.adapt(digits_cnn, "tent"))
    status, body = called(app, receive, (b"content-length", b"999999999"))
    assert (status, "longer than" in body) == (413, True)


def test_a_body_that_does_not_arrive_is_given_up(digits_cnn):
    async def receive():
        await asyncio.sleep(60)

    app = create_app(tta.adapt(digits_cnn, "tent"), ServeSettings(timeout=0.2))
    status, body = called(app, receive)
    assert (status, "did not arrive within 0.2 s" in body) == (408, True)


def test_a_busy_server_says_so(digits_cnn):
    go_on = threading.Event()
    with serving_of(digits_cnn, settings={"max_requests": 1, "timeout": 60}) as client:
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


def test_an_answer_that_takes_too_long_is_given_up_and_not_learned_from(digits_cnn):
    go_on = threading.Event()
    with serving_of(digits_cnn, settings={"timeout": 0.3}) as client:
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
def test_fuzzed_bodies_are_answered_and_harm_nothing(digits_cnn, count):
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
    with serving_of(digits_cnn, None) as client:
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
