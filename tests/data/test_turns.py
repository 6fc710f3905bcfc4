"""Targets on all turns of the assistant: masks written by hand, and those of transformers."""

import copy
import dataclasses

import numpy as np
import pytest
from transformers import AddedToken

from rlhf_jax.data import encode_texts, load_examples
from rlhf_jax.data.settings import DataSettings
from rlhf_jax.data.sft import max_targets, tokenize_texts
from rlhf_jax.errors import InputError

ALL = DataSettings(assistant_turns="all", packing=False, max_length=512)

CHATML = """\
{%- if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{ '<call>' + call.name + '</call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """\
{{- bos_token }}{% for m in messages %}
{{- '<|start|>' + m.role + '<|end|>\\n\\n' + (m.content | trim) + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"""
GEMMA = """\
{{- bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else 'user' %}
{{- '<start_of_turn>' + role + '\\n' + (m.content | trim) + '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
WITHOUT_SPECIAL_TOKENS = """\
{%- for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""
# Drops the thoughts of all turns of the assistant but the last, as Qwen3's does.
FORGETFUL = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}
{{- m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MARKED = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}
{%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def say(role, content, **more):
    return {"role": role, "content": content, **more}


TALK = [
    say("system", "Be brief."),
    say("user", "Was it dull?"),
    say("assistant", "It was."),
    say("user", "The end too?"),
    say("assistant", "No."),
]


@pytest.fixture
def chat(tokenizer):
    """chat(template, eos) -> a tokenizer with the tokens of all templates here."""

    def with_template(template, eos="<|im_end|>"):
        changed = copy.deepcopy(tokenizer)
        names = "<|im_start|> <|im_end|> <|start|> <|end|> <|eot|> <start_of_turn> <end_of_turn>"
        changed.add_tokens([AddedToken(name, special=True) for name in names.split()])
        changed.eos_token, changed.chat_template = eos, template
        return changed

    return with_template


def texts_of(messages, tokenizer, settings=ALL, **columns):
    """The text of a conversation as [(text, whether it is a target)], by runs of the mask."""
    (text,) = tokenize_texts([{"messages": messages, **columns}], tokenizer, settings)
    edges = np.flatnonzero(np.diff(text.is_target)) + 1
    runs = np.split(np.arange(len(text.tokens)), edges)
    return [(tokenizer.decode(np.array(text.tokens)[run]), text.is_target[run[0]]) for run in runs]


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        (
            CHATML,
            "<|im_end|>",
            [
                (
                    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWas it dull?"
                    "<|im_end|>\n<|im_start|>assistant\n",
                    False,
                ),
                ("It was.<|im_end|>", True),
                ("\n<|im_start|>user\nThe end too?<|im_end|>\n<|im_start|>assistant\n", False),
                ("No.<|im_end|>", True),
            ],
        ),
        (
            LLAMA3,
            "<|eot|>",
            [
                (
                    "<|endoftext|><|start|>system<|end|>\n\nBe brief.<|eot|><|start|>user<|end|>"
                    "\n\nWas it dull?<|eot|><|start|>assistant<|end|>\n\n",
                    False,
                ),
                ("It was.<|eot|>", True),
                (
                    "<|start|>user<|end|>\n\nThe end too?<|eot|><|start|>assistant<|end|>\n\n",
                    False,
                ),
                ("No.<|eot|>", True),
            ],
        ),
        (
            GEMMA,
            "<|endoftext|>",
            [
                (
                    "<|endoftext|><start_of_turn>user\nBe brief.<end_of_turn>\n<start_of_turn>user"
                    "\nWas it dull?<end_of_turn>\n<start_of_turn>model\n",
                    False,
                ),
                ("It was.<end_of_turn>", True),
                (
                    "\n<start_of_turn>user\nThe end too?<end_of_turn>\n<start_of_turn>model\n",
                    False,
                ),
                ("No.<end_of_turn><|endoftext|>", True),
            ],
        ),
        (
            WITHOUT_SPECIAL_TOKENS,
            "<|endoftext|>",
            [
                ("system: Be brief.\nuser: Was it dull?\nassistant: ", False),
                ("It was.\n", True),
                ("user: The end too?\nassistant: ", False),
                ("No.\n<|endoftext|>", True),
            ],
        ),
    ],
    ids=["chatml", "llama3", "gemma", "plain"],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_by_hand(chat, template, eos, expected, side):
    tokenizer = chat(template, eos)
    tokenizer.padding_side = side  # of no effect: batches are padded here
    assert texts_of(TALK, tokenizer) == expected
    # The last turn alone has the same tokens and targets as ever.
    last = dataclasses.replace(ALL, assistant_turns="last")
    one, both = (
        encode_texts([{"messages": TALK[:3]}], tokenizer, settings) for settings in (ALL, last)
    )
    np.testing.assert_array_equal(one.tokens, both.tokens)
    np.testing.assert_array_equal(one.loss_mask, both.loss_mask)


def test_calls_of_tools_are_targets_and_their_results_are_not(chat):
    call = say("assistant", "", tool_calls=[{"name": "f"}])
    messages = [TALK[1], call, say("tool", "yes"), TALK[2], say("user", "Thanks.")]
    runs = texts_of(messages, chat(CHATML), tools=[{"name": "f"}])
    assert [text for text, is_target in runs if is_target] == [
        "<call>f</call><|im_end|>",
        "It was.<|im_end|>",
    ]
    assert runs[-1] == ("\n<|im_start|>user\nThanks.<|im_end|>", False)


def test_marks_of_a_template_are_those_of_transformers(chat):
    tokenizer = chat(MARKED)
    (text,) = tokenize_texts([{"messages": TALK}], tokenizer, ALL)
    theirs = tokenizer.apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    length = len(text.tokens)
    assert text.tokens == theirs["input_ids"][:length]
    assert tokenizer.decode(theirs["input_ids"][length:]) == "\n"  # after the last turn
    assert text.is_target == [mask == 1 for mask in theirs["assistant_masks"][:length]]
    assert sum(text.is_target) == sum(theirs["assistant_masks"])
    # They are the spans that the same template without marks has.
    plain = chat(MARKED.replace("{%- generation %}", "").replace("{% endgeneration %}", ""))
    assert tokenize_texts([{"messages": TALK}], plain, ALL) == [text]


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("repeats", [True, False])
def test_turns_of_a_prompt_are_no_targets(chat, template, repeats):
    tokenizer, prompt = chat(template), TALK[:4]
    completion = [TALK[4], say("user", "Sure?"), say("assistant", "Yes.")]
    example = {"prompt": prompt, "completion": (prompt if repeats else []) + completion}
    (text,) = tokenize_texts([example], tokenizer, ALL)
    targets = [token for token, is_target in zip(*text, strict=True) if is_target]
    assert tokenizer.decode(targets) == "No.<|im_end|>Yes.<|im_end|>"
    assert tokenizer.decode(text.tokens).count("It was.") == 1


def test_truncated_and_packed_conversations_keep_their_targets(chat, caplog):
    tokenizer = chat(CHATML)
    (full,) = tokenize_texts([{"messages": TALK}], tokenizer, ALL)
    examples, length = [{"messages": TALK}] * 5, len(full.tokens)
    cut = dataclasses.replace(ALL, max_length=length - 3)
    assert tokenize_texts(examples[:1], tokenizer, cut) == [(full.tokens[:-3], full.is_target[:-3])]
    assert f"1 of 1 texts lost their right end: they exceed data.max_length ({length - 3} tok" in (
        caplog.text
    )
    short = dataclasses.replace(ALL, max_length=length, packing=True)
    greeting = {"messages": [say("user", "Hi."), say("assistant", "Hello.")]}
    batch = encode_texts(
        [*examples, greeting], tokenizer, dataclasses.replace(short, max_length=200)
    )
    (hello,) = tokenize_texts([greeting], tokenizer, ALL)
    packed = []
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segments[row].max() + 1):
            here = batch.segments[row] == segment
            packed.append((batch.tokens[row][here].tolist(), batch.loss_mask[row][here].tolist()))
    assert len(batch.tokens) < 6
    assert sorted(packed) == sorted([*[tuple(full)] * 5, tuple(hello)])
    # Conversations whose first turns fill the sequence have nothing to learn.
    head = dataclasses.replace(ALL, max_length=8)
    with pytest.raises(InputError, match=r"all 5 examples have no token of .* data.max_length \(8"):
        tokenize_texts(examples, tokenizer, head)
    assert max_targets(ALL) == ALL.max_length


def test_templates_that_change_earlier_turns_name_the_line(chat, write):
    examples = [{"messages": TALK[:3]}, {"messages": TALK}]
    examples, _ = load_examples(DataSettings(path=write("a.jsonl", examples), eval_rows=0), "text")
    examples.sort(key=lambda example: len(example["messages"]))
    tokenizer = chat(FORGETFUL)
    with pytest.raises(InputError, match=r"turn 3 of line 2 of .*a\.jsonl differently") as error:
        encode_texts(examples, tokenizer, ALL)
    assert "\n" not in str(error.value)
    encode_texts(examples, tokenizer, dataclasses.replace(ALL, assistant_turns="last"))


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ({"text": "Hi."}, "Example 1 has text and no turns: set data.assistant_turns to last"),
        ({"prompt": "Hi.", "completion": "Hello."}, "Example 1 has text and no turns"),
        ({"messages": TALK[:2]}, "The messages of example 1 have no turn of 'assistant'"),
    ],
)
def test_texts_without_turns_of_the_assistant_are_one_sentence(chat, example, said):
    with pytest.raises(InputError, match=f"^{said}"):
        encode_texts([example], chat(CHATML), ALL)


def test_marks_that_mark_nothing_are_one_sentence(chat):
    template = "{% if false %}{% generation %}{% endgeneration %}{% endif %}" + CHATML
    with pytest.raises(InputError, match="marks no turn of the assistant in .* example 1 by"):
        encode_texts([{"messages": TALK}], chat(template), ALL)


def test_the_setting_goes_with_completion_only():
    with pytest.raises(InputError, match="data.assistant_turns must be last or all, but is 'each'"):
        DataSettings(assistant_turns="each")
    with pytest.raises(InputError, match="without data.completion_only all tokens are targets"):
        DataSettings(assistant_turns="all", completion_only=False)
