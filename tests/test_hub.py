"""Uploads to a real server on this machine that speaks the hub's protocol. The hub itself is not asked."""

import time
from pathlib import Path

import pytest
from hub_server import Hub
from huggingface_hub import constants, get_session

from lowmem_grpo.errors import InputError, NotUploadedError
from lowmem_grpo.output import hub as uploads
from lowmem_grpo.output.hub import check_upload, upload


@pytest.fixture
def hub(monkeypatch):
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(uploads, "PAUSES_S", (0.01, 0.01))
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield server


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "run/adapter/more").mkdir(parents=True)
    (tmp_path / "run/adapter/README.md").write_text("---\nlicense: mit\n---\n# A model\n", encoding="utf-8")
    (tmp_path / "run/adapter/adapter_model.safetensors").write_bytes(bytes(range(256)) * 20)  # a large one
    (tmp_path / "run/adapter/more/a b.txt").write_text("grün", encoding="utf-8")
    return tmp_path / "run/adapter"


def test_a_folder_and_a_file_beside_it_arrive_in_a_new_repository_as_they_are(hub, folder):
    address = upload(folder, "me/model", private=True, beside={"report.html": "<p>"})
    assert address == f"{hub.address}/me/model"
    assert hub.files["me/model@main"] == {
        "README.md": (folder / "README.md").read_bytes(), "report.html": b"<p>",
        "adapter_model.safetensors": bytes(range(256)) * 20, "more/a b.txt": "grün".encode(),
    }  # fmt: skip
    assert hub.private == {"me/model": True} and "Bearer hf_of_a_test" in hub.tokens
    assert hub.large, "the large file did not go as one"


def test_a_name_alone_is_among_the_users_own_and_an_upload_again_replaces_files(hub, folder):
    upload(folder, "model")
    (folder / "more/a b.txt").write_text("blau", encoding="utf-8")
    assert upload(folder, "model") == f"{hub.address}/me/model"
    assert hub.files["me/model@main"]["more/a b.txt"] == b"blau"
    assert hub.private == {"me/model": False}


def test_a_revision_is_a_branch_that_is_made(hub, folder):
    upload(folder, "me/model", revision="trial")
    assert set(hub.files["me/model@trial"]) == {"README.md", "adapter_model.safetensors", "more/a b.txt"}
    assert hub.files["me/model@main"] == {}


def test_a_server_that_is_out_for_a_moment_is_asked_again(hub, folder):
    hub.refusals = [503, 503]
    upload(folder, "me/model")
    assert len(hub.files["me/model@main"]) == 3


def test_a_refusal_is_told_at_once_with_the_command_that_uploads_later(hub, folder):
    hub.refusals = [403] * 9
    with pytest.raises(
        NotUploadedError, match=r"was not uploaded to me/model \(.*403.*\); later, `hf upload me/model /"
    ):
        upload(folder, "me/model")
    assert len([one for one in hub.requests if "create" in one]) == 1


def test_a_hub_that_never_answers_does_not_hold_up_the_end_of_a_run(hub, folder, monkeypatch):
    monkeypatch.setattr(uploads, "SILENCE_S", 0.05)
    hub.deaf.set()
    started, before = time.monotonic(), get_session().timeout
    with pytest.raises(NotUploadedError, match="hf upload"):
        upload(folder, "me/model")
    assert time.monotonic() - started < 5 and get_session().timeout == before


def test_a_hub_that_is_not_there_is_told_in_a_sentence(folder, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NotUploadedError, match="was not uploaded"):
        upload(folder, "me/model")


def test_what_cannot_be_uploaded_is_refused_before_without_asking_the_hub(hub, monkeypatch, tmp_path):
    check_upload("me/model")
    for name in ("a/b/c", "me/mo del", "me/--"):
        with pytest.raises(InputError, match="names no repository"):
            check_upload(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        check_upload("me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match="run `hf auth login`"):
        check_upload("me/model")
    assert not hub.requests
