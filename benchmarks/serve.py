"""Speed of `tta serve` with adaptation off and on, growth of its memory, its errors on a stream, and what it survives.

    python benchmarks/serve.py load digits-cnn --seconds 60               # 32 clients on loopback, one picture a request
    python benchmarks/serve.py load torchvision:mobilenet_v2 --seconds 60 --checkpoint mobilenet_v2.safetensors
    python benchmarks/serve.py load torchvision:mobilenet_v2              # random weights: speed alone
    python benchmarks/serve.py memory --requests 100000                   # resident memory on the way
    python benchmarks/serve.py kill --times 50                            # every restart must serve, from a state that is whole
    python benchmarks/serve.py stream                                     # errors as those of tta.evaluate at the same batches
    python benchmarks/serve.py slow                                       # clients that send a byte a second, beside others
    python benchmarks/serve.py writers                                    # a second server on the folder of the first
    python benchmarks/serve.py full DIR                                   # a folder on a file system of about 800 kB

The server is a process of its own; the clients are one more, on the same machine, so that they compete for its processors.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

import tta
from tta.datasets import digits

REQUEST = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
RUNS = {"off": ["source"], "on, the guarded default": [], "on, tent": ["tent", "small_batches=blend"]}


class Server(NamedTuple):
    """A server that answers: its process, its address, and the lines of its log so far."""

    process: subprocess.Popen[str]
    address: str
    log: list[dict[str, Any]]


@contextlib.contextmanager
def started(*words: str) -> Iterator[Server]:
    """Start `tta serve`, wait until it answers, and end it."""
    command = [sys.executable, "-m", "tta", "serve", *words, "port=0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    log: list[dict[str, Any]] = []
    try:
        for line in process.stderr:
            log.append(json.loads(line) if line.startswith("{") else {"message": line})
            if log[-1]["message"] == "Application startup complete.":
                break
        else:
            raise RuntimeError(f"The server did not start: {log}")
        port = next(line["port"] for line in log if line["message"] == "listening")
        errors = process.stderr
        threading.Thread(target=lambda: all(True for _ in errors), daemon=True).start()  # or its pipe would be full
        yield Server(process, f"http://127.0.0.1:{port}", log)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
        process.wait()


def pictures(side: int, count: int = 200) -> list[bytes]:
    """Foggy digits as PNG files."""
    images = tta.datasets.corrupt(digits.split("test")[0][:count], "fog", severity=3, seed=0, recipe="cifar")
    return [png(image, side) for image in images]


def shown(folder: Path) -> list[Path]:
    """Up to 200 files of a folder, evenly from all of it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return files[:: max(1, len(files) // 200)][:200]


def png(image: torch.Tensor, side: int = 32) -> bytes:
    """A file of an image, uint8 (3, height, width)."""
    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side)).save(out, "PNG")
    return out.getvalue()


def place(address: str) -> tuple[str, int]:
    """Host and port of an address."""
    host, _, port = address.removeprefix("http://").partition(":")
    return host, int(port)


async def asked(
    address: str, files: list[bytes], clients: int, seconds: float = 10**9, requests: int = 10**9
) -> tuple[list[float], Counter[int]]:
    """Seconds of each request and the codes of the answers, of clients that each ask again as soon as they are answered.

    Plain HTTP on sockets kept open: a client library would take more of the shared processors than the server does.
    """
    host, port = place(address)
    times: list[float] = []
    codes: Counter[int] = Counter()
    end, left = time.perf_counter() + seconds, iter(range(requests))

    async def client() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        for number in left:
            start, body = time.perf_counter(), files[number % len(files)]
            writer.write(REQUEST % len(body) + body)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
            times.append(time.perf_counter() - start)
            codes[int(head.split()[1])] += 1
            if time.perf_counter() > end:
                break
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return times, codes


def text_of(address: str) -> str:
    """All metrics of the server."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        return str(answer.read().decode())


def metric(address: str, name: str) -> float:
    """A metric without labels of the server."""
    found = re.search(rf"^{name} (\S+)$", text_of(address), re.MULTILINE)
    assert found is not None
    return float(found[1])


def model_words(spec: str, given: Path | None, folder: Path) -> list[str]:
    """The words of a model with its checkpoint; torchvision's without one gets random weights, which are as fast as any."""
    if given is not None:
        return [spec, f"checkpoint={given}"]
    if not spec.startswith("torchvision:"):
        return [spec]
    checkpoint = folder / "weights.pt"
    torch.save(tta.load_model(spec, pretrained=False).model.state_dict(), checkpoint)
    return [spec, f"checkpoint={checkpoint}"]


