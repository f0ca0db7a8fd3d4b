"""A stand-in for vLLM, of which mmft's worker uses this much: EngineArgs, SamplingParams, LoRARequest and the engine's add_request, step and abort_request.

Names, order and defaults of what is here are those of vLLM 0.30.0 and 0.33.0; tests/vllm/test_stand_in.py compares them with its source. Inside is plain transformers
and peft: its own processor writes the images' tokens into the ids, one request after another gets a token a step. `additional_config` breaks it on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from .sampling_params import SamplingParams

__version__ = "0.33.0+stand.in"
__all__ = ["EngineArgs", "LLMEngine", "SamplingParams"]


@dataclass
class EngineArgs:
    """Those keys of the real one that mmft or a test sets, in its order."""

    model: str = "Qwen/Qwen3-0.6B"
    tokenizer: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    seed: int = 0
    max_model_len: int = None  # type: ignore[assignment]
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.92
    max_num_seqs: int | None = None
    disable_log_stats: bool = False
    limit_mm_per_prompt: dict[str, int] = field(default_factory=dict)
    mm_processor_kwargs: dict[str, Any] | None = None
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    enable_tower_connector_lora: bool = False
    generation_config: str = "auto"
    additional_config: dict[str, Any] = field(default_factory=dict)


class LLMEngine:
    def __init__(self, args: EngineArgs):
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.args, self.faults = args, args.additional_config
        if self.faults.get("start"):
            raise ValueError("No available memory for the cache blocks.\nTry increasing `gpu_memory_utilization`.")
        print("noise on stdout")
        torch.manual_seed(args.seed)
        self.model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
        self.processor = AutoProcessor.from_pretrained(args.model, **(args.mm_processor_kwargs or {}))
        longest = self.model.config.get_text_config().max_position_embeddings
        self.model_config = SimpleNamespace(max_model_len=args.max_model_len or longest)
        self.requests: dict[str, dict[str, Any]] = {}
        self.seen: list[tuple[str, dict[str, Any], SamplingParams, Any]] = []  # every call of add_request

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, usage_context: Any = None, stat_loggers: Any = None, enable_multiprocessing: bool = False) -> LLMEngine:
        engine = cls(engine_args)
        engines.append(engine)
        return engine

    def add_request(
        self, request_id: str, prompt: Any, params: Any, arrival_time: float | None = None, lora_request: Any = None, tokenization_kwargs: Any = None,
        trace_headers: Any = None, priority: int = 0, session_id: str | None = None, prompt_text: str | None = None,
    ) -> str:  # fmt: skip
        import torch

        self.seen.append((request_id, prompt, params, lora_request))
        assert set(prompt) <= {"prompt_token_ids", "multi_modal_data"} and (lora_request is None or self.args.enable_lora)
        token = self.processor.image_token_id
        images, ids = list((prompt.get("multi_modal_data") or {}).get("image", [])), list(prompt["prompt_token_ids"])
        if ids.count(token) != len(images):
            raise ValueError(f"Expected there to be {len(images)} prompt placeholders, but found {ids.count(token)}")
        inputs: dict[str, Any] = {}
        if images:
            inputs = dict(self.processor.image_processor(images, return_tensors="pt"))
            merge = self.processor.image_processor.merge_size ** 2
            counts = iter([int(grid.prod()) // merge for grid in inputs["image_grid_thw"]])
            ids = [i for each in ids for i in ([token] * next(counts) if each == token else [each])]
        if self.faults.get("tokens"):
            ids = [ids[0], *ids]
        if len(ids) + 1 > self.model_config.max_model_len:
            raise ValueError(f"The decoder prompt (length {len(ids)}) is longer than the maximum model length of {self.model_config.max_model_len}.")
        if lora_request is not None:
            self._load(lora_request)
        generator = torch.Generator()
        generator.manual_seed(params.seed if params.seed is not None else self.args.seed)
        self.requests[request_id] = {"prompt": ids, "new": [], "inputs": inputs, "params": params, "lora": lora_request, "generator": generator}
        return f"{request_id}-12345678"

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        for name in request_ids:
            self.requests.pop(name, None)

    def step(self) -> list[Any]:
        if self.faults.get("step") and any(len(r["new"]) >= self.faults["step"] for r in self.requests.values()):
            raise RuntimeError("EngineCore encountered an issue.")
        return [self._advance(name, request) for name, request in list(self.requests.items())]

    def _advance(self, name: str, request: dict[str, Any]) -> Any:
        import torch

        params, ids = request["params"], [*request["prompt"], *request["new"]]
        logits = self._logits(ids, request["inputs"], request["lora"])
        logs = logits.log_softmax(-1)
        scores = logits[-1].clone()
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(ids)))
            scores[seen] = torch.where(scores[seen] > 0, scores[seen] / params.repetition_penalty, scores[seen] * params.repetition_penalty)
        if len(request["new"]) < params.min_tokens:
            scores[params.stop_token_ids] = -torch.inf
        if self.faults.get("second"):  # the second likeliest token at this place of every answer
            scores[scores.argmax()] = -torch.inf if len(request["new"]) == self.faults["second"] - 1 else scores.max()
        if params.temperature == 0:
            token = int(scores.argmax())
        else:
            scores = scores / params.temperature
            if params.top_k > 0:
                scores[scores < scores.topk(min(params.top_k, len(scores))).values[-1]] = -torch.inf
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=request["generator"]))
        request["new"].append(token)
        finish = "abort" if self.faults.get("abort") else "stop" if token in params.stop_token_ids else "length" if len(request["new"]) >= params.max_tokens else None
        top = None
        if params.logprobs is not None:
            best = logs[-1].topk(max(params.logprobs, 1)).indices.tolist()[: params.logprobs]
            top = [{i: SimpleNamespace(logprob=float(logs[-1, i])) for i in dict.fromkeys([token, *best])}]
        first = len(request["new"]) == 1
        of_prompt = None
        if params.prompt_logprobs is not None and first:
            of_prompt = [None, *({i: SimpleNamespace(logprob=float(logs[place, i]))} for place, i in enumerate(request["prompt"][1:]))]
        if finish is not None:
            del self.requests[name]
        new = SimpleNamespace(index=0, text="", token_ids=[token], logprobs=top, finish_reason=finish, stop_reason=token if finish == "stop" else None)
        return SimpleNamespace(request_id=name, prompt_token_ids=request["prompt"], prompt_logprobs=of_prompt, outputs=[new], finished=finish is not None, lora_request=request["lora"])

    def _load(self, lora: Any) -> None:
        from peft import PeftModel

        if not isinstance(self.model, PeftModel):
            self.model = PeftModel.from_pretrained(self.model, lora.lora_path, lora.lora_name).eval()
        elif lora.lora_name not in self.model.peft_config:
            self.model.load_adapter(lora.lora_path, lora.lora_name)

    def _logits(self, ids: list[int], inputs: dict[str, Any], lora: Any) -> Any:
        """fp32 logits (S, V) of one sequence."""
        import contextlib

        import torch

        row = torch.tensor([ids])
        kinds = {"mm_token_type_ids": (row == self.processor.image_token_id).long()} if inputs else {}
        if lora is not None:
            self.model.set_adapter(lora.lora_name)
        off = self.model.disable_adapter() if lora is None and hasattr(self.model, "peft_config") else contextlib.nullcontext()
        with torch.no_grad(), off:
            return self.model(input_ids=row, attention_mask=torch.ones_like(row), **inputs, **kinds).logits[0].float()


engines: list[LLMEngine] = []  # all that were started; for tests
