"""A checkpoint as a model of lm-evaluation-harness: what stands between the memory markers is compressed.

    import utils.harness.lm                                    # registers `code-llava`
    lm_eval.simple_evaluate(model="code-llava", model_args={"chunk_size": 8, "auto_memory": 500}, tasks=["gsm8k"])

Source: github.com/EleutherAI/lm-evaluation-harness, `lm_eval.api.model.LM`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# lm-eval looks for its own models only where none is registered yet: they come first.
import lm_eval.models  # noqa: F401
import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

from utils.client.completion import Sampling
from utils.compress.expander import Expander
from utils.errors import ConfigError, PromptError
from utils.harness.arguments import ModelArguments
from utils.harness.context import ChatContext, ContextReader
from utils.harness.counts import Counts
from utils.harness.likelihood import Scored, embed_each_once, score_continuations
from utils.harness.pairs import read_pair, read_whole
from utils.harness.sampling import read_sampling
from utils.inference.generation import Generator, batches_by_length
from utils.model.limits import check_prompt_fits
from utils.model.prompt import MemoryPrompt


@register_model("code-llava")
class CodeLlavaLM(LM):
    """A Code-LLaVA or LCLM checkpoint.

    Args:
        arguments: Those of `ModelArguments`.

    Raises:
        CheckpointError: The checkpoint is missing, incomplete or inconsistent.
        ConfigError: There is no such argument, or its value cannot be.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = ModelArguments.read(arguments)
        stays_text = self.arguments.expansion
        self.model, processor = self.arguments.open()
        expander = Expander(processor.tokenizers, self.model.encode_memory)
        self.reader = ContextReader(processor, expander, stays_text, self.arguments.auto_memory)
        self.tokenizer = processor.tokenizers.decoder
        self.generator = Generator(self.model.decoder, self.tokenizer)
        self.counts = Counts()
        self._device = self.model.device

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> CodeLlavaLM:
        """Make one of `--model_args` and lm-eval's own flags; see `ModelArguments.read`."""
        return cls(**ModelArguments.read(arg_dict, additional_config).to_json())

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> CodeLlavaLM:
        """Make one of `name=value,name=value`; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # ---- answers ----

    @torch.inference_mode()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts up to a stop string, which does not belong to the answer, an end token or the limit.

        Args:
            requests: lm-eval's instances with the arguments (context, generation arguments).
            disable_tqdm: Show no progress.

        Raises:
            PromptError: A context cannot be read, or it and its answer are longer than the decoder's positions.
            ConfigError: A generation argument is wrong, or there is not memory enough.
        """
        samplings: dict[str, Sampling] = {}
        fitting: dict[Sampling, list[int]] = {}
        prompts: list[MemoryPrompt] = []
        answers = [""] * len(requests)
        # All is read and checked before the first is answered: a bad one is reported at once.
        for number, request in enumerate(_bar(requests, "reading", disable_tqdm)):
            context, arguments = request.args
            key = json.dumps(arguments, sort_keys=True, default=str)
            if key not in samplings:
                samplings[key] = read_sampling(arguments, self.arguments.max_gen_toks)
            with _naming(request):
                prompts.append(self.reader.read(context))
                if self._fits(prompts[-1], samplings[key]):
                    fitting.setdefault(samplings[key], []).append(number)
        with _bar(None, "answers", disable_tqdm, total=len(requests)) as bar:
            too_long = len(requests) - sum(map(len, fitting.values()))
            bar.update(too_long)
            for sampling, numbers in fitting.items():
                lengths = [len(prompts[number].input_ids) for number in numbers]
                # The longest first: what does not fit into the machine's memory fails at once.
                for batch in reversed(batches_by_length(lengths, self.arguments.batch_size, window=len(numbers))):
                    chosen = [numbers[index] for index in batch]
                    rows = embed_each_once(self.model, [prompts[number] for number in chosen])
                    for number, completion in zip(chosen, self.generator.complete(rows, sampling), strict=True):
                        answers[number] = completion.text
                        self.cache_hook.add_partial("generate_until", requests[number].args, completion.text)
                    bar.update(len(batch))
        self._count(prompts, too_long)
        return answers

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations.

        Args:
            requests: lm-eval's instances with the arguments (context, continuation); see `read_pair`.
            disable_tqdm: Show no progress.

        Returns:
            For each the logarithm of the continuation's probability, and whether greedy decoding would write it.

        Raises:
            PromptError: A context cannot be read, a continuation has no token, or both are longer than the decoder's
                positions.
        """
        pairs: list[Scored] = []
        with torch.inference_mode():
            for request in _bar(requests, "reading", disable_tqdm):
                with _naming(request):
                    pairs.append(read_pair(self.reader, *request.args))
                    self._check_room(pairs[-1])
        scores = self._score(pairs, disable_tqdm)
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, score)
        self._count([prompt for prompt, _ in pairs])
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, for perplexity; see `read_whole`.

        Args:
            requests: lm-eval's instances with the argument (text,).
            disable_tqdm: Show no progress.

        Raises:
            PromptError: As `loglikelihood`.
        """
        pairs: list[Scored] = []
        owners: list[int] = []
        with torch.inference_mode():
            for number, request in enumerate(_bar(requests, "reading", disable_tqdm)):
                with _naming(request):
                    found = list(read_whole(self.reader, request.args[0], self.generator.max_rows))
                    for pair in found:
                        self._check_room(pair)
                pairs += found
                owners += [number] * len(found)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._score(pairs, disable_tqdm), strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        self._count([prompt for prompt, _ in pairs])
        return totals

    # ---- chats ----

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests knows contexts by: the tokenizer, and what becomes memory."""
        return f"{self.tokenizer.name_or_path.replace('/', '__')}-memory{self.reader.least_memory_tokens}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that chats are written with from now on; None where none is wanted.

        Args:
            chat_template: True for the tokenizer's own, or the name of one of several.

        Raises:
            ConfigError: The tokenizer has none, or none of this name.
        """
        if not chat_template:
            return None
        name = chat_template if isinstance(chat_template, str) else None
        try:
            template = str(self.tokenizer.get_chat_template(name))
        except ValueError as error:
            raise ConfigError(f"chat template: {error}") from None
        # A name that is none would be taken for the template itself.
        if name is not None and template == name:
            raise ConfigError(f"the decoder's tokenizer has no chat template {name!r}: leave the name out")
        self.reader.template = template
        return template

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> ChatContext:
        """A chat as a context; see `ContextReader.chat`."""
        return self.reader.chat(chat_history, add_generation_prompt)

    # ---- results ----

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results: the arguments, and counts over all requests so far."""
        about = self.arguments.to_json() | {"chunk_size": self.reader.processor.chunk_size}
        return {"code_llava": about | {"counts": self.counts.to_json()}}

    def _fits(self, prompt: MemoryPrompt, sampling: Sampling) -> bool:
        try:
            self.generator.check_room(len(prompt.input_ids), sampling)
        except PromptError:
            if self.arguments.too_long == "error":
                raise
            return False
        return True

    def _check_room(self, pair: Scored) -> None:
        # The last token is not read.
        check_prompt_fits(len(pair[0].input_ids) + len(pair[1]) - 1, self.model.decoder.config)

    def _score(self, pairs: Sequence[Scored], disable_tqdm: bool) -> list[tuple[float, bool]]:
        with _bar(None, "log-likelihoods", disable_tqdm, total=len(pairs)) as bar:
            return score_continuations(self.model, pairs, self.arguments.batch_size, bar.update)

    def _count(self, prompts: Sequence[MemoryPrompt], too_long: int = 0) -> None:
        self.reader.forget()
        self.counts.add(prompts, too_long)


def _bar(requests: Any, name: str, disable: bool, total: int | None = None) -> Any:
    """A progress bar; none is shown where standard error is no terminal."""
    return tqdm(requests, desc=name, unit="request", disable=disable or None, total=total)


@contextmanager
def _naming(request: Any) -> Iterator[None]:
    """Let errors say which document it is."""
    try:
        yield
    except PromptError as error:
        raise PromptError(f"document {request.doc_id} of {request.task_name}: {error}") from None