def load(options: argparse.Namespace) -> None:
    """Print requests a second and times to answer, with adaptation off and on."""
    side = 32 if options.model.startswith("digits") else 224
    files = pictures(side) if options.pictures is None else [file.read_bytes() for file in shown(options.pictures)]
    print(f"{options.model}, {options.clients} clients, {options.seconds:g} s each, {torch.get_num_threads()} threads")
    print("adaptation                  requests/s    p50 ms    p99 ms  images/batch  answers")
    with tempfile.TemporaryDirectory() as folder:
        words = model_words(options.model, options.checkpoint, Path(folder))
        for name, method in RUNS.items():
            with started(*words, *method, f"batch_size={options.clients}") as server:
                asyncio.run(asked(server.address, files, options.clients, 2))  # until it is warm
                before = metric(server.address, "tta_images_total"), batches(server.address)
                start = time.perf_counter()
                times, codes = asyncio.run(asked(server.address, files, options.clients, options.seconds))
                rate = len(times) / (time.perf_counter() - start)
                mean = (metric(server.address, "tta_images_total") - before[0]) / (batches(server.address) - before[1])
                cuts = statistics.quantiles([1000 * second for second in times], n=100)
                print(
                    f"{name:26}  {rate:10.0f}  {cuts[49]:8.1f}  {cuts[98]:8.1f}  {mean:12.1f}  {dict(codes)}",
                    flush=True,
                )


def batches(address: str) -> float:
    """Batches answered so far, learned from or not."""
    found = re.findall(r"^tta_batches_total\{.*\} (\S+)$", text_of(address), re.MULTILINE)
    return sum(map(float, found))


def memory(options: argparse.Namespace) -> None:
    """Print the resident memory on the way through many requests."""
    files = pictures(32)
    with tempfile.TemporaryDirectory() as folder, started("digits-cnn", f"state={folder}") as server:
        part = max(1, options.requests // 10)
        for number in range(11):
            images = metric(server.address, "tta_images_total")
            resident = metric(server.address, "process_resident_memory_bytes") / 2**20
            print(f"{images:8.0f} requests  {resident:7.1f} MiB", flush=True)
            if number < 10:
                _, codes = asyncio.run(asked(server.address, files, options.clients, requests=part))
                assert set(codes) == {200}, codes


def kill(options: argparse.Namespace) -> None:
    """Kill a server that saves after every batch, at random moments, and look at what the next one starts from."""
    generator, files = random.Random(options.seed), pictures(32)
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.times + 1):
            with started("digits-cnn", f"state={folder}", "autosave=1") as server:
                found.update(judged(server, Path(folder), first=number == 0))
                _, codes = asyncio.run(asked(server.address, files, 1, requests=1))
                found["serves" if codes[200] else "does not serve"] += 1
                if number < options.times:
                    ended = threading.Timer(generator.uniform(0.05, 1.5), server.process.kill)
                    ended.start()
                    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                        asyncio.run(asked(server.address, files, 4, 60))
                    server.process.wait(60)
                    found["killed"] += 1
                    found["left half a file"] += any(Path(folder).glob(".*autosave*"))
    print(", ".join(f"{name}: {count}" for name, count in sorted(found.items())))


def judged(server: Server, folder: Path, first: bool) -> list[str]:
    """Facts of a start: from a saved state, from the latest one, and whether one was damaged."""
    texts = [line["message"] for line in server.log]
    latest = max(folder.glob("autosave-*"), default=None)
    resumed = next((text for text in texts if text.startswith("went on from")), None)
    facts = ["found a damaged state"] * sum("damaged" in text for text in texts)
    if first:
        return facts
    if resumed is None:
        return [*facts, "started from nothing"]
    return [
        *facts,
        "went on from the latest state" if latest and latest.name in resumed else "went on from an older state",
    ]


def stream(options: argparse.Namespace) -> None:
    """Print the errors on foggy and low-contrast digits of a server and of :func:`tta.evaluate`, batch by batch alike."""
    model = tta.load_model("digits-cnn")
    target = tta.stream("digits-c", batch_size=50, corruptions=["fog", "contrast", "gaussian_noise"])
    print("method                      served %  tta.evaluate %")
    for name, method in RUNS.items():
        named = {"small_batches": "blend"} if "tent" in method else {}
        expected = tta.evaluate(tta.adapt(model, *method[:1], **named), target).errors
        wrong, counts = Counter[int](), Counter[int]()
        with started("digits-cnn", *method, "batch_size=50") as server:
            for batch in target:
                images = (batch.images * 255).round().to(torch.uint8)
                labels = torch.tensor(predicted(server.address, [png(image) for image in images]))
                counts.update(batch.domain.tolist())
                wrong.update(batch.domain[labels != batch.labels].tolist())
        served = {domain: 100 * wrong[number] / counts[number] for number, domain in enumerate(expected)}
        for domain, error in expected.items():
            print(f"{name + ', ' + domain:40}  {served[domain]:6.2f}  {error:6.2f}", flush=True)


