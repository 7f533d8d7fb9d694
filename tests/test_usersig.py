"""UserSig and the signature of callbacks, against what Tencent's own code makes."""

from __future__ import annotations

import pytest
from conftest import APPID

import usersig
from simulator import KEY, check_user_sig


def test_usersig_agrees_with_tencents_library():
    sig = usersig.gen_user_sig(APPID, KEY, "xiaojun", 15552000, now=1700000000)
    fields = check_user_sig(KEY, sig, now=1700000000)
    assert fields == {
        "TLS.ver": "2.0",
        "TLS.identifier": "xiaojun",
        "TLS.sdkappid": APPID,
        "TLS.expire": 15552000,
        "TLS.time": 1700000000,
        "TLS.sig": "LvA7d/Iw7gSsnskvVzBDPOCCDbuNCw4GHwTC0bip+B4=",
    }


def test_callback_signature_agrees_with_tencents_example():
    # https://www.tencentcloud.com/document/product/1047/34354
    sign = "17773bc39a671d7b9aa835458704d2a6db81360a5940292b587d6d760d484061"
    assert usersig.sign_callback("xxxxyyyy", "1669872112") == sign
    usersig.check_callback(["xxxxyyyy"], sign, "1669872112", now=1669872112)
    usersig.check_callback(["new", "xxxxyyyy"], sign.upper(), "1669872112", 1669872171)


@pytest.mark.parametrize(
    "request_time", ["1669872051", "1669872173", "", "x", "１", "-1"]
)
def test_a_stale_or_strange_request_time_is_refused(request_time):
    sign = usersig.sign_callback("token", request_time)
    with pytest.raises(usersig.BadSignature):
        usersig.check_callback(["token"], sign, request_time, now=1669872112)
