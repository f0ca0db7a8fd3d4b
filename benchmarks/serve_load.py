"""How many requests a second `mmft serve` answers, and how long they take, against one-by-one generation with plain transformers.

    python -m benchmarks.serve_load [requests] [clients]

Trains two small runs on drawn shapes (the built-in tiny model), serves them in this process, and sends the same held-out rows from `clients` threads to both adapters in turn. Then the same rows are
answered one by one by the model's own `generate`, with the adapter of each row switched on before. Both write the same answers, or the program stops.
"""

from __future__ import annotations

import base64
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

WORDS = ["data.pictures=400", "data.splits.validation=64", "trainer.max_steps=60", "logger=none", "evaluation.max_samples=64", "evaluation.base=false"]


def main(requests: int = 256, clients: int = 32) -> None:
    import mmft
    from mmft.common.files import read_jsonl
    from mmft.config.compose import compose

    home = Path(tempfile.mkdtemp(prefix="mmft-load-"))
    words = [*WORDS, f"output_dir={home.as_posix()}"]
    runs = [mmft.train([*words, f"seed={seed}", f"run_dir={(home / name).as_posix()}"]) for seed, name in ((1, "a"), (2, "b"))]
    import openai
    import torch

    from mmft.evaluation.decode import generate
    from mmft.serving.adapters import open_models
    from mmft.serving.engine import Engine
    from mmft.serving.listener import listening
    from mmft.serving.server import Server, background

    models = open_models([str(run.path) for run in runs], compose([f"output_dir={home.as_posix()}"]), [], None)
    rows = read_jsonl(runs[0].path / "eval" / "tuned.jsonl")
    jobs = [(("a", "b")[i % 2], rows[i // 2 % len(rows)]) for i in range(requests)]
    engine = Engine(models, models[-1].opened.settings["evaluation"]["batch_size"], requests)
    engine.start()

    def body(row: dict) -> list:
        data = base64.b64encode(Path(row["root"], row["images"][0]).read_bytes()).decode()
        return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}, {"type": "text", "text": row["prompt"]}]}]

    def ask(client: openai.OpenAI, job: tuple[str, dict]) -> tuple[float, str]:
        began = time.perf_counter()
        answer = client.chat.completions.create(model=job[0], messages=body(job[1]))
        return time.perf_counter() - began, answer.choices[0].message.content or ""

    with background(Server(engine), listening("127.0.0.1", 0)) as url, ThreadPoolExecutor(clients) as pool:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        ask(client, jobs[0]), ask(client, jobs[1])
        began = time.perf_counter()
        served = list(pool.map(lambda job: ask(client, job), jobs))
        seconds = time.perf_counter() - began
    engine.close()

    prepared = {sample.id: sample for sample in mmft.prepare([word for word in words if word.startswith(("data.", "output_dir"))])["validation"]}
    lanes, alone, times = {served.name: served for served in models}, [], []
    began = time.perf_counter()
    for name, row in jobs:
        start = time.perf_counter()
        lane = lanes[name]
        batch = lane.collator.prompt([prepared[row["id"]]])
        with lane.use() as model, torch.no_grad():
            ids = generate(model, batch, lane.opened.evaluator([]).generation_config())
        alone.append(lane.collator.decode(ids[:, batch["input_ids"].shape[1] :])[0])
        times.append(time.perf_counter() - start)
    one_by_one = time.perf_counter() - began
    differing = sum(a != b for a, (_, b) in zip(alone, served, strict=True))
    assert not differing, f"{differing} of {requests} answers differ"

    def line(what: str, total: float, each: list[float]) -> str:
        return f"{what:<34}{requests / total:8.1f} requests/s   median {statistics.median(each):.3f} s   p95 {sorted(each)[int(0.95 * len(each))]:.3f} s"

    print(f"\n{requests} requests, {clients} clients, 2 adapters, batch {engine.lanes['a'].places}, {models[0].opened.loaded.device}, torch threads {torch.get_num_threads()}")
    print(line("mmft serve", seconds, [s for s, _ in served]))
    print(line("one by one, transformers' generate", one_by_one, times))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
