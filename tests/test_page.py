"""The page of a server works in a real browser, under its strict content security policy, without a network."""

import re
import time

import pytest
from fake_server import PAGE, FakeServer, described, serving

HOSTILE = "<img src=x onerror=\"document.title='broken in'\">"
SCORES = {
    "banking": {"card_lost": 0.5, "card_stolen": 0.25, "pin_forgotten": 0.125, "savings_rate": 0.06, "atm": 0.05,
                "travel_notice": 0.0125},
    "travel": {"visa": 0.375, "hotel": 0.25},
    "topics": {"money": 0.875, "cards": 0.5, "travel": 0.125},
    HOSTILE: {"<script>document.title='broken in'</script>": 0.75, HOSTILE: 0.25},
    "a-very-long-name-" * 8: {"a_very_long_label_" * 8: 1.0},
    "torn": {"a": 1.0},
}  # fmt: skip
CHANGES = {
    "banking": {"method": "lora:rank=4", "metrics": {"test": {"accuracy": 0.9312}, "validation": {"accuracy": 0.5}}},
    "travel": {"threshold": 0.4},
    "topics": {"multi": True},
    "torn": {"status": "broken", "version": None, "error": "The file is cut short."},
}


def adapters(scores):
    return {name: described(name, labels, **CHANGES.get(name, {})) for name, labels in scores.items()}


class Page:
    """What a reader sees and does."""

    def __init__(self, browser, server):
        self.browser, self.server = browser, server

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def texts(self, selector):
        return self.browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
        )

    def until(self, holds):
        for _ in range(200):
            if found := holds():
                return found
            time.sleep(0.02)
        raise AssertionError(self.browser.execute_script("return document.body.innerText"))

    def choose(self, *names):
        for box in self.all("#list input"):
            if box.get_attribute("value") in names:
                box.click()

    def ask(self, text, *names):
        """The cards of the answers, by the button."""
        self.choose(*names)
        self.browser.find_element("id", "text").send_keys(text)
        self.browser.find_element("id", "ask").click()
        self.until(lambda: self.all("#results article") and not self.all("#results[aria-busy]"))
        return self.all("#results article")

    def error(self):
        return self.until(lambda: self.browser.find_element("id", "error").text)


