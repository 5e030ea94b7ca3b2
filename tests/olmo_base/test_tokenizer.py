"""The tokenizer: any text comes back unchanged, and no text can spell a control token."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from olmo_base.corpus.documents import DocumentSource
from olmo_base.corpus.shards import read_shards
from olmo_base.corpus.tokenize import TokenizeRecipe
from olmo_base.corpus.tokenize import run as tokenize
from olmo_base.run.artefact import RunConfig
from olmo_base.run.errors import UserError
from olmo_base.run.recipe import RecipeError, load_recipe
from olmo_base.tokenizer import (
    SPECIAL_TOKENS,
    TokenizerRecipe,
    load_tokenizer,
    plan,
    run,
    train_tokenizer,
)

OLMO_TOKENIZERS = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
TEXTS = [
    f"The {animal} number {number} sat on the {place}, and it said: hello, 世界! 🙂\n"
    for number, (animal, place) in enumerate(
        [("cat", "mat"), ("dog", "log"), ("owl", "bowl"), ("frog", "rock")] * 20
    )
]


def write_documents(folder, texts=TEXTS):
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DocumentSource(str(path))


def recipe_for(folder, **keys) -> TokenizerRecipe:
    keys = {"vocab_size": 400, **keys}
    return TokenizerRecipe(
        "tokenizer", (write_documents(folder),), RunConfig(str(folder / "run")), **keys
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(recipe_for(tmp_path_factory.mktemp("tokenizer"))).path


def random_texts(number):
    """Texts over all of Unicode, with everything that was ever a trap drawn often."""
    generator = random.Random(0)
    traps = [
        *"\x00\r\n\t  \u0301\u200d\ufeff\ufffd\u2028\U0010ffff\ue000",
        *("\r\n", "👩‍👩‍👧‍👦", "e\u0301", "  ", "12345", "ﷺ", "नमस्ते", "'s", *SPECIAL_TOKENS),
    ]
    for _ in range(number):
        pieces = []
        for _ in range(generator.randrange(12)):
            code = generator.choice([generator.randrange(128), generator.randrange(0x110000)])
            any_character = chr(code) if not 0xD800 <= code < 0xE000 else "x"
            pieces.append(generator.choice([any_character, any_character, *traps]))
        yield "".join(pieces)


def test_any_text_comes_back_unchanged(trained):
    tokenizer = load_tokenizer(trained)
    automatic = AutoTokenizer.from_pretrained(trained)
    for text in random_texts(2000):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert automatic.decode(ids) == text


def test_text_that_spells_a_control_token_is_ordinary_text(trained):
    tokenizer = load_tokenizer(trained)
    special = set(range(len(SPECIAL_TOKENS)))
    for token in SPECIAL_TOKENS:
        assert special.isdisjoint(tokenizer.encode(f"say {token}{token} please").ids)


def test_a_text_full_of_control_tokens_teaches_no_merge_of_them(tmp_path):
    recipe = recipe_for(tmp_path, vocab_size=600)
    tokenizer = train_tokenizer(["<|user|><|endoftext|>|||IP_ADDRESS|||" * 50] * 4, recipe)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    assert [vocabulary[token] for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    tokenizer.encode_special_tokens = True
    assert min(tokenizer.encode("<|user|><|endoftext|>").ids) >= len(SPECIAL_TOKENS)


def test_transformers_reads_the_same_ids_and_the_special_tokens(trained):
    automatic = AutoTokenizer.from_pretrained(trained)
    tokenizer = load_tokenizer(trained)
    text = "The cat 42 said  hello\n\n"
    assert automatic(text)["input_ids"] == tokenizer.encode(text).ids
    assert set(automatic(text)) == {"input_ids", "attention_mask"}
    assert (automatic.eos_token_id, automatic.pad_token_id, automatic.bos_token_id) == (0, 1, None)
    assert automatic.convert_tokens_to_ids("<|assistant|>") == 6
    assert automatic.decode([5, *tokenizer.encode("hi").ids], skip_special_tokens=True) == "hi"
    assert automatic.model_max_length == 4096


def test_digits_stand_alone_unless_the_recipe_says_otherwise(tmp_path):
    texts = ["in 1234 and 1234 and 1234 again"] * 20
    alone = train_tokenizer(texts, recipe_for(tmp_path))
    together = train_tokenizer(texts, recipe_for(tmp_path, split_digits=False))
    assert alone.encode("x 1234").tokens == ["x", "Ġ", "1", "2", "3", "4"]
    assert together.encode("x 1234").tokens == ["x", "Ġ1234"]


def test_the_same_texts_give_the_same_tokenizer_in_another_process(tmp_path, trained):
    recipe_path = tmp_path / "recipe.yaml"
    source = write_documents(tmp_path)
    recipe_path.write_text(
        f"stage: tokenizer\nvocab_size: 400\ndataset_mixer: [{{path: {source.path}}}]\n"
        f"output_dir: {tmp_path / 'again'}\n"
    )
    subprocess.run(
        [sys.executable, "-m", "olmo_base", str(recipe_path)],
        check=True,
        cwd=Path(__file__).parents[2],
        env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (
        trained / "tokenizer.json"
    ).read_bytes()


def test_a_small_text_gives_a_smaller_vocabulary_and_says_so(tmp_path, capsys):
    folder = run(recipe_for(tmp_path, vocab_size=5000))
    assert load_tokenizer(folder.path).get_vocab_size() < 5000
    assert "not 5,000" in capsys.readouterr().err


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="256 bytes and 14 special tokens already need 270"):
        recipe_for(tmp_path, vocab_size=269)


def test_an_extra_special_token_said_twice_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="extra_special_tokens"):
        recipe_for(tmp_path, extra_special_tokens=("<|user|>",))


def test_the_recipe_loads_from_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "stage: tokenizer\nvocab_size: 100\ndataset_mixer: [{path: x}]\noutput_dir: y\n"
    )
    with pytest.raises(UserError, match=r"recipe.yaml, line 2: vocab_size: 100 is too small"):
        load_recipe(TokenizerRecipe, path)
    recipe = load_recipe(TokenizerRecipe, path, ["vocab_size=2000"])
    assert recipe.dataset_mixer == (DocumentSource("x"),)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.json does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizers file"):
        load_tokenizer(tmp_path)


def test_the_plan_counts_what_a_run_would_read(tmp_path):
    assert plan(recipe_for(tmp_path)) == {
        "documents": 80,
        "characters": sum(map(len, TEXTS)),
        "files": 1,
        "vocab_size": 400,
    }
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- OLMo's own


@pytest.mark.skipif(not OLMO_TOKENIZERS.is_dir(), reason="no tokenizers in ../shared/data")
@pytest.mark.parametrize(
    ("name", "eos_token", "eos_token_id"),
    [  # the two name their end of text and their masked addresses the other way round
        ("allenai_eleuther-ai-gpt-neox-20b-pii-special", "<|endoftext|>", 0),
        ("allenai_gpt-neox-olmo-dolma-v1_5", "<|endoftext|>", 50_279),
    ],
)
def test_the_tokenizers_of_olmo_tokenize_documents(tmp_path, name, eos_token, eos_token_id):
    path = OLMO_TOKENIZERS / f"{name}.json"
    texts = ["A river.\n\n\tIt  starts here: 12,345 été, 漢字 🦊", "A mail to |||EMAIL_ADDRESS|||."]
    recipe = TokenizeRecipe(
        "tokenize", str(path), (write_documents(tmp_path, texts),), RunConfig(str(tmp_path / "run"))
    )
    folder = tokenize(recipe).path
    (shard,) = read_shards(folder / "tokens" / "train")
    assert (shard.info.dtype, shard.info.eos_token_id) == ("uint16", eos_token_id)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=eos_token)
    ids = [theirs(text, add_special_tokens=False, split_special_tokens=True) for text in texts]
    expected = [id_ for item in ids for id_ in [*item["input_ids"], eos_token_id]]
    assert shard.tokens().tolist() == expected
    written = AutoTokenizer.from_pretrained(folder)
    assert written.eos_token_id == eos_token_id
    assert written.decode(expected[: expected.index(eos_token_id)]) == texts[0]
