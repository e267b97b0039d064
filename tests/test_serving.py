"""The page of ``predict.py --serve``: by hand over HTTP, and in a browser."""

import base64
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from test_predict import checkpoint  # noqa: F401 (a fixture)

import predict
from engine.serving import LARGEST, Server

EVIL = "<script>document.title = 'run'</script>"


def image_file(colour: str = "red", size=(40, 30)) -> bytes:
    Image.new("RGB", size, colour).save(out := io.BytesIO(), "PNG")
    return out.getvalue()


def known_answer(path: Path):
    """Red and green as classes, a picture of the inverse; no image is an error, blue a bug."""
    try:
        with Image.open(path) as image:
            red, green, blue = image.convert("RGB").getpixel((0, 0))
    except OSError as error:
        return {"file": str(path), "error": f"{path} is no image: {error}"}, None
    if blue:
        raise RuntimeError("a bug\nof several lines")
    predictions = [("red", red / 255), (EVIL, green / 255)]
    return {"file": str(path), "predictions": predictions}, Image.new("RGB", (8, 8), (255 - red, 255 - green, 0))


@contextmanager
def serving(answer=known_answer) -> Iterator[Server]:
    with Server(answer, f"micro of {EVIL}", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: Server, method: str = "POST", path: str = "/predict", body: bytes | None = None, **headers):
    connection = http.client.HTTPConnection(*server.server_address, timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def test_an_image_gets_its_answer():
    with serving() as server:
        response, content = ask(server, body=image_file())
        answer = json.loads(content)
        assert (response.status, answer["predictions"]) == (200, [["red", 1.0], [EVIL, 0.0]])
        kind, _, data = answer["picture"].partition(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)) == (0, 255, 0)


def test_what_goes_wrong_is_said_and_the_server_goes_on():
    with serving() as server:
        response, content = ask(server, body=b"no image")
        assert response.status == 400
        assert json.loads(content)["error"].startswith("the image is no image: ")
        response, content = ask(server, body=image_file("blue"))
        assert (response.status, json.loads(content)) == (500, {"error": "a bug"})
        for method, path, status in (("GET", "/other", 404), ("POST", "/", 404), ("PUT", "/predict", 501)):
            assert ask(server, method, path, b"")[0].status == status
        response, content = ask(server, body=b"", Content_Length=str(LARGEST + 1))
        assert (response.status, json.loads(content)) == (413, {"error": "an image may have 32 MB at most"})
        assert ask(server, body=iter([b"x"]), Transfer_Encoding="chunked")[0].status == 411
        with socket.create_connection(server.server_address) as gone:
            gone.sendall(b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\nx")
        assert ask(server, body=image_file())[0].status == 200


def test_no_other_page_may_ask():
    with serving() as server:
        port = server.server_address[1]
        for headers, status in (
            ({"Host": "evil.example"}, 403),  # a name that has come to point here
            ({"Host": "127.0.0.1.evil.example"}, 403),
            ({"Host": "localhost", "Origin": "http://localhost:1"}, 403),  # another page of this machine
            ({"Host": "localhost:9000", "Origin": "http://localhost:9000"}, 200),  # a port that is forwarded
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": server.address}, 200),
            ({"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}, 200),
        ):
            assert ask(server, body=image_file(), **headers)[0].status == status, headers
        assert ask(server, "GET", "/", Host="evil.example")[0].status == 403
        assert server.server_address[0] == "127.0.0.1"


def test_one_image_at_a_time():
    inside, most = 0, 0

    def slow(path):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        threading.Event().wait(0.05)
        inside -= 1
        return {"predictions": []}, None

    with serving(slow) as server:
        threads = [threading.Thread(target=ask, args=(server,), kwargs={"body": b"x"}) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1


def test_a_port_that_is_taken(checkpoint, capsys):  # noqa: F811
    with serving() as server:
        port = str(server.server_address[1])
        assert predict.main(["--checkpoint", str(checkpoint), "--device", "cpu", "--serve", port]) == 2
    error = capsys.readouterr().err
    assert error == f"error: port {port} cannot be served on: Address already in use; choose another: --serve N\n"
    for words, said in {
        ("--serve", "70000"): "port 70000 cannot be served on",
        ("--serve", "--sheet", "x.png"): "--serve shows what comes to its page: leave out sheet",
        ("x.png", "--serve", "0"): "leave out images",
        (): "IMAGE-OR-FOLDER (or --serve)",
    }.items():
        assert predict.main(["--checkpoint", str(checkpoint), "--device", "cpu", *words]) == 2
        assert said in capsys.readouterr().err


def test_the_command_answers_as_predict_does(checkpoint, digits, tmp_path):  # noqa: F811
    words = ["predict.py", "--checkpoint", str(checkpoint), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, *words, "--serve", "0", "--top", "3"], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        said = process.stdout.readline()
        assert said.startswith(f"crossformer_micro of {checkpoint}: open http://127.0.0.1:")
        port = int(said.partition("127.0.0.1:")[2].split()[0])
        photograph = next((digits / "val" / "3").iterdir())
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/predict", photograph.read_bytes())
        answer = json.loads(connection.getresponse().read())
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read().strip() == "stopped"
    finally:
        process.kill()
    assert "picture" not in answer
    to = tmp_path / "found.json"
    assert predict.main([*words[1:], str(photograph), "--format", "json", "--top", "3", "--to", str(to)]) == 0
    expected = json.loads(to.read_text())[0]["predictions"]
    assert answer["predictions"] == [[one["class"], one["probability"]] for one in expected]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(browser, tmp_path, width, scheme):
    said = []
    for name, content in {"a <b>.png": image_file(), "green.png": image_file("lime"), "bad.png": b"no image"}.items():
        (tmp_path / name).write_bytes(content)
    with serving() as server:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server.address)
        assert page.title() == f"micro of {EVIL}"
        page.locator("input[type=file]").set_input_files([tmp_path / "a <b>.png", tmp_path / "green.png"])
        page.locator("figure li").nth(3).wait_for()
        assert page.locator("figcaption").all_inner_texts() == ["green.png", "a <b>.png"], "the latest first"
        assert page.locator("figure").first.locator("li").all_inner_texts()[1].split("\n") == [EVIL, "100.0 %"]
        assert page.locator("figure img").first.get_attribute("src").startswith("data:image/png")
        assert said == []
        page.evaluate(
            """bytes => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png"));
                dispatchEvent(new DragEvent("drop", { dataTransfer: transfer }));
            }""",
            list(b"no image"),
        )
        page.wait_for_selector(".error")
        assert page.locator(".error").inner_text().startswith("the image is no image")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.title() == f"micro of {EVIL}"
        page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert all("status of 400" in line for line in said), said
