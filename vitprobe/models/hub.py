"""The model hub: asked when it answers, its cache when it does not, its errors in one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# A slow hub takes seconds for an answer and works; one that takes longer would take minutes.
PATIENCE_S = 10.0
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


@contextmanager
def hub() -> Iterator[None]:
    """Within it, a hub that does not answer fails at once; a cached file is used all the same.

    The hub's client retries for most of a minute. A quick look decides whether to let it try: if
    nobody answers, it is told that it is offline, which makes it look into its cache only. Each
    time anew: a connection may be back, or gone, within one Python session.
    """
    from huggingface_hub import constants

    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    offline = constants.HF_HUB_OFFLINE
    hub_log.setLevel(logging.ERROR)
    try:
        if not offline and not _answers(constants.ENDPOINT):
            constants.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        hub_log.setLevel(level)


def what_it_said(error: BaseException, name: str) -> str:
    """What went wrong between here and the hub, and what to do, in one sentence.

    Args:
        error: of timm or of the hub's client; what it says stands in the errors that led to it.
        name: of the repository or model.
    """
    chain = list(_chain(error))
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
    if kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "URLError", "ConnectError",
                "ConnectionError", "ConnectTimeout"}:  # fmt: skip
        return (
            f"The weights of {name} are not in the local cache, and the model hub cannot be "
            f"reached."
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


def _answers(endpoint: str) -> bool:
    from huggingface_hub.utils import get_session

    try:
        # The client's own session: its proxies and certificates are what will be used.
        get_session().head(endpoint, timeout=PATIENCE_S)
    except Exception:
        # Clients of several libraries raise each their own.
        return False
    return True
