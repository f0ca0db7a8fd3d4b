"""The grammar in front of Hydra against arbitrary words: a config, or one line; the value that was typed is the one that arrives."""

import pytest
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from mmft.cli import parse
from mmft.common.errors import UserError
from mmft.config import compose, sweep_overrides
from mmft.config.plain import to_plain

KEYS = ["lora.r", "trainer.learning_rate", "name", "data", "model", "data.pictures", "generation.max_new_tokens", "evaluation.split", "seed", "experiment", "task",
        "logger", "hydra/launcher", "hydra.run.dir", "+lora.x", "~lora", "++model.path", "lora.target_modules", "lora@x", "collator.system", "input", "prompt"]  # fmt: skip
CHARACTERS = st.characters(codec="utf-8", exclude_categories=["Cs"])
value = st.text(CHARACTERS, max_size=20) | st.text(st.sampled_from("[]{}()'\"\\$,:=~+- \t#@!%&*a1.é\n"), max_size=16) | st.sampled_from(
    ["1,2", "[1,2]", "{a: 1}", "choice(1,2)", "range(3)", "${seed}", "${oc.env:HOME}", "null", "true", "1e-4", "interval(0,1)", "glob(*)", "???", "${", "\\", "'", ""])  # fmt: skip
word = st.builds("{}={}".format, st.sampled_from(KEYS) | st.text(CHARACTERS, max_size=10), value) | st.text(CHARACTERS, max_size=12)


@given(argv=st.lists(word, max_size=3), verb=st.sampled_from([[], ["prepare"], ["predict"], ["train"]]))
@examples(40)
def test_any_words_are_a_config_or_one_line(argv, verb):
    try:
        command = parse.parse([*verb, *argv])
        compose.compose(command.overrides, command.config_dir, command.config_name)
    except UserError as error:
        assert str(error).strip()
    except SystemExit as stop:  # --version
        assert stop.code in (0, None)


@given(argv=st.lists(word, min_size=1, max_size=2))
@examples(40)
def test_any_words_of_a_sweep(argv):
    try:
        command = parse.parse(["-m", *argv])
        points, _ = sweep_overrides.expand(command.overrides)
        assert len(points) >= 1
        sweep_overrides.first_values(command.overrides)
        sweep_overrides.check_sweep(command.overrides, None, "config")
    except UserError as error:
        assert str(error).strip()


@given(question=st.text(CHARACTERS, min_size=1, max_size=30))
@examples(25)
def test_a_bare_question_arrives_as_it_was_typed(question):
    """`mmft predict run=DIR prompt=TEXT`: commas, quotes, braces and ${} in a question are characters."""
    plain = question
    if plain[0] in "[{\"'" or "\x00" in plain or plain != plain.strip():
        return  # lists, quoted values; white space at the ends is Hydra's to drop
    try:
        cfg = compose.compose(parse.parse(["predict", "run=x", "input=x", f"prompt={plain}"]).overrides)
    except UserError as error:
        pytest.fail(f"{plain!r}: {error}")
    got = to_plain(cfg.task)["prompt"]
    assert got == plain or (not isinstance(got, str)), (plain, got)
