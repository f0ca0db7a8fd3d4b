"""The metric judge against a stand-in host on the loopback: what is asked, replies kept, faults named, and who may name the host."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mmft.common.errors import UserError
from mmft.config.choices import JUDGE_VARIABLE
from mmft.evaluation.metrics.base import MetricSet
from mmft.evaluation.metrics.judge import KEY_VARIABLE, Judge

ROW = {"id": "r1", "prompt": "What is it?", "references": ["a cat"], "prediction": "a small {references} cat"}


class Host:
    """reply: a text, or a status with headers. asked: (path, key, body) of every request."""

    def __init__(self):
        self.reply, self.asked = "7", []
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                host.asked.append((self.path, self.headers.get("Authorization"), body))
                status, headers = host.reply if isinstance(host.reply, tuple) else (200, {})
                text = "" if status != 200 else json.dumps({"choices": [{"message": {"content": host.reply}}]})
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def host(monkeypatch):
    made = Host()
    monkeypatch.setenv(JUDGE_VARIABLE, made.address)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_an_answer_is_asked_about_once_and_its_number_is_a_share_of_ten(host, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "sesame")
    judge = Judge(model="m", cache=str(tmp_path / "kept"))
    assert [judge.row(ROW), judge.row(ROW), Judge(model="m", cache=str(tmp_path / "kept")).row(ROW)] == [{"judge": 0.7}] * 3
    ((path, key, body),) = host.asked
    assert (path, key, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer sesame", "m", 0)
    text = body["messages"][0]["content"]
    assert "What is it?" in text and '["a cat"]' in text and "a small {references} cat" in text, "what an answer says is not filled in"
    assert "sesame" not in "".join(p.read_text(encoding="utf-8") for p in (tmp_path / "kept").iterdir())
    assert judge.row({**ROW, "prediction": "a dog"}) == {"judge": 0.7} and Judge(model="other", cache=str(tmp_path / "kept")).row(ROW) == {"judge": 0.7}
    assert len(host.asked) == 3, "another answer and another model are asked"


@pytest.mark.parametrize(
    ("reply", "said"),
    [((500, {}), "status 500"), ("good", "not a number"), ("70", "not a number from 0 to 10"), ((302, {"Location": "http://127.0.0.1:9/v1"}), "status 302")],
)
def test_a_judge_that_fails_is_named_and_the_value_is_missing(host, tmp_path, caplog, reply, said):
    host.reply = reply
    metrics = MetricSet({"judge": Judge(model="m", cache=str(tmp_path / "kept"))})
    rows = [{**ROW, "metrics": metrics.row(ROW)}, {**ROW, "id": "r2", "metrics": {"judge": 0.5}}]
    assert rows[0]["metrics"] == {} and "metric judge: row r1" in caplog.text and said in caplog.text
    assert metrics.corpus(rows) == {"judge": 0.5} and metrics.info(rows)["judge"]["missing"] == 1
    assert not (tmp_path / "kept").exists(), "no fault is kept"


def test_only_the_command_line_names_the_host(mmft, tmp_path, monkeypatch):
    monkeypatch.setenv(JUDGE_VARIABLE, "")
    with pytest.raises(UserError, match="only the command names"):
        MetricSet.from_config({"judge": {"_target_": "mmft.evaluation.metrics.judge.Judge", "model": "m"}})
    code, _, err = mmft("metrics=[judge]", "metrics.judge.url=http://127.0.0.1:1/v1")
    assert code == 2 and "metrics.judge.url" in err
    code, _, err = mmft("metrics=[judge]", "metrics.judge.model=m", "--judge", "http://127.0.0.1:1/v1", "data.pictures=96", "data.splits.validation=4", f"run_dir={tmp_path.as_posix()}/run")
    assert code == 2 and "judge is never used in training" in err and "mmft evaluate run=DIR metrics=[judge]" in err and not (tmp_path / "run").exists()
    for address in ("ftp://x/v1", "http://user:pass@x/v1", "x"):
        monkeypatch.setenv(JUDGE_VARIABLE, address)
        with pytest.raises(UserError, match="base address"):
            Judge(model="m").ready()


def test_evaluate_asks_the_host_of_its_command(mmft, host, tmp_path, monkeypatch):
    words = ("evaluate", "data.pictures=96", "data.splits.validation=3", "generation.max_new_tokens=3", "metrics=[judge]", "metrics.judge.model=m",
             f"metrics.judge.cache={tmp_path.as_posix()}/kept", "--judge", host.address)  # fmt: skip
    for n in range(2):
        code, out, err = mmft(*words, f"run_dir={tmp_path.as_posix()}/{n}")
        assert code == 0, err
        assert "0.700" in out
    assert 1 <= len(host.asked) <= 3, "the second time, everything was known"
    assert host.address not in (tmp_path / "0" / "snapshot.yaml").read_text(encoding="utf-8")
