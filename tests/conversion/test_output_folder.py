# SPDX-License-Identifier: Apache-2.0
import pytest

from diffusers_hart.conversion.output_folder import new_folder


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "parent" / "out"
    with new_folder(target) as folder:
        (folder / "file").write_text("content")
        assert not target.exists()
    assert (target / "file").read_text() == "content"
    assert [path.name for path in target.parent.iterdir()] == ["out"]

    second = tmp_path / "second"
    with pytest.raises(OSError, match="disk full"), new_folder(second) as folder:
        (folder / "file").touch()
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


def test_permissions_are_those_of_any_new_folder(tmp_path):
    (tmp_path / "usual").mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode
