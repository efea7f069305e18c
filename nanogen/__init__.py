"""nanogen: how machines generate images and sound, from scratch, on one backbone and one loop.

    run = nanogen.load("runs/maskgit-cifar10")
    images = run.sample(16, label="horse", guidance=2.0)   # uint8 (16, 32, 32, 3)
"""

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake that the user can mend, said in one sentence. Any other exception is a bug."""


def load(folder):
    """A trained run from its folder, as a `nanogen.lab.runs.Run`. UserError if it is none."""
    from nanogen.lab.runs import load_run

    return load_run(folder)
