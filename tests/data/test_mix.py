"""`data=mix`: sources on the command line and in yaml files, draws by weight, images in two sources, and what is refused."""

from __future__ import annotations

from collections import Counter

import pytest
from mixed import HELD_OUT, TRAIN, mix, source, write_sources

from mmft.common.errors import UserError
from mmft.config import compose
from mmft.data.mixing import mixing
from mmft.data.prepare import prepared_data
from mmft.training.sampling import MixtureSampler


@pytest.fixture
def folder(tmp_path):
    return write_sources(tmp_path)


def opened(tmp_path, *words):
    return prepared_data(compose.compose([*words, f"output_dir={(tmp_path / 'o').as_posix()}"]))


# --- sources ---------------------------------------------------------------------------------------------------------


def test_each_source_is_prepared_as_by_itself_and_read_as_one(mmft, tmp_path, folder):
    code, out, err = mmft("prepare", *mix(folder, "more", "caps", "chat"))
    assert code == 0, err
    alone = [word.replace("data.sources.caps", "data") for word in source(folder, "caps")]
    sets = {p.name for p in (tmp_path / "outputs" / "data").iterdir() if p.is_dir()}
    code, alone_out, err = mmft("prepare", *alone)
    assert code == 0 and len(sets) == 3
    assert {p.name for p in (tmp_path / "outputs" / "data").iterdir() if p.is_dir()} == sets, "the same set as without a mix"
    assert all(f"caps: {line.replace(' data.splits', ' data.sources.caps.splits')}" in out for line in alone_out.splitlines()), "keys are named where they stand"
    prepared = opened(tmp_path, *mix(folder, "more", "caps", "chat"))
    assert prepared.splits == {"train": sum(TRAIN.values()), "validation": sum(HELD_OUT.values())}
    rows = prepared.split("train")
    assert [rows[i].source for i in range(len(rows))] == ["caps"] * 8 + ["chat"] * 8 + ["more"] * 6, "in the order of their names"
    assert rows[0].id == "caps/1" and rows[-1].id == "more/6" and rows[8].prompt_text == "Say 0."


def test_a_yaml_file_names_sources_and_the_command_changes_them(tmp_path, folder):
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "ours.yaml").write_text(
        "defaults:\n  - mix\n  - /data@sources.caps: table\n  - /data@sources.chat: table\n  - _self_\n"
        f"sources:\n  caps: {{path: {(folder / 'caps.csv').as_posix()}, weight: 2}}\n", encoding="utf-8",
    )  # fmt: skip

    def composed(*words):
        return compose.compose(["data=ours", *words], str(tmp_path / "conf"))

    cfg = composed(*source(folder, "chat", weight=0.5), "data.sources.more=coco", "data.sources.more.path=X")
    assert {name: node["_target_"].rpartition(".")[2] for name, node in cfg.data.sources.items()} == {"caps": "Table", "chat": "OpenAIMessages", "more": "CocoCaptions"}
    assert cfg.data.sources.caps.weight == 2 and cfg.data.sources.chat.weight == 0.5 and "columns" not in cfg.data.sources.chat
    assert composed("+data@data.sources.more=coco", "data.sources.more.path=X", "data.sources.chat.path=Y").data.sources.more.path == "X", "Hydra's own words"


def test_a_home_folder_in_a_source_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", tmp_path.as_posix())
    cfg = compose.compose(["data=mix", "data.sources.a=coco", "data.sources.a.path=~/coco", "data.sources.a.images=~/pictures"])
    assert (cfg.data.sources.a.path, cfg.data.sources.a.images) == (f"{tmp_path.as_posix()}/coco", f"{tmp_path.as_posix()}/pictures")


def test_a_training_row_with_an_image_that_another_source_holds_out_is_left_out(mmft, tmp_path, folder):
    (folder / "caps0.png").write_bytes((folder / "more8.png").read_bytes())  # caps trains what more holds out
    code, out, err = mmft("prepare", *mix(folder, "caps", "more"))
    assert code == 0 and "caps: 1 training row is left out, because more holds out an image that it shows (the first: caps/1)" in out, err
    prepared = opened(tmp_path, *mix(folder, "caps", "more"))
    assert [row.id for row in prepared.split("train")][:2] == ["caps/2", "caps/3"] and prepared.splits["train"] == 7 + 6
    assert opened(tmp_path, *mix(folder, "caps", "chat")).splits["train"] == 8 + 8


def test_a_weight_of_0_holds_out_only(tmp_path, folder):
    prepared = opened(tmp_path, *mix(folder, "caps", "chat"), "data.sources.chat.weight=0")
    assert prepared.splits == {"train": 8, "validation": 5} and prepared.mixing(prepared.split("train")).every_row_once
    assert prepared.fingerprint == opened(tmp_path, *mix(folder, "caps", "chat"), "data.sources.chat.weight=0.5").fingerprint, "the same held-out rows"


# --- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights, draws, counts", [
    ({"a": None, "b": None}, None, {"a": 30, "b": 10}),  # the union
    ({"a": None, "b": 0.25}, None, {"a": 32, "b": 8}),  # 40 x 1 / 1.25
    ({"a": 0.7, "b": 0.3}, 10, {"a": 7, "b": 3}),
    ({"a": 1, "b": 1}, 25, {"a": 13, "b": 12}),  # the first source gets the odd one
    ({"a": None, "b": None}, 20, {"a": 15, "b": 5}),  # in proportion to the rows
    ({"a": 5000, "b": 2000}, 7000, {"a": 5000, "b": 2000}),
])  # fmt: skip
def test_draws_of_an_epoch(weights, draws, counts):
    assert mixing({"a": 30, "b": 10}, weights, draws).counts == counts


