"""Images, videos, sound and series, in the forms in which models take them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from tools.coverage.tiny_draft import LENGTH, REGIONS, ROWS, Draft
from tools.coverage.tiny_rules import IMAGE, PATCH

Media = dict[str, Any]


def forms(draft: Draft) -> Iterator[Media]:
    """Yield the inputs beside text in every form that fits the names of the forward's arguments."""
    for build in _FORMS:
        found = build(draft)
        if found is not None:
            yield found


def _size(draft: Draft) -> tuple[int, int]:
    size = draft.value("image_size", "img_size", "input_image_size", default=2 * IMAGE)
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    return (size, size) if isinstance(size, int) else tuple(size)[-2:]


def _channels(draft: Draft) -> int:
    found = getattr(draft.vision_config, "num_channels", None)
    return found or draft.value("num_channels", "in_channels", "in_chans", default=3)


def _one(value: Any) -> int:
    return value if isinstance(value, int) else value[0]


def _packed_images(draft: Draft) -> Media | None:
    """Patches of all images in one row (B*N, C*T*P*P) and their grids (B, 3)."""
    if not draft.accepts("image_grid_thw") and not draft.accepts("image_grid_hw"):
        return None
    patch = _one(draft.value("patch_size", default=PATCH))
    frames = _one(draft.value("temporal_patch_size", default=1))
    side = 2 * draft.value("spatial_merge_size", default=2)
    pixels = draft.normal(ROWS * side * side, _channels(draft) * frames * patch * patch)
    grid = torch.tensor([[1, side, side]] * ROWS)
    if draft.accepts("image_grid_hw"):
        return {"pixel_values": pixels, "image_grid_hw": grid[:, 1:]}
    return {"pixel_values": pixels, "image_grid_thw": grid}


def _packed_patches(draft: Draft) -> Media | None:
    """The same with patches as small images (B*N, C, P, P)."""
    packed = _packed_images(draft)
    if packed is None:
        return None
    pixels = packed["pixel_values"]
    patch = _one(draft.value("patch_size", default=PATCH))
    return {**packed, "pixel_values": pixels.view(len(pixels), -1, patch, patch)}


def _padded_patches(draft: Draft) -> Media | None:
    """Patches of every image (B, N, C*P*P), a mask, and the shapes (B, 2)."""
    if not draft.accepts("spatial_shapes"):
        return None
    patch = _one(draft.value("patch_size", default=PATCH))
    pixels = draft.normal(ROWS, 16, _channels(draft) * patch * patch)
    mask = torch.ones(ROWS, 16, dtype=torch.long)
    shapes = torch.tensor([[4, 4]] * ROWS)
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _placed_patches(draft: Draft) -> Media | None:
    """Patches (B, N, C*P*P) with their positions (B, N, 2)."""
    if not draft.accepts("image_position_ids"):
        return None
    patch = _one(draft.value("patch_size", default=PATCH))
    side = 2 * draft.value("pooling_kernel_size", default=2)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([columns.flatten(), rows.flatten()], dim=-1)
    pixels = draft.uniform(ROWS, side * side, _channels(draft) * patch * patch)
    return {"pixel_values": pixels, "image_position_ids": places.expand(ROWS, -1, -1).clone()}


def _pixels(draft: Draft) -> Media | None:
    """Images (B, C, H, W)."""
    if not draft.accepts("pixel_values") or draft.accepts("spatial_shapes"):
        return None
    height, width = _size(draft)
    batch: Media = {"pixel_values": draft.normal(ROWS, _channels(draft), height, width)}
    if draft.requires("image_sizes"):
        batch["image_sizes"] = torch.tensor([[height, width]] * ROWS)
    return batch


def _sized_pixels(draft: Draft) -> Media | None:
    """Images (B, C, H, W) and their sizes (B, 2)."""
    if not draft.accepts("image_sizes"):
        return None
    height, width = _size(draft)
    return {
        "pixel_values": draft.normal(ROWS, _channels(draft), height, width),
        "image_sizes": torch.tensor([[height, width]] * ROWS),
    }


def _tiles(draft: Draft) -> Media | None:
    """Tiles of every image (B, 2, C, H, W), and the sizes before cutting."""
    if not draft.accepts("pixel_values"):
        return None
    height, width = _size(draft)
    batch: Media = {"pixel_values": draft.normal(ROWS, 2, _channels(draft), height, width)}
    if draft.accepts("image_sizes"):
        batch["image_sizes"] = torch.tensor([[height, width]] * ROWS)
    return batch


