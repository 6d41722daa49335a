"""The page in headless Chromium: it renders, its filters work, hostile texts do nothing, and it fits a phone."""

import shutil

import pytest
from helpers.folders import make_lab, make_run

from sgpo_jax.commands import report as report_command
from sgpo_jax.report import comparison, page

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra 'browser'")

WIDTHS = (1280, 375)


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=path)
        except playwright.Error as error:
            reason = str(error).splitlines()[0]
            pytest.skip(f"needs Chromium, of the system or by `playwright install chromium`: {reason}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    lab = make_lab(folder / "lab")
    report_command.write(lab, lab / "report.html")
    runs = [make_run(folder / "run"), make_run(folder / "other")]
    compared = comparison.write(runs, folder / "compared.html")
    return {"run": page.write_run(runs[0]), "lab": lab / "report.html", "compared": compared}


@pytest.fixture
def open_page(browser, files):
    """Returns `open_page(kind, width, scheme) -> (the page, its console messages, its requests)`."""
    opened = []

    def open_it(kind, width=1280, scheme="light"):
        tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        opened.append(tab)
        complaints, requests = [], []
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(files[kind].as_uri())
        return tab, complaints, requests

    yield open_it
    for tab in opened:
        tab.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["run", "lab", "compared"])
def test_the_page_renders_without_complaint_and_fits_its_width(open_page, files, kind, width):
    tab, complaints, requests = open_page(kind, width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    charts = tab.locator("svg")
    assert charts.count() >= 5
    for i in range(charts.count()):
        box = charts.nth(i).bounding_box()
        assert box["width"] > 200 and box["height"] > 100
    assert tab.locator("h1").inner_text().startswith({"run": "SGPO · ", "lab": "Lab · ", "compared": "2 runs"}[kind])
    assert complaints == [] and requests == [files[kind].as_uri()]


def visible(tab):
    problems = "[...document.querySelectorAll('[data-tags]')].filter(p => p.offsetParent)"
    return tab.evaluate(f"{problems}.map(p => p.dataset.tags)")


def test_filters_show_the_problems_of_one_outcome(open_page):
    tab, complaints, _ = open_page("run", 375)
    everything = ["correct|newly correct", "wrong", "no_box", "cut"]
    assert visible(tab) == everything
    for name, wanted in (("wrong", ["wrong"]), ("newly correct", [everything[0]]), ("no box", ["no_box"])):
        tab.get_by_role("button", name=name, exact=False).click()
        assert visible(tab) == wanted
        assert tab.locator("button[aria-pressed=true]").all_inner_texts() == [f"{name} 1"]
    tab.get_by_role("button", name="all").click()
    assert visible(tab) == everything and complaints == []


@pytest.mark.parametrize("kind", ["run", "lab"])
def test_hostile_texts_do_nothing(open_page, kind):
    tab, _, _ = open_page(kind)
    assert tab.evaluate("window.owned") is None
    assert tab.locator("img").count() == 0 and tab.locator("script").count() == 1


def test_the_policy_stops_what_escaping_would_have_missed(open_page):
    tab, complaints, _ = open_page("run")
    tab.evaluate(
        """document.body.insertAdjacentHTML("beforeend", '<img src="x.png" onerror="window.owned = 1">');
        const script = document.createElement("script"); script.textContent = "window.owned = 1";
        document.body.append(script);"""
    )
    tab.wait_for_function("document.images[0].complete")
    assert tab.evaluate("window.owned") is None
    assert len(complaints) >= 2 and all("Content Security Policy" in complaint for complaint in complaints)


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_page_text_and_charts_follow_the_colour_scheme(open_page, scheme, dark):
    tab, _, _ = open_page("run", scheme=scheme)

    def brightness(selector, name):
        colour = tab.evaluate("([s, n]) => getComputedStyle(document.querySelector(s))[n]", [selector, name])
        return sum(map(int, colour[colour.index("(") + 1 : -1].split(",")[:3])) / 3

    assert (brightness("body", "backgroundColor") < 60) == dark
    for selector, name in (("body", "color"), ("svg text", "fill"), (".answer .text", "color")):
        assert (brightness(selector, name) > 180) == dark, selector


def test_on_a_phone_a_field_of_the_config_stands_above_its_values(open_page):
    tab, _, _ = open_page("run", 375)
    field, here = (tab.locator(".fields td").nth(i).bounding_box() for i in (0, 1))
    assert here["y"] >= field["y"] + field["height"] and here["x"] == field["x"]
    with tab.expect_download() as waiting:
        tab.get_by_role("link", name="rl.jsonl").click()
    assert waiting.value.suggested_filename == "rl.jsonl"
