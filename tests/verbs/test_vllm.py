"""backend=vllm of predict, evaluate and serve, against tests/standins/vllm: plain transformers and peft behind vLLM's call shape.

vLLM itself is not installed where these tests run. The stand-in has its signatures, expands the images by the base model's own processor, and loads the
adapters' folders with peft; so what is compared is all that mmft does around it.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from verb_data import lines

STANDINS = Path(__file__).resolve().parents[1] / "standins"


def forget() -> None:
    for name in [n for n in sys.modules if n == "vllm" or n.startswith("vllm.")]:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def installed():
    """The stand-in can be imported; its worker runs in a thread of this process, so that a test can look at what it was given."""
    from mmft.serving.vllm import process, worker

    def launch():
        commands, replies = os.pipe(), os.pipe()
        reader, writer = os.fdopen(commands[0], encoding="utf-8"), os.fdopen(replies[1], "w", encoding="utf-8")

        def work() -> None:
            with writer:
                worker.serve(reader, writer)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return process.Pipes(os.fdopen(commands[1], "w", encoding="utf-8"), os.fdopen(replies[0], encoding="utf-8"), lambda: thread.join(20))

    with pytest.MonkeyPatch.context() as patch:
        forget()
        patch.syspath_prepend(str(STANDINS))
        patch.delenv("MMFT_VLLM", raising=False)
        patch.setattr(process, "launch", launch)
        import vllm

        yield vllm
    forget()


@pytest.fixture
def vllm(installed):
    """The stand-in; vllm.engines are those that this test has started."""
    installed.engines.clear()
    return installed


@pytest.fixture(scope="module")
def second(trained):
    """Another run over the same base, with other weights, another rank and a system prompt of its own."""
    from mmft.cli.main import main

    run = trained.outputs / "second"
    words = ["seed=7", "lora.r=3", "trainer.learning_rate=0.01", "collator.system=Answer briefly.", "trainer.max_steps=2", "evaluation.base=false"]
    if not run.is_dir():  # tests/verbs/test_serve.py has the same
        assert main([*trained.words, *words, f"run_dir={run.as_posix()}"]) == 0
    return run


def fault(**keys) -> str:
    return f"vllm={{additional_config:{{{','.join(f'{k}:{v}' for k, v in keys.items())}}}}}"


# --- predict and evaluate -------------------------------------------------------------------------------------------


def test_predict_answers_as_training_measured_and_hands_over_what_vllm_reads(verb, vllm, trained, tmp_path):
    expected = [row["prediction"] for row in trained.lines("eval/tuned.jsonl")]
    out = tmp_path / "answers.jsonl"
    code, _, err = verb("predict", "input=validation", f"out={out.as_posix()}", "backend=vllm", "vllm={gpu_memory_utilization:0.5}", "check=2")
    assert code == 0 and [row["prediction"] for row in lines(out)] == expected
    assert [row["truncated"] for row in lines(out)] == [row["truncated"] for row in trained.lines("eval/tuned.jsonl")]
    [engine] = vllm.engines
    args = engine.args
    assert args.model == str(trained.run.parents[1] / "tiny") and args.dtype == "float32" and args.seed == 42 and args.generation_config == "vllm"
    assert (args.enable_lora, args.max_loras, args.max_lora_rank, args.gpu_memory_utilization) == (True, 1, 16, 0.5) and args.disable_log_stats
    base_model = [call for call in engine.seen if call[3] is None]
    adapted = [call for call in engine.seen if call[3] is not None]
    assert len(base_model) == 2 and len(adapted) == 2 + len(expected), "two rows of each were compared first"
    name, prompt, params, lora = adapted[-1]
    assert (lora.lora_name, lora.lora_int_id, lora.lora_path) == ("first", 1, str(trained.run / "adapter"))
    assert (params.temperature, params.max_tokens, params.ignore_eos, params.detokenize) == (0, 8, True, False) and params.logprobs is None
    tokenizer = engine.processor.tokenizer
    row = next(r for r in trained.lines("eval/tuned.jsonl") if r["id"] == lines(out)[-1]["id"])
    text = engine.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}], add_generation_prompt=True, tokenize=False
    )
    prompts = [call[1]["prompt_token_ids"] for call in adapted]
    assert prompt["prompt_token_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"] and all(ids.count(engine.processor.image_token_id) == 1 for ids in prompts)
    assert set(params.stop_token_ids) >= {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    from PIL import Image

    seen = {call[1]["multi_modal_data"]["image"][0].tobytes() for call in adapted}
    assert seen == {Image.open(Path(r["root"], r["images"][0])).convert("RGB").tobytes() for r in trained.lines("eval/tuned.jsonl")}


def test_evaluate_measures_what_training_measured(verb, vllm, trained, run_copy):
    """Losses from the log-probabilities of prompts, answers, and the base: all from the stand-in, against those of training with transformers."""
    code, out, err = verb("evaluate", f"run={run_copy.as_posix()}", "backend=vllm", "base=true", "check=0", run=False)
    assert code == 0, err
    [file] = [p for p in (run_copy / "eval").glob("*.json") if p.stem not in ("tuned", "base") and json.loads(p.read_text()).get("backend")]
    found, known = json.loads(file.read_text(encoding="utf-8")), trained.json("summary.json")
    assert found["backend"] == "vllm 0.33.0+stand.in" and found["method"] == "lora"
    assert found["eval_loss"] == pytest.approx(known["eval_loss"], abs=2e-5) and found["base_eval_loss"] == pytest.approx(known["base_eval_loss"], abs=2e-5)
    assert found["metrics"] == pytest.approx(known["metrics"]) and found["base_metrics"] == pytest.approx(known["base_metrics"])
    mine, theirs = lines(file.with_suffix(".jsonl")), trained.lines("eval/tuned.jsonl")
    assert [r["prediction"] for r in mine] == [r["prediction"] for r in theirs] and [r["loss"] for r in mine] == pytest.approx([r["loss"] for r in theirs], abs=1e-4)


def test_size_limits_reach_its_processor(mmft, vllm, trained, tmp_path):
    """min_pixels makes of an image of 56 pixels one of 112: four times the tokens, in both, or every prompt would be refused. The model brings a penalty."""
    model = Path(shutil.copytree(trained.run.parents[1] / "tiny", tmp_path / "tiny"))
    file = model / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "repetition_penalty": 1.3, "do_sample": True, "top_k": 3}), encoding="utf-8")
    words = ["predict", f"model.path={model}", "model.processor.min_pixels=12544", f"input=[{trained.pictures}/0.png,{trained.pictures}/1.png]", "prompt=What is this?"]
    assert mmft(*words, f"out={tmp_path}/a.jsonl")[0] == 0
    code, _, err = mmft(*words, f"out={tmp_path}/b.jsonl", "backend=vllm")
    assert code == 0, err
    assert [r["prediction"] for r in lines(tmp_path / "a.jsonl")] == [r["prediction"] for r in lines(tmp_path / "b.jsonl")]
    [engine] = vllm.engines
    assert engine.args.mm_processor_kwargs == {"min_pixels": 12544} and not engine.args.enable_lora and engine.seen[0][3] is None
    assert (engine.seen[0][2].repetition_penalty, engine.seen[0][2].temperature) == (1.3, 0), "generation.do_sample=false stands in the config"


def test_draws_are_vllms_and_their_settings_transformers(verb, vllm, trained):
    code, out, _ = verb("predict", "input=validation", "backend=vllm", "check=0", "generation.do_sample=true", "generation.temperature=0.7", "generation.repetition_penalty=1.1")
    params = [call[2] for call in vllm.engines[0].seen]
    assert code == 0 and {(p.temperature, p.top_k, p.repetition_penalty) for p in params} == {(0.7, 50, 1.1)} and len({p.seed for p in params}) == len(params) == 6


def test_a_repetition_penalty_is_the_same_in_both(verb, vllm, tmp_path):
    words = ["predict", "input=validation", "generation.repetition_penalty=1.5", "generation.min_new_tokens=3"]
    assert verb(*words, f"out={tmp_path}/a.jsonl")[0] == verb(*words, f"out={tmp_path}/b.jsonl", "backend=vllm")[0] == 0
    assert [r["prediction"] for r in lines(tmp_path / "a.jsonl")] == [r["prediction"] for r in lines(tmp_path / "b.jsonl")]


# --- what it does not do is said by name ----------------------------------------------------------------------------


@pytest.mark.parametrize("change, named", [
    ({"use_dora": True}, "does not load DoRA"),
    ({"modules_to_save": ["multi_modal_projector"]}, "does not load modules that were trained whole"),
    ({"trainable_token_indices": [1]}, "does not load trained tokens"),
    ({"target_parameters": ["x"]}, "does not load expert tensors"),
    ({"bias": "all"}, "does not load trained biases (lora.bias=all)"),
    ({"lora_bias": True}, "does not load a bias of its own"),
    ({"init_lora_weights": "loftq"}, "began by changing the base (lora.init_lora_weights=loftq)"),
    ({"peft_type": "IA3"}, "is of the type IA3"),
])  # fmt: skip
def test_an_adapter_that_vllm_would_compute_otherwise_is_refused_before_anything_is_loaded(verb, vllm, run_copy, change, named):
    file = run_copy / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    code, _, err = verb("predict", f"run={run_copy.as_posix()}", "input=validation", "backend=vllm", run=False)
    assert code == 2 and err.count("\n") == 1 and named in err and "mmft merge" in err and not vllm.engines


def test_an_adapter_of_the_vision_part_and_one_of_a_high_rank_are_refused(verb, vllm, run_copy):
    import torch
    from safetensors.torch import load_file, save_file

    file = run_copy / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    seen = "base_model.model.model.visual.blocks.0.attn.qkv"
    save_file({**tensors, f"{seen}.lora_A.weight": torch.zeros(2, 4), f"{seen}.lora_B.weight": torch.zeros(4, 2)}, file)
    code, _, err = verb("evaluate", f"run={run_copy.as_posix()}", "backend=vllm", run=False)
    assert code == 2 and err.count("\n") == 1 and "would ignore its adapter in 1 modules outside the language model, e.g. model.visual.blocks.0.attn.qkv" in err
    assert "enable_tower_connector_lora:true" in err and not vllm.engines
    name = next(k for k in tensors if ".lora_A." in k)
    save_file({**tensors, name: torch.zeros(513, 4)}, file)
    code, _, err = verb("evaluate", f"run={run_copy.as_posix()}", "backend=vllm", run=False)
    assert code == 2 and "has rank 513, and backend=vllm takes 512 at most" in err


@pytest.mark.parametrize("words, message", [
    (["backend=vlm"], "backend=vlm: no such backend. Did you mean vllm? There are: transformers, vllm."),
    (["vllm={seed:1}"], "vllm=...: has an effect with backend=vllm only; add that, or drop it"),
    (["backend=vllm", "vllm={model:x}"], "vllm.model: comes from the run; drop it"),
    (["backend=vllm", "vllm=3"], "vllm=3: must be keys of vLLM's EngineArgs"),
    (["backend=vllm", "check=-1"], "check=-1: must be 0 or more"),
    (["backend=vllm", "chat=true"], "chat=true: goes with backend=transformers"),
    (["backend=vllm", "choose=[a,b]"], "backend=vllm generates answers and does not choose"),
    (["backend=vllm", "generation.num_beams=2"], "generation.num_beams=2: vLLM has no counterpart"),
    (["backend=vllm", "generation.no_repeat_ngram_size=2"], "generation: no_repeat_ngram_size=2 has no counterpart in vLLM; use backend=transformers"),
    (["backend=vllm", "check=0", "vllm={gpu_memory:1}"], "backend=vllm: vLLM failed: ValueError: EngineArgs of this vLLM has no gpu_memory"),
    (["backend=vllm", "check=0", fault(start=1)], "vLLM failed: ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`."),
    (["backend=vllm", "check=0", fault(step=2)], "vLLM failed: RuntimeError: EngineCore encountered an issue."),
    (["backend=vllm", "check=0", fault(abort=1)], "backend=vllm: vLLM gave a request up"),
    (["backend=vllm", "check=0", fault(tokens=1)], "tokens where the run's collator makes"),
    (["backend=vllm", "check=2", fault(second=1)], "where transformers answers"),
])  # fmt: skip
def test_a_mistake_or_a_failure_is_one_line(verb, vllm, words, message):
    code, out, err = verb("predict", "input=validation", *words)
    assert code == 2 and message in err and err.count("\n") == 1 and "Traceback" not in err


def test_different_ranks_need_a_vllm_that_knows_them(verb, vllm, run_copy, monkeypatch):
    """vLLM 0.30 reads one rank and one alpha of an adapter; 0.33 has a method that asks for those of a module."""
    from vllm.lora.peft_helper import PEFTHelper

    file = run_copy / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "alpha_pattern": {"model.language_model.layers.0.mlp.up_proj": 7}}), encoding="utf-8")
    words = [f"run={run_copy.as_posix()}", "input=validation", "backend=vllm", "check=1"]
    assert verb("predict", *words, run=False)[0] == 0
    monkeypatch.delattr(PEFTHelper, "get_rank_and_scaling")
    code, _, err = verb("predict", *words, run=False)
    assert code == 2 and "one rank and one alpha for all modules of an adapter, and that of copy has several" in err and err.count("\n") == 1


def test_it_says_where_vllm_may_come_from(verb, vllm, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr("mmft.serving.vllm.process.find_spec", lambda name: None if name == "vllm" else found(name))
    code, _, err = verb("predict", "input=validation", "backend=vllm")
    assert code == 2 and "pip install 'mmft[vllm]'" in err and "MMFT_VLLM=ENV" in err
    monkeypatch.setenv("MMFT_VLLM", str(tmp_path))
    code, _, err = verb("predict", "input=validation", "backend=vllm")
    assert code == 2 and f"MMFT_VLLM={tmp_path}: holds no python" in err


def test_only_equally_likely_tokens_may_part_two_answers():
    """By hand: the texts part at the second token, whose rival lies 0.2 below it."""
    from mmft.serving.vllm.backend import parts_at_a_tie
    from mmft.serving.vllm.process import Completed

    class Letters:
        end_ids = [0]

        def decode(self, rows):
            return ["".join(" abcd"[i] for i in row if i).strip() for row in rows]

    done = Completed(ids=[1, 2, 0], logprobs=[[(1, -0.1), (3, -3.0)], [(2, -0.7), (3, -0.9), (0, -1.0)], [(0, -0.1), (1, -5.0)]])
    assert parts_at_a_tie(done, "ac", Letters(), 0.25) and not parts_at_a_tie(done, "ac", Letters(), 0.1)
    assert not parts_at_a_tie(done, "ad", Letters(), 0.25), "a token that is not among the likeliest"
    assert parts_at_a_tie(done, "a", Letters(), 0.31) and not parts_at_a_tie(done, "a", Letters(), 0.25), "the rival ends the answer"
    assert not parts_at_a_tie(done, "abc", Letters(), 1.0), "it ended where the other went on, and was sure of it"


# --- serve ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def serving(installed, trained, second):
    """mmft serve run=[first,second] backend=vllm, in threads of this process."""
    openai = pytest.importorskip("openai")
    from mmft.config.compose import compose
    from mmft.serving.listener import listening
    from mmft.serving.server import Server, background
    from mmft.serving.vllm.engine import served_engine

    installed.engines.clear()
    cfg = compose([f"output_dir={trained.outputs.as_posix()}"])
    with served_engine([str(trained.run), str(second)], cfg, [], None, None, 2, 8, 300) as engine, background(Server(engine), listening("127.0.0.1", 0)) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        yield client, engine, installed.engines[-1]


def question(row: dict) -> list[dict]:
    data = base64.b64encode(Path(row["root"], row["images"][0]).read_bytes()).decode()
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}, {"type": "text", "text": row["prompt"]}]}]


def test_serve_answers_for_all_models_at_once(serving, trained, second):
    client, engine, started = serving
    assert [m.id for m in client.models.list()] == ["tiny", "first", "second"] and started.args.max_loras == 2 and started.args.max_lora_rank == 16
    measured = {"tiny": trained.lines("eval/base.jsonl"), "first": trained.lines("eval/tuned.jsonl"), "second": lines(second / "eval/tuned.jsonl")}
    jobs = [(name, row) for rows in zip(*measured.values(), strict=True) for name, row in zip(measured, rows, strict=True)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: client.chat.completions.create(model=job[0], messages=question(job[1])), jobs))
    assert [a.choices[0].message.content for a in answers] == [row["prediction"] for _, row in jobs]
    assert {(c[3].lora_name, c[3].lora_int_id) if c[3] else None for c in started.seen} == {None, ("first", 1), ("second", 2)}
    assert all(a.usage.prompt_tokens > 10 for a in answers) and engine.waiting == 0


def test_serve_streams_with_logprobs_stops_and_limits(serving, trained):
    client, _, started = serving
    row = trained.lines("eval/tuned.jsonl")[0]
    chunks = list(client.chat.completions.create(model="first", messages=question(row), stream=True, logprobs=True, top_logprobs=2))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == row["prediction"]
    infos = [info for c in chunks if c.choices[0].logprobs for info in c.choices[0].logprobs.content]
    assert infos and all(len(i.top_logprobs) == 2 and i.top_logprobs[0].logprob == i.logprob <= 0 for i in infos)
    word = row["prediction"].split()[1]
    stopped = client.chat.completions.create(model="first", messages=question(row), stop=[word])
    assert stopped.choices[0].message.content == row["prediction"].split(word)[0] and stopped.choices[0].finish_reason == "stop"
    short = client.chat.completions.create(model="first", messages=question(row), max_tokens=2)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2 and started.seen[-1][2].max_tokens == 2
    drawn = [client.chat.completions.create(model="first", messages=question(row), temperature=1.5, seed=n).choices[0].message.content for n in (3, 3, 4)]
    assert drawn[0] == drawn[1] and started.seen[-1][2].seed == 4
    assert not started.requests, "an answer that was stopped is forgotten"


def test_a_bad_request_and_one_that_leaves_disturb_nobody(serving, trained):
    import openai

    client, engine, started = serving
    row = trained.lines("eval/tuned.jsonl")[0]
    with pytest.raises(openai.NotFoundError, match="there is no model 'third'; there are: tiny, first, second"):
        client.chat.completions.create(model="third", messages=question(row))
    with pytest.raises(openai.BadRequestError, match="this model's context is"):
        client.chat.completions.create(model="first", messages=[{"role": "user", "content": "word " * 5000}])
    stream = client.chat.completions.create(model="first", messages=question(row), stream=True, max_tokens=400, stop=["\0"])
    next(iter(stream))
    stream.close()
    deadline = time.time() + 30
    while started.requests and time.time() < deadline:
        time.sleep(0.05)
    assert not started.requests and engine._free._value == 8
    assert client.chat.completions.create(model="first", messages=question(row)).choices[0].message.content == row["prediction"]


def test_a_broken_engine_answers_with_an_error(installed, trained):
    openai = pytest.importorskip("openai")
    from mmft.config.compose import compose
    from mmft.serving.listener import listening
    from mmft.serving.server import Server, background
    from mmft.serving.vllm.engine import served_engine

    cfg, row = compose([f"output_dir={trained.outputs.as_posix()}"]), trained.lines("eval/tuned.jsonl")[0]
    keys = {"additional_config": {"step": 2}}
    with served_engine([str(trained.run)], cfg, [], None, keys, 0, None, 8) as engine, background(Server(engine), listening("127.0.0.1", 0)) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        for _ in range(2):  # the one that was on its way, and one afterwards
            with pytest.raises(openai.InternalServerError, match="the model failed|vLLM failed"):
                client.chat.completions.create(model="first", messages=question(row))
        assert engine._free._value == 256


# --- the process, and the stand-in itself -----------------------------------------------------------------------------


@pytest.mark.long
def test_in_a_process_of_its_own(trained, tmp_path):
    """Through the command line; MMFT_VLLM names an environment whose python has the stand-in on its path. What that prints reaches no stream of the command."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ -z "$PYTHONPATH" ] || exit 9\nPYTHONPATH={STANDINS} exec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    env = {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), **os.environ, "MMFT_VLLM": str(tmp_path / "env"), "TMPDIR": str(tmp_path)}
    words = ["-m", "mmft", "predict", f"run={trained.run}", "input=validation", "backend=vllm", "check=1", f"out={tmp_path}/a.jsonl", f"output_dir={trained.outputs}"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr == "" and "noise" not in done.stdout, done.stderr
    assert [r["prediction"] for r in lines(tmp_path / "a.jsonl")] == [r["prediction"] for r in trained.lines("eval/tuned.jsonl")]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("mmft-vllm")], "folder and log are gone"
    broken = subprocess.run([sys.executable, *words[:-2], "check=0", f"out={tmp_path}/b.jsonl", fault(start=1), words[-1]], capture_output=True, text=True, env=env)
    assert broken.returncode == 2 and "No available memory" in broken.stderr and broken.stderr.count("\n") == 1
    [log] = tmp_path.glob("mmft-vllm-*.log")
    assert str(log) in broken.stderr


