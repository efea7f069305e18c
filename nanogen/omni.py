"""Omni: text, image and sound in one sequence, one Transformer, and a small head for each.

    caption        image          sound
    14 words       64 patches     25 spans       any of them may be hidden
        |              |              |
       first half of the Transformer: reads  ->  mean over all that is given
        |              |              |              |
       second half: draws; the mean conditions each of its layers
        |              |              |
    softmax        flow head      flow head      draw what is hidden, a few at a time

A number is read, seen and heard: a caption, a drawing with a sign "7" (or of two to four things),
and a voice that says it. A softmax gives the probabilities of words. Patches of pixels, and spans
of two latents of a codec, are vectors, and a flow head draws them (blocks/heads.py): time runs from
t=0, noise, to t=1, data. The number is a small thing, one word or a corner of an image. So the
first half of the layers reads; the mean of its states over what is given conditions the second.

In training, a sequence has two of the parts, or all three. One part is asked for: its tokens have
an order, the first few are shown, the others are hidden, and the loss is on the hidden ones. One in
five sequences has a random order, as in MAR. The other parts are given as a whole, or for guidance
not at all. The sampler asks for the same: it begins with nothing of the part and draws the next
tokens of the order in each pass. Spanish sounds are never in a sequence with an image.

    python -m nanogen train omni --data numbers
    python -m nanogen sample runs/omni-numbers --prompt "a red dog on grass with a sign that says 7"
    python -m nanogen sample runs/omni-numbers --voice seven.wav --ask image

Measured (3,000 steps of 96: 87 minutes on one thread beside other programs, about 37 on two free
ones by the speed of 150 steps; means of three sampling seeds, 100 held-out combinations each; by
chance 0.1): numbers right from image or sound to text 1.00 and 0.98, from text to image 0.93, to
sound 0.91, from sound to image 0.78, from image to sound 0.84. Spanish sounds, which training keeps
apart from images: straight 0.37, by way of a text 0.89.

Sources: Mizrahi et al. 2023, "4M" (masks across all modalities); Li et al. 2024, "MAR" (a flow head
for vectors); Zhou et al. 2024, "Transfusion" (words, vectors, one Transformer). Different here: one
part is asked for at a time; the summary; vectors, not codes, each kind with its own head.
"""

from dataclasses import dataclass
from itertools import combinations

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
from nanogen.data.phonemes import LANGUAGES
from nanogen.data.voices import RATE
from nanogen.method import Method, Requirement, check, check_numbers, choose

PARTS = ("text", "image", "sound")
TEXT, IMAGE, SOUND = range(3)
PATCH = 4  # pixels on a side of a patch
SPAN = 2  # frames of the codec in a token of sound
VOCABULARY = len(numbers.WORDS) + 2


@dataclass
class Config:
    width: int = 192  # features of a token
    depth: int = 2  # blocks that read, and as many that draw
    heads: int = 4  # attention heads
    head: str = "flow"  # of image and sound: flow, or mse, to compare
    head_width: int = 256  # features inside such a head
    head_depth: int = 2  # its layers
    head_repeat: int = 4  # noises for each token of a training batch
    parts: str = "text+image+sound"  # what is learned: two of them, to compare, or all three
    together: float = 0.1  # fraction of the sequences with all three; pairs share the rest
    nothing: float = 0.1  # fraction of the sequences of which nothing is given, for guidance
    ordered: float = 0.8  # fraction with the sampler's order of tokens; the others: at random
    separate: str = "spanish"  # the language that no image comes with; "": there is none
    size: int = SIZE  # side of the images in pixels, which the lab reads

    def __post_init__(self):
        choose(self, head=("flow", "mse"), separate=("", *LANGUAGES), parts=(
            "text+image+sound", "text+image", "text+sound", "image+sound"))
        check_numbers(self, together=(0 < self.together < 1, "between 0 and 1"),
                      nothing=(0 < self.nothing < 1, "between 0 and 1"),
                      ordered=(0 <= self.ordered <= 1, "from 0 to 1"))
        check(self, width=(self.width % (4 * self.heads) == 0, "a multiple of 4 * heads"),
              size=(self.size == SIZE, f"{SIZE}, the side of all scenes"))


