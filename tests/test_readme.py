"""The READMEs and docs/: settings are complete, code works and is the same in both."""

from __future__ import annotations

import re
import subprocess
from dataclasses import fields

import pytest
from conftest import HERE

from botserver import REPLIES, Settings
from imbot import cli
from providers import PROVIDERS

READMES = [HERE / "README.md", HERE / "README.zh-CN.md"]
SETTINGS = [HERE / "docs/settings.md", HERE / "docs/settings.zh-CN.md"]
OPERATIONS = [HERE / "docs/operations.md", HERE / "docs/operations.zh-CN.md"]
PLATFORMS = [HERE / "docs/services.md", HERE / "docs/services.zh-CN.md"]
PAGES = [*READMES, *SETTINGS, *OPERATIONS, *PLATFORMS]
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


@pytest.mark.parametrize("readme", READMES, ids=name)
def test_a_readme_is_short_and_its_settings_are_there(readme):
    assert len(readme.read_text("utf-8").splitlines()) <= 120
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
    shown = subprocess.run(command, capture_output=True, text=True, env={}).stdout
    assert {f"{name}={value}" for name, value in env.items()} <= {*shown.splitlines()}
    config = read(env)
    assert config.ai_extra_body == {"temperature": 0.5}
    assert config.ai_system_prompt == 'You are a pirate. Say "Ahoy" first.'


def test_both_languages_hold_the_same_code():
    for english, chinese in (SETTINGS, OPERATIONS, PLATFORMS):  # READMEs: test_pastes
        for language in ("python", "sh", "ini", "nginx", "toml"):
            pairs = [map(uncommented, blocks(p, language)) for p in (english, chinese)]
            assert [*pairs[0]] == [*pairs[1]]


def uncommented(code):
    return re.sub(r"(^|\s+)# .*", r"\1", code, flags=re.MULTILINE).replace(
        "your.domain", "你的域名"
    )


def test_gunicorn_is_started_everywhere_as_in_the_procfile():
    files = [HERE / name for name in ("Procfile", "Dockerfile", "botserver.py")]
    for file in [*files, *READMES, *OPERATIONS]:
        text = re.sub("[\"',]", "", file.read_text("utf-8"))
        commands = re.findall(r"gunicorn [^`\n]*?(\S+create_app\(\))", text)
        assert commands and {*commands} == {"botserver:create_app()"}, file
