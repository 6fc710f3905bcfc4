"""Messages for prompts, completions and judged responses, through the chat template."""

import json
import signal

import pytest

from rlhf_jax.data import (
    encode_examples,
    encode_pairs,
    encode_prompts,
    encode_rankings,
    encode_texts,
    load_examples,
)
from rlhf_jax.data.chat import contents, prompt_text
from rlhf_jax.data.settings import DataSettings, TokenizerSettings
from rlhf_jax.data.tokenizers import use_chat_template
from rlhf_jax.errors import InputError
from tests.data.texts import TEMPLATE, ids, turns

HEAD = "<user>Hi.\n<assistant>Hello.<|endoftext|>\n<user>Was it dull?\n<assistant>"
PROMPT = turns("Hi.", "Hello.", "Was it dull?")
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("It was.", "No."))


def parts_of(batch, index=0):
    """The tokens of prompt, chosen and rejected response."""
    sides = ((batch.prompts, batch.prompt_mask), batch[2:4], batch[4:6])
    return [tokens[index][mask[index]].tolist() for tokens, mask in sides]


@pytest.mark.parametrize(
    "example",
    [
        {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD},
        {"prompt": PROMPT, "chosen": PROMPT + GOOD, "rejected": PROMPT + BAD},
        {"prompt": PROMPT, "chosen": "It was.", "rejected": "No."},
        {"chosen": PROMPT + GOOD, "rejected": PROMPT + BAD},
    ],
    ids=["apart", "repeated", "texts", "full"],
)
def test_pairs_of_messages(chat, write, example):
    examples, _ = load_examples(
        DataSettings(path=write("a.jsonl", [example]), eval_rows=0), "pairs"
    )
    batch = encode_pairs(examples, chat, DataSettings())
    expected = [ids(chat, text) for text in (HEAD, "It was.<|endoftext|>", "No.<|endoftext|>")]
    assert parts_of(batch) == expected


def test_a_text_as_prompt_of_messages_is_the_users_turn(chat):
    """As in HuggingFaceH4/ultrafeedback_binarized, whose responses repeat it."""
    full = turns("Was it dull?", "It was."), turns("Was it dull?", "No.")
    examples = [{"prompt": "Was it dull?", "chosen": full[0], "rejected": full[1]}]
    prompt, chosen, _ = parts_of(encode_pairs(examples, chat, DataSettings()))
    assert prompt == ids(chat, "<user>Was it dull?\n<assistant>")
    assert chosen == ids(chat, "It was.<|endoftext|>")


def test_conversations_that_part_before_their_last_turn_are_dropped(chat, caplog):
    other = turns("Hi.", "Hello.", "Was it fun?")
    pair = {"chosen": PROMPT + GOOD, "rejected": PROMPT + BAD}
    apart = {"chosen": PROMPT + GOOD, "rejected": other + BAD}
    batch = encode_pairs([apart, pair, {"chosen": GOOD, "rejected": BAD}], chat, DataSettings())
    assert len(batch.valid) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 pairs were dropped because they differ before their last turn."
    ]
    with pytest.raises(InputError, match="No pair is left: of 1, .*, 1 no prompt in common and 0"):
        encode_pairs([apart], chat, DataSettings())


def test_rankings_of_messages(chat):
    example = {"prompt": PROMPT, "responses": [GOOD, PROMPT + BAD, "Who knows?"]}
    batch = encode_rankings([example], chat, DataSettings())
    assert batch.prompts[0][batch.prompt_mask[0]].tolist() == ids(chat, HEAD)
    for place, text in enumerate(("It was.", "No.", "Who knows?")):
        tokens = batch.responses[0, place][batch.mask[0, place]].tolist()
        assert tokens == ids(chat, text + "<|endoftext|>")


@pytest.mark.parametrize("completion", [GOOD, "It was.", PROMPT + GOOD])
def test_a_completion_of_messages(chat, completion):
    examples = [{"prompt": PROMPT, "completion": completion}]
    batch = encode_texts(examples, chat, DataSettings())
    tokens = batch.tokens[0][batch.segments[0] > 0].tolist()
    assert tokens == ids(chat, HEAD + "It was.<|endoftext|>")
    assert batch.tokens[0][batch.loss_mask[0]].tolist() == ids(chat, "It was.<|endoftext|>")


