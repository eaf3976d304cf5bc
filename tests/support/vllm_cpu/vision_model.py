"""Make a tiny model that sees. Run by the vLLM environment's Python; imported only for IMAGE_TOKENS.

usage: python vision_model.py TEXT_MODEL DIRECTORY

Writes a BLIP-2's configuration, with a few narrow layers, and its processor to DIRECTORY, which is created if necessary; the
tokenizer is the text model's. There are no weights: serve it with ``--load-format dummy``, which makes some up, so what it
says is noise. Each image is IMAGE_TOKENS tokens of its prompt, whatever its size.

BLIP-2, since it is the simplest that vLLM imports without torchvision, which this environment has not.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

IMAGE_TOKENS = 8
_SIDE = 56  # pixels
_PATCH = 14


def make(source: Path, directory: Path) -> None:
    """Write the model to ``directory``, with the tokenizer of ``source``."""
    # Imported by name: this folder's checks run where the package is not installed.
    transformers: Any = importlib.import_module("transformers")

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(source))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    pictures = transformers.BlipImageProcessorPil(size={"height": _SIDE, "width": _SIDE})
    processor = transformers.Blip2Processor(
        image_processor=pictures, tokenizer=tokenizer, num_query_tokens=IMAGE_TOKENS
    )
    narrow = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 128}
    text = transformers.OPTConfig(
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=256,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=2048,
        vocab_size=image_token + 64 - image_token % 64,  # a round number above the last token
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**narrow, image_size=_SIDE, patch_size=_PATCH),
        qformer_config=transformers.Blip2QFormerConfig(**narrow, encoder_hidden_size=64, vocab_size=64),
        text_config=text,
        num_query_tokens=IMAGE_TOKENS,
        image_token_index=image_token,
    )
    config.architectures = ["Blip2ForConditionalGeneration"]

    directory.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(str(directory))
    config.save_pretrained(str(directory))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    make(Path(sys.argv[1]), Path(sys.argv[2]))
