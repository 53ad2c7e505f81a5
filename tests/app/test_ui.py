"""The page in a real browser: sample, edit, drop an image, watch a sweep, compare; what attackers and mistakes get."""

import json
import os
import re
import shutil
import socket
import time
import urllib.error
import urllib.request

import pytest
from playwright.sync_api import expect, sync_playwright
from support.image_files import make_photo
from support.scaling_runs import make_runs

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[1280, 390], ids=["wide", "narrow"])
def page(request, browser, page_url):
    """The page, open; nothing may stick out, and no script may fail."""
    page, errors = browser.new_page(viewport={"width": request.param, "height": 820}), []
    page.on("pageerror", lambda error: errors.append(error))
    page.set_default_timeout(120_000)
    page.goto(page_url)
    page.wait_for_selector("#sample-button")
    yield page
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert not errors
    page.close()


def open_tab(page, name: str) -> None:
    """Also where a narrow page hides it in a menu."""
    tab = page.get_by_role("tab", name=name)
    if not tab.count():
        page.locator(".overflow-menu > button").click()
        tab = page.locator(".overflow-dropdown").get_by_text(name)
    tab.click()


def sources(page, selector: str) -> list[str]:
    """Addresses of the pictures shown in a part of the page."""
    return page.eval_on_selector_all(f"{selector} img", "all => all.map(image => image.src)")


def sample(page, seed: int = 0) -> list[str]:
    """Draws with what is set; addresses of the images."""
    page.click("#sample-button")
    page.locator("#sample-status").get_by_text(f"4x4, seed {seed}").wait_for()
    page.wait_for_selector("#film img")
    return sources(page, "#samples")


@needs_browser
def test_samples_appear_and_follow_seed_and_class(page):
    first = sample(page)
    assert len(first) == 8 and len(set(first)) == 8
    seed = page.get_by_label("seed").first
    seed.fill("5")
    seed.blur()
    other = sample(page, seed=5)
    assert other[:3] == first[5:]  # image i has seed + i
    assert not set(other[3:]) & set(first)


@needs_browser
def test_a_class_is_found_by_its_name(page):
    box = page.get_by_label("class").first
    box.click()
    box.fill("")
    box.press_sequentially("ow")
    expect(page.get_by_role("option")).to_have_count(1)
    page.get_by_role("option").click()
    expect(box).to_have_value("2: owl")
    assert sample(page)


@needs_browser
def test_words_become_pictures(browser, text_page_url):
    page = browser.new_page()
    page.goto(text_page_url)
    words = page.get_by_label("words").first
    expect(words).to_have_attribute("placeholder", "a red heart")
    pictures, seed = {}, page.get_by_label("seed").first
    for text, number in [("a cat", 1), ("", 2), ("", 1), ("a cat", 2), ("a cat", 1)]:
        words.fill(text)
        seed.fill(str(number))
        seed.blur()
        drawn = sample(page, seed=number)
        assert pictures.setdefault((text, number), drawn) == drawn
    assert pictures["a cat", 1] != pictures["", 1]
    words.fill("a" * 1001)
    page.click("#sample-button")
    expect(page.get_by_text("this text has 1,001 characters: give at most 1,000")).to_be_visible()
    page.close()


@needs_browser
def test_a_painted_mask_edits_a_sample(page):
    sample(page)
    open_tab(page, "Edit")
    page.click("#edit-button")
    page.get_by_text("upload an image first, or use a sample").wait_for()
    page.click("#take-sample")
    canvas = page.locator("#editor canvas").first
    page.wait_for_function("document.querySelector('#editor canvas').offsetHeight > 100")
    page.wait_for_timeout(1500)  # the editor draws the image on its own time
    page.click("#edit-button")
    page.get_by_text("there is nothing to generate").wait_for()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y - 20)
    page.mouse.down()
    page.mouse.move(x + 40, y - 20, steps=8)
    page.mouse.move(x + 40, y + 30, steps=8)
    page.mouse.up()
    page.wait_for_timeout(700)
    page.click("#edit-button")
    page.wait_for_selector("#edits img")
    share = int(re.search(r"(\d+) % of the image", page.inner_text("#edit-status"))[1])
    assert 2 < share < 60
    assert len(sources(page, "#edits")) == 4


