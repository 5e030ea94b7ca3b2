"""Pretraining: token shards become a base model, a Hugging Face model folder.

The shards are cut into sequences (corpus/batches.py); each optimizer step sums the loss of its
micro-batches and divides once, by all tokens asked for. One process; a stopped run goes on with
the same sequences, rates and optimizer state, bit for bit on a CPU.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from olmo_base.compute import compile_layers, in_float8, refuse_float8
from olmo_base.expected_memory import Division, division_of, expected_memory_bytes
from olmo_base.model.hf_weights import copy_tokenizer, export_hf, load_native
from olmo_base.model.transformer import (
    GENERATIONS,
    ModelConfig,
    Transformer,
    flops_per_token,
    num_parameters,
)
from olmo_base.parallel import (
    Ranks,
    refuse_uneven_shape,
    shared_model,
    started_ranks,
    whole_model,
)
from olmo_base.pretrain_loop import refuse_divided_questions, train
from olmo_base.pretrain_recipe import (
    Corpus,
    PretrainRecipe,
    config_from_afar,
    epoch_at,
    input_files,
    mixture_table,
    model_config,
    num_steps,
    open_corpus,
    read_tokenizer_config,
    with_global_batch,
)
from olmo_base.run.artefact import RunFolder, atomic_write
from olmo_base.run.errors import UserError, machine_error
from olmo_base.run.launch import Launch, pick_device, seed_everything
from olmo_base.run.trackers import refuse_missing_trackers
from olmo_base.tokenizer import load_tokenizer, write_tokenizer_files


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


# ---------------------------------------------------------------- the stage


def plan(recipe: PretrainRecipe, launch: Launch | None = None) -> dict[str, object]:
    """What a run would do and need, for --dry-run; with ``launch`` in so many processes.

    Errors: UserError, as in the run.
    """
    refuse_missing_trackers(recipe.log.report_to)
    device = pick_device() if launch is None else torch.device(launch.device)
    division = Division() if launch is None else division_of(recipe.parallel, launch.num_processes)
    recipe = with_global_batch(recipe, division.num_data)
    if (config := config_from_afar(recipe)) is not None:
        paths = ", ".join(source.path for source in recipe.dataset_mixer)
        words = f"{paths} is not on this machine: the vocabulary is that of {recipe.shape.model}"
        text: dict[str, object] = {"not_here": f"{words}, and text is not counted"}
        steps = num_steps(recipe, 0)
    else:
        corpus = open_corpus(recipe, verify=False)
        config = model_config(recipe, corpus)
        steps = num_steps(recipe, len(corpus.train))
        text = {
            "examples": len(corpus.train),
            **({"mixture": "; ".join(mixture_table(corpus))} if mixture_table(corpus) else {}),
            "epochs": epoch_at(recipe, corpus, steps),
            "tokens_available": corpus.train.num_tokens,
            "held_out_tokens": corpus.held_out.num_tokens if corpus.held_out else 0,
        }
    tokens_per_step = recipe.sequences_per_step * recipe.max_length
    refuse_uneven_shape(recipe.parallel, config, recipe.max_length)
    if launch is not None and launch.device == "cuda":  # which may not be on this machine
        bf16 = recipe.bf16 is not False
    else:
        bf16 = computes_in_bf16(recipe.bf16, device, config.hidden_size)
    memory = expected_memory_bytes(
        config,
        recipe.per_device_train_batch_size,
        recipe.max_length,
        bf16=bf16,
        checkpointing=recipe.gradient_checkpointing in (True, "full"),
        device="cuda" if device.type == "cuda" else "cpu",
        division=division,
    )
    flops = flops_per_token(config, recipe.max_length)
    return {
        **text,
        "steps": steps,
        "tokens_per_step": tokens_per_step,
        "tokens": recipe.sizes.before(steps) * recipe.max_length,
        "vocab_size": config.vocab_size,
        "parameters": num_parameters(config),
        "flops_per_token": flops,
        "flops": flops * recipe.sizes.before(steps) * recipe.max_length,
        "bf16": bf16,
        **({"memory_bytes": memory} if launch is None else _shared_out(launch, division, memory)),
    }


def _shared_out(launch: Launch, division: Division, memory: int) -> dict[str, object]:
    """The figures of a plan that say who holds what."""
    ways = {
        "copies": division.copies if division.divides_weights else division.num_data,
        "shards": division.weight_parts,
        "context": division.context,
        "tensor": division.tensor,
    }
    words = ", ".join(f"{name} x {number}" for name, number in ways.items() if number > 1)
    return {
        "processes": launch.num_processes,
        "divided": words or "one process",
        "memory_bytes_of_each": memory,
    }


def run(recipe: PretrainRecipe) -> RunFolder:
    """Train the model and write it as a Hugging Face folder; goes on by itself after a stop."""
    refuse_missing_trackers(recipe.log.report_to)
    with started_ranks(recipe.parallel) as ranks:
        return _run(with_global_batch(recipe, ranks.num_data), ranks)


def _run(recipe: PretrainRecipe, ranks: Ranks) -> RunFolder:
    with ranks.main_first():
        folder = RunFolder.open(recipe, input_files(recipe))
    if not folder.is_finished:
        try:
            _pretrain(recipe, ranks, folder)
        finally:
            folder.release()
    return folder


def _pretrain(recipe: PretrainRecipe, ranks: Ranks, folder: RunFolder) -> None:
    corpus = open_corpus(recipe, verify=folder.is_main)
    config = model_config(recipe, corpus)
    refuse_uneven_shape(recipe.parallel, config, recipe.max_length)
    refuse_divided_questions(recipe, ranks)
    bf16 = computes_in_bf16(recipe.bf16, ranks.device, config.hidden_size)
    if recipe.float8:
        refuse_float8(ranks)
    seed_everything(recipe.run.seed)
    model, with_loss = _model(recipe, config, ranks, bf16=bf16)
    model.gradient_checkpointing = recipe.gradient_checkpointing
    if recipe.torch_compile:
        compile_layers(model)
    folder.counts.used = len(corpus.train)
    folder.log(
        f"{num_parameters(config):,} parameters, {corpus.train.num_tokens:,} tokens, "
        f"{num_steps(recipe, len(corpus.train)):,} steps of "
        f"{recipe.sequences_per_step * recipe.max_length:,} tokens, "
        f"{'bf16' if bf16 else 'fp32'} on {ranks}"
    )
    for line in mixture_table(corpus):
        folder.log(line)
    if corpus.held_out is None:
        folder.log("no held-out documents: give the tokenize stage an eval_fraction to have some")
    figures = train(folder, recipe, corpus, model, ranks, with_loss=with_loss, bf16=bf16)
    whole = model if with_loss is None else whole_model(model)
    if folder.is_main:
        try:
            _export(folder, whole, corpus)
        except Exception as error:
            if (problem := machine_error(error)) is None:
                raise
            raise UserError(
                f"The model could not be written to {folder.path}: {problem} Its checkpoints are "
                "kept. Make room and run again; the run goes on from the last one."
            ) from error
        results = {"parameters": num_parameters(config), "bf16": bf16, **figures}
        atomic_write(folder.path / "README.md", model_card(recipe, corpus, config, results))
        folder.finish(**results)
    ranks.wait()


def _model(
    recipe: PretrainRecipe, config: ModelConfig, ranks: Ranks, *, bf16: bool
) -> tuple[Transformer, nn.Module | None]:
    """The model to train, and what computes its loss if there are several ranks."""
    device = ranks.device if ranks.num_ranks == 1 else torch.device("cpu")
    given: Transformer | None = None
    if recipe.init_from is not None:
        given = load_native(recipe.init_from, device=device, dtype=torch.float32)
    if ranks.num_ranks == 1:
        model = given or Transformer(config, recipe.ends).to(device)
        return in_float8(model) if recipe.float8 else model, None
    weights = None if given is None else given.state_dict()
    change = in_float8 if recipe.float8 else None
    return shared_model(config, ranks, weights, change=change, bf16=bf16, ends=recipe.ends)


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
        content = read_tokenizer_config(temporary)
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
        f"{epoch_at(recipe, corpus, num_steps(recipe, len(corpus.train))):.3g} epochs). "
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