@pytest.fixture
def show(browser):
    """Opens the page over adapters, in a window of some width under a colour scheme."""
    running = []

    def open_page(scores=SCORES, width=1280, scheme="light"):
        server = FakeServer(scores, adapters(scores))
        running.append(serving(server))
        running[-1].__enter__()
        preference = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
        size = {"width": width, "height": 1600, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get_log("browser")
        browser.get(server.url + "/")
        page = Page(browser, server)
        page.until(lambda: page.all("#list li"))
        return page

    yield open_page
    for server in running:
        server.__exit__(None, None, None)


def test_the_page_is_one_file_that_never_makes_markup_of_data():
    page = PAGE.read_text()
    assert page.count("<script") == page.count("<style") == 1 and " style=" not in page and " on" + "click" not in page
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|@import|url\(|https?:", page)


def test_adapters_are_listed_with_what_is_known_of_them(show):
    page = show()
    assert page.texts("#list .name") == list(SCORES)
    assert page.texts("#list .faint")[:2] == ["lora:rank=4 · 6 labels · accuracy 93.1 % on test", "ia3 · 2 labels"]
    assert page.texts("#list .faint")[-1] == "The file is cut short."
    assert [box.is_enabled() for box in page.all("#list input")] == [True] * 5 + [False]
    assert page.texts("#server") == ["minilm · fp32"] and page.texts("#chosen li") == []
    assert page.browser.get_log("browser") == []


def test_an_answer_has_bars_as_wide_as_its_percentages(show):
    page = show()
    (card,) = page.ask("I lost it", "banking")
    assert card.find_element("css selector", ".label").text == "card_lost"
    top = list(SCORES["banking"].items())[:5]
    lines = [item.text.split("\n") for item in card.find_elements("css selector", "li")]
    assert lines == [[label, f"{100 * share:.1f} %"] for label, share in top]
    widths = page.browser.execute_script(
        "return [...document.querySelectorAll('.bar')].map(b => b.getBoundingClientRect().width /"
        " b.parentElement.getBoundingClientRect().width)"
    )
    assert widths == pytest.approx([share for _, share in top], abs=0.005)
    version = page.server.adapters["banking"]["version"]
    assert re.fullmatch(rf"version {version} · \d+ ms", page.texts("#results .faint")[-1])
    assert page.server.asked[-1][2] == {"adapter": "banking", "texts": ["I lost it"], "top_k": 5}
    assert page.browser.get_log("browser") == []


def test_two_adapters_are_asked_at_once_and_stand_side_by_side(show):
    page = show()
    left, right = page.ask("where to?", "banking", "travel")
    assert left.rect["y"] == right.rect["y"] and left.rect["x"] + left.rect["width"] < right.rect["x"]
    assert page.texts("#results .label") == ["card_lost", "out of scope"]
    assert "No label reaches 40.0 %." in right.text and "visa" in right.text
    asked = [body for _, path, body, _ in page.server.asked if path == "/v1/classify"]
    assert [[item["adapter"] for item in body] for body in asked] == [["banking", "travel"]]
    assert not any(box.is_enabled() for box in page.all("#list input:not(:checked)"))
    page.all("#chosen button")[0].click()
    assert page.texts("#chosen li") == ["travel ×"]
    assert [box.is_enabled() for box in page.all("#list input")] == [True] * 5 + [False]


def test_the_keyboard_is_enough(show):
    from selenium.webdriver import Keys

    page = show()
    page.all("#filter")[0].send_keys("topics", Keys.TAB, Keys.SPACE)
    page.until(lambda: page.texts("#chosen li") == ["topics ×"])
    page.all("#text")[0].send_keys("first line", Keys.ENTER, "second", Keys.CONTROL + Keys.ENTER)
    page.until(lambda: page.texts("#results .label") == ["money, cards"])
    assert page.server.asked[-1][2]["texts"] == ["first line\nsecond"]
    assert page.texts("#results .given > :first-child") == ["money", "cards"]
    named = page.browser.execute_script(
        "return [...document.querySelectorAll('input, textarea')].map(e => !!(e.labels.length || e.ariaLabel))"
    )
    assert all(named) and page.all("#results[aria-live=polite]") and page.all("#error[role=alert]")


def test_names_and_labels_are_shown_as_text_whatever_they_are(show):
    page = show()
    page.ask("hello <b>", HOSTILE)
    assert page.texts("#results h2") == [HOSTILE]
    assert page.texts("#results li > :first-child") == list(SCORES[HOSTILE])
    page.server.failures.append((422, {}, b'{"error": "Not <img src=x onerror=alert(1)>."}'))
    page.all("#ask")[0].click()
    assert page.error() == "Not <img src=x onerror=alert(1)>."
    assert page.browser.title == "Infuse" and not page.all("img, main script")


def test_errors_are_the_sentences_of_the_server(show):
    page = show()
    page.all("#ask")[0].click()
    assert page.error() == "Choose an adapter first."
    page.choose("banking")
    page.all("#ask")[0].click()
    page.until(lambda: page.error() == "Type a text first.")
    page.server.failures.append((429, {"Retry-After": "1"}, b'{"error": "The queue is full."}'))
    page.all("#text")[0].send_keys("hello")
    page.all("#ask")[0].click()
    page.until(lambda: page.error() == "The queue is full.")
    assert page.texts("#results article") == []
    page.server.failures.append((502, {}, b"<html>Bad gateway"))
    page.all("#ask")[0].click()
    page.until(lambda: "status 502" in page.error())
    page.ask("")
    assert not page.all("#error")[0].is_displayed()


def test_a_server_that_is_gone_is_said_to_be(browser):
    with serving(FakeServer(SCORES, adapters(SCORES))) as server:
        page = Page(browser, server)
        browser.get(server.url + "/")
        page.until(lambda: page.all("#list li"))
        browser.execute_script("window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
        page.all("#reload")[0].click()
        assert "can't be reached" in page.error()


def test_thousands_of_adapters_are_filtered(show):
    page = show({f"team-{i:04d}": {"yes" if i % 2 else "no": 1.0} for i in range(5000)})
    assert len(page.all("#list li")) == 100 and "5,000 of 5,000 adapters; the first 100" in page.texts("#hint")[0]
    page.choose("team-0001")
    started = time.monotonic()
    page.all("#filter")[0].send_keys("TEAM-432 yes")
    assert page.texts("#list .name") == [f"team-432{i}" for i in range(1, 10, 2)]
    assert time.monotonic() - started < 3
    page.choose("team-4321")
    assert page.texts("#chosen li") == ["team-0001 ×", "team-4321 ×"]
    page.all("#filter")[0].send_keys(" nothing")
    assert page.texts("#list .name") == [] and "0 of 5,000" in page.texts("#hint")[0]


def test_a_single_adapter_is_chosen_already_and_reload_finds_more(show):
    page = show({"travel": SCORES["travel"]})
    assert page.texts("#chosen li") == ["travel ×"]
    page.server.adapters["banking"] = described("banking", SCORES["banking"])
    page.all("#reload")[0].click()
    page.until(lambda: page.texts("#list .name") == ["travel", "banking"])
    assert page.texts("#chosen li") == ["travel ×"]


@pytest.mark.parametrize("width", [320, 390])
def test_nothing_scrolls_sideways_on_a_phone(show, width):
    page = show(width=width)
    upper, lower = page.ask("hello " * 30, "banking", next(name for name in SCORES if "long" in name))
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert lower.rect["y"] > upper.rect["y"] + upper.rect["height"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_scheme_and_stand_out(show, scheme):
    page = show(scheme=scheme)
    page.ask("hello", "travel", "banking")
    pairs = page.browser.execute_script("""
        const solid = e => { const c = getComputedStyle(e).backgroundColor;
            return c === 'rgba(0, 0, 0, 0)' ? solid(e.parentElement) : c; };
        return [...document.querySelectorAll('h1, h2, p, .name, .faint, .label, button, textarea, li span')]
            .filter(e => e.textContent.trim() && !e.closest('label:has(:disabled)'))
            .map(e => [getComputedStyle(e).color, solid(e)]);
    """)
    page_colour = luminance(page.browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert page_colour > 0.9 if scheme == "light" else page_colour < 0.05
    for ink, paper in pairs:
        low, high = sorted((luminance(ink), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)  # WCAG's AA


def luminance(colour):
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
