"""The model that lm-eval sees, beside what the rest of the project says to the same prompts."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from utils.client.completion import Sampling
from utils.errors import CodeLlavaError, ConfigError, PromptError
from utils.harness.lm import CodeLlavaLM
from utils.inference.generation import Generator
from utils.inference.inference import load_model
from utils.model.markers import wrap

CODE = "def f(a):\n    return a + 1\n"
# The tiny pair writes "L========" after the first.
CONTEXTS = [f"{wrap(CODE)} Who", "Nothing to compress.", f"a {wrap('x')} and {wrap('y = 2')} then", "b"]


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=0, metadata=("some_task", number, 1))
        for number, one in enumerate(arguments)
    ]


def questions(contexts: list[str], **arguments: Any) -> list[Instance]:
    return requests("generate_until", *((context, arguments) for context in contexts))


@pytest.fixture(scope="module")
def arguments(checkpoints: dict[str, Path]) -> dict[str, Any]:
    return {"checkpoint": str(checkpoints["lclm"]), "device": "cpu", "dtype": "float32"}


@pytest.fixture
def lm(arguments: dict[str, Any]) -> CodeLlavaLM:
    return CodeLlavaLM(**arguments, batch_size=3)


def answers(arguments: dict[str, Any], contexts: list[str], sampling: Sampling) -> list[str]:
    """What generation says to each prompt alone."""
    model, tokenizer, processor = load_model(arguments["checkpoint"], device="cpu", dtype="float32")
    generator = Generator(model.decoder, tokenizer)
    with torch.inference_mode():
        rows = [model.embed_prompt(processor.parse_raw(context)) for context in contexts]
    return [generator.complete([row], sampling)[0].text for row in rows]


def test_answers_are_those_of_generation(lm: CodeLlavaLM, arguments: dict[str, Any]) -> None:
    expected = answers(arguments, CONTEXTS, Sampling(max_tokens=9))
    assert lm.generate_until(questions(CONTEXTS, max_gen_toks=9), disable_tqdm=True) == expected
    stop = expected[0][2:4]
    ended = lm.generate_until(questions(CONTEXTS, max_gen_toks=9, until=[stop, "\0never"]))
    assert ended == [text.split(stop)[0] for text in expected]
    assert ended != expected


def test_each_request_keeps_its_own_settings(lm: CodeLlavaLM, arguments: dict[str, Any]) -> None:
    mixed = requests(
        "generate_until", *((context, {"max_gen_toks": 3 + 4 * (n % 2)}) for n, context in enumerate(CONTEXTS))
    )
    short, long = (answers(arguments, CONTEXTS, Sampling(max_tokens=number)) for number in (3, 7))
    assert lm.generate_until(mixed) == [short[0], long[1], short[2], long[3]]


def test_repeats_of_a_drawn_request_differ(lm: CodeLlavaLM) -> None:
    torch.manual_seed(1)
    drawn = lm.generate_until(questions(CONTEXTS[:1] * 4, max_gen_toks=9, do_sample=True, temperature=2.0))
    assert len(set(drawn)) > 1
    torch.manual_seed(1)
    assert lm.generate_until(questions(CONTEXTS[:1] * 4, max_gen_toks=9, do_sample=True, temperature=2.0)) == drawn


def test_memory_is_encoded_once_and_counted(lm: CodeLlavaLM, caplog: pytest.LogCaptureFixture) -> None:
    encoded: list[int] = []
    hook = lm.model.memory_encoder.chunker.encoder.register_forward_hook(lambda *_: encoded.append(1))
    try:
        with caplog.at_level(logging.INFO):
            lm.generate_until(questions(CONTEXTS, max_gen_toks=1))
        first = len(encoded)
        lm.generate_until(questions([f"{wrap(CODE)} And?"], max_gen_toks=1))
    finally:
        hook.remove()
    assert first > 0
    assert len(encoded) == first, "the second question finds the memory in the cache"
    counts = lm.get_model_info()["code_llava"]["counts"]
    tokens = len(CODE) + 1 + 5 + len(CODE)
    assert (counts["requests"], counts["with_memory"], counts["memory_tokens"]) == (5, 3, tokens)
    assert counts["num_latents"] == 7 + 1 + 2 + 7
    assert "2 of 4 requests" in caplog.text


def test_repeats_in_a_batch_are_encoded_once(arguments: dict[str, Any]) -> None:
    lm = CodeLlavaLM(**arguments, cache=False, batch_size=4)
    encoded: list[int] = []
    lm.model.memory_encoder.chunker.encoder.register_forward_hook(lambda *_: encoded.append(1))
    lm.generate_until(questions(CONTEXTS[:1] * 4, max_gen_toks=1))
    lm.loglikelihood(requests("loglikelihood", *((CONTEXTS[0], f"{letter} is") for letter in "ABCD")))
    assert len(encoded) == 2


def test_nothing_compressed_is_said(lm: CodeLlavaLM, caplog: pytest.LogCaptureFixture) -> None:
    lm.generate_until(questions(["a", "b"], max_gen_toks=1))
    assert "none of 2 requests has memory" in caplog.text


@pytest.mark.parametrize("expand", [{"expand_tokens": 12}, {"expand": "1/2", "expand_policy": "random"}])
def test_part_of_the_memory_stays_text(arguments: dict[str, Any], expand: dict[str, Any]) -> None:
    lm = CodeLlavaLM(**arguments, **expand)
    lm.generate_until(questions([f"{wrap('a = 1' + chr(10) + 'b = 22' + chr(10) + CODE)} What is b?"], max_gen_toks=1))
    assert lm.get_model_info()["code_llava"]["counts"]["text_rows"] > 0
    assert lm.get_model_info()["code_llava"].items() >= expand.items()


def test_long_contexts_become_memory(arguments: dict[str, Any]) -> None:
    lm = CodeLlavaLM(**arguments, auto_memory="20")
    plain = f"Read.\n\n{CODE}\n\nWhat?"
    marked = plain.replace(CODE.strip(), wrap(CODE.strip()))
    assert len(set(lm.generate_until(questions([plain, marked], max_gen_toks=9)))) == 1
    assert lm.get_model_info()["code_llava"]["counts"]["with_memory"] == 2


def test_what_does_not_fit_is_an_error_or_counted(lm: CodeLlavaLM, arguments: dict[str, Any]) -> None:
    many = questions(["short", "x" * 510], max_gen_toks=9)
    with pytest.raises(PromptError, match=re.escape("document 1 of some_task: the prompt needs 510 rows + 9")):
        lm.generate_until(many)
    lenient = CodeLlavaLM(**arguments, too_long="empty")
    assert lenient.generate_until(many) == [*lenient.generate_until(many[:1]), ""]
    assert lenient.get_model_info()["code_llava"]["counts"]["too_long"] == 1
    # A memory of so many tokens does fit.
    assert lm.generate_until(questions([wrap("x" * 510)], max_gen_toks=9))[0]


def test_continuations_are_scored_as_the_decoder_reads_them(lm: CodeLlavaLM) -> None:
    context = CONTEXTS[0]
    text = lm.generate_until(questions([context], max_gen_toks=4))[0]
    tries = [(context, text), (context, "zzzz"), ("", text), (f"{context} ", text)]
    greedy, other, empty, spaced = lm.loglikelihood(requests("loglikelihood", *tries), disable_tqdm=True)
    assert greedy[1]
    assert not other[1]
    assert other[0] < greedy[0] < 0
    assert empty[0] != greedy[0]
    # " " + text continues the context without its last space.
    (same,) = lm.loglikelihood(requests("loglikelihood", (context, f" {text}")))
    assert spaced == pytest.approx(same)


def test_letters_of_a_choice_sum_to_the_probabilities(lm: CodeLlavaLM) -> None:
    scores = lm.loglikelihood(requests("loglikelihood", *((CONTEXTS[2], letter) for letter in "ABCD")))
    assert 0 < sum(math.exp(score) for score, _ in scores) < 1


def test_a_continuation_must_fit(lm: CodeLlavaLM) -> None:
    assert lm.loglikelihood(requests("loglikelihood", ("x" * 510, "abc")))[0][0] < 0
    with pytest.raises(PromptError, match=r"document 0 of some_task: .*513 rows"):
        lm.loglikelihood(requests("loglikelihood", ("x" * 510, "abcd")))


def test_whole_texts_are_scored_in_windows(lm: CodeLlavaLM) -> None:
    text = "abcdefghij" * 60
    whole, short, nothing = lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", (text,), (text[:500],), ("",)), disable_tqdm=True
    )
    assert nothing == 0
    assert short == pytest.approx(lm.loglikelihood(requests("loglikelihood", ("", text[:500])))[0][0], abs=1e-2)
    # A second window scores what the first one, of 512 tokens, left: 88 tokens after 424 that it only reads.
    first = lm.loglikelihood(requests("loglikelihood", ("", text[:512])))[0][0]
    second = lm.loglikelihood(requests("loglikelihood", (text[87:512], text[512:])))[0][0]
    assert whole == pytest.approx(first + second, abs=1e-2)


def test_text_behind_memory_is_scored_given_it(lm: CodeLlavaLM) -> None:
    context, rest = f"a {wrap(CODE)}", " and more"
    (rolling,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (context + rest,)))
    assert rolling == pytest.approx(lm.loglikelihood(requests("loglikelihood", (context, rest)))[0][0])
    with pytest.raises(PromptError, match="no token"):
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", (context,)))


def test_chats_are_answered_as_chats(lm: CodeLlavaLM, arguments: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": f"{wrap(CODE)} What?"}]
    model, tokenizer, processor = load_model(arguments["checkpoint"], device="cpu", dtype="float32")
    (ids,) = model.generate([processor.parse_chat(messages)], max_new_tokens=9)
    context = lm.apply_chat_template(messages)
    assert lm.generate_until(questions([context], max_gen_toks=9)) == [tokenizer.decode(ids, skip_special_tokens=True)]
    assert lm.chat_template(True) == tokenizer.chat_template
    assert lm.chat_template(False) is None
    assert str(arguments["checkpoint"]).replace("/", "__") in lm.tokenizer_name
    with pytest.raises(ConfigError, match="another"):
        lm.chat_template("another")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"batch_size": "auto"}, "batch_size"),
        ({"auto_memory": 0}, "auto_memory"),
        ({"too_long": "cut"}, "too_long"),
        ({"expand": "2"}, "expand"),
        ({"expand_tokens": 3, "expand": "1/2"}, "not both"),
        ({"checkpoint": "/nowhere/at/all"}, "nowhere"),
        ({"tokenizer": "x"}, "tokenizer"),
        ({"dtype": "int8"}, "int8"),
        ({"cache": "no"}, "cache"),
    ],
)
def test_what_cannot_be_is_named(arguments: dict[str, Any], wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(CodeLlavaError, match=named):
        CodeLlavaLM.create_from_arg_obj({**arguments, **wrong}, {"batch_size": 1})


def test_lm_eval_finds_the_model_and_its_own_flags_give_way(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = get_model("code-llava")
    assert found is CodeLlavaLM
    assert get_model("local-completions").__module__.startswith("lm_eval"), "its own models stay"
    text = ",".join(f"{name}={value}" for name, value in arguments.items())
    lm = found.create_from_arg_string(text + ",batch_size=7", {"batch_size": 1, "max_batch_size": None})
    assert lm.arguments.batch_size == 7
    # The device that lm-eval's command passes on where none is named.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    unnamed = found.create_from_arg_obj({"checkpoint": arguments["checkpoint"]}, {"device": "cuda:0"})
    assert unnamed.device.type == "cpu"
