"""Whose pictures an AI service may be asked to fetch."""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import urlsplit

# Names that networks give to their own machines.
PRIVATE = ".local .localhost .localdomain .internal .intranet .lan .home.arpa".split()


def is_public(url: str) -> bool:
    """Return whether a URL is a picture's on the web: HTTPS, a name in public, the
    usual port, no credentials.

    Names are judged as browsers and resolvers read them: in NFKC, with any of IDNA's
    dots (https://www.unicode.org/reports/tr46/).
    """
    try:
        parts = urlsplit(url)
        plain = parts.port in (None, 443) and "@" not in parts.netloc
    except ValueError:
        return False
    if parts.scheme != "https" or not plain or re.search(r"[\s\\\0-\x1f]", url):
        return False
    name = unicodedata.normalize("NFKC", parts.hostname or "").casefold()
    name = name.replace("\u3002", ".").removesuffix(".")
    # No IP address: those end in a number, decimal, octal or hexadecimal.
    labels = r"(?:[^\W_](?:[\w-]*[^\W_])?\.)+[^\W\d_][\w-]*"
    return bool(re.fullmatch(labels, name)) and not name.endswith(tuple(PRIVATE))
