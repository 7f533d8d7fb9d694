"""Each paste of README's "Change it" works in a copy of the app, one-to-one and in a
group, and is the same in both languages but for its words."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import responses

from imbot import commands
from simulator.fixtures import APPID, FAST, TOKEN, Caller, idle, poll

HERE = Path(__file__).parent.parent
READMES = ["README.md", "README.zh-CN.md"]
LONGEST = 8  # lines of a paste
PLACES = {  # what the first line of a paste names -> the line above its place
    "Settings": '    """Every setting. Add yours',
    "at the end": "",
    "compose": "        # Your own answers go here.",
    "answer": "            delivery.finish(answer)",
    "create_app": '    app.config["MAX_CONTENT_LENGTH"]',
    "before create_app": '    "stream": StreamReply,\n}',
    "PROVIDERS": "PROVIDERS = {",
}
CHINESE = {
    "Settings 里": "Settings",
    "文件末尾": "at the end",
    "compose 里": "compose",
    "answer 里": "answer",
    "create_app 里": "create_app",
    "create_app 前面": "before create_app",
    "PROVIDERS 里": "PROVIDERS",
}


def read_pastes(readme: str) -> dict[str, tuple[str, str]]:
    """Return (place, code) of each paste by a word of its code."""
    text = HERE.joinpath(readme).read_text("utf-8")
    [block] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    pastes = re.split(r"^# ", block, flags=re.MULTILINE)[1:]
    found = {}
    for paste in pastes:
        head, _, code = paste.partition("\n")
        assert len(code.splitlines()) <= LONGEST, head
        [word] = [word for word in WORDS if word in code]
        found[word] = (place_of(head), code)
    return found


def place_of(head: str) -> str:
    names = {name: name for name in PLACES} | CHINESE
    return names[max((n for n in names if n in re.split("[:：,，]", head)[0]), key=len)]


WORDS = [
    "open_from: int",
    "def dice",
    "datetime.now",
    "人工",
    "TIMImageElem",
    "answers.csv",
    "/hello",
    "SignedReply",
    '"mine"',
]


