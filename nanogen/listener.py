"""The listener: a judge that writes down the words of a recording and recognises its voice.

    spectrogram --convolutions--> a vector for each frame --> a word, or none        words
                                                          --> mean over the frames   voice

The training data need not say where a word begins or ends: the loss sums the probabilities of all
alignments of words and frames (CTC). A voice is a direction. The network learns to tell
the training speakers apart, and a recording of an unseen speaker gets a direction, too: recordings
with about the same one are of the same speaker.

    python -m nanogen train listener --data recordings

Sources: Graves et al. 2006, "Connectionist Temporal Classification"; Snyder et al. 2018,
"X-Vectors" (a vector for a voice); Wang et al. 2018, "CosFace" (the margin of the voices).
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.audio.spectral import log_mel
from nanogen.judge import vary_recording
from nanogen.method import Method, check_numbers

HOP = 128  # samples between two frames
MARGIN, SHARPNESS = 0.2, 20.0  # CosFace: by how much the right voice must win; factor of cosines


@dataclass
class Config:
    width: int = 160  # channels
    depth: int = 7  # residual blocks
    voice_width: int = 64  # size of a voice's vector
    words: int = 30  # number of different words: ten digits in three languages
    speakers: int = 406  # number of voices to learn from
    jitter: float = 0.7  # largest noise in training, added to the spectrogram, which has std 1
    seconds: float = 4.0  # longer recordings are cut when they are loaded

    def __post_init__(self):
        check_numbers(self, seconds=(self.seconds > 0, "more than 0"))


class Listener(Method):
    """Waveforms (B, T) -> logits of words for each frame, and a vector of the voice."""

    kind, data, conditions = "judge", "sounds", {}
    columns = ("words", "speakers")

    def __init__(self, config: Config, base=None):
        super().__init__()
        self.config, width = config, config.width
        self.standardize = nn.BatchNorm1d(64, affine=False)  # measures mean and std of the bands
        self.inp = nn.Conv1d(64, width, 5, padding=2)
        self.blocks = nn.ModuleList(Block(width, 2 ** (i % 4)) for i in range(config.depth))
        self.words = nn.Linear(width, config.words + 1)  # the last: the blank of CTC, no word
        self.voice = nn.Linear(width, config.voice_width + 1)  # the last: a frame's weight
        self.speakers = nn.Linear(config.voice_width, config.speakers, bias=False)
        for layer in (self.words, self.voice, self.speakers):
            layer.adamw = True

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) and (B,) samples -> a vector for each frame, (B, T / 128 + 1, width), and bool (B,
        T / 128 + 1), which frames are no padding. In eval mode, padding changes nothing."""
        x = self.standardize(log_mel(waveforms.float(), hop=HOP))
        if self.training:  # else a codec, which blurs and adds noise, would change the voice
            blur, level = torch.rand(2, len(x), 1, 1, device=x.device)
            around = F.avg_pool2d(x[:, None], 3, 1, padding=1, count_include_pad=False)[:, 0]
            x = torch.lerp(x, around, blur) + self.config.jitter * level * torch.randn_like(x)
        there = torch.arange(x.shape[2], device=x.device) <= lengths[:, None] // HOP
        h = self.inp(x * there[:, None])
        for block in self.blocks:
            h = block(h, there[:, None])
        return h.transpose(1, 2), there

    def voices(self, features: Tensor, counts: Tensor) -> Tensor:
        """Frames (B, F, width), of which bool (B, F) counts -> unit vectors (B, voice_width)."""
        vectors, weights = self.voice(features).float().split((self.config.voice_width, 1), dim=2)
        weights = weights.masked_fill(~counts[..., None], -torch.inf).softmax(dim=1)
        return F.normalize((weights * vectors).sum(1), dim=1)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: "waveforms" (B, T), "lengths" (B,), "words" (B, L), -1 after the last, "speakers"
        (B,). The voice is heard in a part of at least half a second."""
        features, there = self(vary_recording(batch["waveforms"]), batch["lengths"])
        words, frames = batch["words"], there.sum(1)
        logits = self.words(features).float().log_softmax(-1).transpose(0, 1)
        heard = F.ctc_loss(logits, words.clamp(min=0), frames, (words >= 0).sum(1),
                           blank=self.config.words)
        length = 32 + torch.rand(len(frames), device=frames.device) * (frames - 32).clamp(min=0)
        start = torch.rand(len(frames), device=frames.device) * (frames - length).clamp(min=0)
        index = torch.arange(features.shape[1], device=frames.device)
        counts = (index >= start[:, None].floor()) & (index < (start + length)[:, None])
        speakers = F.normalize(self.speakers.weight.float())
        cosines = self.voices(features, counts & there) @ speakers.T
        wanted = MARGIN * F.one_hot(batch["speakers"], self.config.speakers)
        voice = F.cross_entropy(SHARPNESS * (cosines - wanted), batch["speakers"])
        return heard + voice, {"words": heard.detach(), "voice": voice.detach()}

    @torch.no_grad()
    def listen(self, waveforms: Tensor, lengths: Tensor) -> tuple[list[list[int]], Tensor]:
        """Sounds (B, T) and their lengths (B,) -> the words of each by greedy decoding (the
        likeliest of each frame, without repetitions and blanks), and the voices (B, voice_width).
        In eval mode."""
        features, there = self(waveforms, lengths)
        best = self.words(features).argmax(-1).masked_fill(~there, self.config.words)
        found = [[word for word, before in zip(row, [-1, *row], strict=False)
                  if word not in (before, self.config.words)] for row in best.tolist()]
        return found, self.voices(features, there)


class Block(nn.Module):
    """A dilated convolution with a residual connection: (B, C, F), bool (B, 1, F), which frames are
    there -> (B, C, F)."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.near = nn.Conv1d(width, width, 5, padding=2 * dilation, dilation=dilation)
        self.mix = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        return x + self.mix(F.gelu(self.near(F.gelu(self.norm(x)) * there)))


def edits(said: list, heard: list) -> int:
    """The least number of words to insert, delete or replace (Levenshtein's distance)."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def equal_error_rate(same: np.ndarray, different: np.ndarray) -> float:
    """Similarities of pairs of one voice, and of pairs of two -> the error at the threshold where
    the fraction of the first below it equals the fraction of the second above it. 0: always told
    apart; 0.5: by chance; NaN without pairs of both kinds."""
    if not len(same) or not len(different):
        return float("nan")
    thresholds = np.concatenate([same, different])
    missed = np.searchsorted(np.sort(same), thresholds) / len(same)
    wrong = 1 - np.searchsorted(np.sort(different), thresholds) / len(different)
    at = np.abs(missed - wrong).argmin()
    return float((missed[at] + wrong[at]) / 2)


Model = Listener
