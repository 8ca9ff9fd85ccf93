"""Start the gateway: an OpenAI-compatible server that compresses marked memory on its way to a vLLM server.

python -m utils.serving.gateway --backend-url http://127.0.0.1:8000 --port 8080
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
from typing import Any

from utils.cli import EXIT_OK, make_parser, run_command
from utils.errors import ConfigError
from utils.inference.flags import (
    add_cache_flags,
    add_checkpoint_flags,
    add_memory_limit_flags,
    memory_limit,
    open_cache,
)

logger = logging.getLogger(__name__)

KEY_VARIABLE = "CODE_LLAVA_GATEWAY_KEY"
# How long running answers may take to finish after SIGTERM.
_SHUTDOWN_S = 60
_BACKEND_URL = "http://127.0.0.1:8000"


def build_parser() -> argparse.ArgumentParser:
    """Flags of `python -m utils.serving.gateway`."""
    parser = make_parser(
        "Serve an OpenAI-compatible API that compresses the memory in prompts for a vLLM server behind it.",
        examples="""\
  vllm serve checkpoints/code-llava-smollm2/llm --served-model-name code-llava --enable-prompt-embeds
  python -m utils.serving.gateway --backend-url http://127.0.0.1:8000
  python -m utils.serving.gateway --backend local      # no server needed; a page at http://127.0.0.1:8080/
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "code-llava",
    "messages": [{"role": "user", "content": "What is this? <|memory_start|>def f(): …<|memory_end|>"}]}'""",
        prog="python -m utils.serving.gateway",
    )
    add_checkpoint_flags(parser, path_flags=("--checkpoint", "--model-path"))
    add_memory_limit_flags(parser)
    add_cache_flags(parser)
    backend = parser.add_argument_group("backend")
    backend.add_argument(
        "--backend", choices=("vllm", "local"), default="vllm",
        help="a vLLM server, or the checkpoint's decoder in this process, one request at a time; default vllm",
    )  # fmt: skip
    backend.add_argument("--backend-url", help=f"vLLM server; default {_BACKEND_URL}")
    backend.add_argument("--backend-key", help="its key; default $VLLM_API_KEY, else $OPENAI_API_KEY")
    backend.add_argument("--timeout", type=float, default=600.0, help="its longest silence in seconds; default 600")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1")
    server.add_argument("--port", type=int, default=8080, help="default 8080")
    server.add_argument(
        "--api-key", action="append", metavar="KEY",
        help="key that clients must send; give it again for another client, whose memories and cache entries are "
        f"apart; default ${KEY_VARIABLE} (several with commas), else none",
    )  # fmt: skip
    server.add_argument(
        "--on-error", choices=("fail", "plain-text"), default="fail",
        help="when the encoder fails: refuse, or send the memory as text and say so; default fail",
    )  # fmt: skip
    server.add_argument("--max-body-mb", type=int, default=64, help="longest request body in MiB; default 64")
    server.add_argument("--max-spans", type=int, default=1024, help="most memory spans of a request; default 1024")
    server.add_argument("--max-waiting", type=int, default=256, help="requests waiting for the encoder; default 256")
    server.add_argument(
        "--max-batch-tokens", type=int, default=32768, help="memory tokens of requests encoded together; default 32768"
    )
    server.add_argument(
        "--memory-ttl", type=float, default=86400.0,
        help="how long a stored text is kept after its last use, in seconds; default 86400, a day",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_command(build_parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    import uvicorn

    from utils.inference.compressor import Compressor
    from utils.serving.app import create_app
    from utils.serving.backend_check import check_backend
    from utils.serving.local_backend import LOCAL_URL, LocalBackend
    from utils.serving.local_decoder import LocalDecoder
    from utils.serving.settings import GatewaySettings, read_keys

    for flag in ("max_body_mb", "max_spans", "max_waiting", "max_batch_tokens"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    if args.backend == "local" and args.backend_url:
        raise ConfigError("--backend local answers in this process: leave --backend-url out")
    settings = GatewaySettings(
        backend_url=LOCAL_URL if args.backend == "local" else args.backend_url or _BACKEND_URL,
        backend_key=args.backend_key,
        api_keys=read_keys(args.api_key, os.environ.get(KEY_VARIABLE), KEY_VARIABLE),
        on_error=args.on_error,
        max_body_bytes=args.max_body_mb << 20,
        max_spans=args.max_spans,
        max_waiting=args.max_waiting,
        max_batch_tokens=args.max_batch_tokens,
        memory_ttl_s=args.memory_ttl,
        timeout_s=args.timeout,
    )
    weights: dict[str, Any] = {
        "device": args.device, "dtype": args.dtype, "attn_implementation": args.attn_implementation,
    }  # fmt: skip
    cache = open_cache(args)
    try:
        compressor = Compressor.load(
            args.checkpoint, chunk_size=args.chunk_size, batch_tokens=args.batch_tokens, limit=memory_limit(args),
            cache=cache, **weights,
        )  # fmt: skip
        backend = None
        if args.backend == "local":
            backend = LocalBackend(LocalDecoder.load(compressor.files, **weights), args.max_waiting)
        else:
            asyncio.run(check_backend(settings, compressor.width))
        logger.info("gateway on http://%s:%d in front of %s", args.host, args.port, settings.backend_url)
        config = uvicorn.Config(
            create_app(settings, compressor, backend), host=args.host, port=args.port, log_level="warning",
            timeout_graceful_shutdown=_SHUTDOWN_S,
        )  # fmt: skip
        # What was loaded stays: the collector need not go through it for each long body, while nothing else runs.
        gc.collect()
        gc.freeze()
        uvicorn.Server(config).run()
    finally:
        if cache is not None:
            cache.close()
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
