"""Convert the small model from GGUF to what vLLM loads. Run by the vLLM environment's Python, never imported.

usage: python convert_model.py SOURCE.gguf DIRECTORY

Writes ``model.safetensors`` (bfloat16), the configuration and the tokenizer to DIRECTORY, which is made if
necessary. Ends with a traceback and status 1 when the file cannot be read; the caller shows it.
"""

import importlib
import sys
from pathlib import Path
from typing import Any


def convert(source: Path, directory: Path) -> None:
    """Read the GGUF file ``source``, undo its 4-bit quantisation and write the model to ``directory``."""
    # Imported by name: this folder's checks run where neither package is installed.
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")

    where, file = str(source.parent), source.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=file).to(torch.bfloat16)

    # The weights are plain numbers by now, but the model still calls itself quantised and would not be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.__dict__.pop("quantization_config", None)
    if hasattr(model, "quantization_method"):
        del model.quantization_method

    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
