"""The READMEs and docs/: settings are complete, code works and is the same in both."""

from __future__ import annotations

import importlib
import json
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import fields

import pytest
from conftest import APPID, FAST, HERE, TOKEN, Caller, idle, poll, sse

from botserver import REPLIES, Settings
from imbot import cli, commands
from imbot.queue import open_store
from imbot.settings import Persona
from providers import PROVIDERS

READMES = [HERE / "README.md", HERE / "README.zh-CN.md"]
SETTINGS = [HERE / "docs/settings.md", HERE / "docs/settings.zh-CN.md"]
OPERATIONS = [HERE / "docs/operations.md", HERE / "docs/operations.zh-CN.md"]
PLATFORMS = [HERE / "docs/services.md", HERE / "docs/services.zh-CN.md"]
BENCHMARKS = [HERE / "docs/benchmark.md", HERE / "docs/benchmark.zh-CN.md"]
PAIRS = [READMES, SETTINGS, OPERATIONS, PLATFORMS, BENCHMARKS]
PAGES = [*(page for pair in PAIRS for page in pair), HERE / "CONTRIBUTING.md"]
SHIPPED = {"minimax", "openai-compatible", "echo", "dify", "adp"}  # and others


def name(page):
    return page.name


def read(env):
    """Return the settings of an environment."""
    return Settings.from_env(PROVIDERS, REPLIES, env)


def blocks(page, language):
    """Return the code blocks of a page in a language."""
    pattern = rf"^ *```{language}\n(.*?)^ *```$"
    return re.findall(pattern, page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def settings(page):
    """Return the names of settings in the first column of a page's tables."""
    rows = re.findall(r"^\| (`[A-Z].*?) \|", page.read_text("utf-8"), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([A-Z_]+)…?`", row)}


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
    assert SHIPPED <= named <= {*PROVIDERS}  # a fork may have more
    assert len(named) > 12


@pytest.mark.parametrize("page", SETTINGS, ids=name)
def test_the_example_of_a_robots_toml_works(page, tmp_path):
    [toml] = blocks(page, "toml")
    tmp_path.joinpath("robots.toml").write_text(toml)
    env = {"IM_SDKAPPID": "1", "IM_KEY": "k", "ALLOW_UNSIGNED": "1"}
    env |= {"AI_SECRET_KEY": "k", "ROBOTS": str(tmp_path / "robots.toml")}
    config = read(env | {"SUPPORT_APP_KEY": "app-1"})
    assert config.robots["@RBT#002"].provider == "ollama"
    assert config.provider(config.robots["@RBT#003"], PROVIDERS).key == "app-1"


@pytest.mark.parametrize("page", SETTINGS, ids=name)
def test_every_reply_mode_and_every_key_of_a_robot_is_documented(page):
    text = page.read_text("utf-8")
    assert [*re.findall(r"^\| `([a-z]+)` \|", text, re.MULTILINE)] == [
        *("whole", "card", "custom", "modify", "stream")
    ]
    assert {"whole", "card", "custom", "modify", "stream"} <= {*REPLIES}
    [keys] = re.findall(r"(`nick`.*?`reply_mode_mobile`)", text, re.DOTALL)
    assert re.findall(r"`(\w+)`", keys) == [item.name for item in fields(Persona)]


@pytest.mark.parametrize("readme", READMES, ids=name)
def test_a_readme_is_short_and_what_it_names_exists(readme):
    text = readme.read_text("utf-8")
    assert len(text.splitlines()) <= 120
    assert settings(readme) <= settings(SETTINGS[0])
    [lines] = map(int, re.findall(r"`botserver\.py`.*? (\d+) (?:lines|行)", text))
    story = HERE.joinpath("botserver.py").read_text("utf-8").splitlines()
    assert lines - 50 < len(story) < lines
    services = re.findall(r"^\| `AI_PROVIDER` .*", text, re.MULTILINE)[0]
    assert {*re.findall(r"`([a-z-]+)`", services)} <= {*PROVIDERS}
    modes = re.findall(r"^\| `REPLY_MODE` .*", text, re.MULTILINE)[0]
    assert {*re.findall(r"`([a-z]+)`", modes)} <= {*REPLIES}


def anchors(page):
    """Return the anchors that a page's headings have at GitHub."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_within_the_project_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text("utf-8"))
    assert links or page.name == "CONTRIBUTING.md"
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def structure(page):
    """Return what two languages of a page must have in common, in its order."""
    shape, code = [], False
    for line in page.read_text("utf-8").splitlines():
        kind = re.match(r" *(```\w*|#+(?= )|\||[*] |[0-9]+\. |!\[)", line)
        if kind and (kind[1].startswith("```") or not code):
            shape.append((kind[1], line.count("|") if kind[1] == "|" else 0))
            code ^= kind[1].startswith("```")
    return shape


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].name)
def test_both_languages_have_the_same_structure(pair):
    english, chinese = map(structure, pair)
    assert english == chinese
    links = [
        [re.sub(r"\.zh-CN|#.*", "", link) for link in found]
        for found in (
            re.findall(r"\]\(((?!https?:)[^)]+)\)", page.read_text("utf-8"))
            for page in pair
        )
    ]
    assert sorted(links[0]) == sorted(links[1])


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
    shown = subprocess.run(command, capture_output=True, text=True, env={}).stdout
    assert {f"{name}={value}" for name, value in env.items()} <= {*shown.splitlines()}
    config = read(env)
    assert config.ai_extra_body == {"temperature": 0.5}
    assert config.ai_system_prompt == 'You are a pirate. Say "Ahoy" first.'


