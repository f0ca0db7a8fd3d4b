"""The rows of a prepared split as a table: a pandas DataFrame, or a datasets.Dataset with decoded images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .sample import Sample, text_of

if TYPE_CHECKING:
    import datasets
    import pandas


def to_pandas(rows: Sequence[Sample]) -> pandas.DataFrame:
    """One row for each sample: id, images (absolute paths), prompt, answer, references, choices, and of a mix the source."""
    import pandas

    frame = pandas.DataFrame([_record(rows[i]) for i in range(len(rows))])
    return frame if len(frame) and frame["source"].any() else frame.drop(columns="source", errors="ignore")


def to_dataset(rows: Sequence[Sample]) -> datasets.Dataset:
    """The same columns, the images as datasets.Image, and `messages` as lists of text and image parts; boxes are text, in pixels.

    datasets decodes an image when it is read, without what mmft does about rotation and transparency (mmft/data/images.py).
    """
    import datasets

    samples = [rows[i] for i in range(len(rows))]
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    features = datasets.Features({
        "id": datasets.Value("string"), "images": datasets.List(datasets.Image()), "prompt": datasets.Value("string"),
        "answer": datasets.Value("string"), "references": datasets.List(datasets.Value("string")), "choices": datasets.List(datasets.Value("string")),
        "source": datasets.Value("string"), "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)}),
    })  # fmt: skip
    columns = [{**_record(sample), "messages": _messages(sample)} for sample in samples]
    return datasets.Dataset.from_list(columns, features=features)


def _record(sample: Sample) -> dict[str, Any]:
    return {
        "id": sample.id, "images": [path.as_posix() for path in sample.image_paths], "prompt": sample.prompt_text, "answer": sample.answer_text,
        "references": list(sample.references), "choices": list(sample.choices), "source": sample.source,
    }  # fmt: skip


def _messages(sample: Sample) -> list[dict[str, Any]]:
    return [
        {"role": m["role"], "content": [{"type": "image", "text": None} if p["type"] == "image" else {"type": "text", "text": text_of([p])} for p in m["content"]]}
        for m in sample.messages
    ]
