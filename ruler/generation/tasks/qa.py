"""Question answering: the documents that hold the answer among others that do not. Sizes are documents.

The questions and documents come from files in the shape of SQuAD v2.0 and of HotpotQA (distractor setting).

Source: RULER, arXiv 2404.06654, section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ruler.generation.tasks.base import Sample, SampleFailed, Streams, TaskGenerator
from utils.errors import DatasetError

_NUM_FILLERS = 4  # documents; the first that does not fit whole may be followed by shorter ones


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        text: The question.
        answers: All answers that count as right.
        gold: Numbers of the documents that come with it.
        related: Numbers of documents on the same subject, which are the first to be added.
    """

    text: str
    answers: list[str]
    gold: list[int]
    related: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Questions and the documents that they number."""

    questions: list[Question]
    documents: list[str]


def read_squad(data: dict[str, Any]) -> QuestionSet:
    """Answerable questions of a SQuAD v2.0 file, in file order; documents sorted, once each."""
    documents = sorted({paragraph["context"] for article in data["data"] for paragraph in article["paragraphs"]})
    number = {document: index for index, document in enumerate(documents)}
    questions = []
    for article in data["data"]:
        of_article = [number[paragraph["context"]] for paragraph in article["paragraphs"]]
        for own, paragraph in zip(of_article, article["paragraphs"], strict=True):
            related = [index for index in of_article if index != own]
            questions += [
                Question(item["question"], [answer["text"] for answer in item["answers"]], [own], related)
                for item in paragraph["qas"]
                if not item["is_impossible"]
            ]
    return QuestionSet(questions, documents)


def read_hotpotqa(data: list[dict[str, Any]]) -> QuestionSet:
    """Questions of a HotpotQA distractor file, in file order; documents (title, sentences) sorted, once each."""

    def document(title: str, sentences: Sequence[str]) -> str:
        return f"{title}\n{''.join(sentences)}"

    documents = sorted({document(*entry) for item in data for entry in item["context"]})
    number = {text: index for index, text in enumerate(documents)}
    questions = [
        Question(item["question"], [item["answer"]], [number[document(*entry)] for entry in item["context"]])
        for item in data
    ]
    return QuestionSet(questions, documents)


@dataclass
class QuestionAnswering(TaskGenerator):
    """Generator of `qa_1` and `qa_2`.

    Attributes:
        source: Questions and documents.
    """

    source: QuestionSet = field(default_factory=lambda: QuestionSet([], []))

    def __post_init__(self) -> None:
        self.step = 10
        self.num_depths = max((len(question.gold) for question in self.source.questions), default=0)
        # A document's last word is a piece with the header that follows, so that the rest is counted once for all.
        self._split_at = [len(text) - len(_last_word(text)) for text in self.source.documents]

    def sample(self, streams: Streams, size: int, number: int, depths: Sequence[float] | None = None) -> Sample:
        if number >= len(self.source.questions):
            raise DatasetError(
                f"{self.task.name}: sample {number} needs a question of its own, but the data has only "
                f"{len(self.source.questions)}: ask for fewer samples or give more data"
            )
        question = self.source.questions[number]
        if depths is None:
            chosen = streams.shuffled(self._choose(streams, question, size))
        else:
            chosen = self._spread(streams, question, size, depths)
        return Sample(
            head=[self.prompt.before(), self.prompt.head()],
            context=self._pieces(chosen),
            tail=[self.prompt.tail(query=question.text)],
            outputs=question.answers,
        )

    def _choose(self, streams: Streams, question: Question, size: int) -> list[int]:
        """The question's documents first, then related ones, then any."""
        total = len(self.source.documents)
        if size >= total:
            return [index % total for index in range(size)]
        missing = size - len(question.gold)
        if missing <= len(question.related):
            if missing < 0:
                raise SampleFailed(f"{size} documents are fewer than the question's own {len(question.gold)}")
            return question.gold + streams.random.sample(question.related, missing)
        taken = {*question.gold, *question.related}
        others = [index for index in range(total) if index not in taken]
        return question.gold + question.related + streams.random.sample(others, missing - len(question.related))

    def _pieces(self, chosen: Sequence[int]) -> list[str]:
        pieces = ["Document 1:\n"]
        for place, index in enumerate(chosen, start=2):
            text, cut = self.source.documents[index], self._split_at[index]
            pieces += (text[:cut], f"{text[cut:]}\n\nDocument {place}:\n")
        pieces[-1] = pieces[-1].removesuffix(f"\n\nDocument {len(chosen) + 1}:\n")
        return pieces

    # ---- balanced mode ----

    def smallest_size(self) -> int:
        return self.num_depths

    def _spread(self, streams: Streams, question: Question, size: int, depths: Sequence[float]) -> list[int]:
        """The question's documents at the wanted depths; no document twice unless all are used."""
        others = [index for index in self._choose(streams, question, size) if index not in question.gold]
        streams.random.shuffle(others)
        gold = list(question.gold)
        streams.random.shuffle(gold)
        places = sorted(int((len(others) + 1) * depth) for depth in depths[: len(gold)])
        for shift, (place, index) in enumerate(zip(places, gold, strict=True)):
            others.insert(place + shift, index)
        return others

    def filler(self, streams: Streams, sample: Sample) -> list[str]:
        """The beginning of a few more documents, word by word; none that is there already."""
        asked = "".join(sample.context)
        unused = [text for text in self.source.documents if text not in asked] or self.source.documents
        number = sum(piece.endswith(":\n") for piece in sample.context) + 1
        filler: list[str] = []
        for place, text in enumerate(streams.random.sample(unused, min(_NUM_FILLERS, len(unused))), start=number):
            first, *words = text.split(" ")
            filler += [f"\n\nDocument {place}:\n{first}", *(f" {word}" for word in words)]
        return filler


def _last_word(text: str) -> str:
    """The end of `text` from the space before its last word on."""
    return text[max(text.rstrip().rfind(" "), 0) :]
