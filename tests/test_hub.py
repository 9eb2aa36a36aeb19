"""The model hub on a loopback server: what it says reaches the user as one line with a way on."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import timm
import torch
from huggingface_hub import constants, file_download
from huggingface_hub.utils import get_session
from safetensors.torch import load_file, save

try:  # clients before version 1 have no session of their own to close
    from huggingface_hub import close_session
except ImportError:
    from huggingface_hub.utils import reset_sessions as close_session

from vitprobe import VitprobeError, load_model
from vitprobe.models import hub as hubs

COMMIT = "c" * 40
ELSEWHERE = "http://hub.invalid"


class Hub(http.server.ThreadingHTTPServer):
    """Serves ``me/net`` from a folder; ``answer`` is a status, or what befalls a file."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.answer, self.asked = folder, 200, []
        self.weights, self.config = None, None
        self.proxied, self.stopped = 0, threading.Event()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        hub, path = self.server, self.path.partition("?")[0]
        # A proxy is asked for whole addresses.
        path = path.removeprefix(ELSEWHERE)
        hub.proxied += self.path.startswith(ELSEWHERE)
        if path == "/":
            return self.reply(200)
        hub.asked.append(f"{self.command} {path}")
        if isinstance(hub.answer, int) and hub.answer >= 400:
            codes = {404: "RepoNotFound", 401: "RepoNotFound", 403: "GatedRepo"}
            # One that is to wait for is told how long.
            headers = {"X-Error-Code": codes.get(hub.answer, "Other"), "Retry-After": "600"}
            return self.reply(hub.answer, headers)
        start, _, name = path.rpartition("/")
        file = hub.folder / name
        if not start.startswith("/me/net/resolve/") or not file.is_file():
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = file.read_bytes()
        if hub.answer == "no json" and name == "config.json":
            content = b"{torn"
        if name == "config.json" and hub.config is not None:
            content = hub.config
        if name == "model.safetensors" and hub.weights is not None:
            content = hub.weights
        digest = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
        return self.reply(200, headers, content, "model" in name and hub.answer)

    do_GET = do_HEAD

    def do_CONNECT(self):
        self.server.asked.append(f"CONNECT {self.path}")
        self.reply(502)

    def reply(self, status, headers=(), content=b"", how=200):
        torn = how in ("breaks off", "stalls")
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 3] if torn else content)
            if how == "stalls":
                self.wfile.flush()
                self.server.stopped.wait(60)
        # After an answer to HEAD it stays open: who asks next must not meet its end by chance.
        self.close_connection = self.close_connection or (torn and self.command == "GET")


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
    # Clients before version 1 keep names of their own where they make addresses.
    for module in (constants, file_download):
        monkeypatch.setattr(module, "ENDPOINT", address, raising=False)
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


WITH_ADDRESS = """
from vitprobe import VitprobeError, load_model
for spec in ("hf-hub:me/net", "hf-hub:me/gone"):
    try:
        print(load_model(spec).origin)
    except VitprobeError as error:
        print(error)
"""


def test_the_address_in_the_environment_is_asked_by_clients_of_all_versions(folder, tmp_path):
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    environment |= {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path),
                    "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}  # fmt: skip
    try:
        done = subprocess.run([sys.executable, "-c", WITH_ADDRESS], env=environment,
                              capture_output=True, text=True, timeout=300)  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    loaded, gone = done.stdout.splitlines()
    assert loaded.startswith("test_vit, weights of hf-hub:me/net (sha256 ")
    assert gone.startswith("The model hub has no me/gone (404): check the name")


