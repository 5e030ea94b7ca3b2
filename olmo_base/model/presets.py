"""Named model shapes: the OLMo models of all generations and a ladder of small ones.

Counts of parameters in comments; a test checks those of the full-size models against the real ones.
"""

import dataclasses
from dataclasses import dataclass

from olmo_base.model.rope import Yarn
from olmo_base.model.transformer import ModelConfig
from olmo_base.run.recipe import setting

# Tokenizers: OLMo-1's has 50280 ids, dolma2 100278; the embedding is padded to a multiple of 128.
OLMO1_VOCAB_SIZE = 50304
OLMO1_EOS = 50279
OLMO1_PAD = 1
DOLMA2_VOCAB_SIZE = 100352
DOLMA2_EOS = 100257
DOLMA2_PAD = 100277

OLMO3_WINDOW = 4096
# OLMo-3's extension from 8192 to 65536 tokens
OLMO3_YARN = Yarn(factor=8.0, original_max_position_embeddings=8192)


def _olmo1(
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    intermediate_size: int,  # half of the original configuration's, which counts gate and up
    *,
    num_key_value_heads: int | None = None,
    max_position_embeddings: int = 2048,
    clip_qkv: float | None = None,
    tie_word_embeddings: bool = False,
) -> ModelConfig:
    return ModelConfig(
        model_type="olmo",
        vocab_size=OLMO1_VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads or num_attention_heads,
        max_position_embeddings=max_position_embeddings,
        rope_theta=10_000.0,
        clip_qkv=clip_qkv,
        tie_word_embeddings=tie_word_embeddings,
        eos_token_id=OLMO1_EOS,
        pad_token_id=OLMO1_PAD,
    )


def _olmo2(
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    intermediate_size: int,
    *,
    num_key_value_heads: int | None = None,
    max_position_embeddings: int = 4096,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=DOLMA2_VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads or num_attention_heads,
        max_position_embeddings=max_position_embeddings,
        eos_token_id=DOLMA2_EOS,
        pad_token_id=DOLMA2_PAD,
    )


def _olmo3(
    olmo2: ModelConfig, *, max_position_embeddings: int = 8192, yarn: Yarn | None = None
) -> ModelConfig:
    """The same shape with windows."""
    return dataclasses.replace(
        olmo2,
        model_type="olmo3",
        max_position_embeddings=max_position_embeddings,
        sliding_window=OLMO3_WINDOW,
        rope_scaling=yarn,
    )


# Width, layers, heads and feed-forward of small models, for experiments. The first five are the
# widths and depths of the old trainer's tiny configurations, named after the parameters with one
# embedding of 50304 rows. The others are OLMo-core's, some of them the same shape again, named
# after the parameters without the embedding and with a head of 100352 rows.
LADDER = {
    "20m": (256, 8, 8, 1024),
    "60m": (512, 8, 8, 2048),
    "150m": (768, 12, 12, 3072),
    "300m": (1024, 16, 16, 4096),
    "700m": (1536, 16, 16, 6144),
    "190m": (768, 12, 12, 3072),
    "370m": (1024, 16, 16, 4096),
    "600m": (1344, 16, 16, 5376),
    "760m": (1536, 16, 16, 6144),
}

_OLMO2_7B = _olmo2(4096, 32, 32, 11008)
_OLMO2_32B = _olmo2(5120, 64, 40, 27648, num_key_value_heads=8)

