"""PolicyTrainer: TRL's GRPOTrainer on mmft's rows, rendering, rewards and evaluation. Imported only where TRL is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from ..collators.base import Collator
from ..common import private_api
from ..common.errors import UserError
from ..common.tensors import eval_mode, to_device
from ..config.settings import Section
from ..data.sample import Sample, with_answer
from ..evaluation.evaluate import Evaluator
from ..evaluation.rewards import Reward
from ..losses.supervised import supervised_logits
from ..system.distributed import rank
from .prompts import PromptProcessor, prompt_rows
from .run_trainer import RunTrainer
from .sampling import set_sampler

NEW_ADAPTER = {"init_lora_weights": True, "lora_dropout": 0.0}  # how the trainer makes a copy of the adapter for the reference
CLOSE, CLOSE_IN_HALF = 1e-3, 0.1  # difference of a log-probability that rounding explains, in fp32 and in half precision


class PromptSampler(RepeatSampler):
    """TRL's order of prompts, drawn anew from (seed, epoch), so that a resumed run goes on with it."""

    epoch = 0  # set before each epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + self.epoch)
        return iter(super().__iter__())


class PolicyTrainer(RunTrainer, GRPOTrainer):
    """GRPOTrainer whose prompts are rows, rendered by the collator; evaluated, logged, saved and resumed as any run.

    collator: without a feature cache: the trainer hands pixels to the model. rewards: functions of the answers. trainer: the config's section, for
    rates by part. Raises UserError where the trainer would compute other log-probabilities than the model. `release` gives the model back.
    """

    def __init__(
        self, *, model: Any, args: GRPOConfig, rows: Sequence[Sample], held_out: Sequence[Any] | None, collator: Collator, processor: Any, rewards: list[Reward],
        callbacks: list[TrainerCallback], evaluator: Evaluator | None = None, generate: bool = False, trainer: Section | None = None,
    ):  # fmt: skip
        huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # a trainer of TRL would report model and machine when it is created
        self.whole = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.own_forward = vars(self.whole).get("forward")
        adapter = getattr(model, "peft_config", {}).get("default")
        given = {key: getattr(adapter, key) for key in NEW_ADAPTER if adapter is not None}
        for reward in rewards:
            reward.reads(rows, collator)
        try:
            # the reference is a copy of the adapter as it is now; made by an initialisation like PiSSA's it would change the base weights again
            for key in given:
                setattr(adapter, key, NEW_ADAPTER[key])
            super().__init__(
                model=model, reward_funcs=list(rewards), args=args, train_dataset=prompt_rows(rows), eval_dataset=held_out,
                processing_class=PromptProcessor(processor, collator, rows), callbacks=callbacks,
            )  # fmt: skip
        except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
            raise UserError(f"objective=grpo: TRL refuses this run: {' '.join(str(error).split())[:300]}") from None
        finally:
            for key, value in given.items():
                setattr(adapter, key, value)
        self.set_up(trainer, evaluator, generate)
        self.rows, self.collator = rows, collator
        self.order = PromptSampler(self.train_dataset, self.num_generations, args.generation_batch_size // self.num_generations,
                                   self.num_iterations * args.steps_per_generation, self.shuffle_dataset, args.seed)  # fmt: skip
        # the tokens that end an answer in evaluation, and no others
        self.eos_token_ids = self.generation_kwargs["eos_token_id"] = self.generation_config.eos_token_id = list(collator.end_ids)
        self.check_probabilities()

    def check_probabilities(self) -> None:
        """Compare the trainer's log-probabilities of an answer with the model's own, for the first row and the first one without images.

        Of a family that counts the images of a row, for the first one with several, too.
        Raises UserError if they differ: the trainer does not give this model all its inputs, or reads its logits in another way.
        """
        first = [0, *[i for i in range(min(len(self.rows), 256)) if not self.rows[i].images][:1]]
        if "batch_num_images" in self.collator.processor.image_processor.model_input_names:  # what PromptProcessor leaves in where a row has several
            first += [i for i in range(len(self.rows)) if len(self.rows[i].images) > 1][:1]
        tolerance = CLOSE if self.whole.dtype == torch.float32 else CLOSE_IN_HALF
        kind = f"objective=grpo: {type(self.whole).__name__} (model type {self.whole.config.model_type})"
        for i in dict.fromkeys(first):
            row = self.rows[i]
            answer = with_answer(row, row.messages[-1])
            with torch.no_grad(), eval_mode(self.model):
                batch = to_device({k: v for k, v in self.collator([answer]).items() if k != "row_ids"}, self.args.device)
                logits, targets, _ = supervised_logits(self.model, batch)
                expected = (logits.float() / self.temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
                prompt = self.processing_class(text=[str(i)])
                ids = torch.cat([prompt.pop("input_ids"), targets.cpu()[None]], dim=1)
                mask = torch.cat([prompt.pop("attention_mask"), torch.ones(1, len(targets), dtype=torch.long)], dim=1)
                inputs = {k: torch.cat([v, v.new_zeros(1, len(targets))], dim=1) if k.endswith("token_type_ids") else v for k, v in prompt.items()}
                inputs = to_device({"input_ids": ids, "attention_mask": mask, **(inputs if row.images else {})}, self.args.device)
                try:
                    found = private_api.policy_log_probs(self, self.model, inputs, len(targets), len(row.images))[0]
                except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError) as error:
                    why = " ".join(str(error).split())[:200].replace("GRPOTrainer._get_per_token_logps_and_entropies() ", "")
                    raise UserError(f"{kind}: TRL's GRPOTrainer cannot compute the log-probability of an answer: {why}") from None
            difference = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
            if not difference <= tolerance:
                raise UserError(f"{kind}: TRL's GRPOTrainer computes other log-probabilities of an answer than the model itself (they differ by {difference:.3g})")

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        set_sampler(loader, self.order)
        return loader

    def num_examples(self, dataloader: Any) -> int:
        """Answers that are trained in an epoch, from which the Trainer computes its speed."""
        return len(self.order) // self.args.steps_per_generation

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.row_ids += dict.fromkeys(self.rows[example["row"]].id for example in inputs)
        try:
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise UserError(f"step {self.state.global_step + 1}: the probabilities from which answers are sampled are not finite, rows {', '.join(self.row_ids[:16])};"
                            " try a lower trainer.learning_rate, or model.dtype=fp32 (mmft resume goes on from the newest checkpoint)") from None  # fmt: skip
        private_api.policy_counts(self).pop("step_time", None)  # the clock would make a repeated run differ; summary.json has the time
        self.losses.append(loss)
        self.meter.loss += loss
        return loss

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        self.meter.supervised_tokens += inputs["completion_mask"].sum()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As in every run; what the trainer has counted since its last log is not logged with it."""
        counts = private_api.policy_counts(self)
        waiting = {name: values[:] for name, values in counts.items()}
        counts.clear()
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            counts.update(waiting)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: most of the work is sampling."""
        return 0

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """mmft writes its own."""

    def keep(self, folder: Path) -> None:
        torch.save(private_api.policy_state(self), folder / f"policy_{rank()}.pt")

    def go_on(self, checkpoint: Path) -> None:
        file = checkpoint / f"policy_{rank()}.pt"
        if file.is_file():  # mmft resume made a checkpoint of a finished run without one
            private_api.restore_policy(self, torch.load(file, weights_only=True, map_location=self.args.device))

    def release(self) -> None:
        """Give the model its own forward back, and take the copy of its adapter out that was the reference."""
        if self.own_forward is None:
            vars(self.whole).pop("forward", None)
        else:
            self.whole.forward = self.own_forward
        if "ref" in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter("ref")
