"""Settings and robots.toml: every fault is named, and no secret is shown."""

from __future__ import annotations

import re

import pytest

from config import Config, ConfigError
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
    with pytest.raises(ConfigError) as caught:
        Config.from_env(env)
    for name in (*env, "IM_CALLBACK_TOKEN"):
        assert name in str(caught.value)
    assert "minimax" in str(caught.value)  # the names that would be right
    with pytest.raises(ConfigError, match="AI_SECRET_KEY is missing"):
        Config.from_env({"IM_SDKAPPID": "1", "IM_KEY": "k", "ALLOW_UNSIGNED": "1"})


def test_settings_are_read_and_secrets_are_not_shown():
    config = Config.from_env(
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
def test_a_wrong_setting_stops_the_start(sim, tmp_path, settings):
    bot = BotProcess(sim, str(tmp_path), **settings).launch()
    assert bot.process.wait(20) != 0
    log = bot.log.read_text()
    assert all(name in log for name in settings)
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ('[robot]\nnick = "x"', "robot is not a robot"),
        ('["@RBT#1"]\ncolour = "x"', "unknown key colour"),
        ('["@RBT#1"]\nprovider = "nobody"', "@RBT#1: provider must be one of: minimax"),
        ('["@RBT#1"]\nreply_mode = 5', "@RBT#1: reply_mode must be a text"),
        ("[", "cannot be read"),
        (None, "is not there"),
    ],
)
def test_a_wrong_robots_file_stops_the_start(tmp_path, toml, says):
    file = tmp_path / "personas.toml"
    if toml:
        file.write_text(toml)
    with pytest.raises(ConfigError, match=re.escape(says)):
        Config.from_env({"ROBOTS": str(file)})
