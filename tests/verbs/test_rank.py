"""`mmft audit run=DIR rank=true`: losses as plain transformers computes them, the order, the files, and that data.without takes them."""

import json
import re

import pytest
from verb_data import lines


def ids_file(table, count):
    return table.with_name(f"{table.stem}_{count}.txt")


@pytest.fixture(scope="module")
def ranked(trained, tmp_path_factory):
    """(the ranking's lines, the ids of the worst rows, the page's text, the output folder of the run)"""
    from mmft.cli.main import main

    page = tmp_path_factory.mktemp("rank") / "page.html"
    assert main(["audit", f"run={trained.run.as_posix()}", "rank=true", "worst=4", f"out={page}", f"output_dir={trained.outputs.as_posix()}"]) == 0
    (table,) = (trained.run / "audit").glob("rank_*.jsonl")
    return lines(table), ids_file(table, 4).read_text(encoding="utf-8").split(), page.read_text(encoding="utf-8"), table


def plain_losses(trained, tuned: bool) -> dict[str, float]:
    """id -> mean loss per token of each training row, from the model's own loss on one row at a time."""
    import torch
    from transformers import AutoModelForImageTextToText

    from mmft.config.compose import compose
    from mmft.runs.open import open_run

    opened = open_run(trained.run, compose([f"output_dir={trained.outputs.as_posix()}"]), [])
    if not tuned:
        model = AutoModelForImageTextToText.from_pretrained(opened.family.path, dtype=torch.float32)
    else:
        from peft import PeftModel

        model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(opened.family.path, dtype=torch.float32), trained.run / "adapter")
    from mmft.data.prepare import prepared_data

    losses = {}
    for row in prepared_data(opened.cfg).split("train"):
        batch = opened.collator([row])
        inputs = {k: v for k, v in batch.items() if torch.is_tensor(v) and k != "labels"}
        with torch.no_grad():
            logits = model.eval()(**inputs).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        losses[row.id] = torch.nn.functional.cross_entropy(logits[labels != -100].float(), labels[labels != -100]).item()
    return losses


def test_losses_are_those_of_plain_transformers_and_peft(ranked, trained):
    rows = ranked[0]
    assert len(rows) == 24 - 6 - 3 and [row["rank"] for row in rows] == list(range(1, 16))
    assert [row["loss"] for row in rows] == sorted((row["loss"] for row in rows), reverse=True)
    for name, tuned in (("loss", True), ("base_loss", False)):
        expected = plain_losses(trained, tuned)
        assert {row["id"] for row in rows} == expected.keys()
        assert all(row[name] == pytest.approx(expected[row["id"]], rel=1e-4) for row in rows), name


def test_the_worst_rows_are_listed_and_shown(ranked):
    rows, ids, page, table = ranked
    assert ids == [row["id"] for row in rows[:4]]
    assert page.count('class="ranked') == 15 and page.count('class="ranked listed"') == 4
    assert re.findall(r'<input type="checkbox" value="([^"]+)"( checked)?>', page) == [(row["id"], " checked" if n < 4 else "") for n, row in enumerate(rows)]
    assert page.count("data:image/png") == 15 and page.count(">tuned model</span>") == 15
    assert not re.search(r'(src|href)="(?!data:)', page) and str(ids_file(table, 4)) in page


def test_rows_above_a_loss(verb, ranked, trained):
    limit = (ranked[0][1]["loss"] + ranked[0][2]["loss"]) / 2
    code, out, err = verb("audit", "rank=true", "worst=0.5", f"above={limit}", "generate=0")
    assert code == 0 and "2 rows listed" in out, err
    (table,) = (trained.run / "audit").glob("rank_*.jsonl")
    assert ids_file(table, 2).read_text(encoding="utf-8").split() == [row["id"] for row in ranked[0][:2]]
    assert ids_file(table, 4).read_text(encoding="utf-8").split() == ranked[1], "another run may have been trained without the rows of this file"
    assert table.with_suffix(".html").is_file() and lines(table) == ranked[0]
    assert json.loads((trained.run / "verbs.jsonl").read_text(encoding="utf-8").splitlines()[-1])["verb"] == "audit"


def test_the_file_leaves_the_rows_out(verb, mmft, ranked, trained, tmp_path):
    file = tmp_path / "ids.txt"
    file.write_text("\n".join(ranked[1]), encoding="utf-8")
    code, out, err = mmft("prepare", *trained.words, f"data.without={file}", output_dir=False)
    assert code == 0 and "train 11 rows" in out and "validation 6 rows" in out and "test 3 rows" in out and "4 left out by hand" in out, err


def test_a_checkpoint_has_a_ranking_of_its_own(verb, ranked, trained):
    code, out, err = verb("audit", "rank=true", "checkpoint=2", "generate=0", "worst=1")
    assert code == 0, err
    tables = sorted((trained.run / "audit").glob("rank_*.jsonl"))
    assert len(tables) == 2 and {row["loss"] for row in lines(tables[0])} != {row["loss"] for row in lines(tables[1])}


@pytest.mark.parametrize(("words", "message"), [
    (["worst=0"], "worst=0: must be a number of rows (50) or a share below one"), (["worst=1.5"], "worst=1.5: must be"), (["above=nan"], "above=nan: must be"),
    (["checkpoint=9"], "checkpoint=9"), (["data.splits.validation=0.9", "data.limit=4", "data.splits.test=0.9"], "split has no rows"),
])  # fmt: skip
def test_wrong_values_are_one_line(verb, words, message):
    code, _, err = verb("audit", "rank=true", *words)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_both_keys_are_needed(verb, mmft):
    code, _, err = verb("audit")
    assert code == 2 and "a run is audited with rank=true" in err and len(err.strip().splitlines()) == 1
    code, _, err = mmft("audit", "rank=true")
    assert code == 2 and "rank=true needs a run: mmft audit run=DIR rank=true" in err
