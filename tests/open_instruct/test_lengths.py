"""Examples that are too long are cut, split or dropped as asked, and each is counted."""

import os
import re
import signal
import sys

import pytest

from olmo_base.run.artefact import ExampleCounts
from olmo_base.run.errors import DataError, UserError
from open_instruct import lengths
from open_instruct.control_tokens import Encoded
from open_instruct.encode import ChatEncoder, find_template
from open_instruct.examples import DataConfig, Dialogue, Message, Pair, Rated, Source
from open_instruct.lengths import encode_dialogues, encode_pairs, encode_rated
from tests.open_instruct.rows import SYSTEM, assistant, user
from tests.open_instruct.test_encode import DIALOGUE, encoder_for, readable


def config(**keys) -> DataConfig:
    return DataConfig(dataset_mixer=(Source("x"),), **keys)


def dialogues(*lengths: int) -> list[Dialogue]:
    """Tülu dialogues of the given numbers of tokens: 9 around an answer of single letters."""
    return [
        Dialogue(
            [user("hello"), assistant("é" * ((length - 8) // 2))],
            "data.jsonl",
            line,
        )
        for line, length in enumerate(lengths, start=1)
    ]


@pytest.fixture(scope="module")
def tulu(chat_tokenizer) -> ChatEncoder:
    return encoder_for(chat_tokenizer, "tulu")


def test_lengths_are_in_tokens(tulu):
    sequences = encode_dialogues(dialogues(10, 20), tulu, config(), ExampleCounts())
    assert [len(sequence.ids) for sequence in sequences] == [10, 20]


def test_a_too_long_example_is_an_error_that_names_row_number_and_choices(tulu):
    with pytest.raises(DataError, match=r"data.jsonl, line 2: 20 tokens. 2 of 3 examples") as error:
        encode_dialogues(dialogues(10, 20, 30), tulu, config(max_length=12), ExampleCounts())
    assert "drop, truncate_left, truncate_right or, for dialogues, split_turns" in str(error.value)
    assert "longest has 30" in str(error.value)


def test_too_many_too_long_examples_are_an_error_whatever_is_done_with_them(tulu):
    for choice in ("drop", "truncate_left", "truncate_right"):
        settings = config(max_length=12, on_too_long=choice, max_too_long_fraction=0.5)
        with pytest.raises(UserError, match=r"2 of 3 examples \(66.7%\).*allows 50.0%"):
            encode_dialogues(dialogues(10, 20, 30), tulu, settings, ExampleCounts())
        counts = ExampleCounts()
        kept = encode_dialogues(dialogues(10, 10, 30, 10), tulu, settings, counts)
        assert len(kept) == counts.used == (3 if choice == "drop" else 4)
        assert sum(counts.dropped.values()) == (1 if choice == "drop" else 0)
        assert counts.truncated == (0 if choice == "drop" else 1)


def test_truncation_keeps_the_side_it_says(tulu):
    whole = tulu.encode_dialogue(dialogues(30)[0].messages)
    for choice, part in (("truncate_right", slice(0, 12)), ("truncate_left", slice(18, 30))):
        settings = config(max_length=12, on_too_long=choice, max_too_long_fraction=1)
        kept = encode_dialogues(dialogues(30), tulu, settings, ExampleCounts())
        assert kept == [Encoded(whole.ids[part], whole.is_learnt[part])]


def test_truncation_on_the_left_keeps_the_bos(chat_tokenizer):
    encoder = encoder_for(chat_tokenizer, "olmo")
    settings = config(max_length=12, on_too_long="truncate_left", max_too_long_fraction=1)
    ids = encode_dialogues(dialogues(30), encoder, settings, ExampleCounts())[0].ids
    assert len(ids) == 12
    assert ids[0] == chat_tokenizer.bos_token_id
    assert ids[-1] == chat_tokenizer.eos_token_id


def test_an_example_with_nothing_left_to_learn_is_dropped_and_counted(tulu):
    settings = config(max_length=4, on_too_long="truncate_right", max_too_long_fraction=1)
    counts = ExampleCounts()
    assert encode_dialogues(dialogues(30), tulu, settings, counts) == []
    assert counts.dropped == {"nothing left to learn after truncation": 1}
    assert (counts.used, counts.truncated) == (0, 0)


def pair(prompt: str, chosen: str, rejected: str) -> Pair:
    return Pair([user(prompt)], [assistant(chosen)], [assistant(rejected)], "pairs.jsonl", 7)


def test_both_sides_of_a_pair_keep_the_same_prompt_when_it_is_cut(tulu):
    pairs = [pair("é" * 20, "yes", "é" * 5)]
    whole = tulu.encode_pair(pairs[0].prompt, pairs[0].chosen, pairs[0].rejected)
    settings = config(max_length=20, on_too_long="truncate_left", max_too_long_fraction=1)
    counts = ExampleCounts()
    (cut,) = encode_pairs(pairs, tulu, settings, counts)
    assert max(len(cut.chosen.ids), len(cut.rejected.ids)) == 20
    shared = cut.shared_prompt_length
    assert cut.chosen.ids[:shared] == cut.rejected.ids[:shared]
    for side, full in ((cut.chosen, whole.chosen), (cut.rejected, whole.rejected)):
        assert side.ids == full.ids[len(full.ids) - len(side.ids) :]
        assert sum(side.is_learnt) == sum(full.is_learnt)
    assert (counts.used, counts.truncated) == (1, 1)


def test_pairs_that_truncation_makes_useless_are_dropped_with_the_reason(tulu):
    alike = pair("hello", "é" * 10 + "yes", "é" * 10 + "no")
    for given, choice, length, reason in (
        (alike, "truncate_right", 16, "chosen and rejected the same after truncation"),
        (alike, "truncate_right", 4, "nothing left to learn after truncation"),
        (alike, "truncate_left", 10, "answer longer than max_length"),
        (alike, "drop", 10, "longer than max_length"),
    ):
        settings = config(max_length=length, on_too_long=choice, max_too_long_fraction=1)
        counts = ExampleCounts()
        assert encode_pairs([given], tulu, settings, counts) == []
        assert counts.dropped == {reason: 1}


@pytest.mark.parametrize("choice", ["truncate_left", "truncate_right", "drop"])
def test_a_rated_answer_is_learnt_alone_and_cut_like_a_pair(tulu, choice):
    given = [
        Rated([user("two plus two?")], [assistant(text)], True, "r", 1) for text in ("4", "5" * 9)
    ]
    counts = ExampleCounts()
    whole = encode_rated(given, tulu, config(), counts)
    for item, expected in zip(whole, given, strict=True):
        pair_of_it = tulu.encode_pair(expected.prompt, expected.answer, expected.answer)
        assert item.sequence == pair_of_it.chosen
        assert item.prompt_length == pair_of_it.shared_prompt_length
        assert not any(item.sequence.is_learnt[: item.prompt_length])
        assert any(item.sequence.is_learnt[item.prompt_length :])
    length = len(whole[1].sequence.ids) - 2
    settings = config(max_length=length, on_too_long=choice, max_too_long_fraction=1)
    counts = ExampleCounts()
    cut = encode_rated(given, tulu, settings, counts)
    assert len(cut) == counts.used == (1 if choice == "drop" else 2)
    assert max(len(item.sequence.ids) for item in cut) <= length
    if choice == "truncate_left":
        assert cut[1].prompt_length == whole[1].prompt_length - 2
        assert sum(cut[1].sequence.is_learnt) == sum(whole[1].sequence.is_learnt)


def test_a_too_long_pair_is_an_error_with_its_line(tulu):
    with pytest.raises(DataError, match=r"pairs.jsonl, line 7: \d+ tokens"):
        encode_pairs([pair("é" * 99, "a", "b")], tulu, config(max_length=20), ExampleCounts())


def test_an_example_that_cannot_be_encoded_is_an_error_or_dropped(train_tokenizer):
    letters = train_tokenizer(("<|endoftext|>", "<|pad|>"), vocab_size=258)
    encoder = encoder_for(letters, "tulu")
    forged: list[Message] = [user("<|user|>"), *DIALOGUE[2:3]]
    given = [Dialogue(DIALOGUE, "a.jsonl", 1), Dialogue(forged, "a.jsonl", 2)]
    with pytest.raises(DataError, match=r"a.jsonl, line 2: .*<\|user\|>"):
        encode_dialogues(given, encoder, config(), ExampleCounts())
    counts = ExampleCounts()
    assert len(encode_dialogues(given, encoder, config(on_bad_row="drop"), counts)) == 1
    assert counts.dropped == {"spells a marker of the chat template": 1}


def test_a_long_dialogue_is_split_before_user_turns_and_every_answer_is_learnt_once(
    tulu, chat_tokenizer
):
    talk: list[Message] = [SYSTEM]
    for number in range(5):
        talk += [user(f"{number}?"), assistant(f"{number}" * (40 if number == 3 else 2))]
    settings = config(max_length=35, on_too_long="split_turns", max_too_long_fraction=1.0)
    counts = ExampleCounts()
    kept = encode_dialogues([Dialogue(talk, "x", 1), *dialogues(10)], tulu, settings, counts)
    texts = [readable(chat_tokenizer, item) for item in kept]
    head = "<|system|>\ns\n"
    assert [text.count("⟦") for text in texts] == [2, 1, 1, 1]
    assert all(text.startswith(head) for text in texts[:3])
    learnt = re.findall(r"⟦(\d+)<", "".join(texts[:3]))
    assert learnt == ["00", "11", "22", "44"]
    assert all(len(item.ids) <= 35 for item in kept)
    assert counts.as_dict() == {
        "used": 4,
        "truncated": 0,
        "split": 1,
        "dropped": {"exchange longer than max_length": 1},
    }


def test_of_a_split_dialogue_the_last_answer_may_be_the_only_one_learnt(tulu, chat_tokenizer):
    talk = [turn for n in range(3) for turn in (user(f"{n}?"), assistant(f"{n}" * 9))]
    settings = config(
        max_length=25, on_too_long="split_turns", max_too_long_fraction=1.0, learn_turns="last"
    )
    (piece,) = encode_dialogues([Dialogue(talk, "x", 1)], tulu, settings, ExampleCounts())
    assert readable(chat_tokenizer, piece).endswith("⟦222222222<|endoftext|>⟧")


def test_pairs_ratings_and_texts_are_not_split_and_it_is_said_why(tulu):
    settings = config(max_length=12, on_too_long="split_turns", max_too_long_fraction=1.0)
    pair = Pair([user("q")], [assistant("a")], [assistant("b")], "x", 1)
    with pytest.raises(UserError, match=r"answers of a pair share one prompt.*Choose drop"):
        encode_pairs([pair], tulu, settings, ExampleCounts())
    rated = Rated([user("q")], [assistant("a")], True, "x", 1)
    with pytest.raises(UserError, match="a rating is of one answer"):
        encode_rated([rated], tulu, settings, ExampleCounts())
    counts = ExampleCounts()
    assert encode_dialogues([Dialogue([], "x", 1, "é" * 20)], tulu, settings, counts) == []
    assert counts.dropped == {"text longer than max_length, which has no turns to split at": 1}


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two cores",
)
def test_several_processes_encode_what_one_does_and_end_without_a_word(tulu, monkeypatch, capfd):
    forged = Dialogue([user("q"), assistant("<|user|>")], "x", 1)
    given = [*dialogues(*range(10, 40)), forged, *dialogues(11)]
    pairs = [Pair([user("q")], [assistant(f"{n}")], [assistant("b")], "x", n) for n in range(9)]
    rated = [Rated([user("q")], [assistant(f"{n}")], n < 3, "x", n) for n in range(9)]

    def encode() -> list[object]:
        return [
            encode_dialogues(given, tulu, config(), ExampleCounts()),
            encode_pairs(pairs, tulu, config(), ExampleCounts()),
            encode_rated(rated, tulu, config(), ExampleCounts()),
        ]

    alone = encode()
    monkeypatch.setattr(lengths, "BATCH_SIZE", 4)
    monkeypatch.setattr(lengths, "LEAST_FOR_PROCESSES", 8)
    before = signal.signal(signal.SIGTERM, lambda *_: print("terminated", file=sys.stderr))
    try:
        assert encode() == alone
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capfd.readouterr().err == ""


def test_plain_text_stands_between_the_tokens_of_a_document_and_is_learnt(train_tokenizer):
    tokenizer = train_tokenizer(bos=True)
    text = "Hello <|user|> world"
    for name, opener in (("tulu", []), ("olmo", [tokenizer.bos_token_id])):
        encoder = ChatEncoder(tokenizer, find_template(name).read_text())
        settings = config(max_length=50)
        given = [Dialogue([], "x", 1, text), Dialogue(DIALOGUE, "x", 2)]
        sequence, dialogue = encode_dialogues(given, encoder, settings, ExampleCounts())
        assert sequence.ids[: len(opener)] == opener
        assert sequence.ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(sequence.ids[len(opener) : -1]) == text
        assert encoder.control_ids.isdisjoint(sequence.ids[len(opener) : -1])
        assert sequence.is_learnt == [False] * len(opener) + [True] * (
            len(sequence.ids) - len(opener)
        )
        assert dialogue == encoder.encode_dialogue(DIALOGUE)
