"""nanogen: how machines generate images and sound, from scratch, on one backbone and one training loop."""

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake that the person at the keyboard can mend, said in one sentence.

    The command line prints the sentence and stops; anything else is a bug and keeps its traceback.
    """