@needs_browser
def test_a_dropped_image_shows_what_each_scale_adds(page, tmp_path):
    open_tab(page, "Tokenizer")
    page.set_input_files("#drop input[type=file]", make_photo(tmp_path))
    page.wait_for_selector("#indices img")
    assert [len(sources(page, f"#{name}")) for name in ("reconstructions", "residuals", "indices")] == [5, 4, 4]
    text = page.inner_text("#scales")
    assert all(scale in text for scale in ("1x1", "2x2", "3x3", "4x4"))


@needs_browser
@pytest.mark.parametrize("tab", ["Tokenizer", "Edit"])
def test_a_bad_file_gets_a_sentence(page, tmp_path, tab):
    (tmp_path / "bad.png").write_bytes(b"no image at all" * 50)
    open_tab(page, tab)
    page.set_input_files(
        {"Tokenizer": "#drop", "Edit": "#edit-upload"}[tab] + " input[type=file]", tmp_path / "bad.png"
    )
    page.get_by_text("this file cannot be decoded").first.wait_for()
    assert "Traceback" not in page.content()


@needs_browser
def test_a_sweep_is_read_again_while_it_grows(page, page_sweep):
    open_tab(page, "Scaling")
    page.wait_for_selector("#figures img")
    assert "val_loss" in page.inner_text("#words")
    assert all(f"d{depth}-38400" in page.inner_text("#runs") for depth in (1, 2, 3))
    before, new = page.inner_text("#words"), max(int(run.name[1:].split("-")[0]) for run in page_sweep.iterdir()) + 1
    make_runs(page_sweep, depths=(new,))
    page.locator("#runs").get_by_text(f"d{new}-38400").first.wait_for()
    assert page.inner_text("#words") != before


@needs_browser
def test_two_models_are_compared(page):
    open_tab(page, "Compare")
    page.click("#compare-button")
    page.wait_for_selector("#second-model img")
    page.wait_for_function("document.querySelectorAll('#second-model img').length == 8")
    assert set(sources(page, "#first-model")) != set(sources(page, "#second-model"))


@needs_browser
def test_visitors_at_once_each_get_their_images(browser, page_url):
    pages = [browser.new_page() for _ in range(3)]
    for seed, page in enumerate(pages):
        page.goto(page_url)
        page.get_by_label("seed").first.fill(str(20 * seed))
        page.get_by_label("seed").first.blur()
    for page in pages:
        page.click("#sample-button")
    shown = []
    for seed, page in enumerate(pages):
        page.locator("#sample-status").get_by_text(f"4x4, seed {20 * seed}").wait_for()
        shown += sources(page, "#samples")
        page.close()
    assert len(set(shown)) == 24


def test_only_this_machine_reaches_the_page(page_url):
    port = int(page_url.rsplit(":", 1)[1])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(OSError):  # of a server that listens everywhere, 127.0.0.2 is an address too
        socket.create_connection(("127.0.0.2", port), timeout=5)


