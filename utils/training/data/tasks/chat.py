"""Answer an ordinary question, which the memory says nothing about, as the decoder did before its training."""

from __future__ import annotations

from utils.errors import ConfigError
from utils.training.data.examples import Example, TaskSources

CHAT = "chat"


def draw(sources: TaskSources) -> Example | None:
    random = sources.random
    if not sources.answers:
        raise ConfigError("task chat repeats what a decoder says: it is built for a decoder, not for evaluation")
    question = random.choice(list(sources.answers))
    num_chars = sources.draw_chars()
    num_chars //= random.choice((1, 8))  # such questions mostly come without a memory: short ones are nearer to that
    file, code = sources.draw_code(max(16, num_chars))
    memory = code.strip("\n")
    if not memory.strip():
        return None
    return Example(memory=memory, question=question, answer=sources.answers[question], source=file.origin)
