"""The READMEs and docs/: settings are complete, code works and is the same in both."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from dataclasses import fields

import cli
import pytest
from conftest import HERE, poll
from test_options import OPTIONS
from test_providers import ASKED

from imbot.settings import Settings
from providers import PROVIDERS
from simulator import BotProcess
from simulator.ai import sse

READMES = [HERE / "README.md", HERE / "README.zh-CN.md"]
SETTINGS = [HERE / "docs/settings.md", HERE / "docs/settings.zh-CN.md"]
OPERATIONS = [HERE / "docs/operations.md", HERE / "docs/operations.zh-CN.md"]
PLATFORMS = [HERE / "docs/services.md", HERE / "docs/services.zh-CN.md"]
PAGES = [*READMES, *SETTINGS, *OPERATIONS, *PLATFORMS]
SHIPPED = {*ASKED, "minimax-completion", "openai-compatible", "echo", "dify", "adp"}
OPTIONAL = [f"{name}.py" for name in OPTIONS]


def name(page):
    return page.name


def blocks(page, language):
    """Return the code blocks of a page in a language."""
    pattern = rf"^ *```{language}\n(.*?)^ *```$"
    return re.findall(pattern, page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def settings(page):
    """Return the names of settings in the first column of a page's tables."""
    rows = re.findall(r"^\| (`[A-Z].*?) \|", page.read_text("utf-8"), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([A-Z_]+)…?`", row)}


@pytest.fixture
def copy(tmp_path):
    """A copy of what is deployed."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in [*HERE.glob("*.py"), HERE / "Procfile"]:
        if file.name != "test_botserver.py":
            shutil.copy(file, folder)
    return folder


@pytest.fixture
def start(sim, copy, tmp_path):
    """Return a function that starts the bot of the copy."""
    bots = []

    def start(**settings):
        bot = BotProcess(sim, str(tmp_path), **settings)
        bot.folder = copy
        bots.append(bot)
        return bot.start()

    yield start
    for bot in bots:
        if bot.alive():
            bot.stop()


@pytest.mark.parametrize("page", SETTINGS, ids=name)
def test_every_setting_is_documented_and_no_other(page):
    known = {item.name.upper() for item in fields(Settings)}
    assert settings(page) == known - {"AI_SECRET_KEYS"} | {"AI_SECRET_KEY_"}
    defaults = {
        item.name.upper(): str(item.default)
        for item in fields(Settings)
        if isinstance(item.default, int | float | str) and str(item.default)
    }
    for row in page.read_text("utf-8").splitlines():
        if match := re.match(r"\| `([A-Z_]+)` \| `?([^`|]+?)`? \|", row):
            setting, default = match.groups()
            if setting in defaults and re.fullmatch(r"[a-z0-9.:/_]+", default):
                assert as_value(default) == as_value(defaults[setting]), setting


def as_value(text):
    try:
        return float({"False": "0"}.get(text, text))
    except ValueError:
        return text


@pytest.mark.parametrize("page", SETTINGS, ids=name)
def test_every_service_is_documented(page):
    [row] = re.findall(r"^\| `AI_PROVIDER` .*", page.read_text("utf-8"), re.MULTILINE)
    named = {*re.findall(r"`([a-z-]+)`", row)}
    assert SHIPPED <= named <= {*PROVIDERS}  # which a fork may have more of


@pytest.mark.parametrize("page", SETTINGS, ids=name)
def test_the_example_of_a_robots_toml_works(page, tmp_path):
    [toml] = blocks(page, "toml")
    tmp_path.joinpath("robots.toml").write_text(toml)
    env = {"IM_SDKAPPID": "1", "IM_KEY": "k", "ALLOW_UNSIGNED": "1"}
    env |= {"AI_SECRET_KEY": "k", "ROBOTS": str(tmp_path / "robots.toml")}
    config = Settings.from_env(env | {"SUPPORT_APP_KEY": "app-1"})
    assert config.robots["@RBT#002"].provider == "ollama"
    assert config.provider(config.robots["@RBT#003"]).key == "app-1"


@pytest.mark.parametrize("readme", READMES, ids=name)
def test_a_readme_is_short_and_its_settings_are_there(readme):
    assert len(readme.read_text("utf-8").splitlines()) < 200
    assert settings(readme) <= settings(SETTINGS[0])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_within_the_project_lead_somewhere(page):
    text = page.read_text("utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert links and not [link for link in links if not (page.parent / link).exists()]
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", text).lower() for text in headings}
    wanted = re.findall(r"\]\(#([^)]+)", text)
    assert {*wanted} <= {anchor.replace(" ", "-") for anchor in anchors}


@pytest.mark.parametrize("page", OPERATIONS, ids=name)
def test_every_command_is_documented(page):
    named = re.findall(r"`([a-z-]+)[^`]*`", page.read_text("utf-8"))
    assert {command.name for command in cli.COMMANDS} <= {*named}


@pytest.mark.parametrize("page", OPERATIONS, ids=name)
def test_systemd_and_a_shell_read_the_same_from_the_example_of_settings(page, tmp_path):
    [lines] = [text for text in blocks(page, "sh") if text.startswith("IM_SDKAPPID")]
    env, lines = {}, lines.replace("…", "x")
    for line in lines.splitlines():
        found = re.fullmatch(r"([A-Z_]+)=(?:([\w.,:/@-]+)|'([^'\\]+)')", line, re.ASCII)
        env[found[1]] = found[2] or found[3]
    file = tmp_path / "botserver.env"
    file.write_text(lines)
    command = ["sh", "-c", f"set -a; . {file}; env"]
    read = subprocess.run(command, capture_output=True, text=True, env={}).stdout
    assert {f"{name}={value}" for name, value in env.items()} <= {*read.splitlines()}
    config = Settings.from_env(env)
    assert config.ai_extra_body == {"temperature": 0.5}
    assert config.ai_system_prompt == 'You are a pirate. Say "Ahoy" first.'


def test_both_languages_hold_the_same_code():
    for english, chinese in (READMES, SETTINGS, OPERATIONS, PLATFORMS):
        for language in ("python", "sh", "ini", "nginx", "toml"):
            pairs = [map(uncommented, blocks(p, language)) for p in (english, chinese)]
            assert [*pairs[0]] == [*pairs[1]]


def uncommented(code):
    return re.sub(r"(^|\s+)# .*", r"\1", code, flags=re.MULTILINE).replace(
        "your.domain", "你的域名"
    )


def test_gunicorn_is_started_everywhere_as_in_the_procfile():
    files = [HERE / name for name in ("Procfile", "Dockerfile", "botserver.py")]
    text = "\n".join(p.read_text("utf-8") for p in [*files, *READMES, *OPERATIONS])
    commands = re.findall(r"\bgunicorn\b.*create_app.*", re.sub("[\"',]", "", text))
    assert len(commands) == 7
    assert {command.strip("]") for command in commands} == {
        "gunicorn botserver:create_app()"
    }


def test_a_reload_takes_new_code(copy, start):
    bot = start(WEB_CONCURRENCY=2)
    code = copy / "botserver.py"
    code.write_text(
        re.sub('__version__ = ".*"', '__version__ = "new"', code.read_text())
    )
    bot.process.send_signal(signal.SIGHUP)
    poll(lambda: bot.log.read_text().count("version new, store sqlite") == 2)


@pytest.mark.parametrize("readme", READMES, ids=name)
def test_the_examples_of_the_readme_work(readme, sim, copy, start):
    for block in blocks(readme, "python"):
        make_changes(copy, block)
    bot = start(AI_PROVIDER="mine", REPLY_MODE="signed")
    sim.say("jared", "@RBT#001", "hello")
    [answer] = sim.wait(1)
    assert answer.text.startswith("You said: hello")
    assert answer.text.endswith("\n\n— written by an AI")
    asked = sim.ai_requests[-1]
    assert (asked["model"], asked["temperature"]) == ("my-model", 0.5)
    sim.say("jared", "@RBT#001", "/dice")
    sim.say_in_group("lin", "@TGS#demo", "/dice", ["@RBT#001"])
    sim.say_in_group("lin", "@TGS#demo", "骰子", ["@RBT#001"])
    dice = sorted(message.text for message in sim.wait(4)[1:])
    for text, mention in zip(dice, ["@lin ", "@lin ", ""], strict=True):
        assert re.match(rf"{mention}🎲 [1-6]\n", text)
    assert len(sim.ai_requests) == 1
    poll(lambda: bot.log.read_text().count("\nanswered @RBT#001") == 4)


@pytest.mark.parametrize("page", PLATFORMS, ids=name)
def test_the_example_of_a_service_that_remembers_works(page, sim, copy, start):
    [block] = blocks(page, "python")
    make_changes(copy, block)
    asked = []

    def answer(headers, body):
        asked.append(body)
        said = {"thread": 7, "text": f"heard {body['say']}", "finished": True}
        return 200, said if len(asked) == 1 else iter([sse(said)])

    sim.services["/v1/talk"] = answer
    start(AI_PROVIDER="talk")
    for number, text in enumerate(["one", "two", "/clear", "three"], 1):
        sim.say("jared", "@RBT#001", text)
        sim.wait(number)
    texts = [message.text for message in sim.delivered]
    assert [texts[n] for n in (0, 1, 3)] == ["heard one", "heard two", "heard three"]
    assert [body["thread"] for body in asked] == [None, 7, None]


def make_changes(folder, block):
    """Do to the files of a folder what the comments of an example say."""
    for comment, code in re.findall(r"^# (.*)\n((?:(?!# ).*\n)+)", block, re.MULTILINE):
        path = folder / re.search(r"\w+\.py", comment)[0]
        text = path.read_text("utf-8") if path.exists() else ""
        registry = re.search(r"\b[A-Z]{3,}\b", comment, re.ASCII)
        head = registry and re.search(rf"^{registry[0]}\b.* = .*\n", text, re.M)
        if not registry:
            text += code
        elif not code.startswith('"'):
            text = text[: head.start()] + code + text[head.start() :]
        elif old := re.search(rf"^ +{code.split(':')[0]}: .*\n", text, re.MULTILINE):
            text = text.replace(old[0], code)
        else:
            text = text[: head.end()] + code + text[head.end() :]
        path.write_text(text, "utf-8")


def test_the_options_can_be_deleted_with_their_lines(sim, copy, start):
    for option in OPTIONAL:
        copy.joinpath(option).unlink()
        line = rf'^ .*"{option.removesuffix(".py")}:\w+",\n'
        for file in (copy / "config.py", copy / "store.py"):
            file.write_text(re.sub(line, "", file.read_text(), flags=re.MULTILINE))
    for readme in READMES:
        text = readme.read_text("utf-8")
        optional = re.findall(r"^\| (`.*`) \| \*", text, re.MULTILINE)
        named = re.findall(r"`(\w+\.py)`", " ".join(optional))
        assert sorted(named) == sorted(OPTIONAL)
    start()
    sim.say("jared", "@RBT#001", "hello")
    assert sim.wait(1)[0].text.startswith("You said: hello")
