"""The image track: one file a method, read from top to bottom."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanogen.data import prompts
from nanogen.method import check, check_numbers


def check_transformer(config) -> None:
    """ValueError by name for a number out of range, and for heads that are not of an even size."""
    check_numbers(config)
    even = config.width % (2 * config.heads) == 0
    check(config, heads=(even, f"such that width {config.width} / heads is an even number"),
          dropout=(getattr(config, "dropout", 0) < 1, "below 1"))


def to_tokens(texts, device: torch.device) -> Tensor:
    """Texts -> their tokens after a start token, int64 (B, L), padded with 0. UserError for words
    that are not known."""
    rows = [torch.tensor([prompts.START, *prompts.tokenize(text)]) for text in texts]
    return pad_sequence(rows, batch_first=True).to(device)


def no_text(tokens: Tensor) -> Tensor:
    """Texts of which only the start token is left: for training and sampling with guidance."""
    return tokens * (torch.arange(tokens.shape[1], device=tokens.device) == 0)
