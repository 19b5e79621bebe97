"""Region features: values known by hand, and what they are made to tell apart."""

import numpy as np
import pytest

from tasks.visual_question_answering import NUM_FEATURES, grid_regions


def image(*, size=16, colour=(255, 255, 255)):
    return np.full((1, size, size, 3), colour, dtype=np.uint8)


def test_a_plain_image_is_its_colour_and_has_no_edges():
    features, boxes = grid_regions(image(colour=(255, 0, 51)), 2)
    assert features.shape == (1, 4, NUM_FEATURES)
    assert features.dtype == boxes.dtype == np.float32
    np.testing.assert_allclose(features[0, :, :3], [[1, -1, -0.6]] * 4, atol=1e-6)
    np.testing.assert_allclose(features[0, :, 3:], 0, atol=1e-6)


def test_boxes_are_shares_of_the_image_row_by_row():
    _, boxes = grid_regions(image(), 2)
    expected = [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    np.testing.assert_array_equal(boxes, expected)


def test_an_edge_across_a_cell_counts_one_in_its_direction():
    pixels = image()
    pixels[:, :, 4:] = 0  # a vertical edge in the left cells: the gradient points right
    features, _ = grid_regions(pixels, 2)
    edges = features[0, :, 6:]
    np.testing.assert_allclose(edges[0], [1, 0, 0, 0, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(edges[1], 0, atol=1e-6)
    turned, _ = grid_regions(pixels.transpose(0, 2, 1, 3), 2)
    np.testing.assert_allclose(turned[0, 0, 6:], [0, 0, 0, 0, 1, 0, 0, 0], atol=1e-6)


def test_the_deviation_is_of_the_cell():
    pixels = image()
    pixels[:, :, 4:] = 0
    features, _ = grid_regions(pixels, 2)
    np.testing.assert_allclose(features[0, 0, :6], [0, 0, 0, 2, 2, 2], atol=1e-6)


def test_a_slanted_edge_has_another_direction_than_a_straight_one():
    straight, slanted = image(), image()
    straight[:, :, 8:] = 0
    slanted[:, np.add.outer(np.arange(16), np.arange(16)) > 16] = 0
    directions = [grid_regions(p, 1)[0][0, 0, 6:].argmax() for p in (straight, slanted)]
    assert directions == [0, 2]


def test_no_image_gives_no_features():
    features, boxes = grid_regions(image()[:0], 4)
    assert features.shape == (0, 16, NUM_FEATURES)
    assert boxes.shape == (16, 4)


def test_other_memory_layouts_give_the_same_values():
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    strided = np.asfortranarray(pixels)
    np.testing.assert_array_equal(grid_regions(pixels, 2)[0], grid_regions(strided, 2)[0])


def test_refuses_what_is_no_batch_of_colour_images():
    with pytest.raises(ValueError, match=r"images have shape \(1, 16, 16\), not \(images, height"):
        grid_regions(image()[..., 0], 2)


@pytest.mark.parametrize("cells", [0, 3, 32])
def test_refuses_a_grid_that_does_not_divide_the_image(cells):
    message = rf"a grid of {cells} x {cells} cells does not divide images of 16 x 16 pixels"
    with pytest.raises(ValueError, match=message):
        grid_regions(image(), cells)
