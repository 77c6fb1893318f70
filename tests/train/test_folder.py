"""Laws of folders that appear whole."""

import os

import pytest

from mamba3.train.folder import new_folder


def filled(path, text):
    with new_folder(path) as building:
        (building / "file").write_text(text)


def test_a_folder_that_is_replaced_is_there_until_the_new_one_is(tmp_path, monkeypatch):
    place = tmp_path / "model"
    filled(place, "old")
    with pytest.raises(RuntimeError), new_folder(place) as building:
        (building / "file").write_text("half")
        raise RuntimeError
    assert (place / "file").read_text() == "old"
    filled(place, "new")
    assert (place / "file").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    place, rename = tmp_path / "model", os.replace
    filled(place, "old")

    def killed(source, target):
        if str(target) == str(place):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            filled(place, "new")
    with pytest.raises(RuntimeError), new_folder(place):
        assert (place / "file").read_text() == "old"  # brought back before anything else is done
        raise RuntimeError
    assert (place / "file").read_text() == "old"
