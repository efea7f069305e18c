"""Omni: text, image and sound in one sequence, one Transformer, and a small head for each.

    caption          image              sound
    a red dog ...    64 patches         50 frames        any of them may be hidden
        |               |                  |
        +---------- one Transformer, all see all ---------+
        |               |                  |
    softmax          flow head          flow head        draw what is hidden, a few at a time

A number is read, seen and heard: a caption, a drawing with a sign "7" (or so many things), and a
voice that says it. One network learns all six ways from one to another: text to image, image to
text, text to sound, sound to text, and image to sound and back. Words are tokens of a vocabulary,
and the head gives their probabilities. Patches of pixels, and the latents of a codec, are vectors,
and a flow head draws them (blocks/heads.py): time runs from t=0, noise, to t=1, data.

Training asks for one part of each example, of which the last tokens in some order are hidden; of
the two other parts both, one or none are given. Sampling asks for the same: it begins with all of
the part hidden and draws some tokens in each pass, as MaskGIT and MAR do. Guidance compares with
the case that nothing is given.

One language is never heard with an image in training, only with text. Does the number still get
from its sounds to an image, straight or by way of text? The metrics say so.

    python -m nanogen train omni --data numbers
    python -m nanogen sample runs/omni-numbers --prompt "a red dog on grass with a sign that says 7"
    python -m nanogen sample runs/omni-numbers --voice seven.wav --ask image

Sources: Mizrahi et al. 2023, "4M" (masks across all modalities); Li et al. 2024, "MAR" (a flow head
for vectors); Zhou et al. 2024, "Transfusion" (words and vectors in one Transformer); Chang et al.
2022, "MaskGIT". Different here: one part is asked for at a time; vectors, not codes, for image and
sound, each with its own head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogen.blocks.heads import make_head
from nanogen.blocks.sampling import apply_guidance, draw, halton_ranks, reveal_schedule
from nanogen.blocks.standardize import Standardizer
from nanogen.blocks.text import to_texts
from nanogen.blocks.transformer import Transformer, grid_positions, rotary_angles, zeroed
from nanogen.data import numbers
from nanogen.data.voices import RATE
from nanogen.method import Method, Requirement, check, check_numbers, choose

PARTS = ("text", "image", "sound")
PATCH = 4  # pixels on a side of a patch
HIDDEN = 1  # the token of a hidden word; 0: the end
VOCABULARY = len(numbers.WORDS) + 2


@dataclass
class Config:
    width: int = 256  # features of a token
    depth: int = 6  # blocks
    heads: int = 4  # attention heads
    head: str = "flow"  # of image and sound: flow, or mse, to compare
    head_width: int = 256  # features inside such a head
    head_depth: int = 2  # its layers
    head_repeat: int = 2  # noises for each token of a training batch
    parts: str = "text+image+sound"  # what is learned: two of them, to compare, or all three
    alone: float = 0.7  # fraction of the examples of which only one other part is given
    nothing: float = 0.1  # fraction of which nothing is given, for guidance
    ordered: float = 0.8  # fraction whose tokens are hidden in the sampler's order; else at random
    separate: str = "spanish"  # the language that no image comes with; "": there is none
    size: int = 32  # side of the images in pixels

    def __post_init__(self):
        choose(self, head=("flow", "mse"), separate=("", *numbers.NAMES), parts=(
            "text+image+sound", "text+image", "text+sound", "image+sound"))
        check_numbers(self, nothing=(self.alone + self.nothing <= 1, "at most 1 - alone"),
                      ordered=(self.ordered <= 1, "at most 1"))
        check(self, width=(self.width % (4 * self.heads) == 0, "a multiple of 4 * heads"),
              size=(self.size % PATCH == 0, f"a multiple of {PATCH}"))


class Omni(Method):
    """A Transformer over three parts, and a head for each of them."""

    encodes, samples_to_judge = True, 100
    conditions = {"prompts": "optional text", "sources": "optional image",
                  "voices": "optional sound"}
    columns = ("tokens", "clips", "language")

    def __init__(self, config: Config, base: nn.Module):
        super().__init__()
        self.freeze(codec=base)
        self.config, width, grid = config, config.width, config.size // PATCH
        self.frames = -(-round(numbers.SECONDS * RATE) // base.hop)
        self.counts = numbers.LONGEST, grid**2, self.frames  # tokens of each part
        dims = 3 * PATCH**2, base.config.dim
        self.patches, self.latents = map(Standardizer, dims)
        self.words = nn.Embedding(VOCABULARY, width)
        nn.init.normal_(self.words.weight, std=0.5)
        self.inputs = nn.ModuleList(nn.Linear(dim, width) for dim in dims)
        self.mask = nn.Parameter(0.2 * torch.randn(2, width))  # a hidden patch, a hidden frame
        self.local = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1),
                                    nn.Conv1d(width, width, 3, padding=1)])
        self.part = nn.Parameter(0.2 * torch.randn(3, width))
        self.asked = nn.Embedding(3, width)  # which part is drawn: the condition of all layers
        self.transformer = Transformer(width, config.depth, config.heads)
        self.to_words = zeroed(nn.Linear(width, VOCABULARY), adamw=True)
        self.draws = nn.ModuleList(
            make_head(config.head, dim, width, config.head_width, config.head_depth,
                      config.head_repeat) for dim in dims)
        chains = [torch.stack([torch.arange(count)] * 2, dim=1) for count in self.counts]
        places = torch.cat([chains[0], grid_positions(grid, grid), chains[2]])
        angles = rotary_angles(places, width // config.heads)
        self.register_buffer("angles", angles, persistent=False)
        # The order in which the sampler draws: words and frames from first to last.
        orders = torch.arange(self.counts[0]), halton_ranks(grid), torch.arange(self.counts[2])
        self.register_buffer("ranks", torch.cat(orders), persistent=False)

    @staticmethod
    def requires(config: Config) -> Requirement:
        return Requirement("codec", {}, data="all")

    # ---- examples <-> three lists of tokens
    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """-> "text" int64 (N, 14), "image" (N, 64, 48), "sound" float32 (N, 50, 32), "language"."""
        clips = batch["clips"].float() / 32768
        clips = F.pad(clips, (0, self.frames * self.codec.hop - clips.shape[1]))
        return {"text": batch["tokens"], "image": self.to_patches(batch["images"]),
                "sound": self.codec.latents(clips).float(), "language": batch["language"]}

    def measure(self, data: dict[str, Tensor]) -> None:
        self.patches.measure(data["image"])
        self.latents.measure(data["sound"])

    def to_patches(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, patches, 48)."""
        return F.pixel_unshuffle(images, PATCH).flatten(2).transpose(1, 2).contiguous()

    def to_images(self, patches: Tensor) -> Tensor:
        """The inverse, of standardized patches; in [-1, 1]."""
        square = self.patches.inverse(patches).transpose(1, 2)
        side = self.config.size // PATCH
        return F.pixel_shuffle(square.unflatten(2, (side, side)), PATCH).clamp(-1, 1)

    # ---- the network
    def hidden_states(self, text: Tensor, image: Tensor, sound: Tensor, asked: Tensor) -> Tensor:
        """text: int64 (B, 14), HIDDEN where it is hidden; image, sound: standardized vectors, NaN
        where hidden; asked: int64 (B,), the part to draw -> (B, 128, width)."""
        rows = [self.words(text)]
        for x, embed, mask, local in zip((image, sound), self.inputs, self.mask, self.local,
                                         strict=True):
            h = torch.where(x[..., :1].isnan(), mask, embed(x.nan_to_num())).transpose(1, 2)
            square = h.unflatten(2, (self.config.size // PATCH, -1)) if x is image else h
            rows.append((h + local(square).flatten(2)).transpose(1, 2))
        rows = [row + part for row, part in zip(rows, self.part, strict=True)]
        return self.transformer(torch.cat(rows, dim=1), self.angles, condition=self.asked(asked))

    def draw_parts(self, language: Tensor) -> tuple[Tensor, Tensor]:
        """language: (B,) -> which part each example asks for, int64 (B,), the same number of each;
        and which it gives, bool (B, 3)."""
        count, device, config = len(language), language.device, self.config
        parts = torch.tensor([PARTS.index(name) for name in config.parts.split("+")], device=device)
        asked = parts[torch.arange(count, device=device) * len(parts) // count]
        given = torch.zeros(count, 3, dtype=torch.bool, device=device)
        given[:, parts] = True
        given.scatter_(1, asked[:, None], False)
        chance, coin = torch.rand(2, count, device=device)
        if len(parts) == 3:  # one of the two others is left out
            other = (asked + 1 + (coin < 0.5).long()) % 3
            given &= ~(F.one_hot(other, 3).bool() & (chance < config.alone)[:, None])
        if config.separate:  # no image with sounds of this language: text takes the place of one
            there = given | F.one_hot(asked, 3).bool()
            clash = (language == numbers.NAMES.index(config.separate)) & there[:, 1] & there[:, 2]
            left_out = torch.where(asked == 0, 1 + (coin < 0.5).long(), 3 - asked)
            given &= ~(F.one_hot(left_out, 3).bool() & clash[:, None])
            given[:, 0] |= clash & (asked != 0) & ("text" in config.parts)
        return asked, given & (chance < 1 - config.nothing)[:, None]

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """The losses of the three heads, on hidden tokens of the part that is asked for."""
        parts = [batch["text"], self.patches(batch["image"]), self.latents(batch["sound"])]
        asked, given = self.draw_parts(batch["language"])
        count, device, seen, wanted = len(asked), asked.device, [], []
        for number, (part, ranks) in enumerate(zip(parts, self.ranks.split(self.counts),
                                                   strict=True)):
            # Of what is asked for, each number of tokens is hidden equally often.
            at_random = torch.rand(part.shape[:2], device=device).argsort(1).argsort(1)
            ordered = torch.rand(count, 1, device=device) < self.config.ordered
            rank = torch.where(ordered, ranks, at_random)
            left = (torch.rand(count, 1, device=device) * part.shape[1]).long()  # not hidden
            hidden = torch.where((asked == number)[:, None], rank >= left, ~given[:, number, None])
            seen.append(part.masked_fill(hidden, HIDDEN) if number == 0
                        else part.masked_fill(hidden[..., None], torch.nan))
            wanted.append(hidden & (asked == number)[:, None])
        states = self.hidden_states(*seen, asked).split(self.counts, dim=1)
        losses = {}
        if wanted[0].any():
            logits = self.to_words(states[0][wanted[0]]).float()
            losses["text"] = F.cross_entropy(logits, parts[0][wanted[0]])
        for number, head in enumerate(self.draws, start=1):
            if (here := wanted[number]).any():
                losses[PARTS[number]] = head.loss(parts[number][here], states[number][here])
        return sum(losses.values()), {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def sample(self, conditions: dict[str, Tensor], *, ask: str = "image", steps: int = 16,
               guidance: float = 2.0, temperature: float = 1.0, head_steps: int = 8,
               seed: int = 0) -> dict:
        """Takes "prompts" (B, L), captions, "sources" (B, 3, H, W), images, "voices" (B, T),
        sounds; an empty text, a black image and silence are not given. ask: image, sound or text
        -> {"images"}, {"waveforms", "lengths"} or {"thoughts"}, texts. steps: passes; head_steps:
        of the flow head; temperature: of words."""
        if ask not in PARTS:
            raise ValueError(f"ask must be one of {', '.join(PARTS)}, got {ask!r}")
        number, seen = PARTS.index(ask), self.read(conditions)
        count, device = self.counts[number], seen[0].device
        batch, rng = len(seen[0]), torch.Generator(device).manual_seed(seed)
        copies = 1 if guidance == 1 else 2  # the second one is given nothing
        asked = torch.full((copies * batch,), number, device=device)
        seen[number] = seen[number].fill_(HIDDEN if number == 0 else torch.nan)
        nothing = [torch.full_like(seen[0], HIDDEN),
                   *(torch.full_like(part, torch.nan) for part in seen[1:])]
        order = self.ranks.split(self.counts)[number].argsort().expand(batch, count)
        before = 0
        for after in reveal_schedule(count, count if ask == "text" else min(steps, count)):
            nothing[number] = seen[number]
            both = [torch.cat(pair[:copies]) for pair in zip(seen, nothing, strict=True)]
            states = self.hidden_states(*both, asked).split(self.counts, dim=1)[number]
            now = order[:, before:after]
            z = states.take_along_dim(now.repeat(copies, 1)[..., None], dim=1)
            if ask == "text":
                logits = apply_guidance(self.to_words(z).float(), guidance)
                logits[..., HIDDEN] = -torch.inf
                seen[0] = seen[0].scatter(1, now, draw(logits, rng, temperature))
            else:
                z, *without = z.flatten(0, 1).chunk(copies)
                new = self.draws[number - 1].sample(z, head_steps, 1.0, rng, *without,
                                                    guidance=guidance)
                new = new.view(batch, after - before, -1)
                seen[number] = seen[number].scatter(1, now[..., None].expand_as(new), new)
            before = after
        if ask == "text":
            return {"thoughts": [numbers.to_caption(row) for row in seen[0].tolist()]}
        if ask == "image":
            return {"images": self.to_images(seen[1])}
        sounds = self.codec.decode_latents(self.latents.inverse(seen[2]))
        return {"waveforms": sounds, "lengths": torch.full((batch,), sounds.shape[1])}

    def read(self, conditions: dict[str, Tensor]) -> list[Tensor]:
        """What is given -> text, image and sound as `hidden_states` takes them."""
        images, clips = conditions["sources"], conditions["voices"]
        text = torch.full((len(images), self.counts[0]), HIDDEN, device=images.device)
        for row, caption in zip(text, to_texts(conditions["prompts"]), strict=True):
            if caption:
                words = numbers.to_tokens(caption)[: len(row)]
                row.zero_()
                row[: len(words)] = torch.tensor(words)
        image = self.patches(self.to_patches(images))
        clips = F.pad(clips, (0, max(0, self.frames * self.codec.hop - clips.shape[1])))
        sound = self.latents(self.codec.latents(clips[:, : self.frames * self.codec.hop]).float())
        image[(images == -1).flatten(1).all(1)] = torch.nan
        sound[~clips.any(1)] = torch.nan
        return [text, image, sound]


Model = Omni
