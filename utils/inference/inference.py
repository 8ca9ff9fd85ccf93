"""Answer prompts about code from a checkpoint, with Hugging Face generation.

    model, tokenizer, processor = load_model("checkpoints/my-pair", chunk_size=8)
    text = generate_text(model, tokenizer, processor, code="def f(): return 3", prompt="What does f return?")

As a command: `python -m utils.inference.inference --test_data examples.json`. The sampling settings are those of the
published Code-LLaVA command.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from utils.checkpoint.settings import EncoderSettings
from utils.cli import EXIT_OK, make_parser, print_json, run_command
from utils.client.completion import Sampling
from utils.errors import ConfigError, DatasetError
from utils.files import read_json
from utils.flags import add_cache_flags, add_checkpoint_flags, add_memory_limit_flags, open_cache
from utils.model.markers import MEMORY, wrap

if TYPE_CHECKING:
    import torch

    from utils.compress.latent_cache import LatentCache
    from utils.model.code_llava_model import CodeLLaVAModel
    from utils.model.processor import Processor

logger = logging.getLogger(__name__)

# Answered without --test-data, so that the command shows what it does on any machine.
_STORE = (
    "import os\n\nMAX_RETRIES = 40\n\n\ndef open_store(path, create=True):\n    # the access code is 48213\n"
    '    if not path:\n        raise ValueError("path")\n    return Store(os.path.abspath(path))\n'
)
BUILT_IN_EXAMPLES = tuple(
    # Memory first, as in most of the embedded checkpoint's training.
    {"code": _STORE, "prompt": f"{MEMORY}\n{question}"}
    for question in (
        "What are the parameters of `open_store`?",
        "What value is assigned to `MAX_RETRIES`?",
        "What is the access code?",
        "What does the function `open_store` return?",
    )
)


def load_model(
    checkpoint_path: str | Path | None = None,
    device: str | torch.device = "auto",
    chunk_size: int | None = None,
    max_code_length: int | None = None,
    attn_implementation: str | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    truncate_memory: bool = False,
    batch_tokens: int | None = None,
    cache: LatentCache | None = None,
) -> tuple[CodeLLaVAModel, Any, Processor]:
    """Load a whole checkpoint for generation.

    Args:
        checkpoint_path: Folder or hub id; None for the embedded default.
        device: "auto", "cpu", "cuda" or "cuda:<number>".
        chunk_size: Encoder tokens per latent; None for the checkpoint's own.
        max_code_length: Most encoder tokens of one memory span; longer is an error.
        attn_implementation: A transformers name for both models; None: packed encoding, sdpa decoding.
        dtype: "float32", "bfloat16", "float16"; None as stored.
        truncate_memory: Cut spans over `max_code_length` at the end, with a warning, where otherwise it is an error.
        batch_tokens: Tokens of one encoder pass; None: chosen by device.
        cache: Latents of earlier encodings; None to encode everything.

    Returns:
        The model in eval mode, the decoder's tokenizer, and the processor that parses prompts for it.

    Raises:
        CheckpointError: The checkpoint is missing, incomplete or inconsistent.
        ConfigError: It cannot serve the chunk size, or the device is not there.
    """
    from utils.checkpoint.locate import find_checkpoint
    from utils.checkpoint.pair import load_pair
    from utils.compress.span_encoder import SpanEncoder
    from utils.model.processor import Processor
    from utils.model.prompt import MemoryLimit

    files = find_checkpoint(checkpoint_path, chunk_size)
    settings = EncoderSettings(
        device=device, dtype=dtype or "auto", attn_implementation=attn_implementation, batch_tokens=batch_tokens
    )
    model, tokenizers = load_pair(files, settings)
    if cache is not None:
        model.cached_encoder = SpanEncoder(model.memory_encoder, files.fingerprint, cache)
    limit = MemoryLimit(max_tokens=max_code_length, truncate=truncate_memory)
    return model, tokenizers.decoder, Processor(tokenizers=tokenizers, chunk_size=files.config.chunk_size, limit=limit)


def generate_text(
    model: CodeLLaVAModel,
    llm_tokenizer: Any,
    processor: Processor,
    code: str,
    prompt: str,
    device: str | torch.device = "auto",
    max_tokens: int = 512,
    temperature: float = 0.7,
) -> str:
    """Answer one prompt about one piece of code; the new text only.

    Args:
        model: From `load_model`.
        llm_tokenizer: From `load_model`.
        processor: From `load_model`.
        code: The memory; it goes where `<|memory|>` stands in the prompt, else after it.
        prompt: One user turn.
        device: Kept for the published signature; the model stays where it was loaded.
        max_tokens: Most new tokens.
        temperature: 0 for greedy decoding.

    Raises:
        PromptError: Markers in the code, empty code, or a prompt longer than the decoder's positions.
    """
    from utils.inference.generation import Generator

    rows = [model.embed_prompt(processor.parse_chat(build_messages(code, prompt)))]
    sampling = published_sampling(max_tokens, temperature)
    return Generator(model.decoder, llm_tokenizer).complete(rows, sampling)[0].text


def published_sampling(max_tokens: int, temperature: float) -> Sampling:
    """The settings of the published Code-LLaVA inference command; its repetition penalty is greedy decoding's, too."""
    return Sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=0.8, top_k=20, repetition_penalty=1.1, seed=None
    )