def predicted(address: str, files: list[bytes]) -> list[int]:
    """Labels of one request."""
    body = json.dumps({"images": [base64.b64encode(file).decode() for file in files]}).encode()
    request = urllib.request.Request(f"{address}/predict?top=1", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return [one["label"] for one in json.load(answer)["predictions"]]


def slow(options: argparse.Namespace) -> None:
    """Print what clients get beside some that send a byte a second, fewer than the places for requests and then more."""
    files = pictures(32)

    async def dripping(address: str) -> int:
        reader, writer = await asyncio.open_connection(*place(address))
        writer.write(REQUEST % 1000)
        answer = asyncio.ensure_future(reader.readuntil(b"\r\n"))
        while not answer.done():
            writer.write(b"x")
            await asyncio.wait([answer], timeout=1)
        writer.close()
        return int(answer.result().split()[1])

    async def both(address: str, count: int) -> None:
        dripped = [asyncio.ensure_future(dripping(address)) for _ in range(count)]
        await asyncio.sleep(1)
        times, codes = await asked(address, files, 8, 5)
        print(f"{count} slow clients: the others get {dict(codes)}, {1000 * max(times):.0f} ms at most", flush=True)
        print(f"  the slow ones, in the end: {dict(Counter(await asyncio.gather(*dripped)))}")
        print(f"  after that, the others: {dict((await asked(address, files, 8, 2))[1])}", flush=True)

    with started("digits-cnn", "timeout=10") as server:
        for count in (32, 100):
            asyncio.run(both(server.address, count))


def writers(options: argparse.Namespace) -> None:
    """Print what a second server on the folder of a running one says, and that the first one serves on."""
    with tempfile.TemporaryDirectory() as folder, started("digits-cnn", f"state={folder}") as server:
        command = [sys.executable, "-m", "tta", "serve", "digits-cnn", "port=0", f"state={folder}"]
        second = subprocess.run(command, capture_output=True, text=True, timeout=300)
        print(f"the second ends with {second.returncode}: {second.stderr.splitlines()[-1]}")
        print(f"the first answers {dict(asyncio.run(asked(server.address, pictures(32), 4, requests=100))[1])}")


def full(options: argparse.Namespace) -> None:
    """Print what is answered and saved while the disk is full, and what the next server starts from."""
    files = pictures(32)
    for _ in range(2):
        with started("digits-cnn", f"state={options.folder}", "autosave=1") as server:
            print(
                [line["message"] for line in server.log if "state" in line["message"] or "went on" in line["message"]]
            )
            _, codes = asyncio.run(asked(server.address, files, 4, requests=400))
            found = re.findall(r'^tta_autosaves_total\{result="(\w+)"\} (\S+)$', text_of(server.address), re.MULTILINE)
            print(f"answers {dict(codes)}, states {dict(found)}")
        print(f"exit code {server.process.returncode}; left: {sorted(file.name for file in options.folder.iterdir())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    of_load = commands.add_parser("load")
    of_load.add_argument("model")
    of_load.add_argument("--seconds", type=float, default=60)
    of_load.add_argument("--pictures", type=Path, metavar="DIR", help="files to send (default: foggy digits)")
    of_load.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights of the model")
    of_load.set_defaults(run=load)
    of_memory = commands.add_parser("memory")
    of_memory.add_argument("--requests", type=int, default=100_000)
    of_memory.set_defaults(run=memory)
    of_kill = commands.add_parser("kill")
    of_kill.add_argument("--times", type=int, default=50)
    of_kill.add_argument("--seed", type=int, default=0)
    of_kill.set_defaults(run=kill)
    for name, run in {"stream": stream, "slow": slow, "writers": writers}.items():
        commands.add_parser(name).set_defaults(run=run)
    of_full = commands.add_parser("full")
    of_full.add_argument("folder", type=Path)
    of_full.set_defaults(run=full)
    for command in (of_load, of_memory):
        command.add_argument("--clients", type=int, default=32)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
