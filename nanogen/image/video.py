"""Text to video: all frames of a short clip at once, from noise, by flow matching.

    "a red dog on grass moving left"  ->  8 frames of 32x32
    an image and a text               ->  a clip that begins with this image
    the last frames of a clip         ->  the frames after them, again and again: a longer clip

The network is that of image/text_image.py, and begins with its weights, which draw single images
already. Its convolutions and its attention see one frame at a time. What is new begins at zero:
attention over time, in which each position of a frame sees the same position in all other frames;
and input channels for known frames. In training, none, one, or several frames are known, at random;
the loss is that of the others. So one network does all three.

All frames show the same background. In the mean of the 8 frames it is the same, too, but the noise
is sqrt(8) times smaller. So a clip can be seen through more noise than an image, and the network
decides earlier what to draw. Training and sampler use earlier times, shifted by sqrt(8): see
`fm.shifted`.

    python -m nanogen train video --data clips
    python -m nanogen sample runs/video-clips --prompt "a blue ship on the sea moving right"
    python -m nanogen sample runs/video-clips --prompt "a dog moving left" --source first.png
    python -m nanogen sample runs/video-clips --length 24

Measured (2,400 steps of 8 clips, 62 minutes on one thread, float32; three sampling seeds, n = 80,
40, 40 held out; from text, then if two frames are given): the right thing in 99% of the frames, and
99%; the right direction in 99 to 100% of the clips, and 100%; at most half a pixel off a straight
line 82 to 89%, and 92 to 98%. The speed of two given frames is not kept: it is within 10% in 20 to
32% of the clips, where a guess gives 20%.

Sources: Ho et al. 2022, "Video Diffusion Models" (a U-Net with attention over space and time);
Singer et al. 2022, "Make-A-Video" (a network of images learns to move); Polyak et al. 2024, "Movie
Gen" (flow matching over all frames); Esser et al. 2024, "Stable Diffusion 3" (shifted times);
Brooks et al. 2024, "Sora" (known frames, to animate an image and to go on with a clip).
Different here: pixels instead of latents; a longer clip is drawn window by window.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks import flow_matching as fm
from nanogen.blocks.text import TextEncoder, to_texts
from nanogen.blocks.transformer import TimeEmbedding
from nanogen.blocks.unet import UNet, check_fit
from nanogen.data import prompts
from nanogen.image import no_text, to_tokens
from nanogen.method import Method, Requirement, check, check_numbers


@dataclass
class Config:
    widths: tuple[int, ...] = (64, 128, 128)  # channels at 1/2, 1/4, 1/8 of the size
    blocks: int = 1  # residual blocks per level
    attention_at: int = 2  # coarsest levels with self-attention; all attend to text and over time
    width: int = 256  # size of the vector of time and text that conditions the U-Net
    text_width: int = 128  # features of a token of the text
    text_depth: int = 2  # blocks of the text encoder
    heads: int = 4  # attention heads of the text encoder
    frames: int = 8  # of a clip
    text_dropout: float = 0.1  # fraction of training clips whose text is hidden, for guidance
    size: int = 32  # side of the images in pixels

    def __post_init__(self):
        check_numbers(self, attention_at=(self.attention_at >= 0, "at least 0"),
                      frames=(self.frames > 2, "at least 3"))
        check_fit(self.size, self.widths)
        check(self, text_width=(self.text_width % (2 * self.heads) == 0, "a multiple of 2 * heads"))


class Video(Method):
    """A velocity field for clips (B, T, 3, H, W), some frames of which may be known."""

    data, output = "videos", "videos"
    conditions = {"prompts": "text", "sources": "optional image"}
    columns = ("prompts",)
    times = staticmethod(partial(fm.logit_normal_times, mean=-2.0, std=1.5))  # -1 - log sqrt(8)

    def __init__(self, config: Config, base: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.encoder = TextEncoder(prompts.VOCABULARY, config.text_width, config.text_depth,
                                   config.heads)
        self.time = TimeEmbedding(config.width)
        self.summary = nn.Linear(config.text_width, config.width)
        self.network = UNet(3, config.widths, config.blocks, config.attention_at, config.width,
                            text=config.text_width, given=4, frames=config.frames)
        if base is not None:  # only training needs it
            known = {name: value for name, value in base.state_dict().items()
                     if not name.startswith("chain.")}
            first = known["network.inp.weight"]  # no channels say which frames are known
            known["network.inp.weight"] = F.pad(first, (0, 0) * 2 + (0, 4))  # 1 x 2 x 2, folded
            self.load_state_dict(self.state_dict() | known)

    @staticmethod
    def requires(config: Config) -> Requirement:
        same = ("widths", "blocks", "attention_at", "width", "text_width", "text_depth", "heads",
                "size")
        fields = {name: getattr(config, name) for name in same}
        return Requirement("text_image", fields, data="prompts", training_only=True)

    def velocity(self, x_t: Tensor, t: Tensor, tokens: Tensor, known: Tensor) -> Tensor:
        """x_t: (B, T, 3, H, W), t: (B,), tokens: (B, L), known: like x_t, NaN in frames that are to
        be drawn -> (B, T, 3, H, W). For guidance, the batch may be twice that of `known`."""
        features, seen, mean = self.encoder(tokens)
        known = known.repeat(len(x_t) // len(known), 1, 1, 1, 1)
        frames, is_known = self.config.frames, ~known[:, :, :1].isnan()
        x = torch.cat([x_t, known.nan_to_num(-1), is_known.to(x_t.dtype)], dim=2).flatten(0, 1)
        condition = (self.time(t) + self.summary(mean)).repeat_interleave(frames, dim=0)
        text = (part.repeat_interleave(frames, dim=0) for part in (features, seen))
        return self.network(x, condition, *text).unflatten(0, (-1, frames))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """Flow matching of "videos" (B, T, 3, H, W) from their "prompts" (B, L) and their first
        frames: of these none, one, or several are known, in a third of the clips each."""
        videos = batch["videos"]
        count, frames, device = len(videos), self.config.frames, videos.device
        tokens = to_tokens(to_texts(batch["prompts"]), device)
        hidden = torch.rand(count, 1, device=device) < self.config.text_dropout
        tokens = torch.where(hidden, no_text(tokens), tokens)
        several = torch.randint(2, frames, (count,), device=device)
        case = torch.randint(3, (count,), device=device)  # none, one, or several are known
        known_count = torch.where(case < 2, case, several)
        drawn = torch.arange(frames, device=device) >= known_count[:, None]  # (B, T)
        known = videos.masked_fill(drawn[..., None, None, None], torch.nan)
        noise, t = torch.randn_like(videos), self.times(count, device)
        x_t = torch.lerp(noise, videos, fm.expand(t, videos))
        error = (self.velocity(x_t, t, tokens, known).float() - (videos - noise)).square()
        each = (error.mean((2, 3, 4)) * drawn).sum(1) / drawn.sum(1)  # (B,)
        return each.mean(), {
            f"loss_{name}_known": each[case == i].sum() / (case == i).sum().clamp(min=1)
            for i, name in enumerate(("none", "one", "several"))}

    @torch.no_grad()
    def sample(self, conditions: dict[str, Tensor], *, steps: int = 20, method: str = "euler",
               guidance: float = 2.0, length: int = 0, overlap: int = 0,
               known: Tensor | None = None, seed: int = 0) -> dict:
        """Takes "prompts" (B, L), "sources" (B, 3, H, W), the first frames, black for none ->
        "videos" (B, T, 3, H, W) in [-1, 1]. length: T, that of training unless told; longer clips
        go on from their last `overlap` frames (0: half of those of training). known: first frames
        (B, K, 3, H, W) in place of sources. steps and method are those of the solver."""
        frames, sources = self.config.frames, conditions["sources"]
        length, overlap = length or frames, overlap or frames // 2
        if not 0 < overlap < frames:
            raise ValueError(f"overlap must be from 1 to {frames - 1}, got {overlap}")
        begun = (sources > -1).flatten(1).any(1)  # not black: there is a first frame
        if known is None and begun.any() != begun.all():
            raise ValueError("either all clips have a first frame or none")
        clip = known if known is not None else sources[:, None][:, : int(begun.any())]
        tokens = to_tokens(to_texts(conditions["prompts"]), sources.device)
        rng = torch.Generator(sources.device).manual_seed(seed)
        while clip.shape[1] < length:
            last = clip[:, -overlap:] if clip.shape[1] >= frames else clip[:, -(frames - 1):]
            given = F.pad(last, (0, 0) * 3 + (0, frames - last.shape[1]), value=torch.nan)
            field = fm.guide(partial(self.velocity, known=given), tokens, no_text(tokens), guidance)
            x0 = torch.randn(given.shape, generator=rng, device=rng.device)

            def pinned(x: Tensor, t: Tensor, field=field, given=given, x0=x0) -> Tensor:
                return torch.where(given.isnan(), field(x, t), given - x0)  # as known in training

            new = fm.solve(pinned, x0, steps, method, shift=frames**0.5).clamp(-1, 1)
            clip = torch.cat([clip, new[:, last.shape[1]:]], dim=1)
        return {"videos": clip[:, :length]}


Model = Video
