"""The demo's page: it names all that is offered, its buttons change the stream, and it asks no other host for anything."""

import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from html import unescape
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image

import tta
from tta.datasets import CORRUPTIONS, VALIDATION_CORRUPTIONS, corrupt, digits

for library in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(library, reason="needs the extra `demo` (and httpx, of `test`)")

warnings.filterwarnings("ignore", message="Using `httpx` with")
from fastapi import FastAPI  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

from tta.cli import demo as words  # noqa: E402
from tta.cli import main  # noqa: E402
from tta.cli.arguments import UsageError  # noqa: E402
from tta.demo import DemoSettings, Pictures, create_app, of_digits, of_folder, run  # noqa: E402
from tta.demo.player import Player, Score, data_url  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def model():
    return tta.load_model("digits-cnn")


@contextlib.contextmanager
def page_of(model, pictures=None, method=None, hparams=None, source=None, **settings):
    """A client of the page; it plays as fast as it can."""
    settings = DemoSettings(**{"interval": 0.0, "playing": False, **settings})
    pictures = pictures or of_digits(batch_size=16)
    app = create_app(model, pictures, settings, method=method, hparams=hparams, source=source)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        client.player = app.state.player
        yield client


def change(client, **wanted):
    answer = client.post("/api/change", json=wanted)
    assert answer.status_code == 200, answer.text
    return answer.json()


def after(client, batches):
    """The state with this many batches played, or more; then it is paused."""
    change(client, playing=True)
    while client.player.number < batches:
        time.sleep(0.001)
    return change(client, playing=False)


def buttons(text, what):
    return [unescape(name) for name in re.findall(f'data-set="{what}" value="([^"]*)"', text)]


# ---------------------------------------------------------------------- pictures


def test_pictures_are_those_of_corrupt_pass_after_pass():
    pictures = of_digits(batch_size=300, seed=3)  # two batches a pass: what is left of 800 comes in another
    images, labels, index = digits.split("test")
    for number, seed, place in ((0, 3, 0), (1, 3, 300), (2, 4, 0)):
        rows = torch.randperm(800, generator=torch.Generator().manual_seed(seed))[place : place + 300]
        shown = pictures.batch(number, "fog", 2)
        assert torch.equal(shown.labels, labels[rows])
        assert torch.equal(shown.images, corrupt(images[rows], "fog", severity=2, seed=seed, index=index[rows]))
    assert torch.equal(
        pictures.batch(0).images, images[torch.randperm(800, generator=torch.Generator().manual_seed(3))[:300]]
    )


@pytest.mark.parametrize(("corruption", "severity", "said"), [("fogg", 5, "Did you mean 'fog'"), ("fog", 6, "1 to 5")])
def test_no_other_corruption_or_severity(corruption, severity, said):
    with pytest.raises(ValueError, match=said):
        of_digits().batch(0, corruption, severity)


def test_a_large_picture_is_reduced_and_a_small_one_is_not():
    small, large = torch.zeros(3, 32, 32, dtype=torch.uint8), torch.zeros(3, 224, 112, dtype=torch.uint8)
    assert data_url(small).startswith("data:image/png;base64,")
    assert data_url(large).startswith("data:image/jpeg;base64,")
    assert len(data_url(large)) < 3000


# ---------------------------------------------------------------------- the page and its buttons


def test_the_page_names_all_that_is_offered(model):
    with page_of(model) as client:
        answer = client.get("/")
        assert buttons(answer.text, "corruption") == ["none", *CORRUPTIONS, *VALIDATION_CORRUPTIONS]
        assert buttons(answer.text, "severity") == ["1", "2", "3", "4", "5"]
        assert buttons(answer.text, "method") == tta.list_methods(task="classification", two_towers=False)
        assert "handwritten digits on digits-cnn" in answer.text


def test_a_method_around_another_has_its_button(model):
    with page_of(model, method="chain:tent") as client:
        assert buttons(client.get("/").text, "method")[0] == "chain:tent"