def test_the_stand_in_has_the_names_and_defaults_of_vllms_source(vllm):
    """MMFT_VLLM_SOURCE is the folder `vllm` of its wheel; without it, what is checked here is that the worker sets nothing else."""
    import ast

    from mmft.serving.vllm.plan import OURS, TOWERS

    known = {field.name for field in dataclasses.fields(vllm.EngineArgs)}
    assert {*OURS, TOWERS, "disable_log_stats"} - known == {"skip_tokenizer_init"}, "of which the last is refused and never set"
    source = os.environ.get("MMFT_VLLM_SOURCE")
    if source is None:
        return

    def fields(file: str, name: str) -> dict[str, str]:
        tree = ast.parse((Path(source) / file).read_text(encoding="utf-8"))
        [found] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
        return {n.target.id: "" if n.value is None else ast.unparse(n.value) for n in found.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}

    def same_order(ours: list[str], theirs: list[str]) -> None:
        assert [n for n in theirs if n in set(ours)] == ours

    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams

    for own, file, name in ((SamplingParams, "sampling_params.py", "SamplingParams"), (LoRARequest, "lora/request.py", "LoRARequest")):
        theirs = fields(file, name)
        same_order([f.name for f in dataclasses.fields(own)], list(theirs))
        for f in dataclasses.fields(own):
            if f.default not in (dataclasses.MISSING, None) and f.name != "output_kind":
                assert theirs[f.name] == repr(f.default), f.name
    same_order([f.name for f in dataclasses.fields(vllm.EngineArgs) if f.name != "additional_config"], [n for n in fields("engine/arg_utils.py", "EngineArgs") if n in known and n != "additional_config"])
    assert "additional_config" in fields("engine/arg_utils.py", "EngineArgs")
    tree = ast.parse((Path(source) / "v1/engine/llm_engine.py").read_text(encoding="utf-8"))
    [engine] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "LLMEngine"]
    methods = {node.name: [a.arg for a in (*node.args.args, *node.args.kwonlyargs)] for node in engine.body if isinstance(node, ast.FunctionDef)}
    for name in ("from_engine_args", "add_request", "step", "abort_request", "has_unfinished_requests"):
        own = list(inspect.signature(getattr(vllm.LLMEngine, name)).parameters)
        own = ["cls", *own] if name == "from_engine_args" else own
        assert methods[name][: len(own)] == own, name  # 0.33 has more behind them
    outputs = (Path(source) / "outputs.py").read_text(encoding="utf-8")
    assert all(f"self.{name} = {name}" in outputs for name in ("prompt_token_ids", "prompt_logprobs", "outputs", "finished", "request_id"))
    assert {"token_ids", "logprobs", "finish_reason"} <= fields("outputs.py", "CompletionOutput").keys() and "logprob" in fields("logprobs.py", "Logprob")
    ranks = (Path(source) / "config/lora.py").read_text(encoding="utf-8")
    from mmft.serving.vllm.plan import PLAIN_STARTS, RANKS

    assert f"MaxLoRARanks = Literal[{', '.join(map(str, RANKS))}]" in ranks
    helper = (Path(source) / "lora/peft_helper.py").read_text(encoding="utf-8")
    if "_init_is_supported" in helper:  # 0.30 does not look
        assert all(f'"{start}"' in helper for start in PLAIN_STARTS)
