"""Images by URL: a server on the loopback that misbehaves in every way; only the well-behaved ones arrive."""

import json
import shutil
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from small import png, write_csv

from mmft.data.download import Download
from mmft.data.images import ImageError
from mmft.data.prepared import PreparedData

IMAGE = png(3, 16)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        port = self.server.server_address[1]
        leads = {
            "/redirected.png": "/ok.png", "/absolute.png": f"http://127.0.0.1:{port}/ok.png", "/out.png": f"http://localhost:{port}/secret.png",
            "/file.png": "file:///etc/passwd", "/ftp.png": "ftp://127.0.0.1/x", "/loop.png": "/loop.png", "/port.png": "http://127.0.0.1:1/x.png",
            "/metadata.png": "http://169.254.169.254/latest",
        }  # fmt: skip
        if self.path in leads:
            self.send_response(302)
            self.send_header("Location", leads[self.path])
            self.end_headers()
            return
        bodies = {"/ok.png": IMAGE, "/secret.png": IMAGE, "/page.png": b"<html>", "/empty.png": b"", "/short.png": IMAGE[:20]}
        if self.path == "/big.png":  # no length said, and no end
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"\0" * 65536)
            except OSError:
                return
        if self.path in ("/drip.png", "/dripping-header.png"):
            try:
                if self.path == "/drip.png":
                    self.send_response(200)
                    self.end_headers()
                for _ in range(300):
                    self.wfile.write(b"H")
                    self.wfile.flush()
                    time.sleep(0.1)
            except OSError:
                return
        if self.path not in bodies and self.path not in ("/said-big.png", "/packed.png"):
            self.send_error(404)
            return
        self.send_response(200)
        if self.path == "/packed.png":
            self.send_header("Content-Encoding", "gzip")
        length = {"/said-big.png": 10**12, "/short.png": len(IMAGE)}.get(self.path, len(bodies.get(self.path, b"")))
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(bodies.get(self.path, b""))


@pytest.fixture
def server():
    class Server(ThreadingHTTPServer):
        daemon_threads = True
        asked: list = []

    made = Server(("127.0.0.1", 0), Handler)
    made.asked = []
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


KEPT = ["/ok.png", "/redirected.png", "/absolute.png"]
REFUSED = {
    "/out.png": "localhost:PORT is not in data.download.hosts", "/file.png": "file: only http and https", "/ftp.png": "ftp: only http and https",
    "/loop.png": "more than 5 redirects", "/port.png": "127.0.0.1:1 is not in data.download.hosts", "/metadata.png": "169.254.169.254 is not in",
    "/big.png": "more than data.download.max_bytes=50000", "/said-big.png": "1000000000000 bytes, more than", "/drip.png": "took longer than 1 s",
    "/dripping-header.png": "took longer than 1 s", "/gone.png": "answers 404", "/packed.png": "packed", "/short.png": f"20 of {len(IMAGE)} bytes",
    "/page.png": "not a picture", "/empty.png": "the file is empty",
}  # fmt: skip


