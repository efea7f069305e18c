"""Omni: text, image and sound in one sequence, one Transformer, and a small head for each.

    caption          image              sound
    a red dog ...    64 patches         50 frames        any of them may be hidden
        |               |                  |
        +---------- one Transformer, all see all ---------+
        |               |                  |
    softmax          flow head          flow head        draw what is hidden, a few at a time

A number is read, seen and heard: a caption, a drawing with a sign "7" (or of two to four things),
and a voice that says it. One network learns all six ways from one to another. Words are tokens of a
vocabulary, and a softmax gives their probabilities. Patches of pixels and latents of a codec are
vectors, and a flow head draws them (blocks/heads.py): time runs from t=0, noise, to t=1, data.

Each training example asks for one part. The tokens of this part have an order; the first few are
shown, the others are hidden, and the loss is on the hidden ones. Of the two other parts, both, one
or none are shown, each as a whole. The sampler asks for the same: it begins with nothing of the
part and draws the next tokens of the order in each pass, as MaskGIT and MAR do. Guidance compares
with a pass in which the other parts are hidden.

One language is never heard with an image in training, only with a text. Does its number still get
from a sound to an image, straight or by way of a text? The metrics say so.

    python -m nanogen train omni --data numbers
    python -m nanogen sample runs/omni-numbers --prompt "a red dog on grass with a sign that says 7"
    python -m nanogen sample runs/omni-numbers --voice seven.wav --ask image

Measured (1,200 steps of 32 examples, 45 minutes on one thread beside other programs; 100 held-out
combinations, by chance 0.1): it reads numbers, and does not yet draw or say the right ones. The
number is right in 0.71 of the captions of images and in 0.61 of those of sounds, but in 0.23 of the
images and 0.11 of the sounds of captions, and in 0.11 between images and sounds. In images, color
and background follow the caption, and the sign has a clear digit, mostly an 8 or a 9. It is 15 of
1,024 pixels, so it has little weight in the loss; other guidances and temperatures do not help.

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
from nanogen.data import numbers, utterances
from nanogen.data.drawing import SIZE
from nanogen.data.numbers import HIDDEN
from nanogen.data.voices import RATE
from nanogen.method import Method, Requirement, check, check_numbers, choose

PARTS = ("text", "image", "sound")
PATCH = 4  # pixels on a side of a patch
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
    alone: float = 0.7  # fraction of the examples of which only one of the two others is given
    nothing: float = 0.1  # fraction of which nothing is given, for guidance
    ordered: float = 0.8  # fraction whose tokens are hidden in the sampler's order; else at random
    separate: str = "spanish"  # the language that no image comes with; "": there is none
    size: int = SIZE  # side of the images in pixels

    def __post_init__(self):
        choose(self, head=("flow", "mse"), separate=("", *numbers.NAMES), parts=(
            "text+image+sound", "text+image", "text+sound", "image+sound"))
        check_numbers(self, nothing=(0 <= self.nothing <= 1 - self.alone, "from 0 to 1 - alone"),
                      ordered=(0 <= self.ordered <= 1, "from 0 to 1"))
        check(self, width=(self.width % (4 * self.heads) == 0, "a multiple of 4 * heads"),
              size=(self.size == SIZE, f"{SIZE}, the side of all scenes"))


class Omni(Method):
    """A Transformer over three parts, and a head for each of them."""

    encodes, samples_to_judge = True, 100
    conditions = {"prompts": "optional text", "sources": "optional image",
                  "voices": "optional sound"}
    columns = ("tokens", "clips", "language")
    adamw = True  # for `mask` and `part`: rows of tables

    def __init__(self, config: Config, base: nn.Module):
        super().__init__()
        self.freeze(codec=base)
        self.config, width, grid = config, config.width, config.size // PATCH
        self.grid, frames = grid, -(-round(numbers.SECONDS * RATE) // base.hop)
        self.counts = numbers.LONGEST, grid**2, frames  # tokens of each part
        self.samples = frames * base.hop  # of a sound
        dims = 3 * PATCH**2, base.config.dim
        self.patches, self.latents = map(Standardizer, dims)
        self.words = nn.Embedding(VOCABULARY, width)
        nn.init.normal_(self.words.weight, std=0.5)
        self.inputs = nn.ModuleList(nn.Linear(dim, width) for dim in dims)
        self.mask = nn.Parameter(0.2 * torch.randn(2, width))  # a hidden patch, a hidden frame
        # Neighbours are mixed before the Transformer, hidden or not.
        self.local = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1),
                                    nn.Conv1d(width, width, 3, padding=1)])
        self.part = nn.Parameter(0.2 * torch.randn(3, width))
        self.asked = nn.Embedding(3, width)  # which part is drawn: the condition of all layers
        self.transformer = Transformer(width, config.depth, config.heads)
        self.to_words = zeroed(nn.Linear(width, VOCABULARY), adamw=True)
        self.heads = nn.ModuleList(
            make_head(config.head, dim, width, config.head_width, config.head_depth,
                      config.head_repeat) for dim in dims)
        # Patches lie in a plane, words and frames on its diagonal; `part` tells them apart.
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
        clips = F.pad(clips, (0, self.samples - clips.shape[1]))
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
        square = self.patches.inverse(patches).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return F.pixel_shuffle(square, PATCH).clamp(-1, 1)

    # ---- the network
    def hidden_states(self, text: Tensor, image: Tensor, sound: Tensor, asked: Tensor) -> Tensor:
        """text: int64 (B, 14), HIDDEN where it is hidden; image, sound: standardized vectors, NaN
        where hidden; asked: int64 (B,), the part to draw -> (B, 128, width)."""
        rows = [self.words(text)]
        shapes = (self.grid, self.grid), (sound.shape[1],)
        for x, shape, embed, mask, local in zip((image, sound), shapes, self.inputs, self.mask,
                                                self.local, strict=True):
            h = torch.where(x[..., :1].isnan(), mask, embed(x.nan_to_num())).transpose(1, 2)
            rows.append((h + local(h.unflatten(2, shape)).flatten(2)).transpose(1, 2))
        rows = [row + part for row, part in zip(rows, self.part, strict=True)]
        return self.transformer(torch.cat(rows, dim=1), self.angles, condition=self.asked(asked))

    def choose_parts(self, language: Tensor) -> tuple[Tensor, Tensor]:
        """language: (B,) -> which part each example asks for, int64 (B,), equally often; and which
        it gives, bool (B, 3): one of the two others with the chance `alone`, none with the chance
        `nothing`, else both."""
        count, device, config = len(language), language.device, self.config
        parts = torch.tensor([PARTS.index(name) for name in config.parts.split("+")], device=device)
        asked = parts[torch.arange(count, device=device) * len(parts) // count]
        given = torch.zeros(count, 3, dtype=torch.bool, device=device)
        given[:, parts] = True
        given.scatter_(1, asked[:, None], False)
        chance, coin = torch.rand(2, count, device=device)
        if len(parts) == 3:
            left_out = (asked + 1 + (coin < 0.5).long()) % 3
            given &= ~(F.one_hot(left_out, 3).bool() & (chance < config.alone)[:, None])
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
        asked, given = self.choose_parts(batch["language"])
        count, device, seen, wanted = len(asked), asked.device, [], []
        for number, (part, ranks) in enumerate(zip(parts, self.ranks.split(self.counts),
                                                   strict=True)):
            # Of what is asked for, each number of tokens is shown equally often, but not all.
            at_random = torch.rand(part.shape[:2], device=device).argsort(1).argsort(1)
            ordered = torch.rand(count, 1, device=device) < self.config.ordered
            rank = torch.where(ordered, ranks, at_random)
            shown = (torch.rand(count, 1, device=device) * part.shape[1]).long()
            here = (asked == number)[:, None]
            hidden = torch.where(here, rank >= shown, ~given[:, number, None])
            seen.append(part.masked_fill(hidden, HIDDEN) if number == 0
                        else part.masked_fill(hidden[..., None], torch.nan))
            wanted.append(hidden & here)
        states = self.hidden_states(*seen, asked).split(self.counts, dim=1)
        losses = {}
        for number, name in enumerate(PARTS):
            x, z = parts[number][wanted[number]], states[number][wanted[number]]
            if len(x):  # a part that is not learned, or a batch of one or two, has none
                losses[name] = (F.cross_entropy(self.to_words(z).float(), x) if name == "text"
                                else self.heads[number - 1].loss(x, z))
        return sum(losses.values()), {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def sample(self, conditions: dict[str, Tensor], *, ask: str = "image", steps: int = 16,
               guidance: float = 3.0, temperature: float = 0.7, head_steps: int = 8,
               seed: int = 0) -> dict:
        """Takes "prompts" (B, L), captions, "sources" (B, 3, 32, 32), images, "voices" (B, T),
        sounds of which the first 0.8 s are heard; an empty text, a black image and silence are not
        given. ask: image, sound or text -> {"images"}, {"waveforms", "lengths"} or {"thoughts"},
        captions. steps: passes; a text takes one for each word. head_steps: of the flow head.
        temperature: of words and heads; below 1 less variety, and less noise."""
        if ask not in (learned := self.config.parts.split("+")):
            raise ValueError(f"ask must be one of {', '.join(learned)}, got {ask!r}")
        number, seen = PARTS.index(ask), self.read(conditions)
        for name, part in zip(PARTS, seen, strict=True):
            hidden = part == HIDDEN if name == "text" else part.isnan()
            if not hidden.all() and (name == ask or name not in learned):
                raise ValueError(f"{name} cannot be given: " + (
                    "it is asked for" if name == ask else "the network did not learn it"))
        count, batch, device = self.counts[number], len(seen[0]), seen[0].device
        rng = torch.Generator(device).manual_seed(seed)
        copies = 1 if guidance == 1 else 2  # in the second one, the other parts are hidden
        asked = torch.full((copies * batch,), number, device=device)
        nothing = [torch.full_like(seen[0], HIDDEN),
                   *(torch.full_like(part, torch.nan) for part in seen[1:])]
        nothing[number] = drawn = seen[number]  # one tensor, filled below
        order = self.ranks.split(self.counts)[number].argsort()
        before = 0
        for after in reveal_schedule(count, count if ask == "text" else min(steps, count)):
            inputs = [torch.cat(pair[:copies]) for pair in zip(seen, nothing, strict=True)]
            states = self.hidden_states(*inputs, asked).split(self.counts, dim=1)[number]
            now, before = order[before:after], after
            z = states[:, now]
            if ask == "text":
                logits = apply_guidance(self.to_words(z).float(), guidance)
                logits[..., HIDDEN] = -torch.inf
                drawn[:, now] = draw(logits, rng, temperature)
            else:
                z, *without = z.flatten(0, 1).chunk(copies)
                new = self.heads[number - 1].sample(z, head_steps, temperature, rng, *without,
                                                    guidance=guidance)
                drawn[:, now] = new.view(batch, len(now), -1).to(drawn)
        if ask == "text":
            return {"thoughts": [numbers.to_caption(row) for row in drawn.tolist()]}
        if ask == "image":
            return {"images": self.to_images(drawn)}
        sounds = self.codec.decode_latents(self.latents.inverse(drawn))
        return {"waveforms": sounds, "lengths": torch.full((batch,), sounds.shape[1])}

    def read(self, conditions: dict[str, Tensor]) -> list[Tensor]:
        """What is given -> text, image and sound as `hidden_states` takes them."""
        images = conditions["sources"]
        text = torch.full((len(images), self.counts[0]), HIDDEN, device=images.device)
        for row, caption in zip(text, to_texts(conditions["prompts"]), strict=True):
            if words := numbers.to_tokens(caption):
                row.fill_(numbers.END)
                row[: len(words)] = torch.tensor(words)
        image = self.patches(self.to_patches(images))
        image[(images == -1).flatten(1).all(1)] = torch.nan
        clips = images.new_zeros(len(images), self.samples)
        for row, clip in zip(clips, conditions["voices"], strict=True):
            if clip.any():  # training sounds begin at once
                clip = utterances.trimmed(clip.cpu().numpy())[: self.samples]
                row[: len(clip)] = torch.from_numpy(clip)
        sound = self.latents(self.codec.latents(clips).float())
        sound[~clips.any(1)] = torch.nan
        return [text, image, sound]


Model = Omni
