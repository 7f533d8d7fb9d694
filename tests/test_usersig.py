"""UserSig and the signature of callbacks, against what Tencent's own code makes."""

from __future__ import annotations

import pytest

import usersig
from conftest import APPID
from simulator import KEY


def test_usersig_agrees_with_tencents_library():
    sig = usersig.gen_user_sig(APPID, KEY, "xiaojun", 15552000, now=1700000000)
    fields = usersig.check_user_sig(KEY, sig, now=1700000000)
    assert fields == {
        "TLS.ver": "2.0",
        "TLS.identifier": "xiaojun",
        "TLS.sdkappid": APPID,
        "TLS.expire": 15552000,
        "TLS.time": 1700000000,
        "TLS.sig": "LvA7d/Iw7gSsnskvVzBDPOCCDbuNCw4GHwTC0bip+B4=",
    }


@pytest.mark.parametrize(
    "made_by_tencent",
    [
        # Python: https://github.com/tencentyun/tls-sig-api-v2-python
        "eJyrVgrxCdYrSy1SslJQMtIzUNJRAItkpqTmlWSmZUIkKjIT87NK82CSxSnZiQUFmSlAKUMTAyiA"
        "yqVWFGQWpYJkTE1NjRDiJZm5YFFzNPXFmekgG3zKHM1T9D3LzdODi-OKs8vCqpxcAvydnV2SSv2c"
        "y03cPcpDnA2SMgu0nUxslWoBHdYzUg__",
        # Node: https://github.com/tencentyun/tls-sig-api-v2-node
        "eJyrVgrxCdYrSy1SslIy0jNQ0gHzM1NS80oy0zLBwhWZiflZpXlQqeKU7MSCgswUJStDEwMogMiU"
        "ZOamKlkZmqOKplYUZBaBxE1NTY3gosWZ6UpWSj5ljuYp*p7l5unBxXnF2WVhVU4uAf7Ozi5JpX7O"
        "5SbuHuUhzgZJmQXaTia2SrUAohcx8g__",
    ],
)
def test_usersig_of_tencents_libraries_is_accepted(made_by_tencent):
    fields = usersig.check_user_sig(KEY, made_by_tencent, now=1700000000)
    assert fields["TLS.identifier"] == "xiaojun"


@pytest.mark.parametrize(
    ("sig", "now", "code"),
    [
        ("", 1700000000, 70003),
        ("eJyr", 1700000000, 70003),
        ("not base64 é", 1700000000, 70003),
        (usersig.gen_user_sig(APPID, KEY, "a", 60, 1700000000)[:80], 0, 70003),
        (usersig.gen_user_sig(APPID, "other", "a", 60, 1700000000), 1700000000, 70009),
        (usersig.gen_user_sig(APPID, KEY, "a", 60, 1700000000), 1700000061, 70001),
    ],
)
def test_a_bad_usersig_is_refused_with_tencents_code(sig, now, code):
    with pytest.raises(usersig.BadSignature) as caught:
        usersig.check_user_sig(KEY, sig, now)
    assert caught.value.code == code


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
