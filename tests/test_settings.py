"""Settings and robots.toml: every fault is named, and no secret is shown."""

from __future__ import annotations

import re

import pytest
from conftest import HERE

import providers
from imbot.settings import Persona, Settings, SettingsError, misspelt
from simulator import BotProcess


def test_every_missing_or_wrong_setting_is_named_at_once():
    env = {
        "IM_SDKAPPID": "abc",
        "IM_KEY": " ",
        "AI_PROVIDER": "nobody",
        "WORKER_THREADS": "0",
        "AI_TIMEOUT": "nan",
        "AI_EXTRA_BODY": "[1]",
        "GROUP_MEMORY": "all",
        "IM_API_URL": "console.tim.qq.com",
    }
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(env)
    for name in (*env, "IM_CALLBACK_TOKEN"):
        assert name in str(caught.value)
    assert "minimax" in str(caught.value)  # the names that would be right
    with pytest.raises(SettingsError, match="AI_SECRET_KEY is missing"):
        Settings.from_env({"IM_SDKAPPID": "1", "IM_KEY": "k", "ALLOW_UNSIGNED": "1"})


def test_settings_are_read_and_secrets_are_not_shown():
    config = Settings.from_env(
        {
            "IM_SDKAPPID": "1400000000",
            "IM_KEY": "the key\n",
            "IM_CALLBACK_TOKEN": "one, two",
            "AI_SECRET_KEY": "the ai key",
            "AI_MODEL": "",
            "AI_EXTRA_BODY": '{"temperature": 0.5}',
        }
    )
    assert config.im_key == "the key"
    assert config.im_callback_token == ("one", "two")
    assert config.ai_extra_body == {"temperature": 0.5}
    assert config.ai_timeout == 60
    for secret in ("the key", "the ai key", "one"):
        assert secret not in repr(config)


@pytest.mark.parametrize(
    "settings",
    [
        {"IM_KEY": "", "AI_TIMEOUT": "x"},
        {"DATABASE_URL": "sqlite:////"},
        {"DATABASE": "bot.db", "REDIS_URL": "redis://x"},
    ],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_wrong_setting_stops_the_start_and_is_all_that_is_said(
    sim, tmp_path, settings, workers
):
    bot = BotProcess(sim, str(tmp_path), WEB_CONCURRENCY=workers, **settings).launch()
    assert bot.wait(20) == 3
    said = [line for line in bot.log.read_text().splitlines() if line]
    assert said[0].startswith(("The settings are not complete", "DATABASE_URL"))
    assert len(said) == (1 if "DATABASE_URL" in settings else len(settings) + 1)
    assert all(name in "".join(said) for name in settings)


def test_a_bot_started_in_another_folder_says_what_is_wrong_or_starts(sim, tmp_path):
    """gunicorn does not find gunicorn.conf.py there."""
    bot = BotProcess(sim, str(tmp_path))
    bot.command[-1:], bot.folder = ["--chdir", str(HERE), bot.command[-1]], tmp_path
    key, bot.env["IM_KEY"] = bot.env["IM_KEY"], ""
    assert bot.launch().wait(20) == 3
    assert "IM_KEY is missing." in bot.log.read_text()
    bot.env["IM_KEY"] = key
    bot.start().stop()


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ('[robot]\nnick = "x"', "robot is not a robot"),
        ('["@RBT#1"]\ncolour = "x"', "unknown key colour"),
        ('["@RBT#1"]\nprovider = "nobody"', "@RBT#1: provider must be one of: minimax"),
        ('["@RBT#1"]\nreply_mode = 5', "@RBT#1: reply_mode must be a text"),
        ('["@RBT#1"]\nsecret_key_env = "app-key"', "must be the name of a variable"),
        ('["@RBT#1"]\nbase_url = "dify.local"', "base_url must be an address"),
        ("[", "cannot be read"),
        (None, "is not there"),
    ],
)
def test_a_wrong_robots_file_stops_the_start(tmp_path, toml, says):
    file = tmp_path / "personas.toml"
    if toml:
        file.write_text(toml)
    with pytest.raises(SettingsError, match=re.escape(says)):
        Settings.from_env({"ROBOTS": str(file)})


TWO_APPS = """
["@RBT#1"]
provider = "dify"
["@RBT#2"]
provider = "dify"
base_url = "https://dify.example.com/v1"
secret_key_env = "AI_SECRET_KEY_SALES"
["@RBT#3"]
secret_key_env = "AI_SECRET_KEY_SALES"
"""


