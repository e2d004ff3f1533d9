"""What a failure of the database is to the rest of the program.

Guarantees: every error of SQLAlchemy, of a driver or of a connection leaves this room as `StoreUnavailable`,
its cause attached; `StoreRefused` alone says that trying again does not help; no text is quoted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from soma_vllm.errors import StoreRefused, StoreUnavailable

CONTRADICTED = (IntegrityError, DataError, ProgrammingError)


@contextmanager
def translated(store: str = "the session store") -> Iterator[None]:
    """Raise what the database raises inside as an error of this package.

    Raises:
        StoreRefused: the database answered, and said no.
        StoreUnavailable: it did not answer, or it is full.
    """
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        name = type(error).__name__
        if _may_pass(error):
            raise StoreUnavailable(f"{store} did not answer ({name})") from error
        duplicate = isinstance(error, IntegrityError)
        raise StoreRefused(f"{store} refused a statement ({name})", duplicate=duplicate) from error


def _may_pass(error: SQLAlchemyError | OSError) -> bool:
    """Whether trying again can help: the database was away or full, not contradicted."""
    if isinstance(error, OSError):
        return True
    return isinstance(error, DBAPIError | PoolTimeout) and not isinstance(error, CONTRADICTED)
