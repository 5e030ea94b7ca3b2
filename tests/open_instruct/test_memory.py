"""What a step is said to need, and what follows; benchmarks/memory.py measures it."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from olmo_base.run.errors import UserError
from olmo_base.run.launch import Launch
from open_instruct import memory, tuning
from open_instruct.adapters import AdapterConfig, add_adapter
from open_instruct.batches import MicroBatchSize, pack
from open_instruct.logprobs import AT_LABELS, EVERYWHERE, HEAD_AT_LABELS, PACKED, native_over
from open_instruct.memory import (
    REWARDS,
    Sizes,
    held_by_each,
    layer_bytes,
    memory_at_hand,
    training_memory,
)
from open_instruct.planned_launch import planned_launch
from tests.open_instruct.tiny import tiny_olmo2

SIZE = MicroBatchSize(step=0, positions=100, seen=100 * 25, longest=25, labels=40)
FLOAT = 4


def needed(way=PACKED, *, recomputes=False, batches=(SIZE,), device="cpu", **changes):
    model = tiny_olmo2()
    number = sum(weight.numel() for weight in model.parameters())
    return training_memory(
        model.config,
        Sizes(number, number),
        list(batches),
        way=way,
        gradient_checkpointing=recomputes,
        device=device,
        **changes,
    )


def test_logits_count_as_often_as_a_way_holds_them():
    many = [replace_size(labels=60_000)]
    logits = FLOAT * 60_000 * tiny_olmo2().config.vocab_size
    once = needed(HEAD_AT_LABELS, batches=many) - needed(REWARDS, batches=many)
    thrice = needed(AT_LABELS, batches=many) - needed(REWARDS, batches=many)
    statistic = needed(HEAD_AT_LABELS, batches=many, needs_distribution=True)
    assert once == pytest.approx(1.05 * logits, rel=0.1)
    assert thrice == pytest.approx(3 * once, rel=0.1)
    assert statistic - needed(REWARDS, batches=many) == pytest.approx(5 * once, rel=0.1)
    long = [replace_size(positions=90_000, labels=60_000)]
    assert needed(EVERYWHERE, batches=long) > needed(AT_LABELS, batches=long)


def replace_size(**changes):
    return SIZE._replace(**changes)


def llama_of(num_layers):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            max_position_embeddings=128,
        )
    )


def olmo2_of(num_layers):
    return tiny_olmo2(num_hidden_layers=num_layers, hidden_size=64, intermediate_size=256)


def adapted_llama_of(num_layers):
    adapter = AdapterConfig(use_peft=True, lora_r=1)
    return add_adapter(llama_of(num_layers), adapter, "base", 0)


NUM_ROWS, LENGTH = 5, 48  # activations as large as a weight would be taken for its copy


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("make_model", "way", "batching"),
    [
        (olmo2_of, PACKED, "auto"),
        (olmo2_of, HEAD_AT_LABELS, "grouped"),
        (llama_of, HEAD_AT_LABELS, "grouped"),
        (adapted_llama_of, HEAD_AT_LABELS, "grouped"),
    ],
    ids=["native", "OLMo-2", "Llama", "LoRA"],
)
def test_a_layer_is_counted_as_autograd_keeps_it(make_model, way, batching, bf16):
    is_adapted = make_model is adapted_llama_of
    adapter = AdapterConfig(use_peft=True, lora_r=1) if is_adapted else None

    def kept(num_layers):
        """Bytes that depend on positions; copies of weights in bfloat16 do not."""
        torch.manual_seed(0)
        model = make_model(num_layers).train()
        native = native_over(model) if way == PACKED else None
        own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        sizes = {weight.numel() * 2 for weight in model.parameters()} if bf16 else set()
        held = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            is_copy = storage.nbytes() in sizes and tensor.numel() * 2 in sizes
            if storage.data_ptr() not in own and not is_copy:
                held[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        ids_RT = torch.randint(61, (NUM_ROWS, LENGTH))
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            if native is not None:
                native.packed(ids_RT, pack(torch.full((NUM_ROWS,), LENGTH).numpy()))
            else:
                model.get_decoder()(input_ids=ids_RT, use_cache=False)
        return sum(size for size, _ in held.values())

    model = make_model(2)
    number = sum(weight.numel() for weight in model.parameters())
    counted = layer_bytes(
        model.config,
        Sizes(number, number // 2 if is_adapted else number, norms_queries=make_model is olmo2_of),
        way=way,
        adapter=adapter,
        bf16=bf16,
        device="cpu",
    )
    expected = NUM_ROWS * LENGTH * counted.kept
    if way == PACKED:  # the probabilities of one block
        expected += (2 if bf16 else 4) * 2 * NUM_ROWS * LENGTH * LENGTH
    assert kept(3) - kept(2) == pytest.approx(expected, rel=0.06)


def test_recomputation_takes_less_and_more_layers_take_more():
    deep = tiny_olmo2(num_hidden_layers=6).config
    shallow = tiny_olmo2().config
    sizes = Sizes(1000, 1000)

    def of(config, recomputes=False):
        return training_memory(config, sizes, [SIZE], way=PACKED, gradient_checkpointing=recomputes)

    assert of(deep) > of(shallow)
    assert of(deep, recomputes=True) < of(deep)
    assert of(shallow, recomputes=True) <= of(shallow)


def test_a_frozen_model_has_neither_gradients_nor_moments():
    config = tiny_olmo2().config

    def of(trained):
        sizes = Sizes(10**6, trained)
        return training_memory(
            config, sizes, [SIZE], way=HEAD_AT_LABELS, gradient_checkpointing=False
        )

    assert of(10**6) - of(1000) > 2 * FLOAT * 0.99 * 10**6


def test_the_memory_here_is_divided_among_the_ranks_of_the_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = memory_at_hand(torch.device("cpu"))
    assert alone > 2**28
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory_at_hand(torch.device("cpu")) == alone // 2


def test_a_container_may_have_less_than_the_machine(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(memory, "CONTAINER_LIMITS", (limit, tmp_path / "absent"))
    limit.write_text("1000\n")
    assert memory_at_hand(torch.device("cpu")) == 1000
    limit.write_text("max\n")
    assert memory_at_hand(torch.device("cpu")) > 2**28


def test_what_fills_the_memory_here_does_not_fit(monkeypatch):
    monkeypatch.setattr(tuning, "memory_at_hand", lambda device: 1000)
    assert tuning.fits(850, torch.device("cpu"))
    assert not tuning.fits(851, torch.device("cpu"))


# ---------------------------------------------------------------- many processes

LLAMA_7B = LlamaConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    tie_word_embeddings=False,
)
NUMBER = 6_738_415_616  # parameters of Llama 2 7B
ENDS = 2 * 32_000 * 4096
LAYER = (NUMBER - ENDS) / 32


def test_divided_over_eight_each_process_holds_an_eighth_and_what_is_gathered():
    launch = Launch(8, divides=True)
    held = held_by_each(LLAMA_7B, Sizes(NUMBER, NUMBER), launch)
    assert held.weights == held.gradients == 4 * NUMBER // 8  # 3.4 GB
    assert held.moments == 8 * NUMBER // 8
    # Embedding and head, a layer and the next, and the gradient of one.
    assert held.gathered == pytest.approx(4 * (ENDS + 2 * LAYER + LAYER))
    assert 16.9e9 < sum(held) < 17.0e9


def test_layers_that_are_not_let_go_are_all_gathered():
    held = held_by_each(LLAMA_7B, Sizes(NUMBER, NUMBER), Launch(8, divides=True, releases=False))
    assert held.gathered == pytest.approx(4 * (NUMBER + LAYER))


def test_copies_are_whole_and_send_gradients_from_buckets_of_their_own():
    alone = held_by_each(LLAMA_7B, Sizes(NUMBER, NUMBER), None)
    assert sum(alone) == 16 * NUMBER
    assert held_by_each(LLAMA_7B, Sizes(NUMBER, NUMBER), Launch(1)) == alone
    copies = held_by_each(LLAMA_7B, Sizes(NUMBER, NUMBER), Launch(8))
    assert sum(copies) - sum(alone) == 4 * NUMBER


def test_an_adapters_few_gradients_are_all_that_is_divided_of_them():
    few = 40_000_000
    held = held_by_each(LLAMA_7B, Sizes(NUMBER + few, few), Launch(4, divides=True))
    assert (held.gradients, held.moments) == (few, 2 * few)
    assert held.weights == NUMBER + few


def test_a_plan_is_made_for_a_file_of_accelerate(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    recipes = Path(__file__).parents[2] / "recipes" / "accelerate"
    fsdp2, ddp = str(recipes / "fsdp2.yaml"), str(recipes / "ddp.yaml")
    assert planned_launch(None, None) is None
    assert planned_launch(4, None) == Launch(4)
    assert planned_launch(None, fsdp2) == Launch(8, divides=True)
    assert planned_launch(16, fsdp2) == Launch(16, divides=True)
    assert planned_launch(None, ddp) == Launch(8)
    other = tmp_path / "other.yaml"
    other.write_text("distributed_type: TPU\n")
    with pytest.raises(UserError, match="distributed_type is TPU"):
        planned_launch(None, str(other))
    with pytest.raises(UserError, match="cannot be read"):
        planned_launch(None, str(tmp_path / "absent.yaml"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    started = planned_launch(None, None)
    assert started is not None and (started.num_processes, started.divides) == (2, False)
