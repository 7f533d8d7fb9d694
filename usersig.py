"""Signatures of Tencent IM: the UserSig of REST calls and the Sign of callbacks.

A UserSig is not a JWT: it is compressed JSON with an HMAC inside (TLSSigAPIv2). Nothing
here reads the environment or logs.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import time
import zlib
from collections.abc import Iterable

CALLBACK_WINDOW = 60  # seconds a callback's RequestTime may lie off our clock
_TO_TENCENT = str.maketrans("+/=", "*-_")


class BadSignature(Exception):
    """A signature that must not be trusted, with the reason."""


def gen_user_sig(
    sdkappid: int, key: str, userid: str, expire: int = 86400, now: float | None = None
) -> str:
    """Return a UserSig that lets `userid` speak to Tencent IM for `expire` seconds.

    The key is used as text, though it looks like hexadecimal digits.
    https://www.tencentcloud.com/document/product/1047/34385
    """
    issued = int(time.time() if now is None else now)
    text = (
        f"TLS.identifier:{userid}\nTLS.sdkappid:{sdkappid}\n"
        f"TLS.time:{issued}\nTLS.expire:{expire}\n"
    )
    digest = hmac.digest(key.encode(), text.encode(), "sha256")
    fields = {
        "TLS.ver": "2.0",
        "TLS.identifier": userid,
        "TLS.sdkappid": sdkappid,
        "TLS.expire": expire,
        "TLS.time": issued,
        "TLS.sig": base64.b64encode(digest).decode(),
    }
    packed = zlib.compress(json.dumps(fields).encode())
    return base64.b64encode(packed).decode().translate(_TO_TENCENT)


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
    theirs = sign.lower().encode("utf-8", "replace")
    ours = [sign_callback(token, request_time).encode() for token in tokens]
    if not any([hmac.compare_digest(theirs, sign) for sign in ours]):
        raise BadSignature(
            "Sign is wrong: IM_CALLBACK_TOKEN and the console must agree"
        )
    if not re.fullmatch("[0-9]{1,15}", request_time):
        raise BadSignature("RequestTime is not a number of seconds")
    if abs((time.time() if now is None else now) - int(request_time)) > CALLBACK_WINDOW:
        raise BadSignature("RequestTime is too far from this server's clock")