def test_what_arrives_and_what_does_not(mmft, server, tmp_path):
    port = server.server_address[1]
    urls = [f"http://127.0.0.1:{port}{path}" for path in [*KEPT, *REFUSED]]
    odd = {f"http://user:pass1234@127.0.0.1:{port}/ok.png": "name or password", f"http://127.0.0.1:{port}/a b.png": "percent-encoded",
           f"HTTP://LOCALHOST:{port}/ok.png": "is not in data.download.hosts", f"gopher://127.0.0.1:{port}/ok.png": "image is a URL"}  # fmt: skip
    table = write_csv(tmp_path / "rows.csv", ["image", "text"], *([u, f"text {i}"] for i, u in enumerate([*urls, *odd])))
    words = ["data=table", f"data.path={table}", f"data.download.hosts=['127.0.0.1:{port}']", "data.download.timeout=1", "data.download.max_bytes=50000",
             "data.max_bad_share=0.95", "data.splits.validation=0"]  # fmt: skip
    code, _, err = mmft(*words)
    assert code == 2 and "run `mmft prepare`" in err and not server.asked  # training asks nobody
    code, out, err = mmft("prepare", *words)
    assert code == 0, err
    (folder,) = (p for p in (tmp_path / "outputs" / "data").iterdir() if p.is_dir())
    report = {json.loads(line)["where"]: json.loads(line)["reason"] for line in (folder / "report.jsonl").read_text(encoding="utf-8").splitlines()}
    for i, (path, reason) in enumerate({**REFUSED, **odd}.items(), len(KEPT) + 2):
        assert reason.replace("PORT", str(port)) in report[f"rows.csv:{i}"], (path, report.get(f"rows.csv:{i}"))
    assert b"pass1234" not in b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file()) and "pass1234" not in out + err
    prepared = PreparedData(folder)
    assert prepared.splits == {"train": len(KEPT)} and "/secret.png" not in server.asked
    for sample in prepared.split("train"):
        assert sample.image_paths[0].is_relative_to(folder / "images") and sample.image_paths[0].read_bytes() == IMAGE
        assert sample.load_images()[0].getpixel((0, 0)) == (3, 0, 7)
    asked = len(server.asked)
    code, _, err = mmft("prepare", *words)  # what failed is tried again, what arrived is not
    later = server.asked[asked:]
    assert code == 0 and "could not be downloaded; preparing again" in err and "/gone.png" in later and not {*KEPT} & {*later} - {"/ok.png"}
    assert later.count("/ok.png") == 0


def test_a_name_that_stands_for_a_private_address_is_refused(server, monkeypatch):
    port = server.server_address[1]
    with pytest.raises(ImageError, match="private network"):
        Download(hosts=[f"localhost:{port}"]).fetch(f"http://localhost:{port}/ok.png")
    assert not server.asked
    assert Download(hosts=[f"localhost:{port}"], private=True).fetch(f"http://localhost:{port}/ok.png") == IMAGE
    for answer in ("169.254.169.254", "0.0.0.0", "224.0.0.1"):
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, answer=answer, **k: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answer, port))])
        with pytest.raises(ImageError, match="private network"):
            Download(hosts=["images.example"], private=True).fetch("http://images.example/ok.png")


def test_the_address_that_was_judged_is_the_one_connected_to(server, monkeypatch):
    """A name whose second answer is another address (DNS rebinding) is asked for once."""
    port, asked, real = server.server_address[1], [], socket.getaddrinfo

    def answers(host, *rest, **keys):
        asked.append(host)
        return real("127.0.0.1" if len(asked) == 1 else "127.0.0.2", *rest, **keys)

    monkeypatch.setattr(socket, "getaddrinfo", answers)
    assert Download(hosts=[f"images.example:{port}"], private=True).fetch(f"http://images.example:{port}/ok.png") == IMAGE
    assert asked == ["images.example"]


def test_a_certificate_nobody_vouches_for_is_refused(tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("makes a certificate with openssl")
    import ssl

    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", tmp_path / "key", "-out", tmp_path / "cert", "-days", "1",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)  # fmt: skip
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.asked = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    made.socket = context.wrap_socket(made.socket, server_side=True)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{made.server_address[1]}"
    try:
        with pytest.raises(ImageError, match="certificate verify failed"):
            Download(hosts=[host]).fetch(f"https://{host}/ok.png")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))
            assert Download(hosts=[host]).fetch(f"https://{host}/ok.png") == IMAGE
    finally:
        made.shutdown()
        made.server_close()


@pytest.mark.parametrize("word, expected", [
    ("data.download.hosts=[]", "data.download.hosts"), ("data.download.hosts=['*']", "data.download.hosts"), ("data.download.host=[a]", "Did you mean hosts?"),
    ("data.download.hosts=['http://a']", "without scheme"), ("data.download={hosts: [a], max_bytes: 0}", "max_bytes"), ("data.download={hosts: [a], timeout: 0}", "timeout"),
])  # fmt: skip
def test_wrong_settings_are_one_line(mmft, tmp_path, word, expected):
    table = write_csv(tmp_path / "rows.csv", ["image", "text"], ["a", "b"])
    code, _, err = mmft("prepare", "data=table", f"data.path={table}", word)
    assert code == 2 and expected in err and err.count("\n") == 1, err
