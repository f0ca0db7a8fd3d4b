"""Training pictures changed at random: drawn by seed, epoch and row; never what is measured; a run that goes on draws the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from interrupted import SMALL, final, killed_after, rows
from small_models import GROUP

ON = ["augment.RandomResizedCrop.scale=[0.6,1.0]", "augment.RandomRotation.degrees=10", "augment.RandomHorizontalFlip.p=0.5", "augment.ColorJitter.brightness=0.3"]
EPOCHS = [w for w in SMALL if "max_steps" not in w] + ["trainer.num_train_epochs=2", "trainer.logging_steps=1", "trainer.dataloader_num_workers=0"]  # 20 rows, 4 a step


@pytest.fixture(scope="module")
def picture():
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def augmented(node: dict, seed: int = 1):
    from mmft.data.augment import Augmented, build_transforms

    return Augmented([], build_transforms(node), seed)


def test_a_draw_hangs_on_seed_epoch_row_and_picture_alone(picture):
    import torch

    node = {"RandomResizedCrop": {"scale": [0.5, 1.0]}, "ColorJitter": {"hue": 0.2}}
    one = augmented(node)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn = {place: one.change(picture, *place).tobytes() for place in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert torch.equal(torch.get_rng_state(), before), "the run's own random numbers stay where they are"
    assert len(set(drawn.values())) == 4 and picture.tobytes() not in drawn.values()
    torch.manual_seed(6)
    assert augmented(node).change(picture, 1, 0, 0).tobytes() == drawn[1, 0, 0]
    assert augmented(node, seed=2).change(picture, 1, 0, 0).tobytes() != drawn[1, 0, 0]


def test_each_transform_does_what_its_name_says(picture):
    import numpy as np

    pixels = np.asarray(picture)
    assert (np.asarray(augmented({"RandomHorizontalFlip": {"p": 1.0}}).change(picture, 0, 0, 0)) == pixels[:, ::-1]).all()
    assert (np.asarray(augmented({"RandomRotation": {"degrees": [180, 180]}}).change(picture, 0, 0, 0)) == pixels[::-1, ::-1]).all()
    darker = np.asarray(augmented({"ColorJitter": {"brightness": [0.5, 0.5]}}).change(picture, 0, 0, 0))
    assert abs(darker.astype(int) - pixels // 2).max() <= 1
    whole = augmented({"RandomResizedCrop": {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}}).change(picture, 0, 0, 0)
    assert whole.size == picture.size and (np.asarray(whole) == pixels).all(), "of a picture that is not square, too"
    assert augmented({"RandomResizedCrop": {"scale": [0.2, 0.3]}}).change(picture, 0, 0, 0).size == picture.size


@pytest.mark.parametrize("word, said", [
    ("augment.ColourJitter.hue=0.1", "augment.ColourJitter: no such transform. Did you mean ColorJitter"),
    ("augment.ColorJitter.brightnes=0.1", "augment.ColorJitter.brightnes: no such key. Did you mean brightness"),
    ("augment.ColorJitter=0.1", "augment.ColorJitter=0.1: must be its keys"), ("augment=ColorJitter", "augment=ColorJitter: must be transforms"),
    ("augment.RandomRotation.degrees=-3", "augment.RandomRotation: "), ("augment.RandomRotation={}", "augment.RandomRotation: "),
    ("augment.ColorJitter.hue=3", "augment.ColorJitter: "), ("augment.RandomResizedCrop.scale=3", "augment.RandomResizedCrop: "),
    ("augment.RandomResizedCrop.scale=[0.9,0.5]", "augment.RandomResizedCrop: "), ("augment.RandomResizedCrop.scale=[0,2]", "at most 1"), ("augment.RandomResizedCrop.scale=[0.1,a]", "augment.RandomResizedCrop: "),
    ("augment.RandomRotation={degrees: 3, fill: red}", "augment.RandomRotation: "), ("augment.RandomHorizontalFlip.p=2", "augment.RandomHorizontalFlip: "),
])  # fmt: skip
def test_a_mistake_is_one_line(mmft, word, said):
    code, _, err = mmft(*SMALL, word)
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1, err


def test_a_cache_asked_for_by_name_is_refused(mmft):
    code, _, err = mmft(*SMALL, "augment.RandomRotation.degrees=10", "vision_cache=memory")
    assert code == 2 and "vision_cache=memory: augment.RandomRotation changes the training pictures in every epoch; use vision_cache=off" in err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    from mmft.cli.main import main

    folder = tmp_path_factory.mktemp("augmented")
    assert main([*EPOCHS, *ON, f"output_dir={(folder / 'o').as_posix()}", f"run_dir={(folder / 'run').as_posix()}"]) == 0
    return folder / "run"


@pytest.mark.parametrize("step, workers", [(3, 0), (7, 2)])  # within the first epoch and the second
def test_a_run_that_goes_on_draws_the_same(mmft, tmp_path, whole, step, workers):
    run = killed_after(whole, step, tmp_path / "run")
    snapshot = run / "snapshot.yaml"
    text = snapshot.read_text(encoding="utf-8")
    assert "RandomResizedCrop" in text and "dataloader_num_workers: 0" in text
    snapshot.write_text(text.replace("dataloader_num_workers: 0", f"dataloader_num_workers: {workers}"), encoding="utf-8")
    code, out, err = mmft("resume", f"run={run.as_posix()}")
    assert code == 0 and f"from step {step}" in out and "changes the training pictures in every epoch" in out, err
    assert final(run) == final(whole) and rows(run) == rows(whole)


@pytest.mark.long
def test_what_is_measured_is_not_changed(mmft, tmp_path, whole, monkeypatch):
    """Base and tuned model are measured on pictures as they are, and the losses of training are other losses than without."""
    plain = tmp_path / "plain"
    assert mmft(*EPOCHS, "evaluation.base=true", "trainer.learning_rate=0", "vision_cache=off", f"run_dir={plain.as_posix()}")[0] == 0
    run = tmp_path / "run"
    from mmft.data.augment import Augmented

    change, places = Augmented.change, []
    monkeypatch.setattr(Augmented, "change", lambda self, picture, *place: places.append(place) or change(self, picture, *place))
    assert mmft(*EPOCHS, *ON, "evaluation.base=true", "trainer.learning_rate=0", f"run_dir={run.as_posix()}")[0] == 0
    assert sorted(filter(None, places)) == [(epoch, index, 0) for epoch in (0, 1) for index in range(20)], "each training picture once an epoch, nothing else"
    assert (run / "base.json").read_bytes() == (plain / "base.json").read_bytes()
    one, other = (json.loads((r / "summary.json").read_text(encoding="utf-8")) for r in (run, plain))
    assert one["eval_loss"] == other["eval_loss"] and one["metrics"] == other["metrics"]
    with_it, without = ([r["loss"] for r in rows(r) if "loss" in r] for r in (run, plain))
    assert len(with_it) == len(without) == 10 and all(a != b for a, b in zip(with_it, without))
    places.clear()
    assert mmft("evaluate", f"run={whole.as_posix()}", "evaluation.split=train")[0] == 0
    assert places == [], "training rows too, when they are measured"


@pytest.mark.long
def test_points_in_step_are_what_they_are_alone(mmft, tmp_path):
    words = ["-m", "seed=1,2", *SMALL, *ON, "trainer.save_strategy=no"]
    for name, more in (("together", []), ("apart", ["hydra/launcher=basic"])):
        code, out, err = mmft(*words, *more, f"output_dir={(tmp_path / name).as_posix()}", output_dir=False)
        assert code == 0 and ("2 points in step" in out) == (name == "together"), err
    found = sorted(p.parent.parent for p in (tmp_path / "together").rglob("adapter/adapter_model.safetensors"))
    assert len(found) == 2
    for run in found:
        (alone,) = (tmp_path / "apart").rglob(run.name)
        losses, others = ([r["loss"] for r in rows(r) if "loss" in r] for r in (run, alone))
        assert losses == pytest.approx(others, abs=1e-5)
    assert final(found[0]) != final(found[1])


def test_mirroring_warns_where_texts_name_a_side_and_the_audit_says_what_is_on(mmft, tmp_path):
    from PIL import Image

    lines = ["image,text", "0.png,a red thing", "1.png,a cat to the left of a dog", "2.png,a bright thing", "3.png,what else"]
    for n in range(4):
        Image.new("RGB", (56, 56), (60 * n, 0, 0)).save(tmp_path / f"{n}.png")
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    words = ["data=table", f"data.path={(tmp_path / 'rows.csv').as_posix()}", "data.splits.validation=0", "evaluation.split=null", "augment.RandomHorizontalFlip={}"]
    words += ["model.processor={}"]
    code, out, err = mmft("audit", *words, "estimate=false", "generate=0", f"out={(tmp_path / 'a.html').as_posix()}")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    for text in ("on for training pictures: RandomHorizontalFlip()", "1 rows name a side"):
        assert text in page and text.split(":")[0].split()[0] in out
    code, out, err = mmft(*words, "trainer.max_steps=1", "audit=false", "logger=none", f"run_dir={(tmp_path / 'run').as_posix()}")
    assert code == 0 and "RandomHorizontalFlip mirrors images whose texts name a side" in out + err and "(1 of the first 4 rows)" in out + err, err


@pytest.mark.long
@pytest.mark.parametrize("kind", ["qwen2vl", "llava", "blip2"])
@pytest.mark.parametrize("accumulate, workers", [(1, 2), (3, 0)])
def test_every_family_accumulation_and_workers(mmft, small, tmp_path, kind, accumulate, workers):
    from PIL import Image

    lines = ["image,question,answer"]
    for n in range(14):
        Image.radial_gradient("L").resize((56, 56)).convert("RGB").point(lambda v, n=n: (v * (n + 3)) % 256).save(tmp_path / f"{n}.png")
        lines.append(f"{n}.png,What is it?,{'a red square ' * (n % 3 + 1)}")
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    words = [
        f"model={GROUP[kind]}", f"model.path={small(kind).as_posix()}", "data=table", f"data.path={(tmp_path / 'rows.csv').as_posix()}",
        "data.columns={image: image, text: answer, prompt: question}", "data.splits={validation: 2}", *SMALL[3:], *ON, "trainer.num_train_epochs=3",
        "trainer.max_steps=-1", "trainer.per_device_train_batch_size=2", f"trainer.gradient_accumulation_steps={accumulate}",
        f"trainer.dataloader_num_workers={workers}", "trainer.save_total_limit=30", f"output_dir={(tmp_path / 'o').as_posix()}",
    ]  # fmt: skip
    whole = tmp_path / "whole"
    code, _, err = mmft(*words, f"run_dir={whole.as_posix()}", output_dir=False)
    assert code == 0, err[-2000:]
    steps = json.loads((whole / "summary.json").read_text(encoding="utf-8"))["steps"]
    for step in sorted({1, steps // 3, steps // 3 + 1, steps - 1}):  # mid-epoch, an epoch's end, the second epoch, the last
        run = killed_after(whole, step, tmp_path / f"at{step}")
        changed: Path = shutil.copytree(run, tmp_path / f"changed{step}")
        code, _, err = mmft("resume", f"run={run.as_posix()}")
        assert code == 0, err[-2000:]
        assert final(run) == final(whole) and rows(run) == rows(whole), f"stopped at step {step}"
        text = (changed / "snapshot.yaml").read_text(encoding="utf-8")
        (changed / "snapshot.yaml").write_text(text.replace(f"dataloader_num_workers: {workers}", f"dataloader_num_workers: {2 - workers}"), encoding="utf-8")
        assert mmft("resume", f"run={changed.as_posix()}")[0] == 0 and final(changed) == final(whole), f"workers changed at step {step}"


def boxed(tmp_path, node, seed=1):
    """A picture of one black block with its box and its centre, as an augmented row."""
    import numpy as np
    from PIL import Image

    from mmft.data.augment import Augmented, build_transforms
    from mmft.data.sample import Sample, user_turn

    pixels = np.full((80, 120, 3), 255, np.uint8)
    pixels[20:40, 30:70] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    regions = [{"label": "block", "image": 0, "box": [30.0, 20.0, 70.0, 40.0]}, {"label": "middle", "image": 0, "point": [50.0, 30.0]}]
    row = Sample("a", ("a.png",), [user_turn(1, "Where?"), {"role": "assistant", "content": [{"type": "regions", "regions": regions}]}], ("-",), str(tmp_path))
    return Augmented([row], build_transforms(node), seed)


@pytest.mark.parametrize("node", [
    {"RandomHorizontalFlip": {"p": 1.0}}, {"RandomResizedCrop": {"scale": [0.3, 0.9]}}, {"RandomRotation": {"degrees": [90, 90], "fill": 255}},
    {"RandomResizedCrop": {"scale": [0.5, 1.0]}, "RandomHorizontalFlip": {"p": 0.5}, "ColorJitter": {"brightness": 0.1}},
])  # fmt: skip
def test_boxes_move_with_their_picture(tmp_path, node):
    """Where the block is, is seen in the changed pixels."""
    import numpy as np

    rows, moved = boxed(tmp_path, node), 0
    for epoch in range(12):
        one = rows[epoch, 0]
        [image] = one.load_images()
        box, point = one.regions
        dark = np.asarray(image.convert("L")) < 128
        ys, xs = np.nonzero(dark)
        assert box["box"] == pytest.approx([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], abs=1.6)
        assert dark[min(int(point["point"][1]), 79), min(int(point["point"][0]), 119)], "the point is still on the block"
        moved += box["box"] != [30, 20, 70, 40]
        assert one.messages[0] == rows.rows[0].messages[0] and rows[epoch, 0].regions == one.regions, "drawn again the same"
    assert moved >= 6 and rows.rows[0].regions[0]["box"] == [30, 20, 70, 40], "the row itself is not changed"


def test_a_draw_that_cuts_a_box_away_is_drawn_again(tmp_path):
    rows = boxed(tmp_path, {"RandomResizedCrop": {"scale": [0.05, 0.2]}})
    for epoch in range(20):
        box, point = rows[epoch, 0].regions
        left, top, right, bottom = box["box"]
        assert right > left and bottom > top and left <= point["point"][0] <= right and top <= point["point"][1] <= bottom


def test_numbers_in_the_batch_are_those_of_the_changed_picture(tmp_path):
    from mmft.collators.chat import ChatCollator
    from mmft.models.families.qwen2vl import Qwen2VL
    from mmft.models.load import end_token_ids, load_model

    family = Qwen2VL(path="mmft:tiny", device="cpu", boxes="thousandths")
    loaded = load_model(family)
    chat = ChatCollator(processor=loaded.processor, family=family, model_config=loaded.model.config, end_token_ids=end_token_ids(family, loaded))
    rows = boxed(tmp_path, {"RandomHorizontalFlip": {"p": 1.0}})
    labels = chat([rows[0, 0]])["labels"][0]
    # 120 wide: 30..70 becomes 50..90, 50 becomes 70
    assert chat.decode([labels[labels >= 0].tolist()]) == ["block [417, 250, 750, 500]; middle [583, 375]"]
    labels = chat([rows[0]])["labels"][0]
    assert chat.decode([labels[labels >= 0].tolist()]) == ["block [250, 250, 583, 500]; middle [417, 375]"], "by index alone: the picture as it is"
