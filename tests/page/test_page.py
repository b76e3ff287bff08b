"""`pbe page` in a real browser: a whole edit and its recipe, cancelling, what is seen, and what others may try."""

import base64
import http.client
import io
import json
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pbe.cli.__main__ import main
from pbe.data import images
from pbe.edit import Editor
from pbe.recipe import Picture, is_same, read_recipe, remake
from pbe.retrieve.index import Index
from tests.page.conftest import Server, start

pytestmark = [pytest.mark.browser, pytest.mark.timeout(120)]

WAIT_MS = 30_000
LONG = {"steps": 200, "count": 8}


class Visit:
    """An open page, driven as its visitor would, by labels and positions."""

    def __init__(self, page: Any, server: Server) -> None:
        self.page, self.server, self.asked, self.complaints = page, server, set[str](), list[str]()
        page.set_default_timeout(WAIT_MS)
        page.on("request", lambda request: self.asked.add(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(server.url)
        page.wait_for_selector("#edit")

    def choose(self, where: str, name: str, data: bytes) -> None:
        file = {"name": name, "mimeType": "image/png", "buffer": data}
        self.page.locator(f"#{where} input[type=file]").set_input_files(file)

    def sample_reference(self) -> None:
        self.page.locator("#sample-references .grid-container button").nth(4).click()
        self.says("Reference of")

    def rectangle(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """In pixels of the canvas."""
        canvas = self.page.locator("#brush canvas")
        canvas.scroll_into_view_if_needed()
        frame = canvas.bounding_box()
        scale = frame["width"] / canvas.evaluate("canvas => canvas.width")
        self.page.get_by_role("button", name="Rectangle").click()
        self.page.mouse.move(frame["x"] + x0 * scale, frame["y"] + y0 * scale)
        self.page.mouse.down()
        self.page.mouse.move(frame["x"] + x1 * scale, frame["y"] + y1 * scale)
        self.page.mouse.up()

    def set(self, **numbers: int) -> None:
        if not self.page.locator("#steps").is_visible():
            self.page.locator("#more button").first.click()
        for name, number in numbers.items():
            entry = self.page.locator(f"#{name} input[type=number]")
            taken = "([name, set]) => [...document.querySelectorAll(`#${name} input`)].every(e => e.value === set)"
            for _ in range(30):  # what is typed while the page draws the slider is lost
                entry.fill(str(number))
                entry.press("Tab")
                self.page.wait_for_timeout(200)
                if self.page.evaluate(taken, [name, str(number)]):
                    break
            else:
                raise AssertionError(f"the slider {name} does not take {number}")

    def has_scale(self, scale: str) -> None:
        """The slider of the guidance scale begins where the model's card says."""
        is_there = "scale => document.querySelector('#scale input[type=number]').value === scale"
        self.page.wait_for_function(is_there, arg=scale)

    def says(self, text: str) -> None:
        self.page.locator("#status", has_text=text).wait_for()

    def ready(self, **numbers: int) -> None:
        """A photo with a hole, a reference and these settings."""
        self.page.bring_to_front()  # browsers slow down what is behind
        self.choose("photo", "photo.png", png(photo_pixels()))
        self.says("Photo of 400 x 300 px")
        self.rectangle(100, 75, 200, 150)
        self.sample_reference()
        self.set(**numbers)

    def edit(self) -> None:
        self.page.locator("#edit").click()

    def cancel(self) -> None:
        """The edit under way, until the page has been told how it ended."""
        last = _handler(json.loads(request(self.server, "GET", "/config")[2]), "refuse_edit")
        with self.page.expect_response(lambda answer: f'"fn_index":{last},' in (answer.request.post_data or "")):
            self.page.locator("#cancel").click()
        self.says("Cancelled")

    def begin_long(self) -> None:
        """An edit of LONG, until it is at work."""
        begun = self.server.said.count("200 steps\n")
        self.edit()
        self.server.wait_for(rf"(?s)(?:200 steps\n.*){{{begun + 1}}}")

    def download(self, button: str, name: str) -> bytes:
        """The file of this name: until the page has it, the button gives nothing, or the file before."""
        from playwright.sync_api import TimeoutError

        end = time.monotonic() + WAIT_MS / 1000
        while time.monotonic() < end:
            try:
                with self.page.expect_download(timeout=5000) as download:
                    self.page.locator(f"#{button}").click()
            except TimeoutError:
                continue
            if download.value.suggested_filename == name:
                return Path(download.value.path()).read_bytes()
        raise AssertionError(f"{name} is not to be had")


@pytest.fixture
def context(chromium: Any) -> Iterator[Any]:
    context = chromium.new_context(viewport={"width": 1280, "height": 1600}, accept_downloads=True)
    yield context
    context.close()


@pytest.fixture
def visit(context: Any, server: Server) -> Visit:
    return Visit(context.new_page(), server)


def photo_pixels(width_px: int = 400, height_px: int = 300) -> np.ndarray:
    coarse = np.random.default_rng(7).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return images.resize(coarse, width_px=width_px, height_px=height_px)


def png(pixels: np.ndarray) -> bytes:
    return images.encode_png(pixels)


def decoded(data: bytes) -> np.ndarray:
    return images.open_picture(data).upright()


def request(
    server: Server, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of a raw request, which no client library has tidied."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None and "Content_Length" not in headers:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    response = connection.getresponse()
    text = response.read(1 << 20).decode("utf-8", "replace")
    connection.close()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, text


# ---- the whole way


def test_an_edit_is_painted_compared_downloaded_made_again_and_edited_further(
    visit: Visit, server: Server, tiny_model: Path, tmp_path: Path
) -> None:
    visit.ready(steps=6, count=2)
    visit.edit()
    visit.says("2 edits are ready")
    assert visit.page.locator("#gallery .grid-container button").count() == 2
    visit.page.locator("#compare img").first.wait_for()
    first = visit.download("png", "edit-seed-42.png")
    visit.page.locator("#gallery .grid-container button").nth(1).click()
    second = visit.download("png", "edit-seed-43.png")
    recipe_json = visit.download("recipe", "edit-seed-43.json")

    for name, data in {"first.png": first, "second.png": second, "second.json": recipe_json}.items():
        (tmp_path / name).write_bytes(data)
    recipes = {name: read_recipe(tmp_path / name) for name in ("first.png", "second.png", "second.json")}
    assert recipes["first.png"].seed == 42 and recipes["second.png"].seed == 43
    assert recipes["second.json"] == recipes["second.png"]
    hole = recipes["first.png"].hole
    assert isinstance(hole, Picture) and hole.data is not None
    painted = decoded(hole.data)[..., 0] > 0
    wanted = np.zeros_like(painted)
    wanted[75:150, 100:200] = True
    assert np.array_equal(painted, wanted), "the hole is not where it was painted"
    assert np.array_equal(decoded(first)[~wanted], photo_pixels()[~wanted])

    editor = Editor.load(tiny_model)
    for name, edit in {"first.png": first, "second.json": second}.items():
        again = remake(recipes[name], editor, folder=None)
        assert is_same(recipes[name], again)
        assert np.array_equal(again, decoded(edit))
    assert main(["edit", "--recipe", str(tmp_path / "second.json"), "--model", str(tiny_model),
                 "--out", str(tmp_path / "again.png")]) == 0  # fmt: skip
    assert np.array_equal(decoded((tmp_path / "again.png").read_bytes()), decoded(second))

    visit.page.locator("#again").click()
    visit.says("Photo of 400 x 300 px")
    visit.rectangle(250, 20, 330, 90)
    visit.page.locator("#seed input").fill("7")
    visit.edit()
    visit.says("2 edits are ready")
    (tmp_path / "further.png").write_bytes(visit.download("png", "edit-seed-7.png"))
    further = read_recipe(tmp_path / "further.png")
    assert further.photo.data is not None and np.array_equal(decoded(further.photo.data), decoded(second))

    hosts = {url.split("/")[2] for url in visit.asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {f"127.0.0.1:{server.port}"}
    assert visit.complaints == []


def test_a_turned_photo_a_box_and_a_mask_file(visit: Visit, tmp_path: Path) -> None:
    stored = Image.fromarray(photo_pixels(300, 200))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    stored.save(turned, "JPEG", exif=exif)
    visit.choose("photo", "turned.jpg", turned.getvalue())
    visit.says("Photo of 200 x 300 px")
    visit.sample_reference()
    visit.set(steps=2, count=1)
    visit.page.get_by_role("radio", name="Box").check()
    box = visit.page.get_by_label("Box: left,top,right,bottom")
    for text, answer in {"": "four whole numbers", "1,2,3": "four whole numbers", "20,30,220,90": "not inside",
                         "0,0,200,300": "whole photo"}.items():  # fmt: skip
        box.fill(text)
        visit.edit()
        visit.says(answer)
    box.fill("20,30,120,90")
    visit.edit()
    visit.says("The edit is ready")
    (tmp_path / "box.json").write_bytes(visit.download("recipe", "edit-seed-42.json"))
    recipe = read_recipe(tmp_path / "box.json")
    assert recipe.model_dump(mode="json")["hole"] == [20, 30, 120, 90]
    assert recipe.photo.data == turned.getvalue()

    boxed = visit.page.locator("#hole img")
    shown = boxed.get_attribute("src")
    visit.page.get_by_role("radio", name="Mask file").check()
    boxed.wait_for(state="hidden")  # no mask yet
    visit.choose("mask", "mask.png", png(np.zeros((300, 201, 3), np.uint8)))
    visit.says("they must be the same")
    visit.page.get_by_role("radio", name="Box").check()
    boxed.wait_for()
    assert boxed.get_attribute("src") != shown, "not drawn again"


def test_an_exemplar_of_the_index_becomes_the_reference(visit: Visit, index_file: Path, tmp_path: Path) -> None:
    visit.ready(steps=2, count=1)
    visit.page.locator("#find").click()
    visit.says('Choose a class, or tick "Like the reference above"')
    visit.page.get_by_label("Class").click()
    visit.page.get_by_role("option", name="Dog").click()
    visit.page.locator("#find").click()
    visit.says("4 exemplars")
    visit.page.locator("#exemplars .grid-container button").nth(1).click()
    visit.says("Reference of")
    visit.edit()
    visit.says("The edit is ready")
    (tmp_path / "edit.png").write_bytes(visit.download("png", "edit-seed-42.png"))
    reference = read_recipe(tmp_path / "edit.png").reference
    index = Index.open(index_file)
    assert reference.data is not None
    assert np.array_equal(decoded(reference.data), index.crop_of(index.find(label="Dog", k=4)[1]))

    visit.page.get_by_label("Like the reference above").check()
    visit.page.locator("#find").click()
    visit.page.locator("#exemplars", has_text="Dog, 0.00").wait_for()


def test_a_damaged_model_or_a_wrong_number_is_one_line_and_edit_is_usable_again(visit: Visit) -> None:
    visit.ready(steps=2, count=1)
    visit.has_scale("2.5")
    visit.page.locator("#seed input").fill("-1")
    visit.edit()
    visit.says("The seed is a whole number from 0")
    visit.page.locator("#seed input").fill("1")
    answers = {("models/damaged", "5"): "NaN or infinite values", ("models/tiny", "2.5"): "The edit is ready"}
    for (model, scale), answer in answers.items():
        visit.page.get_by_label("Model").click()
        visit.page.get_by_role("option", name=model).click()
        visit.has_scale(scale)
        visit.edit()
        visit.says(answer)
        assert visit.page.locator("#status").inner_text().count("\n") == 0


def test_a_photo_can_be_pasted(context: Any, server: Server) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url)

    copy = """async data => {
      const blob = await (await fetch(data)).blob();
      await navigator.clipboard.write([new ClipboardItem({'image/png': blob})]);
    }"""
    visit = Visit(context.new_page(), server)
    visit.page.bring_to_front()
    visit.page.evaluate(copy, "data:image/png;base64," + base64.b64encode(png(photo_pixels())).decode())
    # The click first empties the box, which is an event of its own. Its answer comes after the photo.
    visit.page.route("**/queue/data*", lambda route: (visit.page.wait_for_timeout(1000), route.continue_()), times=1)
    visit.page.locator("#photo").get_by_label("Paste from clipboard").click()
    visit.says("Photo of 400 x 300 px")


def test_of_two_photos_chosen_quickly_the_last_one_counts(visit: Visit) -> None:
    visit.page.bring_to_front()
    visit.page.route("**/queue/data*", lambda route: (visit.page.wait_for_timeout(1000), route.continue_()), times=1)
    photos = visit.page.locator("#sample-photos .grid-container button")
    photos.nth(2).click()
    photos.nth(3).click()
    visit.says("Photo of 640 x 427 px")


def test_cancel_ends_the_computation_and_the_next_edit_runs(visit: Visit, server: Server) -> None:
    visit.ready(**LONG)
    stopped = server.said.count("was stopped after")
    visit.begin_long()
    visit.cancel()
    server.wait_for(rf"(?s)(?:was stopped after \d+ of .*){{{stopped + 1}}}")
    visit.set(steps=2, count=1)
    visit.edit()
    visit.says("The edit is ready")


def test_a_closed_tab_ends_its_edit_and_the_queue_goes_on(context: Any, server: Server) -> None:
    leaves, stays = Visit(context.new_page(), server), Visit(context.new_page(), server)
    leaves.ready(**LONG)
    stays.ready(steps=2, count=1)
    stopped = server.said.count("was stopped after")
    leaves.page.bring_to_front()
    leaves.begin_long()
    stays.page.bring_to_front()
    stays.edit()
    leaves.page.close()
    stays.says("The edit is ready")
    server.wait_for(rf"(?s)(?:was stopped after \d+ of .*){{{stopped + 1}}}")


def test_twenty_edits_at_once_those_beyond_the_queue_are_told_so(visit: Visit, context: Any, server: Server) -> None:
    late = Visit(context.new_page(), server)
    visit.ready(**LONG)
    visit.begin_long()
    config = json.loads(request(server, "GET", "/config")[2])
    number = _handler(config, "edit")
    data = ["Box", "", "1,1,9,9", 5, 1, 42, 2, "the model's own", "ours", "models/tiny"]
    answers = [
        _join(server, {"data": data, "fn_index": number, "session_hash": f"crowd{k}"}, wait=False) for k in range(20)
    ]
    refused = [text for status, text in answers if status == 503]
    assert len(refused) == 20 - 16 and all("full" in text for text in refused)
    late.page.bring_to_front()
    late.edit()
    late.says("The page is busy")
    assert late.page.locator("#status").inner_text().count("\n") == 0
    visit.page.bring_to_front()
    visit.cancel()
    late.page.bring_to_front()
    late.edit()
    late.says("Choose a photo first")
    visit.page.bring_to_front()
    visit.set(steps=2, count=1)
    visit.edit()
    visit.says("The edit is ready")


# ---- what a browser may send


def _png_of(width_px: int, height_px: int) -> bytes:
    """A PNG whose header claims so many pixels, all of one colour; a few hundred kB for gigapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "data", "answer"),
    [
        ("bomb.png", _png_of(60_000, 60_000), "too large"),
        ("empty.png", b"", "empty file"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "cannot be read"),
        ("page.png", b"<html><body>no picture</body></html>", "a web page"),
        ("cut.png", png(photo_pixels())[:2000], "cannot be read"),
        ("<img src=x onerror=alert(1)>.png", b"GIF89a", "cannot be read"),
    ],
    ids=["bomb", "empty", "svg", "html", "cut", "name"],
)
@pytest.mark.parametrize("where", ["photo", "reference"])
def test_what_is_no_picture_gets_one_line(
    visit: Visit, server: Server, where: str, name: str, data: bytes, answer: str
) -> None:
    visit.page.on("dialog", lambda dialog: visit.complaints.append("a script ran"))
    visit.choose(where, name, data)
    visit.says(answer)
    shown = visit.page.inner_text("body")
    assert "Traceback" not in shown and str(server.temporary) not in shown
    assert visit.complaints == []


def test_uploads_of_200_megabytes_are_refused_unsent(visit: Visit, server: Server, tmp_path: Path) -> None:
    status, _, text = request(server, "POST", "/gradio_api/upload", Content_Length=str(200 << 20))
    assert (status, text) == (413, "Too large: at most 32 MiB.")
    status, _, text = request(server, "POST", "/gradio_api/queue/join", Content_Length=str(200 << 20))
    assert status == 413
    status, _, text = request(server, "POST", "/gradio_api/upload", Transfer_Encoding="chunked")
    assert status == 411
    both = request(server, "POST", "/gradio_api/upload", Transfer_Encoding="chunked", Content_Length="2")
    status, _, text = both  # the server would read the chunks
    assert status == 411
    large = tmp_path / "large.png"
    with large.open("wb") as stream:
        stream.truncate(200 << 20)
    visit.page.locator("#photo input[type=file]").set_input_files(large)
    visit.page.get_by_text("exceed the maximum allowed size of 32").wait_for()


@pytest.mark.parametrize(
    "name",
    [
        "../../../../x.png",
        "/etc/x.png",
        "a\\..\\x.png",
        "a%00b.png",
        "a\0b.png",
        "a\nb.png",
        "a\r\n\r\nb.png",
        "x" * 3000 + ".png",
        "..",
    ],
)
def test_file_names_name_no_other_place(server: Server, name: str) -> None:
    body = (
        f'--cut\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        "Content-Type: image/png\r\n\r\nabc\r\n--cut--\r\n"
    ).encode()
    status, _, text = request(
        server, "POST", "/gradio_api/upload", body, Content_Type="multipart/form-data; boundary=cut"
    )
    if status == 200:
        [path] = json.loads(text)
        assert Path(path).resolve().is_relative_to(server.temporary) and Path(path).is_file()
    assert status < 500, text


# ---- what other sites and other programs may try


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:7860", "[::1", ""])
def test_other_names_are_refused(server: Server, host: str) -> None:
    assert request(server, "GET", "/", Host=host)[0] in (400, 403)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost"])
def test_other_sites_are_refused(server: Server, origin: str) -> None:
    status, _, text = request(server, "POST", "/gradio_api/queue/join", b"{}", Origin=origin)
    assert (status, text) == (403, "This page answers to no other site.")


def test_answers_forbid_frames_and_other_hosts(server: Server) -> None:
    status, headers, _ = request(server, "GET", "/")
    policy = headers["content-security-policy"]
    assert status == 200 and "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=%2Fetc%2Fpasswd",
        "/gradio_api/file={folder}/../../../../etc/passwd",
        "/gradio_api/file={folder}/%2e%2e/%2e%2e/log",
        "/gradio_api/file=http://127.0.0.1:{port}/config",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1:{port}/config",
        "/gradio_api/info",
        "/gradio_api/openapi.json",
        "/gradio_api/mcp/sse",
        "/gradio_api/run-history/records",
        "/gradio_api/vibe-code",
        "/monitoring",
        "/assets/../../../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/svelte/../../../../../../etc/passwd",
    ],
)
def test_no_file_of_the_machine_is_served(server: Server, path: str) -> None:
    [folder] = server.temporary.glob("pbe-page-*")
    status, _, text = request(server, "GET", path.format(folder=folder, port=server.port))
    assert 400 <= status < 500, (status, text[:200])
    assert "root:" not in text and "[project]" not in text and "components" not in text


@pytest.mark.parametrize(
    "file",
    [
        {"path": "/etc/passwd"},
        {"path": "{folder}/../../../../etc/passwd"},
        {"path": "http://127.0.0.1:{port}/config", "url": "http://127.0.0.1:{port}/config"},
        {"path": "pyproject.toml"},
        {"path": None, "url": "http://127.0.0.1:{port}/config"},
        {"path": "{folder}"},
    ],
)
@pytest.mark.parametrize("handler", ["take_photo", "take_reference", "take_mask"])
def test_a_request_that_names_what_was_never_uploaded_gets_nothing(
    server: Server, handler: str, file: dict[str, str | None]
) -> None:
    [folder] = server.temporary.glob("pbe-page-*")
    config = json.loads(request(server, "GET", "/config")[2])
    named = {key: value and value.format(folder=folder, port=server.port) for key, value in file.items()}
    data = [{**named, "meta": {"_type": "gradio.FileData"}}]
    body = {"data": data, "fn_index": _handler(config, handler), "session_hash": "stranger"}
    status, text = _join(server, body, wait=True)
    assert status == 200
    checkout = str(Path(__file__).parents[2])
    assert not any(secret in text for secret in ("root:", str(folder), "Traceback", checkout))
    assert "Photo of" not in text and "Reference of" not in text and "mask marks" not in text
    assert Path("/etc/passwd").is_file() and folder.is_dir()
    assert request(server, "GET", "/")[0] == 200


def _handler(config: dict[str, Any], name: str) -> int:
    found = [item["id"] for item in config["dependencies"] if item["api_name"].startswith(name)]
    assert found, [item["api_name"] for item in config["dependencies"]]
    return found[0]


def _join(server: Server, body: dict[str, Any], *, wait: bool) -> tuple[int, str]:
    """Queue a click without a browser; wait: for what it answers."""
    data = json.dumps(body).encode()
    status, _, text = request(server, "POST", "/gradio_api/queue/join", data, Content_Type="application/json")
    if not wait or status != 200:
        return status, text
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", f"/gradio_api/queue/data?session_hash={body['session_hash']}")
    response, said = connection.getresponse(), b""
    while b"process_completed" not in said and (line := response.readline()):
        said += line
    connection.close()
    return status, said.decode()


# ---- what is seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_control_has_a_name_and_every_text_is_readable(visit: Visit, server: Server, scheme: str) -> None:
    visit.page.emulate_media(color_scheme=scheme)
    visit.page.goto(server.url)
    visit.ready(steps=2, count=2)
    visit.edit()
    visit.says("2 edits are ready")
    nameless = visit.page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea, canvas, img')].filter(element => {
          if (!element.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) return false;
          const text = element.closest('label')?.innerText || element.innerText || element.alt || element.title
            || element.getAttribute('aria-label') || element.placeholder || element.labels?.[0]?.innerText || '';
          return !text.trim();
        }).map(element => element.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    faint = visit.page.evaluate(
        """() => {
          const parse = text => text.match(/[\\d.]+/g).map(Number);
          const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
          const light = ([r, g, b]) => [r, g, b].map(linear)
            .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
          const behind = element => {
            for (; element; element = element.parentElement) {
              const style = getComputedStyle(element), colour = parse(style.backgroundColor);
              if (style.backgroundImage !== 'none') return null;
              if ((colour[3] ?? 1) > 0.9) return colour;
            }
            return [255, 255, 255];
          };
          const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
          while (walk.nextNode()) {
            const element = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
            if (!element.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
            if (!/[\\p{L}\\p{N}]/u.test(text) || element.closest('script, style, button:disabled')) continue;
            const ground = behind(element);
            if (!ground) continue;
            const style = getComputedStyle(element), px = parseFloat(style.fontSize);
            const [a, b] = [light(parse(style.color)), light(ground)].sort((p, q) => q - p);
            const ratio = (a + 0.05) / (b + 0.05), large = px >= 24 || (px >= 18.6 && style.fontWeight >= 700);
            if (ratio < (large ? 3 : 4.5)) found.push(`${text.slice(0, 40)}: ${ratio.toFixed(2)}`);
          }
          return found;
        }"""
    )
    assert faint == []


def test_tab_goes_through_the_page_in_its_order(visit: Visit) -> None:
    """The handle of the comparison cannot be reached: Gradio's is for pointers alone. The pictures have names."""
    visit.ready(steps=2, count=1)
    visit.edit()
    visit.says("The edit is ready")
    visit.page.locator("#compare img[alt='The edit']").wait_for()
    visit.page.evaluate("() => { document.body.tabIndex = -1; document.body.focus(); }")
    order: list[str] = []
    while "again" not in order:
        assert len(order) < 200, order
        visit.page.keyboard.press("Tab")
        order.append(visit.page.evaluate("document.activeElement.closest('[id]:not([id^=component], [id^=html])').id"))
    stations = "photo kind brush reference class scale seed more edit gallery png again"
    places = [order.index(station) for station in stations.split()]
    assert places == sorted(places)


def test_the_hole_can_be_painted_by_keyboard(visit: Visit, tmp_path: Path) -> None:
    visit.ready(steps=2, count=1)
    visit.page.get_by_role("button", name="Clear").click()
    visit.page.get_by_role("button", name="Brush").click()
    visit.page.locator("#brush canvas").focus()
    visit.page.keyboard.down(" ")
    for _ in range(5):
        visit.page.keyboard.press("ArrowRight")
    visit.page.keyboard.up(" ")
    visit.edit()
    visit.says("The edit is ready")
    (tmp_path / "edit.json").write_bytes(visit.download("recipe", "edit-seed-42.json"))
    hole = read_recipe(tmp_path / "edit.json").hole
    assert isinstance(hole, Picture) and hole.data is not None
    painted = decoded(hole.data)[..., 0] > 0
    assert painted[150, 200] and painted[150, 245] and not painted[150, 100] and not painted[60, 200]


def test_on_a_phone_nothing_is_wider_than_the_screen(chromium: Any, server: Server) -> None:
    context = chromium.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    visit = Visit(context.new_page(), server)
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()


# ---- beginning and end


@pytest.mark.parametrize("option", ["--host 0.0.0.0", "--allow-host pictures.example"])
def test_others_need_users(tiny_model: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["page", "--model", str(tiny_model), *option.split()]) == 1
    assert f"{option}: others could reach the page; name its users by --auth-file FILE" in capsys.readouterr().err


def test_a_port_that_no_machine_has_is_one_line(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["page", "--model", str(tiny_model), "--port", "78600"]) == 1
    said = capsys.readouterr().err
    assert "--port 78600: " in said and "choose another --port" in said and said.count("\n") == 1


def test_without_gradio_one_line_says_what_installs_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["page", "--model", str(tiny_model)]) == 1
    said = capsys.readouterr().err
    assert "the page needs Gradio; `make env` installs it" in said and said.count("\n") == 1


def test_users_log_in_and_nothing_stays_when_the_page_ends(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chromium: Any
) -> None:
    users = tmp_path / "users"
    monkeypatch.setattr("getpass.getpass", lambda prompt: "correct horse")
    assert main(["page", "--add-user", "ada", "--auth-file", str(users)]) == 0
    server = start(tmp_path, "--model", str(tiny_model), "--auth-file", str(users), "--allow-host", "Pictures.example")
    assert request(server, "GET", "/", Host="pictures.example", Origin="https://pictures.example")[0] == 200
    assert request(server, "GET", "/", Host="other.example")[0] == 403
    [folder] = server.temporary.glob("pbe-page-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert request(server, "GET", "/config")[0] == 401
    assert request(server, "POST", "/gradio_api/queue/join", b"{}", Content_Type="application/json")[0] == 401
    page = chromium.new_page()
    page.goto(server.url)
    for password, seen in (("wrong", "text=Incorrect"), ("correct horse", "#edit")):
        page.locator("input").nth(0).fill("ada")
        page.locator("input[type=password]").fill(password)
        page.get_by_role("button", name="Login").click()
        page.wait_for_selector(seen, timeout=WAIT_MS)
    page.close()
    assert server.end() == 0
    assert list(server.temporary.iterdir()) == []
    assert "Traceback" not in server.said
