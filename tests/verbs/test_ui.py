"""The page of compare ui=true: in a real headless browser, and the parts behind it without one."""

import json
import shutil
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from page_served import served

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def bench(trained):
    from mmft.config.compose import compose
    from mmft.runs.open import open_run
    from mmft.serving.side_by_side import Bench, Model

    opened = open_run(trained.run, compose([]), [])
    return Bench([Model("base", "base", "", opened, base=True), Model("tuned", "tuned", "", opened)])


@pytest.fixture(scope="module")
def row(trained):
    from mmft.data.prepared import PreparedData

    env = json.loads((trained.run / "env.json").read_text(encoding="utf-8"))
    return PreparedData(Path(env["data"]["path"])).split("validation")[0]


def test_answers_grow_and_end_as_training_measured_them(bench, row, trained):
    states = list(bench.answers(row, {}, seed=1))
    assert states[0] == [(None, False)] * 2
    finals = [trained.lines(f"eval/{name}.jsonl")[0]["prediction"] for name in ("base", "tuned")]
    assert states[-1] == [(text, True) for text in finals]
    states = list(bench.answers(row, {"min_new_tokens": 8, "max_new_tokens": 8}, seed=1))  # whatever the model would say
    growing = [state[0][0] for state in states if state[0][0] is not None and not state[0][1]]
    assert growing and all(a == b or b.startswith(a) or b == a.strip() for a, b in zip(growing, growing[1:]))


def test_beams_come_at_the_end_and_the_seed_decides(bench, row):
    from mmft.serving.side_by_side import generation_keys

    beams = list(bench.answers(row, generation_keys(8, 0, 1, 3), seed=1))
    assert [s for s in beams if s[0][0] and not s[0][1]] in ([], [[(beams[-1][0][0], False), (None, False)]])
    drawn = [list(bench.answers(row, generation_keys(8, 2.0, 1.0, 1), seed=s))[-1] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_answer_nobody_waits_for_leaves_the_adapter_on(bench, row, trained):
    """The listener goes away while the base is writing; the next one gets the tuned model's own text."""
    from mmft.serving.side_by_side import generation_keys

    listener = bench.answers(row, generation_keys(200, 0, 1, 1), seed=1)
    next(listener), next(listener)
    listener.close()
    assert list(bench.answers(row, {}, seed=1))[-1][1] == (trained.lines("eval/tuned.jsonl")[0]["prediction"], True)


def test_controls_become_generation_keys():
    from mmft.serving.side_by_side import generation_keys

    assert generation_keys(32.0, 0, 0.5, 1) == {"max_new_tokens": 32, "num_beams": 1, "do_sample": False, "temperature": None, "top_p": None}
    assert generation_keys(8, 0.7, 0.9, 2.0) == {"max_new_tokens": 8, "num_beams": 2, "do_sample": True, "temperature": 0.7, "top_p": 0.9}


def test_without_gradio_it_says_what_to_install(verb, monkeypatch):
    import mmft.serving.page

    monkeypatch.setattr(mmft.serving.page, "find_spec", lambda name: None)
    code, _, err = verb("compare", "ui=true")
    assert code == 2 and err == "mmft: ui=true needs Gradio: pip install 'mmft[ui]'\n"


def test_a_port_in_use_is_one_line_before_anything_loads(verb, monkeypatch):
    pytest.importorskip("gradio")
    import mmft.serving.page

    monkeypatch.setattr(mmft.serving.page, "open_run", lambda *a: pytest.fail("the model was loaded first"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = verb("compare", "ui=true", f"port={port}")
    assert code == 2 and f"port={port}: cannot be used" in err and len(err.strip().splitlines()) == 1


# --- in the browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(trained, tmp_path_factory):
    """A running page's address; ended behind the tests."""
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'mmft[ui]'")
    log = tmp_path_factory.mktemp("ui") / "log.txt"
    temporary = tmp_path_factory.mktemp("temporary")
    with served(log, [f"run={trained.run.as_posix()}", f"output_dir={trained.outputs.as_posix()}"], TMPDIR=str(temporary)) as found:
        yield found
    assert not list(temporary.iterdir()), "uploaded pictures were left behind"


def test_no_file_of_this_machine_is_served(address, trained):
    snapshot = trained.run / "snapshot.yaml"
    for path in (snapshot, trained.pictures / "0.png", "/etc/passwd", "mmft/cli/parse.py"):
        for route in ("gradio_api/file=", "file=", "gradio_api/file/"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{address}{route}{path}", timeout=20)
            assert refused.value.code in (403, 404)
    config = json.load(urllib.request.urlopen(f"{address}config", timeout=20))
    assert config["analytics_enabled"] is False and not config.get("share_url")


@pytest.mark.timeout(240)
def test_both_tabs_in_a_real_browser(address, trained, tmp_path):
    if not BROWSER or not DRIVER:
        pytest.skip("no browser here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is in the dev extra: pip install -e '.[dev]'")
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        wait = WebDriverWait(browser, 90)

        def texts(where):
            return [e.text for e in browser.find_elements(By.CSS_SELECTOR, f"{where} .mmft-answer .text")]

        def plain(where):
            """The answers without the words that are marked as missing."""
            script = "return [...document.querySelectorAll(arguments[0])].map(e => {const c = e.cloneNode(true);" \
                     "c.querySelectorAll('.missing').forEach(m => m.remove()); return c.textContent})"  # fmt: skip
            return [" ".join(t.split()) for t in browser.execute_script(script, f"{where} .mmft-answer .text")]

        browser.get(address)
        wait.until(lambda b: b.find_element(By.ID, "compare-sample"))
        wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#sample img"))
        first_picture = browser.find_element(By.CSS_SELECTOR, "#sample img").get_attribute("src")
        assert first_picture.startswith("data:image/")

        # tab 1: the second sample, by the button that goes on
        next(b for b in browser.find_elements(By.TAG_NAME, "button") if b.text == "Next").click()
        wait.until(lambda b: b.find_element(By.CSS_SELECTOR, "#sample img").get_attribute("src") != first_picture)
        browser.find_element(By.ID, "compare-sample").click()
        wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "#sample-answers .verdict")) == 2)
        measured = [trained.lines(f"eval/{name}.jsonl")[1] for name in ("base", "tuned")]
        assert plain("#sample-answers") == [" ".join(m["prediction"].split()) or "nothing written" for m in measured]
        assert measured[0]["references"][0] in browser.find_element(By.ID, "sample-answers").text
        browser.save_screenshot(str(tmp_path / "sample.png"))

        # tab 2: an own picture and question
        next(t for t in browser.find_elements(By.CSS_SELECTOR, "button[role=tab]") if "own" in t.text).click()
        upload = wait.until(lambda b: b.find_element(By.CSS_SELECTOR, "#own-files input[type=file]"))
        upload.send_keys(str(trained.pictures / "3.png"))
        wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#own-pictures img"))
        browser.find_element(By.CSS_SELECTOR, "#question textarea").send_keys("What is <b>this</b>?")
        time.sleep(0.5)  # Gradio sends what was typed a moment later
        browser.find_element(By.ID, "compare-own").click()
        wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#own-answers .key"))
        assert len(texts("#own-answers")) == 2 and all(texts("#own-answers"))
        browser.save_screenshot(str(tmp_path / "own.png"))

        sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
        assert len(asked) > 5 and [u for u in asked if not u.startswith((address, "data:", "blob:"))] == [], "the page asks other hosts"
    finally:
        browser.quit()
