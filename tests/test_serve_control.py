"""Control of the server: reset, snapshot, rollback, pause and export, for whoever knows the token."""

import pytest
import torch

import tta
from served import CONTROL, IMAGES, TOKEN, ask, labels_of, metrics_of, same_state, serving_of, state_of


@pytest.mark.parametrize(("method", "path"), CONTROL)
def test_control_is_off_without_a_token_and_wants_the_right_one(digits_cnn, refusing, method, path):
    answer = refusing.request(method, path, headers=TOKEN)
    assert (answer.status_code, "no token" in answer.json()["detail"]) == (403, True)
    with serving_of(digits_cnn, settings={"token": "secret"}) as client:
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


def test_reset_snapshot_and_rollback_are_exact(digits_cnn):
    with serving_of(digits_cnn, settings={"token": "secret"}) as client:
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


def test_a_snapshot_outlives_the_server(digits_cnn, tmp_path):
    settings = {"token": "secret", "state": str(tmp_path)}
    with serving_of(digits_cnn, settings=settings) as client:
        ask(client, IMAGES[:32])
        kept = state_of(client)
        client.post("/snapshot", headers=TOKEN)
    with serving_of(digits_cnn, settings=settings) as client:
        ask(client, IMAGES[32:64])
        assert client.post("/rollback", headers=TOKEN).status_code == 200
        assert same_state(kept, state_of(client))
        (tmp_path / "snapshot.safetensors").write_bytes(b"no")
    with serving_of(digits_cnn, settings=settings) as client:
        answer = client.post("/rollback", headers=TOKEN)
        assert (answer.status_code, "damaged" in answer.json()["detail"]) == (409, True)


def test_paused_it_predicts_and_changes_nothing(digits_cnn):
    for method in (None, "tent"):
        with serving_of(digits_cnn, method, settings={"token": "secret", "paused": True}) as client:
            before = state_of(client)
            assert {one["answered"] for one in ask(client, IMAGES[:16])} == {"held"}
            assert same_state(before, state_of(client))
            assert metrics_of(client)["tta_paused"] == 1
            client.post("/pause", params={"on": "false"}, headers=TOKEN)
            assert {one["answered"] for one in ask(client, IMAGES[:16])} == {"learned"}
            client.post("/pause", headers=TOKEN)
            assert client.get("/state").json()["paused"] is True


def test_export_is_a_plain_model_that_predicts_the_same(digits_cnn, tmp_path):
    with serving_of(digits_cnn, settings={"token": "secret", "batch_size": 64}) as client:
        ask(client, IMAGES[:64])
        body = client.get("/export", headers=TOKEN).content
        client.post("/pause", headers=TOKEN)
        expected = labels_of(ask(client, IMAGES[:64]))
    from safetensors.torch import load

    plain = tta.load_model("digits-cnn")
    plain.load_state_dict(load(body))
    assert torch.equal(plain(IMAGES[:64] / 255).argmax(1), expected)
    with serving_of(digits_cnn, "lame", settings={"token": "secret"}) as client:
        answer = client.get("/export", headers=TOKEN)
        assert (answer.status_code, "more than one forward" in answer.json()["detail"]) == (409, True)
