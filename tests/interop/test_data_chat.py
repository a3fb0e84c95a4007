"""Chat templates, one's own among them, system prompts, forms of rows: what is learned is what transformers says."""

import json

import pytest

import undula
from tests.support import tiny
from undula.train import (
    CausalLM,
    Chat,
    Plain,
    Run,
    look,
    prepare,
    restored,
)
from undula.train.data.conversation import tokens
from undula.train.data.load import load_data
from undula.train.tasks.format import TEMPLATES
from undula.train.tasks.shown import IGNORED

# with an end that is a token of this tokenizer, and with the marks by which transformers tells the assistant's tokens
MARKED = (
    "{% for m in messages %}[CLS] {{ m.role }} : {% if m.role == 'assistant' %}{% generation %}{{ m.content }} [SEP]"
    "{% endgeneration %}{% else %}{{ m.content }} [SEP]{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}[CLS] assistant : {% endif %}"
)
TALKS = {
    "a turn": "ua",
    "several": "uauaua",
    "a system": "sua",
    "a system and several": "suaua",
    "assistant first": "aua",
    "two in a row": "uaa",
    "users in a row": "uua",
}
ROLES = {"u": "user", "a": "assistant", "s": "system"}


def talk(shape):
    return [{"role": ROLES[who], "content": f"the {tiny.WORDS[i]} was {who}"} for i, who in enumerate(shape)]


def rows_file(path, rows):
    return tiny.jsonl(path, rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("llama"))


def chml(tmp, name="mine.jinja", text=MARKED):
    (tmp / name).write_text(text)
    return str(tmp / name)


# --- what is learned -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", TALKS.values(), ids=TALKS)
@pytest.mark.parametrize("template", [MARKED, TEMPLATES["chatml"]], ids=["marked", "chatml"])
def test_what_is_learned_is_what_transformers_calls_the_assistants(template, shape, tmp_path):
    """By `return_assistant_tokens_mask`, for which a template marks the assistant's turns."""
    words = tiny.tokenizer(tmp_path)
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    words.chat_template = template
    messages = talk(shape)
    ids, learned = tokens(messages, words)
    said = words.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True, add_special_tokens=False
    )
    mask = said["assistant_masks"]
    assert sum(mask) > 0
    assert [bool(m) for m in mask[: len(ids)]] == learned
    assert said["input_ids"][: len(ids)] == ids
    assert not any(mask[len(ids) :])


# --- a template of one's own ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["name", "file", "text"])
def test_a_base_without_a_template_takes_one(given, model, tmp_path):
    """It is told as text, so that the run is repeated without the file, and the processor has it."""
    text = TEMPLATES["chatml"] if given == "name" else MARKED
    asked = {"name": "chatml", "file": chml(tmp_path), "text": MARKED}[given]
    data = rows_file(tmp_path / "d.jsonl", [{"messages": talk("sua")[:2] + talk("uaua")} for _ in range(8)])
    run = Run(model, data, CausalLM(format=Chat(template=asked), generate=0), undula.LoRA(r=1), tmp_path / "out")
    undula.train(Run(**{**vars(run), "max_steps": 1}))
    if given == "file":
        (tmp_path / "mine.jinja").unlink()
    written = json.loads((tmp_path / "out" / "run.json").read_text())["run"]["task"]["format"]
    assert written == {"is": "Chat", "instruction": "", "template": text}
    opened = restored(tmp_path / "out")
    assert opened.processor.chat_template == text
    assert Run.load(tmp_path / "out").task == run.task


def test_the_option_takes_a_file(model, tmp_path):
    from typer.testing import CliRunner

    from undula.cli.main import app

    data = rows_file(tmp_path / "d.jsonl", [{"messages": talk("ua")} for _ in range(4)])
    usual = [
        "train",
        "--model",
        model,
        "--data",
        data,
        "--task",
        "causal-lm",
        "--out",
        str(tmp_path / "o"),
        "--dry-run",
    ]
    options = ["--task-set", "format=chat", "--task-set", f"format.template={chml(tmp_path)}"]
    done = CliRunner().invoke(app, [*usual, *options, "--task-set", "format.system=be good", "--json", "-"])
    assert done.exit_code == 0, done.output
    pieces = json.loads(done.stdout)["examples"][0]
    assert "good [SEP]" in pieces[0][0]
    assert pieces[1][1] is True


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nowhere.jinja", "is no file here, no Jinja text, and no name of a template; there are: chatml"),
        ("{% for m in messages %}{{ m.content }}", "line 1: this is no Jinja template"),
        ("FILE:no template", "holds no Jinja template"),
        ("FILE:{{ m", "this is no Jinja template"),
    ],
)
def test_what_is_no_template_is_refused(given, said, tmp_path):
    given = chml(tmp_path, text=given[5:]) if given.startswith("FILE:") else given
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        Chat(template=given)


def test_marks_without_tokens_are_told(model, tmp_path):
    """A base that was not made for ChatML reads its marks as text."""
    data = rows_file(tmp_path / "d.jsonl", [{"messages": talk("ua")} for _ in range(4)])
    run = Run(model, data, CausalLM(format=Chat(template="chatml")), undula.LoRA(r=1), tmp_path / "o")
    assert any(
        "<|im_start|>, <|im_end|>, which this tokenizer has no tokens of its own for" in n for n in look(run).notes
    )


def test_runs_without_what_came_later_are_written_as_before():
    assert Chat(instruction="a").encode() == {"is": "Chat", "instruction": "a"}
    assert "form" not in CausalLM().encode()


def test_an_answer_to_nothing_is_a_fault_of_its_row(tmp_path):
    path = rows_file(
        tmp_path / "d.jsonl", [{"messages": talk("ua")}, {"messages": talk("a")}, {"messages": talk("au")}]
    )
    with pytest.raises(ValueError, match=r"line 2 \(a turn of the assistant's alone.*line 3 \(a turn"):
        CausalLM().read(load_data(path), "train")


# --- system prompts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pairs", "conversations"])
def test_a_system_prompt_comes_first_where_there_is_none(form, tmp_path):
    words = tiny.tokenizer(tmp_path)
    words.chat_template = MARKED
    task = CausalLM(format=Chat(system="very happy"))
    row = {"prompt": "the film", "completion": "good"} if form == "pairs" else {"messages": talk("ua")}
    ids = task.example(row, words)["input_ids"]
    assert words.decode(ids).startswith("[CLS] [UNK] [UNK] very happy [SEP]")
    asked = {"prompt": "the film"} if form == "pairs" else {"messages": talk("u")}
    assert words.decode(task.asked_ids(asked, words, 1)).startswith("[CLS] [UNK] [UNK] very happy [SEP]")
    if form == "conversations":
        own = task.example({"messages": talk("sua")}, words)["input_ids"]
        assert "very happy" not in words.decode(own)


@pytest.mark.parametrize(
    ("format", "said"), [(Plain(), "format=plain writes pairs"), (Chat("x "), "it is format.system")]
)
def test_formats_that_conversations_would_ignore_are_refused(format, said, tmp_path):
    data = load_data(rows_file(tmp_path / "d.jsonl", [{"messages": talk("ua")}]))
    with pytest.raises(ValueError, match=said):
        CausalLM(format=format).read(data, "train")


# --- forms ---------------------------------------------------------------------------------------------------------

BOTH = {"messages": talk("ua"), "prompt": "the", "completion": "good", "text": "a film"}


@pytest.mark.parametrize("form", CausalLM.forms)
def test_the_form_can_be_said(form, model, tmp_path):
    """Rows may fit several; the first is taken unless another is asked for."""
    words = tiny.tokenizer(tmp_path / "t", chat=True)
    path = rows_file(tmp_path / "d.jsonl", [BOTH] * 3)
    task, parts = CausalLM(form=form).read(load_data(path), "train")
    assert set(parts["train"].column_names) == set(CausalLM.forms[form])
    assert task.reads(list(BOTH)).startswith(f"{form}: ")
    assert CausalLM().reads(list(BOTH)).startswith("conversations: ")
    assert any(label != IGNORED for label in task.example(parts["train"][0], words)["labels"])


def test_forms_that_are_none_or_do_not_fit_are_refused():
    with pytest.raises(
        LookupError, match=r"no form 'chat'; there are: conversations \(messages/conversations\); pairs"
    ):
        CausalLM(form="chat")
    with pytest.raises(LookupError, match="no column for completion"):
        CausalLM(form="pairs").columns(["prompt"])
    with pytest.raises(LookupError, match="different forms of rows"):
        CausalLM(form="pairs", text="x").columns(["prompt", "completion", "x"])
    with pytest.raises(LookupError, match=r"one of these forms: conversations .*; pairs .*; texts"):
        CausalLM().columns(["a", "b"])


def test_a_run_with_a_form_is_repeated(model, tmp_path):
    path = rows_file(tmp_path / "d.jsonl", [{**BOTH, "text": f"a {w}"} for w in tiny.WORDS])
    run = Run(model, path, CausalLM(form="texts"), undula.LoRA(r=1), tmp_path / "o")
    assert Run.decode(run.encode(), run.out).task == run.task
    assert prepare(run).figures["form"] == "texts: text is 'text'"