def refused(address: str, data: bytes | None = None, kind: str = "application/json") -> int:
    """Status of an answer that gives nothing away."""
    request = urllib.request.Request(address, data=data, headers={"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert b"root:" not in answer.read()
            return answer.status
    except urllib.error.HTTPError as error:
        assert b"root:" not in error.read()
        return error.code


@pytest.mark.parametrize("path", ["/etc/passwd", "//etc/passwd", "..%2f..%2f..%2fetc/passwd", "file:///etc/passwd"])
def test_no_file_of_the_host_is_served(page_url, path, page_models):
    assert refused(f"{page_url}/gradio_api/file={path}") in (400, 403, 404)
    assert refused(f"{page_url}/gradio_api/file={page_models / 'first/config.json'}") in (400, 403, 404)


def config_of(page_url):
    with urllib.request.urlopen(f"{page_url}/config", timeout=20) as answer:
        return json.load(answer)


def handlers(page_url):
    """Handlers by the name of their button or box, with the types of their inputs."""
    config = config_of(page_url)
    parts = {part["id"]: part for part in config["components"]}
    found = {}
    for one in config["dependencies"]:
        for target, _ in one["targets"]:
            name = parts[target]["props"].get("elem_id") if target in parts else None
            if name:
                found[name] = one["id"], [parts[part]["type"] for part in one["inputs"]]
    return found


def answer_to(page_url, handler, data, session="forged"):
    """The events with which the page answers a request."""
    body = {"data": data, "fn_index": handler, "session_hash": session}
    if refused(f"{page_url}/gradio_api/queue/join", json.dumps(body).encode()) != 200:
        return '"success":false'
    with urllib.request.urlopen(f"{page_url}/gradio_api/queue/data?session_hash={session}", timeout=60) as stream:
        return stream.read().decode().replace(" ", "")


@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}])
@pytest.mark.parametrize("kind", ["image", "fifo", "link", "url"])
def test_a_forged_upload_cannot_name_a_file_of_the_host(page_url, tmp_path, meta, kind):
    """The place of an uploaded file comes from the browser: one that was not uploaded is refused, and never opened."""
    secret = tmp_path / "secret.png"
    make_photo(tmp_path).rename(secret)
    if kind == "fifo":
        os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(secret)
    path = {"fifo": tmp_path / "pipe.png", "link": tmp_path / "link.png", "url": f"{page_url}/config"}.get(kind, secret)
    given = {"path": str(path), **meta}
    found = handlers(page_url)
    answers = [answer_to(page_url, found["drop"][0], [given])]
    number, kinds = found["edit-button"]
    editor = {"background": given, "layers": [given], "composite": given, "id": None}
    answers.append(answer_to(page_url, number, [editor if kind == "imageeditor" else None for kind in kinds]))
    for events in answers:
        assert '"success":false' in events and "notuploadedtothispage" in events and "image.png" not in events


@pytest.mark.parametrize("address", ["page_url", "text_page_url"])
def test_values_of_the_wrong_kind_are_answered_in_a_sentence(address, request):
    """And leave no traceback in the terminal: the page's fixture looks."""
    url = request.getfixturevalue(address)
    for name, (number, kinds) in handlers(url).items():
        for value in ("abc", None, -1, 1e400, [[]], {"x": 1}, True):
            events = answer_to(url, number, [value] * len(kinds))
            assert ("Traceback" not in events and "process_completed" in events) or '"success":false' in events, (
                name,
                value,
            )


def test_a_visitor_who_left_is_not_waited_for(page_url):
    number, kinds = handlers(page_url)["sample-button"]
    values = {"dropdown": "0: cat", "number": 0}
    data = [values.get(kind, 1) for kind in kinds]
    for _ in range(12):
        body = {"data": data, "fn_index": number, "session_hash": "gone"}
        assert refused(f"{page_url}/gradio_api/queue/join", json.dumps(body).encode()) == 200
    with urllib.request.urlopen(f"{page_url}/gradio_api/queue/data?session_hash=gone", timeout=60) as stream:
        stream.readline()
    time.sleep(3)  # the server looks whether its visitors are there
    events = answer_to(page_url, number, data, "stays")
    ranks = [int(rank) for rank in re.findall(r'"rank":(\d+)', events)]
    assert '"success":true' in events and max(ranks, default=0) <= 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:PORT", "Origin": "http://localhost:PORT"}, 200),
        ({"Host": "rebound.example:PORT"}, 403),
        ({"Host": "169.254.1.1:PORT"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_only_requests_of_the_page_itself_are_answered(page_url, headers, status):
    port = page_url.rsplit(":", 1)[1]
    request = urllib.request.Request(
        f"{page_url}/config", headers={key: value.replace("PORT", port) for key, value in headers.items()}
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            found = answer.status
    except urllib.error.HTTPError as error:
        found = error.code
        assert "refused: this page is not" in error.read().decode()
    assert found == status


def test_an_upload_above_the_limit_is_refused(page_url):
    boundary, content = "x" * 20, os.urandom(600_000)
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    assert refused(f"{page_url}/gradio_api/upload", body, f"multipart/form-data; boundary={boundary}") == 413
