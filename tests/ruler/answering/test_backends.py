"""The backends with tiny random checkpoints: what they read, what they count, and what they refuse."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ruler.answering.backends import decoder_folder, open_backend
from ruler.answering.predict import PredictJob, predict
from ruler.answering.protocol import BackendSettings, Question, RowRefusedError
from tests.ruler.conftest import make_rows
from tests.support.fake_server import answer_to, by_prompt, faulty, rows_of, running
from tests.support.tiny import byte_tokenizer
from utils.client.completion import RetryPolicy, Sampling
from utils.errors import CheckpointError, ConfigError, DatasetError
from utils.inference.inference import load_model


def question(number=0, max_tokens=6):
    row = make_rows("niah_single_1", 5)[number]
    fields = ("input", "answer_prefix", "context_start", "context_end")
    return Question(**{name: row[name] for name in fields}, max_tokens=max_tokens)


def answers(settings, questions):
    async def ask():
        backend = open_backend(settings)
        await backend.start()
        try:
            return await backend.answer(questions)
        finally:
            await backend.close()

    return asyncio.run(ask())


@pytest.fixture(scope="session")
def checkpoint(checkpoints):
    return str(checkpoints["code-llava"])


def test_memory_text_wraps_the_context_and_nothing_else():
    asked = question(2)
    before, _, rest = asked.memory_text.partition("<|memory_start|>")
    context, _, after = rest.partition("<|memory_end|>")
    assert before + context + after == asked.text
    assert context == asked.input[asked.context_start : asked.context_end]
    assert after.endswith(asked.answer_prefix)


@pytest.mark.parametrize(
    ("text", "start", "words"), [("a <|memory|> b", 13, "holds the text"), ("", 0, "context is empty")]
)
def test_prompts_without_a_clean_context_are_refused(text, start, words):
    asked = Question(input=text, answer_prefix="", context_start=start, context_end=len(text), max_tokens=1)
    with pytest.raises(RowRefusedError, match=words):
        _ = asked.memory_text


def test_a_context_may_hold_markers(checkpoint):
    context = "HOLE = '<|memory|>'"
    asked = Question(input=f"Read {context} now.", answer_prefix="", context_start=5, context_end=5 + len(context),
                     max_tokens=6)  # fmt: skip
    (answer,) = answers(BackendSettings(name="local-memory", model=checkpoint), [asked])
    assert answer.memory_tokens == len(context)


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("name", ["local-text", "local-memory"])
def test_local_answers_are_the_models_own_and_counted(checkpoint, name, api):
    settings = BackendSettings(name=name, model=checkpoint, api=api, system_prompt="Be brief.", batch_size=3)
    questions = [question(number) for number in range(3)]
    model, tokenizer, processor = load_model(checkpoint)
    memory = name == "local-memory"
    for asked, answer in zip(questions, answers(settings, questions), strict=True):
        text = asked.memory_text if memory else asked.text
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
        prompt = processor.parse_chat(messages) if api == "chat" else processor.parse_raw(text)
        # Alone: neighbours in a batch must not change an answer.
        (ids,) = model.generate([prompt], max_new_tokens=6)
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert answer.prompt_tokens == len(prompt.input_ids)
        assert answer.memory_tokens == (prompt.memory_tokens if memory else None)
        assert answer.num_latents == (-(-prompt.memory_tokens // 4) if memory else None)


def test_a_plain_model_folder_answers_like_the_checkpoints_decoder(checkpoint):
    plain = str(decoder_folder(checkpoint))
    assert decoder_folder(plain) == decoder_folder(checkpoint)
    questions = [question(number) for number in range(3)]
    for api in ("completions", "chat"):
        ours, theirs = (
            answers(BackendSettings(name="local-text", model=model, api=api, batch_size=3), questions)
            for model in (checkpoint, plain)
        )
        assert ours == theirs


def test_a_template_that_writes_the_token_of_beginning_brings_no_second_one(copied):
    """RULER's template for Llama 3 begins with it, and so do Llama's tokenizers."""
    root = copied("code-llava")
    tokenizer = byte_tokenizer(markers=True, bos=True)
    tokenizer.save_pretrained(root / "llm")
    bos = tokenizer.bos_token
    plain = question()
    brought = replace(
        plain,
        input=bos + plain.input,
        context_start=plain.context_start + len(bos),
        context_end=plain.context_end + len(bos),
    )
    for name, model in (("local-text", root / "llm"), ("local-text", root), ("local-memory", root)):
        settings = BackendSettings(name=name, model=str(model))
        assert answers(settings, [plain]) == answers(settings, [brought]), (name, model)


def test_sampling_is_repeatable_and_stop_strings_cut(checkpoint):
    drawn = Sampling(temperature=1.0, top_k=50, seed=3)
    first, again, other = (
        answers(BackendSettings(name="local-text", model=checkpoint, sampling=sampling), [question()])[0].text
        for sampling in (drawn, drawn, Sampling(temperature=1.0, top_k=50, seed=4))
    )
    assert first == again != other
    stop = Sampling(temperature=1.0, top_k=50, seed=3, stop=(first[2:4],))
    cut = answers(BackendSettings(name="local-text", model=checkpoint, sampling=stop), [question()])[0].text
    assert cut == first[: first.find(first[2:4])]


def test_a_prompt_longer_than_the_decoder_costs_its_row_only(checkpoint, make_dataset, tmp_path):
    data = make_dataset(count=4)
    path = data / "1024/niah_single_1/validation.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["input"] += " and so on" * 60
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path.parent / "manifest.json").unlink()
    settings = BackendSettings(name="local-text", model=checkpoint, batch_size=4)
    (outcome,) = predict(PredictJob(data_dir=data, output_dir=tmp_path / "run"), settings)
    assert (outcome.answered, outcome.failed) == (3, 1)
    failure = json.loads((tmp_path / "run/1024/niah_single_1.failed.jsonl").read_text())
    assert failure["row"] == 2
    assert "512 positions" in failure["error"]


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_a_server_gets_the_rows_the_decoder_would_read(checkpoint, api):
    model, _, processor = load_model(checkpoint, chunk_size=4)
    asked = question(1)
    with running(by_prompt) as server:
        settings = BackendSettings(name="server-memory", server_url=server.url, checkpoint=checkpoint, api=api)
        (answer,) = answers(settings, [asked])
    (body,) = server.bodies
    assert "prompt" not in body
    assert "messages" not in body
    assert answer.text == answer_to(body["prompt_embeds"])
    rows = rows_of(body["prompt_embeds"])
    text = asked.memory_text
    prompt = processor.parse_chat([{"role": "user", "content": text}]) if api == "chat" else processor.parse_raw(text)
    with torch.inference_mode():
        torch.testing.assert_close(rows, model.embed_prompt(prompt), atol=1e-5, rtol=0)
    assert (answer.prompt_tokens, answer.memory_tokens) == (len(prompt.input_ids), prompt.memory_tokens)
    assert answer.num_latents == prompt.num_latents


def test_memory_through_a_bad_server_loses_no_row(checkpoint, make_dataset, tmp_path):
    job = PredictJob(data_dir=make_dataset(count=6), output_dir=tmp_path / "run")
    with running(faulty("error500", "drop", "garbage", "other_json")) as server:
        settings = BackendSettings(name="server-memory", server_url=server.url, checkpoint=checkpoint, concurrency=3)
        (outcome,) = predict(job, settings, RetryPolicy(attempts=30, first_wait_s=0.001, longest_wait_s=0.02))
    assert (outcome.answered, outcome.failed) == (6, 0)
    # A retry sends the same bytes: nothing is encoded twice.
    assert len(set(server.prompts)) == 6 < len(server.prompts)


def test_another_checkpoint_at_the_same_path_is_noticed(copied, make_dataset, tmp_path):
    folder = copied("code-llava")
    job = PredictJob(data_dir=make_dataset(count=2), output_dir=tmp_path / "run", max_rows=1)
    settings = BackendSettings(name="local-memory", model=str(folder))
    predict(job, settings)
    norm = folder / "projectors" / "code_norm_pre.safetensors"
    save_file({"weight": load_file(norm)["weight"] + 1}, norm)
    with pytest.raises(DatasetError, match="fingerprint"):
        predict(PredictJob(data_dir=job.data_dir, output_dir=job.output_dir), settings)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ConfigError, match="unknown backend 'x'"):
        open_backend(BackendSettings(name="x"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        open_backend(BackendSettings(name="local-text", model=str(tmp_path)))
