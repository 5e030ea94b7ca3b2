"""Given texts that come back with how likely each of their tokens was: echo of /v1/completions.

Token ids -> one pass through the model, beside the engine -> a Token for each, and the next one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from olmo_base.model.generate import Generator
from olmo_base.model.transformer import Transformer
from open_instruct.chat.engine import NOT_FINITE
from open_instruct.chat.refusals import ApiError, wrong
from open_instruct.chat.token_text import Token

BLOCK_LOGITS = 2**24  # made to log-probabilities at once: 64 MiB in fp32


def refuse_unreadable(generator: Generator, prompts: Sequence[Sequence[int]]) -> None:
    """Errors: ApiError for a prompt that the model cannot read."""
    for prompt in prompts:
        if not prompt:
            raise wrong("prompt", "is empty; there is nothing to repeat.")
        for id_ in prompt:
            if not 0 <= id_ < generator.vocab_size:
                raise wrong(
                    "prompt",
                    f"holds the id {id_}, which is not one of the model's {generator.vocab_size} "
                    "tokens.",
                )


@torch.inference_mode()
def scored_tokens(
    generator: Generator, prompt: Sequence[int], num_alternatives: int, num_new: int
) -> list[Token]:
    """The tokens of a prompt, the first without a log-probability, then the likeliest next ones.

    ``num_new`` is 0 or 1. No hooks and no cache: the engine's thread runs the same model meanwhile.
    Errors: ApiError if the model is damaged.
    """
    model = generator.model
    ids_1T = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    if isinstance(model, Transformer):
        outputs_TX = model(ids_1T)[0]
    else:
        outputs_TX = model(input_ids=ids_1T, use_cache=False).logits[0]
    tokens = [Token(prompt[0])]
    height = max(1, BLOCK_LOGITS // generator.vocab_size)
    for first in range(0, len(prompt), height):
        block_TX = outputs_TX[first : first + height]
        logits_TV: Tensor = model.logits(block_TX) if isinstance(model, Transformer) else block_TX
        logp_TV = logits_TV.float().log_softmax(-1)
        if not logp_TV.isfinite().all():
            raise ApiError(500, NOT_FINITE, code="model_failed")
        top_Tk, ids_Tk = logp_TV.topk(max(1, num_alternatives), -1)
        next_ids = [*prompt[first + 1 : first + 1 + len(block_TX)]]
        if len(next_ids) < len(block_TX) and num_new:
            next_ids.append(int(ids_Tk[-1, 0]))
        for row, id_ in enumerate(next_ids):
            pairs = zip(ids_Tk[row].tolist(), top_Tk[row].tolist(), strict=True)
            alternatives = tuple(pairs)[:num_alternatives]
            tokens.append(Token(id_, logp_TV[row, id_].item(), alternatives))
    return tokens