class Omni(Method):
    """A Transformer over three parts, and a head for each of them."""

    encodes, samples_to_judge = True, 100
    conditions = {"prompts": "optional text", "sources": "optional image",
                  "voices": "optional sound"}
    columns = ("tokens", "clips", "language")
    adamw = True  # `mask` and `part` are looked up, not multiplied: no case for Muon

    def __init__(self, config: Config, base: nn.Module):
        super().__init__()
        self.freeze(codec=base)
        self.config, width, grid = config, config.width, config.size // PATCH
        self.grid, spans = grid, -(-round(numbers.SECONDS * RATE) // (SPAN * base.hop))
        self.counts = numbers.LONGEST, grid**2, spans  # tokens of each part
        self.samples = spans * SPAN * base.hop  # of a sound
        dims = 3 * PATCH**2, SPAN * base.config.dim
        self.patches, self.latents = Standardizer(dims[0]), Standardizer(base.config.dim)
        self.words = nn.Embedding(VOCABULARY, width)
        nn.init.normal_(self.words.weight, std=0.5)
        self.inputs = nn.ModuleList(nn.Linear(dim, width) for dim in dims)
        self.mask = nn.Parameter(0.2 * torch.randn(2, width))  # a hidden patch, a hidden span
        self.local = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1),  # mixes neighbours
                                    nn.Conv1d(width, width, 3, padding=1)])
        self.part = nn.Parameter(0.2 * torch.randn(3, width))
        self.asked = nn.Embedding(3, width)  # which part is drawn: a condition of all layers
        self.first, self.second = (Transformer(width, config.depth, config.heads) for _ in range(2))
        self.summary = nn.Linear(width, width)  # of what is given: a condition of the second half
        self.to_words = zeroed(nn.Linear(width, VOCABULARY), adamw=True)
        self.heads = nn.ModuleList(
            make_head(config.head, dim, width, config.head_width, config.head_depth,
                      config.head_repeat) for dim in dims)
        # Patches lie in a plane, words and spans on its diagonal; `part` tells them apart.
        words, _, chain = (torch.arange(count)[:, None].expand(-1, 2) for count in self.counts)
        positions = torch.cat([words, grid_positions(grid, grid), chain])
        angles = rotary_angles(positions, width // config.heads)
        self.register_buffer("angles", angles, persistent=False)
        orders = torch.arange(self.counts[0]), halton_ranks(grid), torch.arange(self.counts[2])
        self.register_buffer("ranks", torch.cat(orders), persistent=False)  # as the sampler draws

    @staticmethod
    def requires(config: Config) -> Requirement:
        return Requirement("codec", {}, data="all")

    # ---- examples <-> three lists of tokens
    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """-> "text" int64 (N, 14), "image" (N, 64, 48), "sound" float32 (N, 50, 32), "language"."""
        clips = F.pad(batch["clips"].float() / 32768, (0, self.samples - batch["clips"].shape[1]))
        return {"text": batch["tokens"], "image": self.to_patches(batch["images"]),
                "sound": self.codec.latents(clips).float(), "language": batch["language"]}

    def measure(self, data: dict[str, Tensor]) -> None:
        self.patches.measure(data["image"])
        self.latents.measure(data["sound"])

    def to_patches(self, images: Tensor) -> Tensor:
        """(B, 3, 32, 32) in [-1, 1] -> (B, 64, 48)."""
        return F.pixel_unshuffle(images, PATCH).flatten(2).transpose(1, 2).contiguous()

    def to_images(self, patches: Tensor) -> Tensor:
        """Standardized patches (B, 64, 48) -> images (B, 3, 32, 32) in [-1, 1]."""
        square = self.patches.inverse(patches).transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return F.pixel_shuffle(square, PATCH).clamp(-1, 1)

    def to_spans(self, latents: Tensor) -> Tensor:
        """Latents of the codec (B, 50, 32) -> standardized spans (B, 25, 64)."""
        return self.latents(latents).unflatten(1, (-1, SPAN)).flatten(2)

    # ---- the network
    def hidden_states(self, parts: dict[int, Tensor], asked: Tensor) -> dict[int, Tensor]:
        """parts: for each of the sequence its tokens. TEXT: int64 (B, 14), HIDDEN where hidden;
        IMAGE, SOUND: standardized (B, 64, 48) and (B, 25, 64), NaN where hidden. asked: int64 (B,),
        the part to draw -> for each part (B, its tokens, width)."""
        rows, given = [], []
        for part, tokens in parts.items():
            if part == TEXT:
                h = self.words(tokens)
            else:
                h = torch.where(is_hidden(tokens)[..., None], self.mask[part - 1],
                                self.inputs[part - 1](tokens.nan_to_num())).transpose(1, 2)
                shape = (self.grid, self.grid) if part == IMAGE else (tokens.shape[1],)
                h = (h + self.local[part - 1](h.unflatten(2, shape)).flatten(2)).transpose(1, 2)
            rows.append(h + self.part[part])
            given.append(~is_hidden(tokens) & (asked != part)[:, None])
        counts, angles = [h.shape[1] for h in rows], self.angles.split(self.counts)
        angles = torch.cat([angles[part] for part in parts])
        h = self.first(torch.cat(rows, dim=1), angles, condition=self.asked(asked))
        weight = torch.cat(given, dim=1)[..., None].to(h.dtype)
        mean = (h * weight).sum(1) / weight.sum(1).clamp(min=1)  # 0 if nothing is given
        h = self.second(h, angles, condition=self.asked(asked) + self.summary(mean))
        return dict(zip(parts, h.split(counts, dim=1), strict=True))

    def choose_parts(self, language: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
        """language: int64 (B,) of a shuffled batch -> the parts of some sequences, and the examples
        (N,) that they are made of."""
        learned = [part for part, name in enumerate(PARTS) if name in self.config.parts]
        subsets = [subset for size in (2, 3) for subset in combinations(learned, size)]
        fraction = (1 - self.config.together) / 3  # of each pair, if there are three
        ends = [round(len(language) * fraction * pair) for pair in range(1, len(subsets))]
        chosen, rows_of = [], torch.arange(len(language), device=language.device).tensor_split(ends)
        for subset, rows in zip(subsets, rows_of, strict=True):
            if self.config.separate and {IMAGE, SOUND} <= {*subset}:
                rows = rows[language[rows] != LANGUAGES.index(self.config.separate)]
            chosen += [(subset, rows)] if len(rows) else []
        return chosen

    def hide(self, part: int, count: int, asked: Tensor, given: Tensor) -> Tensor:
        """Which of the `count` tokens of a part are hidden, bool (B, count). asked, given: (B,)
        bool, whether the part is asked for, and whether it is given if it is not."""
        # 0 to count - 1 tokens are shown, most often few, as in the sampler's passes.
        at_random = torch.rand(len(asked), count, device=asked.device).argsort(1).argsort(1)
        ordered = torch.rand(len(asked), 1, device=asked.device) < self.config.ordered
        rank = torch.where(ordered, self.ranks.split(self.counts)[part], at_random)
        u = torch.rand(len(asked), 1, device=asked.device)
        shown = ((1 - torch.cos(torch.pi / 2 * u)) * count).long()
        return torch.where(asked[:, None], rank >= shown, ~given[:, None])

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """batch: as from `prepare` -> the sum of the three means, and each: of the cross-entropy of
        words and the losses of the flow heads, on hidden tokens of the part that is asked for."""
        whole = [batch["text"], self.patches(batch["image"]), self.to_spans(batch["sound"])]
        wanted, states = ([], [], []), ([], [], [])  # tokens of each part with a loss
        for subset, rows in self.choose_parts(batch["language"]):
            turn = torch.arange(len(rows)) + torch.randint(len(subset), ())
            asked = torch.tensor(subset)[turn % len(subset)].to(rows.device)
            given = torch.rand(len(rows), device=rows.device) >= self.config.nothing
            parts = {part: whole[part][rows] for part in subset}
            hidden = {part: self.hide(part, tokens.shape[1], asked == part, given)
                      for part, tokens in parts.items()}
            found = self.hidden_states({part: cover(tokens, hidden[part])
                                        for part, tokens in parts.items()}, asked)
            for part, tokens in parts.items():
                drawn = hidden[part] & (asked == part)[:, None]
                wanted[part].append(tokens[drawn])
                states[part].append(found[part][drawn])
        losses = {}
        for part, name in enumerate(PARTS):
            if sum(map(len, wanted[part])):  # small batches do not ask for all parts
                x, z = torch.cat(wanted[part]), torch.cat(states[part])
                losses[name] = (F.cross_entropy(self.to_words(z).float(), x) if part == TEXT
                                else self.heads[part - 1].loss(x, z))
        return (sum(losses.values(), 0 * self.mask.sum()),
                {name: value.detach() for name, value in losses.items()})

    @torch.no_grad()
    def sample(self, conditions: dict[str, Tensor], *, ask: str = "image", steps: int = 16,
               guidance: float = 2.0, temperature: float = 0.7, head_steps: int = 8,
               seed: int = 0) -> dict:
        """Takes "prompts" (B, L), captions; "sources" (B, 3, 32, 32), images in [-1, 1]; "voices"
        (B, T), sounds of which 0.8 s are heard, after the silence at the start. An empty text, a
        black image and silence are not given; all rows have the same parts. ask: image, sound or
        text -> {"images"} (B, 3, 32, 32), {"waveforms"} (B, 6400) and {"lengths"}, or
        {"thoughts"}, B captions. steps: passes, at most one for each token; a text has 14 in any
        case. head_steps: of the flow head. temperature: of words and heads; below 1 less variety,
        and less noise. ValueError for a part that was not learned, is given and asked for, or is
        given to some rows only."""
        if ask not in (learned := self.config.parts.split("+")):
            raise ValueError(f"ask must be one of {', '.join(learned)}, got {ask!r}")
        target, parts = PARTS.index(ask), self.read(conditions)
        given = {part: tokens for part, tokens in enumerate(parts) if not is_hidden(tokens).all()}
        for part, tokens in given.items():
            if is_hidden(tokens).all(1).any():
                raise ValueError(f"{PARTS[part]} must be given to all samples of a batch, or none")
            if part == target or PARTS[part] not in learned:
                raise ValueError(f"{PARTS[part]} cannot be given: " + (
                    "it is asked for" if part == target else "the network did not learn it"))
        other = next(part for part in range(3) if part != target and PARTS[part] in learned)
        given = given or {other: parts[other]}  # as in training: a second part, which is hidden
        count, drawn, device = self.counts[target], parts[target], parts[target].device
        rng = torch.Generator(device).manual_seed(seed)
        copies = 1 if guidance == 1 else 2  # in the second one, the other parts are hidden
        asked = torch.full((copies * len(drawn),), target, device=device)
        seen = {part: torch.cat([x, cover(x, True)][:copies]) for part, x in given.items()}
        order, before = self.ranks.split(self.counts)[target].argsort(), 0
        for after in reveal_schedule(count, count if ask == "text" else min(steps, count)):
            seen[target] = torch.cat([drawn] * copies)
            states = self.hidden_states({part: seen[part] for part in sorted(seen)}, asked)[target]
            now, before = order[before:after], after
            z = states[:, now]
            if ask == "text":
                logits = apply_guidance(self.to_words(z).float(), guidance)
                logits[..., HIDDEN] = -torch.inf
                drawn[:, now] = draw(logits, rng, temperature)
            else:
                z, *without = z.flatten(0, 1).chunk(copies)
                new = self.heads[target - 1].sample(z, head_steps, temperature, rng, *without,
                                                    guidance=guidance)
                drawn[:, now] = new.view(len(drawn), len(now), -1).to(drawn)
        if ask == "text":
            return {"thoughts": [numbers.to_caption(row) for row in drawn.tolist()]}
        if ask == "image":
            return {"images": self.to_images(drawn)}
        latents = drawn.unflatten(2, (SPAN, -1)).flatten(1, 2)
        sounds = self.codec.decode_latents(self.latents.inverse(latents))
        return {"waveforms": sounds, "lengths": torch.full((len(sounds),), sounds.shape[1])}

    def read(self, conditions: dict[str, Tensor]) -> list[Tensor]:
        """What is given -> text (B, 14), image (B, 64, 48) and sound (B, 25, 64), standardized;
        HIDDEN and NaN where nothing is given."""
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
                clip = clip[utterances.sounding(clip.cpu().numpy())[0] :][: self.samples]
                row[: len(clip)] = clip
        sound = self.to_spans(self.codec.latents(clips).float())
        sound[~clips.any(1)] = torch.nan
        return [text, image, sound]


def is_hidden(part: Tensor) -> Tensor:
    """Which tokens of a text (B, L), or vectors (B, L, D), are hidden: bool (B, L)."""
    return part == HIDDEN if part.ndim == 2 else part[..., 0].isnan()


def cover(part: Tensor, hidden: Tensor | bool) -> Tensor:
    """The part with these tokens hidden. hidden: bool (B, L), or True for all."""
    hidden = torch.as_tensor(hidden, device=part.device).expand(part.shape[:2])
    return part.masked_fill(hidden, HIDDEN) if part.ndim == 2 \
        else part.masked_fill(hidden[..., None], torch.nan)


Model = Omni
