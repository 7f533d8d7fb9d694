"""Signatures of Tencent IM: the UserSig of REST calls and the Sign of callbacks.

Each is made by one function and checked by its twin. A check returns what it checked
or raises BadSignature; nothing here reads the environment or logs. A UserSig is not a
JWT: it is compressed JSON with an HMAC inside (TLSSigAPIv2).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
import zlib
from collections.abc import Iterable
from typing import Any

CALLBACK_WINDOW = 60  # seconds a callback's RequestTime may lie off our clock
_LARGEST_USERSIG = 4096  # characters; a real one has a few hundred
_TO_TENCENT = str.maketrans("+/=", "*-_")
_FROM_TENCENT = str.maketrans("*-_", "+/=")


class BadSignature(Exception):
    """A signature that must not be trusted; `code` is Tencent's error code for it."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def gen_user_sig(
    sdkappid: int, key: str, userid: str, expire: int = 86400, now: float | None = None
) -> str:
    """Return a UserSig that lets `userid` speak to Tencent IM for `expire` seconds.

    The key is used as text, though it looks like hexadecimal digits.
    https://www.tencentcloud.com/document/product/1047/34385
    """
    issued = int(time.time() if now is None else now)
    fields = {
        "TLS.ver": "2.0",
        "TLS.identifier": userid,
        "TLS.sdkappid": sdkappid,
        "TLS.expire": expire,
        "TLS.time": issued,
        "TLS.sig": _hmac(key, userid, sdkappid, issued, expire),
    }
    packed = zlib.compress(json.dumps(fields).encode())
    return base64.b64encode(packed).decode().translate(_TO_TENCENT)


def check_user_sig(key: str, user_sig: str, now: float | None = None) -> dict[str, Any]:
    """Return the fields of a UserSig; raise BadSignature (70003, 70009, 70001)."""
    fields = _unpack(user_sig)
    try:
        userid, appid = str(fields["TLS.identifier"]), int(fields["TLS.sdkappid"])
        issued, expire = int(fields["TLS.time"]), int(fields["TLS.expire"])
        given = str(fields["TLS.sig"])
    except (KeyError, TypeError, ValueError):
        raise BadSignature(70003, "the UserSig lacks a field") from None
    if not _equal(_hmac(key, userid, appid, issued, expire), given):
        raise BadSignature(70009, "the UserSig was not made with this app's key")
    if (time.time() if now is None else now) > issued + expire:
        raise BadSignature(70001, "the UserSig has expired")
    return fields


def sign_callback(token: str, request_time: str) -> str:
    """Return the Sign that Tencent adds to a callback's URL.

    It covers the time alone, not the body.
    https://www.tencentcloud.com/document/product/1047/34354
    """
    return hashlib.sha256(f"{token}{request_time}".encode()).hexdigest()


def check_callback(
    tokens: Iterable[str], sign: str, request_time: str, now: float | None = None
) -> None:
    """Raise BadSignature unless one of `tokens` made `sign` in the last minute.

    Several tokens let an operator change the token without losing a callback.
    https://www.tencentcloud.com/document/product/1047/34354
    """
    matches = [
        _equal(sign_callback(token, request_time), sign.lower()) for token in tokens
    ]
    if not any(matches):
        raise BadSignature(
            403, "Sign is wrong: IM_CALLBACK_TOKEN and the console must agree"
        )
    if not (
        request_time.isascii() and request_time.isdigit() and len(request_time) < 16
    ):
        raise BadSignature(403, "RequestTime is not a number of seconds")
    if abs((time.time() if now is None else now) - int(request_time)) > CALLBACK_WINDOW:
        raise BadSignature(403, "RequestTime is too far from this server's clock")


def _hmac(key: str, userid: str, sdkappid: int, issued: int, expire: int) -> str:
    text = (
        f"TLS.identifier:{userid}\nTLS.sdkappid:{sdkappid}\n"
        f"TLS.time:{issued}\nTLS.expire:{expire}\n"
    )
    return base64.b64encode(hmac.digest(key.encode(), text.encode(), "sha256")).decode()


def _unpack(user_sig: str) -> dict[str, Any]:
    try:
        packed = base64.b64decode(
            user_sig[:_LARGEST_USERSIG].translate(_FROM_TENCENT), validate=True
        )
        fields = json.loads(zlib.decompressobj().decompress(packed, _LARGEST_USERSIG))
    except (ValueError, RecursionError, zlib.error):
        raise BadSignature(70003, "the UserSig is malformed or cut short") from None
    if not isinstance(fields, dict):
        raise BadSignature(70003, "the UserSig does not hold an object")
    return fields


def _equal(ours: str, theirs: str) -> bool:
    return hmac.compare_digest(ours.encode(), theirs.encode("utf-8", "replace"))
