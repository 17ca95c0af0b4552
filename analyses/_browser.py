"""A headless Chromium for pictures of pages and for tests, driven by Playwright."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

_NAMES: Final = ("chromium", "chromium-browser", "google-chrome")
_FLAGS: Final = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def executable() -> str:
    """Path of the machine's Chromium.

    Raises:
        FileNotFoundError: there is none.
    """
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        raise FileNotFoundError(f"no Chromium is installed (none of {', '.join(_NAMES)}).")
    return found


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with a fresh profile: the machine's own, never one that Playwright downloads.

    Raises:
        FileNotFoundError: there is none.
    """
    found = executable()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, headless=True, args=list(_FLAGS))
        try:
            yield browser
        finally:
            browser.close()
