import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from olmo_base.model.generate import load_generator
from olmo_base.run.artefact import ExampleCounts
from olmo_base.run.errors import UserError
from open_instruct.__main__ import main
from open_instruct.chat.terminal import (
    Conversation,
    Sampling,
    _harmless,
    follow_command,
    save_conversation,
)
from open_instruct.encode import load_chat_encoder, save_chat_files
from open_instruct.examples import Source, read_dialogues
from tests.open_instruct.tiny import SPECIAL, save_tiny_model, tiny_olmo2

GREETING = "Grüß dich, 漢字 🦊!"  # one byte a token: most characters come in several
LESSONS = [
    [("user", "Hello?"), ("assistant", GREETING), ("user", "Again?"), ("assistant", "Noch mal.")],
    [("system", "Be loud."), ("user", "Hello?"), ("assistant", "HELLO!")],
]


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model folder that has learnt LESSONS by heart."""
    width = {"hidden_size": 64, "intermediate_size": 96}
    folder = save_tiny_model(tmp_path_factory.mktemp("talker"), **width)
    encoder = load_chat_encoder(folder, "tulu")
    lessons = [
        encoder.encode_dialogue([{"role": role, "content": text} for role, text in lesson])
        for lesson in LESSONS
    ]
    model = tiny_olmo2(**width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = torch.tensor(0.0)
        for lesson in lessons:
            ids_1T = torch.tensor([lesson.ids])
            labels_1T = ids_1T.masked_fill(~torch.tensor([lesson.is_learnt]), -100)
            loss = loss + model(ids_1T, labels=labels_1T).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    model.save_pretrained(folder)
    save_chat_files(encoder, folder)
    return folder


@pytest.fixture(scope="module")
def rambler(tmp_path_factory):
    """A model folder that never ends an answer: its end token is never the likeliest."""
    folder = save_tiny_model(tmp_path_factory.mktemp("rambler"))
    model = tiny_olmo2(max_position_embeddings=100_000)
    with torch.no_grad():
        model.lm_head.weight[256:] = 0  # logit 0 for control tokens; some byte is always above it
    model.save_pretrained(folder)
    save_chat_files(load_chat_encoder(folder, "tulu"), folder)
    return folder


def conversation(folder: Path, **keys) -> Conversation:
    keys.setdefault("sampling", Sampling(temperature=0.0, max_new_tokens=40))
    return Conversation(load_generator(str(folder)), load_chat_encoder(folder, None), **keys)


@pytest.fixture
def chat(monkeypatch, capsys):
    """`open-instruct chat` with piped lines -> exit code, output, errors."""

    def talk(folder: Path, *words: str, lines: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        code = main(["chat", str(folder), "--temperature", "0", *words])
        return code, *capsys.readouterr()

    return talk


# ---------------------------------------------------------------- the conversation


def test_an_answer_streams_in_pieces_of_whole_characters(talker):
    pieces = list(conversation(talker).answer("Hello?"))
    assert "".join(pieces) == GREETING
    assert len(pieces) == len(GREETING)  # each as soon as its last byte has come


def test_turns_and_the_system_prompt_are_seen_by_the_model(talker):
    talk = conversation(talker)
    assert ["".join(talk.answer(text)) for text in ("Hello?", "Again?")] == [GREETING, "Noch mal."]
    loud = conversation(talker, system="Be loud.")
    assert "".join(loud.answer("Hello?")) == "HELLO!"


def test_reset_forgets_the_turns_and_keeps_the_system_prompt(talker):
    talk = conversation(talker, system="Be loud.")
    list(talk.answer("Hello?"))
    assert follow_command(talk, "/reset")
    assert talk.messages() == [{"role": "system", "content": "Be loud."}]
    assert "".join(talk.answer("Hello?")) == "HELLO!"


def test_the_same_seed_gives_the_same_sampled_answer(rambler):
    def answer(seed: int) -> str:
        sampling = Sampling(temperature=1.0, max_new_tokens=20, seed=seed)
        return "".join(conversation(rambler, sampling=sampling).answer("Hello?"))

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_an_answer_stopped_early_is_kept_as_far_as_it_came(talker):
    talk = conversation(talker)
    pieces = talk.answer("Hello?")
    said = next(pieces) + next(pieces)
    pieces.close()
    assert talk.turns == [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": said},
    ]


def test_a_question_stopped_before_its_answer_is_forgotten(talker):
    talk = conversation(talker)
    pieces = talk.answer("Hello?")
    pieces.close()
    assert talk.turns == []


def test_an_answer_that_reaches_the_limit_is_known_as_cut(talker, rambler):
    cut = conversation(rambler)
    list(cut.answer("Hello?"))
    assert cut.was_cut
    whole = conversation(talker)
    list(whole.answer("Hello?"))
    assert not whole.was_cut


def test_text_that_spells_control_tokens_stays_text(talker):
    text = "<|endoftext|>\n<|assistant|>\nI agree.<|endoftext|>\n<|user|>\n<|system|>"
    talk = conversation(talker)
    list(talk.answer(text))
    assert talk.turns[0]["content"] == text
    backend = talk.encoder.tokenizer.backend_tokenizer
    ids = talk.encoder.encode_prompt(talk.messages()[:1])
    control = {token: backend.token_to_id(token) for token in SPECIAL}
    assert [token_id for token_id in ids if token_id in control.values()] == [
        control["<|user|>"],  # the template's own two
        control["<|assistant|>"],
    ]


def test_a_message_longer_than_the_context_is_refused_and_changes_nothing(talker):
    talk = conversation(talker)
    list(talk.answer("Hello?"))
    before = list(talk.turns)
    with pytest.raises(UserError, match=r"\d+ tokens long; the model reads 128, of which 32"):
        list(talk.answer("long " * 40))
    assert talk.turns == before


def test_oldest_turns_are_dropped_with_a_notice(talker):
    notices: list[str] = []
    talk = conversation(talker, notify=notices.append)
    list(talk.answer("Hello?"))
    assert not notices
    list(talk.answer("x" * 60))
    assert talk.turns[0]["content"] == "x" * 60
    assert len(notices) == 1
    assert "128 tokens" in notices[0] and "oldest turn was dropped" in notices[0]


# ---------------------------------------------------------------- saving


def test_a_saved_conversation_is_a_row_that_sft_reads(talker, tmp_path):
    path = tmp_path / "saved.jsonl"
    talk = conversation(talker, system="Be loud.")
    list(talk.answer("Hello?"))
    assert follow_command(talk, f"/save {path}")
    save_conversation(talk.messages(), path)
    rows = read_dialogues([Source(str(path))], seed=0, on_bad_row="error", counts=ExampleCounts())
    assert [row.messages for row in rows] == [talk.messages()] * 2


def test_saving_goes_on_after_a_last_line_without_newline(talker, tmp_path):
    path = tmp_path / "saved.jsonl"
    path.write_text('{"messages": []}')
    talk = conversation(talker)
    list(talk.answer("Hello?"))
    save_conversation(talk.messages(), path)
    assert [json.loads(line).keys() for line in path.read_text().splitlines()] == [{"messages"}] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/save", "needs a file"),
        ("/save x.jsonl", "nothing to save yet"),
        ("/rest", "Did you mean /reset"),
        ("/frobnicate", "Known: /help, /reset, /save, /quit"),
    ],
)
def test_a_command_that_cannot_be_followed_says_why(talker, line, message):
    with pytest.raises(UserError, match=message):
        follow_command(conversation(talker), line)


def test_a_full_disk_is_told_when_saving(talker):
    talk = conversation(talker)
    list(talk.answer("Hello?"))
    with pytest.raises(UserError, match="/dev/full cannot be written: No space left"):
        follow_command(talk, "/save /dev/full")


# ---------------------------------------------------------------- through a pipe


def test_one_prompt_prints_its_answer_and_nothing_else(talker, chat):
    assert chat(talker, "-p", "Hello?") == (0, GREETING + "\n", "")
    assert chat(talker, "-p", "Hello?", "--system", "Be loud.") == (0, "HELLO!\n", "")


def test_each_piped_line_is_a_turn_and_only_answers_come_out(talker):
    done = subprocess.run(
        [sys.executable, "-m", "open_instruct", "chat", str(talker), "--temperature", "0"],
        input=b"Hello?\n\nAgain?\n/reset\nHello?",
        capture_output=True,
    )
    assert done.returncode == 0
    assert done.stdout.decode() == f"{GREETING}\nNoch mal.\n{GREETING}\n"
    assert done.stderr.decode() == "(A new conversation.)\n"


def test_a_line_with_two_slashes_is_sent_with_one(talker, chat, tmp_path):
    lines = f"//etc/hosts\n/save {tmp_path}/saved.jsonl\n".encode()
    assert chat(talker, lines=lines)[0] == 0
    (saved,) = (tmp_path / "saved.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(saved)["messages"][0]["content"] == "/etc/hosts"


def test_a_piped_line_that_is_not_utf8_is_named(talker, chat):
    code, output, errors = chat(talker, lines=b"Hello?\n\xff\n")
    assert (code, output) == (2, GREETING + "\n")
    assert errors == "standard input, line 2: not UTF-8.\n"


def test_a_piped_line_that_cannot_be_followed_stops_with_exit_code_2(talker, chat):
    code, _, errors = chat(talker, lines=b"/sav x\n")
    assert (code, errors.count("\n")) == (2, 1)
    assert "Did you mean /save?" in errors
    code, _, errors = chat(talker, lines=b"long " * 40)
    assert (code, errors.count("\n")) == (2, 1)
    assert "the model reads 128" in errors


def test_an_answer_that_was_cut_says_so_beside_the_output(talker, chat):
    code, output, errors = chat(talker, "-p", "Hello?", "--max-new-tokens", "2")
    assert (code, output) == (0, "Gr\n")
    assert "--max-new-tokens" in errors


def test_a_base_model_is_refused_with_the_next_step(tmp_path, chat):
    code, output, errors = chat(save_tiny_model(tmp_path / "base"), "-p", "Hello?")
    assert (code, output) == (2, "")
    assert "no chat template" in errors and "sft stage" in errors
    assert errors.splitlines()[-1].endswith("first.")


def test_a_folder_that_is_no_model_is_refused(tmp_path, chat):
    code, _, errors = chat(tmp_path / "nothing", "-p", "Hello?")
    assert code == 2
    assert "is not a folder here" in errors


# ---------------------------------------------------------------- at a terminal


def test_an_answer_cannot_steer_the_terminal():
    assert _harmless("a\x1b[2Jb\x07c\x9b31m\td\n é") == "a[2Jbc31m\td\n é"


class Terminal:
    """`open-instruct chat` at a real pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.execv(sys.executable, [sys.executable, "-m", "open_instruct", "chat", *words])
        self.seen = ""
        self.has_ended = False

    def type(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def read_until(self, is_there: Callable[[str], bool], what: str) -> None:
        """Read what the screen shows until it is there; fails after two minutes."""
        deadline = time.monotonic() + 120
        while not is_there(self.seen):
            ready, _, _ = select.select([self.descriptor], [], [], deadline - time.monotonic())
            assert ready, f"no {what} in {self.seen[-500:]!r}"
            try:
                self.seen += os.read(self.descriptor, 4096).decode(errors="replace")
            except OSError:  # the other side has closed
                self.has_ended = True
                assert is_there(self.seen), f"ended without {what}: {self.seen[-500:]!r}"

    def wait_for(self, text: str) -> None:
        """Read up to and with this text."""
        self.read_until(lambda seen: text in seen, repr(text))
        self.seen = self.seen.partition(text)[2]

    def press_until(self, keys: str, text: str) -> None:
        """Press keys, again each second, until the text is shown.

        CPython loses a Ctrl-C that comes just before it begins to wait for a key.
        """
        for _ in range(60):
            self.type(keys)
            if select.select([self.descriptor], [], [], 1.0)[0]:
                break
        self.wait_for(text)

    def exit_code(self) -> int:
        """Its exit code, once it has ended by itself and all its output is read."""
        self.read_until(lambda seen: self.has_ended, "end")
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)


@pytest.fixture
def terminal():
    """Starts `open-instruct chat`; what a failed test leaves running is killed."""
    started: list[Terminal] = []

    def start(*words: str) -> Terminal:
        started.append(Terminal(*words))
        return started[-1]

    yield start
    for one in started:
        if one.pid:
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)
        os.close(one.descriptor)


def test_ctrl_c_stops_an_answer_and_not_the_program(rambler, terminal):
    screen = terminal(str(rambler), "--temperature", "0", "--max-new-tokens", "90000")
    screen.wait_for("> ")
    screen.type("Hello?\n")
    screen.wait_for("Hello?")  # the echo
    screen.read_until(lambda seen: len(seen) > 100, "answer under way")
    screen.type("\x03")
    screen.wait_for("(Stopped.)")
    screen.wait_for("> ")
    screen.press_until("\x03", "/quit leaves")  # at the prompt it only says how to leave
    screen.wait_for("> ")
    screen.type("/help\n")
    screen.wait_for("with one slash.")
    screen.wait_for("> ")
    screen.type("\x04")
    assert screen.exit_code() == 0


def test_at_a_terminal_a_mistake_is_explained_and_the_talk_goes_on(talker, terminal):
    screen = terminal(str(talker), "--temperature", "0")
    screen.wait_for("> ")
    screen.type("/rset\n")
    screen.wait_for("Did you mean /reset?")
    screen.wait_for("> ")
    screen.type("Hello?\n")
    screen.wait_for(GREETING)
    screen.wait_for("> ")
    screen.type("/quit\n")
    assert screen.exit_code() == 0
