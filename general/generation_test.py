"""Send a file of prompt embeddings to a vLLM server and show what it answers.

    uv run python general/step1.py --output artifacts/prompt_embeddings.npy
    uv run python general/generation_test.py --embedding-file artifacts/prompt_embeddings.npy

The completions API takes the rows as the whole prompt, exactly as step1 wrote them (its chat template is inside). The
chat API puts them into a user message, before `--instruction`, and the server applies its own template around both:
give it rows of raw text (general/step1_raw_text.py). The file is checked before anything is sent.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from utils.cli import EXIT_OK, make_parser, print_json, run_command
from utils.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from utils.client.completion import Completion
    from utils.client.server_client import VllmClient

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    parser = make_parser(
        "Send a file of prompt embeddings to a vLLM server and show what it answers.",
        examples="""\
  uv run python general/generation_test.py --embedding-file artifacts/prompt_embeddings.npy --stream
  uv run python general/generation_test.py --embedding-file artifacts/raw.npy --api chat --instruction "Explain it."
  uv run python general/generation_test.py --server-url http://127.0.0.1:8000 --model NAME --temperature 0.7 --json""",
    )
    parser.add_argument(
        "--embedding-file", "--embedding_file", default="artifacts/prompt_embeddings.npy",
        help=".npy or .safetensors, [rows, width]; default artifacts/prompt_embeddings.npy",
    )  # fmt: skip
    parser.add_argument(
        "--max-prompt-rows", "--max_prompt_rows", type=_positive, help="send the first N rows only; default all"
    )
    server = parser.add_argument_group("server")
    server.add_argument(
        "--server-url", "--server_url", default="http://127.0.0.1:8000",
        help="with or without /v1; default http://127.0.0.1:8000",
    )  # fmt: skip
    server.add_argument("--model", help="served name; default: the server's only one")
    server.add_argument("--api-key", "--api_key", help="default $VLLM_API_KEY, else $OPENAI_API_KEY")
    server.add_argument("--timeout", type=float, default=600.0, help="longest silence in seconds; default 600")
    server.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto",
        help="of the rows on the wire (old servers want their own); default auto: as compressed",
    )  # fmt: skip
    request = parser.add_argument_group("request")
    request.add_argument("--api", choices=("completions", "chat"), default="completions", help="default completions")
    request.add_argument("--instruction", help="text after the rows; --api chat only")
    request.add_argument("--max-tokens", "--max_tokens", type=_positive, default=512, help="new tokens; default 512")
    request.add_argument("--temperature", type=float, default=0.0, help="default 0: greedy")
    request.add_argument("--top-p", "--top_p", type=float, help="default: the server's")
    request.add_argument("--top-k", "--top_k", type=int, help="default: the server's")
    request.add_argument("--seed", type=int, help="of the sampling; default: the server's")
    request.add_argument("--stream", action="store_true", help="print the answer as it arrives")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, when the answer is complete")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    if args.instruction and args.api != "chat":
        raise ConfigError("--instruction needs --api chat: a completions prompt is the rows alone")
    import torch

    from utils.client.server_client import VllmClient
    from utils.compress.prompt_embeds import load_prompt_embeds

    values_TD = load_prompt_embeds(args.embedding_file).values_TD
    num_rows = len(values_TD)
    if args.max_prompt_rows is not None and args.max_prompt_rows < num_rows:
        values_TD = values_TD[: args.max_prompt_rows]
        logger.warning("sending the first %d of %d rows (--max-prompt-rows)", len(values_TD), num_rows)
    client = VllmClient(
        args.server_url, model=args.model, api_key=args.api_key, timeout_s=args.timeout,
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
    )  # fmt: skip
    completion = asyncio.run(_ask(client, values_TD, args))
    if args.json:
        sent = {"embedding_file": args.embedding_file, "file_rows": num_rows, "sent_rows": len(values_TD)}
        print_json({"model": client.model, **sent, **asdict(completion)})
    else:
        sys.stdout.write("\n" if args.stream else completion.text + "\n")
        sys.stdout.flush()
        logger.info(_summary(completion))
    return EXIT_OK


async def _ask(client: VllmClient, values_TD: torch.Tensor, args: argparse.Namespace) -> Completion:
    fields: dict[str, Any] = {
        "max_tokens": args.max_tokens, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k,
        "seed": args.seed,
    }  # fmt: skip
    on_text = None
    if args.stream:
        on_text = (lambda text: None) if args.json else _print_piece
    async with client:
        await client.preflight(width=values_TD.shape[1])
        if args.api == "completions":
            return await client.complete(values_TD, on_text=on_text, **fields)
        content = [client.embeds_part(values_TD)]
        if args.instruction:
            content.append({"type": "text", "text": args.instruction})
        return await client.chat([{"role": "user", "content": content}], on_text=on_text, **fields)


def _print_piece(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _summary(completion: Completion) -> str:
    def count(number: int | None) -> str:
        return "?" if number is None else str(number)

    parts = [f"{count(completion.prompt_tokens)} prompt rows"]
    if completion.cached_tokens:
        parts[0] += f" ({completion.cached_tokens} from the server's prefix cache)"
    parts.append(f"{count(completion.completion_tokens)} new tokens")
    if completion.first_text_s is not None:
        parts.append(f"first text after {completion.first_text_s:.2f} s")
    parts.append(f"{completion.total_s:.2f} s in all")
    return f"{', '.join(parts)} (finished: {completion.finish_reason})"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


if __name__ == "__main__":
    raise SystemExit(main())
