"""The check of a UserSig, which Tencent does and the bot does not."""

from __future__ import annotations

import base64
import json
import time
import zlib
from typing import Any

from usersig import gen_user_sig

LARGEST = 4096  # characters; a real one has a few hundred
FROM_TENCENT = str.maketrans("*-_", "+/=")


class Refused(Exception):
    """A REST call that Tencent would refuse, with Tencent's code for it."""

    def __init__(self, code: int, info: str) -> None:
        super().__init__(info)
        self.code = code


def check_user_sig(key: str, user_sig: str, now: float | None = None) -> dict[str, Any]:
    """Return the fields of a UserSig; raise Refused (70003, 70009, 70001)."""
    fields = _unpack(user_sig)
    try:
        userid, appid = str(fields["TLS.identifier"]), int(fields["TLS.sdkappid"])
        issued, expire = int(fields["TLS.time"]), int(fields["TLS.expire"])
        ours = _unpack(gen_user_sig(appid, key, userid, expire, issued))
        right = ours["TLS.sig"] == fields["TLS.sig"]
    except (KeyError, TypeError, ValueError):
        raise Refused(70003, "the UserSig lacks a field") from None
    if not right:
        raise Refused(70009, "the UserSig was not made with this app's key")
    if (time.time() if now is None else now) > issued + expire:
        raise Refused(70001, "the UserSig has expired")
    return fields


def _unpack(user_sig: str) -> dict[str, Any]:
    try:
        packed = base64.b64decode(
            user_sig[:LARGEST].translate(FROM_TENCENT), validate=True
        )
        fields = json.loads(zlib.decompressobj().decompress(packed, LARGEST))
    except (ValueError, RecursionError, zlib.error):
        raise Refused(70003, "the UserSig is malformed or cut short") from None
    if not isinstance(fields, dict):
        raise Refused(70003, "the UserSig does not hold an object")
    return fields
