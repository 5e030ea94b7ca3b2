"""Pretraining: token shards become a base model, a Hugging Face model folder.

The shards are cut into sequences (corpus/batches.py); each optimizer step sums the loss of its
micro-batches and divides once, by all tokens asked for. One process; a stopped run goes on with
the same sequences, rates and optimizer state, bit for bit on a CPU.
"""

# B sequences of a micro-batch, T positions, D width

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from olmo_base.corpus.batches import (
    Batch,
    Mixture,
    TokenSequences,
    micro_batches,
    read_split,
    refuse_other_tokenizers,
    shares_of,
    split_folder,
)
from olmo_base.corpus.foreign_shards import foreign_files, read_foreign_shards
from olmo_base.corpus.shards import Place, Shard
from olmo_base.losses import MAX_LOGITS, next_token_loss
from olmo_base.model.hf_weights import (
    copy_tokenizer,
    export_hf,
    load_native,
    read_model_config,
)
from olmo_base.model.presets import ModelShape, padded_vocab_size
from olmo_base.model.transformer import (
    GENERATIONS,
    ModelConfig,
    Transformer,
    flops_per_token,
    num_parameters,
)
from olmo_base.optim import (
    OptimConfig,
    Schedule,
    StepGuard,
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    set_learning_rate,
)
from olmo_base.run.artefact import (
    RunConfig,
    RunFolder,
    atomic_write,
    model_files,
    sha256_file,
)
from olmo_base.run.errors import Stopped, UserError
from olmo_base.run.launch import StopFlag, pick_device, seed_everything, stop_signals
from olmo_base.run.metrics import LogConfig, MetricsLog, Progress
from olmo_base.run.recipe import RecipeError, setting
from olmo_base.run.resume import (
    CheckpointConfig,
    latest_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from olmo_base.tokenizer import load_tokenizer, tokenizer_path, write_tokenizer_files

PROCESS_BYTES = 320_000_000  # Python with torch, before any tensor
# Dense bf16 peak in FLOP/s, found by the first part of a name that matches.
GPU_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


@dataclass(frozen=True)
class TokenSource:
    """One item of a ``dataset_mixer`` of tokens: the output_dir of a tokenize run.

    Or a .npy file of dolma's, a .ds file of datatrove's, or a folder of them; they do not say
    their tokenizer, so the recipe must.
    """

    path: str
    ratio: float | None = setting(None, above=0)  # its part of the run; of all items, or of none
    max_repeats: float = setting(1.0, above=0)  # with a ratio: how often it may be read
    tokenizer_name_or_path: str | None = None  # this and the next two: of .npy and .ds files
    eos_token: str | None = None  # None: what the tokenizer's own configuration says
    dtype: Literal["uint16", "uint32"] | None = None  # None: the smallest that holds its ids


@dataclass(frozen=True)
class PretrainOptim(OptimConfig):
    """The optimizer of OLMo-2's pretraining (arXiv:2501.00656, table 1 and section 3.2)."""

    learning_rate: float = setting(4e-4, above=0)
    lr_scheduler_type: Schedule = "cosine"
    min_lr_ratio: float = setting(0.1, low=0, high=1)
    weight_decay: float = setting(0.1, low=0)
    decay_norms: bool = True
    adam_beta2: float = setting(0.95, low=0, below=1)
    skip_spike_sigma: float = setting(0.0, low=0)  # 6 in OLMo-2's runs; 0 skips no finite step
    max_skipped_steps: int = setting(10, low=1)  # in a row; more stop the run


@dataclass(frozen=True)
class PretrainRecipe:
    """What one pretraining run chooses."""

    stage: Literal["pretrain"]
    dataset_mixer: tuple[TokenSource, ...]
    run: RunConfig = field(default_factory=RunConfig)
    init_from: str | None = None  # a model folder to go on from: annealing, or a new mix
    shape: ModelShape = field(default_factory=ModelShape)
    pad_vocab_to_multiple_of: int = setting(128, low=1)
    max_length: int = setting(1024, low=1)  # tokens of a sequence
    mask_documents: bool = False  # a token sees its own document only
    max_ngram_repeats: int = setting(0, low=0)  # leave out sequences with as many: 32 in OLMo-2
    per_device_train_batch_size: int = setting(8, low=1)  # sequences of a micro-batch
    gradient_accumulation_steps: int = setting(1, low=1)
    num_train_epochs: float = setting(1.0, above=0)
    max_steps: int = setting(-1, low=-1)  # above 0: instead of num_train_epochs
    max_tokens: int = setting(-1, low=-1)  # above 0: instead of num_train_epochs
    optim: PretrainOptim = field(default_factory=PretrainOptim)
    z_loss: float = setting(0.0, low=0)  # OLMo-2 used 1e-5
    bf16: bool | Literal["auto"] = "auto"
    gradient_checkpointing: bool = setting(False, changes_result=False)
    per_device_eval_batch_size: int = setting(8, low=1, changes_result=False)
    eval_steps: int = setting(0, low=0, changes_result=False)  # 0: at the start and the end only
    max_eval_tokens: int = setting(200_000, low=1)  # held-out tokens looked at each time
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if not self.dataset_mixer:
            raise RecipeError("dataset_mixer", "the list is empty; name a tokenize run's folder.")
        with_ratio = [source for source in self.dataset_mixer if source.ratio is not None]
        if with_ratio and len(with_ratio) < len(self.dataset_mixer):
            raise RecipeError("dataset_mixer", "give every item a ratio, or none.")
        if with_ratio and self.max_steps <= 0 and self.max_tokens <= 0:
            raise RecipeError(
                "dataset_mixer", "ratios need max_tokens or max_steps to be parts of."
            )
        for source in self.dataset_mixer:
            if source.ratio is None and source.max_repeats != 1.0:
                raise RecipeError("dataset_mixer", f"{source.path}: max_repeats needs a ratio.")
        if self.max_steps > 0 and self.max_tokens > 0:
            raise RecipeError("max_tokens", "max_steps already says how long; keep one of them.")
        if self.init_from is not None and self.shape != ModelShape():
            given = next(
                item.name
                for item in dataclasses.fields(ModelShape)
                if getattr(self.shape, item.name) != getattr(ModelShape(), item.name)
            )
            raise RecipeError(given, "the shape is that of init_from; leave this key out.")
        longest = self.shape.max_position_embeddings
        if longest is not None and longest < self.max_length:
            raise RecipeError(
                "max_position_embeddings",
                f"{longest} is less than max_length {self.max_length}.",
            )

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


# ---------------------------------------------------------------- what the recipe means


@dataclass(frozen=True)
class Corpus:
    """The token shards of a recipe as sequences, and the tokenizer they were made with."""

    train: TokenSequences | Mixture
    held_out: TokenSequences | None
    tokenizer: Path  # its folder, or the tokenizer.json


def shards_of_source(source: TokenSource, split: str) -> list[Shard]:
    """The shards of a split of one source; .npy and .ds files are all to learn from.

    Errors: UserError if there are none, or the source's keys do not go with what it holds.
    """
    is_tokenized = split_folder(source.path, "train").is_dir()
    if not is_tokenized and foreign_files(source.path):
        if source.tokenizer_name_or_path is None:
            raise UserError(
                f"{source.path} does not say which tokenizer its ids are for. Name it with "
                "tokenizer_name_or_path beside the path."
            )
        if split == "eval":
            return []
        return read_foreign_shards(
            source.path,
            tokenizer_name_or_path=source.tokenizer_name_or_path,
            eos_token=source.eos_token,
            dtype=source.dtype,
        )
    for key in ("tokenizer_name_or_path", "eos_token", "dtype"):
        if is_tokenized and getattr(source, key) is not None:
            raise UserError(
                f"{source.path} is a tokenize run's folder and says its own {key}. Leave the key "
                "out."
            )
    return read_split([source.path], split)


def _tokenizer_of(source: TokenSource) -> Path:
    return Path(source.tokenizer_name_or_path or source.path)


def open_corpus(recipe: PretrainRecipe, *, verify: bool) -> Corpus:
    """Map the shards into memory. ``verify`` compares their content with their descriptions.

    Errors: UserError for missing, damaged or too short shards, for shards of different tokenizers,
    or a tokenizer beside them that is not the one they were made with.
    """
    sources = recipe.dataset_mixer
    train_by_source = [shards_of_source(source, "train") for source in sources]
    train_shards = [shard for shards in train_by_source for shard in shards]
    eval_shards = [shard for source in sources for shard in shards_of_source(source, "eval")]
    refuse_other_tokenizers(train_shards)
    train: TokenSequences | Mixture
    if sources[0].ratio is None:
        train = TokenSequences(train_shards, recipe.max_length, verify=verify)
    else:
        train = _mixture(recipe, train_by_source, verify=verify)
    held_out = None
    if eval_shards:
        refuse_other_tokenizers([*train_shards, *eval_shards])
        held_out = TokenSequences(eval_shards, recipe.max_length, verify=verify)
    path = tokenizer_path(_tokenizer_of(sources[0]))
    if sha256_file(path) != train_shards[0].info.tokenizer_sha256:
        raise UserError(
            f"{path} is not the tokenizer that the shards beside it were made with. "
            "Run the tokenize stage again into a new folder."
        )
    return Corpus(train, held_out, _tokenizer_of(sources[0]))


def _mixture(
    recipe: PretrainRecipe, train_by_source: Sequence[Sequence[Shard]], *, verify: bool
) -> Mixture:
    sources = [
        TokenSequences(shards, recipe.max_length, verify=verify) for shards in train_by_source
    ]
    shares = shares_of(
        [source.path for source in recipe.dataset_mixer],
        [len(source) for source in sources],
        [source.ratio or 0.0 for source in recipe.dataset_mixer],
        [source.max_repeats for source in recipe.dataset_mixer],
        num_steps(recipe, 0) * recipe.sequences_per_step,
    )
    return Mixture(sources, shares)


def mixture_table(corpus: Corpus) -> list[str]:
    """What each source of a mixture was asked for, has and gives, in tokens; a line each."""
    if not isinstance(corpus.train, Mixture):
        return []
    T = corpus.train.max_length
    return [
        f"{share.name}: asked {share.ratio:.2%}, available {share.available * T:,} tokens, "
        f"used {share.used * T:,}, each {share.repeats:.2f} times"
        for share in corpus.train.shares
    ]


def model_config(recipe: PretrainRecipe, corpus: Corpus) -> ModelConfig:
    """The model's shape: that of ``init_from``, or the recipe's with the corpus's vocabulary.

    Errors: UserError if ``init_from`` was made for another tokenizer or for shorter rows.
    """
    if recipe.init_from is not None:
        return _config_to_go_on(recipe, recipe.init_from, corpus)
    eos_token_id = corpus.train.eos_token_id
    shape = recipe.shape
    if shape.max_position_embeddings is None:
        shape = dataclasses.replace(shape, max_position_embeddings=recipe.max_length)
    return shape.config(
        vocab_size=padded_vocab_size(corpus.train.vocab_size, recipe.pad_vocab_to_multiple_of),
        eos_token_id=eos_token_id,
        pad_token_id=_pad_token_id(corpus.tokenizer, eos_token_id),
    )


def _config_to_go_on(recipe: PretrainRecipe, folder: str, corpus: Corpus) -> ModelConfig:
    config = read_model_config(folder)
    ours, theirs = tokenizer_path(folder), tokenizer_path(corpus.tokenizer)
    if sha256_file(ours) != sha256_file(theirs):
        raise UserError(
            f"{ours} is not the tokenizer that {theirs.parent} was tokenized with. Tokenize the "
            "text with the model's own."
        )
    if config.max_position_embeddings < recipe.max_length:
        raise UserError(
            f"{folder} reads rows of up to {config.max_position_embeddings} tokens; max_length is "
            f"{recipe.max_length}. Lower it."
        )
    return config


def _pad_token_id(tokenizer: Path, eos_token_id: int) -> int:
    config = _read_tokenizer_config(tokenizer_path(tokenizer).parent)
    token = config.get("pad_token")
    if isinstance(token, dict):  # an AddedToken written out
        token = token.get("content")
    token_id = load_tokenizer(tokenizer).token_to_id(token) if token else None
    return eos_token_id if token_id is None else token_id


def _read_tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    content: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return content


def num_steps(recipe: PretrainRecipe, num_sequences: int) -> int:
    """Optimizer steps of the whole run.

    ``max_tokens`` is rounded up to whole steps, epochs are rounded down: no sequence is seen once
    more than asked for, unless the corpus is smaller than one step.
    """
    if recipe.max_steps > 0:
        return recipe.max_steps
    if recipe.max_tokens > 0:
        return math.ceil(recipe.max_tokens / (recipe.sequences_per_step * recipe.max_length))
    return max(1, int(recipe.num_train_epochs * num_sequences / recipe.sequences_per_step))


def computes_in_bf16(
    choice: bool | Literal["auto"], device: torch.device, hidden_size: int
) -> bool:
    """Whether matrix products run in bf16; weights, norms and sums stay in fp32.

    ``auto``: on a GPU that can, and on a CPU with bf16 instructions. There a training step took
    0.72 of the fp32 time at width 64, 0.61 at 128 and 0.54 at 192 (vocabulary 2048, 4 layers,
    16 x 256 tokens, AVX512-BF16); without the instructions bf16 is emulated and slower.
    """
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return hidden_size >= 64 and bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return False


def expected_memory_bytes(
    config: ModelConfig, batch_size: int, max_length: int, *, bf16: bool, checkpointing: bool
) -> int:
    """Peak memory of the training process.

    Weights, gradients and Adam's moments; what backward needs of each layer: per token, 10 tensors
    of the width in the product's dtype and 2 in fp32, 4 of the feed-forward's width, and half a row
    of attention probabilities per head; 2 layers' worth in fp32 that come and go; Python with
    torch. On a CPU this was 0.9 to 1.15 of the measured peak, for 3 to 67 M parameters.
    """
    width, num_layers = config.hidden_size, config.num_hidden_layers

    def layer(itemsize: int) -> int:
        attention = config.num_attention_heads * max_length * itemsize // 2
        return width * (10 * itemsize + 8) + 4 * config.intermediate_size * itemsize + attention

    kept = num_layers * layer(2 if bf16 else 4)
    if checkpointing:  # the inputs of all layers, and one layer recomputed
        kept = num_layers * width * 4 + layer(4)
    weights = num_parameters(config) * (18 if bf16 else 16)
    logits = 3 * 4 * min(MAX_LOGITS["cpu"], batch_size * max_length * config.vocab_size)
    return PROCESS_BYTES + weights + batch_size * max_length * (kept + 2 * layer(4)) + logits


# ---------------------------------------------------------------- loss


def summed_loss(model: Transformer, batch: Batch, *, z_loss: float) -> tuple[Tensor, Tensor]:
    """What to minimise and the cross-entropy alone, in nats, summed over a micro-batch."""
    hidden_BTD = model(batch.ids_BT, document_ids_BT=batch.document_ids_BT)
    return next_token_loss(
        hidden_BTD.flatten(0, 1), model.output_weight, batch.labels_BT.flatten(), z_loss=z_loss
    )


@torch.no_grad()
def held_out_loss(
    model: Transformer,
    sequences: TokenSequences,
    *,
    batch_size: int,
    max_tokens: int,
    mask: bool,
    bf16: bool,
) -> dict[str, float]:
    """The loss on the first ``max_tokens`` held-out tokens, as a row of metrics.jsonl.

    ``eval_loss`` is in nats per token, ends of documents included. ``eval_bits_per_byte`` spreads
    it over the bytes of the documents' text, so that tokenizers can be compared.
    """
    num_sequences = min(len(sequences), max(1, max_tokens // sequences.max_length))
    device = model.device
    total = torch.zeros((), dtype=_widest(device), device=device)
    for first in range(0, num_sequences, batch_size):
        indices = range(first, min(first + batch_size, num_sequences))
        batch = sequences.batch(indices, mask=mask).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            total += summed_loss(model, batch, z_loss=0.0)[1]
    loss = float(total) / (num_sequences * sequences.max_length)
    tokens_per_byte = sequences.num_tokens / sequences.num_bytes
    return {"eval_loss": loss, "eval_bits_per_byte": loss / math.log(2) * tokens_per_byte}


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no fp64


# ---------------------------------------------------------------- where a run stands


@dataclass
class Position:
    """How far a run has come: what a checkpoint holds beside weights and optimizer."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # asked for so far
    left_out: int = 0  # sequences with repeated n-grams
    seconds: float = 0.0  # in steps, not in evaluations and checkpoints
    row_tokens: int = 0  # since the last row of metrics.jsonl, as the next two
    row_seconds: float = 0.0
    row_loss: float = 0.0  # summed


def refuse_many_skipped(
    guard: StepGuard, folder: RunFolder, recipe: PretrainRecipe, corpus: Corpus, step: int
) -> None:
    """Errors: UserError if too many steps in a row were left out, up to ``step`` at the latest.

    Reading the guard waits for the device.
    """
    if guard.longest <= recipe.optim.max_skipped_steps:
        return
    saved = sorted(path.name for path in folder.checkpoints.glob("step_*"))
    kept = f"The last checkpoint is kept: {saved[-1]}. " if saved else ""
    places = [str(place) for _, found in read_in_step(recipe, corpus, step) for place in found]
    raise UserError(
        f"{guard.longest} steps in a row were left out: loss or gradient was no finite number"
        f"{' or far above the usual' if guard.sigma else ''}. Step {step} read "
        f"{'; '.join(places[:3])}{f' and {len(places) - 3} more' if len(places) > 3 else ''} "
        f"(all: open-instruct data inspect {folder.path} --step {step}). {kept}"
        "Look at that text, lower learning_rate or lengthen the warmup, and train into a new "
        "output_dir; "
        f"{folder.path / 'metrics.jsonl'} shows where it began."
    )


def resume(
    folder: RunFolder, model: Transformer, optimizer: torch.optim.Optimizer, guard: StepGuard
) -> Position:
    """Put weights, optimizer, guard and generators where the latest checkpoint left them."""
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        return Position()
    weights, state = checkpoint.load()
    model.load_state_dict(weights)
    optimizer.load_state_dict(state["optimizer"])
    guard.load_state_dict(state["guard"])
    restore_random_state(state["random"])
    folder.log(f"going on from {checkpoint.path}, after step {checkpoint.step}")
    return Position(**state["position"])


# ---------------------------------------------------------------- the loop


def train(
    folder: RunFolder, recipe: PretrainRecipe, corpus: Corpus, model: Transformer, *, bf16: bool
) -> dict[str, float]:
    """Train ``model`` in place to the end, going on from the latest checkpoint if there is one.

    Returns the figures of the end. Errors: Stopped after SIGINT, SIGTERM or SIGUSR1, with a
    checkpoint written; UserError when too many steps in a row are no good.
    """
    device = model.device
    optimizer = build_optimizer(model, recipe.optim, bf16=bf16)
    guard = StepGuard(device, recipe.optim.skip_spike_sigma)
    at = resume(folder, model, optimizer, guard)
    metrics = MetricsLog(folder, resume_step=at.step)
    total_steps = num_steps(recipe, len(corpus.train))
    row_loss = torch.tensor(at.row_loss, dtype=_widest(device), device=device)
    shown: dict[str, float] = {}

    def evaluate() -> None:
        if corpus.held_out is None:
            return
        row = held_out_loss(
            model,
            corpus.held_out,
            batch_size=recipe.per_device_eval_batch_size,
            max_tokens=recipe.max_eval_tokens,
            mask=recipe.mask_documents,
            bf16=bf16,
        )
        metrics.write(at.step, epoch=_epoch(recipe, corpus, at.step), tokens=at.tokens, **row)
        shown.update(row)
        progress.update(at.step, **shown)

    with stop_signals() as stop, Progress(folder, "pretrain", total_steps, at.step) as progress:
        if at.step == 0:
            evaluate()
        while at.step < total_steps:
            started = time.perf_counter()
            learning_rate = learning_rate_at(at.step, total_steps, recipe.optim)
            set_learning_rate(optimizer, learning_rate)
            batches = micro_batches(
                corpus.train,
                at.step,
                micro_batch_size=recipe.per_device_train_batch_size,
                gradient_accumulation_steps=recipe.gradient_accumulation_steps,
                seed=recipe.run.seed,
                mask=recipe.mask_documents,
                max_ngram_repeats=recipe.max_ngram_repeats,
            )
            at.left_out += recipe.sequences_per_step - sum(len(batch.ids_BT) for batch in batches)
            step_loss = add_gradients(model, batches, z_loss=recipe.z_loss, bf16=bf16)
            grad_norm = clip_gradients(model.parameters(), recipe.optim.max_grad_norm)
            num_tokens = sum(batch.num_labels for batch in batches)
            guard.watch(optimizer, step_loss / max(1, num_tokens), grad_norm)
            optimizer.step()
            optimizer.zero_grad()

            at.step += 1
            at.tokens += num_tokens
            at.row_tokens += num_tokens
            row_loss += step_loss

            is_last = at.step == total_steps
            is_row = is_last or at.step % recipe.log.logging_steps == 0
            is_evaluated = is_last or (recipe.eval_steps and at.step % recipe.eval_steps == 0)
            is_saved = stop.requested or at.step % recipe.checkpoints.save_steps == 0
            if is_row or is_evaluated or is_saved:
                refuse_many_skipped(guard, folder, recipe, corpus, at.step)  # waits for the device
            at.seconds += time.perf_counter() - started
            at.row_seconds += time.perf_counter() - started
            if is_row:
                shown |= {
                    "loss": float(row_loss) / max(1, at.row_tokens),
                    "learning_rate": learning_rate,
                    "grad_norm": float(grad_norm),
                    "tokens_per_second": at.row_tokens / at.row_seconds,
                }
                metrics.write(
                    at.step,
                    epoch=_epoch(recipe, corpus, at.step),
                    tokens=at.tokens,
                    seconds=round(at.seconds, 3),
                    **({"sequences_left_out": at.left_out} if recipe.max_ngram_repeats else {}),
                    **({"skipped_steps": guard.num_skipped} if guard.num_skipped else {}),
                    **{key: shown[key] for key in shown if not key.startswith("eval_")},
                    **_gpu_figures(model, shown["tokens_per_second"], recipe.max_length),
                )
                row_loss.zero_()
                at.row_tokens, at.row_seconds = 0, 0.0
            progress.update(at.step, **shown)
            if is_evaluated:
                evaluate()
            if is_saved and not is_last:  # after the rows: those of a checkpoint's step are kept
                at.row_loss = float(row_loss)
                _save(folder, recipe, model, optimizer, guard, at)
                _stop_if_asked(stop, at)
    return {
        **shown,
        "tokens": at.tokens,
        "train_seconds": round(at.seconds, 3),
        "tokens_per_second": at.tokens / max(at.seconds, 1e-9),
        "skipped_steps": guard.num_skipped,
        "sequences_left_out": at.left_out,
    }


def add_gradients(
    model: Transformer, batches: Sequence[Batch], *, z_loss: float, bf16: bool
) -> Tensor:
    """Add one step's gradients; returns the cross-entropy summed over its tokens, on the device.

    The sum is divided once, by the tokens of all micro-batches, so that how they are cut changes
    nothing but rounding.
    """
    device = model.device
    num_labels = max(1, sum(batch.num_labels for batch in batches))
    step_loss = torch.zeros((), device=device)
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss, cross_entropy = summed_loss(model, batch.to(device), z_loss=z_loss)
        (loss / num_labels).backward()
        step_loss += cross_entropy
    return step_loss


def read_in_step(
    recipe: PretrainRecipe, corpus: Corpus, step: int
) -> list[tuple[int, list[Place]]]:
    """What step 1, 2, … reads: each sequence's number and the documents in it, in order."""
    indices = corpus.train.of_step(
        step - 1, sequences_per_step=recipe.sequences_per_step, seed=recipe.run.seed
    )
    return [(int(index), corpus.train.places(int(index))) for index in indices]


def _epoch(recipe: PretrainRecipe, corpus: Corpus, step: int) -> float:
    return round(step * recipe.sequences_per_step / len(corpus.train), 4)


def _save(
    folder: RunFolder,
    recipe: PretrainRecipe,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    guard: StepGuard,
    at: Position,
) -> None:
    state = {
        "position": asdict(at),
        "optimizer": optimizer.state_dict(),
        "guard": guard.state_dict(),
        "random": random_state(),
    }
    keep = recipe.checkpoints.save_total_limit
    save_checkpoint(folder, at.step, weights=model.state_dict(), state=state, keep=keep)


def _stop_if_asked(stop: StopFlag, at: Position) -> None:
    if stop.requested:
        raise Stopped(stop.signal_number, f" after step {at.step}, which is saved")


def _gpu_figures(model: Transformer, tokens_per_second: float, max_length: int) -> dict[str, float]:
    """``peak_memory_bytes``, and ``mfu`` where the chip's peak is known; nothing on a CPU."""
    if model.device.type != "cuda":
        return {}
    figures: dict[str, float] = {"peak_memory_bytes": torch.cuda.max_memory_allocated(model.device)}
    name = torch.cuda.get_device_name(model.device)
    peak = next((peak for part, peak in GPU_PEAKS.items() if part in name), None)
    if peak is not None:
        figures["mfu"] = tokens_per_second * flops_per_token(model.config, max_length) / peak
    return figures


# ---------------------------------------------------------------- the stage


def input_files(recipe: PretrainRecipe) -> list[Path]:
    """The descriptions of the shards, which hold their SHA-256 (or shards without any), and the
    tokenizer's files.

    Errors: UserError naming a folder without them.
    """
    sources = recipe.dataset_mixer
    described = [
        shard.identity_file
        for split in ("train", "eval")
        for source in sources
        for shard in shards_of_source(source, split)
    ]
    tokenizer = tokenizer_path(_tokenizer_of(sources[0]))
    config = tokenizer.with_name("tokenizer_config.json")
    beside = [config] if config.is_file() else []
    model = [] if recipe.init_from is None else model_files(recipe.init_from)
    return [*described, tokenizer, *beside, *model]


def plan(recipe: PretrainRecipe) -> dict[str, object]:
    """What a run would do and need, for --dry-run."""
    corpus = open_corpus(recipe, verify=False)
    config = model_config(recipe, corpus)
    steps = num_steps(recipe, len(corpus.train))
    tokens_per_step = recipe.sequences_per_step * recipe.max_length
    bf16 = computes_in_bf16(recipe.bf16, pick_device(), config.hidden_size)
    flops = flops_per_token(config, recipe.max_length)
    return {
        "examples": len(corpus.train),
        **({"mixture": "; ".join(mixture_table(corpus))} if mixture_table(corpus) else {}),
        "steps": steps,
        "tokens_per_step": tokens_per_step,
        "tokens": steps * tokens_per_step,
        "epochs": _epoch(recipe, corpus, steps),
        "tokens_available": corpus.train.num_tokens,
        "held_out_tokens": corpus.held_out.num_tokens if corpus.held_out else 0,
        "vocab_size": config.vocab_size,
        "parameters": num_parameters(config),
        "flops_per_token": flops,
        "flops": flops * steps * tokens_per_step,
        "bf16": bf16,
        "memory_bytes": expected_memory_bytes(
            config,
            recipe.per_device_train_batch_size,
            recipe.max_length,
            bf16=bf16,
            checkpointing=recipe.gradient_checkpointing,
        ),
    }


def run(recipe: PretrainRecipe) -> RunFolder:
    """Train the model and write it as a Hugging Face folder; goes on by itself after a stop."""
    folder = RunFolder.open(recipe, input_files(recipe))
    if folder.is_finished:
        return folder
    corpus = open_corpus(recipe, verify=True)
    config = model_config(recipe, corpus)
    device = pick_device()
    bf16 = computes_in_bf16(recipe.bf16, device, config.hidden_size)
    seed_everything(recipe.run.seed)
    if recipe.init_from is None:
        model = Transformer(config).to(device)
    else:
        model = load_native(recipe.init_from, device=device, dtype=torch.float32)
    model.gradient_checkpointing = recipe.gradient_checkpointing
    folder.counts.used = len(corpus.train)
    folder.log(
        f"{num_parameters(config):,} parameters, {corpus.train.num_tokens:,} tokens, "
        f"{num_steps(recipe, len(corpus.train)):,} steps of "
        f"{recipe.sequences_per_step * recipe.max_length:,} tokens, "
        f"{'bf16' if bf16 else 'fp32'} on {device}"
    )
    for line in mixture_table(corpus):
        folder.log(line)
    if corpus.held_out is None:
        folder.log("no held-out documents: give the tokenize stage an eval_fraction to have some")
    figures = train(folder, recipe, corpus, model, bf16=bf16)
    _export(folder, model, corpus)
    results = {"parameters": num_parameters(config), "bf16": bf16, **figures}
    atomic_write(folder.path / "README.md", model_card(recipe, corpus, config, results))
    folder.finish(**results)
    return folder


def _export(folder: RunFolder, model: Transformer, corpus: Corpus) -> None:
    """Write the model folder, its tokenizer told how long a row the model reads."""
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        if corpus.tokenizer.is_dir():
            copy_tokenizer(corpus.tokenizer, temporary, vocab_size=model.config.vocab_size)
        else:
            tokenizer = load_tokenizer(corpus.tokenizer)
            eos_token = tokenizer.id_to_token(corpus.train.eos_token_id)
            assert eos_token is not None  # its id was found by its name
            write_tokenizer_files(corpus.tokenizer, tokenizer, eos_token, temporary)
        content = _read_tokenizer_config(temporary)
        content["model_max_length"] = model.config.max_position_embeddings
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (temporary / "tokenizer_config.json").write_text(text, encoding="utf-8")
        export_hf(model, folder.path, tokenizer_files=temporary)


def model_card(
    recipe: PretrainRecipe, corpus: Corpus, config: ModelConfig, results: dict[str, Any]
) -> str:
    """README.md: what the model is and how it came to be."""
    names = ", ".join(source.path for source in recipe.dataset_mixer)
    lines = [
        "# A base model",
        "",
        f"{GENERATIONS[config.model_type]} architecture, {num_parameters(config):,} parameters "
        f"({config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{config.num_attention_heads} heads, vocabulary {config.vocab_size:,}), "
        f"rows of up to {config.max_position_embeddings:,} tokens.",
        "",
        f"Trained on {results['tokens']:,} tokens of {names} "
        f"({corpus.train.num_documents:,} documents, {corpus.train.num_tokens:,} tokens; "
        f"{_epoch(recipe, corpus, num_steps(recipe, len(corpus.train))):.3g} epochs). "
        "It continues text; it was not tuned to follow instructions.",
        "",
    ]
    if "loss" in results:
        lines.append(f"- training loss at the end: {results['loss']:.4f} nats per token")
    if "eval_loss" in results:
        lines.append(
            f"- held-out loss: {results['eval_loss']:.4f} nats per token, "
            f"{results['eval_bits_per_byte']:.4f} bits per byte"
        )
    lines += ["", "`recipe.yaml` and `manifest.json` say how to make it again.", ""]
    return "\n".join(lines)
