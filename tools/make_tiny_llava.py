"""Makes a LLaVA of random weights, as small as can be, with its processor: for trying the captions of `prepare` without a GPU.

    python tools/make_tiny_llava.py --out work/tiny_llava

It takes seconds. What it writes about pictures is noise, but it depends on picture and prompt, and the folder is an ordinary one of
transformers. The same seed makes the same weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
LETTERS = "abcdefghijklmnopqrstuvwxyz ,."
"""It answers in these only."""
EDGE, PATCH = 32, 8
"""Of the vision tower, in pixels."""
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; it is made")
    parser.add_argument("--seed", type=int, default=0, help="of its weights")
    options = parser.parse_args()
    make_tiny_llava(options.out, options.seed)


def make_tiny_llava(folder: Path, seed: int = 0) -> None:
    """Writes model, tokenizer, image processor and chat template into the folder."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(tokenizer)
    model.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": EDGE}, "crop_size": {"height": EDGE, "width": EDGE}}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(**sizes),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate((*SPECIAL, *letters))}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"], padding_side="left", model_max_length=4096,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Weights ten times as large as is usual, so that an answer depends on all of the prompt and on the picture."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=EDGE, patch_size=PATCH,
    )  # fmt: skip
    language = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=language, image_token_index=SPECIAL.index("<image>"),
            image_seq_length=(EDGE // PATCH) ** 2, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.normal_(std=0.2)
    readable = {tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in LETTERS}
    model.generation_config.suppress_tokens = sorted(set(range(len(tokenizer))) - readable - {tokenizer.eos_token_id})
    return model.eval()


if __name__ == "__main__":
    main()
