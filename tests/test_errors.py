"""Every error raised on purpose is of one family."""

from __future__ import annotations

from ptqd_export import errors
from ptqd_export.errors import PTQDError


def test_every_error_is_a_ptqd_error() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) == 7
    assert all(issubclass(kind, PTQDError) for kind in kinds)