def _tile(draft: Draft) -> Media | None:
    """One tile for every image (B, 1, C, H, W)."""
    tiles = _tiles(draft)
    return tiles and {**tiles, "pixel_values": tiles["pixel_values"][:, :1]}


def _marked_images(draft: Draft) -> Media | None:
    """Images (B, C, H, W), and the tokens (B, L) in whose place they are put."""
    images = _pixels(draft)
    if images is None or not draft.accepts("image_embeds_position_mask"):
        return None
    mask = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    mask[:, 1 : 1 + draft.value("latent_query_num", default=1)] = 1
    return {**images, "image_embeds_position_mask": mask}


def _seen_tiles(draft: Draft) -> Media | None:
    """Images of every sample (B, 2, C, H, W), and which of them each token sees (B, L, 2)."""
    if not draft.accepts("image_attention_mask"):
        return None
    tiles = _tiles(draft)
    return tiles and {**tiles, "image_attention_mask": torch.ones(ROWS, LENGTH, 2)}


def _frames(draft: Draft) -> Media | None:
    """A video (B, T, C, H, W) as ``pixel_values``."""
    if not draft.accepts("pixel_values"):
        return None
    count = draft.value("num_frames", "frames_per_clip", default=4)
    height, width = _size(draft)
    return {"pixel_values": draft.normal(ROWS, count, _channels(draft), height, width)}


def _videos(draft: Draft) -> Media | None:
    """A video (B, T, C, H, W) under a name of its own."""
    if not draft.requires("pixel_values_videos"):
        return None
    count = draft.value("num_frames", "frames_per_clip", default=4)
    height, width = _size(draft)
    return {"pixel_values_videos": draft.normal(ROWS, count, _channels(draft), height, width)}