@pytest.mark.parametrize("counts", [(4, 25), (30, 10), (7, 3)])
def test_rows_are_drawn_evenly_and_by_seed_and_epoch_alone(counts):
    """Over six epochs each row of a source comes as often as any other, give or take one; no epoch repeats another."""
    drawn = mixing({"a": 30, "b": 10}, {"a": counts[0], "b": counts[1]}, sum(counts))
    sampler, epochs = MixtureSampler(drawn, 7), []
    for epoch in range(6):
        sampler.epoch = epoch
        epochs.append(list(sampler))
        assert list(sampler) == epochs[-1] and len(epochs[-1]) == len(sampler) == sum(counts)
        assert Counter("a" if row < 30 else "b" for row in epochs[-1]) == {"a": counts[0], "b": counts[1]}
    times = Counter(row for epoch in epochs for row in epoch)
    for rows, count in ((range(30), counts[0]), (range(30, 40), counts[1])):
        assert {times[row] for row in rows} <= {6 * count // len(rows), -(-6 * count // len(rows))}
    assert len(set(map(tuple, epochs))) == 6
    other = MixtureSampler(drawn, 8)
    assert list(other) != epochs[0]
    assert drawn.rows_seen(sum(counts)) == len(set(epochs[0]))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, message", [
    ([], "there are no sources; add data.sources.NAME=OPTION"),
    (["data.sources.caps=tabel"], "data.sources.caps=tabel: no such data. Did you mean table?"),
    (["data.sources.caps=coco", "data.sources.caps=messages"], "data.sources.caps=messages: two sources have this name"),
    (["data.sources.b/c=table"], "data.sources: 'b/c' cannot name a source"),
    (["data.sources.my set=table"], "data.sources: 'my set' cannot name a source"),
    (["data.sources.ü=table"], "data.sources: 'ü' cannot name a source"),
    (["data/x=1"], "data/x: no such group. Did you mean data?"),
    (["data.sources.caps=mix"], "data.sources.caps=mix: a mix cannot be a source of a mix"),
    (["{caps}", "data.sources.cap.weight=1"], "data.sources.cap: no data set is chosen for this source. Did you mean caps?"),
    (["data.sources.caps=table"], "data.sources.caps.path must be given"),
    (["{caps}", "data.sources.caps.pth=x"], "data.sources.caps.pth: no such key. Did you mean data.sources.caps.path?"),
    (["{caps}", "data.sources.caps.weight=-1"], "data.sources.caps.weight=-1: must be a number, 0 or above"),
    (["{caps}", "data.sources.caps.weight=much"], "data.sources.caps.weight=much: must be float or null"),
    (["{caps}", "data.sources.caps.weight=.inf"], "data.sources.caps.weight="),
    (["{caps}", "{chat}", "data.sources.caps.weight=0", "data.sources.chat.weight=0"], "every weight is 0, so nothing would be trained"),
    (["{caps}", "data.draws=0"], "data.draws=0: must be a whole number of rows above 0"),
    (["{caps}", "data.sources.caps.limit=0"], "data.sources.caps.limit=0: must be a whole number above 0"),
    (["{caps}", "data.sources.caps.download={hosts: []}"], "data.sources.caps.download.hosts: name the hosts"),
])  # fmt: skip
def test_what_cannot_be_mixed_is_refused_in_one_line(mmft, folder, words, message):
    spelled = [word for given in words for word in (source(folder, given[1:-1]) if given in ("{caps}", "{chat}") else [given])]
    code, _, err = mmft("prepare", "data=mix", *spelled)
    assert code == 2 and message in err and err.count("\n") == 1, err


def test_a_source_without_rows_is_named_and_the_others_stay_prepared(mmft, tmp_path, folder):
    (folder / "chat.jsonl").write_text("", encoding="utf-8")
    code, _, err = mmft("prepare", *mix(folder, "caps", "chat"))
    assert code == 2 and err.count("\n") == 1, err
    assert err.startswith("mmft: data.sources.chat: data=messages: the source has no rows; check data.sources.chat.path")
    assert [p.name.split("-")[0] for p in (tmp_path / "outputs" / "data").iterdir() if p.is_dir()] == ["table"]
    code, out, _ = mmft("prepare", *mix(folder, "caps"))
    assert code == 0 and "caps: table: 11 rows read" in out


def test_a_weight_outside_of_a_mix_is_refused(mmft, folder):
    code, _, err = mmft("prepare", "data=table", f"data.path={(folder / 'caps.csv').as_posix()}", "data.weight=0.5")
    assert code == 2 and "data.weight=0.5: only a source of a mix has a weight" in err and err.count("\n") == 1
    code, _, err = mmft("prepare", *source(folder, "caps"))
    assert code == 2 and "data.sources.caps: sources belong to a mix; add data=mix to the command" in err and err.count("\n") == 1


def test_a_snapshot_of_a_mix_composes_again(tmp_path, folder):
    from mmft.config.identity import config_identity
    from mmft.config.snapshot import snapshot

    cfg = compose.compose([*mix(folder, "more", "caps"), "data.sources.caps.weight=0.5"])
    (tmp_path / "snapshot.yaml").write_text(snapshot(cfg), encoding="utf-8")
    again = compose.compose(["data.sources.more.limit=5"], str(tmp_path), "snapshot")
    assert again.data.sources.more.limit == 5
    again.data.sources.more.limit = None
    assert config_identity(again) == config_identity(cfg)


def test_a_key_of_one_source_does_not_change_another(folder):
    with pytest.raises(UserError, match=r"data\.path: no such key"):
        compose.compose([*mix(folder, "caps"), "data.path=x"])