@pytest.fixture
def hub(folder, monkeypatch, hub_cache):
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    at(monkeypatch, server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield server
    close_session()
    server.stopped.set()
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
        (429, r"hub asks to wait \(429, too many requests\)"),
        (500, r"hub answers with an error \(500\): try again later"),
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


def test_no_half_of_a_file_is_trusted_afterwards(hub, hub_cache):
    hub.answer = "breaks off"
    with pytest.raises(VitprobeError, match=r"download of me/net broke off"):
        load_model("hf-hub:me/net")
    assert not list(hub_cache.rglob("*.safetensors"))
    hub.answer = 200
    assert load_model("hf-hub:me/net").module.num_classes == 7


def test_a_download_that_stands_still_is_given_up(hub, monkeypatch):
    monkeypatch.setattr(hubs, "PATIENCE_S", 0.2)
    message, most = r"broke off: 2 times .* sent nothing for 0 s", 2
    if not hasattr(get_session(), "event_hooks"):
        # Clients before version 1 decide themselves for how long, and how often, they wait.
        for module in (constants, file_download):
            monkeypatch.setattr(module, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2, raising=False)
        message, most = r"download of me/net broke off .*timed out", 6
    hub.answer = "stalls"
    with pytest.raises(VitprobeError, match=message):
        load_model("hf-hub:me/net")
    assert hub.asked.count("GET /me/net/resolve/main/model.safetensors") <= most
    hub.answer = 200
    assert load_model("hf-hub:me/net").module.num_classes == 7


def test_the_client_is_left_as_it_was(hub):
    from huggingface_hub.utils import logging

    hub.answer = 500
    before = logging.get_verbosity()
    with pytest.raises(VitprobeError):
        load_model("hf-hub:me/net")
    hooks = getattr(get_session(), "event_hooks", {"response": []})
    assert len(hooks["response"]) == 0 and logging.get_verbosity() == before


def test_a_cached_file_serves_while_the_hub_fails(hub):
    first = load_model("hf-hub:me/net")
    for answer in (429, 500):
        hub.answer = answer
        assert load_model("hf-hub:me/net").weights_sha256() == first.weights_sha256()


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
def test_a_proxy_is_used_where_one_is_set(hub, monkeypatch, variable):
    at(monkeypatch, ELSEWHERE)
    monkeypatch.setenv(variable, hub.address)
    assert load_model("hf-hub:me/net").module.num_classes == 7
    assert hub.proxied > 2


def test_an_encrypted_hub_is_asked_through_the_proxy(hub, monkeypatch):
    at(monkeypatch, "https://hub.invalid")
    monkeypatch.setenv("HTTPS_PROXY", hub.address.replace("//", "//me:secret@"))
    with pytest.raises(VitprobeError, match=f"reached through the proxy {hub.address}") as caught:
        load_model("hf-hub:me/net")
    assert "CONNECT hub.invalid:443" in hub.asked and "secret" not in str(caught.value)


def test_a_proxy_out_of_reach_is_named(hub, monkeypatch):
    at(monkeypatch, ELSEWHERE)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with pytest.raises(VitprobeError, match=r"reached through the proxy http://127\.0\.0\.1:9\."):
        load_model("hf-hub:me/net")


def test_a_cached_file_serves_while_a_proxy_is_out_of_reach(hub, monkeypatch):
    first = load_model("hf-hub:me/net")
    at(monkeypatch, ELSEWHERE)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    close_session()  # one of its own as well, begun with the other proxy
    assert load_model("hf-hub:me/net").weights_sha256() == first.weights_sha256()
    assert constants.HF_HUB_OFFLINE is False


STATES = {
    "another width": (lambda s: {n: t[:1] for n, t in s.items()}, "size mismatch|do not fit"),
    "a part": (lambda s: {n: t for n, t in s.items() if "blocks.1" not in n}, "Missing|do not fit"),
    "integers": (lambda s: {n: t.to(torch.int8) for n, t in s.items()}, "not in plain numbers"),
}


@pytest.mark.parametrize("what", STATES)
@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_the_hub_fit_in_whole_or_are_an_error(hub, folder, monkeypatch, what, strict):
    """Also where timm itself loads as much of them as fits."""
    from timm.models import vision_transformer

    change, message = STATES[what]
    build = vision_transformer.build_model_with_cfg
    monkeypatch.setattr(
        vision_transformer, "build_model_with_cfg",
        lambda *given, **more: build(*given, **{**more, "pretrained_strict": strict}),
    )  # fmt: skip
    hub.weights = save({n: t.contiguous() for n, t in
                        change(load_file(folder / "model.safetensors")).items()})  # fmt: skip
    with pytest.raises(VitprobeError, match=message):
        load_model("hf-hub:me/net")


def test_a_classifier_that_the_configuration_counts_wrongly_is_an_error(hub, folder):
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] = {"num_classes": 9}
    hub.config = json.dumps(config).encode()
    with pytest.raises(VitprobeError, match=r"Missing: head\.weight, head\.bias"):
        load_model("hf-hub:me/net")


def test_a_repository_of_another_library_says_so(hub):
    hub.config = b'{"model_type": "vit"}'
    with pytest.raises(VitprobeError, match=r"names no architecture of timm.*hf download me/net"):
        load_model("hf-hub:me/net")
