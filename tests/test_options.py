"""Options can be deleted: the file, the lines that name it, and nothing else."""

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
    "missed": "missed",
    "cli": "command_line",
    "agents": "dify or adp",
    "version1": "version_1",
}
SOME = "answered_one_to_one or mentioned_in_a_group or without_the_ai"


@pytest.fixture
def without(tmp_path):
    """Return a function that deletes options in a copy, and tests what is left."""
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns(".git", ".venv", "tests", "docs", "__pycache__")
    shutil.copytree(HERE, copy, ignore=ignore)

    def passes(*options, only=""):
        words = "-q -x -p no:cacheprovider".split()
        for option in options:
            copy.joinpath(f"{option}.py").unlink()
            for file in (copy / "config.py", copy / "store.py"):
                lines = file.read_text("utf-8").splitlines(keepends=True)
                file.write_text("".join(x for x in lines if f'"{option}:' not in x))
        for file in copy.glob("*.py"):
            imports = rf"^ *(from|import) ({'|'.join(options)})\b"
            assert not re.search(imports, file.read_text("utf-8"), re.MULTILINE)
        theirs = f"not ({' or '.join(OPTIONS[option] for option in options)})"
        words += ["-k", f"({only}) and {theirs}" if only else theirs]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "test_botserver.py", *words],
            cwd=copy,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        return int(re.search(r"(\d+) passed", done.stdout)[1])

    return passes


@pytest.mark.parametrize("option", OPTIONS)
def test_without_an_option_the_rest_works(without, option):
    assert without(option, only=SOME) >= 6


@pytest.mark.slow
def test_without_any_option_the_rest_passes_its_tests(without):
    assert without(*OPTIONS) > 60
