"""The package easy-vqa as questions with regions, and the cache of these regions."""

import sys

import numpy as np
import pytest
import torch

from ipu_pipeline.errors import DatasetError


@pytest.fixture
def module(example, monkeypatch, tmp_path):
    monkeypatch.setenv("IPU_PIPELINE_CACHE", str(tmp_path / "cache"))
    return example("easy_vqa_data")


def test_the_first_questions_share_their_images(module):
    split = module.read_easy_vqa("train", 24, 4)
    assert len(split) == 24
    assert split.questions[0] == "what is the blue shape?"
    assert dict(split.labels[0].weights) == {"rectangle": 1.0}
    assert len(split.answers) == 13
    features, boxes = split.regions[0]
    assert (features.shape, boxes.shape) == ((16, 14), (16, 4))
    assert torch.equal(features, split.regions[1][0])
    assert not torch.equal(features, split.regions[23][0])
    assert features.abs().max() < 4
    assert (boxes.min(), boxes.max()) == (0, 1)


def test_validation_is_the_test_set_of_the_package(module):
    split = module.read_easy_vqa("validation", 3, 2)
    assert split.where == "easy-vqa[validation]"
    assert split.questions[0] == "what is the red shape?"
    assert split.region_shapes == ((4, 14), (4, 4))


def test_regions_are_computed_once(module, monkeypatch, tmp_path):
    first = module.read_easy_vqa("validation", 3, 4)
    (kept,) = (tmp_path / "cache").glob("regions-*.npz")

    def fail(_):
        raise AssertionError("an image was read again")

    with monkeypatch.context() as patched:
        patched.setattr(module, "_pixels", fail)
        again = module.read_easy_vqa("validation", 3, 4)
        np.testing.assert_array_equal(first.regions[0][0], again.regions[0][0])
        with pytest.raises(AssertionError, match="was read again"):
            module.read_easy_vqa("validation", 3, 2)  # another grid is another file
    kept.write_bytes(b"damaged")
    third = module.read_easy_vqa("validation", 3, 4)
    np.testing.assert_array_equal(first.regions[0][0], third.regions[0][0])


def test_a_cache_that_cannot_be_written_is_no_error(module, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("IPU_PIPELINE_CACHE", str(tmp_path / "file"))
    assert len(module.read_easy_vqa("validation", 2, 4)) == 2


def test_a_missing_package_is_named(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(DatasetError, match="data set 'easy-vqa' is not installed; run 'pip inst"):
        module.read_easy_vqa("train", 1, 4)
