"""`python -m tests.serve.screenshot RUN FILE.png [light|dark] [WIDTH]`: a picture of the page, for docs/serve.md."""

import sys

from tests.browser import open_browser
from tests.serve.served import served


def take(run: str, file: str, scheme: str = "light", width: str = "1000") -> None:
    """Write a story with the model of a run, point at a token, and take the picture."""
    with served(run) as (_, address), open_browser() as browser:
        page = browser.new_page(viewport={"width": int(width), "height": 760}, color_scheme=scheme)
        page.goto(address)
        page.fill("#seed", "1")
        page.click("#go")
        page.locator("#status", has_text="tokens/s").wait_for()
        page.select_option("#layer", str(page.locator("#layer option").count() - 2))
        page.locator(".t").nth(page.locator(".t").count() * 2 // 3).hover()
        page.wait_for_selector("#token h3")
        page.screenshot(path=file, scale="css")


if __name__ == "__main__":
    take(*sys.argv[1:])
