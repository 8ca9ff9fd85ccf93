"""A checkpoint as a model of lm-evaluation-harness: what stands between the memory markers is compressed.

    import utils.harness.lm                                    # registers `code-llava`
    lm_eval.simple_evaluate(model="code-llava", model_args={"chunk_size": 8, "auto_memory": 500}, tasks=["gsm8k"])

Source: github.com/EleutherAI/lm-evaluation-harness, `lm_eval.api.model.LM`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
from collections import Counter
from collections.abc import Sequence
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
from utils.flags import encoder_settings, expansion, open_cache
from utils.harness.context import ChatContext, ContextReader
from utils.harness.likelihood import Scored, score_continuations
from utils.harness.pairs import read_pair, read_whole
from utils.harness.sampling import read_sampling
from utils.inference.generation import Generator, batches_by_length, open_pair
from utils.model.limits import check_prompt_fits
from utils.model.prompt import MemoryLimit, MemoryPrompt

logger = logging.getLogger(__name__)

TOO_LONG = ("error", "empty")
# What lm-eval's command passes on where the user names no device.
_UNNAMED_DEVICE = "cuda:0"


@register_model("code-llava")
class CodeLlavaLM(LM):
    """A Code-LLaVA or LCLM checkpoint.

    Args:
        checkpoint: Folder, run folder or hub id; None for the embedded default.
        chunk_size: Encoder tokens per latent; None for the checkpoint's own.
        expand: Share of the memory tokens that stays text, as "1/16".
        expand_tokens: The same in tokens.
        expand_policy: What chooses it; bm25 where there is a budget.
        auto_memory: Where a context has no markers, its longest part becomes memory if it has so many encoder tokens
            (`utils.harness.context.mark_longest`); None: it stays text.
        device: "auto", "cpu", "cuda" or "cuda:<number>".
        dtype: "float32", "bfloat16", "float16"; "auto" as stored.
        batch_size: Prompts of one forward pass.
        max_gen_toks: New tokens where neither the task nor `--gen_kwargs` says.
        too_long: What becomes of a question that the decoder has no positions for: "error" ends the run before anything
            is answered; "empty" counts it (`get_model_info`), and its answer is the empty text.
        cache: Take latents from the latent cache, and keep them there.

    Raises:
        CheckpointError: The checkpoint is missing, incomplete or inconsistent.
        ConfigError: An argument has a value that cannot be.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        chunk_size: int | None = None,
        expand: str | float | None = None,
        expand_tokens: int | None = None,
        expand_policy: str | None = None,
        auto_memory: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 4,
        max_gen_toks: int = 256,
        too_long: str = "error",
        cache: bool = True,
    ) -> None:
        super().__init__()
        numbers = {"chunk_size": chunk_size, "auto_memory": auto_memory, "batch_size": batch_size}
        for name, value in (numbers | {"max_gen_toks": max_gen_toks}).items():
            if value is not None and (not str(value).isdecimal() or int(value) < 1):
                raise ConfigError(f"{name} must be a number of at least 1, got {value!r}")
        if too_long not in TOO_LONG:
            raise ConfigError(f"too_long must be one of {', '.join(TOO_LONG)}, got {too_long!r}")
        flags = argparse.Namespace(
            device=device, dtype=dtype, attn_implementation=None, batch_tokens=None, no_cache=not cache, cache_dir=None,
            expand=expand, expand_tokens=expand_tokens, expand_policy=expand_policy, expand_query=None,
        )  # fmt: skip
        stays_text, settings = expansion(flags), encoder_settings(flags)
        self.model, processor = open_pair(checkpoint, chunk_size, settings, open_cache(flags), MemoryLimit())
        self.tokenizer = processor.tokenizers.decoder
        self.generator = Generator(self.model.decoder, self.tokenizer)
        self.reader = ContextReader(
            processor,
            Expander(processor.tokenizers, self.model.encode_memory),
            stays_text,
            int(auto_memory) if auto_memory is not None else None,
        )
        self.batch_size, self.max_gen_toks, self.too_long = int(batch_size), int(max_gen_toks), too_long
        self._settings = {"checkpoint": checkpoint, "auto_memory": auto_memory, "too_long": too_long}
        self._settings |= {"expansion": stays_text.to_json() if stays_text else None}
        self._device = self.model.device
        self._counts: Counter[str] = Counter()

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> CodeLlavaLM:
        """Make one of `--model_args`.

        Args:
            arg_dict: Arguments of the class; they win.
            additional_config: `batch_size` and `device` of lm-eval's own flags. A `max_batch_size` is an error: there
                is no automatic batch size here.

        Raises:
            ConfigError: There is no such argument.
        """
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if flags.get("device") == _UNNAMED_DEVICE and not torch.cuda.is_available():
            flags["device"] = "auto"
        known = list(inspect.signature(cls).parameters)
        for name in {**flags, **arg_dict}:
            if name not in known:
                raise ConfigError(
                    f"code-llava has no argument {name!r}: it has {', '.join(known)}. What a task needs goes into "
                    "--metadata"
                )
        return cls(**{**flags, **arg_dict})

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
        prompts = self._read([request.args[0] for request in requests], disable_tqdm)
        answers = [""] * len(requests)
        # All is checked before the first is answered: a bad one is reported at once.
        for number, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True, default=str)
            sampling = samplings.get(key) or read_sampling(request.args[1], self.max_gen_toks)
            samplings[key] = sampling
            if self._fits(prompts[number], sampling, request):
                fitting.setdefault(sampling, []).append(number)
        with tqdm(total=len(requests), desc="answers", unit="request", disable=disable_tqdm) as bar:
            bar.update(len(requests) - sum(map(len, fitting.values())))
            for sampling, numbers in fitting.items():
                lengths = [len(prompts[number].input_ids) for number in numbers]
                # The longest first: what does not fit into the machine's memory fails at once.
                for batch in reversed(batches_by_length(lengths, self.batch_size, window=len(numbers))):
                    chosen = [numbers[index] for index in batch]
                    rows = self.model.embed_prompts([prompts[number] for number in chosen])
                    for number, completion in zip(chosen, self.generator.complete(rows, sampling), strict=True):
                        answers[number] = completion.text
                        self.cache_hook.add_partial("generate_until", requests[number].args, completion.text)
                    bar.update(len(batch))
        self._report(prompts)
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
            for request in tqdm(requests, desc="reading", unit="request", disable=disable_tqdm):
                pairs.append(read_pair(self.reader, *request.args))
                self._check_room(pairs[-1], request)
        scores = self._score(pairs, disable_tqdm)
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, score)
        self._report([prompt for prompt, _ in pairs])
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
            for number, request in enumerate(tqdm(requests, desc="reading", unit="request", disable=disable_tqdm)):
                found = list(read_whole(self.reader, request.args[0], self.generator.max_rows))
                for pair in found:
                    self._check_room(pair, request)
                pairs += found
                owners += [number] * len(found)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._score(pairs, disable_tqdm), strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        self._report([prompt for prompt, _ in pairs])
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
        """What lm-eval writes beside the results: settings, and counts over all requests so far."""
        chunk_size = self.reader.processor.chunk_size
        return {"code_llava": {**self._settings, "chunk_size": chunk_size, "counts": dict(self._counts)}}

    def _read(self, contexts: Sequence[str], disable_tqdm: bool) -> list[MemoryPrompt]:
        self.reader.forget()
        bar = tqdm(contexts, desc="reading", unit="request", disable=disable_tqdm)
        return [self.reader.read(context) for context in bar]

    def _fits(self, prompt: MemoryPrompt, sampling: Sampling, request: Any) -> bool:
        try:
            self.generator.check_room(len(prompt.input_ids), sampling, _name(request))
        except PromptError:
            if self.too_long == "error":
                raise
            self._counts["too_long"] += 1
            return False
        return True

    def _check_room(self, pair: Scored, request: Any) -> None:
        # The last token is not read.
        num_rows = len(pair[0].input_ids) + len(pair[1]) - 1
        check_prompt_fits(num_rows, self.model.decoder.config, name=_name(request))

    def _score(self, pairs: Sequence[Scored], disable_tqdm: bool) -> list[tuple[float, bool]]:
        with tqdm(total=len(pairs), desc="log-likelihoods", unit="request", disable=disable_tqdm) as bar:
            return score_continuations(self.model, pairs, self.batch_size, bar.update)

    def _report(self, prompts: Sequence[MemoryPrompt]) -> None:
        """Count what was read, say it, and forget the prompts."""
        self.reader.forget()
        counts = Counter(
            requests=len(prompts),
            with_memory=sum(bool(prompt.spans) for prompt in prompts),
            prompt_rows=sum(len(prompt.input_ids) for prompt in prompts),
            memory_tokens=sum(prompt.memory_tokens for prompt in prompts),
            num_latents=sum(prompt.num_latents for prompt in prompts),
            text_rows=sum(prompt.text_rows for prompt in prompts),
        )
        self._counts += counts
        if not counts["with_memory"]:
            logger.warning(
                "none of %d requests has memory: nothing was compressed. Tasks write markers around it, or pass "
                "--model_args auto_memory=500", len(prompts),
            )  # fmt: skip
            return
        logger.info(
            "%d of %d requests have memory: %d tokens → %d latents + %d rows of text; so far %d were too long",
            *(counts[name] for name in ("with_memory", "requests", "memory_tokens", "num_latents", "text_rows")),
            self._counts["too_long"],
        )


def _name(request: Any) -> str:
    return f"document {request.doc_id} of {request.task_name}"
