"""The Explore page in Chromium, over the fake engine."""

from __future__ import annotations

import csv

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from app.panels import messages
from tests.app.fake_engine import ADAPTERS, INERT

BUCKET_HEADER = (
    "run_id,arm,bucket_by,bucket,bucket_start,bucket_end,n_tokens,layer_index,layer_name,adapter,"
    "mean_scaling,std_scaling,min_scaling,max_scaling,mean_effective_scaling,share_top1"
)


def test_a_typed_prompt_grows_text_and_heatmap_in_one_mounted_component(fake_app, open_page):
    page = open_page(fake_app)
    page.generate("Why does salt dissolve in water?")
    page.wait(lambda: page.n_columns() > 0, "no heatmap")
    page.component("root.mountedOnce = true")
    first = page.n_tokens(), page.n_columns(), page.painted_width()
    assert "Writing" in page.text()
    page.wait(lambda: page.n_tokens() > first[0] + 10, "the text does not grow")
    page.wait(lambda: page.n_columns() > first[1] + 5, "the heatmap does not grow")
    page.wait(lambda: page.painted_width() > first[2], "the picture does not grow")
    page.wait_until_finished()
    assert page.texts()[0].startswith("Salt dissolves because water molecules are polar")
    assert page.texts()[1].startswith("Salt dissolves because water is a solvent")
    assert "first difference at token 5" in page.component("return root.innerText")
    assert page.component("return root.mountedOnce")
    assert page.console_errors() == []


def test_stop_ends_the_run_and_keeps_what_it_wrote(fake_app, open_page):
    page = open_page(fake_app)
    page.generate("slowly: salt")
    page.wait(lambda: page.texts() and page.texts()[0], "nothing is written")
    page.press("Stop")
    page.wait(lambda: "new tokens, stopped" in page.text(), "it does not stop", 10)
    page.wait(lambda: page.button("Generate"), "Generate does not come back")
    assert 0 < len(page.texts()[0]) < 300
    assert page.console_errors() == []


def test_a_muted_adapter_is_off_from_the_next_token(fake_app, open_page):
    page = open_page(fake_app)
    page.unfold("Steer adapters")
    page.generate("slowly: salt")
    page.wait(lambda: page.n_columns() > 0, "no heatmap")
    page.select("math", "Mute")
    page.wait(lambda: "Steered: math muted" in page.text(), "nothing says so")
    before = page.n_tokens()
    page.wait(lambda: page.n_tokens() > before + 2, "the text does not grow")
    page.press("Stop")
    page.wait(lambda: page.button("Generate"), "it does not stop")
    page.read_cell(0.02, 0.6, "top-k all · temperature 1 · weight 1")
    assert "off" not in page.tooltip()
    page.choose("math")
    page.wait(lambda: "cut by top-k or muted" in page.component("return root.innerText"), "no key")
    assert page.console_errors() == []


def test_two_browsers_with_different_knobs_get_their_own_results(fake_app, open_page):
    one, other = open_page(fake_app), open_page(fake_app)
    one.slider("Top-k").send_keys(Keys.HOME)
    one.wait(lambda: "1" in one.slider("Top-k").get_attribute("value"), "the slider stays")
    one.generate("slowly: salt")
    one.wait(lambda: one.n_columns() > 0, "no heatmap")
    other.generate("water")
    other.wait(lambda: "1 request before yours" in other.text(), "the queue is not shown")
    one.press("Stop")
    one.wait(lambda: "new tokens, stopped" in one.text(), "it does not stop")
    other.wait_until_finished()
    assert "salt" in one.component("return root.querySelector('.card.prompt').textContent")
    assert "water" in other.component("return root.querySelector('.card.prompt').textContent")
    for page, knobs in ((one, "top-k 1"), (other, "top-k all")):
        page.choose("math")
        page.read_cell(0.1, 0.6, knobs)
        cut = "cut by top-k" in page.component("return root.querySelector('.legend').innerText")
        assert cut == (knobs == "top-k 1")
        assert page.console_errors() == []


def test_a_closed_tab_leaves_the_engine_to_others(fake_app, open_page):
    gone, other = open_page(fake_app), open_page(fake_app)
    gone.generate("slowly: salt")
    gone.wait(lambda: gone.n_columns() > 0, "no heatmap")
    other.generate("water")
    other.wait(lambda: "1 request before yours" in other.text(), "the queue is not shown")
    gone.close()
    # By itself the run would go on for half a minute.
    other.wait(lambda: "Queued" not in other.text(), "the engine stays busy", 10)
    other.wait_until_finished()


