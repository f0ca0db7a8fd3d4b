"""TensorBoard's files, read back with TensorBoard's own reader."""

import io

import pytest
from PIL import Image


@pytest.fixture
def events(make_logger, rows, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    logger = make_logger("tensorboard", "logger.picture_size=100")
    logger.start(run_dir, "a run", {"seed": 1})
    for step in (1, 2):
        logger.scalars(step, {"loss": 4.0 / step, "learning_rate": 1e-4})
    logger.scalars(2, {"eval_loss": 1.25, "eval_cider": 0.5})
    for step in (1, 2):
        logger.samples(step, rows, "samples")
    logger.finish("done")
    logger.finish("done")  # twice does no harm
    assert capsys.readouterr().err == ""

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_scalars_pictures_and_texts_come_back(events):
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 4.0), (2, 2.0)]
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(2, 1.25)]
    assert {"eval/cider", "train/learning_rate", "hardware/rss_mb"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("hardware/rss_mb")] == [1, 2]  # not again with the evaluation

    assert sorted(events.Tags()["images"]) == ["samples/0/picture", "samples/1/picture"]  # the third row's file is gone
    shown = [Image.open(io.BytesIO(e.encoded_image_string)) for e in events.Images("samples/0/picture")]
    assert [p.size for p in shown] == [(100, 50), (100, 50)]
    assert shown[0].convert("RGB").getpixel((50, 25)) == (200, 30, 30)
    both = Image.open(io.BytesIO(events.Images("samples/1/picture")[0].encoded_image_string)).convert("RGB")
    assert both.size == (100 + 4 + 40, 50) and both.getpixel((120, 10)) == (30, 30, 200)

    texts = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("samples/0/text/text_summary")]
    assert len(texts) == 2 and all(part in texts[0] for part in ("What colour?", "dark red", "a red\n```field"))
    assert "samples/2/text/text_summary" in events.Tags()["tensors"]  # its text is there all the same


def test_a_directory_that_cannot_be_written_turns_it_off(make_logger, tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where the folder should be", encoding="utf-8")
    logger = make_logger("tensorboard")
    logger.start(tmp_path, "name", {})
    logger.scalars(1, {"loss": 1.0})
    logger.finish("done")
    err = capsys.readouterr().err
    assert err.startswith("mmft: TensorBoard logger is off: ") and err.count("\n") == 1


def leaderboard_in(folder) -> str:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0})
    accumulator.Reload()
    [event] = accumulator.Tensors("leaderboard/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_the_leaderboard_of_a_sweep_is_a_text(make_logger, tmp_path):
    from loggers.test_services import attach_a_leaderboard

    attach_a_leaderboard(make_logger("tensorboard"), tmp_path / "ranks")
    assert "| lora.r-4 | 4 |" in leaderboard_in(tmp_path / "ranks")


@pytest.mark.long
def test_a_sweep_attaches_its_leaderboard(mmft, tmp_path):
    """Two points through the command line, with their default logger; what is read back is the Markdown beside them."""
    words = ["trainer.max_steps=1", "data.pictures=24", "data.splits.validation=4", "evaluation.max_samples=2", "evaluation.base=false", "generation.max_new_tokens=2"]
    code, _, err = mmft("-m", "lora.r=2,4", "name=ranks", *words)
    folder = tmp_path / "outputs" / "sweeps" / "ranks"
    assert code == 0 and leaderboard_in(folder) == (folder / "report.md").read_text(encoding="utf-8"), err