def test_each_persona_has_the_key_of_its_own_app(tmp_path):
    file = tmp_path / "personas.toml"
    file.write_text(TWO_APPS)
    env = {**WHOLE, "ROBOTS": str(file), "AI_SECRET_KEY": "main"}
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(env | {"AI_BASE_URL": "https://here/v1"})
    for name in ("AI_SECRET_KEY_DIFY", "AI_SECRET_KEY_SALES"):
        assert f"{name} is missing: the AI service dify needs one." in str(caught.value)
    keys = {"AI_SECRET_KEY_DIFY": "key one", "AI_SECRET_KEY_SALES": "key two"}
    ours = Settings.from_env(env | keys)
    asked = [ours.provider(ours.persona(f"@RBT#{n}")) for n in (1, 2, 3, 4)]
    assert [(p.key, p.url) for p in asked] == [
        ("key one", "https://api.dify.ai/v1"),
        ("key two", "https://dify.example.com/v1"),
        ("key two", "https://api.minimaxi.com/v1"),
        ("main", "https://api.minimaxi.com/v1"),
    ]
    assert "key one" not in repr(ours) and "key two" not in repr(ours)
    assert misspelt(env | keys) and not misspelt(env | keys, ours.ai_secret_keys)


def test_a_service_whose_file_is_gone_is_named(monkeypatch):
    monkeypatch.setitem(providers.PROVIDERS, "lost", "nowhere:LOST")
    with pytest.raises(
        SettingsError, match="lost is nowhere:LOST, which cannot be load"
    ):
        config.load(providers.PROVIDERS, "lost")


def test_a_robots_file_saved_by_windows_notepad_is_read(tmp_path):
    file = tmp_path / "personas.toml"
    file.write_text('["@RBT#1"]\nnick = "小明"', "utf-8-sig")
    assert (
        Settings.from_env(WHOLE | PROXY | {"ROBOTS": str(file)}).robots["@RBT#1"].nick
    )


WHOLE = {"IM_SDKAPPID": "1", "IM_KEY": "k", "ALLOW_UNSIGNED": "1"}
PROXY = {"AI_BASE_URL": "http://localhost:4000/v1"}


def test_an_address_without_a_provider_is_a_service_without_fields_of_any_vendor():
    config = Settings.from_env({**WHOLE, **PROXY, "AI_MODEL": "mock"})
    provider = config.provider(Persona())
    assert config.ai_provider == "openai-compatible"
    assert provider.url == PROXY["AI_BASE_URL"]
    body = provider.body(messages=[])
    assert body.keys() == {"messages", "model", "max_tokens"}
    assert "model" not in Settings.from_env(WHOLE | PROXY).provider(Persona()).body()
    named = {**WHOLE, **PROXY, "AI_PROVIDER": "zhipu", "AI_SECRET_KEY": "k"}
    assert Settings.from_env(named).ai_provider == "zhipu"


def test_a_service_without_an_address_needs_one():
    with pytest.raises(SettingsError, match="AI_BASE_URL is missing"):
        Settings.from_env({**WHOLE, "AI_PROVIDER": "openai-compatible"})
    assert Settings.from_env({**WHOLE, "AI_PROVIDER": "echo"}).ai_provider == "echo"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("AI_MODLE", "AI_MODEL"),
        ("AI_KEY", "AI_SECRET_KEY"),
        ("AI_PROMPT", "AI_SYSTEM_PROMPT"),
        ("AI_SECRET_KEY_DEEPSEK", "AI_SECRET_KEY_DEEPSEEK"),
        ("WORKER_THREDS", "WORKER_THREADS"),
        ("DATABASE_URI", "DATABASE_URL"),
    ],
)
def test_a_misspelt_setting_is_named_with_the_nearest(wrong, right):
    (line,) = misspelt({wrong: "secret", "AI_SECRET_KEY_DEEPSEEK": "k", **WHOLE})
    assert line == f"{wrong} is not a setting: do you mean {right}?"


def test_variables_of_other_programs_are_not_taken_for_settings():
    others = (
        "PATH PORT HOME LANG LANGUAGE LOGNAME HOSTNAME HISTSIZE HISTCONTROL GROUPS "
        "SECRET_KEY MODEL TIMEOUT BASE_URL REDIS_URL DATABASE_PRIVATE_URL "
        "GTK_IM_MODULE IM_CONFIG_PHASE AI_GATEWAY_API_KEY AI_AGENT OPENAI_API_KEY "
        "GUNICORN_CMD_ARGS WEB_CONCURRENCY FLASK_APP RATE ROOT MAX_REQUESTS"
    )
    assert misspelt(dict.fromkeys(others.split(), "x")) == []


def test_a_misspelt_setting_is_named_when_the_start_fails_for_it():
    env = {"IM_SDKAPPID": "1", "IM_KYE": "secret", "ALLOW_UNSIGNED": "1", **PROXY}
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(env)
    assert "IM_KEY is missing.\nIM_KYE is not a setting" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_misspelt_setting_is_named_in_the_log_of_the_start(
    make_app, monkeypatch, caplog
):
    monkeypatch.setenv("AI_MODLE", "mock")
    make_app()
    assert "AI_MODLE is not a setting: do you mean AI_MODEL?" in caplog.messages