@pytest.mark.parametrize(
    "example",
    [
        {"prompt": PROMPT, "label": 1},
        {"messages": PROMPT + GOOD, "label": 1},
        {"messages": PROMPT, "label": 1},
        {"chosen": PROMPT + GOOD, "rejected": PROMPT + BAD, "label": 1},
    ],
)
def test_prompts_of_messages_end_where_the_assistant_answers(chat, write, example):
    examples, _ = load_examples(
        DataSettings(path=write("a.jsonl", [example]), eval_rows=0), "prompts"
    )
    assert examples[0]["label"] == 1
    batch = encode_prompts(examples, chat, DataSettings())
    assert batch.prompts[0][batch.prompt_mask[0]].tolist() == ids(chat, HEAD)


def test_comparisons_of_messages_are_texts_too(chat, write):
    path = write("a.jsonl", [{"chosen": PROMPT + GOOD, "rejected": PROMPT + BAD}])
    examples, _ = load_examples(DataSettings(path=path, eval_rows=0), "text")
    assert examples == [{"messages": PROMPT + GOOD}]


def test_what_cannot_be_rendered_is_one_sentence(chat, tokenizer, monkeypatch):
    example = {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}
    with pytest.raises(InputError, match="prompt of example 1 ends with a turn of 'assistant'"):
        encode_prompts([{"prompt": PROMPT + GOOD}], chat, DataSettings())
    monkeypatch.setattr(chat, "chat_template", "{{ raise_exception('roles must alternate.') }}")
    with pytest.raises(InputError, match="render the messages of example 1: roles must alternate"):
        encode_pairs([example], chat, DataSettings())
    monkeypatch.setattr(chat, "chat_template", "{{ messages | length }}")
    with pytest.raises(
        InputError, match=r"example 1 differently .* use another tokenizer.chat_template"
    ):
        encode_pairs([example], chat, DataSettings())
    monkeypatch.setattr(chat, "chat_template", None)
    with pytest.raises(
        InputError, match="no chat template: .* give one as tokenizer.chat_template"
    ):
        encode_pairs([example], chat, DataSettings())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([{"role": "user"}], "a message without content: .*user"),
        ([{"content": "a"}], "a list "),
        ([3], "a list "),
        ([["a"]], "a list "),
    ],
)
def test_lists_that_are_no_messages(write, value, said):
    path = write("a.jsonl", [{"prompt": "p", "completion": value}])
    with pytest.raises(InputError, match=f"Line 1 of .*column 'completion' holds {said}"):
        load_examples(DataSettings(path=path, eval_rows=0), "text")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 5 }}", "can only concatenate str"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ('{% include "x" %}', "no loader for this environment"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ('{{ "a" | round }}', "str"),
        ('{{ [1, "a"] | max }}', "'>' not supported"),
    ],
)
def test_templates_that_fail_in_any_way_name_the_line(chat, write, monkeypatch, template, said):
    monkeypatch.setattr(chat, "chat_template", template)
    path = write("a.jsonl", [{"messages": PROMPT + GOOD}])
    examples, _ = load_examples(DataSettings(path=path, eval_rows=0), "text")
    with pytest.raises(InputError, match=f"render the messages of line 1 of .*: .*{said}") as error:
        encode_texts(examples, chat, DataSettings())
    assert "\n" not in str(error.value)


def test_an_endless_template_is_stopped_and_earlier_alarms_are_kept(chat, monkeypatch):
    monkeypatch.setattr("rlhf_jax.data.chat.MAX_SECONDS", 0.1)
    loop = "{% for i in range(9**5) %}"
    monkeypatch.setattr(chat, "chat_template", loop * 3 + "{% endfor %}" * 3)
    signal.setitimer(signal.ITIMER_REAL, 600.0)
    try:
        with pytest.raises(InputError, match="messages of example 1: it takes longer than 0 sec"):
            encode_texts([{"messages": PROMPT + GOOD}], chat, DataSettings())
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 500
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


@pytest.mark.parametrize("kind", ["text", "pairs", "rankings", "prompts"])
def test_templates_name_the_line_of_every_kind(chat, write, monkeypatch, kind):
    """Also after the order of the file is shuffled and after its pairs are drawn."""
    template = "{% if messages[0].content == 'x' %}{{ raise_exception('it is x') }}{% endif %}"
    monkeypatch.setattr(chat, "chat_template", template + TEMPLATE)
    examples = [{"chosen": PROMPT + GOOD, "rejected": PROMPT + BAD} for _ in range(20)]
    examples[6] = {key: turns("x", "y") for key in examples[6]}
    settings = DataSettings(path=write("a.jsonl", examples), eval_rows=5)
    train, held_out = load_examples(settings, kind)
    with pytest.raises(InputError, match="the messages of line 7 of .*a.jsonl: it is x"):
        encode_examples(kind, [*train, *held_out], chat, settings)


# --- parts, tools and calls ----------------------------------------------------------------------

TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool['name'] }}]{% endfor %}"
    "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}"
    "{% for call in turn.tool_calls or [] %}({{ call['name'] }}){% endfor %}"
    "{{ eos_token if turn['role'] == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "look_up"}]}


def test_parts_of_text_are_one_content(chat, write):
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "."}]
    messages = [{"role": "user", "content": parts, "name": None}, *turns("Hi.", "Hello.")[1:]]
    path = write("a.jsonl", [{"messages": messages}, {"messages": turns("Hi.", "Hello.")}])
    examples, _ = load_examples(DataSettings(path=path, eval_rows=0), "text")
    one, other = (encode_texts([each], chat, DataSettings()) for each in examples)
    assert one.tokens.tolist() == other.tokens.tolist()
    assert contents(messages) == "Hi.\nHello."
    image = [{"role": "user", "content": [{"type": "image", "url": "a"}]}]
    with pytest.raises(
        InputError, match="Line 1 of .*'messages' holds a part {'type': 'image'.*only"
    ):
        load_examples(DataSettings(path=write("b.jsonl", [{"messages": image}])), "text")


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_and_calls_reach_the_template(chat, write, monkeypatch, as_json):
    monkeypatch.setattr(chat, "chat_template", TOOL_TEMPLATE)
    tools = [{"name": "look_up", "type": "function"}]
    answer = turns("", "It was.")[1]
    example = {"messages": [turns("Dull?")[0], CALL, {"role": "tool", "content": "yes"}, answer]}
    example["tools"] = json.dumps(tools) if as_json else tools
    examples, _ = load_examples(DataSettings(path=write("a.jsonl", [example]), eval_rows=0), "text")
    batch = encode_texts(examples, chat, DataSettings())
    head = "[look_up]<user>Dull?<assistant>(look_up)<|endoftext|><tool>yes<assistant>"
    text = ids(chat, head) + ids(chat, "It was.<|endoftext|>")
    assert batch.tokens[0][batch.segments[0] > 0].tolist() == text
    comparison = {"chosen": example["messages"], "rejected": [*example["messages"][:-1], CALL]}
    examples, _ = load_examples(
        DataSettings(path=write("b.jsonl", [{**comparison, "tools": tools}]), eval_rows=0), "pairs"
    )
    prompt, chosen, rejected = parts_of(encode_pairs(examples, chat, DataSettings()))
    assert prompt == ids(chat, head)
    assert chosen == ids(chat, "It was.<|endoftext|>")
    assert rejected == ids(chat, "(look_up)<|endoftext|>")


def test_what_a_template_would_leave_out_is_named(chat):
    for example, said in (
        (
            {"messages": [turns("Hi.")[0], CALL]},
            "Example 1 has tool_calls, which the chat template",
        ),
        ({"messages": turns("a", "b"), "tools": [{"name": "f"}]}, "Example 1 has tools, which the"),
        ({"messages": turns("a", "b"), "tools": "{"}, "Example 1: column 'tools' is no JSON: "),
        ({"messages": turns("a", "b"), "tools": "3"}, "Example 1: column 'tools' holds 3, no list"),
    ):
        with pytest.raises(InputError, match=f"^{said}"):
            encode_texts([example], chat, DataSettings())


def test_samples_of_conversations_begin_at_their_last_turn(chat):
    assert prompt_text({"messages": PROMPT + GOOD}, 1, chat) == HEAD
    assert prompt_text({"messages": PROMPT}, 1, chat) == HEAD
    assert prompt_text({"messages": GOOD}, 1, chat) == ""


# --- the template as a setting -------------------------------------------------------------------


def test_a_template_is_a_text_or_a_file(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    use_chat_template(tokenizer, TEMPLATE)
    assert tokenizer.chat_template == TEMPLATE
    file = tmp_path / "chat.jinja"
    file.write_text("{% generation %}" + TEMPLATE + "{% endgeneration %}")
    use_chat_template(tokenizer, str(TokenizerSettings(chat_template=str(file)).chat_template))
    assert tokenizer.chat_template == file.read_text()


def test_templates_that_are_none(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"'chat\.jinja' is neither a file nor a Jinja template"):
        TokenizerSettings(chat_template="chat.jinja")
    with pytest.raises(InputError, match=r"tokenizer\.chat_template is no Jinja template: "):
        use_chat_template(tokenizer, "{% for %}")
    with pytest.raises(InputError, match=r"tokenizer\.chat_template is no Jinja template: maximum"):
        use_chat_template(tokenizer, "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}")
    (tmp_path / "binary").write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match="binary cannot be read: "):
        use_chat_template(tokenizer, str(tmp_path / "binary"))