def build_messages(code: str, prompt: str) -> list[dict[str, str]]:
    """One user turn in which the code, wrapped in the memory markers, stands for each `<|memory|>` or at the end."""
    wrapped = wrap(code)
    content = prompt.replace(MEMORY, wrapped) if MEMORY in prompt else f"{prompt} {wrapped}"
    return [{"role": "user", "content": content}]


def read_test_data(path: str | Path) -> list[dict[str, str]]:
    """Read `{"examples": [{"code": str, "prompt": str}, …]}`.

    Raises:
        DatasetError: The file is missing or of another shape; the message names the example.
    """
    data = read_json(path)
    examples = data.get("examples") if isinstance(data, dict) else None
    if not isinstance(examples, list) or not examples:
        raise DatasetError(
            f'{path}: expected {{"examples": [{{"code": …, "prompt": …}}, …]}} with at least one example'
        )
    for number, example in enumerate(examples):
        for key in ("code", "prompt"):
            if not isinstance(example, dict) or not isinstance(example.get(key), str):
                raise DatasetError(f"{path}: example {number} has no text under {key!r}")
    return examples


def build_parser() -> argparse.ArgumentParser:
    """Flags of `python -m utils.inference.inference`."""
    parser = make_parser(
        "Answer prompts about code from a checkpoint: the code is compressed, the decoder generates.",
        examples="""\
  uv run python -m utils.inference.inference
  uv run python -m utils.inference.inference --test-data examples.json --num-examples 4 --temperature 0 --json
  uv run python -m utils.inference.inference --checkpoint latent-context/0.6b-4b-LCLM-16x --device cuda""",
        prog="python -m utils.inference.inference",
    )
    add_checkpoint_flags(parser, path_flags=("--checkpoint", "--model-path"))
    add_memory_limit_flags(parser)
    add_cache_flags(parser)
    data = parser.add_argument_group("data")
    data.add_argument("--test-data", "--test_data", help='JSON {"examples": [{"code", "prompt"}]}; built-in examples')
    data.add_argument("--num-examples", "--num_examples", type=int, help="first N examples; default all")
    generation = parser.add_argument_group("generation")
    generation.add_argument("--max-tokens", "--max_tokens", type=int, default=512, help="new tokens; default 512")
    generation.add_argument("--temperature", type=float, default=0.7, help="0 is greedy; default 0.7")
    generation.add_argument("--seed", type=int, default=0, help="of the sampling; default 0")
    generation.add_argument("--batch-size", type=int, default=4, help="prompts generated together; default 4")
    parser.add_argument("--json", action="store_true", help="one JSON object an example on stdout")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    for name in ("num_examples", "max_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.temperature < 0:
        raise ConfigError(f"--temperature must not be negative, got {args.temperature}")
    examples = read_test_data(args.test_data) if args.test_data else list(BUILT_IN_EXAMPLES)
    for result in _answers(args, examples[: args.num_examples]):
        _print_result(result, args.json)
    return EXIT_OK


def _answers(args: argparse.Namespace, examples: Sequence[dict[str, str]]) -> Iterator[dict[str, Any]]:
    import torch

    from utils.inference.generation import Generator, batches_by_length

    model, tokenizer, processor = load_model(
        args.checkpoint,
        args.device,
        args.chunk_size,
        args.max_code_length,
        args.attn_implementation,
        args.dtype,
        truncate_memory=args.truncate_memory,
        batch_tokens=args.batch_tokens,
        cache=open_cache(args),
    )
    # All prompts are parsed before the first is answered: a bad one is reported at once.
    prompts = [processor.parse_chat(build_messages(e["code"], e["prompt"])) for e in examples]
    model.check_room(prompts, args.max_tokens)
    generator = Generator(model.decoder, tokenizer)
    sampling = published_sampling(args.max_tokens, args.temperature)
    torch.manual_seed(args.seed)
    # Batches are of similar lengths, results come in the order of the examples.
    waiting: dict[int, dict[str, Any]] = {}
    turn = 0
    with tqdm(total=len(prompts), unit="prompt", disable=len(prompts) <= args.batch_size) as bar:
        for batch in batches_by_length([len(prompt.input_ids) for prompt in prompts], args.batch_size):
            began = time.perf_counter()
            rows = model.embed_prompts([prompts[index] for index in batch])
            completions = generator.complete(rows, sampling)
            seconds = time.perf_counter() - began
            for index, completion in zip(batch, completions, strict=True):
                prompt = prompts[index]
                waiting[index] = {
                    "index": index,
                    "prompt": examples[index]["prompt"],
                    "text": completion.text,
                    "finish_reason": completion.finish_reason,
                    "memory_tokens": prompt.memory_tokens,
                    "num_latents": prompt.num_latents,
                    "ratio": round(prompt.memory_tokens / max(1, prompt.num_latents), 2),
                    "prompt_tokens": completion.prompt_tokens,
                    "completion_tokens": completion.completion_tokens,
                    "truncated_tokens": sum(span.truncated_tokens for span in prompt.spans),
                    "seconds": round(seconds / len(batch), 3),
                    "seed": args.seed,
                }
            bar.update(len(batch))
            while turn in waiting:
                yield waiting.pop(turn)
                turn += 1


def _print_result(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    counts = f"{result['memory_tokens']} memory tokens → {result['num_latents']} latents ({result['ratio']}×)"
    sys.stdout.write(
        f"--- example {result['index']}: {counts}, {result['completion_tokens']} new tokens, {result['seconds']} s\n"
        f"{result['prompt']}\n> {result['text']}\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
