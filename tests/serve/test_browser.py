"""The page in a real browser: two readers at once, probabilities, attention, and no request to another machine."""

import mlx.core as mx
import pytest

import mlx_transformer as mt
from tests.browser import open_browser
from tests.serve.served import served

pytest.importorskip("starlette", reason="starlette is not installed: make test installs it")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: make test installs it")

SAID = {"first": ("the cat", 3), "second": ("a <b>dog</b>\n  sat", 5)}
TOKENS = 60  # past the context of 48


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(browser, run):
    with served(run) as (_, address):
        yield address


@pytest.fixture
def pages(browser, address):
    """Two pages, what they asked for, and what they complained of."""
    context, heard = browser.new_context(viewport={"width": 390, "height": 800}), {"asked": [], "errors": []}
    context.set_default_timeout(15_000)
    context.on("request", lambda request: heard["asked"].append(request.url))
    context.on("weberror", lambda error: heard["errors"].append(str(error.error)))
    context.on("console", lambda line: heard["errors"].append(line.text) if line.type == "error" else None)
    pages = [context.new_page() for _ in range(2)]
    for page in pages:
        page.goto(address)
        page.locator("#layer option").nth(1).wait_for(state="attached")
    yield pages, heard
    context.close()


def write(page, prompt, *, seed=0, max_tokens=TOKENS):
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.fill("#max_tokens", str(max_tokens))
    page.click("#go")


def test_two_readers_at_once(pages, run, address):
    (first, second), heard = pages
    for page, (prompt, seed) in zip((first, second), SAID.values(), strict=True):
        write(page, prompt, seed=seed)
    model, tokenizer = mt.load(run)
    for page, (prompt, seed) in zip((first, second), SAID.values(), strict=True):
        page.locator("#status", has_text="tokens/s").wait_for()
        (expected,) = mt.generate(model, tokenizer, prompt, seed=seed, max_tokens=TOKENS)
        assert page.locator("#text").text_content() == expected.text
        assert page.locator(".t").count() == len(tokenizer.encode(prompt)) + 1 + len(expected.tokens)
        assert page.locator("b").count() == 0

    tokens = [tokenizer.bos_id, *tokenizer.encode("the cat")]
    p = mx.softmax(model(mx.array([tokens]))[0, -1])
    first.locator(".t").nth(len(tokens)).hover()
    first.wait_for_selector(".candidate.own")
    row = first.locator("#token .candidate").first
    assert row.locator("code").get_attribute("title") == tokenizer.token(mx.argmax(p).item())
    assert float(row.locator(".p").text_content().split()[0]) == pytest.approx(100 * p.max().item(), rel=0.06)

    first.select_option("#layer", "1")
    first.select_option("#head", "0")
    first.locator("#token h3", has_text="The model no longer sees this token").wait_for()
    first.locator(".t.forgotten").first.wait_for()  # the text is longer than the context
    first.locator(".t").last.hover()
    first.locator("#token h3", has_text="Attends to").wait_for()
    assert first.locator(".t.shaded").count() > 10
    assert first.evaluate("document.documentElement.scrollWidth") <= 390
    assert heard["errors"] == []
    assert {url.split("/")[2] for url in heard["asked"]} == {address.removeprefix("http://")}


def test_a_reader_stops_and_is_told_what_is_wrong(pages):
    (page, _), heard = pages
    page.fill("#temperature", "0")  # the most probable tokens, which do not end the text
    write(page, "the cat", max_tokens=10_000)
    page.wait_for_selector(".t:not(.given)")
    page.click("#stop")
    page.locator("#status", has_text="stopped after").wait_for()
    written = page.locator("#text").text_content()
    write(page, " ")
    page.wait_for_selector("#error:not([hidden])")
    assert page.locator("#error").text_content() == "prompt ' ' is empty: expected some text to continue"
    assert page.locator("#text").text_content() == written
    assert [line for line in heard["errors"] if "400" not in line] == []
