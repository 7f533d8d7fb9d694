"""HTTP calls over connections that any number of threads share.

`requests` for a server: a `requests.Session` prepares every call anew from all that it
remembers, which costs nearly as much as the call. Here nothing is remembered but the
open connections: no cookies and no redirects. ~/.netrc and a password in an address are
not used: they would replace a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import InvalidURL
from requests.structures import CaseInsensitiveDict
from requests.utils import default_user_agent
from urllib3.exceptions import HTTPError

HEADERS = {
    "User-Agent": default_user_agent(),
    "Accept": "*/*",
    "Content-Type": "application/json",
}


class Wire:
    """The connections to one address, of which `threads` are kept open.

    What the environment says of proxies and CA bundle holds for as long as they do.
    """

    def __init__(
        self, url: str, threads: int = 64, adapter: type[HTTPAdapter] = HTTPAdapter
    ) -> None:
        self._adapter = adapter(pool_maxsize=threads)
        settings: Any = {"proxies": {}, "verify": True}
        with suppress(ValueError):  # a broken address is told of when it is called
            session = requests.Session()
            settings = session.merge_environment_settings(url, {}, None, None, None)
        self._proxies, self._verify = settings["proxies"], settings["verify"]

    def post(
        self,
        url: str,
        data: bytes,
        headers: Mapping[str, str],
        timeout: tuple[float, float],
        stream: bool = False,
    ) -> requests.Response:
        """Send JSON and return the response; its body is read unless `stream`.

        `timeout` has the seconds to connect, and between two bytes of the answer.
        Raises requests.RequestException.
        """
        request = requests.PreparedRequest()
        request.method, request.url, request.body = "POST", url, data
        length = {"Content-Length": str(len(data))}
        request.headers = CaseInsensitiveDict({**HEADERS, **headers, **length})
        given = stream, timeout, self._verify, None, self._proxies
        try:
            response = self._adapter.send(request, *given)
        except requests.RequestException:
            raise
        except (HTTPError, ValueError) as error:  # of an address that cannot be
            raise InvalidURL(type(error).__name__) from None
        if not stream:
            response.content  # noqa: B018
        return response
