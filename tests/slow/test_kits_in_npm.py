"""What the bot sends, as the real code of Tencent's TUIKit for Vue shows it.

The kit comes from npm into a temporary folder; kit.mjs feeds its component for a
robot's messages. The simulator's rules (simulator/kits.py) must say the same.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import STORY, Caller, idle, poll

from simulator.kits import KitChat
from simulator.messages import chatbot_data, is_finished, text_body

pytestmark = pytest.mark.slow
ROBOT = "@RBT#001"
SCRIPT = Path(__file__).with_name("kit.mjs")
TOOLS = ("vue@3", "jsdom@24", "esbuild@0.28")
# Of the kit's dependencies, those of its chatbot message.
NEEDED = ("engine", "universal-api", "marked", "highlight.js", "dompurify")
AS_OF = "--before=2026-11-30"  # newer releases of what the kit needs are not taken
QUIETLY = ("--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1")
SEND, EDIT = "openim/sendmsg", "openim/modify_c2c_msg"


def npm(folder, *words):
    """Run npm in a folder; skip the test where that does not work."""
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("node and npm are not installed")
    command = ["npm", *words, *QUIETLY]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=90)
    except subprocess.CalledProcessError as error:
        why = error.stderr.decode().partition("\n")[0]
        pytest.skip(f"npm {words[0]} failed: {why}")
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm {words[0]} took too long")


@pytest.fixture(scope="module", params=["2.5.6", "3.0.2"])
def kit(request, tmp_path_factory):
    """A folder with a version of the kit, and kit.mjs."""
    folder = tmp_path_factory.mktemp("kit")
    npm(folder, "pack", f"@tencentcloud/chat-uikit-vue@{request.param}")
    [archive] = folder.glob("*.tgz")
    shutil.unpack_archive(archive, folder, filter="data")
    needs = json.loads((folder / "package/package.json").read_text())["dependencies"]
    used = [
        f"{name}@{version}"
        for name, version in needs.items()
        if any(word in name for word in NEEDED) and not name.startswith("@types/")
    ]
    npm(folder, "install", AS_OF, *TOOLS, *used)
    shutil.copy(SCRIPT, folder)
    return folder


def shown_by(kit, events):
    """Return what the kit shows of [(flow, id, element)...], and its streaming."""
    done = subprocess.run(
        ["node", "kit.mjs"],
        cwd=kit,
        input=json.dumps(events).encode(),
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    result = json.loads(done.stdout)
    return [squeezed(text) for text in result["texts"].values()], result["streaming"]


def squeezed(text):
    """Return a text without white space, which Markdown does not keep."""
    return "".join(text.split())


def card(text, finished):
    data = {"chatbotPlugin": 2, "src": 2, "chunks": [text], "isFinished": finished}
    return {"MsgType": "TIMCustomElem", "MsgContent": {"Data": json.dumps(data)}}


def recorded(sim, refused):
    """Refuse some edits; return a list that gets the rest as ("in", id, element)."""
    events = []

    def fault(command, body):
        if command == EDIT and refused(body["MsgBody"][0]):
            return 20023
        if command in (SEND, EDIT):
            key = body.get("MsgKey") or f"{body['MsgSeq']}_{body['MsgRandom']}_"
            name = "_".join(key.split("_")[:2])
            events.extend(("in", name, element) for element in body["MsgBody"])
        return None

    sim.fault = fault
    return events


def no_edit(element):
    return False


def every_edit(element):
    return True


def the_end(element):
    return is_finished(chatbot_data(element))


LONG = f"{STORY}\n\n" * 9  # several messages
KINDS = {  # name -> (question, AI's answer, chunks until it breaks off, refused edits)
    "a question": ("hello", STORY, 0, no_edit),
    "/help": ("/help", "", 0, no_edit),
    "a long answer": ("hello", LONG, 0, no_edit),
    "an AI that breaks off": ("hello", STORY, 150, no_edit),
    "a refused edit": ("hello", STORY, 0, every_edit),
    "a refused end": ("hello", STORY, 0, the_end),
}


EVERY = [
    *(("custom", kind) for kind in KINDS),
    *(("card", kind) for kind in KINDS if KINDS[kind][3] is no_edit),
]


@pytest.mark.parametrize(("mode", "kind"), EVERY)
def test_the_kit_shows_what_the_simulator_says(kit, sim, make_app, mode, kind):
    question, answer, sim.break_after, refused = KINDS[kind]
    sim.ai_answer = lambda messages: answer
    sim.ai_pace = 0.01 if mode == "custom" else 0.0  # slow enough to be seen growing
    events = recorded(sim, refused)
    im = Caller(sim, make_app(reply_mode=mode, bot_language="en").test_client())
    rules = sim.kit_chat("vue", "jared", ROBOT)
    im.say(question)
    poll(lambda: rules.shown and idle(im), 60)
    [asked] = text_body(question)
    texts, streaming = shown_by(kit, [("out", "question", asked), *events])
    assert texts == [squeezed(text) for text in rules.shown.values()]
    assert "".join(texts).count(squeezed(answer)) == 1 or sim.break_after or not answer
    assert not streaming[-1]


CHANGES = {  # message -> what it says, one after another
    "1_1": ["The ans", "The answer", "The answer is 42."],
    "1_2": ["The answer", "Sorry, no answer came"],
    "1_3": ["The answer", "The ans", "Sorry, no answer came"],
    "1_4": ["😀😀 hi", "Sorry, nothing"],
}


def test_the_kit_appends_as_the_simulator_says(kit):
    """Also where the bot does not go: a text that does not begin as it was shown."""
    rules = KitChat("vue")
    events = [
        ("in", name, card(text, int(text == texts[-1])))
        for name, texts in CHANGES.items()
        for text in texts
    ]
    for _, name, element in events:
        rules.show(name, [element])
    texts, _ = shown_by(kit, events)
    assert texts == [squeezed(text) for text in rules.shown.values()]


def test_the_kit_sends_nothing_until_an_answer_is_finished(kit):
    [asked], [plain] = text_body("hello"), text_body("hi")
    chat = [
        ("out", "1_1", asked),
        ("in", "2_1", card("h", 0)),
        ("in", "2_1", card("hi", 1)),
        ("out", "3_1", asked),
        ("in", "4_1", plain),
    ]
    assert shown_by(kit, chat)[1] == [True, True, False, True, False]
