"""The docs' screenshots of the page: the real page, worker and pocket models, in a real browser.

python -m builder.page_pictures    writes docs/images/page-picture.png and page-chat.png
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from builder import browser

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs/images"
SIZE = {"width": 1180, "height": 700}

#: The longest time for a job on a slow machine, in milliseconds.
TIMEOUT_MS = 400_000


def main() -> None:
    """Generate a picture and ask a question on the page, and take a screenshot of each."""
    found = browser.find()
    if found is None:
        sys.exit("no browser: python -m builder.browser fetches one")
    with served() as url, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=found.program, args=list(found.arguments), env=dict(found.env)
        )
        page = chromium.new_page(viewport=SIZE)  # type: ignore[arg-type]
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(url)
        page.wait_for_selector("#send:enabled")
        take(page, "page-picture.png", generate_picture)
        take(page, "page-chat.png", ask)
        chromium.close()


def generate_picture(page: Page) -> None:
    page.select_option("#type", "sdxl_image_fast")
    page.select_option("[name='config.resolution']", "512x512")
    page.fill("[name='config.guidance_scale']", "6")
    page.fill("[name='config.seed']", "2026")
    page.click("#send")
    page.wait_for_selector("figure img")


def ask(page: Page) -> None:
    page.select_option("#type", "chat_conversation")
    page.fill("[name='system']", "You are a helpful assistant. Answer in one sentence.")
    page.fill("[name='max_tokens']", "60")
    page.fill("[name='temperature']", "0")
    page.click("#send")
    page.wait_for_selector(".talk p:last-child:not(.growing)")


def take(page: Page, name: str, act: Callable[[Page], None]) -> None:
    """Run `act` and save a screenshot in 256 colours. The page has hardly more."""
    act(page)
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        page.screenshot(path=file.name)
        Image.open(file.name).convert("RGB").quantize(256).save(IMAGES / name, optimize=True)


@contextmanager
def served() -> Iterator[str]:
    """Run a worker for pictures and chat on the pocket models. The value is its page's URL."""
    with tempfile.TemporaryDirectory() as folder:
        env = {"SERVE": "http", "FAMILIES": "sdxl,chat", "HOST": "127.0.0.1", "PORT": "0"}
        process = subprocess.Popen(
            [sys.executable, "handler.py"],
            env={**os.environ, **env, "STORAGE_URL": f"file:{folder}"},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        try:
            lines = iter(process.stderr.readline, "")
            yield next(found[0] for line in lines if (found := re.search(r"http://\S+", line)))
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
