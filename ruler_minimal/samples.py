"""Makes the samples of the three light tasks: an instruction, a memory to read, and the separate right answers.

    task = NeedleTask(num_keys=2)
    sample = task.make(random.Random(7), count_words, max_length=512)

A sample's length is the length of its whole prompt, in whatever unit the given counter counts. Keys and values are
unique within a sample, and no right answer is part of another word of it, so that a substring score is fair.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

from ruler.generation.words import load_word_lists
from utils.errors import ConfigError, DatasetError
from utils.model.markers import wrap

# How long a text is: in tokens of some tokenizer, or in words.
Counter = Callable[[str], int]

_FILLER = (
    "The ferry left the harbour a few minutes before the rain began.",
    "Someone had stacked the chairs against the far wall of the library.",
    "Every spring the orchard behind the school turns white for a week.",
    "The baker keeps a small radio on the shelf above the oven.",
    "A narrow path follows the river from the mill to the old bridge.",
    "Two cyclists stopped at the crossing to study a folded map.",
    "The museum closes early on Mondays unless a group has booked a tour.",
    "Snow stayed on the northern slope long after the valley was green.",
    "The tailor measured the sleeve twice and wrote nothing down.",
    "By noon the market square was empty except for a few pigeons.",
)


def count_words(text: str) -> int:
    """Length in words, where no tokenizer is named."""
    return len(text.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question.

    Attributes:
        instruction: What to do; it stands before the memory.
        memory: The text to read, without markers.
        outputs: The right answers, each on its own.
    """

    instruction: str
    memory: str
    outputs: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """Instruction and memory as plain text."""
        return f"{self.instruction}\n\n{self.memory}"

    def row(self, index: int) -> dict[str, object]:
        """The sample as a dataset row; the memory is wrapped in the markers."""
        return {
            "index": index,
            "input": self.prompt,
            "outputs": list(self.outputs),
            "input_memory_instruction": self.instruction,
            "input_memory_content": wrap(self.memory),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleTask:
    """Find the values of keys that are spread over filler text."""

    num_keys: int = 1
    num_values: int = 1

    def make(self, rng: random.Random, length_of: Counter, max_length: int) -> Sample:
        """Make one sample of at most `max_length`."""
        keys = rng.sample(load_word_lists().pairs, self.num_keys)
        values = [str(value) for value in rng.sample(range(10**6, 10**7), self.num_keys * self.num_values)]
        owners = [key for key in keys for _ in range(self.num_values)]
        needles = [f"One of the special magic numbers for {k} is: {v}." for k, v in zip(owners, values, strict=True)]
        rng.shuffle(needles)
        instruction = (
            "Some special magic numbers are hidden within the following text. Memorize them: you will be asked about "
            f"them.\n\nQuestion: What are all the special magic numbers for {_listing(keys)} mentioned in the text? "
            "Answer with the numbers only, separated by commas."
        )
        return _filled(rng, instruction, needles, tuple(values), length_of, max_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class VariableTask:
    """Follow chains of assignments that are spread, in order, over filler text."""

    num_chains: int = 2
    num_hops: int = 4

    def make(self, rng: random.Random, length_of: Counter, max_length: int) -> Sample:
        """Make one sample of at most `max_length`."""
        names = _unique_names(rng)
        values = rng.sample(range(10**4, 10**5), self.num_chains)
        chains = [[next(names) for _ in range(self.num_hops + 1)] for _ in values]
        lines = [
            [f"VAR {chain[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in pairwise(chain))]
            for chain, value in zip(chains, values, strict=True)
        ]
        # Interleave the chains at random without changing the order within one.
        turns = [number for number, chain in enumerate(lines) for _ in chain]
        rng.shuffle(turns)
        queues = [iter(chain) for chain in lines]
        mixed = [next(queues[turn]) for turn in turns]
        asked = rng.randrange(self.num_chains)
        instruction = (
            "Memorize and track the chains of variable assignments hidden within the following text.\n\nQuestion: "
            f"Which variables are assigned the value {values[asked]}, directly or through others? Answer with their "
            "names only, separated by commas."
        )
        return _filled(rng, instruction, mixed, tuple(chains[asked]), length_of, max_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonWordsTask:
    """Name the most frequent words of a list; the counts alone decide how long it is."""

    top_k: int = 5
    freq_common: int = 8
    freq_rare: int = 2
    vocab_size: int = 20

    def make(self, rng: random.Random, length_of: Counter, max_length: int) -> Sample:
        """Make one sample; one that does not fit into `max_length` is an error.

        Raises:
            ConfigError: The most frequent words would not be the answer.
            DatasetError: The list is too long.
        """
        if not 0 < self.top_k < self.vocab_size:
            raise ConfigError(f"--top-k-common must be below --vocab-size, got {self.top_k} and {self.vocab_size}")
        if not 0 < self.freq_rare < self.freq_common:
            raise ConfigError(f"--freq-rare must be below --freq-common, got {self.freq_rare} and {self.freq_common}")
        words = _separate_words(rng, self.vocab_size)
        common, rare = words[: self.top_k], words[self.top_k :]
        listed = common * self.freq_common + rare * self.freq_rare
        rng.shuffle(listed)
        memory = "\n".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))
        instruction = (
            "Below is a numbered list of words. Some appear more often than others.\n\nQuestion: What are the "
            f"{self.top_k} most frequent words of the list? Answer with the words only, separated by commas."
        )
        sample = Sample(instruction=instruction, memory=memory, outputs=tuple(common))
        _check_fits(length_of(sample.prompt), max_length, "lower --vocab-size or the frequencies")
        return sample


Task = NeedleTask | VariableTask | CommonWordsTask


def _filled(
    rng: random.Random,
    instruction: str,
    facts: Sequence[str],
    outputs: tuple[str, ...],
    length_of: Counter,
    max_length: int,
) -> Sample:
    """Spread facts, in order, over as much filler text as fits."""
    bare = Sample(instruction=instruction, memory=" ".join(facts), outputs=outputs)
    room = max_length - length_of(bare.prompt)
    _check_fits(max_length - room, max_length, "raise --max-seq-length or ask for less")
    per_sentence = length_of(" ".join(_FILLER)) / len(_FILLER)
    filler = rng.choices(_FILLER, k=int(room / per_sentence * 1.1) + 2)
    depths = sorted(rng.random() for _ in facts)

    def sample(num_filler: int) -> Sample:
        sentences = filler[:num_filler]
        for inserted, (fact, depth) in enumerate(zip(facts, depths, strict=True)):
            sentences.insert(int(depth * (num_filler + 1)) + inserted, fact)
        return Sample(instruction=instruction, memory=" ".join(sentences), outputs=outputs)

    # Start near the answer: the text is long, and each look at it costs a whole count.
    size = min(len(filler), int(room / per_sentence))
    while (over := length_of(sample(size).prompt) - max_length) > 0:
        size -= max(1, int(over / per_sentence))
    while size < len(filler) and length_of(sample(size + 1).prompt) <= max_length:
        size += 1
    return sample(size)


def _check_fits(needed: int, max_length: int, advice: str) -> None:
    if needed > max_length:
        raise DatasetError(f"the smallest sample is {needed} long, but only {max_length} are allowed: {advice}")


def _listing(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"


def _unique_names(rng: random.Random) -> Iterator[str]:
    """Five capital letters, never the same twice."""
    seen = set()
    for _ in count():
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in seen:
            seen.add(name)
            yield name


def _separate_words(rng: random.Random, size: int) -> list[str]:
    """Different nouns, none of which is part of another."""
    nouns = sorted({noun.lower() for noun in load_word_lists().nouns if noun.isalpha()})
    rng.shuffle(nouns)
    words: list[str] = []
    for noun in nouns:
        if len(words) == size:
            return words
        if not any(noun in word or word in noun for word in words):
            words.append(noun)
    raise ConfigError(f"--vocab-size {size} is more than the word list has ({len(words)} words, none part of another)")
