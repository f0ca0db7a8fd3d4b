"""Names that keys may take and that the command line must know without importing torch."""

from __future__ import annotations

ANSWERS = ("generate", "choose")  # evaluation.answer
# evaluation.choice_norm: what the log-likelihood of a choice is divided by; `prior` is subtracted from it
CHOICE_NORMS = ("none", "token", "character", "prior")
JUDGE_VARIABLE = "MMFT_JUDGE"  # the host of metrics=[judge], set by the flag --judge and inherited by the processes of a sweep; no file can set it
TRAINER_METRICS = ("runtime", "samples_per_second", "steps_per_second")  # logged by transformers at every evaluation

# What a preference objective measures on held-out rows beside the answers: name -> whether higher is better (evaluation/preferences.py)
PREFERENCE_SCORES = {"reward_accuracy": True, "reward_margin": True, "preference_loss": False, "kl": False}

# Classes of torchvision.transforms.v2 and their arguments, in the order of application. None of them changes the image size.
AUGMENT_TRANSFORMS = {
    "RandomResizedCrop": ("scale", "ratio"),
    "RandomRotation": ("degrees", "fill"),
    "RandomHorizontalFlip": ("p",),
    "ColorJitter": ("brightness", "contrast", "saturation", "hue"),
}