def _flat_patches(draft: Draft) -> Media | None:
    """Patches with their row and column (B, N, 2 + P*P*C)."""
    if not draft.accepts("flattened_patches"):
        return None
    patch = _one(draft.value("patch_size", default=PATCH))
    places = torch.tensor([[1 + n // 4, 1 + n % 4] for n in range(16)]).expand(ROWS, -1, -1)
    values = draft.normal(ROWS, 16, patch * patch * _channels(draft))
    return {"flattened_patches": torch.cat([places.float(), values], dim=-1)}


def _wave(draft: Draft) -> Media | None:
    """A waveform (B, samples)."""
    if not draft.accepts("input_values"):
        return None
    stride = prod(draft.value("conv_stride", default=(160,)))
    return {"input_values": draft.normal(ROWS, stride * 24)}


def _channel_wave(draft: Draft) -> Media | None:
    """A waveform (B, 1, samples)."""
    wave = _wave(draft)
    return wave and {"input_values": wave["input_values"][:, None]}


def _mel(draft: Draft) -> int:
    return draft.value(
        "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "n_mels",
        "input_dim", "feature_size", "feat_dim", "num_mels", default=16,
    )  # fmt: skip


def _spectrogram(draft: Draft, name: str) -> Media | None:
    if not draft.accepts(name):
        return None
    frames = 2 * draft.value("max_source_positions", default=32)
    return {name: draft.normal(ROWS, _mel(draft), frames)}


def _mel_first(draft: Draft) -> Media | None:
    """A spectrogram (B, mels, T)."""
    return _spectrogram(draft, "input_features")


def _time_first(draft: Draft) -> Media | None:
    """A spectrogram (B, T, mels)."""
    found = _mel_first(draft)
    return found and {"input_features": found["input_features"].transpose(1, 2).contiguous()}


def _image_spectrogram(draft: Draft) -> Media | None:
    """A spectrogram (B, T, mels) under ``input_values``, or one with a channel (B, 1, T, mels)."""
    if not draft.accepts("input_values"):
        return None
    frames = draft.value("max_length", "spec_size", default=64)
    return {"input_values": draft.normal(ROWS, frames, _mel(draft))}


def _channel_spectrogram(draft: Draft) -> Media | None:
    """A spectrogram (B, 1, T, mels)."""
    found = _time_first(draft)
    return found and {"input_features": found["input_features"][:, None]}


def _series(draft: Draft) -> Media | None:
    """Time series (B, T, C)."""
    if not draft.accepts("past_values"):
        return None
    length = draft.value("context_length", default=32)
    return {"past_values": draft.normal(ROWS, length, draft.value("num_input_channels", default=1))}


def _flat_series(draft: Draft) -> Media | None:
    """One time series a sample (B, T)."""
    found = _series(draft)
    return found and {"past_values": found["past_values"][..., 0]}


def _regions(draft: Draft) -> Media | None:
    """Features (B, N, dim) and boxes (B, N, 4) of regions of an image."""
    if draft.accepts("visual_embeds"):
        features = draft.normal(ROWS, REGIONS, draft.config.visual_embedding_dim)
        return {"visual_embeds": features, "visual_attention_mask": torch.ones(ROWS, REGIONS)}
    if not draft.accepts("visual_feats"):
        return None
    return {
        "visual_feats": draft.normal(ROWS, REGIONS, draft.config.visual_feat_dim),
        "visual_pos": draft.uniform(ROWS, REGIONS, draft.config.visual_pos_dim),
    }


def _image_array(draft: Draft) -> Media | None:
    """Images under the name ``inputs``."""
    if not draft.accepts("inputs"):
        return None
    height, width = _size(draft)
    return {"inputs": draft.normal(ROWS, 3, height, width)}


_FORMS: tuple[Callable[[Draft], Media | None], ...] = (
    _regions, _series, _flat_series, _packed_images, _packed_patches, _padded_patches,
    _placed_patches, _flat_patches, _image_array, _videos, _marked_images, _pixels, _sized_pixels,
    _seen_tiles, _tiles, _tile,
    _frames, _mel_first, _time_first, _channel_spectrogram, _wave, _image_spectrogram,
    _channel_wave,
)  # fmt: skip


def mark_tokens(draft: Draft, batch: Media) -> Tensor:
    """Return the ids with as many image (audio, video) tokens as the media give features."""
    ids: Tensor = batch["input_ids"]
    for kind in ("image", "video", "audio"):
        token = draft.value(f"{kind}_token_id", f"{kind}_token_index")
        count = _num_features(draft, kind, batch)
        if token is not None and count:
            marks = torch.full((ROWS, count), token)
            ids = torch.cat([ids[:, :1], marks, ids[:, 1:]], dim=1)
    return ids


def kinds_of_tokens(draft: Draft, ids: Tensor) -> Tensor:
    """Return 0 for text, 1 for images and 2 for videos, (B, L)."""
    kinds = torch.zeros_like(ids)
    for number, kind in enumerate(("image", "video"), start=1):
        token = draft.value(f"{kind}_token_id", f"{kind}_token_index")
        if token is not None:
            kinds[ids == token] = number
    return kinds


def masks(draft: Draft, media: Media, axis: int = -1) -> Media:
    """Return the masks, all ones, of sound whose length the model counts.

    Args:
        draft: The batch in the making.
        media: The sound.
        axis: Of time in a spectrogram: 1, or -1 for the longest one.
    """
    name = next((n for n in ("input_features", "input_values") if n in media), None)
    if name is None:
        return {}
    values = media[name]
    length = values.shape[-1] if name == "input_values" else max(values.shape[1:])
    length = values.shape[1] if axis == 1 else length
    ones = torch.ones(ROWS, length, dtype=torch.long)
    accepted = ("attention_mask", f"{name}_mask", "padding_mask", "feature_attention_mask")
    return {mask: ones for mask in accepted if draft.accepts(mask)}


def _num_features(draft: Draft, kind: str, batch: Media) -> int:
    """Return the features that the model makes of the media of one sample; 0 when it makes none."""
    model: Any = draft.model
    owner = model if hasattr(model, f"get_{kind}_features") else getattr(model, "model", model)
    features = getattr(owner, f"get_{kind}_features", None)
    if features is None:
        return 0
    known = inspect.signature(features).parameters
    given = {name: value for name, value in batch.items() if name in known}
    given.pop("attention_mask", None)
    if not any(value.is_floating_point() for value in given.values()):
        return 0
    with torch.no_grad():
        found = features(**given)
    return sum(value[..., 0].numel() for value in _rows(found)) // ROWS


def _rows(found: Any) -> list[Tensor]:
    found = getattr(found, "pooler_output", found)
    if isinstance(found, Tensor):
        return [found]
    return [tensor for item in found for tensor in _rows(item)]
