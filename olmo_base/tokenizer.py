"""Train a byte-level BPE tokenizer on documents, and load one.

Every one of the 256 bytes is a token, so any text becomes ids and comes back unchanged. The folder
it is saved in is one that ``transformers.AutoTokenizer`` opens.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from olmo_base.corpus.documents import DocumentSource, DocumentStream, document_files
from olmo_base.run.artefact import RunConfig, RunFolder, atomic_write
from olmo_base.run.errors import Stopped, UserError
from olmo_base.run.launch import stop_signals
from olmo_base.run.metrics import Progress
from olmo_base.run.recipe import RecipeError, setting

EOS_TOKEN = "<|endoftext|>"  # ends every document, and so separates them
PAD_TOKEN = "<|pad|>"
# OLMo's own, and the marks of turns, which are control tokens here so that no text can spell them.
SPECIAL_TOKENS = (
    EOS_TOKEN,
    PAD_TOKEN,
    "<|im_start|>",
    "<|im_end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|endofprompt|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "|||PHONE_NUMBER|||",
    "|||EMAIL_ADDRESS|||",
    "|||IP_ADDRESS|||",
)
NUM_BYTES = 256
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class TokenizerRecipe:
    """What one tokenizer training chooses."""

    stage: Literal["tokenizer"]
    dataset_mixer: tuple[DocumentSource, ...]
    run: RunConfig = field(default_factory=RunConfig)
    vocab_size: int = setting(32_000, high=2**31 - 1)  # special tokens and the 256 bytes included
    min_frequency: int = setting(2, low=1)  # a pair seen less often is never merged
    split_digits: bool = True  # each digit its own token, so that numbers align for arithmetic
    extra_special_tokens: tuple[str, ...] = ()
    model_max_length: int = setting(4096, low=1)  # told to transformers; training does not use it

    def __post_init__(self) -> None:
        specials = special_tokens(self.extra_special_tokens)
        if len(set(specials)) != len(specials) or "" in specials:
            raise RecipeError(
                "extra_special_tokens", "each must be a text of its own, and none of the usual ones"
            )
        smallest = NUM_BYTES + len(specials)
        if self.vocab_size < smallest:
            raise RecipeError(
                "vocab_size",
                f"{self.vocab_size} is too small: {NUM_BYTES} bytes and {len(specials)} special "
                f"tokens already need {smallest}.",
            )
        if not self.dataset_mixer:
            raise RecipeError("dataset_mixer", "the list is empty; name at least one file.")


def special_tokens(extra: Sequence[str]) -> list[str]:
    """The special tokens of a tokenizer in the order of their ids."""
    return [*SPECIAL_TOKENS, *extra]


# ---------------------------------------------------------------- the tokenizer itself


def untrained_tokenizer(*, split_digits: bool) -> Tokenizer:
    """A byte-level BPE with GPT-2's word pattern and no merges yet."""
    tokenizer = Tokenizer(models.BPE())
    steps: list[pre_tokenizers.PreTokenizer] = []
    if split_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: Any, recipe: TokenizerRecipe) -> Tokenizer:
    """The tokenizer trained on an iterator of texts, which is walked through once.

    Special tokens have the ids 0, 1, 2, …; then come the 256 bytes, then the merges in the order
    they were learnt. The same texts give the same tokenizer.
    """
    tokenizer = untrained_tokenizer(split_digits=recipe.split_digits)
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        min_frequency=recipe.min_frequency,
        special_tokens=[
            AddedToken(token, special=True, normalized=False)
            for token in special_tokens(recipe.extra_special_tokens)
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def tokenizer_config(
    *,
    eos_token: str,
    pad_token: str,
    model_max_length: int,
    additional_special_tokens: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": eos_token,
        "pad_token": pad_token,
        "unk_token": None,
        "additional_special_tokens": list(additional_special_tokens),
        "clean_up_tokenization_spaces": False,
        # without token_type_ids, which Olmo2's generate() refuses
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": model_max_length,
        "padding_side": "right",
    }


def save_tokenizer(tokenizer: Tokenizer, folder: Path, config: dict[str, Any]) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    named = {key: config[key] for key in ("eos_token", "pad_token", "additional_special_tokens")}
    atomic_write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    atomic_write(folder / "tokenizer_config.json", _json(config))
    atomic_write(folder / "special_tokens_map.json", _json(named))


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def tokenizer_path(folder_or_json: str | Path) -> Path:
    """The tokenizer.json of a folder, or the file itself. Errors: UserError if there is none."""
    path = Path(folder_or_json)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{path} does not exist, so there is no tokenizer. Give the output_dir of a finished "
            "tokenizer run, or a model folder with a tokenizer.json."
        )
    return path


