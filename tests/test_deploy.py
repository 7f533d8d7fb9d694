"""The files of platforms, containers and workflows agree with the program."""

from __future__ import annotations

import json
import platform
import re
import runpy
import subprocess
import sys
import tomllib
from dataclasses import fields

import click
import pytest
import yaml
from conftest import HERE
from dotenv import dotenv_values
from flask.cli import run_command

import imbot
from botserver import Settings, create_app
from imbot.engine import Engine
from imbot.settings import parse

START = "gunicorn botserver:create_app()"
REQUIRED = ["IM_SDKAPPID", "IM_KEY", "IM_CALLBACK_TOKEN", "AI_SECRET_KEY"]
NAMES = {item.name.upper() for item in fields(Settings)}
OF_GUNICORN = {"PORT", "WEB_CONCURRENCY"}
DOCS = [*HERE.glob("*.md"), *HERE.glob("docs/*.md")]


def text_of(name):
    return HERE.joinpath(name).read_text("utf-8")


def command_of(readme, word):
    """Return the command line of a README that ends with a word."""
    [line] = re.findall(rf"^(python3 -m venv .* {word}.*)$", text_of(readme), re.M)
    return line


def dockerfile():
    """Return the instructions of the Dockerfile."""
    return [line.split(" ", 1) for line in text_of("Dockerfile").splitlines()]


def test_gunicorn_is_started_everywhere_as_in_the_procfile():
    [line] = text_of("Procfile").splitlines()
    assert line == "web: gunicorn 'botserver:create_app()'"
    assert " ".join(json.loads(dict(dockerfile())["CMD"])) == START
    pages = "\n".join(map(text_of, ["botserver.py", *(str(p) for p in DOCS)]))
    commands = re.findall(r"\bgunicorn\b.*create_app\(\)", re.sub("[\"',]", "", pages))
    assert {*commands} == {START} and len(commands) >= 5


def test_one_version_of_python_is_deployed_and_the_lowest_that_works_is_told():
    version = text_of(".python-version").strip()
    assert dict(dockerfile())["FROM"] == f"python:{version}-slim"
    container = json.loads(text_of(".devcontainer/devcontainer.json"))
    assert container["image"].endswith(f"/python:{version}")
    workflow = yaml.safe_load(text_of(".github/workflows/test.yml"))
    [python] = [s for s in steps(workflow) if "setup-python" in s.get("uses", "")]
    assert python["with"] == {"python-version-file": ".python-version"}
    project = tomllib.loads(text_of("pyproject.toml"))
    lowest = project["tool"]["ruff"]["target-version"].replace("py3", "3.")
    named = {v for p in DOCS for v in re.findall(r"Python (3\.\d+)", p.read_text())}
    assert named == {lowest}
    assert [*map(int, version.split("."))] >= [*map(int, lowest.split("."))]


def test_an_older_python_is_told_which_one_is_needed(monkeypatch):
    monkeypatch.setattr(sys, "version", "3.10.13 (main)")
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    with pytest.raises(SystemExit, match="needs Python 3.11 or newer; .* 3.10.13"):
        runpy.run_path(imbot.__file__)


def test_the_example_of_an_env_file_has_settings_with_their_defaults(tmp_path):
    text = text_of(".env.example")
    example = tmp_path / "env"
    example.write_text(re.sub("^# ([A-Z_]+=)", r"\1", text, flags=re.MULTILINE))
    values = dotenv_values(example)
    assert values.keys() <= NAMES | OF_GUNICORN
    assert [name for name in dotenv_values(HERE / ".env.example") if name in REQUIRED]
    assert not {*REQUIRED} - dotenv_values(HERE / ".env.example").keys()
    kinds = {item.name.upper(): item for item in fields(Settings)}
    for name in values.keys() - {*REQUIRED} - OF_GUNICORN - {"IM_API_URL"}:
        if values[name]:
            assert parse(values[name], str, 0, 0, "") == kinds[name].default, name
    assert not re.search("=.*['\"]", text)  # Docker would take them for a part


def test_an_env_file_is_neither_committed_nor_deployed():
    assert ".env" in text_of(".gitignore").splitlines()
    assert {".*", "*.env"} <= {*text_of(".dockerignore").splitlines()}


def test_heroku_gets_what_its_schema_asks_for():
    app = json.loads(text_of("app.json"))
    assert app.keys() <= {  # of Heroku's schema
        *("name", "description", "keywords", "website", "repository", "logo"),
        *("success_url", "scripts", "env", "formation", "addons", "buildpacks"),
        *("environments", "stack", "image"),
    }
    assert 3 <= len(app["name"]) <= 30 and len(app["description"]) <= 140
    assert app["env"].keys() <= NAMES
    asked = [name for name, about in app["env"].items() if about["required"]]
    assert asked == REQUIRED
    for about in app["env"].values():
        assert about.keys() <= {"description", "value", "required", "generator"}
        assert about["description"] and about.get("value", "x")
    [addon] = app["addons"]
    assert addon["plan"].startswith("heroku-postgresql:")
    assert f"addons:create {addon['plan']}" in text_of("docs/operations.md")
    assert app["buildpacks"] == [{"url": "heroku/python"}]
    assert app["formation"] == {"web": {"quantity": 1, "size": "basic"}}


