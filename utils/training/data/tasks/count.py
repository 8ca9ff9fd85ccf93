"""Count a word in a list of words."""

from __future__ import annotations

from utils.training.data.examples import Example, TaskSources
from utils.training.data.notes import NOUNS


def draw(sources: TaskSources) -> Example | None:
    random = sources.random
    num_words = max(4, sources.draw_chars() // 8)
    vocabulary = random.sample(NOUNS, min(len(NOUNS), random.randint(3, 8)))
    words = random.choices(vocabulary, k=num_words)
    word = random.choice(words)
    question = f"How often does `{word}` appear?"
    return Example(memory=", ".join(words), question=question, answer=str(words.count(word)))
