"""Shapes of published models, so that a run can be planned before anything is downloaded."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from olmo_base.model.hf_weights import hf_config
from olmo_base.model.presets import PRESETS

# Name on the Hugging Face hub -> preset. Tuned models have the shape of what they were tuned from.
_OLMO = {
    "allenai/OLMo-7B-hf": "olmo_7b",
    "allenai/OLMo-7B-SFT-hf": "olmo_7b",
    "allenai/OLMo-2-0425-1B": "olmo2_1b",
    "allenai/OLMo-2-0425-1B-SFT": "olmo2_1b",
    "allenai/OLMo-2-1124-7B": "olmo2_7b",
    "allenai/OLMo-2-1124-7B-SFT": "olmo2_7b",
    "allenai/OLMo-2-1124-13B": "olmo2_13b",
    "allenai/OLMo-2-1124-13B-SFT": "olmo2_13b",
    "allenai/OLMo-2-0325-32B": "olmo2_32b",
    "allenai/OLMo-2-0325-32B-SFT": "olmo2_32b",
    "allenai/Olmo-3-7B-Think-SFT": "olmo3_7b_64k",
    "allenai/Olmo-3-7B-Instruct-SFT": "olmo3_7b_64k",
    "allenai/Olmo-3-32B-Think-SFT": "olmo3_32b_64k",
    "allenai/Olmo-3-32B-Instruct-SFT": "olmo3_32b_64k",
}
# hidden and inner width, layers, heads, key/value heads, vocabulary, positions; their config.json
_LLAMA = {
    "meta-llama/Llama-2-7b-hf": (4096, 11008, 32, 32, 32, 32_000, 4096),
    "allenai/tulu-2-7b": (4096, 11008, 32, 32, 32, 32_000, 8192),
    "meta-llama/Llama-2-13b-hf": (5120, 13824, 40, 40, 40, 32_000, 4096),
    "allenai/tulu-2-13b": (5120, 13824, 40, 40, 40, 32_000, 8192),
    "meta-llama/Llama-2-70b-hf": (8192, 28672, 80, 64, 8, 32_000, 4096),
    "allenai/tulu-2-70b": (8192, 28672, 80, 64, 8, 32_000, 8192),
    "meta-llama/Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128_256, 131_072),
    "allenai/Llama-3.1-Tulu-3-8B-SFT": (4096, 14336, 32, 32, 8, 128_264, 131_072),
    "meta-llama/Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128_256, 131_072),
    "allenai/Llama-3.1-Tulu-3-70B-SFT": (8192, 28672, 80, 64, 8, 128_264, 131_072),
}
KNOWN = (*_OLMO, *_LLAMA)


def recorded_config(name: str) -> Any | None:
    """The configuration of a published model that is not on this machine; None for all others."""
    if name not in KNOWN or Path(name).exists() or _is_downloaded(name):
        return None
    if name in _OLMO:
        content = hf_config(PRESETS[_OLMO[name]], torch.bfloat16)
        return AutoConfig.for_model(**content)
    hidden, inner, layers, heads, kv_heads, vocabulary, positions = _LLAMA[name]
    return AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
    )


def _is_downloaded(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache  # heavy, and only for models of the hub

    return isinstance(try_to_load_from_cache(name, "config.json"), str)
