"""`minidiffedit ui` in headless Chromium, on the miniature: a visitor's whole way, and what else may come along."""

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import expect

from minidiffedit import cli

pytest.importorskip("gradio", reason="the page needs Gradio: pip install '.[ui]'")
SCREENSHOTS = Path(__file__).parents[2] / ".screenshots"
MINI = Path(__file__).parents[2] / "weights" / "mini"
HORSE, ZEBRA = "a photo of a horse on a grass field", "a photo of a zebra on a grass field"
PHOTO = MINI / "scenes" / "horse-zebra" / "source.png"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """The command in a process of its own."""

    def __init__(self, folder, *words, port=None):
        self.port, self.log = port or free_port(), folder / "log.txt"
        code = "import sys; from minidiffedit.cli import main; sys.exit(main())"
        argv = [sys.executable, "-c", code, "ui", *words, "--model", "mini", "--port", str(self.port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MINIDIFFEDIT_CACHE": str(folder)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, cwd=folder, env=environment)
        began = time.monotonic()
        while "shows the page" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() - began < 120, self.log.read_text()
            time.sleep(0.2)
        self.seconds, self.url = time.monotonic() - began, f"http://127.0.0.1:{self.port}/"

    def end(self):
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    one = Server(tmp_path_factory.mktemp("server"))
    yield one
    one.end()


@pytest.fixture
def come(browser):
    """come(server, **options of the context) -> a visitor's page; a request to any other machine fails the test."""
    contexts, elsewhere = [], []

    def visit(server, **options):
        context = browser.new_context(
            **{"viewport": {"width": 1400, "height": 1000}, "accept_downloads": True} | options
        )
        contexts.append(context)
        page = context.new_page()
        local = ("http://127.0.0.1:", "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(local) else elsewhere.append(request.url))
        page.goto(server.url)
        expect(page.get_by_role("button", name="Find the mask")).to_be_visible(timeout=30_000)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not elsewhere
