"""Names that keys may take and that the command line must know without importing torch."""

from __future__ import annotations

METRICS = ("exact_match", "exact_match_normalized", "contains", "token_f1", "vqa_accuracy", "bleu4", "rouge_l", "cider")
TRAINER_METRICS = ("runtime", "samples_per_second", "steps_per_second")  # logged by transformers at every evaluation
OBJECTIVES = ("eval_loss", *METRICS)  # the values of `objective`

# Classes of torchvision.transforms.v2 and their arguments, in the order of application. None of them changes the image size.
AUGMENT_TRANSFORMS = {
    "RandomResizedCrop": ("scale", "ratio"),
    "RandomRotation": ("degrees", "fill"),
    "RandomHorizontalFlip": ("p",),
    "ColorJitter": ("brightness", "contrast", "saturation", "hue"),
}
