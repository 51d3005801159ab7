"""The site builds without a warning and is read in a browser: links, pictures, width, search, the dark scheme."""

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

from tests.browser import open_browser

pytest.importorskip("mkdocs", reason="mkdocs is not installed: make test installs it")

ROOT = Path(__file__).parent.parent.parent
PHONE = {"width": 375, "height": 812}
SHOTS = os.environ.get("SITE_SCREENSHOTS")  # a folder: every page is photographed at three sizes


class Links(HTMLParser):
    """The addresses that a page names, and its anchors."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], {""}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.anchors |= {named[key] for key in ("id", "name") if named.get(key)}
        if tag == "a" and named.get("href"):
            self.links.append(named["href"])
        elif tag == "link" and named.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.loaded.append(named.get("href", ""))
        self.loaded += [named[key].split()[0] for key in ("src", "srcset") if named.get(key)]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "SITE_DIR": str(folder)}
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """Address -> what is in it."""
    found = sorted(path for path in site.rglob("*.html"))
    return {path.relative_to(site).as_posix(): Links(path.read_text(encoding="utf-8")) for path in found}


def test_every_link_and_picture_leads_somewhere(site, pages):
    broken = []
    for page, links in pages.items():
        if page == "404.html":  # its addresses are absolute, since it is shown for any missing one
            continue
        for link in [*links.links, *links.loaded]:
            if re.match(r"(https?:|mailto:|data:|javascript:)", link):
                if link in links.loaded and not link.startswith("data:"):
                    broken.append(f"{page} loads {link} from another server")
                continue
            path, anchor = urldefrag(urljoin(f"/{page}", link))
            target = unquote(path).lstrip("/") or "index.html"
            if not (site / target).is_file():
                broken.append(f"{page} -> {link}")
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors | {"__skip"}:
                broken.append(f"{page} -> {link}: no such anchor")
    assert not broken, "\n".join(broken)


@pytest.fixture(scope="module")
def address(site):
    """The address at which the site is served."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


def watched(browser, address, wrong, **options):
    """Return a page whose errors, and requests to other servers, are noted in `wrong`."""
    page = browser.new_page(**options)
    page.on("request", lambda request: _note_foreign(request.url, page, address, wrong))
    page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
    page.on("console", lambda message: wrong.append(f"{page.url}: {message.text}") if message.type == "error" else None)
    page.on(
        "response",
        lambda answer: wrong.append(f"{page.url}: {answer.url}: {answer.status}") if answer.status >= 400 else None,
    )
    return page


def _note_foreign(url, page, address, wrong):
    if not url.startswith((address, "data:", "blob:")):
        wrong.append(f"{page.url} asks {url}")


def shown(pages):
    """Addresses to open: every page, of the many that show a source file only some."""
    sources = [page for page in pages if page.startswith("source/")]
    return [page for page in pages if page not in sources and page != "404.html"] + sources[:3]


WIDER = """() => [document.documentElement.scrollWidth, [...document.querySelectorAll('body *')]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && getComputedStyle(e).position !== 'fixed')
  .slice(0, 3).map(e => e.outerHTML.slice(0, 120))]"""
BROKEN = "() => [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"


def test_every_page_is_read_on_a_phone(browser, address, pages):
    wrong = []
    page = watched(browser, address, wrong, viewport=PHONE)
    for name in shown(pages):
        page.goto(address + name)
        width, elements = page.evaluate(WIDER)
        if width > PHONE["width"]:
            wrong.append(f"{name} is {width} pixels wide: {elements}")
        wrong += [f"{name} cannot show {src}" for src in page.evaluate(BROKEN)]
        if SHOTS:
            page.screenshot(path=f"{SHOTS}/phone_{name.replace('/', '_')}.png")
    page.close()
    for scheme in ("dark", "light") if SHOTS else ():
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        for name in shown(pages):
            page.goto(address + name)
            page.screenshot(path=f"{SHOTS}/{scheme}_{name.replace('/', '_')}.png")
        page.close()
    assert not wrong, "\n".join(wrong)


def test_the_search_finds_a_word_and_opens_its_page(browser, address):
    wrong = []
    page = watched(browser, address, wrong, viewport={"width": 1280, "height": 800})
    page.goto(address)
    page.click("[data-md-component=search-query]")
    page.locator("[data-md-component=search-query]").press_sequentially("Muon")
    link = page.locator(".md-search-result__link").first
    link.wait_for()
    link.click()
    page.wait_for_url(re.compile("phase6|muon|parts|api", re.IGNORECASE))
    assert "Muon" in page.inner_text("article")
    page.close()
    assert not wrong, "\n".join(wrong)


def test_the_page_is_dark_where_the_reader_wants_it(browser, address):
    wrong = []
    page = watched(browser, address, wrong, viewport={"width": 1280, "height": 900}, color_scheme="dark")
    page.goto(address + "phase3.html")
    red, green, blue = map(
        int, re.findall(r"\d+", page.evaluate("() => getComputedStyle(document.body).backgroundColor"))[:3]
    )
    assert max(red, green, blue) < 80
    page.close()
    assert not wrong, "\n".join(wrong)
