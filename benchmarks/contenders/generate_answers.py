"""Answer the rows of task.json: by transformers' `generate` in batches of one size in file order, by mmft, or by a peer in its own environment.

    PYTHON generate_answers.py TASK.json

Writes result.json: seconds of wall time and of processor time from the loaded model to the last answer, and the answers.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def prompts(processor: Any, rows: list[dict[str, str]], folder: Path, dtype: Any) -> dict[str, Any]:
    """One batch of these rows, padded on the left by the processor."""
    from PIL import Image

    turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}] for row in rows]
    texts = [processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    images = [[Image.open(folder / row["image"]).convert("RGB")] for row in rows]
    inputs = dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return inputs


def load_processor(task: dict[str, Any]) -> Any:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(task["model"])
    processor.tokenizer.padding_side = "left"
    return processor


def by_transformers(task: dict[str, Any], rows: list[dict[str, str]]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForImageTextToText

    processor = load_processor(task)
    model = AutoModelForImageTextToText.from_pretrained(task["model"], dtype=getattr(torch, task["dtype"])).eval()
    answers: list[str] = []
    watch = Watch()
    for start in range(0, len(rows), task["batch"]):
        inputs = prompts(processor, rows[start : start + task["batch"]], Path(task["rows"]).parent, model.dtype)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=task["max_new_tokens"])
        answers += [t.strip() for t in processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]
    return {**watch.read(), "answers": answers}


def by_swift(task: dict[str, Any], rows: list[dict[str, str]]) -> dict[str, Any]:
    """ms-swift's TransformersEngine, which `swift infer` uses, with its collation, generation and decoding.

    The processor renders each row in place of swift's template, whose prompt would not end in the row's number.
    """
    import torch
    from swift.infer_engine import InferRequest, RequestConfig, TransformersEngine
    from swift.template import StdTemplateInputs

    processor, folder, dtype = load_processor(task), Path(task["rows"]).parent, getattr(torch, task["dtype"])
    engine = TransformersEngine(
        task["model"], model_type="qwen2_vl", template_type="qwen2_vl", torch_dtype=dtype, device_map="cpu", max_batch_size=task["batch"], use_hf=True,
    )  # fmt: skip

    def encode(request: Any, **_: Any) -> dict[str, Any]:
        (turn,), (image,) = request.messages, request.images
        inputs = prompts(processor, [{"prompt": turn["content"], "image": image}], folder, dtype)
        rest = {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
        return rest | {"input_ids": inputs["input_ids"][0].tolist(), "template_inputs": StdTemplateInputs(messages=[turn])}

    engine.template.encode = encode
    asked = [InferRequest(messages=[{"role": "user", "content": row["prompt"]}], images=[row["image"]]) for row in rows]
    watch = Watch()
    answered = engine.infer(asked, RequestConfig(max_tokens=task["max_new_tokens"], temperature=0), use_tqdm=False)
    return {**watch.read(), "answers": [a.choices[0].message.content.strip() for a in answered]}


def by_llamafactory(task: dict[str, Any], rows: list[dict[str, str]]) -> dict[str, Any]:
    """LLaMA-Factory's do_predict: its model preparation and its CustomSeq2SeqTrainer, fed with rows that the processor rendered."""
    import tempfile

    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

    processor, folder = load_processor(task), Path(task["rows"]).parent
    words = {
        "stage": "sft", "do_predict": True, "predict_with_generate": True, "model_name_or_path": task["model"], "eval_dataset": "given below",
        "output_dir": tempfile.mkdtemp(), "finetuning_type": "full", "per_device_eval_batch_size": task["batch"], "report_to": "none", "use_cpu": True,
        "infer_dtype": task["dtype"], "disable_tqdm": True, "template": "qwen2_vl",
    }  # fmt: skip
    model_args, _, training_args, finetuning_args, _ = get_train_args(words)
    model_args.device_map = {"": "cpu"}
    training_args.remove_unused_columns = False
    model = load_model(processor.tokenizer, model_args, finetuning_args)

    def collate(part: list[dict[str, str]]) -> dict[str, Any]:
        inputs = prompts(processor, part, folder, model.dtype)
        return inputs | {"labels": inputs["input_ids"].clone()}  # it takes a missing label for a row without a reference

    trainer = CustomSeq2SeqTrainer(
        model=model, args=training_args, finetuning_args=finetuning_args, tokenizer=processor.tokenizer, processor=None, data_collator=collate,
        gen_kwargs={"do_sample": False, "max_new_tokens": task["max_new_tokens"], "pad_token_id": processor.tokenizer.pad_token_id},
    )  # fmt: skip
    watch = Watch()
    ids = trainer.predict(rows, metric_key_prefix="predict", **trainer._gen_kwargs).predictions
    ids[ids < 0] = processor.tokenizer.pad_token_id
    return {**watch.read(), "answers": [t.strip() for t in processor.batch_decode(ids, skip_special_tokens=True)]}


def by_mmft(task: dict[str, Any], rows: list[dict[str, str]]) -> dict[str, Any]:
    """What `mmft predict` does between loading the model and writing the file. features: computed before the watch starts."""
    from mmft.config.compose import compose
    from mmft.evaluation.answer import answer_prompts, prompts_of
    from mmft.runs.open import open_any

    cfg = compose(task["words"])
    opened = open_any(None, cfg, [])
    asked = prompts_of(task["rows"], None, False, None, cfg)
    evaluator = opened.evaluator([])
    watch = Watch()
    answers = [str(record["prediction"]) for record in answer_prompts(evaluator, opened.model, asked, 0)]
    return {**watch.read(), "answers": answers}


class Watch:
    """Wall time and processor time of this process since it was made."""

    def __init__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"wall": time.perf_counter() - self.began[0], "cpu": time.process_time() - self.began[1]}


CONTENDERS = {"transformers": by_transformers, "mmft": by_mmft, "swift": by_swift, "llamafactory": by_llamafactory}


def main() -> None:
    path = Path(sys.argv[1])
    task = json.loads(path.read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in Path(task["rows"]).read_text(encoding="utf-8").splitlines()]
    result = CONTENDERS[task["by"]](task, rows)
    (path.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
