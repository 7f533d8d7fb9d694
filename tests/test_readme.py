"""The READMEs: their settings are complete and their code works."""

from __future__ import annotations

import random
import re
from dataclasses import fields, replace

import pytest

import providers
import store
import tim
from botserver import Config
from conftest import HERE, Caller, poll

READMES = [HERE / "README.md", HERE / "README.zh-CN.md"]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_every_setting_is_in_the_readme_and_no_other(readme):
    settings = {item.name.upper() for item in fields(Config)}
    settings = settings - {"AI_SECRET_KEYS"} | {"AI_SECRET_KEY_"}
    rows = re.findall(r"^\| (`[A-Z].*?) \|", readme.read_text("utf-8"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([A-Z_]+)…?`", row)}
    assert named - {"REPLY_MODE"} == settings - {"REPLY_MODE"}
    defaults = {
        item.name.upper(): str(item.default)
        for item in fields(Config)
        if isinstance(item.default, int | float | str) and str(item.default)
    }
    for row in readme.read_text("utf-8").splitlines():
        if match := re.match(r"\| `([A-Z_]+)` \| `?([^`|]+?)`? \|", row):
            name, default = match.groups()
            if name in defaults and re.fullmatch(r"[a-z0-9.:/_]+", default):
                assert float_or_text(default) == float_or_text(defaults[name]), name


def float_or_text(text):
    try:
        return float({"False": "0"}.get(text, text))
    except ValueError:
        return text


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_the_examples_of_the_readme_work(readme, sim, make_app, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text("utf-8"), re.DOTALL)
    names = {
        "random": random,
        "replace": replace,
        "PROVIDERS": dict(providers.PROVIDERS),
    }
    names |= {"MODES": dict(tim.MODES), "Whole": tim.Whole}
    names |= {"Service": providers.Service, "openai_chat": providers.openai_chat}
    names |= {"SQLiteStore": store.SQLiteStore}
    for block in blocks:
        exec(block, names)
    mine = providers.Provider(names["PROVIDERS"]["mine"])
    assert mine.body()["temperature"] == 0.5
    dice = providers.Provider(
        names["PROVIDERS"]["dice"], sim.ai_key, url=f"{sim.url}/v1"
    )
    for text, answer in [("/dice", r"🎲 [1-6]"), ("hello", r"You said: hello .*")]:
        turns = [{"role": "user", "content": text}]
        [said] = dice.chat(turns, providers.CancelScope(5))
        assert re.fullmatch(answer, said)
    monkeypatch.setattr(tim, "MODES", names["MODES"])
    monkeypatch.chdir(tmp_path)
    app = make_app(reply_mode="signed")
    app.extensions["bot"].store = names["AuditedStore"](str(tmp_path / "audited.db"))
    Caller(sim, app.test_client()).say("hello")
    assert sim.wait(1)[0].text.endswith("\n\n— written by an AI")
    poll(lambda: (tmp_path / "answered.txt").exists())
    toml = re.search(r"```toml\n(.*?)```", readme.read_text("utf-8"), re.DOTALL)[1]
    tmp_path.joinpath("robots.toml").write_text(toml)
    config = Config.from_env(
        {"IM_SDKAPPID": "1", "IM_KEY": "k", "ALLOW_UNSIGNED": "1", "AI_SECRET_KEY": "k"}
    )
    assert config.robots["@RBT#002"].provider == "ollama"


def test_both_readmes_hold_the_same_code():
    blocks = [
        re.findall(r"```.*?```", readme.read_text("utf-8"), re.DOTALL)
        for readme in READMES
    ]
    assert blocks[0] == blocks[1]
    procfile = HERE.joinpath("Procfile").read_text()
    options = "--worker-class gthread --threads 8 --graceful-timeout 25"
    for text in [procfile, *blocks[0][3:4], *blocks[0][7:8]]:
        assert options in text
