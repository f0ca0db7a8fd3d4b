"""The page of compare ui=true for others: refused without a password, and nothing of it answers who has not logged in."""

from __future__ import annotations

import http.cookiejar
import json
import urllib.error
import urllib.parse
import urllib.request
import uuid

import pytest
from page_served import served

SECRET = "correct horse battery"
ELSEWHERE = "127.0.0.2"  # an address that is not the loopback's own, and that nobody else can reach


@pytest.mark.parametrize("host, password, said", [
    ("0.0.0.0", None, "others can reach this page, so it needs a login"), (ELSEWHERE, None, "(it is not set)"), ("0.0.0.0", "short", "(it is 5 characters long)"),
    ("::", None, "needs a login"), ("example.org", SECRET, "must be an address of this machine"), ("localhost", None, "must be an address of this machine"),
])  # fmt: skip
def test_an_address_for_others_is_refused_without_a_password(verb, trained, monkeypatch, host, password, said):
    pytest.importorskip("gradio")
    import mmft.runs.answers  # before the replacement below, so that they keep the function itself
    import mmft.runs.open
    import mmft.serving.page

    monkeypatch.delenv("MMFT_UI_PASSWORD", raising=False)
    if password:
        monkeypatch.setenv("MMFT_UI_PASSWORD", password)
    monkeypatch.setattr(mmft.runs.open, "open_run", lambda *a: pytest.fail("the model was loaded first"))
    code, _, err = verb("compare", "ui=true", f"host='{host}'")
    assert code == 2 and f"host={host}: " in err and said in err and len(err.strip().splitlines()) == 1 and (password or "no word") not in err


@pytest.mark.parametrize("word", ["password=x", f"host={SECRET.replace(' ', '')}", "auth=x"])
def test_no_word_of_a_command_is_a_password(verb, monkeypatch, word):
    monkeypatch.setenv("MMFT_UI_PASSWORD", SECRET.replace(" ", ""))
    code, _, err = verb("compare", "ui=true", word)
    assert code == 2 and SECRET.replace(" ", "") not in err


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    """(address, what was said) of a page for others."""
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'mmft[ui]'")
    log = tmp_path_factory.mktemp("login") / "log.txt"
    words = [f"run={trained.run.as_posix()}", f"host={ELSEWHERE}"]
    with served(log, words, ELSEWHERE, MMFT_UI_PASSWORD=SECRET, OMP_NUM_THREADS="1") as found:
        yield found, log


def visitor(address: str, user: str | None = None, password: str = "") -> urllib.request.OpenerDirector:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
    if user is not None:
        opener.open(f"{address}login", urllib.parse.urlencode({"username": user, "password": password}).encode(), timeout=30)
    return opener


def refused(call) -> int:
    with pytest.raises(urllib.error.HTTPError) as error:
        call()
    return error.value.code


def test_nothing_answers_who_has_not_logged_in(page, trained):
    address, _ = page
    stranger, session = visitor(address), uuid.uuid4().hex
    entrance = stranger.open(address, timeout=30).read().decode()
    assert str(trained.run) not in entrance and "compare-sample" not in entrance, "the way in shows nothing of the run"
    join = urllib.request.Request(f"{address}gradio_api/queue/join", json.dumps({"data": [], "fn_index": 0, "session_hash": session}).encode(), {"Content-Type": "application/json"})
    edge = uuid.uuid4().hex
    body = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\nContent-Type: image/png\r\n\r\nx\r\n--{edge}--\r\n'.encode()
    upload = urllib.request.Request(f"{address}gradio_api/upload", body, {"Content-Type": f"multipart/form-data; boundary={edge}"})
    for request in (join, upload, f"{address}config", f"{address}gradio_api/info", f"{address}gradio_api/queue/data?session_hash={session}",
                    f"{address}gradio_api/file={trained.pictures / '0.png'}"):  # fmt: skip
        assert refused(lambda request=request: stranger.open(request, timeout=30)) in (401, 403, 404), request
    for user, password in (("mmft", "wrong horse battery"), ("mmft", ""), ("root", SECRET)):
        assert refused(lambda user=user, password=password: visitor(address, user, password)) in (400, 401, 422)


def test_who_logs_in_sees_the_page_and_no_file(page, trained):
    address, log = page
    guest = visitor(address, "mmft", SECRET)
    config = json.load(guest.open(f"{address}config", timeout=30))
    assert any(c["props"].get("elem_id") == "compare-sample" for c in config["components"])
    for path in (trained.run / "snapshot.yaml", "/etc/passwd"):
        assert refused(lambda path=path: guest.open(f"{address}gradio_api/file={path}", timeout=30)) in (403, 404)
    said = log.read_text(encoding="utf-8")
    assert SECRET not in said and "for all who can reach this machine, user mmft" in said and "unencrypted" in said
    assert not [p for p in trained.run.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()], "no file of the run holds it"
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address.replace(ELSEWHERE, "127.0.0.1"), timeout=10)
