"""The queue: messages wait in a store, a pool of threads works on them.

Nothing here knows of chats, AI or Tencent.
"""

from ..timing import NORMAL, Timing
from .sql import NO_LIMIT, Added
from .store import MAX_ATTEMPTS, OPEN, Claim, Store, StoreBusy, StoreError
from .workers import Job, LeaseLost, Workers, log_error

__all__ = [
    "MAX_ATTEMPTS",
    "NO_LIMIT",
    "OPEN",
    "Added",
    "Claim",
    "Job",
    "LeaseLost",
    "Store",
    "StoreBusy",
    "StoreError",
    "Workers",
    "log_error",
    "open_store",
]


def open_store(
    url: str, timing: Timing = NORMAL, app: int = 0, wait: bool = False
) -> Store:
    """Open the store that a DATABASE_URL names, for one app (IM_SDKAPPID), or for
    any if `app` is 0. Raises StoreError, unless `wait`, if its host is unknown."""
    scheme = url.partition(":")[0]
    if scheme == "sqlite":
        from .sqlite import SQLiteStore

        return SQLiteStore(url, timing, app)
    try:
        from .postgres import PostgresStore
    except ImportError as error:
        raise StoreError(f"{error}; see requirements.txt") from None
    return PostgresStore(url, timing, app, wait)
