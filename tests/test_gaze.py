"""The gaze page in a real headless Chromium: what it shows is what the attention rows say."""

import base64
import json
import random
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import sync_playwright

from support import pictures
from support.grounding import Box
from support.pictures import Gaze, Prediction, draw_page
from support.prompts import Block, Example, Media, Prompt
from support.ranks import UsageError
from support.toy import Task, sample_example

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><img src=x onerror='window.hacked = 1'>",
    "<!-- <b>&amp; \"double\" 'single' `back` ${1} \\u003c {{data}} {{nonce}}",
    "lines\u2028and\u2029paragraphs, a lone \ud800 surrogate, \x00 and \x1b",
]


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no Chromium: none of {', '.join(names)} is on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Open a file in a window of its own, by default 1200 pixels wide.

    At the end, no page has logged a message or an error, or asked for anything but the file itself
    and its embedded pictures.
    """
    contexts, complaints = [], []

    def ask(request):
        if request.url.split(":")[0] not in ("file", "data"):
            complaints.append(request.url)

    def visit(path, hash="", width=1200, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", ask)
        page.goto(path.as_uri() + hash)
        wait(page, "[...document.querySelectorAll('.says')].every(x => x.textContent)")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []


def make_gaze(
    seed=0,
    tokens=("<answer>", " red", "</answer>"),
    frames=(None,),
    layers=(1,),
    target=(),
    accuracy=1.0,
    **fields,
) -> Prediction:
    """An answered toy example, with a vision block for each entry of `frames` and random rows."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    media, blocks, length = [], [], 3
    for count in frames:
        example = sample_example(rng, Task(frames=count))
        media += example.media
        grid = ((count + 1) // 2 if count else 1, 4, 4)
        blocks.append(Block(torch.empty(0), grid, start=length))
        length += blocks[-1].tokens + 2
    shape = len(tokens) + 1, length + len(tokens)
    rows = {}
    for layer in layers:
        logits = 3 * torch.randn(shape, generator=generator)
        rows[layer] = logits.masked_fill(torch.ones(shape).triu(length).bool(), -1e9).softmax(-1)
    example = Example(**{"problem": "So?", "solution": "red", "media": media} | fields)
    grids = [block.shape for block in blocks]
    prompt = Prompt(torch.zeros(length), None, blocks, example, target, grids)
    return Prediction({"accuracy": accuracy}, Gaze(prompt, list(tokens), rows), range(1, 2), 1)


def cut(one: Prediction, t: int, kind: str = "predicting", layer: int = 1) -> dict:
    """The numbers of a token's row by definition: masses and the brightness (cells,) of pictures,
    0 beyond the brightest cells that hold 95%."""
    prompt = one.gaze.prompt
    row = one.gaze.rows[layer][t].numpy().astype(np.float64)
    if kind == "own":
        row = one.gaze.rows[layer][t + 1].numpy().astype(np.float64)
        row[len(prompt.ids) + t] = 0
        row /= row.sum()
    cells = [row[block.start : block.start + block.tokens] for block in prompt.blocks]
    cells = np.concatenate(cells)
    order = np.argsort(-cells)
    enough = np.searchsorted(np.cumsum(cells[order]), 0.95 * cells.sum()) + 1
    kept = np.zeros_like(cells)
    kept[order[:enough]] = cells[order[:enough]]
    asked, vision = row[: len(prompt.ids)].sum(), cells.sum()
    masses = [
        vision,
        asked - vision,
        row[len(prompt.ids) :].sum(),
        cells[list(prompt.target)].sum(),
    ]
    return {"masses": masses, "cells": cells, "light": kept / cells.max()}


def wait(page, expression: str) -> None:
    """Wait until a JavaScript expression is true. Playwright's own way needs `eval`, which the
    page's policy forbids."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never true: {expression}")


def masses_of(page, side=0) -> list[float]:
    """The masses on vision, question, earlier response and target that a side prints."""
    texts = page.locator(".side").nth(side).locator(".key span").all_inner_texts()
    return [float(text.split()[-1]) for text in texts if text]


def lights_of(page, side=0, views="figure > .view") -> np.ndarray:
    """How much of its picture each cell of a side's views lets through, from 0 to 1."""
    read = """canvases => canvases.flatMap(canvas => {
        const { width, height } = canvas;
        const copy = new OffscreenCanvas(width, height).getContext('2d');
        copy.drawImage(canvas, 0, 0);
        return [...copy.getImageData(0, 0, width, height).data].filter((_, i) => i % 4 === 3);
    })"""
    alphas = page.locator(".side").nth(side).locator(f"{views} > canvas").evaluate_all(read)
    return 1 - np.array(alphas) / (255 * 0.86)


def check(page, one: Prediction, t: int, side=0, views="figure > .view", **row) -> None:
    """The numbers and pictures of a side are those of a token's row."""
    expected = cut(one, t, **row)
    shown = masses_of(page, side)
    assert shown == pytest.approx(expected["masses"][: len(shown)], rel=0.06, abs=6e-4)
    assert lights_of(page, side, views) == pytest.approx(expected["light"], abs=0.012)


def test_pointing_at_a_token_shows_its_row(tmp_path, visit):
    one = make_gaze(frames=(None, None), target=(17,))
    assert draw_page(tmp_path / "gaze.html", {"toy": [one]}, "A run") == 1
    page = visit(tmp_path / "gaze.html")
    assert page.title() == "A run"
    tokens = page.locator(".tokens span")
    assert tokens.all_inner_texts() == one.gaze.response
    check(page, one, 1)  # the answer is shown first
    for t in (0, 2, 1):
        tokens.nth(t).hover()
        check(page, one, t)
    tokens.nth(0).hover()
    page.mouse.move(5, 5)  # leaving the response shows the chosen token again
    check(page, one, 1)
    tokens.nth(2).click()
    page.mouse.move(5, 5)
    check(page, one, 2)


def test_words_and_frames_say_what_the_picture_shows(tmp_path, visit):
    boxes = [Box(28, 0, 56, 28, medium=1), Box(1.4, 2.8, 110.6, 5.6, medium=1)]
    one = make_gaze(frames=(None, None), target=(17,), boxes=boxes)
    draw_page(tmp_path / "gaze.html", {"toy": [one]}, "A run")
    page = visit(tmp_path / "gaze.html")
    cells = cut(one, 1)["cells"]
    brightest = int(cells.argmax())
    image, cell = divmod(brightest, 16)
    place = f"row {cell // 4 + 1}, column {cell % 4 + 1} of image {image + 1}"
    says = page.locator(".says").inner_text()
    assert says.startswith(f"The row that predicts “red” (token 2 of 3) looks most at {place}")
    assert float(says.split()[-4]) == pytest.approx(cells[brightest], rel=0.06)
    for i, alt in enumerate(page.locator(".view img").evaluate_all("x => x.map(x => x.alt)")):
        assert alt.startswith(f"image {i + 1}: ")
        mass = cells[16 * i : 16 * i + 16].sum()
        assert float(alt.split()[-1]) == pytest.approx(mass, rel=0.06)
    assert page.locator(".view").nth(0).locator("i").count() == 0
    read = "x => x.map(({ style: s }) => [s.left, s.top, s.width, s.height].map(parseFloat))"
    drawn = page.locator(".view").nth(1).locator("i").evaluate_all(read)
    assert drawn == [[25, 0, 25, 25], [1.25, 2.5, 97.5, 2.5]]  # percent of 112 pixels
    widths = page.locator(".bar i").evaluate_all("x => x.map(x => parseFloat(x.style.width))")
    assert widths == pytest.approx([100 * mass for mass in cut(one, 1)["masses"][:3]], abs=0.01)


def test_layer_row_and_brightness_can_be_chosen(tmp_path, visit):
    one = make_gaze(layers=(1, 27))
    draw_page(tmp_path / "gaze.html", {"model": [one]}, "A run")
    page = visit(tmp_path / "gaze.html")
    check(page, one, 1, layer=27)  # the last layer is shown first
    page.select_option("#row", "own")
    wait(page, "document.querySelector('.says').textContent.startsWith('The own')")
    for t in range(3):
        page.locator(".tokens span").nth(t).hover()
        check(page, one, t, kind="own", layer=27)
    page.select_option("#layer", "1")
    wait(page, "location.hash.includes('layer=1&')")
    check(page, one, 1, kind="own", layer=1)  # the chosen token
    copy = visit(tmp_path / "gaze.html", page.evaluate("location.hash"))  # a link
    check(copy, one, 1, kind="own", layer=1)
    page.select_option("#power", "0.5")
    for t in (0, 2, 1):
        page.locator(".tokens span").nth(t).hover()
        expected = cut(one, t, kind="own")["light"] ** 0.5
        assert lights_of(page) == pytest.approx(expected, abs=0.012)


def test_before_and_after_stand_side_by_side(tmp_path, visit):
    words = ["The", "star", "is", "red", ",", "so", "I", "say", "<answer>", "red", "</answer>"]
    before = [make_gaze(0, accuracy=0.0), make_gaze(1), make_gaze(2, accuracy=0.5)]
    after = [make_gaze(3, words), make_gaze(4), make_gaze(5)]
    draw_page(tmp_path / "gaze.html", {"before": before, "after": after}, "A run")
    page = visit(tmp_path / "gaze.html")
    headings = page.locator(".heading").all_inner_texts()
    assert [" ".join(text.split()) for text in headings] == ["before ✗ wrong", "after ✓ right"]
    check(page, before[0], 1, side=0)
    check(page, after[0], 9, side=1)
    page.keyboard.press("ArrowLeft")  # moves the last side until another one is chosen
    check(page, before[0], 1, side=0)
    check(page, after[0], 8, side=1)
    page.locator(".side").nth(0).locator(".tokens span").nth(0).click()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("End")
    page.mouse.move(5, 5)
    check(page, before[0], 2, side=0)
    check(page, after[0], 8, side=1)

    wait(page, "location.hash.includes('token=3,9')")
    copy = visit(tmp_path / "gaze.html", page.evaluate("location.hash"))  # a link
    check(copy, before[0], 2, side=0)
    check(copy, after[0], 8, side=1)
    left, right = (copy.locator(".side").nth(i).bounding_box() for i in (0, 1))
    assert left["x"] + left["width"] <= right["x"] and left["y"] == right["y"]

    options = page.locator("#filter option").all_inner_texts()
    assert options == [
        "all (3)",
        "changed (2)",
        "right before (1)",
        "wrong before (1)",
        "partly before (1)",
        "right after (3)",
    ]
    page.select_option("#filter", "partly before (1)")
    wait(page, "location.hash.startsWith('#example=3')")
    assert page.locator("nav button:visible").count() == 1
    check(page, before[2], 1, side=0)


def test_examples_are_chosen_by_whether_a_right_answer_looked(tmp_path, visit):
    """The last side decides; half right is right, and rows without boxes are in no such list."""
    judged = [(1.0, 1.0), (0.5, 0.0), (0.0, 0.0), (1.0, 0.0), (0.0, None)]
    after = [make_gaze(number, accuracy=right) for number, (right, _) in enumerate(judged)]
    for prediction, (_, looked) in zip(after, judged, strict=True):
        prediction.record |= {} if looked is None else {"pointing": looked}
    draw_page(tmp_path / "gaze.html", {"before": after[::-1], "after": after}, "A run")
    page = visit(tmp_path / "gaze.html")
    options = page.locator("#filter option").all_inner_texts()
    chosen = [option for option in options if option.startswith("after: ")]
    assert [words.removeprefix("after: ") for words in chosen] == [
        "right and looked (1)",
        "right and did not (2)",
        "wrong and did not (1)",
    ]
    page.select_option("#filter", chosen[1])
    wait(page, "location.hash.startsWith('#example=2')")
    names = page.locator("nav button:visible").evaluate_all("x => x.map(x => x.ariaLabel[8])")
    assert names == ["2", "4"]


def test_the_keyboard_is_enough(tmp_path, visit):
    gazes = [make_gaze(seed) for seed in range(3)]
    draw_page(tmp_path / "gaze.html", {"toy": gazes}, "A run")
    page = visit(tmp_path / "gaze.html")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.role") == "option":
            break
    focused = "[document.activeElement.textContent, document.activeElement.ariaSelected]"
    assert page.evaluate(focused) == [" red", "true"]
    for key, t in (("ArrowRight", 2), ("ArrowRight", 2), ("Home", 0), ("ArrowLeft", 0), ("End", 2)):
        page.keyboard.press(key)
        assert page.evaluate(focused) == [gazes[0].gaze.response[t], "true"]
        check(page, gazes[0], t)
    for key, example in (("ArrowRight", 2), ("ArrowRight", 3), ("ArrowRight", 3), ("ArrowLeft", 2)):
        page.keyboard.press(f"Shift+{key}")
        wait(page, f"location.hash.startsWith('#example={example}&')")
    check(page, gazes[1], 1)
    names = page.locator("nav button").evaluate_all("x => x.map(x => x.ariaLabel)")
    assert names == [f"Example {i}: toy right" for i in (1, 2, 3)]


def test_a_video_has_a_line_over_time_and_plays(tmp_path, visit):
    box = Box(28, 0, 56, 28, start=1.5, end=3)  # the second frame of the second pair begins it
    one = make_gaze(frames=(5,), target=(17, 33), boxes=[box])
    video = Media([Image.new("RGB", (112, 112), (50 * i, 0, 0)) for i in range(5)], True)
    one.gaze.prompt.example.media = [video]
    draw_page(tmp_path / "gaze.html", {"toy": [one]}, "A run")
    page = visit(tmp_path / "gaze.html")
    cells = cut(one, 1)["cells"].reshape(3, 16).sum(1)
    check(page, one, 1, views=".strip .view")
    label = page.locator("svg").evaluate("x => x.ariaLabel")
    times = [float(x) for x in label.removeprefix("Mass over time: ").split(",")]
    assert times == pytest.approx(cells, rel=0.06, abs=6e-4)
    points = page.locator("svg path").nth(1).get_attribute("d")[1:].split(" L")
    heights = [1 - float(point.split()[1]) for point in points]
    assert heights == pytest.approx(cells / cells.max(), abs=1e-4)
    buttons = "[...document.querySelectorAll('.strip button')]"
    place = f"{buttons}.findIndex(x => x.ariaCurrent === 'true')"
    assert page.evaluate(place) == cells.argmax()
    name = ["frames 1 and 2", "frames 3 and 4", "frames 5"][cells.argmax()]
    mass, shown = page.locator("figcaption").inner_text().removeprefix("Peak ").split(": ")
    assert float(mass) == pytest.approx(cells.max(), rel=0.06) and shown == name
    light = cut(one, 1)["light"].reshape(3, 16)
    for patch in (2, 0):  # the third pair has one frame
        page.locator(".strip button").nth(patch).click()
        assert page.evaluate(place) == patch
        assert lights_of(page) == pytest.approx(light[patch], abs=0.012)
        assert page.locator("figure > .view i").count() == (patch > 0)
    sources = "document.querySelector('figure > .view img').src"
    seen = {page.evaluate(sources)}
    page.get_by_role("button", name="Play").click()
    for _ in range(4):
        wait(page, f"!{list(seen)}.includes({sources})")
        seen.add(page.evaluate(sources))
    page.get_by_role("button", name="Pause").click()
    assert len(seen) == 5


def units(text: str) -> list[int]:
    """The UTF-16 code units of a text, lone surrogates included."""
    return np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2").tolist()


def test_markup_and_special_characters_are_text(tmp_path, visit):
    text = " ".join(HOSTILE)
    one = make_gaze(tokens=HOSTILE, problem=text, solution=text, name=text)
    draw_page(tmp_path / "gaze.html", {text: [one]}, text)
    page = visit(tmp_path / "gaze.html")
    read = "({ textContent: x }) => Array.from({ length: x.length }, (_, i) => x.charCodeAt(i))"
    for place in ("h1", "#question", "#solution", "#name", ".heading span:first-child"):
        assert page.locator(place).evaluate(read) == units(text), place
    tokens = page.locator(".tokens span")
    for t, token in enumerate(HOSTILE):
        assert tokens.nth(t).evaluate(read) == units(token)
        tokens.nth(t).hover()
        check(page, one, t)
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.evaluate("document.scripts.length") == 2  # the data and the page's own
    sources = page.locator("img").evaluate_all("x => x.map(x => x.src.slice(0, 11))")
    assert set(sources) == {"data:image/"}


def test_nothing_else_may_run_or_leave_the_page(tmp_path, browser):
    draw_page(tmp_path / "gaze.html", {"toy": [make_gaze()]}, "A run")
    page = browser.new_page()
    page.goto((tmp_path / "gaze.html").as_uri())
    blocked = page.evaluate("""async () => {
        const blocked = [];
        document.onsecuritypolicyviolation = event => blocked.push(event.effectiveDirective);
        const script = document.createElement('script');
        script.textContent = 'window.hacked = 1';
        document.body.append(script);
        const picture = new Image();
        picture.src = 'http://127.0.0.1:9/';
        await fetch('http://127.0.0.1:9/').catch(() => {});
        await new Promise(done => setTimeout(done, 50));
        return [window.hacked, blocked.sort()];
    }""")
    page.close()
    assert blocked == [None, ["connect-src", "img-src", "script-src-elem"]]


def test_a_page_fits_a_phone_and_a_dark_room(tmp_path, visit):
    frames = (None, None, 16)
    one = make_gaze(tokens=["a", "long" * 40, "\n\n", " ", "", "b"] * 30, frames=frames)
    draw_page(tmp_path / "gaze.html", {"before": [one], "after": [one]}, "A run")
    page = visit(tmp_path / "gaze.html", width=390, has_touch=True, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    sides = [page.locator(".side").nth(i).bounding_box() for i in (0, 1)]
    assert sides[0]["y"] + sides[0]["height"] <= sides[1]["y"]
    page.locator(".tokens span").nth(5).tap()
    wait(page, "location.hash.includes('token=6,1&')")
    colour = "getComputedStyle(document.body).backgroundColor"
    light = visit(tmp_path / "gaze.html", width=390, color_scheme="light").evaluate(colour)
    assert sum(map(int, light[4:-1].split(","))) > 600
    assert sum(map(int, page.evaluate(colour)[4:-1].split(","))) < 100


def test_an_empty_response_and_a_prompt_without_pictures(tmp_path, browser):
    gazes = [make_gaze(tokens=()), make_gaze()]
    blind = gazes[1].gaze.prompt
    blind.example.media, blind.grids, blind.blocks = [], [], []
    draw_page(tmp_path / "gaze.html", {"toy": gazes}, "A run")
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "gaze.html").as_uri())
    assert page.locator(".tokens").inner_text() == "(empty)"
    assert lights_of(page) == pytest.approx(np.ones(16))
    assert page.locator(".view img").evaluate("x => x.naturalWidth") == 112
    page.keyboard.press("Shift+ArrowRight")
    wait(page, "document.querySelector('.says').textContent")
    assert page.locator(".says").inner_text().endswith("has no mass on vision.")
    assert masses_of(page)[0] == 0
    page.close()
    assert errors == []