def test_nothing_is_asked_of_another_host(model):
    """The policy makes the browser refuse it; the texts name none."""
    with page_of(model) as client:
        answer = client.get("/")
        policy = dict(part.split(maxsplit=1) for part in answer.headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert set(policy.values()) <= {"'none'", "'self'", "data:"}
        for name in ("/", "/page.css", "/page.js"):
            answer = client.get(name)
            assert answer.status_code == 200
            assert "//" not in re.sub(r"(^|\s)// .*$", "", answer.text, flags=re.MULTILINE)
        assert client.get("/docs").status_code == 404


def test_a_page_of_another_name_is_refused(model):
    """As a name of somebody else's that leads to this machine would be."""
    with page_of(model) as client:
        assert client.get("/api/state", headers={"Host": "evil.example"}).status_code == 400
        for name in ("/api/change", "/api/reset"):
            assert client.post(name, json={}, headers={"Origin": "http://127.0.0.1"}).status_code == 200
            answer = client.post(name, json={}, headers={"Origin": "https://evil.example"})
            assert (answer.status_code, answer.json()["detail"]) == (403, "Only the buttons of this page are answered.")


def test_a_batch_is_what_source_model_and_adapter_say(model):
    pictures = of_digits(batch_size=16)
    adapter = tta.adapt(model, "tent", lr=1e-2)
    with page_of(model, pictures, "tent", {"lr": 1e-2}, guard=False, corruption="contrast") as client:
        state = after(client, 3)
        wrong_source = wrong_adapted = 0
        for number in range(state["batch"]):
            images, labels = pictures.batch(number, "contrast", 5)
            by_source, by_adapter = model(images / 255).argmax(1), adapter(images / 255).argmax(1)
            wrong_source += int((by_source != labels).sum())
            wrong_adapted += int((by_adapter != labels).sum())
        assert state["start"] == {"images": 16 * state["batch"], "source": wrong_source, "adapted": wrong_adapted}
        assert wrong_source > wrong_adapted
        assert [one["label"] for one in state["pictures"]] == [str(label) for label in labels.tolist()]
        for who, predicted in (("source", by_source), ("adapted", by_adapter)):
            said = [[str(int(one)), bool(one == label)] for one, label in zip(predicted, labels, strict=True)]
            assert [one[who] for one in state["pictures"]] == said
        assert state["pictures"][0]["image"] == data_url(images[0])


def test_another_domain_goes_on_with_the_adapter(model):
    with page_of(model) as client:
        before = after(client, 2)
        adapter = client.player.adapter
        state = change(client, corruption="contrast", severity=3)
        assert (state["corruption"], state["severity"], state["batch"]) == ("contrast", "3", before["batch"])
        assert state["domain"]["images"] == 0
        assert state["start"] == before["start"]
        assert state["marks"][-1] == [state["batch"], "domain", "contrast, severity 3: the adapter goes on"]
        state = after(client, state["batch"] + 1)
        assert client.player.adapter is adapter
        last = client.player.pictures.batch(state["batch"] - 1, "contrast", 3)
        assert state["pictures"][0]["image"] == data_url(last.images[0])
        assert change(client, corruption="none")["marks"][-1][2] == "no corruption: the adapter goes on"


def test_another_method_begins_with_a_fresh_adapter(model):
    with page_of(model, method="tent", hparams={"lr": 0.1}) as client:
        first = after(client, 2)
        adapter = client.player.adapter
        state = change(client, method="sar")
        assert client.player.adapter.method == "sar"
        assert client.player.adapter.progress().batches == 0
        assert state["start"]["images"] == 0
        assert state["batch"] == first["batch"]  # the stream goes on
        assert state["marks"][-1][1:] == ["method", "sar: a fresh adapter, from the source model"]
        change(client, method="tent")
        assert client.player.adapter is not adapter
        assert client.player.adapter.config.lr == 0.1
        same = client.player.adapter
        assert change(client, method="tent")["marks"][-1][2].startswith("tent")
        assert client.player.adapter is same


def test_reset_is_the_beginning(model):
    with page_of(model, method="tent", corruption="fog") as client:
        first = after(client, 1)
        again = after(client, first["batch"] + 3)
        state = client.post("/api/reset").json()
        assert (state["batch"], state["points"], state["start"]["images"]) == (0, [], 0)
        assert client.player.adapter.progress().batches == 0
        state = after(client, again["batch"])
        assert [one for one in state["points"] if one[0] <= again["batch"]] == again["points"]


def test_pause_holds_the_stream_still(model):
    with page_of(model, playing=True) as client:
        state = change(client, playing=False)
        time.sleep(0.05)
        assert client.get("/api/state").json() == state
        assert client.get("/api/state", params={"seen": state["version"]}).status_code == 204
        assert client.get("/api/state", params={"seen": state["version"] - 1}).json() == state


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"corruption": "fgo"}, "No corruption 'fgo'. Did you mean 'fog'?"),
        ({"severity": 0}, "severity=0; expected 1 to 5"),
        ({"severity": "high"}, "body.severity: Input should be a valid integer"),
        ({"method": "tnet"}, "No method 'tnet'. Did you mean 'tent'?"),
        ({"method": "dpcore", "corruption": "fog"}, "VisionTransformer"),
        ({"speed": 3}, "body.speed: Extra inputs are not permitted"),
        ([], "body: "),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence_and_changes_nothing(model, body, said):
    with page_of(model, method="norm") as client:
        adapter, before = client.player.adapter, client.get("/api/state").json()
        answer = client.post("/api/change", json=body)
        assert answer.status_code == 422
        assert said in answer.json()["detail"]
        assert client.player.adapter is adapter
        assert client.get("/api/state").json() == before
        assert {**change(client), "version": before["version"]} == before


