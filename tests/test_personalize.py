"""Personalize: only the adapters learn, and without them the base draws as before."""

import pytest
import torch
from conftest import awake, briefly

from nanogen.image import personalize, text_image
from nanogen.lab.prepare import encode, encode_text
from nanogen.lab.train import train

SMALL = dict(widths=(16, 32), width=32, text_width=16, text_depth=1, think_width=32, think_depth=1,
             heads=2, size=8)


def tiny_personalize(**fields):
    """A model with its adapters at zero, and a base of its own."""
    torch.manual_seed(1)
    base = awake(text_image.TextImage(text_image.Config(**SMALL)))
    fields = dict(rank=2, priors=6, least=16, size=8) | fields
    return personalize.Personalize(personalize.Config(**fields), base)


def five_images():
    rng = torch.Generator().manual_seed(0)
    return {"images": torch.randint(256, (5, 3, 8, 8), generator=rng).byte(),
            "prompts": encode_text(["a zib on grass"] * 5)}


def draw(model):
    given = {"prompts": encode_text(["a zib", "a red dog"]), "sources": -torch.ones(2, 3, 8, 8)}
    return model.sample(given, steps=2, think=False)["images"]


def test_at_the_start_the_adapters_change_nothing_and_later_they_are_of_a_low_rank():
    plain, model = text_image.TextImage(text_image.Config(**SMALL)), tiny_personalize()
    plain.load_state_dict({name.replace("parametrizations.weight.original", "weight"): value
                           for name, value in model.base.state_dict().items()
                           if ".weight.0." not in name})
    assert torch.equal(draw(plain.eval()), draw(model))
    awake(model)
    assert (draw(plain) - draw(model)).abs().amax((1, 2, 3)).min() > 1e-3
    adapter = next(iter(model.adapters.values()))
    weight = torch.zeros(adapter.b.shape[0], adapter.a.shape[1])
    assert torch.linalg.matrix_rank(adapter(weight)) == 2


@pytest.mark.parametrize("prior_weight", [1.0, 0.0])
def test_training_changes_the_adapters_and_nothing_of_the_base(prior_weight):
    model = tiny_personalize(prior_weight=prior_weight)
    own = {name.partition(".")[0] for name, _ in model.named_parameters()}
    assert own == {"adapters"} == {name.partition(".")[0] for name in model.state_dict()} - {
        "progress"}
    before = {name: value.clone() for name, value in model.base.state_dict().items()}
    data = encode(model, five_images(), flip=False)
    assert {len(column) for column in data.values()} == {6}
    assert torch.equal(data["priors"], data["subject"]) == (prior_weight == 0)
    log = train(model, data, briefly(4, batch_size=3, optimizer="adamw", flip=False), quiet=True)
    assert ("prior" in log[-1]) == (prior_weight > 0)
    changed = {name for name, value in model.base.state_dict().items()
               if not torch.equal(value, before[name])}
    assert changed and all(".weight.0." in name for name in changed)


def test_the_name_of_an_image_is_its_prompt_if_it_names_the_subject_in_known_words():
    names = {"a zib on grass": "a zib on grass", "a zib on the moon": "a zib", "dog 1": "a zib",
             "IMG 0012": "a zib"}
    assert {name: personalize.known_prompt(name) for name in names} == names
