"""Answer prompts about code from a checkpoint, with Hugging Face generation.

    model, tokenizer, processor = load_model("checkpoints/my-pair", chunk_size=8)
    text = generate_text(model, tokenizer, processor, code="def f(): return 3", prompt="What does f return?")

As a command: `python -m utils.inference.inference --memory FILE --text QUESTION`, or `--test_data examples.json`. The
sampling settings are those of the published Code-LLaVA command.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from utils.checkpoint.settings import EncoderSettings
from utils.cli import EXIT_OK, describe_rows, make_parser, print_json, run_command
from utils.client.completion import Sampling
from utils.errors import ConfigError, DatasetError
from utils.files import read_json
from utils.flags import (
    add_cache_flags,
    add_checkpoint_flags,
    add_expand_flags,
    add_memory_files_flag,
    add_memory_limit_flags,
    encoder_settings,
    expansion,
    memory_limit,
    open_cache,
    read_memory_files,
)
from utils.model.markers import MEMORY, wrap

if TYPE_CHECKING:
    import torch

    from utils.compress.latent_cache import LatentCache
    from utils.compress.select import Expansion
    from utils.model.code_llava_model import CodeLLaVAModel
    from utils.model.processor import Processor

# Answered where no other prompts are named. Its memory comes first, as in most of the embedded checkpoint's training.
TEST_DATA = Path(__file__).with_name("test_data.json")


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
        dtype: A torch dtype or one of `utils.checkpoint.settings.DTYPE_NAMES`; None for "auto".
        truncate_memory: Cut spans over `max_code_length` at the end, with a warning, where otherwise it is an error.
        batch_tokens: Tokens of one encoder pass; None: chosen by device.
        cache: Latents of earlier encodings; None to encode everything.

    Returns:
        The model in eval mode, the decoder's tokenizer, and the processor that parses prompts for it.

    Raises:
        CheckpointError: The checkpoint is missing, incomplete or inconsistent.
        ConfigError: It cannot serve the chunk size, or the device is not there.
    """
    # Late, as torch is: `--help` needs neither.
    from utils.inference.generation import open_pair
    from utils.model.prompt import MemoryLimit

    settings = EncoderSettings(
        device=device, dtype=dtype or "auto", attn_implementation=attn_implementation, batch_tokens=batch_tokens
    )
    limit = MemoryLimit(max_tokens=max_code_length, truncate=truncate_memory)
    model, processor = open_pair(checkpoint_path, chunk_size, settings, cache, limit)
    return model, processor.tokenizers.decoder, processor


def generate_text(
    model: CodeLLaVAModel,
    llm_tokenizer: Any,
    processor: Processor,
    code: str,
    prompt: str,
    device: str | torch.device = "auto",
    max_tokens: int = 512,
    temperature: float = 0.7,
    *,
    expansion: Expansion | None = None,
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
        expansion: What of the code stays text; None: nothing.

    Raises:
        PromptError: Markers in the prompt, empty code, or a prompt longer than the decoder's positions.
    """
    from utils.compress.expander import Expander
    from utils.inference.generation import Generator

    parsed = processor.parse_chat(build_messages(code, prompt))
    rows = [model.embed_prompt(Expander(processor.tokenizers, model.encode_memory)(parsed, expansion))]
    sampling = published_sampling(max_tokens, temperature)
    return Generator(model.decoder, llm_tokenizer).complete(rows, sampling)[0].text


def published_sampling(max_tokens: int, temperature: float) -> Sampling:
    """The settings of the published Code-LLaVA inference command; its repetition penalty is greedy decoding's, too."""
    return Sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=0.8, top_k=20, repetition_penalty=1.1, seed=None
    )


