"""A headless Chromium for the tests of pages, and pages that watch themselves.

Without a Chromium the tests are skipped; with NEED_CHROMIUM=1 they fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import expect, sync_playwright

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

LIMIT_MS = 20_000  # for anything to appear; the cores may be busy with other tests


# Of a module, not of the session: while Playwright runs, asyncio.run fails in every other test of this process.
@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        refuse = pytest.fail if os.environ.get("NEED_CHROMIUM") else pytest.skip
        refuse("no Chromium here: install it, or name one in CHROMIUM")
    expect.set_options(timeout=LIMIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable]:
    """Opens a page in a context of its own; its requests and errors are in page.urls and page.complaints."""
    contexts = []

    def open_page(url: str, **settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(LIMIT_MS)
        page.urls, page.complaints = [], []
        page.on("request", lambda request: page.urls.append(request.url))
        page.on("console", lambda message: message.type == "error" and page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
