"""Settings and robots.toml: every fault is named, and no secret is shown."""

from __future__ import annotations

import re
from typing import Any, Literal

import pytest

from botserver import REPLIES, Settings
from imbot.settings import ADDRESS, Persona, SettingsError, misspelt, setting
from providers import PROVIDERS


def read(env, cls=Settings):
    """Return the settings of an environment."""
    return cls.from_env(PROVIDERS, REPLIES, env)


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
        read(env)
    for name in (*env, "IM_CALLBACK_TOKEN"):
        assert name in str(caught.value)
    assert "minimax" in str(caught.value)  # the names that would be right
    with pytest.raises(SettingsError, match="AI_SECRET_KEY is missing"):
        read({"IM_SDKAPPID": "1", "IM_KEY": "k", "ALLOW_UNSIGNED": "1"})


def test_settings_are_read_and_secrets_are_not_shown():
    config = read(
        {
            "IM_SDKAPPID": "1400000000",
            "IM_KEY": "the key\n",
            "IM_CALLBACK_TOKEN": "token-a, token-b",
            "AI_SECRET_KEY": "the ai key",
            "AI_MODEL": "",
            "AI_EXTRA_BODY": '{"temperature": 0.5}',
        }
    )
    assert config.im_key == "the key"
    assert config.im_callback_token == ("token-a", "token-b")
    assert config.ai_extra_body == {"temperature": 0.5}
    assert config.ai_timeout == 60
    for secret in ("the key", "the ai key", "token-a"):
        assert secret not in repr(config)


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ('[robot]\nnick = "x"', "robot is not a robot"),
        ('["@RBT#1"]\ncolour = "x"', "unknown key colour"),
        ('["@RBT#1"]\nprovider = "nobody"', "@RBT#1: provider must be one of: minimax"),
        ('["@RBT#1"]\nreply_mode = 5', "@RBT#1: reply_mode must be a text"),
        (
            '["@RBT#1"]\nsecret_key_env = "app-key"',
            "must be the name of an environment variable",
        ),
        ('["@RBT#1"]\nbase_url = "dify.local"', "base_url must be an address"),
        ("[", "is no TOML: Invalid initial character"),
        ("[@RBT#1]", 'name in quotes: ["@RBT#001"]'),
        (None, "which does not exist"),
        ('["@RBT#1"]\nmodel = false', "@RBT#1: model must be a text in quotes"),
    ],
)
def test_a_wrong_robots_file_stops_the_start(tmp_path, toml, says):
    file = tmp_path / "personas.toml"
    if toml:
        file.write_text(toml)
    with pytest.raises(SettingsError, match=re.escape(says)):
        read({"ROBOTS": str(file)})


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
        read(env | {"AI_BASE_URL": "https://here/v1"})
    for name in ("AI_SECRET_KEY_DIFY", "AI_SECRET_KEY_SALES"):
        assert f"{name} is missing: the AI service dify needs one." in str(caught.value)
    keys = {"AI_SECRET_KEY_DIFY": "key one", "AI_SECRET_KEY_SALES": "key two"}
    ours = read(env | keys)
    personas = [ours.persona(f"@RBT#{n}") for n in (1, 2, 3, 4)]
    asked = [ours.provider(persona, PROVIDERS) for persona in personas]
    assert [(p.key, p.url) for p in asked] == [
        ("key one", "https://api.dify.ai/v1"),
        ("key two", "https://dify.example.com/v1"),
        ("key two", "https://api.minimaxi.com/v1"),
        ("main", "https://api.minimaxi.com/v1"),
    ]
    assert "key one" not in repr(ours) and "key two" not in repr(ours)
    assert misspelt(env | keys) and not misspelt(env | keys, ours.ai_secret_keys)


def test_a_robots_file_saved_by_windows_notepad_is_read(tmp_path):
    file = tmp_path / "personas.toml"
    file.write_text('["@RBT#1"]\nnick = "小明"', "utf-8-sig")
    assert read(WHOLE | PROXY | {"ROBOTS": str(file)}).robots["@RBT#1"].nick


WHOLE = {"IM_SDKAPPID": "1", "IM_KEY": "k", "ALLOW_UNSIGNED": "1"}
PROXY = {"AI_BASE_URL": "http://localhost:4000/v1"}


def test_an_address_without_a_provider_is_a_service_without_fields_of_any_vendor():
    config = read({**WHOLE, **PROXY, "AI_MODEL": "mock"})
    provider = config.provider(Persona(), PROVIDERS)
    assert config.ai_provider == "openai-compatible"
    assert provider.url == PROXY["AI_BASE_URL"]
    body = provider.body(messages=[])
    assert body.keys() == {"messages", "model", "max_tokens"}
    assert "model" not in read(WHOLE | PROXY).provider(Persona(), PROVIDERS).body()
    named = {**WHOLE, **PROXY, "AI_PROVIDER": "zhipu", "AI_SECRET_KEY": "k"}
    assert read(named).ai_provider == "zhipu"


