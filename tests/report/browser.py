"""Whether there is a browser for the tests that need one."""

from __future__ import annotations

import os

import pytest

from analyses._browser import executable


def need_browser() -> None:
    """Skip where no browser is installed; where CI=true, fail."""
    pytest.importorskip("playwright")
    try:
        executable()
    except FileNotFoundError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))
