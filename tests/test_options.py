"""Options can be deleted: the file, its lines in config.py, and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from conftest import HERE

# What test_botserver.py asks of an option: names of its tests, or of their parameters.
OPTIONS = {
    "growing": "modify or custom or stream or button or card",
    "postgres": "postgres",
    "cli": "command_line",
    "agents": "dify or adp",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_without_an_option_the_rest_starts_and_passes_its_tests(option, tmp_path):
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns(".git", ".venv", "tests", "docs", "__pycache__")
    shutil.copytree(HERE, copy, ignore=ignore)
    copy.joinpath(f"{option}.py").unlink()
    config = copy.joinpath("config.py")
    lines = config.read_text("utf-8").splitlines(keepends=True)
    config.write_text("".join(line for line in lines if f'"{option}:' not in line))
    for file in copy.glob("*.py"):
        text = file.read_text("utf-8")
        assert not re.search(rf"^(from|import) {option}\b", text, re.MULTILINE)
    words = ["-q", "-x", "-p", "no:cacheprovider", "test_botserver.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "-k", f"not ({OPTIONS[option]})"],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d\d passed", done.stdout)
