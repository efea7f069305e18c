"""The image track: one file a method, read from top to bottom."""

from nanogen.method import check, check_numbers


def check_transformer(config) -> None:
    """ValueError by name for a number out of range, and for heads that are not of an even size."""
    check_numbers(config)
    even = config.width % (2 * config.heads) == 0
    check(config, heads=(even, f"such that width {config.width} / heads is an even number"),
          dropout=(getattr(config, "dropout", 0) < 1, "below 1"))