def test_both_languages_hold_the_same_code():
    for english, chinese in PAIRS[1:]:  # READMEs: test_pastes
        for language in ("python", "sh", "ini", "nginx", "toml", "cron"):
            pairs = [map(uncommented, blocks(p, language)) for p in (english, chinese)]
            assert [*pairs[0]] == [*pairs[1]]


def uncommented(code):
    return re.sub(r"(^|\s+)# .*", r"\1", code, flags=re.MULTILINE).replace(
        "your.domain", "你的域名"
    )


@pytest.mark.parametrize("page", OPERATIONS, ids=name)
def test_the_backup_is_made_while_the_bot_runs(page, tmp_path):
    [block] = [text for text in blocks(page, "sh") if "VACUUM" in text]
    statement = re.search(r'"(VACUUM INTO .*)"', block)[1]
    copy = tmp_path / "copy.db"
    url = f"sqlite:///{tmp_path}/bot.db"
    with closing(open_store(url)) as store:
        store.add("id", "chat", {})
        with closing(sqlite3.connect(tmp_path / "bot.db")) as database:
            database.execute(statement.replace("/root/bot-backup.db", str(copy)))
    with closing(open_store(f"sqlite:///{copy}")) as store:
        assert store.stats()["waiting"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("oldest", "failed", "status"), [(1.3, 0, 0), (61.0, 0, 1), (0.0, 1, 1)]
)
def test_the_line_of_the_alarm_tells_trouble(oldest, failed, status):
    for page in OPERATIONS:
        [block] = [text for text in blocks(page, "sh") if "/healthz" in text]
        program = re.search(r"python3 -c \\\n    '(.*)'", block)[1]
        health = json.dumps({"oldest": oldest, "failed": failed})
        command = [sys.executable, "-c", program]
        assert subprocess.run(command, input=health, text=True).returncode == status


@pytest.fixture
def talk(request, tmp_path, monkeypatch):
    """A copy of the app with the service that the page shows."""
    [block] = blocks(request.param, "python")
    service, imported, line = re.split(r"^# .*\n", block, flags=re.MULTILINE)[1:]
    for file in ("botserver.py", "usersig.py", "providers.py"):
        text = HERE.joinpath(file).read_text("utf-8")
        if file == "providers.py":
            text = text.replace("\nimport jwt\n", f"\nimport jwt\n{imported}")
            text = text.replace("PROVIDERS = {\n", f"PROVIDERS = {{\n    {line}")
        tmp_path.joinpath(file).write_text(text, "utf-8")
    tmp_path.joinpath("talk.py").write_text(service, "utf-8")
    monkeypatch.setattr(commands, "COMMANDS", {})
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("botserver", "providers", "talk"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    yield importlib.import_module("botserver")
    for module in ("botserver", "providers", "talk"):
        monkeypatch.delitem(sys.modules, module)


@pytest.mark.parametrize("talk", PLATFORMS, ids=name, indirect=True)
def test_the_example_of_a_service_that_remembers_works(talk, sim, tmp_path):
    asked = []

    def answer(headers, body):
        asked.append(body)
        said = {"thread": 7, "text": f"heard {body['say']}", "finished": True}
        return 200, said if len(asked) == 1 else iter([sse(said, end="")])

    sim.services["/v1/talk"] = answer
    settings = talk.Settings(
        im_sdkappid=APPID,
        im_key=sim.key,
        im_callback_token=(TOKEN,),
        im_api_url=sim.url,
        ai_provider="talk",
        ai_secret_key="key",
        ai_base_url=f"{sim.url}/v1",
        database_url=f"sqlite:///{tmp_path}/bot.db",
    )
    app = talk.create_app(settings, FAST)
    im = Caller(sim, app.test_client())
    for number, text in enumerate(["one", "two", "/clear", "three"], 1):
        im.say(text)
        sim.wait(number)
        poll(lambda: idle(im))
    app.extensions["bot"].close(drain=5)
    texts = [message.text for message in sim.delivered]
    assert [texts[n] for n in (0, 1, 3)] == ["heard one", "heard two", "heard three"]
    assert [body["thread"] for body in asked] == [None, 7, None]
