"""What the doctor says of the store."""

from __future__ import annotations

from contextlib import closing

import pytest
from stores import fail, full_disk, put

from imbot.cli import check_store
from imbot.queue import StoreError, open_store
from imbot.settings import Settings


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bot.db"


@pytest.fixture
def settings(path):
    return Settings(im_sdkappid=2, database_url=f"sqlite:///{path}")


def test_it_says_what_a_store_promises_and_holds(settings, path):
    with closing(open_store(settings.database_url)) as store:
        put(store, "1", "2")
        fail(store)
        said = check_store(settings)
        assert said.startswith(f"{path}: on this disk before a callback")
        assert said.endswith("; 1 waiting, 1 failed")
        assert store.owner() is None, "it changes nothing"


def test_it_creates_no_file(settings, path):
    assert check_store(settings) == f"{path} is not there yet: the server will make it"
    assert not path.exists()


def test_it_refuses_a_database_in_memory():
    settings = Settings(im_sdkappid=2, database_url="sqlite:///:memory:")
    with pytest.raises(StoreError, match="keeps nothing"):
        check_store(settings)


def test_it_finds_that_a_database_is_another_apps(settings):
    open_store(settings.database_url, app=1).close()
    with pytest.raises(StoreError, match="IM_SDKAPPID 1, and this server's is 2"):
        check_store(settings)


def test_it_finds_a_full_disk_before_there_is_a_database(settings, path):
    with full_disk(path), pytest.raises(ValueError, match="cannot be made: File too"):
        check_store(settings)
    assert not [*path.parent.iterdir()]


def test_it_finds_a_full_disk(settings, path):
    with closing(open_store(settings.database_url)) as store:
        put(store, "1")
        with full_disk(path), pytest.raises(StoreError, match="disk"):
            check_store(settings)
