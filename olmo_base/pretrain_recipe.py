"""What one pretraining run chooses, and what that means: its sequences, model shape and steps."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from olmo_base.corpus.batches import (
    Mixture,
    TokenSequences,
    read_split,
    refuse_other_tokenizers,
    shares_of,
    split_folder,
)
from olmo_base.corpus.foreign_shards import foreign_files, read_foreign_shards
from olmo_base.corpus.shards import Place, Shard
from olmo_base.corpus.warmup import StepSizes, WarmupConfig
from olmo_base.model.hf_weights import read_model_config
from olmo_base.model.presets import PRESETS, ModelShape, padded_vocab_size
from olmo_base.model.transformer import EndsInit, ModelConfig, Recomputation, num_parameters
from olmo_base.optim import OptimConfig, Schedule
from olmo_base.parallel import ParallelConfig
from olmo_base.run.artefact import RunConfig, model_files, sha256_file
from olmo_base.run.errors import UserError
from olmo_base.run.metrics import LogConfig
from olmo_base.run.recipe import RecipeError, setting
from olmo_base.run.resume import CheckpointConfig
from olmo_base.tokenizer import load_tokenizer, tokenizer_path

SMALLEST_PUBLISHED = 10**9  # parameters
SET_BY_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


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
    # In the first steps max_grad_norm is so many times as large: 5 or 10 in OLMo-1's runs
    clip_warmup_steps: int = setting(0, low=0)
    clip_warmup_factor: float = setting(1.0, low=1)

    def max_grad_norm_at(self, step: int) -> float:
        """How large the gradient may be in step 0, 1, …; 0 never clips."""
        is_early = step < self.clip_warmup_steps
        return self.max_grad_norm * (self.clip_warmup_factor if is_early else 1.0)


@dataclass(frozen=True)
class PretrainRecipe:
    """What one pretraining run chooses."""

    stage: Literal["pretrain"]
    dataset_mixer: tuple[TokenSource, ...]
    run: RunConfig = field(default_factory=RunConfig)
    # A model folder to go on from: annealing, or a new mix; ``model`` then says what it must be.
    init_from: str | None = None
    shape: ModelShape = field(default_factory=ModelShape)
    ends: EndsInit = field(default_factory=EndsInit)
    pad_vocab_to_multiple_of: int = setting(128, low=1)
    max_length: int = setting(1024, low=1)  # tokens of a sequence
    mask_documents: bool = False  # a token sees its own document only
    max_ngram_repeats: int = setting(0, low=0)  # leave out sequences with as many: 32 in OLMo-2
    per_device_train_batch_size: int = setting(8, low=1)  # sequences of a micro-batch
    gradient_accumulation_steps: int = setting(1, low=1)
    global_batch_size: int = setting(
        0, low=0, help="sequences of a step, all ranks together; 0: what each has, times the ranks"
    )
    num_train_epochs: float = setting(1.0, above=0)
    max_steps: int = setting(-1, low=-1)  # above 0: instead of num_train_epochs
    max_tokens: int = setting(-1, low=-1)  # above 0: instead of num_train_epochs
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    optim: PretrainOptim = field(default_factory=PretrainOptim)
    z_loss: float = setting(0.0, low=0)  # OLMo-2 used 1e-5
    bf16: bool | Literal["auto"] = "auto"
    gradient_checkpointing: bool | Recomputation = setting(
        False, changes_result=False, help="false or none, selective, true or full"
    )
    torch_compile: bool = setting(False, help="compile each layer; the same to rounding")
    float8: bool = setting(False, help="matrix products in 8 bits, through torchao on a GPU")
    per_device_eval_batch_size: int = setting(8, low=1, changes_result=False)
    eval_steps: int = setting(0, low=0, changes_result=False)  # 0: at the start and the end only
    max_eval_tokens: int = setting(200_000, low=1)  # held-out tokens looked at each time
    # Files or folders of OLMES requests, and how many questions of each file (0: all)
    eval_requests: tuple[str, ...] = setting((), changes_result=False)
    max_eval_requests: int = setting(200, low=0, changes_result=False)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    checkpoint_dir: str | None = setting(
        None, changes_result=False, help="a URI (s3://, gs://, file://) instead of the run's folder"
    )
    log: LogConfig = field(default_factory=LogConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

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
        if self.global_batch_size and self.gradient_accumulation_steps > 1:
            raise RecipeError(
                "gradient_accumulation_steps",
                f"{self.gradient_accumulation_steps}, but it follows from global_batch_size "
                f"{self.global_batch_size}; keep one of them.",
            )
        if self.init_from is not None and self.shape != ModelShape(self.shape.model):
            given = next(
                item.name
                for item in dataclasses.fields(ModelShape)
                if item.name != "model" and getattr(self.shape, item.name) is not None
            )
            raise RecipeError(given, "the shape is that of init_from; leave this key out.")
        if self.init_from is not None:
            for key, value in vars(self.ends).items():
                if value is not None:
                    raise RecipeError(
                        key, "the weights are those of init_from; leave this key out."
                    )
        self.warmup.refuse_misfits(self.sequences_per_step, self.max_length)
        if self.warmup.length_warmup_steps and self.parallel.context_parallel > 1:
            raise RecipeError(
                "length_warmup_steps", "context_parallel cuts rows over ranks; keep one of them."
            )
        longest = self.shape.max_position_embeddings
        if longest is not None and longest < self.max_length:
            raise RecipeError(
                "max_position_embeddings",
                f"{longest} is less than max_length {self.max_length}.",
            )

    @property
    def sizes(self) -> StepSizes:
        """How many sequences each step reads."""
        warmup = self.warmup
        return StepSizes(
            self.sequences_per_step,
            warmup.batch_size_warmup_start,
            warmup.batch_size_warmup_steps,
        )

    def places(self, step: int) -> range:
        """Where the sequences of step 0, 1, … stand in the run's row."""
        first = self.sizes.before(step)
        return range(first, first + self.sizes.at(step))

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimizer step, of all ranks."""
        return (
            self.global_batch_size
            or self.per_device_train_batch_size * self.gradient_accumulation_steps
        )


def with_global_batch(recipe: PretrainRecipe, num_data: int) -> PretrainRecipe:
    """The recipe with the sequences of a step said in one number; ``num_data`` ranks read them.

    So a step's sequences hang on the recipe that the run keeps, and not on how many ranks go on
    with it.
    """
    if recipe.global_batch_size or num_data == 1:
        return recipe
    return dataclasses.replace(
        recipe,
        global_batch_size=recipe.sequences_per_step * num_data,
        gradient_accumulation_steps=1,
    )


# ---------------------------------------------------------------- what the recipe means


@dataclass(frozen=True)
class Corpus:
    """The token shards of a recipe as sequences, and the tokenizer they were made with."""

    train: TokenSequences | Mixture
    held_out: TokenSequences | None
    tokenizer: Path  # its folder, or the tokenizer.json
    held_out_by_source: dict[str, TokenSequences]  # where there are several; their names


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


def tokenizer_of(source: TokenSource) -> Path:
    """The folder or file of the tokenizer that a source was made with."""
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
    path = tokenizer_path(tokenizer_of(sources[0]))
    if sha256_file(path) != train_shards[0].info.tokenizer_sha256:
        raise UserError(
            f"{path} is not the tokenizer that the shards beside it were made with. "
            "Run the tokenize stage again into a new folder."
        )
    return Corpus(train, held_out, tokenizer_of(sources[0]), _held_out_by_source(recipe))


def _held_out_by_source(recipe: PretrainRecipe) -> dict[str, TokenSequences]:
    """The held-out sequences of each source, if several have one at least."""
    paths = [source.path for source in recipe.dataset_mixer]
    names = [Path(path).name for path in paths]
    found = {}
    for source, name in zip(recipe.dataset_mixer, names, strict=True):
        shards = shards_of_source(source, "eval")
        if sum(shard.info.num_tokens for shard in shards) > recipe.max_length:
            key = name if names.count(name) == 1 else source.path
            found[key] = TokenSequences(shards, recipe.max_length)
    return found if len(found) > 1 else {}


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
        recipe.sizes.before(num_steps(recipe, 0)),
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

    Errors: UserError if ``init_from`` was made for another tokenizer or for shorter rows, or if
    embedding and head are to start unlike and are one.
    """
    if recipe.init_from is not None:
        return _config_to_go_on(recipe, recipe.init_from, corpus)
    eos_token_id = corpus.train.eos_token_id
    shape = recipe.shape
    if shape.max_position_embeddings is None:
        shape = dataclasses.replace(shape, max_position_embeddings=recipe.max_length)
    config = shape.config(
        vocab_size=padded_vocab_size(corpus.train.vocab_size, recipe.pad_vocab_to_multiple_of),
        eos_token_id=eos_token_id,
        pad_token_id=_pad_token_id(corpus.tokenizer, eos_token_id),
    )
    if config.tie_word_embeddings:
        for key, value in vars(recipe.ends).items():
            if value is not None:
                raise UserError(
                    f"{key} is {value}, but head and embedding are one. Leave it out, or set "
                    "tie_word_embeddings: false."
                )
    return config


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
    if recipe.shape != ModelShape():
        _refuse_other_shape(config, recipe.shape.model, folder)
    return config