def build_messages(code: str, prompt: str) -> list[dict[str, str]]:
    """One user turn in which the code, wrapped in the memory markers, stands for each `<|memory|>` or at the end."""
    content, *others = prompt.split(MEMORY) if MEMORY in prompt else (f"{prompt} ", "")
    for other in others:
        content = content + wrap(code) + other
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
  uv run python -m utils.inference.inference --memory docs/sample/store.py --text "What does the function load return?"
  uv run python -m utils.inference.inference --test-data examples.json --num-examples 4 --temperature 0 --json
  uv run python -m utils.inference.inference --checkpoint latent-context/0.6b-4b-LCLM-16x --device cuda""",
        prog="python -m utils.inference.inference",
    )
    add_checkpoint_flags(parser)
    add_memory_limit_flags(parser)
    add_expand_flags(parser)
    add_cache_flags(parser)
    data = parser.add_argument_group("prompts")
    one = data.add_mutually_exclusive_group()
    one.add_argument("--text", nargs="+", metavar="QUESTION", help="each a prompt of its own about the --memory files")
    one.add_argument(
        "--test-data", "--test_data", default=str(TEST_DATA),
        help='JSON {"examples": [{"code", "prompt"}]}; default utils/inference/test_data.json',
    )  # fmt: skip
    add_memory_files_flag(data)
    data.add_argument("--num-examples", "--num_examples", type=int, help="first N prompts; default all")
    generation = parser.add_argument_group("generation")
    generation.add_argument("--max-tokens", "--max_tokens", type=int, default=512, help="new tokens; default 512")
    generation.add_argument("--temperature", type=float, default=0.7, help="0 is greedy; default 0.7")
    generation.add_argument("--seed", type=int, default=0, help="of the sampling; default 0")
    generation.add_argument("--batch-size", type=int, default=4, help="prompts generated together; default 4")
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt on stdout")
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
    for result in _answers(args, _chats(args)[: args.num_examples]):
        _print_result(result, args.json)
    return EXIT_OK


def _chats(args: argparse.Namespace) -> list[tuple[str, list[dict[str, str]]]]:
    """What each prompt asks, and its chat."""
    if args.text:
        memory = read_memory_files(args.memory)
        return [(question, [{"role": "user", "content": memory + question}]) for question in args.text]
    if args.memory:
        raise ConfigError("--memory needs --text: what shall be answered about the files?")
    examples = read_test_data(args.test_data)
    return [(example["prompt"], build_messages(example["code"], example["prompt"])) for example in examples]


def _answers(args: argparse.Namespace, chats: Sequence[tuple[str, list[dict[str, str]]]]) -> Iterator[dict[str, Any]]:
    import torch

    from utils.compress.expander import Expander
    from utils.compress.prompt_embeds import compression_ratio
    from utils.inference.generation import Generator, batches_by_length, open_pair

    settings, limit = encoder_settings(args), memory_limit(args)
    model, processor = open_pair(args.checkpoint, args.chunk_size, settings, open_cache(args), limit)
    # All prompts are parsed before the first is answered: a bad one is reported at once.
    expander, stays_text = Expander(processor.tokenizers, model.encode_memory), expansion(args)
    prompts = [expander(processor.parse_chat(messages), stays_text) for _, messages in chats]
    model.check_room(prompts, args.max_tokens)
    generator = Generator(model.decoder, processor.tokenizers.decoder)
    sampling = published_sampling(args.max_tokens, args.temperature)
    torch.manual_seed(args.seed)
    # Batches are of similar lengths, results come in the order of the prompts.
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
                    "prompt": chats[index][0],
                    "text": completion.text,
                    "finish_reason": completion.finish_reason,
                    "memory_tokens": prompt.memory_tokens,
                    "num_latents": prompt.num_latents,
                    "text_rows": prompt.text_rows,
                    "ratio": round(compression_ratio(prompt.memory_tokens, prompt.num_latents + prompt.text_rows), 2),
                    "prompt_tokens": completion.prompt_tokens,
                    "completion_tokens": completion.completion_tokens,
                    "truncated_tokens": sum(span.truncated_tokens for span in prompt.spans),
                    "expanded": [
                        {"span": number, "chars": segment.chars}
                        for number, span in enumerate(prompt.spans)
                        for segment in span.segments
                    ],
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
    counts = f"{result['memory_tokens']} memory tokens → {describe_rows(result)}"
    sys.stdout.write(
        f"{result['prompt']}\n> {result['text']}\n"
        f"  ({counts}; {result['completion_tokens']} new tokens, {result['seconds']} s)\n"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