@pytest.fixture(params=READMES)
def paste(request, tmp_path, monkeypatch):
    """Return a function that pastes into a copy of the app and imports it."""
    pastes = read_pastes(request.param)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "COMMANDS", {})

    def make(*words: str) -> ModuleType:
        texts = {
            n: HERE.joinpath(n).read_text() for n in ("botserver.py", "providers.py")
        }
        for word in words:
            place, code = pastes[word]
            name = "providers.py" if place == "PROVIDERS" else "botserver.py"
            texts[name] = put(texts[name], PLACES[place], code)
        for name, text in texts.items():
            Path(name).write_text(text)
        for name in texts:
            monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        spec = importlib.util.spec_from_file_location("botserver", "botserver.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "botserver", module)
        spec.loader.exec_module(module)
        return module

    return make


def put(text: str, above: str, code: str) -> str:
    """Return a file with code below a line, indented as it is; imports at the top."""
    lines = code.splitlines()
    imports = [line for line in lines if re.match("import |from ", line)]
    rest = [line for line in lines if line not in imports]
    text = text.replace("import sys\n", "\n".join(["import sys", *imports, ""]), 1)
    if not above:
        main = text.index("if __name__")
        return "\n".join([text[:main], *rest, text[main:]])
    [line] = [row for row in text.splitlines() if row.startswith(above.split("\n")[0])]
    end = text.index(above.split("\n")[-1], text.index(line)) if "\n" in above else 0
    end = text.index("\n", end or text.index(line)) + 1
    indent = " " * (len(line) - len(line.lstrip())) if "\n" not in above else ""
    indent = "    " if above == PLACES["PROVIDERS"] else indent
    return text[:end] + "".join(f"{indent}{row}\n" for row in rest) + text[end:]


@pytest.fixture
def start(sim, tmp_path):
    """Return a function that starts an app of a copy, and a caller of it."""
    bots = []

    def make(module: ModuleType, **settings) -> Caller:
        defaults = {
            "im_sdkappid": APPID,
            "im_key": sim.key,
            "im_callback_token": (TOKEN,),
            "im_api_url": sim.url,
            "ai_secret_key": sim.ai_key,
            "ai_base_url": f"{sim.url}/v1",
            "database_url": f"sqlite:///{tmp_path}/bot.db",
        }
        app = module.create_app(module.Settings(**defaults | settings), FAST)
        bots.append(app.extensions["bot"])
        return Caller(sim, app.test_client())

    yield make
    for bot in bots:
        bot.close(drain=5)


def say_everywhere(im: Caller, text: str):
    """Say a text one-to-one, then in a group; return the two answers."""
    im.say(text)
    im.sim.wait(1)
    im.post(im.sim.say_in_group("lin", "@TGS#demo", text, ["@RBT#001"]))
    answers = im.sim.wait(2)
    poll(lambda: idle(im))
    return answers


def test_both_readmes_have_the_same_pastes():
    english, chinese = map(read_pastes, READMES)
    assert english.keys() == chinese.keys() == {*WORDS}
    for word in WORDS:
        assert english[word][0] == chinese[word][0]


@pytest.mark.parametrize("hours", [(0, 24), (9, 9)])
def test_an_answer_without_the_ai(paste, start, hours, monkeypatch):
    module = paste("open_from: int", "datetime.now")

    class Clock:
        @staticmethod
        def now(zone):
            return type("Now", (), {"hour": 12 if hours[1] == 24 else 3})

    module.datetime = Clock
    answers = say_everywhere(start(module), "hello")
    closed = hours[1] != 24
    assert all(("18" in answer.text) == closed for answer in answers)
    asked = start(module).sim.ai_requests
    assert len(asked) == (0 if closed else 2)


def test_at_night_commands_work_and_recalled_questions_are_left(paste, start, sim):
    module = paste("open_from: int", "datetime.now")

    class Clock:
        @staticmethod
        def now(zone):
            return type("Now", (), {"hour": 3})

    module.datetime = Clock
    im = start(module)
    say_everywhere(im, "/help")
    assert all("/clear" in answer.text for answer in sim.delivered)


def test_a_setting_of_its_own(paste, monkeypatch):
    module = paste("open_from: int")
    env = {"IM_SDKAPPID": "1", "IM_KEY": "k", "ALLOW_UNSIGNED": "1", "OPEN_FROM": "7"}
    read = module.Settings.from_env
    about = module.PROVIDERS, module.REPLIES
    assert read(*about, {**env, "AI_SECRET_KEY": "k"}).open_from == 7
    with pytest.raises(module.imbot.settings.SettingsError, match="OPEN_FROM must be"):
        read(*about, {**env, "OPEN_FROM": "noon"})


def test_a_command(paste, start):
    for answer in say_everywhere(start(paste("def dice")), "/dice"):
        assert re.search("🎲 [1-6]$", answer.text)


def test_a_human_takes_over_once(paste, start, sim):
    faults = [20004] * 4  # the answer is sent again by another claim
    sim.fault = lambda command, body: faults.pop() if faults else None
    with responses.RequestsMock(assert_all_requests_are_fired=False) as web:
        web.add_passthru("http://127.0.0.1")
        hook = web.post("https://example.com/human")
        im = start(paste("人工"))
        im.say("I want a human")
        [answer] = sim.wait(1)
        im.post(sim.say_in_group("lin", "@TGS#demo", "人工客服", ["@RBT#001"]))
        sim.wait(2)
    assert not faults and not sim.ai_requests
    assert hook.call_count == 2
    assert json.loads(hook.calls[0].request.body)["text"] == "I want a human"


def test_a_picture_as_the_answer(paste, start):
    for answer in say_everywhere(start(paste("TIMImageElem")), "logo"):
        [element] = answer.body["MsgBody"]
        assert element["MsgType"] == "TIMImageElem"


def test_what_was_sent_is_recorded(paste, start):
    say_everywhere(start(paste("answers.csv")), "hello")
    text = poll(lambda: (t := Path("answers.csv").read_text()).count("\n") == 2 and t)
    rows = [*csv.reader(text.splitlines())]
    assert [row[1:3] for row in rows] == [["@RBT#001", ""], ["@RBT#001", "@TGS#demo"]]
    assert [row[3:5] for row in rows] == [["jared", "hello"], ["lin", "hello"]]
    assert all(row[0].isdigit() and "You said" in row[5] for row in rows)


def test_a_route(paste, start):
    assert start(paste("/hello")).client.get("/hello").status_code == 200


def test_another_way_to_show_an_answer(paste, start):
    im = start(paste("SignedReply"), reply_mode="signed")
    for answer in say_everywhere(im, "hello"):
        assert re.search("\n\n—+ .*(robot|机器人)", answer.text)


def test_another_ai_service(paste, start, sim):
    im = start(paste('"mine"'), ai_provider="mine")
    say_everywhere(im, "hello")
    assert {asked["model"] for asked in sim.ai_requests} == {"my-model"}
