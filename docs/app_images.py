"""Make docs/images/app-*.png: pictures of the playground, from a real browser.

    python docs/app_images.py

Needs ``regard[app]``, playwright and Debian's chromium.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright

from regard.app import launch

IMAGES = Path(__file__).parent / "images"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
PATIENCE = 60_000
"""Milliseconds."""


def main() -> None:
    torch.set_num_threads(1)
    address = launch(port=None, wait=False)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        context = playwright.chromium.launch_persistent_context(
            folder, executable_path="/usr/bin/chromium", headless=True, args=ARGUMENTS, viewport={"width": 1280, "height": 900}
        )
        context.set_default_timeout(PATIENCE)
        page = context.pages[0]
        page.goto(address, wait_until="domcontentloaded")
        for side in "ab":
            page.locator(f"#map-{side} img").wait_for(state="visible")
        with page.expect_response(lambda _: True):
            page.locator("#map-a img").click(position={"x": 150, "y": 190})
        page.wait_for_timeout(6000)
        page.screenshot(path=IMAGES / "app-compare.png", full_page=True)
        page.locator("#measure").click()
        page.locator("#growth img").wait_for(state="visible")
        page.wait_for_timeout(1000)
        page.screenshot(path=IMAGES / "app-cost.png", full_page=True)
        page.get_by_role("tab", name="Trained model").click()
        page.locator("#model-maps img").wait_for(state="visible")
        page.locator("#model-photo img").click(position={"x": 95, "y": 120})  # an eye
        page.wait_for_timeout(4000)
        page.screenshot(path=IMAGES / "app-trained.png", full_page=True)
        page.get_by_role("tab", name="Catalog").click()
        page.locator("#search input, #search textarea").first.fill("window")
        page.locator("#about .formula").wait_for(state="visible")
        page.wait_for_timeout(3000)
        page.screenshot(path=IMAGES / "app-catalog.png", full_page=True)
        context.close()
    os._exit(0)  # the server's threads would keep the process


if __name__ == "__main__":
    main()
