"""Ordinary questions, and what a decoder answers to them before it is trained.

Training on memories alone costs a decoder what it knew: after hours of it, the embedded one said that the capital of
France is France. Its own old answers, learnt beside the rest, keep that (replay of generated samples; Shin et al.,
"Continual Learning with Deep Generative Replay", arXiv 1705.08690).

    answers = replayed_answers(config.data, model, processor)      # question → answer
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import yaml
from tqdm import tqdm

from utils.errors import DatasetError
from utils.model.code_llava_model import CodeLLaVAModel
from utils.model.processor import Processor
from utils.training.config import DataConfig
from utils.training.data.tasks.chat import CHAT

# Longest answer that is kept: one that goes on would end in the middle.
MAX_ANSWER_TOKENS = 64
# More questions take longer and say little more: examples beyond them ask the same beside other memories.
MAX_QUESTIONS = 3000
_BATCH_SIZE = 32
_TOPICS = Path(__file__).with_suffix(".yaml")


def replayed_answers(data: DataConfig, model: CodeLLaVAModel, processor: Processor) -> dict[str, str]:
    """What the task chat draws from: a question an example, up to `MAX_QUESTIONS`, and the model's answers.

    Nothing for data without it.
    """
    number = min(data.tasks.get(CHAT, 0), MAX_QUESTIONS)
    if not number:
        return {}
    questions = chat_questions(Random(f"{data.seed} {CHAT} questions"), number)
    # Here on the CPU, where bfloat16 is often emulated, many times slower.
    stored = model.decoder.dtype
    model.decoder.float()
    answers = answer_questions(questions, model, processor)
    model.decoder.to(stored)
    return answers


def chat_questions(random: Random, number: int) -> list[str]:
    """Different ordinary questions, in an order of chance: facts, words, sums and small programs."""
    drawn = _questions(random)
    seen: dict[str, None] = {}
    while len(seen) < number:
        seen[next(drawn)] = None
    return list(seen)


def _questions(random: Random) -> Iterator[str]:
    # Here, not above: a GPU machine trains on data that were built elsewhere, and may lack the package.
    from wonderwords import RandomWord

    words = RandomWord(rng=random)
    about = yaml.safe_load(_TOPICS.read_text(encoding="utf-8"))
    while True:
        a, b = random.randrange(2, 60), random.randrange(2, 60)
        noun, verb, adjective = (words.word(include_parts_of_speech=[part]) for part in ("noun", "verb", "adjective"))
        country = random.choice(about["countries"])
        yield random.choice(
            (
                f"What is the capital of {country}?",
                f"On which continent is {country}?",
                f"Which language do people speak in {country}?",
                f"Who was {random.choice(about['people'])}? Answer in one sentence.",
                f"What is {random.choice(about['topics'])}? Answer in one sentence.",
                f"Explain {random.choice(about['topics'])} to a child in one sentence.",
                f"Write a Python function that {random.choice(about['jobs'])}.",
                f"What is {a} + {b}?",
                f"What is a {noun}? Answer in one sentence.",
                f"What does the word `{adjective}` mean? Answer in one sentence.",
                f"Use the word `{verb}` in a sentence.",
                f"Give the opposite of `{adjective}`.",
            )
        )


def answer_questions(questions: Sequence[str], model: CodeLLaVAModel, processor: Processor) -> dict[str, str]:
    """Question → the model's greedy answer without any memory; questions with longer answers are left out.

    Raises:
        DatasetError: There are questions, and all answers are longer than `MAX_ANSWER_TOKENS`.
    """
    answers: dict[str, str] = {}
    decoder = processor.tokenizers.decoder
    order = sorted(questions, key=len)  # like lengths side by side waste least
    with tqdm(total=len(order), desc="answering questions", unit="question", disable=None) as bar:
        for at in range(0, len(order), _BATCH_SIZE):
            batch = order[at : at + _BATCH_SIZE]
            prompts = [processor.parse_chat([{"role": "user", "content": question}]) for question in batch]
            rows = model.generate(prompts, max_new_tokens=MAX_ANSWER_TOKENS)
            for question, ids in zip(batch, rows, strict=True):
                answer = decoder.decode(ids, skip_special_tokens=True).strip()
                if answer and len(ids) < MAX_ANSWER_TOKENS:
                    answers[question] = answer
            bar.update(len(batch))
    if questions and not answers:
        raise DatasetError(
            f"the decoder ends none of its answers within {MAX_ANSWER_TOKENS} tokens: leave the task chat out"
        )
    return answers
