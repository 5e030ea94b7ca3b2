"""Tokenizers trained on the spot, shared by the tests of dialogues."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# Every control token that a template in chat_templates/ writes.
CHAT_TOKENS = (
    "<|endoftext|>",
    "<|pad|>",
    "<|bos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
TEXT = [
    "The quick brown fox says hello to the whole world.\n\nIs the assistant a user, or a system?",
    "What is two plus two? It is four. <|assistant|> <|user|> <|system|> || <> endoftext",
] * 4

TrainTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def train_tokenizer() -> TrainTokenizer:
    """Trains a small byte-level BPE: ``train_tokenizer(special_tokens, bos=True, vocab_size=...)``.

    With ``bos`` its post-processor adds <|bos|> to every text, as Llama's does.
    """

    def train(
        special_tokens: tuple[str, ...] = CHAT_TOKENS, *, bos: bool = False, vocab_size: int = 400
    ) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special_tokens),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(TEXT, trainer)
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
        names = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
        if bos:
            names["bos_token"] = "<|bos|>"
            backend.post_processor = processors.TemplateProcessing(
                single="<|bos|> $A", special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))]
            )
        return PreTrainedTokenizerFast(tokenizer_object=backend, **names)

    return train


@pytest.fixture(scope="session")
def chat_tokenizer(train_tokenizer: TrainTokenizer) -> PreTrainedTokenizerFast:
    """Knows every control token of chat_templates/, and has a bos of its own."""
    return train_tokenizer(bos=True)
