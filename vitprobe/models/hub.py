"""The model hub: asked when it answers, its cache when it does not, its errors in one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

HUB_PATIENCE_S = 3.0


@contextmanager
def hub() -> Iterator[None]:
    """Within it, a hub that does not answer fails at once; a cached file is used all the same.

    The hub's client retries for most of a minute. A quick look decides whether to let it try: if
    nobody answers, it is told that it is offline, which makes it look into its cache only.
    """
    from huggingface_hub import constants

    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    offline = constants.HF_HUB_OFFLINE
    hub_log.setLevel(logging.ERROR)
    try:
        if not offline and not _hub_answers(constants.ENDPOINT):
            constants.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        hub_log.setLevel(level)


@cache
def _hub_answers(endpoint: str) -> bool:
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    try:
        # urllib honours the usual proxy settings, as the hub's client does.
        with urlopen(Request(endpoint, method="HEAD"), timeout=HUB_PATIENCE_S):
            return True
    except HTTPError:
        return True
    except (URLError, OSError, ValueError):
        return False