def test_alarms_of_the_guard_are_marks(model):
    with page_of(model, of_digits(batch_size=32), "tent", {"lr": 1.0}, corruption="none") as client:
        state = after(client, 20)
        kinds = [kind for _, kind, _ in state["marks"]]
        assert "alarm" in kinds
        assert client.player.adapter.guard.counts["alarms"] == kinds.count("alarm")
        assert state["answered"] in ("held", "source")


def test_a_page_left_open_takes_what_a_new_demo_says(model):
    """Views are numbered on from one process to the next: an older number is never shown in place of a newer one."""
    with page_of(model) as client:
        before = after(client, 3)["version"]
    with page_of(model) as client:
        assert client.get("/api/state").json()["version"] > before


def test_one_thread_learns_whoever_looks_on(model, monkeypatch):
    seen, by_adapter = set(), Player._play

    def play(self):
        seen.add(threading.current_thread().name)
        by_adapter(self)

    monkeypatch.setattr(Player, "_play", play)
    with page_of(model, playing=True) as client:
        one, other = (TestClient(client.app, base_url="http://127.0.0.1") for _ in range(2))
        change(one, corruption="snow")
        assert other.get("/api/state").json()["corruption"] == "snow"
        state = change(other, playing=False)
        assert one.get("/api/state").json() == state
        assert seen == {"tta-demo"}


def test_a_batch_that_fails_pauses_with_its_reason(model, monkeypatch):
    with page_of(model) as client:
        monkeypatch.setattr(Pictures, "batch", lambda *_: 1 / 0)
        client.post("/api/change", json={"playing": True})
        while client.player.playing:
            time.sleep(0.001)
        state = change(client, playing=False)
        assert state["marks"][-1] == [1, "error", "division by zero The stream is paused."]
        monkeypatch.undo()
        assert after(client, 3)["start"]["images"] > 0


def test_scores_add_up():
    score = Score(4, 2, 1)
    score.add(Score(4, 2, 0))
    assert (score, score.percent(), Score().percent()) == (Score(8, 4, 1), (50.0, 12.5), None)


# ---------------------------------------------------------------------- a folder of the user's


@pytest.fixture
def folder(tmp_path):
    """Digits 0 to 9 as files in class folders of other names, two each, at 40 x 40 pixels."""
    images, labels, _ = digits.split("test")
    for label in range(10):
        place = tmp_path / "photos" / f"class {label}"
        place.mkdir(parents=True)
        for number, image in enumerate(images[labels == label][:2]):
            Image.fromarray(image.permute(1, 2, 0).numpy()).resize((40, 40)).save(place / f"{number}.png")
    return tmp_path / "photos"


def test_a_folder_is_played_as_the_model_expects_it(folder, model):
    pictures = of_folder(folder, model, batch_size=8)
    with page_of(model, pictures, corruption="none") as client:
        state = after(client, 2)
        assert "pictures of &#x27;photos&#x27; on digits-cnn" in client.get("/").text
        assert pictures.batch(0).images.shape == (8, 3, 32, 32)
        assert state["start"]["source"] < state["start"]["images"] / 4
        assert {one["label"] for one in state["pictures"]} <= set("0123456789")


