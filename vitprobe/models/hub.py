"""The model hub: asked when it answers, its cache when it does not, its errors in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

# A slow hub takes seconds for an answer and works; one that takes longer would take minutes.
PATIENCE_S, CLIENT_PATIENCE_S = 8.0, 10
# The same request goes without an answer, or without a byte more, this often; an error of the
# hub's machines this often: the first question is whether a cached file is still right.
SILENCES, ERRORS = 2, 3
TOO_MANY = 429
# Codes of answers -> what they mean and what to do.
ANSWERS = {
    401: "has no repository {name}, or it is private (401): check the name, or `hf auth login`",
    403: "says that access to {name} is restricted (403): ask for it on the repository's page, "
    "and `hf auth login`",
    404: "has no {name} (404): check the name and the revision; what is private needs "
    "`hf auth login`",
    429: "asks to wait (429, too many requests): try again in a while, or `hf auth login` for a "
    "larger share",
}


class Stalled(OSError):
    """The hub has stopped answering in the middle of a download."""


@contextmanager
def hub() -> Iterator[None]:
    """Within it, a hub that does not answer fails at once; a cached file is used all the same.

    The hub's client retries for most of a minute. A quick look decides whether to let it try: if
    nobody answers, it is told that it is offline, which makes it look into its cache only. Each
    time anew: a connection may be back, or gone, within one Python session.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    offline = constants.HF_HUB_OFFLINE
    logging.set_verbosity_error()
    try:
        if not offline and not _answers(constants.ENDPOINT):
            _set_offline(True)
        with _impatient():
            yield
    finally:
        if offline != constants.HF_HUB_OFFLINE:
            _set_offline(offline)
        logging.set_verbosity(level)


def _set_offline(offline: bool) -> None:
    from huggingface_hub import constants, utils

    constants.HF_HUB_OFFLINE = offline
    # Clients before version 1 look at it when they begin a session, and keep that one.
    reset = getattr(utils, "reset_sessions", None)
    if reset is not None:
        reset()


def what_it_said(error: BaseException, name: str) -> str:
    """What went wrong between here and the hub, and what to do, in one sentence.

    Args:
        error: of timm or of the hub's client; what it says stands in the errors that led to it.
        name: of the repository or model.
    """
    chain = list(_chain(error))
    stalled = next((one for one in chain if isinstance(one, Stalled)), None)
    if stalled is not None:
        return f"The download of {name} broke off: {stalled}. Try again later."
    for one in chain:
        code = getattr(getattr(one, "response", None), "status_code", None)
        code = code or getattr(one, "code", None)
        if not isinstance(code, int) or code < 400:
            continue
        if type(one).__name__ == "GatedRepoError":
            code = 403
        said = ANSWERS.get(code, f"answers with an error ({code}): try again later")
        return f"The model hub {said.format(name=name)}."
    kinds = {type(one).__name__ for one in chain}
    if kinds & {"JSONDecodeError", "UnicodeDecodeError"}:
        return f"The config.json of {name} on the model hub is not JSON."
    if kinds & {"EntryNotFoundError", "RemoteEntryNotFoundError"}:
        return f"The repository {name} has no file as timm writes it: {_first(error)}."
    out_of_reach = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "URLError", "ConnectError",
                    "ConnectionError", "ConnectTimeout"}  # fmt: skip
    # What has answered, and sends no more, was reached.
    if kinds & out_of_reach and "ReadTimeoutError" not in kinds:
        return (
            f"The weights of {name} are not in the local cache, and the model hub cannot be "
            f"reached{_through()}."
        )
    return f"The download of {name} broke off ({type(error).__name__}: {_first(error)})."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160].rstrip(".") if lines else type(error).__name__


@contextmanager
def _impatient() -> Iterator[None]:
    """Within it the hub's client gives up what does not get better by asking again.

    By itself it asks six times, for up to a minute each, and waits in between for as long as the
    hub says. A download that goes on, however slowly, is not given up.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session, hf_raise_for_status

    session: Any = get_session()
    # Who has set another limit than the client's own wants that one.
    set_by_user = constants.HF_HUB_DOWNLOAD_TIMEOUT not in (None, CLIENT_PATIENCE_S)
    patience = constants.HF_HUB_DOWNLOAD_TIMEOUT if set_by_user else PATIENCE_S
    if not hasattr(session, "event_hooks"):
        # Clients before version 1 have no such hooks; they take their time.
        yield
        return
    begun: Counter[tuple[str, str, str]] = Counter()
    answered: Counter[tuple[str, str, str]] = Counter()

    def key(request: Any) -> tuple[str, str, str]:
        # One that goes on from where it broke off asks for another range.
        return request.method, str(request.url), request.headers.get("Range", "")

    def ask(request: Any) -> None:
        one = key(request)
        # What has been downloaded is not asked for again: an answer to GET was no whole one.
        if begun[one] - (answered[one] if request.method == "HEAD" else 0) >= SILENCES:
            raise Stalled(
                f"{SILENCES} times the model hub ended it, or sent nothing for {patience:.0f} s"
            )
        begun[one] += 1
        limits = request.extensions.get("timeout") or {}
        for kind, seconds in limits.items():
            limits[kind] = patience if seconds is None else min(seconds, patience)

    def hear(response: Any) -> None:
        one = key(response.request)
        answered[one] += 1
        code = response.status_code
        # The client waits for as long as the hub says, which may be an hour.
        waits = "Retry-After" in response.headers or answered[one] >= ERRORS
        if code == TOO_MANY or (code >= 500 and waits):
            hf_raise_for_status(response)

    before = session.event_hooks
    session.event_hooks = {
        "request": [*before["request"], ask],
        "response": [*before["response"], hear],
    }
    try:
        yield
    finally:
        session.event_hooks = before


def _through() -> str:
    """By which proxy the hub is asked, in words, without a password in it."""
    from huggingface_hub import constants

    endpoint = urlsplit(constants.ENDPOINT)
    proxies = getproxies()
    proxy = urlsplit(proxies.get(endpoint.scheme) or proxies.get("all") or "")
    if not proxy.hostname or proxy_bypass(endpoint.hostname or ""):
        return ""
    port = f":{proxy.port}" if proxy.port else ""
    return f" through the proxy {proxy.scheme}://{proxy.hostname}{port}"


def _answers(endpoint: str) -> bool:
    from huggingface_hub.utils import get_session

    try:
        # The client's own session: its proxies and certificates are what will be used.
        get_session().head(endpoint, timeout=PATIENCE_S)
    except Exception:
        # Clients of several libraries raise each their own.
        return False
    return True
