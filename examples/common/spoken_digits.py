"""Spoken digits from a small synthesiser: pulses and noise, shaped by the resonances of a mouth.

The speech is made as Fant's source-filter theory has it (Acoustic Theory of Speech Production,
1960): a voice of pulses and a hiss, each multiplied in short frames by what the mouth lets
through. Speakers differ in pitch, in the size of their mouth and in pace.

Axes: ``T`` frames, ``F`` frequencies, ``P`` phonemes, ``R`` resonances.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import numpy.typing as npt

RATE = 16000  # samples per second
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SPOKEN = ("z i r o u", "w a n", "t u", "h r i", "f o r", "f a i v", "s e k s", "s e v a n",
           "e i t", "n a i n")  # fmt: skip
# Seconds, strength of the voice, its three resonances (Hz), strength of the hiss, its middle (Hz).
_PHONEMES = {
    "i": (0.09, 1.0, (280, 2250, 2900), 0.0, 2000),
    "e": (0.09, 1.0, (530, 1850, 2500), 0.0, 2000),
    "a": (0.11, 1.0, (720, 1150, 2450), 0.0, 2000),
    "o": (0.10, 1.0, (550, 850, 2400), 0.0, 2000),
    "u": (0.10, 1.0, (300, 870, 2250), 0.0, 2000),
    "w": (0.05, 0.6, (300, 620, 2200), 0.0, 2000),
    "r": (0.06, 0.7, (320, 1100, 1450), 0.0, 2000),
    "n": (0.07, 0.5, (280, 1650, 2600), 0.0, 2000),
    "v": (0.05, 0.4, (280, 1100, 2300), 0.1, 2400),
    "z": (0.08, 0.3, (280, 1700, 2600), 0.4, 3600),
    "s": (0.10, 0.0, (280, 1700, 2600), 0.6, 3700),
    "f": (0.09, 0.0, (280, 1100, 2300), 0.2, 2200),
    "h": (0.08, 0.0, (280, 1400, 2600), 0.15, 3000),
    "t": (0.05, 0.0, (280, 1800, 2700), 0.3, 3200),
    "k": (0.05, 0.0, (280, 1300, 2200), 0.3, 1700),
    " ": (0.06, 0.0, (280, 1300, 2200), 0.0, 2000),
}
_FRAME, _HOP = 512, 128
_WIDTHS_R = np.array([90.0, 130.0, 180.0])


def speak(digits: Sequence[int], rng: Random) -> npt.NDArray[np.float32]:
    """Return digits as one speaker says them: samples within -1 and 1, ``RATE`` a second."""
    phonemes = [_PHONEMES[" "]]
    for digit in digits:
        phonemes += [*(_PHONEMES[p] for p in _SPOKEN[digit].split()), _PHONEMES[" "]]
    pace, mouth, pitch = rng.uniform(0.8, 1.25), rng.uniform(0.88, 1.15), rng.uniform(90, 220)
    lengths = np.array([p[0] * pace * rng.uniform(0.85, 1.15) for p in phonemes])
    middles = np.cumsum(lengths) - lengths / 2
    size = int(lengths.sum() * RATE) // _HOP * _HOP + _FRAME
    times_T = np.arange(0, size - _FRAME + 1, _HOP) / RATE

    def track(values: Sequence[float]) -> npt.NDArray[np.float64]:
        return np.interp(times_T, middles, values)

    resonances_TR = mouth * np.stack([track([p[2][r] for p in phonemes]) for r in range(3)], 1)
    hz_F = np.fft.rfftfreq(_FRAME, 1 / RATE)
    peaks_TRF = 1 / (1 + ((hz_F - resonances_TR[..., None]) / _WIDTHS_R[:, None]) ** 2)
    voice_TF = track([p[1] for p in phonemes])[:, None] * (peaks_TRF * [[1.0], [0.6], [0.3]]).sum(1)
    middle_T = track([p[4] for p in phonemes])
    hiss_TF = track([p[3] for p in phonemes])[:, None] * np.exp(
        -(((hz_F - middle_T[:, None]) / 700) ** 2)
    )
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal((2, size))
    falling = pitch * np.linspace(1.1, 0.9, size)
    pulses = np.diff(np.floor(np.cumsum(falling / RATE)), prepend=0.0) * np.sqrt(RATE / pitch)
    sound = np.zeros(size)
    window = np.hanning(_FRAME)
    for source, shape_TF in ((pulses, voice_TF), (noise[0], hiss_TF)):
        frames = np.lib.stride_tricks.sliding_window_view(source, _FRAME)[::_HOP] * window
        shaped = np.fft.irfft(np.fft.rfft(frames) * shape_TF, _FRAME) * window
        for frame, start in zip(shaped, range(0, size, _HOP), strict=False):
            sound[start : start + _FRAME] += frame
    sound += rng.uniform(0.002, 0.02) * noise[1]
    return (rng.uniform(0.3, 0.9) * sound / np.abs(sound).max()).astype(np.float32)
