"""The hash of a local model's files, begun ahead or not."""

from __future__ import annotations

import hashlib
import os

import pytest

from mmft.models import fingerprint


@pytest.fixture(autouse=True)
def begun(monkeypatch):
    """Nothing of commands that other tests ran in this process."""
    monkeypatch.setattr(fingerprint, "_threads", {})
    return fingerprint._threads


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(os.urandom(3_000_007))
    (tmp_path / "pytorch_model.bin").write_bytes(b"does not count")
    (tmp_path / "empty.txt").write_bytes(b"")
    return tmp_path


def by_hand(folder):
    names = ["config.json", "empty.txt", "model.safetensors"]
    return "sha256:" + hashlib.sha256(b"".join(name.encode() + (folder / name).read_bytes() for name in names)).hexdigest()


def test_names_and_contents_of_what_counts(folder, monkeypatch):
    monkeypatch.setattr(fingerprint, "WINDOW", 1 << 20)  # three windows
    assert fingerprint.local_revision(folder) == by_hand(folder)


def test_what_was_threads_ahead_is_taken_once(folder, begun, monkeypatch):
    fingerprint.read_ahead(str(folder))
    begun[folder.resolve()].join()
    expected = by_hand(folder)
    monkeypatch.setattr(fingerprint, "_hashed", lambda folder: "anew")
    assert fingerprint.local_revision(folder) == expected
    assert fingerprint.local_revision(folder) == "anew"


def test_files_that_changed_since_are_hashed_again(folder, begun):
    fingerprint.read_ahead(str(folder))
    begun[folder.resolve()].join()
    (folder / "config.json").write_text('{"other": 1}')
    assert fingerprint.local_revision(folder) == by_hand(folder)


def test_a_hub_id_is_left_alone(begun):
    fingerprint.read_ahead("organisation/name")
    fingerprint.read_ahead("mmft:tiny")
    assert not begun
