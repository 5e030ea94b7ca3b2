"""Request files: accuracy and bits per byte against values worked out by hand."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from olmo_base.model.transformer import ModelConfig, Transformer
from olmo_base.olmes_requests import (
    encode_option,
    load_requests,
    read_questions,
    request_paths,
    score_requests,
)
from olmo_base.run.errors import DataError, UserError

OFFICIAL = Path(__file__).parents[3] / "shared/data/olmes_requests"


def byte_tokenizer() -> Tokenizer:
    """An id for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def constant_model(logits_V: torch.Tensor, max_length: int = 64) -> Transformer:
    """A model of two channels that finds the same next token likely whatever it has read."""
    model = Transformer(
        ModelConfig(
            vocab_size=len(logits_V),
            hidden_size=2,
            intermediate_size=2,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=max_length,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.embed_tokens.weight[:] = 1.0
        model.norm.get_parameter("weight")[:] = 1.0
        model.output_weight[:] = logits_V[:, None] / 2  # the normed state is (1, 1)
    return model


def row(doc_id: int, idx: int, label: int, continuation: str, context: str = "Q:") -> dict:
    request = {"context": context, "continuation": continuation}
    return {"doc_id": doc_id, "idx": idx, "label": label, "request": request}


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(one) + "\n" for one in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_accuracy_and_bits_per_byte_are_those_worked_out_by_hand(tmp_path):
    tokenizer = byte_tokenizer()
    [a], [b] = (tokenizer.encode(letter).ids for letter in "ab")
    probabilities_V = torch.full((256,), 0.25 / 254)
    probabilities_V[a], probabilities_V[b] = 0.5, 0.25
    model = constant_model(probabilities_V.log())
    write(
        tmp_path / "task/rc.jsonl.gz",
        [
            # a: 1 bit; b: 2 bits. The likeliest is "a", and it is right.
            row(0, 0, 0, "a"),
            row(0, 1, 0, "b"),
            # aaa: 3 bits, 1 a character; b: 2 bits, 2 a character. Likeliest b, per character aaa.
            row(1, 0, 0, "aaa"),
            row(1, 1, 0, "b"),
            # bb is right, and neither the likeliest nor so per character: 2 bits a byte
            row(2, 0, 1, "a"),
            row(2, 1, 1, "bb"),
            row(1_000_000, 0, 1, "a", "Answer:"),  # the copy without its text: not a question
        ],
    )
    files = load_requests([str(tmp_path)], tokenizer, limit=0)
    assert score_requests(model, files, bf16=False) == {
        "requests_accuracy/task/rc": pytest.approx(1 / 3),
        "requests_accuracy_per_char/task/rc": pytest.approx(2 / 3),
        "requests_bits_per_byte/task/rc": pytest.approx((1 + 1 + 2) / 3, abs=1e-5),
    }
    [first] = load_requests([str(tmp_path)], tokenizer, limit=1)
    assert len(first.questions) == 1 and len(first.requests) == 2


def test_tokens_of_too_long_a_context_are_counted(tmp_path):
    model = constant_model(torch.zeros(256), max_length=8)
    path = write(tmp_path / "r.jsonl", [row(0, 0, 0, "ab", "Q" * 10), row(0, 1, 0, "c")])
    files = load_requests([str(path)], byte_tokenizer(), limit=0)
    figures = score_requests(model, files, bf16=False)
    assert figures["requests_cut/r"] == 10 + 2 - 1 - 8  # the last token is only predicted
    assert figures["requests_bits_per_byte/r"] == pytest.approx(math.log2(256))


def test_blanks_at_the_end_of_a_context_are_part_of_the_answer():
    tokenizer = byte_tokenizer()
    before, after = encode_option(tokenizer, "Q: ", "yes")
    assert (tokenizer.decode(before), tokenizer.decode(after)) == ("Q:", " yes")


@pytest.mark.parametrize(
    "rows, problem",
    [
        ([{"doc_id": 0}], "line 1: needed doc_id, idx, label and request"),
        ([row(0, 0, 0, "a"), row(0, 0, 0, "b")], "line 2: question 0 has two labels, or option 0"),
        ([row(0, 0, 5, "a")], r"question 0: options \[0\], label 5"),
        ([], "holds no question"),
    ],
    ids=["missing key", "twice", "no such label", "empty"],
)
def test_a_file_that_is_no_requests_is_one_message(tmp_path, rows, problem):
    path = write(tmp_path / "r.jsonl", rows)
    with pytest.raises(DataError, match=problem):
        read_questions(path, 0)


def test_a_cut_off_archive_and_a_missing_file_are_named(tmp_path):
    path = write(tmp_path / "r.jsonl.gz", [row(0, 0, 0, "a" * 500)])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"r\.jsonl\.gz, line 2: cannot be read"):
        read_questions(path, 0)
    with pytest.raises(UserError, match="nowhere does not exist"):
        request_paths([str(tmp_path / "nowhere")])


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="no official request files on this machine")
def test_every_official_file_is_read_as_it_is():
    files = request_paths([str(OFFICIAL)])
    assert len(files) >= 20
    for path in files.values():
        questions = read_questions(path, 5)
        assert len(questions) == 5 and all(len(one.options) >= 2 for one in questions)
