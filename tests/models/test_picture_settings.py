"""What ``preprocessor_config.json`` says beside the settings that are followed comes back when it is written."""

import json

import pytest
from interloom.models import GroupViTImageProcessor, IdeficsImageProcessor

OURS = {"note": {"by": "us"}, "data_format": "channels_first"}


@pytest.mark.parametrize("kind", [IdeficsImageProcessor, GroupViTImageProcessor])
def test_unknown_settings_are_kept_and_written_back(kind, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({**OURS, "resample": 1, "image_mean": [0.5] * 3})
    )
    images = kind.from_pretrained(tmp_path)
    assert images.changed({"resample": 2}).further == OURS
    images.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())
    assert {name: written[name] for name in OURS} == OURS
    assert (written["resample"], written["image_mean"]) == (1, [0.5] * 3)
    assert "further" not in written
    assert kind.from_pretrained(tmp_path / "again").to_dict() == images.to_dict()
    with pytest.raises(ValueError, match="does not know further"):
        images.changed({"further": {"a": 1}})


def test_settings_of_the_processor_are_not_taken_for_those_of_pictures():
    values = {
        "processor_class": "P",
        "image_processor": {"image_size": 9},
        "size": {"height": 30, "width": 30},
    }
    images = IdeficsImageProcessor.from_dict(values)
    assert (images.image_size, images.further) == (30, {})
