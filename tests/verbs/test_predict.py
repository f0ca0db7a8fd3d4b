"""predict: everything input= may name, answers as in training, broken pictures named and left out; the chat."""

import csv
import json
import shutil

import pytest
from small_models import GROUP, KINDS
from verb_data import QUESTION, lines


def answers(path):
    return [row["prediction"] for row in lines(path)]


def test_a_prepared_split_is_answered_as_training_answered_it(verb, trained, tmp_path):
    (prepared,) = (trained.outputs / "data").glob("table-*")
    for n, given in enumerate(["validation", prepared.as_posix(), (prepared / "validation.arrow").as_posix()]):
        code, out, err = verb("predict", f"input={given}", f"out={tmp_path.as_posix()}/{n}.jsonl")
        assert code == 0, err
        measured = [{k: v for k, v in row.items() if k not in ("loss", "loss_tokens")} for row in trained.lines("eval/tuned.jsonl")]
        assert lines(tmp_path / f"{n}.jsonl") == measured, "all but the loss of the reference"
    assert "token_f1" in out, "references are known, so the metrics are shown"


def test_own_pictures_are_answered_as_training_answered_the_same_ones(verb, trained):
    """The prompt comes from the run; a single answer is the only thing on stdout."""
    for row in trained.lines("eval/tuned.jsonl")[:2]:
        code, out, err = verb("predict", f"input={row['root']}/{row['images'][0]}")
        assert (code, out.strip()) == (0, row["prediction"]) and QUESTION in err


def test_another_question_gives_another_prompt(verb, trained, tmp_path):
    words = "Which colour, exactly? ${x} it's (blue)"
    code, _, err = verb("predict", f"input={trained.pictures.as_posix()}/1.png", f"prompt={words}", f"out={tmp_path.as_posix()}/a.jsonl")
    assert code == 0, err
    assert lines(tmp_path / "a.jsonl")[0]["prompt"] == words


