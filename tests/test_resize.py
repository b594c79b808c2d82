"""The control that resizes pictures: grids, what a tower of fixed size sees, and a small LLaVA end to end."""

from __future__ import annotations

import pytest
import stand_in
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from adaptinfer import ScheduleError, UnsupportedError
from adaptinfer.errors import InputError
from adaptinfer.resize import Resize, grid_of

TEXT = "USER: <image>\nWhat colour is the star? ASSISTANT:"


@pytest.fixture(scope="module")
def checkpoint():
    path = stand_in.folder()
    return AutoModelForImageTextToText.from_pretrained(path, dtype="float32").eval(), AutoProcessor.from_pretrained(
        path
    )


def picture(width=512, height=512):
    noise = torch.randint(0, 255, (8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize((width, height))


@pytest.mark.parametrize(
    ("height", "width", "most", "expected"),
    [
        (336, 336, 64, (8, 8)),
        (336, 336, 128, (11, 11)),
        (480, 640, 48, (6, 8)),
        (100, 400, 16, (2, 8)),
        (5, 9, 1, (1, 1)),
    ],
)
def test_grids_by_hand(height, width, most, expected):
    assert grid_of(height, width, most) == expected


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 600))
def test_grids_stay_within_the_budget(height, width, most):
    rows, columns = grid_of(height, width, most)
    assert 1 <= rows * columns <= most


def test_a_tower_of_fixed_size_reads_fewer_tokens(checkpoint):
    model, processor = checkpoint
    image = model.config.image_token_id
    with torch.no_grad():
        vanilla = processor(text=TEXT, images=picture(), return_tensors="pt")
        expected = model(**vanilla).logits
        for budget, tokens in ((25, 25), (0.25, 64), (40, 36)):
            inputs = Resize(budget).inputs(processor, TEXT, [picture()])
            assert (inputs["input_ids"] == image).sum() == tokens
            with Resize(budget)(model):
                out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
                assert out.shape[1] == inputs["input_ids"].shape[1] + 2
            with pytest.raises(ValueError, match="doesn't match model"):
                model(**inputs)
        assert "forward" not in vars(model.base_model.vision_tower)
        with Resize(256)(model):  # interpolating to the same size changes nothing
            whole = Resize(256).inputs(processor, TEXT, [picture()])
            torch.testing.assert_close(model(**whole).logits, expected, atol=1e-3, rtol=0)


def test_budgets_are_shared_out_over_pictures(checkpoint):
    model, processor = checkpoint
    two = "USER: <image>\nand <image>\nWhat differs? ASSISTANT:"
    inputs = Resize(0.5).inputs(processor, two, [picture(), picture(300, 200)])
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 2 * 121  # 11 x 11 of 128
    assert inputs["pixel_values"].shape[-2:] == (132, 132)


def test_what_cannot_be_done_is_refused(checkpoint):
    _, processor = checkpoint
    two = "<image><image>"
    with pytest.raises(InputError, match="less than one vision token a picture"):
        Resize(1).inputs(processor, two, [picture(), picture()])
    with pytest.raises(ScheduleError, match="budget: 257 is more than the 256"):
        Resize(257).inputs(processor, TEXT, [picture()])

    class Fixed:  # a model whose pictures always yield as many tokens
        image_token, image_token_id = "<image>", processor.image_token_id
        image_processor, patch_size = processor.image_processor, 16

        def __call__(self, **_):
            return {"input_ids": torch.full((1, 64), self.image_token_id)}

    with pytest.raises(UnsupportedError, match="Fixed makes 64 vision tokens of pictures that hold 16 patches"):
        Resize(16).inputs(Fixed(), TEXT, [picture()])
