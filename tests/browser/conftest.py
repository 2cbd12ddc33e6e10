"""A headless Chromium for pages that open from disk; any other request, complaint or error fails the test."""

import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

HINT = "willReadFrequently"  # Chromium's advice to tests that read a canvas; the page reads none


@pytest.fixture(scope="session")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    own = next(filter(None, map(shutil.which, names)), None)  # none: the one that `playwright install chromium` fetches
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium's sandbox refuses root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=own, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """visit(path, **options of the context) -> the page, when its script is through."""
    contexts, wrong = [], []

    def requested(request):
        if not request.url.startswith(("file:", "data:", "blob:")):
            wrong.append(request.url)

    def open_page(path, **options):
        context = browser.new_context(offline=True, **{"viewport": {"width": 1400, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", requested)
        page.on("console", lambda message: None if HINT in message.text else wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(path.resolve().as_uri())
        page.wait_for_selector("body[data-ready]", timeout=20_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong
