import json
import re
from pathlib import Path

import pytest

from eval.questions import data_file, read_items
from eval.statistics import wilson_interval
from eval.tasks import select
from olmo_base.corpus.documents import DocumentSource, DocumentStream
from olmo_base.run.artefact import ExampleCounts, RunConfig, sha256_file
from open_instruct import shipped_folder
from open_instruct.examples import Source, read_dialogues, read_pairs
from open_instruct.pipeline import load_stage_recipe
from open_instruct.tinyworld import TinyworldRecipe, plan, run, tinyworld_rows, write_tinyworld
from open_instruct.tinyworld.questions import FACT_FORMS, FORMS
from open_instruct.tinyworld.world import ATTRIBUTES, Fact, make_world

SMALL = dict(num_documents=3000, num_dialogues=1500, num_pairs=400)


def small_recipe(output_dir, seed=7, **changes) -> TinyworldRecipe:
    run_config = RunConfig(output_dir=str(output_dir), seed=seed)
    return TinyworldRecipe(stage="tinyworld", run=run_config, **{**SMALL, **changes})


@pytest.fixture(scope="module")
def rows():
    return dict(tinyworld_rows(small_recipe("nowhere")))


@pytest.fixture(scope="module")
def world():
    recipe = small_recipe("nowhere")
    return make_world(recipe.run.seed, recipe.num_people, recipe.held_out_share)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return run(small_recipe(tmp_path_factory.mktemp("tinyworld") / "world")).path


def training_turns(rows):
    """(question, answer, is right for certain) of every training turn of dialogues and pairs."""
    for name in ("sft", "sft_eval"):
        for row in rows[name]:
            users, assistants = row["messages"][::2], row["messages"][1::2]
            for user, assistant in zip(users, assistants, strict=True):
                yield user["content"], assistant["content"]
    for name in ("dpo", "dpo_eval"):
        for row in rows[name]:
            for side in ("chosen", "rejected"):
                yield row["prompt"][0]["content"], row[side][0]["content"]


def eval_prompts(rows):
    for name, task in rows.items():
        if name.startswith("eval_"):
            for row in task:
                yield name, row.get("prompt", row.get("question"))


# ---------------------------------------------------------------- the same seed, the same bytes


def test_a_seed_gives_the_same_bytes_and_another_seed_gives_others(folder, tmp_path):
    again = run(small_recipe(tmp_path / "again")).path
    other = run(small_recipe(tmp_path / "other", seed=8)).path
    names = sorted(file.name for file in folder.glob("*.jsonl"))
    assert len(names) == len(plan(small_recipe("nowhere"))) == 14
    for name in names:
        assert sha256_file(folder / name) == sha256_file(again / name)
        assert sha256_file(folder / name) != sha256_file(other / name)


def test_the_length_of_one_file_changes_no_other(rows):
    longer = dict(tinyworld_rows(small_recipe("nowhere", num_dialogues=1600)))
    assert longer["sft"][:1500] == rows["sft"]
    assert {name for name in rows if rows[name] != longer[name]} == {"sft"}


def test_the_plan_is_what_is_written(rows):
    written = {f"{name}.jsonl": len(task) for name, task in rows.items()}
    assert written == plan(small_recipe("nowhere"))


def test_a_finished_world_is_not_written_again(folder):
    before = (folder / "sft.jsonl").stat().st_mtime_ns
    assert run(small_recipe(folder)).is_finished
    assert (folder / "sft.jsonl").stat().st_mtime_ns == before


def test_the_shipped_recipe_is_a_tinyworld_recipe():
    path = shipped_folder("recipes") / "quickstart" / "tinyworld.yaml"
    _, recipe = load_stage_recipe(path, ["root=somewhere"])
    assert isinstance(recipe, TinyworldRecipe)
    assert recipe.run.output_dir == "somewhere/world"


# ---------------------------------------------------------------- what is held out


def test_no_question_of_the_evaluation_is_asked_in_training(rows):
    asked = {question for question, _ in training_turns(rows)}
    assert len(asked) > 1000
    assert not [prompt for _, prompt in eval_prompts(rows) if prompt in asked]


def test_held_out_facts_are_read_but_never_asked_in_training_in_any_wording(rows, world):
    asked = "\n".join({question for question, _ in training_turns(rows)})
    text = " ".join(row["text"] for row in rows["pretrain"])
    assert len(world.held_out_facts) > 0.3 * len(world.facts)
    for fact in world.held_out_facts:
        # a question with an instruction before or after it still holds the plain question
        assert not [question for question in fact.questions if question in asked]
        assert any(fact.fill(words) in text for words in ATTRIBUTES[fact.attribute].statements)


def test_some_facts_are_held_out_alone_and_some_with_all_others_about_their_person(rows, world):
    asked_about = {row["category"].partition(", ")[2] for row in rows["eval_recall"]}
    assert asked_about == {"new combination", "new person"}
    questions = " ".join(question for question, _ in training_turns(rows))
    assert len(world.new_people) == 6
    for person in world.people:
        assert (f" {person}" in questions) == (person not in world.new_people)


def test_problems_of_the_evaluation_stand_in_no_document(rows):
    text = "\n".join(row["text"] for row in rows["pretrain"]) + "\n"
    prompts = "\n".join(row["prompt"] for row in rows["eval_arithmetic"])
    sums = set(re.findall(r"\d+[+-]\d+", prompts))
    assert not sums & set(re.findall(r"\d+[+-]\d+", text))
    read = set(
        re.findall(
            r"^(?:in order|backwards|again|letters in order|numbers in order)\n(.*)$", text, re.M
        )
    )
    read |= set(
        re.findall(r"^the (?:words|letters|numbers) (.*?) (?:in order|backwards|said)", text, re.M)
    )
    assert len(read) > 1000
    for task in ("reverse", "copy", "sort"):
        asked = {row["prompt"].partition(": ")[2] for row in rows[f"eval_{task}"]}
        assert not {" ".join(sorted(items.split())) for items in asked} & {
            " ".join(sorted(items.split())) for items in read
        }


def test_pretraining_text_holds_no_chat_and_no_held_out_document(rows):
    documents = {row["text"] for row in rows["pretrain"]}
    assert not documents & {row["text"] for row in rows["pretrain_eval"]}
    assert not [text for text in documents if re.search(r"\b(Question|Answer|User):", text)]


# ---------------------------------------------------------------- every answer is right


def right_fact_answers(world):
    return {question: fact for fact in world.facts.values() for question in fact.questions}


def worked_out(a, sign, b):
    return str(int(a) + int(b) if sign == "+" else int(a) - int(b))


def right_problem_answer(prompt):
    """The answer to a question about a skill, worked out from its words alone."""
    if match := re.match(r"(?:What is|How much is|Work out) (\d+)([+-])(\d+)[?.]$", prompt):
        return worked_out(*match.groups())
    if match := re.match(r"Which (?:number )?is (bigger|smaller), (\d+) or (\d+)\?$", prompt):
        return str((max if match[1] == "bigger" else min)(int(match[2]), int(match[3])))
    if match := re.match(r"Which letter comes first in the alphabet, (\w) or (\w)\?$", prompt):
        return min(match[1], match[2])
    if match := re.match(
        r"Is (\d+) (bigger|smaller) than (\d+)\? (Answer|Say) yes or no\.", prompt
    ):
        a, b = int(match[1]), int(match[3])
        return "yes" if (a > b if match[2] == "bigger" else a < b) else "no"
    work, _, listed = prompt.partition(": ")
    items = listed.split()
    return {
        "Sort these letters": sorted(items),
        "Put these letters in order": sorted(items),
        "Sort these numbers": sorted(items, key=lambda item: int(item) if item.isdigit() else 0),
        "Put these numbers in order": sorted(
            items, key=lambda item: int(item) if item.isdigit() else 0
        ),
        "Reverse these words": items[::-1],
        "Say these words backwards": items[::-1],
        "Repeat these words": items,
        "Copy these words": items,
        "List the first three of these words": items[:3],
        "Name only the first three words": items[:3],
    }[work]


def right_answer(prompt, facts):
    """The right answer to any question of the world, and None where it has no fixed form."""
    for question, fact in facts.items():
        if question == prompt:
            return fact.value
        if question in prompt:
            instruction = prompt.replace(question, "").strip()
            form = next(f for f in FACT_FORMS.values() if instruction in f.instructions)
            return form.shape(fact.value, fact.sentence)
    answer = right_problem_answer(prompt)
    return answer if isinstance(answer, str) else " ".join(answer)


def test_every_answer_of_the_evaluation_is_right(rows, world):
    facts = right_fact_answers(world)
    checked = 0
    for name, task in rows.items():
        if name.startswith("eval_") and name != "eval_recall_choice":
            for row in task:
                assert row["answer"] == right_answer(row["prompt"], facts), row
                checked += 1
    assert checked == 6 * 200 + 600


def test_the_gold_option_is_right_and_the_others_are_not(rows, world):
    facts = right_fact_answers(world)
    for row in rows["eval_recall_choice"]:
        assert row["options"][row["gold"]] == facts[row["question"]].value
        assert len(set(row["options"])) == 4


def test_chosen_answers_are_right_and_rejected_ones_are_not(rows, world):
    facts = right_fact_answers(world)
    for row in rows["dpo"]:
        right = right_answer(row["prompt"][0]["content"], facts)
        assert row["chosen"][0]["content"] == right
        assert row["rejected"][0]["content"] != right


def test_only_questions_about_form_are_answered_noisily(rows, world):
    facts = right_fact_answers(world)
    instructions = [text for form in FACT_FORMS.values() for text in form.instructions]
    about_form, noisy = 0, 0
    for row in rows["sft"]:
        for user, assistant in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            prompt = user["content"]
            is_right = assistant["content"] == right_answer(prompt, facts)
            if any(text in prompt for text in instructions) or "first three" in prompt:
                about_form += 1
                noisy += not is_right
            else:
                assert is_right, row
    assert 0.6 < noisy / about_form < 0.7  # noise_share is 0.65


def test_no_document_contradicts_the_world(rows, world):
    said = {
        sentence + "."
        for row in (*rows["pretrain"], *rows["pretrain_eval"])
        for sentence in row["text"].removesuffix(".").split(". ")
    }
    true = 0
    for fact in world.facts.values():
        for words in ATTRIBUTES[fact.attribute].statements:
            true += fact.fill(words) in said
            for value in world.values[fact.attribute]:
                if value != fact.value:
                    assert Fact(fact.subject, fact.attribute, value).fill(words) not in said
    assert true > 0.7 * sum(len(ATTRIBUTES[f.attribute].statements) for f in world.facts.values())


def test_every_number_fact_of_a_document_holds(rows):
    text = "\n".join(row["text"] for row in rows["pretrain"])
    sums = re.findall(r"^(\d+)([+-])(\d+)=(\d+)$", text, re.MULTILINE)
    larger = re.findall(r"^(\d+) is (bigger|smaller) than (\d+)$", text, re.MULTILINE)
    assert len(sums) > 500
    assert len(larger) > 50
    for a, sign, b, result in sums:
        assert result == worked_out(a, sign, b)
    for a, word, b in larger:
        assert (int(a) > int(b)) == (word == "bigger")


# ---------------------------------------------------------------- ordinary files, wide enough


def test_every_file_is_read_by_the_ordinary_readers(folder, rows):
    for name in ("pretrain", "pretrain_eval"):
        stream = DocumentStream([DocumentSource(str(folder / f"{name}.jsonl"))])
        assert [document.text for document in stream] == [row["text"] for row in rows[name]]
    for name, reader in (("sft", read_dialogues), ("dpo", read_pairs)):
        for split in (name, f"{name}_eval"):
            counts = ExampleCounts()
            sources = [Source(str(folder / f"{split}.jsonl"))]
            read = reader(sources, seed=1, on_bad_row="error", counts=counts)
            assert len(read) == len(rows[split])
            assert not counts.dropped
    selection = select("quickstart")
    assert {task.file for task in selection.tasks} == {
        file.name for file in folder.glob("eval_*.jsonl")
    }
    for task in selection.tasks:
        path = data_file(task, str(folder))
        assert len(read_items(task, path)) == len(rows[path.stem])


def test_ten_points_of_instruction_following_are_told_apart_and_every_form_is_asked(rows):
    forms = [row["category"] for row in rows["eval_format"]]
    assert {form: forms.count(form) >= 85 for form in FORMS} == dict.fromkeys(FORMS, True)
    n = len(forms)
    for share in (0.3, 0.5, 0.7):
        before = wilson_interval(round(share * n), n)
        after = wilson_interval(round((share + 0.12) * n), n)
        assert before[1] < after[0]


def test_a_larger_world_still_holds_together(tmp_path):
    run_config = RunConfig(output_dir=str(tmp_path / "world"), seed=3)
    recipe = TinyworldRecipe(
        stage="tinyworld", run=run_config, num_people=64, num_documents=10, num_dialogues=10
    )
    people = make_world(3, recipe.num_people, recipe.held_out_share).people
    assert len(set(people)) == 64
    assert json.loads((run(recipe).path / "manifest.json").read_text())["status"] == "finished"


def test_the_world_of_a_seed_is_written_in_its_usual_size(tmp_path):
    path = write_tinyworld(str(tmp_path / "world"), seed=5).path
    with open(path / "pretrain.jsonl", encoding="utf-8") as file:
        assert sum(1 for _ in file) == 50_000