def load_tokenizer(folder_or_json: str | Path) -> Tokenizer:
    """A tokenizer from a folder or a tokenizer.json.

    It reads text that spells a special token as ordinary text: control tokens are put in by code,
    never by documents. Errors: UserError if there is none or it cannot be read.
    """
    path = tokenizer_path(folder_or_json)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path} is no tokenizers file: {error}.") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_token(path: Path, tokenizer: Tokenizer, wanted: str | None) -> tuple[str, int]:
    """The token that ends a document, and its id: ``wanted``, the tokenizer's own, or OLMo's.

    ``path`` is the tokenizer.json. Errors: UserError if the tokenizer has no such token.
    """
    config_path = path.with_name("tokenizer_config.json")
    configured = None
    if config_path.is_file():
        configured = json.loads(config_path.read_text(encoding="utf-8")).get("eos_token")
        if isinstance(configured, dict):  # an AddedToken written out
            configured = configured.get("content")
    token = str(wanted or configured or EOS_TOKEN)
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise UserError(
            f"{path} has no token {token!r} to end a document with. "
            "Name one of its tokens with eos_token."
        )
    return token, token_id


def tokenizer_files(folder_or_json: str | Path) -> list[Path]:
    """The tokenizer.json and what describes it beside it."""
    path = tokenizer_path(folder_or_json)
    return [file for name in TOKENIZER_FILES[1:] if (file := path.with_name(name)).is_file()] + [
        path
    ]


def write_tokenizer_files(
    folder_or_json: str | Path, tokenizer: Tokenizer, eos_token: str, target: Path
) -> None:
    """Copy a tokenizer's files, unchanged; one that comes alone gets a tokenizer_config.json."""
    files = tokenizer_files(folder_or_json)
    for file in files:
        name = "tokenizer.json" if file == files[-1] else file.name
        atomic_write(target / name, file.read_bytes())
    if not (target / "tokenizer_config.json").exists():
        has_pad = tokenizer.token_to_id(PAD_TOKEN) is not None
        config = tokenizer_config(
            eos_token=eos_token,
            pad_token=PAD_TOKEN if has_pad else eos_token,
            model_max_length=2**20,
        )
        atomic_write(target / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


# ---------------------------------------------------------------- the stage


def input_files(recipe: TokenizerRecipe) -> list[Path]:
    """The document files. Errors: UserError naming one that is missing."""
    return document_files(recipe.dataset_mixer)


def plan(recipe: TokenizerRecipe) -> dict[str, object]:
    """What a run would read, for --dry-run."""
    stream = DocumentStream(recipe.dataset_mixer)
    num_characters = sum(len(document.text) for document in stream)
    return {
        "documents": stream.counts.used,
        "characters": num_characters,
        "files": len(input_files(recipe)),
        "vocab_size": recipe.vocab_size,
    }


def run(recipe: TokenizerRecipe) -> RunFolder:
    """Train and save the tokenizer. It takes minutes at most, so a stopped run starts again."""
    folder = RunFolder.open(recipe, input_files(recipe))
    if folder.is_finished:
        return folder
    stream = DocumentStream(recipe.dataset_mixer, folder.counts)
    num_bytes = 0
    with (
        stop_signals() as flag,
        Progress(folder, "reading documents", stream.bytes_total, unit="bytes") as progress,
    ):

        def texts() -> Any:
            nonlocal num_bytes
            for document in stream:
                if flag.requested:
                    raise Stopped(flag.signal_number)
                num_bytes += len(document.text.encode("utf-8"))
                progress.update(stream.bytes_read, documents=folder.counts.used)
                yield document.text

        tokenizer = train_tokenizer(texts(), recipe)
        if flag.requested:
            raise Stopped(flag.signal_number)
    vocab_size = tokenizer.get_vocab_size()
    if vocab_size < recipe.vocab_size:
        folder.log(
            f"The text has pairs for {vocab_size:,} tokens only, not {recipe.vocab_size:,}: "
            f"no other pair occurs {recipe.min_frequency} times."
        )
    specials = special_tokens(recipe.extra_special_tokens)
    config = tokenizer_config(
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=recipe.model_max_length,
        additional_special_tokens=specials[2:],
    )
    save_tokenizer(tokenizer, folder.path, config)
    folder.log(f"tokenizer of {vocab_size:,} tokens from {folder.counts.used:,} documents")
    folder.finish(vocab_size=vocab_size, documents=folder.counts.used, text_bytes=num_bytes)
    return folder
