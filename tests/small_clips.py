"""Small image-text models of the real libraries with random weights, saved to folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from safetensors.torch import save_file

WORDS = ("a", "photo", "picture", "of", "the", "cat", "dog", "owl", ".")
# pixels of a side
SIDE = 32


def hugging_face(folder: Path) -> Any:
    """Save a small CLIP model of transformers with a tokeniser of a few words; return it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    marks = {"<pad>": 0, "<start>": 1, "<end>": 2, "<unknown>": 3}
    words = marks | {word: number for number, word in enumerate(WORDS, start=len(marks))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unknown>",
    ).save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config=tower | ids | {"vocab_size": len(words), "max_position_embeddings": 16},
        vision_config=tower | {"num_hidden_layers": 4, "image_size": SIDE, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    # small random towers give embeddings that are all alike
    torch.nn.init.normal_(model.text_projection.weight)
    torch.nn.init.normal_(model.visual_projection.weight)
    model.save_pretrained(folder)
    return model


OPEN_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {
        **{"image_size": SIDE, "layers": 4, "width": 16},
        **{"head_width": 8, "patch_size": 8},
    },
    "text_cfg": {
        **{"context_length": 16, "vocab_size": 49408},
        **{"width": 16, "heads": 2, "layers": 2},
    },
}


def opened(folder: Path) -> Any:
    """Save a small model of OpenCLIP in its folder format; return it."""
    folder.mkdir(exist_ok=True)
    preprocess = {"mean": [0.5, 0.25, 0.5], "std": [0.5, 0.5, 0.25], "interpolation": "bilinear"}
    contents = {"model_cfg": OPEN_CLIP, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(contents))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return model
