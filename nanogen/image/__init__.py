"""The image track: one file a method, read from top to bottom."""

from dataclasses import fields

from nanogen.method import check


def check_numbers(config) -> None:
    """ValueError by name for an int field below 1 and for a float field below 0."""
    for field in fields(config):
        least, value = {int: 1, float: 0}.get(field.type), getattr(config, field.name)
        check(config, **{field.name: (least is None or value >= least, f"at least {least}")})


def check_transformer(config) -> None:
    """The same, and what a Transformer needs: heads of an even size, fractions up to 1."""
    check_numbers(config)
    even = config.width % (2 * config.heads) == 0
    check(config, heads=(even, f"such that width {config.width} / heads is an even number"),
          dropout=(getattr(config, "dropout", 0) < 1, "below 1"),
          label_dropout=(config.label_dropout <= 1, "at most 1"))