def test_a_knob_turned_while_it_runs_is_marked_on_the_time_axis(fake_app, open_page):
    page = open_page(fake_app)
    page.generate("salt")
    page.wait(lambda: page.n_tokens() > 20, "nothing is written")
    page.slider("Top-k").send_keys(Keys.HOME)
    legend = "return root.querySelector('.legend').innerText"
    page.wait(lambda: "knobs changed" in page.component(legend), "the change is not marked")
    page.wait_until_finished()
    page.read_cell(0.02, 0.6, "top-k all")
    page.read_cell(0.97, 0.6, "top-k 1")


def test_after_the_run_the_sliders_reroute_and_it_can_be_undone(fake_app, open_page):
    page = open_page(fake_app)
    page.generate("salt")
    page.wait_until_finished()
    page.choose("chemistry")
    text = page.texts()
    page.slider("Top-k").send_keys(Keys.HOME)
    page.wait(lambda: messages.REROUTED in page.text(), "nothing says that it is re-routed")
    legend = "return root.querySelector('.legend').innerText"
    page.wait(lambda: "cut by top-k" in page.component(legend), "nothing is cut")
    assert page.texts() == text
    page.press("Back to recorded")
    page.wait(lambda: messages.REROUTED not in page.text(), "it stays re-routed")
    page.wait(lambda: "cut by top-k" not in page.component(legend), "it stays cut")


def test_a_script_in_the_text_is_only_text(fake_app, open_page):
    page = open_page(fake_app)
    title = page.driver.title
    page.generate("Tell me of <script>alert(1)</script> and <img src=x onerror=alert(2)>")
    page.wait_until_finished()
    assert INERT in page.texts()[0]
    assert page.component("return root.querySelectorAll('script, img').length") == 0
    assert page.driver.title == title
    assert page.console_errors() == []


def test_the_csv_is_downloaded(fake_app, open_page):
    page = open_page(fake_app)
    page.generate("salt")
    page.wait_until_finished()
    page.press("Scalings (CSV)")
    found = page.wait(lambda: list(page.downloads.glob("xlora-*.csv")), "no file comes")
    lines = found[0].read_text(encoding="utf-8").splitlines()
    assert lines[0].replace('"', "") == BUCKET_HEADER
    rows = list(csv.DictReader(lines))
    assert {row["adapter"] for row in rows} == set(ADAPTERS)
    assert len({row["mean_scaling"] for row in rows if row["arm"] == "routed"}) > 100
    page.press("Run file")
    page.wait(lambda: list(page.downloads.glob("xlora-*.safetensors")), "no run file comes")


def test_hover_links_text_and_heatmap_without_a_rerun(fake_app, open_page):
    page = open_page(fake_app)
    page.generate("salt")
    page.wait_until_finished()
    page.point_at_token(30)
    page.wait(lambda: "share of mass" in page.tooltip(), "the token says nothing")
    token = page.component("return root.querySelectorAll('.token')[30].textContent")
    assert page.marked()[0] == token
    cell = page.read_cell(0.5, 0.6, "block")
    for name in ADAPTERS:
        assert name in cell
    assert page.marked()


def test_the_cell_cursor_is_reached_and_moved_by_keyboard(fake_app, open_page):
    page = open_page(fake_app)
    page.generate("salt")
    page.wait_until_finished()
    page.component("root.querySelector('[data-part=plot]').focus()")
    keys = [Keys.HOME, Keys.ARROW_RIGHT, Keys.PAGE_DOWN, Keys.ARROW_DOWN]
    ActionChains(page.driver).send_keys(*keys).perform()
    label = "return root.querySelector('[data-part=cell]').getAttribute('aria-label')"
    spoken = page.component(label)
    assert spoken.startswith("token 2 ")
    assert "block 1 · k_proj: math 0." in spoken
    assert "block 1 · k_proj" in page.tooltip()
    ActionChains(page.driver).send_keys(Keys.ESCAPE).perform()
    assert page.tooltip() == ""


def test_dark_pages_are_drawn_dark_and_narrow_ones_fit(fake_app, open_page):
    page = open_page(fake_app, dark=True, width=520)
    page.generate("salt")
    page.wait_until_finished()
    style = "return getComputedStyle(root).getPropertyValue('--st-background-color').trim()"
    assert page.component(style) == "#0e1117"
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.driver.execute_script(overflow) <= 0
    assert page.component("return root.scrollWidth <= root.clientWidth + 1")
    assert page.console_errors() == []
