"""The model hub on a loopback server: what it says reaches the user as one line with a way on."""

import hashlib
import http.server
import threading
import time
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from vitprobe import VitprobeError, load_model

COMMIT = "c" * 40


class Hub(http.server.ThreadingHTTPServer):
    """Serves ``me/net`` from a folder; ``answer`` is a status, or what befalls a file."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.answer, self.asked = folder, 200, []

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        hub, path = self.server, self.path.partition("?")[0]
        if path == "/":
            return self.reply(200)
        hub.asked.append(f"{self.command} {path}")
        if isinstance(hub.answer, int) and hub.answer >= 400:
            codes = {404: "RepoNotFound", 401: "RepoNotFound", 403: "GatedRepo"}
            return self.reply(hub.answer, {"X-Error-Code": codes.get(hub.answer, "Other")})
        start, _, name = path.rpartition("/")
        file = hub.folder / name
        if not start.startswith("/me/net/resolve/") or not file.is_file():
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = file.read_bytes()
        if hub.answer == "no json" and name == "config.json":
            content = b"{torn"
        digest = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
        return self.reply(200, headers, content, hub.answer == "breaks off" and "model" in name)

    do_GET = do_HEAD

    def reply(self, status, headers=(), content=b"", torn=False):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 3] if torn else content)
        self.close_connection = self.close_connection or torn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("repository")
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=7), path,
                            safe_serialization=True)  # fmt: skip
    return path


def at(monkeypatch, address):
    """The client's hub is at this address, as with HF_ENDPOINT in the environment."""
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(folder, monkeypatch, tmp_path):
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    at(monkeypatch, server.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def test_cold_cached_gone_and_back_within_one_session(hub, folder, monkeypatch):
    model = load_model("hf-hub:me/net")
    expected = load_file(folder / "model.safetensors")
    torch.testing.assert_close(model.module.state_dict(), expected, rtol=0, atol=0)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert model.details["file_sha256"] == digest
    assert model.name == "me/net"
    assert model.origin == f"test_vit, weights of hf-hub:me/net (sha256 {digest[:8]}…)"
    # Gone: the cache is used. What is not in it is told, and there again once the hub is back.
    at(monkeypatch, "http://127.0.0.1:9")
    assert load_model("hf-hub:me/net").weights_sha256() == model.weights_sha256()
    with pytest.raises(VitprobeError, match="the model hub cannot be reached"):
        load_model("hf-hub:me/net@v2")
    at(monkeypatch, hub.address)
    assert load_model("hf-hub:me/net@v2").name == "me/net@v2"
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (404, r"hub has no me/net \(404\): check the name .*hf auth login"),
        (401, r"no repository me/net, or it is private \(401\)"),
        (403, r"access to me/net is restricted \(403\): ask for it"),
        ("no json", r"config\.json of me/net on the model hub is not JSON"),
    ],
)
def test_what_the_hub_says_is_told_at_once_with_a_way_on(hub, answer, message):
    hub.answer = answer
    start = time.monotonic()
    with pytest.raises(VitprobeError, match=message) as caught:
        load_model("hf-hub:me/net")
    assert time.monotonic() - start < 20
    assert "\n" not in str(caught.value) and "Try ARCHITECTURE@random" in str(caught.value)


def test_no_half_of_a_file_is_trusted_afterwards(hub):
    hub.answer = "breaks off"
    with pytest.raises(VitprobeError, match=r"download of me/net broke off"):
        load_model("hf-hub:me/net")
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
    hub.answer = 200
    assert load_model("hf-hub:me/net").module.num_classes == 7
