"""The server's worker: it alone touches the adapter, and makes batches of what arrives."""

import threading
from concurrent.futures import ThreadPoolExecutor

import tta
from served import IMAGES, TOKEN, ask, metrics_of, serving_of
from tta.serve.worker import Worker


def test_images_of_many_requests_form_a_batch(digits_cnn):
    with serving_of(digits_cnn, settings={"batch_size": 8, "batch_timeout": 20}) as client:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda image: ask(client, [image])[0]["answered"], IMAGES[:8]))
        assert found == ["learned"] * 8
        assert metrics_of(client)['tta_batches_total{answered="learned"}'] == 1


def test_only_the_worker_touches_the_adapter(digits_cnn):
    seen = set()

    class Watched(type(tta.adapt(digits_cnn, "tent"))):
        def adapt(self, x):
            seen.add(threading.current_thread().name)
            return super().adapt(x)

        def state_dict(self, *args, **kwargs):
            seen.add(threading.current_thread().name)
            return super().state_dict(*args, **kwargs)

    adapter = tta.adapt(digits_cnn, Watched)
    with serving_of(digits_cnn, adapter=adapter, settings={"token": "secret"}) as client:
        seen.clear()
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(ask, client, IMAGES[n : n + 4]) for n in range(0, 32, 4)]
            jobs += [pool.submit(client.post, "/snapshot", headers=TOKEN) for _ in range(3)]
            assert all(job.result() for job in jobs)
        assert seen == {"tta-adapter"}


def test_the_worker_drops_what_nobody_waits_for(digits_cnn):
    adapter = tta.adapt(digits_cnn, "tent")
    worker = Worker(adapter, 4, 0.0, False, lambda adapter, batch: None)
    futures = [worker.submit(list(IMAGES[n : n + 2])) for n in range(0, 8, 2)]
    assert futures[0].cancel()
    assert futures[2].cancel()
    worker.start()
    worker.stop()
    assert [len(future.result()) for future in (futures[1], futures[3])] == [2, 2]
    assert adapter.progress().batches == 1


def test_a_full_batch_does_not_wait(digits_cnn):
    worker = Worker(tta.adapt(digits_cnn, "tent"), 8, 3600.0, False, lambda adapter, batch: None)
    worker.start()
    futures = [worker.submit([image]) for image in IMAGES[:8]]
    try:
        assert [len(future.result(60)) for future in futures] == [1] * 8  # an hour, if it waited
    finally:
        worker.stop()