def test_without_labels_nothing_is_right_or_wrong(folder, model):
    with page_of(model, of_folder(folder, model, labels=False, batch_size=8)) as client:
        state = after(client, 2)
        assert (state["start"]["images"], state["points"]) == (0, [])
        assert {(one["label"], one["source"][1], one["adapted"][1]) for one in state["pictures"]} == {(None,) * 3}


def test_folders_name_classes_that_the_weights_do_not(folder, model, tmp_path):
    model = tta.load_model("digits-cnn").named(None)
    assert of_folder(folder, model).names == [f"class {label}" for label in range(10)]
    mapped = tmp_path / "map.json"
    mapped.write_text(json.dumps({f"class {label}": 9 - label for label in range(10)}))
    found = of_folder(folder, model, class_map=str(mapped), batch_size=20)
    assert found.names is None
    assert sorted(found.batch(0).labels.tolist()) == sorted(2 * list(range(10)))


def test_classes_that_do_not_fit_are_refused(folder, model):
    to_ten = {f"class {label}": label + 1 for label in range(10)}
    with pytest.raises(ValueError, match="class 10; expected 0 to 9"):
        create_app(model, of_folder(folder, model, class_map=to_ten))
    shutil.rmtree(folder / "class 3")
    with pytest.raises(ValueError, match="pictures of 9 classes and a model of 10"):
        create_app(model, of_folder(folder, model))


# ---------------------------------------------------------------------- the command


def test_words_come_in_any_order(folder):
    found = words.parse(["tent", "lr=0.1", str(folder), "digits-vit", "port=0", "labels=false", "batch_size=8"])
    assert (found.folder, found.spec, found.method) == (str(folder), "digits-vit", "tent")
    assert (found.hparams, found.demo) == ({"lr": 0.1}, {"port": 0})
    assert found.pictures == {"labels": False, "batch_size": 8}
    assert words.parse([])[:3] == (None, "digits-cnn", "auto")
    assert words.parse(["digits", "tent", "tent.lr=1"]).hparams == {"lr": 1}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["tnet"], "neither a folder, a model nor a method. Did you mean 'tent'"),
        (["tent", "norm"], "one method; got tent, norm"),
        (["prot=1"], "'prot'. Did you mean 'port'"),
        (["labels=false"], "key 'labels'"),
        (["photos/"], "A folder needs a model"),
    ],
)
def test_words_that_mean_nothing_are_refused(given, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        words.parse(given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("no/such/folder", "no/such/folder"),
        ("corruption=fgo", "'fog'"),
        ("severity=9", "1 to 5"),
        ("port=70000", "65535"),
        ("interval=-1", "0 or more"),
    ],
)
def test_a_wrong_beginning_is_refused(given, said, capsys):
    assert main(["demo", "digits-cnn", given]) == 2
    assert said in capsys.readouterr().err


def test_without_the_extra_a_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(words, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert "tta demo needs fastapi, uvicorn: pip install 'tta-toolkit[demo]'" in capsys.readouterr().err


def test_methods_that_need_source_images_get_those_of_the_digits():
    app, settings = words.make_app(words.parse(["eata", "playing=false", "fisher_batch_size=256"]))
    assert app.state.player.adapter.method == "eata"
    assert (settings.host, settings.open) == ("127.0.0.1", False)


@pytest.mark.parametrize("asked", [False, True])
def test_a_browser_is_opened_where_this_is_asked_for_only(asked, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: None)
    run(FastAPI(), DemoSettings(port=0, open=asked))
    address = re.search(r"http://127\.0\.0\.1:[1-9]\d*", capsys.readouterr().out)[0]
    assert opened == [address] * asked


def test_a_port_in_use_is_named():
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(OSError, match="Nothing can listen at "),
    ):
        run(FastAPI(), DemoSettings(port=other.getsockname()[1]))


# ---------------------------------------------------------------------- in a browser