def test_a_page_holds_what_fits_and_says_how_many(tmp_path, visit, monkeypatch):
    gazes = [make_gaze(seed) for seed in range(5)]
    draw_page(tmp_path / "gaze.html", {"toy": gazes}, "A run")
    whole = (tmp_path / "gaze.html").stat().st_size
    monkeypatch.setattr(pictures, "LIMIT", whole - 100)
    assert draw_page(tmp_path / "gaze.html", {"toy": gazes}, "A run") == 4
    assert whole * 0.8 < (tmp_path / "gaze.html").stat().st_size <= whole - 100
    page = visit(tmp_path / "gaze.html")
    assert page.locator("#count").inner_text() == "4 of 5 examples"
    check(page, gazes[0], 1)
    monkeypatch.setattr(pictures, "LIMIT", 20_000)
    assert draw_page(tmp_path / "gaze.html", {"toy": gazes}, "A run") == 0
    assert visit(tmp_path / "gaze.html").locator("#count").inner_text() == "0 of 5 examples"


def test_a_long_video_is_sampled(tmp_path, monkeypatch):
    """Its masses still count all frames."""
    boxes = [Box(0, 0, 28, 28), Box(11.2, 22.4, 44.8, 67.2, medium=1, start=4.2, end=5)]
    boxes.append(Box(0, 0, 9, 9, medium=1, start=1, end=3))  # while no frame of the page is shown
    one = make_gaze(frames=(None, 15), target=(3, 16 + 16, 16 + 4 * 16 + 5), boxes=boxes)
    monkeypatch.setattr(
        pictures, "LARGE", len(pictures.as_text(pictures.example_data([one], [1], stride=4)))
    )
    assert draw_page(tmp_path / "gaze.html", {"toy": [one]}, "A run") == 1
    text = (tmp_path / "gaze.html").read_text().split('id="data">')[1].split("</script>")[0]
    (example,) = json.loads(text)["examples"]
    assert example["stride"] == 4 and example["grids"] == [[1, 4, 4], [2, 4, 4]]
    assert [len(pictures) for pictures in example["pictures"]] == [1, 4]
    assert example["boxes"] == [[0, 0, 0, 25, 25], [2, 10, 20, 30, 40]] and example["target"]
    blob = zlib.decompress(base64.b64decode(example["sides"][0]["layers"][0]))
    sums = np.frombuffer(blob, "<f4", count=4 * (6 + 3)).reshape(4, 9)[1]
    expected = cut(one, 1)
    masses = expected["cells"].reshape(9, 16).sum(1)[[0, 1, 5]]
    assert sums[6:] == pytest.approx(masses) and sums[0] == pytest.approx(expected["masses"][0])
    assert sums[5] == pytest.approx(expected["masses"][3])


def test_cells_are_stored_in_8_bits_up_to_95_percent():
    one = make_gaze(frames=(6, None), tokens=["a"] * 40)
    blob = zlib.decompress(base64.b64decode(pictures.pack(one.gaze, 1)))
    patches, cells = 4, 64
    assert len(blob) == 41 * (4 * (6 + patches) + cells)
    codes = np.frombuffer(blob, np.uint8, offset=41 * 4 * (6 + patches)).reshape(41, cells)
    for t in range(40):
        light = cut(one, t)["light"]
        assert ((codes[t] > 0) == (light > 0)).all()
        assert (codes[t] / 255) ** 2 == pytest.approx(light, abs=1 / 255)


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"gaze\.html cannot be written"):
        draw_page(tmp_path / "missing" / "gaze.html", {"toy": [make_gaze()]}, "A run")
