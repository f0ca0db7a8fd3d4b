"""mmft serve, through the openai client on 127.0.0.1: two runs and their base over one copy of the weights."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def second(trained):
    """Another run over the same base, with other weights, another rank and a system prompt of its own."""
    from mmft.cli.main import main

    run = trained.outputs / "second"
    assert main([*trained.words, "seed=7", "lora.r=3", "trainer.learning_rate=0.01", "collator.system=Answer briefly.", f"run_dir={run.as_posix()}"]) == 0
    return run


@pytest.fixture(scope="module")
def models(trained, second):
    from mmft.config.compose import compose
    from mmft.serving.adapters import open_models

    return open_models([str(trained.run), str(second)], compose([f"output_dir={trained.outputs.as_posix()}"]), [], None)


class Running:
    """A server in this process. client: of openai; url: for requests that it would not send."""

    def __init__(self, models, queue: int = 256, token: str | None = None, check: int = 0, places: int = 16):
        import uvicorn

        from mmft.serving.engine import Engine
        from mmft.serving.listener import listening
        from mmft.serving.parity import check_parity
        from mmft.serving.server import Server

        self.engine = Engine(models, places, queue)
        self.notes = check_parity(self.engine, models, check) if check else self.engine.start()
        self.server = Server(self.engine, token)
        listener = listening("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        self.web = uvicorn.Server(uvicorn.Config(self.server.app(), log_config=None, log_level="critical", lifespan="off"))
        self.web.install_signal_handlers = lambda: None
        self.thread = threading.Thread(target=self.web.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        self.client = openai.OpenAI(base_url=self.url, api_key=token or "none", max_retries=0, timeout=120)

    def ask(self, model, messages, **keys):
        return self.client.chat.completions.create(model=model, messages=messages, **keys)

    def close(self):
        self.web.should_exit = True
        self.thread.join(20)
        self.server.close()
        self.engine.close()


@pytest.fixture(scope="module")
def running(models):
    running = Running(models, check=2)
    yield running
    running.close()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def question(row: dict) -> list[dict]:
    data = base64.b64encode(Path(row["root"], row["images"][0]).read_bytes()).decode()
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}, {"type": "text", "text": row["prompt"]}]}]


@pytest.fixture(scope="module")
def measured(trained, second, models):
    """model name -> what training measured: rows with prompt and prediction."""
    return {"tiny": lines(trained.run / "eval/base.jsonl"), "first": lines(trained.run / "eval/tuned.jsonl"), "second": lines(second / "eval/tuned.jsonl")}


# --- the same answers ---------------------------------------------------------------------------------------------


def test_all_models_at_once_answer_as_training_measured_them(running, measured):
    assert [m.id for m in running.client.models.list()] == ["tiny", "first", "second"]
    assert len({tuple(row["prediction"] for row in rows) for rows in measured.values()}) == 3, "the models differ"
    assert [n.split(":")[0] for n in running.notes] == ["tiny", "first", "second"] and all("answered as predict does" in n for n in running.notes)
    jobs = [(name, row) for i in range(6) for name, rows in measured.items() for row in rows[i : i + 1]]
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: running.ask(job[0], question(job[1])), jobs))
    assert [a.choices[0].message.content for a in answers] == [row["prediction"] for _, row in jobs]
    assert all(a.choices[0].finish_reason == ("length" if row["truncated"] else "stop") for a, (_, row) in zip(answers, jobs, strict=True))


def test_a_stream_has_the_same_text_and_its_usage(running, measured):
    for row in measured["first"][:3]:
        whole = running.ask("first", question(row))
        chunks = list(running.ask("first", question(row), stream=True, stream_options={"include_usage": True}))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == row["prediction"] == whole.choices[0].message.content
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
        assert chunks[-1].usage == whole.usage and not chunks[-1].choices


def test_logprobs_are_those_of_plain_peft(running, measured, trained):
    """Token by token from the logits of one pass of transformers and peft over prompt and answer."""
    import torch
    from peft import PeftModel
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    base = trained.run.parents[1] / "tiny"
    processor = AutoProcessor.from_pretrained(trained.run / "adapter")
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32), trained.run / "adapter").eval()
    row = measured["first"][0]
    answer = running.ask("first", question(row), logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[Image.open(Path(row["root"], row["images"][0])).convert("RGB")], return_tensors="pt")
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1]
    expected = []
    for _ in content:
        with torch.no_grad():
            logs = model(**inputs).logits[0, -1].float().log_softmax(-1)
        values, ids = logs.topk(3)
        expected.append((processor.tokenizer.decode([int(ids[0])]), values.tolist()))
        for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if key in inputs:
                new = ids[:1] if key == "input_ids" else torch.tensor([1 if key == "attention_mask" else 0])
                inputs[key] = torch.cat([inputs[key], new[None].to(inputs[key].dtype)], dim=1)
    assert [c.token for c in content] == [token for token, _ in expected]
    for c, (_, values) in zip(content, expected, strict=True):
        assert c.logprob == pytest.approx(values[0], abs=1e-3) and [t.logprob for t in c.top_logprobs] == pytest.approx(values, abs=1e-3)
        assert bytes(c.bytes).decode() == c.token
    streamed = list(running.ask("first", question(row), logprobs=True, top_logprobs=3, stream=True))
    assert [c.token for s in streamed if s.choices and s.choices[0].logprobs for c in s.choices[0].logprobs.content] == [c.token for c in content]


def test_stop_and_limit(running, measured):
    row = next(r for r in measured["first"] if len(r["prediction"]) > 6)
    text = row["prediction"]
    stop = text[3:5]
    cut = text[: text.index(stop)]
    for stream in (False, True):
        answer = running.ask("first", question(row), stop=[stop, "never there"], stream=stream)
        got = "".join(c.choices[0].delta.content or "" for c in answer if c.choices) if stream else answer.choices[0].message.content
        assert got.rstrip() == cut.rstrip() and stop not in got
    short = running.ask("first", question(row), max_tokens=1)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 1 and text.startswith(short.choices[0].message.content)


def test_a_seed_decides_what_is_drawn(running, measured):
    row = measured["first"][0]
    drawn = [running.ask("first", question(row), temperature=2.0, seed=seed).choices[0].message.content for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    assert running.ask("first", question(row), temperature=2.0, top_p=1e-6, seed=5).choices[0].message.content == row["prediction"]


def test_draws_have_the_probabilities_of_the_logits():
    import torch

    from mmft.serving.sampling import Sampler

    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(temperature=0.5, top_p=0.95, seed=3)
    counts = torch.bincount(torch.tensor([sampler.draw(probabilities.log()) for _ in range(4000)]), minlength=4) / 4000
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0])  # temperature 0.5 squares them; the last lies outside of the first 95 %
    assert torch.allclose(counts, squared / squared.sum(), atol=0.025) and counts[3] == 0
    assert Sampler(0).draw(probabilities) == 0 and Sampler(temperature=1.0, top_k=1, seed=1).draw(probabilities.log()) == 0


class Letters:
    """A collator whose tokens are bytes."""

    def decode(self, ids):
        return [bytes(each).decode("utf-8", "replace").strip() for each in ids]

    def split_answer(self, text, generated=False):
        from mmft.collators.chat_template import _split_reasoning

        return _split_reasoning(text)


@pytest.mark.parametrize("written, stop, shown", [
    ("caf\u00e9 \u732b!", [], "caf\u00e9 \u732b!"), ("one two three", ["two th"], "one "), ("a STO b", ["STOP"], "a STO b"),
    ("<think>why</think> so", [], "so"), ("<b> bold", [], "<b> bold"), ("x<think", [], "x<think"),
])  # fmt: skip
def test_a_stream_shows_no_half_characters_stops_or_think_blocks(written, stop, shown):
    from mmft.serving.answer_text import AnswerText

    answer, seen = AnswerText(Letters(), stop), []
    for byte in written.encode():
        answer.add(byte)
        seen.append(answer.news(final=False)[0])
        if answer.stopped:
            break
    seen.append(answer.news(final=True)[0])
    assert "".join(seen) == shown and not any("\ufffd" in piece for piece in seen)
    assert len([piece for piece in seen if piece]) > 1 or len(shown) < 3


def test_beams_go_through_transformers_loop_and_agree_with_predict(trained, second, models, verb):
    from mmft.config.compose import compose
    from mmft.serving.adapters import open_models

    words = ["generation.num_beams=2"]
    served = open_models([str(trained.run)], compose([*words, f"output_dir={trained.outputs.as_posix()}"]), words, None)
    running = Running(served, check=2)
    try:
        assert running.engine.lanes["first"].alone and "first: 2 held-out rows answered as predict does" in running.notes
        out = trained.outputs / "beams.jsonl"
        assert verb("predict", "input=validation", *words, f"out={out.as_posix()}")[0] == 0
        for row in lines(out)[:2]:
            assert running.ask("first", question(row)).choices[0].message.content == row["prediction"]
        drawn = [running.ask("first", question(row), temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1)]
        assert drawn[0] == drawn[1]
    finally:
        running.close()


# --- bad input ----------------------------------------------------------------------------------------------------

PICTURE = "data:image/png;base64,"


def parts(url: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]}]


@pytest.mark.parametrize("keys, kind, code", [
    ({"model": "third"}, "NotFoundError", "model_not_found"),
    ({"messages": parts(PICTURE + "@@@@")}, "BadRequestError", "invalid_base64"),
    ({"messages": parts(PICTURE + base64.b64encode(b"no picture").decode())}, "BadRequestError", "invalid_image"),
    ({"messages": parts(PICTURE + base64.b64encode(b"\x89PNG\r\n\x1a\n torn").decode())}, "BadRequestError", "invalid_image"),
    ({"messages": parts("https://example.com/cat.png")}, "BadRequestError", "invalid_image_url"),
    ({"messages": parts("file:///etc/passwd")}, "BadRequestError", "invalid_image_url"),
    ({"messages": [{"role": "user", "content": "word " * 60000}]}, "BadRequestError", "context_length_exceeded"),
    ({"max_tokens": 10**6}, "BadRequestError", "context_length_exceeded"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "BadRequestError", "invalid_value"),
    ({"messages": []}, "BadRequestError", "invalid_type"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "BadRequestError", "invalid_value"),
    ({"n": 2}, "BadRequestError", "unsupported_parameter"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "BadRequestError", "unsupported_parameter"),
    ({"extra_body": {"temperture": 1}}, "BadRequestError", "unknown_parameter"),
    ({"temperature": 3}, "BadRequestError", "invalid_value"),
    ({"top_logprobs": 2}, "BadRequestError", "invalid_value"),
    ({"stop": ["a"] * 5}, "BadRequestError", "invalid_value"),
])  # fmt: skip
def test_a_bad_request_is_an_error_of_the_client(running, measured, keys, kind, code):
    with pytest.raises(getattr(openai, kind)) as error:
        running.client.chat.completions.create(**{"model": "first", "messages": question(measured["first"][0]), **keys})
    assert error.value.code == code and "\n" not in error.value.body["message"] and str(running.server.folder) not in error.value.body["message"]
    assert not list(running.server.folder.iterdir()), "no picture is left behind"


def test_300_megabytes_are_refused_without_being_kept(running, measured):
    import psutil

    before = psutil.Process().memory_info().rss
    big = json.dumps({"model": "first", "messages": parts(PICTURE + "A" * 300_000_000)}).encode()
    own = psutil.Process().memory_info().rss - before
    connection = http.client.HTTPConnection(running.url.split("/")[2], timeout=60)
    connection.request("POST", "/v1/chat/completions", big, {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 413 and json.loads(answer.read())["error"]["code"] == "request_too_large"
    connection.close()
    assert psutil.Process().memory_info().rss - before < own + 250 * 2**20
    del big
    row = measured["first"][1]
    assert running.ask("first", question(row)).choices[0].message.content == row["prediction"]


@pytest.mark.parametrize("body, headers, status, code", [
    (b"{", {}, 400, "invalid_json"), (b"[" * 100_000, {}, 400, "invalid_json"), (b"[]", {}, 400, "invalid_type"), (b'"\\ud800"', {}, 400, "invalid_type"),
    (b'{"model": "first", "messages": [{"role": "user", "content": "\\ud800"}]}', {}, 400, "invalid_value"),
    (b"{}", {"content-type": "text/plain"}, 415, "unsupported_media_type"), (b"{}", {"host": "evil.example"}, 403, "wrong_host"),
])  # fmt: skip
def test_a_body_that_no_client_sends(running, body, headers, status, code):
    answer = httpx.post(f"{running.url}/chat/completions", content=body, headers={"content-type": "application/json", **headers})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_other_addresses_are_errors_too(running):
    assert httpx.get(f"{running.url}/chat/completions").json()["error"]["code"] == "method_not_allowed"
    assert httpx.get(f"{running.url}/nothing").json()["error"]["code"] == "not_found"
    assert httpx.get(f"{running.url}/models/second").json()["id"] == "second" and httpx.get(f"{running.url}/models/x").status_code == 404


def test_200_requests_at_once_are_all_answered(running, measured):
    jobs = [(name, measured[name][i % 6]) for i in range(67) for name in measured][:200]
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda job: running.ask(job[0], question(job[1])).choices[0].message.content, jobs))
    assert answers == [row["prediction"] for _, row in jobs]


def test_a_full_queue_refuses_and_the_others_are_answered(models, measured):
    running = Running(models, queue=3, places=4)
    row = measured["first"][2]

    def ask(_):
        try:
            return running.ask("first", question(row)).choices[0].message.content
        except openai.RateLimitError as error:
            return error.code

    try:
        with ThreadPoolExecutor(40) as pool:
            answers = list(pool.map(ask, range(40)))
    finally:
        running.close()
    assert set(answers) == {row["prediction"], "rate_limit_exceeded"}


def test_a_client_that_leaves_frees_its_place(running, measured):
    row = measured["first"][0]
    lane = running.engine.lanes["first"]
    body = {"model": "first", "messages": question(row), "max_tokens": 1500, "temperature": 2.0}
    for stream in (True, False):
        with httpx.Client() as client:
            try:
                with client.stream("POST", f"{running.url}/chat/completions", json={**body, "stream": stream}, timeout=1.0) as response:
                    for _ in response.iter_lines():
                        break
            except httpx.ReadTimeout:
                pass
        deadline = time.time() + 20
        while (lane.busy or list(running.server.folder.iterdir())) and time.time() < deadline:
            time.sleep(0.05)
        assert not lane.busy and not list(running.server.folder.iterdir())
    assert running.ask("first", question(row)).choices[0].message.content == row["prediction"]


def test_a_token_is_asked_for(models, measured):
    running = Running(models, token="a-token-of-24-characters")
    try:
        row = measured["first"][0]
        assert running.ask("first", question(row)).choices[0].message.content == row["prediction"]
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=running.url, api_key="wrong", max_retries=0).models.list()
        assert httpx.get(f"{running.url}/models").status_code == 401
    finally:
        running.close()


def test_mistakes_of_the_command(mmft, trained, second, run_copy, tmp_path, monkeypatch):
    monkeypatch.delenv("MMFT_SERVE_TOKEN", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = mmft("serve", f"run={trained.run}", f"port={port}")
        assert code == 2 and f"port={port}: cannot be used" in err
    for words, message in (
        (["host=0.0.0.0"], "needs a token"), (["queue=0"], "queue=0: must be 1 or more"), (["port=99999"], "port=99999"),
    ):  # fmt: skip
        code, _, err = mmft("serve", f"run={trained.run}", "port=0", *words)
        assert code == 2 and message in err and err.count("\n") == 1, err
    twin = tmp_path / "x" / "first"
    twin.parent.mkdir()
    run_copy.rename(twin)
    code, _, err = mmft("serve", f"run=[{trained.run},{twin}]", "port=0")
    assert code == 2 and "have the same name" in err
    snapshot = twin / "snapshot.yaml"
    other = twin.rename(twin.with_name("other"))
    text = (other / snapshot.name).read_text(encoding="utf-8")
    (other / snapshot.name).write_text(re.sub(r"^  dtype: .*", "  dtype: bf16", text, flags=re.M), encoding="utf-8")
    code, _, err = mmft("serve", f"run=[{trained.run},{other}]", "port=0")
    assert code == 2 and "model.dtype differs" in err and err.count("\n") == 1, err


@pytest.mark.long
def test_the_command_serves_and_ends(trained, second, measured, tmp_path):
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "mmft", "serve", f"run=[{trained.run},{second}]", "port=0", "check=2", f"output_dir={trained.outputs}"], stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    try:
        deadline = time.time() + 120
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/v1", log.read_text(encoding="utf-8"))):
            assert process.poll() is None and time.time() < deadline, log.read_text(encoding="utf-8")
            time.sleep(0.1)
        client = openai.OpenAI(base_url=found[0], api_key="none", max_retries=0)
        row = measured["second"][0]
        assert client.chat.completions.create(model="second", messages=question(row)).choices[0].message.content == row["prediction"]
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(20)
    text = log.read_text(encoding="utf-8")
    assert code in (0, -signal.SIGTERM) and "Traceback" not in text and "second: 2 held-out rows answered as predict does" in text


def test_a_server_that_answers_otherwise_does_not_start(models, monkeypatch):
    from mmft.common.errors import UserError
    from mmft.serving import parity

    monkeypatch.setattr(parity, "predict", lambda served, rows: ["something else"] * len(rows))
    from mmft.serving.engine import Engine

    engine = Engine(models, 16, 256)
    with pytest.raises(UserError, match="where predict answers 'something else'"):
        parity.check_parity(engine, models, 1)
    engine.close()


@pytest.mark.long
def test_a_fuzzer_sees_no_failure_of_the_server(running, measured):
    """Requests made from the server's own OpenAPI description, valid ones and others; afterwards it answers as before."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from hypothesis.strategies import just
    from schemathesis.generation import GenerationMode

    schema = schemathesis.openapi.from_url(running.url.replace("/v1", "/openapi.json"))
    seen: dict[int, int] = {}
    operations = [result.ok() for result in schema.get_all_operations()]
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @settings(max_examples=60, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), derandomize=True)
            @given(case=operation.as_strategy(generation_mode=mode), valid=just(mode is GenerationMode.POSITIVE))
            def fuzz(case, valid):
                if valid and isinstance(case.body, dict) and len(str(case.body)) % 2:
                    # made-up conversations are mostly refused (they end with an assistant, two users follow each other): a good one tries the other keys
                    case.body = {**case.body, "messages": question(measured["first"][0]), "max_tokens": 2, "max_completion_tokens": 2}
                answer = case.call()
                seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
                assert answer.status_code < 500, (answer.status_code, answer.text, case.body)
                if answer.status_code >= 400:
                    assert {"message", "type", "param", "code"} <= answer.json()["error"].keys()

            with contextlib.suppress(Unsatisfiable):  # an address without parameters has no wrong ones
                fuzz()
    assert len(operations) == 4 and seen.get(200, 0) > 5 and sum(seen.values()) > 100, seen
    row = measured["second"][0]
    assert running.ask("second", question(row)).choices[0].message.content == row["prediction"]