def _refuse_other_shape(config: ModelConfig, model: str, folder: str) -> None:
    """Errors: UserError if a model to go on from is not of the named shape."""
    named = PRESETS[model]
    for item in dataclasses.fields(ModelConfig):
        found, needed = getattr(config, item.name), getattr(named, item.name)
        if item.name not in SET_BY_TOKENIZER and found != needed:
            raise UserError(
                f"{folder} is no {model}: its {item.name} is {found}, not {needed}. Name another "
                "init_from, or leave the key 'model' out."
            )


def config_from_afar(recipe: PretrainRecipe) -> ModelConfig | None:
    """The shape of a published model none of whose files are on this machine yet, for a plan.

    None where some are, or the shape is a small one, which is no reason to plan without its text.
    """
    needed = [source.path for source in recipe.dataset_mixer]
    if recipe.init_from is not None:
        needed.append(recipe.init_from)
    named = PRESETS[recipe.shape.model]
    is_planned = recipe.max_steps > 0 or recipe.max_tokens > 0
    if (
        not is_planned
        or num_parameters(named) < SMALLEST_PUBLISHED
        or any(Path(path).exists() for path in needed)
    ):
        return None
    return recipe.shape.config(
        vocab_size=named.vocab_size,
        eos_token_id=named.eos_token_id,
        pad_token_id=named.pad_token_id,
    )


