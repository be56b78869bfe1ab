"""The docs' screenshots of the page: the real page, worker and pocket models, in a real browser.

python -m builder.page_pictures    writes docs/images/page-picture.png and page-chat.png
"""

from __future__ import annotations

import json
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
SIZE = {"width": 1280, "height": 860}

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
    """The first picture of `make run`."""
    job = json.loads((ROOT / "test_input.json").read_text())["input"]
    config = job["config"]
    page.select_option("#type", job["type"])
    page.fill("[name='prompt']", job["prompt"])
    page.select_option("[name='config.resolution']", config["resolution"])
    for name in ("num_inference_steps", "guidance_scale", "seed"):
        page.fill(f"[name='config.{name}']", f"{config[name]:g}")
    page.click("#send")
    page.wait_for_selector("figure img")
    page.wait_for_selector("#state:has-text('Completed')")


def ask(page: Page) -> None:
    """The first question of `make chat`."""
    job = json.loads((ROOT / "test_input.chat.json").read_text())["input"]
    system, question = (message["content"] for message in job["messages"])
    page.select_option("#type", job["type"])
    page.fill("[name='system']", system)
    page.fill("[name='words']", question)
    for name in ("max_tokens", "temperature"):
        page.fill(f"[name='{name}']", str(job[name]))
    page.click("#send")
    page.wait_for_selector(".talk p:last-child:not(.growing)")
    page.wait_for_selector("#state:has-text('Completed')")


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
