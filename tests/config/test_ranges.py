"""Values that torch, numpy or transformers would refuse late, or read as something else, are refused before torch is imported; so are sections taken away."""

import subprocess
import sys

import pytest

from mmft.common.errors import UserError
from mmft.config.compose import compose


@pytest.mark.parametrize("word, message", [
    ("seed=-1", "seed=-1: must be a whole number from 0 to 4294967295"),
    ("seed=4294967296", "seed=4294967296: must be"),
    ("trainer.max_steps=0", "trainer.max_steps=0: must be above 0, or -1 for trainer.num_train_epochs"),
    ("trainer.per_device_train_batch_size=0", "trainer.per_device_train_batch_size=0: must be a whole number above 0"),
    ("trainer.gradient_accumulation_steps=0", "must be a whole number above 0"),
    ("trainer.learning_rate=-1", "trainer.learning_rate=-1: must be 0 or above"),
    ("trainer.learning_rate=nan", "must be 0 or above"),
    ("trainer.adam_beta1=1", "must be 0 or above and below 1"),
    ("trainer.warmup_steps=-1", "trainer.warmup_steps=-1: must be 0 or above"),
    ("trainer.logging_steps=0", "must be above 0"),
    ("evaluation.batch_size=0", "must be a whole number above 0"),
    ("evaluation.max_samples=0", "or null for all rows"),
    ("lora.lora_dropout=2", "lora.lora_dropout=2: must be from 0 to 1"),
    ("lora.lora_alpha=0", "lora.lora_alpha=0: must be above 0"),
    # transformers takes these and refuses to save them with the trained adapter
    ("generation.temperature=0.7", "generation.temperature=0.7: acts on sampled answers only; add generation.do_sample=true, or drop it"),
    ("generation.top_k=5", "acts on sampled answers only"),
    ("generation.length_penalty=2.0", "acts on several beams only; add generation.num_beams=4"),
    ("generation.max_new_tokens=null", "answers need a limit"),
    ("~lora", "~lora: no config is without lora; choose another of its options, lora=OPTION"),
    ("~evaluation.batch_size", "no config is without evaluation.batch_size; set it to another value"),
])
def test_numbers_outside_their_range(word, message):
    with pytest.raises(UserError, match=message):
        compose([word])


@pytest.mark.parametrize("word", ["seed=0", "seed=4294967295", "trainer.max_steps=-1", "trainer.learning_rate=0", "trainer.warmup_steps=0.1", "trainer.logging_steps=0.5",
                                  "evaluation.max_samples=null", "lora.lora_dropout=1", "trainer.num_train_epochs=0.5", "~lora.lora_dropout", "generation.temperature=1.0", "generation.do_sample=true generation.top_p=0.9",
                                  "generation.num_beams=2 generation.length_penalty=2.0", "generation.max_new_tokens=null generation.max_length=64"])
def test_numbers_at_the_edge(word):
    compose(word.split())


def test_a_wrong_number_is_one_line_before_torch():
    code = "import sys; from mmft.cli.main import main; code = main(['trainer.gradient_accumulation_steps=0']); sys.exit(code if 'torch' not in sys.modules else 9)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.splitlines() == ["mmft: trainer.gradient_accumulation_steps=0: must be a whole number above 0"]
