"""The untrained model, its tokenizer and its processor."""

from __future__ import annotations

import math
from typing import Any

import torch
from config import Config
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from adaptinfer.embedded.world.questions import VOCABULARY

# transformers declares less about these than it knows.
Model = Any  # a LlavaForConditionalGeneration
Words = Any  # a PreTrainedTokenizerFast

USER, ASSISTANT, IMAGE, BEGIN, END, PAD, UNKNOWN = "USER:", "ASSISTANT:", "<image>", "<s>", "</s>", "<pad>", "<unk>"
MEAN, DEVIATION = 0.5, 0.25  # of the pixels, 0 to 1

# As LLaVA-1.5's, and plain strings are taken as content too. Whitespace is nothing to the tokenizer.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'USER: ' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' }}"
    "{%- else -%}{{ raise_exception('the embedded model knows the roles user and assistant only') }}{%- endif -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\n' }}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)


def build_tokenizer() -> Words:
    """A fast word-level tokenizer over the world's vocabulary: lower case, commas apart.

    A question is the same with and without a mark at its end; no scene's question has one, so none is learnt.
    """
    words = {word.lower() for word in VOCABULARY} | {"?", ".", ",", "!"}
    special = [PAD, UNKNOWN, BEGIN, END, IMAGE, USER, ASSISTANT]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *sorted(words)])}, UNKNOWN))
    unmarked = normalizers.Replace(Regex(r"[?.!]"), " ")
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), unmarked])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[^\w\s]"), "isolated")]
    )
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # spaces between words, none before punctuation
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    core.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, core.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokenizer: Words, config: Config) -> LlavaProcessor:
    """Pictures of any size become ``config.side`` pixels a side and ``config.tokens`` ``<image>`` tokens."""
    size = {"height": config.side, "width": config.side}
    image_processor = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=[MEAN] * 3, image_std=[DEVIATION] * 3
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=config.patch,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_model(tokenizer: Words, config: Config) -> Model:
    """The untrained model, float32."""
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    special["eos_token_id"] = tokenizer.eos_token_id
    width, layers, heads = config.tower
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=config.side,
        patch_size=config.patch,
        projection_dim=width,
    )
    width, mlp, layers, heads = config.decoder
    text = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 16) * 16,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        **special,
    )
    model: Model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=config.tokens,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():  # words must stand out of the sum of what many untrained layers add to them
        model.get_input_embeddings().weight.mul_(5)
        for layer in model.model.language_model.layers:
            for added in (layer.self_attn.o_proj, layer.mlp.down_proj):
                added.weight.mul_((2 * text.num_hidden_layers) ** -0.5)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=32, **special)
    return model