def test_a_record_of_json_lines_may_lack_what_others_have(tmp_path):
    """The first record has no prompt and no reference of its own; those of the others are asked and known all the same."""
    from mmft.evaluation.inputs import read_table

    rows = [{"image": "a.png"}, {"image": "b.png", "question": "Which colour?", "answer": "red"}, {"text": "nothing to see"}, {"file": "c.png", "prompt": "Why?"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = read_table(tmp_path / "q.jsonl", lambda: "What is it?")
    assert [a.sample and a.sample.prompt_text for a in asked] == ["What is it?", "Which colour?", None, "Why?"]
    assert asked[1].sample.references == ("red",) and asked[0].sample.references == () and asked[2].error == "q.jsonl:3: names no image"


def test_a_prompt_that_is_longer_than_the_tokenizer_expects_brings_no_line_of_a_librarys(verb, trained, monkeypatch):
    """transformers remarks on a text above the tokenizer's model_max_length (2048 here), once in a process."""
    said = []
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", lambda *args, **keys: said.append(args))
    code, _, err = verb("predict", f"input={trained.pictures.as_posix()}/1.png", f"prompt={'word ' * 2100}")
    assert code in (0, 2) and said == [] and "Traceback" not in err


@pytest.mark.long
def test_a_thousand_photos_with_five_broken_ones(verb, trained, tmp_path):
    photos = tmp_path / "photos of 2024"
    good = (trained.pictures / "0.png").read_bytes()
    for n in range(995):
        folder = photos / f"day {n % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{n:04d}.png").write_bytes(good)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 255
    broken = {"empty.jpg": b"", "cut.png": good[: len(good) // 2], "text.jpeg": b"not a picture", "flipped.png": bytes(flipped), "head.webp": b"RIFF"}
    for name, data in broken.items():
        (photos / "day 3" / name).write_bytes(data)
    (photos / "notes.txt").write_text("no picture", encoding="utf-8")
    (photos / ".thumbs").mkdir()
    (photos / ".thumbs" / "hidden.png").write_bytes(b"")
    out = tmp_path / "answers.csv"
    code, _, err = verb("predict", f"input={photos.as_posix()}", f"out={out.as_posix()}", "generation.max_new_tokens=1", "evaluation.batch_size=100")
    named = [line for line in err.splitlines() if line.startswith("mmft: ") and "photos of 2024" in line]
    assert code == 1 and len(named) == 5 and all(sum(name in line for line in named) == 1 for name in broken)
    assert "5 of 1000 inputs could not be answered" in err and "Traceback" not in err
    rows = list(csv.DictReader(out.open(encoding="utf-8", newline="")))
    assert len(rows) == 1000 and [r["image"] for r in rows] == sorted(r["image"] for r in rows)
    assert {r["image"].rsplit("/", 1)[1] for r in rows if r["error"]} == set(broken)
    texts = {r["prediction"] for r in rows if not r["error"]}
    assert len(texts) == 1, "the same picture, whatever batch a broken one left it in"


def test_tables_lists_and_several_pictures_in_one_prompt(verb, trained, tmp_path):
    for n in range(3):
        shutil.copy(trained.pictures / f"{n}.png", tmp_path / f"{n}.png")
    rows = [{"image": "0.png", "prompt": "First?"}, {"image": ["1.png", "2.png"], "prompt": "<image> or <image>?"}, {"image": "9.png"},
            {"image": [], "prompt": "None?"}, {"image": ["0.png"], "prompt": "<image><image>"}]  # fmt: skip
    (tmp_path / "q.jsonl").write_text("\n".join([*map(json.dumps, rows), "{broken"]), encoding="utf-8")
    (tmp_path / "q.csv").write_text('image,question,reference\n0.png,First?,a red circle\n"[""1.png"", ""2.png""]",Which?,\n', encoding="utf-8")
    code, _, err = verb("predict", f"input={tmp_path.as_posix()}/q.jsonl", f"out={tmp_path.as_posix()}/a.jsonl")
    found = lines(tmp_path / "a.jsonl")
    assert code == 1 and [bool(r.get("error")) for r in found] == [False, False, True, True, True, True]
    assert found[1]["images"] == ["1.png", "2.png"] and found[1]["prompt"] == " or ?" and found[2]["prompt"] == QUESTION
    assert "9.png: missing image" in err and "q.jsonl:4: names no image" in err and "q.jsonl:5" in err and "q.jsonl:6: broken JSON" in err
    code, out, err = verb("predict", f"input={tmp_path.as_posix()}/q.csv", f"out={tmp_path.as_posix()}/b.jsonl")
    assert code == 0, err
    two = lines(tmp_path / "b.jsonl")
    assert two[0]["references"] == ["a red circle"] and "token_f1" in two[0]["metrics"] and two[1]["images"] == ["1.png", "2.png"]
    code, out, err = verb("predict", f"input=[{tmp_path.as_posix()}/1.png,{tmp_path.as_posix()}/2.png]", "prompt=Which?", "together=true")
    assert (code, out.strip()) == (0, two[1]["prediction"])
    code, out, err = verb("predict", f"input={tmp_path.as_posix()}/[12].png", "prompt=First?")
    assert code == 0 and out.count(".png") == 2


def test_generation_keys_have_transformers_names(verb, trained, tmp_path):
    def ask(*words):
        name = f"{len(list(tmp_path.iterdir()))}.jsonl"
        code, _, err = verb("predict", "input=validation", f"out={tmp_path.as_posix()}/{name}", *words)
        assert code == 0, err
        return answers(tmp_path / name)

    plain = [r["prediction"] for r in trained.lines("eval/tuned.jsonl")]
    assert all(len(a) <= len(b) for a, b in zip(ask("generation.max_new_tokens=2"), plain, strict=True))
    drawn = ["generation.do_sample=true", "generation.temperature=3.0", "generation.top_k=50"]
    assert ask(*drawn) == ask(*drawn) != plain
    assert ask("evaluation.batch_size=1") == plain


def test_a_model_without_a_run(mmft, trained):
    row = trained.lines("eval/base.jsonl")[0]
    words = [w for w in trained.words if w.startswith(("model.path", "generation"))]
    code, out, err = mmft("predict", *words, f"input={row['root']}/{row['images'][0]}", f"prompt={QUESTION}")
    assert (code, out.strip()) == (0, row["prediction"])


def test_chat_keeps_the_conversation_and_survives_mistakes(verb, trained, monkeypatch):
    import io

    row = trained.lines("eval/tuned.jsonl")[0]
    said = f"/image {row['root']}/{row['images'][0]}\n{QUESTION}\n/image nowhere.png\n/paint\nAnd what else?\n/new\nIs it dark?\n/quit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    code, out, err = verb("predict", "chat=true")
    assert code == 0 and out.splitlines()[0] == (row["prediction"] or "(nothing written)") and len(out.splitlines()) == 3
    assert "nowhere.png: missing image" in err and "/paint: no such command" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "words, expected",
    [
        (["input={tmp}/empty"], "holds no image"),
        (["input={tmp}/nothing"], "no such file or folder"),
        (["input={tmp}/emtpy"], "Did you mean empty?"),
        ([], "input must be given"),
        (["input={pics}/0.png", "out={tmp}/there.csv"], "exists already"),
        (["input={pics}/0.png", "out={tmp}/a.txt"], "must end in .csv or .jsonl"),
        (["input={tmp}/there.csv"], "has no column image"),
        (["input={tmp}/bad.jpg", "out={tmp}/a.csv"], "nothing was answered"),
        (["input={pics}/0.png", "out={tmp}/a.csv", "generation.do_sample=true", "generation.temperature=-1.0"], "generation: "),
        (["input={pics}/0.png", "generation.max_new_token=3"], "Did you mean generation.max_new_tokens?"),
        (["input={pics}/0.png", "model=qwen2vl"], "brings its own model"),
        (["input={pics}/0.png", "imput=3"], "Did you mean input?"),
    ],
)
def test_mistakes_are_named_and_nothing_is_left(verb, trained, tmp_path, words, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jpg").write_bytes(b"")
    (tmp_path / "there.csv").write_text("kept\n1\n", encoding="utf-8")
    code, _, err = verb("predict", *[w.format(tmp=tmp_path.as_posix(), pics=trained.pictures.as_posix()) for w in words])
    assert code == 2 and expected in err and "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jpg", "empty", "there.csv"]
    assert (tmp_path / "there.csv").read_text(encoding="utf-8") == "kept\n1\n"


def test_a_run_with_several_prompts_asks_for_one(verb, run_copy, trained):
    rows = trained.lines("eval/tuned.jsonl")
    rows[0]["prompt"] = "Another question?"
    (run_copy / "eval" / "tuned.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    code, _, err = verb("predict", f"run={run_copy.as_posix()}", f"input={trained.pictures.as_posix()}/0.png", run=False)
    assert code == 2 and 'add prompt="..."' in err


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_answers_and_streams_the_same_text(kind, small, mmft, tmp_path):
    """Two pictures of different size in one batch, then each alone, streamed."""
    from mmft.config.compose import compose
    from mmft.evaluation.inputs import ask
    from mmft.runs.open import open_any
    from mmft.serving.stream import stream

    (tmp_path / "in").mkdir()
    for n in (0, 2):
        shutil.copy(small.root / f"{n}.png", tmp_path / "in" / f"{n}.png")
    model = [f"model={GROUP[kind]}", f"model.path={small(kind).as_posix()}", "generation.max_new_tokens=4"]
    code, _, err = mmft("predict", *model, f"input={tmp_path.as_posix()}/in", "prompt=Describe this image", f"out={tmp_path.as_posix()}/a.jsonl")
    assert code == 0, err
    opened = open_any(None, compose(model), [])
    evaluator = opened.evaluator([])
    for n, text in zip((0, 2), answers(tmp_path / "a.jsonl"), strict=True):
        sample = ask("x", [tmp_path / "in" / f"{n}.png"], "Describe this image").sample
        assert list(stream(evaluator, opened.model, [sample]))[-1] == text
        evaluator.generation["num_beams"] = 2
        assert len(list(stream(evaluator, opened.model, [sample]))) == 1
        evaluator.generation["num_beams"] = 1
