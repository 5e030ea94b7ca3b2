"""Small models that know a few texts by heart: one plain ones, one dialogues, one nothing."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from olmo_base.corpus.documents import DocumentSource
from olmo_base.model.hf_weights import export_hf
from olmo_base.model.transformer import ModelConfig, Transformer
from olmo_base.run.artefact import RunConfig
from olmo_base.tokenizer import (
    EOS_TOKEN,
    PAD_TOKEN,
    TokenizerRecipe,
    save_tokenizer,
    tokenizer_config,
    train_tokenizer,
)
from open_instruct.encode import ChatEncoder, load_chat_tokenizer


def save_knowing_models(
    root: Path,
    plain: Sequence[str],
    dialogues: Sequence[tuple[str, str]],
    *,
    vocab_size: int,
    context: int,
    steps: int,
    more: Callable[[Tokenizer], list[list[int]]] = lambda tokenizer: [],
) -> Path:
    """A folder with base (knows ``plain`` and the ids of ``more``), chat (``dialogues``), blank."""
    tokenizer = train_tokenizer(
        [*plain, *(text for pair in dialogues for text in pair)] * 3,
        TokenizerRecipe(
            stage="tokenizer",
            dataset_mixer=(DocumentSource("unused"),),
            run=RunConfig(output_dir="unused"),
            vocab_size=vocab_size,
        ),
    )
    config = tokenizer_config(eos_token=EOS_TOKEN, pad_token=PAD_TOKEN, model_max_length=context)
    save_tokenizer(tokenizer, root / "tokenizer", config)
    template = (Path(__file__).parents[2] / "chat_templates" / "tulu.jinja").read_text()
    encoder = ChatEncoder(load_chat_tokenizer(root / "tokenizer"), template)
    rows = [
        encoder.encode_dialogue(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ).ids
        for question, answer in dialogues
    ]
    base = [tokenizer.encode(text).ids for text in plain] + more(tokenizer)
    texts: dict[str, list[list[int]]] = {"base": base, "chat": rows, "blank": []}
    for name, ids in texts.items():
        model = trained(ids, vocab_size=vocab_size, context=context, steps=steps)
        export_hf(model, root / name, tokenizer_files=root / "tokenizer")
    (root / "chat" / "chat_template.jinja").write_text(template)
    return root


def trained(rows: list[list[int]], *, vocab_size: int, context: int, steps: int) -> Transformer:
    """A small model after enough steps on a few texts to say them by heart."""
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=context,
            eos_token_id=0,
            pad_token_id=1,
        )
    )
    if not rows:
        return model
    width = max(map(len, rows))
    ids_BT = torch.tensor([row + [1] * (width - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        logits = model.logits(model(ids_BT[:, :-1]))
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids_BT[:, 1:].flatten(), ignore_index=1
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
    return model