def _pad_token_id(tokenizer: Path, eos_token_id: int) -> int:
    config = read_tokenizer_config(tokenizer_path(tokenizer).parent)
    token = config.get("pad_token")
    if isinstance(token, dict):  # an AddedToken written out
        token = token.get("content")
    token_id = load_tokenizer(tokenizer).token_to_id(token) if token else None
    return eos_token_id if token_id is None else token_id


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """A folder's tokenizer_config.json; empty if it has none."""
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
        return recipe.sizes.steps_for(recipe.max_tokens / recipe.max_length)
    return max(1, recipe.sizes.steps_within(recipe.num_train_epochs * num_sequences))


def read_in_step(
    recipe: PretrainRecipe, corpus: Corpus, step: int
) -> list[tuple[int, list[Place]]]:
    """What step 1, 2, … reads: each sequence's number and the documents in it, in order."""
    indices = corpus.train.at(recipe.places(step - 1), seed=recipe.run.seed)
    return [(int(index), corpus.train.places(int(index))) for index in indices]


def epoch_at(recipe: PretrainRecipe, corpus: Corpus, step: int) -> float:
    """Passes over the corpus after so many steps."""
    return round(recipe.sizes.before(step) / len(corpus.train), 4)


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
    tokenizer = tokenizer_path(tokenizer_of(sources[0]))
    config = tokenizer.with_name("tokenizer_config.json")
    beside = [config] if config.is_file() else []
    model = [] if recipe.init_from is None else model_files(recipe.init_from)
    return [*described, tokenizer, *beside, *model]