def test_a_service_without_an_address_needs_one():
    with pytest.raises(SettingsError, match="AI_BASE_URL is missing"):
        read({**WHOLE, "AI_PROVIDER": "openai-compatible"})
    assert read({**WHOLE, "AI_PROVIDER": "echo"}).ai_provider == "echo"


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
    keys = {"AI_SECRET_KEY_DEEPSEEK": "k"}
    (line,) = misspelt({wrong: "secret", **keys, **WHOLE}, keys)
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
        read(env)
    assert "IM_KEY is missing.\nIM_KYE is not a setting" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_misspelt_setting_is_named_in_the_log_of_the_start(
    make_app, monkeypatch, caplog
):
    monkeypatch.setenv("AI_MODLE", "mock")
    make_app()
    assert "AI_MODLE is not a setting: do you mean AI_MODEL?" in caplog.messages


class Forked(Settings):
    open_from: int = setting(9, low=0, high=23)
    price: float = setting(0.5, low=0)
    greets: bool = setting(True)
    words: tuple[str, ...] = setting(())
    table: dict[str, Any] = setting(dict)
    colour: Literal["red", "green"] = setting("red")
    webhook: str = setting("", form=ADDRESS)
    webhook_key: str = setting("", secret=True)
    plain: int = 3


GOOD = {
    "OPEN_FROM": "0",
    "PRICE": "2",
    "GREETS": "no",
    "WORDS": " a, b ,,",
    "TABLE": '{"a": [1]}',
    "COLOUR": "green",
    "WEBHOOK": "https://example.com/hook",
    "WEBHOOK_KEY": "the-secret-of-the-hook",
    "PLAIN": "-4",
}


def test_a_fork_adds_settings_of_every_type():
    read_ones = vars(read(WHOLE | PROXY | GOOD, Forked))
    assert {name: read_ones[name.lower()] for name in GOOD} == {
        "OPEN_FROM": 0,
        "PRICE": 2.0,
        "GREETS": False,
        "WORDS": ("a", "b"),
        "TABLE": {"a": [1]},
        "COLOUR": "green",
        "WEBHOOK": "https://example.com/hook",
        "WEBHOOK_KEY": "the-secret-of-the-hook",
        "PLAIN": -4,
    }
    unset = read(WHOLE | PROXY | dict.fromkeys(GOOD, " "), Forked)
    assert (unset.open_from, unset.greets, unset.table, unset.plain) == (9, True, {}, 3)


def test_a_secret_of_a_fork_is_not_shown_and_hidden_in_the_log():
    settings = read(WHOLE | PROXY | GOOD, Forked)
    assert "the-secret-of-the-hook" not in repr(settings)
    assert "open_from=0" in repr(settings)
    assert "the-secret-of-the-hook" in settings.secrets()


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("OPEN_FROM", "24", "a whole number of at least 0 and at most 23"),
        ("OPEN_FROM", "1.5", "a whole number of at least 0 and at most 23"),
        ("PRICE", "-1", "a number of at least 0"),
        ("PRICE", "inf", "a number of at least 0"),
        ("GREETS", "maybe", "0 or 1"),
        ("TABLE", "[1]", "a JSON object"),
        ("TABLE", "{", "a JSON object"),
        ("COLOUR", "blue", "one of: red, green"),
        ("WEBHOOK", "example.com", ADDRESS),
        ("WEBHOOK", "https://[::1", ADDRESS),
        ("WEBHOOK", "https://user:password@example.com", ADDRESS),
        ("PLAIN", "x", "a whole number"),
        ("HISTORY_TURNS", "51", "a whole number of at least 0 and at most 50"),
        ("REPLY_MODE", "loud", "one of: " + ", ".join(REPLIES)),
        ("DATABASE_URL", "mysql://x", "a URL of one of: sqlite, postgres, postgresql"),
        ("LOG_LEVEL", "LOUD", "one of: DEBUG, INFO, WARNING, ERROR"),
    ],
)
def test_a_wrong_value_is_told_what_it_must_be(name, wrong, says):
    with pytest.raises(SettingsError) as caught:
        read(WHOLE | PROXY | {name: wrong}, Forked)
    assert str(caught.value).splitlines()[1:] == [f"{name} must be {says}."]


def test_a_misspelt_setting_of_a_fork_is_named():
    with pytest.raises(SettingsError, match="OPEN_FORM is not a .* OPEN_FROM?"):
        read({"OPEN_FORM": "9"}, Forked)
    assert not misspelt({"OPEN_FROM": "9"}, (), Forked)


def test_a_type_that_no_text_can_become_stops_the_start():
    class Wrong(Settings):
        names: list[str] = setting(list)

    with pytest.raises(NotImplementedError, match=r"cannot be a list\[str\]"):
        read(WHOLE | PROXY | {"NAMES": "a"}, Wrong)


def test_the_password_of_a_database_is_a_secret():
    url = "postgresql://bot:p%40ssword-9@db.example.com/bot"
    assert "p@ssword-9" in read(WHOLE | PROXY | {"DATABASE_URL": url}).secrets()


def test_a_misspelt_setting_of_a_fork_is_named_in_the_log_of_the_start(
    make_app, monkeypatch, caplog
):
    monkeypatch.setattr("simulator.fixtures.Settings", Forked)
    monkeypatch.setenv("OPEN_FORM", "9")
    make_app()
    assert "OPEN_FORM is not a setting: do you mean OPEN_FROM?" in caplog.messages
