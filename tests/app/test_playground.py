"""The playground in a real browser."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the playground needs regard[app]")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip

MAPS_CHANGE = """() => {
  const read = () => ["a", "b"].map(side => document.querySelector(`#map-${side} img`)?.src);
  const first = read();
  window.changed = [];
  new MutationObserver(() => window.changed.push(read().map((src, i) => src !== first[i])))
    .observe(document.body, {subtree: true, attributes: true, childList: true});
}"""
"""Notes in ``changed``, whenever the page changes, whether each of both maps is another than now."""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}")]


def test_visitor_uploads_clicks_changes_mechanisms_and_reads_numbers(tmp_path) -> None:
    from regard.app import launch

    address = launch(port=None, wait=False)
    assert address.startswith("http://127.0.0.1:")
    asked: list[str] = []
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path), executable_path=str(CHROMIUM), headless=True, args=ARGUMENTS, viewport={"width": 1280, "height": 900}
        )
        context.set_default_timeout(90_000)
        context.on("request", lambda request: asked.append(request.url))
        page = context.pages[0]
        page.goto(address, wait_until="domcontentloaded")

        def facts(side: str, words: str) -> None:
            sync_api.expect(page.locator(f"#facts-{side}")).to_contain_text(words, timeout=90_000)

        facts("a", "49keys")  # neighborhood(7)
        facts("b", "256keys")  # four of 7 x 7 regions of 8 x 8 tokens

        box = page.locator("#map-a img").bounding_box()
        assert box is not None
        scale = min(box["width"] / 448, box["height"] / 482)  # the picture is fitted into its frame
        left = (box["width"] - 448 * scale) / 2
        page.locator("#map-a img").click(position={"x": left + 2 * scale, "y": 2 * scale})
        sync_api.expect(page.locator("#facts-a")).to_contain_text("row 0", timeout=90_000)

        control = page.locator("#a-kernel_size input, #a-kernel_size textarea").first
        control.fill("3")
        control.press("Enter")
        facts("a", "9keys")
        control.fill("0")
        control.press("Enter")
        sync_api.expect(page.locator("#wrong-a .wrong")).to_contain_text("kernel_size must be at least 1", timeout=90_000)

        page.locator("#mechanism-b input").click()
        page.get_by_role("option", name="multi_head").click()
        facts("b", "3,136keys")

        control.fill("3")
        control.press("Enter")
        facts("a", "9keys")
        page.locator("#measure").click()
        table = page.locator("#costs tr")
        sync_api.expect(table).to_have_count(4, timeout=90_000)
        _, first, second, dense = (row.split("\t") for row in table.all_inner_texts())
        assert (first[0], second[0], dense[0]) == ("A neighborhood", "B multi_head", "dense")
        assert second[1] == dense[1] != first[1]
        assert page.locator("#old").inner_text().strip() == ""
        control.fill("5")
        control.press("Enter")
        sync_api.expect(page.locator("#old")).to_contain_text("earlier settings", timeout=90_000)

        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), (10, 90, 200)).save(buffer, "PNG")
        page.locator("#send input[type=file], input[type=file]").first.set_input_files(
            {"name": "blue.png", "mimeType": "image/png", "buffer": buffer.getvalue()}
        )
        facts("b", "11.61 bit")  # of a picture of one colour: all 3136 keys alike

        page.get_by_role("tab", name="Trained model").click()
        sync_api.expect(page.locator("#model-title")).to_contain_text("tiny_dino, trained, 224x224 pixels", timeout=90_000)
        page.locator("#checkpoint textarea, #checkpoint input").first.fill("/etc/passwd")
        page.locator("#open").click()
        sync_api.expect(page.locator("#model-wrong")).to_contain_text("are read from .safetensors files", timeout=90_000)

        page.get_by_role("tab", name="Catalog").click()
        page.locator("#systems th:visible", has_text="Name").first.hover()
        page.locator("#systems th:visible .cell-menu-button").first.click()
        page.get_by_text("Sort ascending").first.click()
        page.locator("#systems").get_by_text("BiFormer").locator("visible=true").first.click()
        sync_api.expect(page.locator("#about h3")).to_have_text("BiFormer", timeout=90_000)

        page.get_by_role("tab", name="Compare").click()
        page.evaluate(MAPS_CHANGE)
        page.locator("#photo input").click()
        page.get_by_role("option", name="coffee").click()
        page.wait_for_function("window.changed.some(both => both.every(Boolean))", timeout=90_000)
        assert page.evaluate("window.changed.every(([a, b]) => a === b)")  # never an old photograph beside a new one

        page.set_viewport_size({"width": 390, "height": 800})
        page.goto(address, wait_until="domcontentloaded")
        facts("b", "keys")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert all(tab.is_visible() for tab in page.get_by_role("tab").all())
        assert page.get_by_role("tab").count() == 3
        context.close()
    assert [url for url in asked if url.startswith("http") and not url.startswith(address)] == []


def test_page_of_an_explanation_shows_its_pictures_and_asks_for_nothing(tmp_path) -> None:
    from regard.cli import main

    out = tmp_path / "seen"
    with pytest.raises(SystemExit) as left:
        main(["explain", "chelsea", "--model", "tiny_dino", "--query", "150,225", "--rollout", "--out", str(out)])
    assert not left.value.code
    asked: list[str] = []
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path / "profile"), executable_path=str(CHROMIUM), headless=True, args=ARGUMENTS
        )
        context.on("request", lambda request: asked.append(request.url))
        page = context.pages[0]
        page.goto((tmp_path / "seen.html").as_uri())
        widths = page.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
        page.screenshot(path=str(tmp_path / "seen-in-browser.png"), full_page=True)
        context.close()
    assert widths
    assert all(width > 0 for width in widths)
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