class Browser:
    """Headless Chromium, driven over its DevTools protocol through a pipe: messages of JSON, each ended by a zero byte."""

    # Chromium reads commands from descriptor 3 and writes to 4; a process in between puts the pipes there.
    PIPES = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"

    def __init__(self, profile):
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for _ in range(2) for end in os.pipe()]
        read_by_it, ours_to_write, ours_to_read, written_by_it = ends
        between = [sys.executable, "-c", self.PIPES, str(read_by_it), str(written_by_it)]
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        self.process = subprocess.Popen(
            [*between, CHROMIUM, *flags, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(read_by_it, written_by_it),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (read_by_it, written_by_it):
            os.close(end)
        self.commands, self.answers = os.fdopen(ours_to_write, "wb", 0), os.fdopen(ours_to_read, "rb")
        self.numbers, self.session, self.requests, self.complaints = itertools.count(1), None, [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """The result of a command; what the browser tells meanwhile is kept."""
        number = next(self.numbers)
        command = {"id": number, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        self.commands.write(json.dumps(command).encode() + b"\0")
        while True:
            message = json.loads(self._message())
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            elif message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(message["params"])

    def _message(self):
        found = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            assert byte, "Chromium has ended."
            found += byte
        return bytes(found)

    def run(self, code):
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, code, seconds=60):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({code})"):
            assert time.monotonic() < end, f"Not within {seconds} s: {code}"
            time.sleep(0.05)

    def press(self, selector):
        """Press a button as a keyboard does: focus it, then Enter."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **key)

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.call("Browser.close")
        self.process.wait(timeout=20)
        for end in (self.commands, self.answers):
            end.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of ``tta demo`` in a process of its own."""
    command = [sys.executable, "-m", "tta", "demo", "port=0", "interval=0.05", "batch_size=16", "corruption=none"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path_factory.mktemp("demo"))
    yield re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
    process.terminate()
    process.wait(timeout=20)
    process.stdout.close()


def opened(browser, address, **size):
    """Open the page in a window of this size, playing, with all its buttons unfolded."""
    browser.call("Emulation.setDeviceMetricsOverride", deviceScaleFactor=1, **size)
    browser.requests, browser.complaints = [], []
    browser.call("Page.navigate", url=address)
    browser.until("document.querySelector('#condition')?.textContent")
    if browser.run("document.querySelector('#play').textContent") == "Play":
        browser.press("#play")
    browser.until("document.querySelectorAll('#pictures li').length === 16")
    browser.run("document.querySelector('details.long').open = true")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is found")
def test_in_a_browser_the_buttons_change_the_stream(browser, address):
    opened(browser, address, width=1280, height=844, mobile=False)
    pressed = "[...document.querySelectorAll('[aria-pressed=true]')].map(one => one.value).join()"
    assert browser.run(pressed) == "none,5,auto"
    browser.press("[value=frost]")
    browser.press("[data-set=severity][value='3']")
    browser.press("[value=tent]")
    browser.until(f"{pressed} === 'frost,3,tent'")
    browser.until("document.querySelector('#events').textContent.includes('tent: a fresh adapter')")
    browser.until("document.querySelectorAll('#start td')[2].textContent >= '32'")
    browser.until("document.querySelector('#curve .adapted').getAttribute('points').split(' ').length > 1")
    browser.press("#play")
    browser.until("document.querySelector('#play').textContent === 'Play'")
    still = browser.run("document.querySelector('#pictures').innerHTML")
    time.sleep(0.5)  # two questions of the page
    assert browser.run("document.querySelector('#pictures').innerHTML") == still
    browser.press("[value=dpcore]")
    browser.until("document.querySelector('#said').textContent.includes('VisionTransformer')")
    assert browser.run(pressed) == "frost,3,tent"
    browser.press("#reset")
    browser.until("document.querySelectorAll('#pictures li').length === 0")
    asked = [url for url in browser.requests if not url.startswith("data:")]
    assert {urlsplit(url).netloc for url in asked} == {urlsplit(address).netloc}
    refused = [one for one in browser.complaints if "422" not in json.dumps(one)]  # that of dpcore is expected
    assert refused == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is found")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_nothing_is_wider_than_the_window(browser, address, width):
    opened(browser, address, width=width, height=844, mobile=width < 500)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("innerWidth") == width