def test_render_gets_what_its_schema_asks_for():
    blueprint = yaml.safe_load(text_of("render.yaml"))
    assert blueprint.keys() == {"services", "databases"}
    [service], [database] = blueprint["services"], blueprint["databases"]
    assert {"type", "name", "runtime", "envVars"} <= service.keys()
    assert (service["type"], service["runtime"]) == ("web", "docker")
    assert service["healthCheckPath"] == "/healthz"
    variables = {one["key"]: one for one in service["envVars"]}
    assert variables.keys() <= NAMES
    where = variables.pop("DATABASE_URL")["fromDatabase"]
    assert where == {"name": database["name"], "property": "connectionString"}
    assert all(one["sync"] is False for one in variables.values())
    assert [*variables] == REQUIRED


def test_a_container_to_work_in_starts_the_demonstration_and_forwards_its_port():
    container = json.loads(text_of(".devcontainer/devcontainer.json"))
    [port] = container["forwardPorts"]
    assert container["portsAttributes"].keys() == {str(port)}
    command = container["postAttachCommand"]
    assert command == f".venv/bin/python -m simulator --port {port}"
    install, _, _ = command_of("README.md", "-m pytest").rpartition(" && ")
    assert container["postCreateCommand"] == install


def test_a_fork_is_checked_with_the_commands_of_the_readme_and_the_linters():
    workflow = yaml.safe_load(text_of(".github/workflows/test.yml"))
    assert workflow[True] == ["push", "pull_request"]  # YAML reads `on` so
    runs = [step["run"] for step in steps(workflow) if "run" in step]
    for readme in ("README.md", "README.zh-CN.md"):
        try_it = command_of(readme, "-m simulator")
        assert runs[:2] == [f"{try_it} --say Hello", command_of(readme, "-m pytest")]
    tools = re.findall(r"\.venv/bin/(\w+)", runs[2])
    assert tools == ["ruff", "ruff", "mypy"]
    needed = text_of("requirements-dev.txt")
    assert all(re.search(f"^{tool}>=", needed, re.MULTILINE) for tool in tools)


def steps(workflow):
    [job] = workflow["jobs"].values()
    assert job["runs-on"] and all(
        {"uses", "run"} & step.keys() for step in job["steps"]
    )
    return job["steps"]


@pytest.mark.parametrize(
    ("reload", "debug", "serves"),
    [(True, "0", False), (None, "1", False), (False, "1", True), (None, "0", True)],
)
def test_the_reloaders_parent_starts_no_bot(monkeypatch, reload, debug, serves):
    monkeypatch.setenv("FLASK_DEBUG", debug)
    monkeypatch.delenv("WERKZEUG_RUN_MAIN", raising=False)
    monkeypatch.setattr(Engine, "create", lambda *given: pytest.fail("a bot"))
    with click.Context(run_command, info_name="run") as context:
        context.params["reload"] = reload
        if serves:
            with pytest.raises(pytest.fail.Exception):
                create_app()
        else:
            assert "bot" not in create_app().extensions
            monkeypatch.setenv("WERKZEUG_RUN_MAIN", "true")  # its child does
            with pytest.raises(pytest.fail.Exception):
                create_app()


def test_a_bot_that_cannot_start_ends_the_reloader(monkeypatch, capsys):
    monkeypatch.setattr(Settings, "from_env", classmethod(fail))
    for child, status in (("true", 1), ("", 3)):
        monkeypatch.setenv("WERKZEUG_RUN_MAIN", child)
        with pytest.raises(SystemExit) as caught:
            create_app()
        assert caught.value.code == status  # with 3 the reloader would go on for ever
    assert capsys.readouterr().err == "IM_KEY is missing.\n" * 2


def fail(*given):
    raise imbot.settings.SettingsError("IM_KEY is missing.")


@pytest.mark.parametrize("software", ["gunicorn/27.0.1", ""])
@pytest.mark.parametrize("read", [True, False])
def test_gunicorn_without_its_configuration_is_told_so(
    make_app, caplog, monkeypatch, software, read
):
    monkeypatch.setenv("SERVER_SOFTWARE", software)
    monkeypatch.delenv("GUNICORN_CONF_READ", raising=False)
    if read:
        monkeypatch.setenv("GUNICORN_CONF_READ", "1")
    make_app()
    lines = [r for r in caplog.messages if "gunicorn.conf.py was not read" in r]
    assert len(lines) == (1 if software and not read else 0)
    assert not lines or f"--config {HERE}/gunicorn.conf.py" in lines[0]


FREED = """
import runpy, sys, threading
from pathlib import Path

def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])

def work():
    for _ in range(9):
        all_here.wait()
        large = b"x" * (8 << 20)
        kept.append(b"x" * 9000)
        del large

runpy.run_path(sys.argv[1])["post_fork"](None, None)
before, all_here, kept = resident(), threading.Barrier(8), []
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(resident() - before)
"""


ARENAS = """
import ctypes, runpy, sys, threading

def work():
    kept = [b"x" * 2000 for _ in range(50)]
    all_here.wait()
    told.wait()

runpy.run_path(sys.argv[1])["post_fork"](None, None)
all_here, told = threading.Barrier(33), threading.Event()
threads = [threading.Thread(target=work) for _ in range(32)]
for thread in threads:
    thread.start()
all_here.wait()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
told.set()
"""


def run_with_malloc(script):
    """Run a script in a process of its own; return what it prints."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("it is glibc's malloc")
    command = [sys.executable, "-c", script, HERE / "gunicorn.conf.py"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def test_a_worker_gives_memory_back_that_it_needed_for_a_moment():
    assert int(run_with_malloc(FREED)) < 12_000  # KB; without the setting 25,000


def test_the_threads_of_a_worker_share_two_arenas():
    assert run_with_malloc(ARENAS).count("<heap nr") == 2  # without the setting 16
