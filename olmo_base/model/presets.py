"""Named model shapes: the released OLMo-2 models and a ladder of small ones.

Counts of parameters in comments; a test checks those of the released models against the real ones.
"""

import dataclasses
from dataclasses import dataclass

from olmo_base.model.transformer import ModelConfig
from olmo_base.run.recipe import setting

# The dolma2 tokenizer has 100278 ids; the embedding is padded to a multiple of 128.
DOLMA2_VOCAB_SIZE = 100352
DOLMA2_EOS = 100257
DOLMA2_PAD = 100277


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


PRESETS: dict[str, ModelConfig] = {
    # For a CPU and a vocabulary of a few thousand; named after the parameters of their layers,
    # to which the embedding and the head add 2 * vocabulary * width.
    "olmo2_1m": _olmo2(128, 4, 4, 512, max_position_embeddings=1024),  # 1.05 M
    "olmo2_2m": _olmo2(192, 4, 6, 768, max_position_embeddings=1024),  # 2.36 M
    "olmo2_4m": _olmo2(256, 4, 4, 1024, max_position_embeddings=1024),  # 4.20 M
    "olmo2_8m": _olmo2(320, 5, 5, 1280, max_position_embeddings=1024),  # 8.20 M
    # The widths and depths that OLMo's own small experiments used; named after the parameters
    # with one embedding of 50304 rows.
    "olmo2_20m": _olmo2(256, 8, 8, 1024),
    "olmo2_60m": _olmo2(512, 8, 8, 2048),
    "olmo2_150m": _olmo2(768, 12, 12, 3072),
    "olmo2_300m": _olmo2(1024, 16, 16, 4096),
    "olmo2_700m": _olmo2(1536, 16, 16, 6144),
    # The released models (arXiv:2501.00656).
    "olmo2_1b": _olmo2(2048, 16, 16, 8192),  # 1,484,916,736: OLMo-2-0425-1B
    "olmo2_7b": _olmo2(4096, 32, 32, 11008),  # 7,298,617,344: OLMo-2-1124-7B
    "olmo2_13b": _olmo2(5120, 40, 40, 13824),  # 13,716,198,400: OLMo-2-1124-13B
    "olmo2_32b": _olmo2(5120, 64, 40, 27648, num_key_value_heads=8),  # 32,234,279,936: -0325-32B
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
