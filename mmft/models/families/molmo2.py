"""Molmo 2: the places that its pooling reads are counted through all images of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Family


@dataclass(kw_only=True)
class Molmo2(Family):
    model_types = ("molmo2",)
    images_apart = False
