"""GOT-OCR 2: its processor takes all images of a call in one list; lists of lists mean pages of one document to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Family


@dataclass(kw_only=True)
class GotOcr2(Family):
    model_types = ("got_ocr2",)

    def arranged(self, images: list[Any]) -> Any:
        return [image for own in images for image in own]