PRESETS: dict[str, ModelConfig] = {
    # For a CPU and a vocabulary of a few thousand; named after the parameters of their layers,
    # to which the embedding and the head add 2 * vocabulary * width.
    "olmo2_1m": _olmo2(128, 4, 4, 512, max_position_embeddings=1024),  # 1.05 M
    "olmo2_2m": _olmo2(192, 4, 6, 768, max_position_embeddings=1024),  # 2.36 M
    "olmo2_4m": _olmo2(256, 4, 4, 1024, max_position_embeddings=1024),  # 4.20 M
    "olmo2_8m": _olmo2(320, 5, 5, 1280, max_position_embeddings=1024),  # 8.20 M
    **{f"olmo_{name}": _olmo1(*shape) for name, shape in LADDER.items()},
    **{f"olmo2_{name}": _olmo2(*shape) for name, shape in LADDER.items()},
    **{f"olmo3_{name}": _olmo3(_olmo2(*shape)) for name, shape in LADDER.items()},
    "olmo3_600m": _olmo3(_olmo2(1280, 16, 16, 5120)),  # OLMo-core's is narrower than its OLMo-2
    # OLMo-1 (arXiv:2402.00838); 65b and 70b were never released.
    "olmo_1b": _olmo1(2048, 16, 16, 8192, tie_word_embeddings=True),  # 1,176,764,416
    "olmo_1b_0724": _olmo1(  # 1,279,787,008
        2048, 16, 16, 8192, max_position_embeddings=4096, clip_qkv=8.0
    ),
    "olmo_7b": _olmo1(4096, 32, 32, 11008),  # 6,888,095,744
    "olmo_7b_0424": _olmo1(4096, 32, 32, 11008, max_position_embeddings=4096, clip_qkv=8.0),
    "olmo_7b_0724": _olmo1(4096, 32, 32, 11008, max_position_embeddings=4096, clip_qkv=8.0),
    "olmo_65b": _olmo1(8192, 80, 64, 22016),  # 65,584,234,496
    "olmo_70b": _olmo1(  # 69,275,222,016
        8192, 80, 64, 28672, num_key_value_heads=8, max_position_embeddings=4096, clip_qkv=8.0
    ),
    # OLMo-2 (arXiv:2501.00656)
    "olmo2_1b": _olmo2(2048, 16, 16, 8192),  # 1,484,916,736: OLMo-2-0425-1B
    "olmo2_7b": _OLMO2_7B,  # 7,298,617,344: OLMo-2-1124-7B
    "olmo2_13b": _olmo2(5120, 40, 40, 13824),  # 13,716,198,400: OLMo-2-1124-13B
    "olmo2_32b": _OLMO2_32B,  # 32,234,279,936: -0325-32B
    # OLMo-3, as pretrained, and as released after the extension to long texts
    "olmo3_7b": _olmo3(_OLMO2_7B),
    "olmo3_7b_64k": _olmo3(_OLMO2_7B, max_position_embeddings=65536, yarn=OLMO3_YARN),
    "olmo3_32b": _olmo3(_OLMO2_32B),
    "olmo3_32b_64k": _olmo3(_OLMO2_32B, max_position_embeddings=65536, yarn=OLMO3_YARN),
}


@dataclass(frozen=True)
class ModelShape:
    """The keys of a recipe that choose a shape: a preset, and what to change of it."""

    model: str = setting("olmo2_2m", choices=PRESETS, help="the named shape to start from")
    hidden_size: int | None = setting(None, low=1)
    intermediate_size: int | None = setting(None, low=1)
    num_hidden_layers: int | None = setting(None, low=1)
    num_attention_heads: int | None = setting(None, low=1)
    num_key_value_heads: int | None = setting(None, low=1, help="fewer than heads: GQA")
    max_position_embeddings: int | None = setting(None, low=1, help="longest row in tokens")
    rope_theta: float | None = setting(None, above=0)
    rms_norm_eps: float | None = setting(None, above=0)
    tie_word_embeddings: bool | None = setting(None, help="the head is the embedding")
    clip_qkv: float | None = setting(None, above=0, help="OLMo-1: cut queries, keys and values")
    sliding_window: int | None = setting(None, low=1, help="OLMo-3: tokens a windowed layer sees")

    def config(
        self,
        *,
        vocab_size: int,
        eos_token_id: int,
        pad_token_id: int,
        bos_token_id: int | None = None,
    ) -> ModelConfig:
        """The whole shape, for a tokenizer's vocabulary.

        Changing ``num_attention_heads`` alone gives every head its own keys and values.
        Errors: UserError if the numbers do not fit together.
        """
        changes = {
            field.name: value
            for field in dataclasses.fields(self)
            if field.name != "model" and (value := getattr(self, field.name)) is not None
        }
        if "num_attention_heads" in changes:
            changes.setdefault("num_key_value_heads", changes["num_attention_heads"])
        return dataclasses.replace(
            PRESETS[self.model],
            vocab_size=vocab_size,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            **changes,
        )


def padded_vocab_size(num_ids: int, multiple: int = 128) -> int:
    """Rows of the embedding for a tokenizer of ``num_ids``: rounded up, which matmuls prefer."""
    return -(-num_ids // multiple) * multiple
